"""Blocks are read as hpack alone would read them, remembered or not, and ours are read by it."""

import contextlib

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_protocol import header_blocks
from fogline_protocol.header_blocks import BadBlock, BlockReader, TooLong

names = st.sampled_from([b":path", b"te", b"grpc-timeout", b"a", b"x" * 200])
values = st.sampled_from([b"", b"/s/M", b"trailers", b"1S", b"2S", b"v" * 900])
lists = st.lists(st.tuples(names, values), max_size=6)


@settings(deadline=None, max_examples=300)
@given(st.lists(lists | st.integers(0, 4096), max_size=30), st.booleans())
def test_whatever_was_remembered_a_block_means_what_it_means_to_hpack(steps, huffman):
    encoder, reader, fresh = hpack.Encoder(), BlockReader(list, 1 << 16), hpack.Decoder(1 << 16)
    for step in steps:
        if isinstance(step, int):
            if step != encoder.header_table_size:  # hpack's encoder forgets an update set twice
                encoder.header_table_size = step
            continue
        block = encoder.encode(step, huffman=huffman)
        assert reader.read(block) == [tuple(h) for h in fresh.decode(block, raw=True)] == step


def test_a_block_that_changed_the_table_means_something_else_the_next_time():
    reader = BlockReader(list, 1 << 16)
    indexed = bytes([0x80 | 62])  # the newest entry of the table
    for value in (b"1", b"2", b"2"):
        reader.read(b"\x40\x01a\x01" + value)  # inserts
        assert reader.read(indexed) == reader.read(indexed) == [(b"a", value)]


def test_a_block_that_changes_the_table_changes_it_every_time():
    reader = BlockReader(list, 1 << 16)
    for value in b"1122":
        reader.read(b"\x40\x01a\x01" + bytes([value]))
    newest = [reader.read(bytes([0x80 | index]))[0][1] for index in (62, 63, 64, 65)]
    assert newest == [b"2", b"2", b"1", b"1"]


def test_a_block_is_interpreted_once_as_long_as_the_table_stays():
    found = []
    reader = BlockReader(lambda headers: found.append(headers) or len(found), 1 << 16)
    block = header_blocks.write([(b"a", b"b")])
    assert [reader.read(block) for _ in range(3)] == [1, 1, 1]
    for number in range(200):  # what is remembered is bounded
        reader.read(header_blocks.write([(b"a", b"%d" % number)]))
    assert len(reader._known) <= header_blocks.REMEMBERED


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.binary(max_size=300))))
def test_hpack_reads_what_we_write(headers):
    block = header_blocks.write(headers)
    assert [tuple(h) for h in hpack.Decoder(1 << 20).decode(block, raw=True)] == headers


@pytest.mark.parametrize("length", [0, 126, 127, 128, 254, 255, 256, 16383, 16384, 70000])
def test_lengths_around_the_limits_of_the_prefix_are_right(length):
    block = header_blocks.write([(b"a", b"v" * length)])
    assert hpack.Decoder(1 << 20).decode(block, raw=True)[0][1] == b"v" * length


def test_a_small_block_that_unpacks_to_much_is_refused():
    reader = BlockReader(list, 1 << 15)
    reader.read(b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000)  # 4000 bytes, remembered as 62
    with pytest.raises(TooLong):
        reader.read(bytes([0x80 | 62]) * 100)


@settings(deadline=None, max_examples=1000)
@given(st.binary(max_size=200))
def test_no_bytes_break_more_than_their_connection(data):
    reader = BlockReader(list, 1 << 15)
    with contextlib.suppress(BadBlock):
        reader.read(data)


def test_a_block_of_nothing_but_size_updates_is_refused_early():
    with pytest.raises(BadBlock, match="cannot be read"):
        BlockReader(list, 1 << 16).read(b"\x20" * 32_000)
