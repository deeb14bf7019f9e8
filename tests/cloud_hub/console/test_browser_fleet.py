"""The pages of devices, models and deployments in a real Chromium."""

import re
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.console.browsing import POOR_CONTRAST, watched
from tests.cloud_hub.console.fleet_stage import Stage

pytestmark = pytest.mark.browser

SENTENCE = "Variant int8-qdq answers 4 of 32 golden inputs otherwise: the error is 11.3."
PATHS = (
    "/devices",
    "/devices?status=offline&q=gate",
    "/devices?q=nothing",
    "/devices/kiosk-1",
    "/models",
    "/models/digits",
    "/models/digits/2",
    "/models/digits/3",
    "/deploy?release=digits%403&to=all",
)


def standing(phase: str, *, wants: int = 3, runs: int = 1, **more: Any) -> pb.ReportedModel:
    return pb.ReportedModel(
        model="digits",
        desired_release=wants,
        active_release=runs,
        active_version=f"1.{runs - 1}.0",
        phase=phase,
        attempt=1,
        **more,
    )


def refused(beside: Stage, name: str) -> None:
    beside.do(beside.report([name], standing("self-test")))
    beside.do(
        beside.report(
            [name],
            standing(
                "rejected",
                code="self-test/deviation",
                sentence=SENTENCE,
                figures={"max_abs_error": 11.3},
            ),
        )
    )


def populate(beside: Stage) -> None:
    beside.do(beside.join("kiosk-1", "kiosk-2", runs=1))
    beside.do(beside.join("gate-1", runs=1, online=False))
    beside.do(beside.fleet.controller.want(["kiosk-1"], "digits", 3))
    beside.do(beside.published("kiosk-1", 1))
    refused(beside, "kiosk-1")


def live(page: Page) -> None:
    expect(page.locator("[data-live=live]")).to_be_visible()


def test_the_first_device_replaces_the_welcome_and_leads_to_its_page(
    visitor: BrowserContext, beside: Stage
) -> None:
    page = visitor.new_page()
    page.goto(f"{beside.url}/devices")
    live(page)
    expect(page.get_by_role("heading", name="No device yet")).to_be_visible()
    beside.do(beside.join("kiosk", runs=1))
    row = page.locator("[data-table=devices] tr")
    expect(row).to_have_count(1)
    expect(page.get_by_role("heading", name="No device yet")).to_be_hidden()
    expect(row.locator("[data-cell=status]")).to_have_attribute("data-word", "online")
    row.get_by_role("link", name="kiosk").click()
    expect(page.get_by_role("heading", name="kiosk", level=1)).to_be_visible()


def test_a_thousand_devices_are_paged_filtered_and_live(
    visitor: BrowserContext, beside: Stage
) -> None:
    beside.do(beside.join(*(f"kiosk-{i}" for i in range(1000)), runs=1))
    page = visitor.new_page()
    page.goto(f"{beside.url}/devices?size=200")
    live(page)
    rows = page.locator("[data-table=devices] tr")
    expect(rows).to_have_count(200)
    page.get_by_role("link", name="Next").click()
    expect(page.locator("[data-text=showing]")).to_have_text("201 to 400 of 1,000 devices")
    live(page)
    beside.do(beside.fleet.controller.want(["kiosk-250", "kiosk-999"], "digits", 2))
    changed = page.locator("[data-key=kiosk-250]")
    expect(changed.locator("[data-cell=update]")).to_have_text("Queued")
    expect(changed.locator("[data-cell=models]")).to_contain_text("@2")
    chip = page.get_by_role("link", name=re.compile("Queued 2"))
    expect(chip).to_be_visible()
    chip.click()
    expect(rows).to_have_count(2)
    page.get_by_label("Find devices").fill("999")
    page.keyboard.press("Enter")
    expect(rows).to_have_count(1)
    assert "update=queued" in page.url
    assert "q=999" in page.url
    page.get_by_role("link", name=re.compile("999.*remove")).click()
    expect(rows).to_have_count(2)


def test_an_update_that_fails_says_why_without_a_reload(
    visitor: BrowserContext, beside: Stage
) -> None:
    beside.do(beside.join("kiosk", runs=1))
    page = visitor.new_page()
    page.goto(f"{beside.url}/devices/kiosk")
    live(page)
    page.evaluate("window.sameDocument = true")
    beside.do(beside.fleet.controller.want(["kiosk"], "digits", 3))
    badge = page.locator(".standing [data-text=standing]")
    expect(badge).to_have_text("Queued")
    beside.do(beside.published("kiosk", 1))
    beside.do(
        beside.report(
            ["kiosk"], standing("downloading", bytes_done=1_000_000, bytes_total=4_000_000)
        )
    )
    progress = page.get_by_role("progressbar")
    expect(progress).to_have_js_property("value", 25)
    expect(page.locator("[data-cell=amount]")).to_contain_text("of 4.00")
    expect(page.locator("[data-table=failures] li")).to_have_count(0)
    refused(beside, "kiosk")
    problem = page.locator("[data-table=failures] li")
    expect(problem).to_contain_text("digits@3 was refused")
    expect(problem).to_contain_text(SENTENCE)
    expect(problem).to_contain_text("self-test/deviation")
    expect(problem).to_contain_text("It keeps running digits@1 (1.0.0).")
    expect(badge).to_have_attribute("data-word", "failed")
    expect(progress).to_be_hidden()
    events = page.locator("[data-table=events] tr [data-cell=phase]")
    expect(events).to_have_text(["Refused", "Self-test", "Downloading", "Committed"])
    expect(page.locator("[role=status]")).to_contain_text(SENTENCE)
    beside.do(beside.fleet.controller.want(["kiosk"], "digits", 2))
    beside.do(beside.published("kiosk", 2))
    beside.do(beside.report(["kiosk"], standing("committed", wants=2, runs=2)))
    expect(problem).to_have_count(0)
    expect(badge).to_have_text("Current")
    assert page.evaluate("window.sameDocument")


