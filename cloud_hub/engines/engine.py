"""What runs a model: the two contracts of this package.

A ``Session`` is one loaded model, run by the thread that calls it. An ``Engine`` is what the
batcher waits for: a session in this process (``inline.py``), one in a child process
(``process.py``), or another server.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cloud_hub.errors import ModelRefused
from fogline_protocol import tensors
from fogline_protocol.errors import Unavailable
from fogline_protocol.tensors import Array, TensorSpec

Arrays = Mapping[str, Array]

# An output beside those of the contract, BYTES [n]: the digest of the model that computed each
# row, as far as an engine learns it with the answer; b"" where it is not told. A column, so that
# it is split, joined and kept with the rows it speaks of.
DIGEST = "fogline.digest"


class EngineLost(Unavailable):
    """The engine died, hung or cannot be trusted any more. It is being replaced."""


class Contract(Protocol):
    """What is known of a loaded model."""

    @property
    def platform(self) -> str:
        """Triton's name for this kind of model, e.g. ``onnxruntime_onnx``."""

    @property
    def provider(self) -> str:
        """What computes, e.g. ``CPUExecutionProvider``."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The tensors it takes: whole shapes, -1 where variable, the batch dimension included."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The tensors it gives."""


class Session(Contract, Protocol):
    """One loaded model, run on the thread that calls it."""

    def run(self, inputs: Arrays) -> Arrays:
        """Return every output: ``[n, ...] -> [n, ...]``.

        Raises:
            BadRequest: the values do not suit the model.
            EngineLost: every later run would fail too.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; no run is in flight."""
        ...


class Engine(Contract, Protocol):
    """One loaded model, whose runs are waited for. One run at a time."""

    @property
    def trouble(self) -> str:
        """Why it cannot run until further notice; empty if it runs or is only just replaced."""

    @property
    def digest(self) -> str:
        """What computes, where only the engine can know: a SHA-256 it was told; else empty."""

    @property
    def memory_bytes(self) -> int:
        """What a process of its own holds resident; 0 if it has none."""

    async def ready(self) -> None:
        """Return when a run could start at once: not while it is being replaced.

        Raises:
            EngineLost: it could not be replaced this time. Called again, it waits for the next one.
        """
        ...

    def join(self, requests: Sequence[Arrays]) -> Arrays:
        """Return the rows of several requests one after the other, where a run takes them best.

        They are valid until something else is joined or run.
        """
        ...

    async def run(self, inputs: Arrays, deadline: float | None = None) -> Arrays:
        """Return every output, one row per input row: ``[n, ...] -> [n, ...]``.

        Args:
            inputs: by name.
            deadline: when nobody waits for the outputs any more, in seconds of
                ``time.monotonic()``; None: somebody always will. An engine that can stop a run
                does not go on after it.

        Raises:
            BadRequest: the values do not suit the model.
            EngineLost: it died or hung over them.
        """
        ...

    async def close(self) -> None:
        """Give back what it holds; no run is in flight."""
        ...


def join(requests: Sequence[Arrays]) -> Arrays:
    """Return the rows of several requests one after the other, in memory of their own."""
    return {name: np.concatenate([request[name] for request in requests]) for name in requests[0]}


def seconds_per_row(session: Session) -> float | None:
    """Run a row of zeros twice and return how long the second run took; None: cannot be told.

    The first run allocates, so it is not representative.

    Raises:
        ModelRefused: it fails on zeros although all of its shapes are known.
    """
    if any(spec.datatype == "BYTES" for spec in session.inputs):
        return None  # nothing is known of what texts it takes
    zeros = {
        spec.name: np.zeros([max(dim, 1) for dim in spec.shape], tensors.dtype_of(spec.datatype))
        for spec in session.inputs
    }
    try:
        session.run(zeros)
        started = time.perf_counter()
        session.run(zeros)
        return time.perf_counter() - started
    except Exception as error:  # every runtime has errors of its own
        # Free dimensions of 1 need not suit a model; real requests will tell.
        if any(dim == -1 for spec in session.inputs for dim in spec.shape[1:]):
            return None
        raise ModelRefused(f"the model fails on zeros: {error}") from None
