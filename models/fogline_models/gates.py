"""Decides which variants may ship. Pure: figures and bars in, a decision per variant out.

How a bar is held against a figure that is known only to within its interval:

    overall        the estimate decides. An upper bound would let the size of the held-out split
                   decide instead of the variant; with a few hundred scenes nothing would pass.
                   ``confident = true`` asks for exactly that, where the data is there.
    a slice        refuses only what is beyond noise, too: of twenty small slices, one loses
                   a point by chance.
    latency        the median of the ratios to the reference, at the batch that devices run.

A loss that the data cannot tell from none is said to be within noise, whatever is decided.
A waiver (``allow``) lets a refused variant ship for a reason; it never hides a figure.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fogline_models.errors import BadInput
from fogline_models.evaluate import Evaluation, Figures
from fogline_models.measure import Cost
from fogline_models.metrics import Difference, Rate
from fogline_models.wording import interval, outward, percent


@dataclass(frozen=True, slots=True)
class Gates:
    """The bars of a recipe; None asks nothing."""

    max_accuracy_loss: float | None = 0.01  # against fp32, as a share: 0.01 is a point
    max_slice_loss: float | None = None  # as max_accuracy_loss, in every slice
    min_accuracy: float | None = None  # on the held-out items, where they have labels
    min_agreement: float | None = 0.99  # of top answers with fp32
    max_relative_error: float | None = 0.02  # of vectors, mean over items
    max_latency_ratio: float | None = 1.0  # of time to fp32: slower is refused
    max_size_ratio: float | None = None  # of bytes to fp32
    latency_batch: int = 1  # rows that times are compared for; devices answer one request at a time
    confident: bool = False  # hold the bars against the worse end of the interval
    # Why a variant ships all the same, by its name: {int8-qdq = "it ships for half of the bytes"}
    allow: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:  # NaN is refused, too
                raise BadInput(f"gates: {name} must lie between 0 and 1, got {value:g}")
        for name in _RATIOS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise BadInput(f"gates: {name} must be a number above 0, got {value:g}")


AGAINST_FP32 = frozenset(
    {"max_accuracy_loss", "max_slice_loss", "min_agreement", "max_relative_error"}
)
_SHARES = ("max_accuracy_loss", "max_slice_loss", "min_accuracy", "min_agreement")
_RATIOS = ("max_relative_error", "max_latency_ratio", "max_size_ratio", "latency_batch")


class Verdict(enum.StrEnum):
    """What becomes of a variant."""

    ELIGIBLE = "eligible"
    WAIVED = "waived"  # ships although a gate refuses it
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Check:
    """One figure held against its bar."""

    gate: str
    figure: float
    bar: float
    passed: bool
    words: str  # both of them, for people
    timing: bool = False  # depends on the machine: not for a model card
    within_noise: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one variant, with everything that was held against it."""

    variant: str
    verdict: Verdict
    checks: tuple[Check, ...]
    reason: str = ""  # the waiver's

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that it did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def may_change(self) -> bool:
        """Whether the next build may decide otherwise, because only noise of timing decided.

        With a waiver it ships either way, and with another failed check it ships in no way.
        """
        noisy = any(check.timing and check.within_noise for check in self.checks)
        sure = any(not (check.timing and check.within_noise) for check in self.failed)
        return noisy and not sure and not self.reason

    @property
    def sentence(self) -> str:
        """The decision as people say it."""
        against = "; ".join(check.words for check in self.failed)
        match self.verdict:
            case Verdict.REFUSED:
                return f"{self.variant} refused: {against}"
            case Verdict.WAIVED:
                return f"{self.variant} ships although {against}. Reason given: {self.reason}"
            case Verdict.ELIGIBLE:
                count = len(self.checks)
                if not self.checks:
                    return f"{self.variant} eligible: no gate asks anything of it"
                unused = " (its waiver was not needed)" if self.reason else ""
                return f"{self.variant} eligible: passes {_count(count, 'check')}{unused}"


def decide(
    gates: Gates,
    evaluation: Evaluation,
    costs: Mapping[str, Cost],
    sizes: Mapping[str, int],
) -> tuple[Decision, ...]:
    """Return the decision on every variant of ``evaluation``, in its order.

    ``costs`` may lack variants that do not run on this machine; no latency is held against them.

    Raises:
        BadInput: a waiver names no variant or gives no reason, a gate asks for a figure that
            there is not, or the batch was not measured.
    """
    for name, reason in gates.allow.items():
        if name not in evaluation.variants:
            known = ", ".join(evaluation.variants)
            raise BadInput(f"gates: allow names {name!r}, which is none of the variants {known}")
        if not reason.strip():
            raise BadInput(f"gates: allow.{name} needs a reason, it is printed in the report")
    if gates.min_accuracy is not None and all(
        figures.accuracy is None for figures in evaluation.variants.values()
    ):
        raise BadInput("gates: min_accuracy needs labels, the held-out split has none")
    if gates.max_slice_loss is not None and not evaluation.variants[evaluation.reference].slices:
        raise BadInput("gates: max_slice_loss needs slices, the held-out split names none")
    if gates.max_slice_loss is not None and all(
        part.accuracy is None for part in evaluation.variants[evaluation.reference].slices
    ):
        raise BadInput("gates: max_slice_loss needs labels, the held-out split has none")
    return tuple(
        _decide(gates, name, evaluation, costs.get(name), sizes) for name in evaluation.variants
    )


