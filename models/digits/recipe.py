"""What ``fogline-models build digits`` does: four bundles, the calibration set, demo traffic.

Every random number has a seed that was fixed before anything was measured. Severity of the
scanner and size of the nets were chosen on training and evaluation digits; calibration, demo
traffic and drift were looked at only when all that was decided.
"""

import copy
import dataclasses
import datetime
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fogline_models import archive, bundle, certify, evaluate
from fogline_models.errors import BadInput
from fogline_models.export import OPSET, export
from fogline_models.quantize import quantize
from fogline_models.session import CPU, Session, hardware_class
from fogline_protocol import release
from fogline_protocol.release import Bundle, BundleDirectory, Pairing, Score, SelfTest, Variant
from fogline_protocol.score import FUNCTIONS, MAX_SOFTMAX
from fogline_protocol.tensors import Array, TensorSpec

from . import data, nets

Say = Callable[[str], None]

INPUTS = (TensorSpec("image", "FP32", (-1, 1, data.SIDE, data.SIDE)),)
OUTPUTS = (TensorSpec("logits", "FP32", (-1, nets.CLASSES)),)
LABELS = tuple(str(digit) for digit in range(nets.CLASSES))
SELF_TEST = "selftest.npz"

TERMS = certify.Terms(alpha=0.05, delta=0.05)
SAMPLING = "one scanned copy per digit, from the writers of the traffic, severity uniform"
EVALUATION_COPIES = 20  # of 105 digits: 2,100 items, but 105 scenes
RANGE_COPIES = 10  # with one, a darker copy met later was clipped and its logits moved by 1.5
LATENCY_BATCHES = (1, 32)

# Every set of scanned copies has its own stream of randomness.
SEEDS = {"ranges": 1, "self_test": 2, "calibration": 3, "evaluation": 4, "traffic": 5, "drift": 6}


@dataclass(frozen=True, slots=True)
class Plan:
    """One release: which net, how it is trained, and how it is offered."""

    model: str
    version: str
    net: Callable[[], nn.Sequential]
    training: nets.Training
    max_batch: int
    variants: tuple[str, ...]  # the one to prefer first
    what: str

    @property
    def title(self) -> str:
        """What people call the release."""
        return f"{self.model} {self.version}"

    @property
    def folder(self) -> str:
        """The name of its bundle's folder."""
        return f"{self.model}-{self.version}"


HUB = Plan(
    "digits-hub",
    "1.0.0",
    nets.hub_net,
    nets.Training(epochs=150, max_learning_rate=5e-3),
    max_batch=256,
    # fp32 first: a certificate names the hub's file but not the hub's processor, so the hub
    # serves the file whose answers are the same on all of them.
    variants=("fp32", "int8-qdq"),
    what="the large net on the hub",
)
EDGE = Plan(
    "digits",
    "1.0.0",
    lambda: nets.edge_net(12),
    nets.Training(epochs=15),
    max_batch=64,
    variants=("int8-qdq", "fp32"),
    what="a net made small on purpose, trained briefly",
)
BETTER_EDGE = Plan(
    "digits",
    "1.1.0",
    lambda: nets.edge_net(16),
    nets.Training(epochs=250),
    max_batch=64,
    variants=("int8-qdq", "fp32"),
    what="a little wider and trained for longer",
)
BROKEN_EDGE = dataclasses.replace(
    BETTER_EDGE, version="1.2.0", what="1.1.0 built again, with an accident in the build"
)

PRECISIONS = {"fp32": "fp32", "int8-qdq": "int8"}


@dataclass(frozen=True, slots=True)
class Items:
    """Every set of scanned copies that releases are made and measured with."""

    ranges: data.Images
    self_test: data.Images
    clean: data.Split
    scanned: data.Images
    scanned_labels: data.Labels


@dataclass(frozen=True, slots=True)
class Built:
    """A trained release's files and what is known about them, before it is bundled."""

    contents: bundle.Contents
    figures: Mapping[str, Mapping[str, object]]  # by variant
    logits: Mapping[str, Array]  # by variant, on the scanned evaluation copies


