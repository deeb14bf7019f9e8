"""The Python beside a recipe: functions that it names as ``nets.py:edge``."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fogline_models.errors import BadInput
from fogline_protocol import documents


def is_function(name: str) -> bool:
    """Return whether a recipe means a function by this name, rather than a file or a folder."""
    file, colon, _ = name.partition(":")
    return bool(colon) and file.endswith(".py")


def load(folder: Path, name: str, key: str) -> Callable[..., Any]:
    """Return the function called ``file.py:function`` of a recipe's folder.

    The folder is loaded as a package of its own, so its files may import each other.

    Args:
        folder: of the recipe.
        name: as the recipe has it.
        key: where the recipe has it, for the error.

    Raises:
        BadInput: there is no such file or function, or importing the file fails.
    """
    file, colon, function = name.partition(":")
    if not colon or not file.endswith(".py") or "/" in file or not function.isidentifier():
        raise BadInput(f"{key}: {name!r} must name a function as file.py:function")
    if not (folder / file).is_file():
        raise BadInput(f"{key}: there is no {file} beside the recipe, in {folder}")
    module = _module(folder, file.removesuffix(".py"), key)
    found = getattr(module, function, None)
    if not callable(found):
        raise BadInput(f"{key}: {file} has no function {function}")
    hook: Callable[..., Any] = found
    return hook


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every Python file of a recipe's folder, by name."""
    return {path.name: documents.sha256_of_file(path) for path in sorted(folder.glob("*.py"))}


def _module(folder: Path, stem: str, key: str) -> Any:
    # The digest of the path keeps two families apart that are called alike.
    where = documents.sha256(str(folder.resolve()).encode())[:8]
    package = f"fogline_family_{folder.resolve().name}_{where}"
    if package not in sys.modules:
        spec = importlib.util.spec_from_loader(package, loader=None, is_package=True)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    try:
        return importlib.import_module(f"{package}.{stem}")
    except (ImportError, SyntaxError) as error:
        raise BadInput(f"{key}: {stem}.py cannot be imported: {error}") from None
