"""Tensors that cross between two processes arrive as they were."""

import os
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from cloud_hub.engines.channel import MAX_DATAGRAM, SMALLEST, Channel, Gone
from fogline_protocol import tensors

NUMERIC = [dtype for dtype in tensors.DTYPES.values() if dtype.kind in "?biuf"]


@pytest.fixture
def ends():
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


arrays = st.one_of(
    st.sampled_from(NUMERIC).flatmap(
        lambda dtype: nps.arrays(dtype, nps.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    st.lists(st.binary(max_size=40), max_size=5).map(
        lambda texts: np.array([*texts, None], dtype=object)[:-1]
    ),
)


@given(st.lists(st.dictionaries(st.text(max_size=8), arrays, max_size=4), max_size=4))
def test_whatever_is_sent_arrives(messages):
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    try:
        for number, message in enumerate(messages):
            ours.send({"number": number}, message)
            document, received = other.receive()
            assert document == {"number": number}
            assert list(received) == list(message)
            for name, sent in message.items():
                assert received[name].dtype == sent.dtype
                np.testing.assert_array_equal(received[name], sent)
    finally:
        ours.close()
        other.close()


numbers = st.sampled_from(NUMERIC).flatmap(
    lambda dtype: nps.array_shapes(min_dims=0, max_dims=2, min_side=0).flatmap(
        lambda shape: st.lists(
            st.integers(0, 5).flatmap(lambda rows: nps.arrays(dtype, (rows, *shape))), min_size=1
        )
    )
)


@given(st.lists(numbers, min_size=1, max_size=3), st.booleans())
def test_what_is_joined_arrives_without_another_copy(columns, between):
    requests = [
        {str(number): parts[at] for number, parts in enumerate(columns)}
        for at in range(min(map(len, columns)))
    ]
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    try:
        joined = ours.join(requests)
        if between:  # nobody sent this
            joined = ours.join(requests)
        before = ours._memory.copy()
        ours.send({}, joined)
        np.testing.assert_array_equal(ours._memory, before)
        _, received = other.receive()
        for name in requests[0]:
            expected = np.concatenate([request[name] for request in requests])
            assert received[name].dtype == expected.dtype
            np.testing.assert_array_equal(received[name], expected)
            np.testing.assert_array_equal(joined[name], expected)
            assert np.shares_memory(joined[name], ours._memory) or not expected.size
    finally:
        ours.close()
        other.close()


def test_what_was_joined_is_sent_as_it_is_and_not_what_took_its_place(ends):
    ours, other = ends
    joined = ours.join([{"x": np.zeros(3, np.uint8)}, {"x": np.ones(3, np.uint8)}])
    ours.send({}, {"x": np.full(2 * SMALLEST, 7, np.uint8)})  # needs other memory
    assert other.receive()[1]["x"].min() == 7
    ours.send({}, joined)
    np.testing.assert_array_equal(other.receive()[1]["x"], [0, 0, 0, 1, 1, 1])


def test_memory_grows_with_what_is_sent_and_is_kept(ends):
    ours, other = ends
    for size in (10, SMALLEST, 10, 3 * SMALLEST, SMALLEST):
        sent = np.arange(size, dtype=np.uint8)
        ours.send({}, {"x": sent})
        np.testing.assert_array_equal(other.receive()[1]["x"], sent)
    # 64 KiB, then the power of two above 192 KiB: two mappings, however many messages.
    assert len(ours._memory) == 4 * SMALLEST


def test_rows_that_do_not_lie_together_arrive_in_order(ends):
    ours, other = ends
    sent = np.arange(24, dtype=np.int32).reshape(4, 6)[::2, ::3]
    ours.send({}, {"x": sent})
    np.testing.assert_array_equal(other.receive()[1]["x"], sent)


def test_bf16_crosses_as_its_two_bytes(ends):
    ours, other = ends
    sent = np.array([b"\x80\x3f", b"\x00\x40"], dtype=tensors.BF16)
    ours.send({}, {"x": sent})
    received = other.receive()[1]["x"]
    assert received.dtype == tensors.BF16
    assert received.tobytes() == sent.tobytes()


def test_memory_cannot_be_taken_away_from_a_reader(ends):
    ours, other = ends
    ours.send({}, {"x": np.zeros(4, np.float32)})
    _, descriptors, _, _ = socket.recv_fds(other._socket, MAX_DATAGRAM, 1)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptors[0], 0)
    os.close(descriptors[0])


def test_an_end_that_closed_is_noticed_by_the_other(ends):
    ours, other = ends
    other.close()
    with pytest.raises(Gone):
        ours.receive()
    with pytest.raises(Gone):
        ours.send({})


def test_no_descriptor_is_left_open():
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    for size in (10, 2 * SMALLEST):
        ours.send({}, {"x": np.zeros(size, np.uint8)})
        other.receive()
    for size in (3 * SMALLEST, 5 * SMALLEST):  # joined, and never sent
        ours.join([{"x": np.zeros(size, np.uint8)}])
    ours.close()
    other.close()
    assert count() == before
