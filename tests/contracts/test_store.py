"""SQLite and PostgreSQL keep the same promises."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy

from cloud_hub.errors import StoreFailed
from cloud_hub.store.store import Store
from tests import postgres
from tests.contracts.store import StoreContract

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with postgres.server() as url:
        yield url


class TestSqlite(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'hub.sqlite'}"


@postgres.needs_postgres
class TestPostgres(StoreContract):
    @pytest.fixture
    def url(self, server: str) -> str:
        """A database of the test's own."""
        name = f"hub{next(_numbers)}"
        admin = sqlalchemy.create_engine(
            server.replace("postgresql:", "postgresql+psycopg:").replace("DATABASE", "postgres"),
            isolation_level="AUTOCOMMIT",
        )
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        admin.dispose()
        return server.replace("DATABASE", name)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "nonsense"),
        ("postgresql://user:secret@/%zz?host=/nowhere", "cannot be opened"),
        ("other://user:secret@host/x", r"other://user:\*\*\*@host/x"),
    ],
)
async def test_a_database_that_cannot_be_opened_is_refused_without_its_password(
    url: str, said: str
) -> None:
    with pytest.raises(StoreFailed, match=said) as caught:
        await Store.open(url)
    assert "secret" not in str(caught.value)
