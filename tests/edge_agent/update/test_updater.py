"""An update reaches its end, or the release that served before serves again and the hub knows why."""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_agent.errors import ReleaseRefused
from edge_agent.update.disk import DiskFull, LocalDisk
from edge_agent.update.lifecycle import StepFailed, StepInterrupted, StepRefused
from edge_agent.update.machine import ModelReport
from edge_agent.update.slots import WITHDRAWN, Desired, Slots, Target, certificate_id
from edge_agent.update.surroundings import Timings
from edge_agent.update.updater import DesiredRefused, Updater
from fogline_protocol.release import BundleDirectory
from fogline_protocol.tensors import Array
from tests.edge_agent.update.fakes import (
    BLOCK,
    WRONG,
    CopyFetch,
    FakeServing,
    Reports,
    Shelf,
    StubSelfTest,
    choose,
)

SOON = Timings(probation_s=0.0, watch_s=0.01, retry_s=0.001, retry_max_s=0.001)
LATER = Timings(probation_s=600.0, watch_s=0.005, retry_s=0.001)  # a probation to be caught in


class Device:
    """An updater with everything around it, which can be switched off and on."""

    def __init__(self, root: Path, shelf: Shelf, timings: Timings = SOON) -> None:
        self.root = root
        self.timings = timings
        self.fetch = CopyFetch(shelf)
        self.self_test = StubSelfTest()
        self.disk = FullDisk(root)
        self.reports = Reports()
        self.serving = FakeServing()
        self.choose = choose
        self.updater = self._new()
        root.mkdir()

    def _new(self) -> Updater:
        return Updater(
            self.root,
            fetch=self.fetch,
            self_test=self.self_test,
            serving=self.serving,
            report=self.reports,
            choose=lambda directory: self.choose(directory),
            timings=self.timings,
            disk=self.disk,
            jitter=lambda: 1.0,
        )

    @contextlib.asynccontextmanager
    async def on(self) -> AsyncIterator[Updater]:
        """Start as the agent does, and stop at the end."""
        self.serving.active, self.serving.history, self.serving.engine_faults = {}, [], 0
        self.reports = Reports()
        self.updater = self._new()
        for model, bundle in self.updater.restore().items():
            await self.serving.activate(model, bundle)
        running = asyncio.create_task(self.updater.run())
        try:
            yield self.updater
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    @property
    def version(self) -> str | None:
        """Of the release that answers."""
        bundle = self.serving.active.get("doubler")
        return None if bundle is None else bundle.bundle.version

    async def until_probation(self) -> None:
        """Wait until the candidate serves and the disk says so."""
        async with asyncio.timeout(20):
            pointer = self.root / "models/doubler/pointer.json"
            while not (pointer.exists() and '"probation"' in pointer.read_text()):
                await asyncio.sleep(0)  # a file has no event

    def slots(self) -> set[str]:
        """Return the folders of the model."""
        return {p.name for p in (self.root / "models/doubler").iterdir() if p.is_dir()}


