"""Makes a release from a folder that transformers wrote: weights, config, tokenizer or processor.

    folder ─► load ─► optimum ─► fold image pre-processing ─► strip ─► compare with torch
                │                and pooling of sentences                on real and random inputs
                └ tokenizer ─► files/tokenizer.json ─► prepared/<split>.npz of raw.text

The folder lies beside the recipe, or a function of the recipe trains and writes it. Nothing is
downloaded and no code of the folder is run. A net whose head is not in the folder would come out
with a random one, so it is refused.

A token classifier answers for every token of a text, padding among them. Which tokens count says its
attention mask; special tokens and inner pieces of words are within it, though transformers leaves
them without a label. A net that was not taught what to say of them says anything, edge and hub then
differ there, and texts escalate for it: train them as a class, as ``label_all_tokens`` does.

optimum and transformers are imported on use, here and in ``preprocess.py``.
"""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models import data, graph, hooks, pooling, preprocess
from fogline_models.errors import BadInput, require
from fogline_models.export import compare
from fogline_models.pooling import Pooling
from fogline_models.preprocess import OPSET, Preprocessing
from fogline_models.recipe import Recipe, ReleaseRecipe, Source
from fogline_models.session import ALL_ROWS, Session
from fogline_models.sources import (
    FILES,
    FP32,
    PREPARED,
    Exported,
    Splits,
    props,
    save_golden,
)
from fogline_models.steps import Say, paced
from fogline_protocol.answers import ATTENTION_MASK
from fogline_protocol.tensors import Array

STEP = "export"
TASKS = (
    "text-classification",
    "token-classification",
    "image-classification",
    "feature-extraction",
)
SEEN = ("training", "ranges", "self_test", "examples")  # by a function that trains
EXAMPLE_TOKENS = 16
MUCH_PADDING = 2  # times the tokens of the longest text: worth a word
UNNAMED = "LABEL_"  # how transformers calls classes that nobody named


def make(recipe: Recipe, release: ReleaseRecipe, splits: Splits, into: Path, say: Say) -> None:
    """Make the folder of a release from a Hugging Face model.

    Raises:
        BadInput: the folder is not usable, or not for the recipe's task and labels, or the file
            computes something else than torch; says what to do.
        MissingExtra: a package of the extra ``hf`` is not installed.
    """
    require("torch", "onnx", "optimum", "transformers", extra="hf")
    require("optimum.onnxruntime", extra="hf")
    if recipe.task not in TASKS:
        raise BadInput(
            f"{STEP}: {recipe.task} cannot be taken from a Hugging Face folder, only "
            f"{', '.join(TASKS)} can: give the model as a torch module or an ONNX file"
        )
    with _folder(recipe, release, splits, say) as folder:
        say("exporting")
        with _quiet():
            net = _load(folder, recipe.task)
            labels = _labels(net.config, recipe)
            model = _exported(net, recipe.task, folder)
            pooled = _pooling(folder, recipe, release)
            if pooled is not None:
                pooled.fold(model, keep_tokens=pooling.HIDDEN in release.source.outputs)
            most = None if pooled is None else pooled.max_tokens
            front = _preprocessing(folder, net.config, model, release, splits, into, most)
        examples = front.prepare(splits["self_test"])
        front.fold(model)
        _close(model, examples, front.bounds)
        _order(model, release.source.outputs)
        graph.finish(model, props(recipe, release, "fp32"), into / FP32, opset=OPSET)
        signature = graph.signature(model, front.bounds, step=STEP)
        graph.check_inputs(signature, examples, step=STEP, what="the self-test")
        answers = _checked(net, pooled, signature, front, examples, into / FP32, release.max_batch)
        save_golden(into, examples, answers)
        longest = _prepare(splits, front, into / PREPARED, say)
        length = front.bounds.get(preprocess.SEQUENCE, (0, 0))[1]
        if 0 < longest <= length / MUCH_PADDING:
            say(
                f"texts are padded to {length} tokens, the longest here has {longest}: answers get "
                f"cheaper with source.dynamic = {{ input_ids = {{ 1 = "
                f'["{preprocess.SEQUENCE}", 1, {longest}] }} }}, and longer texts are cut'
            )
        Exported(
            "huggingface",
            sum(part.numel() for part in net.parameters()),
            front.steps,
            labels=labels,
            facts={
                "architecture": type(net).__name__,
                "model_type": net.config.model_type,
                **({} if pooled is None else {"pooling": str(pooled)}),
            },
            bounds=front.bounds,
        ).save(into)


def quantize_dynamic(
    model: Path,
    target: Path,
    *,
    operators: Collection[str],
    exclude: Collection[str],
    per_channel: bool,
    reduce_range: bool,
) -> None:
    """Write ``model`` with dynamic int8 to ``target``, through optimum's quantizer.

    Unlike onnxruntime's own entry it would also quantize products of two activations, as in
    attention, which costs time and gains no bytes: they are excluded here.

    Raises:
        MissingExtra: a package of the extra ``hf`` is not installed.
    """
    require("onnx", "optimum", "transformers", extra="hf")
    require("optimum.onnxruntime", extra="hf")
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        from onnxruntime.quantization import QuantFormat, QuantizationMode, QuantType
        from optimum.onnxruntime import ORTQuantizer, QuantizationConfig

        how = QuantizationConfig(
            is_static=False,
            format=QuantFormat.QOperator,
            mode=QuantizationMode.IntegerOps,
            activations_dtype=QuantType.QUInt8,
            weights_dtype=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=reduce_range,
            operators_to_quantize=list(operators),
            nodes_to_exclude=sorted({*exclude, *_products(graph.load(model, step="quantize"))}),
        )
        ORTQuantizer(model).quantize(how, save_dir=folder, file_suffix=None)
        os.replace(Path(folder) / model.name, target)


def _products(model: Any) -> Iterator[str]:
    """Yield the names of the nodes that multiply two activations."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] not in weights:
            yield node.name


@contextlib.contextmanager
def _folder(recipe: Recipe, release: ReleaseRecipe, splits: Splits, say: Say) -> Iterator[Path]:
    """Yield the model's folder: the one beside the recipe, or one that its function wrote."""
    named = release.source.huggingface
    key = f"release {release.title}: source.huggingface"
    if not hooks.is_function(named):
        folder = recipe.folder / named
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"{key}: there is no folder {folder} with a config.json. Nothing is downloaded "
                f"in a build: fetch a model of the Hugging Face hub first, with `hf download "
                f"{named} --local-dir DIR`, and name the folder"
            )
        yield folder
        return
    hook = hooks.load(recipe.folder, named, key, passed=("splits", "progress", "into"))
    with tempfile.TemporaryDirectory() as place:
        seen = {name: items for name, items in splits.items() if name in SEEN}
        hook(seen, paced(say), Path(place), **release.source.arguments)
        if not (Path(place) / "config.json").is_file():
            raise BadInput(f"{key}: {named} wrote no config.json: call save_pretrained(into)")
        yield Path(place)


def _load(folder: Path, task: str) -> Any:
    """Return the net in eval mode, float32, with every weight from the folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from optimum.exporters.onnx import model_configs  # noqa: F401 - fills the manager's tables
    from optimum.exporters.tasks import TasksManager
    from safetensors import SafetensorError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        supported = TasksManager.get_supported_tasks_for_model_type(
            config.model_type, "onnx", library_name="transformers"
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{STEP}: {folder}: {_first_line(error)}") from None
    if task not in supported:
        raise BadInput(
            f"{STEP}: optimum cannot export a {config.model_type} model for {task}, only for "
            f"{', '.join(sorted(supported))}"
        )
    loader = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
    try:
        net, told = loader.from_pretrained(
            str(folder), config=config, local_files_only=True, output_loading_info=True,
            torch_dtype="float32",
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{STEP}: {folder}: {_first_line(error)}") from None
    lacking = [
        name
        for name in sorted(told["missing_keys"])
        if task != "feature-extraction" or "pooler" not in name  # which is not exported
    ]
    if lacking:
        raise BadInput(
            f"{STEP}: {folder} lacks weights that {task} needs, {lacking[0]} for instance "
            f"(its config says {', '.join(config.architectures or ['nothing'])}): they would be "
            "random; train the model for this task first"
        )
    net.eval()
    return net


def _labels(config: Any, recipe: Recipe) -> tuple[str, ...]:
    """Return the model's class names; none if nobody named them, or if it has no classes."""
    if recipe.task == "feature-extraction":
        return ()
    found = tuple(config.id2label[number] for number in sorted(config.id2label))
    unnamed = all(name.startswith(UNNAMED) for name in found)
    if recipe.labels and len(found) != len(recipe.labels):
        raise BadInput(
            f"{STEP}: the model tells {len(found)} classes apart, the recipe names "
            f"{len(recipe.labels)} labels"
        )
    if recipe.labels and not unnamed and found != recipe.labels:
        at = next(n for n, name in enumerate(found) if name != recipe.labels[n])
        raise BadInput(
            f"{STEP}: class {at} is {found[at]!r} in the model's config and "
            f"{recipe.labels[at]!r} in the recipe: write the labels in the model's order"
        )
    return () if unnamed else found


