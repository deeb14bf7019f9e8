"""The composition root: builds the hub's parts, joins them, and stops them in order.

The only file that knows all sides. ``fogline serve`` and the system tests both use ``Hub``.

Start                                           Stop
  1 TLS files; lock the data directory            not ready, endpoints.json goes; serving on for
  2 models of the directory: load, warm             drain_notice_s: load balancers turn elsewhere
  3 gRPC door, or front processes: it answers     new inference is refused with a hint, at open
    for these models, and is not ready              doors; what is in flight has drain_s
  4 database: open, migrate; whoever showed a     HTTP door: the console's and devices' calls finish
    token waits until then                        broker, links
  5 fleet: sign what is due, start the broker;    gRPC door: streams that lie idle are ended
    models of the registry: load, warm; ready     engines, which nobody uses
  6 HTTP door: REST, console, files, metrics      examples, history are written; database closes
  7 endpoints.json names them all                 the lock goes with the process

From 3 on the hub answers while it does the rest, most of which is importing it. So what only 4 to
6 need is imported there, on a thread; test_start.py holds what 1 to 3 must do without. Where other
machines reach the gRPC door, 4 comes before 3: it does not open if nobody could be let in.
"""

import asyncio
import contextlib
import errno
import fcntl
import importlib
import json
import logging
import os
import re
import ssl
import tempfile
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cloud_hub import metrics as metrics_module
from cloud_hub.config import ENDPOINTS, HubConfig, called_here, is_loopback, split_address
from cloud_hub.engines.launch import Launcher
from cloud_hub.errors import StartRefused
from cloud_hub.fleet import reports
from cloud_hub.fleet.callers import Caller, CallerLimits
from cloud_hub.front.fronts import Fronts
from cloud_hub.inference import admission, tracing
from cloud_hub.inference.acceleration import Acceleration
from cloud_hub.inference.cache import ResponseCache
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics, Served
from fogline_protocol import door_memory, grpc_service, grpc_transport
from fogline_protocol.door_memory import Memory
from fogline_protocol.doors import Extras
from fogline_protocol.settings import LogSettings
from fogline_protocol.shared_memory import SharedMemory

if TYPE_CHECKING:
    from aiohttp import web

    from cloud_hub.fleet.devices import Devices
    from cloud_hub.fleet.fleet import Fleet
    from cloud_hub.fleet.identity import Identity
    from cloud_hub.insight.examples import Examples
    from cloud_hub.insight.history import History
    from cloud_hub.store.store import Store

DATABASE = "hub.sqlite"
EXAMPLES = "examples"  # folder in the data directory
CLOSE_S = 1.0  # for answers on their way out of the gRPC door; then idle streams are ended

# What the models of the directory are answered without: the database, and most of the rest.
_STORED = ("cloud_hub.fleet.identity", "cloud_hub.insight.history", "cloud_hub.insight.examples")
_LATER = ("cloud_hub.console.app", "cloud_hub.fleet.fleet", "cloud_hub.inference.registry")

_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)

log = logging.getLogger("fogline.hub")


