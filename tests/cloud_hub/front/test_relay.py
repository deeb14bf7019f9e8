"""Both ends of a relay on a real socket: what is asked at one is answered at the other."""

import asyncio
import mmap
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.front import relay
from cloud_hub.front.arena import ALIGNMENT
from cloud_hub.front.relay import INLINE_BELOW, FrontEnd, HubEnd, Kind
from fogline_protocol.errors import NotFound, Overloaded, Unavailable
from fogline_protocol.grpc_service import INFER
from fogline_protocol.outcomes import Entry

ROOM = 8 * INLINE_BELOW


class Ledger:
    """The hub's books."""

    def __init__(self):
        self.outcomes, self.reasons, self.open_now = [], [], 0

    def open_entry(self):
        self.open_now += 1
        return Entry(self._end)

    def rejected(self, reason):
        self.reasons.append(reason)

    def _end(self, outcome, _took_s):
        self.open_now -= 1
        self.outcomes.append(outcome)


class Ends:
    """A front's end and a hub's end, joined."""

    async def __aenter__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = []
        self.books = Ledger()
        memory = mmap.mmap(-1, ROOM)
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        _, self.front = await loop.create_connection(lambda: FrontEnd(memory), sock=ours)
        _, self.hub = await loop.create_connection(
            lambda: HubEnd(memory, self.answer, self.books), sock=theirs
        )
        return self

    async def __aexit__(self, *_error):
        self.front.close()
        self.hub.close()
        await self.hub.lost.wait()

    async def answer(self, call):
        self.calls.append(call)
        await self.gate.wait()
        if call.path == "/nowhere":
            raise NotFound("there is no such place")
        return bytes(call.request)[::-1]

    def ask(self, request, path="/somewhere", **options):
        options = {"seconds_left": None, "metadata": {}} | options
        return self.front.ask(path, request, **options)

    @property
    def free(self):
        return self.front._arena.free


@pytest.fixture
async def ends():
    async with Ends() as ends:
        yield ends


@given(st.lists(st.binary(max_size=100) | st.integers(0, 3 * INLINE_BELOW), max_size=30))
@settings(max_examples=25, deadline=None)
def test_every_call_gets_its_own_answer_whatever_its_size(sizes):
    async def run():
        async with Ends() as ends:
            requests = [
                size if isinstance(size, bytes) else bytes(at % 256 for at in range(size))
                for size in sizes
            ]
            answers = await asyncio.gather(*(ends.ask(request) for request in requests))
            assert answers == [request[::-1] for request in requests]
            assert ends.free == ROOM

    asyncio.run(run())


async def test_what_is_known_of_a_call_arrives_with_it(ends):
    await ends.ask(b"x", "/s/M", seconds_left=1.5, metadata={"authorization": "é"})
    (call,) = ends.calls
    assert call.path == "/s/M"
    assert call.time_remaining() == 1.5
    assert call.invocation_metadata() == (("authorization", "é"),)
    await ends.ask(b"x")
    assert ends.calls[1].time_remaining() is None


async def test_a_refusal_keeps_its_class_and_its_text(ends):
    with pytest.raises(NotFound, match="there is no such place"):
        await ends.ask(b"x", "/nowhere")


async def test_a_caller_who_leaves_frees_its_task_and_its_memory(ends):
    ends.gate.clear()
    asked = asyncio.create_task(ends.ask(bytes(INLINE_BELOW)))
    while not ends.calls:
        await asyncio.sleep(0)
    assert ends.free < ROOM
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    while ends.free < ROOM:
        await asyncio.sleep(0)
    assert ends.hub.calls == 0
    ends.gate.set()
    assert await ends.ask(b"ab") == b"ba"


async def test_a_caller_who_leaves_at_once_costs_nothing(ends):
    asked = asyncio.create_task(ends.ask(bytes(INLINE_BELOW)))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await ends.ask(b"ab") == b"ba"
    assert ends.free == ROOM


