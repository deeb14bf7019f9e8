"""A recipe is understood before anything is trained, or refused in one sentence."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fogline_models import recipe
from fogline_models.errors import BadInput

WHOLE = """
family = "digits"
task = "image-classification"
labels = ["zero", "one"]

[data]
make = "data.py:make"

[[release]]
model = "digits-hub"
version = "1.0.0"
source = { torch = "nets.py:hub" }

[[release]]
model = "digits"
version = "1.0.0"
source = { torch = "nets.py:edge", arguments = { width = 12 } }
escalates_to = "digits-hub"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / recipe.FILE
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    path = written(folder, text)
    with pytest.raises(BadInput) as caught:
        recipe.read(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def test_a_recipe_is_found_by_its_file_its_folder_and_the_name_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "digits"
    folder.mkdir(parents=True)
    path = written(folder, WHOLE)
    monkeypatch.chdir(tmp_path)
    found = [recipe.read(place) for place in (path, folder, Path("digits"))]
    assert {each.folder.resolve() for each in found} == {folder}
    assert found[0].release[1].source.arguments == {"width": 12}
    assert [each.title for each in found[0].release] == ["digits-hub 1.0.0", "digits 1.0.0"]


def test_without_variants_a_release_has_what_its_targets_call_for(tmp_path: Path) -> None:
    text = WHOLE.replace("[data]", 'targets = ["x86_64", "tensorrt"]\n[data]')
    found = recipe.read(written(tmp_path, text))
    assert found.variants(found.release[0]) == ("int8-qdq", "int8-trt", "fp16", "fp32")


def test_the_recipe_of_the_repository_is_one(digits: Path) -> None:
    found = recipe.read(digits)
    assert [each.title for each in found.release] == [
        "digits-hub 1.0.0", "digits 1.0.0", "digits 1.1.0", "digits 1.2.0",
    ]  # fmt: skip


def test_what_is_not_toml_is_told_with_its_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, 'family = "digits"\ntask image')
    assert "recipe.toml is not TOML: " in said
    assert "line 2" in said


def test_what_is_not_text_is_no_toml_either(tmp_path: Path) -> None:
    (tmp_path / recipe.FILE).write_bytes(b"family = '\xff'")
    with pytest.raises(BadInput, match="is not TOML: "):
        recipe.read(tmp_path)


