"""One model's life cycle at work: performs the step that the table names, and says how it ended.

A ``Machine`` owns its model's pointer. It makes every state durable before the step begins that
the state names, so that a restart knows what was under way. The rules it keeps:

* A step can be cancelled at any moment. A newer generation that wants something else cancels it
  at once; one that wants the same leaves it running.
* A step has one deadline. Whatever goes wrong in it ends as an event with a stable code and a
  sentence, never as an exception in the agent: an update may fail, the service may not.
* A step forward that the disk did not take is a failure. A step back is taken even so: the disk
  then still names an earlier step, whose ``BOOTED`` row leads back as well.

Certificates are lighter than releases. One that the hub names no more is not answered under from
the moment its wish is accepted, whatever state this is in: ``restrict``. Others are fetched by
themselves, and if what serves stays the best choice under them, nothing is loaded and nothing is
tested: ``certificates.py``. A wish for another release says nothing of what serves meanwhile, so there
the hub is asked whether it still signs them: ``doubt``.

A commit does not ask whether the hub can be reached: a model cannot break the network, and a
device that is often offline must be able to finish what it has begun.
"""

import asyncio
import contextlib
import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

import structlog

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.variants import Choice
from edge_agent.update import certificates
from edge_agent.update.disk import DiskFault, DiskFull
from edge_agent.update.lifecycle import (
    RESTING,
    SERVING_CANDIDATE,
    TRANSITIONS,
    Event,
    State,
    StepEnded,
    StepFailed,
    StepInterrupted,
    StepRefused,
)
from edge_agent.update.slots import Pointer, Target
from edge_agent.update.surroundings import Surroundings
from fogline_protocol.golden import Deviates, GoldenVectors, VectorsUnusable, judge
from fogline_protocol.release import BundleDirectory, BundleRefused

_log = structlog.get_logger()

