"""gRPC in the headers of HTTP/2: what a request's say, and blocks that answer it. Pure.

Source: gRPC over HTTP/2 (PROTOCOL-HTTP2.md, "Requests" and "Responses"); RFC 9113, section 8.
"""

import base64
import binascii
import math
import re
from typing import Final
from urllib.parse import quote

from fogline_protocol import grpc_calls, http2
from fogline_protocol.errors import BadRequest, InferenceError, Overloaded, Unsupported
from fogline_protocol.grpc_calls import Metadata
from fogline_protocol.header_blocks import Headers
from fogline_protocol.http2_frames import Block

ENCODINGS: Final = {"gzip": 31, "deflate": 15}  # of messages, with zlib's name for each (wbits)
_ACCEPTED: Final = b"identity,gzip,deflate"
_CONTENT_TYPE: Final = (b"content-type", b"application/grpc")
_OK: Final = (b":status", b"200")
ANSWER: Final = Block((_OK, _CONTENT_TYPE))  # the headers of an answer that has messages
DONE: Final = Block(((b"grpc-status", b"0"),))  # the trailers of a good one
# Source: gRPC's statuscodes.md. As grpcio has them, which takes far more than this to import.
_CODES: Final = {
    "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5, "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "UNIMPLEMENTED": 12, "INTERNAL": 13,
    "UNAVAILABLE": 14, "UNAUTHENTICATED": 16,
}  # fmt: skip

_PSEUDO: Final = frozenset((b":method", b":path", b":scheme", b":authority"))
_NEEDED: Final = (b":method", b":path", b":scheme")
# What belongs to the carrier of a call, not to its metadata.
_CARRIERS: Final = frozenset(
    (b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding",
     b"grpc-accept-encoding")
)  # fmt: skip
_FORBIDDEN: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NAME: Final = re.compile(rb":?[\x21-\x39\x3b-\x40\x5b-\x7e]+")  # RFC 9113, 8.2.1: lower case
_BAD_VALUE: Final = re.compile(rb"[\x00\r\n]|\A[ \t]|[ \t]\Z")
_TYPE: Final = re.compile(rb"application/grpc([+;].*)?")
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_PLAIN: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")  # in grpc-message


class _Broken(Exception):
    """Not what RFC 9113 calls a request."""


CALL_BYTES = 4 << 10  # that a call takes beside its headers and its message
HEADER_TIMES = 4  # short strings take so many times what HTTP/2 counts for headers


class Head:
    """What the headers of a request say; whoever reads none of it but what they need is quick."""

    __slots__ = (
        "broken", "encoding", "held", "length", "metadata", "path", "problem", "refusal",
        "timeout_s",
    )  # fmt: skip

    def __init__(self, headers: Headers) -> None:
        self.path = ""
        self.metadata: Metadata = ()
        self.timeout_s: float | None = None  # the caller's time when it sent this
        self.encoding = ""  # of messages that are marked as compressed
        self.length: int | None = None  # of the body, where it is told
        self.held = CALL_BYTES  # about as many bytes as a call with these headers takes
        self.broken = False  # this is no request of HTTP/2
        self.refusal: Block | None = None  # this is one, but no call of gRPC that we could answer
        self.problem: InferenceError | None = None  # why, then
        try:
            self._read(headers)
        except (_Broken, UnicodeDecodeError):
            self.broken = True
        except BadRequest as error:
            self.refusal, self.problem = headers_only(error), error

    def _read(self, headers: Headers) -> None:
        pseudo: dict[bytes, bytes] = {}
        others: list[tuple[bytes, bytes]] = []
        size = 0
        for name, value in headers:
            size += len(name) + len(value) + 32  # RFC 9113, 6.5.2
            if not _NAME.fullmatch(name) or _BAD_VALUE.search(value):
                raise _Broken
            if name[0] != ord(":"):
                others.append((name, value))
            elif others or name in pseudo or name not in _PSEUDO:
                raise _Broken
            else:
                pseudo[name] = value
        self.held += HEADER_TIMES * size
        if not all(pseudo.get(name) for name in _NEEDED):
            raise _Broken
        self.path = pseudo[b":path"].decode()
        carriers: dict[bytes, bytes] = {}
        for name, value in others:
            if name in _FORBIDDEN or (name == b"te" and value.lower() != b"trailers"):
                raise _Broken
            if name in _CARRIERS:
                carriers[name] = value
        if (length := carriers.get(b"content-length")) is not None:
            if not length.isdigit() or len(length) > 18:
                raise _Broken
            self.length = int(length)
        refused = _refused(pseudo, carriers, size)
        if refused is not None:
            self.problem, headers = refused
            self.refusal = headers_only(self.problem, *headers)
        else:
            self.encoding = carriers.get(b"grpc-encoding", b"").decode()
            self.timeout_s = _timeout_s(carriers.get(b"grpc-timeout"))
            self.metadata = tuple(
                (name.decode(), _value(name, value))
                for name, value in others
                if name not in _CARRIERS
            )


