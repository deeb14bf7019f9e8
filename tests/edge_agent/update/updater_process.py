"""Agents to be killed: a process that forks one updater per line of JSON it reads.

Forking from one process that has imported everything makes an agent's start cost milliseconds,
so that hundreds of real processes can be killed in a test. Each ends by itself when its updater
rests, or kills itself at the instant it was told: instants are the changes on the disk, blocks
fetched, self-tests and activations, counted from the start of its updater.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from edge_agent.runtime import release as loading
from edge_agent.update.disk import LocalDisk
from edge_agent.update.machine import ModelReport
from edge_agent.update.selftest import ChildSelfTest
from edge_agent.update.slots import Desired, Target
from edge_agent.update.surroundings import Place, Progress, Timings
from edge_agent.update.updater import Updater
from fogline_protocol.release import BundleDirectory
from fogline_protocol.tensors import Array
from tests.edge_agent.update.fakes import CopyFetch, FakeServing, Shelf, StubSelfTest, choose


class Instants:
    """Counts instants and ends the process at one of them, as `kill -9` does."""

    def __init__(self, die_at: int) -> None:
        self.left = die_at  # 0: never

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalDisk(LocalDisk):
    """The real disk; every change is an instant."""

    def __init__(self, root: Path, tick: Callable[[], None]) -> None:
        super().__init__(root)
        self.tick = tick

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).write_bytes(data[: len(data) // 2])
        self.tick()
        super().write(path, data)
        self.tick()

    def sync(self, path: str) -> None:
        super().sync(path)
        self.tick()

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self.tick()

    def link(self, old: str, new: str) -> None:
        super().link(old, new)
        self.tick()

    def unlink(self, path: str) -> None:
        super().unlink(path)
        self.tick()

    def make_folder(self, path: str) -> None:
        super().make_folder(path)
        self.tick()

    def remove_folder(self, path: str) -> None:
        super().remove_folder(path)
        self.tick()


class MortalSelfTest(StubSelfTest):
    """The stub, an instant on each side."""

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__()
        self.tick = tick

    async def run(
        self, candidate: BundleDirectory, variant: str, provider: str
    ) -> Mapping[str, float]:
        self.tick()
        figures = await super().run(candidate, variant, provider)
        self.tick()
        return figures


class MortalServing(FakeServing):
    """The fake, an instant on each side; a stumbling one has engine faults until a rollback."""

    def __init__(self, tick: Callable[[], None], stumbles: bool, dies_serving: str) -> None:
        super().__init__()
        self.tick = tick
        self.stumbles = stumbles
        self.dies_serving = dies_serving  # the version that takes the process down

    async def activate(self, model: str, bundle: BundleDirectory | None) -> None:
        self.tick()
        if bundle is not None and bundle.bundle.version == self.dies_serving:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.stumbles and self.engine_faults:
            self.stumbles, self.engine_faults = False, 0  # this is the way back
        elif self.stumbles:
            self.engine_faults = 1
        await super().activate(model, bundle)
        self.tick()


class EngineServing:
    """Serves with the agent's own engine."""

    def __init__(self) -> None:
        self.active: dict[str, loading.Release] = {}

    async def activate(self, model: str, bundle: BundleDirectory | None) -> None:
        if bundle is None:
            del self.active[model]
        else:
            self.active[model] = loading.load(bundle, threads=1)

    def place(self, model: str) -> Place | None:
        active = self.active.get(model)
        if active is None:
            return None
        return Place(active.number, active.choice.variant.name, active.choice.provider)

    def certify(self, model: str, bundle: BundleDirectory) -> None:
        self.active[model] = loading.certified(self.active[model], bundle)

    async def run(self, model: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        active = self.active[model]
        names = [spec.name for spec in active.bundle.outputs]
        rows = len(next(iter(inputs.values())))
        return dict(zip(names, await active.engine.run(inputs, names, rows), strict=True))

    def faults(self, model: str) -> int:
        return 0


class FolderFetch:
    """Copies a whole bundle of the workshop; ``index_target`` is its folder."""

    async def fetch(self, target: Target, into: Path, progress: Progress) -> None:
        source = Path("/") / target.index_target
        for path in sorted(source.rglob("*")):
            copy = into / path.relative_to(source)
            if path.is_dir():
                copy.mkdir(exist_ok=True)
            else:
                copy.write_bytes(path.read_bytes())
            await asyncio.sleep(0)

    async def certificates(self, targets: Collection[str]) -> Mapping[str, bytes]:
        raise AssertionError("these bundles bring their certificates")

    async def withdrawn(self, targets: Collection[str]) -> frozenset[str]:
        raise SystemExit("no wish names a certificate")  # anything less is logged and survived


class Log:
    """Writes every report to a file that outlives the process, and ends it when it rests."""

    def __init__(self, file: Path, generation: int) -> None:
        self.handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.generation = generation
        self.updater: Updater | None = None
        self.rested = asyncio.Event()

    async def report(self, models: tuple[ModelReport, ...]) -> None:
        assert self.updater is not None
        os.write(self.handle, b"%d\n" % self.updater.next_sequence())
        if self.updater.is_settled and self.updater.generation == self.generation:
            self.rested.set()


async def live(order: Mapping[str, Any]) -> None:
    """Run one updater until it rests or dies."""
    instants = Instants(order["die_at"])
    root = Path(order["root"])
    wish = {**order["target"]}
    wish["certificate_targets"] = tuple(wish["certificate_targets"])
    target = Target("doubler", **wish)
    log = Log(root.with_suffix(".log"), order["generation"])
    timings = Timings(probation_s=0.002, watch_s=0.001, retry_s=0.0, retry_max_s=0.0)
    if order["real"]:
        target = Target("digits", **wish)
        updater = Updater(
            root,
            fetch=FolderFetch(),
            self_test=ChildSelfTest(),
            serving=(engines := EngineServing()),
            report=log,
            choose=loading.choose,
            timings=timings,
        )
        activate = engines.activate
    else:
        fetch = CopyFetch(Shelf(Path(order["shelf"])))
        fetch.before_block = instants.tick
        serving = MortalServing(instants.tick, order["stumbles"], order["dies_serving"])
        updater = Updater(
            root,
            fetch=fetch,
            self_test=MortalSelfTest(instants.tick),
            serving=serving,
            report=log,
            choose=choose,
            timings=timings,
            disk=MortalDisk(root, instants.tick),
        )
        activate = super(MortalServing, serving).activate
    log.updater = updater
    for model, bundle in updater.restore().items():
        await activate(model, bundle)
    running = asyncio.create_task(updater.run())
    await updater.apply(Desired(order["generation"], "epoch", (target,)))
    await asyncio.wait(
        {running, asyncio.create_task(log.rested.wait())}, return_when=asyncio.FIRST_COMPLETED
    )
    if running.done():
        running.result()


def _wait_for_state(root: Path, state: str) -> None:
    deadline = time.monotonic() + 30
    while not any(
        f'"state": "{state}"' in pointer.read_text()
        for pointer in root.glob("models/*/pointer.json")
    ):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{root} never came to {state}")
        time.sleep(0.001)


def main() -> None:
    """Fork an agent per line, kill it if told, and answer with its exit code."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            os.dup2(2, 1)  # what it logs is not an answer
            try:
                asyncio.run(live(order))
                status = 0
            except (Exception, SystemExit) as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        if order["kill_in"]:
            _wait_for_state(Path(order["root"]), order["kill_in"])
        if order["kill_in"] or order["kill_after_s"]:
            time.sleep(order["kill_after_s"])  # the instant is the point, nothing is waited for
            os.kill(child, signal.SIGKILL)  # alive or not yet reaped: it is still this child
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
