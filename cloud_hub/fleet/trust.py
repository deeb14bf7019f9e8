"""Signs what devices may trust: the TUF repository of this hub.

    root ──┬─ targets ──┬─ certificates             certificates/<model>/<release>/<id>.json
           │            └─ releases-0 … releases-f   <model>/<release>/index.json, by hash of the path
           ├─ snapshot      which version of each of them is current
           └─ timestamp     which snapshot is current, and when that was said

Six keys: root, targets, snapshot, timestamp, releases (all sixteen bins) and certificates. A
stolen certificate key can therefore not publish a release, and the top-level targets role only
delegates. Sixteen bins are one hexadecimal digit of the path's hash, which the specification's
``path_hash_prefixes`` says without an extension: 10,000 releases make 150 KB for a device to
fetch when one is added, while the snapshot that every publication makes it fetch stays at
3 KB. (64 bins would quarter the first and triple the second.) The number is in the
signed targets metadata, so devices never need to know it.

**In this demo all keys lie on the hub**, also the one of root, which says so in its own signed
metadata. ``root.pem`` and ``targets.pem`` may be moved away: the hub then goes on until those
two roles expire, and ``refresh`` names what it could not renew.

What is always true on the disk, whenever the power goes:

* ``timestamp.json`` names a complete repository. Everything it leads to was written and synced
  before it, under names that carry a version, so nothing that is in use is ever overwritten.
* A version that no timestamp leads to was never published; the next publication reuses it.
* A new root is accepted by whoever has the old one *and* fits the metadata that is already
  published, because the roles it changes keys of were signed by both keys before.

A hub restored from a backup publishes versions that devices have already seen and refuses to
go back to. ``rotate`` of the keys concerned is the cure: devices then forget those versions.
"""

import asyncio
import datetime
import hashlib
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import structlog
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from cloud_hub.errors import StartRefused
from cloud_hub.fleet.artifacts import Disk, replace_file
from cloud_hub.fleet.keys import KeyMissing as KeyMissing  # whoever publishes has to expect it
from cloud_hub.fleet.keys import Keys

log = structlog.get_logger(__name__)

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
RELEASES, CERTIFICATES = "releases", "certificates"
OWNERS = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP, RELEASES, CERTIFICATES)  # of a key each

BINS: Mapping[str, str] = {f"{RELEASES}-{digit}": digit for digit in "0123456789abcdef"}
DELEGATED = (CERTIFICATES, *BINS)

_DAY_S = 86_400.0
# The timestamp's life is the longest silent freeze of a device; the others follow the reference.
LIFE_S: Mapping[str, float] = {
    ROOT: 365 * _DAY_S,
    TARGETS: 90 * _DAY_S,
    RELEASES: 30 * _DAY_S,
    CERTIFICATES: 30 * _DAY_S,
    SNAPSHOT: 7 * _DAY_S,
    TIMESTAMP: 1 * _DAY_S,
}
KEEP_OLD_S = 1 * _DAY_S  # a device in the middle of a refresh still asks for the last version
REFRESH_EVERY_S = 600.0
ISSUED = "issued"  # our field in the signed timestamp: the hub's time when it was made

DEMO_WARNING = "DEMO ROOT: its only key lies on the hub. Do not trust it in production."

