"""Figures as people read them, the same in a terminal, a report and a model card. Pure."""

import math


def percent(share: float, digits: int = 1) -> str:
    """Return a share in per cent; what is not quite all or nothing is not rounded to it."""
    text = f"{100 * share:.{digits}f}"
    if digits and float(text) in (0.0, 100.0) and share not in (0.0, 1.0):
        return "<0.1 %" if share < 0.5 else ">99.9 %"
    return f"{text.removesuffix('.0') if share in (0.0, 1.0) else text} %"


def interval(lower: float, upper: float) -> str:
    """Return the ends of a rate's interval in per cent, rounded outwards."""
    low, high = outward(lower, upper)
    return f"{low:.1f}\N{EN DASH}{high:.1f} %".replace("100.0", "100")


def outward(lower: float, upper: float) -> tuple[float, float]:
    """Return the ends of an interval in hundredths, to one digit: never narrower than it is."""
    return math.floor(1000 * lower + 1e-9) / 10, math.ceil(1000 * upper - 1e-9) / 10


def points(share: float) -> str:
    """Return a difference of shares in points, with its sign."""
    text = f"{100 * share:+.1f}" if abs(share) >= 0.0005 else "0.0"
    return text.replace("-", "\N{MINUS SIGN}")


def size(count: int) -> str:
    """Return a number of bytes in the unit that suits it."""
    if count < 10_000:
        return f"{count:,} B"
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def micros(us: float) -> str:
    """Return a time in the unit that suits it."""
    if us < 100:
        return f"{us:.1f} µs"
    if us < 1_000:
        return f"{us:.0f} µs"
    return f"{us / 1e3:.2f} ms" if us < 1e5 else f"{us / 1e3:,.0f} ms"
