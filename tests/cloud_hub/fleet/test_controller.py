import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, select, update

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.arrivals import EVENTS_KEPT, MAX_GENERATION
from cloud_hub.fleet.controller import (
    Controller,
    Running,
    TooMuchWanted,
    Twin,
    UnknownDevice,
    UnknownRelease,
)
from cloud_hub.fleet.link import MAX_COUNTER, MAX_DESIRED_BYTES, Arrival
from cloud_hub.fleet.outbox import BATCH, WantedRelease
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import documents
from fogline_protocol.mqtt import MqttError, NotAcknowledged, PublishRefused
from fogline_protocol.v1 import fleet_pb2 as pb

T = TypeVar("T")
TENANT = "default"
TABLES = (schema.twin, schema.device_event, schema.departed, schema.hub_epoch)


def describe(_connection: Connection, model: str, number: int) -> WantedRelease | None:
    """Every model has nine releases."""
    if not 1 <= number <= 9:
        return None
    return WantedRelease(model, number, f"{number}.0.0", f"{model}/{number}/index.json", ())


class Hub:
    """A controller on a database, and what it passed on."""

    def __init__(self, store: Any, wait: Callable[[float], Any] = asyncio.sleep) -> None:
        self.store = store
        self.seen: list[pb.DeviceState] = []
        self.counted: list[pb.Telemetry] = []
        self.controller = Controller(
            store,
            wanted=describe,
            telemetry=self.counted.append,
            seen=self.seen.append,
            wait=wait,
        )

    async def twin(self, device: str = "a") -> Twin:
        return {one.device: one for one in await self.controller.twins()}[device]

    async def tell(self, *documents: Any) -> None:
        await self.controller.commit(
            [Arrival(TENANT, document.device, document) for document in documents]
        )


class Broker:
    """Keeps the last desired state of every device, and every generation it was given."""

    def __init__(self) -> None:
        self.retained: dict[str, pb.Desired] = {}
        self.given: dict[str, list[int]] = {}
        self.at_once = 0
        self.most_at_once = 0
        self.fails: Callable[[str], BaseException | None] = lambda device: None
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish_desired(self, tenant: str, device: str, desired: pb.Desired) -> None:
        assert tenant == TENANT
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0)
            if (failure := self.fails(device)) is not None:
                raise failure
            self.retained[device] = desired
            self.given.setdefault(device, []).append(desired.generation)
            await self.gate.wait()
        finally:
            self.at_once -= 1

    async def remove_desired(self, tenant: str, device: str) -> None:
        assert tenant == TENANT
        if (failure := self.fails(device)) is not None:
            raise failure
        self.retained.pop(device, None)
        await self.gate.wait()


def outstanding(connection: Connection) -> list[str]:
    t, departed = schema.twin.c, schema.departed.c.device
    unpublished = select(t.device).where(t.published_generation < t.generation)
    return [
        *connection.execute(unpublished).scalars(),
        *connection.execute(select(departed).order_by(departed)).scalars(),
    ]


async def until(store: Store, due: Sequence[str], task: asyncio.Future[None]) -> None:
    """Wait until exactly these devices wait to be published or to be cleared."""
    async with asyncio.timeout(10):
        while await store.read(outstanding) != list(due):
            if task.done():
                task.result()
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def publishing(hub: Hub, broker: Any) -> AsyncIterator[asyncio.Future[None]]:
    task = asyncio.ensure_future(hub.controller.outbox.publish(broker, TENANT))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def birth(device: str = "a", **fields: Any) -> pb.DeviceState:
    return pb.DeviceState(
        schema=1, device=device, **{"online": True, "boot": 1, "connection": 1, **fields}
    )


def report(device: str = "a", sequence: int = 1, **fields: Any) -> pb.Reported:
    return pb.Reported(schema=1, device=device, sequence=sequence, **fields)


