"""Brings the releases that the hub wants to this device.

A desired state is accepted by one durable write, and generations not above it are ignored. One
``Machine`` per model takes it from there. Each change of phase is reported, after it is durable;
a report is the whole device, so the last one repairs all that were lost.

``restore`` is all that a start needs: no network, and the committed release of every model.
"""

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import structlog

from edge_agent.runtime.variants import Choice
from edge_agent.update import certificates
from edge_agent.update.disk import Disk, DiskFault, DiskFull, LocalDisk
from edge_agent.update.lifecycle import (
    MAX_ATTEMPTS,
    SERVING_CANDIDATE,
    Event,
    State,
    StepRefused,
)
from edge_agent.update.machine import STAGES, Machine, ModelReport
from edge_agent.update.slots import Desired, Pointer, Slots, Target
from edge_agent.update.surroundings import Fetch, SelfTest, Serving, Surroundings, Timings
from fogline_protocol.release import MODEL_NAME, BundleDirectory, BundleRefused

MAX_GENERATION = 1 << 53  # beyond it a reader of JSON numbers loses precision: nobody's counter

_log = structlog.get_logger()


class DesiredRefused(Exception):
    """The desired state contradicts itself: keep the last one, tell the hub why."""

    code = "desired/malformed"


class Report(Protocol):
    """Hears how the models of this device stand."""

    async def report(self, models: tuple[ModelReport, ...]) -> None:
        """Keep ``models`` for sending and return at once; losing an older one is fine."""
        ...


