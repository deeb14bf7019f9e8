"""The index of a release: every file of its bundle with the digest of each block.

It is the one signed document a device needs before it fetches anything. The blocks give
resumption (verify what is here, ask for the rest), failure after the first bad block, copies
from older releases, and an end to endless data; the digest of the whole file addresses it.

    <model>/<release>/index.json                         TUF target of an index
    certificates/<model>/<release>/<certificate>.json    TUF target of a certificate
    /blobs/sha256/<sha256 of a file>                     where the hub serves the bytes (Range)
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from fogline_protocol import documents, release
from fogline_protocol.documents import DocumentError
from fogline_protocol.v1 import release_pb2 as pb

BLOCK_BYTES = 1 << 20  # 2 GB make 2,048 blocks and an index of 140 KB
MIN_BLOCK_BYTES = 1 << 12
MAX_BLOCK_BYTES = 1 << 24  # a reader holds one block in memory
MAX_FILES = 4096
MAX_CERTIFICATES = 16  # of one release that a device is told of at a time

_SHA256 = re.compile(r"[0-9a-f]{64}")
_INDEX_TARGET = re.compile(rf"({release.MODEL_NAME.pattern})/([1-9][0-9]{{0,15}})/index\.json")
_CERTIFICATE_TARGET = re.compile(
    rf"certificates/({release.MODEL_NAME.pattern})/([1-9][0-9]{{0,15}})/([0-9a-f]{{16}})\.json"
)


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """One file: its digest, its length, and the digest of each block."""

    sha256: str
    bytes: int
    blocks: tuple[str, ...]  # of ``block_bytes`` each, the last one may be shorter


@dataclass(frozen=True, slots=True)
class ReleaseIndex:
    """What a release consists of."""

    model: str
    release: int
    version: str
    bundle_sha256: str
    files: Mapping[str, IndexedFile]  # by path inside the bundle, ``bundle.json`` included
    block_bytes: int = BLOCK_BYTES

    def to_json(self) -> bytes:
        """Return the canonical document."""
        return documents.canonical(
            pb.ReleaseIndex(
                model=self.model,
                release=self.release,
                version=self.version,
                bundle_sha256=self.bundle_sha256,
                block_bytes=self.block_bytes,
                files={
                    name: pb.IndexedFile(sha256=file.sha256, bytes=file.bytes, blocks=file.blocks)
                    for name, file in self.files.items()
                },
            )
        )


class FileDigester:
    """Computes an ``IndexedFile`` from a stream, whatever the size of its pieces."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._whole = hashlib.sha256()
        self._block = hashlib.sha256()
        self._in_block = 0
        self._blocks: list[str] = []
        self._bytes = 0

    def update(self, data: bytes) -> None:
        """Take the next bytes of the file."""
        self._whole.update(data)
        self._bytes += len(data)
        view = memoryview(data)
        while view:
            part = view[: self._block_bytes - self._in_block]
            self._block.update(part)
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == self._block_bytes:
                self._close_block()

    def finish(self) -> IndexedFile:
        """Return what the file is, after its last byte."""
        if self._in_block:
            self._close_block()
        return IndexedFile(self._whole.hexdigest(), self._bytes, tuple(self._blocks))

    def _close_block(self) -> None:
        self._blocks.append(self._block.hexdigest())
        self._block = hashlib.sha256()
        self._in_block = 0


def parse(data: bytes) -> ReleaseIndex:
    """Read an index and check that it does not contradict itself.

    Raises:
        DocumentError: not an index, or one no release can have.
    """
    message = documents.parse(data, pb.ReleaseIndex(), "index")
    index = ReleaseIndex(
        model=message.model,
        release=message.release,
        version=message.version,
        bundle_sha256=message.bundle_sha256,
        block_bytes=message.block_bytes,
        files={
            name: IndexedFile(file.sha256, file.bytes, tuple(file.blocks))
            for name, file in message.files.items()
        },
    )
    problem = _contradiction(index)
    if problem is not None:
        raise DocumentError(f"index: {problem}")
    return index


def index_target(model: str, number: int) -> str:
    """Return the TUF target path of a release's index."""
    return f"{model}/{number}/index.json"


def certificate_target(model: str, number: int, certificate: str) -> str:
    """Return the TUF target path of a certificate issued for a release."""
    return f"certificates/{model}/{number}/{certificate}.json"


def split_index_target(path: str) -> tuple[str, int]:
    """Return model and release number of an index's target path.

    Raises:
        DocumentError: it is not the path of an index.
    """
    match = _INDEX_TARGET.fullmatch(path)
    if match is None:
        raise DocumentError(f"{path!r} is not the target of an index: MODEL/NUMBER/index.json")
    return match[1], int(match[2])


def split_certificate_target(path: str) -> tuple[str, int, str]:
    """Return model, release number and certificate id of a certificate's target path.

    Raises:
        DocumentError: it is not the path of a certificate.
    """
    match = _CERTIFICATE_TARGET.fullmatch(path)
    if match is None:
        raise DocumentError(
            f"{path!r} is not the target of a certificate: certificates/MODEL/NUMBER/ID.json"
        )
    return match[1], int(match[2]), match[3]


def _contradiction(index: ReleaseIndex) -> str | None:
    if not release.MODEL_NAME.fullmatch(index.model):
        return f"model name {index.model!r} must be lower-case letters, digits, '_' and '-'"
    if index.release < 1:
        return "releases are numbered from 1"
    if not release.SEMANTIC_VERSION.fullmatch(index.version):
        return f"version {index.version!r} is not a semantic version"
    if not MIN_BLOCK_BYTES <= index.block_bytes <= MAX_BLOCK_BYTES:
        return f"blocks of {index.block_bytes} bytes, {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES} are accepted"
    if not 1 <= len(index.files) <= MAX_FILES:
        return f"{len(index.files)} files, 1 to {MAX_FILES} are accepted"
    root = index.files.get(release.ROOT)
    if root is None or root.sha256 != index.bundle_sha256:
        return f"{release.ROOT} is missing or is not the bundle that the index names"
    for name, file in index.files.items():
        parts = PurePosixPath(name).parts
        if not parts or name != "/".join(parts) or name.startswith("/") or ".." in parts:
            return f"file name {name!r} is not a plain path inside the bundle"
        if "\\" in name or "\0" in name or any(len(part.encode()) > 200 for part in parts):
            return f"file name {name!r} cannot exist on every device"
        if any(str(parent) in index.files for parent in PurePosixPath(name).parents):
            return f"file {name!r} lies inside another file"
        blocks = -(-file.bytes // index.block_bytes)
        if len(file.blocks) != blocks:
            return (
                f"file {name!r}: {file.bytes} bytes are {blocks} blocks, {len(file.blocks)} listed"
            )
        if not all(_SHA256.fullmatch(digest) for digest in (file.sha256, *file.blocks)):
            return f"file {name!r} has a digest that is not a SHA-256"
        if blocks == 1 and file.blocks[0] != file.sha256:
            return f"file {name!r} is one block, yet block and file have different digests"
    return None
