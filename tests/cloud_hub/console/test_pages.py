import re
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from tests.cloud_hub.console.stage import Console, Figures, busy, device, empty


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def text(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/html"
        return await response.text()


async def test_the_page_is_complete_as_it_leaves_the_hub(session: aiohttp.ClientSession) -> None:
    async with Console().served() as console:
        page = await text(session, console.url)
    for said in ("82.3%", "camera", "4\N{NO-BREAK SPACE}min ago", "digits-hub", "not an ONNX file"):
        assert said in page
    assert page.count("<line-chart") == 3
    assert page.count('role="img"') == 3
    assert re.search(r'class="line" data-line d="M0,[\d.]+L', page)


async def test_the_page_has_nothing_inline_that_its_policy_forbids(
    session: aiohttp.ClientSession,
) -> None:
    async with Console().served() as console:
        page = await text(session, console.url)
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>([^<]*)<", page) == [""]


async def test_names_from_devices_are_text_and_never_markup(session: aiohttp.ClientSession) -> None:
    hostile = "<script>alert(1)</script>\"'"
    figures = replace(busy(), devices=[device(hostile)], degraded_reasons={hostile: 1})
    async with Console(Figures(figures)).served() as console:
        page = await text(session, console.url)
    assert "<script>alert" not in page
    assert "hub &lt;one&gt;" in page


async def test_an_empty_hub_shows_the_command_that_comes_next(
    session: aiohttp.ClientSession,
) -> None:
    async with Console(Figures(empty()), models=[]).served() as console:
        page = await text(session, console.url)
    assert "No device has reported yet" in page
    assert (
        "fogline-agent run --hub 127.0.0.1:8001 --bundle models/digits/bundles/digits-1.0.0" in page
    )
    assert "This hub serves no model" in page
    assert '<div data-flag="seen" hidden>' in page


@pytest.mark.parametrize("listening", ["0.0.0.0:8001", "[::]:8001"])
async def test_the_command_names_an_address_that_can_be_reached(
    session: aiohttp.ClientSession, listening: str
) -> None:
    async with Console(Figures(empty()), grpc_address=listening).served() as console:
        page = await text(session, console.url.replace("127.0.0.1", "localhost"))
    assert "--hub localhost:8001 " in page


@pytest.mark.parametrize("window_s", [60, 300, 900])
async def test_the_window_is_in_the_address(session: aiohttp.ClientSession, window_s: int) -> None:
    async with Console().served() as console:
        page = await text(session, f"{console.url}/?window={window_s}")
        assert console.fleet.asked == [float(window_s)]
    assert f'<a href="/?window={window_s}" aria-current="true">' in page
    assert f'data-parameters="window_s={window_s}"' in page


async def test_a_window_that_is_not_offered_gets_a_sentence(session: aiohttp.ClientSession) -> None:
    async with (
        Console().served() as console,
        session.get(f"{console.url}/?window=<b>") as response,
    ):
        assert response.status == 400
        page = await response.text()
    assert "window must be one of 60, 300, 900 seconds, got &#39;&lt;b&gt;&#39;." in page


async def test_scripts_and_styles_may_be_kept_for_good(session: aiohttp.ClientSession) -> None:
    async with Console().served() as console:
        page = await text(session, console.url)
        found = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
        assert {path.rsplit(".", 1)[1] for path in found} == {"css", "js", "svg"}
        imported = ["/live.js", "/page.js", "/line-chart.js"]
        folder = found[0].rsplit("/", 1)[0]
        for path in found + [folder + name for name in imported]:
            async with session.get(console.url + path) as response:
                assert response.status == 200, path
                assert "immutable" in response.headers["Cache-Control"]
                assert response.content_type in ("text/css", "text/javascript", "image/svg+xml")
        async with session.get(f"{console.url}/static/0000/page.js") as response:
            assert response.status == 404
        async with session.get(f"{console.url}/favicon.ico") as response:
            assert response.content_type == "image/svg+xml"
