"""The report in a real browser: it asks nobody, fits every screen, and prints."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from fogline_models import report
from tests.models.reporting import document

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed, and CI must not pass without it")
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_the_page_fits_complains_about_nothing_and_asks_nobody(
    chromium: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    report.write(tmp_path, document())
    context = chromium.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    assert asked == [(tmp_path / "report.html").as_uri()]
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Every mark and word of a plot lies within its drawing, give or take a stroke.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
            const box = svg.getBoundingClientRect()
            return [...svg.children].filter(part => {
                const own = part.getBoundingClientRect()
                return own.left < box.left - 12 || own.right > box.right + 14
                    || own.top < box.top - 6 || own.bottom > box.bottom + 6
            }).map(part => part.outerHTML)
        })"""
    )
    assert outside == []
    context.close()


def test_printed_on_a4_nothing_is_cut_off(chromium: Browser, tmp_path: Path) -> None:
    report.write(tmp_path, document())
    page = chromium.new_page(viewport={"width": 688, "height": 1000})  # A4 within its margins
    page.emulate_media(media="print")
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
