"""A family that is built in seconds: points in the plane, told apart by nets that nobody trains.

The nets are ``onnx.helper``'s, the data is a function beside the recipe; tests change single
lines of either.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from click.testing import CliRunner, Result

from fogline_models.cli import main
from tests.models import onnx_nets

CLASSES = 3

RECIPE = """
family = "points"
task = "tabular-classification"
labels = ["left", "right", "up"]

[data]
make = "data.py:make"

[gates]
min_agreement = 0.9
max_accuracy_loss = 0.05
max_latency_ratio = 1e9 # timing may not decide here

[certificate]
alpha = 0.1

[[release]]
model = "points-hub"
version = "1.0.0"
source = { onnx = "hub.onnx" }

[[release]]
model = "points"
version = "1.0.0"
source = { onnx = "edge.onnx" }
escalates_to = "points-hub"
"""

DATA = """
import numpy as np

from fogline_models.data import Items

SEEDS = {"training": 1, "evaluation": 2, "calibration": 3}


def make():
    return {name: points(seed) for name, seed in SEEDS.items()}


def points(seed, count=400):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    corners = np.array([[-1, 0], [1, 0], [0, 1]])
    x = (corners[labels] + rng.normal(0, 0.3, (count, 2))).astype(np.float32)
    return Items({"x": x}, labels, 1000 * seed + np.arange(count))
"""

TORCH = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.dense(x)


def edge(splits, progress):
    torch.manual_seed(0)
    return Net().eval()
"""


def net(noise: float) -> Any:
    """Two dense layers, ``x [n, 2] -> y [n, 3]``, that point to the corners."""
    hidden = np.eye(2, 16, dtype=np.float32)
    hidden[:, 2:4] = -np.eye(2, dtype=np.float32)
    hidden[:, 4:] = onnx_nets.random(2, 12) * 0.1
    outer = np.zeros((16, CLASSES), np.float32)
    outer[2, 0] = outer[0, 1] = outer[1, 2] = 4
    outer += noise * onnx_nets.random(16, CLASSES, seed=1)
    return onnx_nets.mlp(hidden, outer)


def write(folder: Path, *, torch: bool = False) -> Path:
    """Write the family into a folder and return it; with ``torch`` the edge's net is a module."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(net(0), str(folder / "hub.onnx"))
    onnx.save(net(1), str(folder / "edge.onnx"))
    (folder / "data.py").write_text(DATA)
    recipe = RECIPE
    if torch:
        (folder / "nets.py").write_text(TORCH)
        recipe = recipe.replace('onnx = "edge.onnx"', 'torch = "nets.py:edge", outputs = ["y"]')
    (folder / "recipe.toml").write_text(recipe)
    return folder


def change(path: Path, before: str, after: str) -> None:
    """Change one place of a file."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def build(family: Path, *options: str | Path) -> Result:
    """Run ``fogline-models build`` on it, with a cache of its own and the output beside it."""
    arguments: list[str | Path] = ["build", family, "--cache", family.parent / "steps"]
    arguments += ["--out", family.parent / "out", *options]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
