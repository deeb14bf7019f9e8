"""Exports a torch module to an ONNX file that depends on nothing but the module.

The exporter leaves absolute source paths in every node, does not notice a module in train
mode, may quietly answer with another opset (model-workshop 3), and as quietly fixes an axis
that was to stay open; all of it is dealt with here and in ``graph.py``. Whatever is written
passed ONNX's checker and was compared with torch, on the given inputs and on random ones of
other sizes.
"""

import ast
import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models import graph
from fogline_models.errors import BadInput
from fogline_models.graph import Dimension, Dynamic
from fogline_models.session import ALL_ROWS, Session
from fogline_protocol.tensors import Array, TensorSpec

STEP = "export"
OPSET = 20
MAX_RELATIVE_DIFFERENCE = 1e-4  # to torch, of the largest output; measured: 3e-8 to 1e-6
BATCH = "batch"
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the module of a node


def export(
    module: Any,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    examples: Mapping[str, Array],
    max_batch: int,
    props: Mapping[str, str],
    path: Path,
    *,
    dynamic: Dynamic | None = None,
) -> dict[str, Array]:
    """Write ``module`` to ``path`` and return torch's own outputs for ``examples``.

    ``module`` takes the inputs in order and returns one tensor per output; every tensor has
    the batch dimension first, which stays variable up to ``max_batch``. ``dynamic`` names what
    else varies, and how far: ``{"tokens": {1: ("sequence", 1, 128)}}``; axes of one name are
    of one size.

    Raises:
        BadInput: the module is in train mode, uses what ONNX does not have, ties an open axis
            to one size, is not exported with the opset asked for, or the file computes
            something else than torch; or the examples are not what it is said to take.
    """
    import torch

    _check_eval(module)
    _check_exportable(module)
    asked = graph.Signature(inputs, outputs, batched=True, dynamic=dynamic or {})
    graph.check_inputs(asked, examples, step=STEP, what="the examples")
    arguments = tuple(torch.from_numpy(examples[spec.name]) for spec in inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=_shapes(asked, max_batch),
            )
    except torch.onnx.OnnxExporterError as error:
        raise BadInput(f"{STEP}: {_reason(error)}") from None
    if program is None:
        raise BadInput(f"{STEP}: the exporter returned nothing for this module")
    staged = path.with_name(f".{path.name}.staged")
    try:
        model = program.model_proto  # made anew by every access
        _name_by_module(model)
        graph.finish(model, props, staged, opset=OPSET, step=STEP)
        _check_open(model, asked)
        session = Session(staged)
        expected = _torch(module, asked, examples)
        for name, array in expected.items():
            if not np.isfinite(array).all():
                raise BadInput(f"{STEP}: torch's output {name!r} is not finite on the examples")
        compare(session.run(examples, max_batch), expected, "the examples")
        for what, drawn in _draw(asked, examples, max_batch):
            _compare_drawn(session, module, asked, drawn, what)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return expected


def _check_eval(module: Any) -> None:
    """Refuse what is in train mode, at the top or below: a part replaced later forgets ``eval``."""
    if module.training:
        raise BadInput(f"{STEP}: the module is in train mode, call .eval() first")
    for name, part in module.named_modules():
        if part.training:
            raise BadInput(
                f"{STEP}: {name} ({type(part).__name__}), a part of the module, is in train mode: "
                "call .eval() on the whole module last, before it is returned"
            )


def _check_exportable(module: Any) -> None:
    """Refuse what torch would only refuse in words that do not say what to do."""
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        raise BadInput(
            f"{STEP}: torch cannot export TorchScript, what torch.jit made: return the module that "
            "was scripted or traced, or give an ONNX file of it as source.onnx"
        )
    for name, weight in module.named_parameters():
        if weight.dtype in (torch.float16, torch.bfloat16):
            raise BadInput(
                f"{STEP}: {name} is {str(weight.dtype).removeprefix('torch.')}: return the module "
                "in float32, .float(); which precision a device runs is decided by the variants"
            )


def _name_by_module(model: Any) -> None:
    """Put its module in front of the name of every node, as in ``front_end/node_Conv_71``.

    So a recipe can say which part of a module it means, and a sweep which layer it found.
    """
    for node in model.graph.node:
        noted = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(noted.get(NAME_SCOPES, "[]"))  # from the outside in, itself last
        if len(scopes) > 1 and scopes[-2]:
            node.name = f"{scopes[-2]}/{node.name}"


def _shapes(asked: graph.Signature, max_batch: int) -> tuple[dict[int, Any], ...]:
    """Return what varies in every input, in torch's words."""
    import torch

    dimensions: dict[Dimension, Any] = {}

    def dimension(which: Dimension) -> Any:
        name, least, most = which
        return dimensions.setdefault(which, torch.export.Dim(name, min=least, max=most))

    return tuple(
        {
            axis: dimension(which)
            for axis, which in {
                0: (BATCH, 1, max_batch),
                **asked.dynamic.get(spec.name, {}),
            }.items()
        }
        for spec in asked.inputs
    )


