"""The store: what it says is written is written, and readers never see half of it."""

import asyncio
import signal
import sqlite3
import sys

import pytest
from sqlalchemy import insert, select, text

from cloud_hub.errors import StoreFailed
from cloud_hub.store import schema
from cloud_hub.store.store import Store

ROW = {
    "tenant": "default",
    "label": "",
    "created_at": 0.0,
    "expires_at": 1.0,
    "revoked": False,
}


def add(name):
    def work(connection):
        connection.execute(insert(schema.token), {**ROW, "id": name, "sha256": name})

    return work


def names(connection):
    return set(connection.execute(select(schema.token.c.id)).scalars())


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'hub.sqlite'}"


@pytest.fixture
async def store(url):
    store = await Store.open(url)
    yield store
    await store.close()


async def test_a_hub_with_nothing_to_migrate_does_not_import_what_migrates(url):
    program = """
import asyncio, sys
from cloud_hub.store.store import Store
async def main():
    for _ in ("new", "known"):
        await (await Store.open(sys.argv[1])).close()
asyncio.run(main())
assert "alembic" not in sys.modules
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, url)
    assert await process.wait() == 0


async def test_a_written_row_is_there_after_a_new_start(url):
    first = await Store.open(url)
    await first.write(add("a"))
    await first.close()
    second = await Store.open(url)
    assert await second.read(names) == {"a"}
    await second.close()


async def test_a_failing_change_leaves_nothing_behind(store):
    def half(connection):
        add("a")(connection)
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        await store.write(half)
    assert await store.read(names) == set()


async def test_readers_see_all_of_a_change_or_nothing(store):
    def pair(number):
        def work(connection):
            add(f"{number}a")(connection)
            add(f"{number}b")(connection)

        return work

    async def write():
        for number in range(50):
            await store.write(pair(number))

    writing = asyncio.create_task(write())
    while not writing.done():
        seen = await store.read(names)
        assert {n[:-1] for n in seen if n.endswith("a")} == {
            n[:-1] for n in seen if n.endswith("b")
        }
    await writing


async def test_a_caller_who_leaves_does_not_cut_a_change_in_two(store):
    task = asyncio.create_task(store.write(add("a")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.write(add("b"))
    assert await store.read(names) == {"a", "b"}


async def test_a_full_disk_is_named_and_what_was_written_stays(store):
    await store.write(add("before"))

    def much(connection):
        connection.execute(text("PRAGMA max_page_count=60"))
        for number in range(10_000):
            connection.execute(
                insert(schema.token),
                {**ROW, "id": str(number), "sha256": f"{number}", "label": "x" * 200},
            )

    with pytest.raises(StoreFailed, match="full"):
        await store.write(much)
    assert await store.read(names) == {"before"}


async def test_a_database_of_a_newer_version_is_refused_with_a_way_out(url, tmp_path):
    store = await Store.open(url)
    await store.close()
    with sqlite3.connect(tmp_path / "hub.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StoreFailed, match="newer fogline"):
        await Store.open(url)


@pytest.mark.parametrize("content", [b"this is no database" * 100])
async def test_a_file_that_is_no_database_is_refused(url, tmp_path, content):
    (tmp_path / "hub.sqlite").write_bytes(content)
    with pytest.raises(StoreFailed, match="cannot be opened"):
        await Store.open(url)


WRITER = """
import asyncio, sys
from sqlalchemy import insert
from cloud_hub.store import schema
from cloud_hub.store.store import Store
async def main():
    store = await Store.open(sys.argv[1])
    for number in range(100000):
        row = {"id": str(number), "sha256": str(number), "tenant": "t", "label": "", "created_at": 0.0,
               "expires_at": 0.0, "revoked": False}
        await store.write(lambda connection: connection.execute(insert(schema.token), row))
        print(number, flush=True)
asyncio.run(main())
"""


async def test_killing_a_writer_loses_no_acknowledged_change(url):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, url, stdout=asyncio.subprocess.PIPE
    )
    acknowledged = -1
    while acknowledged < 40:
        acknowledged = int(await asyncio.wait_for(process.stdout.readline(), 30))
    process.send_signal(signal.SIGKILL)
    for line in (await process.stdout.read()).split(b"\n")[:-1]:
        acknowledged = int(line)
    await process.wait()
    store = await Store.open(url)
    found = await store.read(names)
    assert {str(n) for n in range(acknowledged + 1)} <= found
    assert len(found) <= acknowledged + 2
    integrity = await store.read(lambda c: c.execute(text("PRAGMA integrity_check")).scalar())
    assert integrity == "ok"
    await store.close()


async def test_an_impossible_url_is_refused():
    with pytest.raises(StoreFailed):
        await Store.open("nonsense")
