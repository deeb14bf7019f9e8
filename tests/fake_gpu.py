"""A GPU that exists in memory only: CUDA and TensorRT as their pages describe them.

Both satisfy the Protocols of ``cloud_hub.engines.tensorrt.api``, which mypy checks, and pass
the contract tests that ``tests/gpu`` runs against the real ones. A plan holds the ONNX file,
which ONNX Runtime computes; device memory is host memory at an address; and **nothing that is
put into a stream happens before somebody waits for it**, so that who reads too early reads
what was there before.

Every call is recorded by name. ``refuse`` makes a TensorRT call return False or None (with a
reason in the log), ``fail`` makes a CUDA call return an error.
"""

import base64
import ctypes
import enum
import functools
import json
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from cloud_hub.engines.tensorrt import api
from fogline_protocol import tensors
from fogline_protocol.tensors import Array

ILLEGAL_ADDRESS = 700
ENVIRONMENT = "FOGLINE_FAKE_GPU"  # JSON of Gpu's arguments and refusals, for a child process


class CudaErrorCode(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700


class Gpu:
    """One machine: its CUDA, its TensorRT, and the record of what was asked of them."""

    def __init__(
        self,
        *,
        version: str = "11.4.0.26",
        devices: int = 1,
        driver: int = 13010,
        hang: bool = False,
    ) -> None:
        self.calls: list[str] = []
        self.version = version
        self.devices = devices
        self.driver = driver
        self.hang = hang  # a build never ends
        self.faults: list[str] = []  # what no caller may do: double frees, foreign memory
        self.cuda = FakeCuda(self)
        self.trt = FakeTensorRt(self)
        self._refused: dict[str, str] = {}
        self._failing: dict[str, tuple[int, int]] = {}

    @staticmethod
    def install(packages: Path) -> Path:
        """Write packages that are these fakes in any process that has the folder on its path.

        The machine they make is the one that ``ENVIRONMENT`` describes.
        """
        bindings = packages / "cuda" / "bindings"
        bindings.mkdir(parents=True, exist_ok=True)
        for folder in (bindings, bindings.parent):
            (folder / "__init__.py").touch()
        for file, part in ((packages / "tensorrt.py", "trt"), (bindings / "runtime.py", "cuda")):
            file.write_text(
                "import sys\nfrom tests import fake_gpu\n"
                f"sys.modules[__name__] = fake_gpu.installed().{part}\n"
            )
        return packages

    @staticmethod
    def hide(packages: Path) -> Path:
        """Write packages that make the real ones look as if they were not installed."""
        packages.mkdir(parents=True, exist_ok=True)
        for name in ("tensorrt", "cuda"):
            missing = f"No module named {name!r}"
            (packages / f"{name}.py").write_text(f"raise ModuleNotFoundError({missing!r})\n")
        return packages

    def refuse(self, call: str, reason: str = "the fake refuses") -> None:
        self._refused[call] = reason

    def fail(self, call: str, error: int, *, after: int = 0) -> None:
        """Return ``error`` from every call of this name but the first ``after``."""
        self._failing[call] = (error, after)

    def relent(self) -> None:
        self._refused.clear()
        self._failing.clear()

    def note(self, call: str) -> None:
        self.calls.append(call)

    def reason(self, call: str) -> str | None:
        self.note(call)
        return self._refused.get(call)

    def error(self, call: str) -> CudaErrorCode:
        self.note(call)
        if self.cuda.broken and call != "cudaDriverGetVersion":
            return self.cuda.broken
        if call in self._failing:
            error, after = self._failing[call]
            if after == 0:
                return CudaErrorCode(error)
            self._failing[call] = (error, after - 1)
        return CudaErrorCode.cudaSuccess

    @property
    def held(self) -> int:
        """How much of the GPU is held: memory, pinned memory, streams."""
        return len(self.cuda.memory) + len(self.cuda.pinned) + len(self.cuda.streams)


class _Uuid:
    bytes = bytes(range(16))


class _Properties:
    name = b"Fake GPU\0\0"
    uuid = _Uuid()
    major = 9
    minor = 0
    multiProcessorCount = 132
    totalGlobalMem = 80 << 30


class _Kind:
    cudaMemcpyHostToDevice: Any = "in"
    cudaMemcpyDeviceToHost: Any = "out"


class _Stream:
    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __int__(self) -> int:
        return self._handle


class FakeCuda:
    """The module ``cuda.bindings.runtime``."""

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = _Kind()

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.memory: dict[int, Any] = {}  # device addresses
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[Callable[[], bool]]] = {}
        self.broken: CudaErrorCode | None = None  # as a real context stays after a fault
        self._current: dict[int, int] = {}  # by thread, as in CUDA

    def cudaDriverGetVersion(self) -> tuple[CudaErrorCode, int]:
        return self._gpu.error("cudaDriverGetVersion"), self._gpu.driver

    def cudaRuntimeGetVersion(self) -> tuple[CudaErrorCode, int]:
        return self._gpu.error("cudaRuntimeGetVersion"), 13000

    def cudaGetDeviceCount(self) -> tuple[CudaErrorCode, int]:
        error = self._gpu.error("cudaGetDeviceCount") or self._no_driver()
        return error, self._gpu.devices if not error else 0

    def cudaGetDeviceProperties(self, device: int) -> tuple[CudaErrorCode, _Properties]:
        error = self._gpu.error("cudaGetDeviceProperties") or self._no_driver()
        return error or self._no_device(device), _Properties()

    def cudaSetDevice(self, device: int) -> tuple[CudaErrorCode]:
        error = self._gpu.error("cudaSetDevice") or self._no_driver() or self._no_device(device)
        if not error:
            self._current[threading.get_ident()] = device
        return (error,)

    def cudaMemGetInfo(self) -> tuple[CudaErrorCode, int, int]:
        return self._gpu.error("cudaMemGetInfo"), 1000, 2000

    def cudaMalloc(self, size: int) -> tuple[CudaErrorCode, int]:
        return self._allocate("cudaMalloc", size, self.memory)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[CudaErrorCode, int]:
        return self._allocate("cudaHostAlloc", size, self.pinned)

    def cudaFree(self, devPtr: int) -> tuple[CudaErrorCode]:
        return self._free("cudaFree", devPtr, self.memory)

    def cudaFreeHost(self, ptr: int) -> tuple[CudaErrorCode]:
        return self._free("cudaFreeHost", ptr, self.pinned)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaErrorCode, _Stream]:
        error = self._gpu.error("cudaStreamCreateWithFlags")
        handle = 0x5000 + len(self._gpu.calls)
        if not error:
            self.streams[handle] = []
        if flags != self.cudaStreamNonBlocking:
            self._gpu.faults.append("the stream waits for the default stream")
        return error, _Stream(handle)

    def cudaStreamSynchronize(self, stream: api.Stream) -> tuple[CudaErrorCode]:
        error = self._gpu.error("cudaStreamSynchronize")
        if error:
            return (error,)
        work = self.streams[int(stream)]
        while work:
            if not work.pop(0)():
                work.clear()
                self.broken = CudaErrorCode.cudaErrorIllegalAddress
                return (self.broken,)
        return (CudaErrorCode.cudaSuccess,)

    def cudaStreamDestroy(self, stream: api.Stream) -> tuple[CudaErrorCode]:
        error = self._gpu.error("cudaStreamDestroy")
        if self.streams.pop(int(stream), None) is None:
            self._gpu.faults.append("a stream was destroyed twice")
        return (error,)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: api.Stream
    ) -> tuple[CudaErrorCode]:
        error = self._gpu.error("cudaMemcpyAsync")
        if error:
            return (error,)
        to, of = (self.memory, self.pinned) if kind == "in" else (self.pinned, self.memory)

        def copy() -> bool:
            if self.room(dst, to) < count or self.room(src, of) < count:
                self._gpu.faults.append(f"a copy {kind} of {count} bytes leaves its memory")
                return False
            ctypes.memmove(dst, src, count)
            return True

        self.streams[int(stream)].append(copy)
        return (CudaErrorCode.cudaSuccess,)

    def room(self, address: int, memory: dict[int, Any]) -> int:
        """Return the bytes at this address, -1 if it is no memory of this kind."""
        return len(memory[address]) if address in memory else -1

    def _allocate(self, call: str, size: int, memory: dict[int, Any]) -> tuple[CudaErrorCode, int]:
        error = self._gpu.error(call)
        if error:
            return error, 0
        block = (ctypes.c_uint8 * size)(*[0xEE] * size)  # never zero, as real memory is not
        memory[ctypes.addressof(block)] = block
        return CudaErrorCode.cudaSuccess, ctypes.addressof(block)

    def _free(self, call: str, address: int, memory: dict[int, Any]) -> tuple[CudaErrorCode]:
        error = self._gpu.error(call)
        if any(self.streams.values()):
            self._gpu.faults.append("memory was freed while the GPU worked")
        if memory.pop(address, None) is None:
            self._gpu.faults.append(f"{call} of what is not held")
        return (error,)

    def _no_driver(self) -> CudaErrorCode:
        if self._gpu.driver < 13000:
            return CudaErrorCode.cudaErrorInsufficientDriver
        return CudaErrorCode.cudaErrorNoDevice if not self._gpu.devices else CudaErrorCode(0)

    def _no_device(self, device: int) -> CudaErrorCode:
        known = 0 <= device < self._gpu.devices
        return CudaErrorCode.cudaSuccess if known else CudaErrorCode.cudaErrorInvalidDevice


