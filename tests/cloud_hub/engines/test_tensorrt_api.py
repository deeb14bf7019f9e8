"""One bridge to TensorRT and CUDA, crossed on use; and the names on its far side exist."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from cloud_hub.engines.tensorrt import api
from cloud_hub.engines.tensorrt.cuda import Cuda
from cloud_hub.engines.tensorrt.errors import GpuUnavailable

PRODUCT = [Path(__file__).parents[3] / name for name in ("cloud_hub", "edge_agent", "protos")]


def test_importing_the_hub_loads_neither_tensorrt_nor_cuda(tmp_path):
    for name in ("tensorrt", "cuda"):  # installed, as far as Python can tell
        (tmp_path / f"{name}.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import cloud_hub.hub, cloud_hub.doctor, cloud_hub.engines.tensorrt.session\n"
        "import cloud_hub.engines.tensorrt.plans, cloud_hub.engines.probe\n"
        "print({'tensorrt', 'cuda'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_there_is_one_bridge():
    """The import rules cannot see ``importlib``."""
    crossing = {
        path.name
        for folder in PRODUCT
        for path in folder.rglob("*.py")
        for word in ('import_module("tensorrt', 'import_module("cuda', "__import__(")
        if word in path.read_text(encoding="utf-8")
    }
    assert crossing == {"api.py"}


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch):
    for name in ("tensorrt", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    for bridge in (api.tensorrt, api.cuda_runtime):
        with pytest.raises(GpuUnavailable, match=r"is not installed .*'fogline\[gpu\]'"):
            bridge()


def test_the_real_cuda_bindings_have_every_name_and_say_what_is_missing():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    called = {
        name for name, _ in inspect.getmembers(api.CudaRuntime) if name.startswith("cuda")
    } | set(api.CudaRuntime.__annotations__)
    assert len(called) > 15
    assert not {name for name in called if not hasattr(runtime, name)}
    cuda = Cuda(api.cuda_runtime())
    if any(Path("/dev").glob("nvidia[0-9]*")):
        assert cuda.devices()
        return
    for refused in (cuda.devices, lambda: cuda.use(0), lambda: cuda.allocate(16), cuda.stream):
        with pytest.raises(GpuUnavailable, match="driver"):
            refused()
