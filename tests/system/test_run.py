"""The script that everything starts with."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.system


def test_run_says_what_it_can_do_from_wherever_it_is_called() -> None:
    asked = [ROOT.name + "/run", "help"]
    done = subprocess.run(["sh", *asked], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("demo", "test", "test workshop", "check", "bench"):
        assert f"./run {command}" in done.stdout


def test_the_demo_asks_for_a_folder_that_there_is_before_its_story(tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "deploy.demo", "--report", str(tmp_path / "no" / "figures.json")]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"--report: there is no folder {tmp_path / 'no'}" in done.stderr
    assert done.stdout == ""
