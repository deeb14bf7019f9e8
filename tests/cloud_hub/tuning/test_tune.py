"""A model is measured on the engines that serve it, and the hub then obeys what was chosen."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from cloud_hub.cli import main
from cloud_hub.engines.launch import Launcher
from cloud_hub.errors import ConfigRefused, ModelRefused
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.metrics import Metrics
from cloud_hub.tuning import tune
from cloud_hub.tuning.settings import Target, shape_option
from fogline_protocol import model_config
from fogline_protocol.model_config import Tuning
from tests import onnx_bytes

TEXT = Path(__file__).parents[2] / "edge_agent" / "data" / "text.onnx"
CONFIG = """
# what the operator wrote
max_batch_size: 16
dynamic_batching { preferred_batch_size: [ 16 ] max_queue_delay_microseconds: 100 }
version_policy { latest { num_versions: 2 } }
model_warmup {
  name: "one" batch_size: 1
  inputs { key: "image" value { data_type: TYPE_FP32 dims: [ 1, 8, 8 ] random_data: true } }
}
"""


@pytest.fixture
def folder(triton_directory):
    return triton_directory / "digits-hub"


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "tune", *map(str, arguments)])


class Silent:
    def trying(self, setting, left):
        pass

    def measured(self, found):
        pass


def open_model(path, datatype="FP32", dims=("n", 2, "h", "w")):
    """Write a model that doubles an input with free dimensions."""
    path.write_bytes(
        onnx_bytes.model(
            [("Add", ["x", "x"], ["y"])], [("x", datatype, dims)], [("y", datatype, dims)]
        )
    )
    return path


async def test_what_was_chosen_is_what_the_hub_serves(triton_directory, folder):
    (folder / "config.pbtxt").write_text(CONFIG)
    found = await asyncio.to_thread(
        run, "digits-hub", "--models", triton_directory, "--seconds", 4, "--latency-ms", 5000,
        "--max-batch", 8, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    chosen = told["chosen"]
    assert chosen in told["measurements"]
    assert told["now"]["batch"] == 16
    assert told["took_s"] < 20
    assert all(one["cpu_ms_per_sample"] > 0 for one in told["measurements"])
    assert (folder / "config.pbtxt.bak").read_text() == CONFIG
    wanted = model_config.parse_pbtxt((folder / "config.pbtxt").read_text())
    assert wanted.versions.latest == 2
    assert wanted.batching.max_queue_delay_us == 100
    assert wanted.warm_ups[0].name == "one"

    opened = []

    class Recording(Launcher):
        async def open(self, path, *, instances=1, threads=0):
            opened.append((instances, threads))
            return await super().open(path, instances=instances, threads=threads)

    repository = Repository(Metrics(), Recording(), Limits())
    await repository.load_directory(triton_directory)
    model = repository.find("digits-hub")
    assert opened == [(chosen["instances"], chosen["threads"])] * chosen["instances"]
    assert len(model.engines) == model.config.instances == chosen["instances"]
    assert model.config.max_batch_size == chosen["batch"]
    assert model.config.threads == chosen["threads"]
    answer = await model.batcher.infer({"image": np.zeros((3, 1, 8, 8), np.float32)}, None)
    assert answer["logits"].shape == (3, 10)
    await repository.close()


def test_a_dry_run_prints_the_curve_and_the_settings_and_writes_nothing(triton_directory, folder):
    before = sorted(folder.rglob("*"))
    found = run("digits-hub", "--models", triton_directory, "--seconds", 2, "--dry-run",
                "--latency-ms", 5000)  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "samples/s" in found.stdout
    assert "chosen" in found.stdout
    assert 'key: "fogline.threads"' in found.stdout
    assert "nothing was written" in found.stdout
    assert "samples/s, p99" in found.stderr  # progress
    assert sorted(folder.rglob("*")) == before


def test_a_limit_that_nothing_keeps_changes_nothing_and_says_what_would(triton_directory, folder):
    (folder / "config.pbtxt").write_text(CONFIG)
    found = run("digits-hub", "--models", triton_directory, "--seconds", 10, "--latency-ms", 0.0001)
    assert found.exit_code == 8
    assert "the quickest took" in found.stderr
    assert "too slow" in found.stdout
    assert (folder / "config.pbtxt").read_text() == CONFIG


def test_no_time_at_all_is_told_from_no_success(triton_directory):
    found = run("digits-hub", "--models", triton_directory, "--seconds", 0.001)
    assert found.exit_code == 8
    assert "raise --seconds" in found.stderr


def test_settings_that_would_be_lost_are_refused_before_anything_is_measured(
    triton_directory, folder
):
    (folder / "config.pbtxt").write_text("optimization { priority: PRIORITY_MAX }")
    found = run("digits-hub", "--models", triton_directory)
    assert found.exit_code == 4
    assert "without losing" in found.stderr
    assert "optimization" in found.stderr
    assert "--dry-run" in found.stderr


def test_ctrl_c_leaves_the_settings_as_they_were(triton_directory, folder):
    (folder / "config.pbtxt").write_text(CONFIG)
    command = [sys.executable, "-c", "from cloud_hub.cli import main; main()", "bench", "tune"]
    command += ["digits-hub", "--models", str(triton_directory), "--seconds", "50"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tuning:
        assert "samples/s" in tuning.stderr.readline()  # one setting is measured, others are left
        tuning.send_signal(signal.SIGINT)
        assert "Aborted" in tuning.stderr.read()
    assert tuning.returncode == 1
    assert sorted(file.name for file in folder.iterdir()) == ["3", "config.pbtxt"]
    assert (folder / "config.pbtxt").read_text() == CONFIG


def test_a_file_alone_is_tuned_with_the_shape_that_is_given(tmp_path):
    file = open_model(tmp_path / "open.onnx")
    refused = run(file)
    assert refused.exit_code == 2
    assert "input 'x' is FP32 [2, -1, -1] after the batch dimension" in refused.stderr
    assert "--shape x=2x224x224" in refused.stderr
    found = run(file, "--shape", "x=2x3x3", "--seconds", 1, "--max-batch", 2, "--json",
                "--latency-ms", 5000)  # fmt: skip
    told = json.loads(found.stdout)
    assert told["written"] is None
    assert f"max_batch_size: {told['chosen']['batch']}" in told["settings"]


async def test_what_engines_in_child_processes_use_is_counted():
    here = psutil.Process().memory_info().rss
    found = await tune.tune(Target.find(str(TEXT), None), tune.Wish(5.0, 10.0, 1), Silent())
    assert found.chosen.memory_bytes > here + (20 << 20)  # a child has loaded ONNX Runtime
    assert found.chosen.cpu_s_per_sample > 0


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"x": (3, 4, 4)}, r"--shape says \[3, 4, 4\]"),
        ({"x": (2, 4)}, r"--shape says \[2, 4\]"),
        ({"z": (2,)}, r"--shape names \['z'\], the inputs are \['x'\]"),
    ],
)
async def test_a_shape_that_is_not_the_models_is_refused(tmp_path, shapes, says):
    target = Target.find(str(open_model(tmp_path / "open.onnx")), None)
    with pytest.raises(ConfigRefused, match=says):
        await tune.tune(target, tune.Wish(1.0, 10.0, 4, shapes), Silent())


@pytest.mark.parametrize("text", ["x", "x=", "=3", "x=3x", "x=0", "x=-1", "x=3,4"])
def test_a_shape_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigRefused, match="NAME=3x224x224"):
        shape_option(text)


def test_a_name_that_means_nothing_is_refused(triton_directory, folder, tmp_path):
    with pytest.raises(ConfigRefused, match=r"no model 'x', it has \['digits-hub'\]"):
        Target.find("x", triton_directory)
    with pytest.raises(ConfigRefused, match="no ONNX file"):
        Target.find("x", None)
    (folder / "config.pbtxt").write_text('backend: "upstream"')
    with pytest.raises(ModelRefused, match="tune it there"):
        Target.find("digits-hub", triton_directory)


def test_the_new_file_may_be_read_by_whom_the_old_one_could(triton_directory, folder):
    target = Target.find("digits-hub", triton_directory)
    tuning = Tuning(8, 1, 1, ())
    assert target.write(target.rewritten(tuning)).backup is None
    assert (folder / "config.pbtxt").stat().st_mode & 0o777 == 0o644
    (folder / "config.pbtxt").chmod(0o640)
    target.write(target.rewritten(tuning))
    assert (folder / "config.pbtxt").stat().st_mode & 0o777 == 0o640
    assert (folder / "config.pbtxt.bak").stat().st_mode & 0o777 == 0o640
