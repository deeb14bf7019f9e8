"""What is done to an ONNX file, whoever made it: read it, take it in, strip it, check it, write it.

Tools leave traces in a graph: absolute source paths, time and place of the run, opsets nobody
uses, in subgraphs and functions as well as at the top. What ``finish`` writes depends on the
model alone: same model, same bytes, in one file.

    load       a file and its external data, or one sentence
    signature  what a graph says of its inputs and outputs, and which of them vary
    adopt      a model that somebody else made, as it is: at its own opset, run before it counts
    finish     strip, label, check, write: the last thing that happens to every file we make

Needs ``onnx``, which is imported on use.
"""

import heapq
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models.errors import BadInput, require
from fogline_models.session import ALL_ROWS, Session
from fogline_protocol.tensors import Array, TensorSpec, dtype_of

Dimension = tuple[str, int, int]  # its name, its smallest and its largest size
Dynamic = Mapping[str, Mapping[int, Dimension]]  # {input: {axis: dimension}}

DEFAULT_DOMAINS = ("", "ai.onnx")  # two spellings of one domain
UNNAMED = ("?", "None")  # what exporters write where an open axis has no name
MAX_BYTES = 2**31 - 1  # of one protobuf message: a larger model cannot be one file
EXAMPLE_ROWS = 2

# onnx.proto, TensorProto.DataType, by its number: onnx itself is not imported before a call.
DATATYPES: Mapping[int, str] = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64",
    8: "BYTES", 9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Signature:
    """What a graph takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool  # the first axis of every input and output is the batch
    dynamic: Dynamic  # what varies besides it


def load(path: Path, *, step: str) -> Any:
    """Return the ``onnx.ModelProto`` at ``path`` with its external data in memory.

    Raises:
        BadInput: there is no such file, it is no ONNX model, or what it refers to is missing;
            the message opens with ``step``.
        MissingExtra: onnx is not installed.
    """
    require("onnx", extra="models")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import external_data_helper

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BadInput(f"{step}: {path}: {error.strerror or error}") from None
    except DecodeError:
        raise BadInput(
            f"{step}: {path} is not an intact ONNX file: export or copy it again"
        ) from None
    if not model.graph.node or not model.opset_import:
        raise BadInput(f"{step}: {path} holds no graph: it is empty, cut off or no ONNX file")
    for tensor in _tensors(model):
        if external_data_helper.uses_external_data(tensor):
            _check_external(path, tensor, step)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise BadInput(
            f"{step}: {path}: its external data cannot be read: {_first_line(error)}"
        ) from None
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            # What exporters write for "open" where ONNX has nothing written. "?" twice does not
            # mean that both are of one size, as a name would. A 0 may also be meant, but a tensor
            # without values is of no use in a request, and many files have it for "open".
            unnamed = size.dim_param in UNNAMED
            if unnamed or (size.HasField("dim_value") and size.dim_value < 1):
                size.Clear()
    return model


def finish(
    model: Any,
    props: Mapping[str, str],
    path: Path,
    *,
    opset: int | None = None,
    step: str = "export",
) -> None:
    """Strip what tools left in an ``onnx.ModelProto``, add our metadata, check it, write it.

    Written whole or not at all, over an older file. With ``opset`` the model must have it.

    Raises:
        BadInput: the model breaks ONNX's rules, has another opset than the one asked for, is
            too large for one file, or cannot be written.
    """
    import onnx

    _strip(model)
    if opset is not None and opset_of(model) != opset:
        raise BadInput(f"{step}: asked for opset {opset}, the tool answered with {opset_of(model)}")
    onnx.helper.set_model_props(model, dict(sorted(props.items())))
    size = model.ByteSize()
    if size > MAX_BYTES:
        raise BadInput(
            f"{step}: {path.name} would have {size / 2**30:.1f} GiB, one ONNX file holds at most 2: "
            "give a smaller model"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadInput(f"{step}: {path.name} breaks ONNX's rules: {_first_line(error)}") from None
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(model.SerializeToString(deterministic=True))
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise BadInput(f"{step}: cannot write {path}: {error.strerror or error}") from None


def adopt(
    source: Path,
    props: Mapping[str, str],
    path: Path,
    *,
    dynamic: Dynamic | None = None,
    examples: Mapping[str, Array] | None = None,
) -> Signature:
    """Take in a model that somebody else made and write it to ``path``, as one stripped file.

    It keeps its own opset, if onnxruntime runs that. ``dynamic`` says how far its open axes go,
    those of the same name included; one that goes nowhere, ``("height", 48, 48)``, is fixed. It
    is run on ``examples``, or on random ones, before it counts.

    Raises:
        BadInput: the file is not usable, has a variable dimension without bounds, needs what
            this onnxruntime does not have, or answers with NaN or infinity.
    """
    step = "export"
    model = load(source, step=step)
    bounds = _bound(model, dynamic or {}, step)
    found = signature(model, bounds, step=step, examples=examples)
    staged = path.with_name(f".{path.name}.staged")
    try:
        finish(model, props, staged, step=step)
        inputs = examples or random_inputs(found, rows=EXAMPLE_ROWS)
        if examples and not found.batched and _fixed_rows(found) is None:
            shapes = {spec.name: spec.shape for spec in (*found.inputs, *found.outputs)}
            raise BadInput(f"{step}: {_without_rows(shapes)}")
        check_inputs(found, inputs, step=step, what="an example")
        try:
            session = Session(staged)
        except BadInput as error:
            raise BadInput(f"{step}: {str(error).replace(str(staged), str(source))}") from None
        for part in runs(found, inputs, rows=EXAMPLE_ROWS):
            check_finite(session.run(part, ALL_ROWS), step=step, what=str(source))
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return found


def opset_of(model: Any) -> int | None:
    """Return the version of ONNX's own operators that a model is written in."""
    for entry in model.opset_import:
        if entry.domain in DEFAULT_DOMAINS:
            return int(entry.version)
    return None


