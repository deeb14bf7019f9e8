"""The servers of a benchmark, started as their users start them, and what is read off them.

Counts come from a server's own Prometheus page; CPU and memory from the kernel, over the whole
process tree, because a server may do its work in children.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from deploy.demo.fleet import script
from fogline_protocol.inference import InferRequest, encode_request
from fogline_protocol.tensors import Array
from tests.benchmarks import peers

START_LIMIT_S = 60.0
PRIORITY = 10  # of all sides alike, over whatever else the machine does


@dataclass(frozen=True, slots=True)
class Model:
    """A model that servers are asked for, and one request with its right answer."""

    name: str
    file: Path
    input: str
    output: str
    rows: Array  # [n, ...], one request
    answer: Array  # [n, ...], by the raw session

    def request(self) -> bytes:
        """Return the ``ModelInferRequest`` that every server is sent."""
        return encode_request(InferRequest(self.name, {self.input: self.rows}))


def tiny(rows: int = 1) -> Model:
    """Return the model whose runs cost less than any call to it."""
    return _model("tiny", "x", "y", np.random.default_rng(0).random((rows, 8, 8), np.float32))


def mid_u8() -> Model:
    """Return a MobileNet-like CNN, asked for one picture of 150 KB."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    return _model("mid_u8", "image", "logits", picture)


def session(file: Path) -> onnxruntime.InferenceSession:
    """Return the raw session, with one thread as everybody here."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _model(name: str, given: str, wanted: str, rows: Array) -> Model:
    file = peers.models() / f"{name}.onnx"
    (answer,) = session(file).run([wanted], {given: rows})
    return Model(name, file, given, wanted, rows, np.asarray(answer))


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that was started for a benchmark."""

    process: "subprocess.Popen[bytes]"
    grpc: str
    metrics: str  # URL of its Prometheus page
    counters: Mapping[str, str]  # name -> what the labels of an answered request contain
    log: Path

    def wait_for(self, model: Model, *, load: bool = False) -> float:
        """Wait until it is up, and return when it first gave the right answer.

        The moment is of ``time.monotonic()``. ``load``: it is asked to load the model before.
        """
        limit = time.monotonic() + START_LIMIT_S
        answered_at = None
        host, _, port = self.grpc.rpartition(":")
        while True:
            if self.process.poll() is not None or time.monotonic() > limit:
                text = self.log.read_text(errors="replace")[-2000:]
                sys.exit(f"{self.process.args!r} did not start:\n{text}")
            with contextlib.suppress(OSError, InferenceServerException):
                # A closed port is seen at once; a gRPC channel would back off and come late.
                socket.create_connection((host, int(port)), 1).close()
                if answered_at is None:
                    if load:
                        self.load(model)
                    self.check(model)
                    answered_at = time.monotonic()
                self.answered(model)  # its HTTP door may open after the other one
                return answered_at
            time.sleep(0.01)

    def load(self, model: Model) -> None:
        """Have a model loaded, or loaded anew; return when it serves."""
        with contextlib.closing(tritonclient.grpc.InferenceServerClient(self.grpc)) as client:
            client.load_model(model.name)

    def check(self, model: Model) -> None:
        """Ask once with NVIDIA's client and hold the answer against the raw session's."""
        given = tritonclient.grpc.InferInput(
            model.input, model.rows.shape, np_to_triton_dtype(model.rows.dtype)
        )
        given.set_data_from_numpy(model.rows)
        with contextlib.closing(tritonclient.grpc.InferenceServerClient(self.grpc)) as client:
            found = client.infer(model.name, [given]).as_numpy(model.output)
        if not np.allclose(found, model.answer, rtol=1e-3, atol=1e-3):
            sys.exit(f"{self.process.args!r} answers {model.name} wrongly")

    def answered(self, model: Model) -> int:
        """Return how many requests of a model it has answered, by its own count."""
        return sum(count for good, count in self._counts(model) if good)

    def failed(self, model: Model) -> int:
        """Return how many requests of a model got an error, by its own count."""
        return sum(count for good, count in self._counts(model) if not good)

    def _counts(self, model: Model) -> list[tuple[bool, int]]:
        with urllib.request.urlopen(self.metrics, timeout=10) as page:
            text = page.read().decode()
        found = []
        for name, labels, value in re.findall(r"^(\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE):
            if f'model="{model.name}"' in labels and name in self.counters:
                found.append((self.counters[name] in labels, int(float(value))))
        return found

    def cpu_s(self) -> float:
        """Return user and system time of the process tree so far, in seconds."""
        # With what ended children used: a server may replace them meanwhile.
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since: its parent has its time
                total += sum(process.cpu_times()[:4])
        return total

    def memory_bytes(self) -> int:
        """Return what the process tree would hold if nothing else ran.

        PSS would divide its libraries by whoever has them too, such as the benchmark itself: a
        third of a server that is at rest. So a page of a file counts once for the tree, and whole.
        """
        own, files = 0, dict[str, int]()
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                own += 1024 * sum(
                    map(int, re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", rollup, re.M))
                )
                for part in process.memory_maps():
                    cached = part.rss - part.anonymous
                    if part.path.startswith("/"):
                        files[part.path] = max(files.get(part.path, 0), cached)
        return own + sum(files.values())

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


@contextlib.contextmanager
def hub(*models: Model, options: Sequence[str] = ()) -> Iterator[Server]:
    """Start a hub with everything that is on by default, in a fresh data directory."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for model in models:
            version = root / "models" / model.name / "1"
            version.mkdir(parents=True)
            shutil.copyfile(model.file, version / "model.onnx")
        grpc_port, http_port = _free_ports(2)
        command = [
            script("fogline"), "serve", "--data", str(root / "hub"),
            "--models", str(root / "models"), "--grpc", f"127.0.0.1:{grpc_port}",
            "--http", f"127.0.0.1:{http_port}", "--threads", "1", *options,
        ]  # fmt: skip
        if shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") is None:
            command += ["--mqtt", "off"]
        with _running(command, os.environ, root / "log") as process:
            yield Server(
                process,
                f"127.0.0.1:{grpc_port}",
                f"http://127.0.0.1:{http_port}/metrics",
                {"fogline_hub_requests_total": 'outcome="ok"'},
                root / "log",
            )


@contextlib.contextmanager
def pytriton(model: Model) -> Iterator[Server]:
    """Start PyTriton with one model."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ports = _free_ports(3)
        command = [
            str(peers.pytriton()), str(peers.HERE / "pytriton_server.py"), model.name,
            str(model.file), *map(str, ports),
        ]  # fmt: skip
        with _running(command, peers.environment(), log) as process:
            yield Server(
                process,
                f"127.0.0.1:{ports[0]}",
                f"http://127.0.0.1:{ports[2]}/metrics",
                # Two counters instead of a label: nothing that is called a failure is an answer.
                {"nv_inference_request_success": "", "nv_inference_request_failure": "answer"},
                log,
            )


def put_first(pid: int) -> None:
    """Put the session of a process before what else the machine does, where we may.

    Linux shares the cores between sessions first (``sched_autogroup_enabled``), and only what is
    in one session goes by its processes' niceness.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, pid, -PRIORITY)
        group = Path(f"/proc/{pid}/autogroup")
        if group.exists():
            group.write_text(str(-PRIORITY), encoding="ascii")


@contextlib.contextmanager
def _running(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    # What pip installs it compiles; a checkout is compiled at its first start, and may be kept
    # from that: then it would be measured how long Python takes to read our comments.
    compiled = {k: v for k, v in environment.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=compiled, stdout=output, stderr=output, start_new_session=True
        )
    put_first(process.pid)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
