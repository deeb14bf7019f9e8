"""Lines of Python's standard library, each token with the kind that ``tokenize`` gives it.

A module is one scene and in one split; a line that is in two modules is the first one's.
"""

import io
import keyword
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers

from fogline_models.data import Items

KINDS = ("keyword", "name", "number", "operator", "string", "comment")
LENGTH = 24  # tokens, the two special ones included
MODULES = 280
LINES = {"training": 16, "calibration": 2, "evaluation": 3}  # of each module
_KIND = {
    tokenize.NUMBER: "number",
    tokenize.OP: "operator",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
}


def pre_tokenizer():
    """Return what cuts a line into words and single marks; the nets' tokenizer uses it, too."""
    return pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])


def make() -> dict[str, Items]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if path.stat().st_size < 40_000
        and not {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        & {*path.relative_to(root).parts}
    )
    found: dict[str, list[tuple[str, int, list[int]]]] = {name: [] for name in LINES}
    seen: set[str] = set()
    for scene, name in enumerate(names[:: max(1, len(names) // MODULES)]):
        where = zlib.crc32(name.encode()) % 4
        split = ("training", "training", "calibration", "evaluation")[where]
        new = [each for each in lines((root / name).read_bytes()) if each[0] not in seen]
        order = np.random.default_rng(scene).permutation(len(new))[: LINES[split]]
        for text, kinds in (new[at] for at in order):
            if text not in seen:
                seen.add(text)
                found[split].append((text, scene, kinds))
    return {name: items(parts) for name, parts in found.items()}


def lines(source: bytes) -> Iterator[tuple[str, list[int]]]:
    """Yield lines of a module that stand for themselves, with the kind of every piece."""
    try:
        code = source.decode()
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
        return
    by_line: dict[int, list[tokenize.TokenInfo]] = {}
    torn = set()  # lines that a string spans
    for token in tokens:
        if token.start[0] != token.end[0]:
            torn |= {*range(token.start[0], token.end[0] + 1)}
        by_line.setdefault(token.start[0], []).append(token)
    cut = pre_tokenizer()
    for number, line in enumerate(code.splitlines(), 1):
        if number in torn or not line.isascii():
            continue
        kind_at: dict[int, str] = {}
        for token in by_line.get(number, ()):
            kind = _KIND.get(token.type, "name")
            if token.type == tokenize.NAME and keyword.iskeyword(token.string):
                kind = "keyword"
            kind_at.update(dict.fromkeys(range(token.start[1], token.end[1]), kind))
        pieces = cut.pre_tokenize_str(line)
        if 4 <= len(pieces) <= LENGTH - 2 and all(start in kind_at for _, (start, _) in pieces):
            yield line, [KINDS.index(kind_at[start]) for _, (start, _) in pieces]


def items(parts: list[tuple[str, int, list[int]]]) -> Items:
    labels = np.full((len(parts), LENGTH), -100)
    for row, (_, _, kinds) in enumerate(parts):
        labels[row, 1 : 1 + len(kinds)] = kinds
    return Items(
        {},
        labels,
        np.array([scene for _, scene, _ in parts]),
        np.array(["short" if len(kinds) < 10 else "long" for _, _, kinds in parts]),
        raw={"text": np.array([text for text, _, _ in parts])},
        sampling="lines of Python's standard library, a module is a scene",
    )
