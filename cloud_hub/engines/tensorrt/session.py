"""Runs one TensorRT plan: arrays in, arrays out, on one stream of one GPU.

Everything that a run needs is allocated at load, at the largest shapes of the plan's profile:
device memory, pinned host memory, the context's own workspace. A run sets the shapes, copies
in, executes and copies out on the stream, and waits once. Every refusal is answered: a False
that is dropped would run on the memory of the request before.

What has been run on a real GPU is what ``tests/gpu`` holds, where there is one; here the same
promises are kept by a fake that executes only when it is waited for. Written from the public
pages of TensorRT 10 and 11.4; on hardware this file has not been run yet.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cloud_hub.engines.engine import Arrays, EngineLost
from cloud_hub.engines.tensorrt import api
from cloud_hub.engines.tensorrt.cuda import Buffer, Cuda
from cloud_hub.engines.tensorrt.errors import (
    GpuUnavailable,
    OutOfDeviceMemory,
    PlanUnusable,
)
from cloud_hub.engines.tensorrt.log import Reasons, is_out_of_memory
from cloud_hub.errors import ModelRefused
from fogline_protocol import tensors
from fogline_protocol.errors import BadRequest
from fogline_protocol.tensors import Array, TensorSpec

PLATFORM = "tensorrt_plan"  # Triton's name
PROVIDER = "TensorRT"

_PROFILE = 0  # the only one that plans.py builds, and the one a new context starts with

Shape = tuple[int, ...]

log = logging.getLogger("fogline.tensorrt")


class _Range(NamedTuple):
    """Shapes that the plan was built for, both ends included."""

    smallest: Shape
    largest: Shape


class TensorRtSession:
    """One plan, loaded. Run and close it on one thread at a time; close it once or more."""

    platform = PLATFORM
    provider = PROVIDER

    def __init__(
        self,
        plan: Path,
        *,
        device: int = 0,
        trt: api.Module | None = None,
        cuda: api.CudaRuntime | None = None,
    ) -> None:
        """Load a plan that this machine built itself: a plan can hold code.

        Raises:
            GpuUnavailable: no TensorRT, driver or GPU.
            OutOfDeviceMemory: the GPU is full.
            PlanUnusable: the plan is damaged, or of another TensorRT or GPU.
            ModelRefused: it has tensors that the protocol lacks or that cannot be served here.
            EngineLost: the GPU failed: nothing in this process can use it any more.
        """
        self._trt = trt or api.tensorrt()
        self._cuda = Cuda(cuda or api.cuda_runtime())
        self._device = device
        self._reasons = Reasons(self._trt)
        self._lost = ""  # why no run is possible any more
        # Never in a local variable: the traceback of an error would keep them beyond ``close``.
        self._runtime: api.Runtime | None = None
        self._engine: api.CudaEngine | None = None
        self._context: api.ExecutionContext | None = None
        self._buffers: dict[str, Buffer] = {}
        self._shapes: Mapping[str, Shape] | None = None  # what the context was told last
        self._output_shapes: Mapping[str, Shape] = {}
        with ExitStack() as held:
            held.callback(self._free_buffers)
            self._load(plan, held)
            self._held = held.pop_all()

    def __repr__(self) -> str:
        state = self._lost or "ready"
        return f"<TensorRtSession on GPU {self._device}: {state}>"

    def run(self, inputs: Arrays) -> Arrays:
        """Return every output for inputs of shapes within the plan's profile.

        Raises:
            BadRequest: a name, datatype or shape that the plan does not take. Nothing has run.
            EngineLost: the GPU or TensorRT failed; every later run fails too.
        """
        if self._lost:
            raise EngineLost(self._lost)
        shapes = self._accept(inputs)
        try:
            self._cuda.use(self._device)
            self._tell_shapes(shapes)
            return self._execute(inputs)
        except (EngineLost, GpuUnavailable, OutOfDeviceMemory) as error:
            # Copies may be under way in buffers that the next run would overwrite.
            self._lost = f"the TensorRT engine failed and must be replaced: {error}"
            raise EngineLost(self._lost) from None

    def close(self) -> None:
        """Wait for the GPU, then give everything back. Doing it again does nothing."""
        self._lost = self._lost or "the TensorRT engine is closed"
        try:
            self._held.close()
        except (EngineLost, GpuUnavailable, OutOfDeviceMemory) as error:
            # The rest has been given back; what a broken GPU holds returns with the process.
            log.warning("closing a TensorRT engine: %s", error)

    def _load(self, plan: Path, held: ExitStack) -> None:
        self._cuda.use(self._device)
        self._stream = self._cuda.stream()
        held.callback(self._cuda.destroy, self._stream)
        held.callback(self._drop_tensorrt)
        self._runtime = self._trt.Runtime(self._reasons.logger)
        self._deserialize(plan)
        self._read_tensors(plan)
        self._context = self._loaded().create_execution_context()
        if self._context is None:
            raise OutOfDeviceMemory(
                f"{plan}: no execution context: it needs {self._loaded().device_memory_size_v2} "
                f"bytes, {self._cuda.free_bytes()} are free: {self._reasons.take()}"
            )
        held.callback(self._settle)
        self._prepare(plan)

    def _deserialize(self, plan: Path) -> None:
        try:
            serialized = plan.read_bytes()
        except OSError as error:
            raise PlanUnusable(f"{plan}: the plan cannot be read: {error.strerror}") from None
        assert self._runtime is not None  # made just before
        self._engine = self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            reason = self._reasons.take()
            if is_out_of_memory(reason):
                raise OutOfDeviceMemory(f"{plan}: no memory to load the plan: {reason}")
            raise PlanUnusable(
                f"{plan}: TensorRT {self._trt.__version__} does not take the plan, which is "
                f"damaged or from another version or GPU: {reason}"
            )

    def _read_tensors(self, plan: Path) -> None:
        """Learn names, datatypes and ranges, and refuse what cannot be served."""
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        self._ranges: dict[str, _Range] = {}
        datatypes = _datatypes(self._trt)
        for index in range(self._loaded().num_io_tensors):
            name = self._loaded().get_tensor_name(index)
            kind = self._loaded().get_tensor_dtype(name)
            datatype = datatypes.get(kind)
            if datatype is None:
                raise ModelRefused(
                    f"{plan}: tensor {name!r} is {kind}, which cannot be served: cast it in the "
                    f"ONNX file to one of {', '.join(sorted(datatypes.values()))}"
                )
            is_input = self._loaded().get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            if (
                is_input and self._loaded().is_shape_inference_io(name)
            ) or self._loaded().get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                raise ModelRefused(
                    f"{plan}: the values of tensor {name!r} decide shapes, so it lives in host "
                    "memory, which cannot be served by TensorRT here: ONNX Runtime can"
                )
            spec = TensorSpec(name, datatype, _shape(self._loaded().get_tensor_shape(name)))
            (inputs if is_input else outputs).append(spec)
            if not is_input:
                continue
            if -1 in spec.shape:
                least, _, most = self._loaded().get_tensor_profile_shape(name, _PROFILE)
                self._ranges[name] = _Range(_shape(least), _shape(most))
            else:
                self._ranges[name] = _Range(spec.shape, spec.shape)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def _prepare(self, plan: Path) -> None:
        """Allocate for the largest shapes, and tell the context where everything is."""
        largest = {name: limits.largest for name, limits in self._ranges.items()}
        try:
            self._tell_shapes(largest, reserve=False)
        except (BadRequest, EngineLost) as error:
            raise ModelRefused(f"{plan}: {error}") from None
        for spec in (*self.inputs, *self.outputs):
            shape = largest[spec.name] if spec.name in largest else self._output_shapes[spec.name]
            self._reserve(spec, shape)

    def _accept(self, inputs: Arrays) -> Mapping[str, Shape]:
        for name in inputs:
            if name not in self._ranges:
                raise BadRequest(
                    f"the model has no input {name!r}, its inputs are {', '.join(self._ranges)}"
                )
        for spec in self.inputs:
            array = inputs.get(spec.name)
            if array is None:
                raise BadRequest(f"input {spec.name!r} is missing")
            objection = spec.mismatch(array)
            if objection is not None:
                raise BadRequest(f"input {spec.name!r}: {objection}")
            least, most = self._ranges[spec.name]
            if any(
                not low <= have <= high
                for low, have, high in zip(least, array.shape, most, strict=True)
            ):
                raise BadRequest(
                    f"input {spec.name!r}: shape {list(array.shape)} is outside what the plan "
                    f"was built for, {list(least)} to {list(most)}"
                )
        return {spec.name: inputs[spec.name].shape for spec in self.inputs}

    def _tell_shapes(self, shapes: Mapping[str, Shape], *, reserve: bool = True) -> None:
        """Make the context know these input shapes, and learn those of the outputs."""
        if shapes == self._shapes:
            return
        self._shapes = None  # half told, until all of it is
        for name, shape in shapes.items():
            if not self._ready().set_input_shape(name, shape):
                raise BadRequest(
                    f"input {name!r}: TensorRT refuses shape {list(shape)}: {self._reasons.take()}"
                )
        try:
            missing = self._ready().infer_shapes()
        except RuntimeError as error:
            told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BadRequest(
                f"the model does not take these shapes together: {told}: {error}: "
                f"{self._reasons.take()}"
            ) from None
        if missing:
            raise EngineLost(f"TensorRT wants more of {', '.join(missing)} than their shapes")
        found = {
            spec.name: _shape(self._ready().get_tensor_shape(spec.name)) for spec in self.outputs
        }
        for name, shape in found.items():
            if any(dim < 0 for dim in shape):
                raise EngineLost(
                    f"the shape of output {name!r} depends on the values of the inputs "
                    f"({list(shape)}), which cannot be served by TensorRT here: ONNX Runtime can"
                )
        self._output_shapes = found
        if reserve:
            for spec in self.outputs:  # an output may be the larger for smaller inputs
                self._reserve(spec, found[spec.name])
        self._shapes = dict(shapes)

    def _execute(self, inputs: Arrays) -> Arrays:
        for spec in self.inputs:
            array = inputs[spec.name]
            buffer = self._buffers[spec.name]
            _fill(buffer.view(array.dtype, array.shape), array)
            self._cuda.copy_in(buffer.device, buffer.host, array.nbytes, self._stream)
        if not self._ready().execute_async_v3(int(self._stream)):
            raise EngineLost(f"execution was refused: {self._reasons.take()}")
        views: dict[str, Array] = {}
        for spec in self.outputs:
            buffer = self._buffers[spec.name]
            view = buffer.view(
                tensors.dtype_of(spec.datatype), tuple(self._output_shapes[spec.name])
            )
            views[spec.name] = view
            self._cuda.copy_out(buffer.host, buffer.device, view.nbytes, self._stream)
        self._cuda.wait(self._stream)
        # The caller's own: the next run writes into the same pinned memory.
        return {name: view.copy() for name, view in views.items()}

    def _reserve(self, spec: TensorSpec, shape: Shape) -> None:
        """Hold a buffer that is large enough, and tell the context its address."""
        needed = math.prod(shape) * tensors.dtype_of(spec.datatype).itemsize
        held = self._buffers.get(spec.name)
        if held is not None:
            if held.capacity >= needed:
                return
            del self._buffers[spec.name]
            held.free()
        buffer = self._buffers[spec.name] = Buffer(self._cuda, needed)
        if not self._ready().set_tensor_address(spec.name, buffer.device):
            raise EngineLost(
                f"TensorRT refuses the memory of tensor {spec.name!r}: {self._reasons.take()}"
            )

    def _loaded(self) -> api.CudaEngine:
        assert self._engine is not None  # or loading has failed
        return self._engine

    def _ready(self) -> api.ExecutionContext:
        if self._context is None:
            raise EngineLost("the TensorRT engine is closed")
        return self._context

    def _settle(self) -> None:
        """Let the GPU finish: what it works on must not be freed under it."""
        self._cuda.use(self._device)
        self._cuda.wait(self._stream)

    def _drop_tensorrt(self) -> None:
        # From the inside out: a context uses its engine, an engine its runtime.
        self._context = None
        self._engine = None
        self._runtime = None

    def _free_buffers(self) -> None:
        with ExitStack() as all_of_them:
            while self._buffers:
                all_of_them.callback(self._buffers.popitem()[1].free)


def _datatypes(trt: api.Module) -> Mapping[api.DataType, str]:
    known = trt.DataType
    return {
        known.FLOAT: "FP32",
        known.HALF: "FP16",
        known.BF16: "BF16",
        known.INT8: "INT8",
        known.INT32: "INT32",
        known.INT64: "INT64",
        known.UINT8: "UINT8",
        known.BOOL: "BOOL",
    }


def _shape(dims: Iterable[int]) -> Shape:
    return tuple(int(dim) for dim in dims)


def _fill(view: Array, array: Array) -> None:
    if array.dtype == np.bool_:
        # Raw requests may hold any byte; TensorRT knows only 0 and 1.
        np.not_equal(array.view(np.uint8), 0, out=view)
    else:
        view[...] = array
