import html
import json
import math
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import model_views, release_pages, release_views, report_views
from cloud_hub.fleet.callers import Caller
from cloud_hub.fleet.releases import Release
from fogline_protocol.release import Parent, Processing, Tolerance
from tests.cloud_hub.console import workshop
from tests.cloud_hub.console.fleet_stage import HARDWARE, Stage, answers
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
        "/models/digits",
        "/models/digits/3",
        "/models/digits/2",
        "/models/digits/1",
        "/models/digits-hub",
        "/models/digits-hub/1",
    ]
    assert '<a href="/devices?runs=digits%401">2 devices</a>' in text
    assert '<a href="/devices?wants=digits%402">1 device</a>' in text
    assert text.count(">Forced<") == 1
    assert text.count(">digits-hub</td>") == 3  # who they escalate to


def test_a_self_test_of_vectors_asks_for_no_agreement() -> None:
    assert release_views.allowed(Tolerance(0.5, 0.0)) == "error at most 0.5"
    assert (
        release_views.allowed(Tolerance(0.5, 0.9)) == "error at most 0.5, agreement at least 90.0%"
    )


NO_CERTIFICATE = "int8-qdq on CPUExecutionProvider: no certificate was issued for it"
FP32_INSTEAD = answers("fp32", aside=NO_CERTIFICATE)


