"""Reads the workshop's report into what a page can say. Pure.

Nobody vouches for a report, so it may hold anything: each value is looked at before it is said,
each text and each list is cut, and what does not fit is left out. ``read`` knows the report of
``fogline-models`` (schema 1: figures, decisions, timings, machine); any other document is
shown as ``facts``, name beside value.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud_hub.console import figures
from cloud_hub.console.figures import many
from cloud_hub.console.fleet_views import plain

FACTS_SHOWN = 200
LONGEST_FACT = 200
LONGEST_SENTENCE = 600
VARIANTS_SHOWN = 24
SLICES_SHOWN = 8
GAINS_SHOWN = 16
DATA_SHOWN = 12
LINES_SHOWN = 60  # of inputs, of steps, of what is known of the machine
SCHEMA = 1

VERDICTS = {"eligible": "Ships", "waived": "Waived", "refused": "Refused"}


@dataclass(frozen=True, slots=True)
class Said:
    """A figure and what qualifies it."""

    value: str = figures.NOTHING
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the report says of one variant; a dash where it says nothing."""

    precision: str
    size_bytes: float | None
    verdict: str  # one of VERDICTS' values, or empty
    sentence: str
    share: float | None  # accuracy, as a number
    accuracy: Said
    loss: Said
    agreement: Said  # with the reference
    agreement_hub: Said
    cosine: Said
    latency: Said
    slow: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """One group of held-out items."""

    name: str
    items: str
    accuracy: Said
    bar: tuple[float, float, float]  # estimate and interval, of a width of 100


@dataclass(frozen=True, slots=True)
class Gain:
    """A release beside its parent on the same items."""

    data: str
    name: str  # a slice, or all items
    items: str
    accuracy: Said
    gained: Said  # points; the note is the interval


@dataclass(frozen=True, slots=True)
class Report:
    """A report of the workshop."""

    reference: str
    hub_model: str
    hub: Figures | None  # of the hub's model on the same items
    together: Mapping[tuple[str, str], str]  # edge and hub, by variant and hardware class
    held_out: str
    counted: str  # what the figures count: item, or token
    variants: Mapping[str, Figures]
    labelled: bool
    classes: bool
    slices: Sequence[Slice]  # of ``sliced``, the weakest first
    sliced: str
    more_slices: int
    batch: str  # of the latencies
    machine: Sequence[tuple[str, str]]
    steps: Sequence[tuple[str, str]]
    inputs: Sequence[tuple[str, str, str, str]]  # name, what, size, SHA-256
    changes: Sequence[str]  # against the parent, as the workshop saw it
    gains: Sequence[Gain]
    more_gains: int
    also: Sequence[tuple[str, str, Sequence[tuple[str, Said]]]]  # data, items, accuracy by model
    uncertified: str  # why a release that escalates has no certificate
    combined: str  # what a score other than max_softmax buys


@dataclass(frozen=True, slots=True)
class FactGroup:
    """One part of a report of another form."""

    title: str
    facts: Sequence[tuple[str, str]]


def read(document: Mapping[str, Any]) -> Report | None:
    """Return the report, or None if the document has another form."""
    found = document.get("figures")
    evaluation = _at(found, "evaluation")
    measured = _at(evaluation, "variants")
    if _at(found, "schema") != SCHEMA or not isinstance(measured, Mapping) or not measured:
        return None
    timings = _at(document, "timings")
    decisions = {
        words(_at(each, "variant")): each
        for each in _items(_at(document, "decisions", "variants"), VARIANTS_SHOWN)
    }
    batch = _first_batch(timings)
    variants = {
        words(name): _figures(
            _at(measured, name),
            decisions.get(words(name)),
            _at(timings, name),
            batch,
            precision=words(_at(found, "precisions", name)),
            size_bytes=_number(_at(found, "sizes", name)),
        )
        for name in list(measured)[:VARIANTS_SHOWN]
    }
    sliced = next(
        (name for name in _shipped_first(document, measured) if _at(measured, name, "slices")), ""
    )
    slices = sorted(_slices(_at(measured, sliced, "slices")), key=lambda part: part.bar[0])
    gains = list(_gains(_at(found, "gains")))
    items, scenes = _number(_at(evaluation, "items")), _number(_at(evaluation, "scenes"))
    what = words(_at(found, "held_out"), LONGEST_SENTENCE)
    counted = "token" if _at(evaluation, "counted") == "tokens" else "item"
    return Report(
        reference=words(_at(evaluation, "reference")),
        hub_model=words(_at(evaluation, "hub_model")),
        hub=_figures(_at(evaluation, "hub"), None, None, "", precision="", size_bytes=None)
        if _share(_at(evaluation, "hub", "accuracy", "value")) is not None
        else None,
        together={
            (words(_at(each, "variant")), words(_at(each, "hardware_class"))): _together(each)
            for each in _items(_at(found, "escalation"), LINES_SHOWN)
        },
        held_out=f"{many(int(items), f'held-out {counted}')} of {many(int(scenes), 'scene')}"
        + (f": {what}" if what else "")
        if items is not None and scenes is not None
        else what,
        counted=counted,
        variants=variants,
        labelled=any(one.share is not None for one in variants.values()),
        classes=bool(_items(_at(evaluation, "classes"), 1)),
        slices=slices[:SLICES_SHOWN],
        sliced=words(sliced),
        more_slices=max(len(slices) - SLICES_SHOWN, 0),
        batch=words(batch),
        machine=[
            (plain(words(name)), words(value) or _fact(value))
            for name, value in _pairs(document.get("machine"))
        ],
        steps=[
            (words(_at(step, "name")), words(_at(step, "did"), LONGEST_SENTENCE))
            for step in _items(_at(found, "steps"), LINES_SHOWN)
        ],
        inputs=[_input(each) for each in _items(_at(found, "inputs"), LINES_SHOWN)],
        changes=[
            said
            for each in _items(_at(found, "parent", "changes"), LINES_SHOWN)
            if (said := words(each, LONGEST_SENTENCE))
        ],
        gains=gains[:GAINS_SHOWN],
        more_gains=max(len(gains) - GAINS_SHOWN, 0),
        also=[
            (
                words(name),
                _count(_at(data, "items")),
                [
                    (words(model), _rate(rate))
                    for model, rate in _pairs(_at(data, "accuracy"))[:VARIANTS_SHOWN]
                ],
            )
            for name, data in _pairs(_at(found, "also"))[:DATA_SHOWN]
        ],
        uncertified=words(_at(found, "uncertified"), LONGEST_SENTENCE),
        combined=words(_at(found, "combined", "sentence"), LONGEST_SENTENCE),
    )


