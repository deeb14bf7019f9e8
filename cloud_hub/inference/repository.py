"""Which models the hub serves, and from which files.

    directory (``--models``)     control: none, poll or explicit  ┐
    registry (``serve_releases``)                                 ┴► files ► engines, warm ► serve

What is served answers until its successor is warm, and finishes what it took. A model that
cannot be loaded says why and does not stop the others; the hub is ready only when none failed.

With control ``none`` the directory is loaded at the start and nothing changes after it; with
``poll`` its files are looked at every few seconds; with ``explicit`` nothing is loaded until a
caller asks for it by name. A name in the directory takes precedence over the registry's.

A model that another server runs (``backend: "upstream"``) has a configuration and no files. While
that server is down at the start the model is one that cannot be loaded, and is tried until it can.
"""

import asyncio
import contextlib
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import structlog

from cloud_hub.engines.engine import Engine
from cloud_hub.engines.launch import Launcher
from cloud_hub.errors import ModelRefused, UpstreamDown
from cloud_hub.inference import directory, warmup
from cloud_hub.inference.acceleration import Acceleration
from cloud_hub.inference.batcher import Batcher
from cloud_hub.inference.directory import ModelFiles
from cloud_hub.metrics import Metrics, ModelMetrics
from fogline_protocol import documents, model_config
from fogline_protocol.errors import NotFound, Unavailable, Unsupported
from fogline_protocol.model_config import ConfigError, ModelConfig
from fogline_protocol.repository import READY, UNAVAILABLE
from fogline_protocol.statistics import ModelStatistics

log = structlog.get_logger(__name__)

AWAIT_S = 0.25  # before an upstream that was down at the start is tried again; doubles
AWAIT_MAX_S = 10.0

Control = Literal["none", "poll", "explicit"]


@dataclass(slots=True)
class ServedModel:
    """One version of one model: its engines, its batcher, and the task that runs batches."""

    name: str
    version: str
    sha256: str  # of the ONNX file; empty: there is none here, the engine knows what computes
    engines: Sequence[Engine]
    config: ModelConfig
    metrics: ModelMetrics
    batcher: Batcher
    task: asyncio.Task[None]
    following: asyncio.Task[None] | None = None  # keeps it on the best runtime there is

    @property
    def engine(self) -> Engine:
        """One of its engines, to ask what they have in common."""
        return self.engines[0]

    @property
    def statistics(self) -> ModelStatistics:
        """What the protocol tells of it."""
        return self.metrics.statistics

    @property
    def digest(self) -> str:
        """The SHA-256 of what computes, as far as is known before it has."""
        return self.sha256 or self.engine.digest

    @property
    def trouble(self) -> str:
        """Why it cannot answer; empty if one of its engines can."""
        troubles = [engine.trouble for engine in self.engines]
        return troubles[0] if all(troubles) else ""

    def check(self) -> None:
        """Raise ``Unavailable`` if it cannot answer."""
        if self.trouble:
            raise Unavailable(f"model {self.name!r} cannot answer: {self.trouble}")

    async def switch(self, engines: Sequence[Engine]) -> None:
        """Answer with these engines from now on, and close the others when they are idle."""
        before, self.engines = self.engines, engines
        try:
            await self.batcher.switch(engines)
        finally:
            await asyncio.gather(*(engine.close() for engine in before))

    async def retire(self) -> None:
        """Finish what is waiting, then give the engines back."""
        await self.batcher.drain()
        await self.stop()

    async def stop(self) -> None:
        """Tell what is waiting that it will get no answer, and give the engines back."""
        running = [task for task in (self.following, self.task) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self.engines))


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What the console and readiness tell of a model."""

    name: str
    version: str
    state: str  # READY or UNAVAILABLE, Triton's words
    reason: str = ""  # why it is not READY, or why newer files of it are not served
    provider: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What every model of the repository is held to."""

    max_batch: int = 64
    max_queue_rows: int = 1024


