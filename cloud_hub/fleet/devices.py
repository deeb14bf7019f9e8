"""The devices the hub has heard of, and the one rule of presence.

A device is online from its first report on, and offline once it was silent for
``offline_after_s`` or its broker has published its will. Kept in memory, where the console reads it every second, and written
with the counts of the same reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects import sqlite

from cloud_hub.store import schema
from cloud_hub.store.store import Store


@dataclass(frozen=True, slots=True)
class Device:
    """What a device last said of itself."""

    name: str
    first_seen: float  # seconds since the epoch, the hub's clock
    last_seen: float
    agent_version: str
    hardware_class: str
    link: str  # its breaker's state: closed, open, half-open; empty: unknown
    rss_bytes: int


class Devices:
    """Every device seen. Owner of the presence rule; used on one event loop."""

    def __init__(self, known: Sequence[Device], offline_after_s: float) -> None:
        self._known = {device.name: device for device in known}
        self._unsaved: set[str] = set()
        self._left: set[str] = set()  # by their broker's word, until they are seen again
        # Before this start of the hub nobody watched: what was known then counts from there.
        self._since = {device.name: device.last_seen for device in known}
        self._offline_after_s = offline_after_s

    @classmethod
    async def open(cls, store: Store, offline_after_s: float) -> "Devices":
        """Return the devices that the database knows."""

        def load(connection: Connection) -> list[Device]:
            return [Device(**row._mapping) for row in connection.execute(select(schema.device))]

        return cls(await store.read(load), offline_after_s)

    def seen(self, device: Device) -> None:
        """Take over what a device says of itself now; its first sighting is kept."""
        before = self._known.get(device.name)
        if before is not None:
            device = replace(device, first_seen=before.first_seen)
        if before is None or not self.online(before, device.last_seen):
            self._since[device.name] = device.last_seen
        self._known[device.name] = device
        self._unsaved.add(device.name)
        self._left.discard(device.name)

    def left(self, name: str) -> None:
        """Take a device's will over: it is offline until it is seen again."""
        self._left.add(name)

    def forget(self, name: str) -> None:
        """Know nothing of a device any more; seen again, it is a new one."""
        self._known.pop(name, None)
        self._since.pop(name, None)
        self._unsaved.discard(name)
        self._left.discard(name)

    def find(self, name: str) -> Device | None:
        """Return a device by its name, or None if it was never seen."""
        return self._known.get(name)

    def online(self, device: Device, now: float) -> bool:
        """Return whether the device counts as online at ``now``."""
        return device.name not in self._left and now - device.last_seen < self._offline_after_s

    def since(self, device: Device, now: float) -> float:
        """Return since when the device is online, or silent, in seconds since the epoch."""
        return self._since[device.name] if self.online(device, now) else device.last_seen

    def all(self) -> list[Device]:
        """Return every device by name."""
        return [self._known[name] for name in sorted(self._known)]

    def take_unsaved(self) -> list[Device]:
        """Return what changed since the last call, to be saved."""
        changed = [self._known[name] for name in sorted(self._unsaved)]
        self._unsaved.clear()
        return changed

    def not_saved(self, devices: Sequence[Device]) -> None:
        """Take back that these were saved; what they have said since stays as it is."""
        self._unsaved.update(device.name for device in devices)


def remove(connection: Connection, name: str) -> None:
    """Remove a device, of which no counts are left."""
    connection.execute(delete(schema.device).where(schema.device.c.name == name))


def save(connection: Connection, devices: Sequence[Device]) -> None:
    """Write devices as they are."""
    if not devices:
        return
    rows = [{name: getattr(device, name) for name in Device.__slots__} for device in devices]
    dialect: Any = sqlite
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql  # large, and most hubs have no use for it

        dialect = postgresql
    insert = dialect.insert(schema.device)
    updated = {name: insert.excluded[name] for name in Device.__slots__ if name != "name"}
    connection.execute(insert.on_conflict_do_update(index_elements=["name"], set_=updated), rows)
