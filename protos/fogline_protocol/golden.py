"""The self-test of a release: golden inputs, what the reference answered, and the verdict.

Hub, device and workshop run it on different engines and in different processes, and must
come to the same verdict on the same outputs; so reading and judging live here, running does not.
"""

import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_protocol.answers import Asked
from fogline_protocol.release import Bundle, Tolerance, Variant
from fogline_protocol.score import MAX_SOFTMAX, Score
from fogline_protocol.tensors import Array, TensorError

MAX_VECTORS_BYTES = 256 << 20  # unpacked; a small archive can hold any number of zeros
FAR_OFF = sys.float_info.max  # an error without a measure; JSON knows neither infinity nor NaN


class VectorsUnusable(Exception):
    """The golden vectors do not fit the bundle: nothing can be said about it."""


class Deviates(Exception):
    """Outputs stray further from the reference than the bundle tolerates."""

    def __init__(self, sentence: str, figures: Mapping[str, float] | None = None) -> None:
        super().__init__(sentence)
        self.figures = dict(figures or {})


@dataclass(frozen=True, slots=True)
class GoldenVectors:
    """Golden inputs and what the fp32 reference answered, by tensor name."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    max_batch: int  # 0: no batch dimension, the vectors are one run

    @classmethod
    def read(cls, bundle: Bundle, path: Path) -> "GoldenVectors":
        """Read the vectors of ``bundle`` from its self-test file.

        Raises:
            VectorsUnusable: the file cannot be read, or has not one row set for every tensor.
        """
        where = bundle.self_test.path
        tensors: dict[str, Array] = {}
        try:
            with zipfile.ZipFile(path) as packed:
                unpacked = sum(entry.file_size for entry in packed.infolist())
            if unpacked > MAX_VECTORS_BYTES:
                raise VectorsUnusable(
                    f"{where}: {unpacked} bytes unpacked, at most {MAX_VECTORS_BYTES} are accepted"
                )
            # Opened here, because `np.load` leaves the file open when it finds it damaged.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                for name in archive.files:
                    array = archive[name]
                    # BYTES: numpy keeps objects only as pickles, which nobody should load.
                    tensors[name] = array.astype(object) if array.dtype.kind == "S" else array
        except VectorsUnusable:
            raise
        except Exception as error:  # five libraries parse this, each with errors of its own
            words = str(error).splitlines() or [type(error).__name__]
            raise VectorsUnusable(f"{where}: {words[0]}") from None
        rows = set()
        for prefix, specs in (("input.", bundle.inputs), ("output.", bundle.outputs)):
            for spec in specs:
                array = tensors.get(prefix + spec.name)
                try:
                    problem = "it is missing" if array is None else spec.mismatch(array)
                except TensorError as error:
                    problem = str(error)
                if array is None or problem is not None:
                    raise VectorsUnusable(f"{where}: {prefix}{spec.name}: {problem}")
                if bundle.max_batch:
                    rows.add(len(array))
        if bundle.max_batch and (len(rows) != 1 or 0 in rows):
            raise VectorsUnusable(
                f"{where}: tensors have {sorted(rows)} rows, expected one number > 0"
            )
        found = cls(
            {spec.name: tensors[f"input.{spec.name}"] for spec in bundle.inputs},
            {spec.name: tensors[f"output.{spec.name}"] for spec in bundle.outputs},
            bundle.max_batch,
        )
        if bundle.score is not None and bundle.max_batch:
            try:
                Asked.of(bundle.score, found.outputs[bundle.score.output], found.inputs)
            except TensorError as error:
                raise VectorsUnusable(f"{where}: {error}") from None
        return found

    def batches(self, variant: Variant) -> Iterator[Mapping[str, Array]]:
        """Yield the inputs in runs of at most as many rows as a variant takes."""
        if not self.max_batch:
            yield self.inputs
            return
        rows, most = len(next(iter(self.inputs.values()))), variant.max_rows or self.max_batch
        for start in range(0, rows, most):
            yield {name: a[start : start + most] for name, a in self.inputs.items()}


def judge(
    bundle: Bundle,
    golden: GoldenVectors,
    answers: Sequence[Mapping[str, Array]],
    tolerance: Tolerance,
) -> Mapping[str, float]:
    """Compare ``answers``, one per batch of ``golden``, with the reference.

    Returns:
        ``max_abs_error`` over all values and ``agreement``, the share of answers that are the
        reference's (1 where no output has classes): of rows, or of tokens that count.

    Raises:
        Deviates: by more than ``tolerance``, or in shape.
    """
    worst = 0.0
    agreement = 1.0
    for spec in bundle.outputs:
        want = golden.outputs[spec.name]
        try:
            parts = [answer[spec.name] for answer in answers]
        except KeyError:
            raise Deviates(f"the model has no output {spec.name!r}") from None
        got = np.concatenate(parts) if golden.max_batch else parts[0]
        if (problem := spec.mismatch(got)) is not None or got.shape != want.shape:
            found = problem or f"expected shape {list(want.shape)}, got {list(got.shape)}"
            raise Deviates(f"output {spec.name!r}: {found}")
        worst = max(worst, _distance(want, got))
        if spec.name == bundle.decisive_output and golden.max_batch and want.size > len(want):
            agreement = _agreement(bundle, golden, want, got)
    figures = {"max_abs_error": worst, "agreement": agreement}
    what = "tokens" if bundle.score is not None and bundle.score.per_token else "rows"
    if worst > tolerance.max_abs_error or agreement < tolerance.min_agreement:
        raise Deviates(
            f"outputs stray from the reference by up to {worst if worst < FAR_OFF else math.inf:.4g} (allowed "
            f"{tolerance.max_abs_error:.4g}); {agreement:.1%} of the golden {what} get its top "
            f"answer (required {tolerance.min_agreement:.1%})",
            figures,
        )
    return figures


def _agreement(bundle: Bundle, golden: GoldenVectors, want: Array, got: Array) -> float:
    asked = Asked.of(bundle.score or Score(MAX_SOFTMAX, ""), want, golden.inputs)
    return float((asked.top(want) == asked.top(got)).mean()) if len(asked) else 1.0


def _distance(want: Array, got: Array) -> float:
    if want.dtype.kind not in "fiu":
        return 0.0 if bool((want == got).all()) else FAR_OFF
    with np.errstate(all="ignore"):
        difference = np.abs(want.astype(np.float64) - got.astype(np.float64))
    # Equal infinities and equal NaNs are what the reference asked for.
    difference[(want == got) | (np.isnan(want) & np.isnan(got))] = 0.0
    largest = float(difference.max(initial=0.0))
    return largest if np.isfinite(largest) else FAR_OFF
