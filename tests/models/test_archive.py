"""npz files: the same bytes for the same arrays, and a sentence for anything else."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fogline_models import archive
from fogline_models.errors import BadInput

ARRAYS = arrays_of.arrays(
    dtype=st.sampled_from(["<f4", "<i8", "u1"]),
    shape=arrays_of.array_shapes(max_dims=3, max_side=4),
    elements={"allow_nan": False},
)


@settings(deadline=None)  # the machine may be busy
@given(content=st.dictionaries(st.sampled_from(["a", "input.x", "b.c"]), ARRAYS))
def test_the_same_arrays_give_the_same_bytes_in_any_order(
    content: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
) -> None:
    backwards = dict(reversed(content.items()))
    assert archive.to_bytes(content) == archive.to_bytes(backwards)
    with np.load(io.BytesIO(archive.to_bytes(content)), allow_pickle=False) as found:
        assert sorted(found.files) == sorted(content)
        for name, array in content.items():
            np.testing.assert_array_equal(found[name], array)


def test_no_time_of_writing_is_kept() -> None:
    data = archive.to_bytes({"x": np.zeros(3, np.float32)})
    assert data[10:14] == b"\x00\x00\x21\x00"  # 1980-01-01 00:00, the first a zip can say


def test_saving_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.npz"
    for value in (1.0, 2.0):
        archive.save(target, {"x": np.full(2, value)})
    assert [path.name for path in target.parent.iterdir()] == ["x.npz"]
    assert archive.read(target)["x"].tolist() == [2.0, 2.0]


def test_arrays_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"run": "me"}], dtype=object))
    with pytest.raises(BadInput, match="not an intact"):
        archive.read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "not an intact"),
        (b"hello", "not an intact"),
        (archive.to_bytes({"x": np.zeros(9)})[:-40], "not an intact"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=says) as refused:
        archive.read(path)
    assert str(path) in str(refused.value)


def test_one_bare_array_is_told_from_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)
    with pytest.raises(BadInput, match="one bare array"):
        archive.read(path)
