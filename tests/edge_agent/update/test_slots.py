"""What slots promise beside surviving a crash: room, order, and what may be deleted."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.update.disk import DiskFault, DiskFull
from edge_agent.update.lifecycle import Life, State
from edge_agent.update.slots import SEQUENCE_BLOCK, Desired, Pointer, Slots, Target
from tests.edge_agent.update.model_disk import ModelDisk

HOME = "models/digits"


def target(release: int, *certificates: str) -> Target:
    return Target("digits", release, f"1.{release}.0", f"digits/{release}/index.json", certificates)


def opened(disk: ModelDisk, first_sequence: int = 0) -> Slots:
    slots = Slots(disk, first_sequence)
    slots.open()
    return slots


def fetched(disk: ModelDisk, slots: Slots, wanted: Target) -> None:
    part = slots.stage(wanted)
    disk.write(f"{part}/bundle.json", b"root")
    disk.write(f"{part}/model.onnx", f"weights {wanted.release}".encode())


def sealed(disk: ModelDisk, slots: Slots, wanted: Target) -> None:
    fetched(disk, slots, wanted)
    slots.seal(wanted, {"model.onnx": f"{wanted.release:064x}"})


def names(disk: ModelDisk, folder: str) -> set[str]:
    return {entry.name for entry in disk.entries(folder)}


texts = st.text(max_size=20)
targets = st.builds(
    Target,
    model=st.just("digits"),
    release=st.integers(1, 1 << 53),
    version=texts,
    index_target=texts,
    certificate_targets=st.lists(texts, max_size=3).map(tuple),
)


@given(
    st.builds(
        Pointer,
        model=st.just("digits"),
        life=st.builds(Life, st.sampled_from(State), st.integers(0, 3)),
        generation=st.integers(0, 1 << 53),
        committed=st.none() | targets,
        before=st.none() | targets,
        candidate=st.none() | targets,
        code=texts,
        sentence=texts,
        figures=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    )
)
def test_a_pointer_is_read_as_it_was_written(pointer: Pointer) -> None:
    disk = ModelDisk()
    opened(disk).put(pointer)
    again = opened(disk)
    assert again.damaged == {}
    assert again.pointer("digits") == pointer


def test_a_wish_and_the_number_of_starts_are_read_as_they_were_written() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    wish = Desired(9, "epoch", (target(1, "c/1.json"), replace(target(2), model="other")))
    slots.accept(wish)
    again = opened(disk)
    assert (again.desired, again.boot) == (wish, 2)


def test_what_was_withdrawn_is_read_as_it_was_written_until_it_is_told_anew() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    sealed(disk, slots, target(1))
    slots.withdraw("digits", frozenset({"a", "b"}))
    assert opened(disk).withdrawn("digits") == {"a", "b"}
    opened(disk).withdraw("digits", frozenset({"c"}))
    again = opened(disk)
    assert again.withdrawn("digits") == {"c"}
    assert again.withdrawn("other") == frozenset()
    disk.write(f"{HOME}/withdrawn.json", b"garbled")
    again = opened(disk)
    assert list(again.damaged) == [f"{HOME}/withdrawn.json"]
    assert again.withdrawn("digits") == frozenset()


def test_what_a_full_disk_did_not_take_is_not_taken_for_withdrawn() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    sealed(disk, slots, target(1))
    slots.withdraw("digits", frozenset({"a"}))
    disk.capacity = 0
    with pytest.raises(DiskFull):
        slots.withdraw("digits", frozenset({"b"}))
    assert slots.withdrawn("digits") == opened(disk).withdrawn("digits") == {"a"}


def test_a_slot_is_named_after_the_release_and_its_certificates() -> None:
    assert target(3).slot.startswith("3-")
    assert len({target(3).slot, target(3, "a").slot, target(3, "b").slot, target(4).slot}) == 4
    assert target(3, "a", "b").slot == target(3, "b", "a").slot


def test_sequence_numbers_go_on_after_a_start_whatever_was_used() -> None:
    disk = ModelDisk()
    first = [opened(disk).next_sequence() for _ in range(3)]
    slots = opened(disk)
    long = [slots.next_sequence() for _ in range(2 * SEQUENCE_BLOCK)]
    after = opened(disk).next_sequence()
    assert sorted({*first, *long, after}) == [*first, *long, after]


def test_a_device_with_a_new_disk_starts_where_its_clock_says() -> None:
    assert opened(ModelDisk(), 5_000).next_sequence() == 5_000
    disk = ModelDisk()
    opened(disk, 5_000)
    assert opened(disk, 17).next_sequence() == 5_000 + SEQUENCE_BLOCK


def test_a_full_disk_does_not_end_the_sequence() -> None:
    disk = ModelDisk(capacity=0)
    slots = opened(disk, 100)
    numbers = [slots.next_sequence() for _ in range(5)]
    assert numbers == [100, 101, 102, 103, 104]


def test_a_sealed_slot_is_what_was_fetched() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    assert not slots.is_sealed(target(1))
    sealed(disk, slots, target(1))
    assert slots.is_sealed(target(1))
    assert names(disk, HOME) == {target(1).slot}
    assert disk.read(f"{slots.folder(target(1))}/model.onnx") == b"weights 1"
    assert disk.read(f"files/{1:064x}") == b"weights 1"


def renewed(disk: ModelDisk, slots: Slots, capacity: int = 1 << 40) -> Target:
    """Seal release 1 under a certificate, and renew it with another one."""
    old = target(1, "c/1.json", "c/2.json")
    fetched(disk, slots, old)
    disk.make_folder(f"{slots.stage(old)}/certificates")
    for id in ("1", "2"):
        disk.write(f"{slots.stage(old)}/certificates/{id}.json", id.encode())
    slots.seal(old, {"model.onnx": f"{1:064x}"})
    disk.capacity = capacity
    new = target(1, "c/2.json", "c/3.json")
    slots.renew(old, new, {"3": b"3"})
    return new


def test_a_renewed_slot_has_the_same_files_under_other_certificates() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    new = renewed(disk, slots)
    folder = slots.folder(new)
    assert slots.is_sealed(new)
    assert names(disk, folder) == {"bundle.json", "model.onnx", "certificates"}
    assert names(disk, f"{folder}/certificates") == {"2.json", "3.json"}
    assert disk.read(f"{folder}/certificates/2.json") == b"2"
    assert {e.name: e.links for e in disk.entries(folder)}["model.onnx"] == 3
    bare = target(1)
    slots.renew(new, bare, {})
    assert names(disk, slots.folder(bare)) == {"bundle.json", "model.onnx"}
    slots.put(Pointer("digits", committed=bare))
    slots.collect("digits")
    assert names(disk, HOME) == {"pointer.json", bare.slot}
    assert disk.read(f"{slots.folder(bare)}/model.onnx") == b"weights 1"


def test_a_renewal_that_a_full_disk_ended_is_begun_anew_or_collected() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    with pytest.raises(DiskFull):
        renewed(disk, slots, capacity=0)
    old, new = target(1, "c/1.json", "c/2.json"), target(1, "c/2.json", "c/3.json")
    assert names(disk, HOME) == {old.slot, f"{new.slot}.linked"}
    disk.capacity = 1 << 40
    slots.put(Pointer("digits", committed=old))
    slots.renew(old, new, {"3": b"3"})
    assert names(disk, HOME) == {"pointer.json", old.slot, new.slot}
    other = target(1, "c/4.json")
    with pytest.raises(DiskFault):
        slots.renew(old, other, {})  # nobody has that certificate
    assert not slots.is_sealed(other)
    slots.collect("digits")
    assert names(disk, HOME) == {"pointer.json", old.slot}


def test_an_interrupted_fetch_finds_what_it_left() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    fetched(disk, slots, target(1))
    assert names(disk, slots.stage(target(1))) == {"bundle.json", "model.onnx"}


def test_a_fetch_goes_on_with_what_was_left_for_other_certificates_of_the_release() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    fetched(disk, slots, target(1, "c/1.json"))
    fetched(disk, slots, target(11))
    part = slots.stage(target(1, "c/2.json"))
    assert names(disk, part) == {"bundle.json", "model.onnx"}
    assert names(disk, HOME) == {f"{target(11).slot}.part", part.rpartition("/")[2]}
    assert names(disk, slots.stage(target(1, "c/2.json"))) == {"bundle.json", "model.onnx"}


def test_what_no_pointer_names_is_collected_and_the_rest_is_not() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    for release in (1, 2, 3, 4):
        sealed(disk, slots, target(release))
    fetched(disk, slots, target(5))
    fetched(disk, slots, target(6))
    slots.put(Pointer("digits", committed=target(2), before=target(1), candidate=target(5)))
    slots.collect("digits")
    assert names(disk, HOME) == {
        "pointer.json",
        target(1).slot,
        target(2).slot,
        f"{target(5).slot}.part",
    }
    assert names(disk, "files") == {f"{1:064x}", f"{2:064x}"}


def test_without_a_pointer_nothing_is_collected() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    sealed(disk, slots, target(1))
    slots.collect("digits")
    assert slots.is_sealed(target(1))


@pytest.mark.parametrize("state", State)
def test_what_serves_or_is_fallen_back_to_is_never_discarded(state: State) -> None:
    disk = ModelDisk()
    slots = opened(disk)
    for release in (1, 2):
        sealed(disk, slots, target(release))
    pointer = Pointer("digits", life=Life(state), committed=target(1), candidate=target(2))
    slots.put(pointer)
    for release in (1, 2):
        slots.discard(target(release))
    assert slots.is_sealed(target(1))
    assert slots.is_sealed(target(2)) == (pointer.active == target(2))


@pytest.mark.parametrize("room", range(0, 1400, 20))
def test_a_disk_that_is_full_at_any_moment_leaves_nothing_half_written(room: int) -> None:
    disk = ModelDisk()
    slots = opened(disk)
    sealed(disk, slots, target(1))
    before = Pointer("digits", committed=target(1))
    slots.put(before)
    disk.capacity = sum(len(disk.read(p)) for p in ("device.json", f"{HOME}/pointer.json")) + room
    after = replace(before, life=Life(State.FETCHING), candidate=target(2), generation=2)
    stands, wish = before, Desired(0)
    try:
        slots.accept(Desired(2, "epoch", (target(2),)))
        wish = Desired(2, "epoch", (target(2),))
        slots.put(after)
        stands = after
    except DiskFull:
        pass
    assert (slots.pointer("digits"), slots.desired) == (stands, wish)
    assert {n for n in names(disk, HOME) | names(disk, "") if n.endswith(".tmp")} == set()
    disk.capacity = 1 << 20
    again = opened(disk)
    assert again.damaged == {}
    assert (again.pointer("digits"), again.desired) == (stands, wish)


def test_a_disk_that_fails_is_told_apart_from_a_full_one() -> None:
    disk = ModelDisk()
    slots = opened(disk)
    with pytest.raises(DiskFault, match=r"digits/1-.*\.part"):
        slots.seal(target(1), {})  # nothing was fetched
