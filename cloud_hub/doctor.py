"""Says what a hub would find on this machine: one sentence per finding.

Each check looks at one thing and says ``ok``, ``note`` (a hub runs without it) or ``wrong``.
With ``gpu`` whatever the GPU needs must be there, and a small TensorRT plan is built and run.
"""

import enum
import importlib.metadata
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.config import HubConfig
from cloud_hub.engines.engine import EngineLost
from cloud_hub.engines.tensorrt import api as tensorrt_api
from cloud_hub.engines.tensorrt.cuda import Cuda
from cloud_hub.engines.tensorrt.errors import GpuUnavailable
from cloud_hub.fleet.mosquitto import MosquittoMissing, find_executable

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


class Level(enum.StrEnum):
    """What a finding means for a hub on this machine."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5}  {self.what:<21}  {self.text}"


async def examine(config: HubConfig, *, gpu: bool) -> AsyncIterator[Finding]:
    """Look at everything, and give every finding as soon as it is made."""
    yield runtime_finding(installed_runtimes())
    try:
        from cloud_hub.engines import probe
    except (ImportError, AttributeError) as error:
        # After one of the two runtimes was uninstalled beside the other, an empty package is left.
        yield Finding(Level.WRONG, "ONNX Runtime", f"it cannot be imported: {error}")
        return
    missing = Level.WRONG if gpu else Level.NOTE
    has_gpu = False
    for finding in _cuda_findings(missing):
        has_gpu = has_gpu or finding.level is Level.OK
        yield finding
    objections = {name: probe.provider_objection(name) for name in probe.providers()}
    for finding in provider_findings(objections, has_gpu=has_gpu, gpu=gpu):
        yield finding
    yield _tensorrt_finding(missing)
    if gpu:
        objection = await probe.tensorrt_objection()
        yield (
            Finding(Level.WRONG, "TensorRT plan", objection)
            if objection
            else Finding(
                Level.OK, "TensorRT plan", "a small plan was built, and its answer is right"
            )
        )
    yield _data_finding(config.data)
    yield _broker_finding(config.mqtt)


def installed_runtimes() -> Mapping[str, str]:
    """Return the versions of the distributions that bring ONNX Runtime."""
    found: dict[str, str] = {}
    for name in _RUNTIMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def runtime_finding(installed: Mapping[str, str]) -> Finding:
    """Judge which distributions of ONNX Runtime are installed: exactly one of them may be."""
    if len(installed) > 1:
        return Finding(
            Level.WRONG,
            "ONNX Runtime",
            "onnxruntime and onnxruntime-gpu are both installed and own the same files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'fogline[gpu]' or "
            "'fogline[hub]'",
        )
    if not installed:
        return Finding(
            Level.NOTE,
            "ONNX Runtime",
            "it was imported, and pip knows neither onnxruntime nor onnxruntime-gpu",
        )
    ((name, version),) = installed.items()
    return Finding(Level.OK, "ONNX Runtime", f"{name} {version}")


def provider_findings(
    objections: Mapping[str, str | None], *, has_gpu: bool, gpu: bool
) -> Iterator[Finding]:
    """Judge what each provider said when it was tried; None: it computed the probe.

    Of those that were compiled in, the CPU always counts, and CUDA where there is a GPU.
    """
    wants_cuda = has_gpu or gpu
    for name, objection in objections.items():
        if objection is None:
            yield Finding(Level.OK, name, "computes the probe, placed on it alone")
        else:
            needed = name == CPU or (name == CUDA and wants_cuda)
            yield Finding(Level.WRONG if needed else Level.NOTE, name, objection)
    if CUDA not in objections and wants_cuda:
        yield Finding(
            Level.WRONG if gpu else Level.NOTE,
            CUDA,
            "this ONNX Runtime is for the CPU only: pip uninstall -y onnxruntime, then "
            "pip install 'fogline[gpu]'",
        )


def _cuda_findings(missing: Level) -> Iterator[Finding]:
    try:
        devices = Cuda(tensorrt_api.cuda_runtime()).devices()
    except GpuUnavailable as error:
        yield Finding(missing, "GPU", f"no GPU can be used: {error}")
        return
    except EngineLost as error:
        yield Finding(Level.WRONG, "GPU", str(error))
        return
    for device in devices:
        yield Finding(
            Level.OK,
            "GPU",
            f"{device.index}: {device.name}, compute capability {device.compute_capability}, "
            f"{device.memory_bytes / (1 << 30):.0f} GiB, driver {device.driver}",
        )


def _tensorrt_finding(missing: Level) -> Finding:
    try:
        return Finding(Level.OK, "TensorRT", tensorrt_api.tensorrt().__version__)
    except GpuUnavailable as error:
        return Finding(missing, "TensorRT", str(error))


def _data_finding(data: Path) -> Finding:
    whole = data.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(Level.WRONG, "data", f"{data} cannot be written: see to {there}")
    state = "can be written" if there == whole else "is not there yet and can be made"
    return Finding(Level.OK, "data", f"{data} {state}")


def _broker_finding(mqtt: str) -> Finding:
    if mqtt:
        return Finding(Level.OK, "broker", f"given as {mqtt}; not asked here")
    try:
        return Finding(Level.OK, "broker", f"Mosquitto at {find_executable()}")
    except MosquittoMissing as error:
        return Finding(Level.NOTE, "broker", str(error))
