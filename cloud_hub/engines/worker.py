"""The child process of an engine: loads one model, then answers runs until its hub is gone.

Nothing is decided here. What goes wrong in a run is answered; what ends the process is the
parent's to notice (``process.py``).
"""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cloud_hub.engines.channel import Channel, Gone
from cloud_hub.engines.engine import EngineLost, Session, seconds_per_row
from cloud_hub.engines.priority import at_low_priority
from cloud_hub.errors import ModelRefused
from fogline_protocol.errors import BadRequest

MAX_TEXT = 4096  # of an error: a datagram holds more, a caller's patience does not
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The kernel takes an engine before the hub that can replace it.
OOM_SCORE = "500"


def main() -> None:
    """Serve the parent at the other end of the socket whose descriptor is the first argument."""
    _depend_on_parent(int(sys.argv[2]))
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    with contextlib.suppress(Gone):  # the hub closed the engine, or is no more
        _serve(channel)


def _serve(channel: Channel) -> None:
    job, _ = channel.receive()
    try:
        session = _OPEN[job["runtime"]](job)
        row_s = seconds_per_row(session)
    except (ModelRefused, EngineLost) as error:
        channel.send({"refused": str(error)[:MAX_TEXT], "kind": type(error).__name__})
        return
    except MemoryError:
        channel.send({"refused": "not enough memory to load it", "kind": "MemoryError"})
        return
    channel.send(
        {
            "platform": session.platform,
            "provider": session.provider,
            "inputs": [(spec.name, spec.datatype, spec.shape) for spec in session.inputs],
            "outputs": [(spec.name, spec.datatype, spec.shape) for spec in session.outputs],
            "row_s": row_s,
        }
    )
    while True:
        _, inputs = channel.receive()
        try:
            channel.send({}, session.run(inputs))
        except Gone:
            raise
        except EngineLost as error:  # a new process may fare better
            channel.send({"error": str(error)[:MAX_TEXT], "blame": "lost"})
            return
        except Exception as error:  # every runtime has errors of its own
            blame = "caller" if isinstance(error, BadRequest) else "engine"
            text = str(error) or type(error).__name__
            channel.send({"error": text[:MAX_TEXT], "blame": blame})


def _onnx_runtime(job: Mapping[str, Any]) -> Session:
    runtime = at_low_priority(lambda: importlib.import_module("cloud_hub.engines.onnx_runtime"))
    session: Session = runtime.OnnxRuntimeSession(Path(job["path"]), threads=job["threads"])
    return session


def _tensorrt(job: Mapping[str, Any]) -> Session:
    from cloud_hub.engines.tensorrt.session import TensorRtSession

    return TensorRtSession(Path(job["path"]))


_OPEN: Mapping[str, Callable[[Mapping[str, Any]], Session]] = {
    "onnxruntime": _onnx_runtime,
    "tensorrt": _tensorrt,
}


def _depend_on_parent(parent: int) -> None:
    """End with the hub, and not before it: signals meant for the whole group are its business."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could take us along
        sys.exit(1)
    with contextlib.suppress(OSError):  # not allowed here: then the kernel chooses by size
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
