"""Our own gRPC door with clients of other hands, and what a socket alone can do to it."""

import asyncio
import contextlib
import gzip
import shutil
import socket
import ssl
import struct
import time
import zlib

import grpc
import hpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fogline_protocol import (
    grpc_connection,
    grpc_headers,
    header_blocks,
    http2_frames,
    lingering,
)
from fogline_protocol.errors import ERRORS, Unauthenticated
from fogline_protocol.grpc_calls import STREAM_IN_FLIGHT
from fogline_protocol.grpc_door import GrpcDoor
from fogline_protocol.http2_frames import Code, Kind, frame
from tests.protos.raw_peer import (
    LIMIT,
    WHO,
    Methods,
    Raw,
    client_side,
    connections_of,
    made_pair,
    message,
    opened,
    raw_call,
    server_side,
    until,
)
from tests.protos.test_http2 import streams_of_bytes


@pytest.fixture
def methods():
    return Methods()


@pytest.fixture
async def door(methods):
    async with opened(methods) as door:
        yield door


@pytest.fixture
async def channel(door):
    async with grpc.aio.insecure_channel(door.address) as channel:
        yield channel


async def test_metadata_deadline_and_who_calls_reach_the_method(methods):
    async def admit(path, metadata):
        WHO.set(f"{path} by {dict(metadata)['name']}")

    async with opened(methods, admit) as door, grpc.aio.insecure_channel(door.address) as channel:
        found = await channel.unary_unary("/t/Told")(
            b"", metadata=(("name", "x"), ("some-bin", b"\0\xff"), ("some-bin", b"2")), timeout=50
        )
    pairs = [("name", "x"), ("some-bin", b"\0\xff"), ("some-bin", b"2")]
    assert found.decode() == repr((pairs, 50, "/t/Told by x"))


async def test_a_stream_is_refused_before_anything_of_it_is_read(methods):
    async def admit(path, metadata):
        raise Unauthenticated("who are you?")

    async with opened(methods, admit) as door, Raw.of(door) as raw:
        raw.ask(1, "/t/Stream", end=False)
        assert await raw.status() == (16, "who are you?")
        assert (await raw.next(Kind.RST_STREAM))[3] == b"\0\0\0\0"  # no error: do not go on
    assert methods.asked == []


async def test_a_synchronous_client_works_too(door):
    def ask():
        with grpc.insecure_channel(door.address) as channel:
            call = channel.unary_unary("/t/Echo")
            futures = [call.future(b"%d" % n, timeout=10) for n in range(100)]
            stream = channel.stream_stream("/t/Stream")(iter([b"1", b"2"]))
            return [f.result() for f in futures], list(stream)

    found = await asyncio.to_thread(ask)
    assert found == ([b"%d" % n for n in range(100)], [b"1", b"2"])


