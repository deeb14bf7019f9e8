"""What an update needs of the device around it: small interfaces, declared where they are used.

``agent.py`` fills them in: what fetches, what tries, what serves. Nothing in this package
imports the other side, so an update can be tested with no agent and no network.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.variants import Choice
from edge_agent.update.lifecycle import StepRefused
from edge_agent.update.slots import Desired, Slots, Target
from fogline_protocol import release
from fogline_protocol.release import BundleDirectory
from fogline_protocol.tensors import Array

P = ParamSpec("P")
T = TypeVar("T")

Progress = Callable[[int, int], None]  # bytes here, bytes in all


class Fetch(Protocol):
    """Brings a release to this device."""

    async def fetch(self, target: Target, into: Path, progress: Progress) -> None:
        """Fill the folder ``into`` with the files of ``target`` that this device needs.

        ``into`` may hold what an interrupted call left there. On return it holds the bundle and
        nothing else, every byte as the hub signed it. A cancelled call has stopped writing when
        the cancellation arrives at its caller.

        Raises:
            StepInterrupted: the hub cannot be reached; what was fetched stays for the next call.
            StepRefused: the hub signed no such release, or one that is not for this device.
            StepFailed: it went wrong, another attempt may go better.
            OSError: the disk is full or fails.
        """
        ...

    async def certificates(self, targets: Collection[str]) -> Mapping[str, bytes]:
        """Return the certificates at these target paths, as the hub signed them, by their ids.

        Raises:
            StepInterrupted, StepRefused, StepFailed, OSError: as ``fetch`` does.
        """
        ...

    async def withdrawn(self, targets: Collection[str]) -> frozenset[str]:
        """Return the ids of those of these certificates that the hub does not sign any more.

        Raises:
            StepInterrupted, StepRefused, StepFailed, OSError: it is not known.
        """
        ...


class SelfTest(Protocol):
    """Runs golden inputs where nothing depends on it."""

    async def run(
        self, candidate: BundleDirectory, variant: str, provider: str
    ) -> Mapping[str, float]:
        """Return the figures of a self-test that was passed.

        Raises:
            StepRefused: the candidate is wrong.
            StepFailed: it could not be shown to be right this time.
        """
        ...


class Place(NamedTuple):
    """Where a model is answered."""

    release: int  # the hub's number; 0: what the device had before
    variant: str
    provider: str


class Serving(Protocol):
    """What answers requests, as far as an update is concerned."""

    async def activate(self, model: str, bundle: BundleDirectory | None) -> None:
        """Answer ``model`` with ``bundle`` from now on, without failing a request.

        None stands for what the device had before the hub gave it anything. When this raises,
        or is cancelled, what served before still serves.
        """
        ...

    def place(self, model: str) -> Place | None:
        """Return what answers ``model`` now, and where; None: nothing does."""
        ...

    def certify(self, model: str, bundle: BundleDirectory) -> None:
        """Answer under the certificates of ``bundle`` from the next request on.

        ``bundle`` has the files of what answers; nothing is loaded and no request waits.
        """
        ...

    async def run(self, model: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the engine that answers ``model`` now."""
        ...

    def faults(self, model: str) -> int:
        """Return how often the engine of ``model`` has failed since it was activated."""
        ...


@dataclass(frozen=True, slots=True)
class Timings:
    """Deadlines of the steps and pauses between attempts, in seconds."""

    fetch_s: float = 6 * 3600.0  # then it starts over with what is there, uncounted
    verify_s: float = 600.0  # 2 GB at the 10 MB/s of a slow SD card take 200 s
    self_test_s: float = 120.0  # above the limit that a self-test itself knows
    shadow_s: float = 600.0
    trial_s: float = 60.0  # load, warm up, switch, answer the golden inputs
    probation_s: float = 30.0  # the window that has to pass without an engine fault
    watch_s: float = 1.0  # between two looks at the engine during the window
    rollback_s: float = 10.0  # fleet-updates.md 11, R3
    retry_s: float = 5.0  # before the second attempt; doubles, with full jitter
    retry_max_s: float = 600.0
    doubt_s: float = 600.0  # between questions about certificates that no wish speaks of


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the machines of one device share."""

    root: Path  # of the slots
    slots: Slots  # inside the event loop, touched through `on_disk` only
    desired: Callable[[], Desired]  # the last one accepted; changes between two awaits only
    thread: Executor  # the one thread that touches them: an fsync may take seconds
    fetch: Fetch
    self_test: SelfTest
    serving: Serving
    choose: Callable[[BundleDirectory], Choice]  # raises ReleaseRefused: nothing of it runs here
    timings: Timings
    jitter: Callable[[], float]  # numbers in [0, 1)
    tell: Callable[[], Awaitable[None]]  # reports the whole device
    # Two self-tests at a time would each need the memory.
    one_self_test: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def on_disk(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` on the thread that owns the slots."""
        return await asyncio.get_running_loop().run_in_executor(
            self.thread, lambda: function(*args, **kwargs)
        )

    def read(
        self,
        folder: str,
        holding: Callable[[BundleDirectory], BundleDirectory] = lambda bundle: bundle,
    ) -> tuple[BundleDirectory, Choice]:
        """Read and verify the variant that this device runs of the bundle in ``folder``.

        Only what was fetched of it is chosen from, by those of its certificates that ``holding``
        leaves.

        Raises:
            BundleRefused: it is not intact.
            StepRefused: no variant of it runs here.
        """
        path = self.root / folder
        there = release.read(path, variants=())
        here = frozenset(v.name for v in there.bundle.variants if (path / v.path).is_file())
        try:
            choice = self.choose(replace(holding(there), present=here))
        except ReleaseRefused as error:
            raise StepRefused("verify/no-variant", str(error)) from None
        return release.read(path, variants={choice.variant.name}), choice
