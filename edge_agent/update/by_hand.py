"""Releases that a person gives to this device: they prove themselves, like those that a hub brings.

    read and verify ─► choose ─► self-test in a child process ─► load
                                   │ passed before, here: not again

What passed is remembered with all that the verdict depends on, so only the first start with a
bundle pays for the child. What failed is tried again at every start: time, memory and crashes
also depend on what else the device was doing, and nobody waits for a start that is refused.
"""

import asyncio
import datetime
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import structlog

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime import providers
from edge_agent.runtime import release as releases
from edge_agent.runtime.release import Release
from edge_agent.runtime.variants import Choice
from edge_agent.update.lifecycle import StepEnded
from edge_agent.update.surroundings import SelfTest
from fogline_protocol.release import BundleDirectory

MEMORY = "self-tests.json"  # in the data directory
MOST_REMEMBERED = 64  # bundles that somebody tried in turn must not pile up

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Passed:
    """One self-test that was passed."""

    at: str  # ISO 8601, UTC
    figures: Mapping[str, float]


class ByHand:
    """Loads bundles from directories that the configuration names."""

    def __init__(
        self, data: Path, self_test: SelfTest, *, provider: str = "", threads: int = 0
    ) -> None:
        """Remember in ``data``, which exists, what passed ``self_test``.

        ``provider`` restricts the choice to one execution provider; ``threads`` are the engines'.
        """
        self._memory = data / MEMORY
        self._self_test = self_test
        self._provider = provider
        self._threads = threads
        # What is known to have passed, so that a way back never waits for a self-test that the
        # disk did not remember.
        self._passed: dict[str, Passed] = {}

    async def load(self, path: Path) -> Release:
        """Return the release in ``path``, proven on this device and loaded.

        Raises:
            ReleaseRefused: it is not intact, cannot run here, or failed its self-test.
        """
        directory, choice = await asyncio.to_thread(read, path, self._provider)
        key = _verdict_depends_on(directory, choice)
        remembered = await asyncio.to_thread(_remembered, self._memory)
        self._passed = remembered | self._passed
        told = _log.bind(
            release=f"{directory.bundle.model}@{directory.bundle.version}",
            variant=choice.variant.name,
            provider=choice.provider,
        )
        if key in self._passed:
            told.info("self-test passed earlier", at=self._passed[key].at)
        else:
            figures = await prove(directory, choice, self._self_test)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            told.info("self-test passed", **figures)
            self._passed[key] = Passed(now, figures)
            try:
                await asyncio.to_thread(_remember, self._memory, dict(self._passed))
            except OSError as error:
                told.warning("the self-test will be run again at the next start", why=str(error))
        return await asyncio.to_thread(
            releases.load, directory, threads=self._threads, choice=choice
        )


def read(path: Path, provider: str = "") -> tuple[BundleDirectory, Choice]:
    """Return the verified bundle in ``path`` and what of it would serve here.

    Raises:
        ReleaseRefused: it is not intact or cannot run here.
    """
    directory = releases.read(path)
    return directory, releases.choose(directory, provider)


async def prove(
    directory: BundleDirectory, choice: Choice, self_test: SelfTest
) -> Mapping[str, float]:
    """Return the figures of a self-test that ``choice`` has just passed.

    Raises:
        ReleaseRefused: it did not.
    """
    try:
        return await self_test.run(directory, choice.variant.name, choice.provider)
    except StepEnded as error:
        raise ReleaseRefused(
            f"bundle {directory.path}: {choice.variant.name} failed its self-test on "
            f"{choice.provider}: {error.sentence} [{error.code}]"
        ) from None


def _verdict_depends_on(directory: BundleDirectory, choice: Choice) -> str:
    return " ".join(
        (
            directory.sha256,  # names the digests of artifact and vectors, and the tolerances
            choice.variant.name,
            providers.hardware_class(choice.provider),
            providers.runtime_version(),
            metadata.version("fogline"),  # which judges
        )
    )


def _remembered(file: Path) -> dict[str, Passed]:
    """Return what ``_remember`` wrote; of a damaged file nothing, then everything is tested."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return {
            str(key): Passed(str(one["at"]), {k: float(v) for k, v in one["figures"].items()})
            for key, one in document.items()
        }
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError
    ):  # fmt: skip
        return {}


def _remember(file: Path, passed: Mapping[str, Passed]) -> None:
    """Write in one step.

    Raises:
        OSError: the disk is full or fails.
    """
    newest = list(passed.items())[-MOST_REMEMBERED:]
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump({key: asdict(one) for key, one in newest}, out)
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise
