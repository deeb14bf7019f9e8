"""A load test of the hub in which everything happens at once, and every request is accounted for.

Hundreds of callers ask a real hub process over gRPC, one by one and in streams, and over REST.
Some have little time, some leave before the answer, some ask for what no answer can hold or send
what is no request, and meanwhile versions are switched and engines killed. In the end

- every request has had exactly one outcome, and nobody waited for ever;
- every answer was the right one for its own input and for the version that says it gave it;
- nobody was refused without a reason that the test had given;
- the counts of the callers, of Prometheus and of ModelStatistics add up.

A request whose caller left may have been answered, failed or never seen by the hub; that many
requests, and no more, may be counted either way.
"""

import asyncio
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import psutil

from deploy.demo.fleet import Process, script
from fogline_protocol import documents, inference
from fogline_protocol.client import Client
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    InferenceError,
    NotFound,
    Overloaded,
    ServerFault,
    Unavailable,
    Unsupported,
)
from fogline_protocol.grpc_service import SERVICE
from fogline_protocol.inference import InferRequest, InferResponse
from fogline_protocol.tensors import Array
from fogline_protocol.v1 import inference_pb2 as pb

DOUBLE = Path(__file__).parent / "edge_agent" / "data" / "double.onnx"
TEXT = DOUBLE.with_name("text.onnx")  # its outputs are texts: they have no classes
WORDS = "words"  # the model that is made of it, which nobody switches
NOBODY = ""  # the model of requests that have none
NO_REQUEST = b"\xff\xff"
# The one beyond the size up to which models may run in the hub's own process.
PADDING = {"inline": 0, "apart": 17 << 20}
# What the folder of a model holds, in turn: another file in place of the old one, another
# version, and the way back. Each multiplies by a factor of its own.
FACTORS: Mapping[int, str] = {2: "1", 5: "1", 3: "2"}

MAX_BATCH = 32
MAX_QUEUE_ROWS = 192
MAX_MESSAGE_BYTES = 1 << 16
LARGE_TEXT = b"." * (
    MAX_MESSAGE_BYTES - 128
)  # it comes, and cannot go with the answer's parameters
PATIENCE_S = 60.0  # of callers without a deadline; whoever waits longer was forgotten
SWITCH_EVERY_S = 1.0
KILL_EVERY_S = 2.0
FROZEN_S = 0.05  # before a kill, so that it meets a batch
PAUSE_S = 0.3  # at most, of a caller between two requests
STREAMED = 12  # requests of one stream

WAYS = (
    "grpc", "grpc, deadline", "grpc, timeout", "grpc, leaves", "stream", "stream, leaves",
    "rest", "rest, timeout", "rest, leaves", "grpc, no classes", "rest, no classes",
    "grpc, too large", "grpc, no request", "rest, no request", "stream, no request", "grpc, no model", "rest, no model",
)  # fmt: skip
LEFT = "left"
OK = "ok"
OUTCOMES = ("success", "fail")  # in ModelStatistics


@dataclass(slots=True)
class Report:
    """What happened, and what must not have."""

    outcomes: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # model, way, outcome
    answered: Counter[tuple[str, str]] = field(default_factory=Counter)  # model, version
    switches: int = 0
    kills: int = 0
    counted: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by Prometheus
    unknown_calls: int = 0  # made to paths where nothing is
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        """How many were sent."""
        return self.outcomes.total()

    def total(
        self, *, model: str | None = None, way: str | None = None, outcome: str | None = None
    ) -> int:
        """Return how many requests had an outcome."""
        return sum(
            count
            for key, count in self.outcomes.items()
            if all(
                want is None or want == have
                for want, have in zip((model, way, outcome), key, strict=True)
            )
        )


