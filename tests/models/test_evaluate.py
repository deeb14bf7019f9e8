"""Figures by hand, and the self-test's two limits, each on its own."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models import evaluate
from fogline_models.errors import BadInput
from fogline_models.evaluate import HeldOut
from fogline_models.session import Session
from fogline_protocol import release
from fogline_protocol.answers import Asked
from fogline_protocol.release import BundleDirectory, SelfTest, Tolerance
from fogline_protocol.score import Score
from fogline_protocol.tensors import Array


def limited(digits: Path, limit: Tolerance) -> BundleDirectory:
    """Return the edge bundle as if its int8 variant had this tolerance."""
    found = release.read(digits / "bundles" / "digits-1.0.0")
    tolerances = {**found.bundle.self_test.tolerances, "int8-qdq": limit}
    self_test = SelfTest(found.bundle.self_test.path, tolerances)
    return dataclasses.replace(found, bundle=dataclasses.replace(found.bundle, self_test=self_test))


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


# All variants on the same items


def items(count: int = 8, **known: Any) -> HeldOut:
    return HeldOut(np.arange(count), **known)


def logits_of(answers: list[int], classes: int = 3) -> Array:
    return np.eye(classes, dtype=np.float32)[answers] * 4


def test_every_variant_is_held_against_labels_the_reference_and_the_hub() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    right = labels.tolist()
    outputs = {
        "int8": logits_of([1, 1, 2, 0, 1, 2, 0, 1]),
        "fp32": logits_of(right),
    }
    groups = np.array(["group 10"] * 4 + ["group 9"] * 4)
    found = evaluate.evaluate(
        outputs,
        items(labels=labels, slices=groups, names=("a", "b", "c")),
        hub=logits_of([2, *right[1:]]),
        hub_model="large",
    )
    assert (found.items, found.scenes, found.classes) == (8, 8, ("a", "b", "c"))
    int8, fp32 = found.variants["int8"], found.variants["fp32"]
    assert int8.accuracy is not None
    assert int8.accuracy.value == 0.875
    assert int8.loss is not None
    assert int8.loss.value == 0.125
    assert int8.loss.within_noise
    assert int8.agreement is not None
    assert int8.agreement.value == 0.875
    assert int8.agreement_hub is not None
    assert int8.agreement_hub.value == 0.875
    assert int8.confusion == ((2, 1, 0), (0, 3, 0), (0, 0, 2))
    assert int8.recall["a"].value == pytest.approx(2 / 3)
    assert [part.name for part in int8.slices] == ["group 9", "group 10"]  # as people count
    assert [part.accuracy.value for part in int8.slices if part.accuracy] == [1.0, 0.75]
    assert (fp32.loss, fp32.agreement) == (None, None)  # against itself
    assert fp32.macro_f1 == 1.0
    assert found.hub is not None
    assert found.hub.accuracy is not None
    assert found.hub.accuracy.value == 0.875


def test_without_labels_only_agreement_is_told() -> None:
    found = evaluate.evaluate(
        {"fp32": logits_of([0, 1]), "int8": logits_of([0, 2])}, items(2)
    ).variants["int8"]
    assert found.agreement is not None
    assert found.agreement.value == 0.5
    assert (found.accuracy, found.macro_f1, found.calibration_error) == (None, None, None)


def test_a_vector_need_not_keep_its_largest_number_for_the_self_test() -> None:
    reference, other = np.array([[0.5, 0.49]]), np.array([[0.49, 0.5]])
    assert evaluate.tolerance(reference, other, "int8", vectors=True).min_agreement == 0.0
    assert evaluate.tolerance(reference, other, "int8").min_agreement > 0.0


def test_what_is_said_of_padding_is_not_held_against_a_variant() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((4, 6, 3))
    mask = np.arange(6) < np.array([[6], [2], [1], [4]])
    astray = np.where(mask[..., None], exact, rng.standard_normal(exact.shape))
    inputs = {"attention_mask": mask.astype(np.int64)}
    outputs = {
        name: evaluate.without_padding(array, inputs)
        for name, array in {"fp32": exact, "int8": astray}.items()
    }
    found = evaluate.evaluate(outputs, items(4), vectors=True).variants["int8"]
    assert found.relative_error_worst == 0.0
    outputs["int8"][0, 0] += 1.0  # a token that counts
    found = evaluate.evaluate(outputs, items(4), vectors=True).variants["int8"]
    assert found.relative_error_worst is not None
    assert found.relative_error_worst > 0.1


@pytest.mark.parametrize("name", ["attention_mask", "other"])
def test_vectors_without_an_axis_for_tokens_are_compared_whole(name: str) -> None:
    vectors = np.ones((4, 6))
    mask = {name: np.zeros((4, 6), np.int64)}
    assert evaluate.without_padding(vectors, mask) is vectors


def test_vectors_get_angles_and_errors_instead_of_answers() -> None:
    outputs = {"fp32": np.ones((4, 5)), "fp16": np.ones((4, 5)) * 1.01}
    found = evaluate.evaluate(outputs, items(4), vectors=True)
    assert found.classes == ()
    fp16 = found.variants["fp16"]
    assert fp16.cosine == pytest.approx(1.0)
    assert fp16.relative_error == pytest.approx(0.01)
    assert (fp16.agreement, fp16.accuracy, fp16.confusion) == (None, None, ())


@pytest.mark.parametrize(
    ("outputs", "known", "says"),
    [
        ({"int8": [0, 1]}, {}, "no variant 'fp32' to compare with"),
        ({"fp32": [0, 1, 2]}, {}, "fp32 gave 3 rows for 2 items"),
        ({"fp32": [0, 1]}, {"names": ("a", "b")}, "2 labels are named, but fp32 has 3 outputs"),
        ({"fp32": [0, 1]}, {"labels": np.array([0, 3])}, "label 3 is none of the 3 classes"),
        ({"fp32": [0, 1]}, {"labels": np.array([0])}, "1 labels for 2 items"),
        ({"fp32": [0, 1]}, {"slices": np.array(["a"])}, "1 slices for 2 items"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    outputs: dict[str, list[int]], known: dict[str, Any], says: str
) -> None:
    arrays = {name: logits_of(answers) for name, answers in outputs.items()}
    with pytest.raises(BadInput, match=says):
        evaluate.evaluate(arrays, items(2, **known))


def test_values_that_are_not_finite_are_refused_with_their_number() -> None:
    broken = logits_of([0, 1, 2])
    broken[1, 2] = np.nan
    with pytest.raises(BadInput, match="int8 gives values that are not finite on 1 of 3 items"):
        evaluate.evaluate({"fp32": logits_of([0, 1, 2]), "int8": broken}, items(3))
    with pytest.raises(BadInput, match="no items"):
        evaluate.evaluate({"fp32": logits_of([])}, items(0))


# Texts, with an answer for each token


MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
LABELS = np.array([[-100, 0, 2, -100], [-100, 1, -100, -100]])
TOPS = [[0, 0, 2, 1], [1, 1, 2, 2]]  # of fp32: right on all three labels


def texts(**known: Any) -> HeldOut:
    asked = Asked.of(
        Score("least_softmax", "y", mask="m"), np.zeros((2, 4, 3)), {"m": known.pop("mask", MASK)}
    )
    return HeldOut(np.arange(2), asked=asked, **known)


def token_logits(tops: list[list[int]], classes: int = 3) -> Array:
    return np.eye(classes, dtype=np.float32)[np.array(tops)] * 4


def test_tokens_are_right_by_their_labels_and_agree_by_their_mask() -> None:
    int8 = [[1, 0, 0, 0], [1, 1, 0, 0]]  # differs on [CLS], on a label, and on padding
    found = evaluate.evaluate(
        {"fp32": token_logits(TOPS), "int8": token_logits(int8)},
        texts(labels=LABELS, slices=np.array(["a", "b"]), names=("x", "y", "z")),
        hub=token_logits(TOPS),
    )
    assert (found.counted, found.items, found.scenes) == ("tokens", 5, 2)
    figures = found.variants["int8"]
    assert figures.accuracy is not None
    assert (figures.accuracy.value, figures.accuracy.items) == (pytest.approx(2 / 3), 3)
    assert figures.loss is not None
    assert figures.loss.value == pytest.approx(1 / 3)
    for agreement in (figures.agreement, figures.agreement_hub):
        assert agreement is not None
        assert (agreement.value, agreement.items) == (pytest.approx(3 / 5), 5)
    assert figures.confusion == ((1, 0, 0), (0, 1, 0), (1, 0, 0))
    assert figures.recall.keys() == {"x", "y", "z"}
    assert [(part.name, part.items) for part in figures.slices] == [("a", 3), ("b", 2)]
    assert figures.slices[1].accuracy is not None
    assert figures.slices[1].accuracy.value == 1.0
    assert len(figures.reliability) > 0


@pytest.mark.parametrize("labels", [None, LABELS * 0 - 100])
def test_tokens_without_labels_still_agree(labels: Array | None) -> None:
    outputs = {"fp32": token_logits(TOPS), "int8": token_logits([[0] * 4, [1] * 4])}
    found = evaluate.evaluate(outputs, texts(labels=labels)).variants["int8"]
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(4 / 5)
    assert (found.accuracy, found.macro_f1, found.confusion) == (None, None, ())


def test_a_slice_none_of_whose_tokens_has_a_label_has_no_accuracy() -> None:
    labels = np.where(np.arange(2)[:, np.newaxis] == 0, LABELS, -100)
    found = evaluate.evaluate(
        {"fp32": token_logits(TOPS)}, texts(labels=labels, slices=np.array(["a", "b"]))
    ).variants["fp32"]
    assert [part.accuracy is None for part in found.slices] == [False, True]


def test_what_is_said_of_padding_is_not_looked_at() -> None:
    broken = token_logits(TOPS)
    broken[0, 3] = np.nan
    found = evaluate.evaluate({"fp32": broken}, texts(labels=LABELS)).variants["fp32"]
    assert found.accuracy is not None
    assert found.accuracy.value == 1.0
    broken[0, 2] = np.inf
    with pytest.raises(BadInput, match="fp32 gives values that are not finite on 1 of 5 tokens"):
        evaluate.evaluate({"fp32": broken}, texts())


@pytest.mark.parametrize(
    ("outputs", "known", "says"),
    [
        (token_logits(TOPS)[:, :3], {}, r"outputs are \[2, 3, 3\] where .* for \[2, 4\]"),
        (token_logits(TOPS)[:1], {}, "int8 gave 1 rows for 2 items"),
        (token_logits(TOPS, 4), {}, "int8 gives 4 values per token, fp32 gives 3"),
        (token_logits(TOPS), {"labels": LABELS[:, :3]}, r"label is \[2, 3\], the tokens are"),
        (
            token_logits(TOPS),
            {"labels": LABELS + 1},
            "label -99 is none of the 3 classes|not count",
        ),
        (token_logits(TOPS), {"labels": np.where(LABELS == 2, 3, LABELS)}, "label 3 is none of"),
        (token_logits(TOPS), {"labels": np.where(MASK, 0, 1)}, "item 0 has class 1 at token 3"),
        (token_logits(TOPS), {"slices": np.array(["a"])}, "1 slices for 2 items"),
        (token_logits(TOPS), {"mask": MASK * 0}, "the mask of the held-out split counts no token"),
    ],
)
def test_tokens_that_do_not_fit_together_are_refused(
    outputs: Array, known: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        evaluate.evaluate({"fp32": token_logits(TOPS), "int8": outputs}, texts(**known))


def test_labels_of_tokens_are_refused_where_a_row_has_one_answer() -> None:
    with pytest.raises(BadInput, match=r"label is \[2, 4\], one for each token, but a row has one"):
        evaluate.evaluate({"fp32": logits_of([0, 1])}, items(2, labels=LABELS))


def test_a_release_is_held_against_its_parent_token_by_token() -> None:
    before = token_logits([[0, 1, 2, 0], [1, 1, 0, 0]])
    everything, *_ = evaluate.against(token_logits(TOPS), before, texts(labels=LABELS))
    assert (everything.name, everything.items) == ("all tokens", 5)
    assert everything.loss is not None
    assert everything.loss.value == pytest.approx(-1 / 3)


def test_a_hub_that_is_called_as_a_variant_is_not_taken_for_it() -> None:
    outputs = {"model": logits_of([0, 1]), "int8": logits_of([0, 1])}
    found = evaluate.evaluate(
        outputs, items(2), reference="model", hub=logits_of([0, 2]), hub_model="model"
    )
    assert found.variants["int8"].agreement is not None
    assert found.variants["int8"].agreement.value == 1.0
    assert found.variants["int8"].agreement_hub is not None
    assert found.variants["int8"].agreement_hub.value == 0.5


# The committed family


def test_the_figures_of_the_committed_edge_release_are_those_of_its_readme(digits: Path) -> None:
    with np.load(digits / "traffic.npz", allow_pickle=False) as file:
        traffic = dict(file)
    found = release.read(digits / "bundles" / "digits-1.0.0")
    hub = release.read(digits / "bundles" / "digits-hub-1.0.0")
    inputs = {"image": traffic["input.image"]}
    outputs = {
        v.name: Session(found.file(v.path)).run(inputs, 64)["logits"] for v in found.bundle.variants
    }
    theirs = Session(hub.file("variants/fp32.onnx")).run(inputs, 64)["logits"]
    held_out = HeldOut(traffic["scene"], traffic["label"], names=tuple(found.bundle.labels))
    evaluation = evaluate.evaluate(outputs, held_out, hub=theirs, hub_model="digits-hub")
    assert (evaluation.items, evaluation.scenes) == (960, 240)
    int8 = evaluation.variants["int8-qdq"]
    assert int8.accuracy is not None
    assert int8.accuracy.value == pytest.approx(0.865, abs=0.006)
    assert int8.accuracy.upper - int8.accuracy.lower > 0.08  # of 240 scenes, not of 960 items
    assert int8.agreement is not None
    assert int8.agreement.value == pytest.approx(0.994, abs=0.006)
    (certificate,) = (c for c in found.certificates if c.variant == "int8-qdq")
    both = evaluate.escalation(certificate, outputs["int8-qdq"], theirs, held_out)
    assert 1 - both.at.escalated == pytest.approx(0.751, abs=0.02)
    assert both.at.disagreement == pytest.approx(0.022, abs=0.01)
    assert both.disagreement.lower < both.at.disagreement < both.disagreement.upper
    assert both.at.accuracy == pytest.approx(0.965, abs=0.01)
    with pytest.raises(BadInput, match="a certificate speaks of answers"):
        evaluate.escalation(certificate, outputs["int8-qdq"], theirs, held_out, vectors=True)
