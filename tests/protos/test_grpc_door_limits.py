"""What the gRPC door makes of strangers who take without giving: it has bounds, and serves on."""

import asyncio
import contextlib
import errno
import socket
import ssl
import time
import zlib

import grpc
import pytest

from fogline_protocol import grpc_connection, grpc_door, http2_frames
from fogline_protocol.grpc_connection import MALFORMED, ROOM_MESSAGES
from fogline_protocol.http2_frames import Code, Kind, frame
from tests.protos.raw_peer import (
    LIMIT,
    Methods,
    Raw,
    client_side,
    connections_of,
    made_pair,
    message,
    opened,
    server_side,
    until,
)

PING = frame(Kind.PING, 0, 0, b"12345678")
WIDE = (4).to_bytes(2, "big") + http2_frames.LARGEST.to_bytes(4, "big")  # windows of streams
OPEN = frame(Kind.WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big"))


@pytest.fixture
def methods():
    return Methods()


@pytest.fixture
async def door(methods):
    async with opened(methods) as door:
        yield door


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return made_pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "encrypted"])
def security(request, pair):
    """What the door and a client of it are told, without and with TLS."""
    if request.param == "plain":
        return {}, {}
    return {"tls": server_side(pair)}, {"ssl": client_side(pair), "server_hostname": "localhost"}


async def turns(raw, count=50):
    """Turns of the door's loop in which it could go on with what it should not."""
    for _ in range(count):
        raw.send(PING)
        await raw.next(Kind.PING)


async def ends(raw):
    """The code and the text that end a connection."""
    payload = (await raw.next(Kind.GOAWAY))[3]
    await raw.closed()
    return payload[7], payload[8:].decode()


async def echoes(raw, stream):
    raw.ask(stream, "/t/Echo", data=message(b"good"))
    return await raw.status(stream) == (0, "")


async def test_packed_messages_are_unpacked_in_turn_as_others_are_answered(door, methods):
    bomb = message(zlib.compress(bytes(LIMIT), 9), 1)
    assert len(bomb) < LIMIT / 500
    async with Raw.of(door, settings=WIDE) as raw:
        raw.send(OPEN)
        for n in range(20):
            raw.ask(2 * n + 1, "/t/Wait", ("grpc-encoding", "deflate"), data=bomb)
        (connection,) = await connections_of(door, 1)
        await until(lambda: methods.waiting == ROOM_MESSAGES)
        await turns(raw)
        assert methods.waiting == ROOM_MESSAGES
        assert connection._in_hand.used == ROOM_MESSAGES * LIMIT
        raw.send(frame(Kind.RST_STREAM, 0, 39, b"\0\0\0\x08"))  # who waits may leave
        methods.gate.set()
        for n in range(19):
            assert (await raw.status(2 * n + 1))[0] == 0
        assert connection._in_hand.used == 0


