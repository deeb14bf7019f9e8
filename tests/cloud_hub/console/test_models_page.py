import math
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import release_views
from tests.cloud_hub.console.fleet_stage import Stage


@pytest.fixture
async def stage(staged: Stage) -> AsyncIterator[Stage]:
    async with staged.served():
        yield staged


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def page(session: aiohttp.ClientSession, url: str, status: int = 200) -> str:
    async with session.get(url) as response:
        text = await response.text()
        assert response.status == status, text
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    return text


async def test_releases_are_listed_with_the_devices_that_run_and_want_them(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk-1", "kiosk-2", runs=1)
    await stage.fleet.controller.want(["kiosk-1"], "digits", 2)
    text = await page(session, f"{stage.url}/models")
    assert re.findall(r'href="(/models/[^"]+)"', text) == [
        "/models/digits/3",
        "/models/digits/2",
        "/models/digits/1",
        "/models/digits-hub/1",
    ]
    assert '<a href="/devices?runs=digits%401">2 devices</a>' in text
    assert '<a href="/devices?wants=digits%402">1 device</a>' in text
    assert text.count(">Forced<") == 1
    assert text.count(">digits-hub</td>") == 3  # who they escalate to


async def test_a_hub_without_releases_shows_the_command_that_comes_next(
    tmp_path_factory: pytest.TempPathFactory, session: aiohttp.ClientSession
) -> None:
    async with Stage(tmp_path_factory.mktemp("bare")).served() as bare:
        text = await page(session, f"{bare.url}/models")
        assert "No release yet" in text
        assert "fogline release push models/digits/bundles/digits-hub-1.0.0" in text
        await bare.join("kiosk")
        assert "fogline release push BUNDLE" in await page(session, f"{bare.url}/devices")


async def test_a_release_shows_contract_certificates_report_card_and_digests(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    release = await stage.fleet.releases.show("digits", 2)
    first, second = await stage.fleet.certificates.list("digits", 2)
    await stage.fleet.certificates.withdraw("digits", 2, first.id, reason="measured <wrongly>")
    text = await page(session, f"{stage.url}/models/digits/2")
    for said in (
        "[n, 1, 8, 8]",
        "[n, 10]",
        "max_softmax of logits",
        first.id,
        second.id,
        ">Withdrawn<",
        "measured &lt;wrongly&gt;",
        ">Holds<",
        f"{second.certificate.threshold:.4f}",
        second.certificate.hardware_class,
        "parameters",
        "6,138",
        "# digits 1.1.0",
        release.bundle_sha256,
        *(file.sha256 for file in release.bundle.files.values()),
    ):
        assert said in text, said
    assert "Forced past the hub" not in text
    assert "Forced past the hub" in await page(session, f"{stage.url}/models/digits/3")
    assert "there is nothing to certify" in await page(session, f"{stage.url}/models/digits-hub/1")


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/models/digits/9", 404, "there is no release 9 of &#39;digits&#39;; there are: 1, 2, 3"),
        ("/models/nothing/1", 404, "no release 1 of &#39;nothing&#39;; there are: none"),
        ("/models/digits/latest", 400, "MODEL@NUMBER"),
        ("/models/digits/٣", 400, "MODEL@NUMBER"),
        ("/models/digits/99999999999999999999", 404, "There is no release 99999999999999999999"),
    ],
)
async def test_an_unknown_release_is_a_page_with_a_sentence(
    stage: Stage, session: aiohttp.ClientSession, path: str, status: int, said: str
) -> None:
    text = await page(session, stage.url + path, status)
    assert said.casefold() in text.casefold()


async def test_a_card_that_is_missing_withholds_nothing_else(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    release = await stage.fleet.releases.show("digits", 1)
    stage.fleet.releases.file(release, "README.md").unlink()
    text = await page(session, f"{stage.url}/models/digits/1")
    assert "Model card" not in text
    assert "Files and digests" in text


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=30,
)


@given(st.dictionaries(st.text(max_size=9), anything, max_size=5))
def test_a_report_may_hold_anything(report: dict[str, Any]) -> None:
    groups = release_views.report(report)
    facts = [fact for group in groups for fact in group.facts]
    assert len(facts) <= release_views.FACTS_SHOWN
    assert all(len(value) <= release_views.LONGEST_FACT + 100 for _, value in facts)


def test_a_report_of_hostile_size_is_cut() -> None:
    groups = release_views.report({"a": {str(i): i for i in range(5000)}, "b": 10**4000})
    assert sum(len(group.facts) for group in groups) == release_views.FACTS_SHOWN
    deep: Any = math.pi
    for _ in range(200):
        deep = {"x": deep}
    assert release_views.report({"deep": deep})
