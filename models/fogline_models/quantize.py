"""Quantizes an fp32 ONNX file to int8 with quantize and dequantize nodes, for x86 processors.

Activations uint8, weights int8, per channel: the form that reaches integer kernels on VNNI.
TensorRT and ARM want other forms, each a variant of its own (model-workshop 4). Ranges are
read off training inputs; the threshold's calibration items are never seen here.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fogline_models.export import finish
from fogline_protocol.tensors import Array

RANGE_BATCH = 64


class _Batches:
    """Feeds inputs to the quantizer, in its own words."""

    def __init__(self, inputs: Mapping[str, Array]) -> None:
        self._left = self._cut(inputs)

    @staticmethod
    def _cut(inputs: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        for start in range(0, len(next(iter(inputs.values()))), RANGE_BATCH):
            yield {name: array[start : start + RANGE_BATCH] for name, array in inputs.items()}

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


def quantize(
    fp32: Path, training_inputs: Mapping[str, Array], props: Mapping[str, str], path: Path
) -> None:
    """Write the int8 form of ``fp32`` to ``path``; ranges come from ``training_inputs``."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "quantized.onnx")
        # Symbolic shape inference adds nothing for static nets and knows fewer operators.
        quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(quantized),
            _Batches(training_inputs),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        finish(onnx.load(str(quantized)), props, path)