async def run(folder: Path, *, seconds: float, callers: int, seed: int = 0) -> Report:
    """Start a hub in ``folder``, put it under load, and return what came of it."""
    models = {name: _Model(folder / "models" / name, padding) for name, padding in PADDING.items()}
    for model in models.values():
        await asyncio.to_thread(model.put, 2)
    words = folder / "models" / WORDS / "1"
    words.mkdir(parents=True)
    (words / "model.onnx").write_bytes(TEXT.read_bytes())
    command = (
        script("fogline"), "serve", "--data", str(folder / "hub"), "--models",
        str(folder / "models"), "--model-control", "explicit", "--grpc", "127.0.0.1:0",
        "--http", "127.0.0.1:0", "--mqtt", "off", "--threads", "1",
        "--max-batch", str(MAX_BATCH), "--max-queue-rows", str(MAX_QUEUE_ROWS),
        "--max-message-bytes", str(MAX_MESSAGE_BYTES),
    )  # fmt: skip
    hub = Process("hub", command, folder / "hub", ("grpc", "http"))
    try:
        await hub.start()
        async with _Soak(hub, models, random.Random(seed)) as soak:
            return await soak.run(seconds, callers)
    finally:
        await hub.stop()


class _Model:
    """A model's folder, whose content changes."""

    def __init__(self, folder: Path, padding: int) -> None:
        self.name = folder.name
        self._folder = folder
        self._data = {factor: _multiplying(factor, padding) for factor in FACTORS}
        self.by_digest = {
            documents.sha256(data): (factor, FACTORS[factor]) for factor, data in self._data.items()
        }

    def put(self, factor: int) -> None:
        """Have the folder hold the version that multiplies by ``factor``, and no other."""
        version = self._folder / FACTORS[factor]
        version.mkdir(parents=True, exist_ok=True)
        scratch = version / "model.onnx.new"
        scratch.write_bytes(self._data[factor])
        scratch.rename(version / "model.onnx")
        for other in self._folder.iterdir():
            if other != version:
                shutil.rmtree(other)


def _multiplying(factor: int, padding: int) -> bytes:
    data = DOUBLE.read_bytes()
    two, other = struct.pack("<f", 2), struct.pack("<f", factor)
    assert data.count(two) == 1
    data = data.replace(two, other)
    if padding:
        # Field 6 of a ModelProto: its documentation, which nobody reads.
        data += b"\x32" + _varint(padding) + b" " * padding
    return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@dataclass(frozen=True, slots=True)
class _Ask:
    """One request and who sends it."""

    way: str
    model: str
    rows: Array
    timeout_us: int = 0  # the parameter; 0: none

    def request(self, id: str = "") -> InferRequest:
        parameters: dict[str, int | float | str | bool] = {}
        if self.timeout_us:
            parameters["timeout"] = self.timeout_us
        return InferRequest(self.model, {"x": self.rows}, id=id, parameters=parameters)


