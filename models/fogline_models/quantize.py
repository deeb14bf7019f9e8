"""Quantizes an fp32 ONNX file to int8 with quantize and dequantize nodes, for x86 processors.

Activations uint8, weights int8, per channel: the form that reaches integer kernels on x86.
TensorRT and ARM want other forms, each a variant of its own (model-workshop 4). Ranges are
read off training inputs; the threshold's calibration items are never seen here.

Weights use 7 of their 8 bits, so that one file is right on every x86 processor. Without VNNI
a kernel adds two products of uint8 and int8 in 16 bits and cuts off what does not fit:

    8 bits   255 * 127 * 2 = 64,770 > 32,767   cut off: logits of digits strayed by up to 8.8
    7 bits   255 *  64 * 2 = 32,640            always fits, as on VNNI, which adds in 32 bits

What the lost bit costs in accuracy is measured in models/digits/README.md. On VNNI, where
nothing saturates, it buys nothing: that is the price of one file instead of two.
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
    """Write the int8 form of ``fp32`` to ``path``; ranges come from ``training_inputs``.

    Its weights lie within [-64, 64].
    """
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
            reduce_range=True,  # weights only; see above
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        finish(onnx.load(str(quantized)), props, path)
