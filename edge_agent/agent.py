"""The composition root: builds the agent's parts, joins them, and stops them in order.

The only file that knows all sides. ``fogline-agent run``, applications that hold the agent
in their own process, and the tests all use ``Agent``.

Start                                             Stop
  1 lock the data directory                         readiness turns false
  2 load what was committed last, or the bundles    gRPC, HTTP: no new calls, those in flight finish
    given by hand, once they passed their self-test telemetry: one last report; fleet link
  3 uplink, fleet link: connect in the background   uplink
  4 telemetry                                       engines
  5 gRPC doors: loopback, Unix socket               the lock goes with the process
  6 HTTP door
  7 endpoints.json names them all

Nothing on the way of the start waits for the network.
"""

import asyncio
import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from edge_agent import config as options
from edge_agent.config import OFF, AgentConfig
from edge_agent.errors import ConfigRefused, StartRefused
from edge_agent.fleet.telemetry import FAREWELL_TIMEOUT_S, Link, Telemetry
from edge_agent.inference.audits import Audits
from edge_agent.inference.router import Router
from edge_agent.inference.uplink import Uplink
from edge_agent.managed import Managed
from edge_agent.runtime import providers
from edge_agent.update.by_hand import ByHand
from edge_agent.update.selftest import ChildSelfTest
from fogline_protocol import door_memory, grpc_service, grpc_transport, rest_service
from fogline_protocol.client import Client, Credentials
from fogline_protocol.door_memory import Memory
from fogline_protocol.doors import Extras
from fogline_protocol.inference import InferRequest, InferResponse
from fogline_protocol.settings import LogSettings
from fogline_protocol.shared_memory import SharedMemory

ENDPOINTS = "endpoints.json"


class Agent:
    """One running agent: ``async with Agent(config) as agent: await agent.infer(request)``."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.endpoints: dict[str, str] = {}  # door -> address in use
        self.uplink: Uplink | None = None
        if config.hub:
            self.uplink = Uplink(
                connection(config),
                max_rows=config.escalation_rows,
                max_requests=config.escalation_requests,
            )
        self.telemetry = Telemetry(
            device=config.device,
            hardware_class=providers.hardware_class(config.provider or providers.usable()[0]),
            link=self._link,
        )
        self.router = Router(
            uplink=self.uplink,
            observer=self.telemetry,
            private=config.private,
            deadline_s=config.deadline_s,
            max_concurrency=config.max_concurrency,
            device=config.device,
            keep=config.keep,
            audits=Audits(config.audit_rate),
        )
        self._extras = Extras(
            shared_memory=SharedMemory(max_request_bytes=config.max_message_bytes)
            if config.allow_shared_memory
            else None,
            logs=LogSettings("fogline", "edge_agent"),
        )
        limit = config.door_memory_bytes or door_memory.default_limit(config.max_message_bytes)
        self._memory = Memory(limit)  # of all doors
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start.

        Raises:
            StartRefused: the data directory, a port or the socket is in use.
            ReleaseRefused: a bundle is not intact, cannot run here or fails its self-test.
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
        """Finish what is in flight within ``drain_s``, then stop."""
        self.router.draining = True
        await self._parts.aclose()

    async def infer(self, request: InferRequest, timeout_s: float | None = None) -> InferResponse:
        """Answer a request of an application in this process, as a door would.

        Raises:
            InferenceError: see ``Router.infer``.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return await self.router.infer(request, deadline)

    async def _start(self) -> None:
        config = self.config
        self._parts.enter_context(_locked(config.data))
        self._parts.callback(self.router.close)
        if self.uplink is None:
            by_hand = ByHand(
                config.data, ChildSelfTest(), provider=config.provider, threads=config.threads
            )
            for path in config.bundle:
                self.router.install(await by_hand.load(path))
        else:
            managed = self._manage(self.uplink)
            await managed.restore()
            self.router.watch_consent()
            await self._parts.enter_async_context(self.uplink)
            following = asyncio.create_task(managed.run(), name="managed")
            self._parts.push_async_callback(_ended, following)
            # Stopped before the link: a report after its farewell would make us online again.
            if config.telemetry_interval_s > 0:
                await self._start_telemetry(self.uplink)
        await self._open_grpc()
        await self._open_http()
        _write_endpoints(config.data / ENDPOINTS, self.endpoints)
        self._parts.callback((config.data / ENDPOINTS).unlink, missing_ok=True)

    def _manage(self, uplink: Uplink) -> Managed:
        return Managed(
            self.config,
            self.router,
            uplink,
            version=metadata.version("fogline"),
            hardware=providers.hardware_class(self.config.provider or providers.usable()[0]),
        )

    async def _start_telemetry(self, uplink: Uplink) -> None:
        reporter = asyncio.create_task(
            self.telemetry.keep_reporting(uplink, self.config.telemetry_interval_s),
            name="telemetry",
        )

        async def stop() -> None:
            reporter.cancel()
            await asyncio.gather(reporter, return_exceptions=True)
            if uplink.link_up:
                await self.telemetry.report(uplink, FAREWELL_TIMEOUT_S)

        self._parts.push_async_callback(stop)

    async def _open_grpc(self) -> None:
        config = self.config
        if config.grpc == OFF and config.unix == OFF:
            return
        methods = {
            **grpc_service.methods(self.router, extras=self._extras),
            **grpc_service.health_methods(self.router),
        }
        door = grpc_transport.new_door(
            config.door,
            methods,
            max_message_bytes=config.max_message_bytes,
            memory=self._memory,
            books=self.router,
        )
        self._parts.push_async_callback(door.stop, config.drain_s)
        try:
            if config.grpc != OFF:
                what, flag = config.grpc, "--grpc HOST:PORT"
                host, port = options.split_address(config.grpc)
                self.endpoints["grpc"] = _joined(host, await door.listen(host, port))
            if config.unix != OFF:
                what, flag = config.unix, "--unix PATH"
                path = _free_socket(config.unix)
                await door.listen_unix(path)
                self.endpoints["unix"] = str(path)
                self._parts.callback(path.unlink, missing_ok=True)
        except OSError:
            raise StartRefused(
                f"cannot listen on {what} (gRPC): it is in use, or this process may not; "
                f"choose another with {flag}"
            ) from None

    async def _open_http(self) -> None:
        config = self.config
        if config.http == OFF:
            return
        app = web.Application(
            client_max_size=config.max_message_bytes, middlewares=[rest_service.local_only]
        )
        rest_service.add_routes(
            app, self.router, extras=self._extras, memory=self._memory, books=self.router
        )
        runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=config.drain_s,
            handler_cancellation=True,  # a caller who leaves takes its work along, as over gRPC
        )
        await runner.setup()
        self._parts.push_async_callback(runner.cleanup)
        host, port = options.split_address(config.http)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise StartRefused(
                f"cannot listen on {config.http} (HTTP): {reason}; "
                "choose another with --http HOST:PORT"
            ) from None
        self.endpoints["http"] = _joined(host, runner.addresses[0][1])

    def _link(self) -> Link:
        if self.uplink is None:
            return Link("no hub", 0, 0)
        counts = self.uplink.counts
        return Link(self.uplink.state, counts.bytes_sent, counts.bytes_received)