def test_a_release_is_deployed_to_all_and_followed_until_it_runs(
    visitor: BrowserContext, beside: Stage
) -> None:
    beside.do(beside.join("kiosk-1", "kiosk-2", runs=1))
    beside.do(beside.join("gate-1", runs=1, online=False))
    page = visitor.new_page()
    page.goto(f"{beside.url}/models")
    page.get_by_role("link", name="digits@2").click()
    expect(page.get_by_label("All 3 devices")).to_be_checked()
    page.get_by_role("button", name="Review").click()
    expect(page.get_by_role("heading", name="Deploy digits@2 to 3 devices?")).to_be_visible()
    expect(page.locator("main")).to_contain_text("1 device is offline now and will follow")
    assert beside.broker.desired == {}
    page.get_by_role("button", name="Deploy to 3 devices").click()
    page.wait_for_url("**/devices?wants=digits@2")
    live(page)
    updates = page.locator("[data-table=devices] [data-cell=update]")
    expect(updates).to_have_text(["Queued"] * 3)
    for name in ("kiosk-1", "kiosk-2", "gate-1"):
        beside.do(beside.published(name, 1))
        assert [release.version for release in beside.broker.desired[name].releases] == ["1.1.0"]
    beside.do(beside.report(["kiosk-1", "kiosk-2"], standing("committed", wants=2, runs=2)))
    expect(updates).to_have_text(["Queued", "Current", "Current"])


def test_one_device_is_chosen_and_a_forced_release_is_warned_about(
    visitor: BrowserContext, beside: Stage
) -> None:
    beside.do(beside.join("kiosk-1", "kiosk-2", runs=1))
    page = visitor.new_page()
    page.goto(f"{beside.url}/models/digits/3")
    expect(page.get_by_role("checkbox")).to_have_count(0)  # hidden: all devices are chosen
    page.get_by_label("These devices").check()
    page.get_by_label("kiosk-2").check()
    page.get_by_role("button", name="Review").click()
    expect(page.get_by_role("heading", name="Deploy digits@3 to 1 device?")).to_be_visible()
    expect(page.locator("main")).to_contain_text("was forced past the hub")
    page.get_by_role("link", name="Cancel").click()
    expect(page.get_by_role("heading", name="digits@3")).to_be_visible()
    assert beside.broker.desired == {}


def test_everything_works_without_javascript(chromium: Browser, beside: Stage) -> None:
    populate(beside)
    for context in watched(chromium.new_context(java_script_enabled=False)):
        page = context.new_page()
        page.goto(f"{beside.url}/devices")
        page.get_by_role("link", name="Failed 1").click()
        page.get_by_role("link", name="kiosk-1").click()
        expect(page.locator("main")).to_contain_text(SENTENCE)
        assert page.get_by_role("button", name="Pause").count() == 0
        page.get_by_label("Release").select_option("digits@2")
        page.get_by_role("button", name="Review").click()
        page.get_by_role("button", name="Deploy to 1 device").click()
        expect(page.locator("[data-key=kiosk-1]")).to_contain_text("@2")
        beside.do(beside.published("kiosk-1", 2))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable_in_light_and_dark(
    visitor: BrowserContext, beside: Stage, scheme: str
) -> None:
    populate(beside)
    page = visitor.new_page()
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for path in PATHS:
        page.goto(beside.url + path)
        found = page.evaluate(POOR_CONTRAST)
        assert found["seen"] > 10, path
        assert found["poor"] == [], path


@pytest.mark.parametrize("width", [320, 768, 1400])
def test_no_width_makes_a_page_scroll_sideways(
    visitor: BrowserContext, beside: Stage, width: int
) -> None:
    populate(beside)
    page = visitor.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    for path in PATHS:
        page.goto(beside.url + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_every_field_and_table_has_a_name(visitor: BrowserContext, beside: Stage) -> None:
    populate(beside)
    page = visitor.new_page()
    for path in PATHS:
        page.goto(beside.url + path)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input:not([type=hidden]), select, table")]
              .filter((e) => !(e.labels?.length || e.caption || e.ariaLabel))
              .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert nameless == [], path
        headings = page.locator("h1").count()
        assert headings == 1, path
