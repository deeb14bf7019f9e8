"""What the hub serves from a Triton-style directory, and what it says of what it cannot."""

import asyncio
import os
import re
import shutil
import signal

import numpy as np
import pytest

from cloud_hub.engines.launch import Launcher
from cloud_hub.inference.directory import ModelFiles
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics
from fogline_protocol.documents import sha256_of_file
from fogline_protocol.errors import BadRequest, Forbidden, NotFound, Unavailable, Unsupported
from fogline_protocol.inference import InferRequest
from fogline_protocol.model_config import Wanted


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
async def repository(metrics):
    repository = Repository(metrics, Launcher(threads=1), Limits(max_batch=16))
    yield repository
    await repository.close()


@pytest.fixture
async def server(repository, metrics, triton_directory):
    await repository.load_directory(triton_directory)
    server = HubServer("hub", repository, metrics)
    server.metrics = metrics
    return server


def images(rows):
    return {"image": np.zeros((rows, 1, 8, 8), np.float32)}


async def test_the_highest_version_of_every_model_is_served(repository, triton_directory):
    model = triton_directory / "digits-hub" / "3" / "model.onnx"
    for version in ("1", "10", "007", "latest"):
        folder = triton_directory / "digits-hub" / version
        folder.mkdir()
        (folder / "model.onnx").write_bytes(model.read_bytes())
    await repository.load_directory(triton_directory)
    assert [(s.name, s.version, s.state) for s in repository.status()] == [
        ("digits-hub", "10", "READY")
    ]
    assert repository.ready


async def test_a_model_that_cannot_be_loaded_says_why_and_does_not_stop_the_others(
    repository, triton_directory, tmp_path
):
    (triton_directory / "corrupt" / "1").mkdir(parents=True)
    (triton_directory / "corrupt" / "1" / "model.onnx").write_bytes(b"not a model")
    (triton_directory / "empty").mkdir()
    (triton_directory / "Bad Name" / "1").mkdir(parents=True)
    (triton_directory / "escapes" / "1").mkdir(parents=True)
    outside = tmp_path / "outside.onnx"
    outside.write_bytes((triton_directory / "digits-hub" / "3" / "model.onnx").read_bytes())
    os.symlink(outside, triton_directory / "escapes" / "1" / "model.onnx")
    await repository.load_directory(triton_directory)
    reasons = {status.name: status.reason for status in repository.status()}
    assert reasons["digits-hub"] == ""
    assert "ONNX Runtime cannot load it" in reasons["corrupt"]
    assert "no version folder" in reasons["empty"]
    assert "no model name" in reasons["Bad Name"]
    assert "leaves" in reasons["escapes"]
    assert not repository.ready
    with pytest.raises(Unavailable, match="cannot load it"):
        repository.find("corrupt")
    with pytest.raises(NotFound, match="unknown model 'nobody', served are"):
        repository.find("nobody")
    with pytest.raises(NotFound, match="no version '9'"):
        repository.find("digits-hub", "9")


async def test_an_answer_names_the_tier_the_release_and_the_very_file(server, triton_directory):
    response = await server.infer(InferRequest("digits-hub", images(2), id="5"), None)
    assert response.outputs["logits"].shape == (2, 10)
    assert response.id == "5"
    assert response.version == "3"
    file = triton_directory / "digits-hub" / "3" / "model.onnx"
    assert response.parameters == {
        "fogline.tier": "hub",
        "fogline.quality": "hub",
        "fogline.reason": "asked",
        "fogline.release": "digits-hub@3",
        "fogline.digest": sha256_of_file(file),
    }
    assert server.model_metadata("digits-hub", "").properties["fogline.digest"] == (
        sha256_of_file(file)
    )


async def test_a_private_request_is_refused_by_the_hub_too(server):
    request = InferRequest("digits-hub", images(1), parameters={"fogline.private": True})
    with pytest.raises(Forbidden, match="must not leave its device"):
        await server.infer(request, None)


async def test_a_mark_of_privacy_that_cannot_be_read_is_refused_rather_than_overlooked(server):
    request = InferRequest("digits-hub", images(1), parameters={"fogline.private": "true"})
    with pytest.raises(BadRequest, match=r"fogline.private must be true or false, got 'true'"):
        await server.infer(request, None)
    request.parameters = {"fogline.private": False}
    assert (await server.infer(request, None)).outputs


