"""Traces: which requests are taken, what their files hold, and a disk that does not play along."""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from cloud_hub.inference.tracing import Files, Plan, Settings, Tracer
from fogline_protocol.errors import BadRequest, Unsupported

ON = {"trace_level": ["TIMESTAMPS"], "trace_rate": ["1"]}


def load(path):
    return json.loads(path.read_text())


def traced(plan, model, requests):
    return [at for at in range(requests) if plan.take(model) is not None]


def test_nothing_is_traced_until_somebody_asks():
    assert traced(Plan(), "m", 3000) == []


def test_every_so_many_th_request_is_traced_up_to_the_count():
    plan = Plan()
    plan.change("", {**ON, "trace_rate": ["3"], "trace_count": ["2"]})
    assert traced(plan, "m", 20) == [2, 5]
    assert plan.settings("").count == 0
    plan.change("", {"trace_count": ["1"]})
    assert traced(plan, "m", 20) == [2]
    plan.change("", {"trace_count": ["-1"]})
    assert len(traced(plan, "m", 30)) == 10


def test_a_model_inherits_what_it_does_not_set_itself_and_clearing_gives_it_back():
    plan = Plan()
    plan.change("", {**ON, "trace_rate": ["2"]})
    plan.change("m", {"trace_rate": ["5"], "trace_count": ["1"]})
    assert (plan.settings("m").level, plan.settings("m").rate) == ("TIMESTAMPS", 5)
    assert plan.settings("other") == plan.settings("")
    plan.change("", {"trace_file": ["all.json"]})
    assert plan.settings("m").file == "all.json"
    assert traced(plan, "m", 20) == [4]  # its own count, which is not everybody's
    assert traced(plan, "other", 4) == [1, 3]
    plan.change("m", {"trace_rate": None, "trace_count": None})
    assert plan.settings("m") == plan.settings("")
    plan.change("", dict.fromkeys(Settings().texts()))
    assert plan.settings("m") == Settings()


@pytest.mark.parametrize(
    ("name", "values", "kind", "text"),
    [
        ("trace_speed", ["1"], BadRequest, "no trace setting 'trace_speed', known are"),
        ("trace_speed", None, BadRequest, "no trace setting 'trace_speed', known are"),
        ("trace_level", ["MAX"], BadRequest, "OFF or TIMESTAMPS"),
        ("trace_level", ["OFF", "TIMESTAMPS"], BadRequest, "OFF or TIMESTAMPS"),
        ("trace_level", ["TIMESTAMPS", "TENSORS"], Unsupported, "TENSORS is not offered"),
        ("trace_rate", ["0"], BadRequest, "from 1 to"),
        ("trace_rate", ["x"], BadRequest, "a whole number"),
        ("trace_rate", ["1", "2"], BadRequest, "has one value"),
        ("trace_rate", ["9" * 5000], BadRequest, "a whole number"),
        ("trace_count", ["-2"], BadRequest, "from -1 to"),
        ("log_frequency", ["-1"], BadRequest, "from 0 to"),
        ("trace_file", ["../x"], BadRequest, "the name of a file in the hub's --trace-dir"),
        ("trace_file", ["/etc/passwd"], BadRequest, "the name of a file"),
        ("trace_file", [".hidden"], BadRequest, "the name of a file"),
        ("trace_file", ["a\n"], BadRequest, "the name of a file"),
        ("trace_file", [""], BadRequest, "the name of a file"),
        ("trace_file", ["n" * 101], BadRequest, "the name of a file"),
    ],
)
def test_a_setting_that_cannot_be_changes_nothing(name, values, kind, text):
    plan = Plan()
    with pytest.raises(kind, match=text):
        plan.change("", {"trace_rate": ["7"], name: values})
    assert plan.settings("") == Settings()


def settle(tracer, *ids, **changes):
    tracer.change("", {**ON, **{name: [value] for name, value in changes.items()}})
    for at in ids:
        trace = tracer.begin("m", "1", f"r{at}", 1.0)
        tracer.finish(trace, 2.0)
    tracer.close()


def test_files_are_whole_after_every_trace_and_numbered_by_log_frequency(tmp_path):
    (tmp_path / "t.0").write_text("what an earlier run left")
    settle(Tracer(tmp_path), *range(5), trace_file="t", log_frequency="2")
    found = {p.name: [r["request_id"] for r in load(p) if "request_id" in r] for p in tmp_path.iterdir()}  # fmt: skip
    assert found == {"t.0": ["r0", "r1"], "t.1": ["r2", "r3"], "t.2": ["r4"]}


def test_without_log_frequency_there_is_one_file(tmp_path):
    settle(Tracer(tmp_path), *range(3))
    assert [r["id"] for r in load(tmp_path / "trace.json") if "model_name" in r] == [1, 2, 3]


def test_a_run_writes_so_much_and_no_more(tmp_path, caplog):
    settle(Tracer(tmp_path, max_bytes=800), *range(20))
    assert 400 < (tmp_path / "trace.json").stat().st_size <= 900
    load(tmp_path / "trace.json")
    assert caplog.text.count("have reached their limit") == 1


def test_a_link_in_the_directory_is_not_followed(tmp_path, caplog):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "traces"
    folder.mkdir()
    (folder / "trace.json").symlink_to(victim)
    settle(Tracer(folder), 1)
    assert victim.read_text() == "precious"
    assert "traces are lost" in caplog.text


