"""Work that makes room for answers: loading a model can wait, those who call cannot.

A thread without privileges can lower its priority, and never raise it again. So such work gets a
thread of its own, which ends with it. Threads that the work itself starts stay as low: it must not
start any that serve later.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Below the process that asks. Woken beside it, others go first; and on a machine that is busy
# throughout it still gets a tenth of what one of them gets, so that it comes to an end.
NICER = 10


def at_low_priority(work: Callable[[], T]) -> T:
    """Return what ``work`` returns or raise what it raises; the calling thread waits for it."""
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(OSError):  # it is for the better, and not needed
            os.nice(NICER)  # of this thread alone, as Linux has it; at 19 it ends
        try:
            returned.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="low-priority")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]
