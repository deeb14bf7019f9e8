"""What runs a model: the two small contracts of this package."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from fogline_protocol.tensors import Array, TensorSpec

Arrays = Mapping[str, Array]


class Session(Protocol):
    """One loaded model, run on the thread that calls it. Lives in a child process or inline."""

    platform: str  # Triton's name of this kind of model, e.g. "tensorrt_plan"
    provider: str  # what computes: "CPUExecutionProvider", "TensorRT"
    inputs: Sequence[TensorSpec]  # whole shapes, -1 where variable, batch dimension included
    outputs: Sequence[TensorSpec]

    def run(self, inputs: Arrays) -> Arrays:
        """Return every output, by name."""
        ...

    def close(self) -> None:
        """Give back what the session holds."""
        ...
