"""Live figures: one WebSocket per tab, at most one value per topic and second.

    tab -> hub   {"sub": {"overview": {"window_s": 300}}}    replaces what the tab had before
    hub -> tab   {"hello": {"build": "..."}}                 first, so that old scripts reload
                 {"topic": "overview", "value": {...}}       at once, then every second
                 {"error": "..."}                            a message made no sense

A value is computed and written as JSON once a second for all tabs that want the same, and
not at all while nobody watches. Each tab has one place per topic: a newer value replaces one
that was not sent yet, so a slow tab skips values and never makes the hub queue them.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from typing import Any, Protocol

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from cloud_hub.console import access
from cloud_hub.console.api import BadParameter, document

log = logging.getLogger("fogline.console")

PERIOD_S = 1.0
HEARTBEAT_S = 20.0
LONGEST_MESSAGE = 4096
FAREWELL_S = 0.5  # for tabs to say goodbye when the hub stops
ERROR = "error"  # the place of what is no topic's value
SIGNED_OUT = 4401  # close code: the token was revoked or the session has ended

Want = tuple[str, Hashable]  # a topic and its parameters


class Topic(Protocol):
    """Something to watch."""

    def parameters(self, given: Mapping[str, Any]) -> Hashable:
        """Return what was asked for, checked; tabs with equal parameters share values.

        Raises:
            BadParameter: the text says which and why.
        """
        ...

    async def refresh(self, parameters: Collection[Any]) -> None:
        """Bring up to date what the values of these parameters are taken from."""
        ...

    def value(self, parameters: Any) -> Any:
        """Return the value of this moment; ``refresh`` came before.

        Raises:
            BadParameter: there is nothing to watch under them, or not any more.
        """
        ...


class Tab:
    """What one open page wants and has not been sent yet. Used on one event loop."""

    def __init__(self) -> None:
        self.wants: frozenset[Want] = frozenset()
        self._unsent: dict[str, str] = {}
        self._something = asyncio.Event()

    def offer(self, topic: str, message: str) -> None:
        """Put a message in the topic's place, instead of one that was not sent yet."""
        self._unsent[topic] = message
        self._something.set()

    def want(self, wants: frozenset[Want]) -> None:
        """Replace what the tab watches."""
        self.wants = wants
        for topic in self._unsent.keys() - {topic for topic, _ in wants} - {ERROR}:
            del self._unsent[topic]

    async def take(self) -> list[str]:
        """Wait for messages and return them."""
        while not self._unsent:
            self._something.clear()
            await self._something.wait()
        messages = list(self._unsent.values())
        self._unsent.clear()
        return messages


