import json
import math
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import release_views
from cloud_hub.fleet.identity import Caller
from tests.cloud_hub.console.fleet_stage import Stage
from tests.examples import numbered, offer, settled


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


async def test_kept_examples_are_told_with_their_size_and_what_comes_next(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    text = await page(session, f"{stage.url}/models")
    assert "0 B of 1.05 MB (0%) are in use" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "fogline-agent run --keep digits" in text
    offer(stage.examples, numbered(1, 2, 3), model="digits")
    offer(stage.examples, numbered(1), model="faces", tenant="shop <1>")
    await settled(stage.examples)
    text = await page(session, f"{stage.url}/models")
    rows = re.findall(
        r'<th scope="row">([a-z]+)</th>\s*<td>(.*?)</td>\s*<td class="number">(\d+)', text
    )
    assert rows == [("digits", "default", "3"), ("faces", "shop &lt;1&gt;", "1")]
    assert "fogline data export digits --since 7d --out digits-hard.npz" in text
    assert 'role="alert"' not in text
    stage.examples.trouble = "No space left on device"
    assert "were not kept: No space left on device" in await page(session, f"{stage.url}/models")


async def test_who_shows_a_token_sees_exports_and_deletes_its_tenants_examples_only(
    staged: Stage, session: aiohttp.ClientSession
) -> None:
    async def authenticate(token: str) -> Caller | None:
        return Caller(token, "", token) if token in ("acme", "rival") else None

    staged.console.authenticate = authenticate
    async with staged.served() as stage:
        url = f"{stage.url}/api/v1/examples"

        async def status(method: str, url: str, token: str) -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {token}"}
            async with session.request(method, url, headers=headers) as response:
                return response.status, await response.text(errors="replace")

        offer(stage.examples, numbered(1, 2), tenant="acme")
        offer(stage.examples, numbered(3), tenant="rival")
        await settled(stage.examples)
        assert (await status("GET", url, "stranger"))[0] == 401
        for tenant, n in (("acme", 2), ("rival", 1)):
            _, text = await status("GET", url, tenant)
            (seen,) = json.loads(text)["models"]
            assert (seen["tenant"], seen["examples"]) == (tenant, n)
            code, text = await status("GET", f"{url}/double", tenant)
            assert (code, text.count('"device":"kiosk"')) == (200, n)
            code, text = await status("GET", f"{url}/double?tenant=other", tenant)
            assert (code, "sees no other" in text) == (400, True)
            models = await status("GET", f"{stage.url}/models", tenant)
            assert f"<td>{tenant}</td>" in models[1]
            assert models[1].count('<th scope="row">double</th>') == 1
        assert (await status("DELETE", url, "acme"))[0] == 400  # nothing is said
        assert (await status("DELETE", f"{url}?sauce=1", "acme"))[0] == 400
        assert (await status("DELETE", f"{url}?all=1", "acme"))[0] == 200
        (left,) = await stage.examples.summary(None)
        assert left.tenant == "rival"
        assert (await status("DELETE", f"{url}?all=1", "stranger"))[0] == 401
