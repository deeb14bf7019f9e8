import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet import contact as contacts
from edge_agent.fleet.contact import Contact
from fogline_protocol.errors import ServerFault, Unavailable
from fogline_protocol.v1.fleet_pb2 import ContactRequest, ContactResponse

GOOD = Contact("mqtt://10.0.0.1:1883", "http://10.0.0.1:8000")


class Hub:
    """Answers with these bytes."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str]] = []

    async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
        self.asked.append((path, ContactRequest.FromString(request).device))
        return self.answer


def says(mqtt: str = "", http: str = "") -> Hub:
    return Hub(ContactResponse(mqtt=mqtt, http=http).SerializeToString())


async def test_a_hub_is_asked_by_name() -> None:
    hub = says(GOOD.mqtt, GOOD.http)
    assert await contacts.ask(hub, "dev", "hub.example", 1.0) == GOOD
    assert hub.asked == [("/fogline.v1.Fleet/Contact", "dev")]
    assert (GOOD.broker.host, GOOD.broker.port) == ("10.0.0.1", 1883)


@pytest.mark.parametrize(
    ("said", "host", "meant"),
    [
        ("http://0.0.0.0:8000", "hub.example", "http://hub.example:8000"),
        ("https://[::]:8000", "hub.example", "https://hub.example:8000"),
        ("http://:8000", "10.0.0.7", "http://10.0.0.7:8000"),
        ("http://0.0.0.0:8000", "fe80::1", "http://[fe80::1]:8000"),
        ("http://other:8000", "hub.example", "http://other:8000"),
    ],
)
async def test_a_hub_that_names_no_host_means_the_one_that_was_called(
    said: str, host: str, meant: str
) -> None:
    assert (await contacts.ask(says("mqtt://0.0.0.0:1", said), "dev", host, 1.0)).http == meant


async def test_a_hub_without_a_broker_says_so() -> None:
    assert await contacts.ask(says(), "dev", "h", 1.0) == Contact("", "")
    only_files = await contacts.ask(says("", "http://h:1"), "dev", "h", 1.0)
    assert only_files == Contact("", "http://h:1")


@pytest.mark.parametrize(
    ("mqtt", "http"),
    [
        ("mqtt://h:99999", "http://h:1"),
        ("tcp://h:1", "http://h:1"),
        ("mqtt://h:1", ""),
        ("mqtt://h:1", "http://"),  # a hub that is about to open this door
        ("mqtt://h:1", "http://h"),
        ("mqtt://h:1", "ftp://h:1"),
        ("mqtt://h:1", "http://h:99999"),
        ("mqtt://h:1", "http://[::1"),
    ],
)
async def test_addresses_that_cannot_be_used_are_the_hubs_fault(mqtt: str, http: str) -> None:
    with pytest.raises(ServerFault, match="addresses cannot be read"):
        await contacts.ask(says(mqtt, http), "dev", "h", 1.0)


async def test_an_answer_that_is_none_is_the_hubs_fault_and_no_answer_is_passed_on() -> None:
    with pytest.raises(ServerFault):
        await contacts.ask(Hub(b"\xff\xff"), "dev", "h", 1.0)

    class Away:
        async def call(self, path: str, request: bytes, timeout_s: float) -> bytes:
            raise Unavailable("nobody there")

    with pytest.raises(Unavailable):
        await contacts.ask(Away(), "dev", "h", 1.0)


def test_what_was_remembered_is_known_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "contact.json"
    assert contacts.remembered(file) is None
    contacts.remember(file, GOOD)
    assert contacts.remembered(file) == GOOD
    contacts.remember(file, Contact("mqtt://b:2", "http://b:3"))
    assert contacts.remembered(file) == Contact("mqtt://b:2", "http://b:3")
    assert os.listdir(tmp_path) == ["contact.json"]


async def test_what_a_hub_can_be_told_is_asked_and_remembered(tmp_path: Path) -> None:
    file = tmp_path / "contact.json"
    answer = ContactResponse(mqtt=GOOD.mqtt, http=GOOD.http, reported_revision=1)
    found = await contacts.ask(Hub(answer.SerializeToString()), "dev", "h", 1.0)
    assert found.reported_revision == 1
    contacts.remember(file, found)
    again = contacts.remembered(file)
    assert again is not None
    assert again.reported_revision == 1
    # An older hub says nothing of it, and an older agent remembered nothing.
    assert (await contacts.ask(says(GOOD.mqtt, GOOD.http), "dev", "h", 1.0)).reported_revision == 0
    file.write_text(json.dumps({"mqtt": GOOD.mqtt, "http": GOOD.http}))
    old = contacts.remembered(file)
    assert old is not None
    assert old.reported_revision == 0


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"mqtt": 1, "http": 2}',
        b'{"mqtt": "garbage", "http": "http://h:1"}', b'{"mqtt": "mqtt://h:1", "http": "http://"}',
        b"[" * 100_000,
        b'{"mqtt": "mqtt://h:1", "http": "http://h:1", "reported_revision": 1e999}',
        b'{"mqtt": "mqtt://h:1", "http": "http://h:1", "reported_revision": "new"}',
    ],
)  # fmt: skip
def test_a_damaged_memory_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "contact.json").write_bytes(content)
    assert contacts.remembered(tmp_path / "contact.json") is None


@given(st.text(), st.text())
def test_whatever_a_hub_says_is_usable_or_refused(mqtt: str, http: str) -> None:
    try:
        Contact(mqtt, http).check()
    except ValueError:
        return
    assert not mqtt or Contact(mqtt, http).broker.port
    json.dumps([mqtt, http])


def test_a_disk_that_takes_nothing_is_not_filled_with_attempts(tmp_path: Path) -> None:
    file = tmp_path / "contact.json"
    file.mkdir()  # so that the last step fails
    for _ in range(3):
        with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
            contacts.remember(file, GOOD)
    assert os.listdir(tmp_path) == ["contact.json"]
