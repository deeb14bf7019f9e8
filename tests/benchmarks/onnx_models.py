"""Writes the models that benchmarks serve: ``python onnx_models.py FOLDER``.

Run by the interpreter of a peer's environment (``peers.py``), because only there is the package
``onnx``; so this file imports nothing of ours. Weights are random with a fixed seed, which
costs a run exactly what trained ones do.

tiny     x FP32 [n, 8, 8] -> y FP32 [n, 10]: two small layers, some 20 us per run
mid_u8   image UINT8 [n, 224, 224, 3] -> logits FP32 [n, 1000]: MobileNetV2 behind a cast, a scale
         and a transpose, 14 MB, some 10 ms per run
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

# Sandler et al. 2018, table 2: expansion, channels, blocks, stride of the first one.
BLOCKS = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
    (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class Graph:
    """Nodes and weights in the order in which they were added."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def weight(self, values: npt.NDArray[np.float32]) -> str:
        """Add a constant and return its name."""
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def random(self, *shape: int) -> str:
        """Add weights whose size keeps activations from growing or vanishing."""
        fan_in = int(np.prod(shape[1:]))
        values = self._random.normal(0, (2 / fan_in) ** 0.5, shape)
        return self.weight(values.astype(np.float32))

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node and return the name of its output."""
        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def conv(self, x: str, out: int, inside: int, kernel: int, stride: int, group: int = 1) -> str:
        """Add a padded convolution with a bias."""
        return self.node(
            "Conv",
            x,
            self.random(out, inside // group, kernel, kernel),
            self.weight(np.zeros(out, np.float32)),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=group,
        )

    def relu6(self, x: str) -> str:
        """Add the activation that MobileNets use."""
        zero, six = (self.weight(np.array(limit, np.float32)) for limit in (0, 6))
        return self.node("Clip", x, zero, six)

    def dense(self, x: str, inside: int, out: int) -> str:
        """Add a layer ``[n, inside] -> [n, out]``."""
        bias = self.weight(np.zeros(out, np.float32))
        return self.node("Gemm", x, self.random(out, inside), bias, transB=1)

    def save(self, path: Path, given: onnx.ValueInfoProto, last: str, out: str, size: int) -> None:
        """Write the model whose only output is ``last``, called ``out``: ``[n, size]``."""
        self._nodes.append(helper.make_node("Identity", [last], [out]))
        result = helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", size])
        graph = helper.make_graph(self._nodes, path.stem, [given], [result], self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def tiny(path: Path) -> None:
    """Write the model whose runs cost less than any call to it."""
    graph = Graph()
    hidden = graph.node("Relu", graph.dense(graph.node("Flatten", "x"), 64, 32))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 8])
    graph.save(path, given, graph.dense(hidden, 32, 10), "y", 10)


def mid_u8(path: Path) -> None:
    """Write a CNN of the size that phones run, fed with pictures as cameras give them."""
    graph = Graph()
    x = graph.node("Cast", "image", to=TensorProto.FLOAT)
    x = graph.node("Mul", x, graph.weight(np.array(1 / 127.5, np.float32)))
    x = graph.node("Sub", x, graph.weight(np.array(1, np.float32)))
    x = graph.node("Transpose", x, perm=[0, 3, 1, 2])
    x = graph.relu6(graph.conv(x, 32, 3, 3, 2))
    inside = 32
    for expansion, out, blocks, first_stride in BLOCKS:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            wide = inside * expansion
            y = x if expansion == 1 else graph.relu6(graph.conv(x, wide, inside, 1, 1))
            y = graph.relu6(graph.conv(y, wide, wide, 3, stride, group=wide))
            y = graph.conv(y, out, wide, 1, 1)
            x = graph.node("Add", x, y) if stride == 1 and inside == out else y
            inside = out
    x = graph.relu6(graph.conv(x, 1280, inside, 1, 1))
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    given = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 224, 224, 3])
    graph.save(path, given, graph.dense(x, 1280, 1000), "logits", 1000)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tiny(folder / "tiny.onnx")
    mid_u8(folder / "mid_u8.onnx")
