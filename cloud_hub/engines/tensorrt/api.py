"""The members of TensorRT and CUDA that fogline calls, typed by hand, and the way to reach them.

Written from NVIDIA's public documentation only: the TensorRT Python API pages (10 and 11.4,
docs.nvidia.com/deeplearning/tensorrt, "Python API"), the Apache-2.0 sources and samples of
github.com/NVIDIA/TensorRT, and the documentation of cuda-bindings. Nothing here is generated
from the proprietary bindings. A member that is missing is read up on those pages and added.

mypy checks every call of this package against these classes, and the recording fake of the
tests as well. Whether the pages tell the truth is shown by ``tests/gpu``.
"""

import importlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

from cloud_hub.engines.tensorrt.errors import GpuUnavailable

R_co = TypeVar("R_co", covariant=True)

SUPPORTED_MAJORS = (10, 11)
OLDEST = (10, 1)  # where device_memory_size_v2 and the parser's node names are

DataType = Hashable  # members of an enumeration are only compared here
TensorIOMode = Hashable
TensorLocation = Hashable
MemoryPoolType = Hashable
BuilderFlag = Hashable


class DataTypes(Protocol):
    """``tensorrt.DataType``: those that have an Open Inference datatype."""

    FLOAT: DataType
    HALF: DataType
    BF16: DataType
    INT8: DataType
    INT32: DataType
    INT64: DataType
    UINT8: DataType
    BOOL: DataType


class TensorIOModes(Protocol):
    """``tensorrt.TensorIOMode``."""

    INPUT: TensorIOMode
    OUTPUT: TensorIOMode


class TensorLocations(Protocol):
    """``tensorrt.TensorLocation``."""

    DEVICE: TensorLocation
    HOST: TensorLocation


class MemoryPoolTypes(Protocol):
    """``tensorrt.MemoryPoolType``."""

    WORKSPACE: MemoryPoolType


class BuilderFlags(Protocol):
    """``tensorrt.BuilderFlag``: what both majors have. Precision is decided in the ONNX file."""

    TF32: BuilderFlag


class NetworkFlags(Protocol):
    """``tensorrt.NetworkDefinitionCreationFlag``, converted with ``int``."""

    STRONGLY_TYPED: Any


class HostMemory(Protocol):
    """``tensorrt.IHostMemory``: it has the buffer interface, so ``memoryview`` reads it."""

    @property
    def nbytes(self) -> int: ...

    def __buffer__(self, flags: int, /) -> memoryview: ...


class ExecutionContext(Protocol):
    """``tensorrt.IExecutionContext``. Every False is a refusal: running on would use old memory."""

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...

    def get_tensor_shape(self, name: str) -> Iterable[int]: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def infer_shapes(self) -> list[str]: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    """``tensorrt.ICudaEngine``."""

    @property
    def num_io_tensors(self) -> int: ...

    @property
    def device_memory_size_v2(self) -> int: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_mode(self, name: str) -> TensorIOMode: ...

    def get_tensor_dtype(self, name: str) -> DataType: ...

    def get_tensor_shape(self, name: str) -> Iterable[int]: ...

    def get_tensor_location(self, name: str) -> TensorLocation: ...

    def is_shape_inference_io(self, name: str) -> bool: ...

    def get_tensor_profile_shape(
        self, name: str, profile_index: int
    ) -> Sequence[Iterable[int]]: ...

    def create_execution_context(self) -> ExecutionContext | None: ...


class Runtime(Protocol):
    """``tensorrt.Runtime``."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...


class NetworkTensor(Protocol):
    """``tensorrt.ITensor``."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Iterable[int]: ...


class Network(Protocol):
    """``tensorrt.INetworkDefinition``."""

    @property
    def num_inputs(self) -> int: ...

    def get_input(self, index: int) -> NetworkTensor: ...


class ParserError(Protocol):
    """``tensorrt.ParserError``: its parts are methods."""

    def desc(self) -> str: ...

    def node_name(self) -> str: ...

    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """``tensorrt.OnnxParser``."""

    @property
    def num_errors(self) -> int: ...

    def parse_from_file(self, model: str) -> bool: ...

    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """``tensorrt.IOptimizationProfile``. Pages: ValueError when inconsistent; sources: RuntimeError."""

    def set_shape(
        self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]
    ) -> None: ...


class TimingCache(Protocol):
    """``tensorrt.ITimingCache``."""

    def serialize(self) -> HostMemory: ...


class BuilderConfig(Protocol):
    """``tensorrt.IBuilderConfig``. ``progress_monitor`` takes a subclass of IProgressMonitor."""

    builder_optimization_level: int
    progress_monitor: Any

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None: ...

    def clear_flag(self, flag: BuilderFlag) -> None: ...

    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...

    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    """``tensorrt.Builder``."""

    def create_network(self, flags: int) -> Network | None: ...

    def create_builder_config(self) -> BuilderConfig | None: ...

    def create_optimization_profile(self) -> OptimizationProfile | None: ...

    def build_serialized_network(
        self, network: Network, config: BuilderConfig
    ) -> HostMemory | None: ...


