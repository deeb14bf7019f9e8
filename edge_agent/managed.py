"""Joins the model story to the request story: what a hub may change on this device.

    restore     serve what the updater committed last; no network
    contact     ask the hub, over the uplink, where broker and files are; remember the answer
    desired  →  updater (fetch → verify → self-test → trial → probation) → router
    router   →  updater → reported

Nothing of it stands between an application and its answer. A hub that is away, a broker that
is gone or a release that is refused leave the device serving what it serves. And if one of these
parts ends by a mistake of our own, it is logged with its trace and all of them start again as
after a restart of the agent, while the router goes on answering.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from edge_agent.config import AgentConfig, split_address
from edge_agent.errors import ReleaseRefused, StartRefused
from edge_agent.fleet import contact as contacts
from edge_agent.fleet import twin
from edge_agent.fleet.contact import Contact, Hub
from edge_agent.fleet.link import DeviceLink, DeviceLinkOptions
from edge_agent.inference.router import Router
from edge_agent.runtime import providers
from edge_agent.runtime import release as releases
from edge_agent.runtime.release import Release
from edge_agent.update import slots
from edge_agent.update.by_hand import ByHand
from edge_agent.update.disk import DiskFault, DiskFull
from edge_agent.update.download import Downloader, HubFiles
from edge_agent.update.fetch import HubReleases
from edge_agent.update.lifecycle import StepInterrupted
from edge_agent.update.machine import ModelReport
from edge_agent.update.selftest import ChildSelfTest
from edge_agent.update.slots import Desired, Target
from edge_agent.update.surroundings import Place, Progress, Timings
from edge_agent.update.trust import Trust
from edge_agent.update.updater import DesiredRefused, Updater
from fogline_protocol.errors import InferenceError
from fogline_protocol.mqtt import Backoff
from fogline_protocol.release import BundleDirectory
from fogline_protocol.tensors import Array

T = TypeVar("T")

ASK_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long things are left alone, in seconds."""

    ask_s: float = 2.0  # between questions for the hub's addresses while its broker is away
    accept_s: float = 30.0  # until a desired state is tried again that the disk did not take
    restart_s: float = 1.0  # after a mistake of our own; doubles, with full jitter


