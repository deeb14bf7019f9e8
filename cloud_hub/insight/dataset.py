"""Makes a data set of exported examples: npz, which the workshop reads, or parquet.

    input.<name>              [n, ...]   what was asked
    edge_<output>             [n, ...]   the edge's answer: the output that is scored
    hub_<output>              [n, ...]   the hub's: every output, what distillation learns from
    edge_label, label         [n]        the top answers of the two; of models that answer for every
                                         token [n, tokens], -100 where attention_mask is 0
    edge_score                [n]        how sure the edge was
    propensity, reason        [n]        how probable it was that the hub was asked, and why it was
    device, source, scene     [n]        who sent it; one scene per named source, else per example
    time, count               [n]        when it came last, and how often in this way
    edge_release, edge_sha256, hub_model, hub_sha256, sha256    who answered; the input's digest
    sampling                             how the examples were chosen, in words

Columns grow in files beside the data set and are joined at the end, so memory does not grow with
it; the data set appears under its name when it is whole.
"""

import abc
import contextlib
import io
import math
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np

from cloud_hub.errors import HubError
from cloud_hub.insight.example_codec import Example
from fogline_protocol import tensors
from fogline_protocol.answers import ATTENTION_MASK, NO_LABEL
from fogline_protocol.tensors import BYTES, Array

CHUNK_BYTES = 1 << 20
GROUP_ROWS = 1024  # of a parquet file; with large inputs fewer
GROUP_BYTES = 32 << 20


class DatasetRefused(HubError):
    """The examples do not make one data set, or it cannot be written: the message says why."""

    exit_code = 8


class Dataset(Protocol):
    """A data set in the making: ``with`` it, ``add`` examples, then ``finish``."""

    table: "Table"

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None: ...

    def add(self, example: Example) -> None:
        """Add one; DatasetRefused if it differs in kind from those before."""
        ...

    def finish(self, sampling: str) -> int:
        """Give it its name, over an older one, and return how many examples are in it."""
        ...


class Table:
    """Turns examples into rows of equal kind: by column an array or a text."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._kinds: dict[str, tuple[Any, ...]] = {}
        self._scenes: dict[tuple[str, str], int] = {}
        self._next_scene = 0

    def row(self, example: Example) -> Mapping[str, Array | str]:
        """Return one row.

        Raises:
            DatasetRefused: it has other columns, or a column of another kind, than those before.
        """
        facts = example.facts
        row: dict[str, Array | str] = {
            "edge_score": np.array(facts.score, np.float32),
            "propensity": np.array(facts.propensity),
            "reason": facts.reason,
            "device": facts.device,
            "source": facts.source,
            "scene": np.array(self._scene(facts.device, facts.source), np.int64),
            "time": np.array(facts.at),
            "count": np.array(facts.count, np.int64),
            "edge_release": facts.release,
            "edge_sha256": facts.edge_sha256,
            "hub_model": facts.hub_model,
            "hub_sha256": facts.hub_sha256,
            "sha256": facts.sha256,
        }
        for name, scored in example.edge.items():
            mask = example.inputs.get(ATTENTION_MASK)
            row |= _top("edge_label", scored, mask)
            row |= _top("label", example.hub.get(name), mask)
        # A model's own output called "label" is one, and wins.
        row |= {f"edge_{name}": array for name, array in example.edge.items()}
        row |= {f"hub_{name}": array for name, array in example.hub.items()}
        row |= {f"input.{name}": array for name, array in example.inputs.items()}
        kinds = {
            name: () if isinstance(value, str) else (value.dtype, value.shape)
            for name, value in row.items()
        }
        if not self._kinds:
            self._kinds = kinds
        elif kinds != self._kinds:
            odd = sorted(
                name
                for name in kinds.keys() | self._kinds.keys()
                if kinds.get(name) != self._kinds.get(name)
            )
            raise DatasetRefused(
                f"{odd[0]} is {_kind(kinds.get(odd[0]))} where release {facts.release} and hub model "
                f"{facts.hub_sha256[:12] or facts.hub_model} answered, and "
                f"{_kind(self._kinds.get(odd[0]))} before: the models changed in between, so choose "
                "a time before or after with --since and --until"
            )
        self.reasons[facts.reason] += 1
        return row

    def _scene(self, device: str, source: str) -> int:
        known = self._scenes.get((device, source)) if source else None
        if known is not None:
            return known
        scene = self._next_scene
        self._next_scene += 1
        if source:
            self._scenes[device, source] = scene
        return scene


def sampling(model: str, reasons: Mapping[str, int]) -> str:
    """Return how examples were chosen, for whoever is tempted to take them for all requests."""
    told = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
    return (
        f"requests of {model} that the hub answered and devices let it keep, by reason: {told}. "
        "Not a uniform sample: only rows with propensity < 1 (audits) speak for all requests, each "
        "weighing count / propensity"
    )


class NpzDataset:
    """A data set as npz: ``numpy.load`` reads it without pickle."""

    def __init__(self, path: Path) -> None:
        """Make ``path`` in the end."""
        self.table = Table()
        self._path = path
        self._rows = 0
        self._columns: dict[str, _Column] = {}

    def __enter__(self) -> Self:
        """Open a folder for the columns beside the data set."""
        with _writing(self._path):
            self._folder = Path(
                tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=self._path.parent)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Leave nothing but the data set."""
        for column in self._columns.values():
            column.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, example: Example) -> None:
        """Add one.

        Raises:
            DatasetRefused: it differs in kind from those before, or the disk is full.
        """
        row = self.table.row(example)
        with _writing(self._path):
            if not self._columns:
                for number, (name, value) in enumerate(row.items()):
                    file = (self._folder / str(number)).open("w+b")
                    self._columns[name] = _column(name, value, file)
            for name, value in row.items():
                self._columns[name].add(value)
        self._rows += 1

    def finish(self, sampling: str) -> int:
        """Give it its name, over an older one, and return how many examples are in it.

        Raises:
            DatasetRefused: the disk is full; nothing remains of the attempt.
        """
        partial = self._folder / "whole"
        with _writing(self._path):
            with zipfile.ZipFile(partial, "w") as archive:
                for name in sorted(self._columns):
                    column = self._columns[name]
                    with archive.open(_entry(name, column), "w", force_zip64=True) as entry:
                        dtype, shape = column.kind()
                        header = {
                            "descr": np.lib.format.dtype_to_descr(dtype),
                            "fortran_order": False,
                            "shape": (self._rows, *shape),
                        }
                        np.lib.format.write_array_header_2_0(entry, header)
                        for chunk in column.chunks():
                            entry.write(chunk)
                text = io.BytesIO()
                np.lib.format.write_array(text, np.array(sampling), allow_pickle=False)
                archive.writestr(_entry("sampling"), text.getvalue())
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self._path)
        return self._rows


