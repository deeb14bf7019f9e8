"""Which models the hub serves, and from which files.

A Triton-style directory: ``name/1/model.onnx`` and an optional ``name/config.pbtxt``; versions
are decimal integers, and the version policy of the configuration says which of them are served
(the highest one where it says nothing). A model that cannot be loaded says why and does not stop
the others; the hub is ready only when none failed.

A model that another server runs (``backend: "upstream"``) has no version folder. While that server
is down the model is one that cannot be loaded, and it is tried again until it can.

With control ``none`` everything is loaded at the start and nothing changes after it; with
``explicit`` nothing is loaded until a caller asks for it by name.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cloud_hub.engines.engine import Engine
from cloud_hub.engines.launch import Launcher
from cloud_hub.engines.upstream import Upstream, UpstreamDown, UpstreamEngine
from cloud_hub.errors import ModelRefused
from cloud_hub.inference.batcher import Batcher
from cloud_hub.metrics import Metrics
from fogline_protocol import documents, model_config
from fogline_protocol.inference import NotFound, Unavailable, Unsupported
from fogline_protocol.model_config import ConfigError, ModelConfig, Wanted
from fogline_protocol.release import MODEL_NAME
from fogline_protocol.repository import READY, UNAVAILABLE
from fogline_protocol.statistics import ModelStatistics

AWAIT_S = 0.25  # before an upstream that was down at the start is tried again; doubles
AWAIT_MAX_S = 10.0
MAX_CONFIG_BYTES = 1 << 20  # of a config.pbtxt or a file of labels

log = logging.getLogger("fogline.repository")

Control = Literal["none", "explicit"]


@dataclass(slots=True)
class ServedModel:
    """One version of one model: its engine, its batcher, and the task that runs batches."""

    name: str
    version: str
    sha256: str  # of the ONNX file; empty: there is none here, the engine knows what computes
    engine: Engine
    config: ModelConfig
    statistics: ModelStatistics
    batcher: Batcher
    task: asyncio.Task[None]

    @property
    def digest(self) -> str:
        """The SHA-256 of what computes, as far as is known before it has."""
        return self.sha256 or self.engine.digest

    async def retire(self) -> None:
        """Finish what is waiting, then give the engine back."""
        await self.batcher.drain()
        await self.stop()

    async def stop(self) -> None:
        """Tell what is waiting that it will get no answer, and give the engine back."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.engine.close()


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


