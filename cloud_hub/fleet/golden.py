"""Runs a bundle's golden inputs on the hub's own engine and judges the answers.

The device does the same before it activates anything; doing it here keeps a release that is
plainly wrong from leaving the hub at all. What passes here may still fail on a device with
another instruction set: that is what the device's self-test is for.
"""

import asyncio
import sys
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cloud_hub.errors import ModelRefused
from fogline_protocol.release import Bundle, BundleDirectory, Tolerance
from fogline_protocol.tensors import Array

RUN_LIMIT_S = 120.0
MAX_VECTORS_BYTES = 256 << 20  # unpacked; a small archive can hold any number of zeros
FAR_OFF = sys.float_info.max  # an error without a measure


class Engine(Protocol):
    """Runs one loaded variant."""

    async def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return every output, one row per input row: ``[n, ...] -> [n, ...]``."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


Load = Callable[[Path], Engine]  # raises ModelRefused; it blocks, so it is called in a thread


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one variant's self-test. ``problem`` is empty if it passed."""

    figures: Mapping[str, float]  # max_abs_error, agreement; empty if it never ran
    problem: str = ""


async def run(
    directory: BundleDirectory, load: Load, providers: Collection[str]
) -> Mapping[str, Finding]:
    """Return a finding for every variant that is meant for one of ``providers``.

    Raises:
        ModelRefused: the golden vectors themselves are unusable.
    """
    bundle = directory.bundle
    golden = await asyncio.to_thread(_read, bundle, directory.file(bundle.self_test.path))
    findings = {}
    for variant in bundle.variants:
        if not set(variant.providers) & set(providers):
            continue
        tolerance = bundle.self_test.tolerances[variant.name]
        try:
            engine = await asyncio.to_thread(load, directory.file(variant.path))
        except ModelRefused as error:
            findings[variant.name] = Finding({}, f"it cannot be loaded: {error}")
            continue
        try:
            async with asyncio.timeout(RUN_LIMIT_S):
                answers = [await engine.run(inputs) for inputs in _batches(bundle, golden)]
            findings[variant.name] = judge(bundle, golden, answers, tolerance)
        except TimeoutError:
            findings[variant.name] = Finding({}, f"it did not end within {RUN_LIMIT_S:.0f} s")
        except Exception as error:  # a runtime's errors have no common base; all mean the same here
            findings[variant.name] = Finding({}, f"it fails on its golden inputs: {error}")
        finally:
            await asyncio.to_thread(engine.close)
    return findings


def judge(
    bundle: Bundle,
    golden: Mapping[str, Array],
    answers: list[Mapping[str, Array]],
    tolerance: Tolerance,
) -> Finding:
    """Compare the answers, one per batch, with the reference's outputs in ``golden``."""
    worst, agreement = 0.0, 1.0
    decisive = bundle.score.output if bundle.score is not None else bundle.outputs[0].name
    for spec in bundle.outputs:
        want = golden[f"output.{spec.name}"]
        parts = [answer.get(spec.name) for answer in answers]
        present = [part for part in parts if part is not None]
        if len(present) != len(parts):
            return Finding({}, f"the model has no output {spec.name!r}")
        got = np.concatenate(present) if bundle.max_batch else present[0]
        problem = spec.mismatch(got)
        if problem is not None or got.shape != want.shape:
            problem = problem or f"expected shape {list(want.shape)}, got {list(got.shape)}"
            return Finding({}, f"output {spec.name!r}: {problem}")
        worst = max(worst, _distance(want, got))
        if spec.name == decisive and bundle.max_batch and want.size > len(want):
            rows = len(want)
            top = want.reshape(rows, -1).argmax(axis=1) == got.reshape(rows, -1).argmax(axis=1)
            agreement = float(top.mean())
    figures = {"max_abs_error": worst, "agreement": agreement}
    if worst > tolerance.max_abs_error or agreement < tolerance.min_agreement:
        return Finding(
            figures,
            f"outputs stray from the reference by up to {worst:.4g} (allowed "
            f"{tolerance.max_abs_error:.4g}); {agreement:.1%} of the golden rows get its top answer "
            f"(required {tolerance.min_agreement:.1%})",
        )
    return Finding(figures)


def _read(bundle: Bundle, path: Path) -> Mapping[str, Array]:
    where = bundle.self_test.path
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_VECTORS_BYTES:
            raise ModelRefused(f"{where}: {unpacked} bytes unpacked, at most {MAX_VECTORS_BYTES}")
        with path.open("rb") as file, np.load(file, allow_pickle=False) as vectors:
            golden = {name: vectors[name] for name in vectors.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelRefused(f"{where}: not an archive of golden vectors: {error}") from None
    rows = set()
    for prefix, specs in (("input.", bundle.inputs), ("output.", bundle.outputs)):
        for spec in specs:
            array = golden.get(prefix + spec.name)
            problem = "it is missing" if array is None else spec.mismatch(array)
            if array is None or problem is not None:
                raise ModelRefused(f"{where}: {prefix}{spec.name}: {problem}")
            if bundle.max_batch:
                rows.add(len(array))
    if bundle.max_batch and (len(rows) != 1 or 0 in rows):
        raise ModelRefused(f"{where}: tensors have {sorted(rows)} rows, expected one number > 0")
    return golden


def _batches(bundle: Bundle, golden: Mapping[str, Array]) -> list[Mapping[str, Array]]:
    inputs = {spec.name: golden[f"input.{spec.name}"] for spec in bundle.inputs}
    if not bundle.max_batch:
        return [inputs]
    rows = len(next(iter(inputs.values())))
    step = bundle.max_batch
    return [{n: a[i : i + step] for n, a in inputs.items()} for i in range(0, rows, step)]


def _distance(want: Array, got: Array) -> float:
    if want.dtype.kind not in "fiu":
        return 0.0 if bool((want == got).all()) else FAR_OFF
    with np.errstate(all="ignore"):
        difference = np.abs(want.astype(np.float64) - got.astype(np.float64))
    # Equal infinities and equal NaNs are what the reference asked for.
    difference[(want == got) | (np.isnan(want) & np.isnan(got))] = 0.0
    largest = float(difference.max(initial=0.0))
    # JSON, where these figures go, knows neither infinity nor NaN.
    return largest if np.isfinite(largest) else FAR_OFF
