"""Runs a release's golden inputs on this device's real provider, before anything depends on it.

The run happens in a child process, because a model may exhaust the memory, hang, or take its
process down, and none of that may cost the agent an answer. The parent enforces time and memory,
the child compares outputs; the result is one line of JSON.

Memory is measured as the resident set, polled by the parent, not limited by ``setrlimit``: ONNX
Runtime reserves far more address space than it touches, so RLIMIT_AS refuses healthy models, and
an allocation that fails under RLIMIT_DATA ends in whatever the library makes of it, an exception
here and an abort there, which nobody could tell from a crash. A peak between two polls is still
seen afterwards (the kernel's high-water mark), and a child that outruns the poll is the first
that the kernel kills (``oom_score_adj``), not the agent.

What the vectors are and how outputs are judged is the protocol's (``fogline_protocol.golden``); the
trial uses the same, with the engine that answers requests.
"""

import argparse
import asyncio
import contextlib
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.update.lifecycle import StepEnded, StepFailed, StepRefused
from fogline_protocol import release
from fogline_protocol.documents import DocumentError
from fogline_protocol.golden import Deviates, GoldenVectors, VectorsUnusable, judge
from fogline_protocol.release import Bundle, BundleDirectory
from fogline_protocol.tensors import Array

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

DEVIATION = "self-test/deviation"
TIMEOUT = "self-test/timeout"
MEMORY = "self-test/memory"
CRASH = "self-test/crash"
LOAD = "self-test/load"

# The same bytes on the same provider deviate again, and a graph that does not load never will.
# Time, memory and crashes also depend on what else the device was doing.
_CERTAIN = frozenset({DEVIATION, LOAD})

POLL_S = 0.02  # a child that touches 2 GB/s overshoots by 40 MB; a poll costs 20 us


@dataclass(frozen=True, slots=True)
class Limits:
    """What a self-test may take."""

    time_s: float = 60.0
    memory_bytes: int = 1 << 30  # resident, the interpreter and the runtime (about 70 MB) included


def run_here(
    directory: Path, variant: str, provider: str, load: Callable[[Bundle, Path], Run]
) -> Mapping[str, float]:
    """Run the self-test of the bundle in ``directory`` in this process.

    The caller has verified the bundle; nothing is hashed again.

    Args:
        directory: of the bundle.
        variant: the name of the variant to run.
        provider: the execution provider whose tolerance holds.
        load: opens an artifact on it.

    Raises:
        StepRefused: it deviates, or cannot be loaded.
        StepFailed: it crashed.
    """
    try:
        bundle = release.parse((directory / release.ROOT).read_bytes())
        golden = GoldenVectors.read(bundle, directory / bundle.self_test.path)
        artifact = directory / bundle.variant(variant).path
        tolerance = bundle.self_test.tolerances[variant].on(provider)
    except (OSError, DocumentError, VectorsUnusable) as error:
        raise StepRefused(LOAD, str(error)) from None
    except KeyError:
        raise StepRefused(LOAD, f"the bundle has no variant {variant!r}") from None
    started = time.perf_counter()
    try:
        run = load(bundle, artifact)
    except MemoryError:
        raise
    except Exception as error:  # a runtime's errors are its own; all mean the same here
        raise StepRefused(LOAD, f"{bundle.variant(variant).path}: {_first_line(error)}") from None
    loaded = time.perf_counter()
    answers: list[Mapping[str, Array]] = []
    durations: list[float] = []
    for inputs in golden.batches(bundle.variant(variant)):
        began = time.perf_counter()
        try:
            answers.append(run(inputs))
        except MemoryError:
            raise
        except Exception as error:
            raise StepFailed(
                CRASH, f"a run on golden inputs ended in: {_first_line(error)}"
            ) from None
        durations.append(time.perf_counter() - began)
    figures = {
        "load_seconds": loaded - started,
        "run_seconds": sum(durations),
        "run_p95_ms": 1e3 * float(np.percentile(durations, 95)),
        "rows": float(len(next(iter(golden.inputs.values()))) if golden.max_batch else 1),
    }
    try:
        return {**figures, **judge(bundle, golden, answers, tolerance)}
    except Deviates as error:
        raise StepRefused(DEVIATION, str(error), {**figures, **error.figures}) from None


class ChildSelfTest:
    """Runs self-tests in child processes of this interpreter."""

    def __init__(self, limits: Limits | None = None, *, threads: int = 1) -> None:
        self._limits = limits or Limits()
        self._threads = threads

    async def run(
        self, candidate: BundleDirectory, variant: str, provider: str
    ) -> Mapping[str, float]:
        """Run the self-test of ``candidate`` and return its figures.

        Raises:
            StepRefused: ``self-test/deviation`` or ``self-test/load``.
            StepFailed: ``self-test/timeout``, ``self-test/memory`` or ``self-test/crash``.
        """
        return await supervise(
            [
                sys.executable,
                "-m",
                "edge_agent.update.selftest",
                str(candidate.path.absolute()),
                f"--variant={variant}",
                f"--provider={provider}",
                f"--threads={self._threads}",
            ],
            self._limits,
        )


