"""Reads a Triton-style directory: which models lie in it, and what their folders say.

    NAME/config.pbtxt      optional; what it leaves out follows from the graph
    NAME/1/model.onnx      versions are decimal integers
    NAME/labels.txt        where the configuration names one
    NAME/warmup/data       raw tensors of warm-up requests, where it names them

A model that another server runs has a configuration and no version.

Nothing a folder says leads out of the directory: links and names that do are refused.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.errors import ModelRefused
from fogline_protocol import model_config
from fogline_protocol.model_config import ConfigError, Wanted
from fogline_protocol.release import MODEL_NAME

CONFIG = "config.pbtxt"
WARM_UP = "warmup"
MAX_CONFIG_BYTES = 1 << 20  # of a config.pbtxt or a file of labels
MAX_WARM_UP_BYTES = 256 << 20  # of one raw tensor


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the folder of one model says."""

    folder: Path
    wanted: Wanted
    versions: Sequence[tuple[str, Path]]  # those to serve, ascending, with their ONNX files
    labels: Mapping[str, Sequence[str]]  # by output

    def warm_up_data(self, name: str) -> bytes:
        """Return the raw tensor of a warm-up request.

        Raises:
            ModelRefused: it cannot be read, or lies elsewhere.
        """
        return _read(self.folder, Path(WARM_UP, name), MAX_WARM_UP_BYTES)

    def inside(self, name: str) -> Path:
        """Return a file that the configuration names.

        Raises:
            ModelRefused: it lies elsewhere.
        """
        _held_inside(self.folder, self.folder / name)
        return self.folder / name


def folders(root: Path) -> Mapping[str, Path]:
    """Return the folders of all models, by name."""
    found = (e for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))
    return {folder.name: folder for folder in sorted(found)}


def fingerprint(folder: Path) -> Hashable:
    """Return a value that changes whenever a file of the model does."""
    found: list[tuple[str, tuple[int, int, int] | None]] = []
    for path in sorted(folder.rglob("*")):
        try:
            status = path.stat()
        except OSError:  # it went, or a link leads nowhere: reading it will say so
            found.append((str(path), None))
        else:
            found.append((str(path), (status.st_ino, status.st_size, status.st_mtime_ns)))
    return tuple(found)


def read(folder: Path) -> ModelFiles:
    """Return what a model's folder says.

    Raises:
        ModelRefused: it cannot be obeyed; the text names the file and what is wrong with it.
    """
    if not MODEL_NAME.fullmatch(folder.name):
        raise ModelRefused(
            f"{folder.name!r} is no model name: use lower-case letters, digits, '_', '-'"
        )
    wanted = Wanted()
    if (folder / CONFIG).exists():
        try:
            wanted = model_config.parse_pbtxt(_text(folder, CONFIG))
        except ConfigError as error:
            raise ModelRefused(f"{folder}: {error}") from None
    if wanted.backend == model_config.UPSTREAM:
        return ModelFiles(folder, wanted, (), _labels(folder, wanted))
    there = [
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isdecimal() and str(int(entry.name)) == entry.name
    ]
    if not there:
        raise ModelRefused(
            f"{folder} has no version folder: expected e.g. {folder.name}/1/model.onnx"
        )
    chosen = wanted.versions.choose(there)
    if not chosen:
        raise ModelRefused(
            f"{folder}: the version policy asks for {list(wanted.versions.specific)}, there are "
            f"{sorted(there)}"
        )
    versions = [(str(version), folder / str(version) / "model.onnx") for version in chosen]
    for _, file in versions:
        if not file.is_file():
            raise ModelRefused(f"{file} is missing")
        _held_inside(folder, file)
    return ModelFiles(folder, wanted, versions, _labels(folder, wanted))


def _labels(folder: Path, wanted: Wanted) -> Mapping[str, Sequence[str]]:
    return {output: _text(folder, name).splitlines() for output, name in wanted.label_files.items()}


def _text(folder: Path, name: str) -> str:
    try:
        return _read(folder, Path(name), MAX_CONFIG_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ModelRefused(f"{folder / name} is not UTF-8 text: {error}") from None


def _read(folder: Path, name: Path, limit: int) -> bytes:
    file = folder / name
    _held_inside(folder, file)
    try:
        with file.open("rb") as opened:
            data = opened.read(limit + 1)
    except OSError as error:
        raise ModelRefused(f"{file}: {error.strerror}") from None
    if len(data) > limit:
        raise ModelRefused(f"{file} is larger than {limit} bytes")
    return data


def _held_inside(folder: Path, file: Path) -> None:
    root = folder.parent
    try:
        inside = file.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in a name
        raise ModelRefused(f"{str(file)!r} cannot be found: {error}") from None
    if not inside:
        raise ModelRefused(f"{file} is a link that leaves {root}")