UNKNOWN: Mapping[str, tuple[str, str]] = {
    "at the top": ("[data]", "famly = 1\n[data]"),
    "in data": ('make = "data.py:make"', 'make = "data.py:make"\nmakes = 1'),
    "in a source": ('torch = "nets.py:hub"', 'torch = "nets.py:hub", arguents = {}'),
    "in a release": ('escalates_to = "digits-hub"', 'escalate_to = "digits-hub"'),
    "in gates": ("[data]", "[gates]\nmin_agreemnt = 1\n[data]"),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_a_key_that_there_is_not_is_named_with_the_nearest_one(tmp_path: Path, place: str) -> None:
    said = refusal(tmp_path, WHOLE.replace(*UNKNOWN[place], 1))
    assert "there is no key " in said
    meant = {
        "at the top": "famly, did you mean family?",
        "in data": "data.makes, did you mean make?",
        "in a source": "release.source.arguents, did you mean arguments?",
        "in a release": "release.escalate_to, did you mean escalates_to?",
        "in gates": "gates.min_agreemnt, did you mean min_agreement?",
    }
    assert meant[place] in said


def test_where_it_lies_is_not_for_the_recipe_to_say(tmp_path: Path) -> None:
    assert "there is no key folder" in refusal(tmp_path, "folder = '/'\n" + WHOLE)


WRONG: Mapping[str, tuple[str, str, str]] = {
    "a type": ('version = "1.0.0"', "version = 1.0", "release.0.version: input should be a valid"),
    "a table": ('[data]\nmake = "data.py:make"', "data = 1", "data: input should be a dictionary"),
    "a task": ("image-classification", "image-classificatio", "task: input should be 'image-class"),
    "files that nothing reads": (
        '[data]\nmake = "data.py:make"\n\n[[release]]\nmodel = "digits-hub"\nversion = "1.0.0"\n'
        'source = { torch = "nets.py:hub" }\n\n[[release]]\nmodel = "digits"\nversion = "1.0.0"\n'
        'source = { torch = "nets.py:edge", arguments = { width = 12 } }\nescalates_to = "digits-hub"',
        'reads = ["*.csv"]\n[data]\nfiles = { training = "a.npz" }\n[[release]]\nmodel = "digits"\n'
        'version = "1.0.0"\nsource = { onnx = "a.onnx" }',
        "reads: no function is named that could read them",
    ),
    "a task of numbers": (
        "image-classification", "tabular-regression",
        "task: tabular-regression asks for numbers, and no figure here says how wrong a number is",
    ),
    "no task": ('task = "image-classification"', "", "task: field required"),
    "a share": ("[data]", "[gates]\nmin_agreement = 2\n[data]", "min_agreement must lie between"),
    "terms": ("[data]", "[certificate]\nalpha = 1.5\n[data]", "alpha must lie between 0 and 1"),
    "days": ("[data]", "[certificate]\nvalid_days = 0\n[data]", "valid for at least a day"),
    "a target": ("[data]", "targets = ['riscv']\n[data]", "no form is known for target 'riscv'"),
    "labels": ('["zero", "one"]', '["one", "one"]', "labels: 'one' is there twice"),
    "two origins of data": ("[data]", "[data]\nfiles = {a = 'a.npz'}", "either make or files"),
    "no origin of data": ('make = "data.py:make"', "", "data: name either make or files"),
    "two sources": ('torch = "nets.py:hub"', 'torch = "nets.py:hub", onnx = "a.onnx"', "exactly one"),
    "no source": ('torch = "nets.py:hub"', "", "name exactly one of torch, huggingface and onnx"),
    "a name": ('"digits-hub"\nversion', '"Digits"\nversion', "must be lower-case letters"),
    "a version": ('version = "1.0.0"', 'version = "1.0"', "is not a semantic version"),
    "a twin": ('"digits-hub"\nversion', '"digits"\nversion', "it is there twice"),
    "a form": ("escalates_to", "variants = ['int9']\nescalates_to", "'int9' is no form, known are"),
    "a form twice": ("escalates_to", "variants = ['fp32', 'fp32']\nescalates_to", "there twice"),
    "kept": ("escalates_to", "keep = {fp16 = ['a']}\nescalates_to", "'fp16' is none of its"),
    "swept": ("escalates_to", "sweep = {int8-qdq = 1.5}\nescalates_to", "agreement lies between"),
    "a score": ("escalates_to", "score = 'best'\nescalates_to", "score: 'best' is unknown, known"),
    "a score without a hub": (
        'source = { torch = "nets.py:hub" }',
        'source = { torch = "nets.py:hub" }\nscore = "logistic"',
        "score: logistic is fitted to a hub's answers, so name escalates_to",
    ),
    "a score of tokens": (
        "escalates_to", "score = 'least_softmax'\nescalates_to",
        "score: least_softmax does not fit image-classification, whose rows have one answer",
    ),
    "a mask of tokens": (
        "escalates_to", "mask = 'attention_mask'\nescalates_to",
        "mask: 'attention_mask' says which tokens count, image-classification has none",
    ),
    "calibration that was seen": (
        'make = "data.py:make"', 'make = "data.py:make"\ntogether = [["ranges", "calibration"]]',
        "data.together: calibration cannot share items with ranges: no bound holds",
    ),
    "rows": ("escalates_to", "max_batch = -1\nescalates_to", "max_batch: from 0"),
    "a hub": ('escalates_to = "digits-hub"', 'escalates_to = "digit-hub"', "a release further up"),
    "a parent": ("escalates_to", 'parent = "0.9.0"\nescalates_to', "there is no digits 0.9.0 further"),
    "a waiver": ("[data]", "[gates]\nallow = {int9 = 'x'}\n[data]", "gates.allow: 'int9' is none"),
    "a batch": ("[data]", "[gates]\nlatency_batch = 65\n[data]", "65 rows, but max_batch is 64"),
    "an accident": (
        "escalates_to", "accident = {golden_of = '2.0.0', why = 'x'}\nescalates_to",
        "there is no digits 2.0.0 further up",
    ),
    "bounds": (
        'torch = "nets.py:hub"', 'torch = "nets.py:hub", dynamic = {x = {1 = ["n", 9, 3]}}',
        "source.dynamic.x.1: bounds must rise from 1, for an axis after the batch, got 9..3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_key(
    tmp_path: Path, what: str
) -> None:
    before, after, says = WRONG[what]
    assert before in WHOLE
    assert says in refusal(tmp_path, WHOLE.replace(before, after, 1))


def test_no_release_is_nothing_to_build(tmp_path: Path) -> None:
    text = WHOLE[: WHOLE.index("[[release]]")]
    assert "release: field required" in refusal(tmp_path, text)
    assert "nothing to build" in refusal(tmp_path, "release = []\n" + text)


def test_no_recipe_is_told_with_the_places_that_were_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"recipe\.toml in letters or models/letters"):
        recipe.read(Path("letters"))
