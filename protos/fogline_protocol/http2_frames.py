"""Frames of HTTP/2 as they are on the wire: their numbers, their parts, and how one is made. Pure.

What follows from one, and which may follow which, is ``http2``'s to know.

Source: RFC 9113, sections 4, 6 and 7.
"""

import enum
import struct

from fogline_protocol import header_blocks
from fogline_protocol.header_blocks import Headers

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW = 65_535
LARGEST = (1 << 31) - 1  # of windows and stream ids
PEER_FRAME_BYTES = 1 << 14  # what every peer takes

HEADER = struct.Struct(">HBBBI")  # the length in two parts, kind, flags, stream
SETTING = struct.Struct(">HI")
LONG = struct.Struct(">I")


class Kind(enum.IntEnum):
    """Frames by their number on the wire."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(enum.IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12


class Setting(enum.IntEnum):
    """What a SETTINGS frame may set."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20


class Block:
    """A list of headers as a frame, but for the number of its stream; made once, sent often."""

    __slots__ = ("closing", "opening", "payload")

    def __init__(self, headers: Headers) -> None:
        self.payload = header_blocks.write(headers)
        length = len(self.payload)
        if length > PEER_FRAME_BYTES:
            raise ValueError(f"headers of {length} bytes do not fit a frame of every peer")
        self.opening = length.to_bytes(3, "big") + bytes((Kind.HEADERS, END_HEADERS))
        self.closing = length.to_bytes(3, "big") + bytes((Kind.HEADERS, END_HEADERS | END_STREAM))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame."""
    length = len(payload)
    return HEADER.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


class Fault(Exception):
    """The peer broke a rule, and the connection ends by it."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def bare(flags: int, payload: bytes) -> bytes:
    """Return a payload without padding and priority.

    Raises:
        Fault: it is shorter than they are.
    """
    at, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise Fault(Code.FRAME_SIZE_ERROR, "padding without its length")
        at, end = 1, end - payload[0]
    if flags & PRIORITY:
        at += 5
    if end < at:
        raise Fault(Code.PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[at:end]


def expect(right: bool, what: str) -> None:
    """Raise ``Fault`` unless the length of ``what`` is ``right``."""
    if not right:
        raise Fault(Code.FRAME_SIZE_ERROR, f"{what} of a wrong length")


def on_connection(stream: int, what: str) -> None:
    """Raise ``Fault`` if ``what`` came on a stream: it speaks of the whole connection."""
    if stream:
        raise Fault(Code.PROTOCOL_ERROR, f"{what} on a stream")
