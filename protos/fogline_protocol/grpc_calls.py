"""Calls over bytes, whatever carries them, and how errors leave by the door.

A unary call that fails ends with a status. A stream of requests outlives the failure of one:
the error travels in-band with the id of its request and the next ones are answered, unless
the caller sent the metadata ``triton_grpc_error: true``, which asks for the end of the stream.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple, Protocol

from fogline_protocol import inference
from fogline_protocol.errors import InferenceError, ServerFault
from fogline_protocol.outcomes import OK, Entries, Entry, outcome_of

# The text of an error travels as a header, of which clients take 8 KiB in all by default, and
# non-ASCII bytes are three there. A text that quotes a long name would take its status along.
MAX_ERROR_BYTES = 2048


PUSHBACK = "grpc-retry-pushback-ms"  # clients with a retry policy obey it by themselves


class Context(Protocol):
    """What a method may ask of the call it answers, whatever carries it."""

    @property
    def entry(self) -> Entry | None:
        """Return the request in the books of whoever counts it; None: nobody does."""
        ...

    def time_remaining(self) -> float | None:
        """Return how long the caller still waits, in seconds; None: for ever."""
        ...

    def invocation_metadata(self) -> Any:
        """Return pairs of a name and a text (bytes where the name ends in ``-bin``), or None."""
        ...


Method = Callable[[bytes, Context], Awaitable[bytes]]


class Methods(Protocol):
    """What a door serves; a mapping is one, and so is whoever hands every call on."""

    def get(self, path: str, /) -> Method | None:
        """Return the method of a path, e.g. ``/package.Service/Method``; None: there is none."""
        ...


Metadata = tuple[tuple[str, str | bytes], ...]  # bytes where the name ends in ``-bin``
Admit = Callable[[str, Metadata], Awaitable[None]]  # by the path; InferenceError refuses the call

STREAM_IN_FLIGHT = 64  # requests of one stream; the next ones wait unread, on the caller's side

log = logging.getLogger("fogline.grpc")


def pushback(error: InferenceError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata that say when to ask again (gRPC proposal A6)."""
    if error.retry_after_s is None:
        return ()
    if math.isinf(error.retry_after_s):
        return ((PUSHBACK, "-1"),)
    return ((PUSHBACK, str(math.ceil(error.retry_after_s * 1000))),)


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Return what ``pushback`` says; ``math.inf``: do not ask again, as anything unreadable does.

    Source: gRPC proposal A6: "if the value is negative or unparseable, no retry is made".
    """
    for key, value in metadata or ():
        if key == PUSHBACK:
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            readable = text.isascii() and text.isdecimal() and len(text) <= 12
            return int(text) / 1000 if readable else math.inf
    return None


def text_of(error: InferenceError) -> str:
    """Return the text of ``error`` in a length that its callers take."""
    text = str(error)
    encoded = text.encode(errors="replace")
    if len(encoded) > MAX_ERROR_BYTES:
        return encoded[:MAX_ERROR_BYTES].decode(errors="ignore") + "..."
    return text


async def translating(path: str, method: Method, data: bytes, context: Context) -> bytes:
    """Return the answer of ``method``.

    Raises:
        InferenceError: and nothing else: a fault of ours ends this call, never the process.
    """
    try:
        answer = await method(data, context)
        log.debug("%s answered", path)
        return answer
    except InferenceError as error:
        log.info("%s refused: %s: %s", path, error.grpc_code, error)
        raise
    except Exception as error:
        log.exception("%s failed", path)
        raise ServerFault(f"{path} failed, see the server's log") from error


async def answer_stream(
    path: str,
    method: Method,
    requests: AsyncIterator[bytes],
    context: Context,
    write: Callable[[bytes], Awaitable[None]],
    entries: Entries | None = None,
) -> None:
    """Answer a stream of inference requests, whatever carries it, in their order.

    ``method`` answers one of them with a ``ModelStreamInferResponse``. Requests of one stream run
    side by side, up to ``STREAM_IN_FLIGHT``. ``entries`` count them; those that are open when
    the stream ends are left to whoever knows how.

    Raises:
        InferenceError: the stream is to end with its status.
    """
    by_status = _wants_status(context)
    # In order of arrival; None: the caller sends no more; an error: what it sends is no stream.
    answers: asyncio.Queue[asyncio.Task[_Streamed | InferenceError] | InferenceError | None]
    answers = asyncio.Queue(STREAM_IN_FLIGHT)
    # Owned by this call: whatever ends it takes everything below along.
    running: set[asyncio.Task[Any]] = set()

    def start(work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        running.add(task)
        task.add_done_callback(running.discard)
        return task

    async def read() -> None:
        end = None
        try:
            async for data in requests:
                part = context if entries is None else _Part(context, entries.open())
                await answers.put(start(_streamed(path, method, data, part, by_status)))
        except InferenceError as error:
            if entries is not None:
                entries.open()  # it was to be a request; it ends with the stream
            end = error
        await answers.put(end)

    start(read())
    try:
        while (task := await answers.get()) is not None:
            found = task if isinstance(task, InferenceError) else await task
            if isinstance(found, InferenceError):
                raise found
            await write(found.answer)
            if entries is not None:
                entries.end_oldest(found.outcome)
    finally:
        for task in tuple(running):
            task.cancel()


class _Streamed(NamedTuple):
    """The message that answers one request of a stream, and what that means for its caller."""

    answer: bytes
    outcome: str


class _Part:
    """The context of one request of a stream."""

    __slots__ = ("_call", "entry")

    def __init__(self, call: Context, entry: Entry) -> None:
        self._call = call
        self.entry: Entry | None = entry

    def time_remaining(self) -> float | None:
        return self._call.time_remaining()

    def invocation_metadata(self) -> Any:
        return self._call.invocation_metadata()


async def _streamed(
    path: str, method: Method, data: bytes, context: Context, by_status: bool
) -> _Streamed | InferenceError:
    """Return the message that answers one request of a stream, or what must end the stream."""
    try:
        return _Streamed(await translating(path, method, data, context), OK)
    except InferenceError as error:
        if by_status:
            return error
        text = inference.encode_stream_error(inference.request_id(data), error)
        return _Streamed(text, outcome_of(error))


def _wants_status(context: Context) -> bool:
    return any(
        key == "triton_grpc_error" and value in ("true", b"true")
        for key, value in context.invocation_metadata() or ()
    )