async def test_each_release_says_on_how_many_devices_each_of_its_variants_answers(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk-1", "kiosk-2", runs=1, serving=answers())
    await stage.join("kiosk-3", runs=1, serving=FP32_INSTEAD)
    await stage.join("kiosk-4", runs=1)  # its agent is older
    await stage.join("kiosk-5", runs=2, serving=answers("strange", "strange"))
    await stage.join("kiosk-6", serving=FP32_INSTEAD)  # installed by hand
    for path in ("/models", "/models/digits"):
        text = await page(session, stage.url + path)
        for said in (
            '<a href="/devices?runs=digits%401">4 devices</a>',
            '<a href="/devices?runs=digits%401&amp;variant=int8-qdq">int8-qdq 2</a>, ',
            '<a href="/devices?runs=digits%401&amp;variant=fp32">fp32 1</a>, not told 1',
            'href="/devices?runs=digits%401&amp;serves=fallback">fallback 1</a>',
        ):
            assert said in text, said
        assert text.count("&amp;variant=") == 2
        assert text.count("serves=fallback") == 1
        assert "strange" not in text


async def test_the_page_of_a_release_names_who_answers_with_a_fallback_and_why(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk-1", "kiosk-2", runs=2, version="1.1.0", serving=answers())
    instead = [f"gate-{n}" for n in range(1, 13)]
    await stage.join(*instead, runs=2, version="1.1.0", serving=FP32_INSTEAD)
    meant = answers("fp32", "fp32", "int8-qdq: meant for x86_64+vnni", hardware="old/cpu")
    await stage.join("attic", runs=2, version="1.1.0", serving=meant)
    await stage.join("cellar", runs=2, version="1.1.0")
    await stage.join("yard", runs=1, serving=FP32_INSTEAD)  # of another release
    text = await page(session, f"{stage.url}/models/digits/2")
    for said in (
        '<a href="/devices?runs=digits%402&amp;variant=int8-qdq">2 devices</a>',
        '<a href="/devices?runs=digits%402&amp;variant=fp32">13 devices</a>',
        "A fallback answers on 12 devices",
        "1 device does not tell which variant answers",
        "<small>int8-qdq 2, fp32 12</small>",
        "<small>fp32 1</small>",
    ):
        assert said in text, said
    first, second = re.findall(r"<li([^>]*)>(\d+ devices? answers?.*?)</li>", text)
    assert "waived" in first[0]
    assert first[1].startswith(
        f"12 devices answer with fp32 instead of int8-qdq: {NO_CERTIFICATE}. "
    )
    assert re.findall(r'href="/devices/([^"]+)"', first[1]) == instead[:5]
    assert "and 7 more" in first[1]
    assert "waived" not in second[0]
    assert second[1].startswith(
        "1 device answers with fp32, as meant for such hardware: int8-qdq: meant for x86_64+vnni. "
    )
    text = await page(session, f"{stage.url}/models/digits/3")
    assert "What devices left aside" not in text
    assert "does not tell" not in text


async def test_a_class_is_certified_for_what_runs_there(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    async def certified() -> str:
        text = await page(session, f"{stage.url}/models/digits/2")
        (row,) = re.findall(rf"<tr><th [^>]*>{re.escape(HARDWARE)}(.*?)</tr>", text)
        (word,) = re.findall(r'data-word="(\w+)"', row)
        return str(word)

    for one in await stage.fleet.certificates.list("digits", 2):
        if one.certificate.variant == "fp32":
            await stage.fleet.certificates.withdraw("digits", 2, one.id, reason="an old scale")
    await stage.join("old", runs=2)
    assert await certified() == "holds"  # whatever it is, something is certified there
    await stage.join("old", runs=2, serving=answers("fp32"))
    assert await certified() == "none"
    await stage.join("new", runs=2, serving=answers())
    assert await certified() == "partly"
    await stage.join("old", runs=2, serving=answers())
    assert await certified() == "holds"


async def test_reasons_beyond_count_are_counted(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    for n in range(release_views.ASIDES_SHOWN + 3):
        await stage.join(f"kiosk-{n}", runs=2, serving=answers("fp32", aside=f"reason {n}"))
    text = await page(session, f"{stage.url}/models/digits/2")
    assert text.count("instead of int8-qdq: reason") == release_views.ASIDES_SHOWN
    assert "And 3 more reasons." in text


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
        ">digits 1.1.0</h3>",
        release.bundle_sha256,
        *(file.sha256 for file in release.bundle.files.values()),
    ):
        assert said in text, said
    assert "Forced past the hub" not in text
    assert "Forced past the hub" in await page(session, f"{stage.url}/models/digits/3")
    assert "there is nothing to certify" in await page(session, f"{stage.url}/models/digits-hub/1")


async def generation(stage: Stage, device: str) -> int:
    return {one.device: one.generation for one in await stage.fleet.controller.twins()}[device]


async def test_a_certificate_is_withdrawn_after_a_look_at_what_that_means(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    issued = await stage.fleet.certificates.list("digits", 2)
    held = next(one for one in issued if one.certificate.variant == "int8-qdq")
    newer = replace(held.certificate, issued_at=held.certificate.issued_at + timedelta(days=1))
    path = f"{stage.url}/models/digits/2/certificates/{held.id}/withdraw"
    assert f'href="/models/digits/2/certificates/{held.id}/withdraw"' in await page(
        session, f"{stage.url}/models/digits/2"
    )
    await stage.join("kiosk", runs=2, serving=answers(certificate=held.id))
    await stage.join("gate", runs=2, online=False, serving=answers(certificate=held.id))
    await stage.join("other", runs=1, serving=answers(certificate=held.id))
    await stage.fleet.controller.want(["kiosk"], "digits", 2)
    text = await page(session, path)
    for said in (
        f"Withdraw {held.id}?",
        "2 devices answer under it now.",
        "No other holds for int8-qdq on",
        "escalate every request to digits-hub.",
        "1 device of them is offline and will follow when back.",
    ):
        assert said in text, said
    await stage.fleet.certificates.issue("digits", 2, newer)
    assert f"Then {newer.id} is the latest that holds for int8-qdq on" in await page(session, path)
    wanted = await generation(stage, "kiosk")
    for reason in ("", " ", "x" * 501):
        async with session.post(path, data={"reason": reason}) as response:
            assert response.status == 400
            assert "for a reason, of 1 to 500 characters" in await response.text()
    async with session.post(
        path, data={"reason": "drift"}, headers={"Sec-Fetch-Site": "cross-site"}
    ) as response:
        assert response.status == 403
    assert await generation(stage, "kiosk") == wanted
    async with session.post(path, data={"reason": " a <drift>"}, allow_redirects=False) as response:
        assert response.status == 303
        assert response.headers["Location"] == "/models/digits/2#certificates"
    assert await generation(stage, "kiosk") == wanted + 1
    text = await page(session, f"{stage.url}/models/digits/2")
    assert "Withdrawn: a &lt;drift&gt;" in text
    assert f"certificates/{held.id}/withdraw" not in text
    assert "fogline certificate issue digits@2 FILE" in text
    assert f"{held.id} is withdrawn already" in await page(session, path)
    for stranger in ("f" * 16, "%00", "x" * 300):
        unknown = f"{stage.url}/models/digits/2/certificates/{stranger}/withdraw"
        assert "No such certificate" in await page(session, unknown, 404)
        async with session.post(unknown, data={"reason": "x"}) as response:
            assert response.status == 404


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
    groups = report_views.facts(report)
    facts = [fact for group in groups for fact in group.facts]
    assert len(facts) <= report_views.FACTS_SHOWN
    assert all(len(value) <= report_views.LONGEST_FACT + 100 for _, value in facts)


def test_a_report_of_hostile_size_is_cut() -> None:
    groups = report_views.facts({"a": {str(i): i for i in range(5000)}, "b": 10**4000})
    assert sum(len(group.facts) for group in groups) == report_views.FACTS_SHOWN
    deep: Any = math.pi
    for _ in range(200):
        deep = {"x": deep}
    assert report_views.facts({"deep": deep})


async def accept(stage: Stage, folder: Path, **changes: Any) -> Release:
    digits = Path(__file__).parents[3] / "models" / "digits"
    return await stage.fleet.releases.accept(workshop.bundle(folder, digits, **changes))


async def test_a_release_shows_what_the_workshop_found_and_refused(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await accept(stage, tmp_path / "b")
    text = html.unescape(await page(session, f"{stage.url}/models/digits/4"))
    for said in (
        "int8-qdq ships although 1.31 x the latency of fp32",
        "fp16 refused: loses 3.1 points (95 %: 2.7 to 3.5) of accuracy",
        ">Refused<",
        ">Waived<",
        "not in the bundle",
        "93.4 to 95.5%",
        "2,100 held-out items of 105 scenes",
        "writers 14",
        "static QDQ int8 per channel",
        "<b>resize</b>",
        "<b>argmax</b>",
        "With 95% confidence, at most 5% of all requests are answered by int8-qdq",
        "like the 350 calibration scenes.",
        "held-out items 25.0% escalate and 2.2% are answered differently than by the hub; the two "
        "together are right on 96.5%, the device alone on 86.5%, the hub alone on 98.4%.",
        ">to compare<",
        "<td>+4.2<small>+1.0 to +7.0</small></td>",
        "<td>87.1%<small>86.1 to 88.1%</small></td>",
        'href="/models/digits/4/report.html"',
        "Image classification",
    ):
        assert said in text, said


async def test_a_report_that_contradicts_its_bundle_is_said_to(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    document = workshop.report()
    document["decisions"]["variants"][1] |= {"verdict": "refused", "sentence": "fp32 refused"}
    await accept(stage, tmp_path / "b", document=document)
    text = await page(session, f"{stage.url}/models/digits/4")
    assert "fp32 refused. The bundle ships it all the same." in text
    assert text.count(">Refused<") == 1  # fp16, which is not in the bundle


async def test_what_a_combined_score_buys_is_said_where_the_score_is(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    document = workshop.report()
    await accept(stage, tmp_path / "1", document=document)
    text = await page(session, f"{stage.url}/models/digits/4")
    contract = text[text.index('id="contract"') : text.index('id="self-test"')]
    assert document["figures"]["combined"]["sentence"] in contract
    for version, odd, said in (
        ("1.4.0", {"sentence": workshop.HOSTILE * 99}, True),
        ("1.5.0", {"sentence": ["no text"]}, False),
        ("1.6.0", None, False),
    ):
        document["figures"]["combined"] = odd
        made = await accept(stage, tmp_path / version, version=version, document=document)
        text = await page(session, f"{stage.url}/models/digits/{made.number}")
        assert ("What the score buys" in text) == said
        assert workshop.HOSTILE not in text
        assert text.count("&lt;script&gt;") < 30  # it is cut


async def test_lineage_leads_from_parent_to_child_with_what_changed(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await stage.join("kiosk-1", "kiosk-2", runs=4, version="1.3.0")
    before = await stage.fleet.releases.show("digits", 2)
    first = await accept(stage, tmp_path / "1", parent=Parent("1.1.0", before.bundle_sha256))
    document = workshop.report()
    document["figures"]["evaluation"]["variants"]["fp32"]["accuracy"]["value"] = 0.975
    await accept(
        stage,
        tmp_path / "2",
        version="1.4.0",
        of="digits-1.0.0",
        document=document,
        parent=Parent("1.3.0", first.bundle_sha256),
    )
    text = await page(session, f"{stage.url}/models/digits/4")
    card = text[text.index('<ol class="lineage">') : text.index('id="certificates"')]
    assert re.findall(r'href="(/models/[^"]+)"', card) == ["/models/digits/2", "/models/digits/5"]
    assert "on 2 devices" in card
    assert "94.5% \N{RIGHTWARDS ARROW} 94.5%" in card  # the parent's own report says so
    assert "Pre-processing: none \N{RIGHTWARDS ARROW} resize height 8, width 8." in card
    text = await page(session, f"{stage.url}/models/digits/5")
    assert "94.4% \N{RIGHTWARDS ARROW} 97.5%" in text
    size = "25.6\N{NO-BREAK SPACE}kB \N{RIGHTWARDS ARROW} 16.0\N{NO-BREAK SPACE}kB"
    assert size in text
    assert "hub's model are the same" in text
    listed = await page(session, f"{stage.url}/models/digits")
    assert "<td>digits@2</td>" in listed
    assert "<td>digits@4</td>" in listed


async def test_a_parent_that_this_hub_does_not_have_is_said(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await accept(stage, tmp_path / "b", parent=Parent("0.9.0", "ab" * 32))
    text = await page(session, f"{stage.url}/models/digits/4")
    assert "made to replace digits 0.9.0, which this hub does not have" in text
    assert "abababababab</code>" in text
    assert "smaller now" in text  # what the workshop says has changed
    assert "0.9.0, not here" in await page(session, f"{stage.url}/models")
    assert "begins a line of its own" in await page(session, f"{stage.url}/models/digits/1")


async def test_the_workshops_page_is_served_as_it_came_and_powerless(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await accept(stage, tmp_path / "b", page=workshop.HOSTILE)
    await accept(stage, tmp_path / "without", version="1.4.0", page=None)
    for path in ("/models/digits/4/report.html", "/api/v1/releases/digits/4/report.html"):
        async with session.get(stage.url + path) as response:
            assert await response.text() == workshop.HOSTILE
            assert response.content_type == "text/html"
            policy = response.headers["Content-Security-Policy"].split("; ")
            assert policy[0] == "sandbox"
            assert {"default-src 'none'", "form-action 'none'", "frame-ancestors 'none'"} <= {
                *policy
            }
            assert not any("script" in rule or "http" in rule for rule in policy)
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "No report.html came with digits@5" in await page(
        session, f"{stage.url}/models/digits/5/report.html", 404
    )
    assert "report.html" not in await page(session, f"{stage.url}/models/digits/5")


@pytest.mark.parametrize(
    "document",
    [
        {"figures": {"schema": 1, "evaluation": {"variants": {workshop.HOSTILE: {}}}}},
        workshop.report(machine={workshop.HOSTILE: [workshop.HOSTILE, "\ud800"]}),
        workshop.report(decisions=workshop.HOSTILE, timings=[1], machine=None),
        {workshop.HOSTILE: {workshop.HOSTILE: workshop.HOSTILE}},
    ],
)
async def test_a_hostile_report_and_card_are_text(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path, document: dict[str, Any]
) -> None:
    card = f"# x\n\n{workshop.HOSTILE}\n\n[a](javascript:alert) ![b](https://b.example/c)"
    await accept(
        stage,
        tmp_path / "b",
        document=document,
        card=card,
        task=workshop.HOSTILE,
        pre_processing=(Processing(workshop.HOSTILE, parameters={"a": workshop.HOSTILE}),),
    )
    async with session.get(f"{stage.url}/models/digits/4") as response:
        text = await response.text()
        assert response.status == 200
    assert "<script" not in text
    assert "b.example" not in text
    assert 'href="javascript' not in text
    assert "&lt;script&gt;" in text


async def test_a_release_without_a_report_says_how_one_comes(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await accept(stage, tmp_path / "b", document="[", page=None, certified=False)
    text = await page(session, f"{stage.url}/models/digits/4")
    assert "No report came with this release" in text
    assert "No certificate is attached" in text


async def test_a_release_without_a_certificate_says_why_if_the_workshop_does(
    stage: Stage, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    await accept(stage, tmp_path / "b", certified=False)
    text = await page(session, f"{stage.url}/models/digits/4")
    assert "The workshop says: 12 scenes cannot carry 1 %: 299 are needed" in text


async def test_models_and_releases_are_paged_on_the_server(
    stage: Stage, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_views, "MODELS_AT_ONCE", 1)
    monkeypatch.setattr(release_pages, "MODELS_AT_ONCE", 1)
    monkeypatch.setattr(model_views, "LATEST_SHOWN", 2)
    monkeypatch.setattr(release_pages, "RELEASES_AT_ONCE", 2)
    text = await page(session, f"{stage.url}/models")
    assert re.findall(r'href="(/models/?[^"]*)"', text)[1:] == [
        "/models/digits",
        "/models/digits/3",
        "/models/digits/2",
        "/models/digits",
        "/models?page=2",
    ]
    assert "/models/digits-hub/1" in await page(session, f"{stage.url}/models?page=2")
    assert "There is no such page" in await page(session, f"{stage.url}/models?page=3")
    second = await page(session, f"{stage.url}/models/digits?page=2")
    assert re.findall(r'href="(/models/digits[^"]*)"', second) == [
        "/models/digits/1",
        "/models/digits?page=1",
    ]
    assert "There is no such page" in await page(session, f"{stage.url}/models/digits?page=9")


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/models?page=0", 400, "page must be a number from 1 on"),
        ("/models?page=99999999999999999999", 400, "page must be a number"),
        ("/models?page=1&page=2", 400, "comes twice"),
        ("/models/digits?size=2", 400, "there is no parameter"),
        ("/models/nothing", 404, "There is no release of a model"),
        ("/models/%00", 404, "There is no release of a model"),
        ("/models/digits/9/report.html", 404, "there is no release 9"),
    ],
)
async def test_a_list_that_cannot_be_shown_is_a_page_with_a_sentence(
    stage: Stage, session: aiohttp.ClientSession, path: str, status: int, said: str
) -> None:
    assert said.casefold() in (await page(session, stage.url + path, status)).casefold()


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
