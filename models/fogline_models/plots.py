"""Draws the plots of a report as SVG, from the report's own figures. Pure.

Small and by hand: they take the page's colors, light and dark, its font, and no library's
idea of a margin. Every plot says in words what it shows, for whoever cannot see it, and the
page prints the same figures as a table beneath. Text is escaped here, where it is written.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fogline_models.wording import micros, percent

WIDTH = 460.0
MAX_CELLS = 32  # classes in a drawn confusion matrix; more are told by their largest mistakes
MAX_SLICES = 24
TIMES = "\N{MULTIPLICATION SIGN}"
SHAPES = ("circle", "square", "diamond", "triangle")  # told apart in black and white, too


@dataclass(slots=True)
class _Drawing:
    """The parts of one SVG, in the order in which they cover each other."""

    height: float
    summary: str
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.parts.append(
            f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'
        )

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, extra: str = ""
    ) -> None:
        self.parts.append(
            f'<rect class="{style}" x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" '
            f'height="{_n(max(height, 0))}"{extra}/>'
        )

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        d = "M" + "L".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.parts.append(f'<path class="{style}" d="{d}"/>')

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">'
            f"{html.escape(words)}</text>"
        )

    def dot(self, x: float, y: float, size: float) -> None:
        """Draw a point that belongs to no series."""
        self.parts.append(f'<circle class="mark s5" cx="{_n(x)}" cy="{_n(y)}" r="{size}"/>')

    def mark(self, x: float, y: float, place: int, size: float = 4.5) -> None:
        """Draw the mark of the series at ``place``."""
        style = f"mark {series(place)}"
        match SHAPES[place % len(SHAPES)]:
            case "circle":
                self.parts.append(f'<circle class="{style}" cx="{_n(x)}" cy="{_n(y)}" r="{size}"/>')
            case "square":
                side = size * 1.7
                self.rect(x - side / 2, y - side / 2, side, side, style)
            case "diamond":
                far = size * 1.3
                self.path([(x, y - far), (x + far, y), (x, y + far), (x - far, y), (x, y - far)],
                          style)  # fmt: skip
            case _:
                far = size * 1.2
                self.path([(x, y - far), (x + far, y + far * 0.8), (x - far, y + far * 0.8),
                           (x, y - far)], style)  # fmt: skip

    def svg(self) -> str:
        name = html.escape(self.summary)
        return (
            f'<svg viewBox="0 0 {_n(WIDTH)} {_n(self.height)}" role="img" aria-label="{name}">'
            f"{''.join(self.parts)}</svg>"
        )


def series(place: int) -> str:
    """Return the style of the series at ``place``; the reference is the first."""
    return f"s{place % 6}"


def swatch(place: int) -> str:
    """Return the mark of a series alone, for the page's legends."""
    drawing = _Drawing(14, "")
    drawing.mark(7, 7, place)
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{drawing.parts[0]}</svg>'


def by_slice(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[Mapping[str, float] | None]]]
) -> str:
    """Draw the accuracy of every variant in every group: a dot with its interval.

    ``rows`` are the groups, each with one rate per name.
    """
    left, right, top = 124.0, WIDTH - 14, 8.0
    lane = 13.0
    height = lane * len(names) + 12
    found = [rate for _, rates in rows for rate in rates if rate is not None]
    low = math.floor(10 * min(rate["lower"] for rate in found) + 1e-9) / 10
    low = min(low, 0.9)
    drawing = _Drawing(
        top + height * len(rows) + 26,
        "Accuracy by slice, with 95 % intervals over scenes: "
        + "; ".join(
            f"{label}: "
            + ", ".join(
                f"{name} {percent(rate['value'])}"
                for name, rate in zip(names, rates, strict=True)
                if rate is not None
            )
            for label, rates in rows
        ),
    )

    def x(value: float) -> float:
        return left + (right - left) * (value - low) / (1 - low)

    bottom = top + height * len(rows)
    for tick in _ticks(low, 1.0):
        drawing.line(x(tick), top, x(tick), bottom, "grid")
        drawing.text(x(tick), bottom + 17, percent(tick, 0), "tick", "middle")
    for i, (label, rates) in enumerate(rows):
        y = top + height * i
        if i:
            drawing.line(0, y, right, y, "rule")
        style = "name strong" if i == 0 else "name"
        drawing.text(0, y + height / 2 + 4, _short(label, 19), style)
        for j, rate in enumerate(rates):
            if rate is None:
                continue
            at = y + 6 + lane * (j + 0.5)
            drawing.line(x(rate["lower"]), at, x(rate["upper"]), at, f"whisker {series(j)}")
            drawing.mark(x(rate["value"]), at, j)
    return drawing.svg()


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Draw which label got which answer; shades are shares of the label's items."""
    size = len(names)
    left, top = 74.0, 36.0
    cell = (WIDTH - left - 2) / size
    side = min(cell, 38.0)
    drawing = _Drawing(
        top + side * size + 6,
        "Confusion matrix, labels in rows, answers in columns; most often: "
        + (
            ", ".join(f"{words} ({count})" for words, count in mistakes(counts, names)[:5])
            or "no mistakes"
        ),
    )
    wide = max(4, int(side * size / max(size, 1) / 6.5))
    drawing.text(left + side * size / 2, 9, "answer", "tick", "middle")
    drawing.text(0, 9, "label", "tick")
    for i, name in enumerate(names):
        if side >= 11:
            drawing.text(left - 8, top + side * (i + 0.5) + 4, _short(name, 10), "name", "end")
            drawing.text(left + side * (i + 0.5), top - 6, _short(name, wide), "name", "middle")
        total = sum(counts[i])
        for j, count in enumerate(counts[i]):
            share = count / total if total else 0.0
            x, y = left + side * j, top + side * i
            drawing.rect(x + 0.75, y + 0.75, side - 1.5, side - 1.5, "cell")
            if count:
                # The root keeps rare mistakes visible.
                depth = math.sqrt(share) if i != j else share
                style = "hit" if i == j else "miss"
                drawing.rect(
                    x + 0.75, y + 0.75, side - 1.5, side - 1.5, style,
                    f' fill-opacity="{0.08 + 0.84 * depth:.2f}"',
                )  # fmt: skip
                if side >= 20:
                    deep = f" on-{style}" if depth > (0.6 if i == j else 0.75) else ""
                    drawing.text(x + side / 2, y + side / 2 + 4, str(count), f"count{deep}",
                                 "middle")  # fmt: skip
    return drawing.svg()


