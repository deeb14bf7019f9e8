from collections.abc import AsyncIterator

import pytest

from tests.fakes import FakeHub, Serving


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
async def door(hub: FakeHub) -> AsyncIterator[Serving]:
    """The fake hub behind a real gRPC door."""
    async with Serving(hub) as serving:
        yield serving
