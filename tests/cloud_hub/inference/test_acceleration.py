"""Models move to TensorRT and back under load, without a request that fails.

Hub, child processes, plans and switch are the real ones; TensorRT and CUDA are the fakes of
``tests/fake_gpu.py``, which compute a plan with ONNX Runtime.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.engines.launch import Launcher
from cloud_hub.inference.acceleration import Acceleration
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics
from fogline_protocol.inference import InferRequest
from tests import fake_gpu

ROOT = Path(__file__).parents[3]
DOUBLE = ROOT / "tests" / "edge_agent" / "data" / "double.onnx"  # x FP32 [n, 3]


@pytest.fixture
def machine(tmp_path):
    """Return a function that makes the environment of child processes, with a GPU in it."""

    def make(**properties):
        packages = fake_gpu.Gpu.install(tmp_path / "packages")
        path = os.pathsep.join([str(packages), str(ROOT), *sys.path])
        return {**os.environ, "PYTHONPATH": path, fake_gpu.ENVIRONMENT: json.dumps(properties)}

    return make


@pytest.fixture
async def make(tmp_path):
    """Return a function that serves ``double`` on a machine."""
    folder = tmp_path / "models" / "double"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(DOUBLE.read_bytes())
    made = []

    async def serve(environment, config=""):
        (folder / "config.pbtxt").write_text(config)
        launcher = Launcher(threads=1, environment=environment)
        acceleration = Acceleration(launcher, tmp_path / "plans")
        await acceleration.find(environment)
        repository = Repository(Metrics(), launcher, Limits(max_batch=16), "none", acceleration)
        made.append(repository)
        await repository.load_directory(folder.parent)
        return repository

    yield serve
    for repository in made:
        await repository.close()


async def ask(repository, value):
    x = np.full((2, 3), value, np.float32)
    server = HubServer("hub", repository, Metrics())
    (output,) = (await server.infer(InferRequest("double", {"x": x}), None)).outputs.values()
    np.testing.assert_array_equal(output, 2 * x)


async def until(repository, provider):
    """Keep asking, in eight tasks, until this provider serves."""
    done = asyncio.Event()

    async def keep_asking():
        value = 0
        while not done.is_set():
            value += 1
            await ask(repository, value)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(keep_asking()) for _ in range(8)]
    async with asyncio.timeout(60):
        while repository.find("double").engine.provider != provider:
            await asyncio.sleep(0.01)
            for task in tasks:
                assert not task.done(), task.exception()
    done.set()
    await asyncio.gather(*tasks)


async def test_a_model_moves_to_tensorrt_under_load(make, machine):
    repository = await make(machine())
    assert repository.find("double").engine.provider == "CPUExecutionProvider"
    await until(repository, "TensorRT")
    await ask(repository, 5)
    assert repository.status()[0].provider == "TensorRT"


async def test_every_instance_moves(make, machine):
    repository = await make(machine(), "instance_group { count: 2 }")
    await until(repository, "TensorRT")
    assert [engine.provider for engine in repository.find("double").engines] == ["TensorRT"] * 2


async def test_a_plan_that_is_kept_is_not_built_again(make, machine, tmp_path):
    await until(await make(machine()), "TensorRT")
    (plan,) = (tmp_path / "plans").glob("*.plan")
    before = plan.stat().st_ino
    await until(await make(machine()), "TensorRT")
    assert plan.stat().st_ino == before


async def test_onnx_runtime_takes_over_when_tensorrt_is_lost(make, machine, tmp_path):
    repository = await make(machine())
    await until(repository, "TensorRT")
    engine = repository.find("double").engine
    (plan,) = (tmp_path / "plans").glob("*.plan")
    plan.write_bytes(b"damaged")  # so that it cannot be started again
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while repository.find_all("double", "")[0].engine.provider != "CPUExecutionProvider":
            await asyncio.sleep(0.01)
    await ask(repository, 7)
    assert repository.ready


@pytest.mark.parametrize(
    ("properties", "why"),
    [({"devices": 0}, "no such GPU"), ({"driver": 0}, "driver"), ({"version": "9.3.0.1"}, "9.3")],
)
async def test_without_a_usable_gpu_onnx_runtime_serves_and_the_reason_is_known(
    make, machine, properties, why
):
    repository = await make(machine(**properties))
    assert why in repository._acceleration.objection
    await ask(repository, 3)
    following = repository.find("double").following
    await asyncio.wait_for(following, 10)  # there is nothing to wait for
    assert repository.find("double").engine.provider == "CPUExecutionProvider"


async def test_closing_in_the_middle_of_a_build_ends_it(make, machine):
    others = children()
    repository = await make(machine(hang=True))
    async with asyncio.timeout(30):
        while repository._acceleration._builder.building is None:
            await asyncio.sleep(0.01)
    await ask(repository, 3)
    assert children() > others
    await asyncio.wait_for(repository.close(), 20)
    assert children() <= others


def children() -> set[str]:
    """Return the processes that the loop's thread has started and not reaped."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())
