"""The quick ways give what protobuf gives, for any request and any answer, or stand aside."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fogline_protocol import inference, known_messages, tensors
from fogline_protocol.errors import InferenceError
from fogline_protocol.inference import InferResponse
from fogline_protocol.tensors import DTYPES
from fogline_protocol.v1 import inference_pb2 as pb
from tests.protos.test_mutations import damaged, messages

MANY = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def outcome(read, data):
    try:
        return read(data)
    except InferenceError as error:
        return type(error), str(error)


def same(found, expected):
    if isinstance(expected, tuple):
        return found == expected
    if [*found.inputs] != [*expected.inputs]:
        return False
    for name, array in expected.inputs.items():
        other = found.inputs[name]
        if (other.dtype, other.shape) != (array.dtype, array.shape):
            return False
        if other.flags.writeable != array.flags.writeable:
            return False
        if tensors.to_raw(other) != tensors.to_raw(array):
            return False
    return repr([found.model, found.version, found.id, [*found.outputs], found.parameters]) == repr(
        [expected.model, expected.version, expected.id, [*expected.outputs], expected.parameters]
    ) and (found.classification, found.places) == (expected.classification, expected.places)


@st.composite
def usual(draw):
    """Requests as clients send them over and over, and small departures from them."""
    message = pb.ModelInferRequest(model_name=draw(st.sampled_from(["m", "digits"])))
    message.model_version = draw(st.sampled_from(["", "1"]))
    message.id = draw(st.sampled_from(["", "7", "é", "i" * 200]))
    for name in draw(st.lists(st.sampled_from(["x", "y", "z"]), max_size=3, unique=True)):
        datatype = draw(st.sampled_from([*DTYPES]))
        shape = draw(st.sampled_from([[1, 4], [2], [0, 3], [], [3, 50]]))
        count = int(np.prod(shape))
        size = draw(st.sampled_from([0, 0, 0, 1]))  # too long, now and then
        if datatype == "BYTES":
            raw = b"\x01\0\0\0a" * count
        else:
            raw = draw(st.binary(min_size=8, max_size=8)) * (count + 1)
            raw = raw[: count * DTYPES[datatype].itemsize]
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw + b"!" * size)
    for name in draw(st.sampled_from([[], ["y"], ["y", "z"]])):
        message.outputs.add(name=name)
    key = draw(st.sampled_from([None, "triton_enable_empty_final_response", "priority"]))
    if key:
        message.parameters[key].int64_param = draw(st.sampled_from([0, 1]))
    data = message.SerializeToString()
    if draw(st.integers(0, 3)):
        return data
    # What comes behind the tensors counts as well: the last of a field wins.
    return data + draw(st.sampled_from([b"\x0a\x01z", b"\x1a\x01z", b"\x32\x03\x0a\x01y"]))


@MANY
@given(st.lists(usual() | messages() | damaged(), min_size=1, max_size=4))
def test_any_request_means_the_same_whichever_way_it_is_read_and_whatever_came_before(sent):
    for data in sent * 2:
        expected = outcome(inference.parse_request, data)
        assert same(outcome(inference.decode_request, data), expected), data


@MANY
@given(usual(), st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_is_seen_although_the_request_before_was_known(data, at, value):
    outcome(inference.decode_request, data)
    hurt = bytearray(data)
    if hurt:
        hurt[at % len(hurt)] = value
    expected = outcome(inference.parse_request, bytes(hurt))
    assert same(outcome(inference.decode_request, bytes(hurt)), expected)


def test_a_repeated_request_is_not_parsed_again(monkeypatch):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    one, two = (
        inference.encode_request(inference.InferRequest("m", {"x": array + n}, id=str(n)))
        for n in (0, 1)
    )
    inference.decode_request(one)
    monkeypatch.setattr(inference, "parse_request", None)
    found = inference.decode_request(two)
    assert found.id == "1"
    np.testing.assert_array_equal(found.inputs["x"], array + 1)


def test_arrays_are_aligned_wherever_their_bytes_lay():
    for name in ("x" * n for n in range(1, 12)):
        for dtype in ("f4", "f8", "i2", "u1"):
            data = inference.encode_request(
                inference.InferRequest("m", {name: np.arange(5, dtype=dtype)})
            )
            for _ in range(2):
                assert inference.decode_request(data).inputs[name].flags.aligned


texts = st.sampled_from(["", "a", "é", "x" * 300])
arrays = st.builds(
    lambda dtype, shape: np.zeros(shape, dtype),
    st.sampled_from([d for d in DTYPES.values() if d != tensors.BYTES]),
    st.sampled_from([(1, 4), (0,), (), (3, 100)]),
) | st.just(np.array([[b"a", b"bc"]], dtype=object))
responses = st.builds(
    InferResponse,
    texts,
    texts,
    st.dictionaries(texts, arrays, max_size=3),
    texts,
    st.dictionaries(texts, texts | st.booleans() | st.integers(0, 2**63) | st.just(1.0)),
    st.sampled_from([(), ("a",)]),
)


@MANY
@given(st.lists(responses, min_size=1, max_size=3))
def test_any_answer_is_the_same_message_whichever_way_it_is_written(sent):
    for response in sent * 2:
        found = pb.ModelInferResponse.FromString(inference.encode_response(response))
        assert found == inference._response(response)


def test_what_is_remembered_is_bounded():
    remembered = known_messages.Remembered()
    for number in range(10_000):
        remembered.put(b"%d" % number, number)
        assert remembered.get(b"%d" % number) == number
    assert len(remembered._known) <= known_messages.REMEMBERED


@pytest.mark.parametrize(
    "data", [b"", b"\x3a", b"\x3a\xff\xff\xff\xff\xff\xff", b"\x0a\x80", b"\x3a\x05ab", b"\xff"]
)
def test_what_ends_early_takes_the_long_way(data):
    assert known_messages.split_request(data) is None