async def test_batching_changes_no_answer(server):
    rng = np.random.default_rng(0)
    inputs = [rng.random((n, 1, 8, 8), np.float32) for n in (1, 3, 16, 40)]
    together = await asyncio.gather(
        *(server.infer(InferRequest("digits-hub", {"image": x}), None) for x in inputs)
    )
    for x, answer in zip(inputs, together, strict=True):
        alone = await server.infer(InferRequest("digits-hub", {"image": x}), None)
        np.testing.assert_allclose(
            answer.outputs["logits"], alone.outputs["logits"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        ({}, (), "input 'image' is missing"),
        ({"image": np.zeros((1, 64), np.float32)}, (), r"expected shape \[-1, 1, 8, 8\]"),
        ({"image": np.zeros((1, 1, 8, 8))}, (), "expected datatype FP32, got FP64"),
        (images(0), (), "no rows"),
        (images(1), ("labels",), "unknown output 'labels'"),
    ],
)
async def test_a_request_that_does_not_fit_the_contract_is_refused(server, inputs, outputs, text):
    with pytest.raises(BadRequest, match=text):
        await server.infer(InferRequest("digits-hub", inputs, outputs=outputs), None)
    assert (await server.infer(InferRequest("digits-hub", images(1)), None)).outputs


async def test_what_happened_is_counted(server, repository):
    await server.infer(InferRequest("digits-hub", images(2)), None)
    with pytest.raises(BadRequest):
        await server.infer(InferRequest("digits-hub", {}), None)
    text = server.metrics.render().decode()
    labels = 'model="digits-hub",outcome="{}",version="3"'
    assert f"fogline_hub_requests_total{{{labels.format('ok')}}} 1.0" in text
    assert f"fogline_hub_requests_total{{{labels.format('invalid_argument')}}} 1.0" in text


async def test_a_request_for_no_model_is_counted_under_no_name_of_its_own(server):
    for name, version in (("nobody", ""), ("digits-hub", "9")):
        with pytest.raises(NotFound):
            await server.infer(InferRequest(name, images(1), version), None)
    text = server.metrics.render().decode()
    assert 'fogline_hub_rejections_total{reason="no_model"} 2.0' in text
    assert "nobody" not in text
    (series,) = re.findall(r"^fogline_hub_requests_total.*$", text, re.M)
    assert series == 'fogline_hub_requests_total{model="",outcome="not_found",version=""} 2.0'


async def test_a_caller_who_left_was_not_answered(server):
    asked = asyncio.create_task(server.infer(InferRequest("digits-hub", images(1)), None))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    text = server.metrics.render().decode()
    assert 'requests_total{model="digits-hub",outcome="cancelled",version="3"} 1.0' in text
    assert 'outcome="ok"' not in text


async def test_a_draining_hub_is_not_ready_and_still_answers(server):
    server.draining = True
    assert not server.server_ready()
    assert not server.model_ready("digits-hub", "")
    assert (await server.infer(InferRequest("digits-hub", images(1)), None)).outputs


def add_version(root, version):
    """Serve the same file as another version too, or as another model's."""
    source = root / "digits-hub" / "3" / "model.onnx"
    folder = root / version
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(source.read_bytes())


async def test_a_configuration_limits_batches_and_names_versions_and_labels(
    repository, triton_directory
):
    add_version(triton_directory, "digits-hub/1")
    add_version(triton_directory, "digits-hub/2")
    folder = triton_directory / "digits-hub"
    (folder / "digits.txt").write_text("zero\none\n")
    (folder / "config.pbtxt").write_text(
        'max_batch_size: 4 version_policy { latest { num_versions: 2 } } output { name: "logits" '
        'data_type: TYPE_FP32 dims: 10 label_filename: "digits.txt" }'
    )
    await repository.load_directory(triton_directory)
    server = HubServer("hub", repository, Metrics())
    assert list(server.model_metadata("digits-hub", "").versions) == ["2", "3"]
    assert (await server.infer(InferRequest("digits-hub", images(1)), None)).version == "3"
    second = InferRequest("digits-hub", images(1), version="2")
    assert (await server.infer(second, None)).version == "2"
    with pytest.raises(NotFound, match="no version '1', served is 2, 3"):
        await server.infer(InferRequest("digits-hub", images(1), version="1"), None)
    config = server.model_config("digits-hub", "")
    assert config.max_batch_size == 4
    assert list(config.labels["logits"]) == ["zero", "one"]
    counts = {s.version: s.success.count for s in server.model_statistics("digits-hub", "")}
    assert counts == {"2": 1, "3": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_batch_size:", "cannot be read"),
        ('output { name: "nope" data_type: TYPE_FP32 dims: 10 }', "names the output 'nope'"),
        ("version_policy { specific { versions: 7 } }", r"asks for \[7\], there are \[3\]"),
        (
            'output { name: "logits" data_type: TYPE_FP32 dims: 10 label_filename: "../../x" }',
            "leaves",
        ),
        (
            'output { name: "logits" data_type: TYPE_FP32 dims: 10 label_filename: "none.txt" }',
            "No such file",
        ),
    ],
)
async def test_a_configuration_that_cannot_be_obeyed_says_why(
    repository, triton_directory, text, reason
):
    (triton_directory / "digits-hub" / "config.pbtxt").write_text(text)
    await repository.load_directory(triton_directory)
    with pytest.raises(Unavailable, match=reason):
        repository.find("digits-hub")


