"""Traces of single requests: which are taken, what they hold, and the files they go to.

``Plan`` decides and is pure; ``Tracer`` is what a server holds. A request that is traced carries
its ``Trace`` in a context variable, so that the batcher finds it without the calls in between
knowing. Files are written by a thread of their own, from a queue that is bounded: when the disk
is slow or full, traces are lost and counted, never requests.

Source: triton-inference-server/server docs/user_guide/trace.md.
"""

import dataclasses
import errno
import itertools
import json
import logging
import os
import queue
import re
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from fogline_protocol.errors import BadRequest, Unsupported
from fogline_protocol.settings import TraceChanges, TraceSettings

log = logging.getLogger("fogline.tracing")

REFUSAL = "traces are not offered here: start this hub with --trace-dir DIR, where to write them"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_WAITING = 4096  # traces between a request and its file
MAX_BYTES = 256 << 20  # of all traces of one run
MAX_COUNT = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a model's requests is traced, and where it goes."""

    level: str = "OFF"  # or TIMESTAMPS
    rate: int = 1000  # every so many-th request
    count: int = -1  # so many more; -1: no limit
    log_frequency: int = 0  # so many traces per file, which then are numbered; 0: one file
    file: str = "trace.json"  # in the operator's directory

    def texts(self) -> TraceSettings:
        """Return the settings as the protocol carries them."""
        return {
            "trace_file": [self.file],
            "trace_level": [self.level],
            "trace_rate": [str(self.rate)],
            "trace_count": [str(self.count)],
            "log_frequency": [str(self.log_frequency)],
        }


_FIELDS = {
    "trace_level": "level",
    "trace_rate": "rate",
    "trace_count": "count",
    "log_frequency": "log_frequency",
    "trace_file": "file",
}
_LOWEST = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}


def read(name: str, values: Sequence[str]) -> str | int:
    """Return the value that the texts of one setting stand for.

    Raises:
        BadRequest: there is no such setting or no such value.
        Unsupported: level TENSORS.
    """
    if name not in _FIELDS:
        raise BadRequest(f"there is no trace setting {name!r}, known are {', '.join(_FIELDS)}")
    if name == "trace_level":
        levels = set(values)
        if "TENSORS" in levels:
            raise Unsupported("trace_level TENSORS is not offered here, TIMESTAMPS is")
        if levels not in ({"OFF"}, {"TIMESTAMPS"}):
            raise BadRequest(f"trace_level is OFF or TIMESTAMPS, got {list(values)}")
        return levels.pop()
    if len(values) != 1:
        raise BadRequest(f"{name} has one value, got {list(values)}")
    (text,) = values
    if name == "trace_file":
        if not FILE_NAME.fullmatch(text):
            raise BadRequest(
                f"trace_file is the name of a file in the hub's --trace-dir: letters, digits, "
                f"'.', '_' and '-', not starting with '.', got {text[:120]!r}"
            )
        return text
    if not re.fullmatch(r"-?[0-9]{1,10}", text) or not _LOWEST[name] <= int(text) <= MAX_COUNT:
        raise BadRequest(
            f"{name} is a whole number from {_LOWEST[name]} to {MAX_COUNT}, got {text[:120]!r}"
        )
    return int(text)


@dataclass(slots=True)
class _Scope:
    """What was set for all models or for one, and how far its sampling is."""

    own: dict[str, str | int] = field(default_factory=dict)  # by setting
    seen: int = 0  # requests since the last change
    taken: int = 0  # traces since ``trace_count`` was set


class Plan:
    """Which requests are traced. A model without settings of its own shares those of all."""

    def __init__(self) -> None:
        self._all = _Scope()
        self._models: dict[str, _Scope] = {}

    def settings(self, model: str) -> Settings:
        """Return what holds for a model, for all models if ``model`` is empty."""
        scope = self._models.get(model, self._all)
        own = {_FIELDS[name]: value for name, value in {**self._all.own, **scope.own}.items()}
        found = dataclasses.replace(Settings(), **own)  # type: ignore[arg-type]
        if found.count > 0:
            return dataclasses.replace(found, count=max(0, found.count - scope.taken))
        return found

    def change(self, model: str, changes: TraceChanges) -> None:
        """Change what holds for a model, or for all: everything that is named, or nothing.

        Raises:
            BadRequest: an unknown setting or an impossible value.
            Unsupported: level TENSORS.
        """
        for name, values in changes.items():  # an unknown name is one, with or without value
            read(name, values if values is not None else Settings().texts().get(name, ()))
        scope = self._models.get(model) if model else self._all
        scope = scope or _Scope()
        for name, values in changes.items():
            if values is None:
                scope.own.pop(name, None)
            else:
                scope.own[name] = read(name, values)
        if "trace_count" in changes:
            scope.taken = 0
        if changes:
            scope.seen = 0
        if model and scope.own:
            self._models[model] = scope
        elif model:
            self._models.pop(model, None)

    def take(self, model: str) -> Settings | None:
        """Count a request of a model; return where its trace goes, or None: it is not traced."""
        scope = self._models.get(model, self._all)
        found = self.settings(model)
        if found.level == "OFF" or found.count == 0:
            return None
        scope.seen += 1
        if scope.seen % found.rate:
            return None
        scope.taken += 1
        return found


