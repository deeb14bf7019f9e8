"""What a machine is told about itself."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from cloud_hub import doctor
from cloud_hub.cli import main
from cloud_hub.config import HubConfig
from cloud_hub.doctor import Level
from cloud_hub.engines import probe
from cloud_hub.errors import ModelRefused
from tests.fake_gpu import Gpu

BIG = "CUDAExecutionProvider"


def test_both_runtimes_together_are_wrong_and_it_says_how_to_get_out():
    finding = doctor.runtime_finding({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"})
    assert finding.level is Level.WRONG
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.text


@pytest.mark.parametrize(
    ("installed", "level"),
    [({"onnxruntime": "1.32.0"}, Level.OK), ({"onnxruntime-gpu": "1"}, Level.OK), ({}, Level.NOTE)],
)
def test_one_runtime_is_right(installed, level):
    assert doctor.runtime_finding(installed).level is level


@pytest.mark.parametrize(
    ("objections", "has_gpu", "gpu", "levels"),
    [
        ({"CPUExecutionProvider": None}, False, False, [Level.OK]),
        ({"CPUExecutionProvider": "off by 1"}, False, False, [Level.WRONG]),
        ({"CPUExecutionProvider": None, BIG: "no"}, False, False, [Level.OK, Level.NOTE]),
        ({"CPUExecutionProvider": None, BIG: "no"}, True, False, [Level.OK, Level.WRONG]),
        ({"CPUExecutionProvider": None, BIG: None}, True, True, [Level.OK, Level.OK]),
        ({"CPUExecutionProvider": None}, True, False, [Level.OK, Level.NOTE]),
        ({"CPUExecutionProvider": None}, True, True, [Level.OK, Level.WRONG]),
        ({"CPUExecutionProvider": None, "X": "no"}, True, True, [Level.OK, Level.NOTE, Level.WRONG]),
    ],
)  # fmt: skip
def test_a_provider_counts_where_it_is_needed(objections, has_gpu, gpu, levels):
    found = list(doctor.provider_findings(objections, has_gpu=has_gpu, gpu=gpu))
    assert [finding.level for finding in found] == levels


def test_the_cpu_really_computes_the_probe():
    assert probe.provider_objection("CPUExecutionProvider") is None


def test_a_provider_that_is_not_there_is_no_session_on_the_cpu():
    assert "does not have CoreMLExecutionProvider" in str(
        probe.provider_objection("CoreMLExecutionProvider")
    )
    with pytest.raises(ModelRefused):
        probe.strict_session(b"no model", "CPUExecutionProvider")


def _doctor(tmp_path, *options, packages=None):
    """Run the command in a process, where fakes may be installed."""
    path = os.pathsep.join([*([str(packages)] if packages else []), *sys.path])
    code = "from cloud_hub.cli import main; main()"
    data = ("--data", str(tmp_path / "hub"))
    run = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json", *data, *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return run, {finding["what"]: finding for finding in found}


def test_without_a_gpu_the_hub_is_fine_and_is_told_so(tmp_path):
    run, found = _doctor(tmp_path, packages=Gpu.hide(tmp_path / "packages"))
    assert run.returncode == 0, run.stderr
    assert found["GPU"]["level"] == "note"
    assert found["GPU"]["text"].startswith("no GPU can be used: ")
    assert found["CPUExecutionProvider"]["level"] == "ok"
    assert found["data"]["level"] == "ok"


def test_a_gpu_that_is_required_and_not_there_is_wrong(tmp_path):
    run, found = _doctor(tmp_path, "--gpu", packages=Gpu.hide(tmp_path / "packages"))
    assert run.returncode == 1
    assert run.stderr == ""
    assert {found[what]["level"] for what in ("GPU", "TensorRT", "TensorRT plan")} == {"wrong"}


def test_with_a_gpu_a_small_plan_is_built_run_and_compared(tmp_path, fake_packages):
    run, found = _doctor(tmp_path, "--gpu", packages=fake_packages)
    assert found["GPU"]["text"].startswith("0: Fake GPU, compute capability 9.0, 80 GiB, driver ")
    assert found["TensorRT"]["text"] == "11.4.0.26"
    assert found["TensorRT plan"] == {
        "level": "ok",
        "what": "TensorRT plan",
        "text": "a small plan was built, and its answer is right",
    }
    if BIG not in probe.providers():  # an ONNX Runtime for the CPU only
        assert run.returncode == 1
        assert found[BIG]["level"] == "wrong"


@pytest.fixture
def fake_packages(tmp_path):
    return Gpu.install(tmp_path / "packages")


def test_half_a_runtime_is_found_out(tmp_path):
    (tmp_path / "packages" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "packages" / "onnxruntime" / "__init__.py").touch()
    run, found = _doctor(tmp_path, packages=tmp_path / "packages")
    assert run.returncode == 1
    assert "it cannot be imported: " in found["ONNX Runtime"]["text"]


async def test_a_data_directory_that_cannot_be_written_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    config = HubConfig(data=tmp_path / "file" / "hub")
    found = {one.what: one async for one in doctor.examine(config, gpu=False)}
    assert found["data"].level is Level.WRONG
    assert str(tmp_path / "file") in found["data"].text


def test_a_wrong_option_is_an_error_of_its_own(tmp_path):
    (tmp_path / "hub.toml").write_text("max_bach = 3\n")
    result = CliRunner().invoke(main, ["doctor", "--config", str(tmp_path / "hub.toml")])
    assert result.exit_code == 2
    assert "did you mean 'max_batch'?" in result.output