class ParquetDataset:
    """A data set as parquet: tensors as fixed-shape tensors, ``sampling`` in the file's metadata."""

    def __init__(self, path: Path) -> None:
        """Make ``path`` in the end.

        Raises:
            DatasetRefused: pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise DatasetRefused(
                "parquet needs pyarrow, which is not installed: pip install 'fogline[parquet]', or "
                "choose --format npz, which needs nothing"
            ) from None
        self.table = Table()
        self._arrow: Any = pyarrow
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._writer: Any = None
        self._pending: list[Mapping[str, Array | str]] = []
        self._pending_bytes = 0
        self._rows = 0

    def __enter__(self) -> Self:
        """Do nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Leave nothing but the data set."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._partial.unlink(missing_ok=True)

    def add(self, example: Example) -> None:
        """Add one.

        Raises:
            DatasetRefused: it differs in kind from those before, or the disk is full.
        """
        row = self.table.row(example)
        self._pending.append(row)
        self._pending_bytes += sum(len(v) if isinstance(v, str) else v.nbytes for v in row.values())
        self._rows += 1
        if len(self._pending) >= GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
            self._flush()

    def finish(self, sampling: str) -> int:
        """Give it its name, over an older one, and return how many examples are in it.

        Raises:
            DatasetRefused: the disk is full; nothing remains of the attempt.
        """
        self._flush()
        with _writing(self._path):
            self._writer.add_key_value_metadata({"sampling": sampling})
            self._writer.close()
            self._writer = None
            os.replace(self._partial, self._path)
        return self._rows

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = {
            name: self._array(name, [row[name] for row in self._pending])
            for name in sorted(self._pending[0])
        }
        table = self._arrow.table(columns)
        with _writing(self._path):
            if self._writer is None:
                self._writer = self._arrow.parquet.ParquetWriter(self._partial, table.schema)
            self._writer.write_table(table)
        self._pending, self._pending_bytes = [], 0

    def _array(self, name: str, values: list[Any]) -> Any:
        arrow = self._arrow
        if isinstance(values[0], str):
            return arrow.array(values, arrow.string())
        first = values[0]
        if first.dtype == BYTES:
            if first.size == 1:
                return arrow.array([value.item() for value in values], arrow.binary())
            return arrow.array([list(v.flat) for v in values], arrow.list_(arrow.binary()))
        if first.dtype.kind == "V":
            raise DatasetRefused(f"{name} is BF16, which parquet does not have: use --format npz")
        stacked = np.ascontiguousarray(np.stack(values))
        if stacked.dtype == bool and stacked.ndim > 1:
            stacked = stacked.view(np.uint8)  # a tensor of bits is none
        if stacked.ndim == 1:
            return arrow.array(stacked)
        return arrow.FixedShapeTensorArray.from_numpy_ndarray(stacked)


FORMATS: Mapping[str, Callable[[Path], Dataset]] = {"npz": NpzDataset, "parquet": ParquetDataset}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise DatasetRefused(
            f"{path} cannot be written: {error.strerror or error}; nothing of it remains"
        ) from None


class _Column(abc.ABC):
    """One column in its file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk has no room for what is buffered, either
            self.file.close()

    @abc.abstractmethod
    def add(self, value: Any) -> None: ...

    @abc.abstractmethod
    def kind(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Return the dtype, and the shape of one row."""

    def chunks(self) -> Iterator[bytes]:
        self.file.flush()
        self.file.seek(0)
        while chunk := self.file.read(CHUNK_BYTES):
            yield chunk


class _Numbers(_Column):
    def __init__(self, file: IO[bytes], first: Array) -> None:
        super().__init__(file)
        self._kind = (first.dtype, first.shape)

    def add(self, value: Any) -> None:
        self.file.write(value.tobytes())

    def kind(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        return self._kind


class _Texts(_Column):
    """Texts that come again and again: a number each, and every text once."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._numbers: dict[str, int] = {}

    def add(self, value: Any) -> None:
        self.file.write(np.uint32(self._numbers.setdefault(value, len(self._numbers))).tobytes())

    def kind(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        return np.dtype(f"<U{max(1, *map(len, self._numbers))}"), ()

    def chunks(self) -> Iterator[bytes]:
        texts = np.array(list(self._numbers), self.kind()[0])
        rows = max(1, CHUNK_BYTES // texts.itemsize)
        self.file.seek(0)
        while chunk := self.file.read(4 * rows):
            yield texts[np.frombuffer(chunk, np.uint32)].tobytes()


class _Bytes(_Column):
    """BYTES elements of any length, in the end as long as the longest."""

    def __init__(self, name: str, file: IO[bytes], first: Array) -> None:
        super().__init__(file)
        self._name = name
        self._shape = first.shape
        self._longest = 1

    def add(self, value: Any) -> None:
        for element in value.flat:
            if element.endswith(b"\0"):
                raise DatasetRefused(
                    f"{self._name} has an element that ends with a zero byte, which npz cannot "
                    "tell from padding: use --format parquet"
                )
            self.file.write(len(element).to_bytes(4, "little") + element)
            self._longest = max(self._longest, len(element))

    def kind(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        return np.dtype(f"S{self._longest}"), self._shape

    def chunks(self) -> Iterator[bytes]:
        self.file.seek(0)
        while head := self.file.read(4):
            yield self.file.read(int.from_bytes(head, "little")).ljust(self._longest, b"\0")


def _entry(name: str, column: _Column | None = None) -> zipfile.ZipInfo:
    """Return the entry of an array: of no time, so that equal data sets are equal files."""
    entry = zipfile.ZipInfo(f"{name}.npy")
    entry.create_system = 3  # Unix, wherever this runs
    if isinstance(column, _Texts):  # mostly padding and repetition
        entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _column(name: str, value: Array | str, file: IO[bytes]) -> _Column:
    if isinstance(value, str):
        return _Texts(file)
    if value.dtype == BYTES:
        return _Bytes(name, file, value)
    return _Numbers(file, value)


def _top(name: str, logits: Array | None, mask: Array | None) -> dict[str, Array | str]:
    """Return the index of the top answer as a column; none where there is nothing to rank.

    Classes lie along the last axis. Where several rows of them are one example's, each is ranked:
    they are a token's each, and no answer where the mask, if it is theirs, does not count them.
    """
    if logits is None or logits.dtype.kind not in "fiu" or not logits.size:
        return {}
    tokens = logits.shape[:-1]
    counted = mask is not None and bool(tokens) and mask.shape == tokens
    if not counted and math.prod(tokens) == 1:
        return {name: np.array(logits.argmax(), np.int64)}
    top = logits.argmax(axis=-1).astype(np.int64)
    return {name: np.where(mask != 0, top, NO_LABEL) if counted else top}


def _kind(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "absent"
    if not kind:
        return "a text"
    dtype, shape = kind
    return f"{tensors.DATATYPES[dtype]}[{','.join(map(str, shape))}]"
