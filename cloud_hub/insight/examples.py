"""Keeps the hard examples that devices let the hub keep, and gives them back for training.

    a request's rows ─► offer ─► queue, bounded ─► writer ─► files (inputs) ─► rows (answers)
                          └ never waits: what does not fit is dropped and counted    │
    quota and retention, the oldest first ◄──────────────────────────────────────────┘

Consent is the device's mark (``fogline_protocol.examples``); nothing comes here without it. The
same content of one tenant and model is kept once, with the ways in which it came. Files are written
before the rows that name them, and deleted after: a kill loses what was queued, and leaves at most
a file without a row, which the next start removes.

A disk that is full costs examples, never answers: they are counted with the reason, and ``trouble``
says so until one is kept again.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cloud_hub.errors import StoreFailed
from cloud_hub.insight import example_codec, example_rows, quota
from cloud_hub.insight.example_codec import ExampleDamaged, Facts
from cloud_hub.insight.example_files import ExampleFiles, Group, on_disk
from cloud_hub.insight.example_rows import Deleted, Kept, Row, Selection
from cloud_hub.metrics import ExampleMetrics
from cloud_hub.store.store import Store
from fogline_protocol.examples import EdgeAnswer
from fogline_protocol.tensors import BYTES, Array

log = logging.getLogger("fogline.examples")

QUEUE_BYTES = 32 << 20  # waiting for the disk; tens of camera frames, thousands of small inputs
BATCH_ROWS = 256  # in one transaction
GATHER_S = 0.5  # what comes meanwhile shares one; a kill loses as much
TIDY_S = 600.0  # between two looks for what is too old
READ_BYTES = 4 << 20  # of inputs in memory at once, while they are exported
DAY_S = 86400.0
_OWN = "fogline."  # outputs that are the hub's, not the model's


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept, and how long."""

    quota_bytes: int  # of disk, all together; 0: nothing new is kept
    retention_s: float  # since it last came; 0: until the quota pushes it out


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """The rows of one answered request."""

    tenant: str
    hub_model: str
    hub_sha256: str
    inputs: Mapping[str, Array]
    edge: EdgeAnswer
    outputs: Mapping[str, Array]
    batched: bool  # the first dimension is the row
    at: float
    bytes: int

    @property
    def rows(self) -> int:
        return len(self.edge.scores)


