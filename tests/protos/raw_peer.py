"""A gRPC door with a few methods, and a peer of it that sends what it likes."""

import asyncio
import contextlib
import contextvars
import datetime
import ipaddress
import ssl

import hpack
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fogline_protocol import header_blocks, http2_frames
from fogline_protocol.errors import BadRequest
from fogline_protocol.grpc_door import GrpcDoor
from fogline_protocol.http2_frames import Kind, frame

LIMIT = 1 << 20
WHO = contextvars.ContextVar("WHO", default="nobody")


class Methods(dict):
    """What the door serves; ``gate`` holds ``/t/Wait`` and notes who was given up."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.waiting = self.given_up = 0
        self.asked = []
        super().__init__(
            {
                "/t/Echo": self.echo, "/t/Wait": self.wait, "/t/Large": self.large,
                "/t/Told": self.told, "/t/Stream": self.streamed,
            }
        )  # fmt: skip

    async def echo(self, data, context):
        return data

    async def streamed(self, data, context):
        self.asked.append(data)
        if data == b"bad":
            raise BadRequest("bad")
        return data * 100_000 if data.startswith(b"large") else data

    async def wait(self, data, context):
        self.waiting += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        finally:
            self.waiting -= 1
        return data

    async def large(self, data, context):
        return b"x" * int(data)

    async def told(self, data, context):
        left = context.time_remaining()
        metadata = [pair for pair in context.invocation_metadata() if pair[0] != "user-agent"]
        return repr((metadata, left and round(left), WHO.get())).encode()


@contextlib.asynccontextmanager
async def opened(methods, admit=None, *, memory=None, max_connections=None, **options):
    door = GrpcDoor(
        methods,
        streams={"/t/Stream"},
        max_message_bytes=LIMIT,
        admit=admit,
        memory=memory,
        max_connections=max_connections,
    )
    port = await door.listen("127.0.0.1", 0, **options)
    door.address = f"127.0.0.1:{port}"
    try:
        yield door
    finally:
        await door.stop(None)


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def message(data, flag=0):
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


class Raw:
    """A peer that sends what it likes and reads frames."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.decoder = hpack.Decoder()

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, door, **options):
        async with cls.at(door.address, **options) as raw:
            yield raw

    @classmethod
    @contextlib.asynccontextmanager
    async def at(cls, address, *, begin=True, settings=b"", **security):
        reader, writer = await asyncio.open_connection(*address.split(":"), **security)
        raw = cls(reader, writer)
        if begin:
            raw.send(http2_frames.PREFACE + frame(Kind.SETTINGS, 0, 0, settings))
        try:
            yield raw
        finally:
            writer.close()

    def send(self, data):
        self.writer.write(data)

    def ask(self, stream, path, *more, data=None, end=True, **pseudo):
        headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
        headers |= {":" + key: value for key, value in pseudo.items()}
        pairs = [*headers.items(), ("content-type", "application/grpc"), ("te", "trailers"), *more]
        last = dict(pairs)  # the last of a name counts
        block = header_blocks.write([(k.encode(), v.encode()) for k, v in last.items()])
        ended = end and data is None
        self.send(frame(Kind.HEADERS, http2_frames.END_HEADERS | ended, stream, block))
        if data is not None:
            self.send(frame(Kind.DATA, int(end), stream, data))

    async def frame(self):
        head = await self.reader.readexactly(9)
        payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, flags, stream = Kind(head[3]), head[4], int.from_bytes(head[5:], "big")
        if kind is Kind.HEADERS:
            payload = dict(self.decoder.decode(payload))
        return kind, flags, stream, payload

    async def next(self, *kinds, stream=None):
        async with asyncio.timeout(10):
            while True:
                found = await self.frame()
                if found[0] in kinds and stream in (None, found[2]):
                    return found

    async def status(self, stream=1):
        """The status and text that end a call."""
        while True:
            _, flags, _, headers = await self.next(Kind.HEADERS, stream=stream)
            if flags & http2_frames.END_STREAM:
                return int(headers["grpc-status"]), headers.get("grpc-message", "")

    async def closed(self):
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass


async def connections_of(door, count):
    await until(lambda: len(door.connections) == count)
    return tuple(door.connections)


def raw_call(number, path=b"/a"):
    """Return the frames of a call with an empty message, as no library would time them."""
    head = header_blocks.write(
        [
            (b":method", b"POST"), (b":path", path), (b":scheme", b"http"), (b":authority", b"x"),
            (b"te", b"trailers"), (b"content-type", b"application/grpc"),
        ]
    )  # fmt: skip
    return http2_frames.frame(1, 4, number, head) + http2_frames.frame(0, 1, number, bytes(5))


def made_pair(folder):
    """The files of a certificate for this machine and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(1)
        .not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"


def server_side(pair):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pair)
    return context


def client_side(pair):
    context = ssl.create_default_context(cafile=pair[0])
    context.set_alpn_protocols(["h2"])
    return context
