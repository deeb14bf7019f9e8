"""Quantizes an fp32 ONNX file, in the form that pays on the hardware it is for.

The forms are those of ``forms.py``, a variant each. Any of them can be mixed: nodes named in
``keep`` stay fp32 (``sensitivity.py`` finds which are worth it). Ranges are read off training
inputs; the threshold's calibration items are never seen here.

A file is written only if onnxruntime runs it and its answers are numbers.
"""

import contextlib
import difflib
import fnmatch
import functools
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fogline_models import forms, graph
from fogline_models.errors import BadInput
from fogline_models.forms import STEP, Form, Way
from fogline_models.session import ALL_ROWS, Session
from fogline_models.steps import Say, paced, silent
from fogline_protocol.tensors import Array

RANGE_BATCH = 64
RANGE_BYTES = 2**30  # of what lies between the nodes, which observing ranges holds all at once
PER_CHANNEL_OPSET = 13  # of ONNX, where QuantizeLinear learnt to have an axis
ORT_WARNINGS, ORT_ERRORS = 2, 3  # of its log; the first is what it begins with
MAX_FP16 = 65504.0
# Masks of attention add the lowest float32, for want of -inf: it is meant to saturate.
MASK = -1e30
MAX_FP16_DIFFERENCE = 0.02  # of the largest output; measured: 1e-3 and less

# What dynamic quantization may touch: no convolutions, 2 and 3.4 times slower than fp32
# on VNNI and AVX2, and nothing that only passes integers on.
_DYNAMIC = ("MatMul", "Gemm", "Gather", "Attention", "LSTM", "EmbedLayerNormalization")

