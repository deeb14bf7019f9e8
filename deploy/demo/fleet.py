"""The demo's processes: one hub and its agents, started as a person would start them.

Everything runs in its own process below one data directory, and is stopped in the end
whatever happens. Addresses come from each process's endpoints.json.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

PROBATION_S = 2.0  # half a minute in earnest; a visitor has a minute
START_LIMIT_S = 60.0  # a cold start on a busy machine; usually under two seconds


class DemoFailed(Exception):
    """The demo cannot go on; the message says what happened and where the log is."""


@dataclass(slots=True)
class Process:
    """One process with a data directory, restartable with the same command."""

    name: str
    command: Sequence[str]
    data: Path
    doors: Sequence[str]  # that endpoints.json must name before it counts as started
    endpoints: dict[str, str] = field(default_factory=dict)
    _process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.data.parent / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """The process id of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        assert self._process is not None
        return self._process.returncode

    async def start(self) -> None:
        """Start and wait until its doors are open.

        Raises:
            DemoFailed: it ended, or took longer than a minute.
        """
        endpoints = self.data / "endpoints.json"
        await asyncio.to_thread(self.data.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(endpoints.unlink, missing_ok=True)
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops its children.
            self._process = await asyncio.create_subprocess_exec(
                *self.command, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit:
            if self._process.returncode is not None:
                raise DemoFailed(f"{self.name} ended at its start:\n{_tail(self.log)}")
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                found = json.loads(await asyncio.to_thread(endpoints.read_text))
                if all(door in found for door in self.doors):
                    self.endpoints = found
                    return
            await asyncio.sleep(0.02)
        raise DemoFailed(f"{self.name} did not start in {START_LIMIT_S:.0f} s:\n{_tail(self.log)}")

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and wait; a process that ignores it for 15 s is killed."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(number)
        try:
            async with asyncio.timeout(15):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class Fleet:
    """A hub and its agents; ``async with`` stops whatever was started."""

    def __init__(self, root: Path, hub_bundle: Path, edge_bundle: Path, http: str) -> None:
        self.root = root
        self._hub_bundle = hub_bundle
        self._edge_bundle = edge_bundle
        self._http = http
        self.hub = Process("hub", (), root / "hub", ("grpc", "http"))
        self.agents: list[Process] = []

    async def __aenter__(self) -> Self:
        """Start the hub, then the agents together."""
        repository = self.root / "models" / "digits-hub" / "1"
        await asyncio.to_thread(repository.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(shutil.copyfile, self._hub_bundle, repository / "model.onnx")
        try:
            await self._start_hub("127.0.0.1:0", self._http)
            address = self.hub.endpoints["grpc"]
            sockets = self.root / "sockets"
            await asyncio.to_thread(sockets.mkdir, exist_ok=True)
            # Three devices that differ as devices do: cores, patience, how much they take on.
            self.agents = [
                self._agent("kiosk", address, "--threads", "2"),
                self._agent("camera", address, "--threads", "1", "--deadline-s", "0.5"),
                self._agent("scanner", address, "--threads", "1", "--max-concurrency", "16"),
            ]
            await asyncio.gather(*(agent.start() for agent in self.agents))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop every process."""
        await self._stop()

    async def restart_hub(self) -> None:
        """Start the hub again where it was: same data, same addresses."""
        await self._start_hub(self.hub.endpoints["grpc"], self.hub.endpoints["http"])

    def broker_pid(self) -> int:
        """Return the process id of the hub's own broker.

        Raises:
            DemoFailed: there is none.
        """
        mark = str(self.hub.data / "broker")
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"mosquitto" in words[0] and any(mark.encode() in word for word in words):
                        return int(entry.name)
        raise DemoFailed(f"the hub runs no broker:\n{_tail(self.hub.log)}")

    async def _start_hub(self, grpc: str, http: str) -> None:
        self.hub.command = (
            script("fogline"), "serve", "--data", str(self.hub.data), "--name", "demo",
            "--grpc", grpc, "--http", http, "--models", str(self.root / "models"),
        )  # fmt: skip
        await self.hub.start()

    def _agent(self, name: str, hub: str, *options: str) -> Process:
        data = self.root / name
        command = (
            script("fogline-agent"), "run", "--device", name, "--data", str(data), "--hub", hub,
            "--bundle", str(self._edge_bundle), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
            "--unix", str(self.root / "sockets" / f"{name}.sock"),
            "--probation-s", str(PROBATION_S), *options,
        )  # fmt: skip
        return Process(name, command, data, ("grpc", "http", "unix"))

    async def _stop(self) -> None:
        await asyncio.gather(*(process.stop() for process in (*self.agents, self.hub)))


def script(name: str) -> str:
    """Return the path of an installed command of this environment."""
    return os.path.join(os.path.dirname(sys.executable), name)


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-15:]) + f"\n(the whole log: {log})"