@pytest.mark.parametrize("way", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_read_small_and_large(channel, way):
    for data in (b"", b"small", bytes(range(256)) * 3000):
        assert await channel.unary_unary("/t/Echo")(data, compression=way, timeout=10) == data
        call = channel.stream_stream("/t/Stream")(iter([data] * 3), compression=way, timeout=10)
        assert [answer async for answer in call] == [data] * 3


@pytest.mark.parametrize(
    ("headers", "data", "status", "text"),
    [
        ({}, message(b"x" * 5)[:4], 3, "ended in the middle of its message"),
        ({}, message(b"x" * 5)[:-1], 3, "ended in the middle of its message"),
        ({}, b"", 3, "ended in the middle"),
        ({}, None, 3, "ended before its message"),
        ({}, message(b"1") + message(b"2"), 3, "one message, and more than that"),
        ({}, b"\x02\0\0\0\0", 3, "begins with 0 or 1"),
        ({}, message(b"x", 1), 3, "grpc-encoding does not say how"),
        ({"grpc-encoding": "gzip"}, message(b"not gzip", 1), 3, "not what gzip makes"),
        (
            {"grpc-encoding": "gzip"},
            message(gzip.compress(b"cut short", mtime=0)[:-3], 1),
            3,
            "ends early or goes on",
        ),
        (
            {"grpc-encoding": "deflate"},
            message(zlib.compress(b"\0" * 2 * LIMIT), 1),
            8,
            "larger than max",
        ),
        ({"grpc-encoding": "snappy"}, message(b""), 12, "'snappy' is not known here"),
        ({"grpc-timeout": "soon"}, message(b""), 3, "grpc-timeout must be"),
        ({"x-bin": "%%%"}, message(b""), 3, "not base64"),
        ({"x": "y" * 17_000}, message(b""), 8, "at most 16384 are taken"),
    ],
)
async def test_what_is_wrong_with_a_call_is_said_and_the_connection_goes_on(
    door, headers, data, status, text
):
    async with Raw.of(door) as raw:
        raw.ask(1, "/t/Echo", *headers.items(), data=data)
        found = await raw.status()
        assert found[0] == status
        assert text in found[1].replace("%25", "%")
        raw.ask(3, "/t/Echo", data=message(b"good"))
        assert (await raw.next(Kind.DATA, stream=3))[3] == message(b"good")


@pytest.mark.parametrize("kind", ERRORS.values())
def test_every_error_has_the_number_that_grpcio_gives_its_status(kind):
    number, _ = getattr(grpc.StatusCode, kind.grpc_code).value
    trailers = dict(hpack.Decoder().decode(grpc_headers.trailers(kind("why")).payload))
    assert trailers["grpc-status"] == str(number)


async def test_an_unknown_compression_is_told_what_is_known(door):
    async with Raw.of(door) as raw:
        raw.ask(1, "/t/Echo", ("grpc-encoding", "snappy"), data=message(b""))
        headers = (await raw.next(Kind.HEADERS))[3]
        assert headers["grpc-accept-encoding"] == "identity,gzip,deflate"


async def test_an_unknown_path_is_unimplemented_with_a_text(channel):
    with pytest.raises(grpc.aio.AioRpcError, match="/t/Nothing is not offered") as caught:
        await channel.unary_unary("/t/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({":method": "GET"}, "405"),
        ({"content-type": "application/json"}, "415"),
        ({"content-type": "application/grpc-web"}, "415"),
        ({"content-type": "application/grpc+proto"}, "200"),
        ({"content-type": "application/grpc;v=1"}, "200"),
        ({":path": "/t/Echo", "te": "trailers", "user-agent": "x"}, "200"),
    ],
)
async def test_what_is_no_grpc_is_told_so_in_http(door, changed, status):
    async with Raw.of(door) as raw:
        pseudo = {key[1:]: value for key, value in changed.items() if key[0] == ":"}
        plain = [pair for pair in changed.items() if pair[0][0] != ":"]
        pseudo.pop("path", None)
        raw.ask(1, "/t/Echo", *plain, data=message(b"x"), **pseudo)
        headers = (await raw.next(Kind.HEADERS))[3]
        assert headers[":status"] == status
        assert (status == "200") == ("grpc-message" not in headers)


@pytest.mark.parametrize(
    "headers",
    [
        [(b":method", b"POST"), (b":scheme", b"http")],  # no path
        [(b":path", b""), (b":method", b"POST"), (b":scheme", b"http")],
        [(b":path", b"/t/Echo"), (b":method", b"POST"), (b":scheme", b"http"), (b"A", b"")],
        [(b":path", b"/t/Echo"), (b":method", b"POST"), (b"a", b""), (b":scheme", b"http")],
        [(b":path", b"/"), (b":path", b"/"), (b":method", b"POST"), (b":scheme", b"http")],
        [(b":status", b"200")],
        [(b":path", b"/"), (b":method", b"POST"), (b":scheme", b"http"), (b"te", b"gzip")],
        [(b":path", b"/"), (b":method", b"POST"), (b":scheme", b"http"), (b"connection", b"")],
        [(b":path", b"/"), (b":method", b"POST"), (b":scheme", b"http"), (b"a", b"x\r\ny")],
        [(b":path", b"\xff"), (b":method", b"POST"), (b":scheme", b"http")],
        [],
    ],
)
async def test_what_is_no_request_of_http2_costs_its_stream(door, headers):
    async with Raw.of(door) as raw:
        raw.send(frame(Kind.HEADERS, 5, 1, header_blocks.write(headers)))
        reset = await raw.next(Kind.RST_STREAM, Kind.HEADERS)
        assert (reset[0], reset[3]) == (Kind.RST_STREAM, b"\0\0\0\x01")
        raw.ask(3, "/t/Echo", data=message(b"good"))
        assert (await raw.status(3))[0] == 0


