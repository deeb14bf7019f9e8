"""The console's figures as JSON: ``/api/v1``.

Keys are the field names of the values in ``insight/history.py``; nothing measured is null.
Errors are ``application/problem+json`` with a sentence in ``detail``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from cloud_hub.console.access import problem
from cloud_hub.insight.history import WINDOW_S, Decided, Overview

DEFAULT_WINDOW_S = 300.0
SHORTEST_WINDOW_S = 10.0  # what a rate "now" is taken over


class Insight(Protocol):
    """What the fleet did."""

    def overview(self, now: float, window_s: float) -> Overview:
        """Return the figures of the last ``window_s`` seconds."""
        ...

    def decisions(self, device: str) -> Sequence[Decided]:
        """Return what became of a device's latest requests, the newest first."""
        ...


class BadParameter(Exception):
    """The caller sent a parameter that cannot be used; the text says which and why."""


def window_s(value: object) -> float:
    """Return a window that was sent as text or as a number.

    Raises:
        BadParameter: it is no number or out of range.
    """
    expected = f"window_s must be a number from {SHORTEST_WINDOW_S:g} to {WINDOW_S}"
    # A flag is a number to Python, but nobody means one second by true.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadParameter(f"{expected}, got {value!r}")
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        raise BadParameter(f"{expected}, got {str(value)[:40]!r}") from None
    if math.isnan(seconds) or not SHORTEST_WINDOW_S <= seconds <= WINDOW_S:
        raise BadParameter(f"{expected}, got {str(value)[:40]}")
    return seconds


def document(value: Any) -> Any:
    """Return a value of dataclasses, mappings and sequences as JSON has it."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: document(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): document(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [document(item) for item in value]
    return value


class Api:
    """Answers programs."""

    def __init__(self, insight: Insight, clock: Callable[[], float]) -> None:
        self._insight = insight
        self._clock = clock

    async def overview(self, request: web.Request) -> web.Response:
        """Answer ``GET /api/v1/overview?window_s=300``."""
        try:
            unknown = set(request.query) - {"window_s"}
            if unknown:
                raise BadParameter(f"{min(unknown)!r} is no parameter here, window_s is")
            if len(request.query.getall("window_s", [])) > 1:
                raise BadParameter("window_s comes twice")
            window = window_s(request.query.get("window_s", DEFAULT_WINDOW_S))
        except BadParameter as error:
            return problem(400, str(error))
        return web.json_response(document(self._insight.overview(self._clock(), window)))
