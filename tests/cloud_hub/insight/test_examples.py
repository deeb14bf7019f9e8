"""Keeping examples never costs an answer: no room, no disk, no power. What is read is whole."""

import asyncio
import errno
import os
import random
import signal
import sys
import time

import numpy as np
import pytest

from cloud_hub.errors import StoreFailed
from cloud_hub.insight import examples as module
from cloud_hub.insight.example_files import ExampleFiles, write_file
from cloud_hub.insight.examples import Bounds, Examples
from cloud_hub.metrics import Metrics
from cloud_hub.store.store import Store
from tests.examples import numbered, numbers_of, offer, read, settled, told


@pytest.fixture
async def store(tmp_path):
    store = await Store.open(f"sqlite:///{tmp_path / 'hub.sqlite'}")
    yield store
    await store.close()


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def keep(store, tmp_path, metrics):
    def opened(quota_bytes=1 << 30, write=write_file):
        files = ExampleFiles(tmp_path / "examples", write)
        return Examples(store, files, Bounds(quota_bytes, 0), metrics.of_examples())

    return opened


def count(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"fogline_hub_examples{name}", labels) or 0


def files(tmp_path):
    return [path for path in (tmp_path / "examples").rglob("*") if path.is_file()]


class Gate:
    """A disk that waits until it is told to go on."""

    def __init__(self):
        self.open = False

    def __call__(self, path, data):
        while not self.open:
            time.sleep(0.002)
        write_file(path, data)


async def test_what_does_not_fit_the_queue_is_dropped_at_once_and_counted(
    keep, metrics, monkeypatch
):
    monkeypatch.setattr(module, "QUEUE_BYTES", 4000)
    gate = Gate()
    async with keep(write=gate) as examples:
        try:
            began = time.monotonic()
            for number in range(100):
                offer(examples, numbered(number))
            offer(examples, numbered(*range(200)))
            # The disk stands still all the while: nobody has waited for it.
            assert time.monotonic() - began < 1
            assert 3000 < count(metrics, "_queue_bytes") <= 4000
            dropped = count(metrics, "_dropped_total", reason="queue_full")
            assert 20 < dropped < 100
            assert count(metrics, "_dropped_total", reason="too_large") == 200
        finally:
            gate.open = True
        await settled(examples)
        found, _ = await read(examples)
        assert numbers_of(found) == list(map(float, range(100 - int(dropped))))
        assert count(metrics, "_queue_bytes") == 0
        offer(examples, numbered(500))  # there is room again
        await settled(examples)
        assert count(metrics, "_total", content="new") == 101 - dropped


async def test_what_is_offered_is_written_before_the_hub_stops(keep, tmp_path):
    async with keep() as examples:
        for number in range(300):
            offer(examples, numbered(number))
    assert len(files(tmp_path)) == 300


async def test_a_full_disk_costs_examples_with_its_reason_and_heals_by_itself(
    keep, metrics, tmp_path
):
    room = [3]

    def write(path, data):
        if not room[0]:
            path.write_bytes(data[:5])  # as much as there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        room[0] -= 1
        write_file(path, data)

    async with keep(write=write) as examples:
        offer(examples, numbered(*range(5)))
        await settled(examples)
        assert "No space left" in examples.trouble
        assert count(metrics, "_dropped_total", reason="disk") == 2
        assert len(files(tmp_path)) == 3  # nothing half-written is left
        found, left_out = await read(examples)
        assert (numbers_of(found), left_out) == ([0, 1, 2], 0)
        room[0] = 10
        offer(examples, numbered(3, 4))
        await settled(examples)
        assert examples.trouble == ""
        found, _ = await read(examples)
        assert numbers_of(found) == [0, 1, 2, 3, 4]


class Refusing:
    """A database that has no room."""

    def __init__(self, store):
        self.read = store.read
        self._store = store
        self.refuses = False

    async def write(self, work):
        if self.refuses:
            raise StoreFailed("the database refused: database or disk is full")
        return await self._store.write(work)


