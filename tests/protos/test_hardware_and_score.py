"""The two scales everybody must agree on: hardware classes and scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fogline_protocol import hardware, score


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, "x86_64+avx512_vnni"),
        ("x86_64", {"avx2", "avx_vnni"}, "x86_64+avx_vnni"),
        ("x86_64", {"sse2"}, "x86_64"),
        ("aarch64", {"asimddp", "fp"}, "aarch64+asimddp"),
        ("riscv64", {"v"}, "riscv64"),
    ],
)
def test_the_strongest_instruction_set_names_the_class(machine, flags, name):
    assert hardware.instruction_set(machine, flags) == name


@pytest.mark.parametrize(
    ("processor", "wanted", "suits"),
    [
        ("x86_64+avx2", (), True),
        ("x86_64+avx2", ("x86_64",), True),
        ("x86_64+avx2", ("x86_64+vnni", "aarch64"), False),
        ("x86_64+avx512_vnni", ("x86_64+vnni",), True),
        ("x86_64+avx_vnni", ("x86_64+avx512_vnni",), False),
        ("aarch64+i8mm", ("x86_64+vnni", "aarch64"), True),
        ("x86_64", ("x86_64+vnni",), False),
    ],
)
def test_a_processor_suits_those_who_name_its_kind_and_what_it_can(processor, wanted, suits):
    assert hardware.suits(processor, wanted) == suits


@pytest.mark.parametrize(
    ("processor", "saturates"),
    [
        ("x86_64", True),
        ("x86_64+avx2", True),
        ("x86_64+avx512f", True),
        ("x86_64+avx_vnni", False),
        ("x86_64+avx512_vnni", False),
        ("aarch64+i8mm", False),
        ("aarch64", False),
    ],
)
def test_sums_saturate_on_x86_without_vnni_only(processor, saturates):
    assert hardware.sums_saturate(processor) == saturates


def test_a_patch_release_of_the_runtime_is_the_same_class():
    first = hardware.hardware_class("CPUExecutionProvider", "onnxruntime", "1.32.0")
    assert first == hardware.hardware_class("CPUExecutionProvider", "onnxruntime", "1.32.9")
    assert first.endswith("/CPUExecutionProvider/onnxruntime-1.32")


rows = hnp.arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32))


@given(rows)
def test_a_score_is_the_largest_softmax_probability(logits):
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(score.max_softmax(logits), softmax.max(axis=1), rtol=1e-5)


@given(rows)
def test_a_rows_score_does_not_depend_on_its_company(logits):
    together = score.max_softmax(logits)
    alone = np.concatenate([score.max_softmax(row[None]) for row in logits])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_is_certain_about_a_row_that_is_not_finite(bad):
    logits = np.array([[1, 2], [bad, 2]], np.float32)
    scores = score.max_softmax(logits)
    assert scores[0] > 0.5
    assert scores[1] == 0.0


HEAD = {"bias": 0.5, "log_odds": 1.25, "spread": -0.5}
weights = st.floats(-100, 100)
any_head = st.fixed_dictionaries(dict.fromkeys(HEAD, weights))
any_finite = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(any_finite, any_head)
def test_a_logistic_score_lies_between_0_and_1_whatever_the_logits(logits, head):
    scores = score.logistic(logits, **head)
    assert scores.shape == (len(logits),)
    assert ((scores > 0) & (scores < 1)).all()


@given(any_finite, any_head)
def test_a_rows_logistic_score_does_not_depend_on_its_company(logits, head):
    together = score.logistic(logits, **head)
    alone = np.concatenate([score.logistic(row[None], **head) for row in logits])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("classes", [2, 10, 127, 1000])
def test_nor_with_many_classes(classes):
    logits = np.random.default_rng(classes).normal(0, 4, (33, classes)).astype(np.float32)
    for function in (score.max_softmax, lambda some: score.logistic(some, **HEAD)):
        alone = np.concatenate([function(row[None]) for row in logits])
        np.testing.assert_array_equal(function(logits), alone)


@given(hnp.arrays(np.float32, (6, 5), elements=st.integers(-1024, 1024)), st.integers(-999, 999))
def test_a_logistic_score_does_not_change_when_every_logit_does(logits, constant):
    np.testing.assert_array_equal(
        score.logistic(logits + np.float32(constant), **HEAD), score.logistic(logits, **HEAD)
    )


@given(hnp.arrays(np.float64, (8, 4), elements=st.integers(-40, 40)), st.floats(0.1, 2))
def test_a_head_on_the_log_odds_alone_ranks_as_the_softmax_does(steps, slope):
    logits = (steps / 8).astype(np.float32)
    plain = score.max_softmax(logits.astype(np.float64)).astype(np.float64)
    scores = score.logistic(logits, bias=-0.7, log_odds=slope, spread=0)
    for i in range(len(logits)):
        surer = plain[i] > plain + 1e-6  # nearer ones are float32's business
        assert (scores[i] > scores[surer]).all()
    same = score.logistic(logits, bias=0, log_odds=1, spread=0)
    np.testing.assert_allclose(same, plain, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("head", [HEAD, dict.fromkeys(HEAD, 0.0)])
def test_nor_is_a_logistic_head_certain_about_a_row_that_is_not_finite(bad, head):
    scores = score.logistic(np.array([[1, 9], [bad, 2], [2, bad]], np.float32), **head)
    assert scores[0] >= 0.5
    assert scores[1:].tolist() == [0, 0]


@st.composite
def texts(draw):
    """Logits [n, tokens, classes] and a mask [n, tokens] of any kind; some of both may be empty."""
    shape = draw(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 5)))
    anything = st.floats(width=32) | st.floats(-20, 20, width=32)
    kind = draw(st.sampled_from([np.int64, np.bool_, np.float32, np.uint8]))
    mask = draw(hnp.arrays(np.bool_, shape[:2])).astype(kind)
    return draw(hnp.arrays(np.float32, shape, elements=anything)), mask


@given(texts())
def test_a_text_scores_as_its_least_certain_token_that_counts(text):
    logits, mask = text
    scores = score.least_softmax(logits, mask)
    assert (scores.shape, scores.dtype) == ((len(logits),), np.float32)
    for row, counts, found in zip(logits, mask != 0, scores, strict=True):
        if counts.any():
            assert found == score.max_softmax(row[counts]).min()
        else:
            assert found == 1.0  # nothing is asked, so nothing is uncertain


@given(texts(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_neither_padding_nor_the_order_of_tokens_changes_a_texts_score(text, more, random):
    logits, mask = text
    scores = score.least_softmax(logits, mask)
    padding = np.full((len(logits), more, logits.shape[2]), np.nan, np.float32)
    longer = np.concatenate([logits, padding], axis=1)
    ones = np.concatenate([mask, np.zeros((len(mask), more), mask.dtype)], axis=1)
    np.testing.assert_array_equal(score.least_softmax(longer, ones), scores)
    order = list(range(longer.shape[1]))
    random.shuffle(order)
    shuffled = score.least_softmax(longer[:, order], ones[:, order])
    np.testing.assert_array_equal(shuffled, scores)


@given(any_finite)
def test_a_text_of_one_token_scores_as_a_row(logits):
    one = logits[:, np.newaxis]
    np.testing.assert_array_equal(score.least_softmax(one), score.max_softmax(logits))
    np.testing.assert_array_equal(
        score.least_softmax(one, np.ones(one.shape[:2], np.int64)), score.max_softmax(logits)
    )


@given(texts())
def test_without_a_mask_every_token_counts(text):
    logits, _ = text
    np.testing.assert_array_equal(
        score.least_softmax(logits), score.least_softmax(logits, np.ones(logits.shape[:2]))
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_is_certain_about_a_text_with_a_counted_token_that_is_not_finite(bad):
    logits = np.array([[[9, 0], [bad, 0]]] * 2, np.float32)
    assert score.least_softmax(logits).tolist() == [0, 0]
    scores = score.least_softmax(logits, np.array([[1, 1], [1, 0]]))
    assert scores[0] == 0
    assert scores[1] > 0.99


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
        elements=st.floats(-20, 20, width=32),
    ),
    st.integers(0, 5),
)
def test_probabilities_score_as_the_softmax_they_came_from(logits, counted):
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)
    mask = np.broadcast_to(np.arange(logits.shape[1]) < counted, logits.shape[:2])
    np.testing.assert_allclose(
        score.least_probability(shares, mask), score.least_softmax(logits, mask), rtol=1e-5
    )
    for rows, same in zip(shares, logits, strict=True):
        np.testing.assert_allclose(score.max_probability(rows), score.max_softmax(same), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nor_are_probabilities_that_are_not_finite(bad):
    shares = np.array([[0.5, bad], [0.25, 0.75]], np.float32)
    assert score.max_probability(shares).tolist() == [0, 0.75]


def test_a_score_with_parameters_is_the_function_with_them():
    logits = np.array([[1, 3, 2]], np.float32)
    ready = score.scorer(score.Score("logistic", "y", HEAD))
    assert ready(logits) == score.logistic(logits, **HEAD)
    assert score.scorer(score.Score("max_softmax", "y")) is score.max_softmax
    with pytest.raises(KeyError):
        score.scorer(score.Score("forest", "y"))


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (score.Score("max_softmax", "y"), None),
        (score.Score("logistic", "y", HEAD), None),
        (score.Score("forest", "y", {"trees": 3.0}), None),  # of a later release of fogline
        (
            score.Score("max_softmax", "y", {"bias": 1.0}),
            "the score max_softmax takes the parameters none, got bias",
        ),
        (
            score.Score("logistic", "y"),
            "the score logistic takes the parameters bias, log_odds, spread, got none",
        ),
        (score.Score("least_softmax", "y", mask="attention_mask"), None),
        (score.Score("least_softmax", "y"), None),
        (
            score.Score("max_softmax", "y", mask="attention_mask"),
            "the score max_softmax is of whole rows and takes no mask, got 'attention_mask'",
        ),
        (
            score.Score("logistic", "y", {**HEAD, "bias": float("nan")}),
            "the score's parameter bias is not a finite number",
        ),
    ],
)
def test_a_score_has_the_parameters_of_its_function(found, problem):
    assert found.problem == problem