@dataclass(slots=True, eq=False)
class Trace:
    """The moments of one request, in seconds of ``time.monotonic()``."""

    settings: Settings
    id: int
    model: str
    version: str
    request_id: str
    started: float
    queued: float = 0.0
    moments: list[tuple[float, float, float, float]] = field(default_factory=list)

    def ran(self, queued: float, started: float, joined: float, ran: float, done: float) -> None:
        """Note a run of an engine; a request that is split has several."""
        self.queued = min(self.queued or queued, queued)
        self.moments.append((started, joined, ran, done))

    def records(self, ended: float) -> str:
        """Return the trace as Triton writes it: records of a JSON list, without its brackets."""
        names = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")
        stamps = [("REQUEST_START", self.started)]
        if self.moments:
            stamps.append(("QUEUE_START", self.queued))
            first, last = min(self.moments), max(self.moments)
            stamps += zip(names, (*first[:2], *last[2:]), strict=True)
        stamps.append(("REQUEST_END", ended))
        head = {
            "id": self.id,
            "model_name": self.model,
            "model_version": int(self.version),
            "request_id": self.request_id,
        }
        records: list[object] = [head]
        records += (
            {"id": self.id, "timestamps": [{"name": name, "ns": round(at * 1e9)}]}
            for name, at in stamps
        )
        return ",\n".join(map(json.dumps, records))


# The trace of the request that this task answers; the batcher takes it along.
CURRENT: ContextVar[Trace | None] = ContextVar("fogline_trace", default=None)


class Tracer:
    """Takes the traces of a hub and has them written into ``directory``."""

    def __init__(self, directory: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._plan = Plan()
        self._ids = itertools.count(1)
        self._files = Files(directory, max_bytes)

    def settings(self, model: str) -> TraceSettings:
        """Return what holds for a model, for all models if ``model`` is empty."""
        return self._plan.settings(model).texts()

    def change(self, model: str, changes: TraceChanges) -> TraceSettings:
        """Change what holds for a model, or for all; see ``Plan.change``."""
        self._plan.change(model, changes)
        return self.settings(model)

    def begin(self, model: str, version: str, request_id: str, started: float) -> Trace | None:
        """Return the trace of a request that starts now, or None: it is not traced."""
        settings = self._plan.take(model)
        if settings is None:
            return None
        return Trace(settings, next(self._ids), model, version, request_id, started)

    def finish(self, trace: Trace, ended: float) -> None:
        """Have a trace written; never waits and never fails."""
        self._files.put(trace.settings, trace.records(ended))

    def close(self) -> None:
        """Write what waits, and stop. Blocks for as long as that takes."""
        self._files.close()


class Files:
    """Writes traces into a directory, from a thread of its own.

    A file is a whole JSON list after every write.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._left = max_bytes
        self._lost = 0
        self._waiting: queue.Queue[tuple[Settings, str] | None] = queue.Queue(MAX_WAITING)
        self._written: dict[str, int] = {}  # traces by name of their setting
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="fogline-traces", daemon=True)
        self._thread.start()

    def put(self, settings: Settings, records: str) -> None:
        """Queue one trace; it is lost if too many wait."""
        try:
            self._waiting.put_nowait((settings, records))
        except queue.Full:
            self._lose(f"{MAX_WAITING} of them wait for the disk")

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()
        if self._lost:
            log.warning("%d traces were lost", self._lost)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            settings, records = item
            size = len(records) + 4
            if size > self._left:
                self._lose("the traces of this run have reached their limit")
                continue
            try:
                self._write(settings, records)
            except OSError as error:
                self._lose(error.strerror or str(error))
            else:
                self._left -= size
                self._trouble = ""

    def _write(self, settings: Settings, records: str) -> None:
        done = self._written.get(settings.file, 0)
        name, first = settings.file, done == 0
        if settings.log_frequency:
            name = f"{name}.{done // settings.log_frequency}"
            first = done % settings.log_frequency == 0
        # What an earlier run left under this name is replaced, a link is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_TRUNC if first else 0)
        descriptor = os.open(self._directory / name, flags, 0o640)
        try:
            size = os.fstat(descriptor).st_size
            data = f"{',' if size else '['}\n{records}\n]\n".encode()
            start = max(0, size - 3)  # over the end of the list
            if os.pwrite(descriptor, data, start) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(descriptor, start)
            if size:
                os.pwrite(descriptor, b"\n]\n", start)
            raise
        finally:
            os.close(descriptor)
        self._written[settings.file] = done + 1

    def _lose(self, why: str) -> None:
        self._lost += 1
        if why != self._trouble:  # once per kind of trouble, not once per request
            self._trouble = why
            log.warning("traces are lost: %s", why)
