"""Every request at every door is in the books once, with the outcome that its caller saw."""

import asyncio
import contextlib
import time
from collections import Counter

import aiohttp
import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol import inference, rest_service
from fogline_protocol.door_memory import Memory
from fogline_protocol.errors import ERRORS, NotFound, ServerFault, Unauthenticated
from fogline_protocol.grpc_service import INFER, STREAM
from fogline_protocol.http2_frames import Kind, frame
from fogline_protocol.inference import InferRequest
from fogline_protocol.outcomes import Entries, Entry, ending, outcome_of
from fogline_protocol.v1 import inference_pb2 as pb
from tests.protos.echo import EchoServer, grpc_door, rest_door
from tests.protos.raw_peer import Raw, message

LIMIT = 1 << 16
LARGE_ROWS = 1 << 18  # 4 MiB of an answer


class Ledger:
    """The books: what was told, in order, and that nothing stays open."""

    def __init__(self):
        self.told, self.reasons, self.opened = [], [], 0
        self.settled = asyncio.Event()

    def open_entry(self):
        self.opened += 1
        return Entry(self._tell)

    def rejected(self, reason):
        self.reasons.append(reason)

    def _tell(self, outcome, _took_s):
        self.told.append(outcome)
        if len(self.told) == self.opened:
            self.settled.set()

    async def outcomes(self, count):
        async with asyncio.timeout(10):
            while len(self.told) < count or len(self.told) < self.opened:
                self.settled.clear()
                await self.settled.wait()
        return self.told