def standing(phase: str = "committed", **fields: Any) -> pb.ReportedModel:
    return pb.ReportedModel(**{"model": "digits", "phase": phase, "active_release": 1, **fields})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One database for all; every test and every example begins with empty tables."""
    path = tmp_path_factory.mktemp("controller") / "hub.sqlite"
    store = asyncio.run(Store.open(f"sqlite:///{path}"))
    yield store
    asyncio.run(store.close())


def empty(connection: Connection) -> None:
    for table in TABLES:
        connection.execute(delete(table))


@pytest.fixture
async def store(shared: Store) -> Store:
    await shared.write(empty)
    return shared


@pytest.fixture
def hub(store: Store) -> Hub:
    return Hub(store)


def batches(told: Sequence[T], at_once: int) -> list[Sequence[T]]:
    return [told[n : n + at_once] for n in range(0, len(told), at_once)]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


several = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# What operators take back


async def test_what_is_not_wanted_any_more_is_published_without_it(hub: Hub, store: Store) -> None:
    broker = Broker()
    await hub.tell(birth("a"), birth("b"), birth("c"))
    await hub.controller.want(None, "digits", 1)
    await hub.controller.want(["a"], "shelf", 2)
    assert await hub.controller.unwant(["c", "a"], "digits") == ["c", "a"]
    assert (await hub.twin("a")).standing == "queued"
    assert (await hub.twin("c")).standing == "idle"
    async with publishing(hub, broker) as task:
        await until(store, [], task)
        told = {
            name: [one.model for one in wanted.releases] for name, wanted in broker.retained.items()
        }
        assert told == {"a": ["shelf"], "b": ["digits"], "c": []}
        assert broker.retained["c"].generation == 2
        assert await hub.controller.unwant(None, "digits") == ["b"]
        assert await hub.controller.unwant(None, "digits") == []
        await until(store, [], task)
        assert not broker.retained["b"].releases
    generation = (await hub.twin("a")).generation
    with pytest.raises(UnknownDevice, match="'z'"):
        await hub.controller.unwant(["a", "z"], "shelf")
    assert (await hub.twin("a")).generation == generation


async def test_a_forgotten_device_leaves_nothing_behind(hub: Hub, store: Store) -> None:
    broker = Broker()
    await hub.tell(birth("a"), birth("b"), report("a", models=[standing()]))
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
        revision = hub.controller.revision
        assert await hub.controller.forget("a")
        assert hub.controller.revision > revision
        assert [one.device for one in await hub.controller.twins()] == ["b"]
        assert await hub.controller.events("a") == []
        with pytest.raises(UnknownDevice):
            await hub.controller.want(["a"], "digits", 2)
        await until(store, [], task)
        assert list(broker.retained) == ["b"]
        assert not await hub.controller.forget("a")


async def test_the_broker_that_is_away_is_cleared_when_it_returns(store: Store) -> None:
    returned = asyncio.Event()

    async def wait(_seconds: float) -> None:
        await returned.wait()

    hub, broker = Hub(store, wait), Broker()
    await hub.tell(birth("a"), birth("b"))
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    broker.fails = lambda device: NotAcknowledged("away")
    async with publishing(hub, broker) as task:
        await hub.controller.forget("a")
        await until(store, ["a"], task)
    # A hub that was restarted meanwhile knows it, too.
    hub = Hub(store, wait)
    broker.fails = lambda device: None
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    assert list(broker.retained) == ["b"]


async def test_a_broker_that_forbids_it_keeps_no_other_from_being_told(
    hub: Hub, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Broker()
    await hub.tell(birth("a"), birth("b"))
    await hub.controller.forget("a")
    refusal = PublishRefused("v1/default/d/a/desired", 135, "Not authorized")
    broker.fails = lambda device: refusal if device == "a" else None
    async with publishing(hub, broker) as task:
        await hub.controller.want(["b"], "digits", 1)
        await until(store, ["a"], task)
    assert [one.generation for one in broker.retained.values()] == [1]
    assert "of a cannot be cleared: the broker refused" in caplog.text


async def test_a_device_that_comes_back_is_new_and_told_that_nothing_is_wanted(
    hub: Hub, store: Store
) -> None:
    broker = Broker()
    await hub.tell(birth(), report(sequence=9, generation=1, models=[standing()]))
    await hub.controller.want(["a"], "digits", 2)
    await hub.controller.forget("a")
    await hub.tell(birth(online=False))  # only now its broker misses it
    assert await hub.controller.twins() == []
    await hub.tell(birth(boot=2, generation=1), report(sequence=10, generation=1))
    back = await hub.twin()
    assert (back.desired, back.standing, back.reported.sequence) == ({}, "idle", 10)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    # Above what it has, so that it takes it: what it was told before holds no more.
    assert broker.retained["a"].generation == 2
    assert not broker.retained["a"].releases


# What devices say


GENERATIONS = st.integers(0, 6)
REPORTS = st.lists(st.tuples(st.integers(1, 9), GENERATIONS), max_size=14)
STATES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans(), GENERATIONS), max_size=14
)


@several
@given(REPORTS, st.integers(1, 5))
def test_in_whatever_order_reports_arrive_the_highest_sequence_stands(
    shared: Store, told: list[tuple[int, int]], at_once: int
) -> None:
    async def example() -> None:
        await shared.write(empty)
        hub = Hub(shared)
        await hub.tell(birth())
        generation = newest = 0
        for batch in batches(told, at_once):
            await hub.tell(
                *(report("a", s, generation=g, models=[standing(attempt=s)]) for s, g in batch)
            )
            for sequence, spoken_of in batch:
                if sequence > newest:
                    newest = sequence
                    # A device ahead of the hub is overtaken, and nothing else raises it.
                    generation = spoken_of + 1 if spoken_of > generation else generation
            twin = await hub.twin()
            assert twin.reported.sequence == newest
            assert [one.attempt for one in twin.reported.models] == [newest] * bool(newest)
            assert twin.generation == generation

    run(example())


@several
@given(STATES, st.integers(1, 5))
def test_in_whatever_order_births_and_wills_arrive_the_newest_stands(
    shared: Store, told: list[tuple[int, int, bool, int]], at_once: int
) -> None:
    async def example() -> None:
        await shared.write(empty)
        hub = Hub(shared)
        await hub.tell(report())  # a will alone makes no device
        for batch in batches(told, at_once):
            await hub.tell(
                *(
                    birth(boot=boot, connection=number, online=online, generation=generation)
                    for boot, number, online, generation in batch
                )
            )
        if not told:
            return
        boot, number, died = max((b, c, not online) for b, c, online, _ in told)
        twin = await hub.twin()
        assert twin.connected is not died
        # The presence rule hears the same: strictly newer ones, in order.
        moments = [(s.boot, s.connection, not s.online) for s in hub.seen]
        assert moments == sorted(set(moments))
        assert moments[-1] == (boot, number, died)

    run(example())


async def test_a_late_will_buries_no_newer_birth_and_a_repeated_birth_no_will(hub: Hub) -> None:
    await hub.tell(birth(connection=1), birth(connection=2))
    await hub.tell(birth(connection=1, online=False))
    assert (await hub.twin()).connected
    await hub.tell(birth(connection=2, online=False), birth(connection=2))
    assert not (await hub.twin()).connected
    await hub.tell(birth(boot=2))
    assert (await hub.twin()).connected
    assert [(s.boot, s.connection, s.online) for s in hub.seen] == [
        (1, 1, True), (1, 2, True), (1, 2, False), (2, 1, True),
    ]  # fmt: skip


async def test_a_device_ahead_of_the_hub_hears_of_the_next_wish(hub: Hub, store: Store) -> None:
    broker = Broker()
    await hub.tell(birth(generation=7))
    await hub.controller.want(["a"], "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
        assert broker.retained["a"].generation == 9
        await hub.tell(report(sequence=1, generation=20))
        await until(store, [], task)
    assert broker.retained["a"].generation == 21
    assert [one.release for one in broker.retained["a"].releases] == [1]


async def test_a_generation_that_no_device_would_follow_is_not_taken_over(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    await hub.tell(birth(generation=MAX_COUNTER))
    assert (await hub.twin()).generation == 0
    assert "above which there is none" in caplog.text
    await hub.tell(birth(connection=2, generation=MAX_GENERATION - 1))
    assert (await hub.twin()).generation == MAX_GENERATION


async def test_changes_of_phase_become_events_and_repetitions_do_not(hub: Hub) -> None:
    await hub.tell(report(sequence=1, models=[standing("downloading", bytes_done=1)]))
    await hub.tell(report(sequence=2, models=[standing("downloading", bytes_done=2)]))
    await hub.tell(report(sequence=3, models=[standing("rejected", code="c", sentence="Why.")]))
    await hub.tell(report(sequence=2, models=[standing("trial")]))
    events = await hub.controller.events("a")
    assert [(e.phase, e.code, e.sentence) for e in events] == [
        ("rejected", "c", "Why."),
        ("downloading", "", ""),
    ]


async def test_one_device_cannot_fill_the_hub_with_its_history(hub: Hub) -> None:
    await hub.tell(report("other", 1, models=[standing()]))
    for sequence in range(1, 4):
        models = [standing(model=f"m{sequence}-{n}") for n in range(EVENTS_KEPT // 2)]
        await hub.tell(report("a", sequence, models=models))
    assert len(await hub.controller.events("a", limit=1000)) == EVENTS_KEPT
    assert len(await hub.controller.events("other")) == 1


async def test_what_no_database_takes_does_not_cost_the_other_documents(hub: Hub) -> None:
    hostile = standing(
        "p" * 99,
        model="m" * 99,
        code="c" * 999,
        sentence="nul \0 " + "s" * 5000,
        desired_release=(1 << 64) - 1,
    )
    await hub.tell(report("a", 1, models=[hostile]), report("b", 1, models=[standing()]))
    (event,) = await hub.controller.events("a")
    assert (len(event.phase), len(event.model), len(event.code)) == (32, 63, 64)
    assert event.sentence.startswith("nul ? s")
    assert event.release == MAX_COUNTER
    assert (await hub.twin("b")).reported.sequence == 1


async def test_counts_are_passed_on(hub: Hub) -> None:
    await hub.tell(pb.Telemetry(device="a", boot_id="x", sequence=1))
    assert [counts.device for counts in hub.counted] == ["a"]


# How a device stands


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (None, "queued"),
        (report(generation=0, models=[standing()]), "queued"),
        (report(generation=1), "updating"),
        (report(generation=1, models=[standing("self-test", active_release=0)]), "updating"),
        (report(generation=1, models=[standing("committed", active_release=2)]), "updating"),
        (report(generation=1, models=[standing("committed")]), "current"),
        (report(generation=1, models=[standing("rejected", active_release=0)]), "failed"),
        (report(generation=1, models=[standing("rolled-back", active_release=2)]), "failed"),
        # A device without a model refuses in nobody's name.
        (report(generation=1, models=[standing("rejected", model="")]), "failed"),
        # What is not wanted is nobody's business.
        (report(generation=1, models=[standing(), standing("rejected", model="x")]), "current"),
    ],
)
async def test_one_word_says_how_a_device_stands(
    hub: Hub, said: pb.Reported | None, word: str
) -> None:
    await hub.tell(birth())
    assert (await hub.twin()).standing == "idle"
    await hub.controller.want(["a"], "digits", 1)
    if said is not None:
        await hub.tell(said)
    assert (await hub.twin()).standing == word


async def test_running_counts_devices_by_release(hub: Hub) -> None:
    for number, device in enumerate(("a", "b", "c", "d")):
        model = standing(active_release=min(number, 2))
        await hub.tell(report(device, 1, models=[model]))
    nothing_told = {1: Running(1, {}, 0), 2: Running(2, {}, 0)}
    assert await hub.controller.running("digits") == nothing_told


def serving(variant: str, aside: str = "", **more: str) -> pb.Serving:
    meant = {"meant_variant": "int8", "meant_provider": "CPU"}
    return pb.Serving(**{"variant": variant, "provider": "CPU", "aside": aside, **meant, **more})


async def test_running_counts_variants_and_fallbacks_of_devices_that_tell(hub: Hub) -> None:
    told = [
        serving("int8"),
        serving("fp32"),
        serving("int8", provider="CUDA"),
        serving("fp32", meant_variant="", meant_provider=""),  # says nothing of what was meant
        None,  # an older agent
    ]
    for number, what in enumerate(told):
        model = standing(active_release=1, serving=what)
        await hub.tell(report(f"device-{number}", 1, models=[model]))
    await hub.tell(report("unmanaged", 1, models=[standing(active_release=0, serving=told[0])]))
    assert await hub.controller.running("digits") == {1: Running(5, {"int8": 2, "fp32": 2}, 2)}


async def test_another_variant_without_an_update_is_part_of_the_history(hub: Hub) -> None:
    left = "int8 on CPU: no certificate was issued for it"
    said = [
        standing(active_release=1),
        standing(active_release=1, serving=serving("int8")),  # the agent was updated
        standing(active_release=1, serving=serving("fp32", left)),
        standing(active_release=1, serving=serving("fp32", left)),
        standing(active_release=2, serving=serving("int8")),  # an update, with its own line
    ]
    for sequence, model in enumerate(said, 1):
        await hub.tell(report(sequence=sequence, models=[model]))
    found = [(event.release, event.sentence) for event in await hub.controller.events("a")]
    assert found == [(2, ""), (1, f"answers with fp32 on CPU now: {left}"), (1, "")]


# What operators want


async def test_wanting_raises_the_generation_once(hub: Hub) -> None:
    await hub.tell(birth("a"), birth("b"))
    assert await hub.controller.want(None, "digits", 1) == ["a", "b"]
    assert await hub.controller.want(["b", "b"], "digits", 1) == ["b"]
    assert [one.generation for one in await hub.controller.twins()] == [1, 1]
    await hub.controller.want(["b"], "digits", 2)
    assert await hub.controller.want(["b"], "shelf", 2) == ["b"]
    twin = await hub.twin("b")
    assert (twin.generation, dict(twin.desired)) == (3, {"digits": 2, "shelf": 2})


async def test_an_unknown_device_or_release_changes_nothing(hub: Hub) -> None:
    await hub.tell(birth("a"))
    before = await hub.controller.twins()
    with pytest.raises(UnknownDevice, match="no device 'b' has reported"):
        await hub.controller.want(["a", "b"], "digits", 1)
    with pytest.raises(UnknownRelease, match="digits@10 is not a release"):
        await hub.controller.want(None, "digits", 10)
    assert await hub.controller.twins() == before


async def test_more_than_fits_into_one_document_is_refused_when_it_is_wanted(hub: Hub) -> None:
    await hub.tell(birth("a"), birth("b"))
    number = 0
    with contextlib.suppress(TooMuchWanted):
        for number in range(100):
            await hub.controller.want(None, f"model-{number}", 1)
    with pytest.raises(TooMuchWanted, match=f"{MAX_DESIRED_BYTES}.* names {number} models"):
        await hub.controller.want(["b"], "one-more", 1)
    assert len((await hub.twin("b")).desired) == number
    # And so the devices still hear of every other change.
    broker = Broker()
    async with publishing(hub, broker) as task:
        await until(hub.store, [], task)
    assert len(documents.canonical(broker.retained["a"])) <= MAX_DESIRED_BYTES


async def test_whoever_wants_a_release_or_runs_it_is_told_anew(hub: Hub, store: Store) -> None:
    await hub.tell(*map(birth, ("wants", "runs", "both", "other", "idle")))
    await hub.controller.want(["wants", "both"], "digits", 2)
    await hub.controller.want(["runs", "other"], "digits", 3)
    active = {"runs": 2, "both": 2, "other": 1, "idle": 0}
    await hub.tell(
        *(report(name, models=[standing(active_release=n)]) for name, n in active.items())
    )
    broker = Broker()
    async with publishing(hub, broker) as task:
        await until(store, [], task)
        revision = hub.controller.revision
        told = await store.write(lambda c: hub.controller.restate(c, "digits", 2))
        assert told == ["both", "runs", "wants"]
        hub.controller.restated()
        await until(store, [], task)
    generations = {one.device: one.generation for one in await hub.controller.twins()}
    assert generations == {"wants": 2, "runs": 2, "both": 2, "other": 1, "idle": 0}
    assert {name: given[-1] for name, given in broker.given.items()} == {
        "wants": 2, "runs": 2, "both": 2, "other": 1,
    }  # fmt: skip
    # It is wanted as before.
    assert [one.release for one in broker.retained["runs"].releases] == [3]
    assert hub.controller.revision > revision


async def test_a_device_without_room_for_more_is_told_anew_only_if_it_must_be(
    hub: Hub, store: Store
) -> None:
    await hub.tell(birth())
    with contextlib.suppress(TooMuchWanted):
        for number in range(100):
            await hub.controller.want(None, f"model-{number}", 1)
    full = {f"model-{n}": 1 for n in range(number)} | {"one": 1, "more": 1, "digits": 1}
    await store.write(lambda c: c.execute(update(schema.twin).values(desired=json.dumps(full))))
    before = await hub.twin()
    with pytest.raises(TooMuchWanted, match=f"at most {MAX_DESIRED_BYTES} are possible"):
        await store.write(lambda c: hub.controller.restate(c, "digits", 1))
    assert (await hub.twin()).generation == before.generation
    await store.write(lambda c: hub.controller.restate(c, "digits", 1, at_any_size=True))
    assert (await hub.twin()).generation == before.generation + 1


# What goes out


async def test_a_thousand_devices_are_published_in_batches(hub: Hub, store: Store) -> None:
    names = [f"d{n:04}" for n in range(1000)]
    await hub.tell(*map(birth, names))
    broker = Broker()
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    assert sorted(broker.retained) == names
    assert all(generations == [1] for generations in broker.given.values())
    assert broker.most_at_once <= BATCH


async def test_what_was_published_is_a_change_for_who_reads(hub: Hub, store: Store) -> None:
    await hub.tell(birth())
    await hub.controller.want(None, "digits", 1)
    revision = hub.controller.revision
    async with publishing(hub, Broker()) as task:
        await until(store, [], task)
        async with asyncio.timeout(10):
            while hub.controller.revision == revision:
                await asyncio.sleep(0)
    assert (await hub.twin()).published_generation == 1


async def test_a_broker_that_forgot_gets_everything_again(hub: Hub, store: Store) -> None:
    broker = Broker()
    await hub.tell(birth("a"), birth("b"), birth("unwanted"))
    await hub.controller.want(["a", "b"], "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
        broker.retained.clear()
        await hub.controller.broker_forgot()
        await until(store, [], task)
    assert {name: one.generation for name, one in broker.retained.items()} == {"a": 1, "b": 1}


async def test_a_broker_that_forgets_while_it_is_published_to_gets_everything_again(
    hub: Hub, store: Store
) -> None:
    broker = Broker()
    await hub.tell(birth("a"))
    await hub.controller.want(None, "digits", 1)
    broker.gate.clear()  # it has it, and its answer is on the way
    async with publishing(hub, broker) as task:
        while "a" not in broker.retained:
            await asyncio.sleep(0)
        broker.retained.clear()
        await hub.controller.broker_forgot()
        broker.gate.set()
        await until(store, [], task)
    assert broker.given["a"] == [1, 1]


async def test_a_birth_without_the_generation_published_gets_it_again(
    hub: Hub, store: Store
) -> None:
    broker = Broker()
    await hub.tell(birth(connection=1))
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
        await hub.tell(birth(connection=2, generation=1))
        assert await store.read(outstanding) == []
        # A broker that came back with an old copy of its memory.
        await hub.tell(birth(connection=3, generation=0))
        await until(store, [], task)
        assert broker.given["a"] == [1, 1]
        # The same while the next one is on its way.
        broker.gate.clear()
        await hub.controller.want(None, "digits", 2)
        while len(broker.given["a"]) < 3:
            await asyncio.sleep(0)
        await hub.tell(birth(connection=4, generation=1))
        broker.gate.set()
        await until(store, [], task)
    assert broker.given["a"] == [1, 1, 2, 2]


async def test_a_newer_wish_during_publication_goes_out_too(hub: Hub, store: Store) -> None:
    broker = Broker()
    await hub.tell(birth())
    await hub.controller.want(None, "digits", 1)
    broker.gate.clear()
    async with publishing(hub, broker) as task:
        while "a" not in broker.retained:
            await asyncio.sleep(0)
        await hub.controller.want(None, "digits", 2)
        broker.gate.set()
        await until(store, [], task)
    assert broker.given["a"] == [1, 2]


@pytest.mark.parametrize(
    "failure",
    [
        ValueError("the desired state of b takes 5000 bytes"),
        PublishRefused("v1/default/d/b/desired", 135, "Not authorized"),
    ],
)
async def test_what_can_never_be_published_blocks_nobody_and_is_not_tried_in_circles(
    hub: Hub, store: Store, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    broker = Broker()
    tried = 0

    def fails(device: str) -> BaseException | None:
        nonlocal tried
        tried += device == "b"
        return failure if device == "b" else None

    broker.fails = fails
    await hub.tell(birth("a"), birth("b"), birth("c"))
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, ["b"], task)
        for _ in range(100):
            await asyncio.sleep(0)
        assert tried == 1
        await hub.controller.want(["c"], "digits", 2)
        await until(store, ["b"], task)
        assert broker.retained["c"].generation == 2
        assert len([r for r in caplog.records if "cannot be published" in r.message]) == 1
        # Another broker, or the same with other rights.
        broker.fails = lambda device: None
        await hub.controller.epoch_published("e2")
        await until(store, [], task)


async def test_a_broker_that_is_away_is_waited_for(store: Store) -> None:
    waits: list[float] = []
    broker = Broker()
    away: list[MqttError] = [NotAcknowledged("nobody"), NotAcknowledged("nobody")]
    broker.fails = lambda device: away.pop() if away else None

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    hub = Hub(store, wait)
    await hub.tell(birth())
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    assert waits == [2.0, 2.0]
    assert broker.given["a"] == [1]


async def test_a_mistake_of_our_own_ends_the_publisher_and_is_not_hidden(hub: Hub) -> None:
    broker = Broker()
    broker.fails = lambda device: ZeroDivisionError()
    await hub.tell(birth())
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(task, 10)


async def test_the_epoch_is_remembered_across_starts_and_named_in_documents(
    hub: Hub, store: Store
) -> None:
    assert await hub.controller.last_epoch() is None
    await hub.controller.epoch_published("e1")
    await hub.controller.epoch_published("e2")
    assert await Hub(store).controller.last_epoch() == "e2"
    broker = Broker()
    await hub.tell(birth())
    await hub.controller.want(None, "digits", 1)
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    assert broker.retained["a"].hub_epoch == "e2"


# Crashes


class Crash(Exception):
    """The hub was killed here."""


class Fuse:
    """Lets a number of operations pass, and kills the hub at the next."""

    def __init__(self, left: int) -> None:
        self.left = left

    def burn(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Crash


class CrashingStore:
    """The database of a hub that is killed before or after a change."""

    def __init__(self, store: Store, fuse: Fuse) -> None:
        self._store = store
        self._fuse = fuse

    async def write(self, work: Callable[[Connection], T]) -> T:
        self._fuse.burn()
        result = await self._store.write(work)
        self._fuse.burn()
        return result

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await self._store.read(work)


class CrashingBroker(Broker):
    """Outlives the hub, which is killed before or after it is heard."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = Fuse(1 << 30)

    async def publish_desired(self, tenant: str, device: str, desired: pb.Desired) -> None:
        self.fuse.burn()
        await super().publish_desired(tenant, device, desired)
        self.fuse.burn()

    async def remove_desired(self, tenant: str, device: str) -> None:
        self.fuse.burn()
        await super().remove_desired(tenant, device)
        self.fuse.burn()


