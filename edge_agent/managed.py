"""Joins the model story to the request story: what a hub may change on this device.

    restore     serve what the updater committed last; no network
    contact     ask the hub, over the uplink, where broker and files are; remember the answer
    desired  →  updater (fetch → verify → self-test → trial → probation) → router
    router   →  updater → reported

Nothing of it stands between an application and its answer. A hub that is away, a broker that
is gone or a release that is refused leave the device serving what it serves.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from edge_agent.config import AgentConfig, split_address
from edge_agent.errors import ReleaseRefused
from edge_agent.fleet import contact as contacts
from edge_agent.fleet import twin
from edge_agent.fleet.contact import Contact
from edge_agent.fleet.link import DeviceLink, DeviceLinkOptions
from edge_agent.inference.router import Router
from edge_agent.inference.uplink import Uplink
from edge_agent.runtime import release as releases
from edge_agent.runtime.release import Release
from edge_agent.update import slots
from edge_agent.update.disk import DiskFault, DiskFull
from edge_agent.update.download import Downloader, HubFiles
from edge_agent.update.fetch import HubReleases
from edge_agent.update.lifecycle import StepInterrupted
from edge_agent.update.machine import ModelReport
from edge_agent.update.selftest import ChildSelfTest
from edge_agent.update.slots import Desired, Target
from edge_agent.update.surroundings import Progress, Timings
from edge_agent.update.trust import Trust
from edge_agent.update.updater import DesiredRefused, Updater
from fogline_protocol.inference import InferenceError
from fogline_protocol.release import BundleDirectory
from fogline_protocol.tensors import Array

ASK_EVERY_S = 2.0  # for the hub's addresses, while its broker cannot be reached
ASK_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class Managed:
    """The part of an agent that a hub manages. ``restore`` it, then ``run`` it."""

    def __init__(
        self, config: AgentConfig, router: Router, uplink: Uplink, *, version: str, hardware: str
    ) -> None:
        """Make the parts; nothing is read or asked yet.

        Args:
            config: of the agent; ``data`` exists.
            router: what answers.
            uplink: the way to ask the hub for its addresses.
            version: of the agent.
            hardware: class of this device.
        """
        self._config = config
        self._uplink = uplink
        self._version = version
        self._hardware = hardware
        self._contact_file = config.data / "contact.json"
        self._releases = config.data / "releases"
        self._releases.mkdir(exist_ok=True)
        self.serving = _Serving(config, router)
        self._fetch = _Fetch()
        self._link: DeviceLink | None = None
        self.updater = Updater(
            self._releases,
            fetch=self._fetch,
            self_test=ChildSelfTest(),
            serving=self.serving,
            report=_Told(self),
            choose=functools.partial(releases.choose, provider=config.provider),
            timings=replace(Timings(), probation_s=config.probation_s),
            # A device whose disk was replaced must not report below what the hub has seen.
            first_sequence=int(time.time()) << 20,
        )

    async def restore(self) -> None:
        """Serve what was committed last; the bundles given by hand answer where there is none.

        Raises:
            ReleaseRefused: a bundle given by hand is not intact or cannot run here.
        """
        committed = await asyncio.to_thread(self.updater.restore)
        await self.serving.by_hand(except_for=committed)
        for model, bundle in committed.items():
            try:
                await self.serving.activate(model, bundle)
            except ReleaseRefused as error:
                # It ran here once. The hub learns of it when the updater reports.
                log.error("committed release does not load", model=model, why=str(error))
                await self.serving.activate(model, None)

    async def run(self) -> None:
        """Follow the hub until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.updater.run())
            group.create_task(self._follow())

    # What the link carries documents for ---------------------------------------------------

    def generation(self) -> int:
        """Return the generation accepted last."""
        return self.updater.generation

    async def desired(self, payload: bytes) -> None:
        """Consider a desired document; return when the decision is safe."""
        try:
            wanted = twin.read_desired(payload)
            await self.updater.apply(
                Desired(
                    wanted.generation,
                    wanted.hub_epoch,
                    tuple(
                        Target(r.model, r.release, r.version, r.index_target, r.certificate_targets)
                        for r in wanted.releases
                    ),
                )
            )
        except twin.DesiredRefused as error:
            self._publish(error.refusal.generation, _refused(self._standings(), error.refusal))
        except DesiredRefused as error:
            refusal = twin.Refuse(error.code, str(error))
            self._publish(0, _refused(self._standings(), refusal))
        except (DiskFull, DiskFault) as error:
            # Not accepted, so it is published again at the next birth.
            refusal = twin.Refuse(error.code, str(error))
            self._publish(0, _refused(self._standings(), refusal))

    async def report(self) -> bytes:
        """Return a reported document of how all models stand."""
        return self._document(self.generation(), self._standings())

    async def tell(self) -> None:
        """Send how all models stand, when there is a link."""
        if self._link is not None:
            self._link.publish_reported(await self.report())

    def _standings(self) -> list[twin.ModelStanding]:
        return [
            twin.ModelStanding(
                model=one.model,
                phase=twin.Phase(one.phase),
                desired_release=one.desired_release,
                active_release=one.active_release,
                previous_release=one.previous_release,
                active_version=one.active_version,
                code=one.code,
                sentence=one.sentence,
                attempt=one.attempt,
                figures=one.figures,
                bytes_done=one.bytes_done,
                bytes_total=one.bytes_total,
            )
            for one in self.updater.reports()
        ]

    def _document(self, generation: int, standings: Sequence[twin.ModelStanding]) -> bytes:
        sequence = self.updater.next_sequence()
        return twin.reported(self._config.device, sequence, generation, standings)

    def _publish(self, generation: int, standings: Sequence[twin.ModelStanding]) -> None:
        if self._link is not None:
            self._link.publish_reported(self._document(generation or self.generation(), standings))

    # Where the hub is ----------------------------------------------------------------------

    async def _follow(self) -> None:
        """Keep a link to wherever the hub says its broker is."""
        contact = await asyncio.to_thread(contacts.remembered, self._contact_file)
        while True:
            if contact is None or not contact.mqtt:
                contact = await self._ask()
                if contact is None or not contact.mqtt:
                    await asyncio.sleep(ASK_EVERY_S)
                    continue
            contact = await self._linked(contact)

    async def _linked(self, contact: Contact) -> Contact:
        """Serve one link; return the new addresses once the hub names others."""
        trust, self._fetch.releases = self._at(contact)
        link = DeviceLink(
            DeviceLinkOptions(
                address=contact.broker,
                device=self._config.device,
                boot=self.updater.boot,
                agent_version=self._version,
                hardware_class=self._hardware,
                keepalive_s=10,
                max_wait_s=5.0,
            ),
            self,
        )
        self._link = link
        serving = asyncio.create_task(link.run(), name="fleet link")
        try:
            was_connected = False
            while True:
                await asyncio.sleep(ASK_EVERY_S if was_connected else ASK_EVERY_S / 4)
                if link.is_connected and not was_connected:
                    self.updater.nudge()
                was_connected = link.is_connected
                if was_connected:
                    continue
                found = await self._ask()
                if found is not None and found.mqtt and found != contact:
                    return found
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await asyncio.to_thread(trust.close)

    def _at(self, contact: Contact) -> tuple[Trust, HubReleases]:
        config = self._config
        token: Callable[[], str] | None = None
        if config.hub_token_file is not None:
            token = functools.partial(_read_token, config.hub_token_file)
        files = HubFiles(contact.http, token=token, ca=config.hub_ca)
        trust = Trust(config.data / "trust", files, root=config.hub_root)
        choose = functools.partial(releases.choose, provider=config.provider)
        near = [self._releases / slots.FILES]
        return trust, HubReleases(trust, Downloader(files), choose, near)

    async def _ask(self) -> Contact | None:
        host, _ = split_address(self._config.hub)
        try:
            found = await contacts.ask(self._uplink, self._config.device, host, ASK_TIMEOUT_S)
            await asyncio.to_thread(contacts.remember, self._contact_file, found)
        except InferenceError as error:
            log.debug("the hub's addresses are not known", why=str(error))
            return None
        except OSError as error:
            log.warning("the hub's addresses cannot be kept", why=str(error))
        return found


