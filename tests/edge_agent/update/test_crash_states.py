"""No power cut, at any instruction, leaves a device without a complete release.

A story of three releases runs on a model of a disk, and one of a release that gets other
certificates twice. After every operation every state that a
crash could leave is enumerated, and each one must keep the invariant and lead to the release
that is wanted. Then every fsync of the protocol is forgotten in turn, which must be noticed:
a check that notices nothing proves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from edge_agent.update.lifecycle import SERVING_CANDIDATE, Event, Life, State
from edge_agent.update.slots import Desired, Pointer, Slots, StateDamaged, Target
from tests.edge_agent.update.model_disk import Image, ModelDisk

FOLDER = "models/digits"


def target(release: int) -> Target:
    return Target("digits", release, f"1.{release}.0", f"digits/{release}/index.json")


def renewal(number: int) -> Target:
    """The first release, each time under a certificate more, and without the first in the end."""
    certificates = [f"certificates/digits/1/{n:016x}.json" for n in range(1, number + 1)]
    return replace(target(1), certificate_targets=tuple(certificates[number > 2 :]))


def content(wanted: Target) -> dict[str, bytes]:
    return {
        "bundle.json": f"root {wanted.release}".encode(),
        "variants/int8.onnx": f"weights {wanted.release}".encode(),
        **{f"certificates/{id}.json": id.encode() for id in wanted.certificate_ids},
    }


@dataclass(slots=True)
class Promises:
    """What the protocol has said to be durable so far, and what a crash must therefore leave."""

    committed: int = 0  # the number of the wish
    generation: int = 0
    sequence: int = -1


class Violation(Exception):
    """A crash would leave what must never be."""


class Story:
    """What ``machine.py`` does on the disk for a release, step by step."""

    targets: Callable[[int], Target] = staticmethod(target)  # by generation

    def __init__(self, slots: Slots, disk: ModelDisk, promises: Promises) -> None:
        self.slots, self.disk, self.promises = slots, disk, promises

    def want(self, number: int) -> None:
        if self.slots.desired.generation < number:
            self.slots.accept(Desired(number, "epoch", (self.targets(number),)))
        self.promises.generation = number
        self.promises.sequence = self.slots.next_sequence()

    def update(self) -> None:
        """Bring the desired release to a commit, from whatever is on the disk."""
        wanted = self.slots.desired.targets[0]
        pointer = self.slots.pointer("digits")
        life = pointer.life.after(Event.BOOTED)
        if life.state is State.ROLLING_BACK:
            life = life.after(Event.DONE)
        if life.state is not State.IDLE and pointer.candidate != wanted:
            life = life.after(Event.SUPERSEDED)
        if life.state in (State.REJECTED, State.ROLLED_BACK):
            life = Life()  # a newer generation; whether it should is the table's business
        pointer = replace(pointer, life=life, generation=self.slots.desired.generation)
        if life.state is State.IDLE and pointer.committed == wanted:
            self.put(replace(pointer, candidate=None))
            self.slots.collect("digits")
            return
        if life.state in (State.IDLE, State.WAITING):
            life = life.after(Event.WANTED)
        pointer = replace(pointer, life=life, candidate=wanted)
        assert life.state is State.FETCHING
        self.put(pointer)
        held = pointer.committed
        if held is not None and wanted.is_of_the_release_of(held):
            fetched = {id: id.encode() for id in wanted.certificate_ids - held.certificate_ids}
            self.slots.renew(held, wanted, fetched)
            self.commit(pointer, Event.RENEWED, wanted, pointer.before)
            return
        if not self.slots.is_sealed(wanted):
            self.fetch(wanted, self.slots.stage(wanted))
            pointer = self.advance(pointer)
            # Unlike fetching, whose files nobody trusts, this is a promise.
            self.slots.seal(wanted, {"variants/int8.onnx": wanted.slot})
        else:
            pointer = self.advance(pointer)
        for _ in (State.TESTING, State.SHADOW, State.TRIAL, State.PROBATION):
            pointer = self.advance(pointer)
        self.commit(pointer, Event.DONE, wanted, pointer.committed)

    def commit(self, pointer: Pointer, event: Event, wanted: Target, before: Target | None) -> None:
        life = pointer.life.after(event)
        self.put(replace(pointer, life=life, committed=wanted, before=before, candidate=None))
        self.promises.committed = self.slots.desired.generation
        self.slots.collect("digits")

    def advance(self, pointer: Pointer) -> Pointer:
        pointer = replace(pointer, life=pointer.life.after(Event.DONE))
        self.put(pointer)
        return pointer

    def put(self, pointer: Pointer) -> None:
        self.slots.put(pointer)

    def fetch(self, wanted: Target, into: str) -> None:
        there = {entry.name for entry in self.disk.entries(into)}
        for folder in {name.partition("/")[0] for name in content(wanted) if "/" in name} - there:
            self.disk.make_folder(f"{into}/{folder}")
        for name, data in content(wanted).items():
            self.disk.write(f"{into}/{name}", data)


class Hurried(Story):
    """Writes the pointer of the trial right after the slot: ``seal`` must not lean on others."""

    def put(self, pointer: Pointer) -> None:
        if pointer.life.state in (State.IDLE, State.TRIAL):
            self.slots.put(pointer)


class Renewing(Hurried):
    """A release is committed, and then it gets other certificates."""

    targets = staticmethod(renewal)


def check(image: Image, promises: Promises, targets: Callable[[int], Target] = target) -> Slots:
    """Start on what a crash left.

    Raises:
        Violation: it is not what must be there.
    """
    disk = ModelDisk.booted(image)
    slots = Slots(disk)
    slots.open()
    if slots.damaged:
        raise Violation(f"unreadable: {slots.damaged}")
    for entry in disk.entries(FOLDER) if "digits" in names(disk, "models") else ():
        if entry.is_folder and "." not in entry.name:
            known = {targets(number).slot: targets(number) for number in (1, 2, 3)}
            if not complete(disk, known[entry.name]):
                raise Violation(f"slot {entry.name} is not complete")
    pointer = slots.pointer("digits")
    needed = [pointer.active]
    if pointer.life.state in SERVING_CANDIDATE:
        needed.append(pointer.committed)
    for wanted in needed:
        if wanted is not None and not complete(disk, wanted):
            raise Violation(f"{pointer.life.state}: release {wanted.release} is not complete")
    if promises.committed and pointer.committed is None:
        raise Violation("no release although one was committed")
    later = [targets(number) for number in range(promises.committed, 4)]
    if promises.committed and pointer.committed not in later:
        raise Violation(f"release {promises.committed} was committed, now it is older")
    if slots.desired.generation < promises.generation:
        raise Violation("an accepted generation was forgotten")
    if slots.next_sequence() <= promises.sequence:
        raise Violation("a sequence number comes again")
    return slots


def names(disk: ModelDisk, folder: str) -> set[str]:
    return {entry.name for entry in disk.entries(folder)}


def complete(disk: ModelDisk, wanted: Target) -> bool:
    slot = f"{FOLDER}/{wanted.slot}"
    try:
        return all(disk.read(f"{slot}/{name}") == data for name, data in content(wanted).items())
    except FileNotFoundError:
        return False


class Enumeration:
    """Every crash state of every operation, each one checked once per set of promises."""

    def __init__(self, *, converge: bool = False) -> None:
        self.converge = converge
        self.story: type[Story] = Story
        self.promises = Promises()
        self.checked: set[tuple[Image, int, int, int]] = set()

    def after(self, operation: str, path: str) -> None:
        p = self.promises
        for image in self.disk.crashes():
            key = (image, p.committed, p.generation, p.sequence)
            if key not in self.checked:
                self.checked.add(key)
                try:
                    check(image, p, self.story.targets)
                    if self.converge and p.generation:
                        self.finish(image)
                except Violation as error:
                    raise Violation(f"after {operation} of {path}: {error}") from None

    def finish(self, image: Image) -> None:
        disk = ModelDisk.booted(image)
        slots = Slots(disk)
        slots.open()
        story = self.story(slots, disk, Promises())
        wanted = max(self.promises.generation, slots.desired.generation)
        story.want(wanted)
        story.update()
        pointer = slots.pointer("digits")
        end = story.targets(wanted)
        if pointer.active != end or not complete(disk, end):
            raise Violation(f"it ends with {pointer.active}")
        kept = {t.slot for t in (pointer.committed, pointer.before) if t is not None}
        if names(disk, FOLDER) != {"pointer.json", *kept}:
            raise Violation(f"garbage is left: {names(disk, FOLDER) - kept}")

    def run(
        self,
        tell: type[Story] = Story,
        *,
        forget: Callable[[str], bool] = lambda path: False,
        releases: int = 3,
        slots: type[Slots] = Slots,
    ) -> int:
        """Return how many crash states there were.

        Raises:
            Violation: one of them is not what must be there.
        """
        self.story = tell
        self.disk = ModelDisk(after=self.after, forget=forget)
        story = tell(slots(self.disk), self.disk, self.promises)
        story.slots.open()
        for release in range(1, releases + 1):
            story.want(release)
            story.update()
        return len(self.checked)


def test_every_crash_state_of_three_updates_keeps_the_invariant_and_converges() -> None:
    states = Enumeration(converge=True).run()
    assert states > 500  # else the model forgets too little to prove anything


def test_the_order_holds_without_the_writes_between_slot_and_trial() -> None:
    assert Enumeration(converge=True).run(Hurried) > 300


def test_every_crash_state_of_two_renewals_keeps_the_invariant_and_converges() -> None:
    enumeration = Enumeration(converge=True)
    assert enumeration.run(Renewing) > 500
    assert names(enumeration.disk, FOLDER) == {"pointer.json", renewal(3).slot}
    # What was linked is one file.
    assert enumeration.disk.entries("files")[0].links == 2


def certificate_content(path: str) -> bool:
    return ".linked/certificates/" in path


def linked_names(path: str) -> bool:
    return path.endswith((".linked", ".linked/variants", ".linked/certificates"))


class NoSyncOfTheRenewedName(Slots):
    def renew(self, old, new, certificates) -> None:
        self._disk.forget = lambda path: path == FOLDER
        super().renew(old, new, certificates)
        self._disk.forget = lambda path: False


class DeletesWhatIsRenewedFirst(Slots):
    def renew(self, old, new, certificates) -> None:
        super().renew(old, new, certificates)
        self._delete("digits", lambda slot, part: slot == old.slot)


@pytest.mark.parametrize("forget", [certificate_content, linked_names])
def test_a_forgotten_fsync_of_a_renewal_is_noticed(forget) -> None:
    with pytest.raises(Violation, match="not complete"):
        Enumeration().run(Renewing, forget=forget)


@pytest.mark.parametrize("slots", [NoSyncOfTheRenewedName, DeletesWhatIsRenewedFirst])
def test_a_broken_order_of_a_renewal_is_noticed(slots) -> None:
    with pytest.raises(Violation, match=r"release . is not complete"):
        Enumeration().run(Renewing, slots=slots)


def release_content(path: str) -> bool:
    return ".part/" in path and path.endswith((".json", ".onnx"))


def release_names(path: str) -> bool:
    return path.endswith((".part", ".part/variants"))


class NoSyncOfTheSlotsName(Slots):
    def seal(self, target, digests) -> None:
        model_disk, self._disk.forget = self._disk, lambda path: path == FOLDER
        super().seal(target, digests)
        model_disk.forget = lambda path: False


class NoSyncBeforeDeleting(Slots):
    def collect(self, model) -> None:
        self._disk.forget = lambda path: path == FOLDER
        super().collect(model)
        self._disk.forget = lambda path: False


class DeletesBeforeTheCommit(Slots):
    def put(self, pointer) -> None:
        super().put(pointer)
        if pointer.life.state is State.TRIAL:
            kept = self._pointers["digits"]
            self._pointers["digits"] = replace(kept, committed=None, before=None)
            self.collect("digits")
            self._pointers["digits"] = kept


@pytest.mark.parametrize(
    ("forget", "complaint"),
    [
        (release_content, "not complete"),
        (release_names, "not complete"),
        (lambda path: path == f"{FOLDER}/pointer.json.tmp", "unreadable"),
        (lambda path: path == "device.json.tmp", "unreadable"),
        (lambda path: path in ("", "models"), "forgotten|comes again|no release"),
    ],
    ids=["content of a release", "names in a release", "pointer", "device", "names of folders"],
)
def test_a_forgotten_fsync_is_noticed(forget, complaint) -> None:
    with pytest.raises(Violation, match=complaint):
        Enumeration().run(Hurried, forget=forget)


@pytest.mark.parametrize(
    ("slots", "complaint"),
    [
        (NoSyncOfTheSlotsName, "trial: release . is not complete"),
        (NoSyncBeforeDeleting, "slot .* is not complete"),
        (DeletesBeforeTheCommit, "trial: release . is not complete"),
    ],
)
def test_a_broken_order_is_noticed(slots, complaint) -> None:
    with pytest.raises(Violation, match=complaint):
        Enumeration().run(Hurried, slots=slots)


def test_a_pointer_whose_name_is_not_synced_breaks_its_promise_but_never_the_device() -> None:
    # The one fsync that safety does not need: an update may be undone, and the generation
    # repairs it. It is what makes `put` mean what it says.
    def forget(path: str) -> bool:
        return path == FOLDER

    class OnlyTheName(Slots):
        def put(self, pointer) -> None:
            self._disk.forget = forget
            super().put(pointer)
            self._disk.forget = lambda path: False

    with pytest.raises(Violation, match="no release although one was committed"):
        Enumeration().run(Hurried, slots=OnlyTheName)

    class Silent(Promises):
        @property
        def committed(self) -> int:
            return 0

        @committed.setter
        def committed(self, value: int) -> None:
            pass

    quiet = Enumeration()
    quiet.promises = Silent()
    assert quiet.run(Hurried, slots=OnlyTheName) > 300


class Killed(Exception):
    """The process is gone; what it wrote is still in the page cache."""


def story_killed_after(operations: int, slots: type[Slots]) -> Enumeration | None:
    """Kill the process, start another one, and cut the power at every later instruction."""
    enumeration = Enumeration()
    left = operations

    def count(operation: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    disk = enumeration.disk = ModelDisk(after=count)
    try:
        first = Hurried(slots(disk), disk, enumeration.promises)
        first.slots.open()
        first.want(1)
        first.update()
        return None
    except Killed:
        disk.after = enumeration.after
    second = Hurried(slots(disk), disk, enumeration.promises)
    second.slots.open()
    second.want(1)
    second.update()
    return enumeration


class NoSyncAtStart(Slots):
    def open(self) -> None:
        self._disk.forget = lambda path: not path.endswith(".tmp")
        super().open()
        self._disk.forget = lambda path: False


def test_a_killed_process_and_a_power_cut_after_the_next_start_lose_nothing() -> None:
    operations = 1
    while story_killed_after(operations, Slots) is not None:
        operations += 1
    assert operations > 30


def test_a_start_that_trusts_the_page_cache_is_noticed() -> None:
    with pytest.raises(Violation):
        any(story_killed_after(n, NoSyncAtStart) is None for n in range(1, 100))


def test_a_state_file_that_is_not_what_was_written_is_told_apart() -> None:
    disk = ModelDisk()
    slots = Slots(disk)
    slots.open()
    slots.put(Pointer("digits", generation=3, committed=target(1)))
    written = disk.read(f"{FOLDER}/pointer.json")
    for damage in (
        b"",
        b"[]",
        written[:-1],
        written.replace(b'"generation": 3', b'"generation": 4'),
        written.replace(b"digits", b"digots"),
        b"[" * 100_000,
        b"\xff\xfe",
    ):
        disk.write(f"{FOLDER}/pointer.json", damage)
        again = Slots(disk)
        again.open()
        assert list(again.damaged) == [f"{FOLDER}/pointer.json"], damage
        assert again.pointer("digits") == Pointer("digits")
    assert issubclass(StateDamaged, Exception)
