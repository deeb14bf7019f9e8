"""An engine in a child process: what hangs, crashes or eats the memory there costs one batch.

    start ─► loading ─ contract ─► running ◄─────────────┐
                └─ refused: ModelRefused                 │ started again
                               running ─ died, hung ─► replaced, at once, then ever more slowly

A batch that took an engine down is not tried again: it might take the next one down too. And
an engine is replaced by one with the same bytes, whatever has become of their file: answers
name the digest of what gave them.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_hub.engines.channel import Channel, Gone, Message
from cloud_hub.engines.engine import Arrays, EngineLost, join
from cloud_hub.engines.tensorrt.errors import GpuUnavailable, OutOfDeviceMemory, PlanUnusable
from cloud_hub.errors import ModelRefused
from fogline_protocol import tensors
from fogline_protocol.errors import BadRequest, ServerFault
from fogline_protocol.tensors import TensorSpec

RETRY_S = 0.5  # before the second start in a row; doubles
RETRY_MAX_S = 30.0
CLOSE_S = 5.0  # for a child that is told to end; it has nothing to save

log = logging.getLogger("fogline.engines")


@dataclass(frozen=True, slots=True)
class Job:
    """What a child is to load, and how long it may take over things."""

    runtime: str  # a key of what worker.py can open
    path: Path
    threads: int = 0  # per run; 0: as many as there are cores
    load_limit_s: float = 300.0
    run_limit_s: float = 30.0
    environment: Mapping[str, str] | None = None  # None: this process's

    def document(self, path: str) -> Mapping[str, Any]:
        """Return what the child is told; ``path`` is where it finds the file."""
        return {"runtime": self.runtime, "path": path, "threads": self.threads}


class _HeldFile:
    """A model's file, held open so that it can be loaded again when its path leads elsewhere."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelRefused(f"{path}: {error.strerror}") from None
        self._path = path
        self._first = os.fstat(self.descriptor)

    def path(self) -> str:
        """Return where a child that has the descriptor finds the bytes that were loaded first.

        Raises:
            ModelRefused: they are no more: somebody wrote over them.
        """
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._first.st_size, self._first.st_mtime_ns):
            raise ModelRefused(
                f"{self._path} was written over after it had been loaded: load the model anew"
            )
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.stat(), self._first):
                return str(self._path)  # beside it may lie weights that the graph refers to
        return f"/proc/self/fd/{self.descriptor}"

    def close(self) -> None:
        """Let go of the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class ProcessEngine:
    """A session in a child process. Used on one event loop; one run at a time.

    Owner of the child. ``_running`` is set while there is one that can take a run.
    """

    digest = ""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._channel: Channel | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._answered: asyncio.Future[Message] | None = None  # while something was asked
        self._running = asyncio.Event()
        # Of the start that is going on: whether there is a child that runs.
        self._outcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._file = _HeldFile(job.path)
        self._replacing: asyncio.Task[None] | None = None
        self._closed = False
        self.trouble = ""  # set when it could not be started again
        self.starts = 0
        self.platform = ""
        self.provider = ""
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self.row_s: float | None = None  # how long one row took, if that can be told

    def __repr__(self) -> str:
        pid = None if self._process is None else self._process.pid
        return f"<ProcessEngine {self._job.path} pid {pid} {self.trouble or 'running'}>"

    @classmethod
    async def start(cls, job: Job) -> "ProcessEngine":
        """Return an engine that has loaded its model and run it once.

        Raises:
            ModelRefused: it cannot be loaded, or died or hung meanwhile.
        """
        engine = cls(job)
        try:
            await engine._start()
        except BaseException:
            engine._file.close()
            raise
        return engine

    @property
    def pid(self) -> int | None:
        """The child's process, for figures about it; None while it is being replaced."""
        return self._process.pid if self._process is not None else None

    @property
    def memory_bytes(self) -> int:
        """What the child holds resident; 0 while there is none."""
        if self._process is None:
            return 0
        try:
            resident = (
                Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1]
            )
        except OSError:
            return 0
        return int(resident) * os.sysconf("SC_PAGE_SIZE")

    async def ready(self) -> None:
        """Return when a run could start at once; see ``Engine``.

        Raises:
            EngineLost: the start that was going on failed.
        """
        if not self._running.is_set() and not await asyncio.shield(self._outcome):
            raise EngineLost(self.trouble)

    def join(self, requests: Sequence[Arrays]) -> Arrays:
        """Return the rows of several requests where the child reads them; see ``Engine``."""
        texts = any(array.dtype == tensors.BYTES for array in requests[0].values())
        if self._channel is None or texts:  # being replaced; or they are written as they are sent
            return join(requests)
        return self._channel.join(requests)

    async def run(self, inputs: Arrays, deadline: float | None = None) -> Arrays:
        """Return every output; see ``Engine``. A run cannot be stopped without its process.

        Raises:
            BadRequest: the values do not suit the model.
            ServerFault: the runtime failed on them.
            EngineLost: the child died or hung over them and is being replaced, or could not be.
        """
        await self.ready()
        try:
            answer, outputs = await self._ask(
                {}, inputs, self._job.run_limit_s, f"hung: no answer in {self._job.run_limit_s} s"
            )
        except Gone as error:
            self._replace(str(error))
            raise EngineLost(
                f"the engine {error} while it ran this batch; it is being replaced"
            ) from None
        except asyncio.CancelledError:
            # It may answer late, which nobody must take for the answer to something else.
            self._replace("was left in the middle of a run")
            raise
        if answer.get("blame") == "lost":
            self._replace(f"gave up: {answer['error']}")
            raise EngineLost(answer["error"])
        if "error" in answer:
            kind = BadRequest if answer["blame"] == "caller" else ServerFault
            raise kind(answer["error"])
        # The next run overwrites this memory, and callers keep their rows for as long as they like.
        return {name: values.copy() for name, values in outputs.items()}

    async def close(self) -> None:
        """End the child: its memory returns with it."""
        self._closed = True
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.gather(self._replacing, return_exceptions=True)
        await self._end()
        self._file.close()

    async def _start(self) -> None:
        try:
            path = ""
            # The child may come to the path after another file has: then what it made of that
            # one counts for nothing.
            while path != (path := self._file.path()):
                await self._end()
                try:
                    await self._load(path)
                except ModelRefused:
                    if path == self._file.path():
                        raise
        except BaseException:
            await self._end()
            raise
        self.trouble = ""
        self._running.set()
        self._outcome.set_result(True)

    async def _load(self, path: str) -> None:
        """Start a child that loads what lies at ``path``."""
        channel, theirs = Channel.pair()
        self._channel = channel
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "cloud_hub.engines.child",
                str(theirs.fileno()), str(os.getpid()),
                pass_fds=(theirs.fileno(), self._file.descriptor), stdin=asyncio.subprocess.DEVNULL,
                env=self._job.environment,
            )  # fmt: skip
        asyncio.get_running_loop().add_reader(channel.fileno(), self._heard)
        self.starts += 1
        limit = self._job.load_limit_s
        try:
            answer, _ = await self._ask(
                self._job.document(path), {}, limit, f"hung: not loaded after {limit} s"
            )
        except Gone as error:
            raise ModelRefused(f"{self._job.path}: the engine {error} while it loaded") from None
        if "refused" in answer:
            raise _REFUSALS.get(answer["kind"], ModelRefused)(answer["refused"])
        self.platform, self.provider = answer["platform"], answer["provider"]
        self.inputs, self.outputs = _specs(answer["inputs"]), _specs(answer["outputs"])
        self.row_s = answer["row_s"]

    async def _ask(
        self, document: Mapping[str, Any], arrays: Arrays, limit_s: float, late: str
    ) -> Message:
        """Send a message and return the one that answers it.

        Raises:
            Gone: with a verb phrase that says what became of the child.
        """
        assert self._channel is not None
        self._answered = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(document, arrays)
            async with asyncio.timeout(limit_s):
                return await self._answered
        except TimeoutError:
            raise Gone(late) from None
        except Gone:
            raise Gone(await self._fate()) from None
        finally:
            self._answered = None

    def _heard(self) -> None:
        """The child has said something, or hung up."""
        assert self._channel is not None
        try:
            message = self._channel.receive()
        except Gone as gone:
            if self._answered is None:
                self._replace("died while it was idle")
            elif not self._answered.done():
                self._answered.set_exception(gone)
        else:
            if self._answered is not None and not self._answered.done():
                self._answered.set_result(message)

    async def _fate(self) -> str:
        """Say what became of a child that hung up."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                code = await self._process.wait()
                return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return "closed its connection"

    def _replace(self, why: str) -> None:
        assert self._channel is not None
        asyncio.get_running_loop().remove_reader(self._channel.fileno())
        self._running.clear()
        self._outcome = asyncio.get_running_loop().create_future()
        log.error("the engine of %s is lost: it %s", self._job.path, why)
        if not self._closed:
            self._replacing = asyncio.create_task(self._start_again(), name="replace-engine")

    async def _start_again(self) -> None:
        wait_s = RETRY_S
        while True:
            await self._end()
            began = time.monotonic()
            try:
                await self._start()
            except (ModelRefused, OSError) as error:
                self.trouble = f"the engine cannot be started again: {error}"
                tried, self._outcome = self._outcome, asyncio.get_running_loop().create_future()
                tried.set_result(False)  # whoever waits has waited long enough
                log.error("the engine of %s is not replaced: %s", self._job.path, error)
            else:
                took_s = time.monotonic() - began
                log.info("the engine of %s is replaced, in %.3f s", self._job.path, took_s)
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)

    async def _end(self) -> None:
        """End the child and wait until it is gone."""
        self._running.clear()
        channel, self._channel = self._channel, None
        if channel is not None:
            asyncio.get_running_loop().remove_reader(channel.fileno())
            channel.close()
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._process = None  # only now: who is cancelled here leaves it to whoever closes


# What a child's refusals are called there.
_REFUSALS: Mapping[str, type[ModelRefused]] = {
    kind.__name__: kind for kind in (GpuUnavailable, OutOfDeviceMemory, PlanUnusable)
}


def _specs(documents: list[tuple[str, str, list[int]]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, datatype, tuple(shape)) for name, datatype, shape in documents)