class Examples:
    """All examples of one hub. Used on one event loop; ``async with`` writes what was offered."""

    def __init__(
        self,
        store: Store,
        files: ExampleFiles,
        bounds: Bounds,
        metrics: ExampleMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.bounds = bounds
        self.trouble = ""  # why the last examples were not kept
        self._store = store
        self._files = files
        self._metrics = metrics
        self._clock = clock
        self._queue: deque[_Offer] = deque()
        self._queued_bytes = 0
        self._held: dict[Group, int] = {}  # bytes, by group
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()  # a batch is full, or somebody waits for it
        self._queued_rows = 0
        self._offered = self._done = 0  # offers, ever
        self._progress = asyncio.Event()  # another one each time that something is done
        self._changing = asyncio.Lock()  # rows and files change together
        self._closing = False
        self._writer: asyncio.Task[None] | None = None
        metrics.watch(lambda: sum(self._held.values()), lambda: self._queued_bytes)

    async def __aenter__(self) -> "Examples":
        """Read what is there and start keeping."""
        self._held = await self._store.read(example_rows.held)
        self._writer = asyncio.create_task(self._write_forever(), name="examples")
        self._writer.add_done_callback(self._ended)
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Write what was offered, then stop."""
        self._closing = True
        self._wake.set()
        self._hurry.set()
        if self._writer is not None:
            await asyncio.wait([self._writer])

    @property
    def accepting(self) -> bool:
        """Whether anything is kept at all."""
        return self.bounds.quota_bytes > 0 and not self._closing

    def offer(
        self,
        tenant: str,
        model: str,
        sha256: str,
        inputs: Mapping[str, Array],
        edge: EdgeAnswer,
        outputs: Mapping[str, Array],
        *,
        batched: bool,
    ) -> None:
        """Keep the rows of an answered request if there is room; returns at once.

        ``model`` and ``sha256`` are the hub's, of what computed ``outputs``.
        """
        own = {name: array for name, array in outputs.items() if not name.startswith(_OWN)}
        size = sum(map(_size, (*inputs.values(), *own.values(), *edge.tensors().values())))
        rows = len(edge.scores)
        if size > min(QUEUE_BYTES, self.bounds.quota_bytes):
            self._metrics.dropped("too_large", rows)
            return
        if self._queued_bytes + size > QUEUE_BYTES:
            self._metrics.dropped("queue_full", rows)
            return
        self._queued_bytes += size
        # Outputs may be a few rows of a large batch, which they would hold on to.
        own = {name: array.copy() for name, array in own.items()}
        self._queue.append(
            _Offer(tenant, model, sha256, inputs, edge, own, batched, self._clock(), size)
        )
        self._offered += 1
        self._queued_rows += rows
        self._wake.set()
        if self._queued_rows >= BATCH_ROWS or self._queued_bytes >= QUEUE_BYTES // 4:
            self._hurry.set()

    async def settled(self) -> None:
        """Wait until what has been offered so far is kept or dropped."""
        target = self._offered
        while self._done < target and not (self._writer is None or self._writer.done()):
            self._hurry.set()
            await self._progress.wait()

    async def summary(self, tenant: str | None) -> list[Kept]:
        """Return what is kept, of one tenant or of all.

        Raises:
            StoreFailed: the database cannot be read.
        """
        found = await self._store.read(partial(example_rows.summary, tenant=tenant))
        held = self._held  # answers included
        return [
            replace(one, bytes=held.get(Group(one.tenant, one.model), one.bytes)) for one in found
        ]

    async def layouts(self, tenant: str, selection: Selection) -> dict[str, int]:
        """Return how many examples are selected, by the layout of their inputs.

        Raises:
            StoreFailed: the database cannot be read.
        """
        return await self._store.read(
            partial(example_rows.layouts, tenant=tenant, selection=selection)
        )

    async def frames(
        self, tenant: str, selection: Selection, layouts: Sequence[str]
    ) -> AsyncIterator[bytes]:
        """Return the selected examples as frames, and one that ends them.

        A page at a time is in memory. The newest sighting speaks for an example that came in
        several ways; what was deleted meanwhile or is damaged is left out, and counted at the end.

        Raises:
            StoreFailed: the database cannot be read.
            OSError: the disk cannot be read.
        """
        after, left_out = 0, 0
        while True:
            page, last = await self._store.read(
                partial(
                    example_rows.page,
                    tenant=tenant,
                    selection=selection,
                    layouts=layouts,
                    after=after,
                )
            )
            if last is None:
                break
            after = last
            for part in _portions(page):
                frames = await asyncio.to_thread(self._read, part)
                left_out += len(part) - len(frames)
                for one in frames:
                    yield one
        yield example_codec.frame({"end": True, "left_out": left_out})

    async def delete(self, tenant: str | None, selection: Selection) -> Deleted:
        """Forget what is selected, also what is still queued; of one tenant or of all.

        Raises:
            StoreFailed: the database cannot take it; nothing is deleted.
            OSError: a file cannot be removed; its row is gone, and the next start tries again.
        """
        await self.settled()
        async with self._changing:
            deleted, gone = await self._store.write(
                partial(example_rows.delete_selected, tenant=tenant, selection=selection)
            )
            self._held = await self._store.read(example_rows.held)
            await asyncio.to_thread(self._remove, gone)
        if deleted.examples:
            log.info("%d examples were deleted on request", deleted.examples)
        return deleted

    async def tidy(self) -> None:
        """Delete what is older than the retention, and what a smaller quota leaves no room for.

        Raises:
            StoreFailed, OSError: see ``delete``.
        """
        async with self._changing:
            if self.bounds.retention_s:
                before = Selection(until=self._clock() - self.bounds.retention_s)
                deleted, gone = await self._store.write(
                    partial(example_rows.delete_selected, tenant=None, selection=before)
                )
                if deleted.sightings:
                    self._held = await self._store.read(example_rows.held)
                    await asyncio.to_thread(self._remove, gone)
                    self._metrics.evicted("retention", deleted.examples)
            if self.bounds.quota_bytes:  # without one nothing is added, and nothing goes for it
                await self._make_room()

    async def _write_forever(self) -> None:
        try:
            await self._sweep()
        except (StoreFailed, OSError) as error:
            self._note_trouble(error)
        tidied = -TIDY_S
        while self._queue or not self._closing:
            if time.monotonic() - tidied >= TIDY_S:
                tidied = time.monotonic()
                try:
                    await self.tidy()
                except (StoreFailed, OSError) as error:
                    self._note_trouble(error)
            if self._queue:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_S):
                        await self._hurry.wait()
                await self._write(self._take())
            elif not self._closing:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TIDY_S):
                        await self._wake.wait()

    def _ended(self, writer: asyncio.Task[None]) -> None:
        if not self._closing or writer.cancelled() or writer.exception() is not None:
            error = None if writer.cancelled() else writer.exception()
            log.error("the writer of examples has ended", exc_info=error)
            self.trouble = "the part that writes examples has failed, see the hub's log"
            self._closing = True  # nothing is accepted any more
        self._progress.set()

    def _take(self) -> list[_Offer]:
        batch = [self._queue.popleft()]
        rows = batch[0].rows
        while self._queue and rows + self._queue[0].rows <= BATCH_ROWS:
            batch.append(self._queue.popleft())
            rows += batch[-1].rows
        self._queued_rows -= rows
        if self._queued_rows < BATCH_ROWS and not self._closing:
            self._hurry.clear()
        return batch

    async def _write(self, batch: Sequence[_Offer]) -> None:
        total = sum(offer.rows for offer in batch)
        reason = ""
        async with self._changing:
            rows, failed = await asyncio.to_thread(self._put, batch)
            if failed is not None:
                reason = "disk"
                self._note_trouble(failed)
            try:
                new, grown = await self._store.write(partial(example_rows.note, rows=rows))
            except StoreFailed as error:
                # Their files may be others', too: what nobody names goes at the next start.
                self._note_trouble(error)
                rows, reason, new, grown = [], "database", 0, {}
            for group, size in grown.items():
                self._held[group] = self._held.get(group, 0) + size
            self._metrics.kept(new, len(rows) - new)
            if len(rows) < total:
                self._metrics.dropped(reason, total - len(rows))
            elif self.trouble:
                log.info("examples are kept again")
                self.trouble = ""
            try:
                await self._make_room()
            except (StoreFailed, OSError) as error:
                self._note_trouble(error)
        self._queued_bytes -= sum(offer.bytes for offer in batch)
        self._done += len(batch)
        self._progress.set()
        self._progress = asyncio.Event()

    def _put(self, batch: Sequence[_Offer]) -> tuple[list[Row], OSError | None]:
        """Write the inputs of offers; what was written until the disk refused, and why."""
        rows: list[Row] = []
        for offer in batch:
            for at in range(offer.rows):
                inputs = _row(offer.inputs, at if offer.batched else None)
                packed = example_codec.pack(inputs)
                group = Group(offer.tenant, offer.edge.model)
                facts = _facts(offer, at, example_codec.sha256_of(packed))
                try:
                    self._files.put(group, facts.sha256, packed)
                except OSError as error:
                    return rows, error
                rows.append(
                    Row(
                        group,
                        facts,
                        example_codec.layout_of(inputs),
                        on_disk(len(packed)),
                        example_codec.pack(_row(offer.edge.outputs, at)),
                        example_codec.pack(_row(offer.outputs, at if offer.batched else None)),
                    )
                )
        return rows, None

    async def _make_room(self) -> None:
        """Delete the oldest of those that hold too much, until all keep within the quota."""
        while too_much := quota.surplus(self._held, self.bounds.quota_bytes):
            gone, freed = await self._store.write(partial(example_rows.evict, too_much=too_much))
            if not freed:  # the sums were off: look again
                self._held = await self._store.read(example_rows.held)
                return
            for group, size in freed.items():
                self._held[group] -= size
                if self._held[group] <= 0:
                    del self._held[group]
            self._metrics.evicted("quota", len(gone))
            await asyncio.to_thread(self._remove, gone)

    async def _sweep(self) -> None:
        """Delete files that no row names."""
        if not await asyncio.to_thread(self._files.directory.is_dir):
            return
        groups = {group.folder: group for group in await self._store.read(example_rows.held)}
        for folder in await asyncio.to_thread(lambda: list(self._files.groups())):
            group = groups.get(folder)
            known: set[str] = set()
            if group is not None:
                known = await self._store.read(partial(example_rows.names, group=group))
            removed = await asyncio.to_thread(self._files.sweep, folder, known)
            if removed:
                log.info("%d examples that a kill left unfinished were removed", removed)

    def _remove(self, gone: Sequence[tuple[Group, str]]) -> None:
        for group, sha256 in gone:
            self._files.remove(group, [sha256])

    def _read(self, rows: Sequence[Row]) -> list[bytes]:
        frames = []
        for row in rows:
            try:
                inputs = self._files.read(row.group, row.facts.sha256)
            except ExampleDamaged as error:
                log.warning("an example is left out: %s", error)
            else:
                frames.append(example_codec.example_frame(row.facts, inputs, row.edge, row.hub))
        return frames

    def _note_trouble(self, error: Exception) -> None:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if self.trouble != text:
            log.error("examples are not being kept: %s", text)
        self.trouble = text


def _portions(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Cut rows into parts that may be in memory at once."""
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += row.disk_bytes
        if size >= READ_BYTES:
            yield part
            part, size = [], 0
    yield part


def _size(array: Array) -> int:
    if array.dtype == BYTES:
        return sum(len(element) for element in array.flat)
    return array.nbytes


def _row(arrays: Mapping[str, Array], at: int | None) -> Mapping[str, Array]:
    """Return one row of the arrays, or, of a model without batches, all of them."""
    if at is None:
        return arrays
    # Not array[at], which of a list of texts is no array.
    return {name: array[at : at + 1].reshape(array.shape[1:]) for name, array in arrays.items()}


def _facts(offer: _Offer, at: int, sha256: str) -> Facts:
    edge = offer.edge
    return Facts(
        sha256=sha256,
        at=offer.at,
        device=edge.device,
        source=edge.sources[at],
        reason=edge.reasons[at],
        propensity=float(edge.propensities[at]),
        score=float(edge.scores[at]),
        release=edge.release,
        edge_sha256=edge.sha256,
        hub_model=offer.hub_model,
        hub_sha256=offer.hub_sha256,
        count=1,
    )