def connection(config: AgentConfig) -> Callable[[], Client]:
    """Return what makes connections to the hub; one sends nothing before its first call.

    The files are read once, here: a restart takes new ones.

    Raises:
        ConfigRefused: one of them cannot be read.
    """
    credentials = None
    if config.hub_uses_tls:
        try:
            authority = None if config.hub_ca is None else config.hub_ca.read_bytes()
            token = ""
            if config.hub_token_file is not None:
                token = config.hub_token_file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigRefused(f"{error.filename}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigRefused(f"{config.hub_token_file}: not a token, which is ASCII") from None
        credentials = Credentials(authority, token)
    return functools.partial(
        Client, config.hub, credentials=credentials, max_message_bytes=config.max_message_bytes
    )


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Hold the data directory for this agent alone; the lock ends with the process."""
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
                f"data directory {data} is in use by another agent: "
                "stop it, or choose another with --data DIR"
            ) from None
        # What a killed agent left behind names doors that nobody answers.
        (data / ENDPOINTS).unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)


def _free_socket(name: str) -> Path:
    """Return the absolute path, free to bind: what a killed agent left there is removed.

    Raises:
        StartRefused: somebody serves on it, or it is not a socket.
    """
    path = Path(name).absolute()
    try:
        kind = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise StartRefused(f"--unix {path}: there is no directory {path.parent}") from None
        return path
    except OSError as error:
        raise StartRefused(f"--unix {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(kind):
        raise StartRefused(f"--unix {path}: there is a file that is not a socket; remove it first")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StartRefused(f"--unix {path}: {error.strerror}") from None
        else:
            raise StartRefused(
                f"--unix {path}: another process serves on this socket; choose another path"
            )
    return path


def _write_endpoints(path: Path, endpoints: dict[str, str]) -> None:
    """Write in one step: a reader sees all addresses or no file.

    Raises:
        StartRefused: the directory takes no file.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(endpoints, file)
        os.replace(name, path)
    except OSError as error:
        raise StartRefused(f"{path}: {error.strerror}") from None
