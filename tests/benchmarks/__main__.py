"""Runs benchmarks by name: ``./run bench [serving] [agent] [switching]``."""

import sys

from tests import benchmarks
from tests.benchmarks import agent, serving, switching

ALL = {"serving": serving.main, "agent": agent.main, "switching": switching.main}


def main() -> None:
    """Run what was named, or everything."""
    names = sys.argv[1:] or list(ALL)
    if unknown := set(names) - set(ALL):
        sys.exit(f"no benchmark {sorted(unknown)}; there are {sorted(ALL)}\n\n{benchmarks.__doc__}")
    for name in names:
        ALL[name]()


main()
