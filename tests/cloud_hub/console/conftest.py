"""A browser, and a fleet with releases, for the console's tests."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from tests.cloud_hub.console.browsing import ARGUMENTS, watched
from tests.cloud_hub.console.fleet_stage import Stage, copied, prepare


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed, and CI must not pass without it")
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visitor(chromium: Browser) -> Iterator[BrowserContext]:
    """A visitor whose pages complain about nothing and ask nobody but the hub."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield from watched(context)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The data of a hub that has releases; to be copied."""
    folder = tmp_path_factory.mktemp("prepared")
    # In a thread of its own: this one may have the loop of the browser or of another test.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(prepare(folder, digits))).result()
    return folder


@pytest.fixture
def staged(prepared: Path, tmp_path: Path) -> Stage:
    """A hub with releases and no device, not served yet."""
    return Stage(copied(prepared, tmp_path / "hub"))


@pytest.fixture
def beside(staged: Stage) -> Iterator[Stage]:
    """The same, served in a thread of its own."""
    with staged.served_beside():
        yield staged
