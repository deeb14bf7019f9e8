import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientWebSocketResponse, web

from cloud_hub.console.api import BadParameter
from cloud_hub.console.live import SIGNED_OUT, Live, Tab
from tests.cloud_hub.console.stage import TOKEN, Console, only_the_right_token


class Counting:
    """A topic that counts how often each of its values was computed."""

    def __init__(self, padding: int = 0) -> None:
        self.computed: dict[int, int] = {}
        self.refreshed: set[int] = set()
        self._padding = "x" * padding

    def parameters(self, given: Mapping[str, Any]) -> Hashable:
        if not isinstance(given.get("n"), int):
            raise BadParameter("n must be a whole number")
        return int(given["n"])

    async def refresh(self, parameters: Collection[Any]) -> None:
        self.refreshed = set(parameters)

    def value(self, parameters: Any) -> Any:
        self.computed[parameters] = self.computed.get(parameters, 0) + 1
        return {"n": parameters, "tick": self.computed[parameters], "padding": self._padding}


class Failing(Counting):
    def value(self, parameters: Any) -> Any:
        if super().value(parameters)["tick"] > 2:
            raise ZeroDivisionError("a bug")
        return {}


@asynccontextmanager
async def serving(
    topic: Counting, period_s: float = 0.02, admitted: Callable[[], bool] = lambda: True
) -> AsyncIterator[tuple[Live, str]]:
    async def admits(_request: web.Request) -> bool:
        return admitted()

    live = Live({"count": topic}, build="b1", admits=admits, period_s=period_s)
    app = web.Application()
    app.router.add_get("/live", live.serve)
    app.on_shutdown.append(live.close)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=30.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield live, f"http://127.0.0.1:{runner.addresses[0][1]}/live"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def tab(url: str, **subscription: Any) -> AsyncIterator[ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        assert await socket.receive_json(timeout=5) == {"hello": {"build": "b1"}}
        if subscription:
            await socket.send_json({"sub": {"count": subscription}})
        yield socket


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


async def value(socket: ClientWebSocketResponse) -> Any:
    message = await socket.receive_json(timeout=5)
    assert message["topic"] == "count", message
    return message["value"]


async def test_a_tab_gets_a_value_at_once_and_then_every_period() -> None:
    async with serving(Counting()) as (_, url), tab(url, n=1) as socket:
        ticks = [(await value(socket))["tick"] for _ in range(4)]
    assert ticks == sorted(set(ticks))


async def test_tabs_that_want_the_same_share_one_computation() -> None:
    topic = Counting()
    async with (
        serving(topic, period_s=60) as (live, url),
        tab(url, n=1) as one,
        tab(url, n=1) as two,
        tab(url, n=2) as other,
    ):
        assert await value(one) == await value(two)
        assert (await value(other))["n"] == 2
        assert topic.computed == {1: 1, 2: 1}
        live.publish()
        assert (await value(one))["tick"] == (await value(two))["tick"] == 2
        assert topic.computed == {1: 2, 2: 2}


async def test_nothing_is_computed_while_nobody_watches() -> None:
    topic = Counting()
    async with serving(topic) as (live, url):
        async with tab(url, n=1) as socket:
            await value(socket)
            await socket.send_json({"sub": {}})
            await eventually(lambda: live.idle)
            before = dict(topic.computed)
            live.publish()
            assert topic.computed == before
            await socket.send_json({"sub": {"count": {"n": 1}}})
            while (await value(socket))["tick"] <= before[1]:  # what was on the way
                pass
        await eventually(lambda: len(live) == 0 and live.idle)


async def test_a_newer_value_replaces_one_that_was_not_sent() -> None:
    slow = Tab()
    for tick in range(100):
        slow.offer("count", str(tick))
    slow.offer("other", "x")
    assert await slow.take() == ["99", "x"]


async def test_a_tab_that_does_not_read_is_skipped_and_does_not_hold_up_others() -> None:
    topic = Counting(padding=1_000_000)
    async with serving(topic) as (live, url):
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        message = json.dumps({"sub": {"count": {"n": 7}}}).encode()
        writer.write(
            b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            + bytes([0x81, 0x80 | len(message), 0, 0, 0, 0])
            + message
        )
        await eventually(lambda: topic.computed.get(7, 0) > 20)
        async with tab(url, n=1) as reader:
            first = (await value(reader))["tick"]
            while (await value(reader))["tick"] < first + 5:
                pass
        began = time.monotonic()
        await live.close()
        await eventually(lambda: len(live) == 0)
        assert time.monotonic() - began < 3
        writer.close()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ("{", "not JSON"),
        ("[" * 3000, "not JSON"),
        ("[]", 'expected {"sub"'),
        ('{"sub": 3}', 'expected {"sub"'),
        ('{"sub": {"nothing": {}}}', "there is no topic 'nothing', there is count"),
        ('{"sub": {"count": []}}', "the parameters of count must be an object"),
        ('{"sub": {"count": {"n": "x"}}}', "n must be a whole number"),
    ],
)
async def test_a_message_that_makes_no_sense_gets_a_sentence_and_the_tab_lives(
    sent: str, said: str
) -> None:
    async with serving(Counting()) as (_, url), tab(url) as socket:
        await socket.send_str(sent)
        assert said in (await socket.receive_json(timeout=5))["error"]
        await socket.send_json({"sub": {"count": {"n": 1}}})
        assert (await value(socket))["n"] == 1