class Managed:
    """The part of an agent that a hub manages. ``restore`` it, then ``run`` it."""

    def __init__(
        self,
        config: AgentConfig,
        router: Router,
        uplink: Hub,
        *,
        version: str,
        hardware: str,
        pauses: Pauses | None = None,
    ) -> None:
        """Make the parts; nothing is read or asked yet.

        Args:
            config: of the agent; ``data`` exists.
            router: what answers.
            uplink: the way to ask the hub for its addresses.
            version: of the agent.
            hardware: class of this device.
            pauses: shorter ones, in tests.
        """
        self._config = config
        self._uplink = uplink
        self._version = version
        self._hardware = hardware
        self._pauses = pauses or Pauses()
        self._contact_file = config.data / "contact.json"
        self._releases = config.data / "releases"
        self._releases.mkdir(exist_ok=True)
        self._router = router
        self.serving = _Serving(config, router)
        self._fetch = _Fetch()
        self._link: DeviceLink | None = None
        self._known: Contact | None = None  # the addresses that the disk has
        self._revision = 0  # up to which the hub reads Reported, as far as it has said
        self._look_again = False  # for the hub's addresses, although its broker is there
        self._unaccepted = b""  # a desired document that the disk did not take
        self._accept_again_at = 0.0  # on the event loop's clock
        self.updater = self._new_updater()

    def _new_updater(self) -> Updater:
        config = self._config
        return Updater(
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
            ReleaseRefused: a bundle given by hand is not intact, cannot run here or fails its
                self-test, and no release was committed that could serve instead.
            StartRefused: the data directory cannot be read.
        """
        try:
            committed = await asyncio.to_thread(self.updater.restore)
        except DiskFault as error:
            raise StartRefused(f"data directory {self._config.data}: {error}") from None
        await self.serving.by_hand(except_for=committed)
        for model, bundle in committed.items():
            try:
                await self.serving.activate(model, bundle)
            except ReleaseRefused as error:
                log.error("committed release does not load", model=model, why=str(error))
                await self.serving.fall_back(model, f"it does not load any more: {error}")

    async def run(self) -> None:
        """Follow the hub until cancelled."""
        backoff = Backoff(base_s=self._pauses.restart_s, max_s=60.0)
        while True:
            began = time.monotonic()
            # Not a task group: on Python 3.11 it can take a cancellation for a failure of its own.
            tasks = [
                asyncio.create_task(self.updater.run(), name="updater"),
                asyncio.create_task(self._follow(), name="follow the hub"),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled():
                    log.error(
                        "the managed part of the agent failed and is started again",
                        part=task.get_name(),
                        exc_info=task.exception(),
                    )
            backoff.held(time.monotonic() - began)
            await asyncio.sleep(backoff.next_wait_s())
            await self._start_over()

    async def _start_over(self) -> None:
        """Continue as a new start would; what answers now answers until its successor is loaded."""
        before = {one.model for one in self.updater.reports()}
        self.updater = self._new_updater()
        try:
            await self.restore()
            # A candidate that was on trial has no say any more.
            kept = {one.model for one in self.updater.reports() if one.active_release}
            for model in before - kept:
                await self.serving.activate(model, None)
        except (ReleaseRefused, StartRefused) as error:
            log.error("what served before goes on serving", why=str(error))

    # What the link carries documents for ---------------------------------------------------

    def generation(self) -> int:
        """Return the generation accepted last."""
        return self.updater.generation

    async def desired(self, payload: bytes) -> None:
        """Consider a desired document; return when the decision is safe."""
        if not payload:
            return  # the hub has withdrawn its wishes: no wish to remove anything
        self._unaccepted = b""
        try:
            wanted = twin.read_desired(payload)
        except twin.DesiredRefused as error:
            self._refuse(error.refusal)
            return
        try:
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
        except DesiredRefused as error:
            self._refuse(twin.Refuse(error.code, str(error), wanted.generation))
        except (DiskFull, DiskFault) as error:
            self._refuse(twin.Refuse(error.code, str(error), wanted.generation))
            self._unaccepted = payload
            self._accept_again_at = asyncio.get_running_loop().time() + self._pauses.accept_s

    async def report(self) -> bytes:
        """Return a reported document of how all models stand, for a new connection or epoch."""
        # Both follow a restart of the hub, and with it its files may have moved.
        self._look_again = True
        return self._document(self.generation(), self._standings())

    def tell(self) -> None:
        """Send how all models stand, when there is a link."""
        self._publish(self.generation(), self._standings())

    def _refuse(self, refusal: twin.Refuse) -> None:
        log.warning("desired state refused", code=refusal.code, sentence=refusal.sentence)
        generation = refusal.generation or self.generation()
        # What was installed by hand is not the hub's to want, so it has no part in the refusal.
        refused = twin.refused(self._managed(), refusal)
        self._publish(generation, self._answering([*refused, *self._by_hand()]))

    def _standings(self) -> list[twin.ModelStanding]:
        return self._answering([*self._managed(), *self._by_hand()])

    def _managed(self) -> list[twin.ModelStanding]:
        return [self._standing(one) for one in self.updater.reports()]

    def _by_hand(self) -> list[twin.ModelStanding]:
        """Return the models that answer and that no hub has ever wanted anything of."""
        managed = {one.model for one in self.updater.reports()}
        return [
            twin.ModelStanding(one.bundle.model, twin.Phase.COMMITTED)
            for one in self._router.releases()
            if one.bundle.model not in managed
        ]

    def _answering(self, standings: Sequence[twin.ModelStanding]) -> list[twin.ModelStanding]:
        """Return the standings with what answers, and the version of what came by hand."""
        told = []
        for one in standings:
            release = self._router.serving(one.model)
            # While a candidate is being loaded, what answers is not yet what the slots say.
            if release is not None and release.number == one.active_release:
                version = one.active_version or release.bundle.version
                one = replace(one, active_version=version, serving=_serving(release))
            told.append(one)
        return told

    def _standing(self, one: ModelReport) -> twin.ModelStanding:
        standing = twin.ModelStanding(
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
        why = self.serving.fallen_back.get(one.model)
        if why is None:
            return standing
        # The updater knows what it committed, not that it could not be loaded at this start.
        standing = replace(standing, active_release=0, active_version="")
        if standing.phase is not twin.Phase.COMMITTED:
            return standing  # another release is on its way
        return replace(standing, phase=twin.Phase.ROLLED_BACK, code="start/load", sentence=why)

    def _document(self, generation: int, standings: Sequence[twin.ModelStanding]) -> bytes:
        sequence = self.updater.next_sequence()
        device = self._config.device
        return twin.reported(device, sequence, generation, standings, self._revision)

    def _publish(self, generation: int, standings: Sequence[twin.ModelStanding]) -> None:
        if self._link is not None:
            self._link.publish_reported(self._document(generation, standings))

    # Where the hub is ----------------------------------------------------------------------

    async def _follow(self) -> None:
        """Keep a link to wherever the hub says its broker is."""
        contact = self._known = await asyncio.to_thread(contacts.remembered, self._contact_file)
        if contact is not None:
            self._revision = contact.reported_revision
        while True:
            contact, files = await self._usable(contact)
            contact = await self._linked(contact, files)

    async def _usable(self, contact: Contact | None) -> tuple[Contact, HubFiles]:
        """Return addresses that can be used: these, or those that the hub names."""
        useless: Contact | None = None
        while True:
            if contact is not None and contact.mqtt and contact != useless:
                try:
                    return contact, self._files(contact)
                except ValueError as error:
                    log.error("the hub's addresses cannot be used", why=str(error))
                    useless = contact
            found = await self._ask()
            if found is None or found == contact:
                await asyncio.sleep(self._pauses.ask_s)
            contact = found

    async def _linked(self, contact: Contact, files: HubFiles) -> Contact:
        """Serve one link; return the new addresses once the hub names others."""
        config = self._config
        trust = Trust(config.data / "trust", files, root=config.hub_root)
        downloader = Downloader(files)
        choose = functools.partial(releases.choose, provider=config.provider)
        self._fetch.releases = HubReleases(
            trust, downloader, choose, [self._releases / slots.FILES]
        )
        link = DeviceLink(
            DeviceLinkOptions(
                address=contact.broker,
                device=self._config.device,
                # Every link counts its connections from one. So each gets a number of its own,
                # above those of earlier links, earlier starts and a disk that was replaced.
                boot=self.updater.next_sequence(),
                agent_version=self._version,
                hardware_class=self._hardware,
                keepalive_s=10,
                max_wait_s=5.0,
            ),
            self,
        )
        serving = asyncio.create_task(link.run(), name="fleet link")
        self._link = link
        try:
            return await self._until_moved(contact, link, serving)
        finally:
            self._link = None
            serving.cancel()
            await asyncio.gather(serving, self._fetch.leave(), return_exceptions=True)
            for part in (downloader, trust, files):
                await asyncio.to_thread(part.close)

    async def _until_moved(
        self, contact: Contact, link: DeviceLink, serving: asyncio.Task[None]
    ) -> Contact:
        clock = asyncio.get_running_loop().time
        was_connected = False
        while True:
            pause_s = self._pauses.ask_s / (1 if was_connected else 4)
            await asyncio.wait({serving}, timeout=pause_s)
            if serving.done():
                await serving  # it only ends by a mistake of our own
            if link.is_connected and not was_connected:
                self.updater.nudge()
            was_connected = link.is_connected
            if self._unaccepted and clock() >= self._accept_again_at:
                await self.desired(self._unaccepted)
            if was_connected and not self._look_again:
                continue
            found = await self._ask()
            if found is None:
                continue
            self._look_again = False
            if found.mqtt and found != contact:
                return found

    def _files(self, contact: Contact) -> HubFiles:
        token: Callable[[], str] | None = None
        if self._config.hub_token_file is not None:
            token = functools.partial(_read_token, self._config.hub_token_file)
        return HubFiles(contact.http, token=token, ca=self._config.hub_ca)

    async def _ask(self) -> Contact | None:
        host, _ = split_address(self._config.hub)
        try:
            found = await contacts.ask(self._uplink, self._config.device, host, ASK_TIMEOUT_S)
        except InferenceError as error:
            log.debug("the hub's addresses are not known", why=str(error))
            return None
        if found.mqtt and found.reported_revision != self._revision:
            self._revision = found.reported_revision
            self.tell()
        if found.mqtt and not _same(found, self._known):
            try:
                await asyncio.to_thread(contacts.remember, self._contact_file, found)
                self._known = found
            except OSError as error:
                log.warning("the hub's addresses cannot be kept", why=str(error))
        return found


class _Told:
    """Hears from the updater and passes it on."""

    def __init__(self, managed: Managed) -> None:
        self._managed = managed

    async def report(self, models: tuple[ModelReport, ...]) -> None:
        """See ``Report.report`` in ``updater.py``; what is sent is read anew."""
        self._managed.tell()


class _Fetch:
    """Brings releases once it is known from where."""

    def __init__(self) -> None:
        self.releases: HubReleases | None = None
        self._running: set[asyncio.Task[Any]] = set()

    async def fetch(self, target: Target, into: Path, progress: Progress) -> None:
        """See ``Fetch.fetch`` in ``surroundings.py``."""
        await self._unless_moved(lambda hub: hub.fetch(target, into, progress))

    async def certificates(self, targets: Collection[str]) -> Mapping[str, bytes]:
        """See ``Fetch.certificates`` in ``surroundings.py``."""
        if not targets:
            return {}  # so a withdrawal is followed wherever the hub's files are
        return await self._unless_moved(lambda hub: hub.certificates(targets))

    async def withdrawn(self, targets: Collection[str]) -> frozenset[str]:
        """See ``Fetch.withdrawn`` in ``surroundings.py``."""
        return await self._unless_moved(lambda hub: hub.withdrawn(targets))

    async def _unless_moved(self, work: Callable[[HubReleases], Coroutine[Any, Any, T]]) -> T:
        if self.releases is None:
            raise StepInterrupted("download/no-hub", "the hub has not said yet where its files are")
        step = asyncio.create_task(work(self.releases))
        self._running.add(step)
        try:
            await asyncio.wait({step})
        finally:
            step.cancel()
            await asyncio.wait({step})
            self._running.discard(step)
        if step.cancelled():
            raise StepInterrupted("download/moved", "the hub's files have moved meanwhile")
        return step.result()

    async def leave(self) -> None:
        """Fetch nothing from the hub that was; return when nothing uses its parts any more."""
        self.releases = None
        for step in self._running:
            step.cancel()
        if self._running:
            await asyncio.wait(set(self._running))


class _Serving:
    """The router, as far as an update is concerned."""

    def __init__(self, config: AgentConfig, router: Router) -> None:
        self._config = config
        self._router = router
        self._given = ByHand(
            config.data, ChildSelfTest(), provider=config.provider, threads=config.threads
        )
        self._by_hand: dict[str, Path] = {}
        self.fallen_back: dict[str, str] = {}  # by model: why its committed release is not served

    async def by_hand(self, except_for: Mapping[str, BundleDirectory]) -> None:
        """Load the bundles of the configuration; they stay the way back of their models.

        Raises:
            ReleaseRefused: one is not intact, cannot run here or fails its self-test, and
                ``except_for`` is empty.
        """
        for path in self._config.bundle:
            try:
                loaded = await self._given.load(path)
            except ReleaseRefused as error:
                if not except_for:
                    raise
                # What works must not stay down because of what it once replaced.
                log.error("a bundle given by hand cannot be used", why=str(error))
                continue
            model = loaded.bundle.model
            self._by_hand[model] = path
            if model in except_for:
                loaded.engine.close()
            else:
                self._router.install(loaded)

    async def activate(self, model: str, bundle: BundleDirectory | None) -> None:
        """See ``Serving.activate`` in ``surroundings.py``."""
        if bundle is not None:
            self._router.install(await self._load(bundle))
            self.fallen_back.pop(model, None)
        elif model in self._by_hand:
            self._router.install(await self._given.load(self._by_hand[model]))
        else:
            self._router.remove(model)

    def place(self, model: str) -> Place | None:
        """See ``Serving.place`` in ``surroundings.py``."""
        serving = self._router.serving(model)
        if serving is None:
            return None
        return Place(serving.number, serving.choice.variant.name, serving.choice.provider)

    def certify(self, model: str, bundle: BundleDirectory) -> None:
        """See ``Serving.certify`` in ``surroundings.py``."""
        serving = self._router.serving(model)
        assert serving is not None, "only what serves can be certified: our bug"
        certified = releases.certified(serving, bundle)
        same = certified.choice.certificate == serving.choice.certificate
        if not same or bundle != serving.directory:
            self._router.certify(certified)

    async def fall_back(self, model: str, why: str) -> None:
        """Answer ``model`` with what was given by hand, or not at all, and remember why.

        Raises:
            ReleaseRefused: what was given by hand does not load either.
        """
        self.fallen_back[model] = why
        await self.activate(model, None)

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

    async def _load(self, bundle: BundleDirectory) -> Release:
        return await asyncio.to_thread(
            releases.load,
            bundle,
            provider=self._config.provider,
            threads=self._config.threads,
            number=slots.release_number(bundle.path),
        )


def _serving(release: Release) -> twin.Serving:
    choice = release.choice
    return twin.Serving(
        variant=choice.variant.name,
        provider=choice.provider,
        hardware_class=providers.hardware_class(choice.provider),
        certificate=choice.certificate.id if choice.certificate is not None else "",
        meant_variant=choice.meant[0],
        meant_provider=choice.meant[1],
        aside=choice.aside,
    )


def _same(found: Contact, known: Contact | None) -> bool:
    """Return whether there is nothing new in ``found`` to remember."""
    return (
        known is not None and found == known and found.reported_revision == known.reported_revision
    )


def _read_token(file: Path) -> str:
    return file.read_text(encoding="ascii").strip()