def facts(document: Mapping[str, Any]) -> list[FactGroup]:
    """Return a report of any form as groups of facts."""
    groups: dict[str, list[tuple[str, str]]] = {}
    left = FACTS_SHOWN
    for name, value in document.items():
        if name in ("bundle_sha256", "model", "version"):
            continue  # on the page already
        nested = isinstance(value, dict | list)
        title = plain(words(name)).capitalize() if nested else "General"
        for path, text in _facts(value, "" if nested else words(name), 0):
            if left:
                left -= 1
                groups.setdefault(title, []).append((path.replace("_", " "), text))
    return [FactGroup(title, found) for title, found in groups.items()]


def words(value: Any, longest: int = LONGEST_FACT) -> str:
    """Return a text that any page can hold, on one line; empty if it is none."""
    if not isinstance(value, str):
        return ""
    text = "".join(c if c.isprintable() else " " for c in value[: longest + 1]).strip()
    return text if len(text) <= longest else f"{text[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"


def _figures(
    found: Any, decision: Any, timing: Any, batch: str, *, precision: str, size_bytes: float | None
) -> Figures:
    ratio = _number(_at(timing, "ratio", batch, "median"))
    latency = _number(_at(timing, "latency_us", batch, "median"))
    cosine = _number(_at(found, "cosine"))
    worst = _number(_at(found, "cosine_worst"))
    return Figures(
        precision=precision,
        size_bytes=size_bytes,
        verdict=VERDICTS.get(words(_at(decision, "verdict")), ""),
        sentence=words(_at(decision, "sentence"), LONGEST_SENTENCE),
        share=_share(_at(found, "accuracy", "value")),
        accuracy=_rate(_at(found, "accuracy")),
        loss=_loss(_at(found, "loss")),
        agreement=_rate(_at(found, "agreement")),
        agreement_hub=_rate(_at(found, "agreement_hub")),
        cosine=Said()
        if cosine is None
        else Said(f"{cosine:.5f}", "" if worst is None else f"worst {worst:.5f}"),
        latency=Said()
        if latency is None
        else Said(
            _micros(latency), "" if ratio is None else f"{ratio:.2f} \N{MULTIPLICATION SIGN}"
        ),
        slow=ratio is not None and ratio > 1.02,
    )


def _together(found: Any) -> str:
    """Return what a pair gives on the held-out items at its certified threshold."""
    escalated = _share(_at(found, "at", "escalated"))
    differs = _share(_at(found, "at", "disagreement"))
    if escalated is None or differs is None:
        return ""
    said = (
        f"On the workshop's held-out items {figures.percent(escalated)} escalate and "
        f"{figures.percent(differs)} are answered differently than by the hub"
    )
    pair, edge, hub = (
        _share(_at(found, *path))
        for path in (("at", "accuracy"), ("accuracy_edge",), ("accuracy_hub",))
    )
    if pair is None or edge is None or hub is None:
        return f"{said}."
    return (
        f"{said}; the two together are right on {figures.percent(pair)}, the device alone on "
        f"{figures.percent(edge)}, the hub alone on {figures.percent(hub)}."
    )