async def test_a_model_told_not_to_batch_takes_its_whole_shape(repository, triton_directory):
    (triton_directory / "digits-hub" / "config.pbtxt").write_text("max_batch_size: 0")
    await repository.load_directory(triton_directory)
    server = HubServer("hub", repository, Metrics())
    answer = await server.infer(InferRequest("digits-hub", images(3)), None)
    assert answer.outputs["logits"].shape == (3, 10)
    (found,) = server.model_statistics("", "")
    assert (found.inference_count, found.execution_count) == (1, 1)


async def test_statistics_tell_success_failure_and_rows_apart(server):
    await server.infer(InferRequest("digits-hub", images(2)), None)
    await asyncio.gather(
        *(server.infer(InferRequest("digits-hub", images(1)), None) for _ in range(3))
    )
    with pytest.raises(BadRequest):
        await server.infer(InferRequest("digits-hub", {}), None)
    (found,) = server.model_statistics("digits-hub", "3")
    assert (found.success.count, found.fail.count) == (4, 1)
    assert (found.queue.count, found.compute_infer.count) == (4, 4)
    assert (found.inference_count, found.execution_count) == (5, 2)
    assert set(found.batches) == {2, 3}
    assert found.compute_infer.ns > 0


async def test_models_change_on_request_only_where_that_is_allowed(server):
    for change in (server.load_model("digits-hub", ()), server.unload_model("digits-hub")):
        with pytest.raises(Unsupported, match="--model-control explicit"):
            await change
    assert server.server_ready()


@pytest.fixture
async def explicit(triton_directory):
    repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=16), "explicit")
    await repository.load_directory(triton_directory)
    yield HubServer("hub", repository, Metrics())
    await repository.close()


def states(server):
    return [(m.name, m.version, m.state, m.reason) for m in server.repository_index()]


async def test_counts_go_on_when_a_version_is_loaded_anew(explicit):
    for asked in range(1, 4):
        await explicit.load_model("digits-hub", ())
        await explicit.infer(InferRequest("digits-hub", images(1)), None)
        (found,) = explicit.model_statistics("digits-hub", "3")
        assert found.success.count == asked
        await explicit.unload_model("digits-hub")


async def test_explicit_control_loads_and_unloads_what_callers_name(explicit, triton_directory):
    assert states(explicit) == [("digits-hub", "", "UNAVAILABLE", "not loaded")]
    assert explicit.server_ready()
    await explicit.load_model("digits-hub", ())
    assert states(explicit) == [("digits-hub", "3", "READY", "")]
    await explicit.unload_model("digits-hub")
    assert states(explicit) == [("digits-hub", "3", "UNAVAILABLE", "unloaded")]
    with pytest.raises(NotFound, match="unknown model"):
        await explicit.infer(InferRequest("digits-hub", images(1)), None)
    with pytest.raises(NotFound, match="not loaded"):
        await explicit.unload_model("digits-hub")
    with pytest.raises(NotFound, match="no model of the repository"):
        await explicit.load_model("../models/digits-hub", ())
    with pytest.raises(Unsupported, match="load parameters"):
        await explicit.load_model("digits-hub", ("file:1/model.onnx",))


async def test_a_load_that_fails_leaves_the_model_as_it_was(explicit, triton_directory):
    await explicit.load_model("digits-hub", ())
    (triton_directory / "digits-hub" / "4").mkdir()
    (triton_directory / "digits-hub" / "4" / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(Unavailable, match="cannot be loaded"):
        await explicit.load_model("digits-hub", ())
    assert states(explicit) == [("digits-hub", "3", "READY", "")]
    assert (await explicit.infer(InferRequest("digits-hub", images(1)), None)).version == "3"


async def test_no_request_fails_while_a_new_version_takes_over(explicit, triton_directory):
    await explicit.load_model("digits-hub", ())
    add_version(triton_directory, "digits-hub/4")
    loading = asyncio.create_task(explicit.load_model("digits-hub", ()))
    seen = []
    while "4" not in seen:
        answers = await asyncio.gather(
            *(explicit.infer(InferRequest("digits-hub", images(1)), None) for _ in range(8))
        )
        seen += [answer.version for answer in answers]
    await loading
    assert seen == sorted(seen)
    assert seen[0] == "3"


@pytest.fixture
async def polled(triton_directory):
    repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=16), "poll")
    await repository.load_directory(triton_directory)
    yield repository
    await repository.close()


