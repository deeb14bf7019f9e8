"""The model story on the hub, joined: releases, trust, desired states, and the way to devices.

    release push              → releases (check, try, number, sign) ─┐
    device set, unset, forget → controller (desired, generation) ────┼→ link → broker → devices
    certificate issue, withdraw → certificates (sign) ───────────────┘
    devices                   → link → controller (reported, counts) → console

Serving inference never depends on any of it: a broker that is missing or dies is said, waited
for and started again, and so is whatever of the below ends by a mistake of our own.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from sqlalchemy import Connection, select

from cloud_hub.fleet import artifacts, certificates, reports
from cloud_hub.fleet.artifacts import Blobs
from cloud_hub.fleet.certificates import Certificates
from cloud_hub.fleet.controller import Controller, UnknownDevice
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.golden import Load
from cloud_hub.fleet.link import REVISION, HubLink, HubLinkOptions
from cloud_hub.fleet.mosquitto import Mosquitto, MosquittoFailed, MosquittoMissing
from cloud_hub.fleet.outbox import WantedRelease
from cloud_hub.fleet.releases import Releases
from cloud_hub.fleet.trust import Repository, keep_fresh
from cloud_hub.fleet.workshop_report import ReportPages
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import release_index
from fogline_protocol.errors import BadRequest
from fogline_protocol.mqtt import Backoff, BrokerAddress
from fogline_protocol.release import MODEL_NAME
from fogline_protocol.release_index import MAX_CERTIFICATES
from fogline_protocol.v1 import fleet_pb2 as pb

log = structlog.get_logger(__name__)

TENANT = "default"  # until callers' tenants reach the broker
OFF = "off"

Telemetry = Callable[[pb.Telemetry], None]
Forget = Callable[[str], Awaitable[None]]
Job = Callable[[], Awaitable[None]]


class StillOnline(Exception):
    """The device is in touch with the hub: stop its agent first."""


class Fleet:
    """Everything between an accepted bundle and a device that runs it."""

    def __init__(
        self,
        store: Store,
        data: Path,
        load: Load,
        devices: Devices,
        telemetry: Telemetry,
        forget: Forget,
    ) -> None:
        """Join the parts; nothing runs yet.

        Args:
            store: the hub's database.
            data: the hub's directory.
            load: opens what is pushed, to try it.
            devices: that the hub has heard of.
            telemetry: takes counts.
            forget: forgets a device and its counts, in ``devices`` too.

        Raises:
            StartRefused: the signing keys do not fit the signed metadata.
        """
        self._devices = devices
        self._forget = forget
        self._data = data
        self._repository = Repository(data, now=time.time())
        self._blobs = Blobs(data / "blobs")
        self.releases = Releases(
            store,
            self._blobs,
            self._repository,
            reports=ReportPages(data / "reports"),
            load=load,
        )
        self.controller = Controller(
            store,
            wanted=_wanted,
            telemetry=_checked(telemetry),
            seen=lambda state: None if state.online else devices.left(state.device),
        )
        self.certificates = Certificates(store, self._repository, self.controller)
        self._mosquitto: Mosquitto | None = None
        self._link: HubLink | None = None
        self.broker = ""  # its address as a URL; empty: there is none
        self.trouble = ""  # why there is no broker

    @contextlib.asynccontextmanager
    async def running(self, mqtt: str) -> AsyncIterator[None]:
        """Sign what is due, reach the broker, and keep at it until left.

        Args:
            mqtt: URL of a broker; empty: one of our own, a child process; ``off``: none.
        """
        await self.releases.reconcile()
        await self.certificates.reconcile()
        async with contextlib.AsyncExitStack() as stack:
            jobs: dict[str, Job] = {"signatures": lambda: keep_fresh(self._repository)}
            address = await self._find_broker(mqtt, stack)
            if self._mosquitto is not None and address is not None:
                jobs["broker"] = self._mosquitto.watch
            if address is not None:
                self.broker = str(address)
                jobs["devices"] = functools.partial(self._keep_in_touch, address)
            tasks = [
                asyncio.create_task(_lasting(name, job), name=name) for name, job in jobs.items()
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def broker_reached(self) -> bool:
        """Whether the broker can be reached at this moment."""
        return self._link is not None and self._link.is_connected

    async def forget(self, device: str, now: float) -> None:
        """Forget a device: what it said, counted and is to run. One that returns is a new one.

        What it let the hub keep as examples stays; that is deleted with ``fogline data delete``.

        Raises:
            StillOnline: it is in touch with the hub, by the clock ``now``.
            UnknownDevice: the hub has never heard of it.
            StoreFailed: it is not forgotten, or not wholly: try again.
        """
        if not MODEL_NAME.fullmatch(device):  # not every database takes it
            raise UnknownDevice(f"no device can be called {device[:100]!r}")
        heard = self._devices.find(device)
        if heard is not None and self._devices.online(heard, now):
            raise StillOnline(
                f"{device} is online, and would count on without being known: stop its agent "
                "first, or wait until it counts as offline"
            )
        await self._forget(device)
        if not await self.controller.forget(device) and heard is None:
            raise UnknownDevice(f"no device {device!r} has reported to this hub")

    def routes(self) -> Sequence[web.RouteDef]:
        """Return the HTTP routes below which devices fetch what was signed."""
        return artifacts.routes(self._blobs, self._repository.directory)

    def contact(self, http: str) -> pb.ContactResponse:
        """Return where a device finds broker and files; ``http`` is the hub's own URL."""
        if not urlsplit(http).netloc:
            return reports.NOT_YET  # that door opens in a moment
        return pb.ContactResponse(mqtt=self.broker, http=http, reported_revision=REVISION)

    async def _keep_in_touch(self, address: BrokerAddress) -> None:
        last_epoch = await self.controller.last_epoch()
        link = HubLink(HubLinkOptions(address=address), self.controller, last_epoch=last_epoch)
        self._link = link
        async with asyncio.TaskGroup() as group:
            group.create_task(link.run())
            group.create_task(self.controller.outbox.publish(link, TENANT))

    async def _find_broker(
        self, mqtt: str, stack: contextlib.AsyncExitStack
    ) -> BrokerAddress | None:
        if mqtt == OFF:
            self.trouble = "switched off with --mqtt off"
            return None
        if mqtt:
            return BrokerAddress.parse(mqtt)
        self._mosquitto = Mosquitto(self._data / "broker")
        stack.push_async_callback(self._mosquitto.stop)
        try:
            return await self._mosquitto.start()
        except (MosquittoMissing, MosquittoFailed) as error:
            self.trouble = str(error)
            log.error("no broker: devices get no updates", why=str(error))
            return None


