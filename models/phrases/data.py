"""Which snippet belongs to which split, and where snippets come from: the files of this machine.

Nothing is downloaded. The text is that of installed packages, of Debian and of Python, and the
kind of a snippet is that of the file it was cut from. Always true here:

- a package belongs to one split only, with everything of it; packages of one Debian source are
  one package, and Python's ``pygments`` is Debian's ``python3-pygments``;
- the text of one kind from one package is one *scene*: written by the same people, often from one
  template;
- vendored copies do not leak: a snippet of another split that shares a line of some length with
  a snippet of training is left out;
- what is drawn from a package depends on its own files alone, so one more package moves nothing
  in the others.

Another machine has other packages and so other figures; the same machine has the same digests.
"""

import gzip
import hashlib
import importlib.metadata
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_models.data import UNSTATED, Items
from fogline_models.errors import BadInput

KINDS = ("python", "c-c++", "perl", "shell", "markup", "manual", "changelog", "guide")

CHARACTERS = 160  # of a snippet, at most
MIN_CHARACTERS = 40
FILES = 12  # of one kind from one package
SNIPPETS = 8  # of one file
READ_BYTES = 16_384  # of a file: enough to draw from, and no trap in a huge one
MIN_BYTES = 400
SHARED_LINE = 24  # characters of a line that make it more than an accident in two packages

# Shares of the packages; the rest is for evaluation.
TRAINING_SHARE, CALIBRATION_SHARE = 0.55, 0.27
MOST = {"training": 1500, "calibration": 150, "evaluation": 150}  # snippets of a kind
MOST_PACKAGES = 60  # of a kind: every Debian package has a changelog
LEAST = {"training": 8, "calibration": 3, "evaluation": 3}  # packages of a kind
SELF_TEST = 32
SAMPLING = "a random snippet of a random package, kinds in equal parts where packages allow"

DPKG = Path("/var/lib/dpkg")
OURS = "fogline"  # changes with every commit

_SUFFIXES = {
    ".py": "python",
    ".h": "c-c++", ".hpp": "c-c++", ".cuh": "c-c++", ".c": "c-c++", ".cc": "c-c++", ".cpp": "c-c++",
    ".pl": "perl", ".pm": "perl",
    ".sh": "shell",
    ".xml": "markup", ".html": "markup", ".htm": "markup", ".svg": "markup",
    ".md": "guide", ".rst": "guide",
}  # fmt: skip
_INTERPRETERS = {"sh": "shell", "bash": "shell", "dash": "shell", "perl": "perl"}
_SCRIPTS = ("postinst", "preinst", "postrm", "prerm")  # that Debian runs around an installation
_PROGRAMS = ("/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/etc/init.d/")
_DOCUMENTS = "/usr/share/doc/"
_MANUALS = "/usr/share/man/man"
_GUIDES = ("README", "NEWS", "FAQ", "HACKING", "TODO")
_METADATA = ".dist-info/METADATA"  # headers, an empty line, then what the package's page shows
_NEEDED = (
    "a Debian or Ubuntu system with its documentation, man pages, perl and some -dev packages, "
    "and the workshop's Python packages"
)


@dataclass(frozen=True, slots=True)
class File:
    """One file of an installed package."""

    package: str
    name: str  # the same on every machine that has it
    path: str


@dataclass(frozen=True, slots=True)
class Snippet:
    """Some consecutive lines of a file."""

    text: str
    kind: str
    package: str
    lines: frozenset[str]  # the longer ones, whole, white space collapsed


def make() -> Mapping[str, Items]:
    """Return every set of the family.

    Raises:
        BadInput: too few packages are installed here; says of which kind.
    """
    splits = assigned(
        [snippet for kind, files in found().items() for snippet in drawn(kind, files)]
    )
    for name, least in LEAST.items():
        for kind in KINDS:
            here = {snippet.package for snippet in splits[name] if snippet.kind == kind}
            if len(here) < least:
                raise BadInput(
                    f"data: {name} has text of kind {kind} from {len(here)} installed packages, "
                    f"{least} are needed: this family wants {_NEEDED}"
                )
    sets = {name: items(snippets) for name, snippets in splits.items()}
    return {**sets, "self_test": sets["training"].rows(slice(SELF_TEST))}