def _torch(module: Any, asked: graph.Signature, given: Mapping[str, Array]) -> dict[str, Array]:
    import torch

    with torch.no_grad():
        results = module(*(torch.from_numpy(given[spec.name]) for spec in asked.inputs))
    results = tuple(results) if isinstance(results, tuple | list) else (results,)
    for result in results:
        if not isinstance(result, torch.Tensor):
            raise BadInput(
                f"{STEP}: the module returns {type(result).__name__}, not tensors: wrap it in a "
                "module whose forward returns a tensor or a tuple of tensors, such as "
                "net(x)['logits'], and name them in source.outputs"
            )
    if len(results) != len(asked.outputs):
        raise BadInput(
            f"{STEP}: the module returns {len(results)} tensors, {len(asked.outputs)} outputs "
            f"are named: {', '.join(spec.name for spec in asked.outputs)}"
        )
    return {spec.name: result.numpy() for spec, result in zip(asked.outputs, results, strict=True)}


def _check_open(model: Any, asked: graph.Signature) -> None:
    """Check that the file has every axis open that was asked for: the exporter only logs it."""
    found = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    for spec in asked.inputs:
        for axis in (0, *asked.dynamic.get(spec.name, {})):
            size = found[spec.name][axis]
            if not size.dim_param:
                name = BATCH if axis == 0 else asked.dynamic[spec.name][axis][0]
                raise BadInput(
                    f"{STEP}: axis {axis} ({name}) of input {spec.name!r} came out fixed at "
                    f"{size.dim_value}: the module depends on the size of its example, take it "
                    "from tensor.shape instead"
                )


def _draw(
    asked: graph.Signature, examples: Mapping[str, Array], max_batch: int
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield inputs and what they are: random ones like the examples, of other sizes; nothing.

    Nothing, which is silence or a black image, because the exporter takes adding less than 1e-8
    for adding 0 and drops it: log(x + 1e-9) is then -inf where torch's is a number.
    """
    rng = np.random.default_rng(0)
    for rows, stretch in ((1, 0.5), (min(max_batch, 3), 1.5)):
        sizes: dict[str, int] = {}
        drawn: dict[str, Array] = {}
        for spec in asked.inputs:
            example = examples[spec.name]
            shape = [rows, *example.shape[1:]]
            for axis, (name, least, most) in asked.dynamic.get(spec.name, {}).items():
                fitting = min(most, max(least, round(example.shape[axis] * stretch)))
                shape[axis] = sizes.setdefault(name, fitting)
            if example.dtype.kind == "f":
                noise = rng.standard_normal(shape) * float(example.std()) + float(example.mean())
                drawn[spec.name] = noise.astype(example.dtype)
            else:  # an index must index something: only values that the examples have
                drawn[spec.name] = rng.choice(example.ravel(), shape)
        yield "random inputs", drawn
    yield "inputs of zeros", {name: np.zeros_like(array[:1]) for name, array in drawn.items()}


def _compare_drawn(
    session: Session, module: Any, asked: graph.Signature, drawn: Mapping[str, Array], what: str
) -> None:
    sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in drawn.items())
    try:
        want = _torch(module, asked, drawn)
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadInput(
            f"{STEP}: the module itself fails on inputs of shape {sizes}: "
            f"{str(error).splitlines()[0]}: it depends on the size of its example"
        ) from None
    try:
        found = session.run(drawn, ALL_ROWS)
    except BadInput as error:
        raise BadInput(
            f"{STEP}: the module answers inputs of shape {sizes}, the file does not: {error}"
        ) from None
    compare(found, want, f"{what} of shape {sizes}")


def compare(found: Mapping[str, Array], expected: Mapping[str, Array], what: str) -> None:
    """Check that a file's outputs are torch's, to within 1e-4 of the largest value.

    Raises:
        BadInput: one is not; it is named, with ``what`` the inputs were.
    """
    for name, want in expected.items():
        if want.shape != found[name].shape:
            raise BadInput(
                f"{STEP}: output {name!r} has shape {list(found[name].shape)} on {what}, torch's "
                f"has {list(want.shape)}"
            )
        meant = np.isfinite(want)  # random inputs may be ones that torch itself cannot answer
        if not meant.any():
            continue
        gap = np.abs(found[name][meant].astype(np.float64) - want[meant])
        difference = float(gap.max() / max(np.abs(want[meant]).max(), 1e-12))
        if not difference <= MAX_RELATIVE_DIFFERENCE:
            raise BadInput(
                f"{STEP}: output {name!r} differs from torch by {difference:.1e} of its largest "
                f"value on {what}, at most {MAX_RELATIVE_DIFFERENCE:.0e} is accepted"
            )


def _reason(error: BaseException) -> str:
    """Return one sentence for the exporter's refusal, whose own text is a page long."""
    text = str(error)
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        return (
            f"the module uses {found[1]}, which torch cannot write in ONNX opset {OPSET}: "
            "replace it by operators that ONNX has"
        )
    cause = error.__cause__ or error
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if "data-dependent" in text:
        return (
            f"the module branches on the values of a tensor ({first}): write it with torch.where "
            "or torch.cond"
        )
    return f"torch cannot export the module: {first}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch says about itself: torchvision's absence, its own deprecations.

    What went wrong comes as an exception, or is found out by comparing.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),  # what it could not trace, it prints
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
