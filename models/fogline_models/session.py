"""Runs one ONNX file wholly on one execution provider, or fails.

``get_providers()`` names what was asked for, not what runs: a session for an absent provider
quietly runs on the CPU. So where each node was placed is read back and compared (model-workshop 9).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fogline_models.errors import BadInput, require
from fogline_protocol import hardware
from fogline_protocol.tensors import Array

CPU = "CPUExecutionProvider"
ALL_ROWS = 2**31 - 1  # more than there are: one run


def hardware_class(provider: str = CPU) -> str:
    """Return the hardware class of this machine, provider and installed runtime."""
    require("onnxruntime", extra="edge")
    import onnxruntime

    return hardware.hardware_class(provider, "onnxruntime", onnxruntime.__version__)


class Session:
    """One loaded ONNX file; single-threaded, as a device runs it."""

    def __init__(self, model: Path, provider: str = CPU, *, as_written: bool = False) -> None:
        """Load ``model``.

        With ``as_written`` nothing is fused: what lies between dequantize and quantize nodes
        then computes in float32, exactly what the file says. Fused, it runs in integer kernels,
        which on x86 without VNNI cut off sums that weights of 8 bits make too large.

        Raises:
            BadInput: the file is no ONNX model, or the provider cannot run all of it here.
            MissingExtra: onnxruntime is not installed.
        """
        require("onnxruntime", extra="edge")
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as native

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # what matters is raised, not printed
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if provider != CPU:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise BadInput(
                f"provider {provider} is not in this onnxruntime, it has {', '.join(available)}"
            )
        self._model = model
        self._refusals = (
            native.EPFail,
            native.Fail,
            native.InvalidArgument,
            native.InvalidGraph,
            native.InvalidProtobuf,
            native.NoSuchFile,
            native.NotImplemented,
            native.RuntimeException,
        )
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=[provider])
        except self._refusals as error:
            raise BadInput(f"{model}: {_reason(str(error), provider)}") from None
        parts = self._session.get_provider_graph_assignment_info()
        placed = {part.ep_name for part in parts}
        if placed != {provider}:
            raise BadInput(f"{model}: asked for {provider}, placed on {', '.join(sorted(placed))}")
        # One scale for all that is in a run: what a row gives depends on the rows beside it.
        self.mixes_rows = any(
            node.op_type.startswith("DynamicQuantize")
            for part in parts
            for node in part.get_nodes()
        )
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = sorted(given.name for given in self._session.get_inputs())

    def rows(self, wanted: int) -> int:
        """Return how many rows go into one run: ``wanted``, unless the file fixes them."""
        firsts = {
            spec.shape[0]
            for spec in self._session.get_inputs()
            if spec.shape and isinstance(spec.shape[0], int)
        }
        return int(firsts.pop()) if len(firsts) == 1 else wanted

    def run(
        self,
        inputs: Mapping[str, Array],
        rows_at_once: int,
        heard: Callable[[int, int], None] | None = None,
    ) -> dict[str, Array]:
        """Return every output for all rows, computed at most ``rows_at_once`` at a time.

        ``{name: [n, ...]} -> {name: [n, ...]}``. A file that mixes rows gets one at a time, as
        hub and devices run it. ``heard`` is told how many rows of how many are done.

        Raises:
            BadInput: the model refuses these inputs.
        """
        if self.mixes_rows and self.rows(0) == 0:
            rows_at_once = 1
        total = max((len(array) for array in inputs.values() if array.ndim), default=1)
        if total <= rows_at_once:  # also where an input has no rows, because no batch varies
            return dict(zip(self._outputs, self._run(inputs), strict=True))
        parts = []
        for start in range(0, total, rows_at_once):
            if heard is not None:
                heard(start, total)
            rows = {name: array[start : start + rows_at_once] for name, array in inputs.items()}
            parts.append(self._run(rows))
        return {
            name: np.concatenate([part[i] for part in parts])
            for i, name in enumerate(self._outputs)
        }

    def _run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        if sorted(inputs) != self._inputs:
            raise BadInput(
                f"{self._model}: it takes the inputs {', '.join(self._inputs) or 'none'}, "
                f"given are {', '.join(sorted(inputs)) or 'none'}"
            )
        try:
            outputs: Sequence[Array] = self._session.run(self._outputs, inputs)
        except self._refusals as error:
            raise BadInput(
                f"{self._model}: it fails on these inputs: {str(error).splitlines()[0]}"
            ) from None
        return outputs


# What onnxruntime 1.32 says of an operator that it has never heard of, or has no kernel for.
_UNKNOWN = re.compile(
    r"No Op registered for (?P<onnx>\S+) with"
    r"|Fatal error: (?P<foreign>\S+?)\(-?\d+\) is not a registered"
    r"|Could not find an implementation for (?P<kernel>\S+?\(\d+\))"
)
_TOO_NEW = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_OPSET = re.compile(
    r"Opset (\d+) is under development.* domain (\S+) is till opset (\d+)", re.DOTALL
)


def _reason(text: str, provider: str) -> str:
    """Return one sentence for onnxruntime's refusal of a file."""
    import onnxruntime

    here = f"onnxruntime {onnxruntime.__version__}"
    if found := _UNKNOWN.search(text):
        name = next(filter(None, found.groups()))
        newer = ", or in a newer opset" if found["kernel"] else ""
        return (
            f"{here} has no operator {name} for the types it is used with on {provider}: write "
            f"the model without it{newer}"
        )
    if found := _TOO_NEW.search(text):
        return (
            f"it is written in ONNX IR {found[1]}, {here} reads up to {found[2]}: export it older"
        )
    if found := _OPSET.search(text):
        return (
            f"it is written in opset {found[1]} of {found[2]}, {here} runs up to {found[3]}: "
            "export it with that"
        )
    return f"onnxruntime refuses it on {provider}: {text}"
