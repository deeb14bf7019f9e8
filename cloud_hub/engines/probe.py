"""What this machine can really run, proven by running something on it.

ONNX Runtime lists what it was compiled with, and answers an absent provider with a session on
the CPU and a warning; a driver may be there and too old; TensorRT may import and build nothing.
So each of them computes a graph of two nodes, and its answer is compared.
"""

import asyncio
import base64
import hashlib
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from cloud_hub.engines.tensorrt.errors import PlanRefused
from cloud_hub.engines.tensorrt.plan_key import profile_for
from cloud_hub.engines.tensorrt.plans import PlanBuilder, find_platform
from cloud_hub.engines.tensorrt.session import TensorRtSession
from cloud_hub.errors import ModelRefused
from fogline_protocol.errors import InferenceError
from fogline_protocol.tensors import Array, TensorSpec

CPU = "CPUExecutionProvider"

_REMOTE = "AzureExecutionProvider"  # sends tensors to a service: never what a hub should do
_BUILD_LIMIT_S = 300.0  # seconds are usual; the first build on a machine loads every kernel
_TOLERANCE = 1e-3  # of numbers between 0 and 1: TF32 keeps ten bits

# y = softmax(x + x), FP32 [n, 4], opset 17.
_PROBE = base64.b64decode(
    "CAkSB2ZvZ2xpbmU6ZAoWCgF4CgF4EgFzGgZub2RlXzAiA0FkZAoXCgFzEgF5GgZub2RlXzEiB1NvZnRtYXgSBWdyYXBoWhQKAXgSDwoNCAESCQoDEgFuCgIIBGIUCgF5Eg8KDQgBEgkKAxIBbgoCCARCAhAR"
)
_X = np.array([[0.1, -0.2, 0.3, 0.4], [1, 2, -3, 0.5], [0, 0, 0, 0]], np.float32)


def providers() -> tuple[str, ...]:
    """Return the local providers that this ONNX Runtime was compiled with, best first."""
    return tuple(name for name in onnxruntime.get_available_providers() if name != _REMOTE)


def strict_session(model: Path | bytes, provider: str) -> onnxruntime.InferenceSession:
    """Return a session that runs wholly on this provider.

    Raises:
        ModelRefused: ONNX Runtime cannot load the model, or would place part of it elsewhere.
    """
    what = "the probe" if isinstance(model, bytes) else str(model)
    if provider not in onnxruntime.get_available_providers():
        raise ModelRefused(f"this ONNX Runtime does not have {provider}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, and said by us
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # onnxruntime's classes have no base of their own
        raise ModelRefused(f"{what}: not loaded on {provider}: {_one_line(error)}") from None
    placed = {part.ep_name for part in session.get_provider_graph_assignment_info()}
    if placed - {provider}:
        raise ModelRefused(f"{what}: asked for {provider}, placed on {', '.join(sorted(placed))}")
    return session


def provider_objection(provider: str) -> str | None:
    """Return why ONNX Runtime cannot use this provider here, or None: it ran."""
    try:
        (found,) = strict_session(_PROBE, provider).run(None, {"x": _X})
    except ModelRefused as error:
        return str(error)
    except Exception as error:  # as above: a driver that loads and then fails
        return f"the probe failed on {provider}: {_one_line(error)}"
    return _difference(found)


async def tensorrt_objection() -> str | None:
    """Build a small plan, run it, and return what was wrong with it; None: nothing was.

    The plan is built in a child process, as the hub does it, and thrown away.
    """
    with tempfile.TemporaryDirectory(prefix="fogline-doctor-") as name:
        folder = Path(name)
        model = folder / "probe.onnx"
        model.write_bytes(_PROBE)
        profile = profile_for([TensorSpec("x", "FP32", (-1, 4))], max_batch=8)
        try:
            builder = PlanBuilder(folder, await find_platform(), limit_s=_BUILD_LIMIT_S)
            plan = await builder.plan(model, hashlib.sha256(_PROBE).hexdigest(), profile)
        except PlanRefused as error:
            return f"no plan could be built: {error}"
        except ModelRefused as error:
            return str(error)
        return await asyncio.to_thread(_plan_objection, plan)


def _plan_objection(plan: Path) -> str | None:
    try:
        session = TensorRtSession(plan)
    except (ModelRefused, InferenceError) as error:
        return f"the plan that was just built cannot be loaded: {error}"
    try:
        return _difference(session.run({"x": _X})["y"])
    except InferenceError as error:
        return f"the plan that was just built does not run: {error}"
    finally:
        session.close()


def _difference(found: Array) -> str | None:
    powers = np.exp(_X + _X)
    expected = powers / powers.sum(axis=1, keepdims=True)
    if found.shape != expected.shape:
        return f"the probe's answer has shape {list(found.shape)}, expected {list(expected.shape)}"
    worst = float(np.abs(found - expected).max())
    return None if worst <= _TOLERANCE else f"the probe's answer is off by up to {worst:.3g}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
