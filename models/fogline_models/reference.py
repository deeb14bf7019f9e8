"""Prints a recipe with every key: what it means, its default, and an example where it is needed.

What a key means is the comment at its field, read from the source of ``recipe.py`` and
``gates.py``, and its default is the field's: neither is written a second time. A line that opens
with ``#key = `` holds a default, so that uncommenting it changes nothing; ``# `` opens words.
"""

import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args, get_type_hints

from fogline_models import data
from fogline_models.forms import FORMS
from fogline_models.gates import Gates
from fogline_models.recipe import Certificate, Data, Recipe, ReleaseRecipe, Source, Task
from fogline_protocol.score import FUNCTIONS

WIDTH = 100
OPENS = """
A recipe of fogline-models: rename what is an example to what is yours, and build it with
"fogline-models build FOLDER". Lines like "#key = value" hold defaults: uncomment one to change it.
"""
CHOICES: Mapping[tuple[type, str], Collection[str]] = {
    (Recipe, "task"): get_args(Task),
    (Recipe, "targets"): ("x86_64", "x86_64+vnni", "aarch64", "tensorrt"),
    (ReleaseRecipe, "variants"): ("fp32", *FORMS),
    (ReleaseRecipe, "score"): tuple(FUNCTIONS),
}
HUB = 'model = "pumps-hub"\nversion = "1.0.0"\nsource = { onnx = "hub.onnx" }'


def text() -> str:
    """Return the recipe, as TOML."""
    npz = inspect.cleandoc(data.__doc__ or "").split("\n\n")[1:3]
    parts = [
        *_words(" ".join(OPENS.split())),
        "",
        *_keys(
            Recipe,
            {"family": "pumps", "task": "tabular-classification", "labels": ["ok", "worn", "dry"]},
            without=("data", "release", "gates", "certificate", "folder"),
        ),
        *_table("data", _comment(Recipe, "data"), _keys(Data, {}, without=("files",))),
        *_table(
            "data.files",
            f"{_comment(Data, 'files')} {npz[0]}",
            [f"# {line}".rstrip() for line in npz[1].splitlines()],
        ),
        *(f'{split} = "{split}.npz"' for split in ("training", "evaluation", "calibration")),
        "",
        *_table("gates", _comment(Recipe, "gates"), _keys(Gates, {})),
        *_table("certificate", _comment(Recipe, "certificate"), _keys(Certificate, {})),
        *_words(f"Releases: {_comment(Recipe, 'release')}."),
        "[[release]]",
        HUB,
        "",
        "[[release]]",
        *_keys(
            ReleaseRecipe,
            {"model": "pumps", "version": "1.0.0", "escalates_to": "pumps-hub"},
            without=("source",),
        ),
        *_table(
            "release.source",
            _comment(ReleaseRecipe, "source"),
            _keys(Source, {"onnx": "edge.onnx"}),
        ),
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


def comments(table: type) -> dict[str, str]:
    """Return what the source of a dataclass says of each of its fields: above it or beside it."""
    source = textwrap.dedent(inspect.getsource(table))
    found: dict[str, str] = {}
    above: list[str] = []
    said: dict[int, str] = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    names = {field.name for field in dataclasses.fields(table)}
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("#"):
            above.append(said[number])
            continue
        name = re.match(r"    (\w+): ", line)
        if name and name[1] in names:
            beside = [said[number]] if number in said else []
            found[name[1]] = " ".join([*above, *beside])
        above = []
    return found


def _comment(table: type, key: str) -> str:
    return comments(table)[key]


def _table(name: str, comment: str, lines: Collection[str]) -> Iterator[str]:
    """Yield a table's head, with what it is for, and its lines."""
    yield from _words(comment)
    if name == "data.files":  # its keys are splits, so that its lines are words
        yield from lines
        yield f"[{name}]"
    else:
        yield f"[{name}]"
        yield from lines


def _keys(table: type, given: Mapping[str, object], without: Collection[str] = ()) -> list[str]:
    """Return the keys of a table, each below what it means; those in ``given`` have a value."""
    said, hints = comments(table), get_type_hints(table)
    lines: list[str] = []
    for field in dataclasses.fields(table):
        if field.name in without:
            continue
        known = CHOICES.get((table, field.name))
        lines += _words(said[field.name])
        if known:
            lines += _words(f"known are {', '.join(known)}")
        default = _default(field)
        inner = [
            part
            for part in get_args(hints[field.name])
            if isinstance(part, type) and dataclasses.is_dataclass(part)
        ]
        if field.name in given:
            lines.append(f"{field.name} = {_toml(given[field.name])}")
        elif inner:
            lines += _inner(field.name, inner[0])
        elif default is None:
            lines.append(f"# {field.name} = ...: not set, {_kind(hints[field.name])}")
        else:
            lines.append(f"#{field.name} = {_toml(default)}")
        lines.append("")
    return lines


def _inner(name: str, table: type) -> list[str]:
    """Return what a table of a release holds that is not there by default."""
    if table in (Gates, Certificate):
        return [f"# [release.{name}]: keys as in [{name}]"]
    keys = "; ".join(f"{key}: {said}" for key, said in comments(table).items())
    return list(_words(f"[release.{name}]: {keys}"))


def _default(field: "dataclasses.Field[Any]") -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        assert not value  # only empty ones are defaults
        return "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)  # texts, numbers and truth values are spelt alike


def _kind(hint: Any) -> str:
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return "a number" if float in kinds or int in kinds else "a path"


def _words(said: str) -> Iterator[str]:
    """Yield words as comments, with a large letter at their beginning, if that is a word."""
    if re.match(r"[a-z]+[ ,:]", said):
        said = said[0].upper() + said[1:]
    for line in textwrap.wrap(said, WIDTH - 2, break_on_hyphens=False):
        yield f"# {line}"