async def life(hub: Hub, store: Store, broker: Broker, done: list[str]) -> None:
    """What happens to a fleet of three; steps that were done before a crash are not repeated."""

    async def step(name: str, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        if name not in done:
            await work()
            done.append(name)

    async def drain() -> None:
        async with publishing(hub, broker) as task:
            await until(store, [], task)

    def forget() -> Coroutine[Any, Any, None]:
        broker.retained.clear()
        return hub.controller.broker_forgot()

    await step("born", lambda: hub.tell(birth("a"), birth("b"), birth("c"), birth("d"), birth("e")))
    await step("first wish", lambda: hub.controller.want(["a", "b", "d", "e"], "digits", 1))
    await step("published", drain)
    await step("reported", lambda: hub.tell(report("a", 5, generation=1), birth("b", boot=2)))
    await step("d forgotten", lambda: hub.controller.forget("d"))
    await step("e forgotten", lambda: hub.controller.forget("e"))
    await step("e is back", lambda: hub.tell(birth("e", boot=2, generation=1)))
    await step("second wish", lambda: hub.controller.want(None, "digits", 2))
    await step("forgotten", forget)
    await step("epoch", lambda: hub.controller.epoch_published("e"))
    await step("ahead", lambda: hub.tell(report("c", 1, generation=40)))
    await step("third wish", lambda: hub.controller.want(["a"], "shelf", 3))
    await step("no more", lambda: hub.controller.unwant(["b"], "digits"))
    await step("drained", drain)


async def converged(store: Store, broker: Broker) -> Mapping[str, tuple[int, dict[str, int]]]:
    """Check that the broker has what the database wants; return it."""
    found = {}
    for twin in await Hub(store).controller.twins():
        assert twin.published_generation == twin.generation
        on_broker = broker.retained[twin.device]
        assert on_broker.generation == twin.generation
        assert {one.model: one.release for one in on_broker.releases} == dict(twin.desired)
        given = broker.given[twin.device]
        assert given == sorted(given), "an older desired state followed a newer one"
        found[twin.device] = (twin.generation, dict(twin.desired))
    return found


async def crash_and_recover(store: Store, *crash_after: int) -> int:
    """Live a life with crashes after so many operations each; return those left of the last."""
    await store.write(empty)
    broker = CrashingBroker()
    done: list[str] = []
    for operations in (*crash_after, 1 << 30):
        fuse = broker.fuse = Fuse(operations)
        try:
            await life(Hub(CrashingStore(store, fuse)), store, broker, done)
            break
        except Crash:
            continue
    assert await converged(store, broker) == {
        "a": (3, {"digits": 2, "shelf": 3}),
        "b": (3, {}),
        "c": (41, {"digits": 2}),
        "e": (3, {"digits": 2}),
    }
    assert "d" not in broker.retained
    return fuse.left


def test_a_crash_anywhere_ends_with_the_newest_wish_on_the_broker(shared: Store) -> None:
    async def enumerate_crashes() -> int:
        points = 0
        while True:
            # A life that ends before its fuse has seen every point of it.
            if await crash_and_recover(shared, points) < (1 << 29):
                return points
            points += 1

    assert run(enumerate_crashes()) > 25


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=6))
def test_many_crashes_end_with_the_newest_wish_on_the_broker(
    shared: Store, crashes: list[int]
) -> None:
    run(crash_and_recover(shared, *crashes))


async def test_a_failing_database_keeps_every_wish(store: Store) -> None:
    """A full disk while it is recorded what was published: it is published again."""

    class Full:
        def __init__(self) -> None:
            self.full = False

        async def write(self, work: Callable[[Connection], T]) -> T:
            if self.full:
                self.full = False
                raise StoreFailed("the disk is full")
            return await store.write(work)

        async def read(self, work: Callable[[Connection], T]) -> T:
            return await store.read(work)

    async def wait(_seconds: float) -> None:
        pass

    database = Full()
    hub = Hub(database, wait)
    broker = Broker()
    await hub.tell(birth())
    await hub.controller.want(None, "digits", 1)
    database.full = True
    async with publishing(hub, broker) as task:
        await until(store, [], task)
    assert broker.given["a"] == [1, 1]
