"""How requests for inference end: each once, as its caller saw it.

    door                            server                        door
    entry = books.open_entry()  ─►  entry.tell = its model's  ─►  entry.end("ok", a status, ...)

Only the door that carries a request knows how it ends. A tensor may have no classes, an answer be
too long to be sent, its caller out of time, after the model did its part well. Only the server
knows whose request it was. So the door opens an entry and ends it, and the server says in between
who is told. An outcome is ``OK``: all of the answer was handed on to be sent; ``CANCELLED``: the
caller left; or the status of the error that the caller got, in lower case. What becomes of an
answer on its way, no server knows.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from fogline_protocol.errors import InferenceError

OK: Final = "ok"
CANCELLED: Final = "cancelled"
DEADLINE_EXCEEDED: Final = "deadline_exceeded"
UNAVAILABLE: Final = "unavailable"  # of callers whose connection we end
INTERNAL: Final = "internal"

UNKNOWN_CALL: Final = "unknown_call"  # reasons to be told to ``Books.rejected``
LARGE_JSON: Final = "large_json"

Tell = Callable[[str, float], None]  # the outcome, and the seconds that it took


def outcome_of(error: BaseException) -> str:
    """Return the outcome of a request that ``error`` ended."""
    if isinstance(error, InferenceError):
        return error.grpc_code.lower()
    return CANCELLED if isinstance(error, asyncio.CancelledError) else INTERNAL


class Entry:
    """One request in the books, open until the door ends it."""

    __slots__ = ("_ended", "began", "tell", "took_s")

    def __init__(self, tell: Tell) -> None:
        """Open it; ``tell`` is told how it ends, unless somebody takes its place before."""
        self.tell = tell
        self.began = 0.0  # when ``tell`` began to count, as of ``time.monotonic()``
        self.took_s = -1.0  # until the clock was stopped; what follows is the door's work
        self._ended = False

    def end(self, outcome: str) -> None:
        """Tell the outcome; only the first one counts."""
        if not self._ended:
            self._ended = True
            took_s = self.took_s
            self.tell(outcome, took_s if took_s >= 0 else time.monotonic() - self.began)


class Books(Protocol):
    """Who counts requests."""

    def open_entry(self) -> Entry:
        """Begin a request for inference of which nothing is known yet."""
        ...

    def rejected(self, reason: str) -> None:
        """Count why something was refused that has no model to be counted for."""
        ...


class Entries:
    """The requests of one stream: answered in the order in which they came."""

    def __init__(self, books: Books) -> None:
        """Begin with none."""
        self._books = books
        self._open: deque[Entry] = deque()
        self._outcome = ""  # once the stream has ended

    def open(self) -> Entry:
        """Begin the next one."""
        entry = self._books.open_entry()
        if self._outcome:
            entry.end(self._outcome)
        else:
            self._open.append(entry)
        return entry

    def end_oldest(self, outcome: str) -> None:
        """End the oldest that is open, unless the stream has ended."""
        if self._open:
            self._open.popleft().end(outcome)

    def end(self, outcome: str) -> None:
        """End all that are open: so did the stream."""
        self._outcome = self._outcome or outcome
        while self._open:
            self._open.popleft().end(outcome)


@contextlib.contextmanager
def ending(entry: Entry) -> Iterator[Entry]:
    """End ``entry`` as the context ends."""
    try:
        yield entry
    except BaseException as error:
        entry.end(outcome_of(error))
        raise
    entry.end(OK)
