"""What is kept of a build is kept by everything that it depends on: every key, file and function."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")
pytest.importorskip("torch", reason="needs torch: pip install 'fogline[models]'")

from fogline_models import data, graph, measure, quantize, splits  # noqa: E402
from fogline_models.gates import Gates  # noqa: E402
from fogline_models.recipe import Certificate, Data, Recipe, ReleaseRecipe, Source  # noqa: E402
from fogline_protocol import documents  # noqa: E402
from tests.models import onnx_nets, small_family  # noqa: E402
from tests.models.small_family import build, change  # noqa: E402

pytestmark = pytest.mark.workshop

Change = Callable[[Path], None]
HUB, EDGE = "points-hub", "points"
LATER = {  # what may run anew because of what was made anew
    "data": {"export", "quantize", "run", "measure"},
    "export": {"quantize", "run", "measure"},
    "quantize": {"run", "measure"},
    "run": set(),
    "measure": set(),
}
BEGUN = re.compile(
    r"^\[\d+/\d+\] ([\w-]+)(?: [\d.]+)?: (data|export|quantize|run|measure)(?: [\w-]+)?$",
    re.MULTILINE,
)
EDGE_SOURCE = 'torch = "nets.py:edge"'


def altered(before: str, after: str, file: str = "recipe.toml") -> Change:
    return lambda family: change(family / file, before, after)


def at_the_top(text: str) -> Change:
    return altered("labels = ", f"{text}\nlabels = ")


def of_data(text: str) -> Change:
    return altered("[data]\n", f"[data]\n{text}\n")


def of_gates(text: str) -> Change:
    return altered("[gates]\n", f"[gates]\n{text}\n")


def of_hub(text: str) -> Change:
    return altered('source = { onnx = "hub.onnx" }', f'{text}\nsource = {{ onnx = "hub.onnx" }}')


def of_edge(text: str) -> Change:
    return altered('escalates_to = "points-hub"', f'escalates_to = "points-hub"\n{text}')


def of_torch(text: str) -> Change:
    return altered(EDGE_SOURCE, f"{EDGE_SOURCE}, {text}")


def both(*changes: Change) -> Change:
    def apply(family: Path) -> None:
        for each in changes:
            each(family)

    return apply


def from_files(family: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("training", "evaluation", "calibration"):
        x = rng.normal(size=(400, 2)).astype(np.float32)
        np.savez(family / f"{name}.npz", **{"input.x": x, "label": rng.integers(0, 3, 400)})
    files = ", ".join(f'{n} = "{n}.npz"' for n in ("training", "evaluation", "calibration"))
    change(family / "recipe.toml", 'make = "data.py:make"', f"files = {{ {files} }}")


def with_examples(family: Path) -> None:
    x = np.random.default_rng(9).normal(size=(9, 2)).astype(np.float32)
    np.savez(family / "hard.npz", **{"input.x": x})
    of_edge('examples = "hard.npz"')(family)


def another_hub(family: Path) -> None:
    onnx.save(small_family.net(0.3), str(family / "hub.onnx"))


def other_weights(family: Path) -> None:
    (family / "weights").write_bytes((family / "weights").read_bytes()[::-1])


def with_a_parent(family: Path) -> None:
    of_edge(f'parent = "{family.parent.parent / "base/out/bundles/points-1.0.0"}"')(family)


ALL = {HUB, EDGE}
WITHOUT_A_HUB = altered('escalates_to = "points-hub"', "")
# A key, what is done to it, and what has to run anew because of it: the step, of which releases.
KEYS: dict[tuple[type, str], tuple[Change, dict[str, set[str]]]] = {
    (Recipe, "family"): (altered('family = "points"', 'family = "dots"'), {"export": ALL}),
    (Recipe, "task"): (altered("tabular-", "image-"), {"export": ALL}),
    (Recipe, "labels"): (altered('"left"', '"west"'), {"data": ALL, "export": ALL}),
    (Recipe, "targets"): (at_the_top('targets = ["x86_64", "aarch64"]'), {"quantize": ALL}),
    (Recipe, "license"): (at_the_top('license = "mit"'), {}),
    (Recipe, "datasets"): (at_the_top('datasets = ["dots"]'), {}),
    (Recipe, "notes"): (at_the_top('notes.Data = "Points."'), {}),
    (Recipe, "reads"): (at_the_top('reads = ["*.csv"]'), {"data": ALL, "export": {EDGE}}),
    (Data, "make"): (altered("data.py:make", "data.py:again"), {"data": ALL}),
    (Data, "files"): (from_files, {"data": ALL, "export": ALL}),
    (Data, "together"): (of_data('together = [["evaluation", "clean"]]'), {"data": ALL}),
    (Data, "also"): (of_data('also = ["calibration"]'), {"run": ALL}),
    (Data, "publish"): (of_data('publish = ["calibration"]'), {}),
    (Gates, "latency_batch"): (of_gates("latency_batch = 2"), {"measure": ALL}),
    (Gates, "max_size_ratio"): (of_gates("max_size_ratio = 9"), {}),
    (Certificate, "alpha"): (altered("alpha = 0.1", "alpha = 0.2"), {}),
    (Source, "torch"): (altered("nets.py:edge", "nets.py:again"), {"export": {EDGE}}),
    (Source, "arguments"): (of_torch("arguments = { seed = 1 }"), {"export": {EDGE}}),
    (Source, "outputs"): (
        both(altered('outputs = ["y"]', 'outputs = ["z"]'), WITHOUT_A_HUB),
        {"export": {EDGE}},
    ),
    (Source, "dynamic"): (
        both(of_torch('dynamic = { x = { 1 = ["w", 2, 4] } }'), WITHOUT_A_HUB), {"export": {EDGE}},
    ),
    (Source, "onnx"): (another_hub, {"export": {HUB}}),
    (ReleaseRecipe, "version"): (
        altered('"points"\nversion = "1.0.0"', '"points"\nversion = "1.0.1"'), {"export": {EDGE}},
    ),
    (ReleaseRecipe, "model"): (altered('model = "points"', 'model = "dots"'), {"export": {"dots"}}),
    (ReleaseRecipe, "description"): (of_edge('description = "Points."'), {}),
    (ReleaseRecipe, "max_batch"): (of_hub("max_batch = 32"), {"export": {HUB}, "run": {HUB}}),
    (ReleaseRecipe, "variants"): (of_edge('variants = ["fp32"]'), {"run": {EDGE}, "measure": {EDGE}}),
    (ReleaseRecipe, "keep"): (of_hub('keep = { int8-qdq = ["dense1"] }'), {"quantize": {HUB}}),
    (ReleaseRecipe, "sweep"): (of_hub("sweep = { int8-qdq = 0.5 }"), {"quantize": {HUB}}),
    (ReleaseRecipe, "escalates_to"): (WITHOUT_A_HUB, {"run": {EDGE}}),
    (ReleaseRecipe, "parent"): (with_a_parent, {"run": {EDGE}}),
    (ReleaseRecipe, "examples"): (with_examples, {"export": {EDGE}}),
    (ReleaseRecipe, "gates"): (of_edge("gates.latency_batch = 4"), {"measure": {EDGE}}),
    (ReleaseRecipe, "certificate"): (of_edge("certificate.alpha = 0.2"), {}),
}  # fmt: skip
# Tables, whose keys are here; tokens and transformers, which are in test_small_tokens.py and
# test_huggingface.py; and what is decided on figures that are kept, without a step of its own.
ELSEWHERE = {
    (Recipe, "data"), (Recipe, "release"), (Recipe, "gates"), (Recipe, "certificate"),
    (Recipe, "folder"), (ReleaseRecipe, "source"), (ReleaseRecipe, "mask"), (Source, "huggingface"),
    (ReleaseRecipe, "score"), (ReleaseRecipe, "accident"),
}  # fmt: skip
CODE = {"data": ALL, "export": {EDGE}}  # the data's function may import it, too
BESIDE: dict[str, tuple[Change, dict[str, set[str]]]] = {
    "code of the data": (altered("0.3", "0.31", "data.py"), {"data": ALL, "export": ALL}),
    "code of the net": (altered("manual_seed(seed)", "manual_seed(seed + 1)", "nets.py"), CODE),
    "a module that the net imports": (altered("WIDTH = 2", "WIDTH = 1 + 1", "parts/sizes.py"), CODE),
    "weights beside a file": (other_weights, {"export": {HUB}}),
    "a file that functions read": (
        both(at_the_top('reads = ["*.csv"]'), lambda family: (family / "seed.csv").unlink(),
             lambda family: (family / "other.csv").write_text("2") and None),
        {"data": ALL, "export": {EDGE}},
    ),
}  # fmt: skip
# A module of the workshop, and what it takes part in.
WORKSHOP = {
    data: {"data": ALL, "export": ALL},
    splits: {"data": ALL},
    graph: {"export": ALL, "quantize": ALL},
    quantize: {"quantize": ALL},
    measure: {"measure": ALL},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a family that is built; not to be changed."""
    family = small_family.write(tmp_path_factory.mktemp("facts") / "base" / "points", torch=True)
    onnx_nets.save(small_family.net(0.1), family / "hub.onnx", external=True)
    # An untrained net answers at random: what it is worth is not asked here.
    change(family / "recipe.toml", "min_agreement = 0.9", "min_agreement = 0")
    change(family / "recipe.toml", "max_accuracy_loss = 0.05", "max_accuracy_loss = 1")
    change(family / "data.py", "def make():", "def again():\n    return make()\n\n\ndef make():")
    (family / "parts").mkdir()
    (family / "parts" / "__init__.py").touch()
    (family / "parts" / "sizes.py").write_text("WIDTH = 2\n")
    (family / "seed.csv").write_text("1")
    change(family / "nets.py", "import torch\n", "import torch\n\nfrom .parts.sizes import WIDTH\n")
    change(family / "nets.py", "Linear(2, 3)", "Linear(WIDTH, 3)")
    change(family / "nets.py", "progress):", "progress, seed=0):")
    change(family / "nets.py", "manual_seed(0)", "manual_seed(seed)")
    with (family / "nets.py").open("a") as nets:
        nets.write("\n\ndef again(splits, progress):\n    return edge(splits, progress)\n")
    result = build(family)
    assert result.exit_code == 0, result.output
    return family


