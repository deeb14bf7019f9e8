"""Who calls, and how much a caller may ask: values, without the database that knows them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """How often, and how much at once, a caller may ask; 0: no limit of its own."""

    rate: float = 0.0  # requests a second
    burst: int = 0  # requests at once above the rate; 0: as many as in a second
    concurrency: int = 0  # requests in flight


NO_LIMITS = CallerLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a token stands for."""

    tenant: str
    label: str
    token_id: str
    limits: CallerLimits = NO_LIMITS
