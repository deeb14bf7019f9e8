import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_agent.inference.rows import not_finite
from fogline_protocol.tensors import Array

shapes = arrays.array_shapes(min_dims=2, max_dims=4, max_side=5)
floats = st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
    lambda dtype: arrays.arrays(dtype, shapes)
)


@given(floats)
def test_every_row_with_a_value_that_is_not_finite_is_found_and_no_other(array: Array) -> None:
    expected = {row for row, values in enumerate(array) if not np.isfinite(values).all()}
    assert set(not_finite({"x": array}, len(array), batched=True)) == expected


def test_all_inputs_of_a_row_count() -> None:
    one, other = np.zeros((3, 2)), np.zeros((3, 4), np.float16)
    one[0, 1], other[2, 3] = np.nan, -np.inf
    whole = np.array([1, 2, 1 << 62])
    assert set(not_finite({"a": one, "b": other, "c": whole}, 3, batched=True)) == {0, 2}


@pytest.mark.filterwarnings("error")
def test_the_largest_finite_values_are_finite() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        x = np.full((2, 70000), np.finfo(dtype).max, dtype)
        assert not not_finite({"x": x}, 2, batched=True)


def test_a_request_without_rows_is_one() -> None:
    assert list(not_finite({"x": np.array([0, np.nan, 0])}, 1, batched=False)) == [0]
    assert not not_finite({"x": np.zeros((0, 3))}, 0, batched=True)


def test_texts_and_whole_numbers_are_what_they_are() -> None:
    text = np.array([[b"nan"]], object)
    assert not not_finite({"s": text, "n": np.zeros((1, 2), np.uint8)}, 1, batched=True)