# How onnxruntime's quantizer takes a graph that it did not foresee.
_QUANTIZER_FAILS = (
    AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip

# What multiplies with weights or looks them up, by its first two inputs.
_WEIGHTED = (*_DYNAMIC, "Conv", "ConvTranspose")


class DynamicQuantizer(Protocol):
    """Quantizes a prepared file so that ranges are found anew in every run."""

    def __call__(
        self,
        model: Path,
        target: Path,
        *,
        operators: Collection[str],
        exclude: Collection[str],
        per_channel: bool,
        reduce_range: bool,
    ) -> None:
        """Write ``model``, its ``operators`` quantized except the nodes to ``exclude``."""
        ...


def with_onnxruntime(
    model: Path,
    target: Path,
    *,
    operators: Collection[str],
    exclude: Collection[str],
    per_channel: bool,
    reduce_range: bool,
) -> None:
    """Quantize as ``DynamicQuantizer`` says, by onnxruntime's own quantizer."""
    from onnxruntime import quantization

    quantization.quantize_dynamic(
        str(model),
        str(target),
        per_channel=per_channel,
        reduce_range=reduce_range,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=list(operators),
        nodes_to_exclude=sorted(exclude),
    )


def quantize(
    fp32: Path,
    form: str,
    ranges: Mapping[str, Array] | None,
    props: Mapping[str, str],
    path: Path,
    *,
    keep: Collection[str] = (),
    dynamic: DynamicQuantizer = with_onnxruntime,
    say: Say = silent,
) -> None:
    """Write one form of ``fp32`` to ``path``; ``ranges`` are training inputs, ``{name: [n, ...]}``.

    ``dynamic`` does what is dynamic; by default onnxruntime itself. ``say`` hears how far it is.

    Raises:
        BadInput: the form is unknown or lacks training inputs, the file or the inputs do not fit
            it, ``keep`` names a node that the file does not have, or the result is not finite.
    """
    with prepared(fp32, ranges, say) as ready:
        ready.write(form, props, path, keep=keep, dynamic=dynamic)


@dataclass(frozen=True, slots=True)
class Node:
    """A node that a form can quantize."""

    name: str
    operator: str
    weighs: bool  # it multiplies with weights: what quantization is for


class Prepared:
    """An fp32 file made ready to be quantized again and again; its ranges are measured once."""

    def __init__(
        self,
        folder: Path,
        fp32: Path,
        ranges: Mapping[str, Array] | None,
        say: Say = silent,
    ) -> None:
        """Fold constants and name every node of ``fp32`` in a copy below ``folder``."""
        self._folder = folder
        self._fp32 = fp32
        self._say = say
        model = graph.load(fp32, step=STEP)
        self.signature = _signature(model)
        self._path = _prepare(model, folder, fp32)
        self._model = graph.load(self._path, step=STEP)
        self._ranges = ranges
        if ranges is not None:
            what = "the training inputs"
            graph.check_inputs(self.signature, ranges, step=STEP, what=what)
            for name, array in ranges.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise BadInput(f"{STEP}: input {name!r} of {what} is NaN or infinite somewhere")

    def nodes(self, form: str) -> tuple[Node, ...]:
        """Return what a form would quantize, in the order of the graph."""
        taken = _operators(forms.named(form))
        constants = {tensor.name for tensor in self._model.graph.initializer}
        return tuple(
            Node(
                node.name,
                node.op_type,
                node.op_type in _WEIGHTED and not constants.isdisjoint(node.input[:2]),
            )
            for node in self._model.graph.node
            if taken is None or node.op_type in taken
        )

    def write(
        self,
        form: str,
        props: Mapping[str, str],
        path: Path,
        *,
        keep: Collection[str] = (),
        dynamic: DynamicQuantizer = with_onnxruntime,
    ) -> None:
        """Write one form to ``path``.

        Raises:
            BadInput: as ``quantize``.
        """
        chosen = forms.named(form)
        if chosen.needs_inputs and self._ranges is None:
            raise BadInput(
                f"{STEP}: form {form} reads ranges off training inputs: give it some, or take "
                "int8-dynamic"
            )
        keep = self._kept(form, keep)
        with _quiet():
            if chosen.way is not Way.DYNAMIC:
                _ = self._rows  # before what follows blames onnxruntime for any failure
            try:
                match chosen.way:
                    case Way.STATIC:
                        model = self._static(chosen, keep)
                    case Way.DYNAMIC:
                        model = self._dynamic(chosen, keep, dynamic)
                    case Way.CAST:
                        model = self._cast(keep)
            except _QUANTIZER_FAILS as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BadInput(
                    f"{STEP}: onnxruntime cannot give {self._fp32} the form {form}, leave the form "
                    f"out: {reason}"
                ) from None
        graph.sort_nodes(model)  # its own sorting does not look into branches, nor at casts
        made = self._folder / f"made-{form}.onnx"
        graph.finish(model, props, made, step=STEP)
        self._check(chosen, made, model)
        graph.finish(model, props, path, step=STEP)

    def _static(self, form: Form, keep: Collection[str]) -> Any:
        from onnxruntime import quantization

        kinds = {"uint8": quantization.QuantType.QUInt8, "int8": quantization.QuantType.QInt8}
        symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        target = self._folder / "static.onnx"
        quantization.quantize_static(
            str(self._path),
            str(target),
            self._batches(self._ranges or {}),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=form.weights_of_7_bits,
            activation_type=kinds[form.activations],
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=sorted({*keep, *self._masked}),
            extra_options=symmetric if form.symmetric else {},
            # Ranges belong to the inputs, not to the form: the first one measures them.
            calibration_cache_path=self._folder / "ranges.json",
        )
        return graph.load(target, step=STEP)

    def _dynamic(self, form: Form, keep: Collection[str], quantizer: DynamicQuantizer) -> Any:
        target = self._folder / "dynamic.onnx"
        quantizer(
            self._path,
            target,
            operators=_DYNAMIC,
            # A Gemm becomes a MatMul of that name before it is looked up.
            exclude=sorted(part for name in keep for part in (name, f"{name}_MatMul")),
            per_channel=True,
            reduce_range=form.weights_of_7_bits,
        )
        return graph.load(target, step=STEP)

    def _cast(self, keep: Collection[str]) -> Any:
        self._check_fits_fp16(keep)
        float16 = _float16()
        model = graph.load(self._path, step=STEP)
        cast = float16.convert_float_to_float16(model, keep_io_types=True, node_block_list=keep)
        _join(cast.graph)
        return cast

    def _check_fits_fp16(self, keep: Collection[str]) -> None:
        """Refuse what float16 cannot hold, in weights and between nodes.

        The latter is measured in fp32: on a CPU onnxruntime computes fp16 nodes in float32, so
        that running the result would not show it.
        """
        import onnx

        touched: dict[str, str] = {}
        for node in self._model.graph.node:
            if node.name not in keep:
                touched.update(dict.fromkeys((*node.input, *node.output), node.name))
        largest: dict[str, float] = {}
        for tensor in self._model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                largest[tensor.name] = _largest(onnx.numpy_helper.to_array(tensor))
        for name, extremes in self._extremes().items():
            largest[name] = _largest(extremes)
        for name in touched:  # in the order of the graph: the first is where it begins
            if (value := largest.get(name, 0.0)) > MAX_FP16:
                raise BadInput(
                    f"{STEP}: tensor {name!r} reaches {value:.3g}, float16 ends at "
                    f"{MAX_FP16:.0f}: keep node {touched[name]!r} and its neighbors in fp32"
                )

    @functools.cached_property
    def _masked(self) -> frozenset[str]:
        """The nodes around an attention mask, which no static form may quantize.

        It adds the lowest float32 to scores of a few units, and 255 steps from there to here
        leave one for all scores: a small transformer fell to 59 % agreement with fp32.
        """
        from onnx import numpy_helper

        constants = [
            *self._model.graph.initializer,
            *(a.t for node in self._model.graph.node for a in node.attribute if a.HasField("t")),
        ]
        arrays = (numpy_helper.to_array(tensor) for tensor in constants)
        if not any(a.dtype.kind == "f" and a.size and a.min() < MASK for a in arrays):
            return frozenset()
        masked = {name for name, (lowest, _) in self._extremes().items() if lowest < MASK}
        return frozenset(
            node.name for node in self._model.graph.node if masked & {*node.input, *node.output}
        )

    def _extremes(self) -> dict[str, Array]:
        """Return the smallest and the largest value of every float tensor between nodes."""
        from onnxruntime import quantization

        inputs = self._ranges or graph.random_inputs(self.signature, RANGE_BATCH)
        observer = quantization.create_calibrator(
            self._path, None, augmented_model_path=str(self._folder / "observed.onnx")
        )
        observer.collect_data(self._batches(inputs))
        found = observer.compute_data()
        return {name: np.array(found[name].range_value, np.float64) for name in found.keys()}  # noqa: SIM118 - no mapping

    def _batches(self, inputs: Mapping[str, Array]) -> "_Batches":
        return _Batches(self.signature, inputs, self._rows, self._say)

    @functools.cached_property
    def _rows(self) -> int:
        """How many rows are observed at once.

        Observing keeps all that lies between the nodes until the run is over. A row of digits is
        some kilobytes of that, one text of 512 tokens in a small BERT 360 MB.
        """
        import onnx

        inputs = self._ranges or graph.random_inputs(self.signature, 1)
        one = next(graph.runs(self.signature, inputs, 1), None)
        if one is None or not self.signature.batched:
            return RANGE_BATCH
        model = graph.load(self._path, step=STEP)
        there = {value.name for value in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name)
            for node in model.graph.node
            for name in node.output
            if name and name not in there
        )
        whole = self._folder / "whole-outputs.onnx"
        whole.write_bytes(model.SerializeToString())
        kept = Session(whole, as_written=True).run(one, ALL_ROWS)
        whole.unlink()
        # Sequences come back as lists, absent optionals as None: neither is observed.
        each = sum(array.nbytes for array in kept.values() if isinstance(array, np.ndarray))
        return max(1, min(RANGE_BATCH, RANGE_BYTES // max(each, 1)))

    def _check(self, form: Form, made: Path, model: Any) -> None:
        """Refuse a file that has nothing quantized, takes or gives something else, or NaN."""
        import onnx

        if not _is_quantized(form, model):
            present = sorted({node.op_type for node in self._model.graph.node})
            raise BadInput(
                f"{STEP}: form {form.name} finds nothing to quantize in {self._fp32}, which has "
                f"{', '.join(present)}: leave the form out, or keep fewer nodes"
            )
        found = _signature(onnx.load(str(made)))
        if (found.inputs, found.outputs) != (self.signature.inputs, self.signature.outputs):
            raise BadInput(
                f"{STEP}: form {form.name} of {self._fp32} takes or gives other tensors than the "
                "fp32 file: that is a fault of the quantizer, leave the form out"
            )
        inputs = self._ranges or graph.random_inputs(self.signature, RANGE_BATCH)
        rows = next(graph.runs(self.signature, inputs, RANGE_BATCH))
        answers = Session(made, as_written=True).run(rows, ALL_ROWS)
        graph.check_finite(answers, step=STEP, what=f"form {form.name} of {self._fp32}")
        if form.way is Way.CAST:
            _check_close(form, Session(self._path).run(rows, ALL_ROWS), answers)

    def _kept(self, form: str, keep: Collection[str]) -> set[str]:
        """Return the nodes that are meant, patterns filled in."""
        names = [node.name for node in self.nodes(form)]
        kept: set[str] = set()
        for name in keep:
            found = [name] if name in names else fnmatch.filter(names, name)
            if not found:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
                raise BadInput(
                    f"{STEP}: cannot keep {name!r}: form {form} quantizes no node of that name; "
                    f"the nearest are {', '.join(map(repr, near)) or 'none'}"
                )
            kept.update(found)
        return kept


@contextlib.contextmanager
def prepared(
    fp32: Path, ranges: Mapping[str, Array] | None, say: Say = silent
) -> Iterator[Prepared]:
    """Yield ``fp32`` made ready for several forms, or for one with different nodes kept.

    ``say`` hears how far it is, of every form.

    Raises:
        BadInput: the file cannot be read or run, or ``ranges`` are not what it takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield Prepared(Path(folder), fp32, ranges, say)


class _Batches:
    """Feeds inputs to the quantizer, in its own words."""

    def __init__(
        self, signature: graph.Signature, inputs: Mapping[str, Array], rows: int, say: Say
    ) -> None:
        self._left = graph.runs(signature, inputs, rows)
        self._given, self._total = 0, _count(inputs)
        self._progress = paced(say)

    def get_next(self) -> dict[str, Array] | None:
        if self._given < self._total:
            self._progress(self._given, self._total, "reading ranges")
        batch = next(self._left, None)
        if batch is not None:
            self._given += _count(batch)  # not what was asked for: a file may fix its batch
        return batch


def _count(inputs: Mapping[str, Array]) -> int:
    """Return how many rows arrays have; 1 where none has an axis."""
    return max((len(array) for array in inputs.values() if array.ndim), default=1)


def _prepare(model: Any, folder: Path, fp32: Path) -> Path:
    """Write the graph as onnxruntime simplifies it on any processor, every node with a name."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    Session(fp32)  # preparing would only log what onnxruntime refuses
    whole, path = folder / "whole.onnx", folder / "prepared.onnx"
    if (graph.opset_of(model) or 0) < PER_CHANNEL_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, PER_CHANNEL_OPSET)
        except (RuntimeError, onnx.version_converter.ConvertError) as error:
            raise BadInput(
                f"{STEP}: {fp32} has opset {graph.opset_of(model)}, quantizing needs "
                f"{PER_CHANNEL_OPSET}, and onnx cannot convert it: {str(error).splitlines()[0]}"
            ) from None
    _own_weights(model)
    whole.write_bytes(model.SerializeToString())
    with _quiet():
        # Symbolic shape inference adds nothing for static nets and knows fewer operators.
        quant_pre_process(str(whole), str(path), skip_symbolic_shape=True)
    ready = onnx.load(str(path))
    seen: set[str] = set()
    for index, node in enumerate(ready.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}:{index}"
        seen.add(node.name)
    _flatten_biases(ready)
    path.write_bytes(ready.SerializeToString())
    return path


def _flatten_biases(model: Any) -> None:
    """Give every Gemm the bias that the quantizer expects: one number for each output.

    ONNX lets it be anything that broadcasts, and preparing itself makes a Gemm of a MatMul and
    an Add, whose constant TensorFlow writes as ``[1, outputs]``.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    flat: dict[str, Any] = {}
    for node in model.graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or not node.input[2]:
            continue
        weight, bias = (constants.get(name) for name in node.input[1:3])
        if weight is None or bias is None or any(size != 1 for size in bias.dims[:-1]):
            continue
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        outputs = weight.dims[0 if turned else 1]
        if list(bias.dims) == [outputs]:
            continue
        name = f"{bias.name}:{outputs}"
        if name not in flat:
            values = np.broadcast_to(numpy_helper.to_array(bias).reshape(-1), (outputs,))
            flat[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        node.input[2] = name
    model.graph.initializer.extend(flat.values())
    read = {name for node in model.graph.node for name in graph.reads(node)}
    read |= {value.name for value in model.graph.output}
    keep = [tensor for tensor in model.graph.initializer if tensor.name in read]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(keep)


def _own_weights(model: Any) -> None:
    """Take weights off the list of inputs, where files before IR 4 have them as well."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) < len(model.graph.input):
        model.graph.ClearField("input")
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, 4)


