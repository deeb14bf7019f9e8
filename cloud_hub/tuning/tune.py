"""Tunes one model: load it, see what may be tried, measure, choose."""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cloud_hub.engines.launch import Launcher
from cloud_hub.engines.onnx_runtime import CPU
from cloud_hub.errors import HubError
from cloud_hub.inference.repository import Limits
from cloud_hub.tuning import choice, measure
from cloud_hub.tuning.choice import Engines, Measurement, Setting, Space
from cloud_hub.tuning.settings import Target
from fogline_protocol.model_config import Tuning


class NothingChosen(HubError):
    """No setting was within the limit, or none could be measured: ask for less."""

    exit_code = 8


class Watcher(Protocol):
    """Is told how it goes."""

    def trying(self, setting: Setting, left: int) -> None:
        """A setting is measured next; so many are left with it."""
        ...

    def measured(self, found: Measurement) -> None:
        """It was."""
        ...


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asks for."""

    limit_s: float  # of a batch at p99
    seconds: float  # for everything
    largest_batch: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of inputs, without batch


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was measured, and what follows from it."""

    wish: Wish
    space: Space
    batches: bool  # whether the model does
    provider: str
    delay_us: int  # that a batch may be held for company, by the model's configuration
    measurements: Sequence[Measurement]
    took_s: float

    @property
    def chosen(self) -> Measurement | None:
        """The measurement whose setting is taken; None: none kept the limit."""
        return choice.choose(self.measurements, self.wish.limit_s)

    @property
    def now(self) -> Measurement | None:
        """What the model gives as it is served without this; None: there was no time for it."""
        found = (one for one in self.measurements if one.setting == self.space.now)
        return next(found, None)

    @property
    def untried(self) -> int:
        """How many settings there was no time for; those given up for good reason do not count."""
        left = choice.remaining(self.space, self.measurements, self.wish.limit_s)
        return sum(len(curve) for curve in left)

    def tuning(self) -> Tuning:
        """Return what the model's settings are to say. There must be a choice."""
        assert self.chosen is not None
        setting = self.chosen.setting
        sizes: tuple[int, ...] = ()
        if self.batches:
            sizes = choice.preferred(self.measurements, setting, self.delay_us)
        return Tuning(
            max_batch_size=setting.batch if self.batches else None,
            instances=setting.engines.instances,
            threads=setting.engines.threads or None,
            preferred_batch_sizes=sizes,
        )

    def check(self) -> None:
        """Refuse an outcome without a choice.

        Raises:
            NothingChosen: the text says what to change.
        """
        if self.chosen is not None:
            return
        able = [one for one in self.measurements if not one.trouble]
        if able:
            quickest = min(able, key=lambda one: one.p99_s)
            raise NothingChosen(
                f"no setting keeps p99 within {self.wish.limit_s * 1e3:g} ms, the quickest took "
                f"{quickest.p99_s * 1e3:.3g} ms: raise --latency-ms"
            )
        if self.measurements:
            raise NothingChosen(f"the model cannot be run: {self.measurements[0].trouble}")
        raise NothingChosen(
            f"nothing could be measured in {self.wish.seconds:g} s: raise --seconds"
        )


async def tune(target: Target, wish: Wish, watcher: Watcher) -> Tuned:
    """Measure what is worth it, within ``wish.seconds``.

    Raises:
        ConfigRefused: an input needs a shape.
        ModelRefused: the model cannot be loaded, or its settings contradict it.
    """
    began = time.monotonic()
    ends_at = began + wish.seconds
    launcher = Launcher()
    wanted = target.wanted
    try:
        async with asyncio.timeout_at(ends_at):
            engine = await launcher.open(target.file)
    except TimeoutError:
        raise NothingChosen(
            f"the model was not even loaded in {wish.seconds:g} s: raise --seconds"
        ) from None
    try:
        served = target.served(engine, Limits().max_batch)
        provider = engine.provider
    finally:
        await engine.close()
    sample = target.sample(served, wish.shapes)
    on_cpu = provider == CPU
    threads = wanted.threads
    if on_cpu and not threads:
        threads = launcher.threads_of_one(wanted.instances)
    space = choice.space(
        Setting(Engines(wanted.instances, threads), max(1, served.max_batch_size)),
        cores=len(os.sched_getaffinity(0)),
        largest_batch=wish.largest_batch if served.batches else 1,
        single_engine=wanted.batching.preserve_ordering,
        on_cpu=on_cpu,
    )
    measurements = []
    climbing = measure.climb(
        launcher, target.file, sample, space,
        batches=served.batches, limit_s=wish.limit_s, ends_at=ends_at, trying=watcher.trying,
    )  # fmt: skip
    async with contextlib.aclosing(climbing):
        async for one in climbing:
            measurements.append(one)
            watcher.measured(one)
    return Tuned(
        wish, space, served.batches, provider, wanted.batching.max_queue_delay_us,
        measurements, time.monotonic() - began,
    )  # fmt: skip
