"""A session of ONNX Runtime: the embedded default, on the CPU or through CUDA."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime

from cloud_hub.engines.engine import Arrays
from cloud_hub.engines.priority import at_low_priority
from cloud_hub.errors import ModelRefused
from fogline_protocol import tensors
from fogline_protocol.errors import BadRequest
from fogline_protocol.tensors import Array, TensorSpec

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

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


def usable_providers() -> list[str]:
    """Return what this build of ONNX Runtime offers of the providers we use, the fastest first."""
    compiled_in = onnxruntime.get_available_providers()
    return [provider for provider in (CUDA, CPU) if provider in compiled_in]


class OnnxRuntimeSession:
    """One ONNX file, loaded."""

    platform = "onnxruntime_onnx"

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """Load the file; ``threads`` per run, 0 for as many as there are cores.

        Raises:
            ModelRefused: ONNX Runtime cannot load it, or it has tensors the protocol lacks.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        # Spinning threads burn the cores that the doors need (model-workshop.md 9).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers = usable_providers()

        def load() -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(path, options, providers=providers)

        # Threads of its own, or of CUDA, would stay at the priority that they are started at.
        alone = options.intra_op_num_threads == 1 and providers == [CPU]
        try:
            self._session = at_low_priority(load) if alone else load()
        except Exception as error:  # onnxruntime raises its own classes without a common base
            raise ModelRefused(f"{path}: ONNX Runtime cannot load it: {error}") from None
        self.provider: str = self._session.get_providers()[0]
        self.inputs = tuple(_spec(path, node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(path, node) for node in self._session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._texts = any(spec.datatype == "BYTES" for spec in (*self.inputs, *self.outputs))

    def run(self, inputs: Arrays) -> Arrays:
        """Return every output: ``[n, ...] -> [n, ...]``.

        Raises:
            BadRequest: a BYTES element is not UTF-8 text, which is all that ONNX knows.
        """
        if not self._texts:
            return dict(
                zip(self._output_names, self._session.run(self._output_names, inputs), strict=True)
            )
        feed = {
            name: _as_text(name, array) if array.dtype == tensors.BYTES else array
            for name, array in inputs.items()
        }
        values = self._session.run(self._output_names, feed)
        return {
            name: _objects((text.encode() for text in array.flat), array)
            if array.dtype == tensors.BYTES
            else array
            for name, array in zip(self._output_names, values, strict=True)
        }

    def close(self) -> None:
        """Give the session back."""
        del self._session


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
