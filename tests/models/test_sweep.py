"""The sweep on real files: a layer that quantization hurts is found, and keeping it helps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")

from fogline_models.errors import BadInput  # noqa: E402 - only after onnx is known to be there
from fogline_models.quantize import prepared  # noqa: E402
from fogline_models.sensitivity import (  # noqa: E402
    Ask,
    Bench,
    Loss,
    Measurement,
    compare,
    mixed,
    sweep,
)
from fogline_protocol.tensors import Array  # noqa: E402
from tests.models import onnx_nets as nets  # noqa: E402

pytestmark = pytest.mark.workshop

RNG = np.random.default_rng(0)
RANGES = {"x": RNG.standard_normal((64, 16)).astype(np.float32)}
ITEMS = {"x": RNG.standard_normal((256, 16)).astype(np.float32)}
HURT = "dense2"


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Four layers; one is fed a value so large that the others beside it share few steps."""
    weights = [nets.random(16, 16, seed=seed) for seed in range(4)]
    weights[1][:, 0] *= 300
    weights[2][0] /= 300
    return nets.save(nets.mlp(*weights), tmp_path / "fp32.onnx")


class Clock:
    """Moves on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize("ask", Ask)
def test_the_layer_that_was_made_to_hurt_comes_first(net: Path, ask: Ask) -> None:
    with prepared(net, RANGES) as ready:
        found = sweep(Bench(ready, "int8-qdq", net, ITEMS), clock=Clock(), ask=ask)
    assert len(found) == 4
    assert found[0].nodes[0] == HURT


def test_a_sweep_gives_the_same_list_again(net: Path) -> None:
    runs = []
    for _ in range(2):
        with prepared(net, RANGES) as ready:
            runs.append(sweep(Bench(ready, "int8-qdq", net, ITEMS), clock=Clock()))
    assert runs[0] == runs[1]


def test_a_sweep_says_how_far_it_is(net: Path) -> None:
    heard: list[tuple[int, int, float]] = []
    with prepared(net, RANGES) as ready:
        bench = Bench(ready, "int8-qdq", net, ITEMS)
        sweep(
            bench,
            clock=Clock(),
            progress=lambda done, total, seconds_left: heard.append((done, total, seconds_left)),
        )
    assert heard == [(1, 4, 3.0), (2, 4, 2.0), (3, 4, 1.0), (4, 4, 0.0)]


def test_a_sweep_never_measures_more_than_it_may(net: Path) -> None:
    with prepared(net, RANGES) as ready:
        bench = Bench(ready, "int8-qdq", net, ITEMS)
        assert len(sweep(bench, clock=Clock(), most=2)) == 2
        with pytest.raises(BadInput, match="at least one measurement"):
            sweep(bench, clock=Clock(), most=0)


def test_keeping_the_layer_that_hurts_reaches_the_target(net: Path) -> None:
    choice, ranked = mixed(net, "int8-qdq", RANGES, ITEMS, 0.95, clock=Clock())
    assert HURT in choice.keep
    assert choice.layers < len(ranked) == 4
    assert choice.loss.agreement >= 0.95
    with prepared(net, RANGES) as ready:
        bench = Bench(ready, "int8-qdq", net, ITEMS)
        assert bench.loss(()).agreement < 0.95
        assert bench.loss(choice.keep) == choice.loss


def written_out(*weights: Array) -> Any:
    """Dense layers, and after each a normalization in plain operators, as exporters write it."""
    nodes, x = [], "x"
    for index in range(len(weights)):
        h = f"h{index}"
        nodes += [
            onnx.helper.make_node("MatMul", [x, f"w{index}"], [h], name=f"dense{index}"),
            onnx.helper.make_node("Mul", [h, h], [f"{h}_squares"], name=f"squares{index}"),
            onnx.helper.make_node("Mul", [f"{h}_squares", f"{h}_squares"], [f"{h}_fourth"]),
            onnx.helper.make_node("Mul", [f"{h}_fourth", f"{h}_fourth"], [f"{h}_eighth"]),
            onnx.helper.make_node("Add", [f"{h}_eighth", "tiny"], [f"{h}_more"]),
            onnx.helper.make_node("Pow", [f"{h}_more", "root"], [f"{h}_size"]),
            onnx.helper.make_node("Div", [h, f"{h}_size"], [f"y{index}"]),
            onnx.helper.make_node("Mul", [f"y{index}", f"{h}_size"], [f"z{index}"]),
        ]
        x = f"z{index}"
    last = f"z{len(weights) - 1}"
    constants = {"tiny": np.float32(1e-9), "root": np.float32(1 / 8)}
    return nets.model(
        nodes,
        [nets.tensor("x", ["n", 16])],
        [nets.tensor(last, ["n", 16])],
        {f"w{index}": array for index, array in enumerate(weights)}
        | {name: np.array(value) for name, value in constants.items()},
    )


def test_where_arithmetic_hurts_it_stays_and_the_weights_are_quantized(tmp_path: Path) -> None:
    weights = [nets.random(16, 16, seed=seed) for seed in range(4)]
    fp32 = nets.save(written_out(*weights), tmp_path / "fp32.onnx")
    choice, ranked = mixed(fp32, "int8-qdq", RANGES, ITEMS, 0.9, clock=Clock())
    assert choice.loss.agreement >= 0.9
    assert len(ranked) == 4
    with prepared(fp32, RANGES) as ready:
        bench = Bench(ready, "int8-qdq", fp32, ITEMS)
        assert bench.loss(()).agreement < 0.9
        assert bench.loss(choice.keep) == choice.loss
        weighing = {node.name for node in bench.nodes if node.weighs}
    assert len(weighing & {*choice.keep}) == choice.layers <= 1


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What each sweep was asked to keep; one that is, finds nothing to quantize."""
    asked: list[object] = []

    def listening(bench: Bench, **how: Any) -> tuple[Measurement, ...]:
        asked.append(how.get("kept", ()))
        if how.get("kept"):
            raise BadInput("quantize: finds nothing to quantize")
        return sweep(bench, **how)

    monkeypatch.setattr("fogline_models.sensitivity.sweep", listening)
    return asked


