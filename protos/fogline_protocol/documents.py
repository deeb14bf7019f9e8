"""Canonical JSON of the protocol's documents, and digests over it.

A document is one protobuf message in protobuf's JSON mapping, keys sorted, no white space.
The order of work is always the same: verify the bytes received, then parse them; nothing is
ever serialised again to check a digest or a signature.
"""

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

MAX_DOCUMENT_BYTES = 4 << 20  # documents are a few kilobytes; a bundle.json of 4 MiB is an attack


class DocumentError(ValueError):
    """Bytes that are not the document they should be."""


def canonical(message: Message) -> bytes:
    """Return the one byte string that stands for ``message``."""
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse(data: bytes, into: M, what: str) -> M:
    """Fill ``into`` from canonical JSON and return it.

    Raises:
        DocumentError: not JSON, an unknown or mistyped field, or larger than any real document.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentError(f"{what}: {len(data)} bytes, at most {MAX_DOCUMENT_BYTES} are accepted")
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict):  # an empty list would pass for an empty message
            raise DocumentError(f"{what}: expected a JSON object")
        return json_format.ParseDict(fields, into)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"{what}: {error}") from None


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
