"""The doctor says what can be done here, and what to install for the rest."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from fogline_models import doctor
from fogline_models.cli import main
from fogline_models.doctor import Level
from fogline_models.forms import FORMS

RUNTIME = {"onnxruntime": "1.32.0"}
GPU = {"onnxruntime-gpu": "1.32.0"}


def test_here_everything_is_looked_at_once(tmp_path: Path) -> None:
    findings = list(doctor.examine(tmp_path))
    whats = [finding.what for finding in findings if finding.what != "provider"]
    assert len(whats) == len(set(whats))
    assert {*doctor.NEEDS, *(f"form {name}" for name in FORMS), "disk", "processor"} <= {*whats}
    assert all(finding.level is not Level.WRONG for finding in findings)


def test_the_command_prints_every_finding_and_leaves_well(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--cache", str(tmp_path / "none" / "yet")])
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) == len(list(doctor.examine(tmp_path)))
    assert not (tmp_path / "none").exists()


def test_a_missing_package_is_a_note_that_says_how_to_install_it() -> None:
    found = doctor.needs("quantize", ("onnx", "onnxruntime"), "models", RUNTIME)
    assert found.level is Level.NOTE
    assert found.text == "cannot: onnx is missing: pip install 'fogline[models]'"


@pytest.mark.parametrize("installed", [RUNTIME, GPU])
def test_either_runtime_will_do(installed: dict[str, str]) -> None:
    (name,) = installed
    assert doctor.needs("certify", ("onnxruntime",), "edge", installed).text == f"{name} 1.32.0"
    assert doctor._runtime(installed).level is Level.OK


def test_both_runtimes_at_once_or_none_are_wrong() -> None:
    both = doctor._runtime({**RUNTIME, **GPU})
    assert both.level is Level.WRONG
    assert "uninstall both, install one" in both.text
    assert "pip install 'fogline[edge]'" in doctor._runtime({}).text


def test_a_missing_tool_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = doctor._tool("espeak-ng", "family keywords", "it speaks")
    assert found.level is Level.NOTE
    assert "apt-get install espeak-ng" in found.text


def test_a_processor_whose_sums_saturate_is_told_and_its_forms_too() -> None:
    assert doctor._processor("x86_64+avx2").level is Level.NOTE
    assert doctor._processor("x86_64+avx512_vnni").level is Level.OK
    assert doctor._form(FORMS["int8-vnni"], "x86_64+avx2").level is Level.NOTE
    assert doctor._form(FORMS["int8-vnni"], "x86_64+avx512_vnni").level is Level.OK
    assert doctor._form(FORMS["int8-qdq"], "x86_64+avx2").level is Level.OK


def test_too_little_room_for_steps_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    result = CliRunner().invoke(main, ["doctor", "--cache", str(tmp_path)])
    assert result.exit_code == 1
    assert "wrong  disk" in result.output
    assert "name another place with --cache" in result.output


def test_a_cache_below_a_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert doctor._space(tmp_path / "file" / "cache").level is Level.WRONG
