"""What the console's tests play on: a fleet whose figures are set by hand, and a served console."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from aiohttp import web

from cloud_hub.console.access import Authenticate
from cloud_hub.console.app import add_console
from cloud_hub.fleet.callers import Caller
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.insight.examples import Examples
from cloud_hub.insight.history import Decided, DeviceLine, Overview, Series
from fogline_protocol.door_memory import Memory
from fogline_protocol.rest_bodies import Bodies
from fogline_protocol.rest_service import BODIES

NOW = 1_790_000_000.0
POINTS = 60
TOKEN = "fgl_right"
NOBODY = SimpleNamespace(controller=None, releases=None, certificates=None)


@dataclass
class HubModel:
    name: str
    version: str
    state: str
    reason: str = ""
    provider: str = "CPUExecutionProvider"


DIGITS = HubModel("digits-hub", "1", "READY")
BROKEN = HubModel("shelf-hub", "4", "UNAVAILABLE", "model.onnx is not an ONNX file", "")


def device(name: str, *, online: bool = True, last_seen: float = NOW - 1) -> DeviceLine:
    return DeviceLine(
        name=name,
        online=online,
        last_seen=last_seen,
        hardware_class="x86_64-avx2/cpu/onnxruntime-1.32",
        agent_version="0.1.0",
        link="closed",
        rss_bytes=84_000_000,
        requests_per_s=12.5,
        rows=600,
        share_edge=0.81,
        share_degraded=0.0,
    )


def empty(window_s: float = 300.0) -> Overview:
    """A hub that no device has reported to."""
    nothing: Sequence[None] = [None] * POINTS
    step_s = window_s / POINTS
    return Overview(
        window_s=window_s,
        requests_per_s=0.0,
        rows=0,
        rows_total=0,
        share_edge=None,
        share_degraded=None,
        degraded_reasons={},
        latency_ms={},
        bytes_sent=0,
        bytes_received=0,
        escalation_bytes_sent_total=0,
        agents_seen=0,
        agents_online=0,
        devices=[],
        series=Series(
            step_s=step_s,
            at=[NOW - window_s + i * step_s for i in range(POINTS)],
            requests_per_s_edge=[0.0] * POINTS,
            requests_per_s_hub=[0.0] * POINTS,
            share_edge=nothing,
            p95_ms_edge=nothing,
            p95_ms_hub=nothing,
        ),
    )


def busy(window_s: float = 300.0) -> Overview:
    """Three devices at work, one of them silent for four minutes."""
    quiet = empty(window_s)
    return replace(
        quiet,
        requests_per_s=25.04,
        rows=7512,
        rows_total=1_204_331,
        share_edge=0.823,
        share_degraded=0.0214,
        degraded_reasons={"hub_unreachable": 150, "deadline": 11},
        latency_ms={
            "edge": {"p50": 0.31, "p95": 0.52, "p99": 0.93},
            "hub": {"p50": 4.6, "p95": 9.41, "p99": 18.2},
        },
        bytes_sent=8_123_000,
        bytes_received=911_000,
        escalation_bytes_sent_total=193_441_000,
        agents_seen=3,
        agents_online=2,
        devices=[
            device("camera"),
            device("gate"),
            device("shelf", online=False, last_seen=NOW - 250),
        ],
        series=replace(
            quiet.series,
            requests_per_s_edge=[20.0 + i % 5 for i in range(POINTS)],
            requests_per_s_hub=[5.0 if i < 40 or i > 45 else 0.0 for i in range(POINTS)],
            share_edge=[0.8] * POINTS,
            p95_ms_edge=[0.5] * POINTS,
            p95_ms_hub=[9.0 if i < 40 or i > 45 else None for i in range(POINTS)],
        ),
    )


class Figures:
    """Stands for the history: its figures are what the test says."""

    def __init__(self, figures: Overview) -> None:
        self.figures = figures
        self.asked: list[float] = []

    def overview(self, now: float, window_s: float) -> Overview:
        self.asked.append(window_s)
        return replace(self.figures, window_s=window_s)

    def decisions(self, device: str) -> list[Decided]:
        return []


async def only_the_right_token(token: str) -> Caller | None:
    return Caller("default", "test", "1") if token == TOKEN else None


@dataclass
class Console:
    """A console, served on the loopback."""

    fleet: Figures = field(default_factory=lambda: Figures(busy()))
    models: list[HubModel] = field(default_factory=lambda: [DIGITS, BROKEN])
    authenticate: Authenticate | None = None
    grpc_address: str = "127.0.0.1:8001"
    devices: Devices = field(default_factory=lambda: Devices([], 30.0))
    operated: Fleet | None = None  # needed by the pages of devices and models only
    examples: Examples | None = None  # needed by the page of models only
    clock: Callable[[], float] = lambda: NOW
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def served(self) -> AsyncIterator["Console"]:
        """Serve it; on the port it had before, if it was served before."""
        app = web.Application()
        app[BODIES] = Bodies(Memory(1 << 26))

        async def other(_request: web.Request) -> web.Response:
            return web.json_response({"live": True})

        app.router.add_get("/v2/health/live", other)
        add_console(
            app,
            history=self.fleet,
            devices=self.devices,
            fleet=self.operated or cast(Fleet, NOBODY),
            scratch=Path(),
            models=lambda: self.models,
            examples=self.examples or cast(Examples, NOBODY),
            authenticate=self.authenticate,
            hub_name="hub <one>",
            grpc_address=self.grpc_address,
            clock=self.clock,
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=30.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
            self.port = runner.addresses[0][1]
            yield self
        finally:
            await runner.cleanup()

    @contextmanager
    def served_beside(self) -> Iterator["Console"]:
        """Serve it in a thread of its own, for tests that do not run on an event loop."""
        ready = threading.Event()
        stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

        async def serve() -> None:
            async with self.served():
                end = asyncio.Event()
                stop.append((asyncio.get_running_loop(), end))
                ready.set()
                await end.wait()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), name="console")
        thread.start()
        try:
            assert ready.wait(10), "the console did not start"
            yield self
        finally:
            if stop:
                loop, end = stop[0]
                loop.call_soon_threadsafe(end.set)
            thread.join(20)
        assert not thread.is_alive(), "the console did not stop"
