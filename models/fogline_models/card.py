"""Writes the model card of a bundle: Hugging Face metadata, then the figures in Markdown.

The card is covered by the bundle's digest, so it holds nothing that varies with time or
machine: no latency, no threshold, and a gate about time is named without its figure. What
authors write (``Words``) is Markdown and stays as it is; names that come from data are escaped.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fogline_models import bundle
from fogline_models.evaluate import Evaluation, Figures
from fogline_models.gates import Decision, Verdict
from fogline_models.metrics import Rate
from fogline_models.report import Subject
from fogline_models.wording import interval, percent, points, size
from fogline_protocol.release import Bundle, Processing
from fogline_protocol.tensors import TensorSpec

MAX_SLICES = 60  # in the table; a card is read by people


@dataclass(frozen=True, slots=True)
class Words:
    """What the author of a model says about it, and how Hugging Face files it."""

    summary: str  # Markdown, the first paragraph
    pipeline_tag: str = ""  # text-classification, image-classification, ...
    license: str = ""  # empty: none is claimed
    library_name: str = "onnx"
    tags: tuple[str, ...] = ()
    dataset: str = ""  # what the held-out items are called
    dataset_id: str = ""  # on Hugging Face, or a name of that form
    sections: Mapping[str, str] = field(default_factory=dict)  # heading: Markdown


def card(
    words: Words,
    subject: Subject,
    root: Bundle,
    evaluation: Evaluation,
    decisions: Sequence[Decision],
) -> str:
    """Return the model card of ``root``; ``root.files`` is not needed yet."""
    shipped = [each.variant for each in decisions if each.verdict is not Verdict.REFUSED]
    preferred = shipped[0] if shipped else evaluation.reference
    parts = [
        f"# {subject.model} {subject.version}",
        words.summary.strip(),
        _contract(root),
        _variants(subject, evaluation, decisions),
        _held_out(subject, evaluation),
        _slices(evaluation, preferred),
        *(f"## {heading}\n\n{text.strip()}" for heading, text in words.sections.items()),
    ]
    head = _head(words, subject, evaluation.variants[preferred])
    return bundle.model_card(head, "\n\n".join(part for part in parts if part))


def _head(words: Words, subject: Subject, best: Figures) -> dict[str, object]:
    metrics = _metrics(best)
    head: dict[str, object] = {"library_name": words.library_name}
    if words.license:
        head["license"] = words.license
    if words.pipeline_tag:
        head["pipeline_tag"] = words.pipeline_tag
    head["tags"] = ["onnx", "fogline", *words.tags]
    if words.dataset_id:
        head["datasets"] = [words.dataset_id]
    if metrics and words.pipeline_tag and words.dataset_id:
        head["metrics"] = [metric["type"] for metric in metrics]
        head["model-index"] = [
            {
                "name": f"{subject.model} {subject.version}",
                "results": [
                    {
                        "task": {"type": words.pipeline_tag},
                        "dataset": {
                            "name": words.dataset or words.dataset_id,
                            "type": words.dataset_id,
                        },
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return head


def _metrics(best: Figures) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    if best.accuracy is not None:
        found.append({"type": "accuracy", "value": round(best.accuracy.value, 4)})
    if best.macro_f1 is not None:
        found.append({"type": "f1", "name": "macro F1", "value": round(best.macro_f1, 4)})
    return found


def _contract(root: Bundle) -> str:
    def told(what: str, specs: Sequence[TensorSpec]) -> str:
        listed = ", ".join(
            f"`{spec.name}` {spec.datatype} `[{', '.join(_axis(a, i) for i, a in enumerate(spec.shape))}]`"
            for spec in specs
        )
        return f"{what}{'s' if len(specs) > 1 else ''} {listed}."

    lines = [told("Input", root.inputs), told("Output", root.outputs)]
    if root.pre_processing:
        lines.append(f"Left to the application before it: {_steps(root.pre_processing)}.")
    if root.post_processing:
        lines.append(f"Left to the application after it: {_steps(root.post_processing)}.")
    if root.labels and len(root.labels) <= 40:
        lines.append(f"Classes: {', '.join(_plain(label) for label in root.labels)}.")
    elif root.labels:
        lines.append(f"{len(root.labels)} classes, named in `bundle.json`.")
    if root.max_batch:
        lines.append(f"Up to {root.max_batch} rows in a run.")
    if root.escalates_to is not None:
        lines.append(
            f"It escalates to `{root.escalates_to.model}` whatever its certificate does not cover."
        )
    return " ".join(lines)


def _steps(steps: Sequence[Processing]) -> str:
    return ", then ".join(_plain(str(step)) for step in steps)


def _variants(subject: Subject, evaluation: Evaluation, decisions: Sequence[Decision]) -> str:
    reference = evaluation.reference
    labelled = evaluation.variants[reference].accuracy is not None
    columns = ["variant", "precision", "size"]
    if not evaluation.classes:
        columns += [f"cosine with {reference}", "relative error"]
    else:
        columns += ["accuracy", f"loss against {reference}"] if labelled else []
        columns += [f"answers as {reference}"]
        columns += ["macro F1", "calibration error"] if labelled else []
    rows = [f"| {' | '.join(columns)} | |", "|" + "---|" * (len(columns) + 1)]
    for decision in decisions:
        name = decision.variant
        figures = evaluation.variants[name]
        cells = [name, subject.precisions[name], size(subject.sizes[name])]
        if not evaluation.classes:
            cells += [f"{figures.cosine or 0:.5f}", percent(figures.relative_error or 0, 2)]
        else:
            if labelled:
                cells += [_rate(figures.accuracy), _loss(figures)]
            cells += [_rate(figures.agreement)]
            if labelled:
                error = figures.calibration_error
                cells += [
                    f"{figures.macro_f1 or 0:.3f}",
                    "" if error is None else percent(error),
                ]
        shown = {Verdict.ELIGIBLE: "ships", Verdict.WAIVED: "ships", Verdict.REFUSED: "refused"}
        rows.append(f"| {' | '.join(cells)} | {shown[decision.verdict]} |")
    told = [_verdict(each) for each in decisions if each.failed or each.reason]
    return "\n".join(["## Variants", "", *rows, *(["", *told] if told else [])])


def _verdict(decision: Decision) -> str:
    """Return why a variant ships or does not.

    Whether a waived variant was slower can change from build to build, and with it the digest
    of the bundle: the card tells the reason, the report the figure.
    """
    against = [check.words for check in decision.failed if not check.timing]
    if decision.reason:
        although = f" although it {'; '.join(against)}" if against else ""
        return (
            f"- **{decision.variant} has a waiver**: it ships{although}, whatever its latency "
            f"(`report.json`). Reason given: {decision.reason}"
        )
    if not against:  # where more is against it, a time decides nothing and may change
        against.append("slower than the recipe allows, with figures in `report.json`")
    return f"- **{decision.variant} is refused**: {'; '.join(against)}."


def _held_out(subject: Subject, evaluation: Evaluation) -> str:
    accuracy = evaluation.variants[evaluation.reference].accuracy
    labelled = ""
    if accuracy is not None and accuracy.items != evaluation.items:
        labelled = f", {accuracy.items:,} of them with a label"
    return (
        f"Figures on {evaluation.items:,} held-out {evaluation.counted} ({subject.held_out}) of "
        f"{evaluation.scenes:,} independent scenes{labelled}; intervals are 95 %, exact binomial over "
        f"scenes. Timings of the machine that built this are in `report.json`."
    )


def _slices(evaluation: Evaluation, preferred: str) -> str:
    slices = evaluation.variants[preferred].slices
    if not slices or all(part.accuracy is None for part in slices):
        return ""
    ranked = slices
    if len(slices) > MAX_SLICES:
        ranked = tuple(sorted(slices, key=lambda part: part.accuracy.value if part.accuracy else 1))
        ranked = ranked[:MAX_SLICES]
    rows = [
        f"| {_plain(part.name)} | {part.items:,} | {part.scenes:,} | {_rate(part.accuracy)} |"
        for part in ranked
    ]
    left_out = len(slices) - len(ranked)
    note = (
        [f"\nThe weakest {len(ranked)}; {left_out} more are in `report.json`."] if left_out else []
    )
    columns = f"| slice | {evaluation.counted} | scenes | accuracy |"
    head = [f"## Accuracy by slice, {preferred}", "", columns]
    return "\n".join([*head, "|---|---|---|---|", *rows, *note])


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return ""
    return f"{percent(rate.value)} ({interval(rate.lower, rate.upper)})"


def _loss(figures: Figures) -> str:
    if figures.loss is None:
        return ""
    noise = ", within noise" if figures.loss.within_noise else ""
    return f"{points(figures.loss.value)} points{noise}"


def _axis(length: int, place: int) -> str:
    return str(length) if length >= 0 else ("n" if place == 0 else "*")


def _plain(text: str) -> str:
    """Return a name from the data as text that Markdown shows as it is, on one line."""
    flat = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", flat)
