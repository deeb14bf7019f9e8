"""Applications beside the agents: each calls its own kind of door and keeps every answer.

The kiosk's application speaks gRPC over TCP, the camera's gRPC over a Unix socket, the
scanner's REST. What an answer was is taken from the answer itself; nothing is assumed.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol, Self

import aiohttp
import numpy as np

from deploy.demo.fleet import Process
from fogline_protocol.client import Client
from fogline_protocol.errors import InferenceError
from fogline_protocol.inference import InferRequest
from fogline_protocol.tensors import Array

MODEL = "digits"
DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request, or one that failed, with its error's text."""

    item: int  # index into the traffic
    mode: str
    label: int
    tier: str
    quality: str
    reason: str
    release: str
    seconds: float
    at: float  # monotonic, when the answer came
    error: str = ""


class Application(Protocol):
    """Asks one agent about one digit."""

    async def ask(self, image: Array, mode: str) -> tuple[Array, dict[str, str]]:
        """Return the logits and the ``fogline.*`` parameters; raise on any failure."""
        ...


class GrpcApplication:
    """Through Open Inference gRPC, over TCP or a Unix socket."""

    def __init__(self, target: str) -> None:
        self._client = Client(target)

    async def ask(self, image: Array, mode: str) -> tuple[Array, dict[str, str]]:
        """Ask for one digit."""
        request = InferRequest(MODEL, {"image": image}, parameters={"fogline.mode": mode})
        response = await self._client.infer(request, DEADLINE_S)
        return response.outputs["logits"], {k: str(v) for k, v in response.parameters.items()}

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


class RestApplication:
    """Through Open Inference REST."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session = session
        self._url = f"http://{address}/v2/models/{MODEL}/infer"

    async def ask(self, image: Array, mode: str) -> tuple[Array, dict[str, str]]:
        """Ask for one digit."""
        body = {
            "parameters": {"fogline.mode": mode, "timeout": int(DEADLINE_S * 1e6)},
            "inputs": [
                {
                    "name": "image",
                    "datatype": "FP32",
                    "shape": list(image.shape),
                    "data": image.ravel().tolist(),
                }
            ],
        }
        async with self._session.post(self._url, json=body) as answer:
            document = await answer.json()
            if answer.status != 200:
                raise InferenceError(document["error"])
        logits = np.array(document["outputs"][0]["data"], np.float32)
        return logits, {k: str(v) for k, v in document["parameters"].items()}


async def applications(agents: Sequence[Process], stack: AsyncExitStack) -> list[Application]:
    """Return one application per agent, each at another kind of door."""
    kiosk, camera, scanner = agents
    session = await stack.enter_async_context(aiohttp.ClientSession())
    tcp = GrpcApplication(kiosk.endpoints["grpc"])
    unix = GrpcApplication(f"unix:{camera.endpoints['unix'].removeprefix('unix:')}")
    for application in (tcp, unix):
        stack.push_async_callback(application.close)
    return [tcp, unix, RestApplication(session, scanner.endpoints["http"])]


async def stream(
    apps: Sequence[Application], images: Array, items: Iterable[int], mode: str, callers: int
) -> AsyncIterator[Answer]:
    """Ask about every item once, ``callers`` at a time per agent, and yield answers as they come."""
    queue = iter(items)
    answers: asyncio.Queue[Answer | None] = asyncio.Queue()

    async def call(app: Application) -> None:
        for item in queue:
            answers.put_nowait(await ask(app, images, item, mode))
        answers.put_nowait(None)

    tasks = [asyncio.create_task(call(app)) for app in apps for _ in range(callers)]
    left = len(tasks)
    try:
        while left:
            answer = await answers.get()
            if answer is None:
                left -= 1
            else:
                yield answer
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Stream:
    """Steady traffic at every agent in turn, from ``async with`` until its end.

    ``answers`` grows while it runs; leaving waits for the answers that are still due.
    """

    def __init__(self, apps: Sequence[Application], images: Array, per_second: float) -> None:
        self.answers: list[Answer] = []
        self._apps = apps
        self._images = images
        self._per_second = per_second
        self._asking: set[asyncio.Task[None]] = set()
        self._pace: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start asking."""
        self._pace = asyncio.create_task(self._keep_asking())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ask no more and wait for what was asked."""
        assert self._pace is not None
        self._pace.cancel()
        await asyncio.gather(self._pace, return_exceptions=True)
        await asyncio.gather(*self._asking)

    @property
    def failed(self) -> int:
        """Requests that got no answer so far."""
        return sum(bool(answer.error) for answer in self.answers)

    async def _keep_asking(self) -> None:
        started = time.monotonic()
        for number, app in enumerate(itertools.cycle(self._apps)):
            await asyncio.sleep(max(0.0, started + number / self._per_second - time.monotonic()))
            task = asyncio.create_task(self._ask(app, number % len(self._images)))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, app: Application, item: int) -> None:
        self.answers.append(await ask(app, self._images, item, "prefer_edge"))


async def ask(app: Application, images: Array, item: int, mode: str) -> Answer:
    """Ask about one item; a failure becomes an answer with an error, so that it is counted."""
    started = time.monotonic()
    try:
        logits, said = await app.ask(images[item : item + 1], mode)
    except (InferenceError, aiohttp.ClientError, KeyError) as error:
        now = time.monotonic()
        return Answer(item, mode, -1, "", "", "", "", now - started, now, error=str(error) or "?")
    now = time.monotonic()
    return Answer(
        item=item,
        mode=mode,
        label=int(np.argmax(logits)),
        tier=said["fogline.tier"],
        quality=said["fogline.quality"],
        reason=said["fogline.reason"],
        release=said.get("fogline.release", ""),
        seconds=now - started,
        at=now,
    )