class Repository:
    """The models being served. Owner of their tasks; used on one event loop."""

    def __init__(
        self,
        metrics: Metrics,
        launcher: Launcher,
        limits: Limits,
        control: Control = "none",
        acceleration: Acceleration | None = None,
    ) -> None:
        self._metrics = metrics
        self._launcher = launcher
        self._acceleration = acceleration
        self.limits = limits
        self._control = control
        self._root: Path | None = None
        # By name; the versions of a model ascend, the last one answers who names none.
        self._models: dict[str, tuple[ServedModel, ...]] = {}
        self._refused: dict[str, ModelStatus] = {}  # should be served and cannot be
        self._unloaded: dict[str, ModelStatus] = {}
        self._objections: dict[str, str] = {}  # to newer files of a model that is served
        self._claimed: set[str] = set()  # names that the directory has
        self._fingerprints: dict[str, Hashable] = {}  # of its folders as they were last read
        self._releases: dict[str, ModelFiles] = {}  # what the registry wants served, by name
        self._outranked: dict[str, Sequence[str]] = {}  # versions of those left out, as logged
        self._retiring: set[asyncio.Task[None]] = set()
        self._awaiting: dict[str, asyncio.Task[None]] = {}  # by name: for upstreams that are down
        self._changing = asyncio.Lock()  # one load or unload at a time
        self.complete = True  # False: more may come before the hub has started

    async def load_directory(self, root: Path) -> None:
        """Serve every model below ``root``; those that cannot be are kept with their reason."""
        self._root = root
        found = await asyncio.to_thread(directory.folders, root)
        self._claimed |= found.keys()
        if self._control == "explicit":
            for name in found:
                self._unloaded[name] = ModelStatus(name, "", UNAVAILABLE, "not loaded")
            return
        async with self._changing:
            for folder in found.values():
                await self._follow(folder)

    async def poll(self, seen: Mapping[str, Hashable]) -> Mapping[str, Hashable]:
        """Serve the directory as it is now: load what is new or changed, unload what is gone.

        A folder is acted on when it is as it was in the look before: ``seen``, the value that
        look returned. So a file that is still being copied is not taken for a model.
        """
        assert self._root is not None
        found = await asyncio.to_thread(directory.folders, self._root)
        now = {n: await asyncio.to_thread(directory.fingerprint, f) for n, f in found.items()}
        async with self._changing:
            for name, fingerprint in now.items():
                if seen.get(name) == fingerprint != self._fingerprints.get(name):
                    await self._follow(found[name])
            for name in self._fingerprints.keys() - now.keys():
                log.info("model is gone from the directory", model=name)
                await self._forget(name)
        return now

    async def _forget(self, name: str) -> None:
        """Serve a model of the directory no longer, but the registry's of that name if there is one."""
        self._claimed.discard(name)
        self._fingerprints.pop(name, None)
        self._refused.pop(name, None)
        self._objections.pop(name, None)
        if name in self._awaiting:
            self._awaiting.pop(name).cancel()
        if name in self._releases:
            await self._attempt(name, self._releases[name], keep=True)
        else:
            self._retire(name, self._models.pop(name, ()))

    async def keep_polling(self, every_s: float) -> None:
        """Poll until cancelled."""
        seen: Mapping[str, Hashable] = {}
        while True:
            try:
                seen = await self.poll(seen)
            except OSError as error:
                log.error("the model directory cannot be read", why=str(error))
            await asyncio.sleep(every_s)

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
            found = await asyncio.to_thread(directory.folders, root)
            if name not in found:
                raise NotFound(f"{name!r} is no model of the repository: {list(found)}")
            self._claimed.add(name)
            try:
                await self._serve(name, await asyncio.to_thread(directory.read, found[name]))
            except (ModelRefused, OSError) as error:
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
            loaded = sorted(self._models.keys() & self._claimed)
            if name not in loaded:
                raise NotFound(f"model {name!r} is not loaded, loaded are {loaded}")
            versions = self._models.pop(name)
            self._unloaded[name] = ModelStatus(name, versions[-1].version, UNAVAILABLE, "unloaded")
            # They go on retiring when the caller leaves.
            await asyncio.wait(self._retire(name, versions))

    async def serve_release(self, name: str, files: ModelFiles) -> None:
        """Serve these versions of a model of the registry from now on, and no others.

        A version that is served already, from the same bytes, goes on undisturbed. What the
        directory names is left alone.
        """
        async with self._changing:
            self._releases[name] = files
            if name in self._claimed:
                await self._note_outranked(name, files)
                return
            await self._attempt(name, files, keep=True)

    async def _note_outranked(self, name: str, files: ModelFiles) -> None:
        """Say once which versions of the registry are not served because of the directory's.

        The same bytes under another number are no loss, so they are not worth a word.
        """
        served = {model.sha256 for model in self._models.get(name, ())}
        left_out = [
            version
            for version, file in files.versions
            if await asyncio.to_thread(documents.sha256_of_file, file) not in served
        ]
        if left_out and left_out != self._outranked.get(name):
            log.warning(
                "the directory's model is served, these releases of the registry are not",
                model=name,
                releases=left_out,
            )
        self._outranked[name] = left_out

    async def refuse_release(self, name: str, error: ModelRefused) -> None:
        """Say why a model of the registry is not served as it should be."""
        async with self._changing:
            if name not in self._claimed:
                self._object(name, error)

    def find(self, name: str, version: str = "", digest: str = "") -> ServedModel:
        """Return the model that answers for ``name`` and ``version`` (empty: the newest).

        See ``choose``.

        Raises:
            NotFound: there is none; the text names those there are.
            Unavailable: there should be one, but it could not be loaded, or its engines are lost.
        """
        found = self.choose(name, version, digest)
        found.check()
        return found

    def choose(self, name: str, version: str, digest: str) -> ServedModel:
        """Return the model that a request is for, be its engines lost or not.

        ``digest`` is what the caller would like to compute where no version is asked for: that of
        the file its certificate compares with. It is a wish; answers say what computed.

        Raises:
            NotFound: there is none; the text names those there are.
            Unavailable: there should be one, but it could not be loaded.
        """
        found = self._find(name, version)
        if digest and not version and found.sha256 != digest:
            found = next((m for m in self._models[name] if m.sha256 == digest), found)
        return found

    def _find(self, name: str, version: str) -> ServedModel:
        versions = self._models.get(name)
        if versions is None:
            if name in self._refused:
                raise Unavailable(f"model {name!r} is not served: {self._refused[name].reason}")
            if not self.complete:
                raise Unavailable(f"model {name!r} is not served yet: the hub is starting")
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
            found = self._find(name, version)
            return (found,) if version else self._models[name]
        return [model for versions in self._models.values() for model in versions]

    def versions(self, name: str) -> Sequence[str]:
        """Return the served versions of a model."""
        return [model.version for model in self._models.get(name, ())]

    @property
    def ready(self) -> bool:
        """Whether every model that should be served is."""
        return self.complete and not self.refused

    @property
    def refused(self) -> Sequence[ModelStatus]:
        """The models that should be served and cannot be."""
        lost = [status for status in self._served() if status.state != READY]
        return [*self._refused.values(), *lost]

    def status(self) -> list[ModelStatus]:
        """Return every model there is or should be, by name."""
        everything = [*self._served(), *self._refused.values(), *self._unloaded.values()]
        return sorted(everything, key=lambda status: status.name)

    async def close(self) -> None:
        """Stop every batcher and give the engines back."""
        for waiting in self._awaiting.values():
            waiting.cancel()
        await asyncio.gather(*self._awaiting.values(), return_exceptions=True)
        models = self.find_all("", "")
        self._models.clear()
        await asyncio.gather(*(model.stop() for model in models))
        await asyncio.gather(*self._retiring, return_exceptions=True)

    def _served(self) -> Iterator[ModelStatus]:
        for model in self.find_all("", ""):
            if model.trouble:
                yield ModelStatus(model.name, model.version, UNAVAILABLE, model.trouble)
            else:
                reason = self._objections.get(model.name, "")
                provider = model.engine.provider
                yield ModelStatus(model.name, model.version, READY, reason, provider)

    def _explicit(self, verb: str) -> Path:
        if self._control != "explicit" or self._root is None:
            raise Unsupported(
                f"this hub does not {verb} models on request: start it with --models DIR "
                "--model-control explicit"
            )
        return self._root

    async def _follow(self, folder: Path) -> None:
        """Serve a folder of the directory as it is, or keep why not."""
        name = folder.name
        self._claimed.add(name)
        # Before it is read: what changes meanwhile is seen by the next look.
        self._fingerprints[name] = await asyncio.to_thread(directory.fingerprint, folder)
        if name in self._awaiting:
            self._awaiting.pop(name).cancel()
        try:
            files = await asyncio.to_thread(directory.read, folder)
        except (ModelRefused, OSError) as error:
            self._object(name, error)
            return
        await self._attempt(name, files, keep=False)

    async def _await_upstream(self, name: str, files: ModelFiles) -> None:
        """Serve a model whose upstream is down as soon as it is up."""
        wait_s = AWAIT_S
        while True:
            # Not in step with the other hubs that wait for it.
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, AWAIT_MAX_S)
            async with self._changing:
                try:
                    await self._serve(name, files)
                except UpstreamDown as error:
                    self._object(name, error, again=True)
                except ModelRefused as error:
                    self._object(name, error)
                    return
                else:
                    log.info("model is served: its upstream is up", model=name)
                    return

    async def _attempt(self, name: str, files: ModelFiles, *, keep: bool) -> None:
        try:
            await self._serve(name, files, keep=keep)
        except UpstreamDown as error:
            self._object(name, error)
            task = asyncio.create_task(self._await_upstream(name, files), name=f"await-{name}")
            self._awaiting[name] = task
        except (ModelRefused, OSError) as error:
            self._object(name, error)

    def _object(self, name: str, error: Exception, *, again: bool = False) -> None:
        """Keep why a model is not served; ``again``: what was said before is not logged again."""
        said = self._objections.get(name), self._refused.get(name)
        if name in self._models:
            self._objections[name] = f"newer files of it are not served: {error}"
        else:
            self._refused[name] = ModelStatus(name, "", UNAVAILABLE, str(error))
        if not again or said != (self._objections.get(name), self._refused.get(name)):
            log.error("model is not served", model=name, why=str(error))

    async def _serve(self, name: str, files: ModelFiles, *, keep: bool = False) -> None:
        """Serve exactly the versions of ``files``, all of them or none.

        Raises:
            ModelRefused: one cannot be loaded; what was served before still is.
        """
        if files.wanted.backend == model_config.UPSTREAM:
            self._replace(name, (await self._open_upstream(name, files),))
            return
        kept: list[ServedModel] = []
        async with contextlib.AsyncExitStack() as opened:
            served = []
            for version, file in files.versions:
                sha256 = await asyncio.to_thread(documents.sha256_of_file, file)
                model = self._same(name, version, sha256) if keep else None
                if model is None:
                    model = await self._open(name, version, sha256, file, files)
                    opened.push_async_callback(model.stop)
                else:
                    kept.append(model)
                served.append(model)
            opened.pop_all()
        self._replace(name, tuple(served), kept)

    def _replace(
        self, name: str, served: tuple[ServedModel, ...], kept: Sequence[ServedModel] = ()
    ) -> None:
        old = [model for model in self._models.get(name, ()) if model not in kept]
        self._models[name] = served
        self._refused.pop(name, None)
        self._objections.pop(name, None)
        self._retire(name, old)

    def _retire(self, name: str, models: Sequence[ServedModel]) -> Sequence[asyncio.Task[None]]:
        """Let models finish what they took, then close them, whatever becomes of the caller."""
        tasks = [asyncio.create_task(m.retire(), name=f"retire-{name}") for m in models]
        for task in tasks:
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return tasks

    def _same(self, name: str, version: str, sha256: str) -> ServedModel | None:
        for model in self._models.get(name, ()):
            if (model.version, model.sha256) == (version, sha256):
                return model
        return None

    async def _open(
        self, name: str, version: str, sha256: str, file: Path, files: ModelFiles
    ) -> ServedModel:
        """Load and warm one version and start its batcher."""
        wanted = files.wanted
        async with contextlib.AsyncExitStack() as opened:
            engines = await self._launcher.open_all(
                file, sha256, wanted.instances, threads=wanted.threads
            )
            for engine in engines:
                opened.push_async_callback(engine.close)
            config = _completed(name, files, engines[0], self.limits.max_batch)
            for engine in engines:
                await _warm_up(engine, config, files)
            opened.pop_all()
        model = self._start(name, version, sha256, engines, config)
        if self._acceleration is not None:
            model.following = asyncio.create_task(
                self._acceleration.follow(
                    model,
                    file,
                    wanted.parameters,
                    lambda engine: _warm_up(engine, config, files),
                ),
                name=f"accelerate-{name}",
            )
        return model

    async def _open_upstream(self, name: str, files: ModelFiles) -> ServedModel:
        """Find the server that runs a model and start its batcher.

        Raises:
            UpstreamDown: it does not answer for it; it may later.
            ModelRefused: the configuration cannot be obeyed.
        """
        # Here: with it comes grpcio, 10 MB that most hubs have no use for.
        from cloud_hub.engines.upstream import Upstream, UpstreamEngine

        wanted, where = files.wanted, files.folder / directory.CONFIG
        try:
            upstream = Upstream.parse(name, wanted.parameters, files.inside)
        except ModelRefused as error:
            raise ModelRefused(f"{where}: {error}") from None
        async with contextlib.AsyncExitStack() as opened:
            engines: list[UpstreamEngine] = []
            for _ in range(wanted.instances):
                engine = await UpstreamEngine.start(upstream)
                opened.push_async_callback(engine.close)
                engines.append(engine)
            limit, theirs = self.limits.max_batch, engines[0].max_batch
            if theirs is not None:
                limit = min(limit, theirs)
                if (wanted.max_batch_size or 0) > theirs:
                    raise ModelRefused(
                        f"{where}: max_batch_size is {wanted.max_batch_size}, the upstream takes "
                        f"{theirs} rows at most"
                    )
            config = _completed(name, files, engines[0], limit)
            opened.pop_all()
        return self._start(name, upstream.version or "1", "", engines, config)

    def _start(
        self, name: str, version: str, sha256: str, engines: Sequence[Engine], config: ModelConfig
    ) -> ServedModel:
        metrics = self._metrics.of_model(name, version)
        batcher = Batcher(
            engines,
            batches=config.batches,
            max_batch=config.max_batch_size,
            max_queue_rows=self.limits.max_queue_rows,
            observer=metrics,
            scheduling=config.batching,
        )
        task = asyncio.create_task(batcher.serve(), name=f"batcher-{name}")
        return ServedModel(name, version, sha256, engines, config, metrics, batcher, task)


def _completed(name: str, files: ModelFiles, engine: Engine, max_batch: int) -> ModelConfig:
    """Return how a loaded model is served."""
    try:
        config = files.wanted.completed(name, engine.inputs, engine.outputs, max_batch)
    except ConfigError as error:
        raise ModelRefused(f"{files.folder / directory.CONFIG}: {error}") from None
    return replace(config, labels=files.labels)


async def _warm_up(engine: Engine, config: ModelConfig, files: ModelFiles) -> None:
    for name, inputs in warmup.requests(files.wanted.warm_ups, config, files.warm_up_data):
        try:
            await engine.run(inputs)
        except Exception as error:  # every runtime has errors of its own
            raise ModelRefused(f"warm-up {name!r} fails: {error}") from None
