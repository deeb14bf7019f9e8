import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.fleet.upload import Limits, UploadRefused, pack, unpack


def entry(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    info.linkname = link
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


END = b"\0" * 1024


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_was_packed_is_unpacked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "variants").mkdir(parents=True)
    (source / "bundle.json").write_bytes(b"{}")
    (source / "variants" / "fp32.onnx").write_bytes(b"m" * 100_000)
    (source / "link").symlink_to("/etc/passwd")
    stream = io.BytesIO()
    pack(source, stream)
    expected = {"bundle.json": b"{}", "variants/fp32.onnx": b"m" * 100_000}
    assert files_below(unpack(io.BytesIO(stream.getvalue()), tmp_path / "a")) == expected
    zipped = io.BytesIO(gzip.compress(stream.getvalue()))
    assert files_below(unpack(zipped, tmp_path / "b")) == expected


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_what_tar_writes_of_a_folder_is_accepted(tmp_path: Path, style: int) -> None:
    (tmp_path / "digits-1.0.0" / "variants").mkdir(parents=True)
    (tmp_path / "digits-1.0.0" / "variants" / "a").write_bytes(b"a")
    (tmp_path / "digits-1.0.0" / "bundle.json").write_bytes(b"{}")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=style) as archive:
        archive.add(tmp_path / "digits-1.0.0", "digits-1.0.0")
    found = unpack(io.BytesIO(stream.getvalue()), tmp_path / "into")
    assert found.name == "digits-1.0.0"
    assert files_below(found) == {"bundle.json": b"{}", "variants/a": b"a"}


HOSTILE = [
    (entry("/etc/passwd") + END, "not a plain path"),
    (entry("../x") + END, "not a plain path"),
    (entry("a/../../x") + END, "not a plain path"),
    (entry("a\\b") + END, "not a plain path"),
    (entry("a", b"", tarfile.SYMTYPE, "/etc") + entry("a/passwd") + END, "links"),
    (entry("a", b"", tarfile.LNKTYPE, "/etc/passwd") + END, "links"),
    (entry("a", b"", tarfile.CHRTYPE) + END, "neither a regular file"),
    (entry("a", b"", tarfile.FIFOTYPE) + END, "neither a regular file"),
    (entry("a", b"", tarfile.GNUTYPE_LONGNAME) + END, "long names"),
    (entry("a") + entry("a") + END, "comes twice"),
    (entry("a") + entry("a/b") + END, "lies inside a file"),
    (entry("/".join("abcdefghi")) + END, "no name of a bundle's file"),
    (entry("p", b"18 path=/etc/shado\n", tarfile.XHDTYPE) + entry("a") + END, "'path'"),
    (entry("p", b"12 size=999\n", tarfile.XGLTYPE) + entry("a") + END, "'size'"),
    (entry("p", b"garbage", tarfile.XHDTYPE) + END, "extension header"),
    (entry("p", b"0 mtime=1\n", tarfile.XHDTYPE) + END, "extension header"),
    (entry("p", b"x" * 70_000, tarfile.XHDTYPE) + END, "70000 bytes"),
    (entry("d", b"data", tarfile.DIRTYPE) + END, "content of its own"),
    (entry("a", b"x" * 2000) + END, "more than 1000 bytes"),
    (b"".join(entry(f"f{n}", b"") for n in range(6)) + END, "more than 5 files"),
    (entry("a", b"x" * 600)[:700], "ends inside a"),
    (entry("a"), "ends inside a header"),
    (b"", "ends inside a header"),
    (b"<html>" * 200, "not a tar archive"),
    (gzip.compress(entry("a", random.Random(0).randbytes(900)))[:400], "damaged"),
    (b"\x1f\x8b" + b"junk" * 10, "damaged"),
    (gzip.compress(entry("a", b"\0" * 50_000_000)), "more than 1000 bytes"),
]


@pytest.mark.parametrize(
    ("archive", "sentence"), HOSTILE, ids=[sentence for _, sentence in HOSTILE]
)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, archive: bytes, sentence: str
) -> None:
    into = tmp_path / "into"
    with pytest.raises(UploadRefused, match=sentence):
        unpack(io.BytesIO(archive), into, Limits(total_bytes=1000, files=5))
    assert not into.exists()
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_no_bytes_get_out_of_the_folder_or_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("upload")
    try:
        unpack(io.BytesIO(entry("ok") + data), folder / "into")
    except UploadRefused:
        assert list(folder.iterdir()) == []
    else:
        assert [path.name for path in folder.iterdir()] == ["into"]
