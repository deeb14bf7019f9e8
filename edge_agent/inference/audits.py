"""Checks some local answers against the hub's, so that what is kept speaks of all requests.

What escalates is what the edge was unsure of. Where it is sure and wrong, only a row that was
chosen without looking at its score can show it: for every row that is answered here a coin is
flipped (escalation.md 6 B), and one that wins is also answered by the hub, beside the caller's
time. How probable that was goes along, so that whoever reads the examples can weigh them.

Only rows that the hub may keep are audited: nobody else would look at the answer yet.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence

from edge_agent.inference.policy import Decision, Mode, Reason, Situation

log = logging.getLogger("fogline.agent.audits")

MOST_AT_ONCE = 8  # beyond, an audit is left out: it may cost bytes, but never a caller's turn


class Audits:
    """Flips the coins, and owns the audits that are on their way."""

    def __init__(self, rate: float, coin: Callable[[], float] = random.random) -> None:
        """Audit a share ``rate`` of local answers; ``coin`` returns numbers from 0 to below 1."""
        self.rate = rate
        self._coin = coin
        self._running: set[asyncio.Task[None]] = set()

    def choose(self, decisions: Sequence[Decision], situation: Situation) -> list[int]:
        """Return the rows to audit: of those that are answered here and could have gone to the hub.

        The score decides whether a row is among them, but not how the coin falls: among the
        confident rows every one is as likely as any other.
        """
        if not self.rate or situation.mode is Mode.EDGE_ONLY or not situation.link_up:
            return []
        if len(self._running) >= MOST_AT_ONCE:
            return []
        return [
            row
            for row, decision in enumerate(decisions)
            if decision.reason is Reason.CONFIDENT and self._coin() < self.rate
        ]

    def begin(self, audit: Coroutine[None, None, None]) -> None:
        """Carry out an audit in the background."""
        task = asyncio.create_task(audit, name="audit")
        self._running.add(task)
        task.add_done_callback(self._ended)

    def close(self) -> None:
        """Give up what is on its way."""
        for task in self._running:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("an audit failed here", exc_info=task.exception())
