"""Audits: a few sure answers are checked by the hub, unseen by the caller, where they may be kept."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.inference.audits import MOST_AT_ONCE, Audits
from edge_agent.inference.policy import Decision, Mode, Quality, Reason, Situation
from edge_agent.runtime.release import Release, load, read
from fogline_protocol.errors import Unavailable
from fogline_protocol.examples import KEEP
from fogline_protocol.inference import InferRequest
from tests.edge_agent import bundles
from tests.edge_agent.bundles import SURE, UNSURE
from tests.edge_agent.inference.test_router import routed, said
from tests.edge_agent.polling import until
from tests.fakes import FakeHub, Serving

HERE = "edge certified confident"
SURE_ROW = Decision(False, Quality.CERTIFIED, Reason.CONFIDENT)
LINKED = Situation(Mode.PREFER_EDGE, False, True, 1.0, 0.0)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return load(read(bundles.make(tmp_path / "double").path))


def always() -> Audits:
    """Return audits of every row that may be audited, at a rate that is no certainty."""
    return Audits(0.25, coin=lambda: 0.0)


async def test_a_sure_answer_that_a_coin_chose_is_kept_with_its_reason_and_propensity(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=always()) as r:
        assert said(await r.ask(SURE, source="cam")) == HERE
        await until(lambda: len(hub.requests) == 1)  # it learns that this hub keeps examples
        await until(lambda: r.router._escalation._keeping == {"judge": True})
        await r.ask(SURE * 2, UNSURE, SURE * 3, source="cam")
        await until(lambda: sum(len(one.scores) for one in hub.kept) == 3)
    rows = sorted(
        (float(one.outputs["logits"][at, 0]), one.reasons[at], one.propensities[at])
        for one in hub.kept  # one request or two: who waits at the same moment travels together
        for at in range(len(one.scores))
    )
    assert rows == [
        (pytest.approx(2 * UNSURE[0, 0]), "uncertain", 1.0),
        (pytest.approx(4 * SURE[0, 0]), "audit", 0.25),
        (pytest.approx(6 * SURE[0, 0]), "audit", 0.25),
    ]
    assert {source for one in hub.kept for source in one.sources} == {"cam"}


@pytest.mark.parametrize(
    "asked",
    [
        {"keep": False},
        {"private": True},
        {"mode": "edge_only"},
    ],
)
async def test_nothing_is_audited_that_may_not_be_kept_or_not_leave(
    hub: FakeHub, door: Serving, release: Release, asked: dict[str, object]
) -> None:
    hub.keeps = True
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=always()) as r:
        await r.ask(SURE, **asked)  # type: ignore[arg-type]
        await r.ask(UNSURE, keep=True)  # anything that was on its way has arrived by now
        assert len(hub.requests) == 1
        await r.ask(SURE)  # and this one would be audited
        await until(lambda: len(hub.requests) == 2)


async def test_without_consent_not_even_the_coin_is_flipped(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True

    def coin() -> float:
        raise AssertionError

    async with routed(door.address, release, device="kiosk", audits=Audits(1.0, coin=coin)) as r:
        assert said(await r.ask(SURE)) == HERE


async def test_a_hub_that_keeps_nothing_is_asked_once_and_then_left_in_peace(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=always()) as r:
        await r.ask(SURE)
        await until(lambda: r.router._escalation._keeping == {"judge": False})
        for _ in range(3):
            await r.ask(SURE)
        await r.ask(UNSURE)
        assert [set(request.parameters) & {KEEP} for request in hub.requests] == [{KEEP}] * 2


async def test_the_caller_waits_for_no_audit_and_more_than_a_few_are_left_out(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    audits = always()
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=audits) as r:
        hub.gate.clear()
        for _ in range(3 * MOST_AT_ONCE):
            assert said(await r.ask(SURE)) == HERE
        assert len(audits._running) == MOST_AT_ONCE
        hub.gate.set()
        await until(lambda: not audits._running)


async def test_a_hub_that_refuses_an_audit_costs_the_caller_nothing(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.error = Unavailable("busy", retry_after_s=0.001)
    audits = always()
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=audits) as r:
        assert said(await r.ask(SURE)) == HERE
        await until(lambda: not audits._running)


async def test_what_the_caller_does_to_its_memory_after_the_answer_is_not_audited(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=always()) as r:
        r.router._escalation._keeping["judge"] = True
        mine = SURE.copy()
        await r.router.infer(InferRequest("double", {"x": mine}), None)
        mine[:] = 0
        await until(lambda: len(hub.requests) == 1)
    np.testing.assert_array_equal(hub.requests[0].inputs["x"], SURE)


async def test_what_the_caller_does_to_its_answer_is_not_audited(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=always()) as r:
        r.router._escalation._keeping["judge"] = True
        response = await r.router.infer(InferRequest("double", {"x": SURE}), None)
        response.outputs["logits"][:] = 0
        await until(lambda: len(hub.kept) == 1)
    (kept,) = hub.kept
    np.testing.assert_array_equal(kept.outputs["logits"], 2 * SURE)


async def test_a_router_that_closes_gives_up_its_audits(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    audits = always()
    async with routed(door.address, release, keep=["double"], device="kiosk", audits=audits) as r:
        hub.gate.clear()
        await r.ask(SURE)
        (running,) = audits._running
        r.router.close()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
        hub.gate.set()


@given(st.integers(0, 2**32), st.floats(0.05, 0.95))
def test_every_sure_row_is_as_likely_to_be_audited_as_any_other(seed: int, rate: float) -> None:
    audits = Audits(rate, coin=random.Random(seed).random)
    rows = [SURE_ROW] * 2000
    chosen = np.zeros(len(rows))
    chosen[audits.choose(rows, LINKED)] = 1
    for half in np.split(chosen, 2):  # six standard errors
        assert abs(half.mean() - rate) < 6 * np.sqrt(rate * (1 - rate) / len(half))


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.CONFIDENT])
def test_only_rows_that_the_policy_was_free_to_escalate_are_audited(reason: Reason) -> None:
    row = Decision(False, Quality.CERTIFIED, reason)
    assert always().choose([row, SURE_ROW], LINKED) == [1]


def test_nothing_is_audited_over_a_link_that_is_down_or_at_rate_zero() -> None:
    assert always().choose([SURE_ROW], LINKED._replace(link_up=False)) == []
    assert Audits(0.0, coin=lambda: 0.0).choose([SURE_ROW], LINKED) == []
