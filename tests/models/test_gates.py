"""Bars and figures: every decision shows both, and a waiver hides nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models import evaluate, gates
from fogline_models.errors import BadInput
from fogline_models.evaluate import Evaluation, HeldOut
from fogline_models.gates import Decision, Gates, Verdict
from fogline_models.measure import Cost, Spread
from fogline_protocol.answers import Asked
from fogline_protocol.tensors import Array

CLASSES = 4
SIZES = {"fp32": 1000, "int8": 550}


def answers(labels: Array, wrong: int) -> Array:
    """Return logits that are right but for the first ``wrong`` items."""
    given = labels.copy()
    given[:wrong] = (given[:wrong] + 1) % CLASSES
    return np.eye(CLASSES)[given] * 3.0


def evaluation(count: int = 200, fp32: int = 0, int8: int = 0, sliced: bool = False) -> Evaluation:
    """Return an evaluation in which both variants are wrong on so many of the first items."""
    labels = np.arange(count) % CLASSES
    slices = np.array([f"group {i * 10 // count}" for i in range(count)]) if sliced else None
    return evaluate.evaluate(
        {"fp32": answers(labels, fp32), "int8": answers(labels, int8)},
        HeldOut(np.arange(count), labels, slices),
    )


def costs(ratio: float, batch: int = 1, spread: float = 0.0) -> dict[str, Cost]:
    def cost(ratio: float, spread: float) -> Cost:
        around = Spread(ratio, ratio - spread, ratio + spread)
        return Cost({batch: Spread(20 * ratio, 19, 21)}, {batch: around}, Spread(5, 4, 6), None)

    return {"fp32": cost(1.0, 0.0), "int8": cost(ratio, spread)}


def int8(decisions: tuple[Decision, ...]) -> Decision:
    (found,) = (each for each in decisions if each.variant == "int8")
    return found


def test_a_variant_slower_than_the_original_is_refused_and_the_sentence_says_by_how_much() -> None:
    decisions = gates.decide(Gates(), evaluation(), costs(1.31), SIZES)
    assert int8(decisions).sentence == (
        "int8 refused: 1.31 x the latency of fp32, at most 1.00 allowed"
    )
    assert gates.eligible(decisions) == ("fp32",)


def test_a_ratio_that_noise_could_have_made_is_said_to_be_one() -> None:
    found = int8(gates.decide(Gates(), evaluation(), costs(1.02, spread=0.04), SIZES))
    assert found.sentence == (
        "int8 refused: 1.02 x the latency of fp32 (quartiles 0.98 to 1.06, within noise), at most "
        "1.00 allowed"
    )


@pytest.mark.parametrize(
    ("ratio", "bars", "changes"),
    [
        (1.02, Gates(), True),  # refused, but only by noise
        (0.98, Gates(), True),  # eligible, but only by noise
        (1.31, Gates(), False),
        (0.50, Gates(), False),
        (1.02, Gates(allow={"int8": "it is half as large"}), False),  # ships either way
        (0.98, Gates(allow={"int8": "it is half as large"}), False),
        (1.02, Gates(max_size_ratio=0.1), False),  # refused either way
        (1.02, Gates(max_latency_ratio=None), False),
    ],
)
def test_a_decision_that_the_next_build_may_take_otherwise_is_known_as_such(
    ratio: float, bars: Gates, changes: bool
) -> None:
    found = gates.decide(bars, evaluation(), costs(ratio, spread=0.04), SIZES)
    assert int8(found).may_change is changes
    assert not next(each for each in found if each.variant == "fp32").may_change


def test_a_quick_and_faithful_variant_is_eligible() -> None:
    decisions = gates.decide(Gates(max_size_ratio=0.6), evaluation(), costs(0.4), SIZES)
    assert int8(decisions).sentence == "int8 eligible: passes 4 checks"
    assert gates.eligible(decisions) == ("fp32", "int8")


@pytest.mark.parametrize(
    ("bars", "wrong", "says"),
    [
        (Gates(min_agreement=None), 5, "loses 2.5 points (95 %: -0.1 to 5.1, within noise) of accuracy against fp32, at most 1.0 allowed"),
        (Gates(max_accuracy_loss=None), 5, "answers as fp32 on 97.5 % of the items (95 %: 94.2\u201399.2 %), at least 99.0 % required"),
        (Gates(max_accuracy_loss=None, min_agreement=None, min_accuracy=0.99), 5, "right on 97.5 % of the items (95 %: 94.2\u201399.2 %), at least 99.0 % required"),
        (Gates(max_size_ratio=0.5), 0, "0.55 x the size of fp32, at most 0.50 allowed"),
    ],
)  # fmt: skip
def test_every_gate_refuses_with_its_figure_and_its_bar(bars: Gates, wrong: int, says: str) -> None:
    found = int8(gates.decide(bars, evaluation(int8=wrong), costs(0.5), SIZES))
    assert found.verdict is Verdict.REFUSED
    assert found.sentence == f"int8 refused: {says}"


def test_a_loss_within_noise_is_said_to_be_so_and_still_decides() -> None:
    found = int8(gates.decide(Gates(min_agreement=None), evaluation(100, 1, 3), costs(0.5), SIZES))
    assert found.verdict is Verdict.REFUSED
    (check,) = found.failed
    assert check.within_noise
    assert "loses 2.0 points" in check.words
    assert "within noise" in check.words


def test_a_gain_is_called_one() -> None:
    found = int8(gates.decide(Gates(min_agreement=None), evaluation(400, 20, 0), costs(0.5), SIZES))
    assert found.verdict is Verdict.ELIGIBLE
    assert "gains 5.0 points (95 %: 2.7 to 7.3)" in found.checks[0].words


def test_confident_gates_want_the_worse_end_of_the_interval_to_pass() -> None:
    small, large = evaluation(100), evaluation(4000)
    bars = Gates(confident=True)
    assert int8(gates.decide(bars, small, costs(0.5), SIZES)).verdict is Verdict.REFUSED
    assert int8(gates.decide(bars, large, costs(0.5), SIZES)).verdict is Verdict.ELIGIBLE
    alike = Gates(confident=True, max_accuracy_loss=None)
    assert int8(gates.decide(alike, small, costs(0.5), SIZES)).failed[0].gate == "min_agreement"
    noisy = gates.decide(bars, large, costs(0.95, spread=0.1), SIZES)
    assert int8(noisy).failed[0].gate == "max_latency_ratio"


def test_a_slice_refuses_only_what_is_beyond_noise() -> None:
    bars = Gates(max_accuracy_loss=0.5, min_agreement=None, max_slice_loss=0.02)
    one = int8(gates.decide(bars, evaluation(200, 0, 1, sliced=True), costs(0.5), SIZES))
    assert one.verdict is Verdict.ELIGIBLE
    many = int8(gates.decide(bars, evaluation(200, 0, 10, sliced=True), costs(0.5), SIZES))
    assert many.verdict is Verdict.REFUSED
    assert "in slice 'group 0' loses 50.0 points" in many.sentence


def test_vectors_are_refused_by_their_error() -> None:
    outputs = {"fp32": np.ones((5, 3)), "int8": np.ones((5, 3)) * 1.05}
    found = evaluate.evaluate(outputs, HeldOut(np.arange(5)), vectors=True)
    decision = int8(gates.decide(Gates(), found, {}, SIZES))
    assert decision.sentence == (
        "int8 refused: strays from fp32 by 5.00 % of a vector's length, at most 2.00 % allowed"
    )


def test_a_waiver_ships_the_variant_with_the_reason_and_every_figure() -> None:
    bars = Gates(allow={"int8": "half of the bytes on a metered link"})
    decisions = gates.decide(bars, evaluation(int8=5), costs(1.31), SIZES)
    found = int8(decisions)
    assert found.verdict is Verdict.WAIVED
    assert found.sentence.startswith("int8 ships although loses 2.5 points")
    assert "1.31 x the latency of fp32, at most 1.00 allowed" in found.sentence
    assert found.sentence.endswith("Reason given: half of the bytes on a metered link")
    assert gates.eligible(decisions) == ("fp32", "int8")


def test_a_waiver_that_nobody_needs_is_said_to_be_unused() -> None:
    bars = Gates(allow={"int8": "it may be slower"})
    found = int8(gates.decide(bars, evaluation(), costs(0.5), SIZES))
    assert found.verdict is Verdict.ELIGIBLE
    assert "its waiver was not needed" in found.sentence


@settings(deadline=None, max_examples=60)
@given(
    wrong=st.integers(0, 40),
    ratio=st.floats(0.1, 3.0),
    loss=st.floats(0.0, 0.2),
    latency=st.floats(0.2, 2.0),
    confident=st.booleans(),
)
def test_a_waiver_never_hides_a_figure_and_changes_nothing_but_the_verdict(
    wrong: int, ratio: float, loss: float, latency: float, confident: bool
) -> None:
    found = evaluation(100, 2, wrong)
    bars = {"max_accuracy_loss": loss, "max_latency_ratio": latency, "confident": confident}
    strict = int8(gates.decide(Gates(**bars), found, costs(ratio), SIZES))
    waived = int8(gates.decide(Gates(**bars, allow={"int8": "why"}), found, costs(ratio), SIZES))
    assert waived.checks == strict.checks
    assert waived.verdict is not Verdict.REFUSED
    assert (waived.verdict is Verdict.WAIVED) == (strict.verdict is Verdict.REFUSED)
    for check in strict.failed:
        assert check.words in strict.sentence
        assert check.words in waived.sentence


@settings(deadline=None, max_examples=60)
@given(wrong=st.integers(0, 40), ratio=st.floats(0.1, 3.0), slack=st.floats(0.0, 0.9))
def test_a_looser_bar_never_refuses_what_a_stricter_one_lets_pass(
    wrong: int, ratio: float, slack: float
) -> None:
    found = evaluation(100, 2, wrong)
    strict = Gates(max_accuracy_loss=0.02, max_latency_ratio=0.9, min_agreement=0.95)
    loose = Gates(
        max_accuracy_loss=0.02 + slack, max_latency_ratio=0.9 + slack, min_agreement=0.95 - slack
    )
    if int8(gates.decide(strict, found, costs(ratio), SIZES)).verdict is Verdict.ELIGIBLE:
        assert int8(gates.decide(loose, found, costs(ratio), SIZES)).verdict is Verdict.ELIGIBLE


def test_when_no_variant_is_left_the_build_is_refused_with_every_figure() -> None:
    decisions = gates.decide(Gates(min_accuracy=0.99), evaluation(100, 3, 4), costs(1.5), SIZES)
    with pytest.raises(BadInput, match="no variant may ship") as refused:
        gates.eligible(decisions)
    assert "fp32 refused: right on 97.0 % of the items" in str(refused.value)
    assert "int8 refused: right on 96.0 % of the items" in str(refused.value)
    assert "1.50 x the latency of fp32" in str(refused.value)


def test_a_variant_that_does_not_run_here_is_not_called_slow() -> None:
    found = int8(gates.decide(Gates(), evaluation(), {}, SIZES))
    assert found.verdict is Verdict.ELIGIBLE
    assert [check.gate for check in found.checks] == ["max_accuracy_loss", "min_agreement"]


@pytest.mark.parametrize(
    ("bars", "says"),
    [
        (Gates(allow={"int9": "why"}), "allow names 'int9', which is none of the variants fp32, int8"),
        (Gates(allow={"int8": "  "}), r"allow\.int8 needs a reason"),
        (Gates(max_slice_loss=0.1), "max_slice_loss needs slices"),
        (Gates(latency_batch=8), "latency_batch is 8, measured were batches of 1"),
    ],
)  # fmt: skip
def test_gates_that_cannot_be_held_are_refused(bars: Gates, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        gates.decide(bars, evaluation(), costs(0.5), SIZES)


def test_accuracy_cannot_be_asked_of_items_without_labels() -> None:
    found = evaluate.evaluate({"fp32": np.eye(3)}, HeldOut(np.arange(3)))
    with pytest.raises(BadInput, match="min_accuracy needs labels"):
        gates.decide(Gates(min_accuracy=0.5), found, {}, SIZES)
    sliced = evaluate.evaluate(
        {"fp32": np.eye(3)}, HeldOut(np.arange(3), slices=np.array(["a", "a", "b"]))
    )
    with pytest.raises(BadInput, match="max_slice_loss needs labels"):
        gates.decide(Gates(max_slice_loss=0.5), sliced, {}, SIZES)


def test_bars_for_tokens_speak_of_tokens() -> None:
    asked = Asked(np.arange(4) < np.array([[4], [2]]))
    tops = np.array([[0, 1, 2, 0], [1, 1, 0, 0]])
    found = evaluate.evaluate(
        {"fp32": np.eye(3)[tops], "int8": np.eye(3)[tops * [1, 1, 0, 1]]},
        HeldOut(np.arange(2), asked=asked),
    )
    _, int8 = gates.decide(Gates(), found, {}, SIZES)
    assert "answers as fp32 on 83.3 % of the tokens (95 %: " in int8.sentence


@pytest.mark.parametrize(
    ("bars", "says"),
    [
        ({"max_accuracy_loss": 1.5}, "max_accuracy_loss must lie between 0 and 1, got 1.5"),
        ({"min_agreement": float("nan")}, "min_agreement must lie between 0 and 1, got nan"),
        ({"max_latency_ratio": 0}, "max_latency_ratio must be a number above 0, got 0"),
        ({"max_size_ratio": float("inf")}, "max_size_ratio must be a number above 0, got inf"),
        ({"latency_batch": 0}, "latency_batch must be a number above 0, got 0"),
    ],
)
def test_a_bar_that_no_figure_can_meet_or_miss_is_refused(
    bars: dict[str, float], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        Gates(**bars)