def _bound(model: Any, dynamic: Dynamic, step: str) -> dict[str, tuple[int, int]]:
    """Name or fix the axes that ``dynamic`` speaks of, and return how far each name goes."""
    values = {value.name: value for value in model.graph.input}
    batch = _part_batch(model, dynamic, step)
    taken = {
        *(size.dim_param for value in (*values.values(), *model.graph.output)
          for size in value.type.tensor_type.shape.dim),
        *(name for axes in dynamic.values() for name, _, _ in axes.values()),
    }  # fmt: skip
    bounds: dict[str, tuple[int, int]] = {}
    for tensor, axes in dynamic.items():
        if tensor not in values:
            raise BadInput(
                f"{step}: dynamic speaks of an input {tensor!r}, the model takes {', '.join(values)}"
            )
        found = _axes(values[tensor], step)
        for axis, (name, least, most) in axes.items():
            size = found[axis] if axis < len(found) else "absent"
            if axis >= len(found) or isinstance(size, int):
                raise BadInput(
                    f"{step}: axis {axis} of input {tensor!r} is {size} in the file: leave it out "
                    "of dynamic"
                )
            theirs = size or name
            if axis and theirs == batch:
                theirs = f"{tensor}{axis}"
                while theirs in taken:
                    theirs += "_"
                taken.add(theirs)
            if bounds.setdefault(theirs, (least, most)) != (least, most):
                raise BadInput(
                    f"{step}: axes named {theirs!r} are of one size, dynamic has them go from "
                    f"{bounds[theirs][0]} to {bounds[theirs][1]} and from {least} to {most}"
                )
            values[tensor].type.tensor_type.shape.dim[axis].dim_param = theirs
    for value in (*values.values(), *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            least, most = bounds.get(dimension.dim_param, (0, -1))
            if least == most:
                dimension.dim_value = most
    return bounds


def _part_batch(model: Any, dynamic: Dynamic, step: str) -> str | None:
    """Return the batch's name, if it has one, and take it off the axes behind the first.

    Files have ``[n, n, 8]`` where an exporter had one name for all that is open: bounds of the
    second axis would be those of the batch. Who bounds the first axis too means what is written.
    """
    inputs = _taken(model)
    shapes = {value.name: _axes(value, step) for value in (*inputs, *model.graph.output)}
    firsts = _open_firsts(shapes[value.name] for value in inputs)
    if not _is_batched(shapes.values(), firsts) or any(0 in axes for axes in dynamic.values()):
        return None
    batch = next(iter(firsts), None)
    if batch is not None and any(batch in shapes[value.name][1:] for value in inputs):
        for value in (*inputs, *model.graph.output):
            for size in value.type.tensor_type.shape.dim[1:]:
                if size.dim_param == batch:
                    size.Clear()
    return batch


def signature(
    model: Any,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    *,
    step: str,
    examples: Mapping[str, Array] | None = None,
) -> Signature:
    """Return what a graph takes and gives.

    The batch is the first axis where every input and output has it and its size is open,
    under one name or none. Any other open axis needs an entry in ``bounds``, under its own
    name, or ``tensor[axis]`` where it has none: an engine must know how far a shape may go.
    ``examples`` say which bounds to propose where there are none.

    Raises:
        BadInput: a tensor is of a kind that requests cannot carry, or is open without bounds.
    """
    values = _taken(model)
    if not values:
        raise BadInput(f"{step}: the graph has no inputs: a release answers requests")
    axes = {value.name: _axes(value, step) for value in (*values, *model.graph.output)}
    batched = _is_batched(axes.values(), _open_firsts(axes[value.name] for value in values))
    dynamic: dict[str, dict[int, Dimension]] = {}
    unbound: dict[str, dict[int, str]] = {}
    for value in values:
        for axis, size in enumerate(axes[value.name]):
            if isinstance(size, int) or (axis == 0 and batched):
                continue
            name = size or f"{value.name}[{axis}]"
            if name not in (bounds or {}):
                unbound.setdefault(value.name, {})[axis] = size or f"{value.name}{axis}"
                continue
            least, most = (bounds or {})[name]
            if not 1 <= least <= most:
                raise BadInput(f"{step}: bounds of {name!r} must rise from 1, got {least}..{most}")
            dynamic.setdefault(value.name, {})[axis] = (name, least, most)
    if unbound:
        rowless = not batched and any(0 in open_axes for open_axes in unbound.values())
        said = _without_rows(axes) if rowless else _proposal(unbound, examples or {})
        raise BadInput(f"{step}: {said}")

    def specs(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                DATATYPES[value.type.tensor_type.elem_type],
                tuple(size if isinstance(size, int) else -1 for size in axes[value.name]),
            )
            for value in values
        )

    return Signature(specs(values), specs(model.graph.output), batched, dynamic)


