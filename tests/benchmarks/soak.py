"""The hub under everything at once for two minutes; see ``tests/soak.py``.

./run bench soak [--seconds 120] [--callers 240]
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from tests import soak
from tests.soak import Report

SECONDS = 120.0
CALLERS = 240


def main(seconds: float = SECONDS, callers: int = CALLERS) -> None:
    """Run, print, and end with an error if anything did not add up."""
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(soak.run(Path(folder), seconds=seconds, callers=callers))
    _print(report, callers)
    if report.problems:
        sys.exit(f"{len(report.problems)} problems, the first of them:\n  "
                 + "\n  ".join(report.problems[:20]))  # fmt: skip


def _print(report: Report, callers: int) -> None:
    print(f"soak: {callers} callers, {report.seconds:.0f} s, {report.requests:,} requests, "
          f"{report.switches} version switches, {report.kills} engines killed")  # fmt: skip
    ways = sorted({way for _, way, _ in report.outcomes})
    outcomes = sorted({outcome for _, _, outcome in report.outcomes})
    print(f"  {'':<16}" + "".join(f"{outcome:>20}" for outcome in outcomes))
    for way in ways:
        counts = (report.total(way=way, outcome=outcome) for outcome in outcomes)
        print(f"  {way:<16}" + "".join(f"{count:>20,}" for count in counts))
    print(f"  counted by the hub: {report.counted.total():,}; right answers "
          f"{report.answered.total():,}")  # fmt: skip
