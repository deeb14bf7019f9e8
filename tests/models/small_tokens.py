"""A family of texts that is built in seconds: every token is a point in the plane, as in
``small_family``, and which of them count says an input that is called ``counts``.

What does not count is far away and of any class, so that whoever looks at it gets other figures.
"""

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from tests.models import onnx_nets, small_family

RECIPE = (
    small_family.RECIPE.replace('"points"', '"texts"')
    .replace('"points-hub"', '"texts-hub"')
    .replace("tabular-classification", "token-classification")
    .replace('version = "1.0.0"', 'version = "1.0.0"\nmask = "counts"')
    .replace('onnx = "hub.onnx" }', 'onnx = "hub.onnx" }\nvariants = ["fp32"]')
    .replace("alpha = 0.1", "alpha = 0.05")
    .replace("min_agreement = 0.9\n", "min_agreement = 0.8\n")
)

DATA = """
import numpy as np

from fogline_models.data import Items

SEEDS = {"training": 1, "evaluation": 2, "calibration": 3}
TOKENS = 6


def make():
    return {name: texts(seed) for name, seed in SEEDS.items()}


def texts(seed, count=400):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, (count, TOKENS))
    corners = np.array([[-1, 0], [1, 0], [0, 1]])
    x = corners[classes] + rng.normal(0, 0.3, (count, TOKENS, 2))
    counts = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, count)[:, None]
    x[~counts] = rng.normal(0, 9, (int((~counts).sum()), 2))
    labels = np.where(counts & (np.arange(TOKENS) > 0), classes, -100)  # the first has none
    inputs = {"x": x.astype(np.float32), "counts": counts.astype(np.int32)}
    slices = np.array(["even", "odd"] * (count // 2))
    return Items(inputs, labels, 1000 * seed + np.arange(count), slices)
"""


def net(noise: float) -> Any:
    """Return ``small_family.net`` for every token: ``x [n, 6, 2] -> y [n, 6, 3]``."""
    made = small_family.net(noise)
    for value, width in ((made.graph.input[0], 2), (made.graph.output[0], 3)):
        value.CopyFrom(onnx_nets.tensor(value.name, ["n", 6, width]))
    made.graph.input.append(onnx_nets.tensor("counts", ["n", 6], TensorProto.INT32))
    return made


def rows() -> Any:
    """Return a net of the same inputs that answers once for all of a text: ``y [n, 3]``."""
    made = net(0)
    made.graph.output[0].CopyFrom(onnx_nets.tensor("rows", ["n", 3]))
    made.graph.node.append(
        onnx.helper.make_node("ReduceMean", ["y"], ["rows"], axes=[1], keepdims=0)
    )
    return made


def write(folder: Path) -> Path:
    """Write the family into a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(net(0), str(folder / "hub.onnx"))
    onnx.save(net(2), str(folder / "edge.onnx"))
    (folder / "data.py").write_text(DATA)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder
