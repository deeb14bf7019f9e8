import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

from edge_agent.errors import HubLate, HubRefused, HubUnavailable
from edge_agent.inference.uplink import Question, Uplink
from fogline_protocol.client import Client
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    NotFound,
    Overloaded,
    ServerFault,
    Unavailable,
)
from fogline_protocol.grpc_service import SERVICE
from fogline_protocol.inference import Parameter
from fogline_protocol.tensors import Array
from tests.edge_agent.polling import until
from tests.fakes import HUB_MODEL, FakeHub, Serving, Valve


def question(*values: float, model: str = HUB_MODEL, **parameters: Parameter) -> Question:
    x = np.array([[value, 0, 0] for value in values], np.float32)
    return Question(model, {"x": x}, len(x), ("logits",), parameters=parameters)


@contextlib.asynccontextmanager
async def connected(
    address: str, *, max_rows: int = 32, max_requests: int = 4, probe_timeout_s: float = 1.0
) -> AsyncIterator[Uplink]:
    async with Uplink(
        lambda: Client(address),
        max_rows=max_rows,
        max_requests=max_requests,
        probe_timeout_s=probe_timeout_s,
    ) as uplink:
        await until(lambda: uplink.round_trip_s > 0 or not uplink.link_up)
        yield uplink


async def first_values(asked: list[asyncio.Task[object]]) -> list[float]:
    answers = await asyncio.gather(*asked)
    return [answer.outputs["logits"][0, 0] for answer in answers]  # type: ignore[attr-defined]


async def test_questions_that_wait_together_leave_as_one_request(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        answers = await asyncio.gather(*(uplink.ask(question(i, i), 5.0) for i in range(10)))
    assert hub.rows_asked == [20]
    assert [a.outputs["logits"][:, 0].tolist() for a in answers] == [
        [100 + i, 100 + i] for i in range(10)
    ]


async def test_a_request_holds_no_more_rows_than_allowed(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address, max_rows=4) as uplink:
        answers = await asyncio.gather(*(uplink.ask(question(i, i, i), 5.0) for i in range(3)))
        assert [a.outputs["logits"][0, 0] for a in answers] == [100, 101, 102]
        await uplink.ask(question(*range(9)), 5.0)  # one caller's rows are never torn apart
    assert hub.rows_asked == [3, 3, 3, 9]


async def test_what_comes_while_requests_are_in_flight_waits_and_leaves_together(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address, max_requests=1) as uplink:
        hub.gate.clear()
        first = asyncio.create_task(uplink.ask(question(1), 5.0))
        await until(lambda: hub.rows_asked == [1])
        others = [asyncio.create_task(uplink.ask(question(i), 5.0)) for i in (2, 3, 4)]
        await asyncio.sleep(0)
        hub.gate.set()
        await asyncio.gather(first, *others)
    assert hub.rows_asked == [1, 3]


async def test_only_questions_of_one_kind_share_a_request(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        wide = Question(HUB_MODEL, {"x": np.zeros((1, 4), np.float32)}, 1, ("logits",))
        answers = await asyncio.gather(
            uplink.ask(question(1), 5.0),
            uplink.ask(question(1, beams=1), 5.0),
            uplink.ask(question(1, beams=True), 5.0),
            uplink.ask(wide, 5.0),
            return_exceptions=True,
        )
    assert len(hub.requests) == 4
    assert [isinstance(answer, HubRefused) for answer in answers] == [False, False, False, True]


async def test_tensors_without_rows_travel_alone(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        alone = [Question(HUB_MODEL, question(1).inputs, 0, ("logits",)) for _ in range(2)]
        await asyncio.gather(*(uplink.ask(q, 5.0) for q in alone))
    assert hub.rows_asked == [1, 1]


async def test_a_caller_who_leaves_does_not_cost_the_others_their_answer(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address, max_requests=1) as uplink:
        hub.gate.clear()
        blocker = asyncio.create_task(uplink.ask(question(0), 5.0))
        await until(lambda: len(hub.requests) == 1)
        asked = [asyncio.create_task(uplink.ask(question(i), 5.0)) for i in range(4)]
        await asyncio.sleep(0)
        asked[1].cancel()  # while it waits: no hub time is spent on it
        hub.gate.set()
        await blocker
        assert await first_values([asked[0], asked[2], asked[3]]) == [100, 102, 103]
        assert hub.rows_asked == [1, 3]

        hub.gate.clear()
        asked = [asyncio.create_task(uplink.ask(question(i), 5.0)) for i in range(3)]
        await until(lambda: len(hub.requests) == 3)
        asked[0].cancel()  # while it is in flight
        hub.gate.set()
        assert await first_values(asked[1:]) == [101, 102]  # type: ignore[arg-type]


async def test_each_caller_waits_no_longer_than_its_own_deadline(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        hub.gate.clear()
        patient = asyncio.create_task(uplink.ask(question(1), 5.0))
        with pytest.raises(HubLate, match=r"within 0\.050 s"):
            await uplink.ask(question(2), 0.05)
        hub.gate.set()
        assert (await patient).outputs["logits"][0, 0] == 101


async def test_a_broken_connection_is_tried_once_more(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        hub.errors = [Unavailable("restarting")]
        assert (await uplink.ask(question(1), 5.0)).outputs["logits"][0, 0] == 101
        assert uplink.counts.retries == 1
        hub.errors = [Unavailable("restarting")] * 2
        with pytest.raises(HubUnavailable, match="restarting"):
            await uplink.ask(question(1), 5.0)
        assert len(hub.requests) == 4
        assert uplink.link_up  # one failed escalation, however many attempts


async def test_no_time_is_spent_on_a_second_attempt_that_cannot_be_in_time(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        uplink.round_trip_s = 1.0
        hub.errors = [Unavailable("restarting")]
        with pytest.raises(HubUnavailable):
            await uplink.ask(question(1), 1.0)
    assert len(hub.requests) == 1


async def test_a_refusal_is_no_fault_of_the_link(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        for _ in range(5):
            with pytest.raises(HubRefused, match="no model 'other'") as refused:
                await uplink.ask(question(1, model="other"), 5.0)
            assert isinstance(refused.value.refusal, NotFound)
        hub.error = ServerFault("the engine crashed")
        for _ in range(5):
            with pytest.raises(HubRefused, match="the engine crashed"):
                await uplink.ask(question(1), 5.0)
        assert uplink.link_up
        assert uplink.counts.retries == 0


async def test_a_hub_without_room_opens_the_breaker_and_probes_close_it(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        hub.error = Overloaded("later")
        for _ in range(2):
            assert uplink.link_up
            with pytest.raises(HubUnavailable, match="later"):
                await uplink.ask(question(1), 5.0)
        assert uplink.state == "open"
        hub.error = None
        await until(lambda: uplink.link_up)


async def test_a_hub_is_not_asked_again_before_it_said_so(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        hub.errors = [Overloaded("later", retry_after_s=0.3)]
        with pytest.raises(HubUnavailable, match="later"):
            await uplink.ask(question(1), 5.0)
        assert not uplink.link_up
        assert uplink.state == "closed"  # the hub is there: no probes, no back-off
        started = time.monotonic()
        with pytest.raises(HubUnavailable, match=r"wants no questions for 0\.[0-3]"):
            await uplink.ask(question(1), 5.0)
        assert time.monotonic() - started < 0.2  # who asks meanwhile does not wait for it
        assert len(hub.requests) == 1
        await until(lambda: uplink.link_up)
        assert (await uplink.ask(question(1), 5.0)).outputs["logits"][0, 0] == 101


async def test_a_hub_that_shuts_down_and_says_when_to_return_is_not_tried_once_more(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        hub.errors = [Unavailable("shutting down", retry_after_s=5.0)]
        with pytest.raises(HubUnavailable, match="shutting down"):
            await uplink.ask(question(1), 5.0)
        assert (len(hub.requests), uplink.counts.retries) == (1, 0)
        assert 4 < uplink.pause_s <= 5


async def test_who_waits_behind_a_refused_request_is_told_at_once(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address, max_requests=1) as uplink:
        hub.gate.clear()
        hub.errors = [Overloaded("later", retry_after_s=60.0)]
        first = asyncio.create_task(uplink.ask(question(1), 30.0))
        await until(lambda: len(hub.requests) == 1)
        others = [asyncio.create_task(uplink.ask(question(i), 30.0)) for i in range(3)]
        await asyncio.sleep(0)
        hub.gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(result) for result in results] == [HubUnavailable] * 4
    assert len(hub.requests) == 1


async def test_do_not_ask_again_is_about_one_request(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        hub.errors = [Unavailable("never this one", retry_after_s=math.inf)]
        with pytest.raises(HubUnavailable, match="never this one"):
            await uplink.ask(question(1), 5.0)
        assert (await uplink.ask(question(1), 5.0)).outputs["logits"][0, 0] == 101
    assert len(hub.requests) == 2


async def test_joining_rows_costs_nobody_an_answer_when_the_hub_takes_fewer(
    hub: FakeHub, door: Serving
) -> None:
    hub.max_rows = 1
    async with connected(door.address) as uplink:
        answers = await asyncio.gather(*(uplink.ask(question(i), 5.0) for i in range(3)))
        assert [a.outputs["logits"][0, 0] for a in answers] == [100, 101, 102]
        with pytest.raises(HubRefused, match="at most 1 rows") as refused:
            await uplink.ask(question(1, 2), 5.0)
        assert isinstance(refused.value.refusal, BadRequest)


async def test_an_answer_with_other_rows_or_outputs_than_asked_for_is_none(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        hub.answer = lambda inputs: {"logits": inputs["x"][:1]}
        with pytest.raises(HubRefused, match="asked for 2 rows"):
            await uplink.ask(question(1, 2), 5.0)


async def test_an_absent_hub_is_an_ordinary_state_and_its_return_is_noticed(
    hub: FakeHub, door: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fogline.agent.uplink")
    await door.stop()
    async with connected(door.address) as uplink:
        assert uplink.state == "open"
        await door.start()
        await until(lambda: uplink.link_up)
        assert (await uplink.ask(question(1), 5.0)).outputs["logits"][0, 0] == 101
    told = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert told == [
        "the link to the hub is down",  # not "open", which would be good news to a person
        "the hub answers again",
        "the link to the hub works",
    ]


async def test_a_hub_that_disappears_is_left_alone_after_two_failures(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        await uplink.ask(question(1), 5.0)
        await door.stop()
        for _ in range(2):
            with pytest.raises(HubUnavailable):
                await uplink.ask(question(1), 1.0)
        assert not uplink.link_up
        await door.start()
        await until(lambda: uplink.link_up)
        await uplink.ask(question(1), 5.0)


async def test_a_link_whose_packets_vanish_works_again_soon_after_they_pass(
    hub: FakeHub, door: Serving
) -> None:
    async with (
        Valve(door.address) as valve,
        connected(valve.address, probe_timeout_s=0.2) as uplink,
    ):
        await uplink.ask(question(1), 5.0)
        valve.shut()
        for _ in range(2):
            with pytest.raises(HubLate):
                await uplink.ask(question(1), 0.1)
        await until(lambda: not uplink.link_up)
        valve.open()
        await until(lambda: uplink.link_up)
        await uplink.ask(question(1), 5.0)


async def test_while_a_silent_connection_closes_the_new_one_is_in_use_already(
    hub: FakeHub, door: Serving
) -> None:
    closing = asyncio.Event()

    class Slow(Client):
        """The first connection: silent to probes, slow to close."""

        async def server_ready(self, timeout_s: float | None = None) -> bool:
            raise DeadlineExceeded("nothing came back")

        async def close(self) -> None:
            await super().close()
            closing.set()
            await asyncio.sleep(3600)

    connections = iter([Slow(door.address)])
    async with Uplink(lambda: next(connections, None) or Client(door.address)) as uplink:
        await closing.wait()
        assert uplink.state == "open"
        await uplink.call(f"/{SERVICE}/ServerLive", b"", 5.0)


async def test_an_attempt_without_time_for_a_round_trip_says_nothing_about_the_link(
    hub: FakeHub, door: Serving
) -> None:
    async with connected(door.address) as uplink:
        uplink.round_trip_s = 1.0
        hub.gate.clear()
        for _ in range(4):
            with pytest.raises(HubLate):
                await uplink.ask(question(1), 0.02)
        await until(lambda: len(hub.requests) == 4)
        assert uplink.link_up
        hub.gate.set()


async def test_a_round_trip_found_too_long_is_measured_again(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        uplink.round_trip_s = 100.0

        def measured_again() -> bool:
            uplink.refresh()  # as the router does at every request that had too little time
            return uplink.round_trip_s < 90

        await until(measured_again)
        assert uplink.link_up


async def test_every_byte_of_an_escalation_is_counted(hub: FakeHub, door: Serving) -> None:
    async with connected(door.address) as uplink:
        assert uplink.counts.bytes_sent == 0  # probes are not escalations
        await uplink.ask(question(1), 5.0)
        one = uplink.counts.bytes_sent
        hub.errors = [Unavailable("once more")]
        await uplink.ask(question(1), 5.0)
        assert uplink.counts.bytes_sent == 3 * one > 36
        assert uplink.counts.bytes_received > 24


async def test_a_fault_of_ours_makes_nobody_wait(
    hub: FakeHub, door: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    cannot_be_sent: Array = np.array([[object()]], dtype=object)
    async with connected(door.address) as uplink:
        with pytest.raises(HubUnavailable, match="given up"):
            await uplink.ask(Question(HUB_MODEL, {"x": cannot_be_sent}, 1), 60.0)
        await uplink.ask(question(1), 5.0)
    assert "an escalation failed here" in caplog.text


async def test_closing_answers_everybody(hub: FakeHub, door: Serving) -> None:
    hub.gate.clear()
    async with connected(door.address, max_requests=1) as uplink:
        asked = [asyncio.create_task(uplink.ask(question(i), 5.0)) for i in (1, 2)]
        await until(lambda: len(hub.requests) == 1)
        began = time.monotonic()
        late = [asyncio.create_task(uplink.ask(question(i), 5.0)) for i in (3, 4)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*asked, *late, return_exceptions=True)
    assert all(isinstance(result, HubUnavailable) for result in results)
    assert time.monotonic() - began < 4.0  # at once, not at their deadlines
    with pytest.raises(HubUnavailable, match="stopping"):
        await uplink.ask(question(1), 1.0)
    hub.gate.set()
