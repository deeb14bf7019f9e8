"""Tests that need an NVIDIA GPU. Everywhere else they are collected, and skipped with the reason.

    .venv/bin/python -m pytest tests/gpu

They have been written against NVIDIA's public pages and **not yet been run on a GPU**. When
they run for the first time, a failure here is right about the library and the fake in
``tests/fake_gpu.py`` is wrong: correct the fake, then the engine.
"""

from pathlib import Path

import pytest

from cloud_hub.engines import probe
from cloud_hub.engines.tensorrt import api as tensorrt_api
from cloud_hub.engines.tensorrt.cuda import Cuda
from cloud_hub.engines.tensorrt.errors import GpuUnavailable


@pytest.fixture(scope="session")
def cuda():
    """The real CUDA runtime, with a GPU behind it."""
    try:
        runtime = tensorrt_api.cuda_runtime()
        Cuda(runtime).devices()
    except GpuUnavailable as error:
        pytest.skip(f"no GPU: {error}")
    return runtime


@pytest.fixture(scope="session")
def trt(cuda):
    """The real TensorRT."""
    try:
        return tensorrt_api.tensorrt()
    except GpuUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def onnx_cuda():
    """The name of ONNX Runtime's CUDA provider, where it should work."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("no GPU: there is no /dev/nvidia0")
    if "CUDAExecutionProvider" not in probe.providers():
        pytest.skip("this ONNX Runtime is for the CPU only: pip install 'fogline[gpu]'")
    return "CUDAExecutionProvider"
