"""What the overview page says, as texts, shapes and rows.

Pure. ``Page`` is rendered into HTML by ``pages.py`` and pushed to open tabs as JSON by
``live.py``: both show the same words, because there is only one place that makes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloud_hub.console import charts, figures
from cloud_hub.console.charts import Chart, Line
from cloud_hub.insight.history import DeviceLine, Overview

DEVICES_SHOWN = 50  # rows that a browser repaints every second without effort
REASONS_SHOWN = 3
# What devices tell of their link are a breaker's states; to people an open link is one that works.
_LINKS: Mapping[str, str] = {"closed": "works", "open": "down", "half-open": "down"}


class Model(Protocol):
    """A model the hub serves, or cannot serve and why."""

    @property
    def name(self) -> str:
        """What requests call it."""
        ...

    @property
    def version(self) -> str:
        """Its integer version."""
        ...

    @property
    def state(self) -> str:
        """READY or UNAVAILABLE."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not ready."""
        ...

    @property
    def provider(self) -> str:
        """What runs it."""
        ...


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table; ``at`` makes it a moment."""

    text: str
    at: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table; ``state`` chooses its mark, never alone: a cell says it in words."""

    key: str
    state: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything on the overview page that can change while it is open."""

    text: Mapping[str, str]
    shapes: Mapping[str, Mapping[str, str]]  # SVG attributes by shape
    flags: Mapping[str, bool]  # which parts of the page are shown
    charts: Mapping[str, Chart]
    tables: Mapping[str, Sequence[Row]]
    announcement: str  # for readers who listen: only what matters, not every tick


def overview(seen: Overview, models: Iterable[Model], *, now: float) -> Page:
    """Return the overview page of the hub's clock ``now``."""
    devices = sorted(seen.devices, key=lambda line: (line.online, line.name))
    spark = charts.spark(
        [
            edge + hub
            for edge, hub in zip(
                seen.series.requests_per_s_edge, seen.series.requests_per_s_hub, strict=True
            )
        ]
    )
    model_rows = [_model_row(model) for model in models]
    return Page(
        text=_texts(seen, now),
        shapes={
            "spark": {"d": spark},
            **_split(seen.share_edge, seen.share_degraded),
        },
        flags={
            "empty": seen.agents_seen == 0,
            "seen": seen.agents_seen > 0,
            "models": bool(model_rows),
            "no_models": not model_rows,
            "more_devices": len(devices) > DEVICES_SHOWN,
        },
        charts={chart.name: chart for chart in _charts(seen)},
        tables={
            "devices": [_device_row(line, now) for line in devices[:DEVICES_SHOWN]],
            "models": model_rows,
        },
        announcement=_announcement(seen),
    )


def _texts(seen: Overview, now: float) -> dict[str, str]:
    window = figures.span(seen.window_s)
    texts = {
        "as_of": f"{figures.clock(now)} UTC",
        "window": window,
        "middle": f"\N{MINUS SIGN}{_half(seen.window_s)}",
        "start": f"\N{MINUS SIGN}{window}",
        "requests": figures.rate(seen.requests_per_s),
        "requests_note": f"{figures.count(seen.rows)} rows in {window}",
        "share_edge": figures.percent(seen.share_edge),
        "share_edge_note": _share_note(seen),
        "degraded": figures.percent(seen.share_degraded),
        "degraded_note": _reasons(seen),
        "online": figures.count(seen.agents_online),
        "online_of": f"of {figures.count(seen.agents_seen)}",
        "online_note": _offline(seen),
        "part_edge": figures.percent(_certified(seen)),
        "part_degraded": figures.percent(seen.share_degraded),
        "part_hub": figures.percent(_hub(seen)),
        "rows": figures.count(seen.rows),
        "rows_total": figures.count(seen.rows_total),
        "sent": str(figures.size(seen.bytes_sent)),
        "received": str(figures.size(seen.bytes_received)),
        "sent_total": str(figures.size(seen.escalation_bytes_sent_total)),
        "devices_shown": f"{DEVICES_SHOWN} of {figures.count(seen.agents_seen)} devices are "
        "shown, those offline first.",
    }
    for tier in ("edge", "hub"):
        found = seen.latency_ms.get(tier, {})
        p95 = figures.duration(found.get("p95"))
        texts[f"p95_{tier}"] = p95.value
        texts[f"p95_{tier}_unit"] = p95.unit
        texts[f"p95_{tier}_note"] = (
            f"{_quantile(found, 'p50')}, {_quantile(found, 'p99')}"
            if found
            else f"no request in {window}"
        )
    return texts


def _quantile(found: Mapping[str, float], name: str) -> str:
    return f"{name}\N{NO-BREAK SPACE}{figures.duration(found.get(name))}"


def _half(window_s: float) -> str:
    half = window_s / 2
    if half >= 60 and half % 60:
        return f"{half / 60:g}\N{NO-BREAK SPACE}min"
    return figures.span(half)


def _certified(seen: Overview) -> float | None:
    if seen.share_edge is None:
        return None
    return max(seen.share_edge - (seen.share_degraded or 0), 0.0)


def _hub(seen: Overview) -> float | None:
    return None if seen.share_edge is None else max(1 - seen.share_edge, 0.0)


