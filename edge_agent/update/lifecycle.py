"""The life of a candidate release of one model on one device, as a table.

Which step may follow which is decided here and nowhere else. Nothing in this file touches a
disk, a clock or a network: ``updater.py`` performs the steps and reports what happened, and
``slots.py`` remembers the state across a power cut.

                         nothing of the candidate has answered yet
          ┌──────────────────────────────────────────────────────────────────┐
    IDLE ─wanted→ FETCHING ─done→ VERIFYING ─done→ TESTING ─done→ SHADOW ─done→ TRIAL ─done→ PROBATION
     ↑               │ ↑ wanted       │               │              │            │               │
     │   interrupted │ │              │               │              │            │ failed        │
     │        failed ↓ │       failed ↓        failed ↓       failed ↓            ↓ booted        ↓
     │             WAITING ←──────────┴───────────────┴──────────────┘          ROLLING_BACK ←────┤
     │                ↑                                                            │              │
     │                └──────────────── done: the committed release serves ────────┘              │
     └────────────────────────────────── done: committed ─────────────────────────────────────────┘

Two rows are the same everywhere, so that nothing has to be remembered about them:

* ``SUPERSEDED``: the hub wants something else now. Work that changed nothing is dropped (IDLE); a
  candidate that serves is taken back first (ROLLING_BACK), so that the next one always has the
  committed release to fall back to; a rollback in progress is finished.
* ``BOOTED``: the agent starts and finds this state on the disk. Losing power is an ordinary
  event. Only a restart while fetching is free: nothing of the candidate was looked at yet, and a
  long download must arrive on a device that is switched off every evening. From VERIFYING on
  a restart may be the candidate's own doing (a parser that crashes, a model that exhausts the
  memory), so it counts as a failure.

A failure leaves the candidate two more attempts: after ``MAX_ATTEMPTS`` of one generation it is
in quarantine until the hub raises the generation, as REJECTED if it never served and as
ROLLED_BACK if it did. A candidate that is certain to fail again (``REFUSED``: wrong outputs, a
graph that does not load) is rejected at once. ``INTERRUPTED`` (the hub cannot be reached) is
nobody's fault and never counts, so an outage of any length ends in the wanted release.

So a restart during TRIAL or PROBATION rolls back at once and still leaves further attempts:
the device serves what is known to be good while it finds out, and one power cut does not cost
it the release.

Where only certificates differ from what serves, there is nothing to test: once they are fetched
the candidate *is* what serves (``RENEWED``, from FETCHING straight to IDLE). Another variant that
they make the better choice takes the whole way.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

MAX_ATTEMPTS = 3  # of one generation


class State(enum.StrEnum):
    """What the device is doing about the candidate release."""

    IDLE = "idle"  # no candidate; the committed release serves, if there is one
    FETCHING = "fetching"
    VERIFYING = "verifying"
    TESTING = "testing"  # golden inputs in a child process
    SHADOW = "shadow"  # beside the committed release, answering nobody
    TRIAL = "trial"  # the candidate takes over and must answer its golden inputs there
    PROBATION = "probation"  # the candidate serves under watch, the committed release is kept
    ROLLING_BACK = "rolling_back"
    WAITING = "waiting"  # for the next attempt
    REJECTED = "rejected"  # in quarantine; it never served
    ROLLED_BACK = "rolled_back"  # in quarantine; it served and was taken back


class Event(enum.StrEnum):
    """What has just happened on the device."""

    WANTED = "wanted"  # an attempt is due
    DONE = "done"
    RENEWED = "renewed"  # the candidate is the committed release under other certificates
    FAILED = "failed"  # another attempt may go better
    REFUSED = "refused"  # the same bytes would fail again
    INTERRUPTED = "interrupted"  # the outside world is away
    SUPERSEDED = "superseded"  # a newer generation wants something else
    BOOTED = "booted"  # the agent starts in this state


TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.IDLE: {
        Event.WANTED: State.FETCHING,
        Event.SUPERSEDED: State.IDLE,
        Event.BOOTED: State.IDLE,
    },
    State.FETCHING: {
        Event.DONE: State.VERIFYING,
        Event.RENEWED: State.IDLE,
        Event.FAILED: State.WAITING,
        Event.REFUSED: State.REJECTED,
        Event.INTERRUPTED: State.WAITING,
        Event.SUPERSEDED: State.IDLE,
        Event.BOOTED: State.FETCHING,  # resumes with the blocks that are here
    },
    State.VERIFYING: {
        Event.DONE: State.TESTING,
        Event.FAILED: State.WAITING,
        Event.REFUSED: State.REJECTED,
        Event.SUPERSEDED: State.IDLE,
        Event.BOOTED: State.WAITING,
    },
    State.TESTING: {
        Event.DONE: State.SHADOW,
        Event.FAILED: State.WAITING,
        Event.REFUSED: State.REJECTED,
        Event.SUPERSEDED: State.IDLE,
        Event.BOOTED: State.WAITING,
    },
    State.SHADOW: {
        Event.DONE: State.TRIAL,
        Event.FAILED: State.WAITING,
        Event.REFUSED: State.REJECTED,
        Event.SUPERSEDED: State.IDLE,
        Event.BOOTED: State.WAITING,
    },
    # From here on the candidate answers. There is no REFUSED: it passed its self-test, so what
    # fails now may be the moment's fault, and the way back is the same in any case.
    State.TRIAL: {
        Event.DONE: State.PROBATION,
        Event.FAILED: State.ROLLING_BACK,
        Event.SUPERSEDED: State.ROLLING_BACK,
        Event.BOOTED: State.ROLLING_BACK,
    },
    State.PROBATION: {
        Event.DONE: State.IDLE,
        Event.FAILED: State.ROLLING_BACK,
        Event.SUPERSEDED: State.ROLLING_BACK,
        Event.BOOTED: State.ROLLING_BACK,
    },
    # There is nothing else a device could do than go back, so it tries until the engine takes it.
    State.ROLLING_BACK: {
        Event.DONE: State.WAITING,
        Event.FAILED: State.ROLLING_BACK,
        Event.SUPERSEDED: State.ROLLING_BACK,
        Event.BOOTED: State.ROLLING_BACK,
    },
    State.WAITING: {
        Event.WANTED: State.FETCHING,
        Event.SUPERSEDED: State.IDLE,
        Event.BOOTED: State.WAITING,
    },
    State.REJECTED: {Event.SUPERSEDED: State.IDLE, Event.BOOTED: State.REJECTED},
    State.ROLLED_BACK: {Event.SUPERSEDED: State.IDLE, Event.BOOTED: State.ROLLED_BACK},
}

# The candidate answers requests in these, and the committed release is its rollback target.
SERVING_CANDIDATE = frozenset({State.TRIAL, State.PROBATION})

# Nothing happens in these before the hub wants something else.
RESTING = frozenset({State.IDLE, State.REJECTED, State.ROLLED_BACK})

COUNTED: Mapping[Event, frozenset[State]] = {
    Event.FAILED: frozenset(
        {
            State.FETCHING,
            State.VERIFYING,
            State.TESTING,
            State.SHADOW,
            State.TRIAL,
            State.PROBATION,
        }
    ),
    Event.REFUSED: frozenset({State.FETCHING, State.VERIFYING, State.TESTING, State.SHADOW}),
    Event.BOOTED: frozenset(
        {State.VERIFYING, State.TESTING, State.SHADOW, State.TRIAL, State.PROBATION}
    ),
}

# What `Reported.phase` of fleet.proto says in each state. "committed", "rejected" and
# "rolled-back" are final: a rollback under way is still "trial", because attempts may be left.
PHASES: Mapping[State, str] = {
    State.IDLE: "committed",
    State.FETCHING: "downloading",
    State.VERIFYING: "verifying",
    State.TESTING: "self-test",
    State.SHADOW: "shadow",
    State.TRIAL: "trial",
    State.PROBATION: "trial",
    State.ROLLING_BACK: "trial",
    State.WAITING: "accepted",
    State.REJECTED: "rejected",
    State.ROLLED_BACK: "rolled-back",
}


class StepEnded(Exception):
    """A step did not get done. The class says which event that is, the rest is for people."""

    event: ClassVar[Event]

    def __init__(
        self, code: str, sentence: str, figures: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(f"{code}: {sentence}")
        self.code = code  # stable, "<stage>/<what>"
        self.sentence = sentence
        self.figures = dict(figures or {})


class StepFailed(StepEnded):
    """Try again: the next attempt may go better. It counts."""

    event = Event.FAILED


class StepRefused(StepEnded):
    """Do not try again: the same bytes would fail again."""

    event = Event.REFUSED


class StepInterrupted(StepEnded):
    """Try again as often as it takes: the outside world is away. Only fetching depends on it."""

    event = Event.INTERRUPTED


class IllegalTransition(Exception):
    """The updater reported an event that cannot happen in this state: our bug."""


@dataclass(frozen=True, slots=True)
class Life:
    """Where a candidate stands, and how often it has failed in this generation."""

    state: State = State.IDLE
    failures: int = 0

    @property
    def attempt(self) -> int:
        """Which attempt this is, or was the last: 1 to ``MAX_ATTEMPTS``; 0 without a candidate."""
        if self.state is State.IDLE:
            return 0
        over = self.state in RESTING or self.state is State.ROLLING_BACK
        return max(1, self.failures) if over else min(self.failures + 1, MAX_ATTEMPTS)

    @property
    def phase(self) -> str:
        """What the hub is told, in the words of ``Reported.phase``."""
        return PHASES[self.state]

    def after(self, event: Event) -> "Life":
        """Return the life that follows ``event``.

        Raises:
            IllegalTransition: the table has no such entry.
        """
        state = step(self.state, event)
        failures = self.failures + (self.state in COUNTED.get(event, frozenset()))
        if state is State.IDLE:
            return Life()
        if state is State.WAITING and failures >= MAX_ATTEMPTS:
            state = State.ROLLED_BACK if self.state is State.ROLLING_BACK else State.REJECTED
        return Life(state, failures)


def step(state: State, event: Event) -> State:
    """Return the state that follows ``event`` in ``state``, attempts not counted.

    Raises:
        IllegalTransition: the table has no such entry.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"{event} cannot happen while {state}") from None
