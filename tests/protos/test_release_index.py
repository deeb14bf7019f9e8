import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol import release_index
from fogline_protocol.documents import DocumentError
from fogline_protocol.release_index import FileDigester, IndexedFile, ReleaseIndex, parse

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()
INDEX = ReleaseIndex(
    "digits", 3, "1.2.0", A, {"bundle.json": IndexedFile(A, 1, (A,))}, block_bytes=4096
)


def altered(**fields: object) -> bytes:
    return json.dumps({**json.loads(INDEX.to_json()), **fields}).encode()


def with_file(name: str, sha256: str = B, size: int = 1, blocks: tuple[str, ...] = (B,)) -> bytes:
    files = json.loads(INDEX.to_json())["files"]
    entry = {"sha256": sha256, "bytes": size, "blocks": list(blocks)}
    return altered(files={**files, name: entry})


def test_an_index_survives_its_document() -> None:
    assert parse(INDEX.to_json()) == INDEX
    assert (
        parse(with_file("variants/a.onnx", A, 8192, (A, B))).files["variants/a.onnx"].bytes == 8192
    )
    assert parse(with_file("empty", A, 0, ())).files["empty"].blocks == ()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[]", "index"),
        (altered(unknown=1), "unknown"),
        (altered(model="../x"), "model name"),
        (altered(release=0), "numbered from 1"),
        (altered(version="one"), "semantic version"),
        (altered(block_bytes=1), "4096 to 16777216"),
        (altered(block_bytes=1 << 40), "4096 to 16777216"),
        (altered(files={}), "0 files"),
        (altered(bundle_sha256=B), "not the bundle that the index names"),
        (with_file("../x"), "plain path"),
        (with_file("/x"), "plain path"),
        (with_file("a//b"), "plain path"),
        (with_file("./a"), "plain path"),
        (with_file("a\\b"), "every device"),
        (with_file("x" * 300), "every device"),
        (with_file("bundle.json/x"), "inside another file"),
        (with_file("a", B, 5000, (B,)), "2 blocks, 1 listed"),
        (with_file("a", B, 0, (B,)), "0 blocks, 1 listed"),
        (with_file("a", "xyz", 1, (B,)), "not a SHA-256"),
        (with_file("a", A, 1, (B,)), "different digests"),
    ],
)
def test_an_index_that_cannot_be_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(DocumentError, match=sentence):
        parse(data)


@given(st.binary(max_size=20_000), st.lists(st.integers(1, 5000), max_size=20))
def test_digests_do_not_depend_on_the_size_of_the_pieces(data: bytes, sizes: list[int]) -> None:
    digester = FileDigester(4096)
    left = data
    for size in sizes:
        digester.update(left[:size])
        left = left[size:]
    digester.update(left)
    blocks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    assert digester.finish() == IndexedFile(
        hashlib.sha256(data).hexdigest(),
        len(data),
        tuple(hashlib.sha256(block).hexdigest() for block in blocks),
    )


def test_target_paths_are_read_as_they_are_written() -> None:
    path = release_index.index_target("digits", 12)
    assert (path, release_index.split_index_target(path)) == (
        "digits/12/index.json",
        ("digits", 12),
    )
    path = release_index.certificate_target("digits", 12, "0123456789abcdef")
    assert release_index.split_certificate_target(path) == ("digits", 12, "0123456789abcdef")


@pytest.mark.parametrize(
    "path", ["", "digits/index.json", "digits/01/index.json", "a/1/b/index.json"]
)
def test_other_paths_are_not_targets(path: str) -> None:
    with pytest.raises(DocumentError):
        release_index.split_index_target(path)
    with pytest.raises(DocumentError):
        release_index.split_certificate_target(f"certificates/{path}")
