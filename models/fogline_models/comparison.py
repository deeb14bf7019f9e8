"""Compares two bundles: what a device that has A gets with B, and what it must fetch for it.

``compare`` reads and runs, ``lines`` and ``sentences`` say it. Sizes, contract and certificates
come from the verified bundles; answers from running both here on the same items; accuracies on
each side's own held-out items from their reports, which no digest covers.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models import metrics, pairing, report
from fogline_models.data import read as read_items
from fogline_models.errors import BadInput
from fogline_models.evaluate import HeldOut, without_padding
from fogline_models.metrics import Rate
from fogline_models.session import Session
from fogline_models.wording import interval, percent
from fogline_protocol import hardware
from fogline_protocol.answers import NO_LABEL, Asked
from fogline_protocol.golden import GoldenVectors, VectorsUnusable
from fogline_protocol.release import ROOT, Bundle, BundleDirectory
from fogline_protocol.release_index import BLOCK_BYTES, FileDigester
from fogline_protocol.score import MAX_SOFTMAX, Score
from fogline_protocol.tensors import Array, TensorError, TensorSpec

READ_BYTES = 1 << 20
MAX_MATRIX = 20  # classes in a printed matrix
FEATURES = "feature-extraction"  # how the names of tasks end whose outputs are vectors


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two bundles."""

    model: str
    version: str
    sha256: str

    @property
    def title(self) -> str:
        """What people call it."""
        return f"{self.model} {self.version}"


@dataclass(frozen=True, slots=True)
class VariantChange:
    """A variant of either bundle; None where one has none of this name."""

    name: str
    bytes_a: int | None
    bytes_b: int | None
    same_file: bool
    accuracy_a: float | None  # as each report says, on its own held-out items
    accuracy_b: float | None
    fetch_bytes: int | None  # what a device that runs it from A must fetch to run it from B
    needed_bytes: int | None  # what a device that has nothing must fetch


@dataclass(frozen=True, slots=True)
class CertificateChange:
    """The thresholds of one variant on one hardware class."""

    variant: str
    hardware_class: str
    threshold_a: float | None
    threshold_b: float | None
    escalated_a: float | None  # on each certificate's calibration items
    escalated_b: float | None
    alpha_a: float | None
    alpha_b: float | None


