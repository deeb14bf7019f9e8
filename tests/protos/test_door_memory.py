"""What all callers together make the doors hold is bounded, and those who mean well get answers."""

import asyncio
import contextlib
import io
import json
import os
import socket
import time

import aiohttp
import grpc
import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request

from fogline_protocol import door_memory, http2_frames, rest_bodies
from fogline_protocol.door_memory import Memory
from fogline_protocol.errors import Overloaded
from fogline_protocol.http2_frames import Kind, frame
from tests.protos.echo import EchoServer, rest_door
from tests.protos.memory_process import LARGEST_BODY, started
from tests.protos.raw_peer import LIMIT, Methods, Raw, message, opened, until

BUDGET = 32 << 20  # of both doors
WITHIN_S = 60.0  # an honest caller is answered, on a machine with as much else to do
CARELESS = ("127.0.0.2", 0)  # another address of this machine
WIDE = (4).to_bytes(2, "big") + http2_frames.LARGEST.to_bytes(4, "big")
PIECE = 60_000  # of a frame


@contextlib.asynccontextmanager
async def peers(door, count, **options):
    """Connections from another address."""
    async with contextlib.AsyncExitStack() as stack:
        crowd = [
            await stack.enter_async_context(Raw.of(door, local_addr=CARELESS, **options))
            for _ in range(count)
        ]
        try:
            yield crowd
        finally:
            await broken_off([raw.writer for raw in crowd])


async def broken_off(writers):
    """End connections whatever there still is to be sent or read."""
    for writer in writers:
        writer.transport.abort()
    for writer in writers:
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def begin(raw, stream, size, path="/t/Echo"):
    """Send ``size`` bytes of a message of the largest size."""
    raw.ask(stream, path, data=message(bytes(LIMIT))[: min(size, PIECE)], end=False)
    for at in range(PIECE, size, PIECE):
        raw.send(frame(Kind.DATA, 0, stream, bytes(min(PIECE, size - at))))