class Updater:
    """Owns the folder of slots and one ``Machine`` per model. See the top of this file."""

    def __init__(
        self,
        root: Path,
        *,
        fetch: Fetch,
        self_test: SelfTest,
        serving: Serving,
        report: Report,
        choose: Callable[[BundleDirectory], Choice],
        timings: Timings | None = None,
        first_sequence: int = 0,
        disk: Disk | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Make an updater that owns the folder ``root``.

        Args:
            root: exists and is used by nobody else.
            fetch: brings releases.
            self_test: tries them.
            serving: switches to them.
            report: hears about it.
            choose: picks the variant for this device, from a bundle whose artifacts may not be
                there yet; raises ``ReleaseRefused`` if there is none.
            timings: deadlines and pauses.
            first_sequence: see ``Slots``.
            disk: the same folder through other eyes, in tests.
            jitter: returns numbers in [0, 1).
        """
        self._slots = Slots(disk or LocalDisk(root), first_sequence)
        self._report = report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fogline-slots")
        self._around = Surroundings(
            root=root,
            slots=self._slots,
            desired=lambda: self._desired,
            thread=self._thread,
            fetch=fetch,
            self_test=self_test,
            serving=serving,
            choose=choose,
            timings=timings or Timings(),
            jitter=jitter,
            tell=self.tell,
        )
        self._desired = Desired(0)  # what the slots hold, as the event loop has heard of it
        self._machines: dict[str, Machine] = {}
        self._group: asyncio.TaskGroup | None = None  # while `run` runs

    @property
    def boot(self) -> int:
        """How often an updater was started on this folder."""
        return self._slots.boot

    @property
    def generation(self) -> int:
        """The generation of the desired state accepted last."""
        return self._desired.generation

    def restore(self) -> Mapping[str, BundleDirectory]:
        """Return what has to serve, by model, and settle what a restart interrupted.

        Call it once, before ``run``. It asks no network and runs no model. A release whose files
        are damaged is replaced by the one before it, and fetched again when the hub is there.

        Raises:
            DiskFault: the disk cannot be read.
        """
        self._slots.open()
        self._desired = self._slots.desired
        for path, why in self._slots.damaged.items():
            _log.warning("state file damaged", file=path, why=why)
        serving = {}
        for model, found in self._slots.pointers.items():
            pointer, bundle = self._settle(_rebooted(found))
            if pointer != found:
                # Not written, the same is settled again at the next start.
                with contextlib.suppress(DiskFull, DiskFault):
                    self._slots.put(pointer)
            self._machines[model] = Machine(self._around, pointer, bundle)
            if bundle is not None and pointer.committed is not None:
                serving[model] = self._holding(pointer.committed)(bundle)
        return serving

    async def apply(self, desired: Desired) -> bool:
        """Accept what the hub wants; False if this or a newer generation was accepted before.

        Raises:
            DesiredRefused: it contradicts itself.
            DiskFull: it is not accepted; the disk has no room to remember it.
            DiskFault: it may not be accepted; the disk failed.
        """
        _check(desired)
        if not await self._around.on_disk(self._accept, desired):
            return False
        if desired.generation > self._desired.generation:  # of two at a time the newer one stays
            self._desired = desired
        for target in desired.targets:
            self._ensure(target.model)
        for machine in self._machines.values():
            machine.wake()
        return True

    def nudge(self) -> None:
        """Go on with what was interrupted, now: the hub can be reached again."""
        for machine in self._machines.values():
            machine.nudge()

    def reports(self) -> tuple[ModelReport, ...]:
        """Return how every model stands, by name."""
        return tuple(self._machines[model].report() for model in sorted(self._machines))

    def next_sequence(self) -> int:
        """Return a number above every earlier one on this disk; from any thread."""
        return self._slots.next_sequence()

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to do for ``generation``, for good or for bad."""
        return all(machine.is_settled for machine in self._machines.values()) and all(
            target.model in self._machines for target in self._desired.targets
        )

    async def tell(self) -> None:
        """Report the whole device."""
        await self._report.report(self.reports())

    async def run(self) -> None:
        """Work until cancelled."""
        for target in self._desired.targets:
            self._ensure(target.model)  # accepted, and then the power went
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for machine in self._machines.values():
                    self._start(machine)
                await self.tell()
                await asyncio.Event().wait()
        finally:
            self._group = None
            # The write that runs now ends; those that wait are not begun.
            await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    def _accept(self, desired: Desired) -> bool:
        if desired.generation <= self._slots.desired.generation:
            return False
        self._slots.accept(desired)
        return True

    def _ensure(self, model: str) -> None:
        if model not in self._machines:
            self._machines[model] = Machine(self._around, self._slots.pointer(model), None)
            self._start(self._machines[model])

    def _start(self, machine: Machine) -> None:
        if self._group is not None:
            self._group.create_task(machine.run(), name=f"update {machine.model}")
            self._group.create_task(machine.doubt(), name=f"certificates of {machine.model}")

    def _holding(self, committed: Target) -> Callable[[BundleDirectory], BundleDirectory]:
        """Return what leaves of a release the certificates that hold."""
        return functools.partial(
            certificates.holding,
            target=committed,
            wish=self._desired.target(committed.model),
            gone=self._slots.withdrawn(committed.model),
        )

    def _settle(self, pointer: Pointer) -> tuple[Pointer, BundleDirectory | None]:
        """Return the bundle to serve; a damaged one gives way to the one before it."""
        while pointer.committed is not None:
            try:
                folder = self._slots.folder(pointer.committed)
                bundle, _ = self._around.read(folder, self._holding(pointer.committed))
            except (BundleRefused, StepRefused) as error:
                _log.error("release damaged", model=pointer.model, why=str(error))
                pointer = replace(
                    pointer,
                    generation=0,  # below every wish: the hub's is taken up again
                    committed=pointer.before,
                    before=None,
                    code="disk/damaged",
                    sentence=f"{pointer.committed.version} was found damaged at start: {error}",
                )
            else:
                return pointer, bundle
        return pointer, None


def _rebooted(pointer: Pointer) -> Pointer:
    """Return the pointer of a model after a restart."""
    was = pointer.life.state
    life = pointer.life.after(Event.BOOTED)
    if life.state is State.ROLLING_BACK:
        # The start loads what is committed; there is nothing left to take back.
        life = life.after(Event.DONE)
    if life == pointer.life or was is State.ROLLING_BACK:
        return replace(pointer, life=life)
    assert pointer.candidate is not None, "only a candidate can be interrupted"
    back = ", so the committed release serves again" if was in SERVING_CANDIDATE else ""
    return replace(
        pointer,
        life=life,
        code=f"{STAGES[was]}/restart",
        sentence=f"the device restarted during {was} of {pointer.candidate.version}{back}"
        f" (attempt {life.failures} of {MAX_ATTEMPTS})",
    )


def _check(desired: Desired) -> None:
    if not 0 < desired.generation < MAX_GENERATION:
        raise DesiredRefused(f"generation {desired.generation} is not between 1 and 2^53")
    models = [target.model for target in desired.targets]
    for target in desired.targets:
        if not MODEL_NAME.fullmatch(target.model):
            raise DesiredRefused(f"model name {target.model!r} is malformed")
        if models.count(target.model) > 1:
            raise DesiredRefused(f"model {target.model!r} is named twice")
        if not 0 < target.release < MAX_GENERATION:
            raise DesiredRefused(
                f"{target.model}: release {target.release} is not a number above 0"
            )
        for path in (target.index_target, *target.certificate_targets):
            parts = PurePosixPath(path).parts
            if not parts or path != "/".join(parts) or ".." in parts or path.startswith("/"):
                raise DesiredRefused(f"{target.model}: target path {path!r} is not a plain path")