async def supervise(command: Sequence[str], limits: Limits) -> Mapping[str, float]:
    """Run ``command``, a self-test that prints its result, within ``limits``.

    Whoever leaves this call, cancelled or not, leaves no child behind.

    Raises:
        StepRefused: ``self-test/deviation`` or ``self-test/load``.
        StepFailed: ``self-test/timeout``, ``self-test/memory`` or ``self-test/crash``.
    """
    clock = asyncio.get_running_loop().time
    started = clock()
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the agent's terminal is not for the child
    )
    ending = asyncio.create_task(child.communicate())
    peak = 0
    try:
        while not ending.done():
            peak = max(peak, _resident_bytes(child.pid))
            if peak > limits.memory_bytes:
                raise _too_much_memory(peak, limits)
            if clock() - started > limits.time_s:
                raise StepFailed(
                    TIMEOUT,
                    f"no result after {limits.time_s:g} s",
                    {"seconds": clock() - started, "peak_bytes": float(peak)},
                )
            await asyncio.wait({ending}, timeout=POLL_S)
    finally:
        if not ending.done():
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await asyncio.shield(ending)
    out, err = ending.result()
    seconds = clock() - started
    assert child.returncode is not None
    if child.returncode != 0:
        raise StepFailed(
            CRASH,
            f"the self-test {_ending(child.returncode)}{_last_words(err)}",
            {"seconds": seconds, "peak_bytes": float(peak)},
        )
    return _verdict(out, seconds, peak, limits)


def _verdict(out: bytes, seconds: float, peak: int, limits: Limits) -> Mapping[str, float]:
    try:
        result = json.loads(out.splitlines()[-1])
        code, sentence, figures = result["code"], result["sentence"], dict(result["figures"])
    except (ValueError, IndexError, KeyError, TypeError):
        raise StepFailed(CRASH, "the self-test ended without a result") from None
    figures["seconds"] = seconds
    figures["peak_bytes"] = max(float(peak), figures.get("peak_bytes", 0.0))
    if code:
        raise (StepRefused if code in _CERTAIN else StepFailed)(code, sentence, figures)
    if figures["peak_bytes"] > limits.memory_bytes:
        raise _too_much_memory(int(figures["peak_bytes"]), limits, figures)
    return figures


def _too_much_memory(
    peak: int, limits: Limits, figures: Mapping[str, float] | None = None
) -> StepFailed:
    return StepFailed(
        MEMORY,
        f"it took {peak >> 20} MiB of memory, {limits.memory_bytes >> 20} MiB are allowed",
        {**(figures or {}), "peak_bytes": float(peak)},
    )


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else ""
    hint = ", as the kernel does when memory runs out" if -returncode == signal.SIGKILL else ""
    return f"was killed by signal {-returncode} {name}".rstrip() + hint


def _last_words(err: bytes) -> str:
    lines = err.decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:200]}" if lines else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _resident_bytes(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0  # it has just ended
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _peak_resident_bytes() -> float:
    # Not ru_maxrss: that one begins with what the parent had in memory when it forked.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return 0.0


def _become_expendable() -> None:
    """Yield to the agent in everything: processor, memory, and life."""
    os.nice(10)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1  # an agent that was killed leaves no self-test behind
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _load(bundle: Bundle, artifact: Path, provider: str, threads: int) -> Run:
    """Open an artifact as the agent will, contract check and warm-up included."""
    # Here and not above: the agent imports this file for the judgement, and has its engine.
    from edge_agent.runtime.engine import Engine

    engine = Engine(
        artifact,
        provider=provider,
        inputs=bundle.inputs,
        outputs=bundle.outputs,
        threads=threads,
        inline_below_s=math.inf,
    )
    names = [spec.name for spec in bundle.outputs]

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        rows = len(next(iter(inputs.values()))) if bundle.max_batch else 1
        return dict(zip(names, asyncio.run(engine.run(inputs, names, rows)), strict=True))

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one self-test and print its result as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.update.selftest")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--provider", default="CPUExecutionProvider")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    _become_expendable()
    code, sentence, figures = "", "", {}
    try:
        figures = dict(
            run_here(
                given.bundle,
                given.variant,
                given.provider,
                lambda bundle, artifact: _load(bundle, artifact, given.provider, given.threads),
            )
        )
    except StepEnded as error:
        code, sentence, figures = error.code, error.sentence, error.figures
    except MemoryError:
        code, sentence = MEMORY, "an allocation was refused"
    figures["peak_bytes"] = _peak_resident_bytes()
    print(json.dumps({"code": code, "sentence": sentence, "figures": figures}), flush=True)


if __name__ == "__main__":
    main()