async def answered(channel, path, data, within_s):
    """Ask until there is an answer, as often as the door says so; return it."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                return await channel.unary_unary(path)(data)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                hints = dict(error.trailing_metadata())
                await asyncio.sleep(int(hints["grpc-retry-pushback-ms"]) / 1000)


async def test_messages_of_many_peers_that_never_end_take_no_more_than_the_budget():
    async with started(BUDGET) as process, grpc.aio.insecure_channel(process.address) as channel:
        assert len(await answered(channel, "/t/Echo", bytes(LIMIT), WITHIN_S)) == LIMIT
        before = process.peak_bytes()
        async with peers(process, 50) as crowd:
            for raw in crowd:
                for n in range(20):  # 250 MB in all
                    begin(raw, 2 * n + 1, 250_000)
                await raw.writer.drain()
            # Small ones pass at once, large ones in their turn.
            assert await channel.unary_unary("/t/Echo")(b"small", timeout=WITHIN_S) == b"small"
            assert len(await answered(channel, "/t/Echo", bytes(LIMIT), WITHIN_S)) == LIMIT
            assert process.peak_bytes() - before < BUDGET


async def test_answers_that_many_peers_do_not_read_take_no_more_than_the_budget():
    async with started(BUDGET) as process, grpc.aio.insecure_channel(process.address) as channel:
        assert len(await answered(channel, "/t/Large", b"%d" % LIMIT, WITHIN_S)) == LIMIT
        before = process.peak_bytes()
        async with peers(process, 50) as crowd:
            for raw in crowd:
                raw.writer.transport.pause_reading()
                for n in range(10):  # 500 MB in all
                    raw.ask(2 * n + 1, "/t/Large", data=message(b"%d" % LIMIT))
                await raw.writer.drain()
            assert await channel.unary_unary("/t/Echo")(b"small", timeout=WITHIN_S) == b"small"
            assert len(await answered(channel, "/t/Large", b"%d" % LIMIT, WITHIN_S)) == LIMIT
            assert process.peak_bytes() - before < BUDGET


async def test_small_answers_that_are_written_and_not_read_count_too():
    memory = Memory(BUDGET)
    async with opened(Methods(), memory=memory) as door, peers(door, 20, settings=WIDE) as crowd:
        for raw in crowd:
            raw.writer.transport.pause_reading()
            raw.send(frame(Kind.WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big")))
            for n in range(500):
                raw.ask(2 * n + 1, "/t/Large", data=message(b"16000"))
        async with grpc.aio.insecure_channel(door.address) as channel:
            assert len(await answered(channel, "/t/Large", b"16000", WITHIN_S)) == 16000
        await until(lambda: memory.answers.used > 0)
        assert memory.answers.used <= memory.answers.limit
    assert memory.answers.used == memory.arriving.used == memory.in_hand.used == 0


@pytest.mark.parametrize("path", ["/t/Echo", "/t/Stream"])
async def test_who_drips_a_large_message_gives_way_to_who_waits(path):
    memory = Memory(4 * LIMIT)
    async with opened(Methods(), memory=memory) as door, peers(door, 10) as crowd:
        for raw in crowd:
            begin(raw, 1, 1000, path)
        await until(lambda: memory.arriving.waiting)

        async def drip():
            while True:
                for raw in crowd:
                    raw.send(frame(Kind.DATA, 0, 1, b"x"))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        async with grpc.aio.insecure_channel(door.address) as channel:
            # Nine others asked before, from one address: it has one turn of two.
            assert len(await answered(channel, "/t/Echo", bytes(LIMIT), WITHIN_S)) == LIMIT
        dripping.cancel()
    assert memory.arriving.used == 0


async def test_streams_that_rest_give_way_only_when_nothing_is_left(caplog):
    memory = Memory(4 << 20)
    async with opened(Methods(), memory=memory) as door, peers(door, 2) as crowd:
        for raw in crowd:
            for n in range(200):
                raw.ask(2 * n + 1, "/t/Stream", end=False)
        await until(lambda: sum(len(c._calls) for c in door.connections) == 400)
        async with peers(door, 1) as (more,):
            for n in range(200):
                more.ask(2 * n + 1, "/t/Stream", end=False)
            more.ask(401, "/t/Echo", data=message(b"x"))
            assert (await more.status(401))[0] == 0
        assert memory.refusals > 0
        door.sweep(time.monotonic())
        assert "calls were refused or ended: the memory of the doors" in caplog.text
        assert memory.arriving.used <= memory.arriving.limit
    assert memory.arriving.used == 0


@pytest.mark.parametrize("way", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_whatever_becomes_of_calls_nothing_stays_counted(way):
    memory, methods = Memory(8 * LIMIT), Methods()
    async with opened(methods, memory=memory) as door:
        async with grpc.aio.insecure_channel(door.address) as channel:
            for size in (0, 10, 100_000, LIMIT):
                echo, stream = channel.unary_unary("/t/Echo"), channel.stream_stream("/t/Stream")
                assert await echo(bytes(size), compression=way) == bytes(size)
                found = [a async for a in stream(iter([bytes(size)] * 9), compression=way)]
                assert found == [bytes(size)] * 9
                call = channel.unary_unary("/t/Wait")(bytes(size), compression=way)
                await until(lambda: methods.waiting == 1)
                call.cancel()
                await until(lambda: methods.waiting == 0)
        await until(lambda: memory.arriving.used == 0)
        assert memory.answers.used == memory.in_hand.used == 0


def test_the_doors_hold_a_quarter_of_the_memory_of_the_machine_or_of_the_container(
    tmp_path, monkeypatch
):
    limits = tmp_path / "memory.max"
    monkeypatch.setattr(door_memory, "_CGROUP_2", limits)
    monkeypatch.setattr(door_memory, "_CGROUP_1", tmp_path / "absent")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text, bytes_there in (
        ("max\n", machine),
        ("1073741824\n", 1 << 30),
        (f"{1 << 60}\n", machine),
    ):
        limits.write_text(text, encoding="ascii")
        assert door_memory.default_limit(LIMIT) == bytes_there // 4
    limits.write_text("1048576\n", encoding="ascii")
    assert door_memory.default_limit(LIMIT) == 4 * LIMIT  # less would not do for one
    assert door_memory.share(100 * LIMIT, 5, LIMIT) == 20 * LIMIT
    assert door_memory.share(8 * LIMIT, 5, LIMIT) == 4 * LIMIT


async def test_calls_that_are_refused_for_memory_are_counted_and_told_when_to_come_back():
    told = []
    memory = Memory(4 * LIMIT, lambda: told.append("refused"))
    methods = Methods()
    async with (
        opened(methods, memory=memory) as door,
        grpc.aio.insecure_channel(door.address) as channel,
    ):
        wait = channel.unary_unary("/t/Wait")
        calls = [wait(bytes(200_000)) for _ in range(20)]
        await until(lambda: methods.waiting and methods.waiting + memory.refusals == 20)
        assert memory.arriving.used <= memory.arriving.limit
        assert len(told) == memory.refusals > 0
        methods.gate.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        refused = [one for one in found if isinstance(one, grpc.aio.AioRpcError)]
        assert len(refused) == memory.refusals
        assert all("server's memory" in one.details() for one in refused)
        assert {dict(one.trailing_metadata())["grpc-retry-pushback-ms"] for one in refused} == {
            "1000"
        }
    assert memory.arriving.used == 0


HALF = (
    b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LARGEST_BODY
) + bytes(LARGEST_BODY - 1)
CHUNKED = (
    b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n" % LARGEST_BODY
) + bytes(LARGEST_BODY - 1)
# Of every connection that sends: what asyncio reads at once, and aiohttp keeps for its handler.
READ_AHEAD = 800_000
QUESTION = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def _post(body):
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


async def half_sent(address, data):
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), local_addr=CARELESS)
    writer.write(data)
    return writer


async def asked(session, parameters=()):
    """Ask until there is an answer, as often as the door says so."""
    body = {**QUESTION, "parameters": dict(parameters)}
    while True:
        async with session.post("/v2/models/echo/infer", json=body) as answer:
            if answer.status != 429:
                assert answer.status == 200, await answer.text()
                return await answer.json()
            await asyncio.sleep(int(answer.headers.get("Retry-After", 1)))


@pytest.mark.parametrize("data", [HALF, CHUNKED], ids=["of known size", "chunked"])
async def test_half_sent_bodies_take_no_more_than_the_budget(data):
    async with (
        started(BUDGET) as process,
        aiohttp.ClientSession(f"http://{process.http}") as session,
    ):
        await asked(session)
        before = process.peak_bytes()
        writers = [await half_sent(process.http, data) for _ in range(40)]  # 335 MB
        async with asyncio.timeout(WITHIN_S):
            await asked(session)
            await asked(session, {"large": "x" * 500_000})  # waits for its turn
        assert process.peak_bytes() - before < BUDGET + 40 * READ_AHEAD
        await broken_off(writers)


async def test_rest_answers_that_nobody_reads_take_no_more_than_the_budget():
    data = _post(json.dumps({**QUESTION, "parameters": {"large": "x" * 1_900_000}}).encode()) * 3
    async with (
        started(BUDGET) as process,
        aiohttp.ClientSession(f"http://{process.http}") as session,
    ):
        await asked(session)
        before = process.peak_bytes()
        writers = []
        for _ in range(40):  # 230 MB, and as much in the transports' buffers
            writers.append(await half_sent(process.http, data))
            writers[-1].transport.pause_reading()
        async with asyncio.timeout(WITHIN_S):
            await asked(session)
            await asked(session, {"large": "x" * 500_000})
        assert process.peak_bytes() - before < BUDGET + 40 * READ_AHEAD
        await broken_off(writers)


async def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(rest_bodies, "ARRIVAL_S", 0.2)
    memory = Memory(BUDGET)
    async with rest_door(EchoServer(), memory=memory) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(HALF[:2000])
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 504 ")
        assert memory.arriving.used == 0
        await broken_off([writer])


async def test_an_answer_that_is_not_read_is_given_up(monkeypatch):
    monkeypatch.setattr(rest_bodies, "LOOK_S", 0.05)
    monkeypatch.setattr(rest_bodies, "UNREAD_S", 0.3)
    memory = Memory(1 << 30)
    async with rest_door(EchoServer(), max_bytes=4 << 20, memory=memory) as address:
        body = json.dumps({**QUESTION, "parameters": {"large": "x" * 1_900_000}}).encode()
        writers = []
        for _ in range(5):  # more than the kernel keeps of one
            writers.append(await half_sent(address, _post(body) * 5))
            writers[-1].transport.pause_reading()
        await until(lambda: memory.answers.used > 0)
        await until(lambda: memory.answers.used == 0)
        await broken_off(writers)


async def unread(address, data):
    """Send ``data`` on a connection whose answers the kernel keeps little of, and nobody reads."""
    host, port = address.split(":")
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    small.connect((host, int(port)))
    _, writer = await asyncio.open_connection(sock=small)
    writer.transport.pause_reading()
    writer.write(data)
    return writer


async def test_no_more_unread_rest_answers_end_than_the_next_one_needs(monkeypatch):
    monkeypatch.setattr(door_memory, "STALL_S", -1.0)  # who is looked at first stalls already
    memory, size = Memory(128 << 20), 7_500_000  # three of them fill 24 MiB; 4 MiB is the kernel's
    tensor = {"name": "x", "datatype": "UINT8", "shape": [1, size]}
    asked_for = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": size}}],
        "outputs": [{"name": "x", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(asked_for).encode()
    path, body = "/v2/models/echo/infer", text + bytes(size)
    headers = {"Inference-Header-Content-Length": str(len(text)), "Accept-Encoding": "identity"}
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
    async with (
        rest_door(EchoServer(), max_bytes=8 << 20, memory=memory) as address,
        aiohttp.ClientSession(f"http://{address}") as session,
    ):
        writers = []
        try:
            for _ in range(3):
                writers.append(await unread(address, head.encode() + body))
                await until(lambda: memory.answers.used > len(writers) * size)
            async with session.post(path, data=io.BytesIO(body), headers=headers) as answer:
                assert answer.status == 200
                assert (await answer.read()).endswith(bytes(size))
            assert memory.refusals == 1  # one gave way, and is counted
            await until(lambda: memory.answers.used < 3 * size)
            assert memory.answers.used > 2 * size
        finally:
            await broken_off(writers)
    assert memory.answers.used == 0


@contextlib.asynccontextmanager
async def arriving(bodies, size):
    """What a body of ``size`` bytes is read from, and the task that waits for all of it."""
    peer = BaseProtocol(asyncio.get_running_loop())
    peer.connection_made(asyncio.Transport())
    stream = aiohttp.StreamReader(peer, 1 << 16)
    headers = {"Content-Length": str(size)}
    request = make_mocked_request("POST", "/", headers, payload=stream, client_max_size=size)

    async def arrive():
        async with bodies.arrived(request) as body:
            return body

    task = asyncio.create_task(arrive())
    try:
        yield stream, task
    finally:
        task.cancel()


async def test_a_body_that_gives_way_as_it_ends_is_refused_and_not_taken_for_an_empty_one():
    memory = Memory(BUDGET)
    bodies = rest_bodies.Bodies(memory)
    async with arriving(bodies, 1000) as (stream, task):
        await until(lambda: memory.arriving.used)
        stream.feed_eof()
        for _, end in bodies.senders():
            end()
        with pytest.raises(Overloaded, match="got on least"):
            await task
    assert memory.arriving.used == 0


async def test_a_body_that_gives_way_as_its_turn_comes_is_refused_at_once():
    memory = Memory(BUDGET)
    bodies, pool = rest_bodies.Bodies(memory), memory.arriving
    assert pool.lend(pool.lendable)
    async with arriving(bodies, 2 * rest_bodies.AHEAD_BYTES) as (stream, task):
        stream.feed_data(bytes(1000))
        await until(lambda: pool.waiting)
        assert not list(bodies.senders())  # it is not to blame while it waits
        pool.back(pool.lendable)
        for _, end in bodies.senders():
            end()
        with pytest.raises(Overloaded, match="got on least"):
            await asyncio.wait_for(task, 10)
    assert pool.used == 0