class Module(Protocol):
    """The module ``tensorrt``."""

    __version__: str

    @property
    def DataType(self) -> DataTypes: ...

    @property
    def TensorIOMode(self) -> TensorIOModes: ...

    @property
    def TensorLocation(self) -> TensorLocations: ...

    @property
    def MemoryPoolType(self) -> MemoryPoolTypes: ...

    @property
    def BuilderFlag(self) -> BuilderFlags: ...

    @property
    def NetworkDefinitionCreationFlag(self) -> NetworkFlags: ...

    # Classes to derive from. ILogger wants log(severity, msg), IProgressMonitor wants
    # phase_start(phase_name, parent_phase, num_steps), step_complete(phase_name, step) -> bool
    # (False cancels the build) and phase_finish(phase_name).
    @property
    def ILogger(self) -> type[Any]: ...

    @property
    def IProgressMonitor(self) -> type[Any]: ...

    def Runtime(self, logger: Any) -> Runtime: ...

    def Builder(self, logger: Any) -> Builder: ...

    def OnnxParser(self, network: Network, logger: Any) -> OnnxParser: ...


class CudaError(Protocol):
    """``cudaError_t``: a member of an IntEnum."""

    @property
    def name(self) -> str: ...

    def __int__(self) -> int: ...


class MemcpyKind(Protocol):
    """``cudaMemcpyKind``."""

    cudaMemcpyHostToDevice: Any
    cudaMemcpyDeviceToHost: Any


class CudaUuid(Protocol):
    """``cudaUUID_t``."""

    @property
    def bytes(self) -> bytes: ...


class DeviceProperties(Protocol):
    """``cudaDeviceProp``."""

    @property
    def name(self) -> bytes: ...

    @property
    def uuid(self) -> CudaUuid: ...

    @property
    def major(self) -> int: ...

    @property
    def minor(self) -> int: ...

    @property
    def multiProcessorCount(self) -> int: ...

    @property
    def totalGlobalMem(self) -> int: ...


class Stream(Protocol):
    """``cudaStream_t``: ``int`` gives the handle that TensorRT takes."""

    def __int__(self) -> int: ...


class CudaRuntime(Protocol):
    """The module ``cuda.bindings.runtime``. Pointers are whole numbers.

    Every call returns a tuple: the error, and the result where there is one, which is None
    when the error is not ``cudaSuccess``.
    """

    cudaStreamNonBlocking: int
    cudaHostAllocDefault: int

    @property
    def cudaMemcpyKind(self) -> MemcpyKind: ...

    def cudaDriverGetVersion(self) -> tuple[CudaError, int]: ...

    def cudaRuntimeGetVersion(self) -> tuple[CudaError, int]: ...

    def cudaGetDeviceCount(self) -> tuple[CudaError, int]: ...

    def cudaGetDeviceProperties(self, device: int) -> tuple[CudaError, DeviceProperties]: ...

    def cudaSetDevice(self, device: int) -> tuple[CudaError]: ...

    def cudaMemGetInfo(self) -> tuple[CudaError, int, int]: ...

    def cudaMalloc(self, size: int) -> tuple[CudaError, int]: ...

    def cudaFree(self, devPtr: int) -> tuple[CudaError]: ...

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[CudaError, int]: ...

    def cudaFreeHost(self, ptr: int) -> tuple[CudaError]: ...

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, Stream]: ...

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[CudaError]: ...

    def cudaStreamDestroy(self, stream: Stream) -> tuple[CudaError]: ...

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: Stream
    ) -> tuple[CudaError]: ...


def tensorrt() -> Module:
    """Import TensorRT: the only bridge to it.

    Raises:
        GpuUnavailable: it is not installed, cannot be loaded, or is of an unknown version.
    """
    try:
        module = cast(Module, importlib.import_module("tensorrt"))
    except ImportError as error:
        raise GpuUnavailable(
            f"TensorRT is not installed ({error}): pip install 'fogline[gpu]'"
        ) from None
    except (OSError, RuntimeError) as error:  # a library it needs is missing or too old
        raise GpuUnavailable(f"TensorRT is installed and cannot be loaded: {error}") from None
    version(module)
    return module


def cuda_runtime() -> CudaRuntime:
    """Import the CUDA runtime: the only bridge to it. Works without a driver.

    Raises:
        GpuUnavailable: it is not installed or cannot be loaded.
    """
    try:
        return cast(CudaRuntime, importlib.import_module("cuda.bindings.runtime"))
    except ImportError as error:
        raise GpuUnavailable(
            f"cuda-bindings is not installed ({error}): pip install 'fogline[gpu]'"
        ) from None
    except (OSError, RuntimeError) as error:
        raise GpuUnavailable(f"cuda-bindings is installed and cannot be loaded: {error}") from None


def version(module: Module) -> tuple[int, int]:
    """Return major and minor of a TensorRT that this package knows.

    Raises:
        GpuUnavailable: it is another one; the text names those supported.
    """
    parts = module.__version__.split(".")
    found = tuple(int(part) for part in parts[:2] if part.isdecimal())
    if len(found) != 2 or found[0] not in SUPPORTED_MAJORS or found < OLDEST:
        raise GpuUnavailable(
            f"TensorRT {module.__version__} is not supported: install "
            f"{OLDEST[0]}.{OLDEST[1]} or a newer one of {' or '.join(map(str, SUPPORTED_MAJORS))}"
        )
    return found[0], found[1]


def network_flags(module: Module) -> int:
    """Return what ``create_network`` takes so that the types of the ONNX file are obeyed.

    This is the one difference between the majors that is seen here: 11 knows only strongly
    typed networks, 10 has to be asked. (EXPLICIT_BATCH means nothing since 10.)
    """
    if version(module)[0] == 10:
        return 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0
