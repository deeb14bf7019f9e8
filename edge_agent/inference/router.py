"""The agent as an Open Inference server: answers here, escalates, merges rows.

    check ─► engine ─► score ─► policy ─┬─ all rows certain ────────────► answer
                                        └─ some are not ─► uplink ─► merge ─► answer

The local answer comes first and is in hand before the hub is asked (``hub_only`` excepted),
so whatever happens to link or hub costs the caller quality at most, never its answer. Rows
are decided one by one; those that escalate leave in one request, and take their rows of the
answer back. One deadline covers both legs.

The router holds the releases in service in one place; ``install`` replaces one between two
requests, and the old engine is closed when its last request is done. ``certify`` replaces the
certificate alone: what is in flight ends under the one it began with, on the same engine.
"""

import asyncio
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Protocol

import numpy as np

from edge_agent.errors import HubLate, HubRefused, HubUnavailable
from edge_agent.inference import policy
from edge_agent.inference.audits import Audits
from edge_agent.inference.consent import Consent
from edge_agent.inference.local import run_here
from edge_agent.inference.parameters import MODE, PRIVATE, Options, forwarded, read_options
from edge_agent.inference.policy import Decision, Mode, Quality, Reason, Situation, Terms
from edge_agent.inference.rows import (
    HUB,
    cannot_merge,
    count_rows,
    in_groups,
    merge,
    not_finite,
    per_row,
    select,
    tier_of,
)
from edge_agent.inference.uplink import Answer, Question, Uplink
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.release import Release
from fogline_protocol import inference
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    Overloaded,
    Unavailable,
)
from fogline_protocol.examples import AUDIT, KEEP, KEEPS, EdgeAnswer
from fogline_protocol.inference import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    ServerMetadata,
)
from fogline_protocol.model_config import ModelConfig
from fogline_protocol.outcomes import INTERNAL, OK, Entry
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import Array

log = logging.getLogger("fogline.agent.router")

DIGEST = "fogline.digest"  # of the hub's model file, in the hub's answers
EXTENSIONS = (
    "classification",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)


class Observer(Protocol):
    """Learns how requests ended; must not raise."""

    def answered(
        self, model: str, release: str, tier: str, seconds: float, outcomes: Sequence[Decision]
    ) -> None:
        """Take note of one answered request; one decision per row."""
        ...


class _Lease:
    """Who uses an engine; the last one of a retired release closes it."""

    __slots__ = ("_engine", "_retired", "_users")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._users = 0
        self._retired = False

    def enter(self) -> None:
        """Count a request in."""
        self._users += 1

    def leave(self) -> None:
        """Count a request out."""
        self._users -= 1
        if self._retired and self._users == 0:
            self._engine.close()

    def retire(self) -> None:
        """Take no new requests; those in flight finish on the old engine."""
        self._retired = True
        if self._users == 0:
            self._engine.close()


