"""ONNX Runtime on CUDA: it serves while a plan is built, so it must really run there.

``get_providers()`` names CUDA for sessions that run elsewhere; the proof is the assignment of
nodes (model-workshop.md 9), with the fallback to the CPU switched off.
"""

import numpy as np
import pytest

from cloud_hub.engines import probe
from cloud_hub.engines.launch import Launcher

pytestmark = pytest.mark.gpu

ROWS = 64


@pytest.fixture
def model(digits):
    return digits / "bundles" / "digits-hub-1.0.0" / "variants" / "fp32.onnx"


@pytest.fixture
def rows(model):
    (image,) = probe.strict_session(model, "CPUExecutionProvider").get_inputs()
    values = np.random.default_rng(5).random((ROWS, *image.shape[1:]), np.float32)
    return {image.name: values}


@pytest.fixture
def expected(model, rows):
    (logits,) = probe.strict_session(model, "CPUExecutionProvider").run(None, rows)
    return logits


def test_the_provider_computes_the_probe(onnx_cuda):
    assert probe.provider_objection(onnx_cuda) is None


def test_every_node_of_a_model_is_placed_on_the_gpu(onnx_cuda, model, rows, expected):
    session = probe.strict_session(model, onnx_cuda)  # raises unless all of it is
    nodes = [
        node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()
    ]
    assert nodes
    (found,) = session.run(None, rows)
    np.testing.assert_allclose(found, expected, atol=2e-2)  # TF32 keeps ten bits
    assert (found.argmax(1) == expected.argmax(1)).all()


async def test_the_hubs_engine_runs_there(onnx_cuda, model, rows, expected):
    engine = await Launcher().open(model)
    try:
        assert engine.provider == onnx_cuda
        answers = [await engine.run(rows) for _ in range(8)]
    finally:
        await engine.close()
    for answer in answers:
        (found,) = answer.values()
        assert (np.asarray(found).argmax(1) == expected.argmax(1)).all()