def _share_note(seen: Overview) -> str:
    if seen.share_edge is None:
        return "no answer yet in this window"
    return f"{figures.percent(_hub(seen))} escalated to the hub"


def _offline(seen: Overview) -> str:
    silent = seen.agents_seen - seen.agents_online
    return f"{figures.count(silent)} offline" if silent else "none is offline"


def _reasons(seen: Overview) -> str:
    if seen.share_degraded is None:
        return "no answer yet in this window"
    if not seen.degraded_reasons:
        return "every due escalation reached the hub"
    ordered = sorted(seen.degraded_reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{_plain(reason)} {figures.count(n)}" for reason, n in ordered[:REASONS_SHOWN]]
    if others := sum(n for _, n in ordered[REASONS_SHOWN:]):
        shown.append(f"other {figures.count(others)}")
    return ", ".join(shown)


def _plain(word: str) -> str:
    return word.replace("_", " ").replace("-", " ") or "no reason given"


def _split(share_edge: float | None, share_degraded: float | None) -> dict[str, dict[str, str]]:
    """Return the bar of who answered; a degraded answer is a local one that should not be."""
    edge = share_edge or 0.0
    degraded = min(share_degraded or 0.0, edge)
    hub = 0.0 if share_edge is None else 1 - edge
    shapes = {}
    x = 0.0
    for name, share in (("edge", edge - degraded), ("degraded", degraded), ("hub", hub)):
        shapes[f"split_{name}"] = {"x": f"{x * 1000:.1f}", "width": f"{share * 1000:.1f}"}
        x += share
    return shapes


def _charts(seen: Overview) -> list[Chart]:
    series = seen.series
    window = figures.span(seen.window_s)
    p95 = [v for v in (*series.p95_ms_edge, *series.p95_ms_hub) if v is not None]
    edge, hub = (seen.latency_ms.get(tier, {}).get("p95") for tier in ("edge", "hub"))
    return [
        charts.stacked(
            "requests",
            [
                Line("edge", "Edge", series.requests_per_s_edge),
                Line("hub", "Hub", series.requests_per_s_hub),
            ],
            series.at,
            words=_rate,
            summary=f"Requests per second over the last {window}, by tier. Now "
            f"{figures.rate(seen.requests_per_s)} per second.",
        ),
        charts.lines(
            "share",
            [Line("edge", "Edge", series.share_edge)],
            series.at,
            scale=charts.shares(),
            words=figures.percent,
            summary=f"Share of rows answered at the edge over the last {window}: "
            f"{_spoken(figures.percent(seen.share_edge))} overall.",
            filled=True,
        ),
        charts.lines(
            "latency",
            [Line("edge", "Edge", series.p95_ms_edge), Line("hub", "Hub", series.p95_ms_hub)],
            series.at,
            scale=charts.decades(min(p95, default=1), max(p95, default=100)),
            words=lambda ms: str(figures.duration(ms)),
            summary=f"Time that 95 of 100 requests stayed below over the last {window}, "
            f"logarithmic. Edge {_spoken(str(figures.duration(edge)))}, "
            f"hub {_spoken(str(figures.duration(hub)))}.",
        ),
    ]


def _rate(value: float | None) -> str:
    return figures.NOTHING if value is None else f"{figures.rate(value)}/s"


def _spoken(text: str) -> str:
    return "no request" if text == figures.NOTHING else text


def link_text(state: str, *, online: bool) -> str:
    """Return how the way to the hub is on a device whose breaker is in ``state``.

    Empty where nobody knows: of a device that is offline, the last word is an old one.
    """
    return _LINKS.get(state, "") if online else ""


def _device_row(line: DeviceLine, now: float) -> Row:
    state = "online" if line.online else "offline"
    return Row(
        key=line.name,
        state=state,
        cells={
            "name": Cell(line.name),
            "state": Cell(state.capitalize()),
            "last_seen": Cell(figures.ago(now - line.last_seen), figures.iso(line.last_seen)),
            "requests": Cell(f"{figures.rate(line.requests_per_s)}/s"),
            "share_edge": Cell(figures.percent(line.share_edge)),
            "degraded": Cell(figures.percent(line.share_degraded)),
            "link": Cell(link_text(line.link, online=line.online) or figures.NOTHING),
            "memory": Cell(
                str(figures.size(line.rss_bytes)) if line.rss_bytes else figures.NOTHING
            ),
            "hardware": Cell(line.hardware_class or figures.NOTHING),
            "version": Cell(line.agent_version or figures.NOTHING),
        },
    )


def _model_row(model: Model) -> Row:
    ready = model.state == "READY"
    return Row(
        key=f"{model.name}/{model.version}",
        state="ready" if ready else "unavailable",
        cells={
            "name": Cell(model.name),
            "version": Cell(model.version or figures.NOTHING),
            "state": Cell("Ready" if ready else _plain(model.state.lower()).capitalize()),
            "provider": Cell(model.provider or figures.NOTHING),
            "reason": Cell(model.reason or figures.NOTHING),
        },
    )


def _announcement(seen: Overview) -> str:
    if not seen.agents_seen:
        return "No device has reported yet."
    return f"{seen.agents_online} of {seen.agents_seen} devices online."
