import asyncio
import datetime
import io
import itertools
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from sqlalchemy import Connection

from cloud_hub.engines.launch import Launcher
from cloud_hub.errors import ModelRefused, StoreFailed
from cloud_hub.fleet import lineage
from cloud_hub.fleet.artifacts import Blobs, Disk
from cloud_hub.fleet.golden import Engine
from cloud_hub.fleet.releases import ReleaseRefused, Releases, pair_problem
from cloud_hub.fleet.trust import Repository
from cloud_hub.fleet.workshop_report import ReportPages
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import documents, hardware, release, release_index
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import (
    Bundle,
    File,
    Pairing,
    Parent,
    SelfTest,
    Tolerance,
    Variant,
)
from fogline_protocol.score import Score
from fogline_protocol.tensors import Array, TensorSpec
from tests.certificates import certificate as a_certificate

NOW = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC).timestamp()
CPU = "CPUExecutionProvider"
X = TensorSpec("x", "FP32", (-1, 3))
Y = TensorSpec("y", "FP32", (-1, 2))
T = TypeVar("T")
PAGE = b"<!doctype html><title>Report</title>"


class QuickDisk(Disk):
    """A disk that nobody cuts the power of, and that counts its operations."""

    def __init__(self, left: int | None = None) -> None:
        self.left = left

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        self._spend()
        path.write_bytes(data)
        path.chmod(mode)

    def rename(self, old: Path, new: Path) -> None:
        self._spend()
        super().rename(old, new)

    def sync(self, directory: Path) -> None:
        self._spend()

    def _spend(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise PowerCut
            self.left -= 1


class PowerCut(Exception):
    """The power went before this operation."""


class Scaled:
    """An engine whose artifact is a factor: ``y = factor * x[:, :2]``."""

    provider = "CPUExecutionProvider"

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        if text == "garbage":
            raise ModelRefused("not a model")
        self._factor = float(text)

    async def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._factor == 0:
            raise RuntimeError("division by zero")
        return {"y": (inputs["x"][:, :2] * self._factor).astype(np.float32)}

    async def close(self) -> None:
        pass


def bundle(
    folder: Path,
    *,
    model: str = "digits-hub",
    version: str = "1.0.0",
    factor: str = "1",
    escalates_to: Pairing | None = None,
    certificates: tuple[Certificate, ...] = (),
    providers: tuple[str, ...] = (CPU,),
    inputs: tuple[TensorSpec, ...] = (X,),
    labels: tuple[str, ...] = (),
    beside: Mapping[str, str] | None = None,
    parent: Parent | None = None,
) -> Path:
    """Write a bundle whose variants are factors, fp32 and those beside it; return its folder."""
    (folder / "variants").mkdir(parents=True)
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    vectors = io.BytesIO()
    arrays: dict[str, Any] = {"input.x": rows, "output.y": rows[:, :2]}
    np.savez(vectors, **arrays)
    factors = {"fp32": factor, **(beside or {})}
    files = {
        **{f"variants/{name}.onnx": text.encode() for name, text in factors.items()},
        "selftest.npz": vectors.getvalue(),
        "README.md": b"# card of " + model.encode(),
    }
    root = Bundle(
        model=model,
        version=version,
        inputs=inputs,
        outputs=(Y,),
        max_batch=3,
        labels=labels,
        variants=tuple(Variant(name, f"variants/{name}.onnx", name, providers) for name in factors),
        self_test=SelfTest("selftest.npz", {name: Tolerance(0.01, 0.9) for name in factors}),
        files={name: File(documents.sha256(data), len(data)) for name, data in files.items()},
        score=Score("max_softmax", "y"),
        escalates_to=escalates_to,
        parent=parent,
    )
    for name, data in {**files, "bundle.json": root.to_json()}.items():
        (folder / name).write_bytes(data)
    (folder / "report.json").write_text('{"accuracy": 0.9}')
    (folder / "report.html").write_bytes(PAGE)
    for certificate in certificates:
        (folder / "certificates").mkdir(exist_ok=True)
        (folder / "certificates" / f"{certificate.id}.json").write_bytes(certificate.to_json())
    return folder


def certificate(edge: bytes = b"1.0005", hub: bytes = b"1", **changes: object) -> Certificate:
    """Return a certificate of the edge bundle's only variant."""
    fields = {"variant_sha256": documents.sha256(edge), "hub_sha256": documents.sha256(hub)}
    return a_certificate(**{**fields, **changes})


class Hub:
    """What a hub keeps on its disk, opened again and again."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.disk = QuickDisk()
        self.store: Store
        self.repository: Repository
        self.releases: Releases

    async def open(self) -> Releases:
        self.store = await Store.open(f"sqlite:///{self.data}/hub.db")
        self.repository = Repository(self.data, now=NOW, disk=self.disk)
        blobs = Blobs(self.data / "blobs", self.disk)
        self.reports = ReportPages(self.data / "reports", self.disk)
        self.releases = Releases(
            self.store,
            blobs,
            self.repository,
            reports=self.reports,
            load=self.load,
            clock=lambda: NOW,
        )
        return self.releases

    @staticmethod
    async def load(path: Path) -> Engine:
        return Scaled(path)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    data = tmp_path / "hub"
    data.mkdir()
    hub = Hub(data)
    await hub.open()
    yield hub
    await hub.store.close()


async def refused(accepting: Awaitable[object]) -> ReleaseRefused:
    with pytest.raises(ReleaseRefused) as caught:
        await accepting
    assert caught.value.sentence
    return caught.value


def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Return a hub's bundle and an edge bundle that escalates to it."""
    hub = bundle(tmp_path / "digits-hub")
    digest = documents.sha256((hub / "bundle.json").read_bytes())
    edge = bundle(
        tmp_path / "digits",
        model="digits",
        factor="1.0005",
        escalates_to=Pairing("digits-hub", digest),
        certificates=(certificate(),),
    )
    return hub, edge


async def test_a_bundle_becomes_a_numbered_signed_release(hub: Hub, tmp_path: Path) -> None:
    path = bundle(tmp_path / "b")
    found = await hub.releases.accept(path)
    assert (found.model, found.number, found.version) == ("digits-hub", 1, "1.0.0")
    assert (found.forced, found.self_test) == (
        False,
        {"fp32": {"max_abs_error": 0, "agreement": 1}},
    )
    assert await hub.releases.report(found) == {"accuracy": 0.9}
    assert await hub.releases.report_page(found) == PAGE
    assert hub.releases.file(found, "README.md").read_bytes() == b"# card of digits-hub"
    info = hub.repository.targets()[found.index_target]
    signed = hub.data / "tuf" / "targets" / info.get_prefixed_paths()[0]
    index = release_index.parse(signed.read_bytes())
    assert index.bundle_sha256 == found.bundle_sha256
    assert sorted(index.files) == ["README.md", "bundle.json", "selftest.npz", "variants/fp32.onnx"]
    for file in index.files.values():
        blob = hub.data / "blobs" / "sha256" / file.sha256
        assert documents.sha256(blob.read_bytes()) == file.sha256
    assert await hub.releases.show("digits-hub") == found
    assert list(await hub.releases.list()) == [found]


async def test_the_same_bundle_is_the_same_release(hub: Hub, tmp_path: Path) -> None:
    path = bundle(tmp_path / "b")
    first = await hub.releases.accept(path)
    shutil.rmtree(hub.data / "blobs" / "sha256")
    (hub.data / "blobs" / "sha256").mkdir()
    assert await hub.releases.accept(path) == first
    assert hub.releases.file(first, "README.md").exists()  # repaired on the way


async def test_pushing_again_adds_a_report_where_there_was_none_and_replaces_none(
    hub: Hub, tmp_path: Path
) -> None:
    path = bundle(tmp_path / "b")
    for name in ("report.json", "report.html"):
        (path / name).unlink()
    first = await hub.releases.accept(path)
    assert await hub.releases.report(first) == {}
    assert not hub.releases.has_report_page(first)
    for said in ("first", "second"):
        (path / "report.json").write_text(f'{{"said": "{said}"}}')
        (path / "report.html").write_text(said)
        assert await hub.releases.accept(path) == first
        assert await hub.releases.report(first) == {"said": "first"}
        assert await hub.releases.report_page(first) == b"first"


async def test_a_parent_is_what_it_is_said_to_be_or_unknown(hub: Hub, tmp_path: Path) -> None:
    made = await hub.releases.accept(bundle(tmp_path / "1"))
    for model, version, code, said in (
        ("other", "1.0.0", "parent/model", "digits-hub@1, a release of another model"),
        ("digits-hub", "1.0.1", "parent/version", "with the version 1.0.0, not 1.0.1"),
    ):
        path = bundle(
            tmp_path / code,
            model=model,
            version="2.0.0",
            parent=Parent(version, made.bundle_sha256),
        )
        error = await refused(hub.releases.accept(path))
        assert error.code == code
        assert said in error.sentence
    for version, parent in (("2.0.0", "3" * 64), ("3.0.0", made.bundle_sha256)):
        path = bundle(tmp_path / version, version=version, parent=Parent("1.0.0", parent))
        await hub.releases.accept(path)
    known = await hub.releases.list("digits-hub")
    third, second, first = (lineage.trace(one, known) for one in known)
    assert second.unknown
    assert second.parent is None
    assert third.parent == made
    assert (first.named, first.unknown, first.children) == (None, False, (known[0],))


async def test_a_parent_that_comes_later_is_found(hub: Hub, tmp_path: Path) -> None:
    before = bundle(tmp_path / "before")
    digest = documents.sha256((before / "bundle.json").read_bytes())
    after = bundle(tmp_path / "after", version="1.1.0", parent=Parent("1.0.0", digest))
    late = await hub.releases.accept(after)
    assert lineage.trace(late, await hub.releases.list()).unknown
    early = await hub.releases.accept(before)
    assert early.number == 2
    assert lineage.trace(late, await hub.releases.list()).parent == early


async def test_a_device_fetches_only_the_blocks_that_its_parent_lacks(
    hub: Hub, tmp_path: Path
) -> None:
    first = await hub.releases.accept(bundle(tmp_path / "1", beside={"int8": "1.0001"}))
    path = bundle(
        tmp_path / "2",
        version="1.1.0",
        beside={"int8": "1.0002", "fp16": "1.0003"},
        parent=Parent("1.0.0", first.bundle_sha256),
    )
    second = await hub.releases.accept(path)
    found = lineage.fetches(
        first.bundle,
        await hub.releases.index(first),
        second.bundle,
        await hub.releases.index(second),
    )
    root = (path / "bundle.json").stat().st_size
    shared = sum(second.bundle.files[name].bytes for name in ("selftest.npz", "README.md"))
    assert {name: (fetch.bytes, fetch.whole) for name, fetch in found.items()} == {
        "fp32": (root, root + shared + 1),
        "int8": (root + 6, root + shared + 6),
        "fp16": (root + 6, root + shared + 6),
    }


async def test_numbers_count_per_model(hub: Hub, tmp_path: Path) -> None:
    for number, version in ((1, "1.0.0"), (2, "1.1.0"), (3, "0.9.0")):
        path = bundle(tmp_path / version, version=version)
        assert (await hub.releases.accept(path)).number == number
    assert (await hub.releases.accept(bundle(tmp_path / "o", model="other"))).number == 1
    assert [r.number for r in await hub.releases.list("digits-hub")] == [3, 2, 1]
    error = await refused(hub.releases.show("digits-hub", 9))
    assert error.code == "release/unknown"
    assert "there are: 1, 2, 3" in error.sentence


async def test_a_version_is_used_once(hub: Hub, tmp_path: Path) -> None:
    await hub.releases.accept(bundle(tmp_path / "a"))
    error = await refused(hub.releases.accept(bundle(tmp_path / "b", factor="1.0002"), force=True))
    assert error.code == "bundle/version-taken"
    assert "release 1" in error.sentence


async def test_a_damaged_bundle_is_refused(hub: Hub, tmp_path: Path) -> None:
    path = bundle(tmp_path / "b")
    (path / "variants" / "fp32.onnx").write_bytes(b"2")
    error = await refused(hub.releases.accept(path, force=True))
    assert error.code == "bundle/refused"
    assert "variants/fp32.onnx" in error.sentence


async def test_no_model_is_called_like_the_role_of_certificates(hub: Hub, tmp_path: Path) -> None:
    error = await refused(hub.releases.accept(bundle(tmp_path / "b", model="certificates")))
    assert error.code == "bundle/name"


@pytest.mark.parametrize(
    ("factor", "sentence"),
    [
        ("2", "stray from the reference by up to 10 .allowed 0.01."),
        ("-1", "0.0% of the golden rows"),
        ("garbage", "cannot be loaded: not a model"),
        ("0", "fails on its golden inputs: division by zero"),
        ("nan", "stray from the reference"),
    ],
)
async def test_a_wrong_model_is_refused_with_figures_unless_forced(
    hub: Hub, tmp_path: Path, factor: str, sentence: str
) -> None:
    path = bundle(tmp_path / "b", factor=factor)
    error = await refused(hub.releases.accept(path))
    assert error.code == "self-test/failed"
    assert re.search(sentence, error.sentence)
    assert list(error.figures) == ["fp32"]
    assert list(await hub.releases.list()) == []
    forced = await hub.releases.accept(path, force=True)
    assert forced.forced
    assert (await hub.releases.show("digits-hub", 1)).forced


@pytest.mark.parametrize(
    ("processor", "fp32", "beside", "hints"),
    [
        ("x86_64+avx2", "1", {"int8": "1.1"}, True),
        ("x86_64+avx512_vnni", "1", {"int8": "1.1"}, False),  # nothing saturates there
        ("x86_64+avx2", "1.1", {"int8": "1.1"}, False),  # the net is wrong, not its quantization
        ("x86_64+avx2", "1.1", {"int8": "1"}, False),
        ("x86_64+avx2", "1", {"int8": "garbage"}, False),  # it never ran
        ("x86_64+avx2", "1", {"fp16": "1.1"}, False),
    ],
)
async def test_int8_that_strays_where_fp32_does_not_is_refused_with_what_may_mend_it(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processor: str,
    fp32: str,
    beside: Mapping[str, str],
    hints: bool,
) -> None:
    monkeypatch.setattr(hardware, "this_machine", lambda: processor)
    path = bundle(tmp_path / "b", factor=fp32, beside=beside)
    error = await refused(hub.releases.accept(path))
    assert error.code == "self-test/failed"
    hint = f"this hub's {processor} has no VNNI: there an int8 file may need to be quantized with"
    assert (f"(its fp32 passes, and {hint} reduce_range=True)" in error.sentence) == hints
    assert (await hub.releases.accept(path, force=True)).forced


async def test_a_release_that_nothing_here_can_run_needs_force(hub: Hub, tmp_path: Path) -> None:
    path = bundle(tmp_path / "b", providers=("TensorrtExecutionProvider",))
    assert (await refused(hub.releases.accept(path))).code == "self-test/failed"
    assert (await hub.releases.accept(path, force=True)).forced


async def test_golden_vectors_that_are_no_archive_cannot_be_forced(
    hub: Hub, tmp_path: Path
) -> None:
    path = bundle(tmp_path / "b")
    root = release.parse((path / "bundle.json").read_bytes())
    (path / "selftest.npz").write_bytes(b"zip?")
    files = {**root.files, "selftest.npz": File(documents.sha256(b"zip?"), 4)}
    (path / "bundle.json").write_bytes(replace(root, files=files).to_json())
    error = await refused(hub.releases.accept(path, force=True))
    assert error.code == "self-test/unusable"


async def test_an_edge_release_needs_the_very_bundle_it_escalates_to(
    hub: Hub, tmp_path: Path
) -> None:
    hub_bundle, edge = pair(tmp_path)
    error = await refused(hub.releases.accept(edge))
    assert error.code == "pair/unknown"
    assert "push that bundle first" in error.sentence
    await hub.releases.accept(bundle(tmp_path / "other", version="0.9.0"))
    assert (await refused(hub.releases.accept(edge))).code == "pair/unknown"
    await hub.releases.accept(hub_bundle)
    found = await hub.releases.accept(edge)
    assert found.escalates_to is not None
    assert f"certificates/digits/1/{certificate().id}.json" in hub.repository.targets()


async def test_a_pair_that_cannot_understand_each_other_is_refused(
    hub: Hub, tmp_path: Path
) -> None:
    hub_bundle = bundle(tmp_path / "h", labels=("a", "b"))
    await hub.releases.accept(hub_bundle)
    digest = documents.sha256((hub_bundle / "bundle.json").read_bytes())
    edge = bundle(
        tmp_path / "e",
        model="digits",
        labels=("b", "a"),
        escalates_to=Pairing("digits-hub", digest),
    )
    error = await refused(hub.releases.accept(edge, force=True))
    assert error.code == "pair/contract"
    assert "name their classes differently" in error.sentence


def _contract(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Bundle:
    return Bundle("m", "1.0.0", inputs, outputs, 3, (), SelfTest("s", {}), {})


@pytest.mark.parametrize(
    ("hub_inputs", "hub_outputs", "problem"),
    [
        ((X,), (Y,), None),
        ((replace(X, shape=(-1, -1)),), (Y, TensorSpec("more", "FP32", (-1,))), None),
        ((replace(X, name="z"),), (Y,), "m has no input 'x'"),
        ((X, TensorSpec("z", "FP32", (-1,))), (Y,), "m also needs the input 'z'"),
        ((replace(X, datatype="FP16"),), (Y,), "input 'x': FP32 does not fit FP16"),
        ((replace(X, shape=(-1, 4)),), (Y,), "input 'x': shape [-1, 3] does not fit [-1, 4]"),
        ((X,), (replace(Y, name="z"),), "m has no output 'y'"),
        ((X,), (replace(Y, shape=(-1, 3)),), "output 'y': shape [-1, 3] does not fit [-1, 2]"),
        ((X,), (replace(Y, shape=(-1,)),), "output 'y': shape [-1] does not fit [-1, 2]"),
    ],
)
def test_the_contract_of_a_pair(
    hub_inputs: tuple[TensorSpec, ...], hub_outputs: tuple[TensorSpec, ...], problem: str | None
) -> None:
    assert pair_problem(_contract((X,), (Y,)), _contract(hub_inputs, hub_outputs)) == problem


async def test_a_certificate_of_something_else_refuses_the_bundle(hub: Hub, tmp_path: Path) -> None:
    hub_bundle, edge = pair(tmp_path)
    await hub.releases.accept(hub_bundle)
    other = certificate(edge=b"another file")
    (edge / "certificates" / "x.json").write_bytes(other.to_json())
    error = await refused(hub.releases.accept(edge, force=True))
    assert error.code == "certificate/other"
    assert "another file" in error.sentence


async def test_an_expired_certificate_is_left_out(hub: Hub, tmp_path: Path) -> None:
    hub_bundle, edge = pair(tmp_path)
    await hub.releases.accept(hub_bundle)
    when = datetime.datetime(2026, 10, 15, tzinfo=datetime.UTC)
    old = certificate(expires_at=when)
    (edge / "certificates" / "old.json").write_bytes(old.to_json())
    await hub.releases.accept(edge)
    assert f"certificates/digits/1/{old.id}.json" not in hub.repository.targets()


async def test_a_start_signs_again_what_the_database_holds(hub: Hub, tmp_path: Path) -> None:
    found = await hub.releases.accept(bundle(tmp_path / "b"))
    await hub.store.close()
    shutil.rmtree(hub.data / "tuf")
    shutil.rmtree(hub.data / "keys")
    releases = await hub.open()
    assert found.index_target not in hub.repository.targets()
    await releases.reconcile()
    assert found.index_target in hub.repository.targets()


class FailingStore(Store):
    """A store whose power goes before or after the transaction of a release."""

    before = True

    async def write(self, work: Callable[[Connection], T]) -> T:
        if not self.before:
            await super().write(work)
        raise PowerCut


async def test_a_crash_anywhere_leaves_a_complete_release_or_none(hub: Hub, tmp_path: Path) -> None:
    """Cut between any two operations on the disk, then around the row; then another bundle."""
    hub_bundle, edge = pair(tmp_path)
    await hub.releases.accept(hub_bundle)
    await hub.store.close()
    start = hub.data
    for operations in itertools.count():
        hub.data = tmp_path / f"case-{operations}"
        shutil.copytree(start, hub.data)
        hub.disk.left = None
        releases = await hub.open()
        hub.disk.left = operations
        try:
            await releases.accept(edge)
            hub.disk.left = None
            break
        except PowerCut:
            pass
        await hub.store.close()
        hub.disk.left = None
        releases = await hub.open()
        assert [r.model for r in await releases.list()] == ["digits-hub"]
        # The number may be signed for the bundle that was lost: it goes to whoever comes next.
        other = bundle(tmp_path / f"other-{operations}", model="digits", version="3.0.0")
        assert (await releases.accept(other)).number == 1
        assert (await releases.accept(edge)).number == 2
        await _check_complete(hub)
        await hub.store.close()
        shutil.rmtree(hub.data)
    assert operations > 15
    await _check_complete(hub)


@pytest.mark.parametrize("before", [True, False])
async def test_a_crash_around_the_row_leaves_a_complete_release_or_none(
    hub: Hub, tmp_path: Path, before: bool
) -> None:
    path = bundle(tmp_path / "b")
    failing = await FailingStore.open(f"sqlite:///{hub.data}/hub.db")
    assert isinstance(failing, FailingStore)
    failing.before = before
    blobs = Blobs(hub.data / "blobs", hub.disk)
    with pytest.raises(PowerCut):
        await Releases(
            failing,
            blobs,
            hub.repository,
            reports=hub.reports,
            load=Hub.load,
            clock=lambda: NOW,
        ).accept(path)
    await failing.close()
    assert len(await hub.releases.list()) == (0 if before else 1)
    assert (await hub.releases.accept(path)).number == 1
    await _check_complete(hub)


async def _check_complete(hub: Hub) -> None:
    rows = await hub.store.read(lambda c: c.execute(schema.release.select()).all())
    for row in rows:
        target = release_index.index_target(row.model, row.number)
        info = hub.repository.targets()[target]
        signed = hub.data / "tuf" / "targets" / info.get_prefixed_paths()[0]
        assert signed.read_bytes() == row.index_document.encode()
        assert hub.reports.read(row.bundle_sha256) == PAGE
        for file in release_index.parse(signed.read_bytes()).files.values():
            assert (hub.data / "blobs" / "sha256" / file.sha256).stat().st_size == file.bytes


async def test_two_at_a_time_get_two_numbers(hub: Hub, tmp_path: Path) -> None:
    paths = [bundle(tmp_path / v, version=v) for v in ("1.0.0", "1.1.0", "1.2.0")]
    found = await asyncio.gather(*(hub.releases.accept(path) for path in paths))
    assert sorted(r.number for r in found) == [1, 2, 3]


async def test_a_database_that_takes_no_row_is_named(hub: Hub, tmp_path: Path) -> None:
    await hub.store.write(
        lambda c: c.exec_driver_sql("CREATE TRIGGER full BEFORE INSERT ON release "
                                    "BEGIN SELECT RAISE(ABORT, 'no room'); END")
    )  # fmt: skip
    with pytest.raises(StoreFailed, match="no room"):
        await hub.releases.accept(bundle(tmp_path / "b"))
    assert list(await hub.releases.list()) == []


async def test_the_committed_digits_become_releases_and_the_broken_one_does_not(
    hub: Hub, digits: Path
) -> None:
    """On the hub's real engine."""
    releases = Releases(
        hub.store,
        Blobs(hub.data / "blobs", hub.disk),
        hub.repository,
        reports=hub.reports,
        load=Launcher(threads=1).open_apart,
    )
    built = digits / "bundles"
    for name in ("digits-hub-1.0.0", "digits-1.0.0", "digits-1.1.0"):
        assert not (await releases.accept(built / name)).forced
    error = await refused(releases.accept(built / "broken" / "digits-1.2.0"))
    assert error.code == "self-test/failed"
    assert error.figures["fp32"]["agreement"] < 0.5
