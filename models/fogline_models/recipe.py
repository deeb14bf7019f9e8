"""A recipe: the one TOML file that says how a family of releases is made.

    family = "digits"
    task = "image-classification"
    labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    targets = ["x86_64"]

    [data]
    make = "data.py:make"             # or [data.files] with an .npz for each split

    [certificate]
    alpha = 0.05

    [[release]]
    model = "digits-hub"
    version = "1.0.0"
    source = { torch = "nets.py:hub" }

    [[release]]
    model = "digits"
    version = "1.0.0"
    source = { torch = "nets.py:edge", arguments = { width = 12 } }
    escalates_to = "digits-hub"

What a key means is said at the field of its name below, and ``fogline-models recipe`` prints it all
(``reference.py``). A key that there is not, is an error, and so is a value that cannot be: found
before anything is trained, in one sentence.
"""

import dataclasses
import datetime
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fogline_models.certify import Terms
from fogline_models.errors import BadInput, require
from fogline_models.forms import FORMS, forms_for
from fogline_models.gates import Gates
from fogline_models.hooks import is_function
from fogline_models.provenance import LEARNT_FROM
from fogline_protocol.release import MODEL_NAME, SEMANTIC_VERSION
from fogline_protocol.score import FUNCTIONS, LEAST_SOFTMAX, MAX_SOFTMAX, PARAMETERS, PER_TOKEN

if TYPE_CHECKING:
    from pydantic import ValidationError

