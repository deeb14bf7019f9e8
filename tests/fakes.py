"""Fakes that play the real part, over real transport, and pass the same contract tests.

``FakeHub`` is an Open Inference server with a tiny model and faults to order; ``Serving``
puts any server behind a real gRPC door on loopback, takes it away and brings it back.
``Valve`` is a TCP relay in which packets can vanish.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np

from fogline_protocol import examples, grpc_service, grpcio_door, inference
from fogline_protocol.errors import BadRequest, InferenceError, NotFound
from fogline_protocol.examples import EdgeAnswer
from fogline_protocol.inference import (
    InferenceServer,
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    ServerMetadata,
)
from fogline_protocol.model_config import ModelConfig
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import Array, TensorSpec

HUB_MODEL = "judge"
HUB_DIGEST = "b" * 64


class FakeHub:
    """A hub that knows one model, ``judge``: ``x`` FP32 [n, 3] -> ``logits`` = x + 100.

    What it is told to do wrong is in its attributes; what it was asked is in ``requests``.
    """

    def __init__(self) -> None:
        self.requests: list[InferRequest] = []
        self.error: InferenceError | None = None  # answer with this
        self.errors: list[InferenceError] = []  # or once with each of these, first
        self.gate = asyncio.Event()  # answers wait for it
        self.gate.set()
        self.ready = True
        self.digest = HUB_DIGEST
        self.keeps = False  # examples, of requests marked so
        self.kept: list[EdgeAnswer] = []
        self.max_rows = 1_000_000
        self.statistics = ModelStatistics(HUB_MODEL, "1")
        self.answer: Callable[[Mapping[str, Array]], dict[str, Array]] = plus_hundred

    def server_metadata(self) -> ServerMetadata:
        return ServerMetadata("fake-hub", "1")

    def server_ready(self) -> bool:
        return self.ready

    def model_ready(self, name: str, version: str) -> bool:
        self.model_metadata(name, version)
        return self.ready

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        if name != HUB_MODEL:
            raise NotFound(f"no model {name!r} here, there is {HUB_MODEL}")
        if version not in ("", "1"):
            raise NotFound(f"model {name!r} has version 1, got {version!r}")
        return ModelMetadata(
            name=name,
            versions=("1",),
            platform="fake",
            inputs=(TensorSpec("x", "FP32", (-1, 3)),),
            outputs=(TensorSpec("logits", "FP32", (-1, 3)),),
        )

    def model_config(self, name: str, version: str) -> ModelConfig:
        contract = self.model_metadata(name, version)
        return ModelConfig(name, 64, contract.inputs, contract.outputs)

    def model_statistics(self, name: str, version: str) -> Sequence[ModelStatistics]:
        if name:
            self.model_metadata(name, version)
        return (self.statistics,)

    async def infer(self, request: InferRequest, deadline: float | None) -> InferResponse:
        self.requests.append(request)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        if self.error is not None:
            raise self.error
        contract = self.model_metadata(request.model, request.version)
        kept: dict[str, Parameter] = {}
        if self.keeps and request.parameters.get(examples.KEEP) is True:
            kept[examples.KEEPS] = True
            inputs, said = examples.detach(request.inputs, request.parameters)
            request = dataclasses.replace(request, inputs=inputs)
            if said is not None:
                self.kept.append(said)
        inference.check_inputs(contract.inputs, request.inputs)
        names = inference.check_outputs(contract.outputs, request.outputs)
        if len(request.inputs["x"]) > self.max_rows:
            raise BadRequest(f"at most {self.max_rows} rows")
        outputs = self.answer(request.inputs)
        self.statistics.executed(len(request.inputs["x"]), (0,), 0, 0, 0)
        self.statistics.success.add(0)
        return InferResponse(
            model=request.model,
            version="1",
            id=request.id,
            outputs={name: outputs[name] for name in names},
            parameters={
                "fogline.tier": "hub",
                "fogline.digest": self.digest,
                "fogline.release": "judge@1",
                **kept,
            },
        )

    @property
    def rows_asked(self) -> list[int]:
        """The rows of each request, in order of arrival."""
        return [len(request.inputs["x"]) for request in self.requests]


def plus_hundred(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"logits": inputs["x"] + np.float32(100)}


class Serving:
    """Any ``InferenceServer`` behind a real gRPC door: ``async with Serving(hub) as door``."""

    def __init__(self, server: InferenceServer, handlers: Sequence[object] = ()) -> None:
        self._server = server
        self._handlers = handlers
        self._door: object | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Open the door, on the same port as before if there was one."""
        door = grpcio_door.new_server()
        ours = grpcio_door.handler(grpc_service.methods(self._server), {grpc_service.STREAM})
        door.add_generic_rpc_handlers((ours, *self._handlers))  # type: ignore[arg-type]
        self.port = door.add_insecure_port(self.address)
        await door.start()
        self._door = door

    async def stop(self) -> None:
        """Be gone: calls in flight break, new ones find nobody."""
        if self._door is not None:
            await self._door.stop(None)  # type: ignore[attr-defined]
            self._door = None


class Valve:
    """A TCP relay to ``target`` whose packets vanish while it is shut, as on a lost radio link.

    Connections that were open when it was shut never work again, like those whose
    retransmission timer has backed off; new ones pass as soon as it is open.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._open = True
        self._relays: set[asyncio.Task[None]] = set()
        self.address = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    def shut(self) -> None:
        self._open = False

    def open(self) -> None:
        self._open = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        self._relays.add(relay)
        born_open = self._open
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        dead = asyncio.Event()

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if not (born_open and self._open):
                    dead.set()
                if dead.is_set():
                    continue
                sink.write(data)
                await sink.drain()

        try:
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._relays.discard(relay)
            for end in (writer, far_writer):
                end.close()
                with contextlib.suppress(ConnectionError):
                    await end.wait_closed()
