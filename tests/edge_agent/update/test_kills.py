"""`kill -9` at every instant of an update, in a real process: the next start always converges.

After each kill the release that the pointer makes active is complete and intact; after the
restart the device ends with the release that is wanted, and no sequence number was used twice.
(A killed process loses nothing that it wrote; what a power cut loses is test_crash_states.py's.)
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_agent.update.disk import LocalDisk
from edge_agent.update.lifecycle import SERVING_CANDIDATE, State
from edge_agent.update.slots import Pointer, Slots, Target
from fogline_protocol import release
from tests.edge_agent.update.fakes import Shelf

BUNDLES = Path(__file__).parents[3] / "models/digits/bundles"
MEMORY, NEEDED_BYTES = Path("/dev/shm"), 64 << 20
KILLED = -signal.SIGKILL
MIN_KILLS, RANDOM_KILLS = 240, 60  # 300 in all: the budget of a run in CI

# One process after the other, up to hundreds or with real models in them. A busy machine takes
# four times as long as an idle one.
patiently = pytest.mark.timeout(400)


class Agents:
    """Starts agents, one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # forking wants one thread
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge_agent.update.updater_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[3],
        )

    def run(self, root: Path, generation: int, target: Target, **order: Any) -> int:
        """Run an agent that wants ``target`` until it rests or dies; return its exit code."""
        fields = {
            "release": target.release,
            "version": target.version,
            "index_target": target.index_target,
            "certificate_targets": target.certificate_targets,
        }
        line = {
            "root": str(root),
            "generation": generation,
            "target": fields,
            "shelf": "",
            "die_at": 0,
            "stumbles": False,
            "dies_serving": "",
            "kill_after_s": 0.0,
            "kill_in": "",
            "real": False,
            **order,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process that starts them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def agents() -> Iterator[Agents]:
    agents = Agents()
    yield agents
    agents.close()


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is room: half of the time would be waiting for syncs.

    A kill takes nothing that was written, synced or not.
    """
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < NEEDED_BYTES:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="fogline-kills-", dir=MEMORY))
    try:
        yield folder
    finally:
        shutil.move(folder, tmp_path / "kept")  # where pytest keeps what tells of a failure


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(tmp_path / "shelf")
    for number in (1, 2):
        shelf.put(number, f"{number}.0.0")
    return shelf


@pytest.fixture
def installed(agents: Agents, shelf: Shelf, tmp_path: Path) -> Path:
    """Return a folder in which release 1 was committed under generation 1."""
    root = tmp_path / "installed"
    root.mkdir()
    assert agents.run(root, 1, shelf.target(1, "1.0.0"), shelf=str(shelf.folder)) == 0
    return root


def what_is_there(root: Path, model: str = "doubler") -> Pointer:
    """Read what a dead agent left, and check what must always hold."""
    copy = root.with_name("autopsy")  # reading counts a start
    shutil.copytree(root, copy)
    try:
        slots = Slots(LocalDisk(copy))
        slots.open()
        assert slots.damaged == {}
        pointer = slots.pointer(model)
        needed = [pointer.active]
        if pointer.life.state in SERVING_CANDIDATE:
            needed.append(pointer.committed)
        for target in needed:
            if target is not None:
                path = copy / slots.folder(target)
                first = next(v.name for v in release.read(path, variants=()).bundle.variants)
                found = release.read(path, variants={first})
                assert found.bundle.version == target.version
        return pointer
    finally:
        shutil.rmtree(copy)


def check_sequences(log: Path) -> None:
    """Check that no sequence number was used twice or went back."""
    sequences = [int(line) for line in log.read_text().splitlines()]
    assert sequences == sorted(set(sequences))


def killed_at(
    instant: int, agents: Agents, shelf: Shelf, installed: Path, *, stumbles: bool
) -> State | None:
    """Kill an update to release 2 at ``instant`` and let the next start finish it.

    Returns:
        The state in which it was killed; None if it had ended before.
    """
    wanted = shelf.target(2, "2.0.0")
    root = installed.with_name("device")
    shutil.copytree(installed, root)
    log = root.with_suffix(".log")
    try:
        order = {"shelf": str(shelf.folder)}
        ended = agents.run(root, 2, wanted, die_at=instant, stumbles=stumbles, **order)
        state = None
        if ended == KILLED:
            dead = what_is_there(root)
            assert dead.active in (shelf.target(1, "1.0.0"), wanted)
            state = dead.life.state
            ended = agents.run(root, 2, wanted, **order)
        assert ended == 0
        alive = what_is_there(root)
        assert (alive.life.state, alive.committed, alive.generation) == (State.IDLE, wanted, 2)
        check_sequences(log)
        return state
    finally:
        shutil.rmtree(root)
        log.unlink()


@patiently
def test_an_agent_killed_at_every_instant_of_an_update_converges(
    agents: Agents, shelf: Shelf, installed: Path
) -> None:
    rows: Counter[State] = Counter()
    for stumbles in (False, True):  # the second goes through a rollback and another attempt
        for instant in itertools.count(1):
            state = killed_at(instant, agents, shelf, installed, stumbles=stumbles)
            if state is None:
                break
            rows[state] += 1
    assert rows.total() >= MIN_KILLS
    assert set(rows) == set(State) - {State.REJECTED, State.ROLLED_BACK}, rows


@patiently
def test_an_agent_killed_at_every_instant_of_a_renewal_converges_without_a_test(
    agents: Agents, shelf: Shelf, installed: Path
) -> None:
    bare = shelf.target(1, "1.0.0")
    wanted = replace(bare, certificate_targets=(shelf.certify(bare, 1), shelf.certify(bare, 2)))
    order = {"shelf": str(shelf.folder), "dies_serving": "1.0.0"}  # nothing is switched to
    root = installed.with_name("device")
    for instant in itertools.count(1):
        shutil.copytree(installed, root)
        ended = agents.run(root, 2, wanted, die_at=instant, **order)
        if ended == KILLED:
            dead = what_is_there(root)
            assert dead.committed in (bare, wanted)
            assert dead.life.state in (State.IDLE, State.FETCHING)
            assert agents.run(root, 2, wanted, **order) == 0
        alive = what_is_there(root)
        assert (alive.life.state, alive.committed, alive.before) == (State.IDLE, wanted, None)
        check_sequences(root.with_suffix(".log"))
        shutil.rmtree(root)
        root.with_suffix(".log").unlink()
        if ended == 0:
            break
    assert instant > 30


@patiently
def test_a_device_killed_at_random_again_and_again_converges_each_time(
    agents: Agents, shelf: Shelf, installed: Path
) -> None:
    chance = random.Random(20)  # which instants these hit is still up to the scheduler
    order = {"shelf": str(shelf.folder)}
    killed = 0
    for generation in itertools.count(2):
        wanted = shelf.target(1 + generation % 2, f"{1 + generation % 2}.0.0")
        for _ in range(2):  # a third in the wrong places would end in quarantine, rightly
            delay_s = chance.uniform(0.001, 0.04)
            ended = agents.run(installed, generation, wanted, kill_after_s=delay_s, **order)
            killed += ended == KILLED
            assert what_is_there(installed).active is not None
        assert agents.run(installed, generation, wanted, **order) == 0
        assert what_is_there(installed).committed == wanted
        if killed >= RANDOM_KILLS:
            break
    check_sequences(installed.with_suffix(".log"))


def test_a_candidate_that_kills_its_agent_every_time_is_given_up(
    agents: Agents, shelf: Shelf, installed: Path
) -> None:
    wanted = shelf.target(2, "2.0.0")
    order = {"shelf": str(shelf.folder)}
    for attempt in (1, 2, 3):
        assert agents.run(installed, 2, wanted, dies_serving="2.0.0", **order) == KILLED
        dead = what_is_there(installed)
        assert (dead.life.state, dead.life.attempt) == (State.TRIAL, attempt)
    assert agents.run(installed, 2, wanted, dies_serving="2.0.0", **order) == 0
    alive = what_is_there(installed)
    assert (alive.life.state, alive.active) == (State.ROLLED_BACK, shelf.target(1, "1.0.0"))
    assert alive.code == "trial/restart"


@patiently
def test_kills_during_a_real_self_test_and_a_real_switch_converge(
    agents: Agents, tmp_path: Path
) -> None:
    root = tmp_path / "device"
    root.mkdir()

    def digits(number: int, version: str) -> Target:
        return Target("digits", number, version, str(BUNDLES / f"digits-{version}").strip("/"))

    assert agents.run(root, 1, digits(1, "1.0.0"), real=True) == 0
    moments = [
        ("testing", 0.0),
        ("testing", 0.1),
        ("testing", 0.2),
        ("trial", 0.0),
        ("trial", 0.01),
    ]
    for generation, (state, delay_s) in enumerate(moments, 2):
        wanted = digits(2, "1.1.0") if generation % 2 == 0 else digits(1, "1.0.0")
        ended = agents.run(root, generation, wanted, real=True, kill_in=state, kill_after_s=delay_s)
        dead = what_is_there(root, "digits")
        if delay_s == 0.0:  # the others hit what they hit
            assert ended == KILLED
            assert state != "testing" or dead.life.state is State.TESTING
        assert agents.run(root, generation, wanted, real=True) == 0
        assert what_is_there(root, "digits").committed == wanted
    check_sequences(root.with_suffix(".log"))
