"""The GPU through the CUDA runtime: devices, a stream, and buffers on both sides of it.

Every CUDA call goes through ``checked``, which turns its error into one of ours. A buffer is
a piece of device memory and as much pinned host memory; whoever makes one frees it once.
"""

import ctypes
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud_hub.engines.engine import EngineLost
from cloud_hub.engines.tensorrt import api
from cloud_hub.engines.tensorrt.errors import GpuUnavailable, OutOfDeviceMemory

# Values of cudaError_t, from the CUDA runtime's documentation, "Data types used by CUDA Runtime".
_OUT_OF_MEMORY = 2
_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100
_INVALID_DEVICE = 101

_DRIVER_RELEASE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the slice of one that this process sees."""

    index: int
    name: str
    uuid: str
    compute_capability: str  # e.g. "9.0"
    multiprocessors: int
    memory_bytes: int
    driver: str  # e.g. "580.65.06, CUDA 13.0"


class Cuda:
    """The CUDA runtime with errors raised instead of returned."""

    def __init__(self, runtime: api.CudaRuntime) -> None:
        self._runtime = runtime

    def devices(self) -> tuple[Device, ...]:
        """Return the GPUs that this process may use.

        Raises:
            GpuUnavailable: there is no driver, it is too old, or it sees no GPU.
        """
        count = checked(self._runtime.cudaGetDeviceCount(), self._why_no_device)[0]
        if not count:
            raise GpuUnavailable("the NVIDIA driver works and sees no GPU")
        return tuple(self.device(index) for index in range(count))

    def device(self, index: int) -> Device:
        """Return what is known of one GPU.

        Raises:
            GpuUnavailable: there is none of this index.
        """
        found: api.DeviceProperties = checked(
            self._runtime.cudaGetDeviceProperties(index), self._why_no_device
        )[0]
        raw = found.uuid.bytes.hex()
        return Device(
            index=index,
            name=found.name.rstrip(b"\0").decode(errors="replace"),
            uuid="-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:])),
            compute_capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multiProcessorCount,
            memory_bytes=found.totalGlobalMem,
            driver=f"{_driver_release()}CUDA {_dotted(self._driver_version())}",
        )

    def use(self, index: int) -> None:
        """Make the calling thread speak to this GPU: CUDA remembers that per thread.

        Raises:
            GpuUnavailable: it cannot be used.
        """
        checked(self._runtime.cudaSetDevice(index), self._why_no_device)

    def free_bytes(self) -> int:
        """Return how much memory the current GPU has left."""
        free: int = checked(self._runtime.cudaMemGetInfo())[0]
        return free

    def stream(self) -> api.Stream:
        """Return a new stream, which does not wait for the default one."""
        made: api.Stream = checked(
            self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking)
        )[0]
        return made

    def wait(self, stream: api.Stream) -> None:
        """Return when everything that was put into the stream has happened."""
        checked(self._runtime.cudaStreamSynchronize(stream))

    def destroy(self, stream: api.Stream) -> None:
        """Give a stream back."""
        checked(self._runtime.cudaStreamDestroy(stream))

    def allocate(self, nbytes: int) -> int:
        """Return the address of new device memory.

        Raises:
            OutOfDeviceMemory: the GPU has not as much left.
        """
        address: int = checked(self._runtime.cudaMalloc(nbytes), wanted=f"{nbytes} bytes")[0]
        return address

    def release(self, address: int) -> None:
        """Give device memory back. Waits for the GPU to be idle."""
        checked(self._runtime.cudaFree(address))

    def allocate_pinned(self, nbytes: int) -> int:
        """Return the address of new page-locked host memory.

        Raises:
            OutOfDeviceMemory: the machine has not as much left.
        """
        address: int = checked(
            self._runtime.cudaHostAlloc(nbytes, self._runtime.cudaHostAllocDefault),
            wanted=f"{nbytes} bytes of pinned host memory",
        )[0]
        return address

    def release_pinned(self, address: int) -> None:
        """Give page-locked host memory back."""
        checked(self._runtime.cudaFreeHost(address))

    def copy_in(self, device: int, host: int, nbytes: int, stream: api.Stream) -> None:
        """Put a copy from host to device into the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(self._runtime.cudaMemcpyAsync(device, host, nbytes, kind, stream))

    def copy_out(self, host: int, device: int, nbytes: int, stream: api.Stream) -> None:
        """Put a copy from device to host into the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(self._runtime.cudaMemcpyAsync(host, device, nbytes, kind, stream))

    def _driver_version(self) -> int:
        number: int = checked(self._runtime.cudaDriverGetVersion())[0]
        return number

    def _why_no_device(self) -> str:
        # Error 35 means both: the runtime tells them apart by the version, 0 without a driver.
        driver = self._driver_version()
        if not driver:
            return "there is no NVIDIA driver"
        needed: int = checked(self._runtime.cudaRuntimeGetVersion())[0]
        return (
            f"the NVIDIA driver is made for CUDA {_dotted(driver)}, "
            f"this installation needs {_dotted(needed)}"
        )


class Buffer:
    """The two memories of one tensor. Owned by one session, used on its stream only."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        """Allocate both sides.

        Raises:
            OutOfDeviceMemory: one side has not as much left; nothing is kept then.
        """
        self._cuda = cuda
        # An empty tensor needs an address too, or TensorRT refuses it.
        self.capacity = max(nbytes, 1)
        self.device = cuda.allocate(self.capacity)
        try:
            self.host = cuda.allocate_pinned(self.capacity)
        except BaseException:
            cuda.release(self.device)
            raise
        self._bytes = np.ctypeslib.as_array(
            (ctypes.c_uint8 * self.capacity).from_address(self.host)
        )

    def view(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the host side as an array. It is only valid until the next run or ``free``."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self._bytes[:nbytes].view(dtype).reshape(shape)

    def free(self) -> None:
        """Give both sides back."""
        try:
            self._cuda.release(self.device)
        finally:
            self._cuda.release_pinned(self.host)


def checked(
    result: tuple[Any, ...], why_no_device: Callable[[], str] | None = None, *, wanted: str = ""
) -> tuple[Any, ...]:
    """Return what a CUDA call gave, without its error.

    Args:
        result: the tuple that every call returns, its error first.
        why_no_device: looks for the reason when there is no usable driver.
        wanted: what was asked for, to be named when memory is short.

    Raises:
        GpuUnavailable: no driver, a driver too old, or no such GPU.
        OutOfDeviceMemory: there is not as much memory.
        EngineLost: anything else: after it nothing on this GPU can be trusted.
    """
    error: api.CudaError = result[0]
    number = int(error)
    if number == 0:
        return result[1:]
    if number == _INSUFFICIENT_DRIVER:
        found = why_no_device() if why_no_device else "the NVIDIA driver is missing or too old"
        raise GpuUnavailable(found)
    if number in (_NO_DEVICE, _INVALID_DEVICE):
        raise GpuUnavailable(f"the NVIDIA driver sees no such GPU ({error.name})")
    if number == _OUT_OF_MEMORY:
        raise OutOfDeviceMemory(f"out of memory{': ' + wanted if wanted else ''} ({error.name})")
    raise EngineLost(f"the GPU failed: {error.name} ({number})")


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_release() -> str:
    """Return the driver's own version with a comma, or nothing where it does not tell."""
    try:
        text = _DRIVER_RELEASE.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return f"{found[1]}, " if found else ""