async def test_a_body_of_another_length_than_announced_costs_its_stream(door):
    async with Raw.of(door) as raw:
        raw.ask(1, "/t/Echo", ("content-length", "7"), data=message(b"xyz"))
        assert (await raw.next(Kind.RST_STREAM))[3] == b"\0\0\0\x01"
        raw.ask(3, "/t/Echo", ("content-length", "8"), data=message(b"xyz"))
        assert (await raw.status(3))[0] == 0


async def test_a_message_beyond_the_limit_is_refused_by_its_prefix_alone(door):
    async with Raw.of(door) as raw:
        for stream, path in ((1, "/t/Echo"), (3, "/t/Stream")):
            raw.ask(stream, path, data=b"\0" + (LIMIT + 1).to_bytes(4, "big"), end=False)
            status, text = await raw.status(stream)
            assert (status, f"({LIMIT + 1} vs. {LIMIT} bytes)" in text) == (8, True)


async def test_an_answer_beyond_the_limit_is_not_sent(channel):
    with pytest.raises(grpc.aio.AioRpcError, match="at most 1048576 are sent") as caught:
        await channel.unary_unary("/t/Large")(b"%d" % (LIMIT + 1), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_large_messages_pass_in_both_directions_side_by_side_with_small_ones(channel):
    large, echo = b"%d" % LIMIT, channel.unary_unary("/t/Echo")
    calls = [channel.unary_unary("/t/Large")(large, timeout=30) for _ in range(20)]
    calls += [echo(b"u" * LIMIT, timeout=30) for _ in range(20)]
    calls += [echo(b"small", timeout=30) for _ in range(100)]
    sizes = [len(answer) for answer in await asyncio.gather(*calls)]
    assert sizes == [LIMIT] * 40 + [5] * 100
    stream = channel.stream_stream("/t/Stream")(iter([b"s" * LIMIT] * 20), timeout=30)
    assert [len(answer) async for answer in stream] == [LIMIT] * 20


async def test_a_deadline_is_kept_by_the_door_too(door, methods):
    async with Raw.of(door) as raw:
        raw.ask(1, "/t/Wait", ("grpc-timeout", "20m"), data=message(b""))
        assert await raw.status() == (4, "the deadline of the call has passed")
        raw.ask(3, "/t/Wait", ("grpc-timeout", "20m"), data=message(b"")[:3], end=False)
        assert (await raw.status(3))[0] == 4  # although it never came to a method
    await until(lambda: methods.given_up == 1)


@pytest.mark.parametrize("path", ["/t/Wait", "/t/Stream"])
async def test_who_breaks_off_takes_the_work_along(door, methods, path):
    methods["/t/Stream"] = methods.wait
    async with Raw.of(door) as raw:
        raw.ask(1, path, data=message(b""), end=path == "/t/Wait")
        await until(lambda: methods.waiting == 1)
        raw.send(frame(Kind.RST_STREAM, 0, 1, b"\0\0\0\x08"))
        await until(lambda: methods.given_up == 1)
        raw.ask(3, "/t/Wait", data=message(b""))
        await until(lambda: methods.waiting == 1)
    await until(lambda: methods.given_up == 2)  # the connection is gone
    await until(lambda: not door.connections)


async def test_a_call_that_somebody_cancels_inside_is_not_left_without_an_end(channel, methods):
    async def cancels(data, context):
        raise asyncio.CancelledError

    methods["/t/Echo"] = cancels
    with pytest.raises(grpc.aio.AioRpcError, match="given up by the server"):
        await channel.unary_unary("/t/Echo")(b"", timeout=10)


async def test_calls_in_flight_finish_while_the_door_closes(methods):
    async with opened(methods) as door, Raw.of(door) as raw:
        raw.ask(1, "/t/Wait", data=message(b"first"))
        await until(lambda: methods.waiting == 1)
        stopping = asyncio.create_task(door.stop(20))
        assert (await raw.next(Kind.GOAWAY))[3][:4] == b"\x7f\xff\xff\xff"
        raw.ask(3, "/t/Echo", data=message(b"on its way"))
        assert (await raw.status(3))[0] == 0
        assert (await raw.next(Kind.GOAWAY))[3][:4] == b"\0\0\0\x03"
        raw.ask(5, "/t/Echo", data=message(b"too late"))
        methods.gate.set()
        assert (await raw.next(Kind.DATA))[2:] == (1, message(b"first"))
        await raw.closed()
        await asyncio.wait_for(stopping, 5)
    with pytest.raises(OSError):  # noqa: PT011  # nobody listens
        await asyncio.open_connection(*door.address.split(":"))


async def test_what_does_not_finish_in_time_is_told_to_ask_elsewhere(methods):
    async with opened(methods) as door, grpc.aio.insecure_channel(door.address) as channel:
        call = channel.unary_unary("/t/Wait")(b"")
        await until(lambda: methods.waiting == 1)
        started = time.monotonic()
        await door.stop(0.1)
        assert time.monotonic() - started < 5
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert methods.given_up == 1


async def test_http_1_gets_an_answer_that_says_what_this_is(door):
    async with Raw.of(door, begin=False) as raw:
        raw.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        text = await asyncio.wait_for(raw.reader.read(), 10)
        assert text.startswith(b"HTTP/1.1 400 ")
        assert b"speaks gRPC" in text


async def test_a_broken_rule_ends_its_connection_with_the_reason_and_no_other(door, channel):
    echo = channel.unary_unary("/t/Echo")
    await echo(b"")
    async with Raw.of(door) as raw:
        raw.send(frame(Kind.PING, 0, 1, b"12345678"))
        payload = (await raw.next(Kind.GOAWAY))[3]
        assert (payload[7], payload[8:]) == (Code.PROTOCOL_ERROR, b"PING on a stream")
        await raw.closed()
    assert await echo(b"still", timeout=10) == b"still"


async def test_who_begins_and_does_not_go_on_is_sent_away(door, methods):
    async with (
        Raw.of(door, begin=False) as silent,
        Raw.of(door) as cut,
        Raw.of(door) as half,
        Raw.of(door) as idle,
    ):
        cut.send(frame(Kind.PING, 0, 0, b"12345678")[:11])
        half.ask(1, "/t/Echo", data=b"\0", end=False)
        for raw in (half, idle):
            raw.send(frame(Kind.PING, 0, 0, b"12345678"))
            await raw.next(Kind.PING)
        await until(lambda: len(door.connections) == 4)
        now = time.monotonic()
        door.sweep(now)
        door.sweep(now + grpc_connection.HANDSHAKE_S + 1)
        await silent.closed()
        await until(lambda: len(door.connections) == 3)
        door.sweep(now + grpc_connection.ARRIVAL_S + 1)
        assert "does not arrive" in (await cut.next(Kind.GOAWAY))[3][8:].decode()
        assert (await half.status())[0] == 4
        await until(lambda: len(door.connections) == 2)
        door.sweep(now + grpc_connection.ARRIVAL_S + grpc_connection.IDLE_S + 2)
        await idle.next(Kind.GOAWAY)
        await idle.closed()
        await until(lambda: not door.connections)


async def test_who_does_not_read_is_not_read_from_and_sent_away_in_the_end(door, methods):
    wide = (4).to_bytes(2, "big") + http2_frames.LARGEST.to_bytes(4, "big")
    async with Raw.of(door, settings=wide) as raw:
        raw.writer.transport.pause_reading()
        raw.send(frame(Kind.WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big")))
        for n in range(500):
            raw.ask(2 * n + 1, "/t/Large", data=message(b"%d" % LIMIT))
        (connection,) = await connections_of(door, 1)
        transport = connection._transport
        await until(lambda: not transport.is_reading())
        # Half a gigabyte was asked for.
        assert transport.get_write_buffer_size() < 2 * (1 << 20)
        now = time.monotonic()
        door.sweep(now)
        door.sweep(now + lingering.UNREAD_S + 1)
        await until(lambda: not door.connections)


async def test_a_stream_whose_reader_is_slow_is_not_read_on(door, methods):
    async with Raw.of(door, settings=b"\0\x04\0\0\0\0") as raw:  # windows of nothing
        raw.ask(1, "/t/Stream", end=False)
        for _ in range(200):
            raw.send(frame(Kind.DATA, 0, 1, message(b"large")))
        raw.ask(3, "/t/Told", data=message(b""))
        raw.send(frame(Kind.WINDOW_UPDATE, 0, 3, (1000).to_bytes(4, "big")))
        assert (await raw.status(3))[0] == 0  # others pass
        await until(lambda: len(methods.asked) >= STREAM_IN_FLIGHT)
        for _ in range(100):  # turns of the loop in which it could go on
            raw.send(frame(Kind.PING, 0, 0, b"12345678"))
            await raw.next(Kind.PING)
        assert len(methods.asked) < 100
        raw.send(frame(Kind.WINDOW_UPDATE, 0, 1, (1 << 29).to_bytes(4, "big")))
        for _ in range(200):
            raw.send(frame(Kind.WINDOW_UPDATE, 0, 0, (500_005).to_bytes(4, "big")))
            got = 0
            while got < 500_005:
                got += len((await raw.next(Kind.DATA, stream=1))[3])
        assert len(methods.asked) == 200


async def test_doors_that_are_started_for_it_share_a_port(methods):
    async with opened(methods, share_port=True) as first:
        host, port = first.address.split(":")
        second = GrpcDoor(methods, streams=(), max_message_bytes=LIMIT)
        assert await second.listen(host, int(port), share_port=True) == int(port)
        await second.stop(None)


async def test_localhost_is_one_port_on_every_address_of_it(methods):
    door = GrpcDoor(methods, streams=(), max_message_bytes=LIMIT)
    port = await door.listen("localhost", 0)
    async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        assert await channel.unary_unary("/t/Echo")(b"x", timeout=10) == b"x"
    await door.stop(1.0)


async def test_a_unix_socket_is_a_door_too(methods, tmp_path):
    door = GrpcDoor(methods, streams=(), max_message_bytes=LIMIT)
    await door.listen_unix(tmp_path / "s")
    async with grpc.aio.insecure_channel(f"unix:{tmp_path / 's'}") as channel:
        assert await channel.unary_unary("/t/Echo")(b"x", timeout=10) == b"x"
    await door.stop(1.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return made_pair(tmp_path_factory.mktemp("tls"))


async def test_encrypted_calls_agree_on_h2_and_nothing_else_is_let_in(methods, pair):
    async with opened(methods, tls=server_side(pair)) as door:
        credentials = grpc.ssl_channel_credentials(pair[0].read_bytes())
        async with grpc.aio.secure_channel(door.address, credentials) as channel:
            echo = channel.unary_unary("/t/Echo")
            assert await echo(b"x" * LIMIT, timeout=20) == b"x" * LIMIT
        without = ssl.create_default_context(cafile=pair[0])
        reader, writer = await asyncio.open_connection(*door.address.split(":"), ssl=without)
        data = await asyncio.wait_for(reader.read(), 10)
        assert b"ALPN must agree on h2" in data
        writer.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_gets_an_answer(door, tmp_path):
    (tmp_path / "body").write_bytes(message(b"hello"))
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "--http2-prior-knowledge", "-H", "content-type: application/grpc",
        "-H", "te: trailers", "--data-binary", f"@{tmp_path / 'body'}", "-D", "-",
        f"http://{door.address}/t/Echo", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert message(b"hello") in out
    assert b"HTTP/2 200" in out
    assert b"grpc-status: 0" in out


async def test_keepalive_pings_of_a_client_are_answered(door):
    options = [
        ("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 500),
        ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0),
    ]  # fmt: skip
    async with grpc.aio.insecure_channel(door.address, options=options) as channel:
        await channel.unary_unary("/t/Echo")(b"", timeout=10)
        (connection,) = door.connections
        before = connection._http.frames
        await until(lambda: connection._http.frames > before + 1)
        assert connection in door.connections


FEW = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FEW
@given(st.lists(streams_of_bytes(), min_size=1, max_size=4))
def test_whatever_strangers_send_the_door_serves_on_and_keeps_nothing(pieces):
    async def attempt():
        methods = Methods()
        methods["/s/M"] = methods.wait
        async with opened(methods) as door:
            for data in pieces:
                async with Raw.of(door, begin=False) as raw:
                    raw.send(data)
                    raw.writer.write_eof()
                    await raw.closed()
            async with Raw.of(door) as raw:
                raw.ask(1, "/t/Echo", data=message(b"good"))
                assert (await raw.status())[0] == 0
            await until(lambda: not door.connections)
            await until(lambda: methods.waiting == 0)

    asyncio.run(attempt())


async def test_an_answer_behind_a_window_that_never_opens_is_given_up():
    async def large(_data, _context):
        return bytes(1 << 20)

    async with opened({"/a": large}) as door:
        _, writer = await asyncio.open_connection(*door.address.split(":"))
        no_window = struct.pack(">HI", 4, 0)  # SETTINGS_INITIAL_WINDOW_SIZE
        writer.write(http2_frames.PREFACE + http2_frames.frame(4, 0, 0, no_window) + raw_call(1))
        await until(lambda: door.connections and next(iter(door.connections))._http.waiting())
        (connection,) = door.connections
        now = time.monotonic()
        connection.sweep(now)
        connection.sweep(now + lingering.UNREAD_S - 1)
        assert connection._http.waiting()
        connection.sweep(now + lingering.UNREAD_S + 1)
        assert not connection._http.waiting()
        writer.close()


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_door_that_closes_lets_a_slow_reader_have_the_whole_answer(encrypted, pair):
    async def large(_data, _context):
        return bytes(1_000_000)

    options = {"tls": server_side(pair)} if encrypted else {}
    async with opened({"/a": large}, **options) as door:
        small = socket.socket()  # so that most of the answers wait on the door's side
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        small.setblocking(False)
        host, port = door.address.split(":")
        await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
        security = {"ssl": client_side(pair), "server_hostname": "localhost"} if encrypted else {}
        reader, writer = await asyncio.open_connection(sock=small, limit=1 << 14, **security)
        wide = struct.pack(">HI", 4, 1 << 30)
        more = frame(8, 0, 0, struct.pack(">I", 1 << 30))  # WINDOW_UPDATE
        writer.write(http2_frames.PREFACE + frame(4, 0, 0, wide) + more)
        writer.write(b"".join(raw_call(number) for number in (1, 3, 5, 7)))
        received = await reader.readexactly(1000)
        (connection,) = door.connections
        stopping = asyncio.create_task(door.stop(10.0))
        # Nothing is read before the door has said all it has to say.
        await until(lambda: connection._http.streams == 0 or connection._full)
        while data := await reader.read(1 << 16):
            received += data
            with contextlib.suppress(ConnectionError):
                writer.write(frame(8, 0, 0, struct.pack(">I", 1)))  # as readers do
        await stopping
        writer.close()
    assert len(received) > 4_000_000
