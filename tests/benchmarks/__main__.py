"""Runs benchmarks by name: ``./run bench [NAME ...] [--row ROW] [--json FILE]``."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import benchmarks
from tests.benchmarks import agent, serving, soak, switching, workshop

ALL: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "serving": lambda options: serving.main(options.row, options.json),
    "agent": lambda _options: agent.main(),
    "switching": lambda _options: switching.main(),
    "soak": lambda options: soak.main(options.seconds, options.callers),
    "workshop": lambda options: workshop.main(options.json),
}
WITH_TORCH = "workshop"  # has an environment of its own


def main() -> None:
    """Run what was named, or everything that needs no torch."""
    parser = argparse.ArgumentParser(
        prog="./run bench",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--row", action="append", choices=serving.ROWS, help="of serving")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where serving or workshop reports to"
    )
    parser.add_argument("--seconds", type=float, default=soak.SECONDS, help="of soak")
    parser.add_argument("--callers", type=int, default=soak.CALLERS, help="of soak")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ALL):
        parser.error(f"no benchmark {sorted(unknown)}; there are {', '.join(ALL)}")
    names = options.names or [name for name in ALL if name != WITH_TORCH]
    if not options.names:
        print(f"without {WITH_TORCH}, which needs torch: ./run bench {WITH_TORCH}")
    for name in names:
        ALL[name](options)


main()
