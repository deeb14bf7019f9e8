"""Models of a directory that another server runs: found, lost, found again, and answered for."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cloud_hub.engines import upstream
from cloud_hub.engines.launch import Launcher
from cloud_hub.inference import repository as repository_module
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics
from fogline_protocol.errors import InferenceError, Unavailable
from fogline_protocol.inference import InferRequest
from tests.fakes import HUB_DIGEST, HUB_MODEL, FakeHub, Serving, plus_hundred

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(upstream, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(upstream, "MAX_WAIT_S", 0.05)
    monkeypatch.setattr(upstream, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(repository_module, "AWAIT_S", 0.01)
    monkeypatch.setattr(repository_module, "AWAIT_MAX_S", 0.05)


@pytest.fixture
def hub():
    return FakeHub()


@pytest.fixture
async def door(hub):
    async with Serving(hub) as door:
        yield door


@pytest.fixture
def folder(tmp_path, door):
    """A directory with a model that the fake hub runs."""
    folder = tmp_path / "models" / HUB_MODEL
    folder.mkdir(parents=True)
    configure(folder, door.address)
    return folder


@pytest.fixture
async def repository():
    repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=16))
    yield repository
    await repository.close()


@pytest.fixture
def server(repository):
    return HubServer("hub", repository, Metrics())


def configure(folder, address, more="", **parameters):
    lines = ['backend: "upstream"', more]
    for key, value in {"url": f"grpc://{address}", **parameters}.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    (folder / "config.pbtxt").write_text("\n".join(lines))


def request(*values):
    x = np.array(values, np.float32).reshape(-1, 1).repeat(3, 1)
    return InferRequest(HUB_MODEL, {"x": x})


def status(repository):
    (found,) = repository.status()
    return found.version, found.state, found.reason


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_model_of_another_server_needs_no_version_folder(
    repository, server, folder, door, hub
):
    await repository.load_directory(folder.parent)
    assert status(repository) == ("1", "READY", "")
    response = await server.infer(request(1, 2), None)
    assert response.outputs.keys() == {"logits"}
    np.testing.assert_array_equal(response.outputs["logits"][:, 0], [101, 102])
    # The release is ours, for the caller named it so; the digest is that of what computed.
    assert response.parameters["fogline.release"] == "judge@1"
    assert response.parameters["fogline.digest"] == HUB_DIGEST
    config = server.model_config(HUB_MODEL, "")
    assert (config.platform, config.backend, config.max_batch_size) == ("upstream", "upstream", 16)
    metadata = server.model_metadata(HUB_MODEL, "")
    assert metadata.properties == {"fogline.provider": f"upstream grpc://{door.address}"}


async def test_name_and_version_there_may_differ_from_those_here(repository, server, folder, door):
    configure(folder, door.address, model=HUB_MODEL, version="1")
    folder.rename(folder.parent / "mine")
    await repository.load_directory(folder.parent)
    answer = await server.infer(InferRequest("mine", request(1).inputs), None)
    assert answer.parameters["fogline.release"] == "mine@1"
    configure(folder.parent / "mine", door.address, model=HUB_MODEL, version="9")
    await repository.load_directory(folder.parent)
    assert "has version 1, got '9'" in repository.status()[0].reason


async def test_an_upstream_that_takes_less_rows_is_sent_no_more(repository, server, folder, hub):
    config = replace(hub.model_config(HUB_MODEL, ""), max_batch_size=4)
    hub.model_config = lambda *_: config
    hub.max_rows = 4
    await repository.load_directory(folder.parent)
    response = await server.infer(request(*range(10)), None)
    np.testing.assert_array_equal(response.outputs["logits"][:, 0], np.arange(100, 110))
    assert hub.rows_asked == [4, 4, 2]


async def test_a_configuration_that_contradicts_the_upstream_is_refused(
    repository, folder, door, hub
):
    for more, text in (
        ("max_batch_size: 128", "the upstream takes 64 rows at most"),
        ('input { name: "z" data_type: TYPE_FP32 dims: 3 }', "names the input 'z'"),
    ):
        configure(folder, door.address, more)
        await repository.load_directory(folder.parent)
        assert text in repository.status()[0].reason
    configure(folder, door.address, token="x")
    await repository.load_directory(folder.parent)
    assert "config.pbtxt: unknown parameters ['token']" in repository.status()[0].reason


async def test_no_file_outside_the_directory_is_sent_to_anybody(repository, folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for file in ("../../secret", str(tmp_path / "secret")):
        configure(folder, "127.0.0.1:1", url="grpcs://127.0.0.1:1", token_file=file)
        await repository.load_directory(folder.parent)
        assert "leaves" in repository.status()[0].reason


async def test_one_that_is_down_at_the_start_is_served_as_soon_as_it_is_up(
    repository, server, folder, door
):
    await door.stop()
    await repository.load_directory(folder.parent)
    version, state, reason = status(repository)
    assert (version, state) == ("", "UNAVAILABLE")
    assert f"upstream grpc://{door.address}, model 'judge'" in reason
    assert not repository.ready
    with pytest.raises(Unavailable, match="is not served: upstream"):
        await server.infer(request(1), None)
    await door.start()
    await until(lambda: repository.ready)
    assert (await server.infer(request(1), None)).outputs["logits"][0, 0] == 101


async def test_what_keeps_a_model_from_being_served_is_logged_until_it_is_something_else(
    repository, folder, tmp_path, monkeypatch
):
    configure(folder, "127.0.0.1:1", url="grpcs://127.0.0.1:1", token_file="token")
    tries = 0
    serve = repository._serve

    async def counted(*args, **kwargs):
        nonlocal tries
        tries += 1
        await serve(*args, **kwargs)

    monkeypatch.setattr(repository, "_serve", counted)
    with capture_logs() as logs:
        await repository.load_directory(folder.parent)
        await until(lambda: tries > 4)
        (folder / "token").write_bytes(b"\xff")
        await until(lambda: "not ASCII" in status(repository)[2])
        seen = tries
        await until(lambda: tries > seen + 3)
    told = [line["why"] for line in logs if line["event"] == "model is not served"]
    assert len(told) == 2
    assert "No such file" in told[0]
    assert "it is not ASCII" in told[1]


async def test_a_hub_that_waits_for_an_upstream_can_stop(folder, door):
    await door.stop()
    repository = Repository(Metrics(), Launcher(threads=1), Limits())
    await repository.load_directory(folder.parent)
    await repository.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("await-")]


async def test_one_that_is_killed_under_load_costs_the_requests_that_came_meanwhile(
    repository, server, folder, door, hub
):
    await repository.load_directory(folder.parent)
    outcomes = []

    async def caller(number):
        for at in range(100):
            value = number * 100 + at
            try:
                answer = await server.infer(request(value), None)
            except InferenceError as error:
                outcomes.append(error)
                await asyncio.sleep(0.01)
            else:
                assert answer.outputs["logits"].tolist() == [[value + 100] * 3]
                outcomes.append(None)

    async def killer():
        await until(lambda: len(outcomes) > 100)
        await door.stop()
        await until(lambda: any(outcomes))
        await until(lambda: not server.model_ready(HUB_MODEL, ""))
        assert status(repository)[1] == "UNAVAILABLE"
        await door.start()

    callers = [asyncio.create_task(caller(number)) for number in range(8)]
    await killer()
    await asyncio.gather(*callers)
    assert {type(o) for o in outcomes if o is not None} <= {
        upstream.EngineLost,
        Unavailable,
    }
    assert len(outcomes) == 800
    await until(lambda: server.model_ready(HUB_MODEL, ""))
    assert (await server.infer(request(1), None)).outputs["logits"][0, 0] == 101


async def test_rows_that_two_models_computed_are_no_answer_of_either(
    repository, server, folder, hub
):
    await repository.load_directory(folder.parent)

    digests = [HUB_DIGEST, "c" * 64]  # 20 rows leave in two parts

    def switching(inputs):
        hub.digest = digests.pop(0)
        return {"logits": inputs["x"]}

    hub.answer = switching
    answer = await server.infer(request(*range(20)), None)
    assert answer.parameters["fogline.digest"] == f"{HUB_DIGEST},{'c' * 64}"
    hub.answer = plus_hundred
    hub.digest = ""
    assert "fogline.digest" not in (await server.infer(request(1), None)).parameters


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_many_rows_and_few_get_what_each_row_gets_alone(sizes):
    async def check():
        async with Serving(FakeHub()) as door:
            engine = await upstream.UpstreamEngine.start(upstream.Upstream(door.address, HUB_MODEL))
            metrics = Metrics().of_model(HUB_MODEL, "1")
            batcher = repository_module.Batcher(
                [engine], batches=True, max_batch=16, max_queue_rows=400, observer=metrics
            )
            task = asyncio.create_task(batcher.serve())
            starts = np.cumsum([0, *sizes])
            inputs = [
                request(*range(at, at + n)).inputs for at, n in zip(starts[:-1], sizes, strict=True)
            ]
            answers = await asyncio.gather(*(batcher.infer(x, None) for x in inputs))
            for x, answer in zip(inputs, answers, strict=True):
                np.testing.assert_array_equal(answer["logits"], x["x"] + 100)
                assert answer["fogline.digest"].tolist() == [HUB_DIGEST.encode()] * len(x["x"])
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await engine.close()

    asyncio.run(check())
