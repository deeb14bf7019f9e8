"""A real hub keeps what is marked, and nothing else; operators list, export and delete it."""

import asyncio
import json
import logging
import time

import aiohttp
import numpy as np
import pytest
import structlog
from click.testing import CliRunner

from cloud_hub import operate
from cloud_hub.cli import main
from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from cloud_hub.insight.example_rows import Selection
from fogline_protocol.client import Client
from fogline_protocol.errors import BadRequest, Forbidden
from fogline_protocol.examples import KEEP, KEEPS, EdgeAnswer
from fogline_protocol.inference import InferRequest

CACHED = "response_cache { enable: true }"


@pytest.fixture(autouse=True)
def quiet():
    """The hub logs where a command prints, because here they are one process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
def make_hub(tmp_path, triton_directory):
    (triton_directory / "digits-hub" / "config.pbtxt").write_text(CACHED)

    def make(**options):
        return Hub(
            HubConfig(
                data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off",
                models=triton_directory, threads=1, drain_notice_s=0, cache_bytes=1 << 20,
                **{"examples_quota_bytes": 1 << 24, **options},
            )
        )  # fmt: skip

    return make


@pytest.fixture
async def hub(make_hub):
    async with make_hub() as hub:
        yield hub


def images(n, first=0):
    return np.random.default_rng(first).random((n, 1, 8, 8), np.float32)


def told(rows, device="kiosk", model="digits", source=""):
    return EdgeAnswer(
        device, f"{model}@1.0.0", "e" * 64, {"logits": np.zeros((rows, 10), np.float32)},
        np.full(rows, 0.5, np.float32), np.ones(rows), ["uncertain"] * rows, [source] * rows,
    )  # fmt: skip


async def ask(hub, pictures, edge=None, **parameters):
    inputs, named = {"image": pictures}, {}
    if edge is not None:
        inputs |= edge.tensors()
        named = {KEEP: True, **edge.parameters()}
    client = Client(hub.grpc_address)
    try:
        request = InferRequest("digits-hub", inputs, parameters=named | parameters)
        return await client.infer(request, 10)
    finally:
        await client.close()


async def kept(hub):
    await asyncio.wait_for(hub.examples.settled(), 30)
    return [(one.model, one.examples) for one in await hub.examples.summary(None)]


async def fogline(hub, *words):
    arguments = ["data", *map(str, words), "--data", str(hub.config.data)]
    return await asyncio.to_thread(CliRunner().invoke, main, arguments)


def said(result, code=0):
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


async def test_only_what_is_marked_and_told_is_kept(hub):
    answer = await ask(hub, images(3))
    assert KEEPS not in answer.parameters
    answer = await ask(hub, images(3), **{KEEP: False})
    assert KEEPS not in answer.parameters
    answer = await ask(hub, images(3), **{KEEP: True})  # a device that asks whether it is wanted
    assert answer.parameters[KEEPS] is True
    assert await kept(hub) == []
    answer = await ask(hub, images(3), told(3))
    assert answer.parameters[KEEPS] is True
    assert await kept(hub) == [("digits", 3)]
    # Answers of the cache are answers.
    answer = await ask(hub, images(3), told(3, device="other"))
    assert answer.parameters["fogline.cached"] is True
    assert await kept(hub) == [("digits", 3)]
    deleted = await hub.examples.delete(None, Selection(device="other"))
    assert deleted.sightings == 3


async def test_what_is_private_is_refused_and_not_kept_whatever_else_it_says(hub):
    with pytest.raises(Forbidden, match="marked private"):
        await ask(hub, images(2), told(2), **{"fogline.private": True})
    assert await kept(hub) == []


async def test_a_hub_that_keeps_nothing_says_so_and_answers_all_the_same(make_hub):
    async with make_hub(examples_quota_bytes=0) as hub:
        answer = await ask(hub, images(2), told(2))
        assert answer.outputs["logits"].shape == (2, 10)
        assert KEEPS not in answer.parameters
        assert await kept(hub) == []


@pytest.mark.parametrize(
    ("rows", "edge", "parameters", "sentence"),
    [
        (2, told(3), {}, "answers to 3 rows, the inputs have 2"),
        (2, told(2, device="../x"), {}, "fogline.device must be a device's name"),
        (2, told(2), {KEEP: False}, r"unknown input \['fogline"),
        (2, None, {KEEP: "yes"}, "fogline.keep must be true or false, got 'yes'"),
    ],
)
async def test_a_mark_that_contradicts_itself_is_refused_by_name(
    hub, rows, edge, parameters, sentence
):
    with pytest.raises(BadRequest, match=sentence):
        await ask(hub, images(rows), edge, **parameters)
    assert (await ask(hub, images(1))).outputs["logits"].shape == (1, 10)
    assert await kept(hub) == []


async def test_operators_list_export_and_delete(hub, tmp_path):
    assert "no example yet" in said(await fogline(hub, "list"))
    out = tmp_path / "hard.npz"
    nothing = await fogline(hub, "export", "digits", "--out", out)
    assert "no example of digits is selected" in said(nothing, 6)
    await ask(hub, images(5), told(5, source="w1"))
    await ask(hub, images(4, first=1), told(4, device="other"))
    await kept(hub)
    assert said(await fogline(hub, "list")).split()[:3] == ["digits", "default", "9"]
    listed = json.loads(said(await fogline(hub, "list", "--json")))
    assert (listed["quota_bytes"], listed["models"][0]["examples"]) == (1 << 24, 9)
    made = said(await fogline(hub, "export", "digits", "--out", out, "--since", "1d"))
    assert made == f"9 examples of digits are in {out}\n"
    with np.load(out) as file:
        assert file["input.image"].shape == (9, 1, 8, 8)
    for options, n in (
        (["--device", "other"], 4), (["--source", "w1"], 5), (["--source", ""], 4),
        (["--shape", "image=1x8x8"], 9), (["--until", "2100-01-01"], 9),
    ):  # fmt: skip
        found = said(await fogline(hub, "export", "digits", "--out", out, "--json", *options))
        assert json.loads(found) == {"examples": n, "left_out": 0, "out": str(out)}
    for options in (["--since", "2100-01-01"], ["--shape", "image=8x8"], ["--device", "nobody"]):
        said(await fogline(hub, "export", "digits", "--out", tmp_path / "no.npz", *options), 6)
    assert not (tmp_path / "no.npz").exists()

    assert "or say --all" in said(await fogline(hub, "delete"), 2)
    assert "or say --all" in said(await fogline(hub, "delete", "digits", "--all"), 2)
    gone = said(await fogline(hub, "delete", "--source", "w1", "--since", "1h"))
    assert gone == "5 examples are deleted, and 5 times they came\n"
    assert await kept(hub) == [("digits", 4)]
    said(await fogline(hub, "delete", "--all"))
    assert await kept(hub) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--since", "yesterday"], "'yesterday' is no time: say 2026-11-01"),
        (["--device", "A B"], "no device can be called 'A B'"),
        (["--shape", "image"], "shape must be NAME=3x224x224, got 'image'"),
        (["--since", "1h", "--until", "2h"], "is not before until"),
        (["--source", "x" * 300], "no source can be called"),
    ],
)
async def test_a_selection_that_makes_no_sense_is_refused_by_name(hub, tmp_path, words, sentence):
    result = await fogline(hub, "export", "digits", "--out", tmp_path / "x.npz", *words)
    assert result.exit_code in (2, 6)
    assert sentence in result.output
    assert list(tmp_path.glob("*.npz")) == []


async def test_inputs_of_several_shapes_are_named_and_exported_one_by_one(hub, tmp_path):
    edge = told(2)
    for shape, first in (((2, 3), 0), ((2, 4), 1), ((2, 4), 2)):
        x = np.random.default_rng(first).random(shape, np.float32)
        hub.examples.offer("default", "judge", "", {"x": x}, edge, {"logits": x}, batched=True)
    await kept(hub)
    out = tmp_path / "x.npz"
    refused = said(await fogline(hub, "export", "digits", "--out", out), 6)
    assert "inputs of 2 shapes" in refused
    assert "x FP32[3] (2), x FP32[4] (4)" in refused
    said(await fogline(hub, "export", "digits", "--out", out, "--shape", "x=4"))
    with np.load(out) as file:
        assert file["input.x"].shape == (4, 4)


async def test_a_damaged_example_is_left_out_and_said(hub, tmp_path):
    await ask(hub, images(3), told(3))
    await kept(hub)
    folder = hub.config.data / "examples"
    first, *others = sorted(path for path in folder.rglob("*") if path.is_file())
    assert folder.stat().st_mode & 0o077 == 0  # nobody else's to read
    first.write_bytes(b"x")
    made = said(await fogline(hub, "export", "digits", "--out", tmp_path / "x.npz"))
    assert "2 examples" in made
    assert "1 were left out, gone or damaged" in made
    for path in others:
        path.unlink()
    all_gone = said(await fogline(hub, "export", "digits", "--out", tmp_path / "y.npz"), 6)
    assert "all 3 selected examples are damaged" in all_gone


async def test_an_export_that_breaks_off_is_none(hub, tmp_path):
    await ask(hub, images(3), told(3))
    await kept(hub)
    *_, path = (path for path in (hub.config.data / "examples").rglob("*") if path.is_file())
    path.unlink()
    path.mkdir()  # what no disk gives back
    result = await fogline(hub, "export", "digits", "--out", tmp_path / "x.npz")
    assert "try again" in said(result, 7) or "cannot be reached" in result.output
    assert list(tmp_path.glob("*.npz")) == []
    assert (await ask(hub, images(1))).outputs["logits"].shape == (1, 10)


async def test_who_leaves_an_export_is_no_trouble_of_the_hub(hub, caplog, monkeypatch):
    ended = asyncio.Event()

    async def frames(*_):
        try:
            while True:
                await asyncio.sleep(0)
                yield bytes(1 << 16)
        finally:
            ended.set()

    monkeypatch.setattr(hub.examples, "frames", frames)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{hub.http_address}/api/v1/examples/digits") as answer,
    ):
        await answer.content.readany()
    await asyncio.wait_for(ended.wait(), 20)
    await hub.examples.settled()
    assert "breaks off" not in caplog.text


async def test_an_export_of_nothing_leaves_no_trouble_in_the_log(hub, tmp_path, caplog):
    for _ in range(10):
        nothing = await fogline(hub, "export", "digits", "--out", tmp_path / "x.npz")
        assert "no example of digits is selected" in said(nothing, 6)
    assert "breaks off" not in caplog.text


async def test_metrics_tell_what_is_kept_and_what_is_not(hub):
    await ask(hub, images(3), told(3))
    await ask(hub, images(3), told(3))
    await kept(hub)
    url = f"http://{hub.http_address}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        lines = (await answer.text()).splitlines()
    assert 'fogline_hub_examples_total{content="new"} 3.0' in lines
    assert 'fogline_hub_examples_total{content="again"} 3.0' in lines
    (held,) = [line for line in lines if line.startswith("fogline_hub_examples_bytes ")]
    assert float(held.split()[1]) > 3 * 4096
    assert "kiosk" not in "".join(lines)  # no label is a device's word


@pytest.mark.parametrize(
    ("text", "ago_s"),
    [("7d", 7 * 86400), ("12h", 12 * 3600), ("30min", 1800)],
)
def test_a_time_may_be_how_long_ago(text, ago_s):
    assert operate.moment(text, 1e9) == 1e9 - ago_s


def test_a_time_without_a_zone_is_utc():
    assert operate.moment("2026-11-01", time.time()) == 1_793_491_200
    assert operate.moment("2026-11-01T12:00", 0) == 1_793_491_200 + 43200
    assert operate.moment("2026-11-01T12:00+02:00", 0) == 1_793_491_200 + 36000