def mistakes(counts: Sequence[Sequence[int]], names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the confusions in words with their counts, the most frequent first."""
    found = [
        (count, i, j)
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    found.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    return [(f"{names[i]!r} taken for {names[j]!r}", count) for count, i, j in found]


def reliability(bins: Sequence[Mapping[str, float]], error: float) -> str:
    """Draw what the model claims against what it keeps."""
    left, right, top, bottom = 44.0, 400.0, 10.0, 366.0
    drawing = _Drawing(
        bottom + 42,
        f"Reliability: calibration error {percent(error)}; "
        + "; ".join(
            f"claims {percent(part['confidence'])}, keeps {percent(part['accuracy'])}"
            for part in bins
        ),
    )

    def x(value: float) -> float:
        return left + (right - left) * value

    def y(value: float) -> float:
        return bottom - (bottom - top) * value

    for tick in (0, 0.25, 0.5, 0.75, 1):
        drawing.line(left, y(tick), right, y(tick), "grid")
        drawing.text(left - 8, y(tick) + 4, percent(tick, 0), "tick", "end")
        drawing.text(x(tick), bottom + 17, percent(tick, 0), "tick", "middle")
    drawing.line(x(0), y(0), x(1), y(1), "ideal")
    drawing.text(x(0.03), y(0.93), "keeps more than it claims", "tick")
    drawing.text(x(0.97), y(0.05), "claims more than it keeps", "tick", "end")
    for part in bins:
        here = x(part["confidence"])
        drawing.line(here, y(part["confidence"]), here, y(part["accuracy"]), "gap")
    if len(bins) > 1:
        drawing.path([(x(p["confidence"]), y(p["accuracy"])) for p in bins], "curve s1 thin")
    for part in bins:
        drawing.dot(x(part["confidence"]), y(part["accuracy"]), 4)
    drawing.text((left + right) / 2, bottom + 36, "confidence", "tick", "middle")
    return drawing.svg()


def latency(names: Sequence[str], costs: Sequence[Mapping[str, Any]], bar: float | None) -> str:
    """Draw the latency of every variant relative to the reference, batch by batch."""
    left, right = 96.0, WIDTH - 116
    lane, head = 20.0, 24.0
    batches = list(costs[0]["latency_us"])
    widest = max(c["ratio"][b]["high"] for c in costs for b in batches)
    limit = 1.02 * float(max(1.0, widest, bar or 0.0))
    block = head + lane * len(names) + 8
    drawing = _Drawing(
        block * len(batches) + 24,
        "Latency relative to the reference: "
        + "; ".join(
            f"batch {b}: "
            + ", ".join(
                f"{name} {micros(c['latency_us'][b]['median'])}, {c['ratio'][b]['median']:.2f} x"
                for name, c in zip(names, costs, strict=True)
            )
            for b in batches
        ),
    )

    def x(value: float) -> float:
        return left + (right - left) * value / limit

    bottom = block * len(batches) - 4
    for i, batch in enumerate(batches):
        y = block * i
        drawing.text(0, y + 15, f"batch {batch}", "name strong")
        for j, (name, cost) in enumerate(zip(names, costs, strict=True)):
            at = y + head + lane * j
            ratio, time = cost["ratio"][batch], cost["latency_us"][batch]
            drawing.text(0, at + 13, _short(name, 13), "name")
            drawing.rect(left, at + 3, x(ratio["median"]) - left, lane - 6, f"bar {series(j)}",
                         ' rx="2"')  # fmt: skip
            if ratio["low"] != ratio["high"]:
                middle = at + lane / 2
                drawing.line(x(ratio["low"]), middle, x(ratio["high"]), middle, "spread")
            drawing.text(right + 8, at + 13.5, micros(time["median"]), "value")
            drawing.text(WIDTH, at + 13.5, f"{ratio['median']:.2f} {TIMES}", "value strong", "end")
    drawing.line(x(1), 20, x(1), bottom, "one")
    drawing.text(x(1), bottom + 16, f"{names[0]} = 1", "tick", "middle")
    if bar is not None and abs(bar - 1) > 0.02:
        drawing.line(x(bar), 20, x(bar), bottom, "limit")
        drawing.text(x(bar), bottom + 16, f"at most {bar:.2f}", "tick limit-name", "middle")
    return drawing.svg()


def risk(found: Mapping[str, Any]) -> str:
    """Draw how disagreement with the hub falls as more is escalated, and where it is certified."""
    curve, at, alpha = found["curve"], found["at"], found["alpha"]
    highest = max([point["disagreement"] for point in curve] + [alpha * 1.15])
    drawing, x, y, bottom = _plane(
        highest,
        f"Disagreement with {found['hub_model']} against what is escalated: "
        f"{percent(curve[0]['disagreement'])} without escalation; at the certified threshold "
        f"{percent(at['escalated'])} escalated and {percent(at['disagreement'])} disagreement, at "
        f"most {percent(alpha)} certified",
    )
    drawing.rect(x(0), y(alpha), x(1) - x(0), y(0) - y(alpha), "safe")
    drawing.line(x(0), y(alpha), x(1), y(alpha), "limit")
    drawing.text(x(1), y(alpha) - 6, f"certified: at most {percent(alpha, 0)}", "tick limit-name",
                 "end")  # fmt: skip
    drawing.path([(x(p["escalated"]), y(p["disagreement"])) for p in curve], "curve s1")
    drawing.line(x(at["escalated"]), y(highest), x(at["escalated"]), bottom, "here")
    drawing.dot(x(at["escalated"]), y(at["disagreement"]), 5.5)
    side, shift = ("start", 9) if at["escalated"] < 0.6 else ("end", -9)
    drawing.text(
        x(at["escalated"]) + shift, y(highest) + 12,
        f"threshold: {percent(at['escalated'], 0)} escalated", "value strong", side,
    )  # fmt: skip
    drawing.text(
        x(at["escalated"]) + shift, y(highest) + 28,
        f"{percent(at['disagreement'])} answered differently", "value", side,
    )  # fmt: skip
    return drawing.svg()


def pair(found: Mapping[str, Any]) -> str:
    """Draw the accuracy of edge and hub together as more is escalated."""
    curve, at = found["curve"], found["at"]
    edge, hub = found["accuracy_edge"], found["accuracy_hub"]
    values = [edge, hub, *(point["accuracy"] for point in curve)]
    low = math.floor(min(values) * 50) / 50 - 0.005
    high = min(1.0, max(values) + 0.01)
    drawing, x, y, bottom = _plane(
        high,
        f"Accuracy of the pair against what is escalated: edge alone {percent(edge)}, hub alone "
        f"{percent(hub)}, at the certified threshold {percent(at['accuracy'])}",
        low,
    )
    drawing.line(x(0), y(hub), x(1), y(hub), "ideal")
    drawing.text(x(1), y(hub) + 16, f"hub alone {percent(hub)}", "tick", "end")
    drawing.path([(x(p["escalated"]), y(p["accuracy"])) for p in curve], "curve s2")
    drawing.line(x(at["escalated"]), y(high), x(at["escalated"]), bottom, "here")
    drawing.dot(x(at["escalated"]), y(at["accuracy"]), 5.5)
    side, shift = ("start", 10) if at["escalated"] < 0.6 else ("end", -10)
    drawing.text(x(at["escalated"]) + shift, y(at["accuracy"]) + 20, percent(at["accuracy"]),
                 "value strong", side)  # fmt: skip
    drawing.text(x(1), y(low) - 8, f"edge alone {percent(edge)}", "tick", "end")
    return drawing.svg()


def _plane(highest: float, summary: str, lowest: float = 0.0) -> tuple[_Drawing, Any, Any, float]:
    left, right, top, bottom = 48.0, WIDTH - 12, 12.0, 250.0
    drawing = _Drawing(bottom + 42, summary)

    def x(share: float) -> float:
        return left + (right - left) * share

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - lowest) / (highest - lowest)

    for tick in _ticks(lowest, highest):
        drawing.line(left, y(tick), right, y(tick), "grid")
        drawing.text(left - 8, y(tick) + 4, percent(tick, 0 if highest > 0.05 else 1), "tick",
                     "end")  # fmt: skip
    for share in (0, 0.25, 0.5, 0.75, 1):
        drawing.text(x(share), bottom + 17, percent(share, 0), "tick", "middle")
    drawing.text((left + right) / 2, bottom + 36, "escalated to the hub", "tick", "middle")
    drawing.line(left, bottom, right, bottom, "axis")
    return drawing, x, y, bottom


def _ticks(low: float, high: float) -> list[float]:
    """Return four to six round numbers between ``low`` and ``high``."""
    step = next(
        step
        for power in (-3, -2, -1, 0)
        for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
        if (high - low) / step <= 5.5
    )
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
