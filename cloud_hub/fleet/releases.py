"""Accepts bundles: checks, tries, numbers, stores, signs. What comes out is a release.

    read → known already? → version free? → parent → pair → self-test here → blobs → sign → row

The row is last, so a crash leaves a complete release or none: a blob without a row is harmless,
and so is a signed index, because devices are only ever sent to releases that have a row, and
the next bundle to be accepted takes the number over. Accepting the same bundle again returns
the same release and repairs whatever is missing of it.

Numbers are integers per model, from 1, because the Open Inference Protocol's versions are.
"""

import asyncio
import functools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy import Connection, Row

from cloud_hub.errors import ModelRefused
from cloud_hub.fleet import certificates, golden, workshop_report
from cloud_hub.fleet.artifacts import BlobRefused, Blobs
from cloud_hub.fleet.golden import Finding, Load
from cloud_hub.fleet.trust import CERTIFICATES, Repository
from cloud_hub.fleet.workshop_report import ReportPages, WorkshopReport
from cloud_hub.store import schema
from cloud_hub.store.store import Store
from fogline_protocol import hardware, release, release_index
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import ROOT, Bundle, BundleDirectory, BundleRefused, Pairing
from fogline_protocol.release_index import IndexedFile, ReleaseIndex
from fogline_protocol.tensors import TensorSpec

log = structlog.get_logger(__name__)

CARD = "README.md"


