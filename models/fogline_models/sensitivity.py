"""Finds the layers that quantization hurts, and the fewest that must stay fp32.

``sweep`` quantizes one layer at a time, or all but one, and compares each answer with fp32's;
``fewest`` keeps the worst of them until a target is met. A *layer* is a node with weights and
what follows it up to the next one; where there are more layers than measurements are allowed,
neighbors are measured together. Where most layers would have to stay, it is often the arithmetic
between weights that quantization hurts, a normalization or an activation written out in plain
operators; ``mixed`` then leaves that in fp32 and asks for layers again. What bounds the
measurements is a number and not a time, so that the same model and items give the same list on
every machine.
"""

import contextlib
import dataclasses
import enum
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fogline_models import graph, metrics
from fogline_models.errors import BadInput
from fogline_models.quantize import Node, Prepared, prepared
from fogline_models.session import ALL_ROWS, Session
from fogline_protocol.tensors import Array

STEP = "sensitivity"
MOST = 48  # measurements of one sweep, each a quantization and a pass over the items
ROWS = 64  # at once


class OutOfReach(BadInput):
    """No choice of layers meets the target: the message says how far one gets."""


class Ask(enum.StrEnum):
    """What one measurement of a sweep is."""

    ONLY = "only"  # how much is lost with this layer alone quantized
    WITHOUT = "without"  # how much is lost with everything else quantized


@dataclass(frozen=True, slots=True)
class Loss:
    """How far a mixed file is from fp32."""

    agreement: float  # share of answers whose top class is fp32's; of vectors the mean cosine
    sqnr_db: float  # signal to quantization noise, over all float outputs; infinite: no noise


@dataclass(frozen=True, slots=True)
class Measurement:
    """One layer, or neighbors measured together, and what came out."""

    nodes: tuple[str, ...]  # what to keep if it is to stay fp32
    operators: tuple[str, ...]
    loss: Loss


@dataclass(frozen=True, slots=True)
class Choice:
    """What to keep in fp32, and what that was measured to give."""

    keep: tuple[str, ...]
    layers: int  # of the sweep, that these nodes are
    loss: Loss


class Progress(Protocol):
    """Hears how far a sweep is."""

    def __call__(self, done: int, total: int, seconds_left: float) -> None:
        """Take note that ``done`` of ``total`` measurements are there."""
        ...


class Bench:
    """Measures mixed files of one fp32 file and form, on one set of items."""

    def __init__(
        self,
        ready: Prepared,
        form: str,
        fp32: Path,
        items: Mapping[str, Array],
        mask: str = "",
        *,
        vectors: bool = False,
    ) -> None:
        """Run ``fp32`` on ``items``, ``{name: [n, ...]}``, to compare with.

        ``vectors`` are features, which agree as far as their cosine says.
        ``mask`` is the input that is not 0 where a token counts; what does not, is not compared.
        """
        graph.check_inputs(ready.signature, items, step=STEP, what="the items")
        self._ready = ready
        self._form = form
        self._items = items
        self._counts = items[mask] != 0 if mask else None
        self._vectors = vectors
        self._known: dict[frozenset[str], Loss] = {}
        self.nodes = ready.nodes(form)
        self._want = self._answers(fp32)

    def loss(self, keep: Sequence[str]) -> Loss:
        """Return how far the form is from fp32 with ``keep`` in fp32; measured once."""
        key = frozenset(keep)
        if key >= {node.name for node in self.nodes}:
            return Loss(1.0, math.inf)  # nothing is quantized, hence nothing lost
        if key not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "mixed.onnx")
                self._ready.write(self._form, {}, path, keep=sorted(key))
                self._known[key] = compare(
                    self._want, self._answers(path), self._counts, vectors=self._vectors
                )
        return self._known[key]

    def _answers(self, path: Path) -> dict[str, Array]:
        # As written: the same figures on every processor, also for forms made for another.
        session = Session(path, as_written=True)
        runs = [
            session.run(part, ALL_ROWS)
            for part in graph.runs(self._ready.signature, self._items, ROWS)
        ]
        return {
            name: np.concatenate([np.atleast_1d(run[name]) for run in runs]) for name in runs[0]
        }


