import datetime
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection

from cloud_hub.fleet.artifacts import Disk
from cloud_hub.fleet.certificates import (
    CertificateRefused,
    Certificates,
    Change,
    named,
    objection,
)
from cloud_hub.fleet.controller import TooMuchWanted
from cloud_hub.fleet.trust import Repository
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import Bundle, File, Pairing, SelfTest, Tolerance, Variant
from fogline_protocol.release_index import MAX_CERTIFICATES
from fogline_protocol.score import Score
from fogline_protocol.tensors import TensorSpec
from tests.certificates import WHEN, certificate

NOW = WHEN.timestamp() + 86_400
HUB_SHA256 = "a" * 64


def _bundle(model: str, artifact: str, pairing: Pairing | None) -> Bundle:
    tensor = TensorSpec("x", "FP32", (-1, 2))
    return Bundle(
        model=model,
        version="1.0.0",
        inputs=(tensor,),
        outputs=(replace(tensor, name="y"),),
        max_batch=4,
        variants=(Variant("fp32", "fp32.onnx", "fp32", ("CPUExecutionProvider",)),),
        self_test=SelfTest("selftest.npz", {"fp32": Tolerance(0.1, 0.9)}),
        files={"fp32.onnx": File(artifact * 64, 1), "selftest.npz": File("0" * 64, 1)},
        score=Score("max_softmax", "y"),
        escalates_to=pairing,
    )


HUB = _bundle("digits-hub", "1", None)
EDGE = _bundle("digits", "2", Pairing("digits-hub", HUB_SHA256))
GOOD = certificate()


class QuickDisk(Disk):
    """A disk that nobody cuts the power of."""

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        path.write_bytes(data)
        path.chmod(mode)

    def sync(self, directory: Path) -> None:
        pass


def insert_releases(connection: Connection) -> None:
    for number, (bundle, sha256) in enumerate(((HUB, HUB_SHA256), (EDGE, "b" * 64)), 1):
        connection.execute(
            schema.release.insert().values(
                model=bundle.model,
                number=number,
                version=bundle.version,
                bundle_sha256=sha256,
                escalates_to=bundle.escalates_to and bundle.escalates_to.model,
                escalates_to_sha256=bundle.escalates_to and bundle.escalates_to.bundle_sha256,
                accepted_at=NOW,
                forced=False,
                size_bytes=2,
                document=bundle.to_json().decode(),
                index_document="{}",
                self_test="{}",
                report="",
            )
        )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await Store.open(f"sqlite:///{tmp_path}/hub.db")
    await store.write(insert_releases)
    yield store
    await store.close()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path, now=NOW, disk=QuickDisk())


class Wishes:
    """Devices that want the release, and what they were told; some have no room for more."""

    def __init__(self) -> None:
        self.devices = ("first", "second")
        self.full = False
        self.told: list[tuple[str, int]] = []
        self.published = 0
        self.dies = False  # with the transaction

    def restate(
        self, connection: Connection, model: str, number: int, *, at_any_size: bool = False
    ) -> Sequence[str]:
        if self.dies:
            raise KeyboardInterrupt
        if self.full and not at_any_size:
            raise TooMuchWanted("full")
        self.told.append((model, number))
        return self.devices

    def restated(self) -> None:
        self.published += 1


@pytest.fixture
def wishes() -> Wishes:
    return Wishes()


@pytest.fixture
def certificates(store: Store, repository: Repository, wishes: Wishes) -> Certificates:
    return Certificates(store, repository, wishes, clock=lambda: NOW)


async def told(store: Store, now: float = NOW) -> Sequence[str]:
    """Return what a desired state of the release names."""
    return await store.read(lambda connection: named(connection, "digits", 2, now))