async def _lasting(name: str, job: Job) -> None:
    """Run ``job`` until cancelled, and anew after it failed.

    What it expects to go wrong it survives by itself, so this is about our own mistakes: they
    are logged with their trace, and must not cost the answers that the hub gives meanwhile.
    """
    backoff = Backoff(lambda: 1.0, base_s=1.0, max_s=60.0)
    while True:
        began = time.monotonic()
        try:
            await job()
        except Exception:
            log.exception("a part of the fleet's control failed and is started again", part=name)
        backoff.held(time.monotonic() - began)
        await asyncio.sleep(backoff.next_wait_s())


def _checked(take: Telemetry) -> Telemetry:
    """Return ``take`` for counts that came through the broker, with the rules of the gRPC door."""

    def accept(report: pb.Telemetry) -> None:
        try:
            checked = reports.parse(report.SerializeToString())
        except BadRequest as refusal:
            log.warning("dropped counts", device=report.device, why=str(refusal))
        else:
            take(checked)

    return accept


def _wanted(connection: Connection, model: str, number: int) -> WantedRelease | None:
    """Describe an accepted release as a desired state names it: with what is certified now."""
    r = schema.release.c
    row = connection.execute(
        select(r.version).where(r.model == model, r.number == number)
    ).one_or_none()
    if row is None:
        return None
    return WantedRelease(
        model,
        number,
        row.version,
        release_index.index_target(model, number),
        sorted(certificates.named(connection, model, number, time.time())[:MAX_CERTIFICATES]),
    )