class _Served:
    """One release in service under one certificate, and what changes about it while it is."""

    __slots__ = (
        "certificate_id",
        "edge_sha256",
        "expires_at",
        "label",
        "lease",
        "output_names",
        "release",
        "statistics",
        "terms",
        "uncertified",
        "version",
        "voided_by",
    )

    def __init__(self, release: Release, before: "_Served | None" = None) -> None:
        """Serve ``release``; ``before`` is the same one under another certificate."""
        certificate = release.choice.certificate
        paired = release.bundle.escalates_to is not None and release.score is not None
        self.release = release
        self.label = release.label
        self.version = release.version
        self.edge_sha256 = release.directory.variant_sha256(release.choice.variant)
        self.lease = _Lease(release.engine)
        self.statistics = ModelStatistics(release.bundle.model, release.version)
        self.output_names = [spec.name for spec in release.bundle.outputs]
        self.uncertified = Terms(paired)
        self.terms = self.uncertified
        self.certificate_id = ""
        self.expires_at = math.inf
        if certificate is not None:
            self.terms = Terms(paired, certificate.threshold)
            self.certificate_id = certificate.id  # computed once: it hashes the document
            self.expires_at = certificate.expires_at.timestamp()
        self.voided_by = ""  # the digest of a hub model that the certificate does not speak of
        if before is not None:
            self.lease, self.statistics = before.lease, before.statistics
            if certificate is not None and before.voided_by != certificate.hub_sha256:
                self.voided_by = before.voided_by

    def terms_now(self) -> Terms:
        """Return what local answers may claim at this moment."""
        if self.voided_by or time.time() >= self.expires_at:
            return self.uncertified
        return self.terms

    def asking(self, parameters: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
        """Return what the hub is told with a request that carried ``parameters``.

        A hub that serves several versions answers with the one that the certificate compares with.
        """
        certificate = self.release.choice.certificate
        passed_on = forwarded(parameters)
        return passed_on if certificate is None else {**passed_on, DIGEST: certificate.hub_sha256}

    def learn_digest(self, digest: Parameter | None) -> None:
        """Hold the hub's model against the one that the certificate compares with.

        A hub that does not say which model computed, as one in front of Triton, may have any.
        """
        certificate = self.release.choice.certificate
        if certificate is None:
            return
        found = digest if isinstance(digest, str) and digest else "unknown"
        changed = found if found != certificate.hub_sha256 else ""
        if changed == self.voided_by:
            return
        self.voided_by = changed
        if changed:
            log.warning(
                "certificate %s of %s is void: the hub's %s is %s now, not %s; everything escalates",
                self.certificate_id,
                self.release.label,
                certificate.hub_model,
                changed,
                certificate.hub_sha256,
            )
        else:
            log.info("certificate %s of %s holds again", self.certificate_id, self.release.label)


class Router:
    """Stands behind the agent's doors and its in-process API.

    Owner of the table of served releases; everything happens on one event loop.
    """

    def __init__(
        self,
        *,
        uplink: Uplink | None,
        observer: Observer,
        private: bool = False,
        deadline_s: float = 2.0,
        max_concurrency: int = 64,
        device: str = "",
        keep: Collection[str] = (),
        audits: Audits | None = None,
    ) -> None:
        """Answer over ``uplink`` and tell ``observer``.

        ``keep`` names what the hub may keep, MODEL or MODEL/SOURCE, unless a request says
        otherwise; ``device`` is who says so then. It gets what escalates and what ``audits``
        choose; by default they choose nothing.
        """
        self.draining = False  # set first on shutdown: callers turn elsewhere before doors close
        self._uplink = uplink
        self._observer = observer
        self._deadline_s = deadline_s
        self._max_concurrency = max_concurrency
        self._in_flight = 0
        self._options = Options(private=private)
        self._device = device
        self._consent = Consent(keep)
        self._consent_watched = False
        self._audits = audits or Audits(rate=0.0)
        self._keeping: dict[str, bool] = {}  # by hub model: whether it says it keeps its examples
        self._served: dict[str, _Served] = {}
        self._hub_refusals: dict[str, str] = {}  # by hub model: said once, until it changes
        self._metadata = ServerMetadata("fogline-agent", metadata.version("fogline"), EXTENSIONS)

    def install(self, release: Release) -> None:
        """Serve ``release`` from the next request on; an earlier one of the model drains."""
        old = self._served.get(release.bundle.model)
        self._served[release.bundle.model] = _Served(release)
        if old is not None:
            old.lease.retire()
        log.info("serving %s: %s", release.label, release.choice.why)
        if old is None:
            self._note_idle_consent()

    def certify(self, release: Release) -> None:
        """Serve what is served already under another certificate, from the next request on."""
        old = self._served.get(release.bundle.model)
        assert old is not None, "nothing of this model is served: our bug"
        assert old.release.engine is release.engine, "another engine serves: our bug"
        self._served[release.bundle.model] = _Served(release, old)
        log.info("serving %s: %s", release.label, release.choice.why)

    def remove(self, model: str) -> None:
        """Serve ``model`` no longer; requests in flight finish."""
        old = self._served.pop(model, None)
        if old is not None:
            old.lease.retire()
            self._note_idle_consent()

    def watch_consent(self) -> None:
        """Warn of consent to keep models that are not served, now and when other ones are served.

        Called once all that a start brings is installed: a model may also be on its way.
        """
        self._consent_watched = True
        self._note_idle_consent()

    def serving(self, model: str) -> Release | None:
        """Return the release that answers ``model`` now."""
        served = self._served.get(model)
        return None if served is None else served.release

    def releases(self) -> list[Release]:
        """Return the releases in service."""
        return [served.release for served in self._served.values()]

    def close(self) -> None:
        """Retire every release."""
        self._consent_watched = False
        self._audits.close()
        for model in list(self._served):
            self.remove(model)

    def server_metadata(self) -> ServerMetadata:
        """Return who this is."""
        return self._metadata

    def server_ready(self) -> bool:
        """Return whether applications may call."""
        return not self.draining

    def model_ready(self, name: str, version: str) -> bool:
        """Return whether the model answers now."""
        self._find(name, version)
        return not self.draining

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """Return the contract of a model, and how it is served on this device."""
        served = self._find(name, version)
        release = served.release
        properties = {
            "fogline.release": release.label,
            "fogline.variant": release.choice.variant.name,
            "fogline.provider": release.choice.provider,
        }
        if served.terms_now().has_certificate:
            properties["fogline.certificate"] = served.certificate_id
        return ModelMetadata(
            name=name,
            versions=(release.version,),
            platform="onnxruntime_onnx",
            inputs=release.bundle.inputs,
            outputs=release.bundle.outputs,
            properties=properties,
        )

    def model_config(self, name: str, version: str) -> ModelConfig:
        """Return how a model is served on this device."""
        bundle = self._find(name, version).release.bundle
        labels = {bundle.decisive_output: bundle.labels} if bundle.labels else {}
        return ModelConfig(name, bundle.max_batch, bundle.inputs, bundle.outputs, labels=labels)

    def model_statistics(self, name: str, version: str) -> Sequence[ModelStatistics]:
        """Return what this device has run of a model, of all models if ``name`` is empty.

        Escalated rows count too: the local answer came first. ``hub_only`` is the hub's to count.
        """
        if name:
            return (self._find(name, version).statistics,)
        return [served.statistics for served in self._served.values()]

    def open_entry(self) -> Entry:
        """Begin a request; what has no model on this device, no statistics tell of."""
        return Entry(lambda _outcome, _took_s: None)

    def rejected(self, reason: str) -> None:
        """Take note of what a door refused: its log has it, no statistics do."""

    async def infer(self, request: InferRequest, deadline: float | None) -> InferResponse:
        """Answer one request.

        The door ends the request's entry in the books; one that has none is counted here.

        Raises:
            BadRequest: tensors that do not fit the model, or parameters nobody knows.
            NotFound: the model is not served here, and the mode is not ``hub_only``.
            Overloaded: too many requests are being answered already.
            DeadlineExceeded: the caller's own time ran out before there was any answer.
            InferenceError: mode ``hub_only``, and the hub's refusal or absence.
        """
        if self._in_flight >= self._max_concurrency:
            raise Overloaded(
                f"{self._in_flight} requests are being answered, the limit of max_concurrency: "
                "come back later"
            )
        self._in_flight += 1
        started = time.monotonic()
        try:
            options = self._options
            if request.parameters:
                options = read_options(request.parameters, options)
            if options.mode is Mode.HUB_ONLY:
                return await self._pass_through(request, options, started, deadline)
            served = self._find(request.model, request.version)
            served.lease.enter()
            entry, outcome = request.entry, INTERNAL
            if entry is not None:
                entry.tell, entry.began = served.statistics.ended, started
            try:
                response = await self._answer(served, request, options, started, deadline)
                outcome = OK
                return response
            finally:
                took_s = time.monotonic() - started
                if entry is None:
                    served.statistics.ended(outcome, took_s)
                else:
                    entry.took_s = took_s
                served.lease.leave()
        finally:
            self._in_flight -= 1

    def _find(self, name: str, version: str) -> _Served:
        served = self._served.get(name)
        if served is None:
            known = ", ".join(sorted(self._served)) or "none"
            raise NotFound(
                f"no model {name!r} on this device, which serves {known}; "
                f"{MODE}=hub_only asks the hub"
            )
        if version and version != served.version:
            raise NotFound(f"model {name!r} has version {served.version}, got {version!r}")
        return served

    async def _answer(
        self,
        served: _Served,
        request: InferRequest,
        options: Options,
        started: float,
        deadline: float | None,
    ) -> InferResponse:
        release = served.release
        bundle = release.bundle
        inputs = request.inputs
        inference.check_inputs(bundle.inputs, inputs)
        names: Sequence[str] = served.output_names
        if request.outputs:
            names = inference.check_outputs(bundle.outputs, request.outputs)
        rows = count_rows(inputs) if bundle.max_batch else 1

        outputs, scores, scored = await run_here(
            release, served.statistics, inputs, names, rows, deadline
        )

        terms = served.terms_now()
        finish = deadline if deadline is not None else started + self._deadline_s
        time_left_s = finish - time.monotonic()
        uplink = self._uplink
        situation = Situation(
            options.mode,
            options.private,
            uplink is not None and uplink.link_up,
            time_left_s,
            0.0 if uplink is None else uplink.round_trip_s,
        )
        # Only where there is somebody to ask do inputs that are not numbers change anything.
        broken = not_finite(inputs, rows, batched=bundle.max_batch > 0) if terms.paired else ()
        decisions = policy.decide_rows(scores, terms, situation, broken)
        escalated = [row for row, decision in enumerate(decisions) if decision.escalate]
        said = None
        # From a broken input there is nothing to learn.
        if scored is not None and not broken and self._consent.covers(bundle.model, options):
            audited = self._audits.choose(decisions, situation)
            if escalated or audited:
                said = self._said(served, scored, scores, decisions, options.source)
            if audited and said is not None:
                self._audit(served, request, said, audited)
        if escalated:
            outputs = await self._escalate(
                served, request, outputs, scores, broken, decisions, escalated, situation, said
            )
        elif uplink is not None and any(d.reason is Reason.DEADLINE for d in decisions):
            uplink.refresh()

        overall = policy.worst(decisions) if decisions else _NO_ROWS
        tier = tier_of(decisions)
        parameters: dict[str, Parameter] = {
            "fogline.tier": tier,
            "fogline.quality": overall.quality.value,
            "fogline.reason": overall.reason.value,
            "fogline.release": served.label,
        }
        if release.score is not None and scores:
            parameters["fogline.score"] = min(scores)
        if not options.private and terms.has_certificate:
            parameters["fogline.certificate"] = served.certificate_id
        if options.per_row:
            outputs = {**outputs, **per_row(decisions, scores if release.score else None)}
        self._observer.answered(
            bundle.model, served.label, tier, time.monotonic() - started, decisions
        )
        return InferResponse(bundle.model, served.version, outputs, request.id, parameters)

    async def _escalate(
        self,
        served: _Served,
        request: InferRequest,
        local: dict[str, Array],
        scores: Sequence[float],
        broken: Collection[int],
        decisions: list[Decision],
        rows: Sequence[int],
        situation: Situation,
        said: EdgeAnswer | None,
    ) -> dict[str, Array]:
        """Ask the hub for ``rows`` and return the merged outputs.

        ``decisions`` is corrected in place for rows that got no answer from the hub. ``said`` is
        the local answer to all rows, where the hub may keep those that escalate.
        """
        uplink, pairing = self._uplink, served.release.bundle.escalates_to
        assert uplink is not None  # the policy escalates only over a link that is up
        assert pairing is not None  # and only for a paired release
        timeout_s = policy.hub_leg_s(situation.time_left_s)
        groups = in_groups(rows, uplink.max_rows)
        questions = self._questions(served, request, list(local), groups, len(decisions), said)
        merged = local
        answers = await asyncio.gather(*(self._ask(uplink, q, timeout_s) for q in questions))
        for group, answer in zip(groups, answers, strict=True):
            if answer is not None:
                self._learn(served, pairing.model, answer, marked=said is not None)
                whole = len(group) == len(decisions)
                problem = None if whole else cannot_merge(merged, answer.outputs)
                if problem is None:
                    merged = merge(merged, answer.outputs, group, whole)
                    continue
                self._note_refusal(pairing.model, problem)
            # As if the link were down, which for these rows it was.
            without_hub = Situation(
                situation.mode, situation.private, False, situation.time_left_s, 0.0
            )
            fallback = policy.decide_rows(
                [scores[row] for row in group],
                served.terms_now(),
                without_hub,
                [place for place, row in enumerate(group) if row in broken],
            )
            for row, decision in zip(group, fallback, strict=True):
                decisions[row] = decision
        return merged

    def _questions(
        self,
        served: _Served,
        request: InferRequest,
        outputs: Sequence[str],
        groups: Sequence[Sequence[int]],
        total: int,
        said: EdgeAnswer | None,
    ) -> list[Question]:
        """Return what the hub is asked about each group of the request's ``total`` rows."""
        bundle = served.release.bundle
        assert bundle.escalates_to is not None  # else nobody asks
        model = bundle.escalates_to.model
        inputs, parameters = request.inputs, served.asking(request.parameters)
        if said is not None:
            parameters = {**parameters, KEEP: True}
            if self._keeping.get(model):
                parameters |= said.parameters()
                inputs = {**inputs, **said.tensors()}
        return [
            Question(
                model=model,
                inputs=select(inputs, group, total),
                rows=len(group) if bundle.max_batch else 0,
                outputs=outputs,
                parameters=parameters,
            )
            for group in groups
        ]

    def _audit(
        self, served: _Served, request: InferRequest, said: EdgeAnswer, rows: Sequence[int]
    ) -> None:
        """Have the hub answer ``rows`` too, beside the caller's time, unless it keeps nothing."""
        uplink, bundle = self._uplink, served.release.bundle
        assert uplink is not None  # audits are chosen only over a link that is up
        assert bundle.escalates_to is not None  # and only where a certificate compares
        assert bundle.score is not None
        if self._keeping.get(bundle.escalates_to.model) is False:
            return
        # A request may lie in memory that its caller writes to as soon as it has the answer.
        own = replace(request, inputs={name: np.copy(a) for name, a in request.inputs.items()})
        # The same holds of the answer: a caller in this process is handed the very arrays.
        said = replace(said, outputs={name: np.copy(a) for name, a in said.outputs.items()})
        groups = in_groups(rows, uplink.max_rows)
        questions = self._questions(
            served, own, [bundle.score.output], groups, len(said.scores), said
        )
        self._audits.begin(self._carry_out(uplink, served, questions))

    async def _carry_out(
        self, uplink: Uplink, served: _Served, questions: Sequence[Question]
    ) -> None:
        for question in questions:
            answer = await self._ask(uplink, question, self._deadline_s)
            if answer is not None:
                self._learn(served, question.model, answer, marked=True)

    def _learn(self, served: _Served, model: str, answer: Answer, *, marked: bool) -> None:
        """Take note of what an answer says of the hub: which model it has, and what it keeps."""
        served.learn_digest(answer.parameters.get(DIGEST))
        if marked:
            self._keeping[model] = answer.parameters.get(KEEPS) is True

    async def _ask(self, uplink: Uplink, question: Question, timeout_s: float) -> Answer | None:
        """Return the hub's answer, or None: then the local one stands."""
        try:
            answer = await uplink.ask(question, timeout_s)
        except HubUnavailable:
            return None  # the breaker knows, and says so when it opens
        except HubRefused as error:
            # It may be what came with the rows: another server may stand there by now.
            self._keeping.pop(question.model, None)
            self._note_refusal(question.model, str(error))
            return None
        self._hub_refusals.pop(question.model, None)
        return answer

    def _said(
        self,
        served: _Served,
        scored: Array,
        scores: Sequence[float],
        decisions: Sequence[Decision],
        source: str,
    ) -> EdgeAnswer:
        score = served.release.bundle.score
        assert score is not None  # else nothing was scored
        rows = len(decisions)
        return EdgeAnswer(
            device=self._device,
            release=served.label,
            sha256=served.edge_sha256,
            outputs={
                score.output: scored if served.release.bundle.max_batch else scored[np.newaxis]
            },
            scores=np.array(scores, np.float32),
            # Whatever is decided as the rows that escalate were always does.
            propensities=np.array([1.0 if d.escalate else self._audits.rate for d in decisions]),
            reasons=[d.reason.value if d.escalate else AUDIT for d in decisions],
            sources=[source] * rows,
        )

    def _note_idle_consent(self) -> None:
        if self._consent_watched:
            for sentence in self._consent.idle(self._served):
                log.warning(sentence)

    def _note_refusal(self, model: str, text: str) -> None:
        if self._hub_refusals.get(model) != text:
            self._hub_refusals[model] = text
            log.warning("the hub does not answer for %s: %s", model, text)

    async def _pass_through(
        self, request: InferRequest, options: Options, started: float, deadline: float | None
    ) -> InferResponse:
        """Answer from the hub alone: mode ``hub_only``."""
        if options.private:
            if self._options.private:
                raise Forbidden("this agent is private: nothing leaves the device, not to the hub")
            raise BadRequest(f"{PRIVATE} and {MODE}=hub_only exclude each other")
        uplink = self._uplink
        if uplink is None:
            raise Unavailable(f"{MODE}=hub_only, and this agent has no hub (option --hub)")
        served = self._served.get(request.model)
        model, version, rows = request.model, request.version, 0
        names: Sequence[str] = request.outputs
        parameters = forwarded(request.parameters)
        if served is not None:
            served = self._find(request.model, request.version)
            bundle = served.release.bundle
            inference.check_inputs(bundle.inputs, request.inputs)
            names = inference.check_outputs(bundle.outputs, request.outputs)
            rows = count_rows(request.inputs) if bundle.max_batch else 0
            if bundle.escalates_to is not None:
                model, version = bundle.escalates_to.model, ""
                parameters = served.asking(request.parameters)
        if pause_s := uplink.pause_s:
            raise Unavailable(
                f"the hub asked not to be asked for {pause_s:.3f} s", retry_after_s=pause_s
            )
        if not uplink.link_up:
            raise Unavailable("the hub cannot be reached at the moment")
        finish = deadline if deadline is not None else started + self._deadline_s
        question = Question(model, request.inputs, rows, names, version, parameters)
        try:
            answer = await uplink.ask(question, finish - time.monotonic())
        except HubLate as error:
            raise DeadlineExceeded(str(error)) from None
        except HubUnavailable as error:
            raise Unavailable(
                f"the hub cannot be reached: {error}", retry_after_s=uplink.pause_s or None
            ) from None
        except HubRefused as error:
            raise error.refusal from None
        decisions = [_HUB_ONLY] * (rows or 1)
        told: dict[str, Parameter] = {
            "fogline.tier": HUB,
            "fogline.quality": Quality.HUB.value,
            "fogline.reason": Reason.MODE.value,
            "fogline.release": answer.parameters.get("fogline.release", answer.model),
        }
        outputs = dict(answer.outputs)
        if served is not None:
            served.learn_digest(answer.parameters.get(DIGEST))
            told["fogline.release"] = served.label
            if options.per_row:
                outputs |= per_row(decisions, None)
        self._observer.answered(
            request.model,
            str(told["fogline.release"]),
            HUB,
            time.monotonic() - started,
            decisions,
        )
        version = answer.version if served is None else served.version
        return InferResponse(request.model, version, outputs, request.id, told)


_HUB_ONLY = Decision(True, Quality.HUB, Reason.MODE)
# Nothing was asked, so nothing can be wrong with the answer.
_NO_ROWS = Decision(False, Quality.CERTIFIED, Reason.CONFIDENT)