async def looks(repository, times=2):
    """Look at the directory so often; the first look alone changes nothing."""
    seen = {}
    for _ in range(times):
        seen = await repository.poll(seen)
    return seen


async def test_a_polled_directory_is_followed(polled, triton_directory):
    first = polled.find("digits-hub")
    await looks(polled)
    assert polled.find("digits-hub") is first  # nothing changed
    add_version(triton_directory, "digits-hub/4")
    add_version(triton_directory, "another/1")
    await looks(polled)
    assert polled.find("digits-hub").version == "4"
    assert polled.find("another").version == "1"
    shutil.rmtree(triton_directory / "another")
    await looks(polled)
    with pytest.raises(NotFound, match="unknown model 'another'"):
        polled.find("another")
    assert polled.ready


async def test_a_file_that_is_still_being_copied_is_not_taken_for_a_model(polled, triton_directory):
    seen = await looks(polled)
    folder = triton_directory / "digits-hub" / "4"
    folder.mkdir()
    whole = (triton_directory / "digits-hub" / "3" / "model.onnx").read_bytes()
    for part in (whole[:100], whole[:1000], whole):
        (folder / "model.onnx").write_bytes(part)
        seen = await polled.poll(seen)
        assert polled.find("digits-hub").version == "3"
    assert polled.status()[0].reason == ""
    await polled.poll(seen)
    assert polled.find("digits-hub").version == "4"


async def test_newer_files_that_cannot_be_served_say_why_beside_the_model(polled, triton_directory):
    config = triton_directory / "digits-hub" / "config.pbtxt"
    config.write_text("max_batch_size:")
    await looks(polled)
    (status,) = polled.status()
    assert (status.version, status.state) == ("3", "READY")
    assert "newer files of it are not served" in status.reason
    assert "cannot be read" in status.reason
    assert polled.ready
    config.write_text("max_batch_size: 2")
    await looks(polled)
    assert polled.status()[0].reason == ""
    assert polled.find("digits-hub").config.max_batch_size == 2


async def test_a_model_that_was_refused_is_served_once_its_files_are_in_order(
    polled, triton_directory
):
    (triton_directory / "late" / "1").mkdir(parents=True)
    await looks(polled)
    with pytest.raises(Unavailable, match="is missing"):
        polled.find("late")
    assert not polled.ready
    add_version(triton_directory, "late/2")
    await looks(polled)
    assert polled.find("late").version == "2"
    assert polled.ready


WARM_UP = """
model_warmup {{
  name: "first" batch_size: {rows} count: 2
  inputs {{ key: "image" value {{ data_type: TYPE_FP32 dims: [1, 8, 8] {data} }} }}
}}
"""


@pytest.mark.parametrize("data", ["zero_data: true", "random_data: true", 'input_data_file: "x"'])
async def test_a_model_answers_its_warm_up_requests_before_it_serves(
    repository, triton_directory, data
):
    folder = triton_directory / "digits-hub"
    (folder / "warmup").mkdir()
    (folder / "warmup" / "x").write_bytes(np.ones((4, 1, 8, 8), np.float32).tobytes())
    (folder / "config.pbtxt").write_text(WARM_UP.format(rows=4, data=data))
    await repository.load_directory(triton_directory)
    (found,) = repository.find_all("digits-hub", "")
    assert found.statistics.inference_count == 0  # nobody asked
    assert repository.ready


@pytest.mark.parametrize(
    ("rows", "data", "reason"),
    [
        (17, "zero_data: true", "batch_size must be from 1 to max_batch_size 16, got 17"),
        (0, "zero_data: true", "batch_size must be from 1"),
        (4, 'input_data_file: "none"', "No such file"),
        (4, 'input_data_file: "../../../other"', "leaves"),
        (4, 'input_data_file: "short"', "expected 1024 bytes"),
        (4, "", "say zero_data: true"),
    ],
)
async def test_a_warm_up_that_cannot_be_run_keeps_the_model_from_serving(
    repository, triton_directory, rows, data, reason
):
    folder = triton_directory / "digits-hub"
    (folder / "warmup").mkdir()
    (folder / "warmup" / "short").write_bytes(b"\0")
    (folder / "config.pbtxt").write_text(WARM_UP.format(rows=rows, data=data))
    await repository.load_directory(triton_directory)
    with pytest.raises(Unavailable, match=reason):
        repository.find("digits-hub")