class Repository:
    """The models being served. Owner of their tasks; used on one event loop."""

    def __init__(
        self, metrics: Metrics, launcher: Launcher, limits: Limits, control: Control = "none"
    ) -> None:
        self._metrics = metrics
        self._launcher = launcher
        self._limits = limits
        self._control = control
        self._root: Path | None = None
        # By name; the versions of a model ascend, the last one answers who names none.
        self._models: dict[str, tuple[ServedModel, ...]] = {}
        self._refused: dict[str, ModelStatus] = {}
        self._unloaded: dict[str, ModelStatus] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._awaiting: set[asyncio.Task[None]] = set()  # for upstreams that are down
        self._changing = asyncio.Lock()  # one load or unload at a time

    async def load_directory(self, root: Path) -> None:
        """Serve every model below ``root``; those that cannot be are kept with their reason."""
        self._root = root
        for folder in await asyncio.to_thread(_model_folders, root):
            if self._control == "explicit":
                self._unloaded[folder.name] = ModelStatus(
                    folder.name, "", UNAVAILABLE, "not loaded"
                )
                continue
            try:
                await self._load(folder)
            except ModelRefused as error:
                log.error("model %s is not served: %s", folder.name, error)
                self._refused[folder.name] = ModelStatus(folder.name, "", UNAVAILABLE, str(error))
                if isinstance(error, UpstreamDown):
                    task = asyncio.create_task(
                        self._await_upstream(folder), name=f"await-{folder.name}"
                    )
                    self._awaiting.add(task)
                    task.add_done_callback(self._awaiting.discard)

    async def reload(self, name: str) -> None:
        """Serve a model of the directory from its files as they are now.

        The versions served before answer until the new ones are warm, and finish what they took.

        Raises:
            Unsupported: control is not explicit.
            NotFound: the directory has no such model.
            Unavailable: it cannot be loaded; what was served before still is.
        """
        root = self._explicit("load")
        async with self._changing:
            folders = await asyncio.to_thread(_model_folders, root)
            folder = next((f for f in folders if f.name == name), None)
            if folder is None:
                raise NotFound(
                    f"{name!r} is no model of the repository: {[f.name for f in folders]}"
                )
            try:
                await self._load(folder)
            except ModelRefused as error:
                if name not in self._models:
                    self._unloaded[name] = ModelStatus(name, "", UNAVAILABLE, str(error))
                raise Unavailable(f"model {name!r} cannot be loaded: {error}") from None
            self._unloaded.pop(name, None)

    async def unload(self, name: str) -> None:
        """Serve a model no longer, and return when its last request has its answer.

        Raises:
            Unsupported: control is not explicit.
            NotFound: it is not served.
        """
        self._explicit("unload")
        async with self._changing:
            versions = self._models.pop(name, None)
            if versions is None:
                raise NotFound(f"model {name!r} is not loaded, loaded are {sorted(self._models)}")
            self._unloaded[name] = ModelStatus(name, versions[-1].version, UNAVAILABLE, "unloaded")
            await asyncio.gather(*(model.retire() for model in versions))

    async def load(self, name: str, version: str, file: Path) -> None:
        """Load and warm one version of a model without a configuration, then let it serve alone.

        Raises:
            ModelRefused: it cannot be loaded; what was served before still is.
        """
        self._replace(name, (await self._open_model(name, version, file, Wanted()),))

    def find(self, name: str, version: str = "") -> ServedModel:
        """Return the model that answers for ``name`` and ``version`` (empty: the newest).

        Raises:
            NotFound: there is none; the text names those there are.
            Unavailable: there should be one, but it could not be loaded.
        """
        versions = self._models.get(name)
        if versions is None:
            if name in self._refused:
                raise Unavailable(f"model {name!r} is not served: {self._refused[name].reason}")
            raise NotFound(f"unknown model {name!r}, served are {sorted(self._models)}")
        if not version:
            return versions[-1]
        for model in versions:
            if model.version == version:
                return model
        raise NotFound(
            f"model {name!r} has no version {version!r}, served is "
            f"{', '.join(model.version for model in versions)}"
        )

    def find_all(self, name: str, version: str) -> Sequence[ServedModel]:
        """Return every served version of every model; of one model, or just one, if named.

        Raises:
            NotFound: what is named is not there.
            Unavailable: it should be there, but could not be loaded.
        """
        if name:
            found = self.find(name, version)
            return (found,) if version else self._models[name]
        return [model for versions in self._models.values() for model in versions]

    def versions(self, name: str) -> Sequence[str]:
        """Return the served versions of a model."""
        return [model.version for model in self._models.get(name, ())]

    @property
    def ready(self) -> bool:
        """Whether every model that should be served is."""
        return not self._refused

    @property
    def refused(self) -> Sequence[ModelStatus]:
        """The models that should be served and cannot be."""
        return list(self._refused.values())

    def status(self) -> list[ModelStatus]:
        """Return every model there is or should be, by name."""
        served = [
            ModelStatus(
                m.name,
                m.version,
                UNAVAILABLE if m.engine.trouble else READY,
                m.engine.trouble,
                m.engine.provider,
            )
            for m in self.find_all("", "")
        ]
        others = [*self._refused.values(), *self._unloaded.values()]
        return sorted([*served, *others], key=lambda status: status.name)

    async def close(self) -> None:
        """Stop every batcher and give the engines back."""
        for waiting in self._awaiting:
            waiting.cancel()
        await asyncio.gather(*self._awaiting, return_exceptions=True)
        models = self.find_all("", "")
        self._models.clear()
        await asyncio.gather(*(model.stop() for model in models))
        await asyncio.gather(*self._retiring, return_exceptions=True)

    def _explicit(self, verb: str) -> Path:
        if self._control != "explicit" or self._root is None:
            raise Unsupported(
                f"this hub does not {verb} models on request: start it with --models DIR "
                "--model-control explicit"
            )
        return self._root

    async def _load(self, folder: Path) -> None:
        name = folder.name
        if not MODEL_NAME.fullmatch(name):
            raise ModelRefused(
                f"{name!r} is no model name: use lower-case letters, digits, '_', '-'"
            )
        wanted, files = await asyncio.to_thread(_read, folder)
        if wanted.backend == model_config.UPSTREAM:
            self._replace(name, (await self._open_upstream(name, folder, wanted),))
            return
        opened: list[ServedModel] = []
        try:
            for version, file in files:
                opened.append(await self._open_model(name, version, file, wanted))
        except BaseException:
            await asyncio.gather(*(model.stop() for model in opened))
            raise
        self._replace(name, tuple(opened))

    async def _open_model(self, name: str, version: str, file: Path, wanted: Wanted) -> ServedModel:
        """Load one version and start its batcher."""
        engine = await self._launcher.open(file)
        try:
            sha256, config = await asyncio.to_thread(self._describe, name, file, wanted, engine)
        except BaseException:
            await engine.close()
            raise
        if wanted.instances > 1 or wanted.max_queue_delay_us or wanted.preferred_batch_sizes:
            log.info(
                "model %s: instance counts, queue delays and preferred sizes are not obeyed; one "
                "engine takes what is queued whenever it is free",
                name,
            )
        return self._served(name, version, sha256, engine, config)

    async def _open_upstream(self, name: str, folder: Path, wanted: Wanted) -> ServedModel:
        """Find the server that runs a model and start its batcher.

        Raises:
            UpstreamDown: it does not answer for it; it may later.
            ModelRefused: the configuration cannot be obeyed.
        """
        try:
            upstream = Upstream.parse(name, wanted.parameters, lambda file: _inside(folder, file))
        except ModelRefused as error:
            raise ModelRefused(f"{folder / 'config.pbtxt'}: {error}") from None
        engine = await UpstreamEngine.start(upstream)
        try:
            config = await asyncio.to_thread(self._describe_upstream, name, folder, wanted, engine)
        except BaseException:
            await engine.close()
            raise
        return self._served(name, upstream.version or "1", "", engine, config)

    def _describe_upstream(
        self, name: str, folder: Path, wanted: Wanted, engine: UpstreamEngine
    ) -> ModelConfig:
        limit, theirs = self._limits.max_batch, engine.max_batch
        if theirs is not None:
            limit = min(limit, theirs)
            if (wanted.max_batch_size or 0) > theirs:
                raise ModelRefused(
                    f"{folder / 'config.pbtxt'}: max_batch_size is {wanted.max_batch_size}, the "
                    f"upstream takes {theirs} rows at most"
                )
        return _completed(name, folder, wanted, engine, limit)

    async def _await_upstream(self, folder: Path) -> None:
        """Load a model whose upstream is down as soon as it is up."""
        wait_s = AWAIT_S
        while True:
            # Not in step with the other hubs that wait for it.
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, AWAIT_MAX_S)
            async with self._changing:
                try:
                    await self._load(folder)
                except ModelRefused as error:
                    reason = str(error)
                    self._refused[folder.name] = ModelStatus(folder.name, "", UNAVAILABLE, reason)
                    if not isinstance(error, UpstreamDown):
                        log.error("model %s is not served: %s", folder.name, reason)
                        return
                else:
                    log.info("model %s is served: its upstream is up", folder.name)
                    return

    def _served(
        self, name: str, version: str, sha256: str, engine: Engine, config: ModelConfig
    ) -> ServedModel:
        metrics = self._metrics.of_model(name, version)
        batcher = Batcher(
            engine,
            batches=config.batches,
            max_batch=config.max_batch_size,
            max_queue_rows=self._limits.max_queue_rows,
            observer=metrics,
        )
        task = asyncio.create_task(batcher.serve(), name=f"batcher-{name}")
        return ServedModel(name, version, sha256, engine, config, metrics.statistics, batcher, task)

    def _describe(
        self, name: str, file: Path, wanted: Wanted, engine: Engine
    ) -> tuple[str, ModelConfig]:
        """Return the digest of a loaded file and how it is served."""
        folder = file.parent.parent
        config = _completed(name, folder, wanted, engine, self._limits.max_batch)
        return documents.sha256_of_file(file), config

    def _replace(self, name: str, versions: tuple[ServedModel, ...]) -> None:
        for old in self._models.get(name, ()):
            task = asyncio.create_task(old.retire(), name=f"retire-{name}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        self._models[name] = versions
        self._refused.pop(name, None)


def _model_folders(root: Path) -> list[Path]:
    return sorted(e for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))


