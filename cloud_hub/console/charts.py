"""The geometry of charts: values over time become SVG paths, ticks and words.

Pure. Paths are drawn once, here, for the page and for live updates alike, in a box of
``WIDTH`` x ``HEIGHT`` that the page stretches to the room there is. Ticks are equally spaced
from top to bottom, so the page can place their labels without knowing the scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloud_hub.console import figures

WIDTH = 600
HEIGHT = 160

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One series: where nothing was measured it is None, and the drawn line has a gap."""

    key: str  # names its color in the style sheet
    label: str
    values: Values


@dataclass(frozen=True, slots=True)
class Scale:
    """From a value to its share of the height, 0 at the bottom; ticks from top to bottom."""

    ticks: Sequence[str]
    place: Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One series as it is shown."""

    key: str
    label: str
    line: str  # path data
    area: str  # path data, empty where only the line is drawn
    values: Sequence[str]  # in words, one per point
    latest: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart as it is shown."""

    name: str
    summary: str  # what a reader who cannot see it is told
    empty: bool
    ticks: Sequence[str]
    grid: str  # path data
    at: Sequence[str]  # time of day of each point
    series: Sequence[Drawn]


def linear(top: float) -> Scale:
    """Return a scale from 0 to a round number at or above ``top``, with three to five ticks."""
    top = max(top, 1e-9)
    magnitude = 10.0 ** math.floor(math.log10(top))
    # The finest round step that reaches the top in at most four; 5 x magnitude always does.
    step = next(s * magnitude for s in (0.5, 1, 2, 5) if s * magnitude * 4 >= top)
    steps = max(2, math.ceil(top / step - 1e-9))
    return Scale(
        [f"{step * i:,.10g}" for i in range(steps, -1, -1)],
        lambda value: value / (step * steps),
    )


def shares() -> Scale:
    """Return the scale of shares: always all of it, so that 99 % never looks like half."""
    return Scale(["100%", "50%", "0%"], lambda value: value)


def decades(lowest: float, highest: float) -> Scale:
    """Return a logarithmic scale in milliseconds: the tiers are orders of magnitude apart."""
    low = math.floor(math.log10(max(lowest, 1e-3)) + 1e-9)
    high = max(math.ceil(math.log10(max(highest, 1e-3)) - 1e-9), low + 1)
    return Scale(
        [_milliseconds(10.0**power) for power in range(high, low - 1, -1)],
        lambda value: (math.log10(max(value, 10.0**low)) - low) / (high - low),
    )


def lines(
    name: str,
    drawn: Sequence[Line],
    at: Sequence[float],
    *,
    scale: Scale,
    words: Callable[[float | None], str],
    summary: str,
    filled: bool = False,
) -> Chart:
    """Return series beside each other, ``filled`` down to the axis or not."""
    floor = [0.0] * len(at)
    series = []
    for line in drawn:
        heights = [None if v is None else scale.place(v) for v in line.values]
        series.append(_drawn(line, heights, floor if filled else None, words))
    return _chart(name, series, drawn, at, scale, summary)


def stacked(
    name: str,
    drawn: Sequence[Line],
    at: Sequence[float],
    *,
    words: Callable[[float | None], str],
    summary: str,
) -> Chart:
    """Return series on top of each other, the first at the bottom."""
    sums = [0.0] * len(at)
    tops: list[list[float]] = []
    for line in drawn:
        sums = [below + (value or 0) for below, value in zip(sums, line.values, strict=True)]
        tops.append(sums)
    scale = linear(max(sums, default=0) or 1)
    below = [0.0] * len(at)
    series = []
    for line, top in zip(drawn, tops, strict=True):
        heights = [scale.place(value) for value in top]
        series.append(_drawn(line, heights, below, words))
        below = heights
    return _chart(name, series, drawn, at, scale, summary)


def spark(values: Sequence[float]) -> str:
    """Return the line of a chart without axes, from zero to the highest value."""
    top = max(values, default=0) or 1
    return _path([value / top for value in values])


def _chart(
    name: str,
    series: Sequence[Drawn],
    given: Sequence[Line],
    at: Sequence[float],
    scale: Scale,
    summary: str,
) -> Chart:
    gaps = len(scale.ticks) - 1
    grid = "".join(f"M0,{_number(HEIGHT * i / gaps)}H{WIDTH}" for i in range(gaps + 1))
    return Chart(
        name=name,
        summary=summary,
        empty=not any(any(line.values) for line in given),
        ticks=scale.ticks,
        grid=grid,
        at=[figures.clock(second) for second in at],
        series=series,
    )


def _drawn(
    line: Line,
    heights: Values,
    below: Sequence[float] | None,
    words: Callable[[float | None], str],
) -> Drawn:
    values = [words(value) for value in line.values]
    return Drawn(
        key=line.key,
        label=line.label,
        line=_path(heights),
        area="" if below is None else _area(heights, below),
        values=values,
        latest=values[-1] if values else figures.NOTHING,
    )


def _runs(heights: Values) -> list[list[tuple[int, float]]]:
    """Return the stretches without gaps, as (index, height)."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, height in enumerate(heights):
        if height is not None:
            runs[-1].append((index, height))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(heights: Values) -> str:
    parts = []
    for run in _runs(heights):
        points = [_point(index, height, len(heights)) for index, height in run]
        # A point without neighbors is a line of no length, which round caps show as a dot.
        parts.append("M" + "L".join(points) + ("h0" if len(points) == 1 else ""))
    return "".join(parts)


def _area(heights: Values, below: Sequence[float]) -> str:
    parts = []
    for run in _runs(heights):
        top = [_point(index, height, len(heights)) for index, height in run]
        bottom = [_point(index, below[index], len(heights)) for index, _ in reversed(run)]
        parts.append("M" + "L".join(top + bottom) + "Z")
    return "".join(parts)


def _point(index: int, height: float, n: int) -> str:
    x = WIDTH * index / (n - 1) if n > 1 else WIDTH / 2
    return f"{_number(x)},{_number(HEIGHT * (1 - min(max(height, 0.0), 1.0)))}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _milliseconds(ms: float) -> str:
    return f"{ms / 1000:,.10g} s" if ms >= 1000 else f"{ms:.10g} ms"
