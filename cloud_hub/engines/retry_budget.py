"""Decides whether a failed request to another server may be made once more.

Pure. A bucket of tokens, as in gRFC A6 and Finagle: every request puts a little in, every retry
takes a whole one out. So a server that fails now and then is asked again, and one that fails
altogether is not asked twice as often as it would be by callers who never retry, which is how
retries turn an overload into an outage.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class RetryBudget:
    """At most one retry per ``requests_per_retry`` requests, and ``reserve`` beyond that.

    Over any stretch of requests: retries <= reserve + requests / requests_per_retry.
    """

    requests_per_retry: int = 10
    reserve: int = 10  # retries that may be saved up; a new budget has them
    _parts: int = field(init=False)  # of a retry: whole numbers, so that none is lost in rounding

    def __post_init__(self) -> None:
        self._parts = self.reserve * self.requests_per_retry

    def request(self) -> None:
        """Count a request; a retry is none."""
        self._parts = min(self._parts + 1, self.reserve * self.requests_per_retry)

    def take(self) -> bool:
        """Take one retry out, if there is one, and return whether there was."""
        if self._parts < self.requests_per_retry:
            return False
        self._parts -= self.requests_per_retry
        return True
