import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from fogline_protocol.client import Client
from fogline_protocol.errors import InferenceError
from fogline_protocol.inference import InferRequest
from tests.edge_agent import bundles
from tests.edge_agent.polling import until
from tests.fakes import FakeHub, Serving

AGENT = str(Path(sys.executable).with_name("fogline-agent"))


class Process:
    """A real ``fogline-agent run`` on its own data directory."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.endpoints_file = folder / "data" / "endpoints.json"
        self._folder = folder
        self._options = options
        self._running: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        self.endpoints_file.unlink(missing_ok=True)  # of an agent that was killed
        with (
            (self._folder / f"out-{self.starts}").open("w") as out,
            (self._folder / f"err-{self.starts}").open("w") as err,
        ):
            self._running = subprocess.Popen(
                [
                    AGENT, "run",
                    "--data", str(self._folder / "data"),
                    "--grpc", "127.0.0.1:0",
                    "--http", "127.0.0.1:0",
                    "--unix", str(self._folder / "agent.sock"),
                    *self._options,
                ],
                stdout=out,
                stderr=err,
            )  # fmt: skip

    async def ready(self) -> dict[str, str]:
        """Return the addresses once they are there."""
        await until(lambda: self.endpoints_file.exists() or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.err
        found: dict[str, str] = json.loads(self.endpoints_file.read_text())
        return found

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._running is not None
        return self._running

    @property
    def out(self) -> str:
        return (self._folder / f"out-{self.starts}").read_text()

    @property
    def err(self) -> str:
        return (self._folder / f"err-{self.starts}").read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def digits(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, "--bundle", str(bundles.DIGITS), "--device", "kitchen")
    yield process
    if process.starts and process.process.poll() is None:
        process.end(signal.SIGKILL)


def image() -> InferRequest:
    return InferRequest("digits", {"image": np.zeros((1, 1, 8, 8), np.float32)})


@pytest.mark.system
async def test_start_and_stop_say_what_matters(digits: Process) -> None:
    digits.start()
    endpoints = await digits.ready()
    await until(lambda: "is ready" in digits.out)
    assert digits.end() == 0
    for part in (
        "fogline agent of 'kitchen' is ready",
        endpoints["grpc"],
        f"unix:{endpoints['unix']}",
        f"http://{endpoints['http']}/v2",
        "digits@1.0.0: ",
        "escalates to digits-hub",
        "uncertain answers stay here and are marked degraded",
        "finishing what is in flight",
    ):
        assert part in digits.out
    for line in digits.err.splitlines():  # logs are JSON when nobody watches
        assert {"event", "level", "logger", "ts"} <= set(json.loads(line))
    assert not digits.endpoints_file.exists()


@pytest.mark.system
async def test_one_small_model_fits_into_its_budgets(digits: Process) -> None:
    """At most 140 MB with TUF and cryptography loaded, at most 2 s of CPU to the first answer."""
    took = []
    for _ in range(3):
        digits.start()
        client = Client((await digits.ready())["grpc"])
        await client.infer(image(), 5.0)
        used = psutil.Process(digits.process.pid).cpu_times()
        took.append(used.user + used.system)
        for _ in range(200):
            await client.infer(image(), 5.0)
        await client.close()
        rss = psutil.Process(digits.process.pid).memory_info().rss
        assert digits.end(signal.SIGINT) == 0
        assert rss <= 140e6
    assert min(took) <= 2.0


@pytest.mark.system
async def test_an_agent_killed_under_load_starts_again_as_if_nothing_was(
    tmp_path: Path, hub: FakeHub, door: Serving
) -> None:
    bundles.make(tmp_path / "bundle")
    process = Process(tmp_path, "--bundle", str(tmp_path / "bundle"), "--hub", door.address)
    socket = f"unix:{tmp_path / 'agent.sock'}"
    x = {"x": np.concatenate([bundles.SURE, bundles.UNSURE])}
    for _ in range(3):
        process.start()
        await process.ready()
        answered = 0

        async def load() -> None:
            nonlocal answered
            client = Client(socket)
            try:
                while True:
                    response = await client.infer(InferRequest("double", x), 5.0)
                    assert response.outputs["logits"].shape == (2, 3)
                    answered += 1
            except InferenceError:
                pass  # the agent is dead
            finally:
                await client.close()

        loads = [asyncio.create_task(load()) for _ in range(4)]
        await until(lambda: answered > 50, 30)  # noqa: B023
        assert process.end(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.gather(*loads)
        assert (tmp_path / "agent.sock").exists()  # what a killed agent leaves
        assert process.endpoints_file.exists()
    process.start()
    await process.ready()
    client = Client(socket)
    response = await client.infer(InferRequest("double", x), 5.0)
    assert response.parameters["fogline.tier"] in ("mixed", "edge")
    await client.close()
    assert process.end() == 0


def ran(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AGENT, *options],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.system
def test_each_kind_of_trouble_has_its_sentence_and_its_exit_code(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    toml = tmp_path / "agent.toml"
    toml.write_text("thread = 1")
    found = ran("run", *data, "--config", str(toml))
    assert found.returncode == 2
    assert found.stderr.startswith("fogline-agent: unknown option 'thread'")
    assert "did you mean 'threads'?" in found.stderr

    assert ran("run", *data, FOGLINE_AGENT_GRPC="0.0.0.0:1").returncode == 2

    made = bundles.make(tmp_path / "bundle")
    (made.path / "fp32.onnx").write_bytes(b"x" * (made.path / "fp32.onnx").stat().st_size)
    found = ran("run", *data, "--bundle", str(made.path))
    assert found.returncode == 4
    assert "fp32.onnx: SHA-256 is" in found.stderr


@pytest.mark.system
def test_a_release_that_is_wrong_is_not_served_and_doctor_says_why(tmp_path: Path) -> None:
    broken = ("--bundle", str(bundles.DIGITS.parent / "broken" / "digits-1.2.0"))
    found = ran("run", "--data", str(tmp_path / "data"), *broken)
    assert found.returncode == 4
    (said,) = found.stderr.splitlines()
    assert re.fullmatch(
        r"fogline-agent: bundle .*digits-1\.2\.0: \S+ failed its self-test on CPUExecutionProvider: "
        r"outputs stray from the reference by up to .* \[self-test/deviation\]",
        said,
    )
    assert "is ready" not in found.stdout
    found = ran("doctor", *broken)
    assert found.returncode == 1
    assert "WRONG  bundle    bundle " in found.stdout
    assert "[self-test/deviation]" in found.stdout
    assert "is intact and runs here" not in found.stdout


@pytest.mark.system
async def test_a_port_in_use_ends_the_start_with_its_own_code(digits: Process) -> None:
    digits.start()
    endpoints = await digits.ready()
    for door in ("grpc", "http"):
        other = str(digits.endpoints_file.parent.parent / f"other-{door}")
        both = {"grpc": "off", "http": "off", door: endpoints[door]}
        found = await asyncio.to_thread(
            ran, "run", "--data", other, "--grpc", both["grpc"], "--http", both["http"]
        )
        assert found.returncode == 3
        assert f"cannot listen on {endpoints[door]}" in found.stderr
    client = Client(endpoints["grpc"])
    await client.infer(image(), 5.0)  # the first one did not notice
    await client.close()


@pytest.mark.system
async def test_doctor_names_what_is_wrong(tmp_path: Path, hub: FakeHub, door: Serving) -> None:
    made = bundles.make(tmp_path / "bundle", variants=("int8", "fp32"), certified=False)
    bundles.add_certificate(made, "fp32")
    bundle = ("--bundle", str(made.path))
    found = await asyncio.to_thread(ran, "doctor", *bundle, "--hub", door.address)
    assert found.returncode == 0, found.stdout
    aside = "double@1.0.0: int8 on CPUExecutionProvider: no certificate was issued for it"
    assert f"ok     aside     {aside}" in found.stdout
    assert "CPUExecutionProvider runs" in found.stdout
    assert "double@1.0.0" in found.stdout
    assert "certified for " in found.stdout
    assert (
        "ok     self-test fp32 on CPUExecutionProvider: 2 golden rows, largest error 0 "
        "(allowed 0.1), 100.0% get the reference's answer (required 90.0%), "
    ) in found.stdout
    assert f"{door.address} answers" in found.stdout
    assert "WRONG" not in found.stdout

    await door.stop()
    found = await asyncio.to_thread(ran, "doctor", *bundle, "--hub", door.address)
    assert found.returncode == 1
    assert f"WRONG  hub       {door.address} does not answer" in found.stdout

    for file in (made.path / "certificates").iterdir():
        file.unlink()
    (tmp_path / "empty").mkdir()
    found = await asyncio.to_thread(ran, "doctor", *bundle, "--bundle", str(tmp_path / "empty"))
    assert found.returncode == 1
    assert "no certificate was issued for it" in found.stdout
    assert "bundle.json: No such file" in found.stdout


def test_importing_the_agent_loads_nothing_heavy() -> None:
    code = """
import pkgutil, importlib, sys
sys.modules["rich"] = None  # structlog takes it where it finds it; a device has none
import edge_agent
for module in pkgutil.walk_packages(edge_agent.__path__, "edge_agent."):
    importlib.import_module(module.name)
heavy = {"torch", "onnx", "tensorrt", "cuda", "sklearn", "cloud_hub", "fogline_models",
         "sqlalchemy", "alembic", "jinja2", "pydantic"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    found = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert found.strip() == "[]"


def test_help_waits_for_no_runtime() -> None:
    code = """
import sys, edge_agent.cli
print(sorted({"onnxruntime", "grpc", "numpy", "aiohttp", "structlog"} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