class Hub:
    """One running hub: ``async with Hub(config) as hub: await hub.wait_stopped()``."""

    store: "Store"  # these from step 4 on
    identity: "Identity"
    devices: "Devices"
    history: "History"
    examples: "Examples"
    fleet: "Fleet"  # from step 5 on

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self.grpc_address = ""
        self.http_address = ""
        self.metrics = Metrics()
        self._launcher = Launcher(config.threads, config.run_limit_s)
        self._acceleration = (
            Acceleration(self._launcher, config.data / "plans")
            if config.tensorrt == "auto"
            else None
        )
        self.repository = Repository(
            self.metrics,
            self._launcher,
            Limits(config.max_batch, config.max_queue_rows),
            config.model_control,
            self._acceleration,
        )
        defaults = CallerLimits(config.caller_rate, 0, config.caller_concurrency)
        cache = (
            ResponseCache(config.cache_bytes, config.cache_ttl_s) if config.cache_bytes else None
        )
        if cache is not None:
            self.metrics.watch_cache(lambda: cache.bytes)
        self.server = HubServer(
            config.name,
            self.repository,
            self.metrics,
            admission.Admission(defaults, self.metrics),
            cache,
        )
        self.metrics.watch(
            lambda: [
                Served(
                    model.statistics,
                    model.batcher.engines,
                    *model.batcher.depth,
                    sum(engine.memory_bytes for engine in model.engines),
                )
                for model in self.repository.find_all("", "")
            ]
        )
        self._extras = Extras(
            shared_memory=SharedMemory(max_request_bytes=config.max_message_bytes)
            if config.allow_shared_memory
            else None,
            trace=self.server if config.trace_dir is not None else None,
            trace_refusal=tracing.REFUSAL,
            # Whoever may call from elsewhere may not mute what the operator reads.
            logs=LogSettings("fogline", "cloud_hub")
            if is_loopback(config.grpc) and is_loopback(config.http)
            else None,
        )
        limit = config.door_memory_bytes or door_memory.default_limit(config.max_message_bytes)
        # Of the doors of this process; each front has one as large.
        self.memory = Memory(
            door_memory.share(limit, 1 + config.front_processes, config.max_message_bytes),
            lambda: self.metrics.rejected("memory"),
        )
        self._stored = asyncio.Event()  # when the database is open
        # The same counts arrive over gRPC and over MQTT.
        self._count: reports.Accept = reports.too_early
        self._certificate = ""  # that the doors show, as PEM; empty without TLS
        self._ended: list[str] = []  # parts that should run as long as the hub
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start.

        Raises:
            StartRefused: the data directory or a port is in use, or a needed token is missing.
        """
        try:
            await self._start()
        except BaseException:
            await self._parts.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drain and stop."""
        try:
            self.server.draining = True
            (self.config.data / ENDPOINTS).unlink(missing_ok=True)
            await asyncio.sleep(self.config.drain_notice_s)
            left = await self.server.drain(self.config.drain_s)
            if left:
                log.warning("%d requests are broken off: drain_s is over", left)
        finally:
            await self._parts.aclose()

    async def _start(self) -> None:
        data = self.config.data
        tls = self._ssl_context()
        self._parts.enter_context(_locked(data))
        # It closes after all that follows, whenever it is opened.
        database = await self._parts.enter_async_context(contextlib.AsyncExitStack())
        self._parts.push_async_callback(self.repository.close)
        if self._acceleration is not None:
            await self._acceleration.find()
        self.repository.complete = False
        if self.config.models is not None:
            await self.repository.load_directory(self.config.models)
        if self.config.trace_dir is not None:
            self.server.tracer = tracing.Tracer(self.config.trace_dir)
            self._parts.push_async_callback(asyncio.to_thread, self.server.tracer.close)
        if not is_loopback(self.config.grpc):
            await self._open_database(database)
        self.grpc_address = await self._open_grpc()
        if not self._stored.is_set():
            await self._open_database(database)

        await asyncio.to_thread(_import, _LATER)
        from cloud_hub.fleet.fleet import Fleet
        from cloud_hub.inference.registry import Registry

        self.fleet = Fleet(
            self.store,
            data,
            self._launcher.open_apart,  # nothing is known yet of what is pushed
            self.devices,
            reports.checked(self._count),
            self.history.forget,
        )
        await self._parts.enter_async_context(self.fleet.running(self.config.mqtt))
        registry = Registry(self.fleet.releases, self.repository, data / "serving")
        await registry.serve()
        self.repository.complete = True
        self._keep("registry", registry.follow())
        if self.config.models is not None and self.config.model_control == "poll":
            self._keep("poll", self.repository.keep_polling(self.config.poll_s))
        self.http_address = await self._open_http(tls)
        endpoints = {"grpc": self.grpc_address, "http": self.http_address}
        # How this machine's commands call it, and the certificate by which they know it: that
        # is seldom one for 127.0.0.1, or by an authority that they have heard of.
        endpoints["url"] = f"{self.scheme}://{called_here(self.http_address)}"
        if self._certificate:
            endpoints["certificate"] = self._certificate
        if self.fleet.broker:
            endpoints["mqtt"] = self.fleet.broker
        _write_endpoints(data / ENDPOINTS, endpoints)
        self._parts.callback((data / ENDPOINTS).unlink, missing_ok=True)

    async def _open_database(self, closed_with: contextlib.AsyncExitStack) -> None:
        await asyncio.to_thread(_import, _STORED)
        from cloud_hub.fleet.devices import Devices
        from cloud_hub.fleet.identity import Identity
        from cloud_hub.insight.example_files import ExampleFiles
        from cloud_hub.insight.examples import DAY_S, Bounds, Examples
        from cloud_hub.insight.history import History
        from cloud_hub.store.store import Store

        self.store = await Store.open(f"sqlite:///{self.config.data / DATABASE}")
        closed_with.push_async_callback(self.store.close)
        self.identity = Identity(self.store)
        self.devices = await Devices.open(self.store, self.config.offline_after_s)
        self.history = await History.open(self.store, self.devices)
        closed_with.push_async_callback(self.history.close)
        bounds = Bounds(
            self.config.examples_quota_bytes, self.config.examples_retention_days * DAY_S
        )
        files = ExampleFiles(self.config.data / EXAMPLES)
        self.examples = await closed_with.enter_async_context(
            Examples(self.store, files, bounds, self.metrics.of_examples())
        )
        self.server.keeper = self.examples
        self._count = lambda report: self.history.accept(report, time.time())
        self._stored.set()

    async def _authenticate(self, secret: str) -> Caller | None:
        await self._stored.wait()  # who shows a token is not turned away for being early
        return await self.identity.authenticate(secret)

    def _keep(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run ``work`` until the hub stops."""
        task = asyncio.create_task(work, name=name)

        def ended(done: asyncio.Task[None]) -> None:
            if not done.cancelled():  # it should never: a mistake of our own
                log.error("a part of the hub has ended", exc_info=done.exception())
                self._ended.append(name)

        task.add_done_callback(ended)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._parts.push_async_callback(end)

    async def _open_grpc(self) -> str:
        address = self.config.grpc
        guarded = await self._is_guarded(address)
        methods = {
            **grpc_service.methods(self.server, self.server, self._extras),
            **grpc_service.health_methods(self.server),
            # Until the HTTP door is open there is nothing to tell: devices ask again.
            **reports.methods(
                lambda report: self._count(report),
                lambda: self.fleet.contact(self.url) if self.http_address else reports.NOT_YET,
            ),
        }
        host, port = split_address(address)
        # Inference has been drained by the time it ends.
        grace_s = min(CLOSE_S, self.config.drain_s)
        if self.config.front_processes:
            answer = admission.passed_on(methods, self._callers(guarded), self.server)
            self.fronts = Fronts(self.config, self.memory.limit, answer, self.server)
            self._parts.push_async_callback(self.fronts.stop, grace_s)
            await self.fronts.start(self.config.front_processes)
            return _joined(host, self.fronts.port)
        door = grpc_transport.new_door(
            self.config.door,
            methods,
            max_message_bytes=self.config.max_message_bytes,
            admit=admission.admitting(self._callers(guarded)),
            memory=self.memory,
            books=self.server,
        )
        self._parts.push_async_callback(door.stop, grace_s)
        tls = None
        if self.config.tls_cert is not None and self.config.tls_key is not None:
            tls = grpc_transport.Pair(self.config.tls_cert, self.config.tls_key)
        try:
            return _joined(host, await door.listen(host, port, tls))
        except OSError:
            raise StartRefused(
                f"cannot listen on {address} (gRPC): the port is in use or the address is not "
                "this machine's; choose another with --grpc HOST:PORT"
            ) from None

    async def _open_http(self, tls: ssl.SSLContext | None) -> str:
        from aiohttp import web

        from cloud_hub.console.app import add_console
        from fogline_protocol import rest_service

        address = self.config.http
        guarded = await self._is_guarded(address)
        app = web.Application(
            client_max_size=self.config.max_message_bytes,
            middlewares=[
                *([] if guarded else [rest_service.local_only]),
                admission.rest_middleware(self._callers(guarded)),
            ],
        )
        rest_service.add_routes(
            app, self.server, self.server, self._extras, self.memory, self.server
        )
        app.router.add_routes(self.fleet.routes())
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._render_metrics)
        add_console(
            app,
            history=self.history,
            devices=self.devices,
            fleet=self.fleet,
            scratch=self.config.data / "uploads",
            models=self.repository.status,
            examples=self.examples,
            authenticate=self.identity.authenticate if guarded else None,
            hub_name=self.config.name,
            grpc_address=self.grpc_address,
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=self.config.drain_s)
        await runner.setup()
        self._parts.push_async_callback(runner.cleanup)
        host, port = split_address(address)
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        try:
            await site.start()
        except OSError as error:
            reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise StartRefused(
                f"cannot listen on {address} (HTTP): {reason}; choose another with --http HOST:PORT"
            ) from None
        return _joined(host, runner.addresses[0][1])

    @property
    def scheme(self) -> str:
        """How its HTTP door is spoken to."""
        return "https" if self.config.tls_cert else "http"

    @property
    def url(self) -> str:
        """The hub's own HTTP address as a URL."""
        return f"{self.scheme}://{self.http_address}"

    def _callers(self, guarded: bool) -> admission.Callers:
        return admission.Callers(self._authenticate, required=guarded, metrics=self.metrics)

    async def _is_guarded(self, address: str) -> bool:
        """Return whether callers of this door must show a token; refuse if nobody could."""
        if is_loopback(address):
            return False
        if not await self.identity.any_valid(time.time()):
            raise StartRefused(
                f"{address} can be reached from other machines, and no valid token exists: make "
                f"one with `fogline token create --data {self.config.data}`"
            )
        return True

    def _ssl_context(self) -> ssl.SSLContext | None:
        if self.config.tls_cert is None or self.config.tls_key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.config.tls_cert, self.config.tls_key)
        except OSError as error:  # ssl.SSLError is one
            raise StartRefused(
                f"{self.config.tls_cert} and {self.config.tls_key} are no TLS pair: "
                f"{error.strerror or error}"
            ) from None
        # The first of a chain is the one that is shown.
        found = _CERTIFICATE.search(self.config.tls_cert.read_text("ascii", "replace"))
        self._certificate = found[0] if found else ""
        return context

    async def _healthz(self, _request: "web.Request") -> "web.Response":
        return _json_response({"alive": True})

    async def _readyz(self, _request: "web.Request") -> "web.Response":
        reasons = [f"model {status.name}: {status.reason}" for status in self.repository.refused]
        reasons += [f"the part {name!r} of the hub has failed, see its log" for name in self._ended]
        if self.server.draining:
            reasons.append("the hub is shutting down")
        return _json_response({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def _render_metrics(self, _request: "web.Request") -> "web.Response":
        from aiohttp import web

        return web.Response(
            body=self.metrics.render(), headers={"Content-Type": metrics_module.CONTENT_TYPE}
        )


def _import(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)


def _json_response(document: Mapping[str, object], status: int = 200) -> "web.Response":
    from aiohttp import web

    return web.json_response(document, status=status)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Hold the data directory for this process alone; the lock ends with the process."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartRefused(f"data directory {data}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartRefused(
                f"data directory {data} is in use by another hub: stop it or choose another --data"
            ) from None
        (data / ENDPOINTS).unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


def _write_endpoints(path: Path, endpoints: dict[str, str]) -> None:
    """Write in one step: a reader sees all addresses or no file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        json.dump(endpoints, file)
    os.replace(name, path)
