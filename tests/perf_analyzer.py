"""NVIDIA's perf_analyzer: where it comes from, and what it says after a run.

The package ``perf-analyzer`` is an empty stub and newer wheels of tritonclient leave the binary
out, so it is taken from the wheel of 2.50.0 (it runs on glibc 2.36), together with the CUDA
runtime it is linked with, which needs no GPU, and Debian's libb64. Kept in the user's cache.
"""

import ctypes.util
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEELS = ("tritonclient==2.50.0", "nvidia-cuda-runtime-cu12==12.9.79")
FILES = ("perf_analyzer", "libcudart.so.12")


def missing() -> str:
    """Return why there is no perf_analyzer for this platform; empty if there is."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"NVIDIA publishes no perf_analyzer for {sys.platform} on {platform.machine()}"
    return ""


def folder() -> Path:
    """Return the folder that holds the binary and its libraries, filled on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    final = cache / "fogline" / "perf_analyzer-2.50.0"
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _fill(made, Path(scratch))
            made.rename(final)  # in one step: whoever finds it finds all of it
    return final


def _fill(made: Path, scratch: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *WHEELS],
        check=True,
        capture_output=True,
        timeout=100,
    )
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if Path(member).name in FILES:
                    (made / Path(member).name).write_bytes(archive.read(member))
    (made / "perf_analyzer").chmod(0o755)
    if ctypes.util.find_library("b64") is None:
        # Unpacked, not installed: that needs no rights.
        subprocess.run(
            ["apt-get", "download", "libb64-0d"],
            cwd=scratch, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        (package,) = scratch.glob("*.deb")
        subprocess.run(["dpkg", "-x", package, scratch / "deb"], check=True, timeout=30)
        for library in (scratch / "deb").rglob("libb64.so*"):
            (made / library.name).write_bytes(library.read_bytes())


@dataclass(frozen=True, slots=True)
class Level:
    """What was measured at one concurrency."""

    concurrency: int
    per_second: float  # inferences
    server_requests: int  # by ModelStatistics
    server_inferences: int
    server_executions: int


def run(address: str, model: str, *options: str) -> list[Level]:
    """Measure ``model`` at ``address``; the exit status must be 0."""
    here = folder()
    done = subprocess.run(
        [
            here / "perf_analyzer", "-m", model, "-u", address, "--async", *options,
            # Short windows, and no opinion on how steady a busy test machine is.
            "--measurement-interval", "200", "--stability-percentage", "999",
        ],
        env={**os.environ, "LD_LIBRARY_PATH": str(here)},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    said = f"exit {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    # Its exit status is 0 as well when every request was refused. (Not from the file that it
    # exports: with shared memory on a busy machine it now and then leaves that out.)
    assert "had error" not in said, said
    return _levels(done.stdout)


def _levels(text: str) -> list[Level]:
    found: list[Level] = []
    for part in text.split("Request concurrency: ")[1:]:
        lines = part.splitlines()
        values: dict[str, str] = {}
        for line in lines[1:]:
            key, _, value = line.strip().partition(": ")
            values.setdefault(key, value)
        found.append(
            Level(
                int(lines[0]),
                float(values["Throughput"].split()[0]),
                int(values["Successful request count"]),
                int(values["Inference count"]),
                int(values["Execution count"]),
            )
        )
    return found
