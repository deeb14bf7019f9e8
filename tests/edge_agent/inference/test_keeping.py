"""What the hub may keep: nothing without consent, nothing private, and to no other server a byte."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from edge_agent.runtime.release import Release, load, read
from fogline_protocol.errors import BadRequest
from fogline_protocol.examples import KEEP
from fogline_protocol.inference import InferRequest
from tests.edge_agent import bundles
from tests.edge_agent.bundles import SURE, UNSURE
from tests.edge_agent.inference.test_router import routed, said
from tests.fakes import FakeHub, Serving


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return load(read(bundles.make(tmp_path / "double").path))


def own(hub: FakeHub, at: int = -1) -> set[str]:
    """Return what of ours a request carried."""
    request = hub.requests[at]
    names = {*request.inputs, *request.parameters} - {"fogline.digest"}
    return {name for name in names if name.startswith("fogline.")}


async def test_nothing_says_that_it_may_be_kept_unless_somebody_consents(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, device="kiosk") as r:
        for _ in range(3):
            await r.ask(UNSURE)
        await r.ask(UNSURE, source="cam")
        await r.ask(UNSURE, keep=False)
    assert [own(hub, at) for at in range(5)] == [set()] * 5
    assert hub.kept == []


async def test_a_request_that_may_be_kept_carries_the_edges_answer_once_the_hub_says_it_keeps(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, device="kiosk") as r:
        await r.ask(UNSURE, keep=True)
        assert own(hub) == {KEEP}  # nobody has said yet that it is wanted
        await r.ask(SURE, UNSURE, UNSURE * 2, keep=True, source="cam", per_row=True)
    (kept,) = hub.kept
    assert (kept.device, kept.release, kept.model) == ("kiosk", "double@1.0.0", "double")
    variant = release.choice.variant
    assert kept.sha256 == release.directory.variant_sha256(variant)
    # The rows that escalated, and what was said of them here.
    np.testing.assert_allclose(kept.outputs["logits"], np.concatenate([UNSURE, UNSURE * 2]) * 2)
    assert kept.scores.shape == (2,)
    assert kept.propensities.tolist() == [1, 1]
    assert kept.reasons == ["uncertain", "uncertain"]
    assert kept.sources == ["cam", "cam"]


@pytest.mark.parametrize(
    ("keep", "asked", "marked"),
    [
        (["double"], {}, True),
        (["double"], {"source": "cam"}, True),
        (["double"], {"keep": False}, False),
        (["double/cam"], {"source": "cam"}, True),
        (["double/cam"], {"source": "other"}, False),
        (["double/cam"], {}, False),
        (["other"], {}, False),
        (["other"], {"keep": True}, True),
        (["double"], {"private": True}, None),
        ([], {"private": True, "keep": True}, None),
    ],
)
async def test_consent_is_the_applications_or_the_configurations_and_privacy_beats_both(
    hub: FakeHub, door: Serving, release: Release, keep: list[str], asked: dict[str, object],
    marked: bool | None,
) -> None:  # fmt: skip
    hub.keeps = True
    async with routed(door.address, release, device="kiosk", keep=keep) as r:
        await r.ask(UNSURE, **asked)  # type: ignore[arg-type]
    if marked is None:
        assert hub.requests == []
    else:
        assert (own(hub) == {KEEP}) is marked


async def test_an_agent_that_is_private_lets_nobody_consent(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, private=True, device="kiosk") as r:
        assert said(await r.ask(UNSURE, keep=True)) == "edge degraded privacy"
    assert hub.requests == []


async def test_a_server_that_keeps_nothing_never_sees_the_edges_answer(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release, device="kiosk", keep=["double"]) as r:
        for _ in range(3):
            assert said(await r.ask(UNSURE)) == "hub hub uncertain"
    assert [own(hub, at) for at in range(3)] == [{KEEP}] * 3


async def test_another_server_in_the_hubs_place_costs_one_answer_at_most(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, device="kiosk", keep=["double"]) as r:
        for _ in range(2):
            assert said(await r.ask(UNSURE)) == "hub hub uncertain"
        hub.keeps = False  # it knows nothing of examples: unknown inputs
        ends = [said(await r.ask(UNSURE)) for _ in range(3)]
        assert ends == ["edge degraded link", "hub hub uncertain", "hub hub uncertain"]
        assert own(hub) == {KEEP}


async def test_what_may_be_kept_and_what_may_not_never_travel_together(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    hub.keeps = True
    async with routed(door.address, release, device="kiosk") as r:
        await r.ask(UNSURE, keep=True)
        hub.requests.clear()
        await asyncio.gather(
            *(r.ask(UNSURE * n, keep=n % 2 == 0, source=f"s{n}") for n in range(1, 9))
        )
    assert sorted(hub.rows_asked) == [4, 4]  # each kind in one request
    (kept,) = hub.kept
    assert sorted(kept.sources) == ["s2", "s4", "s6", "s8"]
    for source, logits in zip(kept.sources, kept.outputs["logits"], strict=True):
        np.testing.assert_allclose(logits, UNSURE[0] * int(source[1:]) * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"keep": "yes"}, r"fogline\.keep must be true or false, got 'yes'"),
        ({"source": 7}, r"fogline\.source must be printable text of at most 200"),
        ({"source": "x" * 201}, r"fogline\.source must be printable text"),
        ({"sauce": "x"}, r"unknown parameter 'fogline\.sauce', known are .*fogline\.source"),
    ],
)
async def test_options_that_make_no_sense_are_refused_by_name(
    release: Release, asked: dict[str, object], sentence: str
) -> None:
    async with routed(None, release) as r:
        with pytest.raises(BadRequest, match=sentence):
            await r.ask(SURE, **asked)  # type: ignore[arg-type]


async def test_a_model_without_rows_is_one_example(
    hub: FakeHub, door: Serving, tmp_path: Path
) -> None:
    hub.keeps = True
    made = bundles.make(tmp_path / "b", onnx="double_one.onnx", max_batch=0)
    async with routed(door.address, load(read(made.path)), device="kiosk") as r:
        r.router._escalation._keeping["judge"] = (
            True  # the fake hub knows rows only, and answers nothing else
        )
        request = InferRequest("double", {"x": UNSURE[0]}, parameters={KEEP: True})
        await r.router.infer(request, None)
    (kept,) = hub.kept
    assert kept.outputs["logits"].tolist() == [pytest.approx((UNSURE[0] * 2).tolist())]
    assert (len(kept.scores), kept.reasons) == (1, ["uncertain"])


async def test_consent_for_a_model_that_is_not_served_is_noticed_when_the_set_of_models_changes(
    release: Release, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned() -> list[str]:
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        caplog.clear()
        return said

    async with routed(None, keep=["duoble/cam", "other"]) as r:
        r.router.watch_consent()
        assert warned() == [
            "keep duoble/cam: this device serves no model duoble, only none so far",
            "keep other: this device serves no model other, only none so far",
        ]
        r.router.install(release)
        assert warned() == [
            "keep duoble/cam: this device serves no model duoble, only double; "
            "did you mean double?",
            "keep other: this device serves no model other, only double",
        ]
        r.router.install(load(read(bundles.make(tmp_path / "next", version="2.0.0").path)))
        assert warned() == []  # another release of the same models
        r.router.install(load(read(bundles.make(tmp_path / "other", model="other").path)))
        assert len(warned()) == 1
        r.router.remove("other")
        assert len(warned()) == 2
    assert warned() == []  # models that go because the agent stops are no news
