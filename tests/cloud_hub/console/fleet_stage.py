"""A console on a real fleet: real database, real releases of the digits, a broker that is a list.

Devices say what a test lets them say, through the door that the MQTT link uses. Nothing here
waits for a clock: devices count as online for an hour after they were heard.
"""

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cloud_hub.engines.launch import Launcher
from cloud_hub.fleet.devices import Device, Devices
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.fleet.link import Arrival
from cloud_hub.insight.example_files import ExampleFiles
from cloud_hub.insight.examples import Bounds, Examples
from cloud_hub.metrics import Metrics
from cloud_hub.store.store import Store
from fogline_protocol import release
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.console.stage import Console, Figures, busy

T = TypeVar("T")

# The class that the committed certificates are for, whichever machine the tests run on.
DIGITS = Path(__file__).parents[3] / "models/digits/bundles/digits-1.1.0"
HARDWARE = release.read(DIGITS).certificates[0].hardware_class
CPU = release.CPU
OFFLINE_AFTER_S = 3600.0
BUNDLES = ("digits-hub-1.0.0", "digits-1.0.0", "digits-1.1.0")
DEADLINE_S = 60.0  # on a machine that others use, too; nothing waits this long


def answers(
    variant: str = "int8-qdq",
    meant: str = "int8-qdq",
    aside: str = "",
    *,
    certificate: str = "",
    provider: str = CPU,
    hardware: str = HARDWARE,
) -> pb.Serving:
    """Return what a device says of what answers there."""
    return pb.Serving(
        variant=variant,
        provider=provider,
        hardware_class=hardware,
        certificate=certificate,
        meant_variant=meant,
        meant_provider=CPU,
        aside=aside,
    )


class Broker:
    """Takes desired states, at once."""

    def __init__(self) -> None:
        self.desired: dict[str, pb.Desired] = {}

    async def publish_desired(self, tenant: str, device: str, desired: pb.Desired) -> None:
        self.desired[device] = desired

    async def remove_desired(self, tenant: str, device: str) -> None:
        self.desired.pop(device, None)


class Stage:
    """A hub's fleet and its console, in a folder that may hold releases already."""

    def __init__(self, data: Path, figures: Figures | None = None) -> None:
        self._data = data
        self.devices = Devices([], OFFLINE_AFTER_S)
        self.broker = Broker()
        self.console = Console(fleet=figures or Figures(busy()), devices=self.devices)
        self.console.clock = time.time
        self._sequence = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return self.console.url

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator["Stage"]:
        self.store = await Store.open(f"sqlite:///{self._data / 'hub.sqlite'}")
        try:
            self.fleet = await asyncio.to_thread(
                Fleet,
                self.store,
                self._data,
                Launcher().open,
                self.devices,
                lambda report: None,
                self._forget,
            )
            self.console.operated = self.fleet
            files = ExampleFiles(self._data / "examples")
            metrics = Metrics().of_examples()
            self.examples = Examples(self.store, files, Bounds(1 << 20, 86400.0), metrics)
            self.console.examples = self.examples
            publishing = asyncio.create_task(
                self.fleet.controller.outbox.publish(self.broker, "default")
            )
            try:
                async with self.examples, self.console.served():
                    yield self
            finally:
                publishing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await publishing
        finally:
            await self.store.close()

    async def _forget(self, device: str) -> None:
        self.devices.forget(device)  # it has counted nothing here

    @contextlib.contextmanager
    def served_beside(self) -> Iterator["Stage"]:
        """Serve in a thread of its own, for tests that do not run on an event loop."""
        ready = threading.Event()
        end: list[asyncio.Event] = []

        async def serve() -> None:
            async with self.served():
                self._loop = asyncio.get_running_loop()
                end.append(asyncio.Event())
                ready.set()
                await end[0].wait()

        thread = threading.Thread(target=asyncio.run, args=(serve(),), name="fleet-stage")
        thread.start()
        try:
            assert ready.wait(DEADLINE_S), "the stage did not start"
            yield self
        finally:
            if end and self._loop is not None:
                self._loop.call_soon_threadsafe(end[0].set)
            thread.join(DEADLINE_S)
        assert not thread.is_alive(), "the stage did not stop"

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Run something on the loop of a stage that is served beside."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(DEADLINE_S)

    async def join(
        self,
        *names: str,
        online: bool = True,
        hardware: str = HARDWARE,
        runs: int = 0,
        version: str = "1.0.0",
        serving: pb.Serving | None = None,
    ) -> None:
        """Let devices appear, with or without a release of the hub and what answers of it."""
        now = time.time()
        for name in names:
            seen = now if online else now - 2 * OFFLINE_AFTER_S
            self.devices.seen(Device(name, seen, seen, "0.1.0", hardware, "closed", 84_000_000))
        running = pb.ReportedModel(
            model="digits",
            active_release=runs,
            active_version=version,
            phase="committed" if runs else "",
            serving=serving,
        )
        await self.report(names, running)

    async def report(
        self, names: Sequence[str], *models: pb.ReportedModel, generation: int | None = None
    ) -> None:
        """Let devices report, about the generation that is wanted unless told otherwise."""
        arrivals = []
        for name in names:
            self._sequence += 1
            desired = self.broker.desired.get(name)
            about = desired.generation if desired and generation is None else generation or 0
            report = pb.Reported(
                schema=1, device=name, sequence=self._sequence, generation=about, models=models
            )
            arrivals.append(Arrival("default", name, report))
        await self.fleet.controller.commit(arrivals)

    async def published(self, name: str, generation: int) -> None:
        """Wait until the broker has a generation of a device's desired state."""
        async with asyncio.timeout(DEADLINE_S):
            while (
                name not in self.broker.desired or self.broker.desired[name].generation < generation
            ):
                await asyncio.sleep(0.005)


async def no_counts(_device: str) -> None:
    """Forget the counts of a device that has none."""


async def prepare(data: Path, digits: Path) -> None:
    """Fill a folder with releases: digits-hub@1, digits@1, digits@2, and digits@3 by force."""
    store = await Store.open(f"sqlite:///{data / 'hub.sqlite'}")
    try:
        fleet = Fleet(
            store, data, Launcher().open, Devices([], 1.0), lambda report: None, no_counts
        )
        for name in BUNDLES:
            await fleet.releases.accept(digits / "bundles" / name)
        await fleet.releases.accept(digits / "bundles" / "broken" / "digits-1.2.0", force=True)
    finally:
        await store.close()


def copied(prepared: Path, folder: Path) -> Path:
    """Return a copy of a prepared folder, for one test to change."""
    return Path(shutil.copytree(prepared, folder))