@pytest.fixture
def server():
    return EchoServer()


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture(params=["http2", "grpcio"])
async def channel(request, server, ledger):
    async with (
        grpc_door(server, kind=request.param, max_message_bytes=LIMIT, books=ledger) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield channel


@pytest.fixture
async def rest(server, ledger):
    async with (
        rest_door(server, books=ledger, max_bytes=LIMIT) as address,
        aiohttp.ClientSession(f"http://{address}") as session,
    ):
        yield session


def asked(model="echo", id="", rows=1, classes=0, array=None, **parameters):
    x = np.ones((rows, 4), np.float32) if array is None else array
    request = InferRequest(model, {"x": x}, id=id, parameters=parameters)
    message = pb.ModelInferRequest.FromString(inference.encode_request(request))
    if classes:
        message.outputs.add(name="x").parameters["classification"].int64_param = classes
    return message.SerializeToString()


TEXTS = np.array([[b"no class"]], object)

CALLS = {
    "ok": (asked(), "ok"),
    "refused by the server": (asked(refuse=True), "invalid_argument"),
    "no such model": (asked("nobody"), "not_found"),
    "no classes": (asked(array=TEXTS, classes=1), "invalid_argument"),
    "no request": (b"\xff\xff", "invalid_argument"),
    "its parameters are not allowed": (asked(triton_x=1), "invalid_argument"),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_is_counted_as_its_caller_sees_it(channel, ledger, name):
    data, outcome = CALLS[name]
    assert await status(channel.unary_unary(INFER)(data, timeout=10)) == outcome
    assert await ledger.outcomes(1) == [outcome]


async def test_an_answer_that_is_too_long_to_be_sent_is_no_success(channel, server, ledger):
    async def tripled(request, deadline):
        response = await EchoServer.infer(server, request, deadline)
        response.outputs = {name: np.tile(x, (3, 1)) for name, x in response.outputs.items()}
        return response

    server.infer, wide = tripled, asked(rows=LIMIT // 32)
    assert await status(channel.unary_unary(INFER)(wide, timeout=10)) == "resource_exhausted"
    assert await ledger.outcomes(1) == ["resource_exhausted"]
    stream = channel.stream_stream(STREAM)(timeout=10)  # which it ends
    for data in (asked(), wide):
        await stream.write(data)
    assert await stream.read() is not grpc.aio.EOF
    assert await status(stream.read()) == "resource_exhausted"
    assert await ledger.outcomes(3) == ["resource_exhausted", "ok", "resource_exhausted"]


async def test_each_request_of_a_stream_is_counted_by_itself(channel, ledger):
    call = channel.stream_stream(STREAM)(iter([data for data, _ in CALLS.values()]), timeout=10)
    answers = [pb.ModelStreamInferResponse.FromString(data) async for data in call]
    outcomes = [outcome for _, outcome in CALLS.values()]
    assert [not answer.error_message for answer in answers] == [o == "ok" for o in outcomes]
    assert await ledger.outcomes(len(CALLS)) == outcomes


async def test_what_ends_a_stream_ends_every_request_of_it(channel, server, ledger):
    assert await ended_by(asked("nobody"), channel, server) == "not_found"
    assert await ledger.outcomes(3) == ["ok", "not_found", "not_found"]


async def test_callers_who_leave_and_those_out_of_time_are_counted_apart(channel, server, ledger):
    server.gates["waits"] = asyncio.Event()
    call = channel.unary_unary(INFER)(asked(id="waits"), timeout=60)
    stream = channel.stream_stream(STREAM)(iter([asked(id="waits")] * 2), timeout=60)
    reading = asyncio.ensure_future(stream.read())
    async with asyncio.timeout(10):
        while len(server.calls) < 3:
            await asyncio.sleep(0.001)
    call.cancel()
    stream.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    assert await ledger.outcomes(3) == ["cancelled"] * 3
    assert await status(channel.unary_unary(INFER)(asked(id="waits"), timeout=0.1)) == (
        "deadline_exceeded"
    )
    # A client that gives up by its own clock may be quicker than the door.
    assert (await ledger.outcomes(4))[3] in ("deadline_exceeded", "cancelled")


@pytest.mark.parametrize("kind", ["http2", "grpcio"])
async def test_who_leaves_while_a_large_answer_is_written_did_not_get_it(server, ledger, kind):
    async def large(request, deadline):
        response = await EchoServer.infer(server, request, deadline)
        response.outputs = {"x": np.tile(response.outputs["x"], (LARGE_ROWS, 1))}
        return response

    server.infer = large
    async with (
        grpc_door(server, kind=kind, max_message_bytes=1 << 30, books=ledger) as address,
        Raw.at(address) as raw,
    ):
        raw.ask(1, STREAM, data=message(asked()), end=False)
        await raw.next(Kind.DATA, stream=1)  # and no window for the rest
        raw.send(frame(Kind.RST_STREAM, 0, 1, (8).to_bytes(4, "big")))  # CANCEL
        assert await ledger.outcomes(1) == ["cancelled"]


@pytest.mark.parametrize("kind", ["http2", "grpcio"])
async def test_who_is_not_let_in_is_counted_too(server, ledger, kind):
    async def admit(path, metadata):
        raise Unauthenticated("who are you?")

    async with (
        grpc_door(server, kind=kind, books=ledger, admit=admit) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        assert await status(channel.unary_unary(INFER)(asked())) == "unauthenticated"
        stream = channel.stream_stream(STREAM)()  # it sends nothing that could cross the refusal
        assert await status(stream.read()) == "unauthenticated"
    assert await ledger.outcomes(2) == ["unauthenticated"] * 2


async def test_calls_that_ask_for_no_inference_are_no_requests(channel, ledger):
    service = INFER.rpartition("/")[0]
    assert await status(channel.unary_unary(f"{service}/ServerLive")(b"")) == "ok"
    assert await status(channel.unary_unary(f"{service}/ModelReady")(b"\xff")) == "invalid_argument"
    assert await status(channel.unary_unary("/some/where")(b"")) == "unimplemented"
    assert (ledger.opened, ledger.reasons) == (0, ["unknown_call"])


async def test_what_is_refused_before_it_has_arrived_is_counted(server, ledger):
    async with (
        grpc_door(server, max_message_bytes=LIMIT, books=ledger) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = channel.unary_unary(INFER)
        assert await status(call(b"x" * (LIMIT + 1))) == "resource_exhausted"
        stream = channel.stream_stream(STREAM)(iter([asked(), b"x" * (LIMIT + 1)]))
        # grpcio's own word for a message that it could not send to its end
        assert await status(read(stream)) in ("resource_exhausted", "internal")
    assert await ledger.outcomes(3) == ["resource_exhausted", "ok", "resource_exhausted"]


@pytest.mark.parametrize(
    ("headers", "data", "outcome"),
    [
        ([("grpc-encoding", "snappy")], message(b""), "unimplemented"),
        ([("grpc-timeout", "soon")], message(b""), "invalid_argument"),
        ([("content-length", "9")], message(b""), "internal"),  # which takes the call's stream
        ([], message(b"x")[:-1], "invalid_argument"),
        ([], b"", "invalid_argument"),
        ([], None, "invalid_argument"),
    ],
)
@pytest.mark.parametrize("path", [INFER, "/some/where"])
async def test_what_is_hardly_a_call_is_counted_if_it_was_to_be_one_of_these(
    server, ledger, path, headers, data, outcome
):
    async with grpc_door(server, books=ledger) as address, Raw.at(address) as raw:
        raw.ask(1, path, *headers, data=data)
        await raw.next(Kind.HEADERS, Kind.RST_STREAM, stream=1)
        assert ledger.told == ([outcome] if path == INFER else [])


async def test_calls_of_a_peer_that_is_sent_away_end_with_it(server, ledger):
    server.gates["waits"] = asyncio.Event()
    async with grpc_door(server, books=ledger) as address, Raw.at(address) as raw:
        raw.ask(1, INFER, data=message(asked(id="waits")))
        raw.ask(3, STREAM, data=message(asked(id="waits")), end=False)
        async with asyncio.timeout(10):
            while len(server.calls) < 2:
                await asyncio.sleep(0.001)
        raw.send(frame(Kind.WINDOW_UPDATE, 0, 0, bytes(4)))  # RFC 9113, 6.9: an error of the peer
        await raw.next(Kind.GOAWAY)
        assert ledger.told == ["unavailable"] * 2


async def test_answers_that_no_memory_is_left_for_are_refusals(server, ledger):
    memory = Memory(4 * LIMIT)
    memory.answers.hold(memory.answers.limit)  # as if others left theirs unread
    async with (
        grpc_door(server, max_message_bytes=LIMIT, books=ledger, memory=memory) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        assert await status(channel.unary_unary(INFER)(asked())) == "resource_exhausted"
    assert await ledger.outcomes(1) == ["resource_exhausted"]


async def test_the_end_of_a_door_is_the_end_of_what_is_asked_there(server, ledger):
    server.gates["waits"] = asyncio.Event()
    async with grpc_door(server, books=ledger) as address:
        channel = grpc.aio.insecure_channel(address)
        call = channel.unary_unary(INFER)(asked(id="waits"))
        stream = channel.stream_stream(STREAM)(iter([asked(id="waits")]))
        reading = asyncio.ensure_future(read(stream))
        async with asyncio.timeout(10):
            while len(server.calls) < 2:
                await asyncio.sleep(0.001)
    assert (await status(call), await status(reading)) == ("unavailable", "unavailable")
    assert await ledger.outcomes(2) == ["unavailable", "unavailable"]
    await channel.close()


def body(data=(1, 2, 3, 4), datatype="FP32", shape=(1, 4), **more):
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}]} | more


CLASSES = [{"name": "x", "parameters": {"classification": 1}}]
POSTS = {
    "ok": ("echo", body(), 200, "ok"),
    "refused by the server": ("echo", body(parameters={"refuse": True}), 400, "invalid_argument"),
    "no such model": ("nobody", body(), 404, "not_found"),
    "no classes": (
        "echo", body(["one"], "BYTES", (1, 1), outputs=CLASSES), 400, "invalid_argument",
    ),
    "no request": ("echo", [], 400, "invalid_argument"),
    "too large": ("echo", body([0] * LIMIT, shape=(LIMIT // 4, 4)), 413, "invalid_argument"),
}  # fmt: skip


@pytest.mark.parametrize("name", POSTS)
async def test_a_rest_request_is_counted_as_its_caller_sees_it(rest, ledger, name):
    model, document, status, outcome = POSTS[name]
    async with rest.post(f"/v2/models/{model}/infer", json=document) as answer:
        assert answer.status == status
    assert await ledger.outcomes(1) == [outcome]


async def test_large_json_that_must_wait_too_long_is_a_refusal(rest, ledger, monkeypatch):
    monkeypatch.setattr(rest_service.rest_codec, "LARGE_BYTES", 1)
    monkeypatch.setattr(rest_service, "LARGE_AT_ONCE", 0)
    async with rest.post("/v2/models/echo/infer", json=body()) as answer:
        assert answer.status == 429
    assert await ledger.outcomes(1) == ["resource_exhausted"]
    assert ledger.reasons == ["large_json"]


async def test_a_large_answer_in_json_that_is_refused_is_no_success(rest, ledger, monkeypatch):
    monkeypatch.setattr(rest_service.rest_codec, "large_response", lambda response, wish: True)
    monkeypatch.setattr(rest_service, "LARGE_AT_ONCE", 0)
    async with rest.post("/v2/models/echo/infer", json=body()) as answer:
        assert answer.status == 429
    assert await ledger.outcomes(1) == ["resource_exhausted"]


async def test_whatever_stands_before_a_rest_route_its_refusal_is_counted(server, ledger):
    async with (
        rest_door(server, books=ledger, middlewares=[rest_service.local_only]) as address,
        aiohttp.ClientSession(f"http://{address}") as session,
        session.post(
            "/v2/models/echo/infer", json=body(), headers={"Host": "evil.example"}
        ) as answer,
    ):
        assert answer.status == 421
    assert await ledger.outcomes(1) == ["permission_denied"]


async def test_rest_calls_that_ask_for_no_inference_are_no_requests(rest, ledger):
    for path, status in (("/v2", 200), ("/v2/models/nobody", 404), ("/v2/some/where", 404)):
        async with rest.get(path) as answer:
            assert answer.status == status
    assert (ledger.opened, ledger.reasons) == (0, ["unknown_call"])


def test_every_error_has_an_outcome_and_nothing_else_has():
    for code, error in ERRORS.items():
        assert outcome_of(error("x")) == code.lower()
    assert outcome_of(asyncio.CancelledError()) == "cancelled"
    assert outcome_of(ValueError()) == outcome_of(ServerFault("x")) == "internal"


def test_only_the_first_outcome_counts_and_whoever_was_named_last_hears_of_it():
    first, last = [], []
    entry = Entry(lambda outcome, _: first.append(outcome))
    entry.tell = lambda outcome, _: last.append(outcome)
    entry.end("ok")
    entry.end("cancelled")
    assert (first, last) == ([], ["ok"])
    with pytest.raises(NotFound), ending(Entry(lambda outcome, _: first.append(outcome))):
        raise NotFound("x")
    with ending(Entry(lambda outcome, _: first.append(outcome))):
        pass
    assert first == ["not_found", "ok"]


def test_a_request_takes_until_its_clock_was_stopped_or_its_end():
    took = []
    for stopped in (2.5, 0.0, None):
        entry = Entry(lambda _, took_s: took.append(took_s))
        entry.began = time.monotonic() - 100
        if stopped is not None:
            entry.took_s = stopped
        entry.end("ok")
    assert took[:2] == [2.5, 0.0]
    assert 100 <= took[2] < 200


@given(st.lists(st.sampled_from(["open", "oldest", "end"]), max_size=20))
def test_all_requests_of_a_stream_end_once_whatever_happens(steps):
    ledger, told = Counter(), []

    class Books:
        def open_entry(self):
            ledger["opened"] += 1
            return Entry(lambda outcome, _: told.append(outcome))

    entries = Entries(Books())
    for step in steps:
        match step:
            case "open":
                entries.open()
            case "oldest":
                entries.end_oldest("ok")
            case "end":
                entries.end("over")
    entries.end("cancelled")
    entries.open()
    assert len(told) == ledger["opened"]
    answered = told.count("ok")
    assert told[:answered] == ["ok"] * answered
    assert set(told[answered:]) == {"over" if "end" in steps else "cancelled"}


async def ended_by(data, channel, server):
    """Ask three on a stream that ``data``, the second, ends, and return its status."""
    server.gates |= {"first": asyncio.Event(), "last": asyncio.Event()}
    call = channel.stream_stream(STREAM)(
        iter([asked(id="first"), data, asked(id="last")]),
        metadata=(("triton_grpc_error", "true"),),
        timeout=10,
    )
    reading = asyncio.ensure_future(read(call))
    async with asyncio.timeout(10):
        while not any(request.id == "last" for request in server.calls):
            await asyncio.sleep(0.001)
    server.gates["first"].set()
    return await status(reading)


async def read(call):
    return [data async for data in call]


async def status(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name.lower()
    return "ok"