def _proposal(unbound: Mapping[str, Mapping[int, str]], examples: Mapping[str, Array]) -> str:
    """Say which axes lack bounds, and what to write to give them some, as far as it is known."""

    def size(tensor: str, axis: int) -> object:
        example = examples.get(tensor)
        return example.shape[axis] if example is not None and axis < example.ndim else "SIZE"

    which = ", ".join(
        f"axis {axis} of input {tensor!r}" for tensor, axes in unbound.items() for axis in axes
    )
    lines = ", ".join(
        f"{json.dumps(tensor)} = {{ "
        + ", ".join(
            f"{axis} = [{json.dumps(name)}, {size(tensor, axis)}, {size(tensor, axis)}]"
            for axis, name in axes.items()
        )
        + " }"
        for tensor, axes in unbound.items()
    )
    one = sum(map(len, unbound.values())) == 1
    return (
        f"{which} {'is' if one else 'are'} open and {'has' if one else 'have'} no bounds: say "
        f"dynamic = {{ {lines} }} in the recipe's source, or with --dynamic: the smallest and the "
        "largest size, equal ones fix an axis"
    )


def _without_rows(axes: Mapping[str, Sequence[int | str | None]]) -> str:
    """Say that items are no rows of these tensors, and what to do: recurrent nets with states."""
    shapes = ", ".join(
        f"{tensor} [{', '.join(str(size or '?') for size in shape)}]"
        for tensor, shape in axes.items()
    )
    return (
        f"an item is a row of every input and output, but these tensors have no first axis in "
        f"common: {shapes}. Transpose what has its batch elsewhere, such as a state, and make "
        "constants of inputs that are no part of an item, in nodes around the model"
    )


def unbounded(model: Any) -> dict[str, tuple[int, int]]:
    """Return bounds that allow everything, for steps that do not care how far shapes go."""
    everything = (1, 2**31 - 1)
    return {
        name: everything
        for value in model.graph.input
        for axis, size in enumerate(value.type.tensor_type.shape.dim)
        for name in (size.dim_param, f"{value.name}[{axis}]")
    }


def runs(found: Signature, inputs: Mapping[str, Array], rows: int) -> Iterator[dict[str, Array]]:
    """Cut items into what a graph takes at once: ``rows`` of them, if its batch varies.

    A graph with a fixed first axis takes that many, and an incomplete rest is left out. One
    whose inputs have different first axes, or none, takes everything at once.
    """
    at_once = rows if found.batched else _fixed_rows(found)
    if at_once is None:
        yield dict(inputs)
        return
    total = len(next(iter(inputs.values())))
    for start in range(0, total if found.batched else total - at_once + 1, at_once):
        yield {name: array[start : start + at_once] for name, array in inputs.items()}


