"""Stands behind the hub's doors: finds the model, checks the request, answers.

Every answer says that the hub gave it, and which bytes did: a device holds the digest
against its certificate, because another hub model voids a disagreement certificate.
"""

import asyncio
import contextlib
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Protocol

from cloud_hub.engines.engine import DIGEST
from cloud_hub.fleet.callers import NO_LIMITS, Caller
from cloud_hub.inference import cache as response_cache
from cloud_hub.inference import tracing
from cloud_hub.inference.admission import CALLER, Admission
from cloud_hub.inference.cache import Key, ResponseCache
from cloud_hub.inference.repository import Repository, ServedModel
from cloud_hub.inference.tracing import CURRENT, Tracer
from cloud_hub.metrics import Metrics
from fogline_protocol import examples, inference
from fogline_protocol.errors import BadRequest, Forbidden, InferenceError, Unavailable, Unsupported
from fogline_protocol.examples import KEEP, KEEPS, EdgeAnswer
from fogline_protocol.inference import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    ServerMetadata,
)
from fogline_protocol.model_config import ModelConfig
from fogline_protocol.outcomes import Entry, ending
from fogline_protocol.repository import ModelIndex
from fogline_protocol.settings import TraceChanges, TraceSettings
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import Array

PRIVATE = "fogline.private"
CACHE = "fogline.cache"  # false: neither take the answer from the cache nor keep it
CACHED = "fogline.cached"  # true in answers from the cache

EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "schedule_policy",
    "statistics",
)


# Request parameters that reach the engine: requests that differ in one never share a batch. An
# engine takes arrays and nothing else today, so there is none.
ENGINE_PARAMETERS: frozenset[str] = frozenset()


RESTART_S = 1.0  # hint of a hub that stops: about what one takes to be there again


class Keeper(Protocol):
    """Keeps what devices let the hub keep."""

    @property
    def accepting(self) -> bool:
        """Whether anything is kept at all."""
        ...

    def offer(
        self,
        tenant: str,
        model: str,
        sha256: str,
        inputs: Mapping[str, Array],
        edge: EdgeAnswer,
        outputs: Mapping[str, Array],
        *,
        batched: bool,
    ) -> None:
        """Take the rows of an answered request, or drop them; must not wait and must not raise."""
        ...


