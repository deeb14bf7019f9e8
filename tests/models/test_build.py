"""Whole builds: resumed, reproducible, and refused in one sentence with nothing half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")
pytest.importorskip("pydantic", reason="needs pydantic: pip install 'fogline[models]'")

from fogline_models import archive  # noqa: E402
from fogline_models.cli import main  # noqa: E402
from fogline_models.session import Session  # noqa: E402
from fogline_protocol import documents, hardware, release  # noqa: E402
from fogline_protocol.score import Score  # noqa: E402
from tests.models import onnx_nets, small_family  # noqa: E402
from tests.models.small_family import build, change  # noqa: E402

pytestmark = pytest.mark.workshop


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return small_family.write(tmp_path / "points")


@pytest.fixture
def with_torch(tmp_path: Path) -> Path:
    pytest.importorskip("torch", reason="needs torch: pip install 'fogline[models]'")
    return small_family.write(tmp_path / "points", torch=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the family's bundles; not to be changed."""
    folder = small_family.write(tmp_path_factory.mktemp("built") / "points")
    result = build(folder)
    assert result.exit_code == 0, result.output
    return folder.parent


def run(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def sentence(result: Result) -> str:
    """Check that a command failed as it should, and return what it said."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1
    assert result.stderr.endswith(said[0] + "\n")
    return said[0].removeprefix("Error: ")


def unfinished(folder: Path) -> list[Path]:
    """What is hidden or named unfinished below a folder, locks aside: there should be none."""
    return [
        path
        for path in folder.rglob("*")
        if (path.name.startswith(".") or "unfinished" in path.name) and path.suffix != ".lock"
    ]


def test_every_release_is_built_paired_certified_and_reported(built: Path) -> None:
    hub = release.read(built / "out" / "bundles" / "points-hub-1.0.0")
    edge = release.read(built / "out" / "bundles" / "points-1.0.0")
    assert edge.bundle.escalates_to is not None
    assert edge.bundle.escalates_to.bundle_sha256 == hub.sha256
    assert [variant.name for variant in edge.bundle.variants] == ["int8-qdq", "fp32"]
    assert {found.variant for found in edge.certificates} == {"int8-qdq", "fp32"}
    assert json.loads((edge.path / "report.json").read_text())["decisions"]["shipped"]
    assert (edge.path / "report.html").is_file()
    listed = json.loads(edge.file("sources.json").read_text())["inputs"]
    splits = {"training", "evaluation", "calibration", "ranges", "self_test"}
    assert listed.keys() == {"edge.onnx", "data.py", *(f"{name}.npz" for name in splits)}
    assert unfinished(built) == []


def test_nothing_is_done_twice_and_the_digests_are_the_same(family: Path) -> None:
    assert build(family).exit_code == 0
    result = build(family, "--out", family.parent / "elsewhere")
    assert result.exit_code == 0, result.output
    steps = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert len(steps) == 9
    assert all(line.endswith("done before") for line in steps)
    for name in ("points-hub-1.0.0", "points-1.0.0"):
        one, other = (
            release.read(family.parent / out / "bundles" / name) for out in ("out", "elsewhere")
        )
        assert one.sha256 == other.sha256


def test_another_folder_and_another_cache_give_the_same_digests(
    built: Path, tmp_path: Path
) -> None:
    family = small_family.write(tmp_path / "deep" / "down" / "renamed")
    assert build(family).exit_code == 0
    for name in ("points-hub-1.0.0", "points-1.0.0"):
        one, other = (
            release.read(parent / "out" / "bundles" / name) for parent in (built, family.parent)
        )
        assert one.sha256 == other.sha256


def test_a_build_into_the_recipes_own_folder_does_not_feed_on_itself(with_torch: Path) -> None:
    # An untrained net answers at random: what it is worth is not asked here.
    change(with_torch / "recipe.toml", "min_agreement = 0.9", "min_agreement = 0")
    change(with_torch / "recipe.toml", "max_accuracy_loss = 0.05", "max_accuracy_loss = 1")
    digests = set()
    for _ in range(2):
        result = build(with_torch, "--out", with_torch)
        assert result.exit_code == 0, result.output
        found = release.read(with_torch / "bundles" / "points-1.0.0")
        digests.add(found.sha256)
    assert len(digests) == 1
    listed = json.loads(found.file("sources.json").read_text())["inputs"]
    assert {"data.py", "nets.py"} == {name for name in listed if not name.endswith(".npz")}


def test_a_build_goes_on_where_it_stopped(family: Path) -> None:
    change(family / "recipe.toml", 'onnx = "edge.onnx"', 'onnx = "edge.onnx", outputs = ["y"]')
    (family / "edge.onnx").write_bytes(b"cut off")
    said = sentence(build(family))
    assert said.startswith("points 1.0.0: export: ")
    assert release.read(family.parent / "out" / "bundles" / "points-hub-1.0.0")
    onnx.save(small_family.net(1), str(family / "edge.onnx"))
    result = build(family)
    assert result.exit_code == 0, result.output
    hub = [line for line in result.stderr.splitlines() if "points-hub 1.0.0: " in line]
    assert len(hub) == 4
    assert all(line.endswith("done before") for line in hub)


def fp32(family: Path, name: str) -> str:
    """Build the family and return the digest of the file that a bundle ships."""
    result = build(family)
    assert result.exit_code == 0, result.output
    found = release.read(family.parent / "out" / "bundles" / name)
    return documents.sha256_of_file(found.file("variants/fp32.onnx"))


def test_another_file_of_the_same_name_is_another_release(family: Path) -> None:
    files = set()
    for noise in (0, 0.2):
        onnx.save(small_family.net(noise), str(family / "hub.onnx"))
        files.add(fp32(family, "points-hub-1.0.0"))
    assert len(files) == 2


def with_weights_of_one_name(family: Path) -> list[Path]:
    """Keep the hub's weights in two files of one name, and return them."""
    model = small_family.net(0)
    places = []
    for tensor, folder in zip(model.graph.initializer, ("a", "b"), strict=True):
        onnx.external_data_helper.set_external_data(tensor, f"{folder}/w.bin")
        places.append(family / folder / "w.bin")
        places[-1].parent.mkdir()
        places[-1].write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
    (family / "hub.onnx").write_bytes(model.SerializeToString())
    return places


def test_weights_of_one_name_in_two_folders_are_told_apart(family: Path) -> None:
    places = with_weights_of_one_name(family)
    files = {fp32(family, "points-hub-1.0.0")}
    hub = release.read(family.parent / "out/bundles/points-hub-1.0.0")
    listed = json.loads(hub.file("sources.json").read_text())["inputs"]
    for place, name in zip(places, ("a/w.bin", "b/w.bin"), strict=True):
        assert listed[name]["sha256"] == documents.sha256_of_file(place)
    for place in places:
        weights = np.frombuffer(place.read_bytes(), np.float32)
        place.write_bytes((weights * np.float32(0.9)).tobytes())
        files.add(fp32(family, "points-hub-1.0.0"))
    assert len(files) == 3


def test_hard_examples_cannot_be_called_like_a_split(family: Path) -> None:
    """Or one of the two is missing among what the bundle says it was made from."""
    (family / "hard").mkdir()
    items(family / "hard", "training", 9)
    change(family / "recipe.toml", "[[release]]", '[[release]]\nexamples = "hard/training.npz"')
    result = build(family)
    assert sentence(result) == (
        "release points-hub 1.0.0: examples: hard/training.npz is called like the split training, "
        "so a bundle could list only one of the two: rename the file"
    )
    assert "export" not in result.stderr


def test_another_function_of_the_same_file_is_another_release(with_torch: Path) -> None:
    change(with_torch / "recipe.toml", "min_agreement = 0.9", "min_agreement = 0")
    change(with_torch / "recipe.toml", "max_accuracy_loss = 0.05", "max_accuracy_loss = 1")
    with (with_torch / "nets.py").open("a") as nets:
        nets.write(
            "\n\ndef other(splits, progress):\n    torch.manual_seed(1)\n    return Net().eval()\n"
        )
    files = {fp32(with_torch, "points-1.0.0")}
    change(with_torch / "recipe.toml", "nets.py:edge", "nets.py:other")
    files.add(fp32(with_torch, "points-1.0.0"))
    assert len(files) == 2


def test_a_step_is_run_again_on_demand_and_an_unknown_one_is_refused(built: Path) -> None:
    family = built / "points"
    result = build(family, "--again", "measure")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("done before") == 7
    assert "no step 'mesure' in this build, only data, export, quantize int8-qdq, run" in (
        sentence(build(family, "--again", "mesure"))
    )


def test_overlap_is_looked_for_again_when_what_may_overlap_changes(family: Path) -> None:
    change(family / "data.py", '"calibration": 3', '"calibration": 2')
    change(
        family / "recipe.toml",
        '"data.py:make"',
        '"data.py:make"\ntogether = [["evaluation", "calibration"]]',
    )
    assert build(family).exit_code == 0
    change(family / "recipe.toml", '\ntogether = [["evaluation", "calibration"]]', "")
    assert "data: splits evaluation and calibration overlap: 400 items are in both" in (
        sentence(build(family))
    )


def test_a_hub_whose_answers_are_called_otherwise_is_refused(with_torch: Path) -> None:
    change(with_torch / "recipe.toml", 'outputs = ["y"]', 'outputs = ["logits"]')
    result = build(with_torch)
    assert (
        "release points 1.0.0: escalates_to: points-hub 1.0.0 gives no output 'logits', only"
        in (sentence(result))
    )
    assert "points 1.0.0: export" not in result.stderr  # so before the edge's net is trained


PAIRS = """
import numpy as np

from fogline_models.data import Items


def make():
    return {name: pairs(seed) for seed, name in enumerate(("training", "evaluation", "calibration"))}


def pairs(seed, count=400):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    corners = np.array([[-1, 0], [1, 0], [0, 1]])
    b = rng.normal(0, 1, (count, 2)).astype(np.float32)
    a = (corners[labels] + rng.normal(0, 0.3, (count, 2)) - b).astype(np.float32)
    return Items({"a": a, "b": b}, labels, 1000 * seed + np.arange(count))
"""


def of_two_inputs(first: str, second: str) -> object:
    """A net of the sum of two inputs, which it takes in the order that they are named in."""
    model = small_family.net(0)
    model.graph.node.insert(0, onnx.helper.make_node("Add", [first, second], ["x"], name="sum"))
    del model.graph.input[:]
    model.graph.input.extend(onnx_nets.tensor(name, ["n", 2]) for name in (first, second))
    return model


def test_a_hub_may_take_its_inputs_in_another_order(family: Path, tmp_path: Path) -> None:
    (family / "data.py").write_text(PAIRS)
    onnx.save(of_two_inputs("a", "b"), str(family / "hub.onnx"))
    onnx.save(of_two_inputs("b", "a"), str(family / "edge.onnx"))
    result = build(family)
    assert result.exit_code == 0, result.output
    made = release.read(family.parent / "out/bundles/points-1.0.0")
    assert [spec.name for spec in made.bundle.inputs] == ["b", "a"]
    assert made.certificates
    hub = family.parent / "out/bundles/points-hub-1.0.0"
    assert "Not compared" not in run("compare", hub, made.path).output


def test_nothing_is_compared_with_what_the_kernels_here_would_cut_off(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub and a parent, as of a release's own files: its variant says where it may be fused."""
    monkeypatch.setattr(hardware, "this_machine", lambda: "x86_64+avx2")
    as_it_is = Session.__init__
    fused: list[Path] = []

    def noted(self: Session, model: Path, *arguments: Any, as_written: bool = False) -> None:
        if model.name == "int8-vnni.onnx" and not as_written:
            fused.append(model)
        as_it_is(self, model, *arguments, as_written=as_written)

    monkeypatch.setattr(Session, "__init__", noted)
    recipe = family / "recipe.toml"
    text = recipe.read_text().replace(
        'version = "1.0.0"', 'version = "1.0.0"\nvariants = ["int8-vnni", "fp32"]'
    )
    edge = text[text.rindex("[[release]]") :]
    later = edge.replace('version = "1.0.0"', 'version = "1.1.0"\nparent = "1.0.0"')
    recipe.write_text(text + later)
    result = build(family)
    assert result.exit_code == 0, result.output
    bundles = family.parent / "out/bundles"
    made = release.read(bundles / "points-1.1.0")
    assert made.bundle.variants[0].name == "int8-vnni"
    hub = release.read(bundles / "points-hub-1.0.0")
    assert hub.bundle.variants[0].name == "int8-vnni"
    assert [found.variant for found in made.certificates] == ["fp32"]
    assert fused == []
    assert run("compare", bundles / "points-1.0.0", made.path).exit_code == 0
    assert fused == []


def test_a_hub_of_other_inputs_is_told_before_anything_is_trained(
    with_torch: Path, built: Path
) -> None:
    hub = built / "out/bundles/points-hub-1.0.0"
    change(with_torch / "recipe.toml", 'escalates_to = "points-hub"', f'escalates_to = "{hub}"')
    change(with_torch / "data.py", 'Items({"x": x}', 'Items({"readings": x}')
    change(with_torch / "nets.py", "forward(self, x)", "forward(self, readings)")
    change(with_torch / "nets.py", "self.dense(x)", "self.dense(readings)")
    result = build(with_torch)
    assert sentence(result) == (
        "release points 1.0.0: escalates_to: points 1.0.0 and points-hub 1.0.0 take different "
        "inputs: points-hub 1.0.0 does not take 'readings'; points-hub 1.0.0 also needs 'x'"
    )
    assert "export" not in result.stderr


def with_a_score_of_its_own(family: Path, tuning: int | None = 4) -> None:
    """Let the edge's release have a fitted score, and points that edge and hub differ on."""
    change(family / "recipe.toml", 'to = "points-hub"', 'to = "points-hub"\nscore = "logistic"')
    change(family / "data.py", "rng.normal(0, 0.3", "rng.normal(0, 0.6")
    if tuning is not None:
        change(family / "data.py", '"calibration": 3', f'"calibration": 3, "tuning": {tuning}')


@pytest.mark.parametrize("tuning", [4, None])
def test_a_fitted_score_is_shipped_certified_and_its_worth_is_said(
    family: Path, tuning: int | None
) -> None:
    with_a_score_of_its_own(family, tuning)
    result = build(family)
    assert result.exit_code == 0, result.output
    made = release.read(family.parent / "out/bundles/points-1.0.0")
    score = made.bundle.score
    assert score is not None
    assert score.function == "logistic"
    assert sorted(score.parameters) == ["bias", "log_odds", "spread"]
    assert made.certificates
    assert all(certificate.score == score for certificate in made.certificates)
    split = "ranges" if tuning is None else "tuning"
    report = json.loads((made.path / "report.json").read_bytes())["figures"]
    assert report["combined"]["parameters"] == score.parameters
    assert report["combined"]["sentence"] in result.output
    assert f"score logistic, fitted on split {split}: " in result.output
    assert f"<b>Score</b>: score logistic, fitted on split {split}" in (
        (made.path / "report.html").read_text()
    )
    sources = json.loads((made.path / "sources.json").read_bytes())
    assert sources["steps"]["score"] == f"logistic, fitted on {split}"
    # Again, from the steps that were kept: the same coefficients.
    assert build(family, "--out", family.parent / "again").exit_code == 0
    assert release.read(family.parent / "again/bundles/points-1.0.0").sha256 == made.sha256


def test_a_hub_that_has_learnt_from_the_calibration_items_is_refused(
    built: Path, family: Path
) -> None:
    hub = built / "out/bundles/points-hub-1.0.0"
    change(family / "recipe.toml", 'escalates_to = "points-hub"', f'escalates_to = "{hub}"')
    change(family / "data.py", '"training": 1, "evaluation": 2, "calibration": 3',
           '"training": 3, "evaluation": 2, "calibration": 1')  # fmt: skip
    result = build(family)
    assert "release points 1.0.0: split calibration: points-hub 1.0.0 has learnt from these" in (
        sentence(result)
    )
    assert "export" not in result.stderr


def test_a_score_is_never_fitted_on_calibration_items(family: Path) -> None:
    with_a_score_of_its_own(family, tuning=3)
    assert "data: splits calibration and tuning overlap: 400 items are in both" in (
        sentence(build(family))
    )
    # Nor may a recipe allow it.
    together = 'together = [["calibration", "tuning"]]'
    change(family / "recipe.toml", '"data.py:make"', f'"data.py:make"\n{together}')
    assert "data.together: calibration cannot share items with tuning: no bound holds" in (
        sentence(build(family))
    )


Change = Callable[[Path], None]


def altered(file: str, before: str, after: str) -> Change:
    return lambda family: change(family / file, before, after)


def corrupt(family: Path) -> None:
    (family / "edge.onnx").write_bytes((family / "edge.onnx").read_bytes()[:200])


def without_its_weights(family: Path) -> None:
    onnx_nets.save(small_family.net(1), family / "edge.onnx", external=True)
    (family / "weights").unlink()


def open_without_bounds(family: Path) -> None:
    model = small_family.net(1)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    onnx.save(model, str(family / "edge.onnx"))


def answering_nan(family: Path) -> None:
    weights = [onnx_nets.random(2, 4), np.full((4, 3), np.nan, np.float32)]
    onnx.save(onnx_nets.mlp(*weights), str(family / "edge.onnx"))


def with_a_foreign_operator(family: Path) -> None:
    model = small_family.net(1)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Blur", "nowhere"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(model, str(family / "edge.onnx"))


def with_two_classes(family: Path) -> None:
    onnx.save(
        onnx_nets.mlp(onnx_nets.random(2, 4), onnx_nets.random(4, 2)), str(family / "edge.onnx")
    )


def four_at_once(family: Path) -> None:
    model = small_family.net(1)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, str(family / "edge.onnx"))


BAD: dict[str, tuple[Change, str, str]] = {
    "a corrupt file": (corrupt, "points 1.0.0: export: ", "edge.onnx"),
    "weights that are missing": (
        without_its_weights, "points 1.0.0: export: ",
        "keeps tensor 'w0' in weights, which is missing: put it beside the model",
    ),
    "a shape without bounds": (
        open_without_bounds, "points 1.0.0: export: axis 1 of input 'x' is open and has no bounds",
        'dynamic = { "x" = { 1 = ["width", 2, 2] } }',
    ),
    "answers that are NaN": (
        answering_nan, "points 1.0.0: export: ", "output 'y' is NaN or infinite in",
    ),
    "an operator that nobody has": (
        with_a_foreign_operator, "points 1.0.0: export: ", "Blur",
    ),
    "fewer classes than labels": (
        with_two_classes, "export: release points 1.0.0: output 'y' has 2 classes",
        "but 3 labels are named: name one for each",
    ),
    "four at once": (
        four_at_once, "points 1.0.0: export: edge.onnx has no open batch axis", "open the first",
    ),
    "more labels than classes": (
        altered("recipe.toml", '"up"]', '"up", "down"]'),
        "export: release points-hub 1.0.0: output 'y' has 3 classes", "but 4 labels are named",
    ),
    "fewer labels than class numbers": (
        altered("recipe.toml", ', "up"]', "]"),
        "points: data: split training: class numbers reach from 0 to 2",
        "the recipe names 2 labels, 0 to 1",
    ),
    "overlapping splits": (
        altered("data.py", '"calibration": 3', '"calibration": 1'),
        "points: data: splits training and calibration overlap: 400 items are in both",
        "split before copying or augmenting, and drop duplicates",
    ),
    "an input that one split calls otherwise": (
        altered("data.py", "for name, seed in SEEDS.items()}",
                "for name, seed in SEEDS.items()} | {'calibration': misnamed(points(3))}\n\n"
                "def misnamed(items):\n"
                "    return Items({'z': items.inputs['x']}, items.labels, items.scenes)"),
        "data: split training has input.x, and split calibration has no array input.x", "only input.z",
    ),
    "an input without its prefix": (
        altered("data.py", "for name, seed in SEEDS.items()}",
                "for name, seed in SEEDS.items()} | {'calibration': misnamed(points(3))}\n\n"
                "def misnamed(items):\n    z = items.inputs['x'][:, :1]\n"
                "    return Items({'z': z}, items.labels, items.scenes, extra=items.inputs)"),
        "data: split training has input.x, and split calibration calls it x", "name the array input.x",
    ),
    "an input of another form in one split": (
        altered("data.py", "for name, seed in SEEDS.items()}",
                "for name, seed in SEEDS.items()} | {'calibration': doubled(points(3))}\n\n"
                "def doubled(items):\n    x = items.inputs['x'].astype('f8')\n"
                "    return Items({'x': x}, items.labels, items.scenes)"),
        "data: input.x is float32 [n, 2] in split training and float64 [n, 2] in split calibration",
        "give both in one form",
    ),
    "inputs that the model does not take": (
        altered("data.py", 'Items({"x": x}', 'Items({"x": x, "more": x}'),
        "points-hub 1.0.0: export: the model takes x", "has more, x",
    ),
    "a calibration set of one class": (
        altered("data.py", "for name, seed in SEEDS.items()}",
                "for name, seed in SEEDS.items()} | {'calibration': of_one(points(3))}\n\n"
                "def of_one(items):\n    return items.rows(items.labels == 1)"),
        "points: data: split calibration: all ", "calibrate on items of every class",
    ),
    "no held-out items": (
        altered("data.py", '"evaluation": 2, ', ""),
        "points: data: there is no split evaluation", "without held-out items nothing can be said",
    ),
    "splits that are none": (
        altered("data.py", "return {name: points(seed) for name, seed in SEEDS.items()}",
                "return [points(1)]"),
        "points: data: data.make: data.py:make returned list", "expected Items by the name",
    ),
    "a score that nothing can be fitted to": (
        altered("recipe.toml", 'source = { onnx = "edge.onnx" }',
                'source = { onnx = "hub.onnx" }\nscore = "logistic"'),
        "points 1.0.0: score: edge and hub agree on all 400 items of split ranges",
        "give a split tuning that neither was trained on, or take the score max_softmax",
    ),
    "a split that is none": (
        altered("data.py", "points(seed) for", "points(seed).inputs for"),
        "points: data: data.make: data.py:make returned a dict for 'training'", "expected Items",
    ),
    "a function that raises": (
        altered("data.py", "rng = np", "raise RuntimeError('no disk')\n    rng = np"),
        "points: data: data.make: data.py:make raised RuntimeError: no disk (data.py, line 14)",
        "fogline-models --traceback shows all of it",
    ),
    "a function that wants more": (
        altered("data.py", "def make():", "def make(folder):"),
        "points: data: data.make: data.py:make(folder) is called with nothing",
        "missing a required argument: 'folder'",
    ),
    "a file that is not there": (
        altered("recipe.toml", "edge.onnx", "egde.onnx"),
        "release points 1.0.0: source.onnx: ", "egde.onnx: No such file",
    ),
    "a hub that is not there": (
        altered("recipe.toml", 'escalates_to = "points-hub"',
                'escalates_to = "../hub/points"'),
        "release points 1.0.0: escalates_to: ", "is no bundle, there is no bundle.json in it: a bundle",
    ),
    "a published split that is not there": (
        altered("recipe.toml", '"data.py:make"', '"data.py:make"\npublish = ["traffic"]'),
        "data: there is no split 'traffic'", "only calibration, evaluation, ranges",
    ),
    "an unknown key": (
        altered("recipe.toml", "min_agreement", "min_agreemnt"), "", "did you mean min_agreement?",
    ),
    "no variant that may ship": (
        altered("recipe.toml", "min_agreement = 0.9", "min_accuracy = 1.0"),
        "points-hub 1.0.0: gates: no variant may ship. ", "at least 100 % required",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_built_is_told_in_one_sentence_and_leaves_nothing_half_written(
    family: Path, what: str
) -> None:
    alter, opens, says = BAD[what]
    alter(family)
    said = sentence(build(family))
    assert said.startswith(opens) or not opens
    assert says in said
    assert unfinished(family.parent) == []
    assert not (family.parent / "out" / "bundles" / "points-1.0.0").exists()


NOT_EXPORTABLE: dict[str, tuple[str, str, str]] = {
    "train mode": (".eval()", ".train()", "export: the module is in train mode, call .eval() first"),
    "an operator that ONNX lacks": (
        "self.dense(x)", "torch.linalg.eigvals(self.dense(x)[:, :1, None]).real[:, 0]", "export: ",
    ),
    "a branch on values": (
        "return self.dense(x)", "return self.dense(x) if x.sum() > 0 else x", "export: ",
    ),
    "NaN": ("self.dense(x)", "self.dense(x) * float('nan')", "is not finite on the examples"),
    "no module": ("return Net().eval()", "return 7", "export: nets.py:edge returned int, expected a"),
    "weights alone": (
        "return Net().eval()", "return Net().state_dict()", "load these weights with load_state_dict",
    ),
    "a function that raises": (
        "torch.manual_seed(0)", "[][1]",
        "export: source.torch: nets.py:edge raised IndexError: list index out of range (nets.py, line",
    ),
    "too few arguments": ("(splits, progress)", "(splits)", "is called with (splits, progress): too"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_EXPORTABLE)
def test_a_module_that_cannot_be_exported_is_told_in_one_sentence(
    with_torch: Path, what: str
) -> None:
    before, after, says = NOT_EXPORTABLE[what]
    change(with_torch / "nets.py", before, after)
    said = sentence(build(with_torch))
    assert said.startswith("points 1.0.0: export: ")
    assert says in said
    assert unfinished(with_torch.parent) == []


TWO_INPUTS = """
import torch


class Net(torch.nn.Module):
    def forward(self, minuend, amount):
        return torch.nn.functional.pad(minuend - amount, (0, 1))


def edge(splits, progress):
    return Net().eval()
"""


def test_several_inputs_reach_a_module_by_their_names(with_torch: Path, tmp_path: Path) -> None:
    (with_torch / "pairs.py").write_text(TWO_INPUTS)
    (with_torch / "misnamed.py").write_text(TWO_INPUTS.replace("minuend", "x"))
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=(64, 2)).astype(np.float32) for name in ("amount", "minuend")}
    data = tmp_path / "pairs.npz"
    np.savez(data, allow_pickle=False, **{f"input.{name}": each for name, each in given.items()})
    options = ["--data", data, "--out", tmp_path / "out", "--output", "y"]
    options += ["--cache", tmp_path / "steps"]

    result = run("export", f"{with_torch / 'pairs.py'}:edge", *options)
    assert result.exit_code == 0, result.output
    found = Session(tmp_path / "out" / "fp32.onnx").run(given, 64)["y"]
    np.testing.assert_allclose(found[:, :2], given["minuend"] - given["amount"], rtol=1e-6)

    said = sentence(run("export", f"{with_torch / 'misnamed.py'}:edge", *options))
    assert "forward(x, amount) must name its first parameters as the inputs" in said


def test_a_file_that_cannot_be_imported_is_told_before_anything_is_made(with_torch: Path) -> None:
    change(with_torch / "nets.py", "import torch", "import troch")
    said = sentence(build(with_torch))
    assert "source.torch: nets.py cannot be imported: ModuleNotFoundError" in said
    assert not (with_torch.parent / "steps").exists()


def test_the_traceback_of_a_recipes_own_function_is_there_on_demand(family: Path) -> None:
    change(family / "data.py", "rng = np", "raise RuntimeError('no disk')\n    rng = np")
    result = run("--traceback", "build", family, "--cache", family.parent / "steps")
    said = sentence(result)
    assert "--traceback" not in said
    assert 'data.py", line 14, in points' in result.stderr
    assert "RuntimeError: no disk" in result.stderr


def test_a_disk_that_cannot_be_written_is_said(family: Path) -> None:
    (family.parent / "file").write_text("in the way")
    out = family.parent / "file" / "out"
    assert "cannot write beside" in sentence(build(family, "--out", out))
    assert "Not a directory" in sentence(build(family, "--cache", out))


def items(folder: Path, name: str, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 400)
    x = np.array([[-1, 0], [1, 0], [0, 1]])[labels] + rng.normal(0, 0.3, (400, 2))
    path = folder / f"{name}.npz"
    archive.save(path, {"input.x": x.astype(np.float32), "label": labels})
    return path


def test_a_file_that_nobody_here_made_goes_through_every_command(
    built: Path, tmp_path: Path
) -> None:
    family = built / "points"
    training, held_out, calibration = (
        items(tmp_path, name, seed) for seed, name in enumerate(("training", "held", "calibration"))
    )
    exported, cache = tmp_path / "exported", tmp_path / "steps"
    result = run(
        "export", family / "edge.onnx", "--data", training, "--out", exported, "--cache", cache
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in exported.iterdir()) == [
        "exported.json", "fp32.onnx", "golden.npz",
    ]  # fmt: skip
    fp32, int8 = exported / "fp32.onnx", tmp_path / "int8.onnx"
    result = run("quantize", fp32, "--form", "int8-qdq", "--data", training, "--out", int8)
    assert result.exit_code == 0, result.output
    result = run("evaluate", fp32, int8, "--data", held_out, "--hub", family / "hub.onnx")
    assert result.exit_code == 0, result.output
    assert "400 items of 400 scenes, against fp32" in result.output
    assert "as hub " in result.output
    made = run(
        "bundle", fp32, "--name", "points", "--version", "2.0.0", "--training", training,
        "--task", "tabular-classification",
        "--evaluation", held_out, "--calibration", calibration, "--labels", "left, right, up",
        "--escalates-to", built / "out" / "bundles" / "points-hub-1.0.0", "--alpha", "0.1",
        "--variant", "fp32", "--parent", built / "out" / "bundles" / "points-1.0.0",
        "--out", tmp_path / "out", "--cache", cache,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    result = run(
        "certify", tmp_path / "out/bundles/points-2.0.0", "--alpha", "0.1", "--data", training,
        "--hub", built / "out/bundles/points-hub-1.0.0",
    )  # fmt: skip
    assert "points 2.0.0 has learnt from these items, as training.npz" in sentence(result)
    found = release.read(tmp_path / "out" / "bundles" / "points-2.0.0")
    assert found.bundle.labels == ("left", "right", "up")
    assert found.bundle.parent is not None
    assert found.bundle.parent.version == "1.0.0"
    assert [each.variant for each in found.certificates] == ["fp32"]
    assert unfinished(tmp_path) == []


def test_a_file_that_takes_one_item_at_a_time_is_built_as_it_is(
    family: Path, tmp_path: Path
) -> None:
    for noise, name in enumerate(("hub.onnx", "edge.onnx")):
        model = small_family.net(noise)
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(model, str(family / name))
    result = build(family)
    assert result.exit_code == 0, result.output
    found = release.read(family.parent / "out" / "bundles" / "points-1.0.0")
    assert found.bundle.max_batch == 0
    assert len(found.certificates) == 2
    held_out = items(tmp_path, "held", 5)
    result = run("evaluate", family / "edge.onnx", "--data", held_out)
    assert result.exit_code == 0, result.output
    assert "batch 1 " in result.output
    assert "batch 32" not in result.output


def test_a_net_that_ends_in_a_softmax_is_as_certain_as_it_says(family: Path, built: Path) -> None:
    for noise, name in enumerate(("hub.onnx", "edge.onnx")):
        model = small_family.net(noise)
        model.graph.node[-1].output[0] = "logits"
        model.graph.node.append(onnx.helper.make_node("Softmax", ["logits"], ["y"]))
        onnx.save(model, str(family / name))
    result = build(family)
    assert result.exit_code == 0, result.output
    logits, shares = (
        release.read(folder / "out" / "bundles" / "points-1.0.0")
        for folder in (built, family.parent)
    )
    assert shares.bundle.score == Score("max_probability", "y")
    # The same net, so the same items are certain, and as often right as it says.
    for one, other in zip(logits.certificates, shares.certificates, strict=True):
        assert other.escalation_rate == pytest.approx(one.escalation_rate, abs=0.03)
    before, after = (
        json.loads((each.path / "report.json").read_text())["figures"]["evaluation"]["variants"]
        for each in (logits, shares)
    )
    for variant in ("fp32", "int8-qdq"):
        assert after[variant]["calibration_error"] == pytest.approx(
            before[variant]["calibration_error"], abs=0.02
        )


def test_a_form_that_loses_answers_is_refused_with_how_to_mend_it(family: Path) -> None:
    lost = onnx_nets.random(2, 16)
    lost[:, :2] *= 1e-4  # of the steps that the others need, none is left for what decides
    decides = np.zeros((16, 3), np.float32)
    decides[0, 1] = decides[1, 2] = 1e4
    onnx.save(onnx_nets.mlp(lost, decides), str(family / "edge.onnx"))
    change(family / "recipe.toml", "min_agreement = 0.9", "min_agreement = 1")
    result = build(family)
    assert result.exit_code == 0, result.output
    assert "points 1.0.0: int8-qdq refused: " in result.stderr
    assert "give the release of a recipe sweep = { int8-qdq = 0.99 }" in result.stderr
    change(family / "recipe.toml", 'model = "points"', 'sweep = { int8-qdq = 1 }\nmodel = "points"')
    result = build(family)
    assert "give the release of a recipe sweep" not in result.stderr


def test_a_single_output_is_no_choice_among_classes(family: Path) -> None:
    onnx.save(onnx_nets.mlp(onnx_nets.random(2, 1)), str(family / "hub.onnx"))
    said = sentence(build(family))
    assert "output 'y' is one number, which is no choice among classes" in said
    assert "1 - p and p" in said


def test_a_file_with_open_sizes_is_built_from_what_its_refusal_proposes(
    family: Path, tmp_path: Path
) -> None:
    model = small_family.net(0)
    model.graph.input[0].type.tensor_type.shape.dim[1].Clear()
    onnx.save(model, str(family / "open.onnx"))
    training = items(tmp_path, "training", 0)
    command = (
        "export", family / "open.onnx", "--data", training, "--out", tmp_path / "exported",
        "--cache", tmp_path / "steps",
    )  # fmt: skip
    proposed = sentence(run(*command)).partition("dynamic = ")[2].partition(" in the recipe")[0]
    result = run(*command, "--dynamic", proposed)
    assert result.exit_code == 0, result.output
    made = onnx.load(str(tmp_path / "exported" / "fp32.onnx"))
    sizes = [size.dim_value for size in made.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [0, archive.read(training)["input.x"].shape[1]]  # the batch stays open


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("export", "{family}/none.onnx", "--data", "{data}", "--out", "{out}"), "none.onnx: No such"),
        (("export", "{family}/edge.onnx", "--data", "{family}/none.npz", "--out", "{out}"), "No such"),
        (
            ("export", "{family}/edge.onnx", "--data", "{data}", "--out", "{family}/data.py/out"),
            "data.py/out: Not a directory",
        ),
        (("export", "{family}/data.py:nets", "--data", "{data}", "--out", "{out}"), "no function nets"),
        (
            ("export", "{family}/nets.py:a", "--data", "{data}", "--out", "{out}", "--argument", "a"),
            "--argument a: Expected '='",
        ),
        (("export", "{family}/data.py", "--data", "{data}", "--out", "{out}"), "data.py:FUNCTION"),
        (
            ("export", "{family}/edge.onnx", "--data", "{data}", "--out", "{out}", "--dynamic", "x"),
            "--dynamic x: Invalid value",
        ),
        (
            ("export", "{family}/edge.onnx", "--data", "{data}", "--out", "{out}",
             "--dynamic", "{{x = {{0 = ['n', 1, 9]}}}}"),
            "source.dynamic.x.0: bounds must rise from 1, for an axis after the batch",
        ),
        (("quantize", "{family}/edge.onnx", "--form", "int8-qdq", "--out", "{out}"), "give it some"),
        (("quantize", "{family}/edge.onnx", "--form", "int9", "--out", "{out}"), "known are int8-qdq"),
        (("quantize", "{family}/data.py", "--form", "fp16", "--out", "{out}"), "data.py"),
        (
            ("quantize", "{family}/edge.onnx", "--form", "int8-dynamic", "--out", "{family}/no/a.onnx"),
            "cannot write",
        ),
        (("evaluate", "{family}/data.py", "--data", "{data}"), "data.py"),
        (("evaluate", "{family}/edge.onnx", "{family}/edge.onnx", "--data", "{data}"), "same name"),
        (
            ("evaluate", "{family}/edge.onnx", "--data", "models/digits/calibration.npz"),
            "edge.onnx: it takes the inputs x, given are image",
        ),
        (
            ("bundle", "{family}/edge.onnx", "--name", "A", "--version", "1", "--training", "{data}",
             "--task", "tabular-classification", "--evaluation", "{data}", "--out", "{out}"), "must be lower-case letters",
        ),
        (
            ("bundle", "{family}/edge.onnx", "--name", "a", "--version", "1.0.0", "--task", "chess",
             "--training", "{data}", "--evaluation", "{data}", "--out", "{out}"),
            "the options: task: input should be",
        ),
        (
            ("bundle", "{family}/edge.onnx", "--name", "a", "--version", "1.0.0",
             "--task", "tabular-classification", "--training", "{data}", "--evaluation", "{data}", "--out", "{out}"), "overlap",
        ),
    ],
)  # fmt: skip
def test_a_command_given_what_it_cannot_use_says_so_and_writes_nothing(
    family: Path, tmp_path: Path, command: tuple[str, ...], says: str
) -> None:
    places = {"family": family, "out": tmp_path / "made", "data": items(tmp_path, "some", 1)}
    arguments = [part.format(**places) for part in command]
    if command[0] in ("export", "bundle"):
        arguments += ["--cache", str(tmp_path / "steps")]
    before = sorted(os.listdir(tmp_path))
    assert says in sentence(run(*arguments))
    assert sorted({*os.listdir(tmp_path)} - {"steps"}) == before
    assert unfinished(tmp_path) == []
