"""Which answers count, and what two models' answers have in common."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fogline_protocol import golden
from fogline_protocol.answers import Asked
from fogline_protocol.golden import Deviates, GoldenVectors, judge
from fogline_protocol.release import Bundle, SelfTest, Tolerance, Variant
from fogline_protocol.score import Score
from fogline_protocol.tensors import TensorError, TensorSpec

ROWS = Score("max_softmax", "logits")
TOKENS = Score("least_softmax", "logits", mask="attention_mask")
MASK = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


def logits_of(classes):
    """Return logits whose top classes these are: [n, ...] -> [n, ..., 3]."""
    return np.eye(3, dtype=np.float32)[np.array(classes)]


TOPS = [[0, 1, 2, 0], [1, 1, 1, 1], [2, 2, 2, 2]]


def test_a_row_has_one_answer_unless_its_score_is_of_tokens():
    outputs = np.arange(12, dtype=np.float32).reshape(2, 2, 3)  # of some shape of its own
    asked = Asked.of(ROWS, outputs, {})
    assert asked.top(outputs).tolist() == [5, 5]
    assert asked.rows.tolist() == [0, 1]
    assert asked.logits(outputs).shape == (2, 6)
    assert asked.differ(outputs, -outputs).tolist() == [True, True]


def test_the_tokens_that_count_are_those_of_the_mask_in_order():
    asked = Asked.of(TOKENS, logits_of(TOPS), {"attention_mask": MASK})
    assert len(asked) == 4
    assert asked.top(logits_of(TOPS)).tolist() == [0, 1, 2, 1]
    assert asked.rows.tolist() == [0, 0, 0, 1]
    assert asked.in_rows(np.array([True, False, True, True])).tolist() == [2, 1, 0]


def test_a_row_differs_when_any_token_that_counts_does():
    asked = Asked.of(TOKENS, logits_of(TOPS), {"attention_mask": MASK})
    other = [[0, 1, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2]]
    padding = [[0, 1, 2, 1], [2, 1, 2, 0], [0, 1, 0, 1]]  # and a row in which nothing counts
    assert asked.differ(logits_of(TOPS), logits_of(other)).tolist() == [True, False, False]
    assert not asked.differ(logits_of(TOPS), logits_of(padding)).any()


def test_without_a_mask_every_token_counts():
    score = dataclasses.replace(TOKENS, mask="")
    asked = Asked.of(score, logits_of(TOPS), {"attention_mask": MASK})
    assert asked.top(logits_of(TOPS)).reshape(3, 4).tolist() == TOPS


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(0, 5), st.just(3))),
    st.randoms(use_true_random=False),
)
def test_every_answer_that_counts_is_told_once_and_no_other(logits, random):
    mask = np.array([[random.random() < 0.5 for _ in row] for row in logits]).reshape(
        logits.shape[:2]
    )
    asked = Asked.of(TOKENS, logits, {"attention_mask": mask})
    assert len(asked) == len(asked.rows) == len(asked.top(logits)) == mask.sum()
    assert asked.in_rows(np.ones(len(asked), bool)).tolist() == mask.sum(axis=1).tolist()


@pytest.mark.parametrize(
    ("logits", "inputs", "says"),
    [
        (logits_of([0, 1]), {"attention_mask": MASK}, r"expected \[n, tokens, classes\]"),
        (logits_of(TOPS), {}, "there is no input 'attention_mask'"),
        (logits_of(TOPS), {"attention_mask": MASK[:, :2]}, r"is \[3, 2\], but .* is \[3, 4, 3\]"),
    ],
)
def test_tokens_that_cannot_be_told_are_refused(logits, inputs, says):
    with pytest.raises(TensorError, match=says):
        Asked.of(TOKENS, logits, inputs)


def test_outputs_of_other_tokens_are_refused():
    asked = Asked.of(TOKENS, logits_of(TOPS), {"attention_mask": MASK})
    with pytest.raises(TensorError, match=r"outputs are \[3, 2, 6\] where .* for \[3, 4\]"):
        asked.top(logits_of(TOPS).reshape(3, 2, 6))
    with pytest.raises(TensorError, match=r"outputs are \[1, 3\] where .* for \[2\]"):
        Asked.of(ROWS, logits_of([0, 1]), {}).top(logits_of([0]))


def a_tagger(min_agreement):
    return Bundle(
        model="tagger",
        version="1.0.0",
        inputs=(TensorSpec("attention_mask", "INT64", (-1, -1)),),
        outputs=(TensorSpec("logits", "FP32", (-1, -1, 3)),),
        max_batch=8,
        variants=(Variant("fp32", "fp32.onnx", "fp32", ()),),
        self_test=SelfTest("selftest.npz", {"fp32": Tolerance(9.0, min_agreement)}),
        files={},
        score=TOKENS,
    )


def test_a_self_test_counts_the_tokens_that_count():
    vectors = GoldenVectors({"attention_mask": MASK}, {"logits": logits_of(TOPS)}, 8)
    found = logits_of([[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])  # one of four, and padding
    bundle = a_tagger(0.75)
    figures = judge(bundle, vectors, [{"logits": found}], bundle.self_test.tolerances["fp32"])
    assert figures["agreement"] == 0.75
    strict = a_tagger(0.8)
    with pytest.raises(Deviates, match=r"75\.0% of the golden tokens get its top answer"):
        judge(strict, vectors, [{"logits": found}], strict.self_test.tolerances["fp32"])


def test_golden_vectors_whose_mask_is_of_other_tokens_cannot_be_used(tmp_path):
    path = tmp_path / "selftest.npz"
    arrays = {"input.attention_mask": MASK[:, :2], "output.logits": logits_of(TOPS)}
    np.savez(path, **arrays)
    with pytest.raises(golden.VectorsUnusable, match=r"is \[3, 2\], but output 'logits' is"):
        GoldenVectors.read(a_tagger(0.8), path)
    np.savez(path, **{**arrays, "input.attention_mask": MASK})
    assert GoldenVectors.read(a_tagger(0.8), path).max_batch == 8
