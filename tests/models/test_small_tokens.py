"""Token classifiers from ONNX files: figures counted by hand, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")
pytest.importorskip("pydantic", reason="needs pydantic: pip install 'fogline[models]'")

import onnx

from fogline_models import archive, data, report
from fogline_models.session import Session
from fogline_protocol import release
from fogline_protocol.score import Score, least_softmax
from tests.models import onnx_nets, small_tokens
from tests.models.small_family import build, change
from tests.models.test_build import run, sentence, unfinished

pytestmark = pytest.mark.workshop


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return small_tokens.write(tmp_path / "texts")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the family's bundles and steps; not to be changed."""
    folder = small_tokens.write(tmp_path_factory.mktemp("built") / "texts")
    result = build(folder)
    assert result.exit_code == 0, result.output
    return folder.parent


def split(built: Path, name: str) -> data.Items:
    (found,) = (built / "steps").rglob(f"{name}.npz")
    return data.read(found)


def answers(directory: release.BundleDirectory, variant: str, items: data.Items) -> Any:
    file = directory.file(directory.bundle.variant(variant).path)
    return Session(file).run(items.inputs, 1)["y"]


def test_accuracy_is_of_labelled_tokens_and_agreement_of_those_that_count(built: Path) -> None:
    edge = release.read(built / "out/bundles/texts-1.0.0")
    hub = release.read(built / "out/bundles/texts-hub-1.0.0")
    items = split(built, "evaluation")
    assert items.labels is not None
    counts, labelled = items.inputs["counts"] != 0, items.labels != -100
    mine = answers(edge, "fp32", items).argmax(axis=-1)
    theirs = answers(hub, hub.bundle.variants[0].name, items).argmax(axis=-1)
    document = report.read(edge.path)
    assert document is not None
    evaluation = document["figures"]["evaluation"]
    fp32 = evaluation["variants"]["fp32"]
    assert (evaluation["items"], evaluation["scenes"]) == (counts.sum(), len(items))
    assert fp32["accuracy"]["items"] == labelled.sum()
    assert fp32["accuracy"]["value"] == pytest.approx((mine == items.labels)[labelled].mean())
    assert fp32["agreement_hub"]["items"] == counts.sum()
    assert fp32["agreement_hub"]["value"] == pytest.approx((mine == theirs)[counts].mean())
    assert np.sum(fp32["confusion"]) == labelled.sum()
    odd = (items.slices == "odd")[:, np.newaxis]
    (part,) = (part for part in fp32["slices"] if part["name"] == "odd")
    assert part["items"] == (counts & odd).sum()
    right = (mine == items.labels)[labelled & odd].mean()
    assert part["accuracy"]["value"] == pytest.approx(right)


def test_the_certificate_counts_texts_with_the_recipes_mask(built: Path) -> None:
    edge = release.read(built / "out/bundles/texts-1.0.0")
    hub = release.read(built / "out/bundles/texts-hub-1.0.0")
    assert edge.bundle.score == Score("least_softmax", "y", mask="counts")
    items = split(built, "calibration")
    counts = items.inputs["counts"] != 0
    theirs = answers(hub, hub.bundle.variants[0].name, items).argmax(axis=-1)
    assert edge.certificates
    for certificate in edge.certificates:
        logits = answers(edge, certificate.variant, items)
        scores = least_softmax(logits, items.inputs["counts"])
        differs = ((logits.argmax(axis=-1) != theirs) & counts).any(axis=1)
        assert differs.sum() > certificate.allowed_losses > 0
        kept = scores > certificate.threshold
        assert (differs & kept).sum() == certificate.allowed_losses
        assert certificate.escalation_rate == pytest.approx(1 - kept.mean())


