"""Large JSON bodies: read and written as json would, in pieces, while others are answered."""

import asyncio
import contextlib
import io
import json

import aiohttp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fogline_protocol import big_json, rest_codec
from fogline_protocol.errors import BadRequest, InferenceError
from fogline_protocol.inference import InferResponse
from fogline_protocol.rest_codec import Wish
from tests.protos.echo import EchoServer, rest_door

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NOTHING = memoryview(b"")


@contextlib.contextmanager
def small_limits():
    """Take everything for large, in pieces of a few values."""
    saved = (big_json.PIECE_BYTES, big_json.LONG_BYTES, big_json.PAUSE_S)
    large, elements = rest_codec.LARGE_BYTES, rest_codec.PIECE_ELEMENTS
    big_json.PIECE_BYTES, big_json.LONG_BYTES, big_json.PAUSE_S = 160, 40, 0
    rest_codec.LARGE_BYTES, rest_codec.PIECE_ELEMENTS = 0, 3
    try:
        yield
    finally:
        big_json.PIECE_BYTES, big_json.LONG_BYTES, big_json.PAUSE_S = saved
        rest_codec.LARGE_BYTES, rest_codec.PIECE_ELEMENTS = large, elements


def outcome(text):
    """Return what a body is read as, or None if it is refused."""
    try:
        request, wish = rest_codec.decode_request("m", "", text, NOTHING)
    except InferenceError:
        return None
    arrays = {n: (a.dtype.str, a.shape, a.tolist()) for n, a in request.inputs.items()}
    return arrays, request.id, request.outputs, request.parameters, wish


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, width=32) | st.integers(0, 9)
nested = st.recursive(
    st.lists(numbers, max_size=12), lambda inner: st.lists(inner, max_size=5), max_leaves=12
)
tensors = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", 'a"b\\', "[[1,2,3,4,5,6,7,8,9"]),
        "datatype": st.sampled_from(["FP32", "INT64", "UINT8", "BYTES", "FP64", "BOOL"]),
        "data": nested | st.lists(st.text(max_size=30), max_size=4),
    }
)


@st.composite
def bodies(draw):
    inputs = draw(st.lists(tensors, max_size=3))
    for tensor in inputs:
        tensor["shape"] = [
            len(rest_codec._flat(tensor["data"])) + draw(st.sampled_from([0] * 9 + [1]))
        ]
    indent = draw(st.sampled_from([None, 1]))
    return json.dumps({"inputs": inputs, "id": draw(st.text(max_size=5))}, indent=indent).encode()


@st.composite
def hurt(draw):
    text = bytearray(draw(bodies()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 1))] = draw(st.sampled_from([b"[", b"]", b",", b"1", b'"', b"}", b" ", b""]))  # fmt: skip
        text = text or bytearray(b" ")
    return bytes(text)


@MANY
@given(bodies() | hurt())
def test_a_body_read_in_pieces_is_the_body_read_at_once(text):
    at_once = outcome(text)
    with small_limits():
        assert outcome(text) == at_once


@MANY
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=20))
def test_a_response_written_in_pieces_says_what_one_written_at_once_says(values):
    arrays = {
        "x": np.array(values, np.float32),
        "n": np.arange(len(values), dtype=np.int64).reshape(-1, 1),
        "t": np.array([f'"{value}é'.encode() for value in values], dtype=object),
    }
    response = InferResponse("m", "1", arrays, "id", {"p": 1})
    at_once, _ = rest_codec.encode_response(response, Wish())
    with small_limits():
        in_pieces, length = rest_codec.encode_response(response, Wish())
    assert json.loads(in_pieces) == json.loads(at_once)
    assert length is None


@pytest.mark.parametrize(
    "data", ["[1,,2,3,4,5,6,7,8]", "[,1,2,3,4,5,6,7,8,9]", "[1,2,3,4,5,6,7,8,9,]", "[[1,2,3],4,5,6,7,8,9,[],]"]
)  # fmt: skip
def test_a_comma_with_nothing_on_one_side_is_no_json_wherever_the_cut_is(data):
    for spaces in range(100, 170):
        text = '{"inputs":[{"name":"x","datatype":"INT32","shape":[9],"data":%s}]}'
        with small_limits(), pytest.raises(BadRequest, match="not JSON"):
            rest_codec.decode_request(
                "m", "", (text % data.replace("[", "[" + " " * spaces, 1)).encode(), NOTHING
            )


def body(values, datatype="FP32"):
    tensor = {"name": "x", "datatype": datatype, "shape": [len(values)], "data": values}
    return json.dumps({"inputs": [tensor]}).encode()


def test_what_is_long_without_lists_of_numbers_is_refused_and_the_way_out_named():
    text = body(["some text"] * 300_000, "BYTES")
    with pytest.raises(BadRequest, match=r"at most 2097152 are read as JSON.*binary_data_size"):
        rest_codec.decode_request("m", "", text, NOTHING)
    with pytest.raises(BadRequest, match="goes on for 32768 bytes without a comma"):
        rest_codec.decode_request("m", "", body([1] * 9)[:-4] + b" " * 400_000 + b"]}]}", NOTHING)


@pytest.mark.parametrize("name", ["inputs", "parameters", "id", "outputs"])
def test_a_long_list_is_no_other_part_of_a_request(name):
    document = {"inputs": [], name: [0.5] * 100_000}
    with pytest.raises(BadRequest):
        rest_codec.decode_request("m", "", json.dumps(document).encode(), NOTHING)


async def test_others_are_answered_while_a_large_body_is_read_and_written():
    values = np.random.default_rng(1).random(400_000).tolist()
    async with (
        rest_door(EchoServer(), max_bytes=32 << 20) as address,
        aiohttp.ClientSession(f"http://{address}") as session,
    ):

        async def ask():
            async with session.post(
                "/v2/models/echo/infer", data=io.BytesIO(body(values))
            ) as answer:
                return answer.status, await answer.json()

        call = asyncio.create_task(ask())
        answered = 0
        while not call.done():
            async with session.get("/v2/health/live") as answer:
                assert answer.status == 200
            answered += 1
        status, document = await call
    assert status == 200
    np.testing.assert_allclose(document["outputs"][0]["data"], values, rtol=1e-6)
    assert answered > 50  # at once it would be a handful, before and after


async def test_only_so_many_large_bodies_wait_at_once():
    from fogline_protocol.rest_service import LARGE_AT_ONCE

    text = body([0.25] * 60_000)
    assert len(text) > rest_codec.LARGE_BYTES
    async with (
        rest_door(EchoServer()) as address,
        aiohttp.ClientSession(f"http://{address}") as session,
    ):

        async def ask(_):
            async with session.post("/v2/models/echo/infer", data=io.BytesIO(text)) as answer:
                return answer.status, await answer.text()

        found = await asyncio.gather(*map(ask, range(4 * LARGE_AT_ONCE)))
        refused = [words for status, words in found if status == 429]
        assert {status for status, _ in found} <= {200, 429}
        assert all("binary_data_size" in words for words in refused)
        assert (await ask(0))[0] == 200
