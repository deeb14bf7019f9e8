"""Runs a bundle's golden inputs on the hub's own engine.

The device does the same before it activates anything; doing it here keeps a release that is
plainly wrong from leaving the hub at all. What passes here may still fail on a device with
another instruction set: that is what the device's self-test is for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloud_hub.errors import ModelRefused
from fogline_protocol import hardware
from fogline_protocol.golden import Deviates, GoldenVectors, VectorsUnusable, judge
from fogline_protocol.release import Bundle, BundleDirectory
from fogline_protocol.tensors import Array

RUN_LIMIT_S = 120.0


class Engine(Protocol):
    """Runs one loaded variant."""

    @property
    def provider(self) -> str:
        """The execution provider that runs it."""
        ...

    async def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return every output, one row per input row: ``[n, ...] -> [n, ...]``."""
        ...

    async def close(self) -> None:
        """Give back what it holds."""
        ...


Load = Callable[[Path], Awaitable[Engine]]  # raises ModelRefused


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one variant's self-test. ``problem`` is empty if it passed."""

    figures: Mapping[str, float]  # max_abs_error, agreement; empty if it never ran
    problem: str = ""


def problems(bundle: Bundle, findings: Mapping[str, Finding], processor: str) -> Sequence[str]:
    """Say of every variant that failed what is wrong with it, and what may mend it.

    Where int8 strays and fp32 does not, the net is right and its quantization is not; on a
    processor whose sums saturate, the likely reason is weights of all 8 bits.

    Args:
        bundle: what was tried.
        findings: by variant.
        processor: that tried it, as ``hardware.this_machine`` names it.
    """
    precisions = {variant.name: variant.precision for variant in bundle.variants}
    fp32_passes = any(precisions[name] == "fp32" and not f.problem for name, f in findings.items())
    said = []
    for name, finding in findings.items():
        if not finding.problem:
            continue
        strays = bool(finding.figures) and precisions[name] == "int8"
        hint = (
            f" (its fp32 passes, and this hub's {processor} has no VNNI: "
            "there an int8 file may need to be quantized with reduce_range=True)"
            if strays and fp32_passes and hardware.sums_saturate(processor)
            else ""
        )
        said.append(f"variant {name}: {finding.problem}{hint}")
    return said


async def run(
    directory: BundleDirectory, load: Load, providers: Collection[str]
) -> Mapping[str, Finding]:
    """Return a finding for every variant that is meant for one of ``providers``.

    Raises:
        ModelRefused: the golden vectors themselves are unusable.
    """
    bundle = directory.bundle
    try:
        golden = await asyncio.to_thread(
            GoldenVectors.read, bundle, directory.file(bundle.self_test.path)
        )
    except VectorsUnusable as error:
        raise ModelRefused(str(error)) from None
    findings = {}
    for variant in bundle.variants:
        if not variant.providers_on(providers, hardware.this_machine()):
            continue
        try:
            engine = await load(directory.file(variant.path))
        except ModelRefused as error:
            findings[variant.name] = Finding({}, f"it cannot be loaded: {error}")
            continue
        try:
            async with asyncio.timeout(RUN_LIMIT_S):
                answers = [await engine.run(inputs) for inputs in golden.batches(variant)]
            tolerance = bundle.self_test.tolerances[variant.name].on(engine.provider)
            findings[variant.name] = Finding(judge(bundle, golden, answers, tolerance))
        except Deviates as error:
            findings[variant.name] = Finding(error.figures, str(error))
        except TimeoutError:
            findings[variant.name] = Finding({}, f"it did not end within {RUN_LIMIT_S:.0f} s")
        except Exception as error:  # a runtime's errors have no common base; all mean the same here
            findings[variant.name] = Finding({}, f"it fails on its golden inputs: {error}")
        finally:
            await engine.close()
    return findings
