"""The Python beside a recipe: functions that it names as ``nets.py:edge``.

What they raise is theirs: it is told in one sentence with file and line, and the exception
itself is kept as its cause, for ``fogline-models --traceback``.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fogline_models.errors import BadInput, MissingExtra
from fogline_protocol import documents


def is_function(name: str) -> bool:
    """Return whether a recipe means a function by this name, rather than a file or a folder."""
    file, colon, _ = name.partition(":")
    return bool(colon) and file.endswith(".py")


def load(folder: Path, name: str, key: str, *, passed: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return the function called ``file.py:function`` of a recipe's folder.

    The folder is loaded as a package of its own, so its files may import each other. The
    function is returned so that calling it raises ``BadInput`` for whatever goes wrong in it,
    and for arguments that it does not take.

    Args:
        folder: of the recipe.
        name: as the recipe has it.
        key: where the recipe has it, for the error.
        passed: what it is called with by position, for the error.

    Raises:
        BadInput: there is no such file or function, or importing the file fails.
    """
    file, colon, function = name.partition(":")
    stem = file.removesuffix(".py")
    if not (colon and file.endswith(".py") and stem.isidentifier() and function.isidentifier()):
        raise BadInput(f"{key}: {name!r} must name a function as file.py:function")
    if not (folder / file).is_file():
        raise BadInput(f"{key}: there is no {file} beside the recipe, in {folder}")
    found = getattr(_module(folder, stem, key), function, None)
    if not callable(found):
        raise BadInput(f"{key}: {file} has no function {function}")
    hook: Callable[..., Any] = found

    def call(*arguments: object, **named: object) -> Any:
        _check_arguments(hook, arguments, named, f"{key}: {name}", passed)
        try:
            return hook(*arguments, **named)
        except (BadInput, MissingExtra):
            raise
        # Foreign code ends here: whatever it raises is the recipe's, not ours.
        except Exception as error:
            raise BadInput(f"{key}: {name} raised {_told(error, folder)}") from error

    return call


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every Python file of a recipe's folder, by its path in it."""
    return hashed(files(folder))


def hashed(found: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of every file, by its name."""
    return {name: documents.sha256_of_file(path) for name, path in found.items()}


def files(folder: Path) -> dict[str, Path]:
    """Return every Python file of a recipe's folder and of the packages in it, by path in it."""
    found = {path.name: path for path in sorted(folder.glob("*.py"))}
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        if not inner.is_symlink():  # which could lead back
            found |= {f"{inner.name}/{name}": path for name, path in files(inner).items()}
    return found


def reads(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the files that a recipe says its functions read, by path in its folder.

    Raises:
        BadInput: a name fits none.
    """
    found: dict[str, Path] = {}
    for name in names:
        places = [folder / name] if Path(name).is_absolute() else sorted(folder.glob(name))
        inside = [
            path
            for place in places
            for path in (sorted(place.rglob("*")) if place.is_dir() else [place])
            if path.is_file()
        ]
        if not inside:
            raise BadInput(f"reads: there is no file {name!r} in {folder}")
        found |= {os.path.relpath(path, folder): path for path in inside}
    return found


def _module(folder: Path, stem: str, key: str) -> Any:
    # Keeps apart two families that are called alike, and one from what it was before an edit:
    # a step's facts name the code that is on the disk, so that is the code to run.
    known = json.dumps([str(folder.resolve()), digests(folder)])
    where = documents.sha256(known.encode())[:8]
    package = f"fogline_family_{folder.resolve().name}_{where}"
    if package not in sys.modules:
        spec = importlib.util.spec_from_loader(package, loader=None, is_package=True)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    importlib.invalidate_caches()  # the file may be younger than what was listed last
    try:
        return importlib.import_module(f"{package}.{stem}")
    except (BadInput, MissingExtra):
        raise
    except Exception as error:  # importing runs it
        raise BadInput(f"{key}: {stem}.py cannot be imported: {_told(error, folder)}") from error


def _check_arguments(
    hook: Callable[..., Any],
    arguments: tuple[object, ...],
    named: dict[str, object],
    where: str,
    passed: tuple[str, ...],
) -> None:
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        return  # written in C: it says itself what it takes
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        names = passed or ("...",) * len(arguments)
        given = ", ".join([*names, *(f"{name}=..." for name in named)])
        called = f"({given})" if given else "nothing"
        raise BadInput(f"{where}{signature} is called with {called}: {error}") from None


def _told(error: Exception, folder: Path) -> str:
    """Return an exception's type, first line, and the last place in the recipe's own files."""
    said = (str(error).strip() or "without a message").splitlines()[0]
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().parent == folder.resolve()
    ]
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {said}{at}"