def compare(
    want: Mapping[str, Array],
    found: Mapping[str, Array],
    counts: Array | None = None,
    *,
    vectors: bool = False,
) -> Loss:
    """Return how far ``found`` is from ``want``: ``{name: [n, ..., classes]}`` twice.

    Every float output counts, each by its own signal; agreement is that of the worst. Of outputs
    for tokens only those are compared that ``counts``, bool ``[n, tokens]``. Which number of
    ``vectors`` is the largest says nothing: they agree by their mean cosine, a whole row being one
    vector, as in ``evaluate``. Pure.
    """
    agreements, ratios = [1.0], [math.inf]
    for name, right in want.items():
        if right.dtype.kind != "f":
            continue
        given = found[name]
        if counts is not None and right.shape[:-1] == counts.shape:
            right, given = right[counts], given[counts]
        noise = float(np.square(given.astype(np.float64) - right).sum())
        signal = float(np.square(right.astype(np.float64)).sum())
        if noise > 0:
            ratios.append(10 * math.log10(max(signal, 1e-300) / noise))
        if vectors and right.ndim > 1 and right.size:
            agreements.append(float(metrics.cosines(given, right).mean()))
        elif right.ndim > 1 and right.size:
            agreements.append(float((given.argmax(axis=-1) == right.argmax(axis=-1)).mean()))
    return Loss(min(agreements), min(ratios))


def layers(nodes: Sequence[Node], most: int) -> tuple[tuple[Node, ...], ...]:
    """Group nodes, in the order of the graph, into at most ``most`` layers. Pure.

    Each begins with a node that has weights; what comes before the first belongs to it. If
    that gives too many, neighbors are joined, as evenly as it goes.
    """
    found: list[list[Node]] = []
    for node in nodes:
        if not found or (node.weighs and any(other.weighs for other in found[-1])):
            found.append([])
        found[-1].append(node)
    size = math.ceil(len(found) / most) if found else 1
    return tuple(
        tuple(node for layer in found[start : start + size] for node in layer)
        for start in range(0, len(found), size)
    )


def sweep(
    bench: Bench,
    *,
    clock: Callable[[], float],
    progress: Progress | None = None,
    ask: Ask = Ask.ONLY,
    most: int = MOST,
    kept: Sequence[str] = (),
) -> tuple[Measurement, ...]:
    """Measure every layer and return them, those that hurt most first.

    Nodes in ``kept`` are part of no layer and stay fp32.

    Raises:
        BadInput: the form quantizes nothing in this file, or a mixed file is not usable.
    """
    if most < 1:
        raise BadInput(f"{STEP}: at least one measurement must be allowed, got {most}")
    nodes = [node for node in bench.nodes if node.name not in kept]
    groups = layers(nodes, most)
    if not groups:
        raise BadInput(f"{STEP}: the form quantizes nothing in this file: leave it out")
    started = clock()
    found: list[Measurement] = []
    for done, group in enumerate(groups, 1):
        names = tuple(node.name for node in group)
        others = tuple(node.name for node in nodes if node.name not in names)
        loss = bench.loss((*kept, *(others if ask is Ask.ONLY else names)))
        found.append(Measurement(names, tuple(node.operator for node in group), loss))
        if progress is not None:
            progress(done, len(groups), (clock() - started) / done * (len(groups) - done))
    return rank(found, ask)


def rank(found: Sequence[Measurement], ask: Ask) -> tuple[Measurement, ...]:
    """Return measurements with the layer first that hurts most. Pure; ties stay in order.

    Noise comes before agreement: a layer's noise alone seldom flips a top class, and agreement
    then ties where noise still tells layers apart.
    """
    sign = 1 if ask is Ask.ONLY else -1  # all but this one: the better the rest, the worse it was
    return tuple(sorted(found, key=lambda m: (sign * m.loss.sqnr_db, sign * m.loss.agreement)))


