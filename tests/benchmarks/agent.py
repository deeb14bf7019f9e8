"""The agent in process against a raw session run: what fogline adds to one local answer."""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import onnxruntime

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig
from fogline_protocol.inference import InferRequest

BUNDLE = Path("models/digits/bundles/digits-1.0.0")
RUNS = 5000


def main() -> None:
    """Measure and print."""
    asyncio.run(_measure())


async def _measure() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        BUNDLE / "variants" / "int8-qdq.onnx", options, providers=["CPUExecutionProvider"]
    )
    feed = {"image": np.random.default_rng(0).random((1, 1, 8, 8), np.float32)}
    request = InferRequest("digits", feed, parameters={"fogline.mode": "edge_only"})

    async def raw() -> None:
        session.run(None, feed)

    with tempfile.TemporaryDirectory() as folder:
        config = AgentConfig(
            data=Path(folder), bundle=(BUNDLE,), grpc="127.0.0.1:0", http="127.0.0.1:0", threads=1
        )
        async with Agent(config) as agent:

            async def through_agent() -> None:
                await agent.infer(request)

            # Interleaved, so that a busy neighbor weighs on both alike.
            taken: dict[str, list[float]] = {"raw": [], "agent": []}
            for _ in range(10):
                taken["raw"] += await _timed(raw)
                taken["agent"] += await _timed(through_agent)
    print("agent in process against a raw session run: digits int8-qdq, one row, one thread")
    p50 = {name: float(np.percentile(times, 50)) * 1e6 for name, times in taken.items()}
    p99 = {name: float(np.percentile(times, 99)) * 1e6 for name, times in taken.items()}
    for name in taken:
        print(f"  {name:<6} p50 {p50[name]:6.1f} us   p99 {p99[name]:6.1f} us")
    print(f"  added at p50: {p50['agent'] - p50['raw']:.1f} us (budget 25)")


async def _timed(call: Callable[[], Awaitable[None]]) -> list[float]:
    times = []
    for _ in range(RUNS // 10):
        started = time.perf_counter()
        await call()
        times.append(time.perf_counter() - started)
    return times
