"""Assembles a bundle: the directory of ``fogline_protocol.release``, whole or not at all.

It is built in a hidden folder beside the target, verified by the same ``release.read`` that
hub and device use, and renamed into place. Whatever lies below the root's digest is
reproducible; certificates and timings lie beside it.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fogline_models import archive
from fogline_models.errors import BadInput
from fogline_protocol import documents, release
from fogline_protocol.release import Bundle, BundleDirectory, File
from fogline_protocol.tensors import Array

CARD = "README.md"
HOW_TO_MAKE_ONE = (
    "a bundle is the folder of a release that 'fogline-models build RECIPE', or 'fogline-models "
    "bundle MODEL', writes below OUT/bundles"
)


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into a bundle. ``root.files`` is left empty: it follows from the rest."""

    root: Bundle
    variants: Mapping[str, bytes]  # by variant name
    golden_inputs: Mapping[str, Array]  # {name: [n, ...]}
    golden_outputs: Mapping[str, Array]  # of the fp32 reference, never of a variant
    card: str
    extras: Mapping[str, bytes] = field(default_factory=dict)  # further files, by name


@contextlib.contextmanager
def assembled(target: Path, contents: Contents) -> Iterator[BundleDirectory]:
    """Yield the verified bundle, still unfinished, and put it at ``target`` when the block ends.

    The block adds what lies outside the digest: certificates and report. An older bundle at
    ``target`` is replaced; if the block raises, the target stays as it was.

    Raises:
        BadInput: what was given does not make a bundle, or the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BadInput(f"bundle: cannot write beside {target}: {error.strerror}") from None
    try:
        _write(unfinished, contents)
        yield release.read(unfinished)
        release.read(unfinished)  # the block must not have damaged it
        unfinished.chmod(0o755)  # mkdtemp made it private
        _replace(unfinished, target)
    except release.BundleRefused as refusal:
        title = f"{contents.root.model} {contents.root.version}"
        raise BadInput(f"bundle: {title}: {refusal}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read(path: Path, key: str = "") -> BundleDirectory:
    """Read and verify a bundle that a person named, as ``key`` of a recipe or an argument.

    Raises:
        BadInput: there is none, or it is not intact; says which and how one is made.
    """
    where = f"{key}: {path}" if key else str(path)
    if not (path / release.ROOT).is_file():
        inside = [
            file.parent
            for pattern in ("*", "*/*")
            for file in sorted(path.glob(f"{pattern}/{release.ROOT}"))
        ]
        meant = f"do you mean {inside[0]}?" if inside else HOW_TO_MAKE_ONE
        raise BadInput(f"{where} is no bundle, there is no {release.ROOT} in it: {meant}")
    try:
        return release.read(path)
    except release.BundleRefused as refusal:
        raise BadInput(f"{where} is not an intact bundle: {refusal}") from None


def model_card(head: Mapping[str, object], body: str) -> str:
    """Return a model card: the YAML head that Hugging Face reads, then Markdown.

    Every value is written as JSON, which is YAML as it stands.
    """
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    return "\n".join(["---", *lines, "---", "", body.strip(), ""])


def _write(folder: Path, contents: Contents) -> None:
    root = contents.root
    files: dict[str, bytes] = {
        **contents.extras,
        CARD: contents.card.encode(),
        root.self_test.path: archive.to_bytes(
            {f"input.{name}": array for name, array in contents.golden_inputs.items()}
            | {f"output.{name}": array for name, array in contents.golden_outputs.items()}
        ),
    }
    for variant in root.variants:
        files[variant.path] = contents.variants[variant.name]
    listed = {name: File(documents.sha256(data), len(data)) for name, data in files.items()}
    files[release.ROOT] = replace(root, files=listed).to_json()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _replace(new: Path, target: Path) -> None:
    """Put ``new`` where ``target`` is; a rename cannot replace a folder that is not empty."""
    if not target.exists():
        os.rename(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        os.rename(target, old / "bundle")
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old / "bundle", target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