def random_inputs(found: Signature, rows: int, seed: int = 0) -> dict[str, Array]:
    """Return inputs that fit a signature, with open axes at their smallest.

    Numbers are normal, whole numbers 0 or 1, so that they index whatever they index.
    """
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in found.inputs:
        dimensions = found.dynamic.get(spec.name, {})
        shape = [
            size if size >= 0 else dimensions[axis][1] if axis in dimensions else rows
            for axis, size in enumerate(spec.shape)
        ]
        dtype = dtype_of(spec.datatype)
        if spec.datatype in ("FP16", "FP32", "FP64"):
            inputs[spec.name] = rng.standard_normal(shape).astype(dtype)
        elif spec.datatype == "BYTES":
            inputs[spec.name] = np.full(shape, b"a", dtype)
        else:
            inputs[spec.name] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


def check_inputs(found: Signature, inputs: Mapping[str, Array], *, step: str, what: str) -> None:
    """Check that arrays are what a graph takes: all of them, in their types and shapes.

    Raises:
        BadInput: it names the input and how it differs.
    """
    wanted = {spec.name for spec in found.inputs}
    if set(inputs) != wanted:
        raise BadInput(
            f"{step}: the model takes {', '.join(sorted(wanted))}, "
            f"{what} has {', '.join(sorted(inputs)) or 'nothing'}"
        )
    fixed = _fixed_rows(found)
    counts = {len(array) if array.ndim else 0 for array in inputs.values()}
    for spec in found.inputs:
        # Items of a graph with a fixed first axis are cut into runs of that size.
        shape = spec.shape if fixed is None else (-1, *spec.shape[1:])
        problem = TensorSpec(spec.name, spec.datatype, shape).mismatch(inputs[spec.name])
        if problem is not None:
            raise BadInput(f"{step}: input {spec.name!r} of {what}: {problem}")
        for axis, (name, least, most) in found.dynamic.get(spec.name, {}).items():
            size = inputs[spec.name].shape[axis]
            if not least <= size <= most:
                raise BadInput(
                    f"{step}: input {spec.name!r} of {what}: axis {axis} ({name}) is {size}, "
                    f"its bounds are {least}..{most}"
                )
    needed = 1 if found.batched else fixed
    if needed is not None and (len(counts) != 1 or min(counts) < needed):
        raise BadInput(
            f"{step}: every input of {what} must have the same number of items and at least "
            f"{needed}, got {', '.join(map(str, sorted(counts)))}"
        )


def check_finite(outputs: Mapping[str, Array], *, step: str, what: str) -> None:
    """Check that a model's answers are numbers.

    Raises:
        BadInput: an output has NaN or infinity; it is named, with how many of its values.
    """
    for name, array in outputs.items():
        if array.dtype.kind == "f":
            wrong = int(array.size - np.isfinite(array).sum())
            if wrong:
                raise BadInput(
                    f"{step}: {what}: output {name!r} is NaN or infinite in {wrong} of "
                    f"{array.size} values: look for a division by zero or an overflow in the model"
                )


def graphs(model: Any) -> Iterator[Any]:
    """Yield every graph and function of a model, the ones inside nodes included."""
    waiting = [model.graph, *model.functions]
    while waiting:
        part = waiting.pop()
        yield part
        for node in part.node:
            for attribute in node.attribute:
                waiting.extend(attribute.graphs)
                if attribute.HasField("g"):
                    waiting.append(attribute.g)


