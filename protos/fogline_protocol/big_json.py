"""Large JSON in pieces, for a thread beside the event loop.

``json.loads`` and ``json.dumps`` keep the interpreter to themselves for as long as they run,
from whichever thread: half a second and more for 60 MB, in which nobody else is answered. What
makes bodies large are lists of numbers, so these are cut out of the text and read a piece at a
time, each in well under a millisecond, with the interpreter free in between. What is left must
be small. A piece is made whole with the brackets that are open around it, so json itself
judges it and reads what it would have read.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fogline_protocol.errors import BadRequest

PIECE_BYTES = 1 << 15  # read in about 0.4 ms
LONG_BYTES = 1 << 16  # a list from this length on is cut out
MAX_REST_BYTES = 1 << 21  # of everything but long lists of numbers; read in one go, in about 20 ms
MAX_DEPTH = 64
# Between two pieces. Merely giving the interpreter up would take it back before the event loop
# has woken.
PAUSE_S = 0.0002

_BRACKETS = re.compile(rb"[\[\]]")


@dataclass(frozen=True, slots=True)
class Numbers:
    """A long list of numbers, nested or not, that still is text."""

    text: bytes
    start: int
    stop: int  # behind its last bracket

    def pieces(self) -> Iterator[Any]:
        """Give the list in parts that follow each other, each nested as deep as it was.

        Raises:
            BadRequest: it is not JSON.
        """
        text, at, depth = self.text, self.start, 0
        while at < self.stop:
            cut = self.stop
            if self.stop - at > PIECE_BYTES:
                cut = text.rfind(b",", at, at + PIECE_BYTES)
                if cut < 0:
                    raise BadRequest(
                        f"the body is not JSON: at byte {at} a list goes on for {PIECE_BYTES} "
                        "bytes without a comma"
                    )
            piece = text[at:cut].strip()
            # A comma stands between two values; json sees only one side of it here.
            if (
                not piece
                or (at > self.start and piece.startswith(b"]"))
                or (cut < self.stop and piece.endswith(b"["))
            ):
                raise BadRequest(f"the body is not JSON: a value is missing at byte {at}")
            after = depth + piece.count(b"[") - piece.count(b"]")
            if not 0 <= after <= MAX_DEPTH:
                raise BadRequest(f"the body is not JSON: brackets do not match at byte {at}")
            try:
                yield json.loads(b"[" * depth + piece + b"]" * after)
            except (ValueError, RecursionError) as error:
                raise BadRequest(
                    f"the body is not JSON: {error} of the part from byte {at} on"
                ) from None
            depth = after
            at = cut + 1
            time.sleep(PAUSE_S)


class Document:
    """A parsed body; ``numbers`` tells what stands where a long list was."""

    __slots__ = ("_lists", "_mark", "root")

    def __init__(self, text: bytes) -> None:
        """Parse ``text``.

        Raises:
            BadRequest: it is not JSON, or long without long lists of numbers.
        """
        self._mark = secrets.token_hex(16)  # which no sender can foresee
        self._lists: list[Numbers] = []
        kept: list[bytes] = []
        done = 0
        for start, stop in _long_lists(text):
            kept += [text[done:start], json.dumps({self._mark: [len(self._lists)]}).encode()]
            self._lists.append(Numbers(text, start, stop))
            done = stop
        kept.append(text[done:])
        rest = sum(map(len, kept))
        if rest > MAX_REST_BYTES:
            raise BadRequest(
                f"{rest} bytes of the body are no long lists of numbers, at most {MAX_REST_BYTES} "
                "are read as JSON: send such tensors as raw bytes behind the JSON "
                "(binary_data_size), or over gRPC"
            )
        try:
            self.root: Any = json.loads(b"".join(kept))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error} (long lists left out)") from None

    def numbers(self, value: Any) -> Numbers | None:
        """Return the long list that stood where ``value`` is now, or None."""
        if not isinstance(value, dict) or self._mark not in value:
            return None
        index: int = value[self._mark][0]
        return self._lists[index]


def _long_lists(text: bytes) -> Iterator[tuple[int, int]]:
    """Give where the long lists without strings and objects start and stop."""
    at = strings = 0
    while True:
        quote = text.find(b'"', at)
        end = len(text) if quote < 0 else quote
        if end - at >= LONG_BYTES:
            start = text.find(b"[", at, end)
            if start >= 0:
                for brace in (b"{", b"}"):  # find, because an expression takes a second for 60 MB
                    found = text.find(brace, start, end)
                    end = found if found >= 0 else end
                stop = _closing(text, start, end)
                if stop - start >= LONG_BYTES:
                    yield start, stop
        if quote < 0:
            return
        at = _behind_string(text, quote)
        strings += 1
        if strings % 1000 == 0:
            time.sleep(PAUSE_S)


def _closing(text: bytes, start: int, end: int) -> int:
    """Return the place behind the bracket that closes the one at ``start``, -1 if none does."""
    depth = 0
    for at in range(start, end, PIECE_BYTES):
        stop = min(at + PIECE_BYTES, end)
        closing = text.count(b"]", at, stop)
        if closing < depth:  # whatever their order, the outermost stays open
            depth += text.count(b"[", at, stop) - closing
        else:
            for bracket in _BRACKETS.finditer(text, at, stop):
                depth += 1 if bracket.group() == b"[" else -1
                if depth == 0:
                    return bracket.end()
        time.sleep(PAUSE_S)
    return -1


def _behind_string(text: bytes, quote: int) -> int:
    """Return the place behind the string that starts at ``quote``."""
    at = quote + 1
    while True:
        end = text.find(b'"', at)
        if end < 0:
            return len(text)
        before = end
        while text[before - 1] == ord("\\"):
            before -= 1
        if (end - before) % 2 == 0:
            return end + 1
        at = end + 1


def dumps(document: Mapping[str, Any], lists: Mapping[str, Iterator[Sequence[Any]]]) -> bytes:
    """Return ``document`` as JSON, every text that is a key of ``lists`` replaced by its list.

    A list is given in parts. The keys must be texts that occur nowhere else in the document.
    """
    text = json.dumps(document).encode()
    parts: list[bytes] = []
    for mark, pieces in lists.items():
        before, _, text = text.partition(json.dumps(mark).encode())
        parts += [before, b"["]
        for index, piece in enumerate(pieces):
            parts.append((b", " if index else b"") + json.dumps(piece)[1:-1].encode())
            time.sleep(PAUSE_S)
        parts.append(b"]")
    parts.append(text)
    return b"".join(parts)