@dataclass(frozen=True, slots=True)
class Answers:
    """Both sides' answers to the same items."""

    source: str  # where the items come from
    variant_a: str
    variant_b: str
    agreement: Rate
    accuracy_a: Rate | None  # where the items have labels
    accuracy_b: Rate | None
    classes: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]  # A's answers in rows, B's in columns
    counted: str = "items"  # or "tokens": what the figures count


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is different between two bundles."""

    a: Side
    b: Side
    lineage: str
    contract: tuple[str, ...]  # sentences; empty: nothing changed
    variants: tuple[VariantChange, ...]
    certificates: tuple[CertificateChange, ...]
    answers: Answers | None
    answers_missing: str  # why there are none


def compare(
    a: BundleDirectory, b: BundleDirectory, data: Path | None = None, variant: str | None = None
) -> Comparison:
    """Return what is different.

    Args:
        a: what a device has.
        b: what it would get.
        data: items for both, an npz with ``input.<name>`` and optionally ``label`` and ``scene``;
            without it B's self-test vectors.
        variant: which file of both answers; by default B's first that A has, too.

    Raises:
        BadInput: the data does not fit, a variant is missing or does not run here.
    """
    reports = tuple(report.read(side.path) for side in (a, b))
    answers, missing = _answers(a, b, data, variant)
    return Comparison(
        a=Side(a.bundle.model, a.bundle.version, a.sha256),
        b=Side(b.bundle.model, b.bundle.version, b.sha256),
        lineage=_lineage(a, b),
        contract=tuple(_contract(a.bundle, b.bundle)),
        variants=tuple(_variants(a, b, reports[0], reports[1])),
        certificates=tuple(_certificates(a, b)),
        answers=answers,
        answers_missing=missing,
    )


def delta_bytes(a: BundleDirectory, b: BundleDirectory, variant: str) -> tuple[int, int]:
    """Return what a device that runs ``variant`` of ``a`` fetches to run it from ``b``.

    The second number is what a device without ``a`` would fetch. A block of 1 MiB that is
    anywhere in what the device has is copied, not fetched (``fogline_protocol.release_index``).

    Raises:
        KeyError: ``b`` has no such variant.
    """
    has_it = any(v.name == variant for v in a.bundle.variants)
    have = _blocks(a, a.bundle.files_for([variant] if has_it else []))
    want = _blocks(b, b.bundle.files_for([variant]))
    return sum(n for digest, n in want.items() if digest not in have), sum(want.values())


def document(found: Comparison) -> Mapping[str, Any]:
    """Return the comparison as plain values for JSON, which has no infinite threshold."""
    told = dataclasses.asdict(found)
    for each in told["certificates"]:
        for side in ("threshold_a", "threshold_b"):
            value = each[side]
            if value is not None and not math.isfinite(value):
                each[side] = "Infinity" if value > 0 else "-Infinity"  # as protobuf writes them
    return told


def sentences(found: Comparison) -> tuple[str, ...]:
    """Return what changed, for the lineage of a report."""
    return (*found.contract, *_variant_sentences(found), *_certificate_sentences(found))


def lines(found: Comparison) -> Iterator[str]:
    """Yield the comparison as a person reads it in a terminal."""
    yield f"{found.a.title}  ->  {found.b.title}"
    if found.a.sha256 == found.b.sha256:
        yield "  The very same bundle."
    yield f"  {found.lineage}"
    for sentence in found.contract or ("Inputs, outputs, labels and score are the same.",):
        yield f"  {sentence}"
    yield from ("", "variants")
    for sentence in _variant_sentences(found):
        yield f"  {sentence}"
    yield from ("", "download, for a device that has A")
    for each in found.variants:
        if each.fetch_bytes is not None and each.needed_bytes is not None:
            yield f"  {each.name}: {each.fetch_bytes:,} of {each.needed_bytes:,} bytes"
    yield from ("", "certificates")
    for sentence in _certificate_sentences(found) or ("Neither has any.",):
        yield f"  {sentence}"
    yield from ("", "answers")
    if found.answers is None:
        yield f"  {found.answers_missing}"
    else:
        yield from (f"  {line}" for line in _answer_lines(found.answers, found))


def _variant_sentences(found: Comparison) -> list[str]:
    said = []
    for each in found.variants:
        if each.bytes_a is None or each.bytes_b is None:
            gone = each.bytes_b is None
            said.append(f"{each.name} is {'gone' if gone else 'new'}")
            continue
        size = (
            "the very same file"
            if each.same_file
            else f"{each.bytes_a:,} -> {each.bytes_b:,} bytes ({each.bytes_b / each.bytes_a:.2f} x)"
        )
        if each.accuracy_a is not None and each.accuracy_b is not None:
            size += (
                f", accuracy in its report {percent(each.accuracy_a)} -> {percent(each.accuracy_b)}"
            )
        said.append(f"{each.name}: {size}")
    return said


def _certificate_sentences(found: Comparison) -> list[str]:
    said = []
    for each in found.certificates:
        where = f"{each.variant} on {each.hardware_class}"
        if each.threshold_a is None or each.threshold_b is None:
            gone = each.threshold_b is None
            said.append(f"{where}: the certificate is {'gone' if gone else 'new'}")
            continue
        if each.alpha_a != each.alpha_b:
            where += f", risk {each.alpha_a:g} -> {each.alpha_b:g}"
        said.append(
            f"{where}: threshold {each.threshold_a:.4f} -> {each.threshold_b:.4f}, escalates "
            f"{percent(each.escalated_a or 0)} -> {percent(each.escalated_b or 0)}"
        )
    return said


def _answer_lines(answers: Answers, found: Comparison) -> Iterator[str]:
    rate = answers.agreement
    yield (
        f"{answers.variant_a} and {answers.variant_b} give the same answer on "
        f"{percent(rate.value)} of {rate.items:,} {answers.counted} (95 %: {_ends(rate)}), "
        f"{answers.source}"
    )
    for side, accuracy in ((found.a, answers.accuracy_a), (found.b, answers.accuracy_b)):
        if accuracy is not None:
            yield f"{side.title} is right on {percent(accuracy.value)} (95 %: {_ends(accuracy)})"
    moved = sorted(
        (
            (-count, i, j)
            for i, row in enumerate(answers.matrix)
            for j, count in enumerate(row)
            if i != j and count
        )
    )
    for count, i, j in moved[:10]:
        yield f"{answers.classes[i]!r} becomes {answers.classes[j]!r}: {-count}"
    if moved and len(answers.classes) <= MAX_MATRIX:
        width = max(5, *(len(name) for name in answers.classes), len(str(rate.items))) + 1
        yield ""
        yield "A in rows, B in columns"
        yield " " * width + "".join(f"{name:>{width}}" for name in answers.classes)
        for name, row in zip(answers.classes, answers.matrix, strict=True):
            yield f"{name:>{width}}" + "".join(f"{count or '.':>{width}}" for count in row)


def _ends(rate: Rate) -> str:
    return interval(rate.lower, rate.upper)


def _lineage(a: BundleDirectory, b: BundleDirectory) -> str:
    parent = b.bundle.parent
    if parent is None:
        return f"B names no parent, so nothing says that it follows {a.bundle.version}."
    if parent.bundle_sha256 == a.sha256:
        return "A is B's parent."
    return (
        f"A is not B's parent: B names {parent.version} with bundle "
        f"{parent.bundle_sha256[:16]}, A is {a.bundle.version} with {a.sha256[:16]}."
    )


def _contract(a: Bundle, b: Bundle) -> Iterator[str]:
    if a.model != b.model:
        yield f"The model is another one: {a.model} -> {b.model}."
    for what, before, after in (
        ("Inputs", _specs(a.inputs), _specs(b.inputs)),
        ("Outputs", _specs(a.outputs), _specs(b.outputs)),
        ("Largest batch", str(a.max_batch), str(b.max_batch)),
        ("Score", _said(a.score), _said(b.score)),
        ("Hub", _hub(a), _hub(b)),
    ):
        if before != after:
            yield f"{what}: {before} -> {after}."
    if a.labels != b.labels:
        gone = [label for label in a.labels if label not in b.labels]
        new = [label for label in b.labels if label not in a.labels]
        parts = [
            f"{len(names)} {word} ({', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''})"
            for word, names in (("gone", gone), ("new", new))
            if names
        ]
        yield f"Labels: {len(a.labels)} -> {len(b.labels)}, {', '.join(parts) or 'in another order'}."


def _specs(specs: tuple[TensorSpec, ...]) -> str:
    """Say what tensors there are, in an order of their own: they are asked for by name."""
    ordered = sorted(specs, key=lambda spec: spec.name)
    return ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in ordered)


def _hub(bundle: Bundle) -> str:
    hub = bundle.escalates_to
    return "none" if hub is None else f"{hub.model}, bundle {hub.bundle_sha256[:16]}"


def _said(part: object) -> str:
    return "none" if part is None else str(part)


def _variants(
    a: BundleDirectory,
    b: BundleDirectory,
    report_a: report.Document | None,
    report_b: report.Document | None,
) -> Iterator[VariantChange]:
    mine = {v.name: v for v in a.bundle.variants}
    theirs = {v.name: v for v in b.bundle.variants}
    for name in dict.fromkeys([*theirs, *mine]):
        before, after = mine.get(name), theirs.get(name)
        fetch, needed = (None, None) if after is None else delta_bytes(a, b, name)
        yield VariantChange(
            name=name,
            bytes_a=None if before is None else a.bundle.files[before.path].bytes,
            bytes_b=None if after is None else b.bundle.files[after.path].bytes,
            same_file=before is not None
            and after is not None
            and a.variant_sha256(before) == b.variant_sha256(after),
            accuracy_a=_reported(report_a, name),
            accuracy_b=_reported(report_b, name),
            fetch_bytes=fetch,
            needed_bytes=needed,
        )


def _reported(found: report.Document | None, variant: str) -> float | None:
    at: Any = found
    for key in ("figures", "evaluation", "variants", variant, "accuracy", "value"):
        if not isinstance(at, dict):
            return None
        at = at.get(key)
    return float(at) if isinstance(at, int | float) else None


def _certificates(a: BundleDirectory, b: BundleDirectory) -> Iterator[CertificateChange]:
    mine = {(c.variant, c.hardware_class): c for c in a.certificates}
    theirs = {(c.variant, c.hardware_class): c for c in b.certificates}
    for key in dict.fromkeys([*theirs, *mine]):
        before, after = mine.get(key), theirs.get(key)
        yield CertificateChange(
            *key,
            threshold_a=None if before is None else before.threshold,
            threshold_b=None if after is None else after.threshold,
            escalated_a=None if before is None else before.escalation_rate,
            escalated_b=None if after is None else after.escalation_rate,
            alpha_a=None if before is None else before.alpha,
            alpha_b=None if after is None else after.alpha,
        )


def _blocks(side: BundleDirectory, names: Collection[str]) -> dict[str, int]:
    """Return the length of every block of these files and the root, by digest."""
    found: dict[str, int] = {}
    for name in (ROOT, *names):
        digester = FileDigester()
        with side.file(name).open("rb") as file:
            while part := file.read(READ_BYTES):
                digester.update(part)
        file_index = digester.finish()
        for i, digest in enumerate(file_index.blocks):
            found[digest] = min(BLOCK_BYTES, file_index.bytes - i * BLOCK_BYTES)
    return found


def _answers(
    a: BundleDirectory, b: BundleDirectory, data: Path | None, variant: str | None
) -> tuple[Answers | None, str]:
    if differ := pairing.differences(a.bundle.inputs, b.bundle.inputs):
        return None, f"Not compared: the two take different inputs: {differ}."
    score = b.bundle.score or Score(MAX_SOFTMAX, b.bundle.outputs[0].name)
    output = score.output
    if b.bundle.task.endswith(FEATURES):
        return None, _vectors(a, b, data, variant)
    width = {side.path: _width(side.bundle, score) for side in (a, b)}
    if len(set(width.values())) != 1 or width[a.path] < 2:
        return None, f"Not compared: the output {output!r} has no classes in common."
    if (a.bundle.score is not None and a.bundle.score.per_token) != score.per_token:
        return None, "Not compared: one answers for every token, the other once for all of a row."
    if not (a.bundle.max_batch and b.bundle.max_batch):
        return None, "Not compared: a model without a batch dimension has no rows to count."
    names = _both_run(a, b, variant)
    inputs, scenes, labels, source = _items(b, data)
    logits = [_run(side, name, inputs, output) for side, name in zip((a, b), names, strict=True)]
    try:
        asked = Asked.of(score, logits[1], inputs)
        before, after = (asked.top(array) for array in logits)
    except TensorError as error:
        return None, f"Not compared: {error}."
    if not len(asked):
        return None, f"Not compared: the mask {score.mask!r} counts no token of {source}."
    told = HeldOut(scenes, labels, asked=asked).each()
    classes = width[b.path]
    known = b.bundle.labels if len(b.bundle.labels) == classes else ()
    counts = metrics.confusion(before, after, classes)
    right: list[Rate | None] = [None, None]
    if told.labels is not None:
        labelled = told.labels != NO_LABEL
        right = [
            metrics.rate((answers == told.labels)[labelled], told.scenes[labelled])
            for answers in (before, after)
        ]
    return Answers(
        source=source,
        variant_a=names[0],
        variant_b=names[1],
        agreement=metrics.rate(before == after, told.scenes),
        accuracy_a=right[0],
        accuracy_b=right[1],
        classes=known or tuple(str(index) for index in range(classes)),
        matrix=tuple(tuple(row) for row in counts.tolist()),
        counted="tokens" if score.per_token else "items",
    ), ""


def _vectors(a: BundleDirectory, b: BundleDirectory, data: Path | None, variant: str | None) -> str:
    """Say how far vectors are from each other: which number of one is the largest is no answer."""
    outputs = [side.bundle.outputs[0] for side in (a, b)]
    if outputs[0] != outputs[1]:
        return "Not compared: the two give different vectors."
    if not (a.bundle.max_batch and b.bundle.max_batch):
        return "Not compared: a model without a batch dimension has no rows to count."
    names = _both_run(a, b, variant)
    inputs, _, _, source = _items(b, data)
    before, after = (
        without_padding(_run(side, name, inputs, outputs[0].name), inputs)
        for side, name in zip((a, b), names, strict=True)
    )
    cosines = metrics.cosines(after, before)
    strays = percent(float(metrics.relative_errors(after, before).mean()))
    return (
        f"No answers but vectors: those of {names[1]} have a cosine of {cosines.mean():.4f} (worst "
        f"{cosines.min():.4f}) with those of {names[0]} and stray by {strays} of their length, "
        f"{len(cosines):,} items, {source}"
    )


def _both_run(a: BundleDirectory, b: BundleDirectory, variant: str | None) -> list[str]:
    """Return which variant of each answers: the one asked for, or B's first that A has, too."""
    theirs = {each.name for each in a.bundle.variants}
    both = [each.name for each in b.bundle.variants if each.name in theirs]
    return [variant or (both[0] if both else side.bundle.variants[0].name) for side in (a, b)]


