"""Which engine a model gets.

A model whose runs are proven short on the CPU runs inline, where it costs no hand-over. Every
other one gets a child process, because what can take long can also hang, and because a large
model's memory returns only with its process.
"""

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.engines.engine import Engine, seconds_per_row
from cloud_hub.engines.inline import ON_LOOP_BELOW_S, InlineEngine
from cloud_hub.engines.onnx_runtime import CPU, OnnxRuntimeSession, usable_providers
from cloud_hub.engines.process import Job, ProcessEngine
from cloud_hub.errors import ModelRefused
from fogline_protocol import documents

# A file of this size loads in a tenth of a second, so that little is lost if it turns out slow.
INLINE_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Launcher:
    """Opens engines as this hub is configured."""

    threads: int = 0  # per run; 0: as many as there are cores
    run_limit_s: float = 30.0  # then an engine counts as hung
    environment: Mapping[str, str] | None = None  # of child processes; None: this one's

    async def open(self, path: Path, *, instances: int = 1, threads: int = 0) -> Engine:
        """Return one of ``instances`` engines that has loaded the file and run it once.

        Args:
            path: an ONNX file.
            instances: how many share the machine.
            threads: per run, as the model's settings say; 0: nothing, this hub's count.

        Raises:
            ModelRefused: it cannot be loaded.
        """
        threads = threads or self.threads_of_one(instances)
        if _small(path) and usable_providers() == [CPU]:
            engine = await asyncio.to_thread(_inline, path, threads)
            if engine is not None:
                return engine
        return await self._apart(path, threads)

    async def open_all(
        self, path: Path, sha256: str, count: int, *, threads: int = 0
    ) -> list[Engine]:
        """Return ``count`` engines of the file with this digest, all of them or none.

        Raises:
            ModelRefused: one cannot be loaded, or the file at ``path`` is another one by now.
        """
        before = _identity(path)
        if await asyncio.to_thread(documents.sha256_of_file, path) != sha256:
            raise ModelRefused(f"{path} is another file than before: load the model anew")
        engines = await _all_or_none(
            lambda: self.open(path, instances=count, threads=threads), count
        )
        if _identity(path) != before:
            await asyncio.gather(*(engine.close() for engine in engines))
            raise ModelRefused(f"{path} changed while it was loaded: load the model anew")
        return engines

    async def open_plans(self, plan: Path, count: int) -> list[Engine]:
        """Return ``count`` engines that run a TensorRT plan, all of them or none.

        Raises:
            ModelRefused: no GPU, not enough of its memory, or a plan of something else.
        """
        return await _all_or_none(lambda: self.open_plan(plan), count)

    def threads_of_one(self, instances: int) -> int:
        """Return how many threads each of ``instances`` engines gets unless its model says so."""
        return self.threads or max(1, (os.cpu_count() or 1) // instances)

    async def open_apart(self, path: Path) -> Engine:
        """Return an engine in a process of its own, for a file that nothing is known of.

        Raises:
            ModelRefused: it cannot be loaded.
        """
        return await self._apart(path, self.threads)

    async def open_plan(self, plan: Path) -> Engine:
        """Return an engine that runs a TensorRT plan.

        Raises:
            ModelRefused: no GPU, not enough of its memory, or a plan of something else.
        """
        job = Job("tensorrt", plan, run_limit_s=self.run_limit_s, environment=self.environment)
        return await ProcessEngine.start(job)

    async def _apart(self, path: Path, threads: int) -> ProcessEngine:
        job = Job(
            "onnxruntime",
            path,
            threads,
            run_limit_s=self.run_limit_s,
            environment=self.environment,
        )
        return await ProcessEngine.start(job)


async def _all_or_none(open_one: Callable[[], Awaitable[Engine]], count: int) -> list[Engine]:
    async with contextlib.AsyncExitStack() as opened:
        engines: list[Engine] = []
        for _ in range(count):
            engine = await open_one()
            opened.push_async_callback(engine.close)
            engines.append(engine)
        opened.pop_all()
    return engines


def _identity(path: Path) -> tuple[int, ...]:
    """Return what changes when another file takes the place of this one, or it is written to."""
    try:
        found = path.stat()
    except OSError as error:
        raise ModelRefused(f"{path}: {error.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _small(path: Path) -> bool:
    try:
        return path.stat().st_size <= INLINE_MAX_BYTES
    except OSError as error:
        raise ModelRefused(f"{path}: {error.strerror}") from None


def _inline(path: Path, threads: int) -> InlineEngine | None:
    """Return an inline engine if its runs are short."""
    session = OnnxRuntimeSession(path, threads=threads)
    try:
        row_s = seconds_per_row(session)
    except ModelRefused as error:
        session.close()
        raise ModelRefused(f"{path}: {error}") from None
    if row_s is None or row_s >= ON_LOOP_BELOW_S:
        session.close()
        _return_freed_memory()  # a child holds the model from now on: once is enough
        return None
    return InlineEngine(session, row_s)


def _return_freed_memory() -> None:
    """Have the C library give back what it keeps for reuse: glibc would, most of a session."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # others do so unasked, or cannot
    if trim is not None:
        trim(0)
