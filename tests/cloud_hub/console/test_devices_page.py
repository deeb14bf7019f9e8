import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import certificate_views, figures, fleet_views, roster
from cloud_hub.console.api import BadParameter
from cloud_hub.console.roster import SIZES, SORTS, Line, ModelLine, Query, Served, natural, select
from cloud_hub.fleet.controller import Event, Twin
from cloud_hub.fleet.devices import Device
from cloud_hub.store import schema
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.console.fleet_stage import CPU, HARDWARE, Stage, answers

NOW = 1_790_000_000.0


def model(name: str = "digits", **changes: Any) -> ModelLine:
    usual: dict[str, Any] = {
        "wanted": 0,
        "running": 1,
        "previous": 0,
        "version": "1.0.0",
        "phase": "committed",
        "code": "",
        "sentence": "",
        "attempt": 1,
        "figures": {},
        "bytes_done": 0,
        "bytes_total": 0,
    }
    return ModelLine(model=name, **(usual | changes))


def line(name: str, **changes: Any) -> Line:
    usual: dict[str, Any] = {
        "online": True,
        "since": NOW - 600,
        "last_seen": NOW - 2,
        "first_seen": NOW - 6000,
        "agent_version": "0.1.0",
        "hardware_class": "x86_64/cpu",
        "link": "works",
        "rss_bytes": 1,
        "managed": True,
        "standing": "current",
        "models": (model(),),
        "generation": 1,
        "published_generation": 1,
        "reported_generation": 1,
    }
    return Line(name=name, **(usual | changes))


def served(variant: str = "int8-qdq", **changes: Any) -> Served:
    usual: dict[str, Any] = {
        "provider": CPU,
        "hardware_class": HARDWARE,
        "certificate": "",
        "instead_of": "",
        "aside": "",
    }
    return Served(variant=variant, **(usual | changes))


FALLBACK = served("fp32", instead_of="int8-qdq", aside="int8-qdq on CPU: no certificate")
FLEET = [
    line(
        "kiosk-10",
        standing="failed",
        models=(model(served=FALLBACK), model("other", served=served())),
    ),
    line("kiosk-9", online=False, last_seen=NOW - 500, models=(model(served=served()),)),
    line("gate", hardware_class="aarch64/cpu", models=(model(wanted=2),), standing="updating"),
    line("Camera", models=(), standing="idle", online=False, last_seen=None, since=None),
]


def found(**query: str) -> list[str]:
    return [one.name for one in select(FLEET, Query.parse(query), NOW).rows]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({}, ["Camera", "gate", "kiosk-9", "kiosk-10"]),
        ({"sort": "-name"}, ["kiosk-10", "kiosk-9", "gate", "Camera"]),
        ({"status": "offline"}, ["Camera", "kiosk-9"]),
        ({"update": "failed"}, ["kiosk-10"]),
        ({"status": "offline", "update": "failed"}, []),
        ({"q": "KIOSK"}, ["kiosk-9", "kiosk-10"]),
        ({"q": "aarch64"}, ["gate"]),
        ({"q": "digits@1"}, ["gate", "kiosk-9", "kiosk-10"]),
        ({"runs": "digits@1", "status": "online"}, ["gate", "kiosk-10"]),
        ({"variant": "int8-qdq"}, ["kiosk-9", "kiosk-10"]),
        ({"runs": "digits@1", "variant": "int8-qdq"}, ["kiosk-9"]),
        ({"runs": "digits@1", "variant": "fp32", "serves": "fallback"}, ["kiosk-10"]),
        ({"runs": "other@1", "serves": "fallback"}, []),
        ({"serves": "fallback", "status": "offline"}, []),
        ({"variant": "<b>"}, []),
        ({"q": "not int8"}, ["kiosk-10"]),
        ({"wants": "digits@2"}, ["gate"]),
        ({"wants": "digits@3"}, []),
        ({"sort": "status"}, ["Camera", "kiosk-9", "gate", "kiosk-10"]),
        ({"sort": "update"}, ["kiosk-10", "gate", "kiosk-9", "Camera"]),
        ({"sort": "-seen"}, ["Camera", "kiosk-9", "gate", "kiosk-10"]),
        ({"sort": "hardware"}, ["gate", "Camera", "kiosk-9", "kiosk-10"]),
    ],
)
def test_devices_are_filtered_and_sorted(query: dict[str, str], names: list[str]) -> None:
    assert found(**query) == names