def test_a_full_disk_loses_traces_and_leaves_whole_files(tmp_path, monkeypatch, caplog):
    files = Files(tmp_path, 1 << 20)
    files.put(Settings(), '{"id": 1}')
    real, full = os.pwrite, []

    def pwrite(descriptor, data, at):
        if len(data) > 4 and full:
            return real(descriptor, data[:5], at)  # as much as there was room for
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    while files._written != {"trace.json": 1}:
        os.sched_yield()
    full.append(True)
    for _ in range(3):
        files.put(Settings(), '{"id": 2}')
    while files._lost < 3:
        os.sched_yield()
    full.clear()
    files.put(Settings(), '{"id": 3}')
    files.close()
    assert load(tmp_path / "trace.json") == [{"id": 1}, {"id": 3}]
    assert caplog.text.count("No space left on device") == 1


def test_a_queue_that_is_full_costs_the_request_nothing(tmp_path, monkeypatch):
    files = Files(tmp_path, 1 << 20)
    files.close()  # nobody reads any more
    for _ in range(5000):
        files.put(Settings(), "{}")
    assert files._lost == 5000 - 4096


@pytest.fixture
async def hub(tmp_path, triton_directory):
    (tmp_path / "traces").mkdir()
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off",
        models=triton_directory, trace_dir=tmp_path / "traces",
    )  # fmt: skip
    async with Hub(config) as hub:
        yield hub


async def test_tritonclient_has_requests_traced_and_the_file_says_where_time_went(hub, tmp_path):
    loop = asyncio.get_running_loop()
    client = triton_grpc.InferenceServerClient(hub.grpc_address)
    image = triton_grpc.InferInput("image", [70, 1, 8, 8], "FP32")  # in two batches
    image.set_data_from_numpy(np.zeros((70, 1, 8, 8), np.float32))

    def ask():
        assert "trace" in client.get_server_metadata().extensions
        client.update_trace_settings("digits-hub", {**ON, "trace_file": "mine.json"})
        for at in range(3):
            client.infer("digits-hub", [image], request_id=f"r{at}")
        found = client.get_trace_settings("digits-hub").settings
        everybody = client.get_trace_settings().settings
        client.update_trace_settings("digits-hub", {"trace_level": None, "trace_rate": None, "trace_file": None})  # fmt: skip
        client.infer("digits-hub", [image])
        with pytest.raises(InferenceServerException, match="no-such"):
            client.update_trace_settings("no-such", ON)
        return found, everybody

    with ThreadPoolExecutor(1) as thread:
        found, everybody = await loop.run_in_executor(thread, ask)
        await loop.run_in_executor(thread, client.close)
    assert list(found["trace_level"].value) == ["TIMESTAMPS"]
    assert list(everybody["trace_level"].value) == ["OFF"]
    hub.server.tracer.close()
    records = load(tmp_path / "traces" / "mine.json")
    heads = [r for r in records if "model_name" in r]
    assert [(h["model_name"], h["model_version"], h["request_id"]) for h in heads] == [
        ("digits-hub", 3, f"r{at}") for at in range(3)
    ]
    for head in heads:
        stamps = [
            (stamp["name"], stamp["ns"])
            for r in records if r["id"] == head["id"] for stamp in r.get("timestamps", ())
        ]  # fmt: skip
        assert [name for name, _ in stamps] == [
            "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END",
            "COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END",
        ]  # fmt: skip
        assert sorted(ns for _, ns in stamps) == [ns for _, ns in stamps]
        assert 0 < stamps[-1][1] - stamps[0][1] < 60e9
    hub.server.tracer._files = Files(tmp_path, 0)  # the hub closes one at its end


async def test_the_rest_door_has_the_same_settings(hub):
    client = triton_http.InferenceServerClient(hub.http_address)
    with ThreadPoolExecutor(1) as thread:

        async def call(name, *args):
            run = asyncio.get_running_loop().run_in_executor
            return await run(thread, lambda: getattr(client, name)(*args))

        changed = await call("update_trace_settings", "digits-hub", {"trace_rate": "5"})
        assert changed == {
            "trace_file": "trace.json", "trace_level": ["OFF"], "trace_rate": "5",
            "trace_count": "-1", "log_frequency": "0",
        }  # fmt: skip
        assert (await call("get_trace_settings", "digits-hub")) == changed
        assert (await call("get_trace_settings"))["trace_rate"] == "1000"
        cleared = await call("update_trace_settings", "digits-hub", {"trace_rate": None})
        assert cleared["trace_rate"] == "1000"
        with pytest.raises(InferenceServerException, match="must be a text") as caught:
            await call("update_trace_settings", None, {"trace_rate": 5})
        assert caught.value.status() == "400"
        await call("close")


async def test_a_hub_without_a_directory_names_the_option(tmp_path):
    config = HubConfig(data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off")
    async with (
        Hub(config) as hub,
        aiohttp.ClientSession(f"http://{hub.http_address}") as session,
    ):
        for path in ("/v2/trace/setting", "/v2/models/m/trace/setting"):
            async with session.get(path) as answer:
                assert answer.status == 501
                assert "--trace-dir" in (await answer.json())["error"]
        async with session.get("/v2") as answer:
            extensions = (await answer.json())["extensions"]
        assert "trace" not in extensions
        assert "logging" in extensions