class _DataType(enum.Enum):
    FLOAT = "FP32"
    HALF = "FP16"
    BF16 = "BF16"
    INT8 = "INT8"
    INT32 = "INT32"
    INT64 = "INT64"
    UINT8 = "UINT8"
    BOOL = "BOOL"
    FP8 = "FP8"


class _DataTypes:
    FLOAT: api.DataType = _DataType.FLOAT
    HALF: api.DataType = _DataType.HALF
    BF16: api.DataType = _DataType.BF16
    INT8: api.DataType = _DataType.INT8
    INT32: api.DataType = _DataType.INT32
    INT64: api.DataType = _DataType.INT64
    UINT8: api.DataType = _DataType.UINT8
    BOOL: api.DataType = _DataType.BOOL


class _Modes:
    INPUT: api.TensorIOMode = "input"
    OUTPUT: api.TensorIOMode = "output"


class _Locations:
    DEVICE: api.TensorLocation = "device"
    HOST: api.TensorLocation = "host"


class _Pools:
    WORKSPACE: api.MemoryPoolType = "workspace"


class _Flags:
    TF32: api.BuilderFlag = "tf32"


class _NetworkFlags:
    STRONGLY_TYPED: Any = 1


class ILogger:
    """Derived from by the caller, who implements ``log``."""

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    """Derived from by the caller."""


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class FakeTensorRt:
    """The module ``tensorrt``."""

    DataType = _DataTypes()
    TensorIOMode = _Modes()
    TensorLocation = _Locations()
    MemoryPoolType = _Pools()
    BuilderFlag = _Flags()
    NetworkDefinitionCreationFlag = _NetworkFlags()
    ILogger: type[Any] = ILogger
    IProgressMonitor: type[Any] = IProgressMonitor

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.__version__ = gpu.version

    def Runtime(self, logger: Any) -> "_Runtime":
        self._gpu.note("Runtime")
        return _Runtime(self._gpu, logger)

    def Builder(self, logger: Any) -> "_Builder":
        self._gpu.note("Builder")
        return _Builder(self._gpu, logger)

    def OnnxParser(self, network: api.Network, logger: Any) -> "_Parser":
        self._gpu.note("OnnxParser")
        assert isinstance(network, _Network)
        return _Parser(self._gpu, network)