def headers_only(error: InferenceError, *headers: tuple[bytes, bytes]) -> Block:
    """Return an answer without a message: headers that are trailers too."""
    return Block((*(headers or (_OK,)), _CONTENT_TYPE, *_status(error)))


def trailers(error: InferenceError) -> Block:
    """Return the end of an answer that had its headers."""
    return Block(_status(error))


def _status(error: InferenceError) -> tuple[tuple[bytes, bytes], ...]:
    code = _CODES[error.grpc_code]
    # A field's value must not begin or end with a space.
    text = quote(grpc_calls.text_of(error).strip(), safe=_PLAIN, errors="replace")
    hints = ((key.encode(), value.encode()) for key, value in grpc_calls.pushback(error))
    return (b"grpc-status", b"%d" % code), (b"grpc-message", text.encode()), *hints


def _refused(
    pseudo: dict[bytes, bytes], carriers: dict[bytes, bytes], size: int
) -> tuple[InferenceError, Headers] | None:
    """Return why a call cannot be answered, and the headers that say so beside its status."""
    error: InferenceError
    method, given = pseudo[b":method"], carriers.get(b"content-type", b"")
    encoding = carriers.get(b"grpc-encoding", b"identity").decode("latin-1")
    if method != b"POST":
        error = Unsupported(f"this door speaks gRPC, whose calls are POST, got {_shown(method)}")
        return error, ((b":status", b"405"), (b"allow", b"POST"))
    if not _TYPE.fullmatch(given):
        error = Unsupported(
            f"this door speaks gRPC: expected content-type 'application/grpc', got {_shown(given)}"
        )
        return error, ((b":status", b"415"),)
    if size > http2.MAX_HEADER_LIST_BYTES:
        text = f"the headers have {size} bytes, at most {http2.MAX_HEADER_LIST_BYTES} are taken"
        return Overloaded(text, retry_after_s=math.inf), ()
    if encoding not in ("identity", *ENCODINGS):
        text = (
            f"grpc-encoding {_shown(encoding.encode())} is not known here, known are "
            f"{_ACCEPTED.decode()}"
        )
        return Unsupported(text), (_OK, (b"grpc-accept-encoding", _ACCEPTED))
    return None


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))


def _value(name: bytes, value: bytes) -> str | bytes:
    if not name.endswith(b"-bin"):
        return value.decode("latin-1")
    try:
        # Padding may be left out. Several values of one name may come as one, with commas.
        return b",".join(
            base64.b64decode(part + b"=" * (-len(part) % 4), validate=True)
            for part in value.split(b",")
        )
    except binascii.Error:
        raise BadRequest(f"metadata {_shown(name)} are not base64") from None


def _timeout_s(value: bytes | None) -> float | None:
    if value is None:
        return None
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise BadRequest(
            f"grpc-timeout must be 1 to 8 digits and one of H, M, S, m, u, n, got {_shown(value)}"
        )
    return int(found[1]) * _UNIT_S[found[2]]
