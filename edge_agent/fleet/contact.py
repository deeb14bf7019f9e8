"""Where broker and files of the hub are: asked over the uplink, remembered across starts.

Only the address of the hub's gRPC door is configured. The rest may move with every start of
the hub, so it is asked again whenever the broker cannot be reached.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError

from fogline_protocol.errors import ServerFault
from fogline_protocol.mqtt import BrokerAddress
from fogline_protocol.v1.fleet_pb2 import ContactRequest, ContactResponse

CONTACT = "/fogline.v1.Fleet/Contact"


class Hub(Protocol):
    """Carries calls to the hub."""

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        """Return the answer, or raise ``InferenceError``."""
        ...


@dataclass(frozen=True, slots=True)
class Contact:
    """Addresses as URLs, an empty one is not offered; and what the hub can be told."""

    mqtt: str
    http: str
    # Up to which revision the hub reads Reported; it moves nothing, so it is not compared.
    reported_revision: int = field(default=0, compare=False)

    @property
    def broker(self) -> BrokerAddress:
        """The broker's address; call it only if there is one."""
        return BrokerAddress.parse(self.mqtt)

    def check(self) -> None:
        """Refuse addresses that cannot be used.

        Raises:
            ValueError: one of them is no address.
        """
        if self.mqtt:
            BrokerAddress.parse(self.mqtt)
        if self.mqtt or self.http:
            parts = urlsplit(self.http)
            if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port:
                raise ValueError(f"{self.http!r} is not http://HOST:PORT or https://HOST:PORT")


async def ask(hub: Hub, device: str, host: str, timeout_s: float) -> Contact:
    """Return what the hub says; where it names no host, ``host`` is the one that was called.

    Raises:
        InferenceError: it could not be asked, or does not know what it is asked.
    """
    request = ContactRequest(device=device).SerializeToString()
    data = await hub.call(CONTACT, request, timeout_s)
    try:
        answer = ContactResponse.FromString(data)
        contact = Contact(_at(answer.mqtt, host), _at(answer.http, host), answer.reported_revision)
        contact.check()
    except (DecodeError, ValueError) as error:
        raise ServerFault(f"the hub's addresses cannot be read: {error}") from None
    return contact


def remembered(file: Path) -> Contact | None:
    """Return what ``remember`` wrote, or None: a damaged file is only asked for again."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        contact = Contact(
            str(document["mqtt"]),
            str(document["http"]),
            int(document.get("reported_revision", 0)),  # an older agent kept none
        )
        contact.check()
        return contact
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def remember(file: Path, contact: Contact) -> None:
    """Keep ``contact`` for the next start.

    Raises:
        OSError: the disk is full or fails.
    """
    descriptor, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(asdict(contact), out)
        os.replace(name, file)
    except OSError:
        os.unlink(name)  # it is tried again and again, and a full disk must not grow fuller
        raise


def _at(url: str, host: str) -> str:
    """Return ``url`` with ``host`` where it names none, or every address of its machine."""
    if not url:
        return ""
    parts = urlsplit(url)
    if parts.hostname not in (None, "0.0.0.0", "::"):
        return url
    shown = f"[{host}]" if ":" in host else host
    port = "" if parts.port is None else f":{parts.port}"
    return parts._replace(netloc=f"{shown}{port}").geturl()