def ran(base: Path, alter: Change) -> set[tuple[str, str]]:
    """Change a copy of the family, build it with what is kept, and return (release, step) made anew."""
    place = base.parent.parent / "changed"
    shutil.rmtree(place, ignore_errors=True)
    family = place / "points"
    shutil.copytree(base, family, ignore=shutil.ignore_patterns("__pycache__"))
    alter(family)
    result = build(family, "--cache", base.parent / "steps")
    begun = BEGUN.findall(result.stderr)
    assert begun or result.exit_code == 0, result.output
    return set(begun)


def check(base: Path, alter: Change, due: dict[str, set[str]]) -> None:
    found = ran(base, alter)
    steps = {step for _, step in found}
    for step, releases in due.items():
        if step == "data":
            assert "data" in steps
        else:
            assert {(release, step) for release in releases} <= found
    allowed = {step for each in due for step in (each, *LATER[each])}
    assert steps <= allowed, "what did not change was made anew"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[0].__name__}.{key[1]}")
def test_every_key_makes_anew_what_depends_on_it_and_nothing_else(
    base: Path, key: tuple[type, str]
) -> None:
    check(base, *KEYS[key])


@pytest.mark.parametrize("what", BESIDE)
def test_so_does_everything_beside_the_recipe(base: Path, what: str) -> None:
    check(base, *BESIDE[what])


@pytest.mark.parametrize("module", WORKSHOP, ids=lambda module: module.__name__)
def test_so_does_another_version_of_the_workshop(
    base: Path, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_is, changed = documents.sha256_of_file, Path(str(module.__file__))

    def digest(path: Path) -> str:
        return documents.sha256(b"changed") if path == changed else as_it_is(path)

    monkeypatch.setattr(documents, "sha256_of_file", digest)
    check(base, lambda family: None, WORKSHOP[module])


def test_no_key_is_forgotten() -> None:
    every = {
        (t, f.name) for t in (Recipe, Data, Source, ReleaseRecipe) for f in dataclasses.fields(t)
    }
    assert every == {key for key in KEYS if key[0] not in (Gates, Certificate)} | ELSEWHERE


def test_nothing_changed_is_nothing_made(base: Path) -> None:
    assert ran(base, lambda family: None) == set()