def build(out: Path, say: Say) -> None:
    """Make every file of the family below ``out``: about a minute on one core."""
    splits = data.splits()
    say("digits: " + ", ".join(f"{name} {len(split.rows)}" for name, split in splits.items()))
    _write_data(out, splits)
    items = Items(
        ranges=_scanned(splits["training"], "ranges", RANGE_COPIES),
        self_test=_scanned(splits["self_test"], "self_test"),
        clean=splits["evaluation"],
        scanned=_scanned(splits["evaluation"], "evaluation", EVALUATION_COPIES),
        scanned_labels=np.tile(splits["evaluation"].labels, EVALUATION_COPIES),
    )
    calibration = certify.read_calibration(out / "calibration.npz")
    bundles = out / "bundles"

    hub_net = _train(HUB, splits["training"], say)
    hub = _build(HUB, hub_net, hub_net, items, None, say)
    with bundle.assembled(bundles / HUB.folder, hub.contents) as directory:
        _check_golden(directory)
        bundle.write_report(directory, _report(HUB, hub_net, hub, directory, items))
    hub_directory = release.read(bundles / HUB.folder)
    pairing = Pairing(HUB.model, hub_directory.sha256)

    for plan in (EDGE, BETTER_EDGE):
        net = _train(plan, splits["training"], say)
        edge = _build(plan, net, net, items, pairing, say)
        with bundle.assembled(bundles / plan.folder, edge.contents) as directory:
            _check_golden(directory)
            report = _report(plan, net, edge, directory, items)
            report["certified"] = [
                _certify(directory, hub_directory, calibration, variant, edge, hub, items, say)
                for variant in plan.variants
            ]
            bundle.write_report(directory, report)

    # The accident: between training and export the last layer's rows moved by one class. File,
    # digests and reference are in order, so nothing but the self-test can tell. It gets no
    # certificate, and skips the check that would have kept it in the workshop.
    broken = _build(BROKEN_EDGE, net, _with_rotated_classes(net), items, pairing, say)
    with bundle.assembled(bundles / "broken" / BROKEN_EDGE.folder, broken.contents):
        say(f"{BROKEN_EDGE.title}: bundled unchecked, broken on purpose")


def _write_data(out: Path, splits: Mapping[str, data.Split]) -> None:
    archive.save(
        out / "calibration.npz",
        {
            "input.image": _scanned(splits["calibration"], "calibration"),
            "label": splits["calibration"].labels,
            "scene": splits["calibration"].rows,
            "sampling": np.array(SAMPLING),
        },
    )
    arrays: dict[str, Array] = {}
    for name, split in (("main", splits["traffic"]), ("drift", splits["drift"])):
        seed_name = "traffic" if name == "main" else "drift"
        images = _scanned(split, seed_name, data.TRAFFIC_COPIES)
        order = np.random.default_rng([SEEDS[seed_name], 1]).permutation(len(images))
        arrays[f"{name}_images"] = images[order]
        arrays[f"{name}_labels"] = np.tile(split.labels, data.TRAFFIC_COPIES)[order]
        arrays[f"{name}_digit"] = np.tile(split.rows, data.TRAFFIC_COPIES)[order]
    archive.save(out / "traffic.npz", arrays)
    rows = {name: split.rows.tolist() for name, split in splits.items()}
    text = ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in rows.items())
    (out / "splits.json").write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def _scanned(split: data.Split, stream: str, copies: int = 1) -> data.Images:
    rng = np.random.default_rng(SEEDS[stream])
    return np.concatenate([data.scanned(split.images, rng) for _ in range(copies)])


