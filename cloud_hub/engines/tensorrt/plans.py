"""Builds TensorRT plans, one at a time, and keeps them on disk.

``Plans`` is the directory: ``KEY.SHA256.plan``, so that one rename makes a plan appear whole
and its name proves its bytes: a plan that is damaged is never given to TensorRT, which may
crash on one. Whatever cannot be used is removed and built again.

``PlanBuilder`` runs ``plan_builder`` in a child process, because a build takes minutes, most
of a GPU's memory, and now and then the whole process with it. The child ends when its input
does, so it never survives the hub.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cloud_hub.engines.tensorrt import plan_builder
from cloud_hub.engines.tensorrt.errors import GpuUnavailable, PlanRefused
from cloud_hub.engines.tensorrt.plan_key import (
    DEFAULT_OPTIONS,
    BuildOptions,
    PlanKey,
    Platform,
    Profile,
)

KEEP_BYTES = 16 << 30  # of all plans together
LIMIT_S = 3600.0  # large transformers take tens of minutes on optimization level 5
_PLATFORM_LIMIT_S = 120.0  # a GPU that sleeps takes seconds to wake, an import from a cold disk too
_GRACE_S = 5.0  # for a child to end by itself before it is killed
_LAST_WORDS = 2000  # bytes of a child that died
_LINE_BYTES = 1 << 20  # longest line a child may write

_PARTIAL = ".partial"
_PLAN = ".plan"
_TIMINGS = ".timings"


class _Kept(NamedTuple):
    path: Path
    nbytes: int
    used_at: float


class Plans:
    """The directory of plans. Used by one process; another one may read."""

    def __init__(self, directory: Path, *, keep_bytes: int = KEEP_BYTES) -> None:
        self._directory = directory
        self._keep_bytes = keep_bytes

    def find(self, key: PlanKey) -> Path | None:
        """Return the plan of this key, whole; a damaged one is removed. Reads all of it."""
        for path in sorted(self._directory.glob(f"{key.id}.*{_PLAN}")):
            if _sha256(path) == path.name.split(".")[1]:
                # The time of the last use, by which the oldest is found; not all disks keep it.
                os.utime(path)
                return path
            path.unlink(missing_ok=True)
        return None

    def keep(self, key: PlanKey, made: Path) -> Path:
        """Move a finished file in, and make room for it. The file must be in this directory."""
        path = self._directory / f"{key.id}.{_sha256(made)}{_PLAN}"
        _sync(made)
        made.replace(path)
        for older in self._directory.glob(f"{key.id}.*{_PLAN}"):
            if older != path:
                older.unlink(missing_ok=True)
        _sync(self._directory)
        self._make_room(path)
        return path

    def drop(self, plan: Path) -> None:
        """Forget a plan that TensorRT did not take, so that it is built again."""
        plan.unlink(missing_ok=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """Give a place to write a new plan to; what is still there at the end is removed.

        One at a time: what lies in an older place is taken for left over.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        for left in self._directory.glob(f"*{_PARTIAL}"):  # by builds that lost their hub
            left.unlink(missing_ok=True)
        number, name = tempfile.mkstemp(suffix=_PARTIAL, dir=self._directory)
        os.close(number)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def timings(self, platform: Platform) -> Path:
        """Return the file of measured kernels for this kind of machine: it makes builds short."""
        return self._directory / f"{platform.id}{_TIMINGS}"

    def _make_room(self, newest: Path) -> None:
        kept = [
            _Kept(path, found.st_size, found.st_mtime)
            for path in self._directory.glob(f"*{_PLAN}")
            for found in [path.stat()]
        ]
        for path in to_remove(kept, self._keep_bytes, newest):
            path.unlink(missing_ok=True)


