"""Quick ways through messages that look like earlier ones: only their tensors and ids differ.

A caller sends one kind of request over and over. Its bytes fall into a head (model, parameters,
names, shapes), an id, and the raw tensors behind them. What the head means was found out with
protobuf once and is remembered; from then on nobody parses it. The same holds for answers, whose
heads are made once. Whatever looks different takes the long way, so nothing is decided here that
protobuf does not decide: `test_known_messages.py` holds both ways to the same result.

Source: Protocol Buffers, "Encoding": fields of different numbers may come in any order.
"""

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

Meaning = TypeVar("Meaning")

REMEMBERED = 256  # heads
HEAD_BYTES = 1024  # of one; a longer one is seldom sent twice

# Field number and wire type (2: length and bytes) of ``ModelInferRequest``.
_ID, _RAW = 0x1A, 0x3A
_IN_HEAD = frozenset((0x0A, 0x12, 0x22, 0x2A, 0x32))


class Remembered(Generic[Meaning]):
    """What was found out about heads; forgets everything rather than grow."""

    def __init__(self) -> None:
        self._known: dict[object, Meaning] = {}
        self.get = self._known.get

    def put(self, head: object, meaning: Meaning) -> None:
        """Remember what a head means."""
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[head] = meaning


def split_request(data: bytes) -> tuple[bytes, bytes, Sequence[tuple[int, int]]] | None:
    """Return the head of a ``ModelInferRequest``, its id, and where its raw tensors begin and end.

    None: it is not made the usual way, which says nothing about whether it is a good one.
    """
    at, end = 0, len(data)
    head_end = -1  # of what comes before the tensors
    id_from = id_to = id_at = 0
    raw: list[tuple[int, int]] = []
    try:
        while at < end:
            tag, length, start = data[at], data[at + 1], at + 2
            if length > 0x7F:  # more bytes of it follow
                length &= 0x7F
                for shift in (7, 14, 21, 28):
                    more = data[start]
                    start += 1
                    length |= (more & 0x7F) << shift
                    if more < 0x80:
                        break
                else:
                    return None
            after = start + length
            if after > end:
                return None
            if tag == _RAW:
                if head_end < 0:
                    head_end = at
                raw.append((start, after))
            elif head_end >= 0:
                return None
            elif tag == _ID:
                if id_to:
                    return None
                id_from, id_at, id_to = at, start, after
            elif tag not in _IN_HEAD:
                return None
            at = after
    except IndexError:
        return None
    if not 0 <= head_end <= HEAD_BYTES:
        return None
    if not id_to:
        return data[:head_end], b"", raw
    return data[:id_from] + data[id_to:head_end], data[id_at:id_to], raw


def response_head(
    model: str, version: str, parameters: Mapping[str, object], outputs: Sequence[object]
) -> object | None:
    """Return what tells answers with one head from others; None: one that will not come again.

    ``outputs`` says of each what its part of the head depends on.
    """
    for value in parameters.values():
        # Numbers differ from answer to answer; and 1, 1.0 and True are equal, but not on the wire.
        if type(value) is not str:
            return None
    return model, version, tuple(parameters.items()), tuple(outputs)


def field(tag: int, data: bytes) -> bytes:
    """Return a field of bytes: its tag, its length, and them."""
    length = len(data)
    if length < 0x80:
        return bytes((tag, length)) + data
    parts = [tag]
    while length > 0x7F:
        parts.append(length & 0x7F | 0x80)
        length >>= 7
    parts.append(length)
    return bytes(parts) + data
