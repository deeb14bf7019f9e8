"""A small server for the doors: one model ``echo`` that gives its inputs back, and its fixtures."""

import contextlib

from aiohttp import web

from fogline_protocol import grpc_service, grpc_transport, rest_service
from fogline_protocol.doors import NOTHING_EXTRA
from fogline_protocol.errors import BadRequest, NotFound
from fogline_protocol.inference import InferResponse, ModelMetadata, ServerMetadata
from fogline_protocol.model_config import ModelConfig
from fogline_protocol.repository import ModelIndex
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import TensorSpec

IN = TensorSpec("x", "FP32", (-1, 4))


class EchoServer:
    """Answers with its inputs, whatever they are; ``refuse`` fails. Slow ones wait for a gate."""

    def __init__(self):
        self.statistics = ModelStatistics("echo", "1")
        self.gates = {}  # by request id
        self.labels = {"x": ("cat", "dog")}
        self.calls = []
        self.ready = True

    def server_metadata(self):
        return ServerMetadata("echo", "1", ("statistics",))

    def server_ready(self):
        return self.ready

    def model_metadata(self, name, version):
        self._known(name)
        return ModelMetadata(name, ("1",), "test", (IN,), (IN,))

    def model_ready(self, name, version):
        self._known(name)
        return True

    def model_config(self, name, version):
        self._known(name)
        return ModelConfig(name, 8, (IN,), (IN,), labels=self.labels)

    def model_statistics(self, name, version):
        if name:
            self._known(name)
        return (self.statistics,)

    async def infer(self, request, deadline):
        self._known(request.model)
        self.calls.append(request)
        if request.parameters.get("refuse"):
            raise BadRequest("refused as asked")
        if request.id in self.gates:
            await self.gates[request.id].wait()
        self.statistics.executed(1, (5,), 1, 2, 3)
        names = request.outputs or list(request.inputs)
        outputs = {name: request.inputs[name] for name in names if name in request.inputs}
        return InferResponse(request.model, "1", outputs, request.id, dict(request.parameters))

    def repository_index(self):
        return (
            ModelIndex("echo", "1", "READY"),
            ModelIndex("broken", "2", "UNAVAILABLE", "not a model"),
        )

    async def load_model(self, name, parameters):
        self.calls.append(("load", name, tuple(parameters)))

    async def unload_model(self, name):
        self.calls.append(("unload", name))

    def _known(self, name):
        if name != "echo":
            raise NotFound(f"unknown model {name!r}, served is 'echo'")


@contextlib.asynccontextmanager
async def grpc_door(server, control=None, extras=NOTHING_EXTRA, *, kind="http2", **options):
    methods = {
        **grpc_service.methods(server, control, extras),
        **grpc_service.health_methods(server),
    }
    door = grpc_transport.new_door(kind, methods, **options)
    port = await door.listen("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await door.stop(None)


@contextlib.asynccontextmanager
async def rest_door(
    server, control=None, extras=NOTHING_EXTRA, *, max_bytes=1 << 20, middlewares=(), **options
):
    app = web.Application(client_max_size=max_bytes, middlewares=middlewares)
    rest_service.add_routes(app, server, control, extras, **options)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