def _exported(net: Any, task: str, folder: Path) -> Any:
    """Return what optimum makes of the net, as an ``onnx.ModelProto``."""
    import torch
    from optimum.exporters.error_utils import MinimumVersionError
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.utils.save_utils import maybe_load_preprocessors

    # optimum's example has 16 tokens, which a small net may not have positions for.
    positions = _positions_of(net.config)
    sizes = {} if positions is None else {"sequence_length": min(EXAMPLE_TOKENS, positions)}
    with tempfile.TemporaryDirectory() as place:
        try:
            onnx_export_from_model(
                net,
                place,
                opset=OPSET,
                task=task,
                preprocessors=maybe_load_preprocessors(str(folder)),
                do_validation=False,  # done here, on more inputs and with a bar
                **sizes,
            )
        except (
            ValueError,
            RuntimeError,
            MinimumVersionError,
            torch.onnx.OnnxExporterError,
        ) as error:
            raise BadInput(
                f"{STEP}: optimum cannot export this {net.config.model_type} model: "
                f"{_first_line(error)}"
            ) from None
        files = sorted(Path(place).glob("*.onnx"))
        if len(files) != 1:
            raise BadInput(
                f"{STEP}: optimum made {len(files)} files of this model, a release is one: export "
                "it yourself and give the file as source.onnx"
            )
        return graph.load(files[0], step=STEP)


def _pooling(folder: Path, recipe: Recipe, release: ReleaseRecipe) -> Pooling | None:
    """Return what makes one vector of a text's, if the folder says so and the recipe wants it."""
    if recipe.task != "feature-extraction":
        return None
    outputs = release.source.outputs
    if outputs != Source().outputs and pooling.EMBEDDING not in outputs:
        return None
    return pooling.read(folder)


def _preprocessing(
    folder: Path,
    config: Any,
    model: Any,
    release: ReleaseRecipe,
    splits: Splits,
    into: Path,
    most: int | None,
) -> Preprocessing:
    """Return what becomes of raw items: by what the splits hold and the net takes."""
    examples = splits["self_test"]
    names = [value.name for value in model.graph.input]
    if not examples.raw:
        bounds = _recipe_bounds(release)
        if preprocess.SEQUENCE not in bounds and "input_ids" in names:
            bounds = {**bounds, preprocess.SEQUENCE: (1, _positions(config, release))}
        return preprocess.none(bounds)
    if names == [preprocess.PIXELS]:
        return preprocess.image(folder, examples, into / FILES)
    lengths = [n for n in (_tokenizer_length(folder), most) if n is not None]
    length = _positions(config, release, min(lengths, default=None))
    return preprocess.text(folder, names, length, examples, into / FILES)


def _recipe_bounds(release: ReleaseRecipe) -> dict[str, tuple[int, int]]:
    dynamic = release.source.dynamic
    return {name: (low, high) for axes in dynamic.values() for name, low, high in axes.values()}


def _tokenizer_length(folder: Path) -> int | None:
    """Return how many tokens the tokenizer itself cuts texts to, or None if it does not say."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    length = get_tokenizer_config(str(folder), local_files_only=True).get("model_max_length")
    return int(length) if isinstance(length, int | float) and length < 1e6 else None


def _positions(config: Any, release: ReleaseRecipe, tokenizer: int | None = None) -> int:
    """Return the longest sequence: of the recipe, or of tokenizer and net, whichever is shorter."""
    asked = _recipe_bounds(release).get(preprocess.SEQUENCE)
    positions = _positions_of(config)
    known = [n for n in (tokenizer, positions) if n is not None]
    if asked is None and not known:
        raise BadInput(
            f"{STEP}: neither tokenizer nor config says how long a text may be: bound it in the "
            f'recipe, source.dynamic = {{ input_ids = {{ 1 = ["{preprocess.SEQUENCE}", 1, 128] }} }}'
        )
    length = min(known) if asked is None else asked[1]
    if positions is not None and positions < length:
        raise BadInput(
            f"{STEP}: the recipe allows {length} tokens, the net has {positions} positions"
        )
    return length


def _positions_of(config: Any) -> int | None:
    """Return how many tokens a net has positions for, or None if it does not count them."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    if "roberta" in config.model_type:  # whose positions begin behind that of padding
        return int(positions) - int(config.pad_token_id) - 1
    return int(positions)


def _close(model: Any, examples: Mapping[str, Array], bounds: Mapping[str, object]) -> None:
    """Fix every axis of an input that neither is the batch nor has bounds to the examples' size.

    optimum leaves height, width and channels of images open, which no net of them is.
    """
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        given = examples.get(value.name)
        if given is None or given.ndim != len(sizes):
            continue  # said when the examples are compared with the signature
        for axis, size in enumerate(sizes):
            if axis and size.dim_param and size.dim_param not in bounds:
                size.dim_value = given.shape[axis]


