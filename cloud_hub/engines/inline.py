"""An engine in this process, for models whose runs are proven short.

A short run happens on the event loop, where it costs no hand-over; a large batch of the same
model, which takes longer, runs in the engine's one thread.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cloud_hub.engines.engine import Arrays, Contract, Session, join

ON_LOOP_BELOW_S = 0.0015  # below it a hand-over costs more than it frees (performance.md)
SMOOTHING = 0.2  # weight of the newest run


class InlineEngine:
    """A session whose runs are expected to be short. It cannot be replaced when one hangs."""

    trouble = ""
    digest = ""
    memory_bytes = 0

    def __init__(self, session: Session, expected_s: float) -> None:
        """Take over a loaded session.

        Args:
            session: is closed with the engine.
            expected_s: how long a run takes, as far as is known.
        """
        self._session = session
        self._expected_s = expected_s
        self._ran = False  # on the loop, since somebody last waited here
        self._thread: ThreadPoolExecutor | None = None
        contract: Contract = session
        self.platform = contract.platform
        self.provider = contract.provider
        self.inputs = contract.inputs
        self.outputs = contract.outputs

    async def ready(self) -> None:
        """Return at once, or after a turn of the loop that has answers to send; see ``Engine``."""
        if self._ran:
            self._ran = False
            await asyncio.sleep(0)

    def join(self, requests: Sequence[Arrays]) -> Arrays:
        """Return the rows of several requests one after the other; see ``Engine``."""
        return join(requests)

    async def run(self, inputs: Arrays, deadline: float | None = None) -> Arrays:
        """Return every output; see ``Engine``. A run cannot be stopped."""
        if self._expected_s < ON_LOOP_BELOW_S:
            self._ran = True
            return self._run(inputs)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, inputs)

    async def close(self) -> None:
        """Give back thread and session."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
        self._session.close()

    def _run(self, inputs: Arrays) -> Arrays:
        started = time.perf_counter()
        outputs = self._session.run(inputs)
        self._expected_s += SMOOTHING * (time.perf_counter() - started - self._expected_s)
        return outputs
