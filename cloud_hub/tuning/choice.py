"""Decides which settings of a model are tried, for how long, and which one is taken.

Pure: measurements and times come in as numbers. One **curve** is the engines of one count and
thread number under growing batches:

    engines ──► batch 1 ─► 2 ─► 4 ... ─► largest        next engines
                  └─ fell twice in a row, too slow, failed ─► ┘

The engines that serve the model now come first, and what it is served with now is measured even
if smaller batches were better, so that the choice can be held against it. Every curve starts with
the smallest batch, because a large one may take longer than there is time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

TIE = 0.03  # what differs by less differs by chance
MIN_SLICE_S = 0.05  # a shorter measurement says nothing
ENOUGH_S = 3.0  # nor does a longer one say more,
ENOUGH_RUNS = 100  # unless it would see fewer runs than this


@dataclass(frozen=True, slots=True, order=True)
class Engines:
    """How many engines serve a model, and with how many threads each."""

    instances: int
    threads: int  # 0: the runtime's own affair


@dataclass(frozen=True, slots=True)
class Setting:
    """What is tried."""

    engines: Engines
    batch: int  # rows in one run; 1 for a model that does not batch


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a setting gave under load: one batch running and one waiting for every engine."""

    setting: Setting
    runs: int
    samples_per_s: float
    p50_s: float  # of a batch, from where it waits behind another one to its answer
    p99_s: float
    cpu_s_per_sample: float
    memory_bytes: int  # resident, this process and its engines
    trouble: str = ""  # why it could not be run; then the figures are 0


@dataclass(frozen=True, slots=True)
class Space:
    """What may be tried."""

    now: Setting  # as the model is served without tuning
    engines: Sequence[Engines]  # in the order to try them
    batches: Sequence[int]  # ascending

    def __len__(self) -> int:
        return len(self.engines) * len(self.batches)


def space(
    now: Setting, *, cores: int, largest_batch: int, single_engine: bool, on_cpu: bool
) -> Space:
    """Return what is worth trying on a machine.

    Batches double; instances and threads double too and never claim more than all cores. Those
    that use the whole machine come first, because most models want that.

    Args:
        now: as the model is served; always part of the space.
        cores: that this process may use.
        largest_batch: 1 for a model that does not batch.
        single_engine: whether its requests must leave in order, which several would break.
        on_cpu: whether the runs need the cores; otherwise threads are the runtime's affair.
    """
    counts = _doubling(cores)
    pairs = {
        Engines(instances, threads if on_cpu else 0)
        for instances in ([1] if single_engine else counts)
        for threads in {*counts, max(1, cores // instances)}
        if instances * threads <= cores
    } - {now.engines}
    idle = {pair: cores - pair.instances * max(1, pair.threads) for pair in pairs}
    ordered = sorted(pairs, key=lambda pair: (idle[pair], pair))
    batches = sorted({*_doubling(largest_batch), now.batch})
    return Space(now, (now.engines, *ordered), batches)


def remaining(
    found: Space, done: Sequence[Measurement], limit_s: float
) -> Sequence[Sequence[Setting]]:
    """Return what is still worth measuring, curve by curve, in the order to do it."""
    by_setting = {one.setting: one for one in done}
    curves: list[Sequence[Setting]] = []
    for engines in found.engines:
        settings = [Setting(engines, batch) for batch in found.batches]
        climbed = [by_setting[one] for one in takewhile(by_setting.__contains__, settings)]
        left = [one for one in settings if one not in by_setting]
        if climbed and _is_too_much(climbed[-1], limit_s):
            continue
        if _falls(climbed):
            left = [one for one in left if one == found.now]
        if left:
            curves.append(left)
    return curves


def slice_s(left_s: float, settings_left: int, run_s: float) -> float:
    """Return how long the next setting is measured; below ``MIN_SLICE_S``: not any more.

    Args:
        left_s: until the time is up.
        settings_left: to share it with, this one included.
        run_s: how long a batch was seen to take, waiting included: what still runs at the end
            of the slice is waited for.
    """
    fair = left_s / max(1, settings_left)
    return min(fair, left_s - run_s, max(ENOUGH_S, ENOUGH_RUNS * run_s))


def choose(done: Sequence[Measurement], limit_s: float) -> Measurement | None:
    """Return the measurement whose setting is taken; None: none kept the limit.

    The most samples a second win. Of those within ``TIE`` the one that takes the least CPU
    does, of those alike in that too the smallest batch, and then the fewest threads.
    """
    able = [one for one in done if not one.trouble and one.p99_s <= limit_s]
    if not able:
        return None
    most = max(one.samples_per_s for one in able)
    able = [one for one in able if one.samples_per_s >= (1 - TIE) * most]
    least = min(one.cpu_s_per_sample for one in able)
    able = [one for one in able if one.cpu_s_per_sample <= (1 + TIE) * least]
    return min(
        able,
        key=lambda one: (
            one.setting.batch,
            one.setting.engines.instances * one.setting.engines.threads,
            -one.samples_per_s,
        ),
    )


def preferred(done: Sequence[Measurement], chosen: Setting, delay_us: int) -> tuple[int, ...]:
    """Return the batch sizes that are not worth holding for company; empty: all or none.

    Without a maximum delay nothing is ever held, and a preferred size would only keep batches
    smaller than they could be. With one, a smaller batch that is as good as the largest leaves.
    """
    curve = {
        one.setting.batch: one.samples_per_s
        for one in done
        if one.setting.engines == chosen.engines and not one.trouble
    }
    enough = (1 - TIE) * curve[chosen.batch]
    good = sorted(
        batch for batch, rate in curve.items() if batch <= chosen.batch and rate >= enough
    )
    return tuple(good) if delay_us and len(good) > 1 else ()


def _is_too_much(last: Measurement, limit_s: float) -> bool:
    """Return whether larger batches can only be as bad: half of all are late, or it fails."""
    return bool(last.trouble) or last.p50_s > limit_s


def _falls(climbed: Sequence[Measurement]) -> bool:
    """Return whether the last two steps each cost throughput, by more than chance."""
    rates = [one.samples_per_s for one in climbed[-3:]]
    return len(rates) == 3 and all(after < (1 - TIE) * before for before, after in pairwise(rates))


def _doubling(largest: int) -> list[int]:
    steps = [1]
    while 2 * steps[-1] <= largest:
        steps.append(2 * steps[-1])
    return steps if steps[-1] == largest else [*steps, largest]
