"""The report of a release: one JSON with every figure, and one HTML page made from it alone.

    report.json    {"decisions": what may ship and why, "figures": what the data says,
                    "timings": what this machine took, "machine": which one that was}
    report.html    the same for people: no script, nothing fetched, light, dark and printed

Both lie beside a bundle's root, outside its digest, because timings do. The model card lies
inside: ``card.py`` writes it from the same evaluation and leaves out whatever varies with time.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fogline_models import plots, wording
from fogline_models.errors import BadInput, require
from fogline_models.evaluate import Combined, Escalation, Evaluation, Slice
from fogline_models.gates import Decision, Verdict
from fogline_models.measure import Cost

SCHEMA = 1
JSON = "report.json"
HTML = "report.html"
MAX_BYTES = 64 << 20
TEMPLATES = Path(__file__).parent / "templates"

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Input:
    """Something the release was made from, by its digest."""

    name: str
    sha256: str
    bytes: int
    what: str = ""  # for people: "training images", "the recipe"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the build, and what it did in words."""

    name: str
    did: str


@dataclass(frozen=True, slots=True)
class Parent:
    """The release that this one follows, and what is different."""

    version: str
    bundle_sha256: str
    changes: tuple[str, ...] = ()  # sentences: ``comparison.sentences``


@dataclass(frozen=True, slots=True)
class Subject:
    """What the report speaks of."""

    model: str
    version: str
    description: str
    held_out: str  # what the items of the figures are, for people
    precisions: Mapping[str, str]  # by variant
    sizes: Mapping[str, int]  # bytes, by variant
    parent: Parent | None = None
    inputs: tuple[Input, ...] = ()
    steps: tuple[Step, ...] = ()


def document(
    subject: Subject,
    evaluation: Evaluation,
    decisions: Sequence[Decision],
    costs: Mapping[str, Cost],
    machine: Mapping[str, str],
    *,
    bundle_sha256: str,
    escalations: Sequence[Escalation] = (),
    also: Mapping[str, Evaluation] | None = None,
    gains: Mapping[str, Sequence[Slice]] | None = None,
    uncertified: str = "",
    combined: Combined | None = None,
) -> Document:
    """Return the whole report as plain values, ready for JSON.

    ``also`` are figures on further data, by its name; ``gains`` how the release that ships does
    beside its parent, on data by its name (``evaluate.against``); ``uncertified`` says why a release that
    escalates has no certificate, and ``combined`` what a score other than max_softmax buys.

    Raises:
        BadInput: a figure is not finite, which JSON cannot hold.
    """
    shipped = [d.variant for d in decisions if d.verdict is not Verdict.REFUSED]
    figures = {
        "schema": SCHEMA,
        **dataclasses.asdict(subject),
        "bundle_sha256": bundle_sha256,
        "evaluation": dataclasses.asdict(evaluation),
        "escalation": [{**dataclasses.asdict(each), "note": each.note} for each in escalations],
        "uncertified": uncertified,
        "combined": None
        if combined is None
        else {**dataclasses.asdict(combined), "sentence": combined.sentence},
        "gains": {
            name: [dataclasses.asdict(each) for each in slices]
            for name, slices in (gains or {}).items()
        },
        "also": {name: _brief(each) for name, each in (also or {}).items()},
    }
    found = {
        "decisions": {
            "shipped": shipped,
            "variants": [
                {**dataclasses.asdict(each), "sentence": each.sentence} for each in decisions
            ],
        },
        "machine": dict(machine),
        "timings": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "figures": figures,
    }
    try:
        plain: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    except ValueError:
        raise BadInput("report: a figure is not finite") from None
    return plain


def _brief(evaluation: Evaluation) -> Mapping[str, Any]:
    """Return the few figures that further data is reported with."""
    models = dict(evaluation.variants)
    if evaluation.hub is not None:
        models[evaluation.hub_model] = evaluation.hub
    return {
        "items": evaluation.items,
        "scenes": evaluation.scenes,
        "accuracy": {
            name: None if each.accuracy is None else dataclasses.asdict(each.accuracy)
            for name, each in models.items()
        },
    }


def write(folder: Path, found: Document) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, each in one step.

    Raises:
        BadInput: the folder cannot be written.
        MissingExtra: jinja2 is not installed.
    """
    # In the order of the document, which is that of the page: variants, batches, slices. A row
    # of numbers stays on one line; within strings a line break is written as an escape.
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    text = re.sub(r"\[\n[\s\d,]+\]", lambda row: re.sub(r"\s+", " ", row.group()), text)
    for name, content in ((HTML, html(found)), (JSON, text)):
        unfinished = folder / f".{name}.unfinished"
        try:
            unfinished.write_text(content, encoding="utf-8")
            os.replace(unfinished, folder / name)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise BadInput(f"report: cannot write {folder / name}: {error.strerror}") from None


def html(found: Document) -> str:
    """Return the page of a report; whatever comes from the document is escaped.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    template = _template()
    from markupsafe import Markup

    drawn = {name: Markup(svg) for name, svg in _drawn(found).items()}
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    page: str = template.render(style=style, drawn=drawn, view=_view(found), **found)
    return page


@functools.cache
def _template() -> Any:
    require("jinja2", extra="models")
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda *a: _whole(wording.percent(*a)),
        "points": wording.points,
        "interval": lambda rate: _whole(wording.interval(rate["lower"], rate["upper"])),
        "micros": lambda us: _whole(wording.micros(us)),
        "size": lambda count: _whole(wording.size(count)),
        "swatch": lambda place: Markup(plots.swatch(place)),
    }
    return environment.get_template("report.html")


