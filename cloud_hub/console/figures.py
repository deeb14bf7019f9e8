"""Numbers as people read them: short, with their unit, never more exact than they are.

Pure. None, "nothing was counted", is a dash and never a zero.
"""

import math
from datetime import UTC, datetime
from typing import NamedTuple

NOTHING = "\N{EN DASH}"
_SPACE = "\N{NO-BREAK SPACE}"


class Figure(NamedTuple):
    """A number and its unit, apart because the page sets them in different sizes."""

    value: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.value}{_SPACE}{self.unit}" if self.unit else self.value


def count(n: float) -> str:
    """Return a whole number with separators: ``12,345``."""
    return f"{n:,.0f}"


def many(n: int, noun: str) -> str:
    """Return a count with its noun: ``1 device``, ``1,000 devices``."""
    return f"{count(n)} {noun}" if n == 1 else f"{count(n)} {noun}s"


def rate(per_s: float) -> str:
    """Return a rate with one decimal while that says something: ``0.4``, ``12.5``, ``1,250``."""
    if per_s >= 100:
        return count(per_s)
    if 0 < per_s < 0.1:
        return "<0.1"
    return f"{per_s:.1f}" if per_s else "0"


def percent(share: float | None) -> str:
    """Return a share of one as ``98.7%``; only all is ``100%``, only none is ``0%``."""
    if share is None:
        return NOTHING
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%"
    return f"{min(math.floor(share * 1000 + 0.5), 999) / 10:.1f}%"


def duration(ms: float | None) -> Figure:
    """Return milliseconds with two or three digits, from one second on as seconds."""
    if ms is None:
        return Figure(NOTHING)
    if ms >= 999.5:
        return Figure(_digits(ms / 1000), "s")
    return Figure(_digits(ms), "ms")


def size(n: float) -> Figure:
    """Return a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5:
            return Figure(count(n) if unit == "B" else _digits(n), unit)
        n /= 1000
    return Figure(_digits(n), "TB")


def span(seconds: float) -> str:
    """Return how long something takes, in its largest whole unit: ``42 s``, ``5 min``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{_SPACE}{unit}"
    return f"{max(seconds, 0):.0f}{_SPACE}s"


def ago(seconds: float) -> str:
    """Return how long something is past."""
    return f"{span(seconds)} ago" if seconds >= 1 else "now"


def clock(at: float) -> str:
    """Return the time of day in UTC of seconds since the epoch: ``14:03:27``."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def iso(at: float) -> str:
    """Return seconds since the epoch as ``<time datetime>`` wants it."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _digits(value: float) -> str:
    if value >= 99.95:
        return count(value)
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}"