class ReleaseRefused(Exception):
    """The bundle does not become a release, or there is no such release.

    ``code`` is stable: ``bundle/refused``, ``bundle/version-taken``, ``bundle/name``,
    ``parent/model``, ``parent/version``, ``pair/unknown``, ``pair/contract``,
    ``self-test/failed``, ``self-test/unusable``, ``certificate/other``, ``release/unknown``.
    Only ``self-test/failed`` can be forced.
    """

    def __init__(
        self, code: str, sentence: str, figures: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence
        self.figures = dict(figures or {})  # by variant


@dataclass(frozen=True, slots=True)
class Release:
    """A bundle that was accepted."""

    model: str
    number: int
    version: str
    bundle_sha256: str
    bundle: Bundle
    accepted_at: float  # seconds since 1970
    forced: bool  # it did not pass its self-test here
    size_bytes: int
    self_test: Mapping[str, Mapping[str, float]]  # figures by variant

    @property
    def escalates_to(self) -> Pairing | None:
        """Return the hub's model that answers what this one does not."""
        return self.bundle.escalates_to

    @property
    def index_target(self) -> str:
        """Return the TUF target path that devices are told."""
        return release_index.index_target(self.model, self.number)


class Releases:
    """The releases of this hub. The only writer of blobs and of the signed indexes."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        repository: Repository,
        *,
        reports: ReportPages,
        load: Load,
        providers: Collection[str] = ("CPUExecutionProvider",),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Join what a release is made of.

        Args:
            store: the database.
            blobs: where the bytes go.
            repository: signs the indexes and certificates.
            reports: where the workshop's pages go.
            load: opens an artifact on the hub's own engine, for the self-test.
            providers: what that engine runs on.
            clock: returns seconds since 1970.
        """
        self._store = store
        self._blobs = blobs
        self._repository = repository
        self._reports = reports
        self._load = load
        self._providers = tuple(providers)
        self._clock = clock
        self._accepting = asyncio.Lock()  # two at a time would take the same number
        self.accepted = asyncio.Event()  # set after each one; whoever follows them clears it

    async def accept(self, directory: Path, *, force: bool = False) -> Release:
        """Make the bundle in ``directory`` a release, or return the one it already is.

        Args:
            directory: of the bundle; must not change meanwhile.
            force: accept it although its self-test fails here.

        Raises:
            ReleaseRefused: with a code, a sentence and the self-test's figures.
            KeyMissing: the hub cannot sign.
            StoreFailed: the database cannot take it.
            OSError: the disk is full or fails.
        """
        async with self._accepting:
            try:
                read = await asyncio.to_thread(release.read, directory)
            except BundleRefused as error:
                raise ReleaseRefused("bundle/refused", str(error)) from None
            before = await self._store.read(lambda c: _before(c, read.bundle))
            said = await asyncio.to_thread(workshop_report.read, directory)
            if read.sha256 in before.known:
                number = before.known[read.sha256]
                await self._complete(read, number)
                await self._add_report(read, number, said)
                return await self.show(read.bundle.model, number)
            problem = _refusal(read.bundle, before)
            if problem is not None:
                raise problem
            offered = self._offered(read, before.hub)
            findings = await self._self_test(read, force=force)
            number = before.highest + 1
            index = await self._complete(read, number, offered)
            await asyncio.to_thread(self._keep_page, read.sha256, said.page)
            now = self._clock()
            row = {
                "model": read.bundle.model,
                "number": number,
                "version": read.bundle.version,
                "bundle_sha256": read.sha256,
                "escalates_to": read.bundle.escalates_to and read.bundle.escalates_to.model,
                "escalates_to_sha256": read.bundle.escalates_to
                and read.bundle.escalates_to.bundle_sha256,
                "accepted_at": now,
                "forced": any(f.problem for f in findings.values()) or not findings,
                "size_bytes": sum(file.bytes for file in index.files.values()),
                "document": (directory / ROOT).read_text(encoding="utf-8"),
                "index_document": index.to_json().decode(),
                "self_test": json.dumps({v: dict(f.figures) for v, f in findings.items()}),
                "report": said.document,
            }

            def insert(connection: Connection) -> None:
                connection.execute(schema.release.insert().values(**row))
                for certificate in offered:
                    certificates.attach(connection, read.bundle.model, number, certificate, now)

            await self._store.write(insert)
            self.accepted.set()
            log.info(
                "release accepted", model=read.bundle.model, number=number, forced=row["forced"]
            )
            return await self.show(read.bundle.model, number)

    async def list(self, model: str | None = None) -> Sequence[Release]:
        """Return the releases, by model, the highest number first."""
        table = schema.release
        query = sa.select(*_COLUMNS).order_by(table.c.model, table.c.number.desc())
        if model is not None:
            query = query.where(table.c.model == model)
        return await self._store.read(lambda c: [_release(row) for row in c.execute(query)])

    async def show(self, model: str, number: int | None = None) -> Release:
        """Return one release; without a number the highest of the model.

        Raises:
            ReleaseRefused: there is none; the sentence says which there are.
        """
        known = await self.list(model)
        for found in known:
            if number in (None, found.number):
                return found
        numbers = ", ".join(str(found.number) for found in reversed(known)) or "none"
        raise ReleaseRefused(
            "release/unknown",
            f"there is no release {number if number is not None else ''} of {model!r}; "
            f"there are: {numbers}".replace("  ", " "),
        )

    def file(self, found: Release, name: str) -> Path:
        """Return the blob that holds the file ``name`` of a release, e.g. its model card.

        Raises:
            KeyError: the bundle has no such file.
        """
        return self._blobs.path(found.bundle.files[name].sha256)

    async def report(self, found: Release) -> Mapping[str, Any]:
        """Return the workshop's report on a release; it may hold anything, or nothing."""
        r = schema.release.c
        query = sa.select(r.report).where(r.model == found.model, r.number == found.number)
        return workshop_report.parse(
            await self._store.read(lambda c: c.execute(query).scalar_one())
        )

    async def report_page(self, found: Release) -> bytes:
        """Return the same as the HTML page that came with the bundle, or nothing."""
        return await asyncio.to_thread(self._reports.read, found.bundle_sha256)

    def has_report_page(self, found: Release) -> bool:
        """Return whether a page came with the bundle."""
        return self._reports.path(found.bundle_sha256).is_file()

    async def index(self, found: Release) -> ReleaseIndex:
        """Return every file of a release with the digests of its blocks."""
        r = schema.release.c
        query = sa.select(r.index_document).where(r.model == found.model, r.number == found.number)
        text = await self._store.read(lambda c: c.execute(query).scalar_one())
        return release_index.parse(text.encode())

    async def reconcile(self) -> None:
        """Sign every release that has a row. Call it once at every start."""
        table = schema.release
        query = sa.select(table.c.model, table.c.number, table.c.index_document)
        rows = await self._store.read(lambda c: c.execute(query).all())
        add = {
            release_index.index_target(row.model, row.number): row.index_document.encode()
            for row in rows
        }
        await asyncio.to_thread(self._repository.publish, add, now=self._clock())

    async def _complete(
        self,
        read: BundleDirectory,
        number: int,
        offered: Collection[Certificate] = (),
    ) -> ReleaseIndex:
        """Store every file and sign the index. What is there already is only looked at."""
        try:
            files = await asyncio.to_thread(self._keep, read)
        except BlobRefused as error:
            raise ReleaseRefused(
                "bundle/refused", f"it changed while it was read: {error}"
            ) from None
        index = ReleaseIndex(read.bundle.model, number, read.bundle.version, read.sha256, files)
        add = {release_index.index_target(index.model, number): index.to_json()}
        for certificate in offered:
            target = release_index.certificate_target(index.model, number, certificate.id)
            add[target] = certificate.to_json()
        await asyncio.to_thread(self._repository.publish, add, now=self._clock())
        return index

    async def _add_report(self, read: BundleDirectory, number: int, said: WorkshopReport) -> None:
        """Take a report where there was none. One that is there is what was accepted: it stays."""
        if not self._reports.path(read.sha256).is_file():
            await asyncio.to_thread(self._keep_page, read.sha256, said.page)
        if said.document:
            r = schema.release.c
            change = (
                schema.release.update()
                .where(r.model == read.bundle.model, r.number == number, r.report == "")
                .values(report=said.document)
            )
            await self._store.write(lambda c: c.execute(change))

    def _keep_page(self, bundle_sha256: str, page: bytes) -> None:
        if page:
            self._reports.keep(bundle_sha256, page)

    def _keep(self, read: BundleDirectory) -> Mapping[str, IndexedFile]:
        wanted = {name: file.sha256 for name, file in read.bundle.files.items()}
        wanted[ROOT] = read.sha256
        return {name: self._blobs.put(read.file(name), sha256) for name, sha256 in wanted.items()}

    def _offered(self, read: BundleDirectory, hub: Bundle | None) -> tuple[Certificate, ...]:
        """Return the bundle's certificates that hold; one about something else is an error."""
        now = self._clock()
        offered: tuple[Certificate, ...] = ()
        for certificate in read.certificates:
            if certificate.expires_at.timestamp() <= now:
                log.warning(
                    "expired certificate left out", id=certificate.id, model=read.bundle.model
                )
                continue
            problem = certificates.objection(certificate, read.bundle, hub, now)
            if problem is not None:
                raise ReleaseRefused(
                    "certificate/other", f"certificate {certificate.id} in the bundle: {problem}"
                )
            offered = (*offered, certificate)
        return offered

    async def _self_test(self, read: BundleDirectory, *, force: bool) -> Mapping[str, Finding]:
        try:
            findings = await golden.run(read, self._load, self._providers)
        except ModelRefused as error:
            raise ReleaseRefused("self-test/unusable", str(error)) from None
        problems = golden.problems(read.bundle, findings, hardware.this_machine())
        if not findings:
            problems = [f"no variant of it runs on this hub ({', '.join(self._providers)})"]
        if problems and not force:
            raise ReleaseRefused(
                "self-test/failed",
                "; ".join(problems),
                {name: finding.figures for name, finding in findings.items()},
            )
        return findings


@dataclass(frozen=True, slots=True)
class _Before:
    """What the hub knew when a bundle arrived."""

    known: Mapping[str, int]  # release number by bundle digest, of this model
    versions: Mapping[str, int]  # release number by semantic version
    highest: int
    hub: Bundle | None  # the bundle that this one escalates to
    hub_releases: tuple[str, ...]  # digests of the releases of that model
    parent: tuple[str, int, str] | None  # model, number and version of what it was made from


def pair_problem(edge: Bundle, hub: Bundle) -> str | None:
    """Say why ``hub`` cannot answer what ``edge`` escalates, or None if it can.

    The hub gets the very inputs of the edge and must give the output that is decided on.
    """
    theirs = {spec.name: spec for spec in hub.inputs}
    for spec in edge.inputs:
        if spec.name not in theirs:
            return f"{hub.model} has no input {spec.name!r}"
        if (problem := _unfit(spec, theirs.pop(spec.name))) is not None:
            return f"input {spec.name!r}: {problem}"
    if theirs:
        return f"{hub.model} also needs the input {min(theirs)!r}"
    outputs = {spec.name: spec for spec in hub.outputs}
    for spec in edge.outputs:
        if spec.name not in outputs:
            return f"{hub.model} has no output {spec.name!r}"
        if (problem := _unfit(outputs[spec.name], spec)) is not None:
            return f"output {spec.name!r}: {problem}"
    if edge.labels and hub.labels and edge.labels != hub.labels:
        return "the two name their classes differently"
    return None


def _unfit(given: TensorSpec, wanted: TensorSpec) -> str | None:
    """Say why a tensor like ``given`` does not fit where ``wanted`` is expected."""
    if given.datatype != wanted.datatype:
        return f"{given.datatype} does not fit {wanted.datatype}"
    if len(given.shape) != len(wanted.shape) or any(
        want not in (-1, have) for have, want in zip(given.shape, wanted.shape, strict=True)
    ):
        return f"shape {list(given.shape)} does not fit {list(wanted.shape)}"
    return None


def _refusal(bundle: Bundle, before: _Before) -> ReleaseRefused | None:
    """Return what speaks against a new bundle, as far as documents tell."""
    if bundle.model == CERTIFICATES:
        return ReleaseRefused("bundle/name", f"no model can be called {CERTIFICATES!r}")
    if bundle.version in before.versions:
        return ReleaseRefused(
            "bundle/version-taken",
            f"{bundle.model} {bundle.version} was accepted as release "
            f"{before.versions[bundle.version]} with another content; give this one another version",
        )
    problem = _parent_problem(bundle, before)
    if problem is not None:
        return problem
    pair = bundle.escalates_to
    if pair is None:
        return None
    if before.hub is None:
        known = ", ".join(sha256[:12] for sha256 in before.hub_releases) or "none"
        return ReleaseRefused(
            "pair/unknown",
            f"it escalates to {pair.model} with the digest {pair.bundle_sha256[:12]}, and of "
            f"{pair.model} this hub has {known}: push that bundle first",
        )
    misfit = pair_problem(bundle, before.hub)
    if misfit is not None:
        return ReleaseRefused("pair/contract", f"it cannot escalate to {pair.model}: {misfit}")
    return None


def _parent_problem(bundle: Bundle, before: _Before) -> ReleaseRefused | None:
    """Return what speaks against a parent that this hub knows; others may be anything."""
    if bundle.parent is None or before.parent is None:
        return None
    model, number, version = before.parent
    named = f"it names {bundle.parent.bundle_sha256[:12]} as its parent, and that is"
    if model != bundle.model:
        return ReleaseRefused(
            "parent/model",
            f"{named} {model}@{number}, a release of another model: name the bundle of "
            f"{bundle.model} that it replaces, or none",
        )
    if version != bundle.parent.version:
        return ReleaseRefused(
            "parent/version",
            f"{named} {model}@{number} with the version {version}, not {bundle.parent.version}: "
            "build it again with the parent's own bundle.json at hand",
        )
    return None


def _before(connection: Connection, bundle: Bundle) -> _Before:
    table = schema.release
    columns = (table.c.number, table.c.version, table.c.bundle_sha256)
    own = connection.execute(sa.select(*columns).where(table.c.model == bundle.model)).all()
    pair = bundle.escalates_to
    hub: Bundle | None = None
    others: tuple[str, ...] = ()
    if pair is not None:
        query = sa.select(table.c.bundle_sha256, table.c.document).where(
            table.c.model == pair.model
        )
        documents = {row.bundle_sha256: row.document for row in connection.execute(query)}
        others = tuple(documents)
        if pair.bundle_sha256 in documents:
            hub = release.parse(documents[pair.bundle_sha256].encode())
    parent = None
    if bundle.parent is not None:
        parents = sa.select(table.c.model, table.c.number, table.c.version).where(
            table.c.bundle_sha256 == bundle.parent.bundle_sha256
        )
        parent = connection.execute(parents).one_or_none()
    return _Before(
        known={row.bundle_sha256: row.number for row in own},
        versions={row.version: row.number for row in own},
        highest=max((row.number for row in own), default=0),
        hub=hub,
        hub_releases=others,
        parent=tuple(parent) if parent is not None else None,
    )


# Not the index and not the report, which may be large and are wanted of one release at a time.
_COLUMNS = [c for c in schema.release.c if c.name not in ("index_document", "report")]


@functools.lru_cache(maxsize=1024)  # releases do not change, and every page lists them
def _bundle(document: str) -> Bundle:
    return release.parse(document.encode())


def _release(row: Row[Any]) -> Release:
    return Release(
        model=row.model,
        number=row.number,
        version=row.version,
        bundle_sha256=row.bundle_sha256,
        bundle=_bundle(row.document),
        accepted_at=row.accepted_at,
        forced=row.forced,
        size_bytes=row.size_bytes,
        self_test=json.loads(row.self_test),
    )