async def test_a_full_database_costs_examples_and_the_next_start_sweeps_their_files(
    store, metrics, tmp_path
):
    refusing = Refusing(store)
    names, bounds = ExampleFiles(tmp_path / "examples"), Bounds(1 << 30, 0)
    async with Examples(refusing, names, bounds, metrics.of_examples()) as examples:
        offer(examples, numbered(1))
        await settled(examples)
        refusing.refuses = True
        offer(examples, numbered(1, 2))
        await settled(examples)
        assert "disk is full" in examples.trouble
        assert count(metrics, "_dropped_total", reason="database") == 2
        assert len(files(tmp_path)) == 2
        refusing.refuses = False
    async with Examples(refusing, names, bounds, Metrics().of_examples()) as examples:
        offer(examples, numbered(3))
        await settled(examples)
        found, _ = await read(examples)
        assert numbers_of(found) == [1, 3]
        assert len(files(tmp_path)) == 2


async def test_a_file_that_a_power_cut_has_cut_is_left_out_until_it_comes_again(keep, tmp_path):
    async with keep() as examples:
        offer(examples, numbered(1, 2, 3))
        await settled(examples)
        cut, rotten, _ = sorted(files(tmp_path))
        cut.write_bytes(b"")
        data = bytearray(rotten.read_bytes())
        data[-1] ^= 1
        rotten.write_bytes(data)
        found, left_out = await read(examples)
        assert (len(found), left_out) == (1, 2)
        cut.unlink()  # gone is no different
        assert (await read(examples))[1] == 2
        offer(examples, numbered(1, 2, 3))
        await settled(examples)
        found, left_out = await read(examples)
        assert (len(found), left_out) == (2, 1)  # a bit that rotted is still left out


async def test_an_input_of_any_kind_comes_back(keep):
    texts = np.empty((2, 1), dtype=object)
    texts[:, 0] = [b"caf\xc3\xa9", b"\0"]
    async with keep() as examples:
        edge = told(numbered(1, 2))
        examples.offer(
            "default", "judge", "", {"s": texts}, edge,
            {"logits": numbered(1, 2), "fogline.digest": texts}, batched=True,
        )  # fmt: skip
        whole = told(numbered(1))
        examples.offer(
            "default", "judge", "", {"s": texts}, whole, {"logits": numbered(1)[0]}, batched=False
        )
        await settled(examples)
        found, _ = await read(examples)
    assert [one.inputs["s"].tolist() for one in found] == [
        [b"caf\xc3\xa9"], [b"\0"], [[b"caf\xc3\xa9"], [b"\0"]],
    ]  # fmt: skip
    assert all(list(one.hub) == ["logits"] for one in found)
    assert found[2].edge["logits"].tolist() == [2, 2, 4]


_KEEPER = """
import asyncio, sys
from pathlib import Path
from cloud_hub.insight.example_files import ExampleFiles
from cloud_hub.insight.examples import Bounds, Examples
from cloud_hub.metrics import Metrics
from cloud_hub.store.store import Store
from tests.examples import numbered, offer

async def main(data, first):
    store = await Store.open(f"sqlite:///{data / 'hub.sqlite'}")
    files = ExampleFiles(data / "examples")
    async with Examples(store, files, Bounds(1 << 30, 0), Metrics().of_examples()) as examples:
        for number in range(first, first + 100_000):
            offer(examples, numbered(number, number % 50), device=f"d{number % 3}")
            if number % 20 == 0:
                await examples.settled()
                print(number, flush=True)

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


async def test_a_keeper_killed_at_any_moment_loses_at_most_what_was_queued(tmp_path, metrics):
    first = 0
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _KEEPER, str(tmp_path), str(first), stdout=asyncio.subprocess.PIPE
        )
        said = first
        for _ in range(random.randint(1, 12)):
            said = int(await asyncio.wait_for(process.stdout.readline(), 60))
        process.send_signal(signal.SIGKILL)
        rest, _ = await process.communicate()
        for line in rest.splitlines():
            said = int(line)
        store = await Store.open(f"sqlite:///{tmp_path / 'hub.sqlite'}")
        names = ExampleFiles(tmp_path / "examples")
        async with Examples(store, names, Bounds(1 << 30, 0), metrics.of_examples()) as examples:
            found, left_out = await read(examples)
            await settled(examples)
            numbers = set(numbers_of(found))
        await store.close()
        assert left_out == 0  # every row has its whole file
        assert numbers >= set(map(float, range(first, said + 1)))  # what it said is kept, is
        assert len(files(tmp_path)) == len(found)  # and no file is without a row
        metrics = Metrics()
        first = said + 1000