def _slices(found: Any) -> Iterator[Slice]:
    for part in _items(found, 10_000):
        share = _share(_at(part, "accuracy", "value"))
        if share is None:
            continue
        low = _share(_at(part, "accuracy", "lower"))
        high = _share(_at(part, "accuracy", "upper"))
        yield Slice(
            name=words(_at(part, "name")) or figures.NOTHING,
            items=_count(_at(part, "items")),
            accuracy=_rate(_at(part, "accuracy")),
            bar=(
                round(100 * share, 1),
                round(100 * (share if low is None else low), 1),
                round(100 * (share if high is None else max(high, low or 0)), 1),
            ),
        )


def _gains(found: Any) -> Iterator[Gain]:
    for data, parts in _pairs(found):
        for part in _items(parts, LINES_SHOWN):
            loss = _at(part, "loss")
            if (gained := _loss(loss, -1)).value != figures.NOTHING:
                yield Gain(
                    data=words(data),
                    name=words(_at(part, "name")) or figures.NOTHING,
                    items=_count(_at(part, "items")),
                    accuracy=_rate(_at(part, "accuracy")),
                    gained=gained,
                )


def _count(value: Any) -> str:
    number = _number(value)
    return figures.NOTHING if number is None else figures.count(number)


def _input(each: Any) -> tuple[str, str, str, str]:
    size = _number(_at(each, "bytes"))
    return (
        words(_at(each, "name")) or figures.NOTHING,
        words(_at(each, "what")),
        figures.NOTHING if size is None else str(figures.size(size)),
        words(_at(each, "sha256")),
    )


def _rate(found: Any) -> Said:
    value = _share(_at(found, "value"))
    if value is None:
        return Said()
    low, high = _share(_at(found, "lower")), _share(_at(found, "upper"))
    if low is None or high is None:
        return Said(figures.percent(value))
    low, high = _outward(low, high)
    return Said(figures.percent(value), f"{100 * low:.1f} to {figures.percent(high)}")


def _loss(found: Any, sign: int = 1) -> Said:
    """Return a difference in points: what is lost, or with the other sign what is gained."""
    value, *ends = (_number(_at(found, end)) for end in ("value", "lower", "upper"))
    if value is None or abs(value) > 1:
        return Said()
    low, high = ends[::sign]
    if low is None or high is None or max(abs(low), abs(high)) > 1:
        return Said(_points(sign * value))
    low, high = sorted((sign * low, sign * high))
    noise = ", within noise" if low <= 0 <= high else ""
    low, high = _outward(low, high)
    return Said(_points(sign * value), f"{_points(low)} to {_points(high)}{noise}")


def _outward(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an interval to a tenth of a point, never narrower than it is."""
    return math.floor(1000 * low + 1e-9) / 1000, math.ceil(1000 * high - 1e-9) / 1000


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}" if abs(share) >= 0.0005 else "0.0"
    return text.replace("-", "\N{MINUS SIGN}")


def _micros(us: float) -> str:
    if us < 999.5:
        return f"{us:.0f}\N{NO-BREAK SPACE}µs" if us >= 99.5 else f"{us:.1f}\N{NO-BREAK SPACE}µs"
    return str(figures.duration(us / 1000))


def _first_batch(timings: Any) -> str:
    for _, timing in _pairs(timings):
        for batch, _ in _pairs(_at(timing, "latency_us")):
            return batch
    return ""


def _shipped_first(document: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[str]:
    for name in _items(_at(document, "decisions", "shipped"), VARIANTS_SHOWN):
        if isinstance(name, str) and name in measured:
            yield name
    yield from list(measured)[:VARIANTS_SHOWN]


def _at(value: Any, *path: str) -> Any:
    """Return what lies at ``path``, or None where the way there ends."""
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _items(value: Any, most: int) -> Sequence[Any]:
    return value[:most] if isinstance(value, list) else ()


def _pairs(value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return []
    return [(str(name), item) for name, item in list(value.items())[:LINES_SHOWN]]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e15 < value < 1e15:
        return None
    return float(value)


def _share(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number <= 1 else None


def _facts(value: Any, path: str, depth: int) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and depth < 6:
        items = [(words(name), item) for name, item in value.items()]
    elif isinstance(value, list) and depth < 6:
        items = [(_label(item, index), item) for index, item in enumerate(value)]
    else:
        return [(path, _fact(value))]
    return [
        fact
        for name, item in items
        for fact in _facts(item, f"{path} \N{MIDDLE DOT} {name}" if path else name, depth + 1)
    ]


def _label(item: Any, index: int) -> str:
    return words(_at(item, "variant")) or str(index + 1)


def _fact(value: Any) -> str:
    match value:
        case None:
            return figures.NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) < 10**15 else str(value)[:LONGEST_FACT]
        case float():
            return f"{value:.4g}" if math.isfinite(value) else str(value)
        case _:
            return words(str(value)[: LONGEST_FACT + 1])