def to_remove(
    kept: Sequence[tuple[Path, int, float]], keep_bytes: int, newest: Path
) -> Sequence[Path]:
    """Return the plans to remove, least recently used first, until the rest fits.

    Args:
        kept: path, size in bytes and time of last use of every plan.
        keep_bytes: what all of them together may take.
        newest: the plan that was just made: it stays, even if it is too large by itself.
    """
    excess = sum(nbytes for _, nbytes, _ in kept) - keep_bytes
    removed: list[Path] = []
    for path, nbytes, _ in sorted(kept, key=lambda plan: (plan[2], plan[0])):
        if excess <= 0:
            break
        if path != newest:
            removed.append(path)
            excess -= nbytes
    return removed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is, as TensorRT counts its steps."""

    model: Path
    phase: str
    step: int
    steps: int


class PlanBuilder:
    """Makes plans for one kind of machine. Used on one event loop; whoever waits owns the build."""

    def __init__(
        self,
        directory: Path,
        platform: Platform,
        *,
        options: BuildOptions = DEFAULT_OPTIONS,
        keep_bytes: int = KEEP_BYTES,
        limit_s: float = LIMIT_S,
        device: int = 0,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.plans = Plans(directory, keep_bytes=keep_bytes)
        self.building: Progress | None = None
        self._platform = platform
        self._options = options
        self._limit_s = limit_s
        self._device = device
        self._on_progress = on_progress
        self._environment = environment
        # One at a time: builds measure kernels, and would measure each other.
        self._turn = asyncio.Lock()

    def key(self, digest: str, profile: Profile) -> PlanKey:
        """Return the key of the plan for a model file with this SHA-256."""
        return PlanKey(self._platform, digest, profile, self._options)

    async def kept(self, digest: str, profile: Profile) -> Path | None:
        """Return the plan if it need not be built."""
        return await asyncio.to_thread(self.plans.find, self.key(digest, profile))

    async def plan(self, model_path: Path, digest: str, profile: Profile) -> Path:
        """Return the plan of a model, built if it is not kept. May take very long.

        Cancelling ends the build. Two callers who want the same plan get one build.

        Raises:
            PlanRefused: there can be none, or not now; the reason is one sentence.
        """
        key = self.key(digest, profile)
        try:
            # What is kept need not wait for another model's build.
            found = await asyncio.to_thread(self.plans.find, key)
            if found is not None:
                return found
            async with self._turn:
                found = await asyncio.to_thread(self.plans.find, key)
                if found is not None:
                    return found
                with self.plans.place() as place:
                    await self._build(plan_builder.Task(
                        model=model_path,
                        sha256=digest,
                        profile=profile,
                        options=self._options,
                        device=self._device,
                        plan=place,
                        timings=self.plans.timings(self._platform),
                    ))  # fmt: skip
                    return await asyncio.to_thread(self.plans.keep, key, place)
        except OSError as error:
            raise PlanRefused(f"the plan cannot be kept: {error}", lasting=False) from None

    async def _build(self, task: plan_builder.Task) -> None:
        def hear(said: Mapping[str, Any]) -> None:
            self.building = Progress(task.model, said["phase"], said["step"], said["steps"])
            self._on_progress(self.building)

        try:
            outcome = await _ask_child(task.to_json(), self._limit_s, self._environment, hear)
        except TimeoutError:
            raise PlanRefused(
                f"the plan of {task.model} was not ready after {self._limit_s:.0f} s: allow more "
                "time, or lower optimization_level",
                lasting=False,
            ) from None
        except _ChildDied as death:
            raise PlanRefused(f"the builder of {task.model} {death}", lasting=False) from None
        finally:
            self.building = None
        if "refused" in outcome:
            raise PlanRefused(str(outcome["refused"]), lasting=bool(outcome["lasting"]))


async def find_platform(
    device: int = 0, *, environment: Mapping[str, str] | None = None
) -> Platform:
    """Return the kind of machine this is, or say why it can have no plans.

    A child process looks: what TensorRT and CUDA take from a process that loads them, hundreds
    of megabytes, the hub does not need.

    Raises:
        GpuUnavailable: no TensorRT, driver or GPU; the text says which.
    """
    try:
        outcome = await _ask_child({"platform": device}, _PLATFORM_LIMIT_S, environment)
    except TimeoutError:
        raise GpuUnavailable(
            f"the GPU said nothing for {_PLATFORM_LIMIT_S:.0f} s: see whether nvidia-smi answers"
        ) from None
    except _ChildDied as death:
        raise GpuUnavailable(f"the process that looked for a GPU {death}") from None
    if "refused" in outcome:
        raise GpuUnavailable(str(outcome["refused"]))
    return Platform(**outcome["platform"])


class _ChildDied(Exception):
    """A child ended without an outcome; the text says how, without a subject."""


async def _ask_child(
    request: Mapping[str, Any],
    limit_s: float,
    environment: Mapping[str, str] | None,
    hear: Callable[[Mapping[str, Any]], None] = lambda said: None,
) -> Mapping[str, Any]:
    """Let a child do one thing and return its outcome; it has ended then, however this ends.

    Raises:
        TimeoutError: it took longer than the limit.
        _ChildDied: it ended without an outcome.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        plan_builder.__name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
        env=environment,
    )
    words = bytearray()
    listening = asyncio.create_task(_listen(process, words))
    try:
        async with asyncio.timeout(limit_s):
            outcome = await _follow(process, request, hear)
            await process.wait()
            await listening
    finally:
        await _end(process)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    if outcome is None:
        raise _ChildDied(_obituary(process.returncode or 0, words.decode(errors="replace")))
    return outcome


async def _follow(
    process: asyncio.subprocess.Process,
    request: Mapping[str, Any],
    hear: Callable[[Mapping[str, Any]], None],
) -> Mapping[str, Any] | None:
    """Give the child its request and read what it says until it has said the outcome."""
    assert process.stdin is not None  # both were asked for
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its last words tell why
        process.stdin.write(json.dumps(request).encode() + b"\n")
        await process.stdin.drain()
    async for line in process.stdout:
        said: Mapping[str, Any] = json.loads(line)
        if "phase" not in said:
            return said
        hear(said)
    return None


async def _listen(process: asyncio.subprocess.Process, words: bytearray) -> None:
    """Keep the last words of a child, which may write lines of any length."""
    assert process.stderr is not None  # it was asked for
    while heard := await process.stderr.read(1 << 16):
        words += heard
        del words[:-_LAST_WORDS]


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a child that may have ended: by its input first, then by force."""
    if process.returncode is not None:
        return
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_GRACE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _obituary(returncode: int, words: str) -> str:
    how = (
        f"was ended by {signal.Signals(-returncode).name}"
        if returncode < 0
        else f"ended with exit code {returncode}"
    )
    last = "; ".join(line.strip() for line in words.splitlines() if line.strip())
    return f"{how}{': ' + last if last else ''}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
