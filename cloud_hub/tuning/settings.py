"""The model that is tuned: where it lies, what it takes, and what its settings say afterwards.

A model of a directory has a folder with a ``config.pbtxt``, which the hub obeys. A mere ONNX file
has none, so its choice can only be printed.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloud_hub.engines.engine import Arrays, Contract
from cloud_hub.errors import ConfigRefused, ModelRefused
from cloud_hub.inference import directory, warmup
from cloud_hub.inference.directory import ModelFiles
from fogline_protocol import model_config, tensors
from fogline_protocol.model_config import ConfigError, ModelConfig, Tuning, Wanted
from fogline_protocol.tensors import Array

BACKUP = directory.CONFIG + ".bak"


@dataclass(frozen=True, slots=True)
class Written:
    """Where a choice was written."""

    config: Path
    backup: Path | None  # the file that was there; None: there was none


@dataclass(frozen=True, slots=True)
class Target:
    """A model to tune."""

    name: str
    file: Path  # the ONNX file
    files: ModelFiles | None  # of its folder; None: it is a file alone

    @classmethod
    def find(cls, model: str, models: Path | None) -> "Target":
        """Return the model that is meant by a name in ``models``, or by a path without.

        Raises:
            ConfigRefused: it is neither.
            ModelRefused: its folder cannot be served, or its settings could not be rewritten.
        """
        if models is None:
            if not Path(model).is_file():
                raise ConfigRefused(
                    f"{model!r} is no ONNX file: name one, or a model of --models DIR"
                )
            return cls(Path(model).stem, Path(model), None)
        try:
            found = directory.folders(models)
        except OSError as error:
            raise ConfigRefused(f"--models {models}: {error.strerror}") from None
        if model not in found:
            raise ConfigRefused(f"{models} has no model {model!r}, it has {list(found)}")
        files = directory.read(found[model])
        if files.wanted.backend == model_config.UPSTREAM:
            raise ModelRefused(f"another server runs {model!r}: tune it there")
        return cls(model, files.versions[-1][1], files)

    @property
    def wanted(self) -> Wanted:
        """What its settings say now."""
        return Wanted() if self.files is None else self.files.wanted

    @property
    def config(self) -> Path | None:
        """Where its settings are kept."""
        return None if self.files is None else self.files.folder / directory.CONFIG

    def served(self, contract: Contract, largest_batch: int) -> ModelConfig:
        """Return how it is served now.

        Raises:
            ModelRefused: its settings contradict its graph.
        """
        try:
            return self.wanted.completed(
                self.name, contract.inputs, contract.outputs, largest_batch
            )
        except ConfigError as error:
            raise ModelRefused(f"{self.config}: {error}") from None

    def sample(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Return one row of every input: ``[1, ...]``; the whole tensor of a model without rows.

        The first warm-up request gives the values where there is one, else they are zeros.

        Args:
            config: how it is served.
            shapes: by input, without the batch dimension, for those with free dimensions.

        Raises:
            ConfigRefused: a shape is missing, or is not one of this input.
            ModelRefused: the warm-up request does not suit the model.
        """
        strange = sorted(shapes.keys() - {spec.name for spec in config.inputs})
        if strange:
            raise ConfigRefused(
                f"--shape names {strange}, the inputs are {[spec.name for spec in config.inputs]}"
            )
        if self.files is not None and self.wanted.warm_ups and not shapes:
            warm_ups = warmup.requests(self.wanted.warm_ups[:1], config, self.files.warm_up_data)
            _, arrays = next(iter(warm_ups))
            rows = 1 if config.batches else None
            return {name: array[:rows] for name, array in arrays.items()}
        skip = 1 if config.batches else 0
        found = {}
        for spec in config.inputs:
            dims = spec.shape[skip:]
            given = shapes.get(spec.name, dims)
            fits = len(given) == len(dims) and all(
                have in (-1, size) for size, have in zip(given, dims, strict=True)
            )
            if not fits or -1 in given:
                example = "x".join(str(224 if dim == -1 else dim) for dim in dims) or "1"
                where = " after the batch dimension" if skip else ""
                raise ConfigRefused(
                    f"input {spec.name!r} is {spec.datatype} {list(dims)}{where}"
                    + (f", --shape says {list(given)}" if spec.name in shapes else "")
                    + f": say which sizes to measure, e.g. --shape {spec.name}={example}"
                )
            found[spec.name] = _zeros(spec.datatype, (1,) * skip + tuple(given))
        return found

    def rewritten(self, tuning: Tuning) -> str:
        """Return its ``config.pbtxt`` as it would say ``tuning``.

        Raises:
            ModelRefused: what it says besides would be lost, or contradicts ``tuning``.
        """
        text = ""
        try:
            if self.config is not None and self.config.exists():
                text = self.config.read_text(encoding="utf-8")  # as it is now: time has passed
            return model_config.tuned(text, tuning)
        except (OSError, UnicodeDecodeError) as error:
            raise ModelRefused(f"{self.config} cannot be read: {error}") from None
        except ConfigError as error:
            raise ModelRefused(
                f"{self.config}: {error}. With --dry-run the choice is only printed"
            ) from None

    def check_rewritable(self) -> None:
        """Refuse a model whose choice could not be written, before time is spent on it.

        Raises:
            ModelRefused: see ``rewritten`` and ``write``.
        """
        if self.config is None:
            return
        self.rewritten(Tuning(None, self.wanted.instances, None, ()))
        if not os.access(self.config.parent, os.W_OK | os.X_OK):
            raise ModelRefused(
                f"{self.config.parent} cannot be written: see to its rights, or say --dry-run"
            )

    def write(self, text: str) -> Written:
        """Put ``text`` in the place of its ``config.pbtxt`` in one step.

        Raises:
            ModelRefused: the folder cannot be written.
        """
        assert self.config is not None
        backup = self.config.with_name(BACKUP)
        try:
            was_there = self.config.exists()
            if was_there:
                _replace(backup, self.config.read_bytes(), self.config)
            _replace(self.config, text.encode(), self.config if was_there else None)
        except OSError as error:
            raise ModelRefused(f"{self.config} cannot be written: {error.strerror}") from None
        return Written(self.config, backup if was_there else None)


def shape_option(text: str) -> tuple[str, tuple[int, ...]]:
    """Return name and sizes of ``NAME=3x224x224``.

    Raises:
        ConfigRefused: it is something else.
    """
    name, equals, sizes = text.rpartition("=")
    parts = sizes.split("x")
    if not (name and equals and all(p.isascii() and p.isdecimal() and int(p) for p in parts)):
        raise ConfigRefused(f"--shape {text!r} is not NAME=3x224x224: sizes without the batch")
    return name, tuple(int(part) for part in parts)


def rows(sample: Arrays, batch: int) -> Arrays:
    """Return a batch of the same row over and over: ``[1, ...] -> [batch, ...]``."""
    return {name: np.repeat(array, batch, axis=0) for name, array in sample.items()}


def _zeros(datatype: str, shape: tuple[int, ...]) -> Array:
    dtype = tensors.dtype_of(datatype)
    if dtype == tensors.BYTES:
        return np.full(shape, b"", dtype=object)
    return np.zeros(shape, dtype)


def _replace(path: Path, data: bytes, like: Path | None) -> None:
    """Write in one step: a hub that polls sees the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if like is None:
            os.chmod(name, 0o644)  # mkstemp's is for its owner alone; the hub may be another user
        else:
            shutil.copymode(like, name)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