def _order(model: Any, asked: tuple[str, ...]) -> None:
    """Put the outputs that the recipe names first: the very first is what a release is judged by."""
    given = {value.name: value for value in model.graph.output}
    if asked == Source().outputs and not given.keys() & set(asked):
        return  # the recipe names none
    for name in asked:
        if name not in given:
            raise BadInput(
                f"{STEP}: the model has no output {name!r}, it gives {', '.join(given)}: correct "
                "source.outputs"
            )
    ordered = [given.pop(name) for name in asked]
    model.graph.ClearField("output")
    model.graph.output.extend([*ordered, *given.values()])


def _checked(
    net: Any,
    pooled: Pooling | None,
    signature: graph.Signature,
    front: Preprocessing,
    examples: Mapping[str, Array],
    file: Path,
    max_batch: int,
) -> dict[str, Array]:
    """Compare the file with torch and return torch's answers for the examples."""
    session = Session(file)
    names = [spec.name for spec in signature.outputs]
    answers = _torch(net, pooled, front.inner(examples), names)
    graph.check_finite(answers, step=STEP, what="torch")
    compare(session.run(examples, max_batch or ALL_ROWS), answers, "the self-test")
    for drawn in _draw(net.config, signature, examples, max_batch):
        expected = _torch(net, pooled, front.inner(drawn), names)
        compare(session.run(drawn, ALL_ROWS), expected, "random inputs")
    return answers


def _torch(
    net: Any, pooled: Pooling | None, tensors: Mapping[str, Array], names: Collection[str]
) -> dict[str, Array]:
    import torch

    parts: dict[str, list[Array]] = {name: [] for name in names}
    total = len(next(iter(tensors.values())))
    with torch.no_grad():
        for start in range(0, total, ROWS):
            rows = {
                name: torch.from_numpy(np.ascontiguousarray(array[start : start + ROWS]))
                for name, array in tensors.items()
            }
            try:
                found = net(**rows)
            except (IndexError, RuntimeError) as error:
                shapes = {name: list(array.shape) for name, array in tensors.items()}
                raise BadInput(
                    f"{STEP}: torch cannot run this model on inputs {shapes}: {_first_line(error)}"
                ) from None
            for name in names:
                if name == pooling.EMBEDDING and pooled is not None:
                    hidden = found[pooling.HIDDEN].numpy()
                    parts[name].append(pooled.apply(hidden, rows[ATTENTION_MASK].numpy()))
                else:
                    parts[name].append(found[name].numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


ROWS = 32  # that torch computes at once


def _draw(
    config: Any, signature: graph.Signature, examples: Mapping[str, Array], max_batch: int
) -> Iterator[dict[str, Array]]:
    """Yield random inputs: one row and a few, short sequences and the longest ones."""
    rng = np.random.default_rng(0)
    for rows, stretch in ((1, 0.0), (min(max_batch or 3, 3), 1.0), (min(max_batch or 2, 2), 0.4)):
        drawn: dict[str, Array] = {}
        lengths: Array | None = None
        for spec in signature.inputs:
            example = examples[spec.name]
            shape = [rows, *example.shape[1:]]
            for axis, (_, least, most) in signature.dynamic.get(spec.name, {}).items():
                shape[axis] = least + round(stretch * (most - least))
            if spec.name == ATTENTION_MASK:
                if lengths is None:
                    lengths = rng.integers(1, shape[1] + 1, (rows, 1))
                drawn[spec.name] = (np.arange(shape[1]) < lengths).astype(example.dtype)
            elif spec.name == "input_ids":
                drawn[spec.name] = rng.integers(0, config.vocab_size, shape).astype(example.dtype)
            elif example.dtype.kind in "iu":
                high = 255 if example.dtype == np.uint8 else int(example.max())
                drawn[spec.name] = rng.integers(0, high + 1, shape).astype(example.dtype)
            else:
                noise = rng.standard_normal(shape) * float(example.std()) + float(example.mean())
                drawn[spec.name] = noise.astype(example.dtype)
        yield drawn


def _prepare(splits: Splits, front: Preprocessing, into: Path, say: Say) -> int:
    """Write every split of raw items as what the file takes; return the longest text's tokens."""
    if not any(items.raw and not items.inputs for items in splits.values()):
        return 0
    longest = 0
    into.mkdir()
    for name, items in splits.items():
        say(f"preparing {name}, {len(items)} items")
        ready = items if items.inputs else replace(items, inputs=front.prepare(items), raw={})
        data.save(into / f"{name}.npz", ready)
        if ATTENTION_MASK in ready.inputs and len(ready):
            longest = max(longest, int(ready.inputs[ATTENTION_MASK].sum(axis=1).max()))
    return longest


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what optimum, transformers and torch say about themselves.

    Known: accelerate is absent (weights are not looked through for duplicates), ``torch_dtype``
    is deprecated, the exporter is the old one, the mask is traced. What goes wrong comes as an
    exception, or is found out by comparing.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