class Computation:
    """What ONNX Runtime knows of a model, and computes. A model with BF16 is taken for a copy."""

    def __init__(self, onnx: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            onnx, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [self._tensor(node) for node in self._session.get_inputs()]
        self.outputs = [self._tensor(node) for node in self._session.get_outputs()]

    def run(self, arrays: dict[str, Array]) -> dict[str, Array]:
        names = [name for name, _, _ in self.outputs]
        if any(kind == _DataType.BF16 for _, kind, _ in self.inputs):
            return dict(zip(names, arrays.values(), strict=True))
        return dict(zip(names, self._session.run(names, arrays), strict=True))

    def _tensor(self, node: Any) -> tuple[str, _DataType, tuple[int, ...]]:
        words = {
            "float": "FP32", "float16": "FP16", "bfloat16": "BF16", "bool": "BOOL",
            "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "int64": "INT64",
        }  # fmt: skip
        word = node.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(dim if isinstance(dim, int) else -1 for dim in node.shape)
        return node.name, _DataType(words.get(word, "FP8")), shape


class _Runtime:
    def __init__(self, gpu: Gpu, logger: Any) -> None:
        self._gpu, self._logger = gpu, logger
        weakref.finalize(self, gpu.note, "~Runtime")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "_Engine | None":
        refused = self._gpu.reason("deserialize_cuda_engine")
        if refused is None:
            try:
                plan = json.loads(serialized_engine)
            except ValueError:
                refused = "the magic number of the plan is wrong"
            else:
                if plan["version"] != self._gpu.version:
                    refused = f"the plan is of {plan['version']}, this is {self._gpu.version}"
        if refused is not None:
            self._logger.log(1, refused)
            return None
        return _Engine(self._gpu, self._logger, self, plan)


class _Engine:
    device_memory_size_v2 = 4096

    def __init__(self, gpu: Gpu, logger: Any, runtime: _Runtime, plan: dict[str, Any]) -> None:
        self.gpu, self.logger, self._keeps = gpu, logger, runtime
        self.model = Computation(base64.b64decode(plan["model"]))
        self._profile = plan["profile"]
        self._tensors = {tensor[0]: tensor for tensor in (*self.model.inputs, *self.model.outputs)}
        weakref.finalize(self, gpu.note, "~CudaEngine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> api.TensorIOMode:
        return "input" if name in {tensor[0] for tensor in self.model.inputs} else "output"

    def get_tensor_dtype(self, name: str) -> api.DataType:
        return self._tensors[name][1]

    def get_tensor_shape(self, name: str) -> Iterable[int]:
        return self._tensors[name][2]

    def get_tensor_location(self, name: str) -> api.TensorLocation:
        return "host" if name.startswith("host_") else "device"

    def is_shape_inference_io(self, name: str) -> bool:
        return name.startswith("shape_")

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Iterable[int]]:
        assert profile_index == 0
        shapes: list[list[int]] = self._profile[name]
        return shapes

    def within(self, name: str, shape: Sequence[int]) -> bool:
        if name not in self._profile:
            return tuple(shape) == self._tensors[name][2]
        least, _, most = self._profile[name]
        return len(shape) == len(least) and all(
            low <= dim <= high for low, dim, high in zip(least, shape, most, strict=True)
        )

    def create_execution_context(self) -> "_Context | None":
        refused = self.gpu.reason("create_execution_context")
        if refused is not None:
            self.logger.log(1, refused)
            return None
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._gpu = engine, engine.gpu
        self._shapes: dict[str, tuple[int, ...]] = {
            name: shape for name, _, shape in engine.model.inputs if -1 not in shape
        }
        self._addresses: dict[str, int] = {}
        weakref.finalize(self, engine.gpu.note, "~ExecutionContext")

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._shapes.pop(name, None)
        if self._refused("set_input_shape") or not self._engine.within(name, shape):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._refused("set_tensor_address") or memory not in self._gpu.cuda.memory:
            return False
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        if self._refused("infer_shapes"):
            raise RuntimeError("infer_shapes error code: -1")
        missing = [name for name, _, _ in self._engine.model.inputs if name not in self._shapes]
        if not missing:
            try:
                self._zeros()
            except Exception as error:  # ONNX Runtime's classes have no base of their own
                self._engine.logger.log(1, str(error))
                raise RuntimeError("infer_shapes error code: -1") from None
        return missing

    def get_tensor_shape(self, name: str) -> Iterable[int]:
        if self._gpu.reason("get_tensor_shape") is not None:
            return (-1,)
        return self._shapes[name] if name in self._shapes else self._zeros()[name].shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._refused("execute_async_v3"):
            return False
        if len(self._addresses) < self._engine.num_io_tensors:
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        cuda, model = self._gpu.cuda, self._engine.model

        def execute() -> bool:
            arrays: dict[str, Array] = {}
            for name, kind, _ in model.inputs:
                dtype = tensors.dtype_of(str(kind.value))
                count = int(np.prod(shapes[name], dtype=int))
                if cuda.room(addresses[name], cuda.memory) < count * dtype.itemsize:
                    return False
                raw = ctypes.string_at(addresses[name], count * dtype.itemsize)
                if dtype == np.bool_ and set(raw) - {0, 1}:
                    self._gpu.faults.append("a BOOL is neither 0 nor 1")
                arrays[name] = np.frombuffer(raw, dtype).reshape(shapes[name])
            for name, array in model.run(arrays).items():
                if cuda.room(addresses[name], cuda.memory) < array.nbytes:
                    self._gpu.faults.append(f"output {name} does not fit its memory")
                    return False
                ctypes.memmove(addresses[name], array.tobytes(), array.nbytes)
            return True

        cuda.streams[stream_handle].append(execute)
        return True

    def _zeros(self) -> dict[str, Array]:
        """Return outputs for zeros, which show the shapes. The fake has no other way to know."""
        return self._engine.model.run(
            {
                name: np.zeros(self._shapes[name], tensors.dtype_of(str(kind.value)))
                for name, kind, _ in self._engine.model.inputs
            }
        )

    def _refused(self, call: str) -> bool:
        reason = self._gpu.reason(call)
        if reason is not None:
            self._engine.logger.log(1, reason)
        return reason is not None


class _NetworkTensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


class _Network:
    def __init__(self) -> None:
        self.onnx = b""
        self.model: Computation | None = None

    @property
    def num_inputs(self) -> int:
        assert self.model is not None
        return len(self.model.inputs)

    def get_input(self, index: int) -> _NetworkTensor:
        assert self.model is not None
        name, _, shape = self.model.inputs[index]
        return _NetworkTensor(name, shape)


class _ParserError:
    def __init__(self, index: int, text: str) -> None:
        self._index, self._text = index, text

    def desc(self) -> str:
        return self._text

    def node_name(self) -> str:
        return f"node_{self._index}"

    def node_operator(self) -> str:
        return "NonZero"


class _Parser:
    def __init__(self, gpu: Gpu, network: _Network) -> None:
        self._gpu, self._network = gpu, network
        self._errors: list[_ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def parse_from_file(self, model: str) -> bool:
        refused = self._gpu.reason("parse_from_file")
        try:
            with open(model, "rb") as file:
                self._network.onnx = file.read()
            self._network.model = Computation(self._network.onnx)
        except Exception as error:  # ONNX Runtime's classes have no base of their own
            refused = str(error)
        if refused is not None:
            self._errors = [_ParserError(index, refused) for index in range(12)]
        return refused is None

    def get_error(self, index: int) -> _ParserError:
        return self._errors[index]


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(
        self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]
    ) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> HostMemory:
        return HostMemory(self.content + b"measured;")


class _Config:
    builder_optimization_level = 3
    progress_monitor: Any = None

    def __init__(self, gpu: Gpu, logger: Any) -> None:
        self._gpu, self._logger = gpu, logger
        self.profile: _Profile | None = None
        self.cache: _TimingCache | None = None

    def set_memory_pool_limit(self, pool: api.MemoryPoolType, pool_size: int) -> None:
        self._gpu.note(f"set_memory_pool_limit {pool} {pool_size}")

    def clear_flag(self, flag: api.BuilderFlag) -> None:
        self._gpu.note(f"clear_flag {flag}")

    def add_optimization_profile(self, profile: api.OptimizationProfile) -> int:
        refused = self._gpu.reason("add_optimization_profile")
        if refused is not None:
            self._logger.log(1, refused)
            return -1
        assert isinstance(profile, _Profile)
        self.profile = profile
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> _TimingCache | None:
        self._gpu.note(f"create_timing_cache of {len(serialized_timing_cache)}")
        return _TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: api.TimingCache, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, _TimingCache)
        if cache.content and not cache.content.endswith(b"measured;"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class _Builder:
    def __init__(self, gpu: Gpu, logger: Any) -> None:
        self._gpu, self._logger = gpu, logger

    def create_network(self, flags: int) -> _Network | None:
        self._gpu.note(f"create_network {flags}")
        return _Network()

    def create_builder_config(self) -> _Config | None:
        self._gpu.note("create_builder_config")
        return _Config(self._gpu, self._logger)

    def create_optimization_profile(self) -> _Profile | None:
        self._gpu.note("create_optimization_profile")
        return _Profile()

    def build_serialized_network(
        self, network: api.Network, config: api.BuilderConfig
    ) -> HostMemory | None:
        assert isinstance(network, _Network)
        assert isinstance(config, _Config)
        refused = self._gpu.reason("build_serialized_network")
        if refused is not None:
            if refused == "crash":
                os.abort()
            self._logger.log(1, refused)
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 3)
        for step in range(3):
            if not monitor.step_complete("Building", step):
                return None
        while self._gpu.hang:
            time.sleep(0.01)
        monitor.phase_finish("Building")
        plan = {
            "version": self._gpu.version,
            "model": base64.b64encode(network.onnx).decode(),
            "profile": config.profile.shapes if config.profile else {},
        }
        return HostMemory(json.dumps(plan).encode())


def _satisfies(gpu: Gpu) -> tuple[api.Module, api.CudaRuntime]:
    """mypy holds both fakes to the Protocols here."""
    return gpu.trt, gpu.cuda


@functools.cache
def installed() -> Gpu:
    """Return the machine that the environment describes: what a child process finds installed."""
    warnings.simplefilter("ignore")  # of ONNX Runtime, in a process of its own
    wanted = json.loads(os.environ.get(ENVIRONMENT, "{}"))
    refusals = wanted.pop("refuse", {})
    gpu = Gpu(**wanted)
    for call, reason in refusals.items():
        gpu.refuse(call, reason)
    print("TensorRT prints where it likes", file=sys.stdout)
    return gpu
