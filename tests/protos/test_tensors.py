"""The tensor codec: what goes in comes out, and what contradicts itself is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fogline_protocol import tensors
from fogline_protocol.tensors import TensorError, TensorSpec

NUMERIC = [name for name in tensors.DTYPES if name not in ("BYTES", "BF16")]
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@given(st.sampled_from(NUMERIC).flatmap(lambda n: hnp.arrays(tensors.DTYPES[n], shapes)))
def test_a_numeric_tensor_survives_the_wire(array):
    datatype = tensors.datatype_of(array)
    back = tensors.from_raw(datatype, array.shape, tensors.to_raw(array))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(shapes, st.data())
def test_a_bytes_tensor_survives_the_wire(shape, data):
    count = int(np.prod(shape))
    elements = data.draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
    array = np.empty(count, dtype=object)
    array[:] = elements
    array = array.reshape(shape)
    back = tensors.from_raw("BYTES", shape, tensors.to_raw(array))
    assert back.shape == array.shape
    assert list(back.flat) == elements


def test_bf16_travels_as_opaque_two_byte_values():
    raw = bytes(range(8))
    array = tensors.from_raw("BF16", [2, 2], raw)
    assert tensors.datatype_of(array) == "BF16"
    assert tensors.to_raw(array) == raw


def test_an_array_in_another_byte_order_is_not_taken_for_ours():
    with pytest.raises(TensorError, match="no Open Inference datatype"):
        tensors.datatype_of(np.zeros(2, ">f4"))


@given(st.binary(max_size=40), st.integers(0, 6))
def test_arbitrary_bytes_are_a_bytes_tensor_or_refused(raw, count):
    try:
        array = tensors.from_raw("BYTES", [count], raw)
    except TensorError:
        return
    assert tensors.to_raw(array) == raw


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "text"),
    [
        ("FP32", [2], b"1234", r"expected 8 bytes for FP32 of shape \[2\], got 4"),
        ("FP32", [-1], b"", "negative dimension"),
        ("FP33", [1], b"1234", "unknown datatype 'FP33'"),
        ("UINT8", [1 << 20, 1 << 20], b"", "more than"),
        ("FP32", [0, 1 << 62], b"", "more than"),
        ("BYTES", [0, 1 << 62], b"", "more than"),
        ("UINT8", [1] * 40, b"1", "40 dimensions"),
        ("BYTES", [1], b"\x05\0\0\0abc", "claims 5 bytes, 3 are left"),
        ("BYTES", [1 << 30], b"abcd", "at most 1048576"),
        ("BYTES", [2], b"abcd", "expected 2 BYTES elements"),
        ("BYTES", [1], b"\x01\0\0\0ab", "1 bytes are left over"),
    ],
)
def test_raw_bytes_that_contradict_their_shape_are_refused_by_name(datatype, shape, raw, text):
    with pytest.raises(TensorError, match=text):
        tensors.from_raw(datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "values", "text"),
    [
        ("INT8", [300], "does not fit INT8"),
        ("INT32", [1.5], "whole numbers"),
        ("INT32", [True], "whole numbers"),
        ("INT32", ["1"], "fit|whole"),
        ("UINT8", [-1], "does not fit UINT8"),
        ("BOOL", [1], "true and false"),
        ("BYTES", [1], "must be text"),
        ("BYTES", ["\ud800"], "Unicode"),
        ("FP32", [1e39], "does not fit FP32"),
        ("FP16", [1.0], "raw bytes"),
        ("FP32", [1.0, 2.0], "expected 1 values"),
        ("FP32", [None], "does not fit FP32"),
        ("FP32", ["1.5"], "does not fit FP32"),
        ("FP64", [True], "does not fit FP64"),
        ("INT64", [float("nan")], "does not fit INT64"),
    ],
)
def test_values_that_do_not_fit_their_datatype_are_refused(datatype, values, text):
    with pytest.raises(TensorError, match=text):
        tensors.from_values(datatype, [1], values)


def test_a_spec_says_what_differs():
    spec = TensorSpec("image", "FP32", (-1, 8))
    assert spec.mismatch(np.zeros((3, 8), np.float32)) is None
    assert spec.mismatch(np.zeros((3, 8), np.float64)) == "expected datatype FP32, got FP64"
    assert spec.mismatch(np.zeros((3, 9), np.float32)) == "expected shape [-1, 8], got [3, 9]"
    assert spec.mismatch(np.zeros(8, np.float32)) == "expected shape [-1, 8], got [8]"


def test_a_number_beyond_the_range_of_its_datatype_is_refused():
    with pytest.raises(TensorError, match="does not fit FP32"):
        tensors.from_values("FP32", [1], [1e300])
    assert np.isinf(tensors.from_values("FP32", [1], [float("inf")])).all()


@pytest.mark.parametrize("shape", [[0, 1 << 62], [1 << 62, 0], [0, 1 << 20, 1 << 20]])
def test_a_zero_does_not_hide_a_dimension_that_no_array_can_have(shape):
    with pytest.raises(TensorError, match="more than"):
        tensors.from_raw("FP32", shape, b"")