def test_a_choice_stands_where_the_second_sweep_has_nothing_to_quantize(
    net: Path, kept: list[object]
) -> None:
    choice, ranked = mixed(net, "int8-qdq", RANGES, ITEMS, 0.98, clock=Clock())
    assert len(kept) == 2
    assert choice.layers == 3 < len(ranked)
    assert choice.loss.agreement >= 0.98


def test_a_target_that_is_no_share_is_not_taken_for_one_out_of_reach(
    net: Path, kept: list[object]
) -> None:
    with pytest.raises(BadInput, match=r"between 0 and 1, got 1\.5"):
        mixed(net, "int8-qdq", RANGES, ITEMS, 1.5, clock=Clock())
    assert len(kept) == 1


def test_a_whole_row_is_one_vector() -> None:
    right = RNG.standard_normal((8, 512, 1, 1)).astype(np.float32)
    given = right + RNG.standard_normal(right.shape).astype(np.float32) / 10
    found = compare({"y": right}, {"y": given}, vectors=True)
    flat = compare({"y": right[..., 0, 0]}, {"y": given[..., 0, 0]}, vectors=True)
    assert found == flat
    assert 0.99 < found.agreement < 0.999


def test_nothing_is_kept_and_nothing_swept_where_the_target_is_met(net: Path) -> None:
    choice, ranked = mixed(net, "int8-qdq", RANGES, ITEMS, 0.1, clock=Clock())
    assert (choice.keep, choice.layers, ranked) == ((), 0, ())


def test_with_everything_kept_nothing_is_lost(net: Path) -> None:
    with prepared(net, RANGES) as ready:
        bench = Bench(ready, "int8-qdq", net, ITEMS)
        assert bench.loss([node.name for node in bench.nodes]) == Loss(1.0, float("inf"))


def test_items_that_the_model_does_not_take_are_refused(net: Path) -> None:
    with (
        prepared(net, RANGES) as ready,
        pytest.raises(BadInput, match=r"^sensitivity: the model takes x"),
    ):
        Bench(ready, "int8-qdq", net, {"z": ITEMS["x"]})
