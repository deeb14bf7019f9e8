"""Runs one ONNX file with ONNX Runtime.

Short runs happen on the event loop, where they cost no hand-over; anything longer runs in
the engine's one worker thread. Which it is, is measured at warm-up and ever after.
"""

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from cloud_hub.errors import ModelRefused
from fogline_protocol import tensors
from fogline_protocol.inference import BadRequest
from fogline_protocol.tensors import Array, TensorSpec

INLINE_BELOW_S = 0.0015  # below it a thread hand-over costs more than it frees (performance.md)

# ONNX Runtime's names of element types; the ones left out have no Open Inference datatype.
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


class OnnxRuntimeEngine:
    """One session of one model. ``close`` it when no run is in flight."""

    platform = "onnxruntime_onnx"  # Triton's name for this kind of model

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """Load the file and run it once.

        Raises:
            ModelRefused: ONNX Runtime cannot load it, or it has tensors the protocol lacks.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        # Spinning threads burn the cores that the doors need (model-workshop.md 9).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers = [
            name
            for name in ("CUDAExecutionProvider", "CPUExecutionProvider")
            if name in onnxruntime.get_available_providers()
        ]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # onnxruntime raises its own classes without a common base
            raise ModelRefused(f"{path}: ONNX Runtime cannot load it: {error}") from None
        self.provider: str = self._session.get_providers()[0]
        self.inputs = tuple(_spec(path, node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(path, node) for node in self._session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._worker: ThreadPoolExecutor | None = None
        self._name = path.parent.parent.name
        self._expected_s = 0.0
        self._warm_up(path)

    @property
    def batches(self) -> bool:
        """Whether every tensor starts with a dimension that may vary: the batch."""
        return all(spec.shape[:1] == (-1,) for spec in (*self.inputs, *self.outputs))

    async def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return every output: ``[n, ...] -> [n, ...]``.

        Raises:
            BadRequest: a BYTES element is not UTF-8 text, which is all that ONNX knows.
        """
        if self._expected_s < INLINE_BELOW_S:
            return self._run(inputs)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"engine-{self._name}")
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._run, inputs)

    def close(self) -> None:
        """Give the worker thread and the session back."""
        if self._worker is not None:
            self._worker.shutdown()
        del self._session

    def _run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        started = time.perf_counter()
        feed = {
            name: _as_text(name, array) if array.dtype == tensors.BYTES else array
            for name, array in inputs.items()
        }
        values = self._session.run(self._output_names, feed)
        took = time.perf_counter() - started
        self._expected_s += 0.2 * (took - self._expected_s)
        return {
            name: _objects((text.encode() for text in array.flat), array)
            if array.dtype == tensors.BYTES
            else array
            for name, array in zip(self._output_names, values, strict=True)
        }

    def _warm_up(self, path: Path) -> None:
        zeros = {
            spec.name: np.zeros(
                [max(dim, 1) for dim in spec.shape], tensors.dtype_of(spec.datatype)
            )
            for spec in self.inputs
            if spec.datatype != "BYTES"
        }
        if len(zeros) != len(self.inputs):
            self._expected_s = INLINE_BELOW_S  # nothing is known of it: not on the loop
            return
        try:
            self._run(zeros)  # the first run allocates: not representative
            started = time.perf_counter()
            self._run(zeros)
            self._expected_s = time.perf_counter() - started
        except Exception as error:
            # Free dimensions of 1 need not suit a model; real requests will tell.
            self._expected_s = INLINE_BELOW_S
            if all(dim != -1 for spec in self.inputs for dim in spec.shape[1:]):
                raise ModelRefused(f"{path}: the model fails on zeros: {error}") from None


def _as_text(name: str, array: Array) -> Array:
    try:
        return _objects((element.decode() for element in array.flat), array)
    except UnicodeDecodeError as error:
        raise BadRequest(f"input {name!r}: an element is not UTF-8 text: {error}") from None


def _objects(elements: Iterable[object], like: Array) -> Array:
    # Not numpy's own text: it gives every element the room of the longest.
    flat = np.empty(like.size, dtype=object)
    flat[:] = list(elements)
    return flat.reshape(like.shape)


def _spec(path: Path, node: onnxruntime.NodeArg) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise ModelRefused(f"{path}: tensor {node.name!r} is {node.type}, which cannot be served")
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in node.shape)
    return TensorSpec(node.name, datatype, shape)
