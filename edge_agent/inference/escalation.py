"""Asks the hub about rows: those that escalate, and those that are audited.

Rows that escalate leave in as few requests as the hub takes, and their rows of the answer are
merged into the local one. A row that gets none from the hub keeps the local answer, decided as
if the link were down. Audits go out beside the caller's time and change no answer.
"""

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from edge_agent.errors import HubRefused, HubUnavailable
from edge_agent.inference import policy
from edge_agent.inference.audits import Audits
from edge_agent.inference.policy import Decision, Situation
from edge_agent.inference.rows import cannot_merge, in_groups, merge, select
from edge_agent.inference.served import DIGEST, Served
from edge_agent.inference.uplink import Answer, Question, Uplink
from fogline_protocol.examples import AUDIT, KEEP, KEEPS, EdgeAnswer
from fogline_protocol.inference import InferRequest
from fogline_protocol.tensors import Array

log = logging.getLogger("fogline.agent.escalation")


class Escalation:
    """The way to the hub. Owner of what its answers taught about its models."""

    def __init__(
        self, uplink: Uplink, audits: Audits, *, device: str = "", audit_deadline_s: float = 2.0
    ) -> None:
        """Ask over ``uplink``; ``device`` is who says what the hub may keep."""
        self._uplink = uplink
        self._audits = audits
        self._device = device
        self._audit_deadline_s = audit_deadline_s
        self._keeping: dict[str, bool] = {}  # by hub model: whether it says it keeps its examples
        self._refusals: dict[str, str] = {}  # by hub model: said once, until it changes

    async def merged(
        self,
        served: Served,
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
        pairing = served.release.bundle.escalates_to
        assert pairing is not None  # the policy escalates only for a paired release
        timeout_s = policy.hub_leg_s(situation.time_left_s)
        groups = in_groups(rows, self._uplink.max_rows)
        questions = self._questions(served, request, list(local), groups, len(decisions), said)
        merged = local
        answers = await asyncio.gather(*(self._ask(question, timeout_s) for question in questions))
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

    def audit(
        self, served: Served, request: InferRequest, said: EdgeAnswer, rows: Sequence[int]
    ) -> None:
        """Have the hub answer ``rows`` too, beside the caller's time, unless it keeps nothing."""
        bundle = served.release.bundle
        assert bundle.escalates_to is not None  # audits are chosen where a certificate compares
        assert bundle.score is not None
        if self._keeping.get(bundle.escalates_to.model) is False:
            return
        # A request may lie in memory that its caller writes to as soon as it has the answer.
        own = replace(request, inputs={name: np.copy(a) for name, a in request.inputs.items()})
        # The same holds of the answer: a caller in this process is handed the very arrays.
        said = replace(said, outputs={name: np.copy(a) for name, a in said.outputs.items()})
        groups = in_groups(rows, self._uplink.max_rows)
        questions = self._questions(
            served, own, [bundle.score.output], groups, len(said.scores), said
        )
        self._audits.begin(self._carry_out(served, questions))

    def said(
        self,
        served: Served,
        scored: Array,
        scores: Sequence[float],
        decisions: Sequence[Decision],
        source: str,
    ) -> EdgeAnswer:
        """Return what this device answered to all rows of a request, for the hub to keep."""
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

    def _questions(
        self,
        served: Served,
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

    async def _carry_out(self, served: Served, questions: Sequence[Question]) -> None:
        for question in questions:
            answer = await self._ask(question, self._audit_deadline_s)
            if answer is not None:
                self._learn(served, question.model, answer, marked=True)

    def _learn(self, served: Served, model: str, answer: Answer, *, marked: bool) -> None:
        """Take note of what an answer says of the hub: which model it has, and what it keeps."""
        served.learn_digest(answer.parameters.get(DIGEST))
        if marked:
            self._keeping[model] = answer.parameters.get(KEEPS) is True

    async def _ask(self, question: Question, timeout_s: float) -> Answer | None:
        """Return the hub's answer, or None: then the local one stands."""
        try:
            answer = await self._uplink.ask(question, timeout_s)
        except HubUnavailable:
            return None  # the breaker knows, and says so when it opens
        except HubRefused as error:
            # It may be what came with the rows: another server may stand there by now.
            self._keeping.pop(question.model, None)
            self._note_refusal(question.model, str(error))
            return None
        self._refusals.pop(question.model, None)
        return answer

    def _note_refusal(self, model: str, text: str) -> None:
        if self._refusals.get(model) != text:
            self._refusals[model] = text
            log.warning("the hub does not answer for %s: %s", model, text)