class _Soak:
    """The callers, those who disturb them, and the books."""

    def __init__(self, hub: Process, models: Mapping[str, _Model], dice: random.Random) -> None:
        self._hub = hub
        self._models = models
        self._dice = dice
        self._report = Report()
        self._numbers = itertools.count(1)
        self._over = asyncio.Event()
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "_Soak":
        self._clients = [Client(self._hub.endpoints["grpc"]) for _ in range(4)]
        for client in self._clients:
            self._parts.push_async_callback(client.close)
        self._channel = await self._parts.enter_async_context(
            grpc.aio.insecure_channel(self._hub.endpoints["grpc"])
        )
        self._rest = await self._parts.enter_async_context(
            aiohttp.ClientSession(
                f"http://{self._hub.endpoints['http']}", connector=aiohttp.TCPConnector(limit=0)
            )
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._parts.aclose()

    async def run(self, seconds: float, callers: int) -> Report:
        """Load, disturb, and close the books."""
        for name in (*self._models, WORDS):
            await self._load(name)
        ways: list[Callable[[], Awaitable[None]]] = [
            self._patient, self._hurried, self._expiring, self._leaving,
            self._streaming, self._streaming_and_leaving, self._rest_patient, self._rest_expiring,
            self._rest_leaving, self._asking_in_vain,
        ]  # fmt: skip
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for at in range(callers):
                group.create_task(self._calling(ways[at % len(ways)]))
            disturbing = [group.create_task(self._switching(name)) for name in self._models] + [
                group.create_task(self._killing())
            ]
            await asyncio.sleep(seconds)
            # A busy machine gets around to less, and is given the time for some of each.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    while self._report.switches < 2 or self._report.kills < 1:
                        await asyncio.sleep(0.1)
            self._over.set()
            await asyncio.gather(*disturbing)
        self._report.seconds = time.monotonic() - began
        await self._settle()
        await self._close_books()
        return self._report

    # Callers

    async def _calling(self, way: Callable[[], Awaitable[None]]) -> None:
        while not self._over.is_set():
            await way()
            await asyncio.sleep(self._dice.uniform(0, PAUSE_S))

    def _ask(self, way: str, timeout_us: int = 0) -> _Ask:
        # Now and then more than a batch holds, so that it is split and joined again.
        count = self._dice.choice((1, 1, 2, 3, 8, MAX_BATCH + 5))
        # Whole numbers that a float32 still holds when multiplied: answers can be told apart.
        number = next(self._numbers) % (1 << 20)
        rows = np.array([[number, at, self._dice.randrange(1000)] for at in range(count)])
        return _Ask(way, self._dice.choice([*self._models]), rows.astype(np.float32), timeout_us)

    async def _patient(self) -> None:
        ask = self._ask("grpc")
        await self._unary(ask, PATIENCE_S)

    async def _hurried(self) -> None:
        ask = self._ask("grpc, deadline")
        await self._unary(ask, self._dice.uniform(0.001, 0.3), may_leave=True)

    async def _expiring(self) -> None:
        await self._unary(self._ask("grpc, timeout", self._timeout_us()), PATIENCE_S)

    async def _leaving(self) -> None:
        ask = self._ask("grpc, leaves")
        await self._leaves(ask, self._unary(ask, PATIENCE_S))

    def _timeout_us(self) -> int:
        return self._dice.randrange(500, 100_000)

    async def _leaves(self, ask: _Ask, call: Awaitable[None]) -> None:
        """Break a call off after a moment, unless it was faster."""
        try:
            async with asyncio.timeout(self._dice.uniform(0, 0.2)):
                await call
        except TimeoutError:
            self._note(ask, LEFT)

    async def _unary(self, ask: _Ask, deadline_s: float, *, may_leave: bool = False) -> None:
        client = self._dice.choice(self._clients)
        try:
            response = await client.infer(ask.request(), deadline_s)
        except DeadlineExceeded as error:
            if may_leave:  # by whose clock cannot be told
                self._note(ask, LEFT)
            else:
                self._refused(ask, error)
        except InferenceError as error:
            self._refused(ask, error)
        else:
            self._answered(ask, response)

    async def _streaming(self) -> None:
        await self._stream("stream", STREAMED)

    async def _streaming_and_leaving(self) -> None:
        await self._stream("stream, leaves", self._dice.randrange(STREAMED))

    async def _stream(self, way: str, answers: int) -> None:
        """Send some requests, read ``answers`` answers, and leave without the rest."""
        odd = self._dice.randrange(STREAMED) if answers == STREAMED else None
        asks = [
            self._vain("stream, no request", NOBODY)
            if at == odd
            else self._ask(way, self._timeout_us() if self._dice.random() < 0.3 else 0)
            for at in range(STREAMED)
        ]
        call: Any = self._channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(timeout=PATIENCE_S)
        done = 0
        try:
            for at, ask in enumerate(asks):
                data = inference.encode_request(ask.request(str(at)))
                await call.write(data if ask.model else NO_REQUEST)
            if answers == STREAMED:
                await call.done_writing()
            while done < answers:
                found = pb.ModelStreamInferResponse.FromString(await call.read())
                if found.infer_response.id != (str(done) if asks[done].model else ""):
                    self._problem(f"answer {found.infer_response.id!r} of a stream came as {done}")
                if found.error_message:
                    self._refused(asks[done], _by_text(found.error_message))
                else:
                    data = found.infer_response.SerializeToString()
                    self._answered(asks[done], inference.decode_response(data))
                done += 1
        except grpc.aio.AioRpcError as error:
            self._problem(f"a stream broke after {done} answers: {error.code()} {error.details()}")
            for ask in asks[done:]:
                self._note(ask, "broken")
        else:
            call.cancel()
            for ask in asks[done:]:
                self._note(ask, LEFT)

    async def _asking_in_vain(self) -> None:
        """Send what gets no answer, whatever the hub does, by every way."""
        words = InferRequest(WORDS, {"s": np.array([[b"one"]], object)})
        words.classification = {"t": 1}
        text = {"name": "s", "datatype": "BYTES", "shape": [1, 1], "data": ["one"]}
        classes = {"name": "t", "parameters": {"classification": 1}}
        infer, path = f"/{SERVICE}/ModelInfer", f"/v2/models/{WORDS}/infer"
        await self._sent(self._vain("grpc, no classes", WORDS), infer, _encoded(words))
        await self._posted(
            self._vain("rest, no classes", WORDS), path, {"inputs": [text], "outputs": [classes]}
        )
        large = InferRequest(WORDS, {"s": np.array([[LARGE_TEXT]], object)})
        await self._sent(self._vain("grpc, too large", WORDS), infer, _encoded(large))
        await self._sent(self._vain("grpc, no request", NOBODY), infer, NO_REQUEST)
        await self._posted(self._vain("rest, no request", NOBODY), path, {"inputs": "none"})
        words.model = f"stranger-{self._dice.randrange(1000)}"
        await self._sent(self._vain("grpc, no model", NOBODY), infer, _encoded(words))
        await self._posted(
            self._vain("rest, no model", NOBODY),
            f"/v2/models/{words.model}/infer",
            {"inputs": [text]},
        )
        self._report.unknown_calls += 2
        with contextlib.suppress(Unsupported):
            await self._clients[0].call(f"/{SERVICE}/ModelGuess", b"", PATIENCE_S)
        async with self._rest.post(f"/v2/models/{WORDS}/guess"):
            pass

    def _vain(self, way: str, model: str) -> _Ask:
        return _Ask(way, model, np.full((1, 3), next(self._numbers), np.float32))

    async def _sent(self, ask: _Ask, path: str, data: bytes) -> None:
        try:
            await self._dice.choice(self._clients).call(path, data, PATIENCE_S)
        except InferenceError as error:
            self._refused(ask, error)
        else:
            self._problem(f"way {ask.way} was answered")
            self._note(ask, OK)

    async def _rest_patient(self) -> None:
        await self._post(self._ask("rest"))

    async def _rest_expiring(self) -> None:
        await self._post(self._ask("rest, timeout", self._timeout_us()))

    async def _rest_leaving(self) -> None:
        ask = self._ask("rest, leaves")
        await self._leaves(ask, self._post(ask))

    async def _post(self, ask: _Ask) -> None:
        body: dict[str, Any] = {
            "inputs": [{
                "name": "x", "datatype": "FP32", "shape": list(ask.rows.shape),
                "data": ask.rows.ravel().tolist(),
            }]
        }  # fmt: skip
        if ask.timeout_us:
            body["parameters"] = {"timeout": ask.timeout_us}
        document = await self._posted(ask, f"/v2/models/{ask.model}/infer", body)
        if document is None:
            return
        (output,) = document["outputs"]
        values = np.array(output["data"], np.float32).reshape(output["shape"])
        self._answered(
            ask,
            InferResponse(
                document["model_name"], document["model_version"], {"logits": values},
                parameters=document["parameters"],
            ),
        )  # fmt: skip

    async def _posted(self, ask: _Ask, url: str, body: Mapping[str, Any]) -> Any:
        """Return the answer to a request; None: it got none, which is noted."""
        limit = aiohttp.ClientTimeout(total=PATIENCE_S)
        try:
            async with self._rest.post(url, json=body, timeout=limit) as answer:
                document = await answer.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            self._problem(f"a REST call broke: {error!r}")
            self._note(ask, "broken")
            return None
        if answer.status != 200:
            error = _by_text(document["error"])
            if error.http_status != answer.status:
                self._problem(f"status {answer.status} for {error}")
            self._refused(ask, error)
            return None
        return document

    # The books

    def _note(self, ask: _Ask, outcome: str) -> None:
        self._report.outcomes[ask.model, ask.way, outcome] += 1

    def _problem(self, text: str) -> None:
        self._report.problems.append(text)

    def _answered(self, ask: _Ask, response: InferResponse) -> None:
        self._note(ask, OK)
        self._report.answered[response.model, response.version] += 1
        digest = str(response.parameters["fogline.digest"])
        factor, version = self._models[ask.model].by_digest[digest]
        if (response.model, response.version) != (ask.model, version):
            self._problem(f"asked {ask.model}, answered {response.model}@{response.version}")
        if not np.array_equal(response.outputs["logits"], ask.rows * factor):
            self._problem(
                f"{ask.model}@{version}, way {ask.way}: asked {ask.rows[0]}, times {factor}, "
                f"got {response.outputs['logits'][0]} of {len(response.outputs['logits'])} rows"
            )

    def _refused(self, ask: _Ask, error: InferenceError) -> None:
        self._note(ask, error.grpc_code)
        expected = (
            isinstance(error, Overloaded)
            or (isinstance(error, BadRequest) and ask.way.endswith(("no classes", "no request")))
            or (isinstance(error, NotFound) and ask.way.endswith("no model"))
            or (isinstance(error, DeadlineExceeded) and ask.timeout_us > 0)
            # A hub that is busy when it tries a model may run a short one in a process too.
            or (isinstance(error, Unavailable) and "signal 9" in str(error))
        )
        if not expected:
            self._problem(f"{ask.model}, way {ask.way}: {error.grpc_code}: {error}")

    # Those who disturb

    async def _load(self, name: str) -> None:
        request = pb.RepositoryModelLoadRequest(model_name=name).SerializeToString()
        await self._clients[0].call(f"/{SERVICE}/RepositoryModelLoad", request, PATIENCE_S)

    async def _switching(self, name: str) -> None:
        """Change the files and have them loaded, over and over."""
        for factor in itertools.cycle((5, 3, 2)):
            if await self._paused(SWITCH_EVERY_S):
                return
            await asyncio.to_thread(self._models[name].put, factor)
            try:
                await self._load(name)
            except InferenceError as error:
                # The engine that loads may be the one that is killed: then the old one stays.
                if "signal 9" not in str(error):
                    self._problem(f"{name} could not be switched: {error}")
            else:
                self._report.switches += 1

    async def _killing(self) -> None:
        """Stop an engine's process for a moment, so that work piles up, then kill it.

        Now and then its successor too, while it loads: then the model has no engine for a while.
        """
        while not await self._paused(KILL_EVERY_S):
            engines = await asyncio.to_thread(self._engines)
            if engines:
                pid = self._dice.choice(engines)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(FROZEN_S)
                    os.kill(pid, signal.SIGKILL)
                    self._report.kills += 1
                    if self._report.kills % 2 == 0:
                        await self._kill_a_newcomer(engines)

    async def _kill_a_newcomer(self, known: Collection[int]) -> None:
        newcomers: set[int] = set()
        while not newcomers and not await self._paused(0.01):
            newcomers = {*await asyncio.to_thread(self._engines)} - {*known}
        for pid in newcomers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self._report.kills += 1

    def _engines(self) -> list[int]:
        found = []
        for child in psutil.Process(self._hub.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "cloud_hub.engines.child" in child.cmdline():
                    found.append(child.pid)
        return found

    async def _paused(self, seconds: float) -> bool:
        """Wait a while; return whether all is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return self._over.is_set()

    # What adds up

    async def _settle(self) -> None:
        """Wait until the hub has dealt with those who left: its counts stand still."""
        limit = time.monotonic() + PATIENCE_S
        before: object = None
        # Both counts, so that they are compared at rest.
        while (now := (await self._by_prometheus(), await self._by_statistics())) != before:
            if time.monotonic() > limit:
                self._problem(f"the hub still works {PATIENCE_S} s after the last request")
                return
            before = now
            await asyncio.sleep(1.0)

    async def _close_books(self) -> None:
        report = self._report
        if (asked := next(self._numbers) - 1) != report.requests:
            self._problem(f"{asked} requests had {report.requests} outcomes")
        counted = report.counted = await self._by_prometheus()
        left = report.total(outcome=LEFT)
        self._within("requests", report.requests - left, counted.total(), report.requests)
        # Whoever sent these stayed for the error, so they are all there.
        for error in (BadRequest.grpc_code, NotFound.grpc_code):
            exact = report.total(model=NOBODY, outcome=error)
            found = counted[NOBODY, "", error.lower()]
            self._within(f"{error} without a model", exact, found, exact)
        reasons = await self._rejections()
        exact = report.total(model=NOBODY, outcome=BadRequest.grpc_code)
        self._within("unreadable", exact, reasons["unreadable"], exact)
        exact = report.unknown_calls
        self._within("unknown calls", exact, reasons["unknown_call"], exact)
        for name in (*self._models, WORDS):
            left = report.total(model=name, outcome=LEFT)
            sent = report.total(model=name)
            ok = report.total(model=name, outcome=OK)
            hub_ok = sum(n for (model, _, how), n in counted.items() if (model, how) == (name, OK))
            hub_all = sum(n for (model, _, _), n in counted.items() if model == name)
            refused = sent - ok - left
            self._within(f"{name}: requests", sent - left, hub_all, sent)
            self._within(f"{name}: answers", ok, hub_ok, ok + left)
            self._within(f"{name}: errors", refused, hub_all - hub_ok, refused + left)
        if report.problems:  # which way the difference went
            told = sorted(f"{'/'.join(key)} {n}" for key, n in report.outcomes.items())
            heard = sorted(f"{'/'.join(key)} {n}" for key, n in counted.items())
            self._problem(f"callers: {', '.join(told)}; hub: {', '.join(heard)}")
        for (name, version), told in report.answered.items():
            left = report.total(model=name, outcome=LEFT)
            self._within(
                f"{name}@{version}: answers", told, counted[name, version, OK], told + left
            )
        for name, version, success, fail in await self._by_statistics():
            of_version = {how: n for (m, v, how), n in counted.items() if (m, v) == (name, version)}
            ok, every = of_version.get(OK, 0), sum(of_version.values())
            self._within(f"{name}@{version}: statistics, success", ok, success, ok)
            self._within(f"{name}@{version}: statistics, all", every, success + fail, every)

    def _within(self, what: str, least: int, found: int, most: int) -> None:
        if not least <= found <= most:
            self._problem(f"{what}: the hub counts {found}, right is {least} to {most}")

    async def _by_statistics(self) -> list[tuple[str, str, int, int]]:
        """Return model, version, successes and failures of what is served now."""
        async with self._rest.get("/v2/models/stats") as answer:
            document = await answer.json()
        return [
            (one["name"], one["version"], *(one["inference_stats"][k]["count"] for k in OUTCOMES))
            for one in document["model_stats"]
        ]

    async def _rejections(self) -> Counter[str]:
        text = await self._metrics()
        found = re.findall(r'^fogline_hub_rejections_total\{reason="(.*)"\} (\S+)$', text, re.M)
        return Counter({reason: int(float(value)) for reason, value in found})

    async def _metrics(self) -> str:
        async with self._rest.get("/metrics") as answer:
            return await answer.text()

    async def _by_prometheus(self) -> Counter[tuple[str, str, str]]:
        text = await self._metrics()
        found: Counter[tuple[str, str, str]] = Counter()
        for labels, value in re.findall(r"^fogline_hub_requests_total\{(.*?)\} (\S+)$", text, re.M):
            label = dict(re.findall(r'(\w+)="(.*?)"', labels))
            found[label["model"], label["version"], label["outcome"]] += int(float(value))
        return found


def _encoded(request: InferRequest) -> bytes:
    """Return a request as bytes, with the classes that it asks for."""
    message = pb.ModelInferRequest.FromString(inference.encode_request(request))
    del message.outputs[:]
    for name, classes in request.classification.items():
        output = message.outputs.add(name=name)
        output.parameters["classification"].int64_param = classes
    return message.SerializeToString()


def _by_text(text: str) -> InferenceError:
    """Return the error that a text stands for: streams carry no codes."""
    for kind, mark in (
        (DeadlineExceeded, "deadline"), (Overloaded, "rows are waiting"), (Unavailable, "engine"),
        (BadRequest, "classification needs"), (BadRequest, "inputs must be"),
        (BadRequest, "malformed protobuf"),
        (NotFound, "unknown model"),
    ):  # fmt: skip
        if mark in text:
            return kind(text)
    return ServerFault(text)
