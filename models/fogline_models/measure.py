"""Measures what a variant costs on this machine: time, memory, and loading.

Nothing here is reproducible, so nothing here enters a digest. Ratios to the reference are
taken within one turn and only then summarized, because a machine's speed changes from one
minute to the next. Memory and loading are measured in a child process of its own, so that
neither what this process holds nor what it has already loaded counts.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models import archive
from fogline_models.errors import BadInput
from fogline_models.session import CPU, Session, hardware_class
from fogline_models.steps import Progress, Say, paced, silent
from fogline_protocol.tensors import Array

TURNS = 9  # of all variants, for each latency
TURN_S = 0.03  # how long a variant's turn takes about
MIN_RUNS, MAX_RUNS = 3, 60  # in a turn
LONG_S = 0.2  # a run that takes longer is timed once in a turn: it warms its caches itself
STARTS = 3  # child processes for each variant
START_TIMEOUT_S = 300.0
STATUS = Path("/proc/self/status")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float  # a quarter lies below
    high: float  # a quarter lies above


@dataclass(frozen=True, slots=True)
class Cost:
    """What one variant costs on this machine."""

    latency_us: Mapping[int, Spread]  # by batch size
    ratio: Mapping[int, Spread]  # of latency to the reference's, in the same turns
    load_ms: Spread  # in a process that has run nothing before; the file is cached
    memory_mb: Spread | None  # peak that session and runs add; None where it cannot be read


def measure(
    files: Mapping[str, Path],
    inputs: Mapping[str, Array],
    batches: Sequence[int],
    *,
    reference: str = "fp32",
    provider: str = CPU,
    say: Say = silent,
) -> dict[str, Cost]:
    """Return what every variant costs.

    Args:
        files: by variant; the reference among them.
        inputs: at least as many rows as the largest batch, real ones.
        batches: numbers of rows in a run.
        reference: the variant that the others are compared with.
        provider: where they run.
        say: hears how far it is.

    Raises:
        BadInput: there is no reference, too few rows, or a file does not run here.
    """
    if reference not in files:
        raise BadInput(f"measure: no variant {reference!r} to compare with, only {list(files)}")
    rows = min(len(array) for array in inputs.values())
    if not batches or max(batches) > rows or min(batches) < 1:
        raise BadInput(f"measure: batches of {list(batches)} rows, there are {rows} rows")
    latency: dict[str, dict[int, Spread]] = {name: {} for name in files}
    ratio: dict[str, dict[int, Spread]] = {name: {} for name in files}
    sessions = {name: Session(path, provider) for name, path in files.items()}
    progress = paced(say)
    for batch in batches:
        cut = {name: array[:batch] for name, array in inputs.items()}
        turns = _turns(sessions, cut, batch, progress)
        for name in files:
            latency[name][batch] = _spread(np.concatenate(turns[name]) * 1e6)
            ratio[name][batch] = _spread(
                np.array(
                    [
                        np.median(mine) / np.median(base)
                        for mine, base in zip(turns[name], turns[reference], strict=True)
                    ]
                )
            )
    del sessions
    cost = {}
    with tempfile.TemporaryDirectory() as folder:
        example = Path(folder, "inputs.npz")
        largest = max(batches)
        example.write_bytes(
            archive.to_bytes({name: array[:largest] for name, array in inputs.items()})
        )
        for name, path in files.items():
            starts = []
            for number in range(STARTS):
                progress(number, STARTS, f"starting {name}")
                starts.append(_start(path, provider, example))
            memory = [start["memory_mb"] for start in starts if "memory_mb" in start]
            cost[name] = Cost(
                latency_us=latency[name],
                ratio=ratio[name],
                load_ms=_spread(np.array([start["load_ms"] for start in starts])),
                memory_mb=_spread(np.array(memory)) if memory else None,
            )
    return cost


def cost_from(document: Mapping[str, Any]) -> Cost:
    """Return the cost that ``dataclasses.asdict`` and JSON made a document of."""
    memory = document["memory_mb"]
    return Cost(
        latency_us={int(n): Spread(**each) for n, each in document["latency_us"].items()},
        ratio={int(n): Spread(**each) for n, each in document["ratio"].items()},
        load_ms=Spread(**document["load_ms"]),
        memory_mb=None if memory is None else Spread(**memory),
    )


def machine(provider: str = CPU) -> dict[str, str]:
    """Return what the figures of this machine depend on, in words, for the report."""
    names = ("numpy", "onnxruntime", "onnx", "torch", "optimum-onnx", "transformers")
    found = {
        "hardware class": hardware_class(provider),
        "processor": _processor(),
        "cores": str(os.cpu_count() or "unknown"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def size_of(model: Path) -> int:
    """Return the bytes of an ONNX file and of what lies beside it under a longer name."""
    return sum(
        part.stat().st_size
        for part in model.parent.iterdir()
        if part.name.startswith(model.name) and part.is_file()
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or "unknown"


def _turns(
    sessions: Mapping[str, Session], rows: Mapping[str, Array], batch: int, progress: Progress
) -> dict[str, list[Array]]:
    """Return the seconds of every run, by variant and turn."""
    runs = {}
    what = f"timing {batch} {'row' if batch == 1 else 'rows'}, turn"
    for name, session in sessions.items():
        session.run(rows, batch)  # the first run allocates
        start = time.perf_counter()
        session.run(rows, batch)
        once = time.perf_counter() - start
        least = MIN_RUNS if once < LONG_S else 1
        runs[name] = int(min(MAX_RUNS, max(least, TURN_S / max(once, 1e-9))))
    turns: dict[str, list[Array]] = {name: [] for name in sessions}
    for turn in range(TURNS):
        for name, session in sessions.items():
            progress(turn, TURNS, what)
            if runs[name] > 1:
                session.run(rows, batch)  # warm caches again after the others' turn
            samples = np.empty(runs[name])
            for i in range(runs[name]):
                start = time.perf_counter()
                session.run(rows, batch)
                samples[i] = time.perf_counter() - start
            turns[name].append(samples)
    return turns


def _spread(samples: Array) -> Spread:
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return Spread(*(float(f"{value:.4g}") for value in (median, low, high)))


def _start(model: Path, provider: str, example: Path) -> dict[str, float]:
    """Load and run ``model`` in a fresh process and return what it measured of itself."""
    command = [sys.executable, "-P", "-m", __name__, str(model), provider, str(example)]
    search = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": search},
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"measure: {model.name} did not load and run within {START_TIMEOUT_S:.0f} s in a "
            f"process of its own"
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BadInput(f"measure: {model.name} does not run in a process of its own: {last}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure_start(model: Path, provider: str, example: Path) -> dict[str, float]:
    """Measure, in this process, what loading and running ``model`` adds to it."""
    import onnxruntime

    onnxruntime.get_available_providers()  # the library counts as there before the session
    inputs = archive.read(example)
    before = _resident_bytes()
    start = time.perf_counter()
    session = Session(model, provider)
    loaded = time.perf_counter() - start
    session.run({name: array[:1] for name, array in inputs.items()}, 1)
    session.run(inputs, len(next(iter(inputs.values()))))
    found = {"load_ms": loaded * 1e3}
    peak = _peak_bytes()
    if before is not None and peak is not None:
        found["memory_mb"] = max(0, peak - before) / 1e6
    return found


def _resident_bytes() -> int | None:
    """Return what this process holds now, and let its peak count from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return _status("VmRSS")
    return None  # no Linux, or /proc may not be written


def _peak_bytes() -> int | None:
    with contextlib.suppress(OSError):
        return _status("VmHWM")
    return None


def _status(field: str) -> int | None:
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(_measure_start(Path(arguments[0]), arguments[1], Path(arguments[2]))))