def _read(folder: Path) -> tuple[Wanted, list[tuple[str, Path]]]:
    """Return what a model's folder says: its configuration and the files of its versions."""
    wanted = Wanted()
    if (folder / "config.pbtxt").exists():
        try:
            wanted = model_config.parse_pbtxt(_text(folder, "config.pbtxt"))
        except ConfigError as error:
            raise ModelRefused(f"{folder}: {error}") from None
    if wanted.backend == model_config.UPSTREAM:
        return wanted, []
    there = [
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isdecimal() and str(int(entry.name)) == entry.name
    ]
    if not there:
        raise ModelRefused(
            f"{folder} has no version folder: expected e.g. {folder.name}/1/model.onnx"
        )
    versions = wanted.versions.choose(there)
    if not versions:
        raise ModelRefused(
            f"{folder}: the version policy asks for {list(wanted.versions.specific)}, there are "
            f"{sorted(there)}"
        )
    files = [(str(version), folder / str(version) / "model.onnx") for version in versions]
    for _, file in files:
        if not file.is_file():
            raise ModelRefused(f"{file} is missing")
        _held_inside(folder, file)
    return wanted, files


def _completed(
    name: str, folder: Path, wanted: Wanted, engine: Engine, max_batch: int
) -> ModelConfig:
    """Return how a loaded model is served."""
    try:
        config = wanted.completed(name, engine.inputs, engine.outputs, max_batch)
    except ConfigError as error:
        raise ModelRefused(f"{folder / 'config.pbtxt'}: {error}") from None
    labels = {
        output: _labels(folder, label_file) for output, label_file in wanted.label_files.items()
    }
    return replace(config, labels=labels)


def _labels(folder: Path, name: str) -> Sequence[str]:
    return _text(folder, name).splitlines()


def _text(folder: Path, name: str) -> str:
    file = folder / name
    _held_inside(folder, file)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ModelRefused(f"{file} is larger than {MAX_CONFIG_BYTES} bytes")
        return data.decode()
    except OSError as error:
        raise ModelRefused(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelRefused(f"{file} is not UTF-8 text: {error}") from None


def _inside(folder: Path, name: str) -> Path:
    """Return a file that a configuration names; nothing outside the repository can be named."""
    _held_inside(folder, folder / name)
    return folder / name


def _held_inside(folder: Path, file: Path) -> None:
    root = folder.parent
    if not file.resolve().is_relative_to(root.resolve()):
        raise ModelRefused(f"{file} is a link that leaves {root}")
