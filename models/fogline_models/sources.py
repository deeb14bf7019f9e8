"""What a release is made from: a torch module, a Hugging Face model, or an ONNX file as it is.

Each becomes a folder that the rest of a build works on and that knows nothing of its origin:

    fp32.onnx            checked against what it was made from
    golden.npz           input.* and output.* of the self-test: the origin's own answers
    exported.json        what is to be said of it, see ``Exported``
    files/...            what the bundle has to carry besides, a tokenizer for instance
    prepared/<split>.npz the splits, where the origin's pre-processing makes inputs of raw ones
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fogline_models import archive, data, graph, hooks
from fogline_models.data import Items
from fogline_models.errors import BadInput, require
from fogline_models.export import export
from fogline_models.recipe import Recipe, ReleaseRecipe, Source
from fogline_models.session import Session
from fogline_models.steps import Say, paced
from fogline_protocol.release import Processing
from fogline_protocol.tensors import Array, TensorError, TensorSpec, datatype_of

GOLDEN = "golden.npz"
FP32 = "fp32.onnx"
RECORD = "exported.json"
FILES = "files"
PREPARED = "prepared"

Splits = Mapping[str, Items]


@dataclass(frozen=True, slots=True)
class Exported:
    """What is known of a folder that a source made."""

    origin: str  # "torch", "huggingface", "onnx"
    parameters: int | None = None  # numbers that it has learned
    pre_processing: tuple[Processing, ...] = ()
    post_processing: tuple[Processing, ...] = ()
    labels: tuple[str, ...] = ()  # of the origin itself; empty: the recipe's
    facts: Mapping[str, str] = field(default_factory=dict)  # further ones, for the report
    # How far open axes of the graph go, by their names in it, which may not be the recipe's.
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write it into the folder."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Exported":
        """Read it from a folder that a step has vouched for."""
        document = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        for key in ("pre_processing", "post_processing"):
            document[key] = tuple(
                Processing(step["kind"], tuple(step["files"]), step["parameters"])
                for step in document[key]
            )
        document["labels"] = tuple(document["labels"])
        document["bounds"] = {name: tuple(pair) for name, pair in document["bounds"].items()}
        return cls(**document)


def props(recipe: Recipe, release: ReleaseRecipe, variant: str) -> dict[str, str]:
    """Return the metadata that every file carries: where it comes from, and no times or paths."""
    return {
        "fogline.family": recipe.family,
        "fogline.model": release.model,
        "fogline.version": release.version,
        "fogline.variant": variant,
    }


def make(recipe: Recipe, release: ReleaseRecipe, splits: Splits, into: Path, say: Say) -> None:
    """Make the folder of a release.

    Raises:
        BadInput: the source is not usable; says what to do.
        MissingExtra: a package that the source needs is not installed.
    """
    source = release.source
    if source.torch:
        _from_torch(recipe, release, splits, into, say)
    elif source.huggingface:
        from fogline_models import huggingface

        huggingface.make(recipe, release, splits, into, say)
    else:
        _from_onnx(recipe, release, splits, into)


def _from_torch(
    recipe: Recipe, release: ReleaseRecipe, splits: Splits, into: Path, say: Say
) -> None:
    require("torch", "onnx", "onnxscript", extra="models")
    import torch

    source = release.source
    hook = hooks.load(recipe.folder, source.torch, "source.torch", passed=("splits", "progress"))
    module = hook(splits, paced(say), **source.arguments)
    if not isinstance(module, torch.nn.Module):
        hint = ""
        if isinstance(module, Mapping):
            hint = ": make the module, load these weights with load_state_dict, and return it"
        raise BadInput(
            f"export: {source.torch} returned {type(module).__name__}, expected a torch module{hint}"
        )
    say("exporting")
    examples = _as_forward_takes_them(module, splits["self_test"].inputs)
    answers = export(
        module,
        foreseen(examples, source),
        tuple(TensorSpec(name, "FP32", (-1,)) for name in source.outputs),  # only their names
        examples,
        release.max_batch,
        props(recipe, release, "fp32"),
        into / FP32,
        dynamic=source.dynamic,
    )
    save_golden(into, examples, answers)
    Exported("torch", sum(part.numel() for part in module.parameters())).save(into)


def _as_forward_takes_them(module: Any, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return the inputs in the order of ``forward``'s parameters, which are named as they are.

    A split has its inputs by name and in no order, and torch's exporter goes by position: two
    inputs of one shape would be taken for each other, by the file as by what it is compared with.

    Raises:
        BadInput: there are several, and ``forward`` names others.
    """
    if len(inputs) == 1:
        return inputs
    parameters = list(inspect.signature(module.forward).parameters)
    names = parameters[: len(inputs)]
    if set(names) != set(inputs):
        raise BadInput(
            f"export: forward({', '.join(parameters)}) must name its first parameters as the "
            f"inputs of the data are named, {', '.join(inputs)}: so none is taken for another"
        )
    return {name: inputs[name] for name in names}


def _from_onnx(recipe: Recipe, release: ReleaseRecipe, splits: Splits, into: Path) -> None:
    require("onnx", extra="models")
    source = release.source
    assert source.onnx is not None
    examples = splits["self_test"].inputs
    found = graph.adopt(
        recipe.folder / source.onnx,
        props(recipe, release, "fp32"),
        into / FP32,
        dynamic=source.dynamic,
        examples=examples,
    )
    if not found.batched:
        if graph.first_axes(found) != {1}:
            raise BadInput(
                f"export: {source.onnx} has no open batch axis and does not take one item at a "
                "time: open the first axis of all inputs and outputs, for instance with "
                "onnx.tools.update_model_dims"
            )
        examples = {name: array[:1] for name, array in examples.items()}  # the vectors are one run
    answers = Session(into / FP32).run(examples, release.max_batch or 1)
    save_golden(into, examples, answers)
    bounds = {n: (low, high) for axes in found.dynamic.values() for n, low, high in axes.values()}
    Exported("onnx", bounds=bounds).save(into)


def signature(folder: Path, source: Source) -> graph.Signature:
    """Return what the file in a source's folder takes and gives."""
    bounds = {**_bounds(source), **Exported.read(folder).bounds}
    return graph.signature(graph.load(folder / FP32, step="bundle"), bounds, step="bundle")


def extras(folder: Path) -> dict[str, bytes]:
    """Return the further files that a bundle carries, by name."""
    root = folder / FILES
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _bounds(source: Source) -> dict[str, tuple[int, int]]:
    return {n: (low, high) for axes in source.dynamic.values() for n, low, high in axes.values()}


def save_golden(into: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Write the self-test vectors of a source's folder."""
    arrays = {f"{data.INPUT}{name}": array for name, array in inputs.items()}
    arrays |= {f"output.{name}": array for name, array in outputs.items()}
    archive.save(into / GOLDEN, arrays)


def foreseen(inputs: Mapping[str, Array], source: Source) -> tuple[TensorSpec, ...]:
    """Return what a torch module that is given these inputs will be said to take.

    Raises:
        BadInput: one is of a type that requests cannot carry.
    """

    def shape(name: str, array: Array) -> tuple[int, ...]:
        open_axes = source.dynamic.get(name, {})
        return (-1, *(-1 if at in open_axes else n for at, n in enumerate(array.shape[1:], 1)))

    def datatype(name: str, array: Array) -> str:
        try:
            return datatype_of(array)
        except TensorError as error:
            raise BadInput(f"export: {data.INPUT}{name}: {error}") from None

    return tuple(
        TensorSpec(name, datatype(name, array), shape(name, array))
        for name, array in inputs.items()
    )
