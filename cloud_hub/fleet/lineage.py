"""Which release came from which, and what a device saves that goes from one to the other. Pure.

A bundle names the bundle that it was made to replace, by digest. A hub need not have that one:
releases are pruned by nobody, but a fleet may begin with the second version of a model. So an
unknown parent is allowed and said; once it is pushed, the two find each other. A known one must
be what it is said to be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cloud_hub.fleet.releases import Release
from fogline_protocol.release import ROOT, Bundle, Parent
from fogline_protocol.release_index import ReleaseIndex


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a release comes from and what came from it."""

    named: Parent | None  # what its bundle says
    parent: Release | None  # None: it names none, or this hub does not have it
    children: tuple[Release, ...]  # the oldest first

    @property
    def unknown(self) -> bool:
        """Whether it names a parent that this hub does not have."""
        return self.named is not None and self.parent is None


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a device fetches for one variant."""

    bytes: int  # if it runs the variant of the same name of the parent
    whole: int  # if it has nothing


def trace(found: Release, known: Sequence[Release]) -> Lineage:
    """Return the lineage of ``found`` among the releases of its model."""
    named = found.bundle.parent
    parent = None
    if named is not None:
        parent = next((r for r in known if r.bundle_sha256 == named.bundle_sha256), None)
    children = [
        r for r in known if r.bundle.parent and r.bundle.parent.bundle_sha256 == found.bundle_sha256
    ]
    return Lineage(named, parent, tuple(sorted(children, key=lambda r: r.number)))


def fetches(
    before: Bundle, before_index: ReleaseIndex, after: Bundle, after_index: ReleaseIndex
) -> Mapping[str, Fetch]:
    """Return what a device fetches to go from ``before`` to ``after``, by variant of ``after``.

    A block that is anywhere in what the device has is copied, not fetched.
    """
    names = {variant.name for variant in before.variants}
    found = {}
    for variant in after.variants:
        own = before.files_for([variant.name] if variant.name in names else [])
        have = _blocks(before_index, own)
        want = _blocks(after_index, after.files_for([variant.name]))
        found[variant.name] = Fetch(
            bytes=sum(size for digest, size in want.items() if digest not in have),
            whole=sum(want.values()),
        )
    return found


def _blocks(index: ReleaseIndex, names: frozenset[str]) -> Mapping[str, int]:
    """Return the size of every block of these files and the root, by digest."""
    found = {}
    for name in (ROOT, *names):
        file = index.files[name]
        for place, digest in enumerate(file.blocks):
            found[digest] = min(index.block_bytes, file.bytes - place * index.block_bytes)
    return found
