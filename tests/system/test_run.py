"""The script that everything starts with."""

import subprocess

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
