"""The pages of a release with everything the workshop makes, in a real Chromium."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from fogline_protocol.release import Parent
from tests.cloud_hub.console import workshop
from tests.cloud_hub.console.browsing import POOR_CONTRAST, watched
from tests.cloud_hub.console.fleet_stage import Stage, answers

pytestmark = pytest.mark.browser

CARD = "# digits 1.3.0\n\nA *card*.\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n> quoted\n"
HOSTILE = """<!doctype html><meta charset="utf-8"><title>Report</title>
<script>document.title = "ran"; fetch("/api/v1/deployments", {method: "POST"})</script>
<meta http-equiv="refresh" content="0; url=http://127.0.0.1:9/left">
<link rel="stylesheet" href="/static/0/console.css">
<img src="/favicon.ico" onerror="document.title = 'ran'">
<iframe src="/devices"></iframe>
<svg><script>document.title = "ran"</script></svg>
<form action="/deploy" method="get"><input name="release" value="digits@1"><button>Go</button></form>
<p id="said">It can only be read.</p>
"""


def a_child(beside: Stage, folder: Path, digits: Path, page: str = workshop.PAGE) -> None:
    """Let digits@4 be accepted, made from digits@2, and run somewhere."""
    parent = beside.do(beside.fleet.releases.show("digits", 2))
    made = workshop.bundle(
        folder, digits, parent=Parent("1.1.0", parent.bundle_sha256), page=page, card=CARD
    )
    beside.do(beside.fleet.releases.accept(made))
    aside = "int8-qdq on CPUExecutionProvider: no certificate was issued for it"
    beside.do(beside.join("kiosk-1", runs=4, version="1.3.0", serving=answers()))
    instead = answers("fp32", aside=aside)
    beside.do(beside.join("kiosk-2", runs=4, version="1.3.0", serving=instead))


def test_a_release_leads_to_its_report_its_parent_and_its_devices(
    chromium: Browser, beside: Stage, digits: Path, tmp_path: Path
) -> None:
    a_child(beside, tmp_path / "b", digits)
    for context in watched(chromium.new_context(java_script_enabled=False)):
        page = context.new_page()
        page.goto(f"{beside.url}/models")
        page.get_by_role("link", name="digits@4").click()
        expect(page.get_by_role("row", name=re.compile("fp16.*Refused"))).to_be_visible()
        expect(page.get_by_text("fp16 refused: loses 3.1 points")).to_be_visible()
        page.get_by_role("link", name="The workshop's report").click()
        heading = page.get_by_role("heading", name="A report of \N{SNOWMAN}")
        expect(heading).to_have_css("color", "rgb(1, 2, 3)")  # its own styles hold
        page.go_back()
        page.locator(".lineage").get_by_role("link", name="digits@2").click()
        expect(page.get_by_role("heading", name="digits@2", level=1)).to_be_visible()
        page.locator(".lineage").get_by_role("link", name="digits@4").click()
        page.get_by_role("link", name="2 devices").click()
        expect(page.locator("[data-table=devices] tr")).to_have_count(2)


def test_a_fallback_leads_from_the_models_to_the_device_and_its_reason(
    visitor: BrowserContext, beside: Stage, digits: Path, tmp_path: Path
) -> None:
    a_child(beside, tmp_path / "b", digits)
    page = visitor.new_page()
    page.goto(f"{beside.url}/models")
    page.get_by_role("link", name="int8-qdq 1").click()
    rows = page.locator("[data-table=devices] tr")
    expect(rows).to_have_count(1)
    expect(rows.locator("[data-cell=models]")).to_have_text("digits@4 int8-qdq")
    page.get_by_role("link", name="answers with int8-qdq").click()
    expect(rows).to_have_count(2)
    page.get_by_role("link", name=re.compile("Fallback 1")).click()
    expect(rows.locator("[data-cell=models]")).to_have_text(["digits@4 fp32 (not int8-qdq)"])
    page.goto(f"{beside.url}/models/digits/4")
    expect(page.get_by_text("1 device answers with fp32 instead of int8-qdq")).to_be_visible()
    page.get_by_role("listitem").get_by_role("link", name="kiosk-2").click()
    card = page.locator("article.model")
    expect(card.locator("[data-cell=variant]")).to_have_text("fp32 (not int8-qdq)")
    expect(card.locator("[data-cell=aside]")).to_contain_text("no certificate was issued for it")
    # What answers changes by itself, and so does the page.
    beside.do(beside.join("kiosk-2", runs=4, version="1.3.0", serving=answers()))
    expect(card.locator("[data-cell=variant]")).to_have_text("int8-qdq")
    expect(card.locator("[data-cell=aside]")).to_be_hidden()
    told = page.locator("[data-table=events] [data-cell=sentence]").first
    expect(told).to_have_text("answers with int8-qdq on CPUExecutionProvider now")


def test_a_certificate_is_withdrawn_for_a_reason(
    chromium: Browser, visitor: BrowserContext, beside: Stage
) -> None:
    issued = beside.do(beside.fleet.certificates.list("digits", 2))
    held = next(one for one in issued if one.certificate.variant == "int8-qdq")
    beside.do(beside.join("kiosk", runs=2, serving=answers(certificate=held.id)))
    path = f"{beside.url}/models/digits/2"
    page = visitor.new_page()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.goto(f"{path}/certificates/{held.id}/withdraw")
        assert page.evaluate(POOR_CONTRAST)["poor"] == []
    for width in (320, 768, 1400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for context in watched(chromium.new_context(java_script_enabled=False)):
        page = context.new_page()
        page.goto(path)
        page.get_by_role("link", name=f"Withdraw {held.id}").click()
        expect(page.get_by_role("heading", name=f"Withdraw {held.id}?")).to_be_visible()
        expect(page.get_by_text("1 device answers under it now.")).to_be_visible()
        page.get_by_label("Reason").fill("drift at the gate")
        page.get_by_role("button", name="Withdraw").click()
        expect(page.get_by_text("Withdrawn: drift at the gate")).to_be_visible()
        expect(page.get_by_role("link", name=f"Withdraw {held.id}")).to_have_count(0)


def test_a_hostile_report_runs_sends_and_fetches_nothing(
    chromium: Browser, beside: Stage, digits: Path, tmp_path: Path
) -> None:
    a_child(beside, tmp_path / "b", digits, HOSTILE)
    answered: list[str] = []
    context = chromium.new_context()
    # Not watched: the browser complains about everything that it keeps the page from doing.
    context.on("response", lambda response: answered.append(response.url))
    page = context.new_page()
    path = f"{beside.url}/models/digits/4/report.html"
    page.goto(path)
    expect(page.locator("#said")).to_have_text("It can only be read.")
    page.get_by_role("button", name="Go").click(no_wait_after=True)
    page.goto(f"{path}?again")  # whatever was under way had its turn
    expect(page).to_have_title("Report")
    assert answered == [path, f"{path}?again"]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_release_with_everything_is_readable_at_every_width(
    visitor: BrowserContext, beside: Stage, digits: Path, tmp_path: Path, scheme: str
) -> None:
    a_child(beside, tmp_path / "b", digits)
    page = visitor.new_page()
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(f"{beside.url}/models/digits/4")
    found = page.evaluate(POOR_CONTRAST)
    assert found["seen"] > 100
    assert found["poor"] == []
    for width in (320, 768, 1400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("table")]
          .filter((e) => !(e.caption || e.ariaLabel)).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
