"""The pages in a real Chromium: live figures, lost hubs, no scripts, eight tabs, keyboard, contrast."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    WebSocketRoute,
    expect,
)

from cloud_hub.insight.history import Overview
from tests.cloud_hub.console.browsing import POOR_CONTRAST, POOR_SHAPES, watched
from tests.cloud_hub.console.stage import (
    BROKEN,
    TOKEN,
    Console,
    Figures,
    busy,
    device,
    empty,
    only_the_right_token,
)

pytestmark = pytest.mark.browser


@pytest.fixture
def console() -> Iterator[Console]:
    with Console().served_beside() as served:
        yield served


def figure(page: Page, name: str) -> str:
    return page.locator(f"[data-text={name}]").first.inner_text()


def test_figures_appear_and_change_without_a_reload(
    visitor: BrowserContext, console: Console
) -> None:
    page = visitor.new_page()
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_contain_text("Live")
    expect(page.locator("[data-text=requests]")).to_have_text("25.0")
    page.evaluate("window.sameDocument = true")
    before = page.locator("[data-chart=requests] [data-series=edge] [data-line]").get_attribute("d")
    figures = busy()
    console.fleet.figures = replace(
        figures,
        requests_per_s=31.5,
        devices=[device("camera", online=False), device("<b>new</b>")],
        agents_online=1,
        agents_seen=2,
        share_edge=0.5,
        series=replace(figures.series, requests_per_s_edge=[float(i) for i in range(60)]),
    )
    console.models.remove(BROKEN)
    expect(page.locator("[data-text=requests]")).to_have_text("31.5")
    rows = page.locator("[data-table=devices] tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("camera")
    expect(rows.nth(0)).to_have_attribute("data-state", "offline")
    expect(rows.nth(0)).to_contain_text("Offline")
    expect(rows.nth(1).locator("th")).to_have_text("<b>new</b>")
    expect(page.locator("[data-table=models] tr")).to_have_count(1)
    expect(page.locator("[data-shape=split_hub]")).to_have_attribute("width", "500.0")
    after = page.locator("[data-chart=requests] [data-series=edge] [data-line]").get_attribute("d")
    assert after != before
    assert page.evaluate("window.sameDocument")


def test_a_lost_hub_is_told_and_its_return_needs_no_reload(visitor: BrowserContext) -> None:
    console = Console()
    page = visitor.new_page()
    with console.served_beside():
        page.goto(console.url)
        expect(page.locator("[data-live=live]")).to_be_visible()
    expect(page.locator("[data-live=reconnecting]")).to_contain_text("Reconnecting")
    expect(page.locator("[role=status]")).to_have_text("Reconnecting.")
    assert figure(page, "requests") == "25.0"  # last known, and greyed
    assert "grayscale" in page.locator("[data-figures]").evaluate("e => getComputedStyle(e).filter")
    console.fleet.figures = replace(busy(), requests_per_s=77.0)
    with console.served_beside():
        expect(page.locator("[data-live=live]")).to_be_visible()
        expect(page.locator("[data-text=requests]")).to_have_text("77.0")
        expect(page.locator("[role=status]")).to_contain_text("Live. 2 of 3 devices online.")


def test_a_hub_that_falls_silent_counts_as_lost(visitor: BrowserContext) -> None:
    # The network takes the messages and says nothing, as it does when a cable is pulled.
    page = visitor.new_page()
    page.clock.install()
    silent: list[bool] = []
    page.route_web_socket(
        re.compile("/api/v1/live$"),
        lambda socket: _forward_until(socket, silent),
    )
    with Console().served_beside() as console:
        page.goto(console.url)
        expect(page.locator("[data-live=live]")).to_be_visible()
        silent.append(True)
        page.clock.run_for(7_000)
        expect(page.locator("[data-live=reconnecting]")).to_be_visible()
        silent.clear()
        page.clock.run_for(7_000)
        expect(page.locator("[data-live=live]")).to_be_visible()


def _forward_until(socket: WebSocketRoute, silent: list[bool]) -> None:
    server = socket.connect_to_server()
    server.on_message(lambda message: None if silent else socket.send(message))


def test_a_page_can_be_paused_and_resumed(visitor: BrowserContext, console: Console) -> None:
    page = visitor.new_page()
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("[data-live=paused]")).to_contain_text("Paused")
    page.wait_for_function(
        "() => /[1-9]\\d* s/.test(document.querySelector('[data-live]').innerText)"
    )
    console.fleet.figures = replace(busy(), requests_per_s=99.0)
    asked = len(console.fleet.asked)
    page.wait_for_function(
        "() => /[3-9]\\d* s/.test(document.querySelector('[data-live]').innerText)"
    )
    assert figure(page, "requests") == "25.0"
    assert len(console.fleet.asked) <= asked + 1  # nobody watches, so nothing is computed
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("[data-text=requests]")).to_have_text("99.0")
    expect(page.locator("[data-live=live]")).to_be_visible()


def test_the_page_reads_without_javascript(chromium: Browser, console: Console) -> None:
    for context in watched(chromium.new_context(java_script_enabled=False)):
        page = context.new_page()
        page.goto(console.url)
        expect(page.locator("body")).to_contain_text("82.3%")
        expect(page.get_by_role("img")).to_have_count(3)
        expect(page.locator("[data-table=devices] tr")).to_have_count(3)
        expect(page.locator("[data-live]")).to_contain_text("As of 14:13:20 UTC")
        assert page.get_by_role("button").count() == 0  # none that would do nothing
        page.get_by_text("Show as table").first.click()
        expect(page.locator("[data-points] tr").first).to_be_visible()
        page.get_by_role("link", name="15 min").click()
        expect(page.locator("[aria-current=true]")).to_have_text("15 min")
        assert page.url.endswith("?window=900")


def test_eight_tabs_are_live_at_once(visitor: BrowserContext, console: Console) -> None:
    pages = [visitor.new_page() for _ in range(8)]
    for page in pages:
        page.goto(console.url)
    console.fleet.figures = replace(busy(), requests_per_s=42.5)
    for page in pages:
        expect(page.locator("[data-live=live]")).to_be_visible()
        expect(page.locator("[data-text=requests]")).to_have_text("42.5")


def test_the_first_device_replaces_the_welcome(visitor: BrowserContext) -> None:
    with Console(Figures(empty())).served_beside() as console:
        page = visitor.new_page()
        page.goto(console.url)
        expect(page.get_by_role("heading", name="No device has reported yet")).to_be_visible()
        expect(page.locator("[data-command]")).to_contain_text("fogline-agent run --hub")
        expect(page.locator("[data-table=devices]")).to_be_hidden()
        console.fleet.figures = busy()
        expect(page.locator("[data-table=devices]")).to_be_visible()
        expect(page.get_by_role("heading", name="No device has reported yet")).to_be_hidden()


def test_a_chart_reads_out_the_point_under_the_pointer(
    visitor: BrowserContext, console: Console
) -> None:
    page = visitor.new_page()
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_be_visible()
    chart = page.locator("[data-chart=latency]")
    hub = chart.locator("li[data-series=hub] b")
    expect(hub).to_have_text("9.00\N{NO-BREAK SPACE}ms")
    box = chart.locator("svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 43 / 59, box["y"] + 20)  # in the gap
    expect(hub).to_have_text("\N{EN DASH}")
    expect(chart.locator("[data-moment]")).to_contain_text("UTC")
    page.mouse.move(5, 5)
    expect(hub).to_have_text("9.00\N{NO-BREAK SPACE}ms")


def test_the_table_below_a_chart_is_live_while_it_is_open(
    visitor: BrowserContext, console: Console
) -> None:
    page = visitor.new_page()
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_be_visible()
    chart = page.locator("[data-chart=requests]")
    chart.locator("summary").click()
    newest = chart.locator("[data-points] tr").first
    expect(newest.locator("td").first).to_have_text("24.0/s")
    series = replace(busy().series, requests_per_s_edge=[3.0] * 60)
    console.fleet.figures = replace(busy(), series=series)
    expect(newest.locator("td").first).to_have_text("3.0/s")
    expect(chart.locator("[data-points] tr")).to_have_count(60)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("figures", [busy, empty])
def test_text_and_shapes_are_readable_in_light_and_dark(
    visitor: BrowserContext,
    scheme: str,
    figures: Callable[[], Overview],
) -> None:
    with Console(Figures(figures())).served_beside() as console:
        page = visitor.new_page()
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.goto(console.url)
        expect(page.locator("[data-live=live]")).to_be_visible()
        found = page.evaluate(POOR_CONTRAST)
        assert found["seen"] > 15
        assert found["poor"] == []
        assert page.evaluate(POOR_SHAPES) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


def test_the_keyboard_reaches_everything(visitor: BrowserContext, console: Console) -> None:
    page = visitor.new_page()
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_be_visible()
    wanted = page.evaluate(
        """() => {
          const all = document.querySelectorAll("a, button, summary, input, [tabindex='0']");
          window.wanted = [...all].filter((e) => e.checkVisibility());
          return window.wanted.length;
        }"""
    )
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("window.wanted.indexOf(document.activeElement)"))
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined == "solid" or page.evaluate("document.activeElement === document.body")
    assert reached - {-1} == set(range(wanted))
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Enter")
    expect(page.locator("[data-live=paused]")).to_be_visible()


def test_nothing_moves_for_those_who_asked_for_it(
    visitor: BrowserContext, console: Console
) -> None:
    page = visitor.new_page()
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_be_visible()
    beat = "getComputedStyle(document.querySelector('.pulse')).animationName"
    page.wait_for_function(f"{beat}.startsWith('beat')")
    page.emulate_media(reduced_motion="reduce")
    page.wait_for_function(f"{beat} === 'none'")


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 2200])
def test_no_width_makes_the_page_scroll_sideways(
    visitor: BrowserContext, console: Console, width: int
) -> None:
    page = visitor.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(console.url)
    expect(page.locator("[data-live=live]")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_signing_in_shows_the_page_and_a_restarted_hub_asks_again(visitor: BrowserContext) -> None:
    console = Console(authenticate=only_the_right_token)
    page = visitor.new_page()
    with console.served_beside():
        page.goto(f"{console.url}/?window=60")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator("[data-live=live]")).to_be_visible()
        assert page.url == f"{console.url}/?window=60"
        assert page.evaluate("document.cookie") == ""
    expect(page.locator("[data-live=reconnecting]")).to_be_visible()
    with console.served_beside():  # sessions live in memory
        expect(page.get_by_label("Token")).to_be_visible()
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("[data-live=live]")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
