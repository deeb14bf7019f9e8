"""What can go wrong by the caller's doing, and the check for packages that are not installed."""

import importlib.util


class BadInput(Exception):
    """What was given cannot be used: the message says what to give instead."""


class TooLittle(BadInput):
    """There are not enough items for what is promised: the message says how many it takes."""


class MissingExtra(Exception):
    """A package that this step needs is not installed: the message says how to install it."""


def require(*packages: str, extra: str) -> None:
    """Check, without importing them, that ``packages`` are installed.

    Raises:
        MissingExtra: one is not; it names the extra of fogline that brings it.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtra(
            f"this step needs {', '.join(absent)}, which is not installed: "
            f"pip install 'fogline[{extra}]'"
        )
