"""What the device pages say, as texts, shapes and rows. Pure, like ``views.py``."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cloud_hub.console import certificate_views, figures
from cloud_hub.console.figures import many
from cloud_hub.console.roster import (
    FAILED,
    SERVES,
    STATUSES,
    UPDATES,
    Line,
    ModelLine,
    Query,
    Selection,
    select,
)
from cloud_hub.console.views import Cell, Page, Row
from cloud_hub.fleet.certificates import Issued
from cloud_hub.fleet.controller import Answered, Event
from cloud_hub.insight.history import Decided, DeviceLine

ANSWERED_S = 900  # of the counted outcomes
TRAFFIC_S = 300.0

# Phases as people read them. ``accepted`` is also where a device waits for another attempt.
PHASES: Mapping[str, str] = {
    "accepted": "Accepted",
    "downloading": "Downloading",
    "verifying": "Verifying",
    "self-test": "Self-test",
    "shadow": "Shadow",
    "trial": "Trial",
    "committed": "Committed",
    "rolled-back": "Rolled back",
    "rejected": "Refused",
}


@dataclass(frozen=True, slots=True)
class Detail:
    """What the page of one device is made of."""

    line: Line
    events: Sequence[Event]
    answered: Sequence[Answered]
    decisions: Sequence[Decided] = ()
    issued: Mapping[tuple[str, str], Issued] = field(default_factory=dict)  # by model and id


def devices(lines: Sequence[Line], query: Query, *, now: float) -> Page:
    """Return the table of devices that a query asks for."""
    found = select(lines, query, now)
    matching = len(found.matching)
    texts = {
        "as_of": f"{figures.clock(now)} UTC",
        "total": figures.count(found.total),
        "matching": many(matching, "device"),
        "showing": _showing(found, query),
        **{f"count_{name}": figures.count(found.statuses.get(name, 0)) for name in STATUSES},
        **{f"count_{name}": figures.count(found.updates.get(name, 0)) for name in UPDATES},
        f"count_{SERVES[0]}": figures.count(found.fallbacks),
    }
    return Page(
        text=texts,
        shapes={},
        flags={
            "empty": found.total == 0,
            "some": found.total > 0,
            "none_match": found.total > 0 and matching == 0,
            "rows": matching > 0,
            "previous": found.page > 1,
            "next": found.page < found.pages,
        },
        charts={},
        tables={"devices": [_device_row(line, now) for line in found.rows]},
        announcement=_announcement(lines),
    )


def device(detail: Detail, traffic: DeviceLine | None, *, now: float) -> Page:
    """Return the page of one device."""
    line = detail.line
    rows = sum(answered.rows for answered in detail.answered)
    failed = [model for model in line.models if model.code]
    return Page(
        text={
            "as_of": f"{figures.clock(now)} UTC",
            "status": line.status.capitalize(),
            "since": "" if line.since is None else f"for {figures.span(now - line.since)}",
            "standing": line.standing.capitalize(),
            "last_seen": figures.NOTHING
            if line.last_seen is None
            else figures.ago(now - line.last_seen),
            "first_seen": _moment(line.first_seen),
            "version": line.agent_version or figures.NOTHING,
            "hardware": line.hardware_class or figures.NOTHING,
            "link": line.link or figures.NOTHING,
            "link_note": f"link {line.link}" if line.link else "no report of the link",
            "memory": str(figures.size(line.rss_bytes)) if line.rss_bytes else figures.NOTHING,
            "wanted": figures.count(line.generation),
            "published": figures.count(line.published_generation),
            "reported": figures.count(line.reported_generation),
            "generation_note": _generation_note(line),
            "requests": figures.rate(traffic.requests_per_s) if traffic else figures.NOTHING,
            "rows": f"{figures.count(traffic.rows if traffic else 0)} rows in "
            f"{figures.span(TRAFFIC_S)}",
            "share_edge": figures.percent(traffic.share_edge if traffic else None),
            "share_edge_note": _escalated(traffic),
            "degraded": figures.percent(traffic.share_degraded if traffic else None),
            "degraded_note": _degraded(detail.answered),
            "answered": f"{figures.count(rows)} rows in {figures.span(ANSWERED_S)}",
        },
        shapes={},
        flags={
            "failed": bool(failed),
            "models": bool(line.models),
            "no_models": not line.models,
            "answered": bool(detail.answered),
            "no_answers": not detail.answered,
            "decisions": bool(detail.decisions),
            "no_decisions": not detail.decisions,
            "events": bool(detail.events),
            "no_events": not detail.events,
            "unmanaged": not line.managed,
        },
        charts={},
        tables={
            "failures": [_failure(model) for model in failed],
            "models": [_model(model, detail.issued, now) for model in line.models],
            "answered": [_answered(one, rows) for one in detail.answered],
            "decisions": _decisions(detail.decisions, now),
            "events": _events(detail.events, now),
        },
        announcement=_device_announcement(line),
    )


def _showing(found: Selection, query: Query) -> str:
    first = (found.page - 1) * query.size + 1
    last = first + len(found.rows) - 1
    if not found.rows:
        return ""
    return (
        f"{figures.count(first)} to {figures.count(last)} of {many(len(found.matching), 'device')}"
    )


def _device_row(line: Line, now: float) -> Row:
    return Row(
        key=line.name,
        state=line.status,
        cells={
            "name": Cell(line.name),
            "status": Cell(line.status.capitalize()),
            "since": Cell(figures.span(now - line.since), figures.iso(line.since))
            if line.since is not None
            else Cell(figures.NOTHING),
            "update": Cell(line.standing.capitalize()),
            "models": Cell(", ".join(model.words() for model in line.models) or figures.NOTHING),
            "hardware": Cell(line.hardware_class or figures.NOTHING),
            "link": Cell(line.link or figures.NOTHING),
            "last_seen": Cell(figures.ago(now - line.last_seen), figures.iso(line.last_seen))
            if line.last_seen is not None
            else Cell(figures.NOTHING),
        },
    )


def _announcement(lines: Sequence[Line]) -> str:
    if not lines:
        return "No device has reported yet."
    online = sum(line.online for line in lines)
    failed = sum(line.standing == "failed" for line in lines)
    instead = sum(any(m.served and m.served.instead_of for m in line.models) for line in lines)
    text = f"{online} of {many(len(lines), 'device')} online."
    text = f"{text} The update of {failed} failed." if failed else text
    return f"{text} {instead} answer with a fallback." if instead else text


def _device_announcement(line: Line) -> str:
    text = f"{line.name} is {line.status}, its update is {line.standing}."
    failed = [f"{model.code}: {model.sentence}" for model in line.models if model.failed]
    return " ".join([text, *failed])


def _generation_note(line: Line) -> str:
    if not line.managed:
        return "it has not reported through the broker"
    if line.generation == 0:
        return "nothing was wanted yet"
    if line.published_generation < line.generation:
        return "waits for the broker"
    if line.reported_generation < line.generation:
        return "the device has not taken it up yet" if line.online else "waits for the device"
    return "the device speaks about what is wanted"


def _escalated(traffic: DeviceLine | None) -> str:
    if traffic is None or traffic.share_edge is None:
        return f"no answer in {figures.span(TRAFFIC_S)}"
    return f"{figures.percent(1 - traffic.share_edge)} escalated to the hub"


def _degraded(answered: Sequence[Answered]) -> str:
    reasons: dict[str, int] = {}
    for one in answered:
        if one.quality == "degraded":
            reasons[one.reason] = reasons.get(one.reason, 0) + one.rows
    if not reasons:
        return "every due escalation reached the hub" if answered else "no answer yet"
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    words = ", ".join(f"{plain(reason)} {figures.count(n)}" for reason, n in ordered[:3])
    return f"in {figures.span(ANSWERED_S)}: {words}"


def _failure(model: ModelLine) -> Row:
    wanted = f"{model.model}@{model.wanted}" if model.wanted else model.model
    space = "" if model.running else " "
    runs = f"It keeps running {model.model}{space}{_release(model.running, model.version)}."
    if model.phase == "rolled-back":
        title = f"{wanted} was taken back"
    elif model.failed:
        title = f"{wanted} was refused"
    else:
        title = f"An attempt at {wanted} failed"
        runs = f"The device tries again: attempt {model.attempt}."
    if model.failed and not (model.running or model.version):
        runs = f"It runs no {model.model} now."
    return Row(
        key=model.model,
        state="failed" if model.failed else "retrying",
        cells={
            "title": Cell(title),
            "code": Cell(model.code),
            "sentence": Cell(model.sentence or "The device gave no sentence."),
            "runs": Cell(runs),
        },
    )


def _model(model: ModelLine, issued: Mapping[tuple[str, str], Issued], now: float) -> Row:
    progress = ""
    if model.bytes_total and model.phase == "downloading":
        progress = f"{100 * model.bytes_done / model.bytes_total:.0f}%"
    certificate, promise = _promise(model, issued, now)
    amount = f"{figures.size(model.bytes_done)} of {figures.size(model.bytes_total)}"
    return Row(
        key=model.model,
        state=model.phase,
        cells={
            "name": Cell(model.model),
            "phase": Cell(PHASES.get(model.phase, plain(model.phase).capitalize())),
            "wanted": Cell(f"@{model.wanted}" if model.wanted else figures.NOTHING),
            "running": Cell(_release(model.running, model.version)),
            "variant": Cell(_variant(model)),
            "provider": Cell(model.served.provider if model.served else figures.NOTHING),
            "aside": Cell(_aside(model)),
            "certificate": Cell(certificate),
            "promise": Cell(promise),
            "previous": Cell(f"@{model.previous}" if model.previous else figures.NOTHING),
            "attempt": Cell(figures.count(model.attempt) if model.attempt else figures.NOTHING),
            "progress": Cell(progress),
            "amount": Cell(f"{progress}, {amount}" if progress else ""),
            "figures": Cell(_figures(model.figures)),
        },
    )


def _variant(model: ModelLine) -> str:
    if model.served is None:
        return "its agent does not tell" if model.now else figures.NOTHING
    return model.served.words


def _aside(model: ModelLine) -> str:
    served = model.served
    if served is None:
        return ""
    why = f" {served.aside}." if served.aside else ""
    if served.instead_of:
        return f"A fallback: {served.instead_of} is meant for this device.{why}"
    return f"As meant for this device.{why}" if why else ""


def _promise(
    model: ModelLine, issued: Mapping[tuple[str, str], Issued], now: float
) -> tuple[str, str]:
    """Return how the certificate stands under which the device answers, and what it says."""
    served = model.served
    if served is None:
        return figures.NOTHING, ""
    if not served.certificate:
        return "None", ""
    found = issued.get((model.model, served.certificate))
    if found is None:
        return "Unknown", f"This hub has not issued {served.certificate} for what runs."
    sentence = certificate_views.promise(found.certificate)
    if found.reason:
        sentence = f"Withdrawn: {found.reason}. {sentence}"
    return certificate_views.state(found, now), sentence


def _release(number: int, version: str) -> str:
    if number:
        return f"@{number} ({version})" if version else f"@{number}"
    return f"{version}, installed by hand" if version else figures.NOTHING


def _figures(values: Mapping[str, float]) -> str:
    words = [f"{plain(name)} {value:.4g}" for name, value in sorted(values.items())]
    return ", ".join(words) or figures.NOTHING


def _answered(one: Answered, rows: int) -> Row:
    return Row(
        key="/".join((one.model, one.tier, one.quality, one.reason)),
        state="degraded" if one.quality == "degraded" else one.tier,
        cells={
            "model": Cell(one.model),
            "tier": Cell(one.tier.capitalize()),
            "quality": Cell(one.quality or figures.NOTHING),
            "reason": Cell(plain(one.reason) or figures.NOTHING),
            "rows": Cell(figures.count(one.rows)),
            "share": Cell(figures.percent(one.rows / rows if rows else None)),
        },
    )


def _decisions(decisions: Sequence[Decided], now: float) -> list[Row]:
    # The newest comes first and pushes the others down: rows are keyed by their place.
    return [
        Row(
            key=str(place),
            state="degraded" if one.quality == "degraded" else one.tier,
            cells={
                "at": Cell(figures.ago(max(now - one.at, 0.0))),
                "release": Cell(one.release),
                "tier": Cell(one.tier.capitalize()),
                "quality": Cell(one.quality or figures.NOTHING),
                "reason": Cell(plain(one.reason) or figures.NOTHING),
                "took": Cell(str(figures.duration(one.seconds * 1000))),
                "rows": Cell(figures.count(one.rows)),
            },
        )
        for place, one in enumerate(decisions)
    ]


def _events(events: Sequence[Event], now: float) -> list[Row]:
    # Reports that arrived together bear the same moment, so equal ones are numbered, from the
    # oldest: a row keeps its key when newer ones come.
    seen: Counter[tuple[object, ...]] = Counter()
    rows = []
    for event in reversed(events):
        same = (event.at, event.generation, event.model, event.phase, event.code)
        rows.append(_event(event, "/".join(map(str, (*same, seen[same]))), now))
        seen[same] += 1
    return rows[::-1]


def _event(event: Event, key: str, now: float) -> Row:
    return Row(
        key=key,
        state="failed" if event.phase in FAILED else "",
        cells={
            "at": Cell(figures.ago(now - event.at), figures.iso(event.at)),
            "release": Cell(f"{event.model}@{event.release}" if event.release else event.model),
            "phase": Cell(PHASES.get(event.phase, plain(event.phase).capitalize())),
            "code": Cell(event.code or figures.NOTHING),
            "sentence": Cell(event.sentence or figures.NOTHING),
            "generation": Cell(figures.count(event.generation)),
        },
    )


def _moment(at: float | None) -> str:
    return figures.NOTHING if at is None else f"{figures.iso(at)[:10]} {figures.clock(at)} UTC"


def plain(word: str) -> str:
    """Return a word of the protocol without its dashes."""
    return word.replace("_", " ").replace("-", " ")