def items(snippets: Iterable[Snippet]) -> Items:
    """Return snippets as a split, in an order that means nothing."""
    order = sorted(snippets, key=lambda snippet: _digest("order", snippet.text))
    return Items(
        inputs={},
        labels=np.array([KINDS.index(snippet.kind) for snippet in order], np.int64),
        scenes=np.array([f"{snippet.package}, {snippet.kind}" for snippet in order], np.str_),
        slices=np.array([snippet.kind for snippet in order], np.str_),
        raw={"text": np.array([snippet.text for snippet in order], np.str_)},
        sampling=SAMPLING if order else UNSTATED,
    )


def assigned(snippets: Iterable[Snippet]) -> Mapping[str, list[Snippet]]:
    """Return the snippets by split, kinds in equal parts, none that training has seen. Pure."""
    waiting: dict[tuple[str, str], dict[str, list[Snippet]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for snippet in snippets:
        waiting[split_of(snippet.package), snippet.kind][snippet.package].append(snippet)
    texts: set[str] = set()
    lines: set[str] = set()
    splits: dict[str, list[Snippet]] = {}
    for split, most in MOST.items():
        splits[split] = []
        for kind in KINDS:
            packages = waiting[split, kind]
            # One of every package before a second of any: no large one takes over.
            turns = itertools.zip_longest(*(packages[name] for name in sorted(packages)))
            fresh = (
                snippet
                for snippet in itertools.chain.from_iterable(turns)
                if snippet is not None and snippet.text not in texts and not snippet.lines & lines
            )
            for snippet in itertools.islice(fresh, most):
                texts.add(snippet.text)
                splits[split].append(snippet)
        lines |= {line for snippet in splits[split] for line in snippet.lines}
    return splits


def split_of(package: str) -> str:
    """Return the split of a package; it depends on the name alone. Pure."""
    share = int(_digest("split", package)[:12], 16) / 16**12
    if share < TRAINING_SHARE:
        return "training"
    return "calibration" if share < TRAINING_SHARE + CALIBRATION_SHARE else "evaluation"


def drawn(kind: str, files: Iterable[File]) -> Iterator[Snippet]:
    """Yield snippets of files of one kind: some from some packages of every split."""
    packages: dict[str, list[File]] = defaultdict(list)
    for file in files:
        packages[file.package].append(file)
    left = dict.fromkeys(MOST, MOST_PACKAGES)
    for package in sorted(packages, key=lambda name: _digest("turn", name)):
        split = split_of(package)
        if left[split]:
            left[split] -= 1
            yield from _drawn(kind, packages[package])


def _drawn(kind: str, files: Iterable[File]) -> Iterator[Snippet]:
    taken = 0
    for file in sorted(files, key=lambda file: _digest("file", file.name)):
        text = _text(file.path)
        if text is not None:
            yield from cut(text, kind, file.package, int(_digest("cut", file.name)[:12], 16))
            taken += 1
            if taken == FILES:
                return


def cut(text: str, kind: str, package: str, seed: int) -> Iterator[Snippet]:
    """Yield some snippets of a text, at random, without overlap. Pure."""
    lines = [line.rstrip() for line in text.splitlines()]
    starts = [at for at, line in enumerate(lines) if line.strip()]
    rng = np.random.default_rng(seed)
    taken: set[int] = set()
    count = 0
    for at in rng.permutation(starts)[: 3 * SNIPPETS].tolist():
        end, length = at, 0
        while end < len(lines) and length < CHARACTERS:
            length += len(lines[end]) + 1
            end += 1
        snippet = "\n".join(lines[at:end])[:CHARACTERS].rstrip()
        if len(snippet.replace(" ", "")) < MIN_CHARACTERS or not taken.isdisjoint(range(at, end)):
            continue
        taken.update(range(at, end))
        whole = (" ".join(line.split()) for line in lines[at:end])
        yield Snippet(
            snippet, kind, package, frozenset(line for line in whole if len(line) >= SHARED_LINE)
        )
        count += 1
        if count == SNIPPETS:
            return


def found() -> Mapping[str, list[File]]:
    """Return the files of every kind that installed packages own."""
    files: dict[str, list[File]] = {kind: [] for kind in KINDS}
    for package, name, path in itertools.chain(_of_debian(), _of_python()):
        kind = kind_of(name, path)
        if kind is not None:
            files[kind].append(File(package, name, path))
    return files


def kind_of(name: str, path: str) -> str | None:
    """Return what a file is by its name, or by its first line if it may be a program."""
    _, _, file = name.rpartition("/")
    _, dot, suffix = file.rpartition(".")
    if dot and f".{suffix}" in _SUFFIXES:
        return _SUFFIXES[f".{suffix}"]
    if name.startswith(_MANUALS):
        return "manual"
    if name.startswith(_DOCUMENTS) and file.startswith("changelog"):
        return "changelog"
    if name.endswith(_METADATA) or (name.startswith(_DOCUMENTS) and file.startswith(_GUIDES)):
        return "guide"
    if suffix in _SCRIPTS or (not dot and name.startswith(_PROGRAMS)):
        return _interpreter(path)
    return None


def _of_debian() -> Iterator[tuple[str, str, str]]:
    """Yield the package, the name and the path of every file of a Debian package."""
    sources = _sources()
    for listed in sorted((DPKG / "info").glob("*.list")):
        name = listed.stem.partition(":")[0]
        package = canonical(sources.get(name, name))
        for script in _SCRIPTS:
            path = listed.with_suffix(f".{script}")
            if path.is_file():
                yield package, f"{name}.{script}", str(path)
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            yield package, line, line


def _sources() -> Mapping[str, str]:
    """Return the source package of every Debian package that is built from one of another name."""
    try:
        status = (DPKG / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for entry in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source): (\S+)", entry, re.MULTILINE))
        if "Source" in fields:
            found[fields["Package"]] = fields["Source"]
    return found


def _of_python() -> Iterator[tuple[str, str, str]]:
    """Yield the package, the name and the path of every file of an installed distribution."""
    for distribution in importlib.metadata.distributions():
        package = canonical(distribution.metadata["Name"] or "")
        record = distribution.read_text("RECORD")
        if package == OURS or record is None:
            continue
        place = distribution.locate_file("")
        for line in record.splitlines():
            name = line.partition(",")[0]
            yield package, name, f"{place}/{name}"


def canonical(name: str) -> str:
    """Return a package's name as Debian and Python agree on it. Pure."""
    name = re.sub(r"[-_.]+", "-", name.lower())
    return re.sub(r"^(python3?|py)-", "", name)


def _interpreter(path: str) -> str | None:
    try:
        with Path(path).open("rb") as file:
            first = file.readline(80).decode("ascii", errors="replace")
    except OSError:
        return None
    if not first.startswith("#!"):
        return None
    return next(
        (_INTERPRETERS[word] for word in re.findall(r"\w+", first) if word in _INTERPRETERS), None
    )


def _text(path: str) -> str | None:
    """Return the beginning of a file, or None if it is missing, short or no text."""
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            content = file.read(READ_BYTES)
    except (OSError, EOFError):
        return None
    text = content.decode("utf-8", errors="replace")
    # A character may be cut in two at the end; anything else undecodable is another encoding.
    if len(content) < MIN_BYTES or "\0" in text or "\ufffd" in text[:-1]:
        return None
    return text.partition("\n\n")[2] if path.endswith(_METADATA) else text


def _digest(purpose: str, text: str) -> str:
    return hashlib.sha256(f"{purpose}\0{text}".encode()).hexdigest()