class Live:
    """All open tabs. Owner of them and of the task that serves them; used on one event loop."""

    def __init__(
        self,
        topics: Mapping[str, Topic],
        *,
        build: str,
        admits: Callable[[web.Request], Awaitable[bool]],
        period_s: float = PERIOD_S,
    ) -> None:
        self._topics = topics
        self._build = build
        self._admits = admits
        self._period_s = period_s
        self._tabs: dict[Tab, tuple[web.WebSocketResponse, web.Request]] = {}
        self._values: dict[Want, str] = {}  # of the last publication, for tabs that come between
        self._publisher: asyncio.Task[None] | None = None
        self._farewell: asyncio.Task[None] | None = None
        self._closing = False

    def __len__(self) -> int:
        return len(self._tabs)

    @property
    def idle(self) -> bool:
        """Whether nothing is being computed."""
        return self._publisher is None or self._publisher.done()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /api/v1/live``."""
        if not access.is_same_origin(request):
            return access.problem(
                403,
                f"a page of {request.headers['Origin']} may not watch the hub at {request.host}",
            )
        if self._closing:
            return access.problem(503, "the hub is shutting down")
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S,
            max_msg_size=LONGEST_MESSAGE,
            timeout=FAREWELL_S,
            compress=False,  # what all tabs share would be compressed for each one anew
        )
        if not socket.can_prepare(request):
            return access.problem(
                426, "this address speaks WebSocket only", {"Upgrade": "websocket"}
            )
        await socket.prepare(request)
        if not await self._admits(request):
            await socket.close(code=SIGNED_OUT, message=b"sign in first")
            return socket
        tab = Tab()
        self._tabs[tab] = (socket, request)
        sender = asyncio.create_task(self._send(tab, socket, request), name="console-tab")
        try:
            await socket.send_json({"hello": {"build": self._build}})
            async for message in socket:
                await self._receive(tab, message)
        except ConnectionError:
            pass  # the tab is gone
        finally:
            del self._tabs[tab]
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender
        return socket

    def publish(self) -> None:
        """Compute what is watched, once each, and offer it to those who watch."""
        wanted = {want for tab in self._tabs for want in tab.wants}
        self._values = {}
        gone: dict[Want, str] = {}
        for want in wanted:
            try:
                self._values[want] = self._message(want)
            except BadParameter as error:
                gone[want] = _error(error)
        for tab in self._tabs:
            for want in tab.wants - gone.keys():
                tab.offer(want[0], self._values[want])
            for want in tab.wants & gone.keys():
                tab.offer(ERROR, gone[want])
            tab.want(tab.wants - gone.keys())

    async def close(self, _app: web.Application | None = None) -> None:
        """Close every tab, at once: nothing of a tab is worth waiting for."""
        self._closing = True
        if self._publisher is not None:
            self._publisher.cancel()
        await self._close_all(WSCloseCode.GOING_AWAY, b"the hub is stopping")

    async def _receive(self, tab: Tab, message: WSMessage) -> None:
        try:
            wants = self._wants(message)
            await self._refresh(wants)
            for want in wants - self._values.keys():
                self._values[want] = self._message(want)
        except BadParameter as error:
            tab.offer(ERROR, _error(error))
            return
        tab.want(wants)
        for want in tab.wants:
            tab.offer(want[0], self._values[want])
        if tab.wants and self.idle:
            self._publisher = asyncio.create_task(self._publish_while_watched(), name="console")
            self._publisher.add_done_callback(self._publisher_ended)

    def _wants(self, message: WSMessage) -> frozenset[Want]:
        if message.type is not WSMsgType.TEXT:
            raise BadParameter("send text, not bytes")
        try:
            given = json.loads(message.data)
        except (ValueError, RecursionError) as error:
            raise BadParameter(f"the message is not JSON: {error}") from None
        subscriptions = given.get("sub") if isinstance(given, dict) else None
        if not isinstance(subscriptions, dict):
            raise BadParameter('expected {"sub": {"TOPIC": {PARAMETERS}}}')
        wants = set()
        for name, parameters in subscriptions.items():
            topic = self._topics.get(name)
            if topic is None:
                known = ", ".join(sorted(self._topics))
                raise BadParameter(f"there is no topic {name[:40]!r}, there is {known}")
            if not isinstance(parameters, dict):
                raise BadParameter(f"the parameters of {name} must be an object")
            wants.add((name, topic.parameters(parameters)))
        return frozenset(wants)

    async def _refresh(self, wants: Collection[Want]) -> None:
        for topic in sorted({topic for topic, _ in wants}):
            await self._topics[topic].refresh([given for name, given in wants if name == topic])

    def _message(self, want: Want) -> str:
        topic, parameters = want
        value = document(self._topics[topic].value(parameters))
        return json.dumps(
            {"topic": topic, "value": value}, ensure_ascii=False, separators=(",", ":")
        )

    async def _publish_while_watched(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._period_s
        while any(tab.wants for tab in self._tabs):
            await asyncio.sleep(due - loop.time())
            await self._refresh({want for tab in self._tabs for want in tab.wants})
            self.publish()
            due = max(due, loop.time()) + self._period_s
        self._values.clear()  # too old for whoever comes next

    def _publisher_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our bug. Tabs are told by the close of their sockets and try again by themselves.
            log.error("live figures failed", exc_info=error)
            self._farewell = asyncio.create_task(
                self._close_all(WSCloseCode.INTERNAL_ERROR, b"see the hub's log")
            )

    async def _send(self, tab: Tab, socket: web.WebSocketResponse, request: web.Request) -> None:
        try:
            while True:
                messages = await tab.take()
                if not await self._admits(request):
                    await socket.close(code=SIGNED_OUT, message=b"sign in again")
                    return
                for message in messages:
                    await socket.send_str(message)
        except ConnectionError:
            pass  # the tab is gone; its reader ends too

    async def _close_all(self, code: int, reason: bytes) -> None:
        async def farewell(socket: web.WebSocketResponse, request: web.Request) -> None:
            try:
                async with asyncio.timeout(FAREWELL_S):
                    await socket.close(code=code, message=reason)
            except TimeoutError:  # a tab that does not even read
                if request.transport is not None:
                    request.transport.abort()

        await asyncio.gather(*(farewell(*tab) for tab in self._tabs.values()))


def _error(error: BadParameter) -> str:
    return json.dumps({"error": str(error)})