def eligible(decisions: Sequence[Decision]) -> tuple[str, ...]:
    """Return the variants that may ship.

    Raises:
        BadInput: there is none; the message holds every figure.
    """
    kept = tuple(d.variant for d in decisions if d.verdict is not Verdict.REFUSED)
    if not kept:
        listed = ". ".join(decision.sentence for decision in decisions)
        raise BadInput(f"gates: no variant may ship. {listed}")
    return kept


def _decide(
    gates: Gates,
    name: str,
    evaluation: Evaluation,
    cost: Cost | None,
    sizes: Mapping[str, int],
) -> Decision:
    checks = [
        *_quality(gates, name, evaluation),
        *_costs(gates, name, evaluation.reference, cost, sizes),
    ]
    reason = gates.allow.get(name, "").strip()
    if all(check.passed for check in checks):
        verdict = Verdict.ELIGIBLE
    else:
        verdict = Verdict.WAIVED if reason else Verdict.REFUSED
    return Decision(name, verdict, tuple(checks), reason)


def _quality(gates: Gates, name: str, evaluation: Evaluation) -> list[Check]:
    figures, reference = evaluation.variants[name], evaluation.reference
    of = f"of the {evaluation.counted}"
    checks = []
    if gates.min_accuracy is not None and figures.accuracy is not None:
        checks.append(
            _at_least("min_accuracy", figures.accuracy, gates.min_accuracy, "right on", of, gates)
        )
    if name == reference:
        return checks  # it loses nothing against itself
    if gates.max_accuracy_loss is not None and figures.loss is not None:
        bar, loss = gates.max_accuracy_loss, figures.loss
        held = loss.upper if gates.confident else loss.value
        checks.append(
            Check(
                "max_accuracy_loss", loss.value, bar, held <= bar,
                f"{_loss(loss)} of accuracy against {reference}, at most {100 * bar:.1f} allowed",
                within_noise=loss.within_noise,
            )
        )  # fmt: skip
    if gates.max_slice_loss is not None and figures.slices:
        checks.append(_worst_slice(figures, gates.max_slice_loss, reference, gates))
    if gates.min_agreement is not None and figures.agreement is not None:
        words = f"answers as {reference} on"
        checks.append(
            _at_least("min_agreement", figures.agreement, gates.min_agreement, words, of, gates)
        )
    if gates.max_relative_error is not None and figures.relative_error is not None:
        error, bar = figures.relative_error, gates.max_relative_error
        checks.append(
            Check(
                "max_relative_error", error, bar, error <= bar,
                f"strays from {reference} by {percent(error, 2)} of a vector's length, at most {percent(bar, 2)} "
                f"allowed",
            )
        )  # fmt: skip
    return checks


def _at_least(gate: str, found: Rate, bar: float, words: str, of: str, gates: Gates) -> Check:
    held = found.lower if gates.confident else found.value
    return Check(
        gate, found.value, bar, held >= bar,
        f"{words} {percent(found.value)} {of} (95 %: {interval(found.lower, found.upper)}), "
        f"at least {percent(bar)} required",
    )  # fmt: skip


def _worst_slice(figures: Figures, bar: float, reference: str, gates: Gates) -> Check:
    losses = {part.name: part.loss for part in figures.slices if part.loss is not None}

    def passes(loss: Difference) -> bool:
        return (loss.upper if gates.confident else loss.value) <= bar or (
            not gates.confident and loss.within_noise
        )

    # Those that fail first, then the largest loss; the name settles ties.
    name = min(losses, key=lambda key: (passes(losses[key]), -losses[key].value, key))
    loss = losses[name]
    return Check(
        "max_slice_loss", loss.value, bar, passes(loss),
        f"in slice {name!r} {_loss(loss)} of accuracy against {reference}, at most "
        f"{100 * bar:.1f} allowed",
        within_noise=loss.within_noise,
    )  # fmt: skip


def _costs(
    gates: Gates, name: str, reference: str, cost: Cost | None, sizes: Mapping[str, int]
) -> list[Check]:
    checks: list[Check] = []
    if name == reference:
        return checks
    if gates.max_latency_ratio is not None and cost is not None:
        if gates.latency_batch not in cost.ratio:
            raise BadInput(
                f"gates: latency_batch is {gates.latency_batch}, measured were batches of "
                f"{', '.join(map(str, cost.ratio))}"
            )
        bar, ratio = gates.max_latency_ratio, cost.ratio[gates.latency_batch]
        held = ratio.high if gates.confident else ratio.median
        batch = f" at batch {gates.latency_batch}" if gates.latency_batch != 1 else ""
        near = ratio.low <= bar <= ratio.high
        noise = f" (quartiles {ratio.low:.2f} to {ratio.high:.2f}, within noise)" if near else ""
        checks.append(
            Check(
                "max_latency_ratio", ratio.median, bar, held <= bar,
                f"{ratio.median:.2f} x the latency of {reference}{batch}{noise}, at most {bar:.2f} "
                f"allowed",
                timing=True,
                within_noise=near,
            )
        )  # fmt: skip
    if gates.max_size_ratio is not None:
        bar, share = gates.max_size_ratio, sizes[name] / sizes[reference]
        checks.append(
            Check(
                "max_size_ratio", share, bar, share <= bar,
                f"{share:.2f} x the size of {reference}, at most {bar:.2f} allowed",
            )
        )  # fmt: skip
    return checks


def _loss(loss: Difference) -> str:
    sign, verb = (1, "loses") if loss.value >= 0 else (-1, "gains")
    low, high = outward(*sorted((sign * loss.lower, sign * loss.upper)))
    noise = ", within noise" if loss.within_noise and loss.value != 0 else ""
    return f"{verb} {100 * abs(loss.value):.1f} points (95 %: {low:.1f} to {high:.1f}{noise})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
