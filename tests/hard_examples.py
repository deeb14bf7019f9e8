"""Runs a hub and a device that asks about hard digits, and exports what the hub kept of them.

    python -m tests.hard_examples models/digits/examples.npz

It is how the digits family got the examples that its release 1.0.1 learns from: real processes,
the release of the time on the device, an application that consents, and nobody who labels.
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np

from deploy.demo.__main__ import EDGE_BUNDLE, HUB_BUNDLE, certified_bundle
from deploy.demo.fleet import Process, script
from digits import data as digits
from fogline_protocol.client import Client
from fogline_protocol.inference import InferRequest
from fogline_protocol.tensors import Array

DEVICE, SOURCE = "scanner", "hard-writers"
ROWS = 16  # of a request
LIMIT_S = 60.0


async def collect(out: Path, root: Path) -> int:
    """Write the examples to ``out`` and return how many there are; processes live in ``root``."""
    images = digits.make_hard()["hard"].inputs["image"]
    repository = root / "models" / "digits-hub" / "1"
    repository.mkdir(parents=True)
    shutil.copyfile(HUB_BUNDLE / "variants" / "fp32.onnx", repository / "model.onnx")
    bundle, _ = certified_bundle(root / "certified", EDGE_BUNDLE)
    hub = Process("hub", (
        script("fogline"), "serve", "--data", str(root / "hub"), "--grpc", "127.0.0.1:0",
        "--http", "127.0.0.1:0", "--mqtt", "off", "--models", str(root / "models"),
        "--examples-quota-bytes", "100000000",
    ), root / "hub", ("grpc", "http"))  # fmt: skip
    async with AsyncExitStack() as stack:
        stack.push_async_callback(hub.stop)
        await hub.start()
        device = Process(DEVICE, (
            script("fogline-agent"), "run", "--device", DEVICE, "--data", str(root / DEVICE),
            "--hub", hub.endpoints["grpc"], "--bundle", str(bundle), "--grpc", "127.0.0.1:0",
            "--http", "127.0.0.1:0", "--keep", "digits",
        ), root / DEVICE, ("grpc", "http"))  # fmt: skip
        stack.push_async_callback(device.stop)
        await device.start()
        client = Client(device.endpoints["grpc"])
        stack.push_async_callback(client.close)
        # The first escalation teaches the device that this hub keeps examples.
        await _ask(client, np.zeros((1, 1, digits.SIDE, digits.SIDE), np.float32), "prefer_hub")
        for start in range(0, len(images), ROWS):
            await _ask(client, images[start : start + ROWS], "prefer_edge")
        return await _exported(hub.data, out)


async def _ask(client: Client, rows: Array, mode: str) -> None:
    await client.infer(
        InferRequest(
            "digits", {"image": rows}, parameters={"fogline.mode": mode, "fogline.source": SOURCE}
        ),
        30.0,
    )


async def _exported(hub: Path, out: Path) -> int:
    """Export until two exports are the same: the hub writes behind its answers."""
    command = [script("fogline"), "data", "export", "digits", "--out", str(out), "--data", str(hub)]
    before = b""
    async with asyncio.timeout(LIMIT_S):
        while True:
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            found = await asyncio.to_thread(out.read_bytes) if done.returncode == 0 else b""
            if found and found == before:
                with np.load(out) as file:
                    return len(file["label"])
            before = found
            await asyncio.sleep(0.5)


def main() -> None:
    """Collect into the file that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, help="the npz to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        count = asyncio.run(collect(options.out, Path(root)))
    print(
        f"{options.out}: {count} examples, {os.path.getsize(options.out):,} bytes", file=sys.stderr
    )


if __name__ == "__main__":
    main()