def _join(part: Any) -> None:
    """Hand float32 on between nodes that are kept: the converter goes through float16 there."""
    import onnx

    def casts(to: int) -> dict[str, str]:
        return {
            node.output[0]: node.input[0]
            for node in part.node
            if node.op_type == "Cast" and any(attribute.i == to for attribute in node.attribute)
        }

    halves = casts(onnx.TensorProto.FLOAT16)
    detours = {
        whole: halves[half]
        for whole, half in casts(onnx.TensorProto.FLOAT).items()
        # What the model casts to float16 itself is meant.
        if half in halves and halves[half].endswith("_cast_to_fp16")
    }
    ends = {value.name for value in part.output}
    for node in part.node:
        for index, name in enumerate(node.input):
            if name in detours:
                node.input[index] = detours[name]
        if node.op_type == "Cast" and node.output[0] in ends and node.output[0] in detours:
            node.input[0] = detours[node.output[0]]  # an output of the graph, float32 all the way
    read = {name for node in part.node for name in graph.reads(node)} | ends
    keep = [node for node in part.node if node.op_type != "Cast" or node.output[0] in read]
    # A second pass: without the way back, the way there may be read by nobody.
    read = {name for node in keep for name in graph.reads(node)} | ends
    keep = [node for node in keep if node.op_type != "Cast" or node.output[0] in read]
    part.ClearField("node")
    part.node.extend(keep)