async def test_requests_for_which_there_is_no_room_travel_on_the_socket(ends):
    ends.gate.clear()
    large = [asyncio.create_task(ends.ask(bytes([n]) * (ROOM // 2))) for n in range(4)]
    while len(ends.calls) < 4:
        await asyncio.sleep(0)
    assert ends.free < ALIGNMENT
    ends.gate.set()
    assert [set(answer) for answer in await asyncio.gather(*large)] == [{0}, {1}, {2}, {3}]
    assert ends.free == ROOM


async def test_whoever_waits_is_told_when_the_hub_goes(ends):
    ends.gate.clear()
    asked = asyncio.create_task(ends.ask(b"x"))
    while not ends.calls:
        await asyncio.sleep(0)
    ends.hub.close()
    with pytest.raises(Unavailable, match="the hub is gone"):
        await asked
    with pytest.raises(Unavailable, match="the hub is gone"):
        await ends.ask(b"x")


async def test_calls_of_a_front_that_ended_are_not_answered(ends):
    ends.gate.clear()
    asked = asyncio.create_task(ends.ask(b"x"))
    while not ends.calls:
        await asyncio.sleep(0)
    ends.front.close()
    await ends.hub.lost.wait()
    while ends.hub.calls:
        await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await asked


async def test_a_front_takes_only_so_many_calls(ends, monkeypatch):
    monkeypatch.setattr("cloud_hub.front.relay.MAX_CALLS", 2)
    ends.gate.clear()
    asked = [asyncio.create_task(ends.ask(b"ab")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="2 calls are waiting"):
        await ends.ask(b"ab")
    ends.gate.set()
    assert await asyncio.gather(*asked) == [b"ba", b"ba"]


async def test_a_front_that_ends_before_it_listens_is_noticed(ends):
    ends.front.close()
    with pytest.raises(Unavailable, match="before it listened"):
        await ends.hub.ready


async def test_why_a_front_cannot_listen_is_told(ends):
    ends.front.send_document(Kind.REFUSED, "the port is in use")
    with pytest.raises(Unavailable, match="the port is in use"):
        await ends.hub.ready


async def test_a_header_of_any_length_arrives_and_frees_its_place(ends):
    long = {"authorization": "\xff" * 16_000}  # 96 KB of JSON
    assert await ends.ask(bytes(INLINE_BELOW), metadata=long) == bytes(INLINE_BELOW)
    assert ends.calls[0].metadata == long
    assert ends.free == ROOM


async def test_whether_a_caller_may_is_asked_apart_from_any_request(ends):
    await ends.ask(b"", admit=True)
    await ends.ask(b"")
    assert [call.admit for call in ends.calls] == [True, False]


async def test_the_front_says_how_a_request_ended_whatever_the_hub_answered(ends):
    for path, outcome in ((INFER, "ok"), (INFER, "resource_exhausted"), ("/somewhere", "ok")):
        entry = ends.front.open_entry()
        await ends.ask(b"x", path, entry=entry if path == INFER else None)
        assert ends.books.outcomes == []  # not even when it has its answer
        assert ends.books.open_now == (path == INFER)
        if path == INFER:
            entry.end(outcome)
            await settled(ends)
            assert ends.books.outcomes.pop() == outcome
    ends.front.open_entry().end("cancelled")  # of one that was not passed on
    await settled(ends)
    assert (ends.books.outcomes, ends.books.open_now) == (["cancelled"], 0)


async def test_what_a_front_refuses_is_counted_at_the_hub(ends, monkeypatch):
    monkeypatch.setattr(relay, "MAX_CALLS", 0)
    entry = ends.front.open_entry()
    with pytest.raises(Overloaded):
        await ends.ask(b"x", INFER, entry=entry)
    entry.end("resource_exhausted")
    await settled(ends)
    assert (ends.books.outcomes, ends.books.reasons) == (["resource_exhausted"], ["front_calls"])
    assert ends.calls == []


async def test_requests_of_a_front_that_is_gone_are_not_left_open(ends):
    entry = ends.front.open_entry()
    await ends.ask(b"x", INFER, entry=entry)
    ends.front.close()
    await ends.hub.lost.wait()
    assert (ends.books.outcomes, ends.books.open_now) == (["unavailable"], 0)


async def settled(ends):
    """Return when the hub has read what the front had said before."""
    ends.front.rejected("mark")
    while "mark" not in ends.books.reasons:
        await asyncio.sleep(0)
    ends.books.reasons.remove("mark")