async def test_bytes_are_refused_and_too_long_a_message_ends_the_tab() -> None:
    async with serving(Counting()) as (live, url):
        async with tab(url) as socket:
            await socket.send_bytes(b"x")
            assert "send text" in (await socket.receive_json(timeout=5))["error"]
            await socket.send_str("x" * 100_000)
            assert (await socket.receive(timeout=5)).type is aiohttp.WSMsgType.CLOSE
        await eventually(lambda: len(live) == 0)


async def test_stopping_closes_every_tab_at_once() -> None:
    async def watch(socket: ClientWebSocketResponse) -> int | None:
        async for message in socket:
            assert message.type is aiohttp.WSMsgType.TEXT
        return socket.close_code

    async with aiohttp.ClientSession() as session:
        async with serving(Counting()) as (live, url):
            sockets = [await session.ws_connect(url) for _ in range(5)]
            for socket in sockets:
                await socket.send_json({"sub": {"count": {"n": 1}}})
            tabs = asyncio.gather(*map(watch, sockets))
            await eventually(lambda: not live.idle)
            began = time.monotonic()
        assert time.monotonic() - began < 3  # shutdown_timeout is 30
        assert await tabs == [1001] * 5


async def test_a_bug_in_a_topic_ends_the_tabs_instead_of_leaving_them_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(Failing()) as (_, url), tab(url, n=1) as socket:
        async for message in socket:
            assert message.type is aiohttp.WSMsgType.TEXT
        assert socket.close_code == 1011
    assert "live figures failed" in caplog.text


async def test_who_may_no_longer_read_is_told_by_the_close_code() -> None:
    allowed = [True]
    async with serving(Counting(), admitted=lambda: allowed[0]) as (_, url):
        async with tab(url, n=1) as socket:
            await value(socket)
            allowed[0] = False
            async with asyncio.timeout(10):
                async for message in socket:
                    assert message.type is aiohttp.WSMsgType.TEXT
            assert socket.close_code == SIGNED_OUT
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            assert (await socket.receive(timeout=5)).type is aiohttp.WSMsgType.CLOSE
            assert socket.close_code == SIGNED_OUT


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
async def test_a_page_of_another_site_may_not_watch(origin: str) -> None:
    async with Console().served() as console, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{console.url}/api/v1/live", origin=origin)
        assert refused.value.status == 403
        async with session.ws_connect(f"{console.url}/api/v1/live", origin=console.url) as socket:
            assert "hello" in await socket.receive_json(timeout=5)


async def test_the_overview_is_watched_with_its_window() -> None:
    async with (
        Console(authenticate=only_the_right_token).served() as console,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.ws_connect(f"{console.url}/api/v1/live") as socket,
    ):
        await socket.receive_json(timeout=5)
        await socket.send_json({"sub": {"overview": {"window_s": True}}})
        assert "window_s must be" in (await socket.receive_json(timeout=5))["error"]
        await socket.send_json({"sub": {"overview": {"window": 60}}})
        assert "no parameter 'window'" in (await socket.receive_json(timeout=5))["error"]
        await socket.send_json({"sub": {"overview": {"window_s": 60}}})
        message = await socket.receive_json(timeout=5)
    assert message["value"]["text"]["share_edge"] == "82.3%"
    assert message["value"]["tables"]["devices"][0]["cells"]["state"] == {
        "text": "Offline",
        "at": "",
    }
    assert console.fleet.asked[0] == 60.0


async def test_without_an_upgrade_the_address_says_what_it_speaks() -> None:
    async with (
        Console().served() as console,
        aiohttp.ClientSession() as session,
        session.get(f"{console.url}/api/v1/live") as response,
    ):
        assert response.status == 426
        assert "WebSocket" in await response.text()
