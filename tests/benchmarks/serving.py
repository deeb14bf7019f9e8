"""The hub over gRPC against the raw ONNX Runtime session, same model, same batch, same threads.

The load generator shares the machine's cores with the hub, so next to throughput stands the
fair figure: the hub process's CPU time per row over the raw session's CPU time per row.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from fogline_protocol.client import Client
from fogline_protocol.inference import InferRequest

MODEL = Path("models/digits/bundles/digits-hub-1.0.0/variants/fp32.onnx")
SECONDS = 3.0


def main() -> None:
    """Measure and print."""
    print("hub against the raw session: digits-hub fp32, one engine thread")
    print(f"{'rows/request':>12} {'callers':>8} {'raw rows/s':>11} {'hub rows/s':>11} "
          f"{'throughput':>11} {'hub CPU / raw CPU':>18}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        target = root / "models" / "digits-hub" / "1"
        target.mkdir(parents=True)
        shutil.copyfile(MODEL, target / "model.onnx")
        hub = subprocess.Popen(
            [
                Path(sys.executable).with_name("fogline"), "serve", "--data", root / "hub",
                "--models", root / "models", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
                "--threads", "1", "--mqtt", "off",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            address = _address(root / "hub" / "endpoints.json")
            for rows, callers in ((1, 1), (1, 64), (8, 16), (64, 16)):
                raw_rate, raw_cpu = _raw(rows)
                hub_rate, hub_cpu = asyncio.run(_through_hub(address, hub.pid, rows, callers))
                print(f"{rows:>12} {callers:>8} {raw_rate:>11,.0f} {hub_rate:>11,.0f} "
                      f"{hub_rate / raw_rate:>10.2f}x {hub_cpu / raw_cpu:>17.2f}x")  # fmt: skip
        finally:
            hub.terminate()
            hub.wait()


def _raw(rows: int) -> tuple[float, float]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    feed = {"image": np.random.default_rng(0).random((rows, 1, 8, 8), np.float32)}
    session.run(None, feed)
    runs = 0
    cpu = time.process_time()
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS / 2:
        session.run(None, feed)
        runs += 1
    took = time.perf_counter() - started
    return runs * rows / took, (time.process_time() - cpu) / (runs * rows)


async def _through_hub(address: str, pid: int, rows: int, callers: int) -> tuple[float, float]:
    client = Client(address)
    image = np.random.default_rng(0).random((rows, 1, 8, 8), np.float32)
    request = InferRequest("digits-hub", {"image": image})
    await client.infer(request)
    process = psutil.Process(pid)
    done = 0
    end = time.perf_counter() + SECONDS

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await client.infer(request)
            done += 1

    before = process.cpu_times()
    started = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    took = time.perf_counter() - started
    after = process.cpu_times()
    await client.close()
    cpu = after.user + after.system - before.user - before.system
    return done * rows / took, cpu / (done * rows)


def _address(endpoints: Path) -> str:
    limit = time.monotonic() + 30
    while not endpoints.exists():
        if time.monotonic() > limit:
            sys.exit("the hub did not start")
        time.sleep(0.02)
    return str(json.loads(endpoints.read_text())["grpc"])