class _Told:
    """Hears from the updater and passes it on."""

    def __init__(self, managed: Managed) -> None:
        self._managed = managed

    async def report(self, models: tuple[ModelReport, ...]) -> None:
        """See ``Report.report`` in ``updater.py``; what is sent is read anew."""
        await self._managed.tell()


class _Fetch:
    """Brings releases once it is known from where."""

    def __init__(self) -> None:
        self.releases: HubReleases | None = None

    async def fetch(self, target: Target, into: Path, progress: Progress) -> None:
        """See ``Fetch.fetch`` in ``surroundings.py``."""
        if self.releases is None:
            raise StepInterrupted("download/no-hub", "the hub has not said yet where its files are")
        await self.releases.fetch(target, into, progress)


class _Serving:
    """The router, as far as an update is concerned."""

    def __init__(self, config: AgentConfig, router: Router) -> None:
        self._config = config
        self._router = router
        self._by_hand: dict[str, Path] = {}

    async def by_hand(self, except_for: Mapping[str, BundleDirectory]) -> None:
        """Load the bundles of the configuration; they stay the way back of their models.

        Raises:
            ReleaseRefused: one is not intact or cannot run here.
        """
        for path in self._config.bundle:
            loaded = await self._load(functools.partial(releases.load, path))
            model = loaded.bundle.model
            self._by_hand[model] = path
            if model in except_for:
                loaded.engine.close()
            else:
                self._router.install(loaded)

    async def activate(self, model: str, bundle: BundleDirectory | None) -> None:
        """See ``Serving.activate`` in ``surroundings.py``."""
        if bundle is not None:
            number = slots.release_number(bundle.path)
            load = functools.partial(releases.load_intact, bundle, number=number)
        elif model in self._by_hand:
            load = functools.partial(releases.load, self._by_hand[model])
        else:
            self._router.remove(model)
            return
        self._router.install(await self._load(load))

    async def run(self, model: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the engine that answers ``model`` now."""
        serving = self._router.serving(model)
        if serving is None:
            raise ReleaseRefused(f"nothing serves {model!r}")
        names = [spec.name for spec in serving.bundle.outputs]
        rows = len(next(iter(inputs.values()))) if serving.bundle.max_batch else 1
        values = await serving.engine.run(inputs, names, rows)
        return dict(zip(names, values, strict=True))

    def faults(self, model: str) -> int:
        """Return how often the engine of ``model`` has failed since it was activated."""
        serving = self._router.serving(model)
        return 0 if serving is None else serving.engine.faults

    async def _load(self, load: Callable[..., Release]) -> Release:
        config = self._config
        return await asyncio.to_thread(load, provider=config.provider, threads=config.threads)


def _refused(
    standings: Sequence[twin.ModelStanding], refusal: twin.Refuse
) -> list[twin.ModelStanding]:
    """Return the standings with the refusal in them; a device without a model may refuse, too."""
    empty = [twin.ModelStanding("", twin.Phase.REJECTED)]
    return [
        replace(one, phase=twin.Phase.REJECTED, code=refusal.code, sentence=refusal.sentence)
        for one in (standings or empty)
    ]


def _read_token(file: Path) -> str:
    return file.read_text(encoding="ascii").strip()