async def test_a_certificate_is_attached_to_a_release_that_is_out_already(
    certificates: Certificates, repository: Repository, store: Store, tmp_path: Path, wishes: Wishes
) -> None:
    change = await certificates.issue("digits", 2, GOOD)
    issued = change.issued
    assert issued.target == f"certificates/digits/2/{GOOD.id}.json"
    info = repository.targets()[issued.target]
    signed = tmp_path / "tuf" / "targets" / info.get_prefixed_paths()[0]
    assert signed.read_bytes() == GOOD.to_json()
    assert await told(store) == (issued.target,)
    assert list(await certificates.list("digits")) == [issued]
    assert change.devices == wishes.devices
    # What holds already is nobody's news.
    assert await certificates.issue("digits", 2, GOOD) == Change(issued, ())
    assert wishes.told == [("digits", 2)]


async def test_a_withdrawn_certificate_is_neither_signed_nor_named_and_its_devices_are_told(
    certificates: Certificates, repository: Repository, store: Store, wishes: Wishes
) -> None:
    issued = (await certificates.issue("digits", 2, GOOD)).issued
    wishes.full = True  # which must not stand in the way
    change = await certificates.withdraw("digits", 2, GOOD.id, reason="drift\0 here")
    withdrawn = change.issued
    assert (withdrawn.withdrawn_at, withdrawn.reason) == (NOW, "drift  here")
    assert (change.devices, wishes.published) == (wishes.devices, 2)
    assert issued.target not in repository.targets()
    assert await told(store) == ()
    again = await certificates.withdraw("digits", 2, GOOD.id, reason="again")
    assert again == Change(withdrawn, ())
    wishes.full = False
    held = await certificates.issue("digits", 2, GOOD)
    assert (held.issued.withdrawn_at, held.issued.reason) == (None, "")
    assert issued.target in repository.targets()
    assert wishes.told == [("digits", 2)] * 3


async def test_an_expired_certificate_is_not_named_any_more(
    store: Store, certificates: Certificates
) -> None:
    await certificates.issue("digits", 2, GOOD)
    assert await told(store, GOOD.expires_at.timestamp()) == ()


DAY = datetime.timedelta(days=1)
OTHER_CLASS = "aarch64/CPUExecutionProvider/onnxruntime-1.32"


async def test_what_was_issued_last_stands_for_its_variant_and_hardware_class(
    store: Store, certificates: Certificates
) -> None:
    elsewhere = replace(GOOD, hardware_class=OTHER_CLASS)
    newer = replace(GOOD, issued_at=WHEN + DAY, expires_at=GOOD.expires_at + DAY)
    # It is taken before the others while it holds, and they outlive it.
    brief = replace(GOOD, issued_at=WHEN + 2 * DAY, expires_at=WHEN + 3 * DAY)
    target = {c.id: f"certificates/digits/2/{c.id}.json" for c in (GOOD, elsewhere, newer, brief)}
    await certificates.issue("digits", 2, GOOD)
    await certificates.issue("digits", 2, elsewhere)
    await certificates.issue("digits", 2, newer)
    assert set(await told(store)) == {target[newer.id], target[elsewhere.id]}
    await certificates.issue("digits", 2, brief)
    assert await told(store) == (target[brief.id], target[newer.id], target[elsewhere.id])
    await certificates.withdraw("digits", 2, newer.id, reason="drift")
    assert set(await told(store)) == {target[brief.id], target[GOOD.id], target[elsewhere.id]}


async def test_no_more_are_issued_than_a_device_takes(
    certificates: Certificates, repository: Repository, store: Store
) -> None:
    for n in range(MAX_CERTIFICATES):
        await certificates.issue("digits", 2, replace(GOOD, hardware_class=f"class-{n}"))
    with pytest.raises(CertificateRefused, match="17 certificates would hold") as caught:
        await certificates.issue("digits", 2, GOOD)
    assert caught.value.code == "certificate/too-many"
    assert len(await told(store)) == len(repository.targets()) == MAX_CERTIFICATES
    await certificates.issue("digits", 2, replace(GOOD, hardware_class="class-0", alpha=0.01))


