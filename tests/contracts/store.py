"""What the hub's database promises, whatever it is: subclass, and give it a ``url`` fixture."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, delete, insert, select, text, update

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.callers import NO_LIMITS, CallerLimits
from cloud_hub.fleet.controller import EVENTS_KEPT, Controller, WantedRelease
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.identity import Identity
from cloud_hub.fleet.link import Arrival, Document
from cloud_hub.insight.history import History
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.v1 import fleet_pb2 as pb

NOW = 1_790_000_000.0


def add(name: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        row = {"id": name, "sha256": name, "tenant": "t", "label": "", "created_at": 0.0}
        connection.execute(insert(schema.token), {**row, "expires_at": 1.0, "revoked": False})

    return work


def names(connection: Connection) -> set[str]:
    return set(connection.execute(select(schema.token.c.id)).scalars())


def _back_to_0003(connection: Connection) -> None:
    for column in ("rate", "burst", "concurrency"):
        connection.execute(text(f"ALTER TABLE token DROP COLUMN {column}"))
    connection.execute(text("UPDATE alembic_version SET version_num='0003'"))


class StoreContract:
    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[Store]:
        store = await Store.open(url)
        yield store
        await store.close()

    async def test_the_migrations_make_exactly_the_tables_of_the_schema(self, url: str) -> None:
        def differences(connection: Connection) -> object:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            return context.get_current_revision(), compare_metadata(context, schema.metadata)

        def unmake(connection: Connection) -> None:
            schema.metadata.drop_all(connection)
            connection.execute(delete(schema.version))

        new = await Store.open(url)
        assert await new.read(differences) == (schema.REVISION, [])
        await new.write(unmake)  # without a version, every migration is due
        await new.close()
        migrated = await Store.open(url)
        assert await migrated.read(differences) == (schema.REVISION, [])
        await migrated.close()

    async def test_what_is_written_is_there_after_a_new_start(self, url: str) -> None:
        first = await Store.open(url)
        await first.write(add("a"))
        await first.close()
        second = await Store.open(url)
        assert await second.read(names) == {"a"}
        await second.close()

    async def test_two_that_open_an_empty_database_at_once_both_find_it_ready(
        self, url: str
    ) -> None:
        stores = await asyncio.gather(*(Store.open(url) for _ in range(3)))
        for number, store in enumerate(stores):
            await store.write(add(str(number)))
        assert await stores[0].read(names) == {"0", "1", "2"}
        for store in stores:
            await store.close()

    async def test_a_failing_change_leaves_nothing_behind(self, store: Store) -> None:
        def half(connection: Connection) -> None:
            add("a")(connection)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await store.write(half)
        assert await store.read(names) == set()

    async def test_what_the_database_refuses_is_named_and_the_next_change_is_taken(
        self, store: Store
    ) -> None:
        await store.write(add("a"))
        with pytest.raises(StoreFailed, match=r"(?i)unique"):
            await store.write(add("a"))
        await store.write(add("b"))
        assert await store.read(names) == {"a", "b"}

    async def test_a_change_excludes_the_writers_of_other_processes(self, url: str) -> None:
        """Read, then write what was read: none of the increments is lost."""
        stores = [await Store.open(url), await Store.open(url)]
        await stores[0].write(add("a"))

        def increment(connection: Connection) -> None:
            t = schema.token
            before = connection.execute(select(t.c.expires_at)).scalar_one()
            connection.execute(update(t).values(expires_at=before + 1))

        await asyncio.gather(*(store.write(increment) for store in stores * 20))
        t = schema.token.c
        assert await stores[0].read(lambda c: c.execute(select(t.expires_at)).scalar_one()) == 41
        for store in stores:
            await store.close()

    async def test_one_read_sees_one_moment_while_another_writes(self, store: Store) -> None:
        loop = asyncio.get_running_loop()
        first_look, written = asyncio.Event(), asyncio.Event()

        def twice(connection: Connection) -> tuple[set[str], set[str]]:
            before = names(connection)
            loop.call_soon_threadsafe(first_look.set)
            asyncio.run_coroutine_threadsafe(written.wait(), loop).result(20)
            return before, names(connection)

        reading = asyncio.ensure_future(store.read(twice))
        await first_look.wait()
        await store.write(add("a"))
        # Other readers see it, and neither side has waited for the other.
        assert await store.read(names) == {"a"}
        written.set()
        assert await reading == (set(), set())

    async def test_a_read_is_not_a_way_to_write(self, store: Store) -> None:
        with contextlib.suppress(StoreFailed):  # PostgreSQL refuses, SQLite takes it back
            await store.read(add("a"))
        assert await store.read(names) == set()

    async def test_a_database_of_a_newer_version_is_refused_with_a_way_out(self, url: str) -> None:
        store = await Store.open(url)
        await store.write(lambda c: c.execute(text("UPDATE alembic_version SET version_num='9'")))
        await store.close()
        with pytest.raises(StoreFailed, match="newer fogline"):
            await Store.open(url)

    # What the hub's parts do with it

    async def test_tokens_are_made_and_revoked(self, store: Store) -> None:
        identity = Identity(store)
        token = await identity.create("acme", "x", 60.0, NOW)
        assert await identity.any_valid(NOW)
        (listed,) = await identity.tokens()
        assert (listed.tenant, token in repr(listed)) == ("acme", False)
        assert await identity.revoke(listed.token_id)
        assert not await identity.any_valid(NOW)

    async def test_limits_are_kept_and_a_token_of_before_has_none(self, store: Store) -> None:
        identity = Identity(store)
        await store.write(add("of before"))  # it knows nothing of limits
        limits = CallerLimits(0.5, 3, 1_000_000)
        secret = await identity.create("acme", "x", 60.0, NOW * 2, limits)
        assert [token.limits for token in await identity.tokens()] == [NO_LIMITS, limits]
        caller = await identity.authenticate(secret)
        assert caller is not None
        assert caller.limits == limits

    async def test_a_database_of_before_is_brought_up_to_date_with_its_rows(self, url: str) -> None:
        store = await Store.open(url)
        await store.write(add("a"))
        await store.write(_back_to_0003)
        await store.close()
        store = await Store.open(url)
        (token,) = await Identity(store).tokens()
        assert (token.token_id, token.limits) == ("a", NO_LIMITS)
        await store.close()

    async def test_counts_survive_a_restart_and_count_once(self, store: Store) -> None:
        for sequence, rows in ((1, 3), (2, 5), (2, 5), (1, 3)):
            devices = await Devices.open(store, 30.0)
            history = await History.open(store, devices)
            report = pb.Telemetry(device="a", boot_id="b", sequence=sequence)
            report.escalation_bytes_sent = rows * 10
            model = report.models.add(model="digits", release="digits@1")
            model.outcomes.add(tier="edge", quality="certified", reason="score", rows=rows)
            model.latencies.add(tier="edge", bounds_s=[0.1], counts=[rows, 0])
            history.accept(report, NOW)
            await history.close()
        devices = await Devices.open(store, 30.0)
        history = await History.open(store, devices)
        overview = history.overview(NOW, 300)
        await history.close()
        assert (overview.rows_total, overview.escalation_bytes_sent_total) == (5, 50)
        assert [device.name for device in devices.all()] == ["a"]

    async def test_the_fleet_is_wanted_reported_and_published(self, store: Store) -> None:
        def wanted(_connection: Connection, model: str, number: int) -> WantedRelease:
            return WantedRelease(model, number, "1.0.0", f"{model}/{number}/index.json", ())

        def controller() -> Controller:
            return Controller(store, wanted=wanted, telemetry=lambda _: None, seen=lambda _: None)

        async def tell(*documents: Document) -> None:
            await controller().commit([Arrival("default", one.device, one) for one in documents])

        published: dict[str, int] = {}
        everything = asyncio.Event()

        class Broker:
            async def publish_desired(self, tenant: str, device: str, desired: pb.Desired) -> None:
                published[device] = desired.generation
                if len(published) == 2:
                    everything.set()

        birth = pb.DeviceState(schema=1, device="a", online=True, boot=1 << 50, connection=1)
        ahead = pb.DeviceState(schema=1, device="b", online=True, boot=1, generation=1 << 50)
        await tell(birth, ahead)
        await controller().want(None, "digits", 1)
        publishing = asyncio.ensure_future(controller().publish(Broker(), "default"))
        await asyncio.wait_for(everything.wait(), 20)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert published == {"a": 1, "b": (1 << 50) + 2}
        for sequence in range(3):
            models = [
                pb.ReportedModel(
                    model=f"m{n}-{sequence}", phase="p" * 99, code="c" * 99, sentence="nul \0",
                    desired_release=(1 << 64) - 1,
                )
                for n in range(EVENTS_KEPT // 2)
            ]  # fmt: skip
            report = pb.Reported(schema=1, device="a", sequence=(1 << 52) + sequence)
            report.models.extend(models)
            await tell(report)
        assert len(await controller().events("a", limit=1000)) == EVENTS_KEPT
        a, b = await controller().twins()
        assert (a.reported.sequence, a.desired, a.connected) == ((1 << 52) + 2, {"digits": 1}, True)
        assert b.reported_at is None
        await controller().broker_forgot()
        await controller().epoch_published("e1")
        await controller().epoch_published("e2")
        assert await controller().last_epoch() == "e2"
        assert [one.published_generation for one in await controller().twins()] == [0, 0]
