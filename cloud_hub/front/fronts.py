"""Starts the fronts, answers what they pass on, and starts one again that ends.

All of them listen on one port; the kernel spreads connections over them. Callers who were
connected to a front that ended connect again, to another one.
"""

import asyncio
import contextlib
import fcntl
import mmap
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import structlog

from cloud_hub.config import HubConfig, split_address
from cloud_hub.errors import StartRefused
from cloud_hub.front.relay import Answer, HubEnd, Kind
from fogline_protocol.errors import Unavailable
from fogline_protocol.outcomes import Books

ARENA_MESSAGES = 4  # the largest ones that lie in shared memory at a time; pages cost when used
START_LIMIT_S = 30.0
RESTART_S = 1.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Front:
    process: asyncio.subprocess.Process
    end: HubEnd


class Fronts:
    """N processes on one port: ``await start(N)``, ``await stop(grace_s)``."""

    def __init__(self, config: HubConfig, memory_bytes: int, answer: Answer, books: Books) -> None:
        """Prepare; ``answer`` answers a call, and each may hold ``memory_bytes`` for callers.

        ``books`` are told how the requests end that come by them.
        """
        self._address = config.grpc
        self._setup: dict[str, Any] = {
            "door": config.door,
            "tls_cert": config.tls_cert and str(config.tls_cert),
            "tls_key": config.tls_key and str(config.tls_key),
            "max_message_bytes": config.max_message_bytes,
            "memory_bytes": memory_bytes,
        }
        self._answer = answer
        self._books = books
        self._fronts: dict[int, _Front] = {}
        self._keeping: list[asyncio.Task[None]] = []
        self._reserved: socket.socket | None = None
        self.port = 0

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [front.process.pid for front in self._fronts.values()]

    async def start(self, count: int) -> None:
        """Return when ``count`` fronts listen.

        Raises:
            StartRefused: the port is in use, or a front cannot listen.
        """
        self._reserve()
        started = await asyncio.gather(
            *(self._start(number) for number in range(count)), return_exceptions=True
        )
        for error in started:
            if isinstance(error, BaseException):
                await self.stop(0.0)
                if isinstance(error, Unavailable | OSError | TimeoutError):
                    text = str(error) or f"not ready after {START_LIMIT_S:.0f} s"
                    raise StartRefused(f"a front process cannot start: {text}")
                raise error
        self._keeping = [
            asyncio.create_task(self._keep(number), name=f"front-{number}")
            for number in range(count)
        ]

    async def stop(self, grace_s: float) -> None:
        """Let calls in flight finish for up to ``grace_s``, then end every front."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(self._end(number, grace_s) for number in tuple(self._fronts)))
        if self._reserved is not None:
            self._reserved.close()

    def _reserve(self) -> None:
        """Hold the port for the fronts alone; another hub that wants it is refused."""
        host, port = split_address(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Without SO_REUSEPORT first: with it a second hub would silently share the port.
        for shared in (False, True):
            held = socket.socket(family, socket.SOCK_STREAM)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                held.bind((host, port))
            except OSError as error:
                held.close()
                raise StartRefused(
                    f"cannot listen on {self._address} (gRPC): {error.strerror}; choose another with "
                    "--grpc HOST:PORT"
                ) from None
            port = held.getsockname()[1]
            if not shared:
                held.close()
        self._reserved = held
        self.port = port
        self._setup |= {"host": host, "port": port}

    async def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        size = ARENA_MESSAGES * int(self._setup["max_message_bytes"])
        memory = os.memfd_create("fogline-requests", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, size)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapped = mmap.mmap(memory, size, prot=mmap.PROT_READ)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "cloud_hub.front.process",
                str(theirs.fileno()), str(memory),
                pass_fds=(theirs.fileno(), memory), stdin=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        loop = asyncio.get_running_loop()
        _, end = await loop.create_connection(
            lambda: HubEnd(mapped, self._answer, self._books), sock=ours
        )
        self._fronts[number] = _Front(process, end)
        end.send_document(Kind.SETUP, self._setup)
        async with asyncio.timeout(START_LIMIT_S):
            await end.ready

    async def _keep(self, number: int) -> None:
        """Start a front again whenever it ends."""
        while True:
            front = self._fronts[number]
            await front.end.lost.wait()
            await self._end(number, 0.0)
            log.error("front ended, starting it again", number=number)
            while number not in self._fronts:
                try:
                    await self._start(number)
                except (Unavailable, OSError, TimeoutError) as error:
                    log.error("front cannot be started", number=number, why=str(error))
                    if number in self._fronts:
                        await self._end(number, 0.0)
                    await asyncio.sleep(RESTART_S)

    async def _end(self, number: int, grace_s: float) -> None:
        front = self._fronts.pop(number)
        front.end.send_document(Kind.STOP, grace_s)
        with contextlib.suppress(TimeoutError):
            # The front's own pause before it stops comes on top of the grace.
            async with asyncio.timeout(grace_s + 2.0):
                await front.process.wait()
        with contextlib.suppress(ProcessLookupError):
            front.process.kill()
        await front.process.wait()
        front.end.close()
