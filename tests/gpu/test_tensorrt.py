"""The promises that the fake keeps, on a real GPU with the real TensorRT."""

import asyncio
import hashlib

import numpy as np
import pytest

from cloud_hub.engines import probe
from cloud_hub.engines.tensorrt.cuda import Buffer, Cuda
from cloud_hub.engines.tensorrt.plans import PlanBuilder, find_platform
from cloud_hub.engines.tensorrt.session import TensorRtSession
from tests import onnx_bytes
from tests.contracts.tensorrt import DOUBLE, DOUBLES, TensorRtContract, batches, make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # a first build loads every kernel

CASTS = onnx_bytes.model(  # TensorRT takes UINT8 at its doors only, behind a cast
    [("Cast", ["x"], ["y"])], [("x", "UINT8", ["n", 4])], [("y", "FP32", ["n", 4])],
    attributes={"Cast": {"to": 1}},
)  # fmt: skip


class TestTensorRt(TensorRtContract):
    """The contract."""

    def test_bytes_of_a_picture_come_in(self, open_model):
        x = np.arange(8, dtype=np.uint8).reshape(2, 4)
        answer = open_model(CASTS, batches(("x", "UINT8", (-1, 4)))).run({"x": x})
        np.testing.assert_array_equal(answer["y"], x.astype(np.float32))


def test_a_buffer_goes_to_the_gpu_and_back(cuda):
    gpu = Cuda(cuda)
    gpu.use(0)
    stream = gpu.stream()
    buffer = Buffer(gpu, 4096)
    view = buffer.view(np.dtype(np.uint8), (4096,))
    there = np.random.default_rng(7).integers(0, 256, 4096, np.uint8)
    view[...] = there
    gpu.copy_in(buffer.device, buffer.host, 4096, stream)
    gpu.wait(stream)
    view[...] = 0
    gpu.copy_out(buffer.host, buffer.device, 4096, stream)
    gpu.wait(stream)
    np.testing.assert_array_equal(view, there)
    buffer.free()
    gpu.destroy(stream)


def test_the_memory_of_a_closed_session_returns(tmp_path, trt, cuda):
    plan = make_plan(tmp_path, DOUBLE, DOUBLES, trt, cuda)
    gpu = Cuda(cuda)
    TensorRtSession(plan, trt=trt, cuda=cuda).close()  # what is loaded once stays
    before = gpu.free_bytes()
    for _ in range(20):
        TensorRtSession(plan, trt=trt, cuda=cuda).close()
    assert before - gpu.free_bytes() < 16 << 20


def test_digits_answers_as_on_the_cpu(tmp_path, digits, trt, cuda):
    file = digits / "bundles" / "digits-hub-1.0.0" / "variants" / "fp32.onnx"
    on_cpu = probe.strict_session(file, "CPUExecutionProvider")
    (image,) = on_cpu.get_inputs()
    rows = np.random.default_rng(3).random((32, *image.shape[1:]), np.float32)
    (expected,) = on_cpu.run(None, {image.name: rows})
    profile = batches((image.name, "FP32", (-1, *image.shape[1:])), most=32)
    plan = make_plan(tmp_path, file.read_bytes(), profile, trt, cuda)
    session = TensorRtSession(plan, trt=trt, cuda=cuda)
    (found,) = session.run({image.name: rows}).values()
    session.close()
    np.testing.assert_allclose(found, expected, atol=2e-2)  # TF32 keeps ten bits
    assert (found.argmax(1) == expected.argmax(1)).all()


async def test_a_plan_is_built_in_a_child_and_found_again(tmp_path, trt, cuda):
    model = tmp_path / "model.onnx"
    model.write_bytes(DOUBLE)
    digest = hashlib.sha256(DOUBLE).hexdigest()
    steps = []
    builder = PlanBuilder(tmp_path / "plans", await find_platform(), on_progress=steps.append)
    profile = DOUBLES
    plan = await builder.plan(model, digest, profile)
    assert steps
    assert await builder.kept(digest, profile) == plan
    assert list((tmp_path / "plans").glob("*.timings"))


async def test_a_build_that_is_left_gives_the_gpu_back(tmp_path, digits, trt, cuda):
    file = digits / "bundles" / "digits-hub-1.0.0" / "variants" / "fp32.onnx"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (image,) = probe.strict_session(file, "CPUExecutionProvider").get_inputs()
    profile = batches((image.name, "FP32", (-1, *image.shape[1:])), most=32)
    begun = asyncio.Event()
    builder = PlanBuilder(
        tmp_path / "plans", await find_platform(), on_progress=lambda progress: begun.set()
    )
    waiting = asyncio.create_task(builder.plan(file, digest, profile))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not list((tmp_path / "plans").glob("*.partial"))


async def test_the_doctors_plan_is_right(trt, cuda):
    assert await probe.tensorrt_objection() is None
