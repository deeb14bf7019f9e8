"""Waiting for what a real process or connection does, with a deadline instead of a sleep."""

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Return as soon as ``condition`` is true.

    Raises:
        TimeoutError: it was not within the deadline.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s} s")
        await asyncio.sleep(0.005)
