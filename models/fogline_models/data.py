"""Items: the data that models are trained, calibrated and measured on, split by split.

On disk a split is an npz archive:

    input.<name>   [n, ...]   what the model takes
    raw.<name>     [n, ...]   instead, what a Hugging Face folder's pre-processing takes: text, with
                              text_pair if there are two, or image, uint8 [n, height, width, channels]
    label          [n]        class numbers, optional; for a token classifier [n, tokens], with -100
                              where a token has none: padding, special tokens, inner pieces of words
    scene          [n]        items of one scene are copies of one thing, not evidence; optional
    slice          [n]        the group of every item (a writer, a noise level), a text; optional
    <name>         [n, ...]   further arrays of one row per item, such as a hub's answers
    sampling                  how the items were drawn, one text

It is also what ``fogline data export`` writes. Splits must not overlap, or every figure is too
good: they are compared by content, because a copy under another number is a copy.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fogline_models import archive
from fogline_models.errors import BadInput
from fogline_protocol import documents
from fogline_protocol.answers import NO_LABEL
from fogline_protocol.tensors import Array

INPUT, RAW = "input.", "raw."
LABEL, SCENE, SLICE, SAMPLING = "label", "scene", "slice", "sampling"
UNSTATED = "not stated"
KINDS = "biufSU"  # of numpy: what an archive holds without running anything


@dataclass(frozen=True, slots=True)
class Items:
    """One split. All arrays have one row per item."""

    inputs: Mapping[str, Array]  # {name: [n, ...]}
    labels: Array | None = None  # int [n], or [n, tokens] with NO_LABEL where there is none
    scenes: Array = field(default_factory=lambda: np.zeros(0, np.int64))  # [n]; none: all differ
    slices: Array | None = None  # text [n]
    raw: Mapping[str, Array] = field(default_factory=dict)  # {name: [n, ...]}
    extra: Mapping[str, Array] = field(default_factory=dict)  # {name: [n, ...]}
    sampling: str = UNSTATED  # how the items were drawn, for people
    sha256: str = ""  # of the file they were read from

    def __post_init__(self) -> None:
        if not len(self.scenes):
            object.__setattr__(self, "scenes", np.arange(len(self)))

    def __len__(self) -> int:
        first = next(iter((*self.inputs.values(), *self.raw.values())), None)
        return 0 if first is None or first.ndim == 0 else len(first)

    @property
    def independent(self) -> Array:
        """The index of one item per scene, the first, in file order."""
        _, first = np.unique(self.scenes, return_index=True)
        return np.sort(first)

    def rows(self, which: Array | slice) -> "Items":
        """Return some of the items."""

        def cut(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {name: array[which] for name, array in arrays.items()}

        return replace(
            self,
            inputs=cut(self.inputs),
            labels=None if self.labels is None else self.labels[which],
            scenes=self.scenes[which],
            slices=None if self.slices is None else self.slices[which],
            raw=cut(self.raw),
            extra=cut(self.extra),
            sha256="",
        )


def drawn(sampling: str) -> str:
    """Say how items were drawn, or where that is to be stated."""
    if sampling != UNSTATED:
        return sampling
    return f"how they were drawn is not stated: give the items a text {SAMPLING!r} that says it"


def read(path: Path) -> Items:
    """Read a split.

    Raises:
        BadInput: no intact archive, no inputs, or arrays that do not fit together.
    """
    arrays = archive.read(path)
    sampling = arrays.pop(SAMPLING, UNSTATED)

    def named(prefix: str) -> dict[str, Array]:
        return {
            name.removeprefix(prefix): arrays.pop(name)
            for name in sorted(arrays)
            if name.startswith(prefix)
        }

    inputs, raw = named(INPUT), named(RAW)
    if not inputs and not raw:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise BadInput(f"{path}: expected arrays named {INPUT}<name>, found {found}")
    items = Items(
        inputs,
        arrays.pop(LABEL, None),
        arrays.pop(SCENE, np.zeros(0, np.int64)),
        arrays.pop(SLICE, None),
        raw,
        arrays,
        str(sampling),
        documents.sha256_of_file(path),
    )
    check(items, str(path))
    return items


def save(path: Path, items: Items) -> None:
    """Write a split in one step, over an older one; the same items give the same bytes."""
    archive.save(path, _arrays(items))


def digest(items: Items) -> str:
    """Return the SHA-256 of the file that ``save`` makes here of items, whatever they came from."""
    return documents.sha256(archive.to_bytes(_arrays(items), compress=True))


def check(items: Items, what: str) -> None:
    """Check that the arrays of a split fit together.

    Raises:
        BadInput: there are no items, or an array has another number of rows.
    """
    count = len(items)
    arrays = {name: array for name, array in _arrays(items).items() if name != SAMPLING}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise BadInput(f"{what}: {name} must have one row per item, found a single number")
        if array.dtype.kind not in KINDS:
            raise BadInput(
                f"{what}: {name} is of type {array.dtype}: give numbers, or texts of numpy's own"
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if count == 0 or set(lengths.values()) != {count} or items.scenes.ndim != 1:
        raise BadInput(f"{what}: expected one row per item in every array, found {lengths}")
    labels = items.labels
    if labels is not None and (labels.ndim not in (1, 2) or labels.dtype.kind not in "iu"):
        raise BadInput(
            f"{what}: {LABEL} must be whole numbers, [n] or [n, tokens], found {labels.dtype} "
            f"{list(labels.shape)}"
        )


def given(labels: Array) -> Array:
    """Return the class numbers that there are, leaving aside tokens without one: ``[labels]``."""
    return labels[labels != NO_LABEL] if labels.ndim > 1 else labels


def check_labels(
    items: Items, labels: Sequence[str], what: str, *, per_token: bool = False
) -> None:
    """Check that every class number has a name, and that there is one for each answer.

    Raises:
        BadInput: one has not, it is named; or rows are labelled where tokens are told apart, or
            tokens where rows are.
    """
    if items.labels is None:
        return
    if (items.labels.ndim > 1) != per_token:
        wanted = (
            "token-classification takes [n, tokens], with -100 where a token has no label"
            if per_token
            else "only token-classification takes a label for each token, the task is another: "
            "give [n]"
        )
        raise BadInput(f"{what}: {LABEL} is {list(items.labels.shape)}: {wanted}")
    numbers = given(items.labels)
    if not labels or not numbers.size:
        return
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= len(labels):
        raise BadInput(
            f"{what}: class numbers reach from {low} to {high}, but the recipe names "
            f"{len(labels)} labels, 0 to {len(labels) - 1}"
        )


def check_classes(items: Items, what: str) -> None:
    """Check that items to calibrate on are of more than one class, where they are labelled.

    Raises:
        BadInput: they are all of one.
    """
    if items.labels is None:
        return
    numbers = np.unique(given(items.labels))
    if len(numbers) == 1:
        all_of = "all labelled tokens of" if items.labels.ndim > 1 else "all"
        raise BadInput(
            f"{what}: {all_of} {len(items)} items are of class {int(numbers[0])}: calibrate on "
            "items of every class"
        )


def check_alike(
    splits: Mapping[str, Items], vary: Mapping[str, Collection[int]] | None = None
) -> None:
    """Check that splits have the same inputs, and in one form: the first is what others are held to.

    Args:
        splits: by name.
        vary: axes that may be of different sizes, by input; None: all may.

    Raises:
        BadInput: an array is missing, or of another type or shape; says what it must be called.
    """
    first = next(iter(splits))
    wanted = _given(splits[first])
    for name, items in splits.items():
        found = _given(items)
        for array in wanted:
            if array not in found:
                raise BadInput(
                    f"data: split {first} has {array}, and {lacking(f'split {name}', items, array)}"
                )
        for array in found:
            if array not in wanted:
                raise BadInput(
                    f"data: split {name} has {array}, and {lacking(f'split {first}', splits[first], array)}"
                )
            mine, theirs = wanted[array], found[array]
            open_axes = () if vary is None else vary.get(array.removeprefix(INPUT), ())
            same = _type(mine) == _type(theirs) and mine.ndim == theirs.ndim
            if same and vary is not None and array.startswith(INPUT):
                same = all(
                    axis in open_axes or mine.shape[axis] == theirs.shape[axis]
                    for axis in range(1, mine.ndim)
                )
            if not same:
                raise BadInput(
                    f"data: {array} is {_type(mine)} {_rows(mine)} in split {first} and "
                    f"{_type(theirs)} {_rows(theirs)} in split {name}: give both in one form"
                )


def lacking(what: str, items: Items, array: str) -> str:
    """Say that items have no such array, and which of their arrays is only misnamed."""
    bare = array.partition(".")[2]
    others = [f"{INPUT}{bare}", f"{RAW}{bare}", bare]
    there = {**_given(items), **items.extra}
    for other in others:
        if other in there:
            return f"{what} calls it {other}: name the array {array}"
    return f"{what} has no array {array}, only {', '.join(there) or 'nothing'}"


def _given(items: Items) -> dict[str, Array]:
    return {f"{INPUT}{name}": array for name, array in items.inputs.items()} | {
        f"{RAW}{name}": array for name, array in items.raw.items()
    }


def _type(array: Array) -> str:
    return "texts" if array.dtype.kind in "US" else str(array.dtype)


def _rows(array: Array) -> str:
    return f"[{', '.join(('n', *map(str, array.shape[1:])))}]"


def check_tokens(labels: Array, counts: Array, what: str) -> None:
    """Check that labels are of the tokens that count: int and bool ``[n, tokens]``.

    Raises:
        BadInput: they are of other tokens, or one has a label that nobody would ask for.
    """
    if labels.shape != counts.shape:
        raise BadInput(
            f"{what}: {LABEL} is {list(labels.shape)}, the tokens are {list(counts.shape)}: give "
            "one number for each, padding included, with -100 where there is no label"
        )
    stray = (labels != NO_LABEL) & ~counts
    if stray.any():
        row, token = np.argwhere(stray)[0]
        raise BadInput(
            f"{what}: item {row} has class {labels[row, token]} at token {token}, which its mask "
            "does not count: -100 says that there is no label"
        )


def check_disjoint(splits: Mapping[str, Items], together: Iterable[Collection[str]] = ()) -> None:
    """Check that no item is in two splits, by content, and no scene either.

    Order does not matter, and neither does the type that numbers or texts are stored in.

    Args:
        splits: by name.
        together: groups of splits that may share items.

    Raises:
        BadInput: two splits overlap; says which, by how much, and shows one item.
    """
    allowed = [frozenset(group) for group in together]
    found = {name: contents(items) for name, items in splits.items()}
    scenes = {name: set(items.scenes.tolist()) for name, items in splits.items()}
    names = list(splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if any({one, other} <= group for group in allowed):
                continue
            shared = found[one].keys() & found[other].keys()
            if shared:
                at = min(found[one][content] for content in shared)
                raise BadInput(
                    f"data: splits {one} and {other} overlap: {_items(len(shared))} in both, the "
                    f"first is item {at} of {one}; split before copying or augmenting, and drop "
                    "duplicates"
                )
            both = _stated(splits[one], scenes[one]) & _stated(splits[other], scenes[other])
            if both:
                raise BadInput(
                    f"data: splits {one} and {other} overlap: {len(both)} scenes are in both, "
                    f"one is {min(map(str, both))}; a scene belongs to one split"
                )


def _stated(items: Items, scenes: set[object]) -> set[object]:
    """Return the scenes, unless they are only the numbers of the items."""
    return set() if np.array_equal(items.scenes, np.arange(len(items))) else scenes


def _items(count: int) -> str:
    return "1 item is" if count == 1 else f"{count} items are"


def contents(items: Items) -> dict[bytes, int]:
    """Return the first row of every content, by its digest; equal inputs are equal contents."""
    arrays = [
        _comparable(array)
        for _, array in sorted((items.inputs if items.inputs else items.raw).items())
    ]
    found: dict[bytes, int] = {}
    for row in range(len(items)):
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array[row].tobytes())
        found.setdefault(digest.digest(), row)
    return found


def _comparable(array: Array) -> Array:
    """Return an array in which equal items are equal bytes, whatever type they are stored in."""
    if array.dtype.kind in "US":  # padded to the longest text, which differs between splits
        flat = [text if isinstance(text, bytes) else str(text).encode() for text in array.ravel()]
        digests = [hashlib.sha256(text).digest() for text in flat]
        return np.array(digests, "V32").reshape(array.shape)
    # Whole numbers above 2**53 may become equal; two such items that differ nowhere else are rare
    # enough. Adding zero makes one zero of both.
    return np.ascontiguousarray(array.astype(np.float64) + 0.0)


def _arrays(items: Items) -> dict[str, Array]:
    arrays: dict[str, Array] = {f"{INPUT}{name}": a for name, a in items.inputs.items()}
    arrays |= {f"{RAW}{name}": a for name, a in items.raw.items()}
    arrays |= items.extra
    arrays[SCENE] = items.scenes
    if items.labels is not None:
        arrays[LABEL] = items.labels
    if items.slices is not None:
        arrays[SLICE] = items.slices
    if items.sampling != UNSTATED:
        arrays[SAMPLING] = np.array(items.sampling)
    return arrays
