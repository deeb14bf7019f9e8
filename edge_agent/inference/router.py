"""The agent as an Open Inference server: answers here, escalates, merges rows.

    check ─► engine ─► score ─► policy ─┬─ all rows certain ────────────► answer
                                        └─ some are not ─► uplink ─► merge ─► answer

The local answer comes first and is in hand before the hub is asked (``hub_only`` excepted),
so whatever happens to link or hub costs the caller quality at most, never its answer. Rows
are decided one by one, and one deadline covers both legs.

The router holds the releases in service in one place; ``install`` replaces one between two
requests, and the old engine is closed when its last request is done. ``certify`` replaces the
certificate alone: what is in flight ends under the one it began with, on the same engine.
"""

import logging
import time
from collections.abc import Collection, Sequence
from importlib import metadata
from typing import Protocol

from edge_agent.errors import HubLate, HubRefused, HubUnavailable
from edge_agent.inference import policy
from edge_agent.inference.audits import Audits
from edge_agent.inference.consent import Consent
from edge_agent.inference.escalation import Escalation
from edge_agent.inference.local import run_here
from edge_agent.inference.parameters import MODE, PRIVATE, Options, forwarded, read_options
from edge_agent.inference.policy import Decision, Mode, Quality, Reason, Situation
from edge_agent.inference.rows import (
    HUB,
    count_rows,
    not_finite,
    per_row,
    tier_of,
)
from edge_agent.inference.served import DIGEST, Served
from edge_agent.inference.uplink import Question, Uplink
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

log = logging.getLogger("fogline.agent.router")

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
        self._consent = Consent(keep)
        self._consent_watched = False
        self._audits = audits or Audits(rate=0.0)
        self._escalation = (
            None
            if uplink is None
            else Escalation(uplink, self._audits, device=device, audit_deadline_s=deadline_s)
        )
        self._served: dict[str, Served] = {}
        self._metadata = ServerMetadata("fogline-agent", metadata.version("fogline"), EXTENSIONS)

    def install(self, release: Release) -> None:
        """Serve ``release`` from the next request on; an earlier one of the model drains."""
        old = self._served.get(release.bundle.model)
        self._served[release.bundle.model] = Served(release)
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
        self._served[release.bundle.model] = Served(release, old)
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

    def _find(self, name: str, version: str) -> Served:
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
        served: Served,
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
        said, escalation = None, self._escalation
        # From a broken input there is nothing to learn.
        if scored is not None and not broken and self._consent.covers(bundle.model, options):
            audited = self._audits.choose(decisions, situation)
            if escalated or audited:
                assert escalation is not None  # neither is chosen but over a link that is up
                said = escalation.said(served, scored, scores, decisions, options.source)
                if audited:
                    escalation.audit(served, request, said, audited)
        if escalated:
            assert escalation is not None
            outputs = await escalation.merged(
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

    def _note_idle_consent(self) -> None:
        if self._consent_watched:
            for sentence in self._consent.idle(self._served):
                log.warning(sentence)

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
