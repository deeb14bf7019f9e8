"""Examples as bytes: the same tensors are the same bytes, and nothing else is taken for them."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cloud_hub.insight import example_codec
from cloud_hub.insight.example_codec import ExampleDamaged, Facts, FrameReader
from tests.examples import tensors_equal

NUMBERS = hnp.arrays(
    st.sampled_from([np.dtype(t) for t in ("f4", "f8", "i8", "u1", "?", "f2", "u2")]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


BF16 = hnp.arrays(np.dtype("u2"), hnp.array_shapes(max_dims=2, max_side=3)).map(
    lambda array: array.view("V2")
)


@st.composite
def texts(draw):
    values = draw(st.lists(st.binary(max_size=6), max_size=4))
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


ARRAYS = st.dictionaries(st.text(max_size=4), NUMBERS | BF16 | texts(), max_size=3)
FACTS = Facts("", 1.5, "kiosk", "", "uncertain", 1.0, 0.25, "m@1.0.0", "e" * 64, "j", "", 3)


@given(ARRAYS, st.randoms())
def test_what_is_packed_comes_back_and_the_order_does_not_matter(arrays, order: random.Random):
    packed = example_codec.pack(arrays)
    names = list(arrays)
    order.shuffle(names)
    assert example_codec.pack({name: arrays[name] for name in names}) == packed
    assert tensors_equal(example_codec.unpack(packed), arrays)


@given(ARRAYS, ARRAYS)
def test_different_tensors_have_different_names(one, other):
    same = example_codec.pack(one) == example_codec.pack(other)
    assert same == tensors_equal(one, other)


@given(st.binary(max_size=60), ARRAYS, st.data())
def test_bytes_that_nobody_packed_are_refused_and_nothing_else_is_raised(junk, arrays, data):
    packed = example_codec.pack(arrays)
    cut = data.draw(st.integers(0, len(packed)))
    for damaged in (junk, packed[:cut] + junk, packed + b"x"):
        try:
            found = example_codec.unpack(damaged)
        except ExampleDamaged:
            continue
        assert example_codec.pack(found)  # by chance it is something


@given(st.lists(ARRAYS, max_size=4), st.data())
def test_frames_come_whole_however_the_stream_is_cut(many, data):
    sent = []
    for arrays in many:
        packed = example_codec.pack(arrays)
        facts = dataclasses.replace(FACTS, sha256=example_codec.sha256_of(packed))
        sent.append(example_codec.example_frame(facts, packed, packed, b"{}\n"))
    sent.append(example_codec.frame({"end": True}))
    stream = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader, found = FrameReader(), []
    for start, end in itertools.pairwise([0, *cuts, len(stream)]):
        found += list(reader.feed(stream[start:end]))
    assert found[-1][0] == {"end": True}
    assert len(found) == len(many) + 1
    for (document, payload), arrays in zip(found, many, strict=False):
        example = example_codec.read_example(document, payload)
        assert tensors_equal(example.inputs, arrays)
        assert tensors_equal(example.edge, arrays)
        assert example.hub == {}


def test_inputs_that_are_not_those_of_their_name_are_refused():
    packed = example_codec.pack({"x": np.zeros(3, np.float32)})
    other = example_codec.pack({"x": np.ones(3, np.float32)})
    (frame,) = FrameReader().feed(example_codec.example_frame(FACTS, other, b"{}\n", b"{}\n"))
    with pytest.raises(ExampleDamaged, match="not those of this name"):
        example_codec.read_example(*frame)
    assert packed != other


@pytest.mark.parametrize("stream", [b"\xff" * 64, b"HTTP/1.1 502 Bad Gateway\r\n", b"\0" * 16])
def test_another_stream_is_not_taken_for_an_export(stream):
    with pytest.raises(ExampleDamaged):
        list(FrameReader().feed(stream))


@pytest.mark.parametrize(
    ("shapes", "has"),
    [({}, True), ({"image": [1, 8, 8]}, True), ({"image": [8, 8]}, False), ({"y": [1]}, False),
     ({"n": []}, True)],
)  # fmt: skip
def test_a_layout_is_found_by_its_shapes(shapes, has):
    arrays = {"image": np.zeros((1, 8, 8), np.float32), "n": np.array(1, np.int64)}
    layout = example_codec.layout_of(arrays)
    assert layout == "image FP32[1,8,8]; n INT64[]"
    assert example_codec.has_shapes(layout, shapes) is has
