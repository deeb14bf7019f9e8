"""Serves the releases of the registry that belong on the hub: those that escalate to nothing.

Of each such model the newest release answers who names no version. An older one is served as
long as a release of the registry is paired with it, because devices that run that release hold
the hub's answers against its certificate, and another file would void it.
"""

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from cloud_hub.engines.onnx_runtime import usable_providers
from cloud_hub.errors import ModelRefused
from cloud_hub.fleet.releases import Release, Releases
from cloud_hub.inference.directory import ModelFiles
from cloud_hub.inference.repository import Repository
from fogline_protocol import hardware
from fogline_protocol.model_config import VersionPolicy, Wanted

log = structlog.get_logger(__name__)


class Registry:
    """Keeps a repository in step with the releases."""

    def __init__(self, releases: Releases, repository: Repository, directory: Path) -> None:
        """Join both; ``directory`` is filled with links to blobs, and with nothing else."""
        self._releases = releases
        self._repository = repository
        self._directory = directory
        shutil.rmtree(directory, ignore_errors=True)  # links of an earlier start

    async def serve(self) -> None:
        """Serve what belongs on the hub of the releases there are now."""
        for model, releases in on_the_hub(await self._releases.list()).items():
            try:
                files = await asyncio.to_thread(self._lay_out, model, releases)
            except (ModelRefused, OSError) as error:
                await self._repository.refuse_release(model, ModelRefused(str(error)))
                continue
            await self._repository.serve_release(model, files)

    async def follow(self) -> None:
        """Serve whatever is accepted, until cancelled."""
        while True:
            await self._releases.accepted.wait()
            self._releases.accepted.clear()
            await self.serve()

    def _lay_out(self, model: str, releases: Sequence[Release]) -> ModelFiles:
        """Give the files of the variants to run their names beside each other again.

        Raises:
            ModelRefused: no variant of the newest one is meant for this hub's providers.
            OSError: the disk is full or fails, or a blob is missing.
        """
        folder = self._directory / model
        versions = []
        most = self._repository.limits.max_batch  # rows in a run, of any of them
        for release in releases:
            bundle = release.bundle
            processor = hardware.this_machine()
            variant = next(
                (v for v in bundle.variants if v.providers_on(usable_providers(), processor)), None
            )
            if variant is None:
                problem = (
                    f"{model}@{release.number} has no variant for {', '.join(usable_providers())} "
                    f"on {processor}"
                )
                if release is releases[-1]:
                    raise ModelRefused(problem)
                log.error("release is not served", why=problem)
                continue
            place = folder / str(release.number)
            for name in bundle.files_for({variant.name}):
                target = place / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    os.link(self._releases.file(release, name), target)
            versions.append((str(release.number), place / variant.path))
            most = min(most, variant.max_rows or most)
        newest = releases[-1].bundle
        return ModelFiles(
            folder,
            Wanted(
                name=model,
                max_batch_size=min(newest.max_batch, most),
                versions=VersionPolicy(specific=tuple(int(number) for number, _ in versions)),
            ),
            versions,
            {newest.decisive_output: newest.labels} if newest.labels else {},
        )


def on_the_hub(releases: Sequence[Release]) -> Mapping[str, Sequence[Release]]:
    """Return the releases that the hub serves, by model, in ascending order of their numbers."""
    paired = {
        (pair.model, pair.bundle_sha256)
        for pair in (release.escalates_to for release in releases)
        if pair is not None
    }
    by_model: dict[str, list[Release]] = {}
    for release in sorted(releases, key=lambda release: release.number):
        if release.escalates_to is None:
            by_model.setdefault(release.model, []).append(release)
    return {
        model: [
            release
            for release in mine
            if release is mine[-1] or (model, release.bundle_sha256) in paired
        ]
        for model, mine in by_model.items()
    }
