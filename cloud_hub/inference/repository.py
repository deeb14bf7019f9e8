"""Which models the hub serves, and from which files.

A Triton-style directory, read once at start: ``name/1/model.onnx``, versions are decimal
integers, the highest one is served. A model that cannot be loaded says why and does not stop
the others; the hub is ready only when none failed.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.engines.onnx_runtime import OnnxRuntimeEngine
from cloud_hub.errors import ModelRefused
from cloud_hub.inference.batcher import Batcher
from cloud_hub.metrics import Metrics
from fogline_protocol import documents
from fogline_protocol.inference import NotFound, Unavailable
from fogline_protocol.release import MODEL_NAME

log = logging.getLogger("fogline.repository")


@dataclass(slots=True)
class ServedModel:
    """One version of one model: its engine, its batcher, and the task that runs batches."""

    name: str
    version: str
    sha256: str  # of the ONNX file
    engine: OnnxRuntimeEngine
    batcher: Batcher
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What the console and readiness tell of a model."""

    name: str
    version: str
    state: str  # READY or UNAVAILABLE, Triton's words
    reason: str
    provider: str = ""


@dataclass(slots=True)
class Limits:
    """What every model of the repository is held to."""

    max_batch: int = 64
    max_queue_rows: int = 1024
    threads: int = 0


class Repository:
    """The models being served. Owner of their tasks; used on one event loop."""

    def __init__(self, metrics: Metrics, limits: Limits) -> None:
        self._metrics = metrics
        self._limits = limits
        self._models: dict[str, ServedModel] = {}
        self._refused: dict[str, ModelStatus] = {}

    async def load_directory(self, root: Path) -> None:
        """Serve every model below ``root``; those that cannot be are kept with their reason."""
        for folder in await asyncio.to_thread(_model_folders, root):
            version = ""
            try:
                if not MODEL_NAME.fullmatch(folder.name):
                    raise ModelRefused(
                        f"{folder.name!r} is no model name: use lower-case letters, digits, '_', '-'"
                    )
                version, file = _latest(root, folder)
                await self.load(folder.name, version, file)
            except ModelRefused as error:
                log.error("model %s is not served: %s", folder.name, error)
                self._refused[folder.name] = ModelStatus(
                    folder.name, version, "UNAVAILABLE", str(error)
                )

    async def load(self, name: str, version: str, file: Path) -> None:
        """Load and warm one model, then let it serve.

        Raises:
            ModelRefused: it cannot be loaded; what was served before still is.
        """
        engine, sha256 = await asyncio.to_thread(self._open, file)
        batcher = Batcher(
            engine,
            batches=engine.batches,
            max_batch=self._limits.max_batch,
            max_queue_rows=self._limits.max_queue_rows,
            observer=self._metrics.of_model(name, version),
        )
        task = asyncio.create_task(batcher.serve(), name=f"batcher-{name}")
        self._models[name] = ServedModel(name, version, sha256, engine, batcher, task)
        self._refused.pop(name, None)

    def find(self, name: str, version: str = "") -> ServedModel:
        """Return the model that answers for ``name`` and ``version`` (empty: any).

        Raises:
            NotFound: there is none; the text names those there are.
            Unavailable: there should be one, but it could not be loaded.
        """
        model = self._models.get(name)
        if model is None:
            if name in self._refused:
                raise Unavailable(f"model {name!r} is not served: {self._refused[name].reason}")
            raise NotFound(f"unknown model {name!r}, served are {sorted(self._models)}")
        if version not in ("", model.version):
            raise NotFound(
                f"model {name!r} has no version {version!r}, served is {model.version!r}"
            )
        return model

    @property
    def ready(self) -> bool:
        """Whether every model that should be served is."""
        return not self._refused

    def status(self) -> list[ModelStatus]:
        """Return every model with its state, by name."""
        served = [
            ModelStatus(m.name, m.version, "READY", "", m.engine.provider)
            for m in self._models.values()
        ]
        return sorted([*served, *self._refused.values()], key=lambda status: status.name)

    async def close(self) -> None:
        """Stop every batcher and give the engines back."""
        for model in self._models.values():
            model.task.cancel()
        await asyncio.gather(
            *(model.task for model in self._models.values()), return_exceptions=True
        )
        for model in self._models.values():
            model.engine.close()
        self._models.clear()

    def _open(self, file: Path) -> tuple[OnnxRuntimeEngine, str]:
        return (
            OnnxRuntimeEngine(file, threads=self._limits.threads),
            documents.sha256_of_file(file),
        )


def _model_folders(root: Path) -> list[Path]:
    return sorted(e for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))


def _latest(root: Path, folder: Path) -> tuple[str, Path]:
    versions = [
        entry.name
        for entry in folder.iterdir()
        if entry.name.isdecimal() and str(int(entry.name)) == entry.name
    ]
    if not versions:
        raise ModelRefused(
            f"{folder} has no version folder: expected e.g. {folder.name}/1/model.onnx"
        )
    version = max(versions, key=int)
    file = folder / version / "model.onnx"
    if not file.is_file():
        raise ModelRefused(f"{file} is missing")
    if not file.resolve().is_relative_to(root.resolve()):
        raise ModelRefused(f"{file} is a link that leaves {root}")
    return version, file
