"""Decides, for each row, between answering on the device and asking the hub.

Pure: it sees the row's score, what the certificate says, and the situation of the request;
it returns a ``Decision`` with the quality the answer will have and the reason for it.
``escalation.py`` carries it out, and asks again with the link down when the hub leg failed.

    quality       means
    hub           the hub's answer
    certified     a local answer above the certified threshold: the bound of the certificate holds
    degraded      a local answer although escalation was due; the reason says what prevented it
    uncertified   a local answer that no certificate speaks about (no pairing, or private)

A certificate speaks of inputs like those it was calibrated on, and the workshop calibrates on
finite numbers only. So a row with a NaN or an infinity in it is not covered, whatever its score.

Two rules carry the guarantee (escalation.md 5). *Stricter is always safe*: the device may
escalate at any ``operating`` threshold above the certified one. *The line between certified
and degraded is the certified threshold*, not the operating one: a row between the two that
could not be escalated is still covered.
"""

import enum
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Below 1.5 round trips an attempt would rather cost the caller its time than bring an answer
# (escalation.md 5.1).
ROUND_TRIPS_NEEDED = 1.5
# The rest of the caller's time stays for handing over the local answer (escalation.md 5).
HUB_SHARE_OF_TIME = 0.5


class Mode(enum.StrEnum):
    """What the caller prefers."""

    EDGE_ONLY = "edge_only"
    PREFER_EDGE = "prefer_edge"
    PREFER_HUB = "prefer_hub"
    HUB_ONLY = "hub_only"


class Quality(enum.StrEnum):
    """How an answer stands to the certificate; see the table above."""

    HUB = "hub"
    CERTIFIED = "certified"
    UNCERTIFIED = "uncertified"
    DEGRADED = "degraded"