def test_the_pair_is_right_on_the_tokens_of_whoever_answers_the_text(built: Path) -> None:
    edge = release.read(built / "out/bundles/texts-1.0.0")
    hub = release.read(built / "out/bundles/texts-hub-1.0.0")
    items = split(built, "evaluation")
    document = report.read(edge.path)
    assert document is not None
    assert items.labels is not None
    (found,) = (one for one in document["figures"]["escalation"] if one["variant"] == "fp32")
    logits = answers(edge, "fp32", items)
    local = least_softmax(logits, items.inputs["counts"]) > found["at"]["threshold"]
    other = answers(hub, "fp32", items).argmax(axis=-1)
    labelled = items.labels != -100

    def right(tops: Any) -> Any:
        return pytest.approx((tops == items.labels)[labelled].mean())

    assert found["at"]["escalated"] == pytest.approx(1 - local.mean())
    pair = np.where(local[:, np.newaxis], logits.argmax(axis=-1), other)
    assert found["at"]["accuracy"] == right(pair)
    assert found["accuracy_edge"] == found["curve"][0]["accuracy"] == right(logits.argmax(axis=-1))
    assert found["accuracy_hub"] == found["curve"][-1]["accuracy"] == right(other)
    assert 0.1 < found["at"]["escalated"] < 0.9

    differs = (logits.argmax(axis=-1) != other) & (items.inputs["counts"] != 0)
    texts = differs.any(axis=1)
    assert found["differs"] == pytest.approx(texts.mean())
    elsewhere = ~(differs & labelled).any(axis=1)[texts]  # only where there is no label
    assert found["only_unlabelled"] == pytest.approx(elsewhere.mean())
    assert elsewhere.any()


def test_files_are_evaluated_by_the_mask_that_is_named(built: Path, tmp_path: Path) -> None:
    items = split(built, "evaluation")
    edge = built / "out/bundles/texts-1.0.0/variants/fp32.onnx"
    hub = built / "out/bundles/texts-hub-1.0.0/variants/fp32.onnx"
    data.save(tmp_path / "held-out.npz", items)
    options = ("--data", tmp_path / "held-out.npz", "--mask", "counts", "--json")
    found = json.loads(run("evaluate", edge, "--hub", hub, *options).stdout)["evaluation"]
    figures = report.read(built / "out/bundles/texts-1.0.0")["figures"]  # type: ignore[index]
    assert (
        found["variants"]["fp32"]["accuracy"]
        == figures["evaluation"]["variants"]["fp32"]["accuracy"]
    )
    bare = {f"input.{name}": array for name, array in items.inputs.items()}
    archive.save(tmp_path / "bare.npz", bare)
    without = run("evaluate", edge, "--data", tmp_path / "bare.npz", "--tokens")
    assert "2,400 tokens of 400 scenes" in without.output  # no mask: all of them count
    said = sentence(run("evaluate", edge, "--data", tmp_path / "bare.npz", "--mask", "mask"))
    assert "there is no input 'mask', which says what tokens count" in said
    onnx.save(small_tokens.rows(), str(tmp_path / "rows.onnx"))
    said = sentence(run("evaluate", tmp_path / "rows.onnx", *options))
    assert "output 'rows' is [400, 3]" in said
    said = sentence(run("evaluate", edge, *options[:2], "--vectors"))
    assert "answers for tokens or vectors, not both" in said


