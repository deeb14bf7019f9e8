import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import api
from cloud_hub.console.app import add_console
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.insight.examples import Examples
from cloud_hub.insight.history import History, Overview
from cloud_hub.store.store import Store
from fogline_protocol.v1.fleet_pb2 import Telemetry
from tests.cloud_hub.console.stage import NOBODY, NOW, Console


@pytest.fixture
async def console() -> AsyncIterator[Console]:
    async with Console().served() as served:
        yield served


async def get(url: str) -> tuple[int, str, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, response.content_type, await response.json(content_type=None)


async def test_the_api_has_the_fields_of_the_overview(console: Console) -> None:
    status, _, found = await get(f"{console.url}/api/v1/overview?window_s=60")
    assert status == 200
    assert list(found) == list(Overview.__slots__)
    assert console.fleet.asked == [60.0]
    assert found["window_s"] == 60.0
    assert found["latency_ms"]["edge"]["p95"] == 0.52
    assert found["devices"][2]["online"] is False
    assert found["series"]["p95_ms_hub"][42] is None


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("window_s=soon", "got 'soon'"),
        ("window_s=", "got ''"),
        ("window_s=nan", "got nan"),
        ("window_s=-5", "got -5"),
        ("window_s=1e9", "from 10 to 900"),
        ("window_s=60&window_s=300", "twice"),
        ("windows=60", "'windows' is no parameter"),
    ],
)
async def test_a_bad_parameter_gets_a_sentence(console: Console, query: str, said: str) -> None:
    status, content_type, found = await get(f"{console.url}/api/v1/overview?{query}")
    assert (status, content_type) == (400, "application/problem+json")
    assert found["status"] == 400
    assert said in found["detail"]
    assert console.fleet.asked == []


@given(st.text() | st.floats() | st.integers() | st.booleans() | st.none() | st.lists(st.none()))
def test_a_window_is_a_number_in_range_or_refused(value: object) -> None:
    try:
        window_s = api.window_s(value)
    except api.BadParameter as error:
        assert "window_s must be a number from 10 to 900" in str(error)  # noqa: PT017
    else:
        assert math.isfinite(window_s)
        assert api.SHORTEST_WINDOW_S <= window_s <= 900


async def test_the_real_history_is_understood(tmp_path: Path) -> None:
    store = await Store.open(f"sqlite:///{tmp_path / 'hub.sqlite'}")
    devices = await Devices.open(store, 30.0)
    history = await History.open(store, devices)
    try:
        report = Telemetry(device="camera", boot_id="b", sequence=1, agent_version="0.1.0")
        model = report.models.add(model="digits", release="1")
        model.outcomes.add(tier="edge", quality="certified", reason="score", rows=3)
        history.accept(report, NOW)
        app = web.Application()
        add_console(
            app,
            history=history,
            devices=devices,
            examples=cast(Examples, NOBODY),
            fleet=cast(Fleet, NOBODY),  # asked by fleet_api.py only, which has tests of its own
            scratch=Path(),
            models=lambda: [],
            authenticate=None,
            hub_name="hub",
            grpc_address="127.0.0.1:8001",
            clock=lambda: NOW,
        )
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            _, _, found = await get(f"{url}/api/v1/overview")
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                page = await response.text()
        finally:
            await runner.cleanup()
    finally:
        await history.close()
        await store.close()
    assert (found["rows"], found["share_edge"]) == (3, 1.0)
    assert found["devices"][0]["name"] == "camera"
    assert ">camera</a></th>" in page