def _taken(model: Any) -> list[Any]:
    """Return the inputs of a graph, without the weights that are listed there before IR 4."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _open_firsts(inputs: Iterable[Sequence[int | str | None]]) -> set[str]:
    """Return the names that the first axes of inputs have."""
    return {shape[0] for shape in inputs if shape and isinstance(shape[0], str)}


def _is_batched(shapes: Iterable[Sequence[int | str | None]], firsts: Collection[str]) -> bool:
    """Whether every tensor has an open first axis, and those of the inputs at most one name."""
    return len(firsts) <= 1 and all(shape and not isinstance(shape[0], int) for shape in shapes)


def first_axes(found: Signature) -> set[int]:
    """Return the sizes that the first axes of inputs and outputs have; 0: there is no axis."""
    return {spec.shape[0] if spec.shape else 0 for spec in (*found.inputs, *found.outputs)}


def _fixed_rows(found: Signature) -> int | None:
    """Return the first axis that all inputs of an unbatched graph share, or None."""
    firsts = {spec.shape[0] if spec.shape else -1 for spec in found.inputs}
    return firsts.pop() if len(firsts) == 1 and min(firsts) > 0 else None


def sort_nodes(model: Any) -> None:
    """Put the nodes of the main graph after what they read, otherwise in the order they have.

    Nodes that wait for each other, which no order helps, come last: whoever checks the graph
    then finds them.
    """
    nodes = list(model.graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waits = [
        {makers[name] for name in reads(node) if name in makers} - {index}
        for index, node in enumerate(nodes)
    ]
    readers: dict[int, list[int]] = {}
    for index, before in enumerate(waits):
        for maker in before:
            readers.setdefault(maker, []).append(index)
    ready = [index for index, before in enumerate(waits) if not before]  # a heap, sorted as it is
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers.get(index, ()):
            waits[reader].discard(index)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    placed = set(order)
    order.extend(index for index in range(len(nodes)) if index not in placed)
    sorted_nodes = [nodes[index] for index in order]
    model.graph.ClearField("node")
    model.graph.node.extend(sorted_nodes)


def reads(node: Any) -> Iterator[str]:
    """Yield what a node reads of the graph it is in, also from within the graphs inside it.

    What those make themselves is not read, whatever it is called: a branch may name its output
    as the node names its own.
    """
    yield from node.input
    for attribute in node.attribute:
        for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            own = {value.name for value in (*inner.input, *inner.initializer)}
            own.update(sparse.values.name for sparse in inner.sparse_initializer)
            own.update(name for part in inner.node for name in part.output)
            read = [name for part in inner.node for name in reads(part)]
            read.extend(value.name for value in inner.output)
            yield from (name for name in read if name not in own)


def _strip(model: Any) -> None:
    domains: set[str] = set()
    for part in (model, *graphs(model)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for part in graphs(model):
        part.ClearField("value_info")
        for node in part.node:
            domains.add(node.domain)
            for piece in (node, *node.attribute):
                _clear(piece)
        if hasattr(part, "initializer"):  # a function has none, and its inputs are plain names
            for piece in (*part.input, *part.output, *part.initializer):
                _clear(piece)
    for tensor in _tensors(model):
        _clear(tensor)
    # Preparing for quantization leaves eight opsets that no node uses.
    keep = [entry for entry in model.opset_import if entry.domain in domains]
    model.ClearField("opset_import")
    model.opset_import.extend(keep)


def _clear(piece: Any) -> None:
    for field in ("metadata_props", "doc_string"):
        if field in piece.DESCRIPTOR.fields_by_name:
            piece.ClearField(field)


def _tensors(model: Any) -> Iterator[Any]:
    for part in graphs(model):
        if hasattr(part, "initializer"):
            yield from part.initializer
            for sparse in part.sparse_initializer:
                yield sparse.values
                yield sparse.indices
        for node in part.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def external_files(path: Path) -> list[Path]:
    """Return the files beside a model that hold its weights, as far as they are there.

    Of a file that cannot be read there are none: ``load`` says what is wrong with it.

    Raises:
        MissingExtra: onnx is not installed.
    """
    require("onnx", extra="models")
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError):
        return []
    names = {
        ExternalDataInfo(each).location for each in _tensors(model) if uses_external_data(each)
    }
    return [found for name in sorted(names) if (found := path.parent / name).is_file()]


def _check_external(path: Path, tensor: Any, step: str) -> None:
    from onnx.external_data_helper import ExternalDataInfo

    location = ExternalDataInfo(tensor).location
    if not location or not (path.parent / location).is_file():
        raise BadInput(
            f"{step}: {path} keeps tensor {tensor.name!r} in {location or 'a file it does not name'}"
            f", which is missing: put it beside the model"
        )


def _axes(value: Any, step: str) -> Sequence[int | str | None]:
    """Return every axis of a tensor: its size, the name of an open one, or None without one."""
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "something without a type"
        raise BadInput(f"{step}: {value.name!r} is a {kind}: requests carry plain tensors only")
    tensor = value.type.tensor_type
    if tensor.elem_type not in DATATYPES:
        raise BadInput(
            f"{step}: {value.name!r} has ONNX's element type {tensor.elem_type}, which the Open "
            f"Inference Protocol does not have: cast it in the model to one of "
            f"{', '.join(DATATYPES.values())}"
        )
    if not tensor.HasField("shape"):
        raise BadInput(
            f"{step}: {value.name!r} has no shape: export the model with one, open axes named"
        )
    return [
        int(size.dim_value) if size.HasField("dim_value") else size.dim_param or None
        for size in tensor.shape.dim
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