class FullDisk(LocalDisk):
    """The real disk, which refuses to write while ``full``."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.full = False
        self.error = errno.ENOSPC

    def write(self, path: str, data: bytes) -> None:
        if self.full:
            super().write(path, data[: len(data) // 2])
            raise OSError(self.error, "full", path)
        super().write(path, data)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def device(tmp_path: Path, shelf: Shelf) -> Device:
    return Device(tmp_path / "device", shelf)


def desired(generation: int, *targets: Target) -> Desired:
    return Desired(generation, "epoch", targets)


def committed(release: int):
    return lambda m: m.phase == "committed" and m.active_release == release


def phase(name: str):
    return lambda m: m.phase == name


async def install(device: Device, target: Target, generation: int = 1) -> ModelReport:
    async with device.on() as updater:
        await updater.apply(desired(generation, target))
        return await device.reports.until(
            lambda m: committed(target.release)(m) and updater.is_settled
        )


async def test_a_release_goes_through_every_phase_and_is_served(device, shelf) -> None:
    async with device.on() as updater:
        assert await updater.apply(desired(7, shelf.put(1, "1.0.0")))
        report = await device.reports.until(committed(1))
    phases = ["accepted", "downloading", "verifying", "self-test", "shadow", "trial", "committed"]
    assert device.reports.phases() in (phases, phases[1:])
    assert (report.active_version, report.code, report.attempt) == ("1.0.0", "", 0)
    assert report.figures["agreement"] == 1.0
    assert device.version == "1.0.0"
    assert (device.updater.generation, device.updater.is_settled) == (7, True)


async def test_a_device_starts_with_what_it_has_and_no_hub(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"))
    device.fetch.reachable = False
    calls = device.fetch.calls
    async with device.on():
        assert device.version == "1.0.0"
        await device.reports.until(committed(1))
    assert device.fetch.calls == calls


async def test_a_device_without_any_release_starts_empty(device) -> None:
    async with device.on() as updater:
        assert updater.reports() == ()
        assert device.serving.history == []


async def test_only_the_variant_that_runs_here_is_on_the_disk(device, shelf) -> None:
    target = shelf.put(1, "1.0.0")
    await install(device, target)
    slot = device.root / "models/doubler" / target.slot
    assert {p.name for p in (slot / "variants").iterdir()} == {"int8.onnx"}


async def test_the_previous_release_stays_and_the_one_before_it_goes(device, shelf) -> None:
    targets = [shelf.put(n, f"1.{n}.0") for n in (1, 2, 3)]
    for generation, target in enumerate(targets, 1):
        report = await install(device, target, generation)
    assert (report.active_release, report.previous_release) == (3, 2)
    assert device.slots() == {targets[1].slot, targets[2].slot}


async def test_the_way_back_to_the_previous_release_needs_no_hub(device, shelf) -> None:
    first, second = shelf.put(1, "1.0.0"), shelf.put(2, "2.0.0")
    await install(device, first, 1)
    await install(device, second, 2)
    device.fetch.reachable = False
    calls = device.fetch.calls
    report = await install(device, first, 3)
    assert (report.active_release, report.previous_release, device.fetch.calls) == (1, 2, calls)


@pytest.mark.parametrize("generation", [1, 4, 5])
async def test_a_generation_that_is_not_newer_is_ignored(device, shelf, generation) -> None:
    first, second = shelf.put(1, "1.0.0"), shelf.put(2, "2.0.0")
    await install(device, first, 5)
    async with device.on() as updater:
        assert not await updater.apply(desired(generation, second))
        assert updater.generation == 5
        assert await updater.apply(desired(6, first))
        await device.reports.until(committed(1))
    assert device.serving.history == ["1.0.0"]  # the start; the same release is not switched to


async def test_sequence_numbers_and_starts_only_grow(device, shelf) -> None:
    numbers = []
    for start in (1, 2, 3):
        async with device.on() as updater:
            assert updater.boot == start
            await updater.apply(desired(start, shelf.put(start, f"{start}.0.0")))
            numbers += [updater.next_sequence() for _ in range(3)]
    assert numbers == sorted(set(numbers))


# Other certificates for what serves


def ids(*paths: str) -> list[str]:
    return [certificate_id(path) for path in paths]


@pytest.fixture
def certified(shelf: Shelf) -> Target:
    """Release 1, under a certificate of the first day."""
    target = shelf.put(1, "1.0.0")
    return replace(target, certificate_targets=(shelf.certify(target, 1),))


async def test_a_replaced_certificate_is_fetched_alone_and_taken_without_test_or_switch(
    device, shelf, certified
) -> None:
    other = replace(certified, certificate_targets=(shelf.certify(certified, 2),))
    both = replace(certified, certificate_targets=(*certified.certificate_targets,
                                                   *other.certificate_targets))  # fmt: skip
    await install(device, certified, 1)
    tests, fetches = device.self_test.calls, device.fetch.calls
    async with device.on() as updater:
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        for generation, wanted in ((2, both), (3, other)):
            await updater.apply(desired(generation, wanted))
            await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
            assert device.serving.certificate() == certificate_id(other.certificate_targets[0])
            assert device.slots() == {wanted.slot}
        assert device.reports.phases() == ["committed", "downloading"] * 2 + ["committed"]
    assert device.serving.history == ["1.0.0"]  # the start
    assert (device.self_test.calls, device.fetch.calls) == (tests, fetches)
    assert device.fetch.certificates_asked == [
        *certified.certificate_targets, *other.certificate_targets,
    ]  # fmt: skip
    assert len(list((device.root / "files").iterdir())) == 3
    device.fetch.reachable = False
    async with device.on() as updater:
        assert device.serving.certificate() == certificate_id(other.certificate_targets[0])
        assert updater.reports()[0].previous_release == 0


async def test_a_withdrawn_certificate_is_left_at_once_whatever_the_hub_does(
    device, shelf, certified
) -> None:
    await install(device, certified, 1)
    replaced = replace(certified, certificate_targets=(shelf.certify(certified, 2),))
    device.fetch.reachable = False
    async with device.on() as updater:
        assert device.serving.certificate()
        await updater.apply(desired(2, replaced))
        assert device.serving.certificate() == ""
        await device.reports.until(lambda m: m.code == "download/unreachable")
    # The slot still holds it, the wish does not.
    async with device.on() as updater:
        assert device.slots() >= {certified.slot}
        assert device.serving.certificate() == ""
        device.fetch.reachable = True
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert ids(*replaced.certificate_targets) == [device.serving.certificate()]
        # Nothing to fetch, so nobody is asked.
        device.fetch.reachable = False
        bare = replace(certified, certificate_targets=())
        await updater.apply(desired(3, bare))
        assert device.serving.certificate() == ""
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert device.slots() == {bare.slot}
    assert device.serving.history == ["1.0.0"]


async def test_a_certificate_that_is_named_again_holds_again_before_its_slot_was_renewed(
    device, shelf, certified
) -> None:
    await install(device, certified, 1)
    replaced = replace(certified, certificate_targets=(shelf.certify(certified, 2),))
    device.fetch.reachable = False
    async with device.on() as updater:
        await updater.apply(desired(2, replaced))
    async with device.on() as updater:
        assert device.serving.certificate() == ""
        await updater.apply(desired(3, certified))
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert device.slots() == {certified.slot}


async def test_a_variant_that_becomes_the_better_choice_takes_the_whole_way(
    device, shelf, certified
) -> None:
    bare = replace(certified, certificate_targets=())
    await install(device, bare, 1)
    only = (shelf.certify(certified, 2, variant="fp32"),)
    async with device.on() as updater:
        await updater.apply(desired(2, replace(certified, certificate_targets=only)))
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert device.serving.variants == {"doubler": "fp32"}
        assert ids(*only) == [device.serving.certificate()]
    assert device.serving.history == ["1.0.0", "1.0.0"]
    assert device.self_test.calls == 2
    # Without it, what is here goes on: the other variant is no better, and it is not here.
    async with device.on() as updater:
        await updater.apply(desired(3, replace(certified, certificate_targets=())))
        assert device.serving.certificate() == ""
    device.fetch.reachable = False
    async with device.on():
        assert device.serving.variants == {"doubler": "fp32"}
        assert device.serving.certificate() == ""


async def test_a_slot_without_what_serves_is_not_committed_as_what_serves(
    device, shelf, certified
) -> None:
    """It was fetched when another variant was the better choice under its certificates."""
    old = replace(certified, certificate_targets=(shelf.certify(certified, 2, variant="fp32"),))
    more = (*old.certificate_targets, *certified.certificate_targets)
    await install(device, old, 1)
    await install(device, replace(old, certificate_targets=more), 2)
    async with device.on() as updater:
        assert device.serving.variants == {"doubler": "int8"}
        assert len(device.slots()) == 2
        device.choose = lambda bundle: choose(replace(bundle, certificates=()))  # they expire
        await updater.apply(desired(3, old))
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        serves = device.serving.active["doubler"]
        variant = serves.bundle.variant(device.serving.variants["doubler"])
        assert serves.path.name == old.slot
        assert serves.file(variant.path).is_file()
    assert device.self_test.calls == 3


async def test_other_certificates_do_not_take_a_candidate_back(device, shelf, certified) -> None:
    await install(device, shelf.put(9, "0.9.0"), 1)
    device.timings = LATER
    bare = replace(certified, certificate_targets=())
    async with device.on() as updater:
        await updater.apply(desired(2, certified))
        await device.until_probation()
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        await updater.apply(desired(3, bare))
        assert device.serving.certificate() == ""
        await updater.apply(desired(4, certified))
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        await updater.apply(desired(5, bare))
        for _ in range(100):
            await asyncio.sleep(0)
        assert device.serving.history == ["0.9.0", "1.0.0"]
    device.timings = SOON
    async with device.on() as updater:
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert device.serving.certificate() == ""


async def test_other_certificates_cost_no_block_that_was_fetched(device, shelf, certified) -> None:
    other = replace(certified, certificate_targets=(shelf.certify(certified, 2),))
    first = iter(range(1 << 30))

    def hold() -> None:
        if next(first) == 10:
            device.fetch.gate.clear()

    device.fetch.before_block = hold
    async with device.on() as updater:
        await updater.apply(desired(1, certified))
        await device.fetch.waiting.wait()
        copied = device.fetch.blocks_copied
        assert copied > 5
        (shelf.folder / certified.certificate_targets[0]).unlink()
        await updater.apply(desired(2, other))
        device.fetch.gate.set()
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert ids(*other.certificate_targets) == [device.serving.certificate()]
        assert device.slots() == {other.slot}
    assert device.fetch.calls == 2
    whole = sum(
        -(-path.stat().st_size // BLOCK)
        for path in (device.root / f"models/doubler/{other.slot}").rglob("*")
        if path.is_file() and path.parent.name != "certificates"
    )
    assert device.fetch.blocks_copied <= whole + 4  # the last one of each file is looked at again


async def test_what_is_withdrawn_while_it_is_being_loaded_is_never_answered_under(
    device, shelf, certified
) -> None:
    bare = replace(certified, certificate_targets=())
    activate = device.serving.activate

    async def slowly(model: str, bundle: BundleDirectory | None) -> None:
        if device.updater.generation == 1:
            assert await device.updater.apply(desired(2, bare))
        await activate(model, bundle)

    run, under = device.serving.run, set()

    async def noting(model: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        under.add(device.serving.certificate())
        return await run(model, inputs)

    async with device.on() as updater:
        device.serving.activate, device.serving.run = slowly, noting
        await updater.apply(desired(1, certified))
        await device.reports.until(lambda m: m.phase == "trial")
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert device.serving.certificate() == ""
        assert device.slots() == {bare.slot}
    assert device.serving.history == ["1.0.0"]
    assert under == {""}


async def test_what_was_withdrawn_is_not_gone_back_to(device, shelf, certified) -> None:
    await install(device, certified, 1)
    device.timings = LATER
    replaced = replace(certified, certificate_targets=(shelf.certify(certified, 2),))
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        await device.until_probation()
        device.fetch.reachable = False
        await updater.apply(desired(3, replaced))
        await device.reports.until(lambda m: m.code == "download/unreachable")
        assert device.serving.history == ["1.0.0", "2.0.0", "1.0.0"]
        assert device.serving.certificate() == ""


async def without_memory(model: str, bundle: BundleDirectory | None) -> None:
    raise ReleaseRefused("no memory")


async def test_what_cannot_be_gone_back_from_is_not_answered_under_what_was_withdrawn(
    device, shelf, certified
) -> None:
    await install(device, shelf.put(9, "0.9.0"), 1)
    device.timings = LATER
    activate = device.serving.activate
    async with device.on() as updater:
        await updater.apply(desired(2, certified))
        await device.until_probation()
        device.serving.activate = without_memory
        device.serving.engine_faults = 1
        await device.reports.until(lambda m: "going back failed" in m.sentence)
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        await updater.apply(desired(3, replace(certified, certificate_targets=())))
        assert (device.version, device.serving.certificate()) == ("1.0.0", "")
        device.serving.activate = activate
        back = ["0.9.0", "1.0.0", "0.9.0"]
        await device.reports.until(lambda _: device.serving.history[:3] == back)


async def test_what_answers_against_every_wish_is_asked_about(device, shelf, certified) -> None:
    """The wish is for what cannot be gone back to, so it does not say what is withdrawn."""
    old = shelf.put(9, "0.9.0")
    await install(device, old, 1)
    device.timings = LATER
    activate = device.serving.activate
    async with device.on() as updater:
        await updater.apply(desired(2, certified))
        await device.until_probation()
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        device.serving.activate = without_memory
        (shelf.folder / certified.certificate_targets[0]).unlink()
        await updater.apply(desired(3, old))
        await device.reports.until(lambda _: device.serving.certificate() == "")
        assert device.version == "1.0.0"
        device.serving.activate = activate
        await device.reports.until(lambda _: device.serving.history == ["0.9.0", "1.0.0", "0.9.0"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StepInterrupted("download/unreachable", "the hub does not answer"), None),
        (OSError(errno.EIO, "a bad disk"), None),
        (RuntimeError("a bug"), "what is withdrawn could not be found out"),
    ],
)
async def test_a_mistake_of_our_own_about_certificates_is_logged_with_its_trace(
    device, shelf, certified, error, told
) -> None:
    await install(device, certified, 1)
    asked = asyncio.Event()

    async def withdrawn(targets: Collection[str]) -> frozenset[str]:
        asked.set()
        raise error

    device.fetch.withdrawn = withdrawn
    with capture_logs() as logs:
        async with device.on() as updater:
            await updater.apply(desired(2, shelf.put(2, "2.0.0", factor=WRONG)))
            await asyncio.wait_for(asked.wait(), 20)
            await device.reports.until(phase("rejected"))  # and the update goes on
    assert device.version == "1.0.0"
    (line,) = [one for one in logs if one["event"] in ("certificates in doubt", told)]
    assert (line["log_level"], "exc_info" in line) == (
        ("info", False) if told is None else ("error", True)
    )


async def test_what_serves_in_the_place_of_something_refused_is_asked_about(
    device, shelf, certified
) -> None:
    """The wish is for another release, so it does not say what is withdrawn of this one."""
    await install(device, certified, 1)
    wrong = shelf.put(2, "2.0.0", factor=WRONG)
    (path,) = certified.certificate_targets
    file = shelf.folder / path
    document = file.read_bytes()
    async with device.on() as updater:
        await updater.apply(desired(2, wrong))
        await device.reports.until(phase("rejected"))
        assert device.serving.certificate() == certificate_id(path)
        file.unlink()
        device.fetch.reachable = False
        await updater.apply(desired(3, wrong))
        await device.reports.until(lambda m: m.code == "download/unreachable")
        assert device.serving.certificate() == certificate_id(path)  # nobody knows
        device.fetch.reachable = True
        told = len(device.reports.seen)
        updater.nudge()
        await device.reports.until(phase("rejected"))
        await device.reports.until(lambda _: device.serving.certificate() == "")
        assert len(device.reports.seen) > told
    device.fetch.reachable = False
    async with device.on() as updater:  # it is remembered without a network
        assert device.serving.certificate() == ""
        device.fetch.reachable = True
        file.write_bytes(document)
        await updater.apply(desired(4, wrong))
        await device.reports.until(lambda _: device.serving.certificate() == certificate_id(path))
        file.unlink()
        await updater.apply(desired(5, wrong))
        await device.reports.until(lambda _: device.serving.certificate() == "")
        # A wish for the release itself has the last word.
        await updater.apply(desired(6, certified))
        assert device.serving.certificate() == certificate_id(path)
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
    assert device.serving.history == ["1.0.0"]


async def test_what_is_asked_about_is_asked_again_without_a_word_from_the_hub(
    device, shelf, certified
) -> None:
    await install(device, certified, 1)
    wrong = shelf.put(2, "2.0.0", factor=WRONG)
    device.timings = replace(SOON, doubt_s=0.01)
    async with device.on() as updater:
        await updater.apply(desired(2, wrong))
        await device.reports.until(phase("rejected"))
        (shelf.folder / certified.certificate_targets[0]).unlink()
        await device.reports.until(lambda _: device.serving.certificate() == "")


async def test_what_a_full_disk_did_not_remember_is_remembered_when_there_is_room(
    device, shelf, certified
) -> None:
    await install(device, certified, 1)
    device.timings = replace(SOON, doubt_s=0.01)
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0", factor=WRONG)))
        await device.reports.until(phase("rejected"))
        device.disk.full = True
        (shelf.folder / certified.certificate_targets[0]).unlink()
        await device.reports.until(lambda _: device.serving.certificate() == "")
        device.disk.full = False
        async with asyncio.timeout(20):
            while not list(device.root.glob(f"**/{WITHDRAWN}")):
                await asyncio.sleep(0.005)
    device.fetch.reachable = False
    async with device.on():
        assert device.serving.certificate() == ""


async def test_a_certificate_of_something_else_is_refused_and_what_serves_goes_on(
    device, shelf, certified
) -> None:
    await install(device, certified, 1)
    wrong = (*certified.certificate_targets, shelf.certify(certified, 2, version="3.0.0"))
    async with device.on() as updater:
        await updater.apply(desired(2, replace(certified, certificate_targets=wrong)))
        report = await device.reports.until(phase("rejected"))
        assert (report.code, report.active_release) == ("certificate/other", 1)
        assert "speaks of doubler 3.0.0, what serves is doubler 1.0.0" in report.sentence
        assert ids(*certified.certificate_targets) == [device.serving.certificate()]
        assert device.slots() == {certified.slot}


async def test_a_disk_without_room_delays_a_certificate(device, shelf, certified) -> None:
    await install(device, certified, 1)
    other = replace(certified, certificate_targets=(shelf.certify(certified, 2),))
    device.timings = replace(SOON, retry_s=0.05)

    def fill() -> None:
        device.disk.full = True

    device.fetch.before_block = fill
    async with device.on() as updater:
        await updater.apply(desired(2, other))
        await device.reports.until(lambda m: m.code == DiskFull.code)
        assert device.serving.certificate() == ""
        device.fetch.before_block, device.disk.full = (lambda: None), False
        await device.reports.until(lambda m: committed(1)(m) and updater.is_settled)
        assert ids(*other.certificate_targets) == [device.serving.certificate()]
    assert device.slots() == {other.slot}


# What the candidate does wrong


async def test_a_candidate_with_wrong_outputs_is_refused_at_once_and_never_served(
    device, shelf
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    wrong = shelf.put(2, "2.0.0", factor=WRONG)
    async with device.on() as updater:
        await updater.apply(desired(2, wrong))
        report = await device.reports.until(phase("rejected"))
    assert (report.code, report.active_release, report.attempt) == ("self-test/deviation", 1, 1)
    assert report.figures["agreement"] < 1.0
    assert device.serving.history == ["1.0.0"]
    assert wrong.slot not in device.slots()


async def test_who_looks_for_why_a_release_does_not_serve_finds_it_in_the_log(
    device, shelf
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.self_test.failures = [StepFailed("self-test/memory", "too much")]
    with capture_logs() as logs:
        async with device.on() as updater:
            await updater.apply(desired(2, shelf.put(2, "2.0.0", factor=WRONG)))
            await device.reports.until(phase("rejected"))
            device.serving.answers_wrongly = True
            await updater.apply(desired(3, shelf.put(3, "3.0.0")))
            await device.reports.until(phase("rolled-back"))
    told = [
        (line["log_level"], line["event"], line["code"], line["version"], line["serves"])
        for line in logs
        if "code" in line
    ]
    assert told == [
        ("warning", "update failed and is tried again", "self-test/memory", "2.0.0", "1.0.0"),
        ("error", "release refused", "self-test/deviation", "2.0.0", "1.0.0"),
        *[("error", "release is taken back", "trial/deviation", "3.0.0", "1.0.0")] * 3,
    ]


async def test_a_quarantine_outlives_a_restart_and_ends_with_a_newer_generation(
    device, shelf
) -> None:
    wrong, right = shelf.put(1, "1.0.0", factor=WRONG), shelf.put(2, "2.0.0")
    async with device.on() as updater:
        await updater.apply(desired(1, wrong))
        await device.reports.until(phase("rejected"))
    calls = device.self_test.calls
    async with device.on() as updater:
        assert (await device.reports.until(phase("rejected"))).code == "self-test/deviation"
        assert device.self_test.calls == calls
        await updater.apply(desired(2, right))
        await device.reports.until(committed(2))


async def test_the_same_release_is_tried_again_when_a_newer_generation_asks(device, shelf) -> None:
    wrong = shelf.put(1, "1.0.0", factor=WRONG)
    async with device.on() as updater:
        for generation in (1, 2):
            await updater.apply(desired(generation, wrong))
            await device.reports.until(
                lambda m, g=generation: m.phase == "rejected" and device.self_test.calls == g
            )
    assert device.self_test.calls == 2


async def test_what_may_go_better_is_tried_three_times(device, shelf) -> None:
    late = StepFailed("self-test/timeout", "no result after 60 s")
    device.self_test.failures = [late] * 3
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0")))
        report = await device.reports.until(phase("rejected"))
    assert (report.code, report.attempt) == ("self-test/timeout", 3)
    assert (device.self_test.calls, device.fetch.calls) == (3, 1)  # what was fetched stays


async def test_the_third_attempt_may_still_succeed(device, shelf) -> None:
    device.self_test.failures = [StepFailed("self-test/memory", "too much")] * 2
    report = await install(device, shelf.put(1, "1.0.0"))
    assert (report.code, report.attempt) == ("", 0)


async def test_a_candidate_that_answers_wrongly_in_the_engine_is_taken_back(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.serving.answers_wrongly = True
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        report = await device.reports.until(phase("rolled-back"))
    assert (report.code, report.attempt) == ("trial/deviation", 3)
    assert (device.version, report.active_release) == ("1.0.0", 1)
    assert device.serving.history == ["1.0.0"] + ["2.0.0", "1.0.0"] * 3


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ReleaseRefused("no memory for it"), "trial/load"),
        (RuntimeError("a bug"), "trial/internal"),
        (StepFailed("trial/warm-up", "too slow"), "trial/warm-up"),
        (StepRefused("trial/shape", "of no use while it serves"), "trial/shape"),
        (StepInterrupted("trial/busy", "of no use here"), "trial/busy"),
    ],
)
async def test_a_candidate_that_does_not_load_leaves_the_old_one_serving(
    device, shelf, error, code
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    async with device.on() as updater:
        device.serving.refusals = [error]
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        report = await device.reports.until(lambda m: m.code != "")
        assert report.code == code
        await device.reports.until(committed(2))


async def test_an_engine_fault_in_probation_takes_the_candidate_back(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.timings = LATER
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        await device.until_probation()
        device.serving.engine_faults = 1
        report = await device.reports.until(phase("rolled-back"))
    assert (report.code, device.version) == ("probation/engine-fault", "1.0.0")


async def test_a_rollback_is_tried_until_the_engine_takes_it(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.timings = LATER
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        await device.until_probation()
        device.serving.refusals = [ReleaseRefused("no memory"), RuntimeError("a bug")]
        await updater.apply(desired(3, shelf.target(1, "1.0.0")))
        report = await device.reports.until(committed(1))
    assert (device.version, report.active_release) == ("1.0.0", 1)
    sentences = [m.sentence for models in device.reports.seen for m in models]
    assert any("going back failed" in s for s in sentences)


async def test_the_way_back_leads_to_the_release_committed_last(device, shelf) -> None:
    async with device.on() as updater:
        for generation in (1, 2):
            await updater.apply(desired(generation, shelf.put(generation, f"{generation}.0.0")))
            await device.reports.until(committed(generation))
        device.serving.answers_wrongly = True
        await updater.apply(desired(3, shelf.put(3, "3.0.0")))
        await device.reports.until(phase("rolled-back"))
        assert device.version == "2.0.0"


async def test_a_slot_that_rots_between_two_attempts_is_fetched_again(device, shelf) -> None:
    target = shelf.put(1, "1.0.0")
    device.self_test.gate.clear()
    device.self_test.failures = [StepFailed("self-test/timeout", "no result after 60 s")]
    async with device.on() as updater:
        await updater.apply(desired(1, target))
        await device.self_test.waiting.wait()
        slot = device.root / "models/doubler" / target.slot
        (slot / "variants/int8.onnx").write_bytes(b"bit rot")
        device.self_test.gate.set()
        await device.reports.until(committed(1))
    assert device.fetch.calls == 2


async def test_a_first_release_that_fails_leaves_the_device_as_it_was(device, shelf) -> None:
    device.serving.answers_wrongly = True
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0")))
        report = await device.reports.until(phase("rolled-back"))
    assert (report.active_release, device.version) == (0, None)
    assert device.serving.history[-1] is None


@pytest.mark.parametrize(
    ("number", "version", "code"),
    [(9, "9.0.0", "download/unknown"), (1, "1.1.0", "verify/identity")],
)
async def test_a_release_that_is_not_what_the_hub_named_is_refused(
    device, shelf, number, version, code
) -> None:
    shelf.put(1, "1.0.0")
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.target(number, version)))
        report = await device.reports.until(phase("rejected"))
    assert report.code == code
    assert device.slots() == set()


async def test_a_release_for_other_hardware_is_refused(device, shelf) -> None:
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0", provider="TensorrtExecutionProvider")))
        report = await device.reports.until(phase("rejected"))
    assert "nothing runs on CPUExecutionProvider" in report.sentence


async def test_damage_between_download_and_check_costs_one_attempt(device, shelf) -> None:
    target = shelf.put(1, "1.0.0")
    artifact = shelf.folder / "doubler/1/variants/int8.onnx"
    intact = artifact.read_bytes()
    artifact.write_bytes(intact[:-1] + b"!")
    async with device.on() as updater:
        await updater.apply(desired(1, target))
        report = await device.reports.until(lambda m: m.code == "verify/bundle")
        assert "SHA-256" in report.sentence
        artifact.write_bytes(intact)
        with contextlib.suppress(TimeoutError):
            await device.reports.until(lambda m: m.phase in ("committed", "rejected"))
        if device.version is None:  # all three attempts were faster than this test
            await updater.apply(desired(2, target))
        await device.reports.until(committed(1))


# What the world does wrong


async def test_an_outage_costs_no_attempt_and_ends_when_the_hub_is_back(device, shelf) -> None:
    device.timings = Timings(probation_s=0.0, retry_s=0.001, retry_max_s=0.002)
    device.fetch.reachable = False
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0")))
        while device.fetch.calls < 10:
            report = await device.reports.until(lambda m: m.code == "download/unreachable")
            assert (report.attempt, report.phase) == (1, "accepted")
            await asyncio.sleep(0)
        device.fetch.reachable = True
        await device.reports.until(committed(1))


async def test_a_nudge_ends_the_pause_of_an_outage(device, shelf) -> None:
    device.timings = Timings(probation_s=0.0, retry_s=3600.0, retry_max_s=3600.0)
    device.fetch.reachable = False
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0")))
        await device.reports.until(lambda m: m.code == "download/unreachable")
        device.fetch.reachable = True
        updater.nudge()
        await device.reports.until(committed(1))


async def test_a_download_that_is_too_slow_goes_on_where_it_was(device, shelf) -> None:
    device.timings = Timings(fetch_s=0.05, probation_s=0.0, retry_s=0.001, retry_max_s=0.001)
    device.fetch.gate.clear()
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0")))
        report = await device.reports.until(lambda m: m.code == "download/timeout")
        assert report.attempt == 1
        device.fetch.gate.set()
        await device.reports.until(committed(1))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk/full"),
        (OSError(errno.EIO, "Input/output error"), "disk/fault"),
        (ConnectionResetError("a downloader that forgot to translate"), "download/internal"),
        (ZeroDivisionError("a bug"), "download/internal"),
    ],
)
async def test_whatever_a_download_meets_ends_the_attempt_and_not_the_agent(
    device, shelf, error, code
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)

    def meet() -> None:
        raise error

    device.fetch.before_block = meet
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        report = await device.reports.until(phase("rejected"))
        assert (report.code, report.active_release) == (code, 1)
        device.fetch.before_block = lambda: None
        await updater.apply(desired(3, shelf.target(2, "2.0.0")))
        await device.reports.until(committed(2))


async def test_a_full_disk_while_fetching_leaves_nothing_and_gives_up_the_oldest_release(
    device, shelf
) -> None:
    for generation in (1, 2):
        await install(device, shelf.put(generation, f"{generation}.0.0"), generation)

    def full() -> None:
        if len(device.slots()) > 2:  # two releases and the third under way
            raise OSError(errno.ENOSPC, "No space left on device")

    device.fetch.before_block = full
    report = await install(device, shelf.put(3, "3.0.0"), 3)
    assert (report.active_release, report.previous_release) == (3, 2)


async def test_a_full_disk_refuses_the_wish_by_name_and_forgets_nothing(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    before = {p: p.read_bytes() for p in device.root.rglob("*") if p.is_file()}
    async with device.on() as updater:
        before[device.root / "device.json"] = (device.root / "device.json").read_bytes()
        device.disk.full = True
        with pytest.raises(DiskFull, match="no space is left"):
            await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        assert {p: p.read_bytes() for p in device.root.rglob("*") if p.is_file()} == before
        device.disk.full = False
        assert await updater.apply(desired(2, shelf.target(2, "2.0.0")))
        await device.reports.until(committed(2))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
async def test_a_disk_that_takes_no_writes_does_not_keep_a_device_from_serving(
    device, shelf, error
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.disk.full, device.disk.error = True, error
    for _ in range(2):
        async with device.on():
            await device.reports.until(committed(1))
            assert device.version == "1.0.0"


async def test_a_disk_that_fills_up_on_trial_brings_the_old_release_back(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.timings = LATER
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        await device.until_probation()
        device.disk.full = True
        device.serving.engine_faults = 1
        report = await device.reports.until(lambda m: m.active_release == 1 and m.code != "")
        assert report.code == "probation/engine-fault"
        await device.reports.until(phase("accepted"))  # after the way back
        assert device.version == "1.0.0"
    device.disk.full = False
    device.serving.engine_faults = 0
    async with device.on():
        assert device.version == "1.0.0"  # the disk still said trial


async def test_a_commit_that_the_disk_refuses_is_taken_back(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    async with device.on() as updater:
        activate = device.serving.activate

        async def then_full(model, bundle) -> None:
            await activate(model, bundle)
            device.disk.full = bundle is not None and bundle.bundle.version == "2.0.0"

        device.serving.activate = then_full
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        report = await device.reports.until(phase("rolled-back"))
    assert (report.code, device.version) == ("disk/full", "1.0.0")


async def test_a_damaged_release_gives_way_to_the_one_before_it_and_is_fetched_again(
    device, shelf
) -> None:
    first, second = shelf.put(1, "1.0.0"), shelf.put(2, "2.0.0")
    await install(device, first, 1)
    await install(device, second, 2)
    artifact = device.root / "models/doubler" / second.slot / "variants/int8.onnx"
    artifact.write_bytes(b"bit rot")
    device.fetch.reachable = False
    async with device.on():
        assert device.version == "1.0.0"
        await device.reports.until(lambda m: m.active_release == 1)
        device.fetch.reachable = True
        device.updater.nudge()
        await device.reports.until(committed(2))


@pytest.mark.parametrize("damaged", ["device.json", "models/doubler/pointer.json"])
async def test_a_damaged_state_file_is_repaired_by_what_is_left(device, shelf, damaged) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    (device.root / damaged).write_bytes(b"{}")
    device.fetch.reachable = False
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.target(1, "1.0.0")))
        await device.reports.until(committed(1))
        assert device.version == "1.0.0"


# What the hub changes its mind about


@pytest.mark.parametrize("moment", ["downloading", "self-test", "trial"])
async def test_a_newer_generation_takes_over_at_any_moment(device, shelf, moment) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    second, third = shelf.put(2, "2.0.0"), shelf.put(3, "3.0.0")
    device.timings = LATER
    async with device.on() as updater:
        if moment == "downloading":
            device.fetch.gate.clear()
        if moment == "self-test":
            device.self_test.gate.clear()
        await updater.apply(desired(2, second))
        await device.reports.until(phase(moment))
        match moment:
            case "downloading":
                await device.fetch.waiting.wait()
            case "self-test":
                await device.self_test.waiting.wait()
            case _:
                await device.until_probation()
        await updater.apply(desired(3, third))
        device.fetch.gate.set()
        device.self_test.gate.set()
        report = await device.reports.until(lambda m: m.active_release == 3 and m.phase == "trial")
        assert (report.previous_release, report.attempt) == (1, 1)
        assert device.slots() == {t.slot for t in (shelf.target(1, "1.0.0"), third)}


async def test_a_newer_generation_that_wants_the_same_leaves_the_work_running(
    device, shelf
) -> None:
    first = shelf.put(1, "1.0.0")
    device.self_test.gate.clear()
    async with device.on() as updater:
        await updater.apply(desired(1, first))
        await device.self_test.waiting.wait()
        await updater.apply(desired(2, first, shelf.put(1, "1.0.0", model="other")))
        device.self_test.gate.set()
        await device.reports.until(committed(1))
        await device.reports.until(committed(1), "other")
    assert device.self_test.calls == 2


async def test_a_model_that_is_no_longer_wanted_keeps_what_it_has(device, shelf) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.self_test.gate.clear()
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        await device.self_test.waiting.wait()
        await updater.apply(desired(3))
        report = await device.reports.until(phase("committed"))
    assert (report.active_release, report.desired_release, device.version) == (1, 0, "1.0.0")


async def test_two_models_do_not_wait_for_each_others_downloads(device, shelf) -> None:
    device.timings = LATER
    async with device.on() as updater:
        await updater.apply(desired(1, shelf.put(1, "1.0.0"), shelf.put(1, "1.0.0", model="other")))
        await device.reports.until(phase("trial"))
        await device.reports.until(phase("trial"), "other")


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Desired(0), "generation 0 is not between"),
        (Desired(1 << 53), "is not between"),
        (desired(1, Target("Doubler", 1, "1.0.0", "a/b")), "model name 'Doubler'"),
        (desired(1, Target("../etc", 1, "1.0.0", "a/b")), "model name"),
        (desired(1, Target("a", 0, "1.0.0", "a/b")), "release 0"),
        (desired(1, Target("a", 1, "1.0.0", "../b")), "target path '../b'"),
        (desired(1, Target("a", 1, "1.0.0", "/b")), "target path '/b'"),
        (desired(1, Target("a", 1, "1.0.0", "")), "target path ''"),
        (desired(1, Target("a", 1, "1.0.0", "b", ("c/../d",))), "target path"),
        (
            desired(1, Target("a", 1, "1.0.0", "b"), Target("a", 2, "1.0.0", "c")),
            "named twice",
        ),
    ],
)
async def test_a_wish_that_contradicts_itself_is_refused(device, broken, sentence) -> None:
    async with device.on() as updater:
        with pytest.raises(DesiredRefused, match=sentence):
            await updater.apply(broken)
        assert updater.generation == 0


async def test_a_wish_accepted_just_before_the_power_went_is_carried_out(device, shelf) -> None:
    target = shelf.put(1, "1.0.0")
    device.root.joinpath("models").mkdir()
    slots = Slots(LocalDisk(device.root))
    slots.open()
    slots.accept(desired(4, target))
    async with device.on():
        await device.reports.until(committed(1))


# Power loss, row by row; test_kills.py does the same to real processes


@pytest.mark.parametrize(
    ("moment", "code"),
    [("self-test", "self-test/restart"), ("trial", "probation/restart")],
)
async def test_a_restart_leads_back_to_what_is_known_to_be_good(
    device, shelf, moment, code
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.timings = LATER
    device.self_test.gate.clear()
    async with device.on() as updater:
        await updater.apply(desired(2, shelf.put(2, "2.0.0")))
        await device.self_test.waiting.wait()
        if moment == "trial":
            device.self_test.gate.set()
            await device.until_probation()
    device.timings = SOON
    device.self_test.gate.set()
    async with device.on():
        assert device.serving.history == ["1.0.0"]
        await device.reports.until(committed(2))
    first = device.reports.seen[0][0]
    assert (first.code, first.phase, first.attempt) == (code, "accepted", 2)
    assert "attempt 1 of 3" in first.sentence


async def test_a_candidate_that_takes_the_device_down_is_given_up_after_three_attempts(
    device, shelf
) -> None:
    await install(device, shelf.put(1, "1.0.0"), 1)
    device.timings = LATER
    target = shelf.put(2, "2.0.0")
    for attempt in (1, 2, 3):
        async with device.on() as updater:
            await updater.apply(desired(2, target))
            report = await device.reports.until(lambda m: m.active_release == 2)
            assert report.attempt == attempt
    async with device.on():
        report = await device.reports.until(phase("rolled-back"))
        assert device.version == "1.0.0"
    assert report.attempt == 3
    assert report.code in ("trial/restart", "probation/restart")