class HubServer:
    """The hub as an Open Inference server."""

    def __init__(
        self,
        name: str,
        repository: Repository,
        metrics: Metrics,
        admission: Admission | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        """Serve what ``repository`` holds.

        Args:
            name: of this hub.
            repository: is closed by whoever made it.
            metrics: what is told of every request.
            admission: holds callers to their limits; None: nobody has any.
            cache: for the models whose configuration asks for one; None: no answer is kept.
        """
        self._name = name
        self._repository = repository
        self._metrics = metrics
        self._admission = admission or Admission(NO_LIMITS, metrics)
        self._cache = cache
        self._caching: dict[str, Mapping[str, str]] = {}  # digests that are cached, by version
        self.keeper: Keeper | None = None  # set by the composition root
        self.tracer: Tracer | None = None  # set by the composition root if there is a directory
        self.draining = False  # set first on shutdown: callers turn elsewhere before doors close
        self.refusing = False  # what is in flight is finished, nothing new is taken
        self._in_flight = 0
        self._quiet = asyncio.Event()  # no request is in flight
        self._quiet.set()

    def server_metadata(self) -> ServerMetadata:
        """Return who this is."""
        return ServerMetadata(self._name, metadata.version("fogline"), EXTENSIONS)

    def server_ready(self) -> bool:
        """Return whether every model that should be served is."""
        return self._repository.ready and not self.draining

    def model_ready(self, name: str, version: str) -> bool:
        """Return whether the model answers now."""
        try:
            model = self._repository.find(name, version)
        except Unavailable:
            return False
        return not self.draining and not model.engine.trouble

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """Return the contract of a model."""
        model = self._repository.find(name, version)
        return ModelMetadata(
            name=model.name,
            versions=self._repository.versions(name),
            platform=model.engine.platform,
            inputs=model.engine.inputs,
            outputs=model.engine.outputs,
            properties={
                "fogline.provider": model.engine.provider,
                **({DIGEST: model.digest} if model.digest else {}),
            },
        )

    def model_config(self, name: str, version: str) -> ModelConfig:
        """Return how a model is served."""
        config = self._repository.find(name, version).config
        return replace(config, response_cache=config.response_cache and self._cache is not None)

    def model_statistics(self, name: str, version: str) -> Sequence[ModelStatistics]:
        """Return the counts of a model, of all models if ``name`` is empty."""
        return [m.statistics for m in self._repository.find_all(name, version)]

    def repository_index(self) -> Sequence[ModelIndex]:
        """Return every model, served or not, with the reason."""
        return [ModelIndex(s.name, s.version, s.state, s.reason) for s in self._repository.status()]

    async def load_model(self, name: str, parameters: Sequence[str]) -> None:
        """Load a model of the repository anew.

        Raises:
            Unsupported: the hub was not started for it, or the model's files come with the call.
            InferenceError: there is no such model, or it cannot be served.
        """
        if parameters:
            raise Unsupported(
                f"load parameters {list(parameters)} are not offered here: change the files of the "
                "repository, then load the model without parameters"
            )
        await self._repository.reload(name)

    async def unload_model(self, name: str) -> None:
        """Serve a model no longer; requests in flight finish.

        Raises:
            Unsupported: the hub was not started for it.
            NotFound: it is not served.
        """
        await self._repository.unload(name)

    def change_trace(self, model: str, changes: TraceChanges) -> TraceSettings:
        """Change which requests of a model, or of all, are traced, and return what holds.

        Raises:
            Unsupported: the hub has no directory for traces, or the level.
            BadRequest: an unknown setting or an impossible value.
            NotFound: there is no such model.
        """
        if self.tracer is None:
            raise Unsupported(tracing.REFUSAL)
        if model:
            self._repository.find(model, "")
        return self.tracer.change(model, changes)

    def open_entry(self) -> Entry:
        """Begin a request; whoever does ends it, once, with what its caller saw."""
        return Entry(self._refused)

    def rejected(self, reason: str) -> None:
        """Count why a door refused something."""
        self._metrics.rejected(reason)

    def _refused(self, outcome: str, _took_s: float) -> None:
        self._metrics.request_refused(outcome)
        if outcome == BadRequest.grpc_code.lower():  # nobody says so later without a model
            self._metrics.rejected("unreadable")

    async def infer(self, request: InferRequest, deadline: float | None) -> InferResponse:
        """Answer one request of the caller whom the door has noted.

        The door ends the request's entry in the books; one that has none is counted here.

        Raises:
            Unavailable: the hub is about to stop.
            Overloaded: the caller asks too often or too much at once, or the queue is full.
            Forbidden: it is marked private, so it must never have left its device.
            InferenceError: see the batcher and the checks of the protocol.
        """
        entry = request.entry
        if entry is None:
            with ending(self.open_entry()) as entry:
                return await self.infer(replace(request, entry=entry), deadline)
        if self.refusing:
            self._metrics.rejected("draining")
            raise Unavailable(
                "the hub is shutting down: ask another one, or this one again later",
                retry_after_s=RESTART_S,
            )
        caller = CALLER.get()
        self._in_flight += 1
        self._quiet.clear()
        try:
            with self._admission.admitted(caller):
                return await self._accounted(caller, request, entry, deadline)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._quiet.set()

    async def drain(self, within_s: float) -> int:
        """Refuse new requests, wait for those in flight, and return how many are left after all.

        The doors stay open meanwhile, so that a refusal has a text and a hint, on open streams
        too. Set ``draining`` before, by the time that load balancers need to notice.
        """
        self.draining = self.refusing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._quiet.wait()
        return self._in_flight

    async def _accounted(
        self, caller: Caller, request: InferRequest, entry: Entry, deadline: float | None
    ) -> InferResponse:
        wish = request.parameters.get(DIGEST, "")
        digest = wish if isinstance(wish, str) else ""
        try:
            model = self._repository.choose(request.model, request.version, digest)
        except InferenceError:  # callers name what they like: that must not make new series
            self._metrics.rejected("no_model")
            raise
        entry.tell = model.metrics.request_ended
        entry.began = started = time.monotonic()
        trace = None
        if self.tracer is not None:
            trace = self.tracer.begin(model.name, model.version, request.id, started)
            CURRENT.set(trace)  # in the task of this request, or of whoever asks one by one
        try:
            return await self._answer(model, caller, request, deadline)
        finally:
            entry.took_s = time.monotonic() - started
            if self.tracer is not None and trace is not None:
                self.tracer.finish(trace, time.monotonic())

    async def _answer(
        self, model: ServedModel, caller: Caller, request: InferRequest, deadline: float | None
    ) -> InferResponse:
        model.check()
        if _flag(request.parameters, PRIVATE, False):
            raise Forbidden(
                "the request is marked private and must not leave its device: the hub does not answer it"
            )
        edge = None
        marked = _flag(request.parameters, KEEP, False)
        if marked:
            inputs, edge = examples.detach(request.inputs, request.parameters)
            request = replace(request, inputs=inputs)
        inference.check_inputs(model.engine.inputs, request.inputs)
        names = inference.check_outputs(model.engine.outputs, request.outputs)
        rows = {len(array) for array in request.inputs.values()} if model.config.batches else {1}
        if len(rows) != 1:
            raise BadRequest(f"the inputs disagree on the number of rows: {sorted(rows)}")
        if rows == {0}:
            raise BadRequest("the inputs have no rows")
        if edge is not None and rows != {len(edge.scores)}:
            raise BadRequest(
                f"{KEEP} comes with the edge's answers to {len(edge.scores)} rows, the inputs have "
                f"{rows.pop()}"
            )
        outputs, cached = await self._outputs(model, caller, request, deadline)
        parameters: dict[str, Parameter] = {
            "fogline.tier": "hub",
            "fogline.quality": "hub",
            "fogline.reason": "asked",
            "fogline.release": f"{model.name}@{model.version}",
        }
        digest = _digest(model, outputs)
        if digest:
            parameters[DIGEST] = digest
        if cached:
            parameters[CACHED] = True
        keeper = self.keeper
        if marked and keeper is not None and keeper.accepting:
            parameters[KEEPS] = True
            if edge is not None:
                keeper.offer(
                    caller.tenant,
                    model.name,
                    digest,
                    request.inputs,
                    edge,
                    outputs,
                    batched=model.config.batches,
                )
        return InferResponse(
            model=model.name,
            version=model.version,
            id=request.id,
            outputs={name: outputs[name] for name in names},
            parameters=parameters,
        )

    async def _outputs(
        self, model: ServedModel, caller: Caller, request: InferRequest, deadline: float | None
    ) -> tuple[Mapping[str, Array], bool]:
        """Return every output, and whether they are from the cache."""
        wanted = _flag(request.parameters, CACHE, True)
        cache, digest = self._cache, model.digest
        # Who does not know what computes cannot know when kept answers are those of another model.
        if cache is None or not wanted or not model.config.response_cache or not digest:
            return await self._run(model, caller, request, deadline), False
        if self._caching.get(model.name, {}).get(model.version) != digest:
            served = self._repository.find_all(model.name, "")
            self._caching[model.name] = {each.version: each.digest for each in served}
            cache.keep(model.name, self._caching[model.name])
        started = time.perf_counter_ns()
        hash_of = response_cache.hash_of
        if response_cache.is_short(request.inputs):
            inputs = hash_of(request.inputs)
        else:
            inputs = await asyncio.to_thread(hash_of, request.inputs)
        kind = _kind(request.parameters)
        key = Key(caller.tenant, model.name, model.version, digest, kind, inputs)
        kept = cache.get(key, time.monotonic())
        looked_ns = time.perf_counter_ns() - started
        if kept is not None:
            model.statistics.cache_hit.add(looked_ns)
            model.statistics.queue.add(0)  # it waited for nothing, and is counted all the same
            return kept, True
        model.statistics.cache_miss.add(looked_ns)
        outputs = await self._run(model, caller, request, deadline)
        if _digest(model, outputs) == digest:  # an upstream may have been switched meanwhile
            started = time.perf_counter_ns()
            cache.put(key, outputs, time.monotonic())
            model.statistics.cache_miss.add(time.perf_counter_ns() - started, 0)
        return outputs, False

    async def _run(
        self, model: ServedModel, caller: Caller, request: InferRequest, deadline: float | None
    ) -> Mapping[str, Array]:
        return await model.batcher.infer(
            request.inputs,
            deadline,
            caller=caller.token_id,
            priority=inference.priority(request.parameters),
            kind=_kind(request.parameters),
        )


def _flag(parameters: Mapping[str, Parameter], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):  # "true" would be a promise broken in silence
        raise BadRequest(f"{key} must be true or false, got {value!r}")
    return value


def _digest(model: ServedModel, outputs: Mapping[str, Array]) -> str:
    """Return the digest of what computed these outputs; empty: it is not known.

    Rows may come from several models while an upstream is switched. All are named then, which
    is no model's digest, so that a device does not take the answer for one of its pair.
    """
    column = outputs.get(DIGEST)
    if column is None:
        return model.sha256
    digests = sorted({row.decode() for row in column})
    return "" if digests == [""] else ",".join(digest or "unknown" for digest in digests)


def _kind(parameters: Mapping[str, Parameter]) -> Hashable:
    if not ENGINE_PARAMETERS:
        return ()
    # True == 1 == 1.0 in Python, not for an engine.
    return tuple(
        (key, type(value), value)
        for key, value in sorted(parameters.items())
        if key in ENGINE_PARAMETERS
    )
