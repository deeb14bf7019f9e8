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


def main() -> None:
    """Run what was named, or everything."""
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
    for name in options.names or ALL:
        ALL[name](options)


main()
