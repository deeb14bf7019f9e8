"""A run that promises what it runs fails if it skipped any of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SKIPS = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no torch')\n"
MODULE = "import pytest\npytest.importorskip('nowhere_at_all', reason='none')\ndef test_a(): pass\n"
RUNS = "def test_a(): pass\n"


@pytest.mark.parametrize(
    ("text", "option", "code"),
    [(SKIPS, "", 0), (SKIPS, "--no-skips", 1), (MODULE, "--no-skips", 1), (RUNS, "--no-skips", 0)],
)
def test_a_skipped_test_fails_a_run_only_if_that_was_asked_for(
    tmp_path: Path, text: str, option: str, code: int
) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_some.py").write_text(text)
    (tmp_path / "test_more.py").write_text(RUNS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *option.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert ("--no-skips: 1 skipped" in done.stdout) == (code == 1)
