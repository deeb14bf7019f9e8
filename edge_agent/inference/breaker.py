"""Decides when the hub is asked and when it is left alone, as a table.

Pure: time comes in as a number, randomness as a draw. ``uplink.py`` reports what happened
and makes the probes; user requests are never used as probes.

    state       SUCCEEDED    FAILED               PROBE_GOOD             PROBE_BAD
    closed      closed, 0    closed, failures+1   closed, 0              as FAILED
                             2nd in a row: open
    open        -            -                    half-open, good = 1    open, wait x 2
    half-open   -            -                    half-open, good + 1    open, wait x 2
                                                  g-th in a row: closed

``-``: nothing changes. Such a result belongs to an escalation that left before the breaker
opened, and says nothing new. Entering ``open`` from ``closed`` sets the first wait; a bad
probe doubles it up to a limit, times a draw from 0.5 to 1 so that a fleet does not knock in
step; the good probes of a run are a fixed gap apart. Closing resets everything.

``PUSHED_BACK`` is a failure at which the hub said when to come back. Until then nothing leaves,
though the breaker stays closed: the hub is there. Refusals of what left before count as one,
however many there are. If the first request after the pause is pushed back too, that is the
second failure in a row.

A new breaker is closed with one failure counted: nothing is known of the hub yet, so one
more is enough.
"""

import enum
from dataclasses import dataclass, replace


class State(enum.StrEnum):
    """Whether escalations leave."""

    CLOSED = "closed"  # they do
    OPEN = "open"  # they do not; the last probe was bad, or none was made yet
    HALF_OPEN = "half-open"  # they do not; the last probe was good


class Event(enum.StrEnum):
    """What happened on the way to the hub."""

    SUCCEEDED = "succeeded"  # an escalation was answered
    FAILED = "failed"  # an escalation was not
    PUSHED_BACK = "pushed-back"  # it was shed, and the hub said when to come back
    PROBE_GOOD = "probe-good"
    PROBE_BAD = "probe-bad"


@dataclass(frozen=True, slots=True)
class Tuning:
    """The breaker's constants.

    ``good_probes`` and ``gap_s`` trade flips and failed attempts against escalations lost
    while the link is up again. Simulated (tests/edge_agent/inference/test_breaker.py: link up
    20 s, down 3 s, 2.2 escalations a second, 20 x 1 h), flips/min, failed per 1,000, share of
    the possible escalations made: 2 x 0.1 s 3.7, 35, 95.5 %; 4 x 0.1 s 3.7, 35, 94.4 %;
    4 x 0.25 s 3.6, 34, 92.7 %. With flaps of 0.3 s after each outage, 4.6, 44, 92.7 %; 4.2, 40,
    90.3 %; 4.0, 38, 88.0 %.
    """

    failures: int = 2  # in a row, until it opens
    good_probes: int = 4  # in a row, until it closes
    gap_s: float = 0.1  # between good probes
    first_wait_s: float = 0.25  # from opening to the first probe
    max_wait_s: float = 4.0  # between bad probes
    max_pause_s: float = 60.0  # whatever a hub says: a wrong hint must not end escalation for good


DEFAULT = Tuning()


@dataclass(frozen=True, slots=True)
class Breaker:
    """The state of the way to the hub."""

    state: State = State.CLOSED
    failures: int = DEFAULT.failures - 1  # in a row, while closed
    good: int = 0  # good probes in a row, while not closed
    wait_s: float = 0.0
    probe_at: float | None = None  # when the next probe is due; None: none is needed
    quiet_until: float = 0.0  # until when the hub asked not to be asked

    @property
    def closed(self) -> bool:
        """Whether the hub is there."""
        return self.state is State.CLOSED

    def lets_through(self, now: float) -> bool:
        """Return whether escalations leave."""
        return self.closed and now >= self.quiet_until


def step(
    breaker: Breaker,
    event: Event,
    now: float,
    *,
    draw: float,
    pause_s: float = 0.0,
    tuning: Tuning = DEFAULT,
) -> Breaker:
    """Return the state that follows ``event``; ``draw`` is uniform between 0.5 and 1.

    ``pause_s`` is what the hub asked for when it pushed back.
    """
    if event is Event.PUSHED_BACK:
        until = max(breaker.quiet_until, now + min(pause_s, tuning.max_pause_s))
        if now >= breaker.quiet_until:
            breaker = step(breaker, Event.FAILED, now, draw=draw, tuning=tuning)
        return replace(breaker, quiet_until=until)
    followed = _step(breaker, event, now, draw, tuning)
    if followed.quiet_until == breaker.quiet_until:
        return followed
    return replace(followed, quiet_until=breaker.quiet_until)


def _step(breaker: Breaker, event: Event, now: float, draw: float, tuning: Tuning) -> Breaker:
    good = event in (Event.SUCCEEDED, Event.PROBE_GOOD)
    if breaker.closed:
        if good:
            return CLOSED if breaker.failures else breaker
        if breaker.failures + 1 < tuning.failures:
            return replace(breaker, failures=breaker.failures + 1)
        wait_s = tuning.first_wait_s
        return Breaker(State.OPEN, 0, 0, wait_s, now + wait_s)
    if event in (Event.SUCCEEDED, Event.FAILED):
        return breaker
    if good:
        if breaker.good + 1 >= tuning.good_probes:
            return CLOSED
        return Breaker(State.HALF_OPEN, 0, breaker.good + 1, breaker.wait_s, now + tuning.gap_s)
    wait_s = min(2 * breaker.wait_s, tuning.max_wait_s)
    return Breaker(State.OPEN, 0, 0, wait_s, now + wait_s * draw)


CLOSED = Breaker(failures=0)