def test_a_file_is_bundled_without_a_recipe(built: Path, tmp_path: Path) -> None:
    names = ("training", "evaluation", "calibration")
    for name in names:
        data.save(tmp_path / f"{name}.npz", split(built, name))
    hub = built / "out/bundles/texts-hub-1.0.0"
    made = run(
        "bundle", built / "texts/edge.onnx", "--name", "texts", "--version", "2.0.0",
        "--task", "token-classification", "--labels", "left,right,up", "--mask", "counts",
        *(part for name in names for part in (f"--{name}", tmp_path / f"{name}.npz")),
        "--variant", "fp32", "--escalates-to", hub, "--alpha", "0.05", "--out", tmp_path / "out",
        "--cache", tmp_path / "steps",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    edge = release.read(tmp_path / "out/bundles/texts-2.0.0")
    assert edge.bundle.score == Score("least_softmax", "y", mask="counts")
    before = release.read(built / "out/bundles/texts-1.0.0").certificates
    (mine,) = edge.certificates
    assert mine.threshold in [found.threshold for found in before if found.variant == "fp32"]


def test_two_releases_are_compared_token_by_token(built: Path, tmp_path: Path) -> None:
    items = split(built, "evaluation")
    data.save(tmp_path / "items.npz", items)
    both = (built / "out/bundles/texts-hub-1.0.0", built / "out/bundles/texts-1.0.0")
    found = json.loads(run("compare", *both, "--data", tmp_path / "items.npz", "--json").stdout)
    counts = items.inputs["counts"] != 0
    assert (
        found["answers"]["agreement"]["items"] == np.sum(found["answers"]["matrix"]) == counts.sum()
    )
    assert found["answers"]["counted"] == "tokens"
    assert found["answers"]["accuracy_a"]["items"] == (items.labels != -100).sum()  # type: ignore[union-attr]


def test_a_sweep_looks_at_the_tokens_that_count(family: Path) -> None:
    # 96.5 % of the tokens that count keep their answers in int8, and 97.5 % of all.
    change(
        family / "recipe.toml",
        'onnx = "edge.onnx" }',
        'onnx = "edge.onnx" }\nsweep = { int8-qdq = 0.97 }',
    )
    result = build(family)
    assert result.exit_code == 0, result.output
    assert "texts 1.0.0: quantize int8-qdq: 1 node stays fp32" in result.stderr


def test_the_mask_of_a_sweep_is_one_of_its_inputs(built: Path, tmp_path: Path) -> None:
    data.save(tmp_path / "training.npz", split(built, "training"))
    net, out = built / "texts/edge.onnx", tmp_path / "q.onnx"
    options = (net, "--form", "int8-qdq", "--data", tmp_path / "training.npz", "--out", out)
    said = sentence(run("quantize", *options, "--sweep", 0.97, "--mask", "count"))
    assert said == "quantize: mask: there is no input 'count', only counts, x"
    said = sentence(run("quantize", *options, "--mask", "counts"))
    assert said == "quantize: mask: only a sweep asks what counts: add one, or leave it out"
    assert not out.exists()
    named = run("quantize", *options, "--sweep", 0.97, "--mask", "counts")
    assert "1 node stays fp32" in named.output
    # No mask, and no attention_mask to take for one: all tokens count.
    assert "0 nodes stay fp32" in run("quantize", *options, "--sweep", 0.97).output


def test_another_mask_is_another_sweep_and_the_same_quantization(family: Path) -> None:
    """Besides, what does not depend on it is kept; so with every other key, in test_facts.py."""
    recipe = family / "recipe.toml"
    change(
        family / "data.py",
        '"counts": counts.astype(np.int32)}',
        '"counts": counts.astype(np.int32), "all": np.ones(counts.shape, np.int32)}',
    )
    for name, noise in (("hub", 0), ("edge", 2)):
        net = small_tokens.net(noise)
        net.graph.input.append(onnx_nets.tensor("all", ["n", 6], onnx.TensorProto.INT32))
        onnx.save(net, str(family / f"{name}.onnx"))

    def anew(mask: str) -> set[str]:
        """Build with another mask for the edge's model, and return the steps that were run."""
        hub, _, edge = recipe.read_text().rpartition("mask = ")
        recipe.write_text(f'{hub}mask = "{mask}"{edge[edge.index(chr(10)) :]}')
        result = build(family)
        assert result.exit_code == 0, result.output
        return set(re.findall(r"^\[\d+/\d+\] ([^:]+: [^:]+)$", result.stderr, re.MULTILINE))

    anew("counts")
    assert anew("all") == set()
    change(recipe, 'onnx = "edge.onnx" }', 'onnx = "edge.onnx" }\nsweep = { int8-qdq = 0.97 }')
    anew("counts")
    assert "texts 1.0.0: quantize int8-qdq" in anew("all")


WRONG = {
    "labels of rows": (
        "data.py", "return Items(inputs, labels, ", "return Items(inputs, labels[:, 1], ",
        r"label is [400]: token-classification takes [n, tokens], with -100 where",
    ),
    "labels of other tokens": (
        "data.py", "return Items(inputs, labels, ", "return Items(inputs, labels[:, :5], ",
        "data: release texts-hub 1.0.0: split calibration: label is [400, 5], the tokens are [400, 6]: give one number for each, padding included",
    ),
    "a label that nobody asks for": (
        "data.py", "    inputs =", "    labels[7, 5] = 1; counts[7, 5] = False\n    inputs =",
        "data: release texts-hub 1.0.0: split calibration: item 7 has class 1 at token 5, which its mask does not count",
    ),
    "a class without a name": (
        "data.py", "    inputs =", "    labels[0, 5] = 3\n    inputs =",
        "class numbers reach from 0 to 3, but the recipe names 3 labels",
    ),
    "a negative class": (
        "data.py", "    inputs =", "    labels[0, 5] = -1\n    inputs =",
        "class numbers reach from -1 to 2, but the recipe names 3 labels",
    ),
    "one class": (
        "data.py", "    inputs =", "    labels[labels > 0] = 0\n    inputs =",
        "all labelled tokens of 400 items are of class 0: calibrate on items of every class",
    ),
    "a mask that counts nothing": (
        "data.py", "    inputs =", "    labels[:] = -100; counts[:] = False\n    inputs =",
        "texts-hub 1.0.0: evaluate: the mask of the held-out split counts no token",
    ),
    "a mask that is no input": (
        "recipe.toml", 'mask = "counts"', 'mask = "count"',
        "mask: the model has no input 'count', it takes x, counts",
    ),
    "tokens of a model that has none": (
        "recipe.toml", 'source = { onnx = "hub.onnx" }', 'source = { onnx = "rows.onnx" }',
        "token-classification takes outputs [n, tokens, classes], 'rows' is [-1, 3]",
    ),
    "labels of tokens for another task": (
        "recipe.toml", "token-classification", "image-classification",
        "mask: 'counts' says which tokens count, image-classification has none",
    ),
    "a score of rows": (
        "recipe.toml", 'mask = "counts"', 'mask = "counts"\nscore = "max_softmax"',
        "score: max_softmax does not fit token-classification, whose rows have many answers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_tokens_is_said_in_one_sentence(family: Path, what: str) -> None:
    file, before, after, says = WRONG[what]
    onnx.save(small_tokens.rows(), str(family / "rows.onnx"))
    change(family / file, before, after)
    assert says in sentence(build(family))
    assert not unfinished(family.parent / "out")


def test_labels_of_tokens_are_for_token_classifiers_only(family: Path) -> None:
    recipe = family / "recipe.toml"
    text = recipe.read_text().replace('\nmask = "counts"', "")
    recipe.write_text(text.replace("token-classification", "text-classification"))
    said = sentence(build(family))
    assert "label is [400, 6]: only token-classification takes a label for each token" in said


def test_a_hub_that_says_the_same_of_every_token_certifies_nothing(family: Path) -> None:
    net = small_tokens.net(0)
    for tensor in net.graph.initializer:
        if tensor.name == "w1":
            tensor.CopyFrom(onnx.numpy_helper.from_array(
                np.array([[1, 0, 0]] * 16, np.float32), "w1"
            ))  # fmt: skip
    onnx.save(net, str(family / "hub.onnx"))
    change(family / "recipe.toml", "max_latency_ratio", "min_accuracy = 0\nmax_latency_ratio")
    said = sentence(build(family))
    assert "gives every token of 400 calibration items the same answer ('left')" in said