FILE = "recipe.toml"
FP32 = "fp32"
Task = Literal[
    "image-classification",
    "audio-classification",
    "text-classification",
    "tabular-classification",
    "video-classification",
    "token-classification",
    "feature-extraction",
    "image-feature-extraction",
]
# A row of these is no answer: variants are compared as vectors, without accuracy, and there is
# nothing to escalate.
VECTORS = ("feature-extraction", "image-feature-extraction")
_OF_NUMBERS = ("regression", "forecasting", "estimation")  # in the names of tasks of other kinds
TOKENS = "token-classification"  # a row of this has an answer for each of its tokens
_OF_TRANSFORMERS = ("text-classification", "token-classification", "feature-extraction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Where the splits come from: a function beside the recipe, or files.

    ``training``, ``evaluation`` and, for certificates, ``calibration`` are needed. ``ranges``
    (for int8) and ``self_test`` are taken from ``training`` if they are not named. A combined
    score is fitted on ``tuning``, or on ``ranges`` without one. Others may be added for ``also``
    and ``publish``.
    """

    # Instead of files: file.py:function beside the recipe. It takes nothing and returns {split: Items}
    # (fogline_models.data).
    make: str = ""
    # The .npz of each split, beside the recipe. training, evaluation and, for certificates,
    # calibration are needed. ranges, for int8, and self_test are taken from training if they are not
    # named; a fitted score takes tuning, or ranges without one. Others may be added for also, publish.
    files: Mapping[str, Path] = field(default_factory=dict)
    together: tuple[tuple[str, ...], ...] = ()  # groups of splits that may share items
    also: tuple[str, ...] = ()  # further splits that every variant is measured on
    publish: tuple[str, ...] = ()  # splits that are written beside the bundles

    @property
    def used(self) -> tuple[str, ...]:
        """The splits that models are run on, if they are there."""
        return (
            "training",
            "ranges",
            "self_test",
            "evaluation",
            "tuning",
            "calibration",
            *self.also,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a release is made from: exactly one of the first three."""

    # file.py:function(splits, progress) beside the recipe. It returns a module in eval mode;
    # splits["training"] holds the items, progress(done, total, note) may tell how far it is.
    torch: str = ""
    # A folder that transformers wrote, with tokenizer or image processor; or
    # file.py:function(splits, progress, into), which trains a model and writes it into that folder.
    # One of Sentence Transformers answers with sentence_embedding, pooled as the folder says.
    huggingface: str = ""
    onnx: Path | None = None  # a file, taken as it is
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of the function
    # Names for what a torch module returns; or which of a Hugging Face model's outputs come first:
    # a release is judged by the very first.
    outputs: tuple[str, ...] = ("logits",)
    # Axes besides the batch that vary, by input, with their bounds: {tokens = {1 = ["length", 1, 128]}}.
    # Texts of a Hugging Face model are padded and cut to the largest sequence_length, by default what
    # the folder allows: {input_ids = {1 = ["sequence_length", 1, 128]}} makes that 128 tokens.
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What local answers may cost, as ``certify.Terms``."""

    # At most this share of all requests is answered differently than by the hub.
    alpha: float = 0.01
    delta: float = 0.05  # the chance that this does not hold
    valid_days: int = 365  # until it expires

    @property
    def terms(self) -> Terms:
        """The same, in the words of the certify step."""
        return Terms(self.alpha, self.delta, datetime.timedelta(days=self.valid_days))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accident:
    """A release that is broken on purpose, to show that it is found out.

    Its self-test vectors are those of another release, and it skips the checks and gates that
    would have kept it in the workshop. It is written below ``broken``.
    """

    golden_of: str  # the version of the release, of the same model, that it pretends to be
    why: str  # what happened, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRecipe:
    """One release of the family."""

    model: str  # its name, as requests name it: lower-case letters, digits, "_" and "-"
    version: str  # a semantic one, such as 1.0.0
    source: Source  # what it is made from: name one of torch, huggingface and onnx
    description: str = ""  # the first words of its model card
    max_batch: int = 64  # rows in one run; 0: the model has no batch axis
    # Best first: the form that devices try first. By default what the targets call for, then fp32.
    variants: tuple[str, ...] = ()
    # Nodes that stay fp32, by form: {int8-qdq = ["dense1"]}
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # The agreement with fp32, by form, for which a sweep finds the fewest nodes to leave fp32:
    # {int8-qdq = 0.99}; of features it is their mean cosine, and 0.9998 is an error of 2 %
    sweep: Mapping[str, float] = field(default_factory=dict)
    # The hub's model that answers what this one is not sure of: further up in this recipe, or the path
    # of a bundle. It takes the same inputs, by name, and tells the same classes apart.
    escalates_to: str = ""
    parent: str = ""  # the version that it replaces, of this recipe; or the path of a bundle
    # What `fogline data export` wrote: handed to the function that trains. Whoever trained a given
    # model with them names them too: no item of them may measure or certify it.
    examples: Path | None = None
    # How certain an answer is: by default max_softmax, for tokens least_softmax; max_probability and
    # least_probability where outputs are probabilities already. logistic is fitted to the hub's
    # answers on the split tuning, or on ranges; the report says what that buys.
    score: str = ""
    # Of a token classifier: the input that says which tokens count. By default attention_mask, if
    # the model takes one, else every token does.
    mask: str = ""
    gates: Gates | None = None  # instead of the family's
    certificate: Certificate | None = None  # instead of the family's
    accident: Accident | None = None  # it is broken on purpose, to show that this is found out

    @property
    def title(self) -> str:
        """What people call the release."""
        return f"{self.model} {self.version}"

    @property
    def folder(self) -> str:
        """Where its bundle lies below the bundles of the family."""
        return ("broken/" if self.accident else "") + f"{self.model}-{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A family of releases."""

    family: str  # what the releases are called together
    task: Task  # Hugging Face's name of what is asked; sensor readings are tabular
    data: Data  # where the splits come from
    release: tuple[ReleaseRecipe, ...]  # one or more, built in this order
    labels: tuple[str, ...] = ()  # the names of the classes, in the order of the outputs
    targets: tuple[str, ...] = ("x86_64",)  # classes of hardware that it is quantized for
    # Of the models, for their cards, as Hugging Face calls it: apache-2.0, mit, other. By default cards
    # name none.
    license: str = ""
    datasets: tuple[str, ...] = ()  # what the data is called, for model cards
    # For every model card, by heading, in Markdown: what the data is, what it does not show.
    notes: Mapping[str, str] = field(default_factory=dict)
    # Files beside the recipe that its functions read, by name or pattern: weights/*.pt, readings.csv.
    # A change of one makes what they made anew, and bundles list them. Python files are known anyway.
    reads: tuple[str, ...] = ()
    gates: Gates = field(default_factory=Gates)  # which variants may ship
    certificate: Certificate = field(default_factory=Certificate)  # what local answers may cost
    folder: Path = Path()  # set by ``read``: where the recipe lies

    def variants(self, release: ReleaseRecipe) -> tuple[str, ...]:
        """Return the variants that a release is built in, best first."""
        forms = forms_for(self.targets, transformer=self.task in _OF_TRANSFORMERS)
        return release.variants or (*forms, FP32)

    @property
    def per_token(self) -> bool:
        """Whether a row has an answer for each of its tokens."""
        return self.task == TOKENS

    @property
    def has_code(self) -> bool:
        """Whether it names functions, so that the Python beside it has a part in what is made."""
        sources = [each.source for each in self.release]
        named = (self.data.make, *(part for s in sources for part in (s.torch, s.huggingface)))
        return any(map(is_function, named))

    def score(self, release: ReleaseRecipe) -> str:
        """Return the function that says how certain an answer of a release is."""
        return release.score or (LEAST_SOFTMAX if self.per_token else MAX_SOFTMAX)


def read(path: Path) -> Recipe:
    """Read a recipe: the file, the folder that holds one, or the name of a family.

    Raises:
        BadInput: there is none, or a key or value is wrong; the message names it.
        MissingExtra: pydantic is not installed.
    """
    file = _find(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{file} is not TOML: {error}") from None
    _check_keys(document, Recipe, str(file), hidden=("folder",))
    return checked({**document, "folder": file.parent}, str(file))


def checked(document: Mapping[str, Any], where: str) -> Recipe:
    """Return the recipe that a document describes.

    Raises:
        BadInput: a value is wrong; the message opens with ``where``.
        MissingExtra: pydantic is not installed.
    """
    task = document.get("task")
    if isinstance(task, str) and task.endswith(_OF_NUMBERS):
        raise BadInput(
            f"{where}: task: {task} asks for numbers, and no figure here says how wrong a number is: "
            f"only classes and features can be released ({', '.join(get_args(Task))})"
        )
    require("pydantic", extra="models")
    from pydantic import TypeAdapter, ValidationError

    try:
        recipe = TypeAdapter(Recipe).validate_python(document)
        problem = _contradiction(recipe)
    except ValidationError as error:
        raise BadInput(f"{where}: {_sentence(error)}") from None
    except BadInput as error:  # of bars, terms and targets
        raise BadInput(f"{where}: {error}") from None
    if problem is not None:
        raise BadInput(f"{where}: {problem}")
    return recipe


def _find(path: Path) -> Path:
    for place in (path, Path("models") / path):
        if place.is_file():
            return place
        if (place / FILE).is_file():
            return place / FILE
    raise BadInput(
        f"no recipe {str(path)!r}: expected a file, or {FILE} in {path} or {Path('models') / path}"
    )


def _check_keys(
    table: object, cls: Any, where: str, path: str = "", hidden: tuple[str, ...] = ()
) -> None:
    """Refuse keys that a table does not have, by name and with the nearest one that it has."""
    if not isinstance(table, Mapping):
        return  # of the wrong type altogether: said when it is validated
    known = {f.name: f for f in dataclasses.fields(cls) if f.name not in hidden}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            meant = f", did you mean {near[0]}?" if near else f", known are {', '.join(known)}"
            raise BadInput(f"{where}: there is no key {path}{key}{meant}")
        inner = _TABLES.get((cls, key))
        for item in value if isinstance(value, list) else [value]:
            if inner is not None:
                _check_keys(item, inner, where, f"{path}{key}.")


_TABLES: Mapping[tuple[Any, str], Any] = {
    (Recipe, "data"): Data,
    (Recipe, "gates"): Gates,
    (Recipe, "certificate"): Certificate,
    (Recipe, "release"): ReleaseRecipe,
    (ReleaseRecipe, "source"): Source,
    (ReleaseRecipe, "gates"): Gates,
    (ReleaseRecipe, "certificate"): Certificate,
    (ReleaseRecipe, "accident"): Accident,
}


def _sentence(error: "ValidationError") -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    said: str = first["msg"]
    return f"{where}: {said[0].lower()}{said[1:]}{more}"


def _contradiction(recipe: Recipe) -> str | None:
    data = recipe.data
    if bool(data.make) == bool(data.files):
        return "data: name either make or files"
    if recipe.reads and not recipe.has_code:
        return "reads: no function is named that could read them"
    for group in data.together:
        learnt = [name for name in group if name in LEARNT_FROM]
        if "calibration" in group and learnt:
            return (
                f"data.together: calibration cannot share items with {learnt[0]}: no bound holds "
                "for a model or a score that has seen them"
            )
    if not recipe.release:
        return "there is no [[release]]: nothing to build"
    twice = [label for label in recipe.labels if recipe.labels.count(label) > 1]
    if twice:
        return f"labels: {twice[0]!r} is there twice, classes are told by their names"
    seen: dict[tuple[str, str], ReleaseRecipe] = {}
    for release in recipe.release:
        problem = _release_contradiction(recipe, release, seen)
        if problem is not None:
            return f"release {release.title}: {problem}"
        seen[release.model, release.version] = release
    return None


def _bars_contradiction(recipe: Recipe, release: ReleaseRecipe) -> str | None:
    """Return what is wrong with gates and terms: training is too long to be told after it."""
    (release.certificate or recipe.certificate).terms  # noqa: B018 - checks itself
    gates = release.gates or recipe.gates
    variants = (*recipe.variants(release), FP32)
    for name in gates.allow:
        if name not in variants:
            return f"gates.allow: {name!r} is none of its variants {', '.join(variants)}"
    if gates.latency_batch > max(release.max_batch, 1):
        return (
            f"gates.latency_batch: {gates.latency_batch} rows, but max_batch is {release.max_batch}"
        )
    return None


def _score_contradiction(recipe: Recipe, release: ReleaseRecipe) -> str | None:
    function = recipe.score(release)
    if function not in FUNCTIONS:
        return f"score: {function!r} is unknown, known are {', '.join(FUNCTIONS)}"
    if (function in PER_TOKEN) != recipe.per_token:
        many = "many answers, one for each token" if recipe.per_token else "one answer"
        return f"score: {function} does not fit {recipe.task}, whose rows have {many}: leave it out"
    if PARAMETERS[function] and not release.escalates_to:
        return f"score: {function} is fitted to a hub's answers, so name escalates_to"
    if release.mask and not recipe.per_token:
        return f"mask: {release.mask!r} says which tokens count, {recipe.task} has none"
    return None


def _release_contradiction(
    recipe: Recipe, release: ReleaseRecipe, seen: Mapping[tuple[str, str], ReleaseRecipe]
) -> str | None:
    if not MODEL_NAME.fullmatch(release.model):
        return f"model {release.model!r} must be lower-case letters, digits, '_' and '-'"
    if not SEMANTIC_VERSION.fullmatch(release.version):
        return f"{release.version!r} is not a semantic version such as 1.0.0"
    if (release.model, release.version) in seen:
        return "it is there twice"
    source = release.source
    if sum(map(bool, (source.torch, source.huggingface, source.onnx))) != 1:
        return "source: name exactly one of torch, huggingface and onnx"
    unknown = [name for name in recipe.variants(release) if name not in (FP32, *FORMS)]
    if unknown:
        return f"variants: {unknown[0]!r} is no form, known are {', '.join((FP32, *FORMS))}"
    for form in (*release.keep, *release.sweep):
        if form not in recipe.variants(release) or form == FP32:
            return f"keep, sweep: {form!r} is none of its quantized variants"
    if len(set(recipe.variants(release))) != len(recipe.variants(release)):
        return "variants: one is there twice"
    problem = _score_contradiction(recipe, release)
    if problem is not None:
        return problem
    if not 0 <= release.max_batch <= 65_536:
        return f"max_batch: from 0, no batch dimension, to 65536, got {release.max_batch}"
    for form, agreement in release.sweep.items():
        if not 0 < agreement <= 1:
            return f"sweep.{form}: agreement lies between 0 and 1, got {agreement:g}"
    for name, axes in source.dynamic.items():
        for axis, (_, least, most) in axes.items():
            if axis < 1 or not 1 <= least <= most:
                return (
                    f"source.dynamic.{name}.{axis}: bounds must rise from 1, for an axis after the "
                    f"batch, got {least}..{most}"
                )
    problem = _bars_contradiction(recipe, release)
    if problem is not None:
        return problem
    models = {model for model, _ in seen}
    to = release.escalates_to
    if to and MODEL_NAME.fullmatch(to) and to not in models:
        return f"escalates_to: {to!r} must be a release further up, or the path of a bundle"
    if (
        release.parent
        and SEMANTIC_VERSION.fullmatch(release.parent)
        and ((release.model, release.parent) not in seen)
    ):
        return f"parent: there is no {release.model} {release.parent} further up"
    accident = release.accident
    if accident is not None and (release.model, accident.golden_of) not in seen:
        return f"accident.golden_of: there is no {release.model} {accident.golden_of} further up"
    return None