async def test_what_a_device_could_not_be_told_is_not_issued(
    certificates: Certificates, repository: Repository, store: Store, wishes: Wishes
) -> None:
    wishes.full = True
    with pytest.raises(TooMuchWanted):
        await certificates.issue("digits", 2, GOOD)
    assert (await told(store), repository.targets(), wishes.published) == ((), {}, 0)
    assert await certificates.list() == []


async def test_a_change_and_what_devices_are_told_are_one_transaction(
    certificates: Certificates, store: Store, wishes: Wishes
) -> None:
    await certificates.issue("digits", 2, GOOD)
    before = await told(store)
    wishes.dies = True
    with pytest.raises(KeyboardInterrupt):
        await certificates.withdraw("digits", 2, GOOD.id, reason="drift")
    with pytest.raises(KeyboardInterrupt):
        await certificates.issue("digits", 2, replace(GOOD, alpha=0.01))
    assert await told(store) == before
    assert [one.id for one in await certificates.list()] == [GOOD.id]


async def test_a_start_finishes_what_a_crash_interrupted(
    repository: Repository, certificates: Certificates
) -> None:
    issued = (await certificates.issue("digits", 2, GOOD)).issued
    other = replace(GOOD, alpha=0.01)
    kept = (await certificates.issue("digits", 2, other)).issued
    await certificates.withdraw("digits", 2, GOOD.id, reason="drift")
    # A crash between row and signature, in both directions.
    repository.publish({issued.target: GOOD.to_json()}, [kept.target], now=NOW)
    await certificates.reconcile()
    assert set(repository.targets()) == {kept.target}


@pytest.mark.parametrize(
    ("model", "number", "code"),
    [("digits", 7, "release/unknown"), ("other", 1, "release/unknown"), ("digits-hub", 1, "certificate/other")],
)  # fmt: skip
async def test_a_certificate_needs_its_release(
    certificates: Certificates, model: str, number: int, code: str
) -> None:
    with pytest.raises(CertificateRefused) as caught:
        await certificates.issue(model, number, GOOD)
    assert caught.value.code == code


@pytest.mark.parametrize("id", ["0" * 16, "", "\0", "' or 1"])
async def test_what_was_never_attached_cannot_be_withdrawn(
    certificates: Certificates, id: str
) -> None:
    with pytest.raises(CertificateRefused) as caught:
        await certificates.withdraw("digits", 2, id, reason="")
    assert caught.value.code == "certificate/unknown"


@pytest.mark.parametrize(
    ("certificate", "sentence"),
    [
        (GOOD, None),
        (replace(GOOD, model="letters"), "speaks of letters 1.0.0"),
        (replace(GOOD, version="2.0.0"), "speaks of digits 2.0.0"),
        (replace(GOOD, variant="int8"), "no variant 'int8'"),
        (replace(GOOD, variant_sha256="9" * 64), "another file than the release's fp32.onnx"),
        (replace(GOOD, hub_model="other"), "compares with other"),
        (replace(GOOD, hub_sha256="9" * 64), "another file than those of digits-hub"),
        (replace(GOOD, score=Score("max_softmax", "z")), "its score"),
        (replace(GOOD, score=Score("logistic", "y", {"bias": 1.0})), "its score"),
        (replace(GOOD, expires_at=WHEN), "it expired at"),
    ],
)
def test_a_certificate_speaks_of_one_release_and_its_pair(
    certificate: Certificate, sentence: str | None
) -> None:
    found = objection(certificate, EDGE, HUB, NOW)
    if sentence is None:
        assert found is None
    else:
        assert found is not None
        assert sentence in found


def test_a_release_that_never_escalates_has_nothing_to_certify() -> None:
    alone = replace(GOOD, model="digits-hub", variant_sha256="1" * 64)
    assert "escalates to no model" in (objection(alone, HUB, None, NOW) or "")
