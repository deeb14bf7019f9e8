import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.inference.policy import Decision
from edge_agent.inference.router import Router
from edge_agent.inference.uplink import Answer, Question, Uplink
from edge_agent.runtime.release import Release, certified, load, read
from fogline_protocol import doors
from fogline_protocol.certificate import Certificate
from fogline_protocol.client import Client
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    Overloaded,
    ServerFault,
    Unavailable,
)
from fogline_protocol.inference import InferRequest, InferResponse, Parameter
from fogline_protocol.tensors import Array
from tests.edge_agent import bundles
from tests.edge_agent.bundles import SURE, UNSURE, rows
from tests.edge_agent.polling import until
from tests.fakes import HUB_DIGEST, FakeHub, Serving


class Noted:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, list[str]]] = []

    def answered(
        self, model: str, release: str, tier: str, seconds: float, outcomes: Sequence[Decision]
    ) -> None:
        ends = [f"{'hub' if o.escalate else 'edge'} {o.quality} {o.reason}" for o in outcomes]
        self.seen.append((model, release, tier, ends))


class Routed:
    """A router with the bundle ``double`` and a way to a fake hub."""

    def __init__(self, router: Router, uplink: Uplink | None, noted: Noted) -> None:
        self.router, self.uplink, self.noted = router, uplink, noted

    async def ask(
        self,
        *parts: Array,
        timeout_s: float | None = None,
        model: str = "double",
        outputs: Sequence[str] = (),
        **parameters: Parameter,
    ) -> InferResponse:
        named = {f"fogline.{key}": value for key, value in parameters.items()}
        request = InferRequest(model, rows(*parts), id="7", outputs=outputs, parameters=named)
        return await self.router.infer(
            request, None if timeout_s is None else time.monotonic() + timeout_s
        )


Start = Callable[..., contextlib.AbstractAsyncContextManager[Routed]]


@contextlib.asynccontextmanager
async def routed(
    address: str | None, *releases: Release, max_rows: int = 32, **options: object
) -> AsyncIterator[Routed]:
    noted = Noted()
    async with contextlib.AsyncExitStack() as parts:
        uplink = None
        if address is not None:
            uplink = await parts.enter_async_context(
                Uplink(lambda: Client(address), max_rows=max_rows)
            )
            await until(lambda: uplink.round_trip_s > 0 or not uplink.link_up)
        router = Router(uplink=uplink, observer=noted, **options)  # type: ignore[arg-type]
        for release in releases:
            router.install(release)
        parts.callback(router.close)
        yield Routed(router, uplink, noted)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return load(read(bundles.make(tmp_path / "double").path))


def said(response: InferResponse) -> str:
    p = response.parameters
    return f"{p['fogline.tier']} {p['fogline.quality']} {p['fogline.reason']}"


def first(response: InferResponse) -> list[float]:
    return [round(value, 3) for value in response.outputs["logits"][:, 0].tolist()]


HERE, THERE = 10.0, 100.1  # what the edge says to SURE, the hub to UNSURE
HERE_UNSURE = 0.2


async def test_a_confident_answer_stays_here(hub: FakeHub, door: Serving, release: Release) -> None:
    async with routed(door.address, release) as r:
        response = await r.ask(SURE)
    assert (said(response), first(response)) == ("edge certified confident", [HERE])
    assert response.id == "7"
    assert response.parameters["fogline.release"] == "double@1.0.0"
    assert response.parameters["fogline.score"] == pytest.approx(0.99991, abs=1e-5)
    certificate = release.choice.certificate
    assert certificate is not None
    assert response.parameters["fogline.certificate"] == certificate.id
    assert not hub.requests


