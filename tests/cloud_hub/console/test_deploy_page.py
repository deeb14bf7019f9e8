import html
import re
from collections.abc import AsyncIterator

import aiohttp
import pytest

from cloud_hub.errors import StoreFailed
from cloud_hub.fleet.devices import Device
from fogline_protocol.v1 import fleet_pb2 as pb
from tests.cloud_hub.console.fleet_stage import Stage
from tests.cloud_hub.console.stage import only_the_right_token


@pytest.fixture
async def stage(staged: Stage) -> AsyncIterator[Stage]:
    async with staged.served():
        yield staged


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def review(
    session: aiohttp.ClientSession, stage: Stage, query: str, status: int = 200
) -> str:
    async with session.get(f"{stage.url}/deploy?{query}") as response:
        text = await response.text()
        assert response.status == status, text
    return html.unescape(text)


def confirmed(text: str) -> list[str]:
    """Return the devices that the confirmation names."""
    found = re.search(r'name="devices" value="([^"]*)"', text)
    return found[1].split() if found else []


async def wanted(stage: Stage) -> dict[str, int]:
    twins = await stage.fleet.controller.twins()
    return {twin.device: twin.desired.get("digits", 0) for twin in twins}


async def test_the_review_says_exactly_what_will_happen_and_changes_nothing(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk-1", "kiosk-2", runs=1)
    await stage.join("gate", runs=1, online=False)
    await stage.join("camera", hardware="aarch64/cpu", version="0.9.0")
    await stage.join("done", runs=2, version="1.1.0")
    await stage.fleet.controller.want(["done"], "digits", 2)
    await stage.join("ahead", runs=3, version="1.2.0")
    before = await wanted(stage)
    text = await review(session, stage, "release=digits%402&to=all")
    assert "Deploy digits@2 to 5 devices?" in text
    assert "3 devices go from digits@1 (1.0.0) to digits@2 (1.1.0)." in text
    assert "1 device goes from digits 0.9.0, installed by hand to digits@2 (1.1.0)." in text
    assert "1 device is to run digits@2 already: nothing changes there." in text
    assert "1 device is offline now and will follow when back: gate." in text
    assert "1 device runs a later release and will go back: ahead." in text
    assert "No certificate holds for the hardware class of 1 device: camera." in text
    assert confirmed(text) == ["ahead", "camera", "gate", "kiosk-1", "kiosk-2"]
    assert await wanted(stage) == before


async def test_a_forced_release_and_a_running_update_are_warned_about(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", runs=1)
    await stage.fleet.controller.want(["kiosk"], "digits", 2)
    text = await review(session, stage, "release=digits%403&to=names&names=kiosk")
    assert "was forced past the hub" in text
    assert "1 device is in the middle of another update, which this one replaces: kiosk." in text
    text = await review(session, stage, "release=digits-hub%401&to=all")
    assert "escalates to no model" in text


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("to=names&names=kiosk-1", ["kiosk-1"]),
        ("to=names&names=kiosk-1&names=gate", ["gate", "kiosk-1"]),
        ("to=names&names=kiosk-*,+gate", ["gate", "kiosk-1", "kiosk-2", "kiosk-10"]),
        ("to=model", ["gate", "kiosk-1", "kiosk-2", "kiosk-10"]),
        ("to=match&q=kiosk&status=online", ["kiosk-1", "kiosk-2", "kiosk-10"]),
        ("to=match&q=nothing", []),
    ],
)
async def test_devices_are_chosen_by_name_pattern_or_filter(
    stage: Stage, session: aiohttp.ClientSession, query: str, names: list[str]
) -> None:
    await stage.join("kiosk-10", "kiosk-2", "kiosk-1", runs=1)
    await stage.join("gate", runs=1, online=False)
    text = await review(session, stage, f"release=digits%402&{query}")
    assert confirmed(text) == names
    assert ('type="submit">Deploy to' in text) == bool(names)  # nobody deploys to no device


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("release=digits%402&to=names&names=nobody", 400, "No device is called 'nobody'."),
        ("release=digits%402&to=names", 400, "No device is named"),
        ("release=digits%402", 400, "To must be all, model, names or match"),
        ("release=digits%402&to=match&size=3", 400, "Size must be one of"),
        ("release=digits%409&to=all", 404, "There is no release 9 of 'digits'"),
        ("release=digits&to=all", 400, "MODEL@NUMBER"),
        ("to=all", 400, "MODEL@NUMBER"),
    ],
)
async def test_a_choice_that_makes_no_sense_gets_a_sentence(
    stage: Stage, session: aiohttp.ClientSession, query: str, status: int, said: str
) -> None:
    await stage.join("kiosk", runs=1)
    assert said in await review(session, stage, query, status)


