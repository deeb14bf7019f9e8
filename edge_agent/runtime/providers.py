"""What this device can really run: execution providers, proven by running something on them.

ONNX Runtime answers an absent provider with a session on the CPU and a warning, and lists
as available whatever it was compiled with. So a provider counts as usable only after it has
run a graph of one node, placed on nothing else.
"""

import base64
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from edge_agent.errors import ReleaseRefused
from fogline_protocol import hardware

CPU = "CPUExecutionProvider"
RUNTIME = "onnxruntime"
_REMOTE = "AzureExecutionProvider"  # sends tensors to a service: never what a device should do

# y = x + x, FP32 [1], opset 13: the smallest graph that no optimizer removes.
_PROBE = base64.b64decode(
    "CAgSB2ZvZ2xpbmU6NQoOCgF4CgF4EgF5IgNBZGQSAXBaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN"
)


@dataclass(frozen=True, slots=True)
class Provider:
    """One execution provider that ONNX Runtime was compiled with."""

    name: str
    objection: str | None  # why it cannot be used here; None: it ran

    @property
    def usable(self) -> bool:
        """Whether the provider ran the probe by itself."""
        return self.objection is None


@functools.cache
def probe() -> tuple[Provider, ...]:
    """Return every local provider, best first, with the proof of its use.

    The hardware does not change under a running process, so it is asked once.
    """
    return tuple(
        Provider(name, _objection(name))
        for name in onnxruntime.get_available_providers()
        if name != _REMOTE
    )


def usable() -> tuple[str, ...]:
    """Return the names of the providers that really run here, best first."""
    return tuple(provider.name for provider in probe() if provider.usable)


def hardware_class(provider: str) -> str:
    """Return this device's hardware class for ``provider``."""
    return hardware.hardware_class(provider, RUNTIME, onnxruntime.__version__)


def runtime_version() -> str:
    """Return the whole version of the runtime; a hardware class names only what kernels change by."""
    return str(onnxruntime.__version__)


def strict_session(
    model: Path | bytes, provider: str, threads: int
) -> onnxruntime.InferenceSession:
    """Return a session that runs wholly on ``provider``.

    Raises:
        ReleaseRefused: ONNX Runtime cannot load the model, or would place part of it elsewhere.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, and said by us
    # Spinning threads save no time on a paced device and cost most of its CPU
    # (model-workshop.md 9).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # ONNX Runtime itself would warn, and go on with the CPU.
    if provider not in onnxruntime.get_available_providers():
        raise ReleaseRefused(f"this ONNX Runtime does not have {provider}")
    source = model if isinstance(model, bytes) else str(model)
    what = "the probe" if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # onnxruntime's classes have no base of their own
        raise ReleaseRefused(f"{what}: not loaded on {provider}: {error}") from None
    placed = {part.ep_name for part in session.get_provider_graph_assignment_info()}
    if placed - {provider}:
        raise ReleaseRefused(f"{what}: asked for {provider}, placed on {', '.join(sorted(placed))}")
    return session


def _objection(provider: str) -> str | None:
    try:
        session = strict_session(_PROBE, provider, 1)
        (result,) = session.run(None, {"x": np.ones(1, np.float32)})
    except ReleaseRefused as error:
        return str(error)
    except Exception as error:  # as above: a driver that loads and then fails
        return f"the probe failed on {provider}: {error}"
    return None if result[0] == 2.0 else f"the probe gave {result[0]} on {provider}, expected 2"
