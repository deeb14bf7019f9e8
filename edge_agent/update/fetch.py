"""Fetches what this device needs of a release: signed index, certificates, then the files.

Joins ``trust`` (what is true) and ``download`` (the bytes) to the ``Fetch`` of the updater. Only
the variant that this device will run is fetched, so the root document comes first and the
choice is made between the two.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.variants import Choice
from edge_agent.update.blocks import LocalBlocks, Transferred
from edge_agent.update.download import Downloader
from edge_agent.update.lifecycle import StepRefused
from edge_agent.update.marks import MetadataRefused
from edge_agent.update.slots import Target, certificate_id
from edge_agent.update.surroundings import Progress
from edge_agent.update.trust import UNKNOWN_TARGET, Trust
from fogline_protocol import certificate, release
from fogline_protocol.documents import DocumentError
from fogline_protocol.release import CERTIFICATES, ROOT, Bundle, BundleDirectory
from fogline_protocol.release_index import ReleaseIndex


class HubReleases:
    """The releases of one hub, as the updater's ``Fetch``."""

    def __init__(
        self,
        trust: Trust,
        downloader: Downloader,
        choose: Callable[[BundleDirectory], Choice],
        near: Collection[Path] = (),
    ) -> None:
        """Join what is needed.

        Args:
            trust: says what the hub has signed.
            downloader: brings the bytes.
            choose: picks the variant, from a bundle whose artifacts are not there yet.
            near: folders with files of other releases, to copy blocks from.
        """
        self._trust = trust
        self._downloader = downloader
        self._choose = choose
        self._near = tuple(near)
        self.last = Transferred()  # what the last fetch cost

    async def fetch(self, target: Target, into: Path, progress: Progress) -> None:
        """See ``Fetch.fetch`` in ``surroundings.py``."""
        index = await self._trust.index(target.index_target)
        found = (index.model, index.release, index.version)
        wanted = (target.model, target.release, target.version)
        if found != wanted:
            raise StepRefused(
                "index/mismatch",
                f"{target.index_target} is signed as {found[0]} {found[2]} (release {found[1]}), the "
                f"hub wants {wanted[0]} {wanted[2]} (release {wanted[1]})",
            )
        certificates = await self.certificates(target.certificate_targets)
        near = LocalBlocks(self._near, index.block_bytes)
        await self._downloader.fetch(index, [ROOT], into, lambda done, total: None, near)
        bundle = _bundle(into, index)
        directory = BundleDirectory(
            into,
            bundle,
            index.bundle_sha256,
            tuple(certificate.parse(data) for data in certificates.values()),
        )
        try:
            variant = self._choose(directory).variant.name
        except ReleaseRefused as error:
            raise StepRefused("download/no-variant", str(error)) from None
        names = bundle.files_for({variant}) | {ROOT}
        self.last = await self._downloader.fetch(index, names, into, progress, near)
        beside = {f"{CERTIFICATES}/{id}.json": data for id, data in certificates.items()}
        work = asyncio.ensure_future(asyncio.to_thread(_finish, into, names, beside))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])  # whoever cancelled may remove the folder next
            raise

    async def certificates(self, targets: Collection[str]) -> Mapping[str, bytes]:
        """See ``Fetch.certificates`` in ``surroundings.py``."""
        return {
            certificate_id(path): await self._trust.certificate_document(path) for path in targets
        }

    async def withdrawn(self, targets: Collection[str]) -> frozenset[str]:
        """See ``Fetch.withdrawn`` in ``surroundings.py``."""
        gone = set()
        for path in targets:
            try:
                await self._trust.certificate_document(path)
            except MetadataRefused as error:
                if error.code != UNKNOWN_TARGET:
                    raise
                gone.add(certificate_id(path))
        return frozenset(gone)


def _bundle(into: Path, index: ReleaseIndex) -> Bundle:
    """Return the root document, after checking that index and root name the same files."""
    try:
        bundle = release.parse((into / ROOT).read_bytes())
    except DocumentError as error:
        raise StepRefused("index/bundle", str(error)) from None
    if (bundle.model, bundle.version) != (index.model, index.version):
        raise StepRefused(
            "index/bundle",
            f"the index of {index.model} {index.version} leads to the bundle of {bundle.model} "
            f"{bundle.version}",
        )
    for name, file in bundle.files.items():
        listed = index.files.get(name)
        if listed is None or (listed.sha256, listed.bytes) != (file.sha256, file.bytes):
            raise StepRefused(
                "index/bundle", f"{name}: the index and the bundle's root document differ"
            )
    return bundle


def _finish(into: Path, names: Collection[str], certificates: dict[str, bytes]) -> None:
    """Leave the files and certificates in ``into`` and nothing else."""
    keep = {*names, *certificates}
    folders = {str(parent) for name in keep for parent in Path(name).parents}
    for top, below, files in os.walk(into):
        here = Path(top)
        for name in list(below):
            path = here / name
            if path.is_symlink():
                path.unlink()
            elif str(path.relative_to(into)) not in folders:
                shutil.rmtree(path)
                below.remove(name)
        for name in files:
            if str((here / name).relative_to(into)) not in keep:
                (here / name).unlink()
    for relative, data in certificates.items():
        path = into / relative
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)  # `Slots.seal` syncs the whole folder
