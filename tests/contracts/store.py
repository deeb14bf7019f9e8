"""What the hub's database promises, whatever it is: subclass, and give it a ``url`` fixture."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, delete, insert, select, text, update

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.arrivals import EVENTS_KEPT
from cloud_hub.fleet.callers import NO_LIMITS, CallerLimits
from cloud_hub.fleet.certificates import CertificateRefused, Certificates, named
from cloud_hub.fleet.controller import Controller, Running
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.identity import Identity
from cloud_hub.fleet.link import Arrival, Document
from cloud_hub.fleet.outbox import WantedRelease
from cloud_hub.fleet.trust import Repository
from cloud_hub.insight.example_files import ExampleFiles
from cloud_hub.insight.example_rows import Selection
from cloud_hub.insight.examples import Bounds, Examples
from cloud_hub.insight.history import History
from cloud_hub.metrics import Metrics
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.fleet import test_certificates
from tests.examples import numbered, numbers_of, offer, read, settled

NOW = 1_790_000_000.0


def add(name: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        row = {"id": name, "sha256": name, "tenant": "t", "label": "", "created_at": 0.0}
        connection.execute(insert(schema.token), {**row, "expires_at": 1.0, "revoked": False})

    return work


def names(connection: Connection) -> set[str]:
    return set(connection.execute(select(schema.token.c.id)).scalars())


def _back_to_0003(connection: Connection) -> None:
    for table in (schema.sighting, schema.example, schema.departed):
        table.drop(connection)
    for column in ("rate", "burst", "concurrency"):
        connection.execute(text(f"ALTER TABLE token DROP COLUMN {column}"))
    connection.execute(text("UPDATE alembic_version SET version_num='0003'"))


def _files(folder: Path) -> int:
    return sum(len(path.name) == 64 for path in folder.rglob("*"))


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
        assert (overview.rows_total, overview.escalation_bytes_sent_total) == (5, 50)
        assert [device.name for device in devices.all()] == ["a"]
        await history.forget("a")
        assert history.overview(NOW, 300).rows_total == 0
        await history.close()
        assert not (await Devices.open(store, 30.0)).all()

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

            async def remove_desired(self, tenant: str, device: str) -> None:
                published.pop(device)

        birth = pb.DeviceState(schema=1, device="a", online=True, boot=1 << 50, connection=1)
        ahead = pb.DeviceState(schema=1, device="b", online=True, boot=1, generation=1 << 50)
        await tell(birth, ahead)
        await controller().want(None, "digits", 1)
        publishing = asyncio.ensure_future(controller().outbox.publish(Broker(), "default"))
        await asyncio.wait_for(everything.wait(), 20)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert published == {"a": 1, "b": (1 << 50) + 2}
        for sequence in range(3):
            models = [
                pb.ReportedModel(
                    model=f"m{n}-{sequence}", phase="p" * 99, code="c" * 99, sentence="nul \0",
                    desired_release=(1 << 64) - 1, active_release=1,
                    serving=pb.Serving(
                        variant=f"v{sequence} \0", provider="p" * 999, aside="nul \0" * 200
                    ),
                )
                for n in range(EVENTS_KEPT // 2)
            ]  # fmt: skip
            report = pb.Reported(schema=1, device="a", sequence=(1 << 52) + sequence)
            report.models.extend(models)
            await tell(report)
        assert len(await controller().events("a", limit=1000)) == EVENTS_KEPT
        a, b = await controller().twins()
        assert (a.reported.sequence, a.desired, a.connected) == ((1 << 52) + 2, {"digits": 1}, True)
        serving = a.reported.models[0].serving
        assert (serving.variant, len(serving.provider)) == ("v2 \0", 999)
        swapped, *_ = await controller().events("a", limit=1)
        assert swapped.sentence == "nul ?"
        running = await controller().running("m0-2")
        assert running == {1: Running(1, {"v2 \0": 1}, 0)}
        assert b.reported_at is None
        await controller().broker_forgot()
        await controller().epoch_published("e1")
        await controller().epoch_published("e2")
        assert await controller().last_epoch() == "e2"
        assert [one.published_generation for one in await controller().twins()] == [0, 0]
        assert await controller().unwant(None, "digits") == ["a", "b"]
        assert await controller().forget("a")
        assert [one.device for one in await controller().twins()] == ["b"]
        publishing = asyncio.ensure_future(controller().outbox.publish(Broker(), "default"))
        async with asyncio.timeout(20):
            while "a" in published or published["b"] != (1 << 50) + 3:
                await asyncio.sleep(0.01)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)

    # Examples that devices let the hub keep

    @pytest.fixture
    def keep(self, store: Store, tmp_path: Path) -> Callable[..., Examples]:
        """Return a function that opens the examples of the store, with bounds and a clock."""

        def opened(
            quota_bytes: int = 1 << 30,
            retention_s: float = 0.0,
            clock: Callable[[], float] = lambda: NOW,
        ) -> Examples:
            bounds = Bounds(quota_bytes, retention_s)
            files = ExampleFiles(tmp_path / "examples")
            return Examples(store, files, bounds, Metrics().of_examples(), clock)

        return opened

    async def test_the_same_content_is_kept_once_and_counted(
        self, keep: Callable[..., Examples], tmp_path: Path
    ) -> None:
        now = NOW
        async with keep(clock=lambda: now) as examples:
            for _ in range(3):
                offer(examples, numbered(1, 2))
            now += 1
            offer(examples, numbered(2, 2, 3), source="door é", reason="preferred")
            await settled(examples)
        async with keep() as examples:  # after a new start
            found, left_out = await read(examples)
            assert (numbers_of(found), left_out) == ([1, 2, 3], 0)
            facts = {float(one.inputs["x"][0]): one.facts for one in found}
            assert {number: one.count for number, one in facts.items()} == {1: 3, 2: 2, 3: 1}
            assert (facts[2].source, facts[2].reason) == ("door é", "preferred")
            assert _files(tmp_path) == 3
            (kept,) = await examples.summary(None)
            assert (kept.tenant, kept.model, kept.examples) == ("default", "double", 3)
            assert kept.bytes > 3 * 4096

    async def test_both_answers_come_back_with_what_is_known_of_them(
        self, keep: Callable[..., Examples]
    ) -> None:
        async with keep() as examples:
            offer(examples, numbered(7), reason="audit", propensity=0.01, source="s")
            await settled(examples)
            ((one,), _) = await read(examples)
        assert one.edge["logits"].tolist() == [14, 2, 4]
        assert one.hub["logits"].tolist() == [21, 3, 6]
        f = one.facts
        assert (f.at, f.device, f.source, f.reason) == (NOW, "kiosk", "s", "audit")
        assert (f.propensity, f.release, f.hub_model) == (0.01, "double@1.0.0", "judge")
        assert (f.edge_sha256, f.hub_sha256, f.count) == ("e" * 64, "b" * 64, 1)
        assert f.score == pytest.approx(0.1)

    async def test_tenants_and_models_share_nothing(self, keep: Callable[..., Examples]) -> None:
        async with keep() as examples:
            for tenant in ("acme", "other/../x"):
                for model in ("double", "triple"):
                    offer(examples, numbered(1), tenant=tenant, model=model)
            await settled(examples)
            await examples.delete("acme", Selection("double"))
            assert [(one.tenant, one.model) for one in await examples.summary(None)] == [
                ("acme", "triple"), ("other/../x", "double"), ("other/../x", "triple"),
            ]  # fmt: skip
            assert await read(examples, tenant="acme") == ([], 0)
            ((one,), left_out) = await read(examples, tenant="other/../x")
            assert (one.inputs["x"][0], left_out) == (1, 0)

    async def test_a_device_is_forgotten_and_what_others_sent_stays(
        self, keep: Callable[..., Examples], tmp_path: Path
    ) -> None:
        async with keep() as examples:
            offer(examples, numbered(1, 2, 3), device="a")
            offer(examples, numbered(3, 4), device="b", source="cam")
            deleted = await examples.delete(None, Selection(device="a"))  # queued ones, too
            assert (deleted.sightings, deleted.examples) == (3, 2)
            found, _ = await read(examples)
            assert numbers_of(found) == [3, 4]
            assert {one.facts.device for one in found} == {"b"}
            assert _files(tmp_path) == 2
            assert (await examples.delete(None, Selection(source="nobody"))).sightings == 0
            assert (await examples.delete(None, Selection(source="cam"))).examples == 2
            assert await examples.summary(None) == []

    async def test_what_is_selected_by_device_source_and_time_is_what_comes(
        self, keep: Callable[..., Examples]
    ) -> None:
        now = NOW
        async with keep(clock=lambda: now) as examples:
            for at, device, source in ((0, "a", ""), (10, "b", "cam"), (20, "a", "cam")):
                now = NOW + at
                offer(examples, numbered(at), device=device, source=source)
            offer(examples, numbered(0), device="b")  # comes again, from another
            await settled(examples)
            for selection, numbers in (
                ({"device": "a"}, [0, 20]),
                ({"device": "b"}, [0, 10]),
                ({"source": ""}, [0]),
                ({"source": "cam", "since": NOW + 11}, [20]),
                ({"since": NOW + 10}, [0, 10, 20]),
                ({"until": NOW + 10}, [0]),
                ({"since": NOW + 10, "until": NOW + 20}, [10]),
            ):
                found, _ = await read(examples, **selection)
                assert numbers_of(found) == numbers

    async def test_the_quota_holds_and_the_oldest_of_the_largest_go_first(
        self, keep: Callable[..., Examples]
    ) -> None:
        now = NOW
        async with keep(clock=lambda: now) as examples:
            offer(examples, numbered(*range(10)), model="small")
            await settled(examples)
            (small,) = await examples.summary(None)
        async with keep(5 * small.bytes, clock=lambda: now) as examples:
            for at in range(100):
                now = NOW + at
                offer(examples, numbered(at))
                if at == 50:
                    offer(examples, numbered(0))  # it came again, so it is not old
                await settled(examples)
            kept = {one.model: one for one in await examples.summary(None)}
            assert kept["small"] == small  # whatever the chatty one does
            assert sum(one.bytes for one in kept.values()) <= 5 * small.bytes
            found, left_out = await read(examples)
            assert left_out == 0
            assert numbers_of(found) == list(map(float, range(60, 100)))
        async with keep(2 * small.bytes, clock=lambda: now) as examples:  # less than before
            await examples.tidy()
            held = sum(one.bytes for one in await examples.summary(None))
            assert 1.8 * small.bytes < held <= 2 * small.bytes
        async with keep(0) as examples:  # off: nothing new, and nothing goes
            await examples.tidy()
            assert not examples.accepting
            assert sum(one.bytes for one in await examples.summary(None)) == held

    async def test_what_has_not_come_for_long_goes(self, keep: Callable[..., Examples]) -> None:
        now = NOW
        async with keep(retention_s=100, clock=lambda: now) as examples:
            offer(examples, numbered(1, 2), device="a")
            now += 60
            offer(examples, numbered(2, 3), device="b")
            await settled(examples)
            now += 41  # what a sent is 101 s old, what b sent 41
            await examples.tidy()
            found, _ = await read(examples)
            assert numbers_of(found) == [2, 3]
            assert {one.facts.device for one in found} == {"b"}
            now += 100
            await examples.tidy()
            assert await examples.summary(None) == []

    async def test_a_certificate_and_what_devices_are_told_of_it_change_together(
        self, store: Store, tmp_path: Path
    ) -> None:
        def wanted(connection: Connection, model: str, number: int) -> WantedRelease:
            targets = named(connection, model, number, test_certificates.NOW)
            return WantedRelease(model, number, "1.0.0", "i", targets)

        await store.write(test_certificates.insert_releases)
        controller = Controller(store, wanted=wanted, telemetry=print, seen=lambda state: None)
        now = test_certificates.NOW
        repository = Repository(tmp_path, now=now, disk=test_certificates.QuickDisk())
        certificates = Certificates(store, repository, controller, clock=lambda: now)
        births = [pb.DeviceState(schema=1, device=n, online=True, boot=1) for n in ("a", "b")]
        await controller.commit([Arrival("default", one.device, one) for one in births])
        await controller.want(["a"], "digits", 2)
        good = test_certificates.GOOD

        async def generations() -> list[int]:
            return [one.generation for one in await controller.twins()]

        assert (await certificates.issue("digits", 2, good)).devices == ["a"]
        assert await generations() == [2, 0]
        assert (await certificates.issue("digits", 2, good)).devices == ()
        gone = await certificates.withdraw("digits", 2, good.id, reason="drift: \u00e9\0\ud800!")
        assert (gone.devices, gone.issued.reason) == (["a"], "drift: \u00e9  !")
        assert await generations() == [3, 0]
        assert (await certificates.issue("digits", 2, good)).devices == ["a"]
        for stranger in ("\0", "\ud800", "f" * 16):
            with pytest.raises(CertificateRefused, match="has no certificate"):
                await certificates.withdraw("digits", 2, stranger, reason="x")
        assert await generations() == [4, 0]
