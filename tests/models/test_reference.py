"""The printed recipe is one, has every key with what it means, and hides no default."""

import dataclasses
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fogline_models import archive, recipe, reference
from fogline_models.cli import main
from fogline_models.gates import Gates
from fogline_models.recipe import Accident, Certificate, Data, Recipe, ReleaseRecipe, Source

TABLES = (Recipe, Data, Source, ReleaseRecipe, Gates, Certificate, Accident)
DEFAULT = re.compile(r"^#(?=\w+ = )", re.MULTILINE)


def written(folder: Path, text: str) -> Recipe:
    (folder / recipe.FILE).write_text(text)
    return recipe.read(folder)


def test_it_is_a_recipe_and_uncommenting_its_defaults_changes_nothing(tmp_path: Path) -> None:
    text = reference.text()
    whole, defaults = DEFAULT.subn("", text)
    assert defaults > 25
    assert written(tmp_path, whole) == written(tmp_path, text)


@pytest.mark.parametrize("table", TABLES)
def test_every_key_is_there_with_what_it_means(table: type) -> None:
    said = reference.comments(table)
    text = reference.text()
    for field in dataclasses.fields(table):
        if (table, field.name) == (Recipe, "folder"):
            continue  # not for a recipe to say
        assert said[field.name], f"say what {table.__name__}.{field.name} means"
        assert re.search(rf"(^#? ?|\[|\.|; |: ){field.name}\b", text, re.MULTILINE), field.name


def test_every_task_form_and_score_is_named() -> None:
    text = reference.text()
    for known in reference.CHOICES.values():
        assert all(name in text for name in known)


def test_it_fits_a_page_and_a_terminal() -> None:
    lines = reference.text().splitlines()
    assert all(len(line) <= 105 for line in lines)
    assert len(lines) < 200


def test_the_command_prints_it_and_building_names_the_command() -> None:
    result = CliRunner().invoke(main, ["recipe"])
    assert result.exit_code == 0
    assert result.output == reference.text()
    assert tomllib.loads(result.output)["task"] == "tabular-classification"
    assert "fogline-models recipe" in CliRunner().invoke(main, ["build", "--help"]).output


@pytest.mark.workshop
def test_what_it_prints_is_built_with_the_files_it_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")
    from tests.models import small_family

    # Timing may not decide here; an example's calibration set is too small for 1 %.
    text = reference.text().replace("#max_latency_ratio = 1.0", "max_latency_ratio = 1e9")
    text = text.replace("#alpha = 0.01", "alpha = 0.1")
    for noise, name in ((0, "hub.onnx"), (1, "edge.onnx")):
        onnx.save(small_family.net(noise), str(tmp_path / name))
    rng = np.random.default_rng(0)
    for name in ("training", "evaluation", "calibration"):
        labels = rng.integers(0, 3, 400)
        x = np.array([[-1, 0], [1, 0], [0, 1]])[labels] + rng.normal(0, 0.3, (400, 2))
        archive.save(tmp_path / f"{name}.npz", {"input.x": x.astype("f4"), "label": labels})

    def card(text: str) -> str:
        (tmp_path / recipe.FILE).write_text(text)
        options = ("--cache", tmp_path / "steps", "--out", tmp_path)
        result = CliRunner().invoke(main, ["build", str(tmp_path), *map(str, options)])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "bundles/pumps-1.0.0/certificates").is_dir()
        return (tmp_path / "bundles/pumps-1.0.0/README.md").read_text()

    found = card(text)
    assert 'pipeline_tag: "tabular-classification"' in found
    assert "license" not in found  # which only the author of a model can give
    assert 'license: "mit"' in card(text.replace('#license = ""', 'license = "mit"'))