_VERSIONED = re.compile(r"([0-9]+)\.([a-z0-9-]+)\.json")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class _Published:
    """The repository that ``timestamp.json`` names."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Mapping[str, Metadata[Targets]]  # by role, the top-level one included

    @property
    def issued(self) -> float:
        """Seconds since 1970 of the last timestamp."""
        return _seconds(self.timestamp.signed.unrecognized_fields[ISSUED])


class Repository:
    """The signed repository below ``DATA/tuf``, its keys below ``DATA/keys``.

    One object owns both. Every method is synchronous and short (milliseconds, one fsync per
    file written), takes the time as a number and may be called from any thread.
    """

    def __init__(self, data: Path, *, now: float, disk: Disk | None = None) -> None:
        """Open the repository, or create it where there is none yet.

        Raises:
            StartRefused: keys or metadata do not fit each other, are damaged, or may be read
                by others.
        """
        self._disk = disk or Disk()
        self._lock = threading.RLock()
        self.directory = data / "tuf"
        self._metadata = self.directory / "metadata"
        self._targets = self.directory / "targets"
        for directory in (self._metadata, self._targets):
            directory.mkdir(parents=True, exist_ok=True)
        self._keys = Keys(data / "keys", OWNERS, self._disk)
        self._state: _Published | None = None  # as on the disk; None after a failed write
        with self._lock:
            self._create_or_load(now)

    def publish(
        self, add: Mapping[str, bytes], remove: Collection[str] = (), *, now: float
    ) -> bool:
        """Make the targets ``add`` (path -> content) available and take ``remove`` away.

        All of it becomes visible at one moment, or none of it. Doing it again changes nothing.

        Returns:
            Whether anything had to be published.

        Raises:
            KeyMissing: the key of a role concerned is not here.
            OSError: the disk fails or is full; what was published before is still published.
        """
        with self._lock:
            published = self._load()
            changed: dict[str, dict[str, TargetFile]] = {}
            for path, data in add.items():
                role = role_of(path)
                file = TargetFile.from_data(path, data)
                if published.targets[role].signed.targets.get(path) != file:
                    self._write_target(file, data)
                    self._edit(changed, role)[path] = file
            for path in remove:
                role = role_of(path)
                if path in self._edit(changed, role):
                    del changed[role][path]
            changed = {
                role: targets
                for role, targets in changed.items()
                if targets != published.targets[role].signed.targets
            }
            if changed:
                self._commit(now, targets=changed)
            return bool(changed)

    def targets(self) -> Mapping[str, TargetFile]:
        """Return every published target by its path."""
        with self._lock:
            published = self._load()
            return {
                path: file
                for role in DELEGATED
                for path, file in published.targets[role].signed.targets.items()
            }

    def anchor(self) -> bytes:
        """Return the current root metadata: what a device is given at enrollment."""
        with self._lock:
            version = self._load().root.signed.version
            return (self._metadata / f"{version}.root.json").read_bytes()

    def due(self, now: float) -> tuple[str, ...]:
        """Return the roles of whose life more than half is over."""
        with self._lock:
            published = self._load()
        now = max(now, published.issued)
        expiries = {
            ROOT: published.root.signed.expires,
            SNAPSHOT: published.snapshot.signed.expires,
            TIMESTAMP: published.timestamp.signed.expires,
            **{role: metadata.signed.expires for role, metadata in published.targets.items()},
        }
        return tuple(
            role
            for role, expires in expiries.items()
            if expires.timestamp() - now < _life(role) / 2
        )

    def refresh(self, now: float) -> tuple[str, ...]:
        """Sign again what is due, and remove what nobody can ask for any more.

        Returns:
            The roles that are due and whose key is not on this hub.

        Raises:
            KeyMissing: snapshot or timestamp cannot be signed.
            OSError: the disk fails or is full; what was published before is still published.
        """
        with self._lock:
            published = self._load()
            due = self.due(now)
            away = tuple(
                role
                for role in due
                if role in (ROOT, *published.targets) and not self._can_sign(role)
            )
            if ROOT in due and ROOT not in away:
                self._write_root(now, published.root.signed.keys, published.root.signed.roles)
            again = {
                role: dict(published.targets[role].signed.targets)
                for role in due
                if role in published.targets and role not in away
            }
            if again or SNAPSHOT in due:
                self._commit(now, targets=again)
            elif TIMESTAMP in due:
                self._commit(now, targets={}, snapshot=False)
            self._prune(now)
            return away

    def rotate(self, owner: str, *, now: float) -> None:
        """Replace the key of ``owner`` by a new one. An interrupted rotation is done again.

        Raises:
            KeyMissing: the key that must approve it (root, or targets for the two delegated
                ones) is not here.
        """
        with self._lock:
            published = self._load()
            incoming = self._keys.incoming(owner)
            key = incoming.public_key
            if owner in (RELEASES, CERTIFICATES):
                roles = [role for role in DELEGATED if _owner(role) == owner]
                again = {TARGETS: {}, **{r: published.targets[r].signed.targets for r in roles}}
                self._commit(now, targets=again, delegations=self._delegations({owner: key}))
            else:
                # First everything that exists is signed by both keys, then root names the new one:
                # between the two, and ever after, either root leads to valid metadata.
                if owner == TARGETS:
                    self._commit(now, targets={TARGETS: {}}, also=(owner, incoming))
                elif owner in (SNAPSHOT, TIMESTAMP):
                    self._commit(
                        now, targets={}, snapshot=owner == SNAPSHOT, also=(owner, incoming)
                    )
                root = self._load().root.signed
                roles_of_root = dict(root.roles)
                roles_of_root[owner] = Role([key.keyid], 1)
                used = {keyid for role in roles_of_root.values() for keyid in role.keyids}
                keys = {k: v for k, v in {**root.keys, key.keyid: key}.items() if k in used}
                also = [incoming] if owner == ROOT else []
                self._write_root(now, keys, roles_of_root, also=also)
            self._keys.promote(owner)
            log.info("key replaced", role=owner, keyid=key.keyid)

    def _create_or_load(self, now: float) -> None:
        if not list(self._metadata.glob("*.root.json")):
            if (self._metadata / "timestamp.json").exists():
                raise StartRefused(
                    f"{self._metadata}: there is metadata but no root; restore the directory from a "
                    "backup, or remove it and enroll every device again"
                )
            self._keys.create_missing()
            keys = {owner: self._keys.current[owner].public_key for owner in OWNERS}
            top = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)
            self._write_root(
                now,
                {keys[role].keyid: keys[role] for role in top},
                {role: Role([keys[role].keyid], 1) for role in top},
            )
            log.warning("root created", sentence=DEMO_WARNING, keys=str(self._keys.directory))
        if not (self._metadata / "timestamp.json").exists():
            # The very first publication, or one that the power cut interrupted.
            self._commit(
                now,
                targets={role: {} for role in (TARGETS, *DELEGATED)},
                delegations=self._delegations(),
            )
        published = self._load()
        trusted = {owner: _keyids(published, owner) for owner in OWNERS}
        self._keys.settle(trusted)
        for owner in (SNAPSHOT, TIMESTAMP, RELEASES, CERTIFICATES):
            signer = self._keys.current.get(owner)
            if signer is None or signer.public_key.keyid not in trusted[owner]:
                raise StartRefused(
                    f"{self._keys.directory / owner}.pem is not the key that the published metadata "
                    f"names for {owner}; restore it from a backup of the data directory"
                )

    def _edit(self, changed: dict[str, dict[str, TargetFile]], role: str) -> dict[str, TargetFile]:
        if role not in changed:
            changed[role] = dict(self._load().targets[role].signed.targets)
        return changed[role]

    def _commit(
        self,
        now: float,
        *,
        targets: Mapping[str, Mapping[str, TargetFile]],
        delegations: Delegations | None = None,
        snapshot: bool = True,
        also: tuple[str, CryptoSigner] | None = None,
    ) -> None:
        """Write new versions of the roles ``targets``, then snapshot, then timestamp.

        ``also``: a role whose new version is signed by one more key.
        """
        published = self._load() if (self._metadata / "timestamp.json").exists() else None
        # A clock that was set back must not sign what devices with a better memory would take
        # for expired, so time never runs backwards here.
        now = max(now, published.issued) if published else now
        root = published.root if published else self._newest_root()
        top = published.targets[TARGETS].signed if published else None
        delegations = delegations or (top.delegations if top else None)
        assert delegations is not None
        self._state = None
        meta = dict(published.snapshot.signed.meta) if published else {}
        for role, files in targets.items():
            signed = Targets(
                version=published.targets[role].signed.version + 1 if published else 1,
                expires=_expiry(role, now),
                targets=dict(files),
                delegations=delegations if role == TARGETS else None,
            )
            trusted = (
                root.signed.roles[TARGETS].keyids
                if role == TARGETS
                else cast("dict[str, DelegatedRole]", delegations.roles)[role].keyids
            )
            meta[f"{role}.json"] = self._write(role, Metadata(signed), trusted, also)
        if snapshot:
            entries = Snapshot(
                version=published.snapshot.signed.version + 1 if published else 1,
                expires=_expiry(SNAPSHOT, now),
                meta=meta,
            )
            trusted = root.signed.roles[SNAPSHOT].keyids
            snapshot_meta = self._write(SNAPSHOT, Metadata(entries), trusted, also)
        else:
            assert published is not None
            snapshot_meta = published.timestamp.signed.snapshot_meta
        self._disk.sync(self._metadata)
        timestamp = Timestamp(
            version=published.timestamp.signed.version + 1 if published else 1,
            expires=_expiry(TIMESTAMP, now),
            snapshot_meta=snapshot_meta,
            unrecognized_fields={ISSUED: _datetime(now).strftime(_TIME)},
        )
        trusted = root.signed.roles[TIMESTAMP].keyids
        data = self._signed(TIMESTAMP, Metadata(timestamp), trusted, also)
        replace_file(self._disk, self._metadata / "timestamp.json", data)
        self._disk.sync(self._metadata)

    def _write(
        self,
        role: str,
        metadata: Metadata[Targets] | Metadata[Snapshot],
        trusted: Iterable[str],
        also: tuple[str, CryptoSigner] | None,
    ) -> MetaFile:
        version = metadata.signed.version
        data = self._signed(role, metadata, trusted, also)
        replace_file(self._disk, self._metadata / f"{version}.{role}.json", data)
        return MetaFile.from_data(version, data, ["sha256"])

    def _signed(
        self,
        role: str,
        metadata: Metadata[Targets] | Metadata[Snapshot] | Metadata[Timestamp] | Metadata[Root],
        trusted: Iterable[str],
        also: tuple[str, CryptoSigner] | None = None,
    ) -> bytes:
        signers = self._keys.signers(_owner(role), trusted)
        if also is not None and also[0] == role:
            signers = [*signers, also[1]]
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def _write_root(
        self,
        now: float,
        keys: Mapping[str, Key],
        roles: Mapping[str, Role],
        also: Iterable[CryptoSigner] = (),
    ) -> None:
        newest = self._newest_root() if list(self._metadata.glob("*.root.json")) else None
        now = max(now, self._load().issued) if newest else now
        root = Metadata(
            Root(
                version=newest.signed.version + 1 if newest else 1,
                expires=_expiry(ROOT, now),
                keys=dict(keys),
                roles=dict(roles),
                unrecognized_fields={"warning": DEMO_WARNING},
            )
        )
        trusted = (newest.signed if newest else root.signed).roles[ROOT].keyids
        for signer in (*self._keys.signers(ROOT, trusted), *also):
            root.sign(signer, append=True)
        self._state = None
        replace_file(
            self._disk, self._metadata / f"{root.signed.version}.root.json", root.to_bytes()
        )
        self._disk.sync(self._metadata)

    def _write_target(self, file: TargetFile, data: bytes) -> None:
        """Write a target under its digest; the name is new, so nobody reads it yet."""
        path = self._targets / file.get_prefixed_paths()[0]
        missing = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._disk, path, data)
        for directory in (path.parent, *(created.parent for created in missing)):
            self._disk.sync(directory)

    def _load(self) -> _Published:
        if self._state is None:
            try:
                self._state = self._read()
            except (RepositoryError, OSError, KeyError, ValueError) as error:
                raise StartRefused(
                    f"{self._metadata} is damaged ({error}); restore the data directory from a backup"
                ) from error
        return self._state

    def _read(self) -> _Published:
        timestamp = Metadata[Timestamp].from_bytes((self._metadata / "timestamp.json").read_bytes())
        expected = timestamp.signed.snapshot_meta
        data = (self._metadata / f"{expected.version}.snapshot.json").read_bytes()
        expected.verify_length_and_hashes(data)
        snapshot = Metadata[Snapshot].from_bytes(data)
        targets = {}
        for name, expected in snapshot.signed.meta.items():
            data = (self._metadata / f"{expected.version}.{name}").read_bytes()
            expected.verify_length_and_hashes(data)
            targets[name.removesuffix(".json")] = Metadata[Targets].from_bytes(data)
        return _Published(self._newest_root(), timestamp, snapshot, targets)

    def _newest_root(self) -> Metadata[Root]:
        newest = max(
            self._metadata.glob("*.root.json"), key=lambda path: int(path.name.split(".")[0])
        )
        return Metadata[Root].from_bytes(newest.read_bytes())

    def _can_sign(self, role: str) -> bool:
        owner = _owner(role)
        signer = self._keys.current.get(owner)
        return signer is not None and signer.public_key.keyid in _keyids(self._load(), owner)

    def _delegations(self, replaced: Mapping[str, Key] | None = None) -> Delegations:
        if (self._metadata / "timestamp.json").exists():
            top = self._load().targets[TARGETS].signed.delegations
            assert top is not None
            assert top.roles is not None
            keys = {o: top.keys[_keyids(self._load(), o)[0]] for o in (RELEASES, CERTIFICATES)}
        else:
            keys = {o: self._keys.current[o].public_key for o in (RELEASES, CERTIFICATES)}
        keys |= replaced or {}
        certificates = DelegatedRole(
            CERTIFICATES,
            [keys[CERTIFICATES].keyid],
            1,
            terminating=True,  # so no bin can say anything about a certificate's path
            paths=[f"{CERTIFICATES}/*/*/*"],
        )
        bins = [
            DelegatedRole(name, [keys[RELEASES].keyid], 1, True, path_hash_prefixes=[prefix])
            for name, prefix in BINS.items()
        ]
        return Delegations(
            {key.keyid: key for key in keys.values()},
            {role.name: role for role in (certificates, *bins)},
        )

    def _prune(self, now: float) -> None:
        """Remove versions and targets that were replaced long ago. Roots are kept for ever."""
        published = self._load()
        kept = {f"{meta.version}.{name}" for name, meta in published.snapshot.signed.meta.items()}
        kept.add(f"{published.snapshot.signed.version}.snapshot.json")
        for path in self._metadata.glob("*.json"):
            match = _VERSIONED.fullmatch(path.name)
            if match is not None and match[2] != ROOT and path.name not in kept:
                _remove_if_old(path, now)
        wanted = {self._targets / file.get_prefixed_paths()[0] for file in self.targets().values()}
        for path in self._targets.rglob("*.json"):
            if path not in wanted:
                _remove_if_old(path, now)


async def keep_fresh(
    repository: Repository,
    *,
    clock: Callable[[], float] = time.time,
    every_s: float = REFRESH_EVERY_S,
) -> None:
    """Sign again what is due, until cancelled. Trouble is told and tried again next time."""
    while True:
        try:
            away = await asyncio.to_thread(repository.refresh, clock())
            if away:
                log.warning("signatures are due and their key is not on this hub", roles=away)
        except (KeyMissing, OSError) as error:
            # What is published stays valid for at least half its life, so there is time to act.
            log.error("signatures could not be renewed", why=str(error))
        await asyncio.sleep(every_s)


def role_of(path: str) -> str:
    """Return the delegated role that answers for a target path."""
    if path.startswith(f"{CERTIFICATES}/") and path.count("/") == 3:
        return CERTIFICATES
    return f"{RELEASES}-{hashlib.sha256(path.encode()).hexdigest()[0]}"


def _owner(role: str) -> str:
    return RELEASES if role in BINS else role


def _life(role: str) -> float:
    return LIFE_S[_owner(role)]


def _keyids(published: _Published, owner: str) -> list[str]:
    if owner in published.root.signed.roles:
        return published.root.signed.roles[owner].keyids
    delegations = published.targets[TARGETS].signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    role = CERTIFICATES if owner == CERTIFICATES else next(iter(BINS))
    return delegations.roles[role].keyids


def _remove_if_old(path: Path, now: float) -> None:
    if path.stat().st_mtime < now - KEEP_OLD_S:
        path.unlink()


def _datetime(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def _expiry(role: str, now: float) -> datetime.datetime:
    return _datetime(now + _life(role))


def _seconds(text: str) -> float:
    return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC).timestamp()
