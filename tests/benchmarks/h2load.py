"""The load generator: h2load sends one prebuilt gRPC request over and over.

It costs a fraction of what a gRPC client in Python would take from the servers' cores. It looks
at the HTTP status only, which is 200 for an error of gRPC too; so every load is a fixed number
of requests, and the server's own count of answers must grow by exactly that number.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_protocol.grpc_service import SERVICE
from tests.benchmarks.servers import Model, Server

PACKAGE = "nghttp2-client"
COUNT_LIMIT_S = 5.0  # for a server's counters to catch up with its answers


@dataclass(frozen=True, slots=True)
class Load:
    """What one load was like."""

    requests: int
    per_second: float
    cpu_s: float  # of the server, per request
    p50_s: float
    p99_s: float
    lost: int  # requests without an answer


def require() -> None:
    """Install h2load when we may, say what to install when we may not."""
    if shutil.which("h2load"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"h2load is missing: install it first, e.g. sudo apt-get install {PACKAGE}")
    print(f"installing Debian's {PACKAGE}", file=sys.stderr, flush=True)
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", PACKAGE]
    for command in (install, ["apt-get", "update", "-q"], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if shutil.which("h2load"):
            return
    sys.exit(f"apt-get could not install {PACKAGE}:\n{done.stdout}{done.stderr}")


def estimate(server: Server, model: Model, *, connections: int, streams: int) -> float:
    """Return about how many requests per second come through, from a short load."""
    found = run(
        server, model, requests=connections * streams * 10, connections=connections, streams=streams
    )
    return found.per_second


def run(
    server: Server,
    model: Model,
    *,
    requests: int,
    connections: int,
    streams: int,
    steady: float | None = None,
    lossless: bool = True,
) -> Load:
    """Send ``requests`` requests, ``streams`` at a time on each of ``connections`` connections.

    Args:
        server: is asked.
        model: what for.
        requests: how many in all.
        connections: side by side.
        streams: on each of them.
        steady: requests per second over all connections; None: as fast as answers come.
        lossless: end the benchmark if a request got no answer; False: the caller looks at ``lost``.
    """
    data = model.request()
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body.grpc", Path(folder) / "log"
        # Not compressed, and the length: gRPC over HTTP/2, "Length-Prefixed-Message".
        body.write_bytes(b"\0" + len(data).to_bytes(4, "big") + data)
        rate = [] if steady is None else [f"--rps={steady / connections:g}"]
        command = [
            "h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-n{requests}", *rate,
            "-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers",
            f"--log-file={log}", f"http://{server.grpc}/{SERVICE}/ModelInfer",
        ]  # fmt: skip
        answered, cpu_s = server.answered(model), server.cpu_s()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        cpu_s = server.cpu_s() - cpu_s
        found = re.search(r"finished in [^,]*, ([\d.]+) req/s", done.stdout)
        if done.returncode or found is None:
            sys.exit(f"h2load failed:\n{done.stdout}{done.stderr}")
        # Start, HTTP status, microseconds until the end of the answer.
        taken_s = np.loadtxt(log, usecols=2, ndmin=1) / 1e6
    lost = answered + requests - _settled(server, model, answered + requests)
    if lost and lossless:
        sys.exit(
            f"{server.process.args!r} counts {requests - lost} answers of {model.name} where "
            f"{requests} were asked for"
        )
    return Load(
        requests,
        float(found[1]),
        cpu_s / requests,
        float(np.percentile(taken_s, 50)),
        float(np.percentile(taken_s, 99)),
        lost,
    )


def _settled(server: Server, model: Model, expected: int) -> int:
    """Return the server's count of answers once it is as expected, or does not get there."""
    limit = time.monotonic() + COUNT_LIMIT_S
    while (found := server.answered(model)) < expected and time.monotonic() < limit:
        time.sleep(0.02)
    return found