async def test_small_packed_messages_pass_where_there_is_room_for_what_they_could_be(door, methods):
    sizes = [LIMIT, LIMIT, LIMIT, LIMIT * 9 // 10]
    async with Raw.of(door) as raw:
        for n, size in enumerate([*sizes, 50, 50, 50]):
            packed = message(zlib.compress(bytes(size), 9), 1)
            raw.ask(2 * n + 1, "/t/Wait", ("grpc-encoding", "deflate"), data=packed)
            await until(lambda n=n: methods.waiting == n + 1)


@pytest.mark.parametrize("way", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_what_streams_have_in_hand_is_bounded_packed_or_not(door, methods, way):
    methods["/t/Stream"] = methods.wait
    async with grpc.aio.insecure_channel(door.address) as channel:
        calls = [
            channel.stream_stream("/t/Stream")(iter([bytes(LIMIT)] * 10), compression=way)
            for _ in range(3)
        ]
        answers = [asyncio.create_task(anext(aiter(call))) for call in calls]
        await until(lambda: methods.waiting == ROOM_MESSAGES)
        echo = channel.unary_unary("/t/Echo")
        for _ in range(50):
            await echo(b"", timeout=10)
        assert methods.waiting == ROOM_MESSAGES
        (connection,) = door.connections
        assert connection._in_hand.used <= ROOM_MESSAGES * LIMIT
        # They wait for us, so their time is not up.
        now = time.monotonic()
        door.sweep(now)
        door.sweep(now + grpc_connection.ARRIVAL_S + 1)
        methods.gate.set()
        for call, answer in zip(calls, answers, strict=True):
            assert len(await answer) == LIMIT
            assert [len(a) async for a in call] == [LIMIT] * 9
        await until(lambda: connection._in_hand.used == connection._coming.used == 0)


async def test_a_stream_that_breaks_off_gives_back_what_it_had_in_hand(door, methods):
    methods["/t/Stream"] = methods.wait
    async with Raw.of(door) as raw:
        raw.ask(1, "/t/Stream", data=3 * message(bytes(1000)), end=False)
        await until(lambda: methods.waiting == 3)
        (connection,) = door.connections
        assert connection._in_hand.used == 3000
        raw.send(frame(Kind.RST_STREAM, 0, 1, b"\0\0\0\x08"))
        await until(lambda: methods.given_up == 3)
        assert connection._in_hand.used == 0


async def test_answers_that_a_stream_does_not_read_hold_up_its_next_requests(door, methods):
    async def large(data, _context):
        methods.asked.append(data)
        return bytes(LIMIT)

    methods["/t/Stream"] = large
    async with Raw.of(door, settings=b"\0\x04\0\0\0\0") as raw:  # windows of nothing
        raw.ask(1, "/t/Stream", end=False)
        for _ in range(60):
            raw.send(frame(Kind.DATA, 0, 1, message(b"")))
            await turns(raw, 2)
        (connection,) = door.connections
        assert len(methods.asked) <= ROOM_MESSAGES + 2
        assert connection._in_hand.used <= (ROOM_MESSAGES + 1) * LIMIT
        raw.send(frame(Kind.RST_STREAM, 0, 1, b"\0\0\0\x08"))
        await until(lambda: connection._in_hand.used == 0)


@pytest.mark.parametrize("path", ["/t/Echo", "/t/Stream"])
async def test_who_begins_a_large_message_and_stops_does_not_starve_others_for_long(door, path):
    begin = message(bytes(LIMIT))[:1000]
    async with Raw.of(door) as raw:
        asking = range(1, 15, 2)
        for stream in asking:
            raw.ask(stream, path, data=begin, end=False)
        await turns(raw, 3)
        (connection,) = door.connections
        started = [n for n, c in connection._calls.items() if c.coming and c.coming.had]
        assert 0 < len(started) < len(asking)
        assert connection._coming.used <= ROOM_MESSAGES * LIMIT
        now = time.monotonic()
        door.sweep(now)
        door.sweep(now + grpc_connection.ARRIVAL_S + 1)
        late = [n for n in asking if n not in started]
        assert [n for n, c in connection._calls.items() if c.coming.had] == late
        for stream in started:
            status, text = await raw.status(stream)
            assert (status, "nothing of the call's message arrived" in text) == (4, True)
        data = message(bytes(LIMIT))[1000:]
        for at in range(0, len(data), 60_000):
            raw.send(frame(Kind.DATA, 0, late[0], data[at : at + 60_000]))
        raw.send(frame(Kind.DATA, 1, late[0]))
        await until(lambda: connection._http.queued(late[0]) or late[0] not in connection._calls)


async def test_who_asks_amiss_again_and_again_is_sent_away_and_nothing_more_is_begun(door, methods):
    async with Raw.of(door) as raw:
        for n in range(MALFORMED + 1):
            raw.ask(2 * n + 1, "/t/Stream", ("content-length", "7"), data=message(b"work"))
        raw.ask(2 * MALFORMED + 3, "/t/Wait", data=message(b""))
        assert await ends(raw) == (Code.ENHANCE_YOUR_CALM, "too many malformed requests")
    await until(lambda: not door.connections)
    assert methods.waiting == methods.given_up == 0


async def test_who_is_not_there_any_more_is_found_out_though_a_call_of_its_is_open(door):
    async with Raw.of(door) as gone, Raw.of(door) as there:
        for raw in (gone, there):
            raw.ask(1, "/t/Stream", end=False)
            await turns(raw, 1)
        now = time.monotonic()
        door.sweep(now)
        door.sweep(now + grpc_connection.QUIET_S + 1)
        asked = await there.next(Kind.PING)
        there.send(frame(Kind.PING, http2_frames.ACK, 0, asked[3]))
        frames = {connection: connection._http.frames for connection in door.connections}
        await until(lambda: any(c._http.frames > before for c, before in frames.items()))
        door.sweep(now + grpc_connection.QUIET_S + grpc_connection.PONG_S + 2)
        await gone.closed()
        await until(lambda: len(door.connections) == 1)
        there.send(frame(Kind.DATA, 1, 1))
        assert (await there.status())[0] == 0


async def test_newcomers_beyond_the_limit_are_closed_and_the_others_served(
    methods, security, caplog
):
    ours, theirs = security
    async with (
        opened(methods, max_connections=2, **ours) as door,
        Raw.of(door, **theirs) as first,
        Raw.of(door, **theirs) as second,
    ):
        assert await echoes(first, 1)
        assert await echoes(second, 1)
        third = await asyncio.open_connection(*door.address.split(":"))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(third[0].read(), 10) == b""
        third[1].close()
        assert await echoes(first, 3)
        door.sweep(time.monotonic())
        assert "1 newcomers were closed: there are 2 connections" in caplog.text
        second.writer.close()
        await until(lambda: len(door.connections) == 1)
        async with Raw.of(door, **theirs) as fourth:
            assert await echoes(fourth, 1)


async def test_a_client_library_beyond_the_limit_waits_between_its_attempts(methods):
    async with opened(methods, max_connections=1) as door, Raw.of(door) as first:
        assert await echoes(first, 1)
        async with grpc.aio.insecure_channel(door.address) as channel:
            echo = channel.unary_unary("/t/Echo")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await echo(b"x", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert door._refused < 5
            first.writer.close()
            assert await echo(b"x", timeout=20, wait_for_ready=True) == b"x"


async def test_handshakes_that_do_not_get_on_count_and_end_with_the_door(methods, pair):
    async with opened(methods, max_connections=2, tls=server_side(pair)) as door:
        silent = [await asyncio.open_connection(*door.address.split(":")) for _ in range(2)]
        await until(lambda: len(door._arriving) == 2)
        late = await asyncio.open_connection(*door.address.split(":"))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(late[0].read(), 10) == b""
        late[1].close()
        secured = {"ssl": client_side(pair), "server_hostname": "localhost"}
        silent.pop()[1].close()
        await until(lambda: len(door._arriving) == 1)
        async with Raw.of(door, **secured) as raw:
            assert await echoes(raw, 1)
        await asyncio.wait_for(door.stop(1.0), 5)
        reader, writer = silent.pop()
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_handshake_that_fails_leaves_nothing_behind(methods, pair):
    async with opened(methods, tls=server_side(pair)) as door:
        async with Raw.of(door) as plain:
            await plain.closed()
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection(
                *door.address.split(":"), ssl=ssl.create_default_context()
            )
        await until(lambda: not door._arriving and not door.connections)


async def test_where_it_is_crowded_idle_connections_give_way(methods):
    async with (
        opened(methods, max_connections=2) as door,
        Raw.of(door) as idle,
        Raw.of(door) as busy,
    ):
        assert await echoes(idle, 1)
        busy.ask(1, "/t/Wait", data=message(b""))
        await until(lambda: methods.waiting == 1)
        now = time.monotonic()
        door.sweep(now)
        door.sweep(now + grpc_door.CROWDED_IDLE_S + 1)
        assert (await ends(idle))[0] == Code.NO_ERROR
        await until(lambda: len(door.connections) == 1)
        methods.gate.set()
        assert (await busy.status())[0] == 0
        door.sweep(now + 3 * grpc_door.CROWDED_IDLE_S)  # it is not crowded any more
        assert await echoes(busy, 3)


async def test_a_door_that_ran_out_of_files_takes_newcomers_again(door, monkeypatch):
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ENFILE]

    def fails(listening):
        if failures:
            raise OSError(failures.pop(), "no more files")
        return accept(listening)

    monkeypatch.setattr(grpc_door, "ACCEPT_RETRY_S", 0.01)
    monkeypatch.setattr(socket.socket, "accept", fails)
    async with Raw.of(door) as raw:
        assert await echoes(raw, 1)
    assert not failures


def test_a_door_leaves_files_to_the_rest_of_its_process(monkeypatch):
    def allowed(files):
        monkeypatch.setattr(grpc_door.resource, "getrlimit", lambda _: (files, files))
        return grpc_door.connections_allowed()

    assert allowed(1024) == 768
    assert allowed(1 << 20) == allowed(grpc_door.resource.RLIM_INFINITY) == 4096
    assert allowed(1) == 1
