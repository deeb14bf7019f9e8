"""What devices count, as values that can be subtracted, added and asked for quantiles.

Pure. A device reports totals since its agent started; the increment between two reports of
one start is their difference. Latencies are histograms, so that those of many devices merge.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Outcome(NamedTuple):
    """How a row ended."""

    model: str
    release: str
    tier: str
    quality: str
    reason: str


class Timing(NamedTuple):
    """Which requests a histogram counts, and its upper bounds in seconds."""

    model: str
    release: str
    tier: str
    bounds_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows by outcome, requests by duration, bytes to and from the hub."""

    rows: Mapping[Outcome, int] = field(default_factory=dict)
    requests: Mapping[Timing, Sequence[int]] = field(default_factory=dict)
    bytes_sent: int = 0
    bytes_received: int = 0

    def since(self, earlier: "Counts") -> "Counts":
        """Return the increment from ``earlier``, which belongs to the same start.

        Counts only grow; one that shrank means another start under the same boot id, and
        then everything counted since is new. One that is no longer named did not change.
        """
        rows = {key: n - earlier.rows.get(key, 0) for key, n in self.rows.items()}
        requests = {
            key: [n - before for n, before in zip(counts, earlier.requests[key], strict=True)]
            if key in earlier.requests
            else list(counts)
            for key, counts in self.requests.items()
        }
        sent = self.bytes_sent - earlier.bytes_sent
        received = self.bytes_received - earlier.bytes_received
        if min(sent, received, *rows.values(), *(n for c in requests.values() for n in c)) < 0:
            return self
        return Counts(
            {key: n for key, n in rows.items() if n},
            {key: counts for key, counts in requests.items() if any(counts)},
            sent,
            received,
        )

    @property
    def empty(self) -> bool:
        """Whether nothing was counted."""
        return not (self.rows or self.requests or self.bytes_sent or self.bytes_received)

    @property
    def total_rows(self) -> int:
        """Rows of every outcome."""
        return sum(self.rows.values())

    @property
    def total_requests(self) -> int:
        """Requests of every duration."""
        return sum(sum(counts) for counts in self.requests.values())

    def rows_where(self, **fields: str) -> int:
        """Return the rows whose outcome has these fields, e.g. ``tier="edge"``."""
        return sum(
            n
            for outcome, n in self.rows.items()
            if all(getattr(outcome, name) == value for name, value in fields.items())
        )

    def quantile_s(self, tiers: Collection[str], q: float) -> float | None:
        """Return the duration that a share ``q`` of these tiers' requests stayed below, in seconds.

        Interpolated within its bucket; beyond the last bound it is that bound. None if the
        tiers answered nothing.
        """
        buckets: Counter[tuple[float, float]] = Counter()  # (lower, upper) -> requests
        for timing, counts in self.requests.items():
            if timing.tier not in tiers:
                continue
            bounds = timing.bounds_s
            for lower, upper, n in zip(
                (0.0, *bounds), (*bounds, bounds[-1] if bounds else 0.0), counts, strict=True
            ):
                buckets[lower, upper] += n
        wanted = q * buckets.total()
        if not buckets.total():
            return None
        passed = 0.0
        upper = 0.0
        for (lower, upper), n in sorted(buckets.items(), key=lambda item: item[0][::-1]):
            if n and passed + n >= wanted:
                return lower + (upper - lower) * max(wanted - passed, 0.0) / n
            passed += n
        return upper


def total(parts: Iterable[Counts]) -> Counts:
    """Return the sum of increments."""
    rows: Counter[Outcome] = Counter()
    requests: dict[Timing, list[int]] = {}
    sent = received = 0
    for part in parts:
        rows.update(part.rows)
        for key, counts in part.requests.items():
            if key in requests:
                requests[key] = [a + b for a, b in zip(requests[key], counts, strict=True)]
            else:
                requests[key] = list(counts)
        sent += part.bytes_sent
        received += part.bytes_received
    return Counts(dict(rows), requests, sent, received)