def promise(found: Mapping[str, Any]) -> str:
    """Return what one certificate says, in a sentence: an escalation of the document."""
    scenes = f"the {found['calibration_scenes']:,} calibration scenes"
    if found["at"]["threshold"] is None and found["at"]["escalated"] == 1.0:
        return (
            f"With {scenes} nothing can be promised for answers of the edge, so every request "
            f"escalates to {found['hub_model']}."
        )
    return (
        f"With {wording.percent(1 - found['delta'], 0)} confidence, at most "
        f"{wording.percent(found['alpha'], _digits(found['alpha']))} of all requests are answered "
        f"at the edge and differently from {found['hub_model']}, as long as they are drawn like "
        f"{scenes}."
    )


def read(folder: Path) -> Document | None:
    """Return the report beside a bundle, or None if there is none of this form.

    It lies outside the digest: whoever can write the folder can write it.

    Raises:
        BadInput: the file is there and is not JSON, or lacks what its schema has.
    """
    path = folder / JSON
    try:
        if not path.is_file() or path.is_symlink():
            return None
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{path}: more than {MAX_BYTES >> 20} MiB, no report is as large")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a report ({error})") from None
    figures = found.get("figures") if isinstance(found, dict) else None
    if not isinstance(figures, dict) or figures.get("schema") != SCHEMA:
        return None
    try:
        sentences = [each["sentence"] for each in found["decisions"]["variants"]]
        plain = all(isinstance(part, str) for part in (*sentences, *found["machine"].values()))
    except (AttributeError, KeyError, TypeError):
        plain = False
    if not plain:
        raise BadInput(f"{path}: a report of schema {SCHEMA} without its decisions or machine")
    document: dict[str, Any] = found
    return document


def _whole(figure: str) -> str:
    """Return a figure that no line break parts from its unit."""
    return figure.replace(" ", "\N{NO-BREAK SPACE}")


def _digits(share: float) -> int:
    return 0 if math.isclose(100 * share, round(100 * share)) else 1


def _view(found: Document) -> Mapping[str, Any]:
    """Return what the page shows first, chosen from the document."""
    evaluation = found["figures"]["evaluation"]
    reference = evaluation["reference"]
    order = [reference, *(name for name in evaluation["variants"] if name != reference)]
    shipped = found["decisions"]["shipped"]
    preferred = shipped[0] if shipped else reference
    certified = {each["variant"]: each for each in found["figures"]["escalation"]}
    best = evaluation["variants"][preferred]
    return {
        "order": order,
        "preferred": preferred,
        "best": best,
        "cost": found["timings"].get(preferred),
        "base": evaluation["variants"][reference],
        "decisions": {each["variant"]: each for each in found["decisions"]["variants"]},
        "escalation": certified.get(preferred),
        "promise": promise(certified[preferred]) if preferred in certified else None,
        "mistakes": plots.mistakes(best["confusion"], evaluation["classes"])
        if best["confusion"]
        else [],
        "slices": [part["name"] for part in best["slices"]],
        "slices_hidden": max(0, len(best["slices"]) - plots.MAX_SLICES),
    }


def _drawn(found: Document) -> dict[str, str]:
    """Return the plots that the document has figures for."""
    view = _view(found)
    order, best = view["order"], view["best"]
    evaluation = found["figures"]["evaluation"]
    drawn: dict[str, str] = {}
    if best["slices"] and best["accuracy"] is not None:
        rows = _slice_rows(evaluation["variants"], order, best, evaluation["counted"])
        drawn["slices"] = plots.by_slice(order, rows)
    if best["confusion"] and len(evaluation["classes"]) <= plots.MAX_CELLS:
        drawn["confusion"] = plots.confusion(best["confusion"], evaluation["classes"])
    if best["reliability"]:
        drawn["reliability"] = plots.reliability(best["reliability"], best["calibration_error"])
    timed = [name for name in order if name in found["timings"]]
    if timed and timed[0] == evaluation["reference"]:
        bars = [
            check["bar"]
            for decision in found["decisions"]["variants"]
            for check in decision["checks"]
            if check["gate"] == "max_latency_ratio"
        ]
        costs = [found["timings"][name] for name in timed]
        drawn["latency"] = plots.latency(timed, costs, bars[0] if bars else None)
    escalation = view["escalation"]
    if escalation is not None:
        drawn["risk"] = plots.risk(escalation)
        if escalation["accuracy_edge"] is not None:
            drawn["pair"] = plots.pair(escalation)
    return drawn


def _slice_rows(
    variants: Mapping[str, Any], order: Sequence[str], best: Mapping[str, Any], counted: str
) -> list[tuple[str, list[Mapping[str, float] | None]]]:
    """Return all that is counted first, then the groups; the weakest only, if there are too many."""
    named = {
        name: {part["name"]: part["accuracy"] for part in variants[name]["slices"]}
        for name in order
    }
    shown = [part["name"] for part in best["slices"]]
    if len(shown) > plots.MAX_SLICES:
        mine = named[order[0]]
        weakest = sorted(shown, key=lambda group: _value(mine[group]))[: plots.MAX_SLICES]
        shown = [group for group in shown if group in weakest]
    rows = [(f"all {counted}", [variants[name]["accuracy"] for name in order])]
    rows += [(group, [named[name].get(group) for name in order]) for group in shown]
    return rows


def _value(rate: Mapping[str, float] | None) -> float:
    return 1.0 if rate is None else rate["value"]  # nothing is known of it: not the weakest
