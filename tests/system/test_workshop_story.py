"""A model that nobody here made: from its file through every command of the workshop to a device."""

import asyncio
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")
pytest.importorskip("pydantic", reason="needs pydantic: pip install 'fogline[models]'")

from deploy.demo.fleet import DemoFailed, script  # noqa: E402
from deploy.demo.operator import Operator  # noqa: E402
from fogline_models import archive  # noqa: E402
from fogline_protocol import release  # noqa: E402
from fogline_protocol.client import Client  # noqa: E402
from fogline_protocol.inference import InferRequest  # noqa: E402
from tests.models import onnx_nets  # noqa: E402

pytestmark = [pytest.mark.system, pytest.mark.workshop, pytest.mark.timeout(300)]

BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
LIMIT_S = 60.0


def of_the_backend_tests():
    """ONNX's own ``test_Linear_no_bias``, opset 6, its batch of four opened as an owner would."""
    model = onnx.load(str(BACKEND / "test_Linear_no_bias" / "model.onnx"))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    return model


def foreign(made, folder):
    """Return a file, what it takes and gives, and 600 items of it."""
    path = onnx_nets.save(made, folder / "foreign.onnx")
    spec = made.graph.input[0]
    shape = [size.dim_value for size in spec.type.tensor_type.shape.dim][1:]
    rng = np.random.default_rng(0)
    items = rng.standard_normal((600, *shape)).astype(np.float32)
    return SimpleNamespace(
        path=path, input=spec.name, output=made.graph.output[0].name, items=items
    )


def ran(command, *arguments):
    """Run an installed command that has to succeed, and return what it printed."""
    done = subprocess.run(
        [script(command), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bundled(model, folder):
    """Take the file through export, quantize, evaluate and bundle; return the bundle."""
    training, held_out = folder / "training.npz", folder / "held-out.npz"
    archive.save(training, {f"input.{model.input}": model.items[:400]})
    archive.save(held_out, {f"input.{model.input}": model.items[400:]})
    exported, int8 = folder / "exported", folder / "int8.onnx"
    cache = ("--cache", folder / "steps")
    ran("fogline-models", "export", model.path, "--data", training, "--out", exported, *cache)
    fp32 = exported / "fp32.onnx"
    ran("fogline-models", "quantize", fp32, "--form", "int8-qdq", "--data", training, "--out", int8)
    told = ran("fogline-models", "evaluate", fp32, int8, "--data", held_out)
    assert "200 items of 200 scenes, against fp32" in told
    # Whether int8 pays for a net this small is the machine's to say, so fp32 ships in any case.
    made = ran(
        "fogline-models", "bundle", fp32, "--name", "foreign", "--version", "1.0.0",
        "--task", "image-classification",
        "--training", training, "--evaluation", held_out, "--variant", "int8-qdq",
        "--variant", "fp32", "--out", folder / "made", *cache,
    )  # fmt: skip
    return Path(made.strip())


@pytest.mark.parametrize("make", [onnx_nets.cnn, of_the_backend_tests])
async def test_a_foreign_file_becomes_a_release_that_a_device_answers_with(
    make, tmp_path, make_hub, make_agent
):
    model = foreign(make(), tmp_path)
    bundle = await asyncio.to_thread(bundled, model, tmp_path)
    hub = await make_hub()
    agent = await make_agent("device", hub.endpoints["grpc"], "--probation-s", "0.5")
    operator = Operator(SimpleNamespace(hub=hub, agents=[agent]))
    limit = time.monotonic() + LIMIT_S
    while not await operator.devices():
        assert time.monotonic() < limit, "the device did not report"
        await asyncio.sleep(0.05)
    data = ("--data", hub.data)
    told = await asyncio.to_thread(ran, "fogline", "release", "push", *data, bundle)
    assert told.startswith("foreign@1 ")
    await asyncio.to_thread(
        ran, "fogline", "device", "set", *data, "--release", "foreign@1", "--all"
    )
    assert await operator.until_committed("foreign@1") == 1
    found = release.read(bundle)
    with np.load(found.file(found.bundle.self_test.path)) as vectors:
        given, want = vectors[f"input.{model.input}"], vectors[f"output.{model.output}"]
    client = Client("unix:" + agent.endpoints["unix"].removeprefix("unix:"))
    try:
        answer = await client.infer(
            InferRequest("foreign", {model.input: given[:1]}, parameters={"fogline.mode": "edge_only"}),
            5.0,
        )  # fmt: skip
    finally:
        await client.close()
    first = found.bundle.variants[0].name
    error = np.abs(answer.outputs[model.output] - want[:1]).max()
    assert error <= found.bundle.self_test.tolerances[first].max_abs_error


async def test_a_bundle_altered_in_any_of_its_files_is_refused_by_hub_and_agent(
    tmp_path, make_hub, make_agent
):
    model = foreign(onnx_nets.cnn(), tmp_path)
    bundle = await asyncio.to_thread(bundled, model, tmp_path)
    listed = sorted(release.read(bundle).bundle.files)
    assert {"README.md", "selftest.npz", "sources.json", "variants/fp32.onnx"} <= {*listed}
    hub = await make_hub()
    for name in listed:
        altered = tmp_path / "altered" / name.replace("/", "-")
        await asyncio.to_thread(shutil.copytree, bundle, altered)
        content = bytearray((altered / name).read_bytes())
        content[len(content) // 2] ^= 1
        (altered / name).write_bytes(content)
        command = [script("fogline"), "release", "push", "--data", str(hub.data), str(altered)]
        pushed = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False
        )
        assert pushed.returncode == 6
        assert f"{name}: SHA-256 is" in pushed.stderr
        with pytest.raises(DemoFailed, match=rf"{name}: SHA-256 is"):
            await make_agent("device", hub.endpoints["grpc"], "--bundle", str(altered))