def _operators(form: Form) -> Collection[str] | None:
    """Return the operators that a form quantizes; None: it takes them all."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    match form.way:
        case Way.STATIC:
            return {*QDQRegistry, *QLinearOpsRegistry}
        case Way.DYNAMIC:
            return _DYNAMIC
        case Way.CAST:
            return None


def _signature(model: Any) -> graph.Signature:
    """Return a graph's signature; how far open axes go does not matter to quantization."""
    return graph.signature(model, graph.unbounded(model), step=STEP)


def _is_quantized(form: Form, model: Any) -> bool:
    if form.way is Way.CAST:
        import onnx

        half = onnx.TensorProto.FLOAT16
        return any(
            attribute.i == half
            for part in graph.graphs(model)
            for node in part.node
            if node.op_type == "Cast"
            for attribute in node.attribute
        )
    marks = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeLSTM"}
    return any(node.op_type in marks for part in graph.graphs(model) for node in part.node)


def _check_close(form: Form, want: Mapping[str, Array], found: Mapping[str, Array]) -> None:
    for name, expected in want.items():
        if expected.dtype.kind != "f":
            continue
        scale = max(float(np.abs(expected).max()), 1e-12)
        difference = float(np.abs(found[name] - expected).max()) / scale
        if difference > MAX_FP16_DIFFERENCE:
            raise BadInput(
                f"{STEP}: form {form.name}: output {name!r} differs from fp32 by "
                f"{difference:.1%} of its largest value, at most {MAX_FP16_DIFFERENCE:.0%} is "
                "accepted: keep the nodes that hurt in fp32"
            )


def _largest(values: Array) -> float:
    """Return the largest magnitude in an array, masks left out."""
    meant = values[np.isfinite(values) & (values > MASK)]
    return float(np.abs(meant).max()) if meant.size else 0.0


def _float16() -> Any:
    """Return onnxruntime's converter, without the search path that its package adds."""
    import importlib
    import sys

    before = sys.path[:]
    try:
        return importlib.import_module("onnxruntime.transformers.float16")
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantizer's advice, and its sessions', which its caller cannot follow.

    onnxruntime's severity is one for the whole process and cannot be read: afterwards it is
    what it begins with, warnings, whatever the caller had set.
    """
    import onnxruntime

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(ORT_ERRORS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        onnxruntime.set_default_logger_severity(ORT_WARNINGS)
