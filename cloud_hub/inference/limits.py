"""How often, and how much at once, one caller may ask.

Pure: time comes in as a number, nothing here waits. ``admission.py`` knows who calls and turns
a refusal into an error; the hints are exact where they can be, because a caller who comes back
too early is refused once more and one who comes back too late was shed for nothing.
"""

from dataclasses import dataclass

# Rounding must not refuse who comes back at the very moment that it was told.
EPSILON_S = 1e-6
SMOOTHING = 0.2  # weight of the newest request in the estimate of how long one takes
NOTHING_KNOWN_S = 1.0  # hint to come back, before any request of the caller has ended


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in, in one word, and when the next one would be."""

    reason: str  # "rate" or "concurrency"
    retry_after_s: float


class Bucket:
    """A token bucket, full at first: ``burst`` requests at once, ``rate`` a second for good.

    Kept as one number, when it will be full again (the virtual scheduling algorithm of ITU-T
    I.371, also known as GCRA): nothing has to be refilled.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._interval_s = 1 / rate
        self._tolerance_s = (burst - 1) * self._interval_s
        self._full_at = 0.0

    def take(self, now: float) -> float:
        """Take one token and return 0, or take none and return the seconds until there is one."""
        full_at = max(self._full_at, now)
        wait_s = full_at - now - self._tolerance_s
        if wait_s > EPSILON_S:
            return wait_s
        self._full_at = full_at + self._interval_s
        return 0.0


class Account:
    """What one caller has used of its limits; 0 is no limit."""

    def __init__(self, rate: float = 0.0, burst: int = 0, concurrency: int = 0) -> None:
        """Without a ``burst``, as many requests may come at once as in a second."""
        self._bucket = Bucket(rate, burst or max(1, round(rate))) if rate else None
        self._concurrency = concurrency
        self.in_flight = 0
        self._lasts_s = 0.0  # a request of this caller, lately; 0: nothing is known

    def enter(self, now: float) -> Refusal | None:
        """Let a request in, whose end ``leave`` must be told, or return why not."""
        if self._concurrency and self.in_flight >= self._concurrency:
            lasts_s = self._lasts_s or NOTHING_KNOWN_S
            return Refusal("concurrency", lasts_s / self._concurrency)
        if self._bucket is not None:
            wait_s = self._bucket.take(now)
            if wait_s:
                return Refusal("rate", wait_s)
        self.in_flight += 1
        return None

    def leave(self, lasted_s: float) -> None:
        """Count a request that was let in as ended, after ``lasted_s``."""
        self.in_flight -= 1
        self._lasts_s += (lasted_s - self._lasts_s) * (SMOOTHING if self._lasts_s else 1.0)
