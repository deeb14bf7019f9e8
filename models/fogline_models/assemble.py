"""Turns what was measured of a release into what ships: gates, bundle, certificates, report.

Quick, and made anew in every build. What is refused is left out of the bundle and stays in the
report. A release whose figures allow nothing, or that fails its own self-test, is not written.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fogline_models import bundle, card, certify, comparison, evaluate, gates, graph, measure, report
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_models.evaluate import Evaluation, HeldOut
from fogline_models.gates import Decision, Verdict
from fogline_models.measure import Cost
from fogline_models.quantize import FORMS
from fogline_models.recipe import FP32, Recipe, ReleaseRecipe
from fogline_models.session import CPU
from fogline_models.sources import Exported
from fogline_models.steps import Say
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import (
    Bundle,
    BundleDirectory,
    Pairing,
    Parent,
    Processing,
    Score,
    SelfTest,
    Tolerance,
    Variant,
)
from fogline_protocol.tensors import Array

BUNDLES = "bundles"
SELF_TEST = "selftest.npz"
SOURCES = "sources.json"
FILES = "files"

# Where a variant may run, best first. A provider that was not measured here gets a tolerance
# wider by a factor: other kernels add in another order, and TF32 keeps 10 bits of a factor.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "fp32": (CPU, "CUDAExecutionProvider"),
    "fp16": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU),
    "int8-trt": ("TensorrtExecutionProvider", CPU),
}
UNMEASURED_FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class Hub:
    """The model that a release escalates to."""

    directory: BundleDirectory

    @property
    def variant(self) -> Variant:
        """The one it serves: its bundle's first."""
        return self.directory.bundle.variants[0]

    @property
    def name(self) -> str:
        """What it is called among the variants of the release."""
        return f"{self.directory.bundle.model} {self.variant.name}"

    @property
    def file(self) -> Path:
        """Where its artifact lies."""
        return self.directory.file(self.variant.path)


@dataclass(frozen=True, slots=True)
class Measured:
    """A release before it is bundled: its files, and all that is known of them."""

    recipe: Recipe
    release: ReleaseRecipe
    exported: Exported
    extras: Mapping[str, bytes]  # further files of the bundle, by name
    golden: Mapping[str, Array]  # input.* and output.*
    files: Mapping[str, Path]  # by variant; fp32 among them
    splits: Mapping[str, Items]
    outputs: Mapping[str, Mapping[str, Array]]  # by split, then variant or the hub's name
    costs: Mapping[str, Cost]
    hub: Hub | None
    parent: BundleDirectory | None
    sources: Mapping[str, object]  # what it was made from, by digest


@dataclass(frozen=True, slots=True)
class Built:
    """One finished release."""

    directory: BundleDirectory
    decisions: tuple[Decision, ...]
    certificates: tuple[Certificate, ...]
    uncertified: str = ""  # why there is no certificate, in one sentence


def finish(
    found: Measured, target: Path, *, now: datetime.datetime, say: Say
) -> Built:
    """Gate, bundle, certify and report one release; it lies at ``target`` when all is done.

    Raises:
        BadInput: nothing of it may ship, it fails its own self-test, or the disk is in the way.
    """
    each = found.release
    signature = graph.signature_of(found.files[FP32], found.release.source.dynamic)
    held_out = _held_out(found, "evaluation")
    shipped_outputs = {name: found.outputs["evaluation"][name] for name in found.files}
    evaluation = evaluate.evaluate(
        shipped_outputs,
        held_out,
        hub=None if found.hub is None else found.outputs["evaluation"][found.hub.name],
        hub_model="hub" if found.hub is None else found.hub.directory.bundle.model,
        vectors=found.recipe.task == "feature-extraction",
    )
    sizes = {name: measure.size_of(path) for name, path in found.files.items()}
    decisions = tuple(
        decision
        for decision in gates.decide(
            each.gates or found.recipe.gates, evaluation, found.costs, sizes
        )
        if decision.variant in found.recipe.variants(each)
    )
    for decision in decisions:
        if decision.verdict is not Verdict.ELIGIBLE:
            say(f"{each.title}: {decision.sentence}")
    allowed = gates.eligible(decisions)
    names = tuple(name for name in found.recipe.variants(each) if name in allowed)