class Reason(enum.StrEnum):
    """Why a row was answered where it was."""

    CONFIDENT = "confident"  # here: its score is above the threshold
    UNCERTAIN = "uncertain"  # by the hub: its score is not
    PREFERRED = "preferred"  # by the hub: the caller prefers it
    MODE = "mode"  # the caller left no choice
    PRIVACY = "privacy"  # here: it may never leave the device
    LINK = "link"  # here: the hub is not reached, or the attempt failed
    DEADLINE = "deadline"  # here: too little time is left for a round trip
    NO_CERTIFICATE = "no-certificate"  # nothing is certified on this device now
    INPUT = "input"  # it holds a NaN or an infinity, of which no certificate speaks


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one row, as long as the hub leg does not fail."""

    escalate: bool
    quality: Quality
    reason: Reason


@dataclass(frozen=True, slots=True)
class Terms:
    """What local answers of one release may claim now."""

    paired: bool  # it names a hub model, and has a score
    certified: float = math.nan  # the certified threshold; NaN: no certificate is valid
    operating: float = -math.inf  # escalate below it as well; only raises the threshold

    @property
    def has_certificate(self) -> bool:
        """Whether a certificate is in force."""
        return not math.isnan(self.certified)


class Situation(NamedTuple):
    """What holds for all rows of a request. Made for each one, hence a tuple: the cheapest value."""

    mode: Mode
    private: bool
    link_up: bool
    time_left_s: float
    round_trip_s: float  # estimate; 0 while nothing is known


def decide(score: float, terms: Terms, situation: Situation, *, finite: bool = True) -> Decision:
    """Return what happens to a row with this score, NaN if it has none, and with this input."""
    if not terms.paired:
        if situation.mode is Mode.HUB_ONLY and not situation.private:
            return _ASKED_HUB_ONLY
        return _NOTHING_TO_ESCALATE_TO
    covered = finite and score > terms.certified
    # Told instead of the obstacle, because there the application can do something about it.
    broken = terms.has_certificate and not finite
    if situation.private:
        return _PRIVATE if covered else _DEGRADED[Reason.INPUT if broken else Reason.PRIVACY]
    why = _why_escalate(score, terms, situation.mode, finite)
    if why is None:
        return _CONFIDENT
    obstacle = _obstacle(situation)
    if obstacle is None:
        return _HUB[why]
    if covered:
        return _COVERED[obstacle]
    if broken:
        return _DEGRADED[Reason.INPUT]
    return _DEGRADED[obstacle if terms.has_certificate else Reason.NO_CERTIFICATE]


def decide_rows(
    scores: Sequence[float],
    terms: Terms,
    situation: Situation,
    not_finite: Collection[int] = (),
) -> list[Decision]:
    """Return ``decide`` for every row: ``[n] -> n``; ``not_finite`` are the rows with such input.

    The score matters only by its side of the two thresholds, so no more than four
    decisions are made however many rows there are.
    """
    if len(scores) == 1:
        return [decide(scores[0], terms, situation, finite=not not_finite)]
    decisions = _by_score(scores, terms, situation)
    if not_finite:
        broken = decide(math.nan, terms, situation, finite=False)
        for row in not_finite:
            decisions[row] = broken
    return decisions


def hub_leg_s(time_left_s: float) -> float:
    """Return how long the hub may take when the local answer is in hand."""
    return time_left_s * HUB_SHARE_OF_TIME


def worst(decisions: Sequence[Decision]) -> Decision:
    """Return the decision with the worst quality; the first one among equals."""
    if len(decisions) == 1:
        return decisions[0]
    return max(decisions, key=lambda decision: _RANK[decision.quality])


def _by_score(scores: Sequence[float], terms: Terms, situation: Situation) -> list[Decision]:
    if not terms.has_certificate:
        return [decide(math.nan, terms, situation)] * len(scores)
    certified = terms.certified
    operating = max(certified, terms.operating)
    sure = decide(math.inf, terms, situation) if operating < math.inf else None
    between = decide(operating, terms, situation)
    unsure = decide(certified, terms, situation)
    return [
        sure if sure is not None and score > operating else between if score > certified else unsure
        for score in scores
    ]


def _why_escalate(score: float, terms: Terms, mode: Mode, finite: bool) -> Reason | None:
    if mode is Mode.HUB_ONLY:
        return Reason.MODE
    if mode is Mode.PREFER_HUB:
        return Reason.PREFERRED
    if not terms.has_certificate:
        return Reason.NO_CERTIFICATE
    if not finite:
        return Reason.INPUT
    # Written so that a score that is not a number escalates.
    if not (score > terms.certified and score > terms.operating):
        return Reason.UNCERTAIN
    return None


def _obstacle(situation: Situation) -> Reason | None:
    """Return the first thing that prevents an escalation, in the order of escalation.md 5.1."""
    if situation.mode is Mode.EDGE_ONLY:
        return Reason.MODE
    if situation.mode is Mode.HUB_ONLY:
        return None  # there is no other answer: try, whatever the odds
    if not situation.link_up:
        return Reason.LINK
    if situation.time_left_s < ROUND_TRIPS_NEEDED * situation.round_trip_s:
        return Reason.DEADLINE
    return None


_RANK = {Quality.HUB: 0, Quality.CERTIFIED: 1, Quality.UNCERTIFIED: 2, Quality.DEGRADED: 3}

# Every decision there is, made once: a request only points to them.
_CONFIDENT = Decision(False, Quality.CERTIFIED, Reason.CONFIDENT)
_NOTHING_TO_ESCALATE_TO = Decision(False, Quality.UNCERTIFIED, Reason.NO_CERTIFICATE)
_PRIVATE = Decision(False, Quality.UNCERTIFIED, Reason.PRIVACY)
_HUB = {reason: Decision(True, Quality.HUB, reason) for reason in Reason}
_COVERED = {reason: Decision(False, Quality.CERTIFIED, reason) for reason in Reason}
_DEGRADED = {reason: Decision(False, Quality.DEGRADED, reason) for reason in Reason}
_ASKED_HUB_ONLY = _HUB[Reason.MODE]
