"""Which digit belongs to which split, and the cheap scanner through which items are seen.

The 1,797 digits that scikit-learn carries come in the order of their writers, without
writer ids, so blocks of 139 rows stand for writers: disjointness is approximate at a
block's edge. Always true here:

- a digit belongs to one split only, and it is split before anything is augmented;
- augmented copies of one digit are one *scene*, never independent items;
- calibration and demo traffic are drawn at random from the same writers, because a
  certificate speaks of data that is drawn like its calibration set, and of no other;
- the writers of ``drift`` appear nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fogline_models.data import UNSTATED, Items

Images = NDArray[np.float32]  # [n, 1, 8, 8], ink from 0 to 1
Labels = NDArray[np.int64]  # [n]
Rows = NDArray[np.int64]  # [n], row numbers in load_digits: the identity of a digit

TOTAL = 1797
SIDE = 8
BLOCK = 139  # rows per stand-in for a group of writers: 13 of them, the last one shorter
INK = 16.0  # the darkest level of the data set

TRAINING_BLOCKS = range(0, 6)
COMMON_BLOCKS = range(6, 11)  # calibration, evaluation and the demo's main traffic
DRIFT_BLOCKS = range(11, 13)

SELF_TEST_DIGITS = 32
CALIBRATION_DIGITS = 350  # the exact bound allows 10 disagreements among them at 5 % and 5 %
TRAFFIC_DIGITS = 240
TRAFFIC_COPIES = 4
HARD_COPIES = 16  # what applications ask of every digit of the hard writers, in time
EVALUATION_COPIES = 20  # of 105 digits: 2,100 items, but 105 scenes
RANGE_COPIES = 10  # with one, a darker copy met later was clipped and its logits moved by 1.5

# Every set of scanned copies has its own stream of randomness.
SEEDS = {
    "ranges": 1,
    "self_test": 2,
    "calibration": 3,
    "evaluation": 4,
    "traffic": 5,
    "drift": 6,
    "hard": 7,
    "hard_evaluation": 8,
}
SAMPLING = "one scanned copy per digit, from the writers of the traffic, severity uniform"

SPLIT_SEED = 0

# The scanner at its worst, chosen on evaluation digits so that the small net finds a good
# tenth of the items hard and the large one a few in a hundred.
MAX_TURN_DEG = 30.0
MAX_LOG_SCALE = 0.2
MAX_SHEAR = 0.3
MAX_SHIFT_PX = 1.5
MAX_FADE = 0.5
MAX_NOISE = 0.12  # standard deviation; ink goes from 0 to 1


@dataclass(frozen=True, slots=True)
class Split:
    """Digits that serve one purpose, as they are in the data set."""

    images: Images
    labels: Labels
    rows: Rows


def make() -> Mapping[str, Items]:
    """Return every set of the family: digits as they are, or as the scanner sees them."""
    digits = splits()
    sets = {
        "training": _items(digits["training"], digits["training"].images),
        "clean": _items(digits["evaluation"], digits["evaluation"].images),
        "ranges": _scanned(digits["training"], "ranges", RANGE_COPIES),
        "self_test": _scanned(digits["self_test"], "self_test"),
        "calibration": _scanned(digits["calibration"], "calibration"),
        "evaluation": _scanned(digits["evaluation"], "evaluation", EVALUATION_COPIES),
    }
    for name in ("traffic", "drift"):
        copies = _scanned(digits[name], name, TRAFFIC_COPIES)
        sets[name] = copies.rows(np.random.default_rng([SEEDS[name], 1]).permutation(len(copies)))
    return sets


def make_hard() -> Mapping[str, Items]:
    """Return the sets for a release that learns from the writers that the edge found hard.

    ``hard`` is what devices were asked: every second digit of the drift's writers. Evaluation
    is the same writers' other digits; ``familiar`` shows whether anything was forgotten.
    """
    sets = dict(make())
    drift = splits()["drift"]
    asked, others = (
        Split(drift.images[at::2], drift.labels[at::2], drift.rows[at::2]) for at in (0, 1)
    )
    return {
        "training": sets["training"],
        "ranges": sets["ranges"],
        "self_test": sets["self_test"],
        "calibration": sets["calibration"],
        "hard": _scanned(asked, "hard", HARD_COPIES),
        "evaluation": _scanned(others, "hard_evaluation", EVALUATION_COPIES),
        "familiar": sets["evaluation"],
    }


def _scanned(split: "Split", stream: str, copies: int = 1) -> Items:
    rng = np.random.default_rng(SEEDS[stream])
    images = np.concatenate([scanned(split.images, rng) for _ in range(copies)])
    return _items(split, images, SAMPLING if stream == "calibration" else UNSTATED)


def _items(split: "Split", images: Images, sampling: str = UNSTATED) -> Items:
    copies = len(images) // len(split.rows)
    rows = np.tile(split.rows, copies)
    return Items(
        {"image": images},
        np.tile(split.labels, copies),
        rows,
        np.array([f"writers {row // BLOCK}" for row in rows]),
        sampling=sampling,
    )


def splits() -> Mapping[str, Split]:
    """Return every split by name: training, self_test, calibration, evaluation, traffic, drift."""
    from sklearn.datasets import load_digits  # a second of import that only a build pays for

    bunch = load_digits()
    images = (bunch.images / INK).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    return {name: Split(images[rows], labels[rows], rows) for name, rows in split_rows().items()}


def split_rows() -> Mapping[str, Rows]:
    """Return which rows of the data set belong to which split; a pure function of the seed."""
    rng = np.random.default_rng(SPLIT_SEED)
    known = rng.permutation(_rows_of(TRAINING_BLOCKS))
    common = rng.permutation(_rows_of(COMMON_BLOCKS))
    calibration_end = CALIBRATION_DIGITS
    traffic_end = calibration_end + TRAFFIC_DIGITS
    return {
        "training": np.sort(known[SELF_TEST_DIGITS:]),
        "self_test": np.sort(known[:SELF_TEST_DIGITS]),
        "calibration": np.sort(common[:calibration_end]),
        "traffic": np.sort(common[calibration_end:traffic_end]),
        "evaluation": np.sort(common[traffic_end:]),
        "drift": _rows_of(DRIFT_BLOCKS),
    }


def scanned(images: Images, rng: np.random.Generator) -> Images:
    """Return the images as a cheap scanner sees them: ``[n, 1, 8, 8] -> [n, 1, 8, 8]``.

    Every item has a severity of its own, uniform between 0 and 1, that scales how far it is
    turned, shifted, sheared, resized and faded, and how noisy it is; then 256 gray levels.
    """
    count = len(images)
    severity = rng.uniform(0, 1, count)

    def spread(limit: float) -> NDArray[np.float64]:
        return severity * limit * rng.uniform(-1, 1, count)

    turn = np.deg2rad(spread(MAX_TURN_DEG))
    scale = np.exp(spread(MAX_LOG_SCALE))
    shear = spread(MAX_SHEAR)
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    # Maps an output position, relative to the center, to where its ink comes from.
    matrix = np.stack([np.stack([cos, -sin + shear], -1), np.stack([sin, cos], -1)], -2)
    shift = np.stack([spread(MAX_SHIFT_PX), spread(MAX_SHIFT_PX)], -1)
    center = (SIDE - 1) / 2
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1) - center
    source = np.einsum("nij,hwj->nhwi", matrix, grid) + center + shift[:, None, None]
    seen = _bilinear(images[:, 0], source)
    contrast = 1 - np.abs(spread(MAX_FADE))
    noise = rng.standard_normal(seen.shape) * (severity * MAX_NOISE)[:, None, None]
    seen = seen * contrast[:, None, None] + noise
    items: Images = (np.rint(np.clip(seen, 0, 1) * 255) / 255).astype(np.float32)[:, None]
    return items


def _rows_of(blocks: range) -> Rows:
    return np.arange(blocks.start * BLOCK, min(blocks.stop * BLOCK, TOTAL), dtype=np.int64)


def _bilinear(images: NDArray[np.float32], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sample ``[n, h, w]`` at positions ``[n, h, w, 2]``; beyond the edge there is no ink."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1))).astype(np.float64)
    at = np.clip(at + 1, 0, SIDE + 1 - 1e-9)
    low = at.astype(np.int64)
    part = at - low
    y, x = low[..., 0], low[..., 1]
    dy, dx = part[..., 0], part[..., 1]
    item = np.arange(len(images))[:, None, None]
    top = padded[item, y, x] * (1 - dx) + padded[item, y, x + 1] * dx
    bottom = padded[item, y + 1, x] * (1 - dx) + padded[item, y + 1, x + 1] * dx
    result: NDArray[np.float64] = top * (1 - dy) + bottom * dy
    return result