def _width(bundle: Bundle, score: Score) -> int:
    """Return how many classes an answer is chosen from, 0 if that is not known."""
    for spec in bundle.outputs:
        own = spec.shape[-1:] if score.per_token else spec.shape[1:]
        if spec.name == score.output and all(length >= 0 for length in own):
            return int(np.prod(own, dtype=int))
    return 0


def _items(
    b: BundleDirectory, data: Path | None
) -> tuple[Mapping[str, Array], Array, Array | None, str]:
    """Return inputs, scenes, labels and where they come from."""
    if data is None:
        try:
            vectors = GoldenVectors.read(b.bundle, b.file(b.bundle.self_test.path))
        except VectorsUnusable as error:
            raise BadInput(str(error)) from None
        rows = len(next(iter(vectors.inputs.values())))
        return vectors.inputs, np.arange(rows), None, "B's self-test vectors"
    items = read_items(data)
    for spec in b.bundle.inputs:
        if spec.name not in items.inputs:
            raise BadInput(f"{data}: there is no {f'input.{spec.name}'!r}, which both models take")
        try:
            problem = spec.mismatch(items.inputs[spec.name])
        except TensorError as error:
            problem = str(error)
        if problem is not None:
            raise BadInput(f"{data}: input {spec.name!r}: {problem}")
    inputs = {spec.name: items.inputs[spec.name] for spec in b.bundle.inputs}
    return inputs, items.scenes, items.labels, str(data)


def _run(side: BundleDirectory, variant: str, inputs: Mapping[str, Array], output: str) -> Array:
    try:
        found = side.bundle.variant(variant)
    except KeyError:
        known = ", ".join(v.name for v in side.bundle.variants)
        raise BadInput(
            f"{side.bundle.model} {side.bundle.version} has no variant {variant!r}, it has {known}"
        ) from None
    here = hardware.suits(hardware.this_machine(), found.processors)
    session = Session(side.file(found.path), as_written=not here)
    outputs = session.run(inputs, found.max_rows or side.bundle.max_batch)
    if output not in outputs:
        raise BadInput(f"{side.bundle.model} {side.bundle.version} gives no output {output!r}")
    return outputs[output]
