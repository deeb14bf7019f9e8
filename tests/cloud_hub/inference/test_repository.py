"""What the hub serves from a Triton-style directory, and what it says of what it cannot."""

import asyncio
import os

import numpy as np
import pytest

from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics
from fogline_protocol.documents import sha256_of_file
from fogline_protocol.inference import (
    BadRequest,
    Forbidden,
    InferRequest,
    NotFound,
    Unavailable,
)


@pytest.fixture
async def repository():
    repository = Repository(Metrics(), Limits(max_batch=16, threads=1))
    yield repository
    await repository.close()


@pytest.fixture
async def server(repository, triton_directory):
    await repository.load_directory(triton_directory)
    metrics = Metrics()
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
