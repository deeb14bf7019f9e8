"""Who may call from another machine: bearer tokens.

A token is 256 random bits, shown once. The database keeps only its SHA-256, which needs no
salt and no slow hash: there is nothing to guess. It is looked up by that digest, so how long
the look-up takes tells nothing about the secret.
"""

import hashlib
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, update

from cloud_hub.config import MIN_RATE
from cloud_hub.errors import ConfigRefused
from cloud_hub.fleet.callers import NO_LIMITS, Caller, CallerLimits
from cloud_hub.store import schema
from cloud_hub.store.store import Store

PREFIX = "fgl_"
REMEMBERED_S = 5.0  # so that a revoked token ends within seconds, without a query per request
MOST_REMEMBERED = 10_000  # strangers' guesses must not fill the memory
MOST_AT_ONCE = 1_000_000  # a larger limit is none


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it may be shown: without its secret."""

    token_id: str
    tenant: str
    label: str
    created_at: float
    expires_at: float
    revoked: bool
    limits: CallerLimits = NO_LIMITS


class Identity:
    """The tokens of one hub."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._remembered: dict[str, tuple[float, Caller | None]] = {}

    async def create(
        self,
        tenant: str,
        label: str,
        lifetime_s: float,
        now: float,
        limits: CallerLimits = NO_LIMITS,
    ) -> str:
        """Make a token and return it: the only time it can be seen.

        Raises:
            ConfigRefused: tenant or label is too long, the tenant is empty, or the limits make
                no sense.
        """
        if not 1 <= len(tenant) <= 63 or len(label) > 200:
            raise ConfigRefused("a tenant has 1 to 63 characters, a label at most 200")
        if not math.isfinite(limits.rate) or min(limits.rate, limits.burst, limits.concurrency) < 0:
            raise ConfigRefused("rate, burst and concurrency are numbers from 0 on; 0: no limit")
        if 0 < limits.rate < MIN_RATE:
            raise ConfigRefused(f"a rate is 0 (no limit) or at least {MIN_RATE} a second")
        if max(limits.burst, limits.concurrency) > MOST_AT_ONCE:
            raise ConfigRefused(f"burst and concurrency are at most {MOST_AT_ONCE}; 0: no limit")
        if limits.burst and not limits.rate:
            raise ConfigRefused("a burst means nothing without a rate: give both")
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": secrets.token_hex(4),
            "sha256": _digest(secret),
            "tenant": tenant,
            "label": label,
            "created_at": now,
            "expires_at": now + lifetime_s,
            "revoked": False,
            "rate": limits.rate,
            "burst": limits.burst,
            "concurrency": limits.concurrency,
        }

        def write(connection: Connection) -> None:
            connection.execute(insert(schema.token), row)

        await self._store.write(write)
        return secret

    async def authenticate(self, secret: str) -> Caller | None:
        """Return who this is, or None for an unknown, expired or revoked token."""
        digest = _digest(secret)
        now = time.time()
        known = self._remembered.get(digest)
        if known is not None and now - known[0] < REMEMBERED_S:
            return known[1]
        t = schema.token

        def read(connection: Connection) -> Caller | None:
            query = select(t).where(t.c.sha256 == digest, t.c.expires_at > now, ~t.c.revoked)
            row = connection.execute(query).one_or_none()
            return None if row is None else Caller(row.tenant, row.label, row.id, _limits(row))

        caller = await self._store.read(read)
        if len(self._remembered) >= MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[digest] = (now, caller)
        return caller

    async def any_valid(self, now: float) -> bool:
        """Return whether anybody could be let in."""
        tokens = await self.tokens()
        return any(token.expires_at > now and not token.revoked for token in tokens)

    async def tokens(self) -> Sequence[Token]:
        """Return every token, oldest first."""
        t = schema.token

        def read(connection: Connection) -> list[Token]:
            return [
                Token(r.id, r.tenant, r.label, r.created_at, r.expires_at, r.revoked, _limits(r))
                for r in connection.execute(select(t).order_by(t.c.created_at))
            ]

        return await self._store.read(read)

    async def revoke(self, token_id: str) -> bool:
        """End a token; False if there is none with this id."""

        def write(connection: Connection) -> int:
            change = update(schema.token).where(schema.token.c.id == token_id)
            return connection.execute(change.values(revoked=True)).rowcount

        return await self._store.write(write) > 0


def _limits(row: Any) -> CallerLimits:
    return CallerLimits(row.rate, row.burst, row.concurrency)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
