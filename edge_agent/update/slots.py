"""What the updater has on the disk, in an order of writes that survives a cut anywhere.

    device.json                    desired state accepted, sequence numbers reserved, starts
    models/<model>/pointer.json    the one truth about a model: committed, before, candidate, state
    models/<model>/withdrawn.json  certificates known to be withdrawn that no wish speaks of
    models/<model>/<slot>.part/    where a release is fetched; nothing in it is trusted
    models/<model>/<slot>/         a release, complete and synced: the name is the promise
    models/<model>/<slot>.linked/  a slot of the same files under other certificates, being made
    models/<model>/<slot>.gone/    being deleted
    files/<sha256>                 hard links to the files of the slots, for the next download

A slot is named after the release number and a digest of where release and certificates come
from, so it never changes once it has its name. The order, each line durable before the next:

    1. fsync every file and folder of <slot>.part
    2. rename <slot>.part to <slot>; fsync the model's folder         (``seal``)
    3. write pointer.json.tmp; fsync; rename; fsync the folder        (``put``: state trial)
    4. the same                                                       (``put``: committed)
    (``renew`` is 1 and 2 with the files of another slot, linked into <slot>.linked.)
    5. rename what no pointer names to <slot>.gone; fsync the folder; delete    (``collect``)

Always true, after any crash: the pointer can be read, the release it makes active is complete,
and while a candidate serves, the committed release is complete too. The tests enumerate every
state a crash can leave. All operations go through ``Disk``, so that they can.

One thread owns a ``Slots``, but any may ask it for a sequence number; two processes on one
folder are a mistake of whoever started them.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_agent.update.disk import Disk, DiskFault, DiskFull, Entry, folder_of, named
from edge_agent.update.lifecycle import SERVING_CANDIDATE, Life, State
from fogline_protocol.release import CERTIFICATES

SEQUENCE_BLOCK = 1000  # sequence numbers reserved by one write; a start skips what is left of them
DEVICE = "device.json"
POINTER = "pointer.json"
WITHDRAWN = "withdrawn.json"
MODELS = "models"
FILES = "files"

_SLOT = re.compile(r"[0-9]+-[0-9a-f]{12}")


class StateDamaged(Exception):
    """A state file does not hold what was written: start from what the disk still offers."""

    code = "disk/damaged"


@dataclass(frozen=True, slots=True)
class Target:
    """One release of one model as the hub names it, with the certificates that go with it."""

    model: str
    release: int  # the hub's number
    version: str  # semantic version, a label
    index_target: str  # TUF target path of the release's index
    certificate_targets: tuple[str, ...] = ()

    @property
    def slot(self) -> str:
        """Name of the slot. New certificates for an old release make a new slot."""
        source = "\n".join((self.index_target, *sorted(self.certificate_targets)))
        return f"{self.release}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    @property
    def certificate_ids(self) -> frozenset[str]:
        """The ids of the certificates: the names of their targets."""
        return frozenset(certificate_id(path) for path in self.certificate_targets)

    def is_of_the_release_of(self, other: "Target") -> bool:
        """Return whether the two differ in their certificates at most."""
        return replace(self, certificate_targets=()) == replace(other, certificate_targets=())


@dataclass(frozen=True, slots=True)
class Desired:
    """What the hub wants of this device, under a generation that every change raises."""

    generation: int
    hub_epoch: str = ""
    targets: tuple[Target, ...] = ()  # one per model

    def target(self, model: str) -> Target | None:
        """Return what is wanted of ``model``, or None if nothing is."""
        return next((t for t in self.targets if t.model == model), None)


@dataclass(frozen=True, slots=True)
class Pointer:
    """Everything durable about one model."""

    model: str
    life: Life = field(default_factory=Life)
    generation: int = 0  # the one whose wish for this model was taken up
    committed: Target | None = None  # known to be good
    before: Target | None = None  # committed before that, kept for the hub to return to
    candidate: Target | None = None
    code: str = ""  # why the candidate is not committed; empty while nothing is wrong
    sentence: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)  # of the last self-test

    @property
    def active(self) -> Target | None:
        """The release that serves."""
        return self.candidate if self.life.state in SERVING_CANDIDATE else self.committed

    @property
    def previous(self) -> Target | None:
        """The release that a rollback returns to; None: what the device had before the hub."""
        return self.committed if self.life.state in SERVING_CANDIDATE else self.before

    def names(self) -> frozenset[str]:
        """Return the slots that must be kept."""
        return frozenset(t.slot for t in (self.committed, self.before, self.candidate) if t)


class Slots:
    """The state of the updater on one disk. See the top of this file."""

    def __init__(self, disk: Disk, first_sequence: int = 0) -> None:
        """Make ``open`` start sequence numbers at ``first_sequence`` or after those used.

        Give a number that grows with the clock: a device whose disk was replaced must not
        start below what the hub has already seen of it.
        """
        self._disk = disk
        self._device = threading.Lock()  # device.json and the four fields that are in it
        self._next_sequence = first_sequence
        self._reserved = 0  # sequence numbers below this one are durable
        self._boot = 0
        self._desired = Desired(0)
        self._pointers: dict[str, Pointer] = {}  # always what the disk says
        self._withdrawn: dict[
            str, frozenset[str]
        ] = {}  # by model: what the disk says, as far as it took it
        self.damaged: dict[str, str] = {}  # state files that could not be read, and why

    @property
    def boot(self) -> int:
        """How often ``open`` was called on this disk."""
        return self._boot

    @property
    def desired(self) -> Desired:
        """The last desired state accepted; generation 0 before the first."""
        return self._desired

    @property
    def pointers(self) -> Mapping[str, Pointer]:
        """Everything known, by model."""
        return dict(self._pointers)

    def pointer(self, model: str) -> Pointer:
        """Return what is known of ``model``."""
        return self._pointers.get(model, Pointer(model))

    def withdrawn(self, model: str) -> frozenset[str]:
        """Return the ids of certificates that ``withdraw`` was told of last."""
        return self._withdrawn.get(model, frozenset())

    def open(self) -> None:
        """Read what the disk holds, and count a start. A disk that takes no writes does not stop it.

        Raises:
            DiskFault: the disk cannot be read.
        """
        with named():
            self._folder(MODELS)
            self._folder(FILES)
            # A killed process may have left names that only the page cache knows. What is
            # read below will be built on, so it must be as durable as if it was written now.
            for entry in self._disk.entries(MODELS):
                self._disk.sync(f"{MODELS}/{entry.name}")
            self._disk.sync(MODELS)
            self._disk.sync("")
            for entry in self._disk.entries(MODELS):
                self._load(entry.name)
        try:
            device = self._read(DEVICE)
        except StateDamaged as error:
            self.damaged[DEVICE] = str(error)
            device = None
        if device is not None:
            self._reserved = device["sequence"]
            self._boot = device["boot"]
            self._desired = Desired(
                device["generation"],
                device["hub_epoch"],
                tuple(_target(t) for t in device["targets"]),
            )
        self._next_sequence = max(self._next_sequence, self._reserved)
        self._boot += 1
        with contextlib.suppress(DiskFull, DiskFault):
            self._reserve()

    def accept(self, desired: Desired) -> None:
        """Remember what the hub wants; one write for all models.

        Raises:
            DiskFull: it is not remembered.
            DiskFault: it may not be remembered.
        """
        with self._device:
            self._write_device(desired, self._reserved)
            self._desired = desired

    def next_sequence(self) -> int:
        """Return a number larger than any that was returned before, on this disk, ever."""
        with self._device:
            if self._next_sequence >= self._reserved:
                # A disk that takes no writes must not silence the device. The numbers go on, and
                # the next start begins at `first_sequence`, which the clock has carried past them.
                with contextlib.suppress(DiskFull, DiskFault):
                    self._reserve()
            self._next_sequence += 1
            return self._next_sequence - 1

    def put(self, pointer: Pointer) -> None:
        """Make ``pointer`` the truth about its model.

        Raises:
            DiskFull: the old pointer stands.
            DiskFault: one of the two stands.
        """
        with named():
            self._folder(f"{MODELS}/{pointer.model}")
        self._replace(f"{MODELS}/{pointer.model}/{POINTER}", _pointer_document(pointer))
        self._pointers[pointer.model] = pointer

    def withdraw(self, model: str, ids: frozenset[str]) -> None:
        """Remember which certificates of ``model`` the hub signs no more, instead of earlier ones.

        Raises:
            DiskFull: it is not remembered.
            DiskFault: it may not be remembered.
        """
        document = {"schema": 1, "ids": sorted(ids)}
        self._replace(f"{MODELS}/{model}/{WITHDRAWN}", document)
        self._withdrawn[model] = ids

    def folder(self, target: Target) -> str:
        """Return the folder that is the slot of ``target`` once it is sealed."""
        return f"{MODELS}/{target.model}/{target.slot}"

    def is_sealed(self, target: Target) -> bool:
        """Tell whether the slot of ``target`` is there, complete.

        Raises:
            DiskFault: the disk failed.
        """
        return target.slot in self._names(f"{MODELS}/{target.model}")

    def stage(self, target: Target) -> str:
        """Return the folder to fetch ``target`` into, with what earlier attempts left in it.

        Also with what they left for the same release under other certificates: nothing in it is
        trusted.

        Raises:
            DiskFull: there is no room for a folder.
            DiskFault: the disk failed.
        """
        part = f"{self.folder(target)}.part"
        with named():
            home = f"{MODELS}/{target.model}"
            self._folder(home)
            names = self._names(home)
            if f"{target.slot}.part" not in names:
                left = re.compile(rf"{target.release}-[0-9a-f]{{12}}\.part")
                found = next((name for name in sorted(names) if left.fullmatch(name)), None)
                if found is None:
                    self._disk.make_folder(part)
                else:
                    self._disk.rename(f"{home}/{found}", part)
        return part

    def seal(self, target: Target, digests: Mapping[str, str]) -> None:
        """Make what was fetched and verified durable and give it the name of a slot.

        Args:
            target: whose ``stage`` folder was filled and verified.
            digests: SHA-256 by path of the files a later download may copy.

        Raises:
            DiskFull: there is no room; the slot does not exist.
            DiskFault: the disk failed; the slot does not exist, or is complete.
        """
        home = f"{MODELS}/{target.model}"
        slot = self.folder(target)
        with named():
            if target.slot not in self._names(home):
                self._sync_tree(f"{slot}.part")
                self._disk.rename(f"{slot}.part", slot)
            self._disk.sync(home)
            known = self._names(FILES)
            for name, sha256 in digests.items():
                if sha256 not in known:
                    # Not synced: an index that a crash may forget costs a download.
                    self._disk.link(f"{slot}/{name}", f"{FILES}/{sha256}")

    def renew(self, old: Target, new: Target, certificates: Mapping[str, bytes]) -> None:
        """Make the slot of ``new``: the files of ``old``, which is sealed, under other certificates.

        Files are linked, so it costs neither room nor time. A certificate that ``new`` names is one
        of ``certificates`` (id -> document), or ``old`` has it.

        Raises:
            DiskFull: there is no room; the slot does not exist.
            DiskFault: the disk failed; the slot does not exist, or is complete.
        """
        home = f"{MODELS}/{new.model}"
        source, slot = self.folder(old), self.folder(new)
        with named():
            names = self._names(home)
            if new.slot not in names:
                made = f"{slot}.linked"
                if f"{new.slot}.linked" in names:
                    self._remove(made)
                self._disk.make_folder(made)
                for entry in self._disk.entries(source):
                    if entry.name != CERTIFICATES:
                        self._link(f"{source}/{entry.name}", f"{made}/{entry.name}", entry)
                if new.certificate_targets:
                    self._disk.make_folder(f"{made}/{CERTIFICATES}")
                for id in new.certificate_ids:
                    path = f"{CERTIFICATES}/{id}.json"
                    if id in certificates:
                        self._disk.write(f"{made}/{path}", certificates[id])
                    else:
                        self._disk.link(f"{source}/{path}", f"{made}/{path}")
                self._sync_tree(made)
                self._disk.rename(made, slot)
            self._disk.sync(home)

    def discard(self, target: Target) -> None:
        """Delete what was fetched of ``target``, unless a rollback or the service needs it.

        Raises:
            DiskFault: the disk failed; ``collect`` tries again.
        """
        pointer = self.pointer(target.model)
        needed = {t.slot for t in (pointer.committed, pointer.active) if t is not None}
        self._delete(target.model, lambda slot, _: slot == target.slot and slot not in needed)

    def collect(self, model: str) -> None:
        """Delete everything of ``model`` that its pointer does not name. Always the last step.

        Without a pointer nothing goes: a damaged one does not say what is needed, and a complete
        slot spares the device a download.

        Raises:
            DiskFault: the disk failed; the next call tries again.
        """
        pointer = self._pointers.get(model)
        if pointer is None:
            return
        staged = {pointer.candidate.slot} if pointer.candidate is not None else set()
        self._delete(model, lambda slot, part: slot not in (staged if part else pointer.names()))

    def _delete(self, model: str, doomed: Callable[[str, bool], bool]) -> None:
        # `doomed` is asked with the name of a slot and whether it is only staged.
        home = f"{MODELS}/{model}"
        with named():
            names = self._names(home)
            slots = [n for n in names if _SLOT.fullmatch(n) and doomed(n, False)]
            for name in slots:
                if f"{name}.gone" in names:
                    self._remove(f"{home}/{name}.gone")
                self._disk.rename(f"{home}/{name}", f"{home}/{name}.gone")
            if slots:
                # Before the first file goes: a folder that has lost one must not have the name
                # of a slot any more.
                self._disk.sync(home)
            for name in self._names(home):
                stem, _, kind = name.partition(".")
                if kind in ("gone", "linked") or (kind == "part" and doomed(stem, True)):
                    self._remove(f"{home}/{name}")
            for entry in self._disk.entries(FILES):
                if entry.links == 1:
                    self._disk.unlink(f"{FILES}/{entry.name}")

    def _load(self, model: str) -> None:
        path = f"{MODELS}/{model}/{POINTER}"
        try:
            document = self._read(path)
            if document is not None:
                self._pointers[model] = _pointer(model, document)
        except StateDamaged as error:
            self.damaged[path] = str(error)
        path = f"{MODELS}/{model}/{WITHDRAWN}"
        try:
            document = self._read(path)
            if document is not None:
                self._withdrawn[model] = frozenset(document["ids"])
        except StateDamaged as error:
            self.damaged[path] = str(error)

    def _reserve(self) -> None:
        upto = self._next_sequence + SEQUENCE_BLOCK
        self._write_device(self._desired, upto)
        self._reserved = upto

    def _write_device(self, desired: Desired, sequence: int) -> None:
        self._replace(
            DEVICE,
            {
                "schema": 1,
                "sequence": sequence,
                "boot": self._boot,
                "generation": desired.generation,
                "hub_epoch": desired.hub_epoch,
                "targets": [_target_document(t) for t in desired.targets],
            },
        )

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            data = self._disk.read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateDamaged(f"{path}: {error.strerror or error}") from None
        return _unseal(path, data)

    def _replace(self, path: str, document: Mapping[str, Any]) -> None:
        temporary = f"{path}.tmp"
        with named():
            try:
                self._disk.write(temporary, _seal(document))
                self._disk.sync(temporary)
                self._disk.rename(temporary, path)
            except OSError:
                with contextlib.suppress(OSError):
                    self._disk.unlink(temporary)
                raise
            self._disk.sync(folder_of(path))

    def _folder(self, path: str) -> None:
        parent = folder_of(path)
        if path.rpartition("/")[2] not in self._names(parent):
            self._disk.make_folder(path)
            self._disk.sync(parent)

    def _names(self, folder: str) -> frozenset[str]:
        with named():
            try:
                return frozenset(entry.name for entry in self._disk.entries(folder))
            except FileNotFoundError:
                return frozenset()

    def _sync_tree(self, folder: str) -> None:
        for entry in self._disk.entries(folder):
            path = f"{folder}/{entry.name}"
            if entry.is_folder:
                self._sync_tree(path)
            else:
                self._disk.sync(path)
        self._disk.sync(folder)

    def _link(self, old: str, new: str, entry: Entry) -> None:
        if not entry.is_folder:
            self._disk.link(old, new)
            return
        self._disk.make_folder(new)
        for below in self._disk.entries(old):
            self._link(f"{old}/{below.name}", f"{new}/{below.name}", below)

    def _remove(self, folder: str) -> None:
        for entry in self._disk.entries(folder):
            path = f"{folder}/{entry.name}"
            if entry.is_folder:
                self._remove(path)
            else:
                self._disk.unlink(path)
        self._disk.remove_folder(folder)


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _seal(document: Mapping[str, Any]) -> bytes:
    check = hashlib.sha256(_canonical(document)).hexdigest()
    return json.dumps({**document, "check": check}, sort_keys=True, indent=1).encode()


def _unseal(path: str, data: bytes) -> dict[str, Any]:
    """Return the document in ``data``. Who passes the check was written by ``_seal``."""
    try:
        document = json.loads(data)
        check = document.pop("check")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise StateDamaged(f"{path}: it is not a state file") from None
    if hashlib.sha256(_canonical(document)).hexdigest() != check:
        raise StateDamaged(f"{path}: its content does not have the digest it names")
    if document.get("schema") != 1:
        raise StateDamaged(f"{path}: schema {document.get('schema')!r} is unknown, expected 1")
    found: dict[str, Any] = document
    return found


def _target_document(target: Target) -> dict[str, Any]:
    return {
        "model": target.model,
        "release": target.release,
        "version": target.version,
        "index_target": target.index_target,
        "certificate_targets": list(target.certificate_targets),
    }


def _target(document: Mapping[str, Any]) -> Target:
    return Target(
        document["model"],
        document["release"],
        document["version"],
        document["index_target"],
        tuple(document["certificate_targets"]),
    )


def _pointer_document(pointer: Pointer) -> dict[str, Any]:
    targets = {
        name: None if target is None else _target_document(target)
        for name, target in (
            ("committed", pointer.committed),
            ("before", pointer.before),
            ("candidate", pointer.candidate),
        )
    }
    return {
        "schema": 1,
        "model": pointer.model,
        "state": pointer.life.state.value,
        "failures": pointer.life.failures,
        "generation": pointer.generation,
        "code": pointer.code,
        "sentence": pointer.sentence,
        "figures": dict(pointer.figures),
        **targets,
    }


def _pointer(model: str, document: Mapping[str, Any]) -> Pointer:
    def target(name: str) -> Target | None:
        return None if document[name] is None else _target(document[name])

    if document["model"] != model:
        raise StateDamaged(f"{model}: its pointer speaks of {document['model']}")
    return replace(
        Pointer(model),
        life=Life(State(document["state"]), document["failures"]),
        generation=document["generation"],
        committed=target("committed"),
        before=target("before"),
        candidate=target("candidate"),
        code=document["code"],
        sentence=document["sentence"],
        figures=document["figures"],
    )


def certificate_id(target: str) -> str:
    """Return the id of the certificate at a target path."""
    return target.rpartition("/")[2].removesuffix(".json")


def release_number(slot: Path) -> int:
    """Return the hub's number of the release in the folder of a slot."""
    return int(slot.name.partition("-")[0])
