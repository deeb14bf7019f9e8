"""The splits of a recipe: made by its function or read from its files, completed and checked.

    training ─┬─ ranges      what quantization reads its ranges off, unless there is a split for it
              └─ self_test   the golden items, unless there is a split for them

What is held out (evaluation, calibration, tuning, ...) shares no item and no scene with any other.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fogline_models import archive, data, hooks, report
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_models.recipe import Recipe
from fogline_models.steps import Say, Steps, code, digest, tools

SELF_TEST_SCENES = 32  # of training, if there is no split for it
RANGE_SCENES = 1024
TRAINED_ON = ("training", "ranges", "self_test")  # splits that may share items


def made_splits(
    recipe: Recipe, steps: Steps, *, only_training: bool = False
) -> tuple[Mapping[str, Items], tuple[report.Input, ...]]:
    """Return the splits of a recipe by name, and what the report lists of them.

    The step ``data``: they are made or read once, completed, checked, and kept.

    Raises:
        BadInput: the data cannot be had or used, or splits overlap; says which and what to do.
        MissingExtra: a package that the recipe's function needs is not installed.
    """
    folder = recipe.folder
    facts: dict[str, object] = {
        "labels": recipe.labels,
        "per token": recipe.per_token,
        "together": recipe.data.together,
        "only_training": only_training,
        **code(archive, data, sys.modules[__name__]),
    }
    if recipe.data.make:
        facts |= {
            "make": recipe.data.make,
            "hooks": hooks.digests(folder),
            "reads": hooks.hashed(hooks.reads(folder, recipe.reads)),
            **tools("numpy", extra="models"),
        }
    else:
        facts["files"] = {
            name: digest(folder / path, f"data.files.{name}")
            for name, path in recipe.data.files.items()
        }

    def make(into: Path, say: Say) -> None:
        if recipe.data.make:
            found = _splits_of(hooks.load(folder, recipe.data.make, "data.make")(), recipe)
        else:
            found = {name: data.read(folder / p) for name, p in recipe.data.files.items()}
        splits = _completed(found, only_training=only_training)
        for name, items in splits.items():
            data.check(items, f"data: split {name}")
            data.check_labels(
                items, recipe.labels, f"data: split {name}", per_token=recipe.per_token
            )
        if "calibration" in splits:
            data.check_classes(splits["calibration"], "data: split calibration")
        data.check_disjoint(splits, (TRAINED_ON, *recipe.data.together))
        for name, items in splits.items():
            data.save(into / f"{name}.npz", items)
        say(", ".join(f"{name} {len(items)}" for name, items in splits.items()))

    place = steps.make(recipe.family, "data", facts, make)
    splits = {path.stem: data.read(path) for path in sorted(place.glob("*.npz"))}
    _check_alike(recipe, splits)
    inputs = tuple(
        report.Input(path.name, splits[path.stem].sha256, path.stat().st_size, "data")
        for path in sorted(place.glob("*.npz"))
    )
    for name in (*recipe.data.also, *recipe.data.publish):
        if name not in splits:
            raise BadInput(f"data: there is no split {name!r}, only {', '.join(splits)}")
    return splits, inputs


def publish(recipe: Recipe, splits: Mapping[str, Items], out: Path) -> None:
    """Write the splits that a recipe publishes, and which scenes each split holds.

    The latter is the claim that no split leaks, to be checked.
    """
    if not recipe.data.publish:
        return
    for name in recipe.data.publish:
        data.save(out / f"{name}.npz", splits[name])
    path = out / "splits.json"
    scenes = {name: np.unique(items.scenes).tolist() for name, items in splits.items()}
    text = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(scenes.items()))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    os.replace(unfinished, path)


def _splits_of(made: object, recipe: Recipe) -> Mapping[str, Items]:
    """Return what the function of a recipe made, if it is splits."""
    wrong = type(made).__name__
    if isinstance(made, Mapping):
        strange = [(key, value) for key, value in made.items() if not isinstance(value, Items)]
        if not strange:
            return made
        wrong = f"a {type(strange[0][1]).__name__} for {strange[0][0]!r}"
    raise BadInput(
        f"data.make: {recipe.data.make} returned {wrong}, expected Items by the name of their "
        "split: {'training': Items(...), ...}"
    )


def _check_alike(recipe: Recipe, splits: Mapping[str, Items]) -> None:
    """Check that what models are run on looks the same in all splits: before one is trained."""
    vary: dict[str, set[int]] = {}
    for each in recipe.release:
        for name, axes in each.source.dynamic.items():
            vary.setdefault(name, set()).update(
                n for n, (_, low, high) in axes.items() if low < high
            )
    # What transformers exported has lengths of its own, which the recipe does not name.
    named = not any(each.source.huggingface for each in recipe.release)
    used = {name: splits[name] for name in recipe.data.used if name in splits}
    data.check_alike(used, vary if named else None)


def _completed(found: Mapping[str, Items], *, only_training: bool) -> dict[str, Items]:
    """Return the splits with those that can be taken from training."""
    splits = dict(found)
    training = splits.get("training")
    if "evaluation" not in splits and not only_training:
        raise BadInput(
            f"data: there is no split evaluation, only {', '.join(splits)}: without held-out "
            "items nothing can be said of a model"
        )
    if training is None and not {"ranges", "self_test"} <= splits.keys():
        raise BadInput("data: there is no split training, so ranges and self_test are needed")
    if training is not None:
        independent = training.independent
        splits.setdefault("ranges", training.rows(independent[:RANGE_SCENES]))
        splits.setdefault("self_test", training.rows(independent[:SELF_TEST_SCENES]))
    else:
        splits["training"] = splits["ranges"]
    return splits
