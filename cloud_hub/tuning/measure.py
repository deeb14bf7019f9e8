"""Measures settings of a model: the engines that serve, behind the batcher that serves.

For every engine two batches are under way, one running and one waiting: so the engines are never
idle, and the time of a batch holds the wait behind another one, as on a busy hub. When the
time is up, engines in child processes are ended, whatever they do; a run in this process is waited
for, because it cannot be stopped.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import numpy as np

from cloud_hub.engines.engine import Arrays, Engine
from cloud_hub.engines.launch import Launcher
from cloud_hub.engines.process import ProcessEngine
from cloud_hub.errors import ModelRefused
from cloud_hub.inference.batcher import Batcher, Compute
from cloud_hub.tuning.choice import (
    MIN_SLICE_S,
    Engines,
    Measurement,
    Setting,
    Space,
    remaining,
    slice_s,
)
from cloud_hub.tuning.settings import rows
from fogline_protocol.errors import InferenceError

PAGE = os.sysconf("SC_PAGE_SIZE")


class _Unwatched:
    """An observer that the batcher needs and nobody asks."""

    def batch_ran(self, rows: int, queued_s: Sequence[float], compute: Compute) -> None:
        """Nothing is counted."""

    def batch_failed(self, queued_s: Sequence[float], busy_s: float) -> None:
        """The caller has the error."""

    def requests_expired(self, queued_s: Sequence[float]) -> None:
        """No request has a deadline."""

    def request_rejected(self, reason: str) -> None:
        """There is room for every request."""


async def climb(
    launcher: Launcher,
    file: Path,
    sample: Arrays,
    space: Space,
    *,
    batches: bool,
    limit_s: float,
    ends_at: float,
    trying: Callable[[Setting, int], None],
) -> AsyncGenerator[Measurement, None]:
    """Measure what ``choice.remaining`` names until nothing is left or the time is up.

    Args:
        launcher: opens engines as the hub does.
        file: the ONNX file.
        sample: one row of every input, or the whole tensors of a model without ``batches``.
        space: what may be tried.
        batches: whether requests share a run.
        limit_s: the latency that p99 is held to.
        ends_at: seconds of ``time.monotonic()``, on Linux the clock of the loop too.
        trying: is told before each setting, with how many are left.
    """
    done: list[Measurement] = []
    while left := remaining(space, done, limit_s):
        first = left[0][0]
        wanted = first.engines
        try:
            async with contextlib.AsyncExitStack() as opened:
                try:
                    async with asyncio.timeout_at(ends_at):
                        engines = await _open(launcher, file, wanted, opened)
                except ModelRefused as error:  # so many may not fit
                    done.append(_failed(first, str(error)))
                    yield done[-1]
                    continue
                while (left := remaining(space, done, limit_s)) and left[0][0].engines == wanted:
                    setting = left[0][0]
                    count = sum(len(curve) for curve in left)
                    trying(setting, count)
                    async with asyncio.timeout_at(ends_at):
                        found = await _measure(
                            engines, setting, sample, batches=batches, left=count, ends_at=ends_at
                        )
                    if found is None:
                        return
                    done.append(found)
                    yield found
                    if found.trouble:
                        break  # an engine may be lost: the next curve gets new ones
        except TimeoutError:
            return


async def _open(
    launcher: Launcher, file: Path, wanted: Engines, opened: contextlib.AsyncExitStack
) -> Sequence[Engine]:
    engines = []
    for _ in range(wanted.instances):
        engine = await launcher.open(file, instances=wanted.instances, threads=wanted.threads)
        opened.push_async_callback(engine.close)
        engines.append(engine)
    return engines


async def _measure(
    engines: Sequence[Engine],
    setting: Setting,
    sample: Arrays,
    *,
    batches: bool,
    left: int,
    ends_at: float,
) -> Measurement | None:
    """Return what a setting gives; None: too little time is left to tell."""
    inputs = rows(sample, setting.batch) if batches else sample
    began = time.monotonic()
    try:
        # Each engine allocates for this batch; and it shows how long a run takes.
        await asyncio.gather(*(engine.run(inputs) for engine in engines))
        now = time.monotonic()
        for_s = slice_s(ends_at - now, left, 2 * (now - began))
        if for_s < MIN_SLICE_S:
            return None
        cpu_s = _cpu_s(engines)
        latencies, took_s = await _load(engines, setting, inputs, batches=batches, for_s=for_s)
        cpu_s = _cpu_s(engines) - cpu_s
    except (InferenceError, OSError) as error:
        return _failed(setting, str(error))
    except Exception as error:  # every runtime has errors of its own
        return _failed(setting, f"{type(error).__name__}: {error}")
    samples = len(latencies) * setting.batch
    p50, p99 = np.percentile(latencies, [50, 99])
    return Measurement(
        setting,
        runs=len(latencies),
        samples_per_s=samples / took_s,
        p50_s=float(p50),
        p99_s=float(p99),
        cpu_s_per_sample=cpu_s / samples,
        memory_bytes=_resident(engines),
    )


def _failed(setting: Setting, why: str) -> Measurement:
    return Measurement(setting, 0, 0.0, 0.0, 0.0, 0.0, 0, why)


async def _load(
    engines: Sequence[Engine], setting: Setting, inputs: Arrays, *, batches: bool, for_s: float
) -> tuple[Sequence[float], float]:
    """Return the seconds of every batch, and how long they took together."""
    callers = 2 * len(engines)
    batcher = Batcher(
        engines,
        batches=batches,
        max_batch=setting.batch,
        max_queue_rows=callers * setting.batch,
        observer=_Unwatched(),
    )
    serving = asyncio.create_task(batcher.serve(), name="tuned-batcher")
    latencies: list[float] = []
    began = time.monotonic()

    async def call() -> None:
        now = time.monotonic()
        while now < began + for_s:
            await batcher.infer(inputs, None)
            then, now = now, time.monotonic()
            latencies.append(now - then)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(call())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # one is enough to say why
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    return latencies, time.monotonic() - began


def _children(engines: Sequence[Engine]) -> list[int]:
    pids = [engine.pid for engine in engines if isinstance(engine, ProcessEngine)]
    return [pid for pid in pids if pid is not None]


def _cpu_s(engines: Sequence[Engine]) -> float:
    """Return the CPU seconds that this process and its engines have used.

    The clock of another process is glibc's ``clock_getcpuclockid``: its number, inverted, beside
    CPUCLOCK_SCHED (Linux, include/linux/posix-timers.h).
    """
    clocks = (~pid << 3 | 2 for pid in _children(engines))
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)


def _resident(engines: Sequence[Engine]) -> int:
    """Return the bytes in memory of this process and its engines."""
    pages = 0
    for pid in (os.getpid(), *_children(engines)):
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            pages += int(statm.read().split()[1])
    return pages * PAGE