async def test_an_uncertain_one_is_answered_by_the_hub(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        response = await r.ask(UNSURE)
    assert said(response) == "hub hub uncertain"
    assert first(response) == [pytest.approx(THERE)]
    assert hub.requests[0].model == "judge"
    assert list(hub.requests[0].outputs) == ["logits"]


async def test_rows_are_decided_one_by_one_and_merged_in_place(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        response = await r.ask(UNSURE, SURE, UNSURE * 2, SURE, per_row=True)
        assert first(response) == [pytest.approx(v) for v in (100.1, 10, 100.2, 10)]
        assert said(response) == "mixed certified confident"
        assert response.outputs["fogline.tier"].tolist() == [b"hub", b"edge", b"hub", b"edge"]
        assert response.outputs["fogline.quality"].tolist() == [
            b"hub", b"certified", b"hub", b"certified",
        ]  # fmt: skip
        scores = response.outputs["fogline.score"]
        assert scores.dtype == np.float32
        assert float(scores.min()) == response.parameters["fogline.score"]
        assert hub.rows_asked == [2]  # in one request
        assert r.noted.seen == [
            (
                "double", "double@1.0.0", "mixed",
                ["hub hub uncertain", "edge certified confident"] * 2,
            )
        ]  # fmt: skip


async def test_per_row_tensors_come_on_request_only(door: Serving, release: Release) -> None:
    async with routed(door.address, release) as r:
        assert list((await r.ask(SURE)).outputs) == ["logits"]


@pytest.mark.parametrize("total", [0, 1, 8, 9, 30])
async def test_any_number_of_rows_is_answered(
    hub: FakeHub, door: Serving, release: Release, total: int
) -> None:
    """max_batch is 8, and 3 rows escalate at a time."""
    x = np.concatenate([UNSURE, SURE] * (total // 2) + [UNSURE] * (total % 2) or [SURE[:0]])
    async with routed(door.address, release, max_rows=3) as r:
        response = await r.ask(x, per_row=True)
    expected = np.where(np.arange(total) % 2 == 0, x[:, 0] + 100, x[:, 0] * 2)
    assert response.outputs["logits"][:, 0] == pytest.approx(expected)
    assert response.outputs["logits"].shape == (total, 3)
    assert response.outputs["fogline.tier"].shape == (total,)
    assert sum(hub.rows_asked) == total - total // 2
    assert max(hub.rows_asked, default=0) <= 3
    assert ("fogline.score" in response.parameters) == (total > 0)


async def test_without_a_hub_uncertain_answers_stay_here_and_are_marked(release: Release) -> None:
    async with routed(None, release) as r:
        response = await r.ask(UNSURE, SURE)
        assert (said(response), first(response)) == ("edge degraded link", [HERE_UNSURE, HERE])
        assert said(await r.ask(SURE)) == "edge certified confident"


async def test_no_loss_of_the_hub_costs_an_answer(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        assert said(await r.ask(UNSURE)) == "hub hub uncertain"
        await door.stop()
        for _ in range(5):
            response = await r.ask(UNSURE, SURE)
            assert (said(response), first(response)) == ("edge degraded link", [HERE_UNSURE, HERE])
        uplink = r.uplink
        assert uplink is not None
        assert not uplink.link_up
        await door.start()
        await until(lambda: uplink.link_up)
        assert said(await r.ask(UNSURE)) == "hub hub uncertain"


async def test_a_silent_hub_takes_no_more_than_half_of_the_time(
    hub: FakeHub, door: Serving, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    async def noted(self: Uplink, question: Question, timeout_s: float) -> Answer:
        given.append(timeout_s)
        return await ask(self, question, timeout_s)

    ask = Uplink.ask
    monkeypatch.setattr(Uplink, "ask", noted)
    async with routed(door.address, release) as r:
        hub.gate.clear()
        began = time.monotonic()
        response = await r.ask(UNSURE, timeout_s=2.0)
        assert time.monotonic() - began < 2.0
        (half,) = given
        assert 0.5 < half <= 1.0
        assert said(response) == "edge degraded link"
        hub.gate.set()


async def test_a_refusing_hub_costs_quality_only_and_is_said_once(
    hub: FakeHub, door: Serving, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    hub.error = ServerFault("engine crashed")
    async with routed(door.address, release) as r:
        for _ in range(3):
            assert said(await r.ask(UNSURE)) == "edge degraded link"
    warnings = [m for m in caplog.messages if "engine crashed" in m]
    assert warnings == ["the hub does not answer for judge: engine crashed"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda inputs: {"logits": inputs["x"].astype(np.float64)},
        lambda inputs: {"logits": inputs["x"][:, :2]},
    ],
)
async def test_hub_rows_that_cannot_stand_beside_ours_are_not_used(
    hub: FakeHub,
    door: Serving,
    release: Release,
    answer: Callable[..., dict[str, Array]],
) -> None:
    hub.answer = answer
    async with routed(door.address, release) as r:
        response = await r.ask(UNSURE, SURE)
    assert (said(response), first(response)) == ("edge degraded link", [HERE_UNSURE, HERE])


async def test_too_little_time_for_a_round_trip_is_a_reason(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        assert r.uplink is not None
        r.uplink.round_trip_s = 1.0
        assert said(await r.ask(UNSURE, timeout_s=1.4)) == "edge degraded deadline"
        assert not hub.requests
        # and the estimate is measured again, so that it does not shut the hub out for ever
        await until(lambda: r.uplink is not None and r.uplink.round_trip_s < 1.0)


async def test_private_requests_never_leave(hub: FakeHub, door: Serving, release: Release) -> None:
    async with routed(door.address, release) as r:
        assert said(await r.ask(SURE, private=True)) == "edge uncertified privacy"
        response = await r.ask(UNSURE, private=True, mode="prefer_hub")
        assert said(response) == "edge degraded privacy"
        assert "fogline.certificate" not in response.parameters
        with pytest.raises(BadRequest, match="exclude each other"):
            await r.ask(UNSURE, private=True, mode="hub_only")
    async with routed(door.address, release_again(release), private=True) as r:
        assert said(await r.ask(UNSURE)) == "edge degraded privacy"
        assert said(await r.ask(UNSURE, private=False)) == "edge degraded privacy"
        with pytest.raises(Forbidden, match="nothing leaves"):
            await r.ask(UNSURE, mode="hub_only")
    assert not hub.requests


def release_again(release: Release) -> Release:
    return load(read(release.directory.path))


async def test_modes(hub: FakeHub, door: Serving, release: Release) -> None:
    async with routed(door.address, release) as r:
        assert said(await r.ask(UNSURE, mode="edge_only")) == "edge degraded mode"
        assert said(await r.ask(SURE, mode="edge_only")) == "edge certified confident"
        assert said(await r.ask(SURE, mode="prefer_edge")) == "edge certified confident"
        assert said(await r.ask(SURE, mode="prefer_hub")) == "hub hub preferred"
        response = await r.ask(SURE, mode="hub_only")
        assert (said(response), first(response)) == ("hub hub mode", [105.0])
        assert response.model == "double"
        assert "fogline.score" not in response.parameters


async def test_hub_only_passes_models_through_that_only_the_hub_knows(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        response = await r.ask(SURE, model="judge", mode="hub_only")
        assert (said(response), first(response)) == ("hub hub mode", [105.0])
        assert response.parameters["fogline.release"] == "judge@1"
        with pytest.raises(NotFound, match="no model 'nobody'"):
            await r.ask(SURE, model="nobody", mode="hub_only")


async def test_hub_only_without_a_hub_says_so(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(None, release) as r:
        with pytest.raises(Unavailable, match="has no hub"):
            await r.ask(SURE, mode="hub_only")
    async with routed(door.address, release_again(release)) as r:
        hub.gate.clear()
        with pytest.raises(DeadlineExceeded, match="no answer from the hub"):
            await r.ask(SURE, mode="hub_only", timeout_s=0.1)
        hub.gate.set()
        await door.stop()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await r.ask(SURE, mode="hub_only")


async def test_while_the_hub_wants_a_pause_requests_are_answered_here(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        hub.errors = [Overloaded("later", retry_after_s=30.0)]
        for _ in range(3):
            answer = await r.ask(UNSURE)
            assert answer.parameters["fogline.tier"] == "edge"
            assert answer.parameters["fogline.quality"] == "degraded"
            assert answer.parameters["fogline.reason"] == "link"
        assert len(hub.requests) == 1
        with pytest.raises(Unavailable, match="asked not to be asked for") as refused:
            await r.ask(SURE, mode="hub_only")
        assert 29 < (refused.value.retry_after_s or 0) <= 30


NAN: Array = np.array([[5, 0, np.nan]], np.float32)
INFINITE: Array = np.array([[5, -np.inf, 0]], np.float32)


async def test_input_that_is_not_finite_is_never_certified_and_costs_only_its_own_row(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        response = await r.ask(SURE, NAN, SURE, INFINITE, UNSURE, per_row=True)
        assert response.outputs["fogline.tier"].tolist() == [
            b"edge", b"hub", b"edge", b"hub", b"hub",
        ]  # fmt: skip
        assert r.noted.seen[-1][3] == [
            "edge certified confident", "hub hub input", "edge certified confident",
            "hub hub input", "hub hub uncertain",
        ]  # fmt: skip
        await door.stop()
        response = await r.ask(SURE, UNSURE, NAN, NAN, per_row=True)
        assert r.noted.seen[-1][3] == [
            "edge certified confident", "edge degraded link",
            "edge degraded input", "edge degraded input",
        ]  # fmt: skip
        assert said(await r.ask(NAN, private=True)) == "edge degraded input"


async def test_a_model_that_quantizes_its_input_away_does_not_make_it_certain(
    tmp_path: Path,
) -> None:
    """8 bits know no NaN: the model answers as if nothing were wrong, and with a high score."""
    async with routed(
        None, load(read(bundles.make(tmp_path / "mixes", onnx="mixes.onnx").path))
    ) as r:
        for x in (NAN, INFINITE):
            response = await r.ask(x)
            assert said(response) == "edge degraded input"
        assert said(await r.ask(SURE)) == "edge certified confident"


async def test_a_broken_input_is_no_example(hub: FakeHub, door: Serving, release: Release) -> None:
    hub.keeps = True
    async with routed(door.address, release, device="kiosk") as r:
        await r.ask(UNSURE, keep=True)  # now the hub has said that it keeps
        await r.ask(NAN, UNSURE, keep=True)
        assert hub.kept == []
        await r.ask(UNSURE, keep=True)
        assert len(hub.kept) == 1


async def test_a_new_hub_model_voids_the_certificate_until_the_old_one_is_back(
    hub: FakeHub, door: Serving, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    old = hub.digest
    async with routed(door.address, release) as r:
        hub.digest = "e" * 64
        assert said(await r.ask(UNSURE)) == "hub hub uncertain"  # from here on it is known
        response = await r.ask(SURE)
        assert said(response) == "hub hub no-certificate"
        assert "fogline.certificate" not in response.parameters
        assert said(await r.ask(SURE, mode="edge_only")) == "edge degraded no-certificate"
        assert "fogline.certificate" not in r.router.model_metadata("double", "").properties
        assert len([m for m in caplog.messages if "is void" in m]) == 1
        hub.digest = old
        assert said(await r.ask(SURE)) == "hub hub no-certificate"
        assert said(await r.ask(SURE)) == "edge certified confident"


async def test_a_hub_that_does_not_name_its_model_voids_the_certificate(
    hub: FakeHub, door: Serving, release: Release, caplog: pytest.LogCaptureFixture
) -> None:
    hub.digest = ""
    async with routed(door.address, release) as r:
        assert said(await r.ask(SURE)) == "edge certified confident"  # nothing was heard yet
        assert said(await r.ask(UNSURE)) == "hub hub uncertain"
        assert said(await r.ask(SURE)) == "hub hub no-certificate"
        assert len([m for m in caplog.messages if "is unknown now" in m]) == 1


async def test_an_expired_certificate_certifies_nothing_any_more(
    hub: FakeHub, door: Serving, tmp_path: Path
) -> None:
    made = bundles.make(tmp_path / "b", certified=False)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.5)
    bundles.add_certificate(made, expires_at=soon)
    release = load(read(made.path))
    async with routed(door.address, release) as r:
        assert said(await r.ask(SURE)) == "edge certified confident"
        await until(lambda: datetime.datetime.now(datetime.UTC) > soon)
        assert said(await r.ask(SURE)) == "hub hub no-certificate"


def under(release: Release, *certificates: Certificate) -> Release:
    """Return what is loaded under other certificates."""
    return certified(release, replace(release.directory, certificates=certificates))


async def test_a_certificate_is_replaced_and_withdrawn_between_two_requests(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    before = release.choice.certificate
    assert before is not None
    stricter = bundles.certificate(release.directory, threshold=0.99999)
    async with routed(door.address, release) as r:
        hub.gate.clear()
        in_flight = asyncio.create_task(r.ask(SURE, UNSURE, per_row=True))
        await until(lambda: hub.requests)
        assert r.router.serving("double") is release
        r.router.certify(under(release, stricter))
        hub.gate.set()
        response = await r.ask(SURE)
        assert said(response) == "hub hub uncertain"
        assert response.parameters["fogline.certificate"] == stricter.id
        # What was under way ends under the one that it began with.
        response = await in_flight
        assert response.parameters["fogline.certificate"] == before.id
        assert response.outputs["fogline.quality"].tolist() == [b"certified", b"hub"]
        r.router.certify(under(release))
        response = await r.ask(SURE)
        assert said(response) == "hub hub no-certificate"
        assert "fogline.certificate" not in response.parameters
        r.router.certify(under(release, before))
        assert said(await r.ask(SURE)) == "edge certified confident"
        assert "closed" not in repr(release.engine)
        (statistics,) = r.router.model_statistics("double", "")
        assert statistics.success.count == 4
    assert "closed" in repr(release.engine)


async def test_an_engine_is_closed_when_the_last_request_of_any_certificate_is_done(
    hub: FakeHub, door: Serving, release: Release, tmp_path: Path
) -> None:
    newer = load(read(bundles.make(tmp_path / "newer", version="1.1.0").path), number=2)
    async with routed(door.address, release) as r:
        hub.gate.clear()
        first_one = asyncio.create_task(r.ask(UNSURE))
        await until(lambda: len(hub.requests) == 1)
        r.router.certify(under(release))
        r.router.install(newer)
        assert "closed" not in repr(release.engine)
        hub.gate.set()
        assert (await first_one).parameters["fogline.release"] == "double@1.0.0"
        assert "closed" in repr(release.engine)


async def test_a_certificate_for_the_model_that_the_hub_has_now_ends_the_void(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        hub.digest = "e" * 64
        await r.ask(UNSURE)  # from here on it is known
        assert said(await r.ask(SURE)) == "hub hub no-certificate"
        other = bundles.certificate(release.directory, threshold=0.95)
        r.router.certify(under(release, other))
        assert said(await r.ask(SURE)) == "hub hub no-certificate"
        fitting = bundles.certificate(release.directory, hub_sha256="e" * 64)
        r.router.certify(under(release, fitting))
        assert said(await r.ask(SURE)) == "edge certified confident"


async def test_certifying_under_load_fails_no_request(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    known = [bundles.certificate(release.directory, items=400 + n) for n in range(5)]
    async with routed(door.address, release) as r:
        seen: list[object] = []

        async def keep_asking() -> None:
            while len(seen) < 400:
                seen.append((await r.ask(SURE, UNSURE)).parameters.get("fogline.certificate"))

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(keep_asking())
            for index, one in enumerate(known, start=1):
                await until(lambda index=index: len(seen) >= 60 * index)  # type: ignore[misc]
                r.router.certify(under(release, *[one][: index % 3]))
    assert set(seen) == {release.choice.certificate.id, None, *(known[n].id for n in (0, 1, 3, 4))}


async def test_a_pair_without_a_certificate_escalates_everything(
    hub: FakeHub, door: Serving, tmp_path: Path
) -> None:
    release = load(read(bundles.make(tmp_path / "b", certified=False).path))
    async with routed(door.address, release) as r:
        assert said(await r.ask(SURE)) == "hub hub no-certificate"
        await door.stop()
        response = await r.ask(SURE)
        assert said(response) == "edge degraded no-certificate"
        assert "fogline.score" in response.parameters


@pytest.mark.parametrize("scored", [True, False])
async def test_a_model_without_a_pair_answers_uncertified(
    hub: FakeHub, door: Serving, tmp_path: Path, scored: bool
) -> None:
    release = load(read(bundles.make(tmp_path / "b", paired=False, scored=scored).path))
    async with routed(door.address, release) as r:
        response = await r.ask(SURE, mode="prefer_hub", per_row=True)
    assert said(response) == "edge uncertified no-certificate"
    assert ("fogline.score" in response.parameters) == scored
    assert ("fogline.score" in response.outputs) == scored
    assert not hub.requests


TOKEN_SURE, TOKEN_UNSURE, PADDING = [5, 0, 0], [0.1, 0, 0], [0, 0, 0]


def tokens(*texts: Sequence[Sequence[float]], length: int = 4) -> dict[str, Array]:
    """Return the inputs of texts of these tokens, padded with what nobody must look at."""
    x = np.array([[*text, *[PADDING] * (length - len(text))] for text in texts], np.float32)
    mask = np.array([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    return {"x": x, "attention_mask": mask}


@pytest.fixture
def tagger(tmp_path: Path) -> Release:
    made = bundles.make(
        tmp_path / "tagger", onnx="tokens.onnx", model="tagger", score=bundles.LEAST_SOFTMAX
    )
    return load(read(made.path))


async def test_a_text_is_as_certain_as_its_least_certain_token(tagger: Release) -> None:
    texts = [[TOKEN_SURE] * 2, [TOKEN_SURE, TOKEN_UNSURE, TOKEN_SURE], [TOKEN_SURE] * 4, []]
    async with routed(None, tagger) as r:
        request = InferRequest("tagger", tokens(*texts), parameters={"fogline.per_row": True})
        response = await r.router.infer(request, None)
        alone = [
            (await r.router.infer(InferRequest("tagger", tokens(text, length=9)), None)).parameters
            for text in texts
        ]
    scores = response.outputs["fogline.score"]
    assert scores.tolist() == pytest.approx([0.9999, 0.379, 0.9999, 1.0], abs=1e-3)
    assert response.outputs["fogline.quality"].tolist() == [
        b"certified", b"degraded", b"certified", b"certified",
    ]  # fmt: skip
    assert response.parameters["fogline.reason"] == "link"
    assert response.parameters["fogline.score"] == scores.min()
    # More padding and other company: the very same scores.
    assert [each["fogline.score"] for each in alone] == scores.tolist()


async def test_a_mask_of_other_tokens_is_refused_with_both_shapes(tagger: Release) -> None:
    given = tokens([TOKEN_SURE] * 2)
    given["attention_mask"] = given["attention_mask"][:, :1]
    async with routed(None, tagger) as r:
        with pytest.raises(
            BadRequest, match=r"'attention_mask' .* is \[1, 1\], but output 'logits'"
        ):
            await r.router.infer(InferRequest("tagger", given), None)
        fits = InferRequest("tagger", tokens([TOKEN_SURE]))
        assert said(await r.router.infer(fits, None)) == "edge certified confident"


async def test_the_best_classes_carry_the_labels_of_the_release() -> None:
    async with routed(None, load(read(bundles.DIGITS))) as r:
        image = np.zeros((2, 1, 8, 8), np.float32)
        request = InferRequest("digits", {"image": image}, classification={"logits": 2})
        ranked = (await doors.answer(r.router, request, None)).outputs["logits"]
        plain = (await r.router.infer(InferRequest("digits", {"image": image}), None)).outputs
    best = int(plain["logits"][0].argmax())
    assert ranked.shape == (2, 2)
    assert ranked[0, 0] == f"{plain['logits'][0, best]:f}:{best}:{best}".encode()


async def test_a_model_without_rows_is_decided_as_one(
    hub: FakeHub, door: Serving, tmp_path: Path
) -> None:
    made = bundles.make(tmp_path / "b", onnx="double_one.onnx", max_batch=0)
    async with routed(door.address, load(read(made.path))) as r:
        request = InferRequest("double", {"x": SURE[0]})
        response = await r.router.infer(request, None)
        assert said(response) == "edge certified confident"
        assert response.outputs["logits"].tolist() == [10, 0, 0]
        # the fake hub knows rows only, so the escalation is refused, and the answer stands
        response = await r.router.infer(InferRequest("double", {"x": UNSURE[0]}), None)
        assert said(response) == "edge degraded link"
        assert hub.requests[0].inputs["x"].shape == (3,)


async def test_only_the_outputs_asked_for_come_back(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        assert list((await r.ask(UNSURE, outputs=["logits"])).outputs) == ["logits"]
        with pytest.raises(BadRequest, match="unknown output 'nothing'"):
            await r.ask(SURE, outputs=["nothing"])


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"mode": "fast"}, r"must be one of edge_only, .*got 'fast'"),
        ({"mode": 1}, r"must be one of edge_only"),
        ({"private": "true"}, r"fogline\.private must be true or false, got 'true'"),
        ({"per_row": 1}, r"fogline\.per_row must be true or false, got 1"),
        ({"modus": "edge_only"}, r"unknown parameter 'fogline\.modus', known are fogline\.mode"),
        ({"tier": "edge"}, r"unknown parameter 'fogline\.tier'"),
    ],
)
async def test_parameters_nobody_knows_are_refused(
    release: Release, parameters: dict[str, Parameter], text: str
) -> None:
    async with routed(None, release) as r:
        with pytest.raises(BadRequest, match=text):
            await r.ask(SURE, **parameters)  # type: ignore[arg-type]


async def test_the_hub_is_told_foreign_parameters_and_of_ours_the_file_to_compare_with(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release) as r:
        parameters: dict[str, Parameter] = {
            "priority": 3,
            "timeout": 5_000_000,
            "fogline.per_row": True,
            "triton_enable_empty_final_response": False,
        }
        await r.router.infer(InferRequest("double", rows(UNSURE), parameters=parameters), None)
    assert hub.requests[0].parameters == {"priority": 3, "fogline.digest": HUB_DIGEST}


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((1, 4), np.float32)}, r"expected shape \[-1, 3\], got \[1, 4\]"),
        ({"x": np.zeros((1, 3), np.int8)}, "expected datatype FP32, got INT8"),
        ({"x": SURE, "y": SURE}, r"unknown input \['y'\]"),
    ],
)
async def test_tensors_that_do_not_fit_are_refused(
    release: Release, inputs: dict[str, Array], text: str
) -> None:
    async with routed(None, release) as r:
        with pytest.raises(BadRequest, match=text):
            await r.router.infer(InferRequest("double", inputs), None)


async def test_unknown_models_and_versions_are_named(release: Release) -> None:
    async with routed(None, release) as r:
        with pytest.raises(
            NotFound, match=r"no model 'treble' on this device, which serves double"
        ):
            await r.ask(SURE, model="treble")
        with pytest.raises(NotFound, match="has version 1, got '2'"):
            r.router.model_metadata("double", "2")
        assert r.router.model_metadata("double", "1").properties["fogline.variant"] == "fp32"
        assert r.router.model_ready("double", "")


async def test_beyond_the_limit_callers_are_told_to_come_back(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release, max_concurrency=2) as r:
        hub.gate.clear()
        waiting = [asyncio.create_task(r.ask(UNSURE)) for _ in range(2)]
        await until(lambda: hub.requests)
        with pytest.raises(Overloaded, match="come back later"):
            await r.ask(SURE)
        hub.gate.set()
        await asyncio.gather(*waiting)
        assert said(await r.ask(SURE)) == "edge certified confident"


async def test_a_new_release_takes_over_between_two_requests_and_the_old_one_drains(
    hub: FakeHub, door: Serving, release: Release, tmp_path: Path
) -> None:
    newer = load(read(bundles.make(tmp_path / "newer", version="1.1.0").path), number=2)
    async with routed(door.address, release) as r:
        hub.gate.clear()
        before = asyncio.create_task(r.ask(UNSURE))
        await until(lambda: hub.requests)
        r.router.install(newer)
        after = await r.ask(SURE)
        assert after.parameters["fogline.release"] == "double@1.1.0"
        assert after.version == "2"
        # in flight, so it still has its engine
        assert await release.engine.run(rows(SURE), ["logits"], 1)
        hub.gate.set()
        assert (await before).parameters["fogline.release"] == "double@1.0.0"
        assert "closed" in repr(release.engine)
        assert r.router.releases() == [newer]


async def test_install_under_load_fails_no_request(
    hub: FakeHub, door: Serving, tmp_path: Path
) -> None:
    made = [
        load(read(bundles.make(tmp_path / str(i), version=f"1.{i}.0").path), number=i + 1)
        for i in range(5)
    ]
    async with routed(door.address, made[0]) as r:
        labels: list[object] = []

        async def keep_asking() -> None:
            while len(labels) < 400:
                labels.append((await r.ask(SURE, UNSURE)).parameters["fogline.release"])

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(keep_asking())
            for index, newer in enumerate(made[1:], start=1):
                await until(lambda index=index: len(labels) >= 70 * index)  # type: ignore[misc]
                r.router.install(newer)
    assert set(labels) == {f"double@1.{i}.0" for i in range(5)}
    assert all("closed" in repr(old.engine) for old in made)


async def test_what_a_caller_who_leaves_was_counted_for_is_free_again(
    hub: FakeHub, door: Serving, release: Release
) -> None:
    async with routed(door.address, release, max_concurrency=1) as r:
        hub.gate.clear()
        for _ in range(3):
            leaving = asyncio.create_task(r.ask(UNSURE))
            sent = len(hub.requests)
            await until(lambda sent=sent: len(hub.requests) > sent)  # type: ignore[misc]
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        hub.gate.set()
        assert said(await r.ask(SURE)) == "edge certified confident"


async def test_readiness_turns_false_before_the_doors_close(release: Release) -> None:
    async with routed(None, release) as r:
        assert r.router.server_ready()
        r.router.draining = True
        assert not r.router.server_ready()
        assert not r.router.model_ready("double", "")
        assert said(await r.ask(SURE)) == "edge certified confident"  # who still asks is answered


async def test_serving_is_said_with_the_reason_of_the_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    release = load(read(bundles.make(tmp_path / "b", certified=False).path))
    async with routed(None, release):
        assert "no certificate was issued for it" in caplog.text


@pytest.mark.parametrize(("max_rows", "alone"), [(1, True), (0, False)])
async def test_a_row_is_answered_as_if_it_came_alone_where_the_variant_would_mix_it(
    tmp_path: Path, max_rows: int, alone: bool
) -> None:
    made = bundles.make(tmp_path / "b", onnx="mixes.onnx", max_rows=max_rows)
    async with routed(None, load(read(made.path))) as r:
        by_itself = (await r.ask(UNSURE)).outputs["logits"]
        beside = (await r.ask(UNSURE, SURE * 100)).outputs["logits"][:1]
    assert np.array_equal(by_itself, beside) is alone