def test_each_count_says_how_many_rows_its_filter_would_leave() -> None:
    by = select(FLEET, Query(status="offline"), NOW)
    assert by.statuses == {"online": 2, "offline": 2}
    assert by.updates == {"current": 1, "idle": 1}
    for status, n in by.statuses.items():
        assert len(select(FLEET, Query(status=status), NOW).matching) == n
    for query in (Query(), Query(status="offline"), Query(update="failed", serves="fallback")):
        anyhow = select(FLEET, query, NOW)
        only = select(FLEET, replace(query, serves="fallback"), NOW)
        assert anyhow.fallbacks == only.fallbacks == len(only.matching)
        assert only.statuses.total() == len(only.matching) or query.status or query.update


def test_a_page_beyond_the_end_is_the_last_one() -> None:
    many = [line(f"d{i}") for i in range(120)]
    selection = select(many, Query(page=9), NOW)
    assert (selection.page, selection.pages, len(selection.rows)) == (3, 3, 20)
    assert select([], Query(page=2), NOW).pages == 1


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"status": "away"}, "status must be one of online, offline, got 'away'"),
        ({"update": "x"}, "update must be one of failed"),
        ({"sort": "--name"}, "sort must be one of"),
        ({"size": "7"}, "size must be one of 50, 100, 200"),
        ({"page": "0"}, "page must be a whole number"),
        ({"page": "1e3"}, "page must be a whole number"),
        ({"wants": "digits"}, "MODEL@NUMBER"),
        ({"serves": "all"}, "serves must be one of fallback, got 'all'"),
        ({"variant": "x" * 201}, "variant must be a text of at most 200"),
        ({"color": "red"}, "there is no parameter 'color'"),
        ({"q": "x" * 201}, "at most 200"),
        ({"q": 3}, "must be a text"),
    ],
)
def test_a_query_that_makes_no_sense_gets_a_sentence(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(BadParameter, match=re.escape(said)):
        Query.parse(given_)


@given(
    st.builds(
        Query,
        status=st.sampled_from(["", "online"]),
        q=st.text(max_size=20).map(str.strip),
        wants=st.sampled_from(["", "digits@2"]),
        variant=st.text(max_size=20),
        serves=st.sampled_from(["", "fallback"]),
        sort=st.sampled_from([*SORTS, *("-" + name for name in SORTS)]),
        size=st.sampled_from(SIZES),
        page=st.integers(1, 999),
    )
)
def test_the_address_holds_the_whole_query(query: Query) -> None:
    assert Query.parse(dict(parse_qsl(query.encoded()))) == query


@given(st.text("ab019-", max_size=8), st.text("ab019-", max_size=8))
def test_any_two_names_have_a_natural_order(one: str, other: str) -> None:
    assert (natural(one) < natural(other)) + (natural(other) < natural(one)) <= 1
    assert natural(f"{one}-9") < natural(f"{one}-10")


def test_events_that_arrived_together_have_rows_of_their_own() -> None:
    event = Event("kiosk", NOW, 1, "digits", 2, "accepted", "", "")
    detail = fleet_views.Detail(line("kiosk"), [event, event, event], [])
    older = fleet_views.Detail(line("kiosk"), [event], [])
    keys = [row.key for row in fleet_views.device(detail, None, now=NOW).tables["events"]]
    assert len(set(keys)) == 3
    assert fleet_views.device(older, None, now=NOW).tables["events"][0].key == keys[-1]


@pytest.mark.parametrize(
    ("changes", "title", "goes_on"),
    [
        ({"phase": "rejected"}, "digits@2 was refused", "It keeps running digits@1 (1.0.0)."),
        ({"phase": "rolled-back"}, "digits@2 was taken back", "It keeps running digits@1 (1.0.0)."),
        (
            {"phase": "rejected", "running": 0, "version": ""},
            "digits@2 was refused",
            "It runs no digits now.",
        ),
        (
            {"phase": "accepted", "attempt": 2},
            "An attempt at digits@2 failed",
            "The device tries again: attempt 2.",
        ),
    ],
)
def test_a_failure_says_what_the_device_runs_meanwhile(
    changes: dict[str, Any], title: str, goes_on: str
) -> None:
    failing = model(wanted=2, code="self-test/deviation", sentence="Wrong.", **changes)
    page = fleet_views.device(
        fleet_views.Detail(line("kiosk", models=(failing,)), [], []), None, now=NOW
    )
    (row,) = page.tables["failures"]
    assert page.flags["failed"]
    assert {name: cell.text for name, cell in row.cells.items()} == {
        "title": title,
        "code": "self-test/deviation",
        "sentence": "Wrong.",
        "runs": goes_on,
    }


def test_a_device_in_a_list_is_named_with_what_answers() -> None:
    assert model(served=served()).words() == "digits@1 int8-qdq"
    assert model(served=FALLBACK, wanted=2).words() == "digits@1 fp32 (not int8-qdq) \u2192 @2"
    assert model(served=served(), running=0).words() == "digits 1.0.0 int8-qdq"
    page = fleet_views.devices(FLEET, Query(), now=NOW)
    assert page.text["count_fallback"] == "1"
    assert page.announcement.endswith("1 answer with a fallback.")


def cells_of(one: ModelLine, **detail: Any) -> dict[str, str]:
    """Return what the page of a device says of one model."""
    at = fleet_views.Detail(line("kiosk", models=(one,)), [], [], **detail)
    (row,) = fleet_views.device(at, None, now=NOW).tables["models"]
    return {name: cell.text for name, cell in row.cells.items()}


def test_a_model_that_answers_says_variant_provider_certificate_and_what_was_left_aside() -> None:
    old = cells_of(model())
    assert (old["variant"], old["provider"]) == ("its agent does not tell", figures.NOTHING)
    assert (old["certificate"], old["aside"]) == (figures.NOTHING, "")
    assert cells_of(model(running=0, version=""))["variant"] == figures.NOTHING
    said = cells_of(model(served=FALLBACK))
    assert (said["variant"], said["provider"]) == ("fp32 (not int8-qdq)", CPU)
    assert said["aside"] == (
        "A fallback: int8-qdq is meant for this device. int8-qdq on CPU: no certificate."
    )
    assert (said["certificate"], said["promise"]) == ("None", "")
    meant = served(aside="fp16: meant for other hardware")
    assert cells_of(model(served=meant))["aside"] == (
        "As meant for this device. fp16: meant for other hardware."
    )
    assert cells_of(model(served=served()))["aside"] == ""


@given(st.text(max_size=700), st.text(max_size=700), st.text(max_size=700))
def test_a_device_may_say_anything_of_what_answers(variant: str, meant: str, aside: str) -> None:
    said = pb.ReportedModel(
        model="digits",
        active_release=1,
        serving=pb.Serving(
            variant=variant,
            provider=variant,
            hardware_class=aside,
            certificate=meant,
            meant_variant=meant,
            meant_provider=meant,
            aside=aside,
        ),
    )
    twin = Twin("kiosk", {}, 0, 0, pb.Reported(models=[said]), NOW, True)
    (found,) = roster.model_lines(twin)
    if found.served is None:
        assert not variant[:64].strip() or not variant[:64].isprintable()
        return
    for name in Served.__slots__:
        text = getattr(found.served, name)
        assert text.isprintable()
        assert len(text) <= 500
    assert len(cells_of(found)["variant"]) < 300


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
        assert response.content_type == "text/html"
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
    return text


def names(text: str) -> list[str]:
    return re.findall(r'data-link="/devices/" data-cell="name" href="/devices/([^"]+)"', text)


async def test_an_empty_fleet_shows_the_command_that_comes_next(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    text = await page(session, f"{stage.url}/devices")
    assert "No device yet" in text
    assert "fogline-agent run --hub 127.0.0.1:8001 --bundle" in text
    assert names(text) == []


async def test_a_thousand_devices_are_paged_on_the_server(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join(*(f"kiosk-{i}" for i in range(1000)), runs=1)
    text = await page(session, f"{stage.url}/devices?page=3&size=100")
    assert names(text) == [f"kiosk-{i}" for i in range(200, 300)]
    assert "201 to 300 of 1,000 devices" in text
    assert 'href="/devices?size=100&amp;page=2"' in text
    assert 'href="/devices?size=100&amp;page=4"' in text
    assert len(names(await page(session, f"{stage.url}/devices"))) == 50


async def test_filters_are_links_that_keep_the_rest_of_the_state(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", runs=1)
    await stage.join("gate", online=False)
    text = await page(session, f"{stage.url}/devices?status=offline&q=ga&sort=-name")
    assert names(text) == ["gate"]
    assert 'href="/devices?q=ga&amp;sort=-name" aria-current="true"' in text  # takes it away
    assert 'href="/devices?status=offline&amp;update=idle&amp;q=ga&amp;sort=-name"' in text
    assert 'aria-sort="descending"' in text
    text = await page(session, f"{stage.url}/devices?q=nobody")
    assert "No device matches" in text
    assert '<a href="/devices">Clear filters</a>' in text


async def test_a_device_that_only_counts_is_listed_too(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    now = time.time()
    stage.devices.seen(Device("lonely", now, now, "0.1.0", "x86_64/cpu", "closed", 1))
    assert names(await page(session, f"{stage.url}/devices")) == ["lonely"]
    text = await page(session, f"{stage.url}/devices/lonely")
    assert "it has not reported through the broker" in text


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/devices?status=away", 400, "Status must be one of online, offline"),
        ("/devices?q=a&q=b", 400, "Q comes twice"),
        ("/devices/nobody", 404, "never heard of a device &#39;nobody&#39;"),
        ("/devices/%3Cb%3E", 404, "&lt;b&gt;"),
    ],
)
async def test_what_cannot_be_shown_is_a_page_with_a_sentence(
    stage: Stage, session: aiohttp.ClientSession, path: str, status: int, said: str
) -> None:
    assert said in await page(session, stage.url + path, status)


async def test_a_device_shows_what_is_wanted_what_runs_and_why_it_failed(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", runs=1)
    await stage.fleet.controller.want(["kiosk"], "digits", 3)
    await stage.published("kiosk", 1)
    await stage.report(
        ["kiosk"],
        pb.ReportedModel(
            model="digits",
            desired_release=3,
            active_release=1,
            active_version="1.0.0",
            phase="rejected",
            code="self-test/deviation",
            sentence="The largest error is <b>11.3</b>.",
            attempt=1,
            figures={"max_abs_error": 11.3},
        ),
    )

    def answer(connection: Any) -> None:
        device = {"name": "kiosk", "first_seen": 0, "last_seen": 0, "agent_version": ""}
        connection.execute(
            schema.device.insert().values(**device, hardware_class="", link="", rss_bytes=0)
        )
        counted = {"device": "kiosk", "model": "digits", "release": "digits@1", "tier": "edge"}
        for minute, rows in ((int(time.time() // 60), 30), (0, 7000)):
            connection.execute(
                schema.outcome.insert().values(
                    **counted,
                    minute=minute,
                    quality="degraded",
                    reason="hub_unreachable",
                    rows=rows,
                )
            )

    await stage.store.write(answer)
    text = await page(session, f"{stage.url}/devices/kiosk")
    for said in (
        "digits@3 was refused",
        "The largest error is &lt;b&gt;11.3&lt;/b&gt;.",
        "self-test/deviation",
        "It keeps running digits@1 (1.0.0).",
        "max abs error 11.3",
        'data-text="wanted">1<',
        'data-text="reported">1<',
        "hub unreachable",
        "30 rows in 15",
    ):
        assert said in text, said
    assert "7,0" not in text  # too long ago
    assert names(await page(session, f"{stage.url}/devices?update=failed")) == ["kiosk"]


async def test_a_link_is_told_in_words_and_only_of_devices_that_are_there(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("gate")
    await stage.join("gone", online=False)
    listed = await page(session, f"{stage.url}/devices")
    assert re.findall(r'data-cell="link">([^<]*)<', listed)[:2] == ["works", figures.NOTHING]
    assert "link works" in await page(session, f"{stage.url}/devices/gate")
    assert names(await page(session, f"{stage.url}/devices?q=works")) == ["gate"]


async def test_a_device_says_what_the_certificate_promises_under_which_it_answers(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    issued = await stage.fleet.certificates.list("digits", 2)
    held = next(one for one in issued if one.certificate.variant == "int8-qdq")
    serving = answers(certificate=held.id)
    await stage.join("kiosk", runs=2, version="1.1.0", serving=serving)
    text = await page(session, f"{stage.url}/devices/kiosk")
    promise = certificate_views.promise(held.certificate)
    assert '<dd data-cell="certificate">Holds</dd>' in text
    assert f'data-cell="promise">{promise}</p>' in text
    await stage.fleet.certificates.withdraw("digits", 2, held.id, reason="a <wrong> scale")
    text = await page(session, f"{stage.url}/devices/kiosk")
    assert '<dd data-cell="certificate">Withdrawn</dd>' in text
    assert f'data-cell="promise">Withdrawn: a &lt;wrong&gt; scale. {promise}</p>' in text
    for strange in ("f" * 16, "\0", "<b>", "x" * 9000, "../" * 5):
        await stage.join("kiosk", runs=2, serving=answers(certificate=strange))
        text = await page(session, f"{stage.url}/devices/kiosk")
        assert '<dd data-cell="certificate">' in text
        assert "<b>" not in text.partition('data-table="models"')[2]
        assert "has not issued" in text or strange == "\0"
    for model, number in (("digits", (1 << 64) - 1), ("di\0gits", 2), ("digits", 1 << 31)):
        odd = pb.ReportedModel(
            model=model, active_release=number, serving=answers(certificate=held.id)
        )
        await stage.report(["kiosk"], odd)
        assert "has not issued" in await page(session, f"{stage.url}/devices/kiosk")


async def test_hostile_words_of_a_device_are_only_words(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    hostile = "<script>alert(1)</script>" + '"' * 9000
    serving = answers(hostile, hostile, hostile, provider=hostile, hardware=hostile)
    await stage.join("kiosk", runs=1, serving=serving)
    for path in ("/devices", "/devices/kiosk", "/models", "/models/digits/1"):
        text = await page(session, stage.url + path)
        assert "<script>alert" not in text, path
        assert '"' * 600 not in text.replace("&#34;", '"'), path
    text = await page(session, f"{stage.url}/devices?variant=%3Cscript%3E&serves=fallback")
    assert "answers with &lt;script&gt;" in text


async def test_fallbacks_are_counted_and_the_filter_stays_while_one_looks_around(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk-1", "kiosk-2", runs=1, serving=answers())
    await stage.join("kiosk-3", runs=1, serving=answers("fp32", aside="no certificate"))
    text = await page(session, f"{stage.url}/devices")
    assert re.search(r'href="/devices\?serves=fallback".*Fallback.*>1<', text)
    text = await page(session, f"{stage.url}/devices?runs=digits%401&serves=fallback")
    assert names(text) == ["kiosk-3"]
    assert text.count('<input type="hidden" name="serves" value="fallback">') == 2
    assert 'href="/devices?runs=digits%401" aria-current="true"' in text  # takes it away
    deploy = f"{stage.url}/deploy?release=digits%402&to=match&serves=fallback&variant=fp32"
    assert "Deploy digits@2 to 1 device?" in await page(session, deploy)


async def test_a_tab_is_sent_the_rows_of_its_page_and_follows_a_device(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join(*(f"kiosk-{i}" for i in range(60)), runs=1)
    async with session.ws_connect(f"{stage.url}/api/v1/live") as socket:
        await socket.receive_json(timeout=5)
        await socket.send_json({"sub": {"devices": {"page": "2"}}})
        value = (await socket.receive_json(timeout=5))["value"]
        assert [row["key"] for row in value["tables"]["devices"]] == [
            f"kiosk-{i}" for i in range(50, 60)
        ]
        assert value["text"]["count_online"] == "60"
        for sub, said in (
            ({"devices": {"page": "x"}}, "page must be"),
            ({"device": {"name": "nobody"}}, "never heard of a device 'nobody'"),
            ({"device": {"name": "../x"}}, "device has one parameter"),
            ({"device": {}}, "device has one parameter"),
        ):
            await socket.send_json({"sub": sub})
            while "error" not in (message := await socket.receive_json(timeout=5)):
                pass
            assert said in message["error"]
        await socket.send_json({"sub": {"device": {"name": "kiosk-1"}}})
        while (message := await socket.receive_json(timeout=5))["topic"] != "device":
            pass
        assert message["value"]["text"]["standing"] == "Idle"
        await stage.fleet.controller.want(["kiosk-1"], "digits", 2)
        while message["value"]["text"]["standing"] != "Queued":
            message = await socket.receive_json(timeout=5)
        assert len(json.dumps(message)) < 20_000
        stage.devices.left("kiosk-1")
        await stage.fleet.forget("kiosk-1", time.time())
        while "error" not in (message := await socket.receive_json(timeout=5)):
            pass
        assert "'kiosk-1', or has forgotten it" in message["error"]
        await socket.send_json({"sub": {"devices": {}}})  # the others are watched as before
        value = (await socket.receive_json(timeout=5))["value"]
        assert value["text"]["count_online"] == "59"


async def test_a_device_is_forgotten_after_its_page_has_said_what_that_means(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", runs=1, online=False)
    await stage.join("shop")
    await stage.fleet.controller.want(["kiosk"], "digits", 2)
    await stage.published("kiosk", 1)
    assert 'href="/devices/kiosk/forget"' in await page(session, f"{stage.url}/devices/kiosk")
    asked = await page(session, f"{stage.url}/devices/kiosk/forget")
    assert "Forget kiosk?" in asked
    assert "goes on running digits@1" in asked
    asked = await page(session, f"{stage.url}/devices/shop/forget")
    assert "shop is online" in asked
    assert 'action="/devices/shop/forget"' not in asked
    async with session.post(f"{stage.url}/devices/shop/forget") as response:
        assert response.status == 409
        assert "Shop is online" in await response.text()
    assert names(await page(session, f"{stage.url}/devices")) == ["kiosk", "shop"]
    url = f"{stage.url}/devices/kiosk/forget"
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        async with session.post(url, headers=headers) as response:
            assert response.status == 403
    async with session.post(url) as response:
        assert (response.status, response.url.path) == (200, "/devices")
        assert names(await response.text()) == ["shop"]
    async with asyncio.timeout(10):
        while "kiosk" in stage.broker.desired:
            await asyncio.sleep(0.005)
    async with session.post(url) as response:
        assert response.status == 404
        assert "no device &#39;kiosk&#39;" in (await response.text()).lower()
    await page(session, f"{stage.url}/devices/kiosk", 404)
    await page(session, f"{stage.url}/devices/kiosk/forget", 404)


async def test_devices_are_read_again_only_after_something_changed(
    stage: Stage, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.join("kiosk")
    reads = []
    twins = stage.fleet.controller.twins

    async def counted() -> Any:
        reads.append(1)
        return await twins()

    monkeypatch.setattr(stage.fleet.controller, "twins", counted)
    for _ in range(3):
        await page(session, f"{stage.url}/devices")
    assert len(reads) == 1
    await stage.join("gate")
    assert names(await page(session, f"{stage.url}/devices")) == ["gate", "kiosk"]
    assert len(reads) == 2