def _train(plan: Plan, split: data.Split, say: Say) -> nn.Sequential:
    every = max(1, plan.training.epochs // 5)

    def progress(epoch: int, loss: float) -> None:
        if epoch % every == 0:
            say(f"{plan.title}: training, epoch {epoch} of {plan.training.epochs}, loss {loss:.3f}")

    return nets.train(plan.net, plan.training, split.images, split.labels, data.scanned, progress)


def _build(
    plan: Plan,
    reference: nn.Sequential,
    shipped: nn.Sequential,
    items: Items,
    escalates_to: Pairing | None,
    say: Say,
) -> Built:
    """Export and quantize ``shipped``, measure it, and describe it against ``reference``."""
    props = {"fogline.model": plan.model, "fogline.version": plan.version}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.onnx") for name in ("fp32", "int8-qdq")}
        say(f"{plan.title}: exporting")
        export(
            shipped,
            INPUTS,
            OUTPUTS,
            {"image": items.self_test},
            plan.max_batch,
            props | {"fogline.variant": "fp32"},
            files["fp32"],
        )
        say(f"{plan.title}: quantizing")
        quantize(
            files["fp32"],
            "int8-qdq",
            {"image": items.ranges},
            props | {"fogline.variant": "int8-qdq"},
            files["int8-qdq"],
        )
        say(f"{plan.title}: evaluating")
        sessions = {name: Session(path) for name, path in files.items()}
        clean, scanned, known = (
            {
                name: session.run({"image": images}, plan.max_batch)["logits"]
                for name, session in sessions.items()
            }
            for images in (
                items.clean.images,
                items.scanned,
                np.concatenate([items.ranges, items.self_test]),
            )
        )
        latencies = evaluate.latencies_us(files, {"image": items.scanned}, LATENCY_BATCHES)
        variants = {name: path.read_bytes() for name, path in files.items()}
    figures: dict[str, dict[str, object]] = {
        name: {
            "bytes": len(variants[name]),
            "accuracy_clean": evaluate.accuracy(clean[name], items.clean.labels),
            "accuracy_scanned": evaluate.accuracy(scanned[name], items.scanned_labels),
            "agreement_with_fp32": evaluate.agreement(scanned[name], scanned["fp32"]),
            "median_latency_us": latencies[name],
        }
        for name in plan.variants
    }
    # Tolerances compare a variant with what its net computes: the reference is not the accident.
    tolerances = {
        name: evaluate.tolerance(known["fp32"], known[name], PRECISIONS[name])
        for name in plan.variants
    }
    root = Bundle(
        model=plan.model,
        version=plan.version,
        inputs=INPUTS,
        outputs=OUTPUTS,
        max_batch=plan.max_batch,
        labels=LABELS,
        description=f"Handwritten digits, 8 by 8 pixels: {plan.what}.",
        variants=tuple(
            Variant(name, f"variants/{name}.onnx", PRECISIONS[name], (CPU,))
            for name in plan.variants
        ),
        self_test=SelfTest(SELF_TEST, tolerances),
        files={},
        score=Score(MAX_SOFTMAX, "logits"),
        escalates_to=escalates_to,
    )
    contents = bundle.Contents(
        root=root,
        variants={name: variants[name] for name in plan.variants},
        golden_inputs={"image": items.self_test},
        golden_outputs={"logits": _reference(reference, items.self_test)},
        card=_card(plan, reference, figures),
    )
    return Built(contents, figures, scanned)


def _reference(net: nn.Sequential, images: data.Images) -> Array:
    with torch.no_grad():
        logits: Array = net(torch.from_numpy(images)).numpy()
    return logits


def _with_rotated_classes(net: nn.Sequential) -> nn.Sequential:
    broken = copy.deepcopy(net)
    with torch.no_grad():
        for part in broken[-1].parameters():
            part.copy_(part.roll(1, dims=0))
    return broken


def _check_golden(directory: BundleDirectory) -> None:
    for variant in directory.bundle.variants:
        problem = evaluate.golden(directory, variant.name).problem
        if problem is not None:
            raise BadInput(
                f"{directory.bundle.model} {directory.bundle.version}, variant {variant.name}: "
                f"fails its own self-test, {problem}"
            )


def _certify(
    directory: BundleDirectory,
    hub_directory: BundleDirectory,
    calibration: certify.CalibrationSet,
    variant: str,
    edge: Built,
    hub: Built,
    items: Items,
    say: Say,
) -> dict[str, object]:
    """Issue one certificate and return what it gives on the evaluation copies."""
    served = HUB.variants[0]
    issued = certify.certify(
        directory,
        hub_directory,
        calibration,
        TERMS,
        issued_at=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        variant=variant,
        hub_variant=served,
    )
    certify.save(issued, certify.folder_of(directory))
    logits = edge.logits[variant]
    raw = 1 - evaluate.agreement(logits, hub.logits[served])
    both = evaluate.hybrid(
        logits,
        hub.logits[served],
        FUNCTIONS[MAX_SOFTMAX](logits),
        items.scanned_labels,
        issued.threshold,
    )
    say(
        f"{issued.model} {issued.version} {variant}: threshold {issued.threshold:.4f}, on "
        f"evaluation digits {both.share_edge:.1%} at the edge, disagreement {raw:.1%} without "
        f"and {both.disagreement:.1%} with escalation; accuracy edge {both.accuracy_edge:.1%}, "
        f"hybrid {both.accuracy_hybrid:.1%}, hub {both.accuracy_hub:.1%}"
    )
    return {
        "variant": variant,
        "hub_variant": served,
        "threshold": issued.threshold,
        "allowed_losses": issued.allowed_losses,
        "scenes": issued.scenes,
        "escalation_rate_calibration": issued.escalation_rate,
        "escalation_rate_upper": issued.escalation_rate_upper,
        "evaluation": dataclasses.asdict(both) | {"disagreement_if_never_escalated": raw},
    }


def _report(
    plan: Plan, net: nn.Sequential, built: Built, directory: BundleDirectory, items: Items
) -> dict[str, object]:
    return {
        "model": plan.model,
        "version": plan.version,
        "bundle_sha256": directory.sha256,
        "parameters": nets.parameters(net),
        "training": dataclasses.asdict(plan.training),
        "opset": OPSET,
        "evaluation": {
            "clean_items": len(items.clean.rows),
            "scanned_items": len(items.scanned),
            "scenes": len(items.clean.rows),
        },
        "variants": built.figures,
        "golden": {
            variant.name: dataclasses.asdict(evaluate.golden(directory, variant.name))
            for variant in directory.bundle.variants
        },
        "machine": {
            "hardware_class": hardware_class(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numpy", "onnx", "onnxruntime", "torch")},
        },
    }


INT8_NOTE_EDGE = """
On a net this small int8 saves about half of the bytes and no time: on x86, with VNNI and without, it
was measured slower than fp32, because quantizing costs more than the multiplications it saves. It
ships because it is the form that pays on larger nets, and so that a release takes the whole way.
Its weights use 7 of their 8 bits, so that the one file is right on processors without VNNI, too.
"""
INT8_NOTE_HUB = """
int8 pays here: about a quarter of the bytes, and faster, most of all in batches. Its weights use 7 of
their 8 bits, so that the one file is right on processors without VNNI, too. The hub serves fp32 all
the same: a certificate compares with one file, and fp32 answers alike on every processor.
"""


def _card(plan: Plan, net: nn.Sequential, figures: Mapping[str, Mapping[str, object]]) -> str:
    rows = "\n".join(
        f"| {name} | {figure['bytes']:,} | {figure['accuracy_clean']:.1%} "
        f"| {figure['accuracy_scanned']:.1%} | {figure['agreement_with_fp32']:.1%} |"
        for name, figure in figures.items()
    )
    counts = {name: len(rows) for name, rows in data.split_rows().items()}
    listed = ", ".join(f"{name.replace('_', '-')} {count}" for name, count in counts.items())
    escalation = (
        "It is the hub's half of the pair: it answers what `digits` is not certain of."
        if plan is HUB
        else "It escalates to `digits-hub` whatever its certificate does not cover."
    )
    best = figures[plan.variants[0]]
    head = {
        "library_name": "onnx",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "fogline", "edge", "handwritten-digits"],
        "datasets": ["optical-recognition-of-handwritten-digits"],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": f"{plan.title}",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {
                            "name": "UCI optical digits, scanned copies",
                            "type": "optical-recognition-of-handwritten-digits",
                        },
                        "metrics": [
                            {
                                "type": "accuracy",
                                "value": round(float(str(best["accuracy_scanned"])), 4),
                            }
                        ],
                    }
                ],
            }
        ],
    }
    body = f"""
# {plan.title}

Tells handwritten digits of 8 by 8 pixels apart: {plan.what}; {nets.parameters(net):,} parameters.
{escalation}

Input `image`, FP32 `[n, 1, 8, 8]`, ink from 0 to 1. Output `logits`, FP32 `[n, 10]`, one per digit.
Up to {plan.max_batch} rows in a run.

| variant | bytes | accuracy, clean | accuracy, scanned | answers as fp32 |
|---|---|---|---|---|
{rows}

*Clean* are {counts["evaluation"]} digits that no other split holds, *scanned* {EVALUATION_COPIES}
copies of each as a cheap scanner sees them (turned, shifted, sheared, faded, noisy): copies of one
digit are not independent, so read these as figures on {counts["evaluation"]} scenes.
{INT8_NOTE_HUB if plan is HUB else INT8_NOTE_EDGE}
Timings of the machine that built this are in `report.json`.

## Data

The 1,797 digits of the UCI set *Optical Recognition of Handwritten Digits* (E. Alpaydin, C. Kaynak,
CC BY 4.0) that scikit-learn carries, split by blocks of rows, which stand for groups of writers:
{listed}.
No digit is in two splits. Augmentation comes after the split.

## Limits

Trained for a demonstration: one seed, one data set, one simulated scanner. On writers it has not
seen its accuracy is lower, and its certificate says nothing about them.
"""
    return bundle.model_card(head, body)