# The first half of every code, so that a person finds the step that a failure belongs to.
STAGES: Mapping[State, str] = {
    State.FETCHING: "download",
    State.VERIFYING: "verify",
    State.TESTING: "self-test",
    State.SHADOW: "shadow",
    State.TRIAL: "trial",
    State.PROBATION: "probation",
    State.ROLLING_BACK: "rollback",
}


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What the hub is told about one model; the fields of ``ReportedModel`` in fleet.proto."""

    model: str
    desired_release: int
    active_release: int  # 0: none from the hub
    previous_release: int
    active_version: str
    phase: str
    code: str = ""
    sentence: str = ""
    attempt: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    bytes_done: int = 0
    bytes_total: int = 0


class Machine:
    """One model's life cycle. Owns the model's pointer; everything else asks it."""

    def __init__(
        self, around: Surroundings, pointer: Pointer, committed: BundleDirectory | None
    ) -> None:
        self.model = pointer.model
        self._around = around
        # May be further back than what the disk says, never further ahead.
        self._pointer = pointer
        self._committed = committed
        self._candidate: tuple[BundleDirectory, Choice] | None = None  # verified, in its slot
        # What was activated last, and which release that is. Not always what the state calls for:
        # while a rollback does not succeed, what it takes back goes on answering.
        self._answering = self._as_answering()
        self._renewal: BundleDirectory | None = None  # the committed release, in its new slot
        self._gone = around.slots.withdrawn(pointer.model)  # where no wish says otherwise
        self._woken = asyncio.Event()
        self._doubted = asyncio.Event()
        self._retry_now = True  # the pause between attempts ended with the restart
        self._interruptions = 0  # in a row
        self._bytes = (0, 0)

    def __repr__(self) -> str:
        life = self._pointer.life
        return f"<update of {self.model}: {life.state}, {life.failures} failures>"

    def wake(self) -> None:
        """Look at the desired state again."""
        self.restrict()
        self._woken.set()
        self._doubted.set()

    def restrict(self) -> None:
        """Answer under no certificate that the hub has taken back, as far as it is known."""
        place = self._around.serving.place(self.model)
        if self._answering is None or place is None:
            return
        target, serves = self._answering
        if place.release != target.release:
            return  # it did not load, and what the device had before answers
        # Also where none is missing: one may be named again before its slot was renewed.
        held = certificates.holding(serves, target, self._wish(), self._gone)
        self._around.serving.certify(self.model, held)

    async def doubt(self) -> None:
        """Ask the hub about certificates that no wish speaks of, until cancelled.

        That are those of a release that serves, or would after a rollback, although another one is
        wanted: one that is on its way, or was refused here, or cannot be gone back to. The hub
        raises the generation when it has withdrawn one.
        """
        around = self._around
        while True:
            self._doubted.clear()
            wish = self._wish()
            here = {self._pointer.committed, self._answering and self._answering[0]}
            unspoken = [
                one for one in here if one and not (wish and wish.is_of_the_release_of(one))
            ]
            targets = sorted({path for one in unspoken for path in one.certificate_targets})
            if targets:
                try:
                    gone = await around.fetch.withdrawn(targets)
                except (StepEnded, OSError) as error:
                    _log.info("certificates in doubt", model=self.model, why=str(error))
                except Exception:
                    # As in a step: whatever comes from outside must not end the agent.
                    _log.exception("what is withdrawn could not be found out", model=self.model)
                else:
                    await self._believe(gone)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(around.timings.doubt_s if unspoken else None):
                    await self._doubted.wait()

    async def _believe(self, gone: frozenset[str]) -> None:
        is_new = gone != self._gone
        if is_new:
            self._gone = gone
            self.restrict()
        if gone != self._around.slots.withdrawn(self.model):
            with contextlib.suppress(DiskFull, DiskFault):  # then with the next answer
                await self._around.on_disk(self._around.slots.withdraw, self.model, gone)
        if is_new:
            await self._around.tell()

    def nudge(self) -> None:
        """End a pause that waits for the hub."""
        self._doubted.set()
        if self._interruptions:
            self._retry_now = True
            self._woken.set()

    @property
    def is_settled(self) -> bool:
        """Whether the last wish was taken up and brought to its end."""
        return self._pointer.life.state in RESTING and not self._is_newer()

    def report(self) -> ModelReport:
        """Return what the hub is told about this model."""
        p = self._pointer
        wish = self._wish()
        # A wish not taken up yet must not look fulfilled, or already failed.
        pending = (
            p.life.state in RESTING and self._is_newer() and wish is not None
        ) and not self._is_committed(wish)
        return ModelReport(
            model=self.model,
            desired_release=wish.release if wish is not None else 0,
            active_release=p.active.release if p.active is not None else 0,
            previous_release=p.previous.release if p.previous is not None else 0,
            active_version=p.active.version if p.active is not None else "",
            phase="accepted" if pending else p.life.phase,
            code="" if pending and p.code != "disk/damaged" else p.code,
            sentence="" if pending and p.code != "disk/damaged" else p.sentence,
            attempt=p.life.attempt,
            figures=p.figures,
            bytes_done=self._bytes[0],
            bytes_total=self._bytes[1],
        )

    async def run(self) -> None:
        """Work until cancelled."""
        with contextlib.suppress(DiskFull, DiskFault):
            await self._around.on_disk(self._around.slots.collect, self.model)
        while True:
            event, why = await self._next()
            await self._enter(event, why)

    # What happens next

    async def _next(self) -> tuple[Event, StepEnded | None]:
        """Return the next event of this model, and its reason if it is a bad one."""
        match self._pointer.life.state:
            case State.IDLE:
                await self._until_something_is_wanted()
                return Event.WANTED, None
            case State.REJECTED | State.ROLLED_BACK:
                while not self._is_newer():
                    await self._sleep(None)
                return Event.SUPERSEDED, None
            case State.WAITING:
                return await self._until_next_attempt(), None
            case State.ROLLING_BACK:
                return await self._perform(State.ROLLING_BACK)
            case working:
                return await self._unless_superseded(working)

    async def _until_something_is_wanted(self) -> None:
        while True:
            wish = self._wish()
            if not self._is_newer():
                await self._sleep(None)
            elif wish is None or self._is_committed(wish):
                await self._adopt_generation()
                await self._around.tell()
            else:
                return

    async def _until_next_attempt(self) -> Event:
        clock = asyncio.get_running_loop().time
        due = clock() + (0.0 if self._retry_now else self._pause())
        self._retry_now = False
        while not self._is_newer():
            if self._retry_now or clock() >= due:
                return Event.WANTED
            await self._sleep(due - clock())
        return Event.SUPERSEDED

    def _pause(self) -> float:
        timings = self._around.timings
        doublings = min(max(self._pointer.life.failures, self._interruptions) - 1, 30)
        pause = min(timings.retry_max_s, timings.retry_s * 2.0 ** max(0, doublings))
        return pause * self._around.jitter()

    async def _unless_superseded(self, state: State) -> tuple[Event, StepEnded | None]:
        step = asyncio.create_task(self._perform(state), name=f"{STAGES[state]} {self.model}")
        try:
            while not step.done():
                if self._is_newer() and self._supersedes(state):
                    return Event.SUPERSEDED, None
                if self._is_newer() and self._wish() == self._pointer.candidate:
                    await self._adopt_generation()
                    continue
                woken = asyncio.create_task(self._woken.wait())
                await asyncio.wait({step, woken}, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                self._woken.clear()
            return step.result()
        finally:
            if not step.done():
                step.cancel()
                await asyncio.wait({step})

    def _supersedes(self, state: State) -> bool:
        """Return whether the newer wish ends what is under way.

        Other certificates do not, once the files are here: they follow after the commit.
        """
        wish, candidate = self._wish(), self._wanted()
        if state is State.FETCHING or wish is None:
            return wish != candidate
        return not wish.is_of_the_release_of(candidate)

    async def _sleep(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        self._woken.clear()

    def _wish(self) -> Target | None:
        return self._around.desired().target(self.model)

    def _wants_again(self, candidate: Target | None) -> bool:
        wish = self._wish()
        if wish is None or candidate is None:
            return False
        return wish.is_of_the_release_of(candidate)

    def _is_newer(self) -> bool:
        return self._around.desired().generation > self._pointer.generation

    def _is_committed(self, wish: Target) -> bool:
        return self._pointer.committed is not None and wish.slot == self._pointer.committed.slot

    async def _adopt_generation(self) -> None:
        self._pointer = replace(self._pointer, generation=self._around.desired().generation)
        with contextlib.suppress(DiskFull, DiskFault):  # forgotten, it is adopted again
            await self._around.on_disk(self._around.slots.put, self._pointer)

    # The steps

    async def _perform(self, state: State) -> tuple[Event, StepEnded | None]:
        """Perform the step of ``state`` and return how it ended."""
        step, deadline_s = self._step(state)
        stage = STAGES[state]
        ended: StepEnded
        try:
            if state is State.TESTING:
                await self._around.one_self_test.acquire()
            try:
                async with asyncio.timeout(deadline_s) as deadline:
                    event = await step()
            finally:
                if state is State.TESTING:
                    self._around.one_self_test.release()
            return event or Event.DONE, None
        except StepEnded as error:
            ended = error
        except (DiskFull, DiskFault) as error:
            ended = StepFailed(error.code, str(error))
        except ReleaseRefused as error:
            ended = StepFailed(f"{stage}/load", str(error))
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                late = StepInterrupted if state is State.FETCHING else StepFailed
                ended = late(f"{stage}/timeout", f"it was not done after {deadline_s:g} s")
            elif isinstance(error, OSError) and (disk := _disk_error(error)) is not None:
                ended = disk
            else:
                # Whatever a step meets in what comes from outside must end the attempt and not
                # the agent, which would meet it again after every restart. It is reported.
                _log.exception("an update step failed", model=self.model, step=stage)
                ended = StepFailed(f"{stage}/internal", f"{type(error).__name__}: {error}"[:300])
        if ended.event not in TRANSITIONS[state]:
            # A candidate that serves is never beyond another try, and only fetching can wait for
            # the outside world. Anywhere else these mean a failure.
            ended = StepFailed(ended.code, ended.sentence, ended.figures)
        return ended.event, ended

    def _step(self, state: State) -> tuple[Callable[[], Awaitable[Event | None]], float]:
        timings = self._around.timings
        match state:
            case State.FETCHING:
                return self._fetch, timings.fetch_s
            case State.VERIFYING:
                return self._verify, timings.verify_s
            case State.TESTING:
                return self._test, timings.self_test_s
            case State.SHADOW:
                return self._shadow, timings.shadow_s
            case State.TRIAL:
                return self._try, timings.trial_s
            case State.PROBATION:
                return self._watch, timings.probation_s + max(10.0, timings.watch_s)
            case State.ROLLING_BACK:
                return self._roll_back, timings.rollback_s
            case State.IDLE | State.WAITING | State.REJECTED | State.ROLLED_BACK:
                raise AssertionError(f"{state} has no step")
            case _:
                assert_never(state)

    async def _fetch(self) -> Event | None:
        target = self._wanted()
        slots = self._around.slots
        held, serves = self._pointer.committed, self._committed
        if held is not None and serves is not None and target.is_of_the_release_of(held):
            self._renewal = await certificates.renewed(self._around, held, serves, target)
            if self._renewal is not None:
                return Event.RENEWED
        if await self._around.on_disk(slots.is_sealed, target):
            return None  # an earlier attempt, or a release that this device had before
        into = self._around.root / await self._around.on_disk(slots.stage, target)

        def progress(done: int, total: int) -> None:
            self._bytes = (done, total)

        await self._around.fetch.fetch(target, into, progress)
        self._interruptions = 0
        return None

    async def _verify(self) -> None:
        self._candidate = await self._around.on_disk(self._verify_and_seal, self._wanted())

    def _verify_and_seal(self, target: Target) -> tuple[BundleDirectory, Choice]:
        slots = self._around.slots
        sealed = slots.is_sealed(target)
        folder = slots.folder(target)
        try:
            bundle, choice = self._around.read(folder if sealed else slots.stage(target))
            found = (bundle.bundle.model, bundle.bundle.version)
            if found != (target.model, target.version):
                raise StepRefused(
                    "verify/identity",
                    f"release {target.release} holds {found[0]} {found[1]}, the hub wants"
                    f" {target.model} {target.version}",
                )
        except BundleRefused as error:
            slots.discard(target)
            raise StepFailed("verify/bundle", str(error)) from None
        if not sealed:
            digests = {
                name: file.sha256
                for name, file in bundle.bundle.files.items()
                if name in bundle.bundle.files_for({choice.variant.name})
                and bundle.file(name).is_file()
            }
            slots.seal(target, digests)
        return replace(bundle, path=self._around.root / folder), choice

    async def _test(self) -> None:
        bundle, choice = self._verified()
        figures = await self._around.self_test.run(bundle, choice.variant.name, choice.provider)
        self._pointer = replace(self._pointer, figures=figures)

    async def _shadow(self) -> None:
        """Pass: running beside the committed release on live inputs has no window yet."""

    async def _try(self) -> None:
        bundle, choice = self._verified()
        serving = self._around.serving
        try:
            golden = await self._around.on_disk(
                GoldenVectors.read, bundle.bundle, bundle.file(bundle.bundle.self_test.path)
            )
        except VectorsUnusable as error:
            raise StepFailed("trial/vectors", str(error)) from None
        await serving.activate(self.model, bundle)
        self._answering = self._wanted(), bundle
        self.restrict()  # before the next request: something may have been withdrawn meanwhile
        answers = [
            await serving.run(self.model, inputs) for inputs in golden.batches(choice.variant)
        ]
        try:
            judge(
                bundle.bundle,
                golden,
                answers,
                bundle.bundle.self_test.tolerances[choice.variant.name].on(choice.provider),
            )
        except Deviates as error:
            raise StepFailed("trial/deviation", str(error), error.figures) from None

    async def _watch(self) -> None:
        clock = asyncio.get_running_loop().time
        timings = self._around.timings
        until = clock() + timings.probation_s
        while True:
            if (faults := self._around.serving.faults(self.model)) > 0:
                raise StepFailed(
                    "probation/engine-fault",
                    f"the engine failed {faults} times while the candidate was on probation",
                )
            if (left := until - clock()) <= 0:
                return
            await asyncio.sleep(min(left, timings.watch_s))

    async def _roll_back(self) -> None:
        await self._around.serving.activate(self.model, self._committed)
        self._answering = self._as_answering()
        self.restrict()

    def _as_answering(self) -> tuple[Target, BundleDirectory] | None:
        """Return what is committed, as what answers; None: what the device had before does."""
        target = self._pointer.committed
        return None if target is None or self._committed is None else (target, self._committed)

    def _wanted(self) -> Target:
        candidate = self._pointer.candidate
        assert candidate is not None, "a step without a candidate: our bug"
        return candidate

    def _verified(self) -> tuple[BundleDirectory, Choice]:
        assert self._candidate is not None, "VERIFYING comes before this step: our bug"
        return self._candidate

    # What follows from it

    async def _enter(self, event: Event, why: StepEnded | None) -> None:
        """Make the state after ``event`` durable, clear up behind it, and report it."""
        was = self._pointer
        forward = event in (Event.WANTED, Event.RENEWED) or (
            event is Event.DONE and was.life.state is not State.ROLLING_BACK
        )
        now = self._after(event, why)
        try:
            await self._around.on_disk(self._around.slots.put, now)
        except (DiskFull, DiskFault) as error:
            if forward:
                if event is Event.WANTED:
                    self._pointer = now  # in memory only: there is an attempt that can fail
                await self._enter(Event.FAILED, StepFailed(error.code, str(error)))
                return
        self._pointer = now
        if why is not None and why.event is Event.INTERRUPTED:
            self._interruptions += 1
        if event is Event.DONE and was.life.state is State.PROBATION:
            self._committed = self._verified()[0]
        if event is Event.RENEWED:
            assert self._renewal is not None, "what was renewed was found before: our bug"
            self._committed, self._renewal = self._renewal, None
            self._answering = self._as_answering()
            self.restrict()
        if now.life.state in RESTING:
            self._candidate = None
            self._interruptions = 0
            self._bytes = (0, 0)
        # What was fetched of a release is of use to the same one under other certificates.
        if event is not Event.SUPERSEDED or not self._wants_again(was.candidate):
            with contextlib.suppress(DiskFull, DiskFault):  # deleted with the next release then
                await self._clear_up(why)
        if why is not None:
            self._log_end(why)
        await self._around.tell()
        if was.life.state is State.ROLLING_BACK and event is Event.FAILED:
            await asyncio.sleep(min(1.0, self._around.timings.retry_s))

    def _log_end(self, why: StepEnded) -> None:
        p = self._pointer
        serves = "what served before" if p.committed is None else p.committed.version
        told = _log.bind(model=self.model, code=why.code, sentence=why.sentence, serves=serves)
        if p.candidate is not None:
            told = told.bind(release=p.candidate.release, version=p.candidate.version)
        match p.life.state:
            case State.REJECTED:
                told.error("release refused")
            case State.ROLLING_BACK:
                told.error("release is taken back")
            case _ if why.event is Event.INTERRUPTED:
                told.info("update is interrupted and goes on when it can")
            case _:
                told.warning("update failed and is tried again", attempt=p.life.failures)

    def _after(self, event: Event, why: StepEnded | None) -> Pointer:
        p = self._pointer
        life = p.life.after(event)
        if p.life.state is State.IDLE and event is Event.WANTED:
            self._retry_now = False
            return replace(
                p,
                life=life,
                generation=self._around.desired().generation,
                candidate=self._wish(),
                code="",
                sentence="",
                figures={},
            )
        if event is Event.WANTED:
            return replace(p, life=life, code="", sentence="")
        if event is Event.DONE and p.life.state is State.PROBATION:
            again = p.committed is not None and p.committed.slot == self._wanted().slot
            return replace(
                p,
                life=life,
                committed=p.candidate,
                before=p.before if again else p.committed,
                candidate=None,
                code="",
                sentence="",
            )
        if event is Event.RENEWED:
            target = self._wanted()
            before = p.before if p.before is None or p.before.slot != target.slot else None
            return replace(p, life=life, committed=target, before=before, candidate=None)
        if life.state is State.IDLE:
            return replace(p, life=life, candidate=None, code="", sentence="", figures={})
        if why is None:
            return replace(p, life=life)
        if p.life.state is State.ROLLING_BACK:
            sentence = f"going back failed, {why.sentence}; {p.sentence}"
            return replace(p, life=life, sentence=sentence[:500])
        return replace(
            p,
            life=life,
            code=why.code,
            sentence=why.sentence,
            figures=why.figures or p.figures,
        )

    async def _clear_up(self, why: StepEnded | None) -> None:
        slots = self._around.slots
        p = self._pointer
        full = why is not None and why.code == DiskFull.code
        if p.candidate is not None and (full or p.life.state in RESTING):
            await self._around.on_disk(slots.discard, p.candidate)
        if full and p.before is not None and p.life.state not in SERVING_CANDIDATE:
            # Two releases and a download must fit; the one before the committed one has to go.
            self._pointer = replace(p, before=None)
            await self._around.on_disk(slots.put, self._pointer)
        if full or p.life.state is State.IDLE:
            await self._around.on_disk(slots.collect, self.model)


def _disk_error(error: OSError) -> StepFailed | None:
    """Return what an error of the operating system says about the disk, if it does."""
    where = error.filename or "the disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StepFailed(DiskFull.code, f"{where}: no space is left on the device")
    if error.errno in (errno.EIO, errno.EROFS):
        return StepFailed(DiskFault.code, f"{where}: {error.strerror}")
    return None
