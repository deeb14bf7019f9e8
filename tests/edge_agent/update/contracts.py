"""What the fakes of this folder promise, and the real things with them.

A test module subclasses a contract and supplies its fixtures; whatever stands behind ``Fetch``
or ``SelfTest`` passes the same tests.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.update.lifecycle import StepInterrupted, StepRefused
from edge_agent.update.slots import Target
from edge_agent.update.surroundings import Fetch, SelfTest
from fogline_protocol.release import BundleDirectory

CODE = re.compile(r"[a-z-]+/[a-z-]+")  # stage and what, for machines


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder`` by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(slots=True)
class Source:
    """A hub with one release, under the control of a test."""

    fetch: Fetch
    target: Target
    unknown: Target  # the hub has no such release
    content: Mapping[str, bytes]  # what a device needs of `target`, certificates included

    def cut(self) -> None:
        """Make the hub unreachable."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make it reachable again."""
        raise NotImplementedError

    def hold(self) -> asyncio.Event:
        """Stop in the middle of the next fetch; the event is set when it has stopped."""
        raise NotImplementedError

    def release(self) -> None:
        """Go on."""
        raise NotImplementedError


class FetchContract:
    """Supply a fixture ``source``."""

    async def test_it_fills_the_folder_with_the_release_and_nothing_else(
        self, source: Source, tmp_path: Path
    ) -> None:
        into = tmp_path / "into"
        into.mkdir()
        await source.fetch.fetch(source.target, into, lambda done, total: None)
        assert files_in(into) == dict(source.content)

    async def test_progress_grows_to_the_whole(self, source: Source, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        await source.fetch.fetch(source.target, tmp_path, lambda *step: seen.append(step))
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] > 0

    async def test_a_release_that_does_not_exist_is_refused(
        self, source: Source, tmp_path: Path
    ) -> None:
        with pytest.raises(StepRefused) as refusal:
            await source.fetch.fetch(source.unknown, tmp_path, lambda done, total: None)
        assert CODE.fullmatch(refusal.value.code)

    async def test_a_hub_that_is_away_interrupts_and_the_next_call_goes_on(
        self, source: Source, tmp_path: Path
    ) -> None:
        source.cut()
        with pytest.raises(StepInterrupted) as interruption:
            await source.fetch.fetch(source.target, tmp_path, lambda done, total: None)
        assert CODE.fullmatch(interruption.value.code)
        source.restore()
        await source.fetch.fetch(source.target, tmp_path, lambda done, total: None)
        assert files_in(tmp_path) == dict(source.content)

    async def test_a_cancelled_call_has_stopped_writing_and_the_next_one_finishes(
        self, source: Source, tmp_path: Path
    ) -> None:
        held = source.hold()
        call = asyncio.create_task(
            source.fetch.fetch(source.target, tmp_path, lambda done, total: None)
        )
        async with asyncio.timeout(10):
            await held.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        left = files_in(tmp_path)
        source.release()
        await asyncio.sleep(0)
        assert files_in(tmp_path) == left
        await source.fetch.fetch(source.target, tmp_path, lambda done, total: None)
        assert files_in(tmp_path) == dict(source.content)

    @pytest.mark.parametrize("damage", [b"", b"x", b"x" * 10_000])
    async def test_what_lies_in_the_folder_is_not_trusted(
        self, source: Source, tmp_path: Path, damage: bytes
    ) -> None:
        for name in source.content:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(damage)
        (tmp_path / "stranger").write_bytes(damage)
        await source.fetch.fetch(source.target, tmp_path, lambda done, total: None)
        assert files_in(tmp_path) == dict(source.content)

    async def test_certificates_come_by_themselves(self, source: Source) -> None:
        found = await source.fetch.certificates(source.target.certificate_targets)
        assert len(found) == len(source.target.certificate_targets) > 0
        assert {f"certificates/{id}.json": data for id, data in found.items()} == {
            name: data for name, data in source.content.items() if name.startswith("certificates/")
        }
        assert await source.fetch.certificates(()) == {}

    async def test_a_certificate_that_is_not_signed_is_waited_for_and_known_as_withdrawn(
        self, source: Source
    ) -> None:
        unknown = f"certificates/{source.target.model}/{source.target.release}/{'0' * 16}.json"
        with pytest.raises(StepInterrupted) as refusal:
            await source.fetch.certificates([unknown])
        assert CODE.fullmatch(refusal.value.code)
        asked = [unknown, *source.target.certificate_targets]
        assert await source.fetch.withdrawn(asked) == {"0" * 16}

    async def test_a_hub_that_is_away_interrupts_certificates_too(self, source: Source) -> None:
        source.cut()
        with pytest.raises(StepInterrupted):
            await source.fetch.certificates(source.target.certificate_targets)
        with pytest.raises(StepInterrupted):
            await source.fetch.withdrawn(source.target.certificate_targets)


@dataclass(slots=True)
class Candidates:
    """A self-test with one candidate to pass and one to refuse."""

    self_test: SelfTest
    right: BundleDirectory
    wrong: BundleDirectory
    variant: str
    provider: str = "CPUExecutionProvider"


class SelfTestContract:
    """Supply a fixture ``candidates``."""

    async def test_a_right_candidate_passes_with_figures(self, candidates: Candidates) -> None:
        figures = await candidates.self_test.run(
            candidates.right, candidates.variant, candidates.provider
        )
        assert figures["agreement"] >= 0.9
        assert figures["max_abs_error"] >= 0.0
        assert {"seconds", "peak_bytes"} <= figures.keys()

    async def test_a_wrong_candidate_is_refused_with_figures(self, candidates: Candidates) -> None:
        with pytest.raises(StepRefused) as refusal:
            await candidates.self_test.run(
                candidates.wrong, candidates.variant, candidates.provider
            )
        assert refusal.value.code == "self-test/deviation"
        assert "allowed" in refusal.value.sentence
        assert refusal.value.figures["max_abs_error"] > 0.0