async def test_a_model_whose_engine_cannot_be_replaced_says_so_until_it_is_loaded_anew(
    triton_directory,
):
    class Apart(Launcher):
        async def open(self, path, *, instances=1, threads=0):
            return await self.open_apart(path)

    metrics = Metrics()
    repository = Repository(metrics, Apart(threads=1), Limits(max_batch=16))
    await repository.load_directory(triton_directory)
    server = HubServer("hub", repository, metrics)
    file = triton_directory / "digits-hub" / "3" / "model.onnx"
    file.write_bytes(file.read_bytes())  # over the old ones: what was loaded is no more
    os.kill(repository.find("digits-hub").engine.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while server.model_ready("digits-hub", ""):
            await asyncio.sleep(0.01)
    assert not repository.ready
    with pytest.raises(Unavailable, match=r"cannot be started again: .* load the model anew"):
        await server.infer(InferRequest("digits-hub", images(1)), None)
    # A request that no engine could take is one of its model all the same.
    (counted,) = server.model_statistics("digits-hub", "")
    assert (counted.success.count, counted.fail.count) == (0, 1)
    text = metrics.render().decode()
    assert 'requests_total{model="digits-hub",outcome="unavailable",version="3"} 1.0' in text
    await repository.load_directory(triton_directory)
    assert server.server_ready()
    assert (await server.infer(InferRequest("digits-hub", images(1)), None)).outputs
    await repository.close()


async def test_a_caller_who_leaves_an_unload_leaves_nothing_running(explicit, triton_directory):
    await explicit.load_model("digits-hub", ())
    model = explicit._repository.find("digits-hub")
    held = asyncio.Event()
    drain = model.batcher.drain

    async def slowly():
        await held.wait()
        await drain()

    model.batcher.drain = slowly
    unloading = asyncio.create_task(explicit.unload_model("digits-hub"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    unloading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unloading
    held.set()
    await explicit._repository.close()
    assert model.task.done()


@pytest.mark.parametrize("label", ["a\\000b", "loop"])
async def test_a_label_file_that_cannot_be_looked_for_stops_only_its_model(
    polled, triton_directory, label
):
    folder = triton_directory / "strange"
    add_version(triton_directory, "strange/1")
    os.symlink("loop", folder / "loop")
    (folder / "config.pbtxt").write_text(
        f'output {{ name: "logits" data_type: TYPE_FP32 dims: 10 label_filename: "{label}" }}'
    )
    add_version(triton_directory, "later/1")
    await looks(polled)
    with pytest.raises(Unavailable, match="cannot be found"):
        polled.find("strange")
    assert polled.find("later").version == "1"


def registered(triton_directory, version):
    file = triton_directory / "digits-hub" / "3" / "model.onnx"
    return ModelFiles(file.parent, Wanted(), [(version, file)], {})


async def test_a_release_does_not_take_the_place_of_a_model_that_a_caller_loaded(
    explicit, triton_directory
):
    repository = explicit._repository
    await explicit.load_model("digits-hub", ())
    await repository.serve_release("digits-hub", registered(triton_directory, "7"))
    assert repository.versions("digits-hub") == ["3"]
    await repository.serve_release("other", registered(triton_directory, "7"))
    with pytest.raises(NotFound, match="is not loaded"):
        await explicit.unload_model("other")  # it is not the directory's to unload
    assert repository.versions("other") == ["7"]


async def test_a_folder_that_comes_and_goes_gives_a_release_its_place_back(
    polled, triton_directory
):
    await polled.serve_release("judge", registered(triton_directory, "7"))
    add_version(triton_directory, "judge/2")
    seen = await looks(polled)
    assert polled.versions("judge") == ["2"]
    shutil.rmtree(triton_directory / "judge")
    await polled.poll(seen)
    assert polled.versions("judge") == ["7"]
    assert polled.ready


async def test_a_model_is_served_with_the_threads_that_its_settings_say(triton_directory):
    asked = []

    class Recording(Launcher):
        async def open(self, path, *, instances=1, threads=0):
            asked.append((instances, threads))
            return await super().open(path, instances=instances, threads=threads)

    (triton_directory / "digits-hub" / "config.pbtxt").write_text(
        'parameters { key: "fogline.threads" value { string_value: "1" } } '
        "instance_group { count: 2 }"
    )
    repository = Repository(Metrics(), Recording(threads=2), Limits())
    await repository.load_directory(triton_directory)
    assert asked == [(2, 1), (2, 1)]
    assert repository.find("digits-hub").config.threads == 1
    await repository.close()
