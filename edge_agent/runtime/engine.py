"""Runs one loaded variant: arrays in, arrays out.

Short runs happen on the event loop, where they cost no hand-over; longer ones in the
engine's one worker thread. Which it is, is predicted from earlier runs of about as many rows.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.providers import strict_session
from fogline_protocol import tensors
from fogline_protocol.errors import BadRequest, DeadlineExceeded, ServerFault, Unavailable
from fogline_protocol.tensors import Array, TensorSpec

INLINE_BELOW_S = 0.0015  # below it a hand-over costs more than it frees (performance.md)
SMOOTHING = 0.2  # weight of the newest run: follows a throttled device within some ten runs

# ONNX Runtime's names of element types that have an Open Inference datatype and a numpy dtype.
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class RunTimes:
    """Predicts how long a run takes, by powers of two of its rows."""

    def __init__(self) -> None:
        self._by_size: dict[int, float] = {}  # bit length of the rows -> seconds

    def learn(self, rows: int, seconds: float) -> None:
        """Take in one measured run."""
        size = rows.bit_length()
        known = self._by_size.get(size)
        self._by_size[size] = seconds if known is None else known + SMOOTHING * (seconds - known)

    def predict(self, rows: int) -> float | None:
        """Return the expected seconds, None if nothing is known.

        For a size never seen the nearest smaller one is scaled up, as if nothing were
        gained by batching; a larger one stands as it is.
        """
        size = rows.bit_length()
        known = self._by_size.get(size)
        if known is not None or not self._by_size:
            return known
        nearest = max((s for s in self._by_size if s < size), default=min(self._by_size))
        return self._by_size[nearest] * 2.0 ** max(size - nearest, 0)


class Engine:
    """One session on one provider. ``close`` it when no run is in flight."""

    def __init__(
        self,
        path: Path,
        *,
        provider: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        threads: int = 0,
        inline_below_s: float = INLINE_BELOW_S,
    ) -> None:
        """Load the file, hold it against its contract, and run it once.

        Raises:
            ReleaseRefused: it does not load wholly on ``provider``, has other tensors than
                the bundle says, or fails on zeros.
        """
        self.provider = provider
        self._path = path
        session = strict_session(path, provider, threads)
        self._session: onnxruntime.InferenceSession | None = session
        _check_contract(path, "input", session.get_inputs(), inputs)
        _check_contract(path, "output", session.get_outputs(), outputs)
        self._text_inputs = frozenset(spec.name for spec in inputs if spec.datatype == "BYTES")
        self._text_outputs = frozenset(spec.name for spec in outputs if spec.datatype == "BYTES")
        self._inline_below_s = inline_below_s
        self._worker: ThreadPoolExecutor | None = None
        self.times = RunTimes()
        self.faults = 0  # runs that failed on inputs that fit the contract
        self._warm_up(inputs, [spec.name for spec in outputs])

    def __repr__(self) -> str:
        state = "closed" if self._session is None else f"one row in {self.times.predict(1)} s"
        return f"<Engine {self._path.name} on {self.provider}, {state}>"

    async def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        rows: int,
        deadline: float | None = None,
    ) -> list[Array]:
        """Return the tensors named by ``outputs``: ``[n, ...] -> [n, ...]``, n being ``rows``.

        Raises:
            BadRequest: a BYTES element is not UTF-8 text.
            DeadlineExceeded: ``deadline`` (seconds, monotonic) passed before the run was done.
            ServerFault: the model failed on inputs that fit its contract.
            Unavailable: the engine was closed.
        """
        expected_s = self.times.predict(rows)
        if expected_s is not None and expected_s < self._inline_below_s:
            return self._run(inputs, outputs, rows)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{self._path.stem}")
        try:
            # Linux: the loop's clock is time.monotonic().
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(
                    self._worker, self._run, inputs, outputs, rows
                )
        except TimeoutError:
            raise DeadlineExceeded("the time ran out before the model was done") from None

    def close(self) -> None:
        """Give the worker thread and the session back."""
        if self._worker is not None:
            # Not waited for: a caller who left may have left its run behind, which still
            # holds the session.
            self._worker.shutdown(wait=False)
        self._session = None  # its memory goes back once nobody runs on it

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str], rows: int) -> list[Array]:
        if self._text_inputs:
            inputs = {
                name: _as_text(name, array) if name in self._text_inputs else array
                for name, array in inputs.items()
            }
        session = self._session
        if session is None:
            raise Unavailable("the release was replaced meanwhile")
        started = time.perf_counter()
        try:
            values: list[Array] = session.run(outputs, inputs)
        except Exception as error:  # onnxruntime's classes have no base of their own
            self.faults += 1
            raise ServerFault(f"the model failed: {error}") from error
        self.times.learn(rows, time.perf_counter() - started)
        if self._text_outputs:
            values = [
                _as_bytes(array) if name in self._text_outputs else array
                for name, array in zip(outputs, values, strict=True)
            ]
        return values

    def _warm_up(self, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
        # Free dimensions beside the batch may not take a 1: then real requests have to tell.
        if any(-1 in spec.shape[1:] for spec in inputs):
            return
        zeros = {
            spec.name: np.full(
                [max(dim, 1) for dim in spec.shape],
                b"" if spec.datatype == "BYTES" else 0,
                tensors.dtype_of(spec.datatype),
            )
            for spec in inputs
        }
        try:
            self._run(zeros, outputs, 1)  # the first run allocates: not representative
            self.times = RunTimes()
            self._run(zeros, outputs, 1)
        except ServerFault as error:
            raise ReleaseRefused(f"{self._path}: fails on zeros: {error}") from None


def _check_contract(
    path: Path,
    kind: str,
    found: Sequence[onnxruntime.NodeArg],
    wanted: Sequence[TensorSpec],
) -> None:
    nodes = {node.name: node for node in found}
    missing = [spec.name for spec in wanted if spec.name not in nodes]
    surplus = sorted(set(nodes) - {spec.name for spec in wanted}) if kind == "input" else []
    if missing or surplus:
        raise ReleaseRefused(
            f"{path}: the bundle names the {kind}s {[s.name for s in wanted]}, "
            f"the file has {list(nodes)}"
        )
    for spec in wanted:
        node = nodes[spec.name]
        datatype = _DATATYPES.get(node.type, node.type)
        shape = [dim if isinstance(dim, int) else -1 for dim in node.shape]
        fits = len(shape) == len(spec.shape) and all(
            -1 in (have, want) or have == want for have, want in zip(shape, spec.shape, strict=True)
        )
        if datatype != spec.datatype or not fits:
            raise ReleaseRefused(
                f"{path}: {kind} {spec.name!r} is {datatype} {shape}, "
                f"the bundle says {spec.datatype} {list(spec.shape)}"
            )


def _as_text(name: str, array: Array) -> Array:
    try:
        return _objects([element.decode() for element in array.flat], array)
    except UnicodeDecodeError as error:
        raise BadRequest(f"input {name!r}: an element is not UTF-8 text: {error}") from None


def _as_bytes(array: Array) -> Array:
    return _objects([element.encode() for element in array.flat], array)


def _objects(elements: Sequence[object], like: Array) -> Array:
    flat = np.empty(len(elements), dtype=object)
    flat[:] = elements
    return flat.reshape(like.shape)
