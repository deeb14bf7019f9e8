"""What tests of several folders share: the committed digits, and nothing else."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Have properties and Ctrl-C mean the same on every machine.

    A shell has what it starts in the background ignore Ctrl-C, and children inherit that.
    """
    # How long an example takes says something of the machine, and nothing of what is tested.
    settings.register_profile(
        "fogline", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("fogline")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="Fail if a test was skipped: for a run that promises what it runs.",
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--no-skips") and reporter is not None:
        skipped = len(reporter.stats.get("skipped", ()))
        if skipped and exitstatus == pytest.ExitCode.OK:
            reporter.write_line(f"--no-skips: {skipped} skipped, for the reasons below", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def digits() -> Path:
    """The folder of the digits family."""
    return ROOT / "models" / "digits"


@pytest.fixture
def triton_directory(tmp_path: Path, digits: Path) -> Path:
    """A Triton-style directory that serves digits-hub as version 3."""
    root = tmp_path / "models"
    folder = root / "digits-hub" / "3"
    folder.mkdir(parents=True)
    model = digits / "bundles" / "digits-hub-1.0.0" / "variants" / "fp32.onnx"
    (folder / "model.onnx").write_bytes(model.read_bytes())
    return root


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Undo what a command or a server in this process did to the log, which is the process's."""
    loggers = [logging.getLogger(name) for name in (None, "fogline", "cloud_hub", "edge_agent")]
    before = [(logger, logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
