"""What several ONNX files are worth and cost, side by side on the same items: no recipe needed."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fogline_models import data, measure
from fogline_models import evaluate as figures
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_models.evaluate import Evaluation, HeldOut
from fogline_models.measure import Cost
from fogline_models.reading import mask_for
from fogline_models.session import Session
from fogline_models.wording import interval, micros, percent
from fogline_protocol.answers import Asked
from fogline_protocol.score import LEAST_SOFTMAX, Score
from fogline_protocol.tensors import Array, TensorError

ROWS = 64  # at once
BATCHES = (1, 32)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Figures and costs by file name; the first one is the reference."""

    evaluation: Evaluation
    costs: Mapping[str, Cost]
    sizes: Mapping[str, int]  # bytes


def evaluate(
    models: tuple[Path, ...],
    held_out: Path,
    hub: Path | None,
    *,
    vectors: bool = False,
    tokens: bool = False,
    mask: str = "",
) -> SideBySide:
    """Run every file on the items of ``held_out`` and measure it.

    A file answers for every token if ``tokens`` or ``mask`` say so, or the items have a label for
    each; ``mask`` names the input that says which count, by default attention_mask if there is one.

    Raises:
        BadInput: a file or the items are not usable, or two files are called alike.
    """
    items = data.read(held_out)
    files = {path.stem: path for path in models}
    if len(files) != len(models):
        raise BadInput(
            "evaluate: two files have the same name, rename one: it is how they are told"
        )
    sessions = {name: Session(path) for name, path in files.items()}
    found = {name: _answers(session, items) for name, session in sessions.items()}
    outputs = {name: array for name, (_, array) in found.items()}
    if vectors:
        outputs = {
            name: figures.without_padding(array, items.inputs) for name, array in outputs.items()
        }
    asked = None
    if tokens or mask or (items.labels is not None and items.labels.ndim > 1):
        if vectors:
            raise BadInput("evaluate: outputs are answers for tokens or vectors, not both")
        asked = _asked(*next(iter(found.values())), items, mask)
    evaluation = figures.evaluate(
        outputs,
        HeldOut(items.scenes, items.labels, items.slices, asked=asked),
        reference=next(iter(files)),
        hub=None if hub is None else _answers(Session(hub), items)[1],
        hub_model="hub" if hub is None else hub.stem,
        vectors=vectors,
    )
    batches = [
        n
        for n in BATCHES
        if n <= len(items) and all(session.rows(n) == n for session in sessions.values())
    ]
    costs = measure.measure(files, items.inputs, batches, reference=next(iter(files)))
    sizes = {name: measure.size_of(path) for name, path in files.items()}
    return SideBySide(evaluation, costs, sizes)


def document(found: SideBySide) -> Mapping[str, Any]:
    """Return everything as plain values, ready for JSON."""
    return dataclasses.asdict(found)


def lines(found: SideBySide) -> Iterator[str]:
    """Yield it as a person reads it in a terminal."""
    evaluation = found.evaluation
    yield f"{evaluation.items:,} {evaluation.counted} of {evaluation.scenes:,} scenes, against {evaluation.reference}"
    for name, each in evaluation.variants.items():
        cost = found.costs[name]
        said = [f"{found.sizes[name]:,} bytes"]
        if each.accuracy is not None:
            bounds = interval(each.accuracy.lower, each.accuracy.upper)
            said.append(f"accuracy {percent(each.accuracy.value)} (95 %: {bounds})")
        if each.agreement is not None:
            said.append(f"answers as {evaluation.reference} {percent(each.agreement.value)}")
        if each.agreement_hub is not None:
            said.append(f"as {evaluation.hub_model} {percent(each.agreement_hub.value)}")
        if each.relative_error is not None:
            said.append(f"relative error {each.relative_error:.2g}")
        said += [
            f"batch {n} {micros(spread.median)} ({cost.ratio[n].median:.2f} x)"
            for n, spread in cost.latency_us.items()
        ]
        yield f"  {name}: {', '.join(said)}"


def _asked(output: str, logits: Array, items: Items, mask: str) -> Asked:
    score = Score(LEAST_SOFTMAX, output, mask=mask_for(mask, items.inputs))
    try:
        return Asked.of(score, logits, items.inputs)
    except TensorError as error:
        raise BadInput(f"evaluate: {error}") from None


def _answers(session: Session, items: Items) -> tuple[str, Array]:
    """Return the first output for all items, with its name."""
    return next(iter(session.run(items.inputs, session.rows(ROWS)).items()))
