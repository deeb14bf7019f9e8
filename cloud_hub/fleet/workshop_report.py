"""What the workshop says of a bundle, kept beside its release: ``report.json``, ``report.html``.

Both lie outside the bundle's digest, so nobody vouches for them, and they are for people only:
a release is accepted whatever they hold. What cannot be kept is left out, with a sentence.

    the release's row               report.json as it came
    DATA/reports/<sha256>.html      report.html, under the digest of the bundle it speaks of

The page is written before the row, as blobs are: a row never lacks a page that came with it,
and a page without a row is harmless.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_hub.fleet.artifacts import SHA256, Disk, replace_file

DOCUMENT = "report.json"
PAGE = "report.html"
MAX_DOCUMENT_BYTES = 1 << 20
MAX_PAGE_BYTES = 4 << 20  # the workshop draws in SVG: 100 kB with every plot


@dataclass(frozen=True, slots=True)
class WorkshopReport:
    """What lay beside a bundle and can be kept."""

    document: str  # a JSON object, or empty
    page: bytes  # HTML, or empty
    notes: tuple[str, ...]  # what was left out, for whoever sent it


class ReportPages:
    """The pages below ``DATA/reports``. Whoever writes the releases writes them."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._directory = directory
        self._disk = disk or Disk()

    def path(self, bundle_sha256: str) -> Path:
        """Return where the page of a bundle lies or would lie."""
        if not SHA256.fullmatch(bundle_sha256):
            raise ValueError(f"{bundle_sha256!r} is not a SHA-256")
        return self._directory / f"{bundle_sha256}.html"

    def keep(self, bundle_sha256: str, page: bytes) -> None:
        """Keep a page, durably, in place of one that may be there.

        Raises:
            OSError: the disk is full or fails; what was there is still there.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        replace_file(self._disk, self.path(bundle_sha256), page)
        self._disk.sync(self._directory)

    def read(self, bundle_sha256: str) -> bytes:
        """Return the page of a bundle; nothing if there is none, or it cannot be read."""
        try:
            return self.path(bundle_sha256).read_bytes()
        except OSError:
            return b""


def read(directory: Path) -> WorkshopReport:
    """Return what lies beside the bundle in ``directory``; it may hold anything."""
    notes: list[str] = []
    text = _bounded(directory / DOCUMENT, MAX_DOCUMENT_BYTES, notes)
    document = ""
    if text:
        try:
            document = _document(text)
        except (ValueError, RecursionError) as error:
            notes.append(f"{DOCUMENT} was left out: it is no JSON object ({error!s:.120})")
    page = _bounded(directory / PAGE, MAX_PAGE_BYTES, notes)
    if page:
        try:
            page.decode()
        except UnicodeDecodeError:
            notes.append(f"{PAGE} was left out: it is not UTF-8")
            page = b""
    return WorkshopReport(document, page, tuple(notes))


def parse(document: str) -> Mapping[str, Any]:
    """Return a kept document; empty if there is none."""
    return json.loads(document) if document else {}


def _bounded(path: Path, limit: int, notes: list[str]) -> bytes:
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            notes.append(f"{path.name} was left out: it is not a regular file")
            return b""
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        notes.append(f"{path.name} was left out: {error.strerror or error}")
        return b""
    if len(data) > limit:
        notes.append(f"{path.name} was left out: it is larger than {limit >> 20} MiB")
        return b""
    return data


def _document(data: bytes) -> str:
    text = data.decode()
    found = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}")
    return text


def _refuse(name: str) -> float:
    raise ValueError(f"JSON has no {name}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:20])
