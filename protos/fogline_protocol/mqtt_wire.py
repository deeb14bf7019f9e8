"""One MQTT 5 connection: the only file that knows paho-mqtt.

What paho-mqtt 2.2 does badly decides the shape:

* Its reconnect forgets every limit, waits without jitter and repeats messages under new ids.
  So a paho client lives for one connection, from CONNECT to its end, and is thrown away.
* An exception in a callback kills its network thread, and ``is_connected()`` stays true. So
  callbacks only post to the event loop and catch everything, and the thread is remembered:
  ``mqtt.py`` asks whether it lives and when the broker was last heard.
* It acknowledges before the application has done anything. So acknowledgements are manual.

``mqtt.py`` decides when to connect, what to send and what to send again. Users of the
adapter import from there.
"""

import asyncio
import contextlib
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

T = TypeVar("T")

# Documents are a few kilobytes; model bytes never travel by MQTT.
MAX_PACKET_BYTES = 64 << 10
JSON = "application/json"
PROTOBUF = "application/x-protobuf"


class MqttError(Exception):
    """Something between us and the broker went wrong."""


class BadAddress(ValueError):
    """The configured broker's address cannot be one. Correct it."""


class ConnectionFailed(MqttError):
    """An attempt to connect came to nothing. The next one is already being waited for."""


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> "BrokerAddress":
        """Return the address that ``mqtt://host[:port]`` or ``mqtts://host[:port]`` names.

        Raises:
            BadAddress: another scheme, no host, a port out of range, or anything after it.
        """
        example = "expected mqtt://HOST:PORT or, with TLS, mqtts://HOST:PORT"
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
        except ValueError as error:  # UnicodeError is one
            raise BadAddress(f"broker address {url!r}: {error}; {example}") from None
        if parts.scheme not in ("mqtt", "mqtts") or not host:
            raise BadAddress(f"broker address {url!r}: {example}")
        if parts.username is not None or parts.password is not None:
            # The address is logged and shown; and it is not repeated in this sentence either.
            raise BadAddress(
                f"the address of the broker at {host} holds a user name or password: "
                "put them into the configuration's own fields"
            )
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise BadAddress(f"broker address {url!r}: nothing may follow the port; {example}")
        if port == 0:
            raise BadAddress(f"broker address {url!r}: port 0 is none; {example}")
        tls = parts.scheme == "mqtts"
        return cls(host, port or (8883 if tls else 1883), tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Tls:
    """Whom to trust, and who we are. Files are read at every connection: renewals take effect."""

    ca_file: Path | None = None  # None: the system's authorities
    certificate_file: Path | None = None
    key_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return a context that verifies the broker.

        Raises:
            OSError: a file is missing, unreadable, or not what it should be.
        """
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.certificate_file is not None:
            context.load_cert_chain(self.certificate_file, self.key_file)
        return context


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message as it is to be published."""

    topic: str
    payload: bytes
    retain: bool = False
    expiry_s: int | None = None  # the broker forgets it after this long; None: never
    content_type: str = ""
    user_properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes when we vanish without a word, ``delay_s`` after it noticed."""

    message: Outgoing
    delay_s: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it arrived. ``ack`` it when what it says is safe."""

    topic: str
    payload: bytes
    qos: int
    retained: bool  # it lay on the broker when we subscribed
    content_type: str
    user_properties: Mapping[str, str]
    connection: int  # the number of the connection that brought it
    packet: int  # the broker's id of it within that connection


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection stands and its subscriptions are granted."""

    number: int  # grows with every attempt of this client
    session_resumed: bool  # False: the broker remembers nothing of us


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttOptions:
    """How to reach a broker, and how far to trust the way there."""

    address: BrokerAddress
    client_id: str
    clean_start: bool
    session_expiry_s: int  # how long the broker keeps our subscriptions while we are away
    subscriptions: tuple[str, ...] = ()  # made anew, at QoS 1, at every connection
    will: Callable[[int], Will] | None = None  # for the connection of that number
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls = Tls()  # only with mqtts://
    keepalive_s: int = 60
    receive_maximum: int = 500  # unacknowledged messages the broker may have with us
    max_outstanding: int = 100  # unacknowledged messages we may have with the broker
    spool_limit: int = 1000  # messages that wait here for their turn or for a connection
    connect_timeout_s: float = 10.0
    # Longer than any healthy broker takes; paho itself would wait for ever.
    acknowledge_within_s: float = 60.0
    watchdog_s: float = 1.0
    max_wait_s: float = 300.0  # between attempts


@dataclass(frozen=True, slots=True)
class Answer:
    """What the broker said to a message."""

    code: int
    reason: str
    refused: bool


def packet_bytes(message: Outgoing) -> int:
    """Return how large the packet may be that carries ``message``."""
    properties: bytes = _message_properties(PacketTypes.PUBLISH, message).pack()
    # One byte of type, up to four of length, two each for the topic's length and the packet id.
    return 9 + len(message.topic.encode()) + len(properties) + len(message.payload)


class Wire:
    """One connection: one paho client from CONNECT to its end, never used again.

    The futures belong to the event loop; paho's callbacks reach them through ``_post`` only.
    """

    def __init__(
        self,
        options: MqttOptions,
        number: int,
        on_message: Callable[[Message], None],
        on_published: Callable[["Wire", int, Answer], None],
    ) -> None:
        self.number = number
        self.max_outstanding = options.max_outstanding
        self.keepalive_s: float = options.keepalive_s
        self.heard_at = time.monotonic()
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_published = on_published
        self._thread: threading.Thread | None = None
        # Under the lock: exactly one side closes a socket that nobody waits for any more.
        self._handover = threading.Lock()
        self._dial_ended = False
        self._dial_abandoned = False
        self._accepted: asyncio.Future[bool] = self._loop.create_future()
        self._granted: asyncio.Future[Sequence[ReasonCode]] = self._loop.create_future()
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=options.client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._client.max_inflight_messages_set(0)  # none of paho's: ours holds at reconnects too
        self._client.on_connect = self._guarded(self._connect_answered)
        self._client.on_subscribe = self._guarded(self._subscribe_answered)
        self._client.on_publish = self._guarded(self._publish_answered)
        self._client.on_message = self._guarded(self._message_arrived)
        self._client.on_disconnect = self._guarded(self._disconnected)
        self._client.on_log = self._guarded(self._logged)
        if options.username is not None:
            self._client.username_pw_set(options.username, options.password)
        if options.will is not None:
            will = options.will(number)
            self._client.will_set(
                will.message.topic,
                will.message.payload,
                qos=1,
                retain=will.message.retain,
                properties=_message_properties(
                    PacketTypes.WILLMESSAGE, will.message, WillDelayInterval=will.delay_s
                ),
            )

    @property
    def thread_alive(self) -> bool:
        """Whether paho's network thread runs."""
        return self._thread is not None and self._thread.is_alive()

    async def open(self) -> Connected:
        """Connect, subscribe, and return what the broker said.

        Raises:
            OSError: nobody listens there, or not with the certificates we trust.
            ConnectionFailed: the broker refused us or a subscription.
            TimeoutError: it did not answer within ``connect_timeout_s``.
        """
        async with asyncio.timeout(self._options.connect_timeout_s):
            if self._options.address.tls:
                self._client.tls_set_context(self._options.tls.context())
            await self._dial()
            self._client.loop_start()
            resumed = await self._unless_closed(self._accepted)
            if self._options.subscriptions:
                await self._subscribe()
        return Connected(self.number, resumed)

    async def _dial(self) -> None:
        """Open the socket and send CONNECT, in a thread of its own.

        Not in the executor: a name server that does not answer would hold up our exit.
        """
        dialed: asyncio.Future[Exception | None] = self._loop.create_future()

        name = f"mqtt-dial-{self._options.client_id}"
        dialer = threading.Thread(
            target=self._dial_here, args=(self._client, dialed), name=name, daemon=True
        )
        dialer.start()
        try:
            error = await dialed
        except asyncio.CancelledError:
            with self._handover:
                self._dial_abandoned = True
                unwanted = self._dial_ended
            if unwanted:
                self._client.disconnect()
            raise
        if error is not None:
            raise error

    async def _subscribe(self) -> None:
        asked = [(topic, SubscribeOptions(qos=1)) for topic in self._options.subscriptions]
        self._client.subscribe(asked)
        codes = await self._unless_closed(self._granted)
        if len(codes) != len(asked):
            raise ConnectionFailed(f"the broker answered {len(codes)} of {len(asked)} requests")
        refused = [
            f"{topic} ({code})"
            for topic, code in zip(self._options.subscriptions, codes, strict=True)
            if code.is_failure
        ]
        if refused:
            raise ConnectionFailed(f"the broker refused to subscribe us to {', '.join(refused)}")

    async def _unless_closed(self, answer: asyncio.Future[T]) -> T:
        waited: set[asyncio.Future[Any]] = {answer, self.closed}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ConnectionFailed(self.closed.result())

    def publish(self, message: Outgoing, qos: int) -> int | None:
        """Hand a message to the network thread; return its packet id, or None if it took none."""
        properties = _message_properties(PacketTypes.PUBLISH, message)
        info = self._client.publish(message.topic, message.payload, qos, message.retain, properties)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def ack(self, message: Message) -> None:
        """Tell the broker that it may forget a message."""
        self._client.ack(message.packet, message.qos)

    def hang_up(self) -> None:
        """End the connection politely: the broker keeps its will to itself."""
        self._client.disconnect()

    def cut(self) -> None:
        """End the connection at once, whatever state its thread is in. The last call of all."""
        self._client.disconnect()
        connection: Any = self._client.socket()
        if connection is not None:
            # Wakes a thread that waits for the socket; one that hangs elsewhere is abandoned.
            with contextlib.suppress(OSError):
                connection.shutdown(2)

        # paho's client holds our callbacks; without this the two would keep each other, and the
        # client's file descriptors, until the garbage collector comes by.
        del self._client

    # The rest runs in other threads.

    def _dial_here(self, client: paho.Client, dialed: asyncio.Future[Exception | None]) -> None:
        error: Exception | None = None
        try:
            client.connect(
                self._options.address.host,
                self._options.address.port,
                keepalive=self._options.keepalive_s,
                clean_start=self._options.clean_start,
                properties=_properties(
                    PacketTypes.CONNECT,
                    SessionExpiryInterval=self._options.session_expiry_s,
                    ReceiveMaximum=self._options.receive_maximum,
                    MaximumPacketSize=MAX_PACKET_BYTES,
                ),
            )
        except Exception as caught:  # judged by whoever waits in ``_dial``
            # Without its frames: they would keep the failed socket open until they are collected.
            error = caught.with_traceback(None)
        with self._handover:
            self._dial_ended = True
            unwanted = self._dial_abandoned
        if unwanted:
            client.disconnect()
        else:
            self._post(settle, dialed, error)

    def _post(self, callback: Callable[..., object], *args: object) -> None:
        # RuntimeError: the event loop has been closed, and nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except Exception as error:  # whatever escapes from here kills the network thread
                self._post(settle, self.closed, f"our callback failed: {error!r}")

        return guarded

    def _connect_answered(
        self, _client: object, _data: object, flags: Any, reason: ReasonCode, properties: Properties
    ) -> None:
        self._thread = threading.current_thread()
        if reason.is_failure:
            refusal = f"the broker refused the connection: {reason} (reason code {reason.value})"
            self._post(settle, self.closed, refusal)
            return
        self.keepalive_s = getattr(properties, "ServerKeepAlive", self.keepalive_s)
        theirs = getattr(properties, "ReceiveMaximum", self.max_outstanding)
        self.max_outstanding = min(self.max_outstanding, theirs)
        self._post(settle, self._accepted, bool(flags.session_present))

    def _subscribe_answered(
        self, _client: object, _data: object, _packet: int, codes: Sequence[ReasonCode], _p: object
    ) -> None:
        self._post(settle, self._granted, codes)

    def _publish_answered(
        self, _client: object, _data: object, packet: int, reason: ReasonCode, _p: object
    ) -> None:
        answer = Answer(reason.value, str(reason), reason.is_failure)
        self._post(self._on_published, self, packet, answer)

    def _message_arrived(self, _client: object, _data: object, arrived: paho.MQTTMessage) -> None:
        properties = arrived.properties
        message = Message(
            topic=arrived.topic,
            payload=bytes(arrived.payload),
            qos=arrived.qos,
            retained=arrived.retain,
            content_type=getattr(properties, "ContentType", ""),
            user_properties=dict(getattr(properties, "UserProperty", ())),
            connection=self.number,
            packet=arrived.mid,
        )
        self._post(self._on_message, message)

    def _disconnected(
        self, _client: object, _data: object, _flags: object, reason: ReasonCode, _p: object
    ) -> None:
        self._post(settle, self.closed, f"the connection ended: {reason}")

    def _logged(self, _client: object, _data: object, _level: object, text: str) -> None:
        # The only public trace of a PINGRESP; any other packet proves the same.
        if text.startswith("Received"):
            self.heard_at = time.monotonic()


def settle(future: asyncio.Future[T], result: T) -> None:
    """Resolve ``future`` unless that has happened already, or its caller has left."""
    if not future.done():
        future.set_result(result)


def _properties(packet_type: int, **values: object) -> Any:
    # Without types in paho itself: its attributes are made by name at run time.
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _message_properties(packet_type: int, message: Outgoing, **more: object) -> Any:
    if message.expiry_s is not None:
        more["MessageExpiryInterval"] = message.expiry_s
    if message.content_type:
        more["ContentType"] = message.content_type
    if message.user_properties:
        more["UserProperty"] = list(message.user_properties)
    return _properties(packet_type, **more)
