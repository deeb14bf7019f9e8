"""The real disk and the model of one behave alike, so that what holds on one holds on the other."""

import pytest

from edge_agent.update.disk import Disk, DiskFault, DiskFull, Entry, LocalDisk, named
from tests.edge_agent.update.model_disk import ModelDisk


@pytest.fixture(params=["real", "model"])
def disk(request: pytest.FixtureRequest, tmp_path) -> Disk:
    return LocalDisk(tmp_path) if request.param == "real" else ModelDisk()


def names(disk: Disk, folder: str = "") -> list[str]:
    return [entry.name for entry in disk.entries(folder)]


def test_what_is_written_is_read(disk: Disk) -> None:
    disk.write("a", b"long content")
    disk.write("a", b"new")
    disk.sync("a")
    disk.sync("")
    assert disk.read("a") == b"new"


def test_a_folder_lists_what_it_holds_by_name(disk: Disk) -> None:
    disk.make_folder("f")
    disk.write("f/b", b"")
    disk.write("f/a", b"")
    disk.make_folder("f/c")
    disk.link("f/a", "a-again")
    assert [(e.name, e.is_folder) for e in disk.entries("f")] == [
        ("a", False),
        ("b", False),
        ("c", True),
    ]
    assert disk.entries("f")[:2] == (Entry("a", False, 2), Entry("b", False, 1))
    assert names(disk) == ["a-again", "f"]


def test_a_rename_replaces_a_file_and_moves_a_folder_with_its_content(disk: Disk) -> None:
    disk.write("old", b"1")
    disk.write("new", b"2")
    disk.rename("old", "new")
    disk.make_folder("f")
    disk.write("f/x", b"3")
    disk.rename("f", "g")
    assert (disk.read("new"), disk.read("g/x"), names(disk)) == (b"1", b"3", ["g", "new"])


def test_a_linked_file_lives_until_its_last_name_goes(disk: Disk) -> None:
    disk.write("a", b"1")
    disk.link("a", "b")
    disk.unlink("a")
    assert disk.read("b") == b"1"
    assert disk.entries("") == (Entry("b", False, 1),)


@pytest.mark.parametrize(
    ("error", "attempt"),
    [
        (FileNotFoundError, lambda d: d.read("none")),
        (FileNotFoundError, lambda d: d.write("none/a", b"")),
        (FileNotFoundError, lambda d: d.sync("none")),
        (FileNotFoundError, lambda d: d.rename("none", "a")),
        (FileNotFoundError, lambda d: d.entries("none")),
        (FileNotFoundError, lambda d: d.unlink("none")),
        (FileExistsError, lambda d: d.make_folder("folder")),
        (FileExistsError, lambda d: d.link("file", "folder")),
        (NotADirectoryError, lambda d: d.entries("file")),
        (NotADirectoryError, lambda d: d.remove_folder("file")),
        (NotADirectoryError, lambda d: d.rename("folder", "file")),
        (IsADirectoryError, lambda d: d.rename("file", "folder")),
        (IsADirectoryError, lambda d: d.read("folder")),
        (OSError, lambda d: d.remove_folder("folder")),  # not empty
        (OSError, lambda d: d.rename("file", "folder/file")),  # another folder
        (OSError, lambda d: d.rename("empty", "folder")),  # not empty
    ],
)
def test_what_cannot_be_done_is_an_error_and_changes_nothing(disk: Disk, error, attempt) -> None:
    disk.write("file", b"1")
    disk.make_folder("folder")
    disk.write("folder/x", b"2")
    disk.make_folder("empty")
    with pytest.raises(error):
        attempt(disk)
    assert (names(disk), names(disk, "folder")) == (["empty", "file", "folder"], ["x"])


def test_a_link_to_a_folder_is_no_folder(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert [e.is_folder for e in LocalDisk(tmp_path).entries("")] == [False, True]


def test_the_model_forgets_what_was_not_synced_and_only_that() -> None:
    disk = ModelDisk()
    disk.write("a", b"1234")
    disk.sync("a")
    disk.sync("")
    disk.write("a", b"5678")
    disk.write("b", b"")
    left = {
        tuple(
            (e.name, ModelDisk.booted(image).read(e.name))
            for e in ModelDisk.booted(image).entries("")
        )
        for image in disk.crashes()
    }
    contents = [b"1234", b"", b"56", b"5678"]
    assert left == {(("a", c),) for c in contents} | {(("a", c), ("b", b"")) for c in contents}


def test_a_rename_survives_whole_or_not_at_all() -> None:
    disk = ModelDisk()
    disk.write("a", b"1")
    disk.sync("a")
    disk.sync("")
    disk.rename("a", "b")
    assert {tuple(names(ModelDisk.booted(i))) for i in disk.crashes()} == {("a",), ("b",)}


def test_a_disk_without_room_is_told_apart_from_one_that_fails() -> None:
    disk = ModelDisk(capacity=3)
    with pytest.raises(DiskFull, match="no space is left"), named():
        disk.write("a", b"1234")
    with pytest.raises(DiskFault, match="none"), named():
        disk.read("none")
