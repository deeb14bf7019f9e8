"""Figures by hand, and the self-test's two limits, each on its own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models import evaluate
from fogline_models.errors import BadInput
from fogline_protocol import release
from fogline_protocol.release import BundleDirectory, SelfTest, Tolerance

LOGITS = np.array([[3, 0, 0], [0, 2, 0], [0, 0, 1], [0, 5, 0]], dtype=np.float32)
OTHERS = np.array([[3, 0, 0], [9, 2, 0], [0, 0, 1], [0, 0, 5]], dtype=np.float32)
LABELS = np.array([0, 1, 2, 2])


def limited(digits: Path, limit: Tolerance) -> BundleDirectory:
    """Return the edge bundle as if its int8 variant had this tolerance."""
    found = release.read(digits / "bundles" / "digits-1.0.0")
    tolerances = {**found.bundle.self_test.tolerances, "int8-qdq": limit}
    self_test = SelfTest(found.bundle.self_test.path, tolerances)
    return dataclasses.replace(found, bundle=dataclasses.replace(found.bundle, self_test=self_test))


def test_figures_count_what_they_say() -> None:
    assert evaluate.accuracy(LOGITS, LABELS) == 0.75
    assert evaluate.agreement(LOGITS, OTHERS) == 0.5
    scores = np.array([0.9, 0.6, 0.5, 0.2], dtype=np.float32)
    found = evaluate.hybrid(LOGITS, OTHERS, scores, LABELS, 0.5)
    assert found.share_edge == 0.5  # a score equal to the threshold escalates
    assert found.disagreement == 0.25
    assert (found.accuracy_edge, found.accuracy_hub) == (0.75, 0.75)
    assert found.accuracy_hybrid == 1.0


def test_too_large_an_error_fails_the_self_test_although_the_answers_agree(digits: Path) -> None:
    result = evaluate.golden(limited(digits, Tolerance(1e-6, 0.0)), "int8-qdq")
    assert result.agreement == 1.0
    assert result.problem is not None
    assert "stray from the reference" in result.problem


def test_too_few_equal_answers_fail_the_self_test_although_the_error_is_small(
    digits: Path,
) -> None:
    result = evaluate.golden(limited(digits, Tolerance(1e6, 1.01)), "int8-qdq")
    assert result.problem is not None
    assert "100.0% of the golden rows get its top answer (required 101.0%)" in result.problem


def test_golden_vectors_that_lack_a_tensor_are_named(digits: Path) -> None:
    found = limited(digits, Tolerance(1.0, 0.9))
    (spec,) = found.bundle.outputs
    other = dataclasses.replace(spec, name="probabilities")
    renamed = dataclasses.replace(found, bundle=dataclasses.replace(found.bundle, outputs=(other,)))
    with pytest.raises(BadInput, match=r"selftest\.npz: output\.probabilities: it is missing"):
        evaluate.golden(renamed, "int8-qdq")


@settings(deadline=None)  # the machine may be busy
@given(error=st.floats(1e-9, 1e6))
def test_a_tolerance_leaves_room_for_another_processor_and_for_little_else(error: float) -> None:
    reference = np.zeros((2, 3))
    found = evaluate.tolerance(reference, reference + error, "int8")
    assert found.max_abs_error >= max(2 * error * (1 - 1e-9), 1e-3)
    assert found.max_abs_error <= max(2.2 * error * (1 + 1e-9), 1e-3)


def test_latencies_are_told_for_every_file_and_batch(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "TURNS", 2)
    monkeypatch.setattr(evaluate, "RUNS_PER_TURN", 2)
    folder = digits / "bundles" / "digits-1.0.0" / "variants"
    files = {"fp32": folder / "fp32.onnx", "int8": folder / "int8-qdq.onnx"}
    images = np.zeros((8, 1, 8, 8), np.float32)
    found = evaluate.latencies_us(files, {"image": images}, (1, 8))
    assert {name: set(times) for name, times in found.items()} == {
        "fp32": {"batch_1", "batch_8"},
        "int8": {"batch_1", "batch_8"},
    }
    assert all(time > 0 for times in found.values() for time in times.values())
