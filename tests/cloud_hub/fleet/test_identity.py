"""Tokens: shown once, stored as digests, ended by time or by hand."""

import time

import pytest
from sqlalchemy import select

from cloud_hub.errors import ConfigRefused
from cloud_hub.fleet.callers import NO_LIMITS, CallerLimits
from cloud_hub.fleet.identity import Identity
from cloud_hub.store import schema
from cloud_hub.store.store import Store


@pytest.fixture
async def store(tmp_path):
    store = await Store.open(f"sqlite:///{tmp_path / 'hub.sqlite'}")
    yield store
    await store.close()


async def test_a_token_lets_its_tenant_in_and_its_secret_is_not_in_the_database(store):
    identity = Identity(store)
    secret = await identity.create("shop", "till 3", 60, time.time())
    caller = await identity.authenticate(secret)
    assert (caller.tenant, caller.label) == ("shop", "till 3")
    rows = await store.read(lambda c: [tuple(r) for r in c.execute(select(schema.token))])
    assert secret not in str(rows)
    assert secret.removeprefix("fgl_") not in str(rows)


async def test_unknown_expired_and_revoked_tokens_let_nobody_in(store):
    identity = Identity(store)
    assert await identity.authenticate("fgl_guess") is None
    old = await identity.create("shop", "", 60, time.time() - 61)
    assert await identity.authenticate(old) is None
    assert not await identity.any_valid(time.time())
    secret = await identity.create("shop", "", 60, time.time())
    assert await identity.any_valid(time.time())
    token_id = next(t.token_id for t in await identity.tokens() if t.expires_at > time.time())
    assert await identity.revoke(token_id)
    assert await Identity(store).authenticate(secret) is None
    assert not await identity.revoke("absent")


async def test_an_impossible_tenant_is_refused(store):
    with pytest.raises(ConfigRefused):
        await Identity(store).create("", "", 60, 0.0)


async def test_a_token_carries_the_limits_it_was_made_with(store):
    identity = Identity(store)
    limits = CallerLimits(rate=12.5, burst=30, concurrency=4)
    secret = await identity.create("shop", "", 60, time.time(), limits)
    assert (await identity.authenticate(secret)).limits == limits
    free = await identity.create("shop", "", 60, time.time())
    assert (await identity.authenticate(free)).limits == NO_LIMITS
    assert [token.limits for token in await identity.tokens()] == [limits, NO_LIMITS]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (CallerLimits(rate=-1.0), "from 0 on"),
        (CallerLimits(rate=float("nan")), "from 0 on"),
        (CallerLimits(rate=float("inf")), "from 0 on"),
        (CallerLimits(rate=1e-300), "at least 0.001"),
        (CallerLimits(concurrency=-1), "from 0 on"),
        (CallerLimits(concurrency=1 << 40), "at most 1000000"),
        (CallerLimits(burst=5), "nothing without a rate"),
    ],
)
async def test_limits_that_make_no_sense_are_refused(store, limits, words):
    with pytest.raises(ConfigRefused, match=words):
        await Identity(store).create("shop", "", 60, 0.0, limits)