def fewest(
    ranked: Sequence[Measurement], target: float, measure: Callable[[Sequence[str]], Loss]
) -> Choice:
    """Return the fewest layers, worst first, to keep so that agreement reaches ``target``.

    Greedy: it keeps the worst layer, then the two worst, and so on in steps that double, then
    halves the last step. So the number of measurements grows with the logarithm of the layers;
    that no smaller set would do is not proven. Pure, given what ``measure`` answers to a list
    of nodes to keep.

    Raises:
        OutOfReach: everything but one layer is kept and the target is still missed.
        BadInput: the target is no share.
    """
    if not 0 < target <= 1:
        raise BadInput(f"{STEP}: agreement must be asked for between 0 and 1, got {target:g}")

    def choice(count: int) -> Choice:
        keep = tuple(name for measurement in ranked[:count] for name in measurement.nodes)
        return Choice(keep, count, measure(keep))

    missed, step = -1, 0  # so many layers are known not to be enough
    while True:
        count = min(step, len(ranked) - 1)  # with all of them kept nothing is quantized
        best = choice(count)
        if best.loss.agreement >= target:
            break
        if count == len(ranked) - 1:
            raise OutOfReach(
                f"{STEP}: agreement {target:.1%} is out of reach: with {count} of {len(ranked)} "
                f"layers in fp32 it is {best.loss.agreement:.1%}: ask for less, or ship fp32"
            )
        missed, step = count, max(1, step * 2)
    while best.layers - missed > 1:
        middle = choice((best.layers + missed) // 2)
        if middle.loss.agreement >= target:
            best = middle
        else:
            missed = middle.layers
    return best


def mixed(
    fp32: Path,
    form: str,
    ranges: Mapping[str, Array] | None,
    items: Mapping[str, Array],
    target: float,
    *,
    clock: Callable[[], float],
    mask: str = "",
    vectors: bool = False,
    progress: Progress | None = None,
    most: int = MOST,
) -> tuple[Choice, tuple[Measurement, ...]]:
    """Sweep ``fp32`` and return what to keep for ``target`` agreement, and the sweep.

    ``items`` may be ``ranges``, which spares held-out ones for the figures: what is measured on
    training inputs flatters, so a target met there is not one met elsewhere. ``mask`` and
    ``vectors`` are as in ``Bench``.

    Raises:
        BadInput: the inputs do not fit, or the target is out of reach.
    """
    with prepared(fp32, ranges) as ready:
        bench = Bench(ready, form, fp32, items, mask, vectors=vectors)
        whole = bench.loss(())
        if whole.agreement >= target:
            return Choice((), 0, whole), ()
        ranked = sweep(bench, clock=clock, progress=progress, most=most)
        choice = _within_reach(bench, ranked, target)
        between = tuple(node.name for node in bench.nodes if not node.weighs)
        few = choice is not None and choice.layers <= len(ranked) / 2
        if not few and len(between) < len(bench.nodes):
            # Nothing may be left that can be quantized; what was found before then stands.
            with contextlib.suppress(BadInput):
                again = sweep(bench, clock=clock, progress=progress, most=most, kept=between)
                found = _within_reach(bench, again, target, between)
                if found is not None and (
                    choice is None or _weights(bench, found.keep) < _weights(bench, choice.keep)
                ):
                    return found, again
        # Where neither reaches it, this says how far one gets.
        return choice or fewest(ranked, target, bench.loss), ranked


def _within_reach(
    bench: Bench, ranked: Sequence[Measurement], target: float, kept: tuple[str, ...] = ()
) -> Choice | None:
    """Return what to keep besides ``kept``, all together; None: the target is out of reach."""
    try:
        found = fewest(ranked, target, lambda keep: bench.loss((*kept, *keep)))
    except OutOfReach:
        return None
    return dataclasses.replace(found, keep=(*kept, *found.keep))


def _weights(bench: Bench, keep: Sequence[str]) -> int:
    """Return how many of the nodes to keep have weights."""
    return sum(node.weighs for node in bench.nodes if node.name in keep)
