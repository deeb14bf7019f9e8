"""Runs one ONNX file wholly on one execution provider, or fails.

``get_providers()`` names what was asked for, not what runs: a session for an absent provider
quietly runs on the CPU. So where each node was placed is read back and compared (model-workshop 9).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fogline_models.errors import BadInput, require
from fogline_protocol import hardware
from fogline_protocol.tensors import Array

CPU = "CPUExecutionProvider"


def hardware_class(provider: str = CPU) -> str:
    """Return the hardware class of this machine, provider and installed runtime."""
    require("onnxruntime", extra="edge")
    import onnxruntime

    return hardware.hardware_class(provider, "onnxruntime", onnxruntime.__version__)


class Session:
    """One loaded ONNX file; single-threaded, as a device runs it."""

    def __init__(self, model: Path, provider: str = CPU) -> None:
        """Load ``model``.

        Raises:
            BadInput: the file is no ONNX model, or the provider cannot run all of it here.
            MissingExtra: onnxruntime is not installed.
        """
        require("onnxruntime", extra="edge")
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = (
            3  # what matters is raised; warnings of the graph pass are noise
        )
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise BadInput(
                f"provider {provider} is not in this onnxruntime, it has {', '.join(available)}"
            )
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=[provider])
        except (
            native.EPFail,
            native.Fail,
            native.InvalidArgument,
            native.InvalidGraph,
            native.InvalidProtobuf,
            native.NoSuchFile,
            native.NotImplemented,
            native.RuntimeException,
        ) as error:
            raise BadInput(f"{model}: onnxruntime refuses it on {provider}: {error}") from None
        placed = {part.ep_name for part in self._session.get_provider_graph_assignment_info()}
        if placed != {provider}:
            raise BadInput(f"{model}: asked for {provider}, placed on {', '.join(sorted(placed))}")
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array], rows_at_once: int) -> dict[str, Array]:
        """Return every output for all rows, computed ``rows_at_once`` at a time.

        ``{name: [n, ...]} -> {name: [n, ...]}``
        """
        total = len(next(iter(inputs.values())))
        parts = [
            self._session.run(
                self._outputs,
                {name: array[start : start + rows_at_once] for name, array in inputs.items()},
            )
            for start in range(0, total, rows_at_once)
        ]
        return {
            name: np.concatenate([part[i] for part in parts])
            for i, name in enumerate(self._outputs)
        }
