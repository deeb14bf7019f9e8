"""Small nets built with ``onnx.helper``: models that the workshop did not make."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fogline_protocol.tensors import Array

FLOAT = TensorProto.FLOAT


def tensor(name: str, shape: Sequence[int | str | None], kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    domains: Sequence[str] = (),
    functions: Sequence[Any] = (),
) -> Any:
    graph = helper.make_graph(
        nodes,
        "net",
        inputs,
        outputs,
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def random(*shape: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
    return values.astype(np.float32)


def cnn(*, batch: int | str = "n", opset: int = 17) -> Any:
    """Two convolutions and a dense layer, ``image [n, 3, 8, 8] -> logits [n, 5]``, no names."""
    return model(
        [
            helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c0"], ["r0"]),
            helper.make_node("Conv", ["r0", "w1"], ["c1"], strides=[2, 2]),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Flatten", ["r1"], ["f"]),
            helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"]),
        ],
        [tensor("image", [batch, 3, 8, 8])],
        [tensor("logits", [batch, 5])],
        {
            "w0": random(8, 3, 3, 3),
            "b0": np.full(8, 0.1, np.float32),
            "w1": random(8, 8, 3, 3, seed=1),
            "w2": random(72, 5, seed=2),
            "b2": np.zeros(5, np.float32),
        },
        opset=opset,
    )


def mlp(*weights: Array) -> Any:
    """Dense layers with Relu between them, ``x [n, k] -> y [n, m]``; nodes ``dense0`` and so on."""
    nodes, x = [], "x"
    for index in range(len(weights)):
        last = index == len(weights) - 1
        made = "y" if last else f"h{index}"
        nodes.append(helper.make_node("MatMul", [x, f"w{index}"], [made], name=f"dense{index}"))
        if not last:
            nodes.append(helper.make_node("Relu", [made], [f"a{index}"], name=f"relu{index}"))
        x = f"a{index}"
    return model(
        nodes,
        [tensor("x", ["n", weights[0].shape[0]])],
        [tensor("y", ["n", weights[-1].shape[1]])],
        {f"w{index}": array for index, array in enumerate(weights)},
    )


def branches(trace: str) -> Any:
    """An If whose branches hold nodes, one of them foreign; ``trace`` is written everywhere."""

    def branch(name: str, node: Any) -> Any:
        graph = helper.make_graph([node], name, [], [tensor(f"{name}_y", None)], doc_string=trace)
        node.doc_string = trace
        entry = node.metadata_props.add()
        entry.key, entry.value = "stack_trace", trace
        return graph

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node(
            "If",
            ["positive"],
            ["s"],
            then_branch=branch(
                "then", helper.make_node("Gelu", ["x"], ["then_y"], domain="com.microsoft")
            ),
            else_branch=branch("else", helper.make_node("Neg", ["x"], ["else_y"])),
        ),
        helper.make_node("MatMul", ["s", "w"], ["m"]),
        helper.make_node("Twice", ["m"], ["y"], domain="local"),
    ]
    twice = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"], doc_string=trace)],
        [helper.make_opsetid("", 17)],
    )
    twice.doc_string = trace
    made = model(
        nodes,
        [tensor("x", ["n", 4])],
        [tensor("y", ["n", 4])],
        {"w": random(4, 4), "zero": np.zeros((), np.float32)},
        domains=("com.microsoft", "local", "unused"),
        functions=[twice],
    )
    made.doc_string = trace
    made.graph.doc_string = trace
    return made


def loop() -> Any:
    """A Loop that multiplies with weights three times, then a dense layer."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["on"], ["still_on"]),
        ],
        "body",
        [tensor("i", [], TensorProto.INT64), tensor("on", [], TensorProto.BOOL), tensor("state", None)],
        [tensor("still_on", [], TensorProto.BOOL), tensor("next", None)],
    )  # fmt: skip
    return model(
        [
            helper.make_node("Loop", ["three", "", "x"], ["looped"], body=body),
            helper.make_node("MatMul", ["looped", "w"], ["y"]),
        ],
        [tensor("x", ["n", 4])],
        [tensor("y", ["n", 4])],
        {"w": random(4, 4), "three": np.array(3, np.int64)},
    )


def save(made: Any, path: Path, *, external: bool = False) -> Path:
    """Write a model to ``path``, its weights beside it if ``external``."""
    if external:
        onnx.save(made, str(path), save_as_external_data=True, location="weights", size_threshold=0)
    else:
        path.write_bytes(made.SerializeToString())
    return path
