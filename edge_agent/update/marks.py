"""What a device never forgets about metadata it has verified, and when it may forget after all.

Pure: ``trust.py`` verifies metadata, keeps the document on the disk, and asks here whether what
it sees is older than what it has seen.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from edge_agent.update.lifecycle import StepInterrupted


class MetadataRefused(StepInterrupted):
    """What the hub, or somebody in between, says is not believed: keep what is here, ask again.

    It says nothing about any release, so it does not count against one. Codes:
    ``metadata/expired``, ``/rollback``, ``/unsigned``, ``/mismatch``, ``/malformed``, ``/too-large``,
    ``/unknown-target``, ``/no-root``, and ``index/mismatch`` or ``certificate/mismatch`` for a
    document that is not the one that was signed.
    """


@dataclass(frozen=True, slots=True)
class Mark:
    """The highest version of a role that was verified, and the keys it was verified with."""

    version: int
    keyids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Marks:
    """What a device never forgets about metadata it has verified."""

    roles: Mapping[str, Mark] = field(default_factory=dict)
    listed: Mapping[str, int] = field(default_factory=dict)  # versions in the last snapshot
    floor: float = 0.0  # seconds since 1970 that have certainly passed

    def under(self, role: str, keyids: Sequence[str]) -> "Marks":
        """Return the marks that hold when ``role`` is verified with ``keyids``."""
        mark = self.roles.get(role)
        if mark is None or mark.keyids == tuple(sorted(keyids)):
            return self
        if role == "root":
            return self  # each root is signed by the one before: its versions never start again
        kept = {name: m for name, m in self.roles.items() if name != role}
        return replace(
            self,
            roles=kept,
            listed={} if role == "snapshot" else self.listed,
            floor=0.0 if role == "timestamp" else self.floor,
        )

    def raised(self, role: str, version: int, keyids: Sequence[str]) -> "Marks":
        """Return the marks after ``version`` of ``role`` was verified.

        Raises:
            MetadataRefused: a higher version was verified before.
        """
        mark = self.roles.get(role)
        if mark is not None and version < mark.version:
            raise MetadataRefused(
                "metadata/rollback",
                f"{role} has version {version}, this device has verified version {mark.version} before",
            )
        return replace(self, roles={**self.roles, role: Mark(version, tuple(sorted(keyids)))})

    def with_listed(self, versions: Mapping[str, int]) -> "Marks":
        """Return the marks after a snapshot that lists ``versions`` was verified.

        Raises:
            MetadataRefused: one of them is missing or lower than it was.
        """
        for name, version in self.listed.items():
            if versions.get(name, 0) < version:
                raise MetadataRefused(
                    "metadata/rollback",
                    f"the snapshot lists {name} at version {versions.get(name, 'none')}, this device "
                    f"has seen {version} before",
                )
        return replace(self, listed=dict(versions))

    @classmethod
    def parse(cls, data: bytes) -> "Marks":
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            document = json.loads(data)
            return cls(
                {
                    str(role): Mark(int(mark["version"]), tuple(map(str, mark["keyids"])))
                    for role, mark in document["roles"].items()
                },
                {str(name): int(version) for name, version in document["listed"].items()},
                float(document["floor"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a document of marks: {error!r}") from None

    def to_json(self) -> bytes:
        """Return the document to keep."""
        return json.dumps(
            {
                "roles": {
                    role: {"version": mark.version, "keyids": list(mark.keyids)}
                    for role, mark in self.roles.items()
                },
                "listed": dict(self.listed),
                "floor": self.floor,
            },
            sort_keys=True,
            indent=1,
        ).encode()
