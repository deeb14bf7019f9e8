"""Steps of a build: kept by content, so that a build goes on where it stopped.

A step is known by its *facts*: everything that determines what it makes, such as digests of
what it reads, options, versions of tools. What it made before from the same facts is taken as
it is, if every file still has its digest; otherwise it is made in a hidden folder and renamed
into place, so a step is whole or absent. Of two builds at once that need the same step, one makes
it and the other waits.

    CACHE/<step>/<key>/...             what the step made
    CACHE/<step>/<key>/step.json       its facts, and the digest of every file
    CACHE/<step>/.<key>.lock           held while it is made; a lock ends with its process
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

from fogline_models.errors import BadInput, MissingExtra
from fogline_protocol import documents

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]  # done, of how many, what to say of it
Facts = Mapping[str, object]  # JSON-ready

RECORD = "step.json"
CACHE = "FOGLINE_MODELS_CACHE"
SAY_EVERY_S = 2.0
SILENCE_S, LONGEST_SILENCE_S = 3.0, 32.0  # longer than between two that are said


def default_cache() -> Path:
    """Return where steps are kept: $FOGLINE_MODELS_CACHE, or below the user's cache folder."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fogline-models"


def silent(line: str) -> None:
    """Say nothing."""


def paced(say: Say, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a progress callback that speaks every two seconds at most, and at the end."""
    last = clock()

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        if done >= total or clock() - last >= SAY_EVERY_S:
            last = clock()
            say(f"{note}, {done} of {total}")

    return progress


def code(*modules: ModuleType) -> dict[str, str]:
    """Return the digest of each module's source, by name: a fact of what it makes."""
    return {
        module.__name__: documents.sha256_of_file(Path(str(module.__file__))) for module in modules
    }


def digest(path: Path, key: str) -> str:
    """Return the SHA-256 of a file that the recipe's ``key`` names: a fact of what is made of it.

    Raises:
        BadInput: it cannot be read; names the key.
    """
    try:
        return documents.sha256_of_file(path)
    except OSError as error:
        raise BadInput(f"{key}: {path}: {error.strerror}") from None


def tools(*packages: str, extra: str) -> dict[str, str]:
    """Return the installed version of each package: a fact of what it makes.

    A package and what a step reads may be called alike (``onnx``, ``torch``), so keys say which.

    Raises:
        MissingExtra: one is not installed; it names the extra of fogline that brings it.
    """
    try:
        return {f"version of {name}": metadata.version(name) for name in packages}
    except metadata.PackageNotFoundError as error:
        raise MissingExtra(
            f"this step needs {error.name}, which is not installed: pip install 'fogline[{extra}]'"
        ) from None


class Steps:
    """Runs the steps of one build, or finds them done."""

    def __init__(
        self,
        cache: Path,
        say: Say,
        *,
        again: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep steps in ``cache`` and tell ``say`` of each; those named in ``again`` run anew."""
        self._cache = cache
        self._say = say
        self._again = again
        self._clock = clock
        self._total = 0
        self._begun = 0

    def expect(self, steps: Iterable[str]) -> None:
        """Announce the names of the steps there will be, so that each can say which one it is.

        Raises:
            BadInput: one that was asked for again is none of them.
        """
        planned = list(steps)
        self._total += len(planned)
        for name in sorted(self._again.difference(planned)):
            known = ", ".join(dict.fromkeys(planned))
            raise BadInput(f"again: there is no step {name!r} in this build, only {known}")

    def make(self, title: str, step: str, facts: Facts, do: Callable[[Path, Say], None]) -> Path:
        """Return the folder with what the step makes of its facts.

        Args:
            title: what it is for, for people.
            step: its name.
            facts: everything that determines the result.
            do: makes it in the folder given to it; may report progress.

        Raises:
            BadInput: of ``do``; or the disk is full or cannot be written.
        """
        self._begun += 1
        at = f"[{self._begun}/{max(self._total, self._begun)}] {title}: {step}"
        facts = {"step": step, **facts}
        text = json.dumps(facts, sort_keys=True, default=str)  # dates, which TOML has
        target = self._cache / step / documents.sha256(text.encode())[:32]
        if self._is_done(step, target):
            self._say(f"{at}: done before")
            return target
        with _told(step, target), self._alone(target, at):
            if self._is_done(step, target):  # by the build that we waited for
                self._say(f"{at}: done meanwhile")
                return target
            if step not in self._again and (damage := _damage(target)):
                self._say(f"{at}: what was kept is damaged ({damage}), made again")
            self._say(at)
            started = self._clock()
            with _unfinished(target) as folder, never_silent(self._say, at) as say:
                try:
                    do(folder, say)
                except BadInput as error:
                    named = str(error).startswith(f"{step.split()[0]}: ")
                    where = title if named else f"{title}: {step}"
                    raise type(error)(f"{where}: {error}") from error.__cause__
                record = {"facts": facts, "files": _digests(folder)}
                written = json.dumps(record, indent=2, sort_keys=True, default=str)
                (folder / RECORD).write_text(written + "\n", encoding="utf-8")
        self._say(f"{at}: {self._clock() - started:.1f} s")
        return target

    def _is_done(self, step: str, target: Path) -> bool:
        return step not in self._again and _damage(target) is None

    @contextlib.contextmanager
    def _alone(self, target: Path, at: str) -> Iterator[None]:
        """Hold the step's lock."""
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never removed: whoever waits for a removed lock would not exclude who makes a new one.
        with (target.parent / f".{target.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say(f"{at}: another build is at it, waiting")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def never_silent(say: Say, at: str) -> Iterator[Say]:
    """Yield what a step says its progress with, and say how long it takes where it is silent.

    What torch, optimum and onnxruntime do in one call cannot say how far it is; a BERT takes them
    half a minute. Silence is broken after three seconds, then ever less often: by another thread,
    so ``say`` must bear that.
    """
    started = time.monotonic()
    last, spoken = at, started
    done = threading.Event()

    def told(line: str) -> None:
        nonlocal last, spoken
        last, spoken = f"{at}: {line}", time.monotonic()
        say(last)

    def watch() -> None:
        heard, due, pause = spoken, spoken + SILENCE_S, SILENCE_S
        while not done.wait(max(due - time.monotonic(), 0.0)):
            if heard != spoken:  # it has spoken itself meanwhile
                heard, due, pause = spoken, spoken + SILENCE_S, SILENCE_S
                continue
            with contextlib.suppress(OSError, ValueError):  # a closed pipe is the step's to find
                say(f"{last}, {time.monotonic() - started:.0f} s so far")
            due, pause = due + pause, min(2 * pause, LONGEST_SILENCE_S)

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield told
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def _told(step: str, target: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = ": free some space, or name another place with --cache" if full else ""
        raise BadInput(
            f"{step}: {error.filename or target}: {error.strerror or error}{hint}"
        ) from None


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes the place of ``target``, if the block does not raise.

    The step's lock is held, so what else is unfinished belongs to builds that were killed.
    """
    for left in target.parent.glob(f".{target.name}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        if target.exists():  # damaged, or asked for again
            os.rename(target, folder.with_name(f"{folder.name}.old"))
        os.rename(folder, target)
    finally:
        for left in (folder, folder.with_name(f"{folder.name}.old")):
            shutil.rmtree(left, ignore_errors=True)


def _damage(target: Path) -> str | None:
    """Return None if a step is kept intact, else what is wrong; empty if it is absent."""
    try:
        files = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
        found = _digests(target)
        for name in sorted(files.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if name not in files:
                return f"{name} was added"
            if found[name] != files[name]:
                return f"{name} has changed"
    except FileNotFoundError:
        return f"{RECORD} is missing" if target.is_dir() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD}: {error}"
    return None


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a step, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): documents.sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / RECORD
    }