async def test_confirming_wants_the_release_on_the_named_devices_only(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", "gate", runs=1)
    devices = confirmed(await review(session, stage, "release=digits%402&to=all"))
    await stage.join("late", runs=1)  # appeared after the review
    form = {"release": "digits@2", "devices": " ".join(devices)}
    for _ in range(2):  # a second click
        async with session.post(
            f"{stage.url}/deploy", data=form, allow_redirects=False
        ) as response:
            assert response.status == 303
            assert response.headers["Location"] == "/devices?wants=digits@2"
    assert await wanted(stage) == {"kiosk": 2, "gate": 2, "late": 0}
    await stage.published("kiosk", 1)
    await stage.published("gate", 1)
    assert {d.generation for d in stage.broker.desired.values()} == {1}
    (sent,) = stage.broker.desired["kiosk"].releases
    assert (sent.model, sent.release, sent.version) == ("digits", 2, "1.1.0")
    assert len(sent.certificate_targets) == 2


async def test_a_fleet_of_a_thousand_is_deployed_to_in_one_go(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join(*(f"kiosk-{i}" for i in range(1000)), runs=1)
    text = await review(session, stage, "release=digits%402&to=all")
    assert "And 800 more devices, treated the same." in text
    form = {"release": "digits@2", "devices": " ".join(confirmed(text))}
    async with session.post(f"{stage.url}/deploy", data=form, allow_redirects=False) as response:
        assert response.status == 303
    assert set((await wanted(stage)).values()) == {2}


@pytest.mark.parametrize(
    ("form", "status", "said"),
    [
        ({"release": "digits@2"}, 400, "No device is named"),
        ({"release": "digits@2", "devices": "kiosk nobody"}, 404, "No device 'nobody'"),
        ({"release": "digits@9", "devices": "kiosk"}, 404, "There is no release 9"),
        ({"devices": "kiosk"}, 400, "MODEL@NUMBER"),
    ],
)
async def test_a_deployment_that_cannot_be_changes_nothing(
    stage: Stage, session: aiohttp.ClientSession, form: dict[str, str], status: int, said: str
) -> None:
    await stage.join("kiosk", runs=1)
    async with session.post(f"{stage.url}/deploy", data=form) as response:
        assert response.status == status
        assert said in html.unescape(await response.text())
    assert await wanted(stage) == {"kiosk": 0}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_a_form_of_another_site_is_refused(
    stage: Stage, session: aiohttp.ClientSession, headers: dict[str, str]
) -> None:
    await stage.join("kiosk", runs=1)
    form = {"release": "digits@2", "devices": "kiosk"}
    async with session.post(f"{stage.url}/deploy", data=form, headers=headers) as response:
        assert response.status == 403
    assert await wanted(stage) == {"kiosk": 0}


async def test_strangers_are_sent_to_the_sign_in_page(
    staged: Stage, session: aiohttp.ClientSession
) -> None:
    staged.console.authenticate = only_the_right_token
    async with staged.served() as stage:
        await stage.join("kiosk", runs=1)
        for method, path in (
            ("GET", "/devices"),
            ("GET", "/devices/kiosk"),
            ("GET", "/models"),
            ("GET", "/models/digits/1"),
            ("GET", "/deploy"),
            ("POST", "/deploy"),
        ):
            async with session.request(method, stage.url + path, allow_redirects=False) as response:
                assert response.status == 303
                assert response.headers["Location"].startswith("/login?next=")


async def test_a_database_that_fails_is_told_in_a_sentence(
    stage: Stage, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.join("kiosk", runs=1)

    async def full(*_: object) -> None:
        raise StoreFailed("the database refused: database or disk is full")

    monkeypatch.setattr(stage.fleet.controller, "want", full)
    form = {"release": "digits@2", "devices": "kiosk"}
    async with session.post(f"{stage.url}/deploy", data=form) as response:
        assert response.status == 503
        assert "database or disk is full" in await response.text()


async def test_a_device_that_only_counts_is_left_out_with_the_reason(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", runs=1)
    stage.devices.seen(Device("lonely", 1.0, 1.0, "0.1.0", "x86_64/cpu", "closed", 1))
    text = await review(session, stage, "release=digits%402&to=all")
    assert confirmed(text) == ["kiosk"]
    assert "1 device is left out" in text
    assert "lonely" in text


async def test_a_phase_that_is_over_makes_the_device_current(
    stage: Stage, session: aiohttp.ClientSession
) -> None:
    await stage.join("kiosk", runs=1)
    await stage.fleet.controller.want(["kiosk"], "digits", 2)
    await stage.published("kiosk", 1)
    done = pb.ReportedModel(
        model="digits",
        desired_release=2,
        active_release=2,
        active_version="1.1.0",
        phase="committed",
    )
    await stage.report(["kiosk"], done)
    async with session.get(f"{stage.url}/devices?update=current") as response:
        assert "digits@2" in await response.text()
    assert "Nothing would change" in await review(session, stage, "release=digits%402&to=all")
