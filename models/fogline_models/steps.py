"""Steps of a build: kept by content, so that a build goes on where it stopped.

A step is known by its *facts*: everything that determines what it makes, such as digests of
what it reads, options, versions of tools. What it made before from the same facts is taken as
it is, if every file still has its digest; otherwise it is made in a hidden folder and renamed
into place, so a step is whole or absent, and two builds at once do not disturb each other.

    CACHE/<step>/<key>/...             what the step made
    CACHE/<step>/<key>/step.json       its facts, and the digest of every file
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType

from fogline_models.errors import BadInput, MissingExtra
from fogline_protocol import documents

Say = Callable[[str], None]
Facts = Mapping[str, object]  # JSON-ready

RECORD = "step.json"
CACHE = "FOGLINE_MODELS_CACHE"


def default_cache() -> Path:
    """Return where steps are kept: $FOGLINE_MODELS_CACHE, or below the user's cache folder."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fogline-models"


def code(*modules: ModuleType) -> dict[str, str]:
    """Return the digest of each module's source, by name: a fact of what it makes."""
    return {
        module.__name__: documents.sha256_of_file(Path(str(module.__file__))) for module in modules
    }


def tools(*packages: str, extra: str) -> dict[str, str]:
    """Return the installed version of each package, by name: a fact of what it makes.

    Raises:
        MissingExtra: one is not installed; it names the extra of fogline that brings it.
    """
    try:
        return {name: metadata.version(name) for name in packages}
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

    def expect(self, count: int) -> None:
        """Announce how many more steps there will be, so that each can say which one it is."""
        self._total += count

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
        text = json.dumps(facts, sort_keys=True)
        target = self._cache / step / documents.sha256(text.encode())[:32]
        if step not in self._again and (damage := self._damage(target)) is None:
            self._say(f"{at}: done before")
            return target
        if step not in self._again and damage:
            self._say(f"{at}: what was kept is damaged ({damage}), made again")
        self._say(at)
        started = self._clock()
        with self._unfinished(target, step) as folder:
            do(folder, lambda line: self._say(f"{at}: {line}"))
            files = {
                path.relative_to(folder).as_posix(): documents.sha256_of_file(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            record = json.dumps({"facts": facts, "files": files}, indent=2, sort_keys=True)
            (folder / RECORD).write_text(record + "\n", encoding="utf-8")
        self._say(f"{at}: {self._clock() - started:.1f} s")
        return target

    def _damage(self, target: Path) -> str | None:
        """Return None if the step is kept intact, else what is wrong; empty if it is absent."""
        try:
            files = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
            for name, digest in files.items():
                if documents.sha256_of_file(target / name) != digest:
                    return f"{name} has changed"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing" if target.is_dir() else ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{RECORD}: {error}"
        return None

    @contextlib.contextmanager
    def _unfinished(self, target: Path, step: str) -> Iterator[Path]:
        folder = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            yield folder
            _place(folder, target)
        except OSError as error:
            hint = (
                ": free some space, or name another place with --cache"
                if error.errno == errno.ENOSPC
                else ""
            )
            raise BadInput(f"{step}: {error.filename or target}: {error.strerror}{hint}") from None
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # damaged, or asked for again
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another build made it meanwhile, from the same facts.
