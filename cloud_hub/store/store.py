"""The database: one writer, many readers.

Every change is one function over a connection, run as one transaction on the one writer
thread. So nothing in the hub ever waits for a lock that it holds itself, and what a caller
was told is written, is: SQLite runs with ``synchronous=FULL``.

On SQLite and on PostgreSQL alike, a change excludes every other writer from its first statement
on, also those of other processes, and one call of ``read`` sees one moment of the database.
"""

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import Connection, Engine, event, insert, select
from sqlalchemy.exc import DBAPIError

from cloud_hub.errors import StoreFailed
from cloud_hub.store import schema

T = TypeVar("T")
Work = Callable[[Connection], T]

MIGRATIONS = Path(__file__).with_name("migrations")
READERS = 4
_WRITERS_LOCK = 0x666F676C  # any number that nobody else takes on this PostgreSQL


class Store:
    """One open database. ``await Store.open(url)``; used from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")

    @classmethod
    async def open(cls, url: str) -> "Store":
        """Open the database and bring its schema up to date.

        Raises:
            StoreFailed: it cannot be opened, or a newer version of fogline has used it.
        """
        engine = _engine(url)
        try:
            await asyncio.to_thread(_migrate, engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    async def write(self, work: Work[T]) -> T:
        """Run ``work`` in one transaction on the writer thread and return its result.

        When this returns, the change is on the disk; when it raises, nothing of it is.

        Raises:
            StoreFailed: the database cannot take it: a full disk, a lost file.
        """
        return await self._run(self._writer, self._in_transaction, work)

    async def read(self, work: Work[T]) -> T:
        """Run ``work``, which changes nothing, on a reader thread and return its result.

        Raises:
            StoreFailed: the database cannot be read.
        """
        return await self._run(self._readers, self._in_snapshot, work)

    async def close(self) -> None:
        """Finish what was begun and close."""
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._readers.shutdown)
        self._engine.dispose()

    async def _run(self, pool: ThreadPoolExecutor, run: Callable[[Work[T]], T], work: Work[T]) -> T:
        try:
            # A caller who leaves must not cut a transaction in two: the thread finishes it.
            return await asyncio.get_running_loop().run_in_executor(pool, run, work)
        except DBAPIError as error:
            raise StoreFailed(f"the database refused: {error.orig}") from error

    def _in_transaction(self, work: Work[T]) -> T:
        with _writing(self._engine) as connection:
            return work(connection)

    def _in_snapshot(self, work: Work[T]) -> T:
        with self._engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            return work(connection)


@contextlib.contextmanager
def _writing(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        connection.execution_options(fogline_writes=True)
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITERS_LOCK})")
            yield connection


def _engine(url: str) -> Engine:
    try:
        parsed = sqlalchemy.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        # A server may have been restarted while a connection rested: look before it is used.
        engine = sqlalchemy.create_engine(
            parsed, pool_pre_ping=parsed.drivername.startswith("postgresql")
        )
    except ModuleNotFoundError as error:
        raise StoreFailed(f"{error.name} is missing: pip install 'fogline[postgres]'") from None
    except sqlalchemy.exc.ArgumentError as error:
        raise StoreFailed(f"database {_without_password(url)!r}: {error}") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _without_password(url: str) -> str:
    return re.sub(r"//([^:/@]*):.*@", r"//\1:***@", url)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, see below
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # with NORMAL a power cut may take the last commits back
        "foreign_keys=ON",
        "busy_timeout=10000",  # the CLI writes beside a running hub
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that begins as a reader cannot always become a writer later.
    writes = connection.get_execution_options().get("fogline_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


_migrating = threading.Lock()  # alembic keeps its context in a module


def _migrate(engine: Engine) -> None:
    try:
        with _migrating, _writing(engine) as connection:
            if not sqlalchemy.inspect(connection).has_table(schema.version.name):
                # A new database: what the migrations would come to, in one step.
                for tables in (schema.version.metadata, schema.metadata):
                    tables.create_all(connection, checkfirst=False)
                connection.execute(insert(schema.version).values(version_num=schema.REVISION))
                return
            found = connection.execute(select(schema.version.c.version_num)).scalar_one_or_none()
            if found != schema.REVISION:
                _upgrade(connection, found)
    except DBAPIError as error:
        raise StoreFailed(f"the database cannot be opened: {error.orig}") from None


def _upgrade(connection: Connection, found: str | None) -> None:
    # Here: they take a tenth of a second and of the hub's memory, and are seldom needed.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StoreFailed(
            f"the database is at revision {found}, which a newer fogline made: "
            "upgrade this one, or start on another data directory"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
