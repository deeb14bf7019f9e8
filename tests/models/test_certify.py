"""Certifying on this machine: what is measured, what is promised, what is refused."""

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fogline_models import archive, bound, bundle, certify, data
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_models.session import Session, hardware_class
from fogline_protocol import certificate, release
from fogline_protocol.release import BundleDirectory, Pairing
from fogline_protocol.score import max_softmax
from fogline_protocol.tensors import Array
from tests.certificates import certificate as made_certificate

NOW = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
TERMS = certify.Terms(alpha=0.05)


@pytest.fixture(scope="module")
def edge(digits: Path) -> BundleDirectory:
    return release.read(digits / "bundles" / "digits-1.0.0")


@pytest.fixture(scope="module")
def hub(digits: Path) -> BundleDirectory:
    return release.read(digits / "bundles" / "digits-hub-1.0.0")


@pytest.fixture(scope="module")
def items(digits: Path) -> Items:
    return data.read(digits / "calibration.npz")


def issue(
    edge: BundleDirectory,
    hub: BundleDirectory,
    items: Items,
    terms: certify.Terms = TERMS,
    variant: str = "int8-qdq",
) -> certificate.Certificate:
    return certify.certify(edge, hub, items, terms, issued_at=NOW, variant=variant)


def with_images(items: Items, images: Array) -> Items:
    return dataclasses.replace(items, inputs={"image": images}, scenes=np.arange(len(images)))


def rebuilt(
    source: BundleDirectory, target: Path, variant: bytes, escalates_to: Pairing | None = None
) -> BundleDirectory:
    """Write a bundle like ``source`` whose every variant is the file ``variant``."""
    arrays = archive.read(source.file(source.bundle.self_test.path))
    root = dataclasses.replace(source.bundle, files={}, escalates_to=escalates_to)
    contents = bundle.Contents(
        root=root,
        variants={v.name: variant for v in root.variants},
        golden_inputs={"image": arrays["input.image"]},
        golden_outputs={"logits": arrays["output.logits"]},
        card="",
    )
    with bundle.assembled(target, contents):
        pass
    return release.read(target)


def test_a_certificate_names_the_files_the_machine_and_the_data(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    found = issue(edge, hub, items)
    assert found.variant_sha256 == edge.variant_sha256(edge.bundle.variant("int8-qdq"))
    assert found.hub_sha256 == hub.variant_sha256(hub.bundle.variants[0])
    assert found.hardware_class == hardware_class()
    assert found.calibration_sha256 == items.sha256
    assert found.sampling == items.sampling
    assert found.expires_at == NOW + datetime.timedelta(days=365)
    assert certificate.parse(found.to_json()) == found


def test_an_edge_that_answers_next_to_nothing_is_said_to() -> None:
    said = [
        certify.sentence(made_certificate(escalation_rate=rate, escalation_rate_upper=1.0))
        for rate in (0.94, 0.95, 1.0)
    ]
    assert ["next to nothing is answered locally" in each for each in said] == [False, True, True]


def test_the_threshold_lets_exactly_the_allowed_losses_through(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    found = issue(edge, hub, items)
    local = Session(edge.file("variants/int8-qdq.onnx")).run(items.inputs, 1)["logits"]
    remote = Session(hub.file("variants/fp32.onnx")).run(items.inputs, 64)["logits"]
    lost = local.argmax(axis=1) != remote.argmax(axis=1)
    answered = max_softmax(local) > found.threshold
    assert lost.sum() > found.allowed_losses  # otherwise this test would say nothing
    assert (lost & answered).sum() == found.allowed_losses == 10
    assert found.escalation_rate == pytest.approx(1 - answered.mean())
    assert found.escalation_rate < found.escalation_rate_upper < 1


def test_a_stricter_promise_escalates_more(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    rates = [issue(edge, hub, items, certify.Terms(a)).escalation_rate for a in (0.05, 0.02, 0.01)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_copies_of_one_scene_do_not_count_as_evidence(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    doubled = dataclasses.replace(
        items,
        inputs={"image": np.repeat(items.inputs["image"], 3, axis=0)},
        scenes=np.repeat(items.scenes, 3),
    )
    once, thrice = issue(edge, hub, items), issue(edge, hub, doubled)
    assert thrice.threshold == once.threshold
    assert (thrice.items, thrice.scenes) == (3 * once.items, once.scenes)


def test_the_hub_file_to_compare_with_can_be_named(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    found = certify.certify(
        edge, hub, items, TERMS, issued_at=NOW, variant="int8-qdq", hub_variant="int8-qdq"
    )
    assert found.hub_sha256 == hub.variant_sha256(hub.bundle.variant("int8-qdq"))


def test_an_edge_that_never_disagrees_never_escalates(
    edge: BundleDirectory, hub: BundleDirectory, items: Items, tmp_path: Path
) -> None:
    same = edge.file("variants/fp32.onnx").read_bytes()
    twin_hub = rebuilt(hub, tmp_path / "hub", same)
    twin = rebuilt(edge, tmp_path / "edge", same, Pairing("digits-hub", twin_hub.sha256))
    found = issue(twin, twin_hub, items, variant="fp32")
    assert found.threshold == bound.ALWAYS
    assert found.escalation_rate == 0.0
    assert certificate.parse(found.to_json()).threshold == bound.ALWAYS


def test_saving_again_replaces_the_certificate_of_its_kind(
    edge: BundleDirectory, hub: BundleDirectory, items: Items, tmp_path: Path
) -> None:
    found = issue(edge, hub, items)
    later = dataclasses.replace(found, issued_at=NOW + datetime.timedelta(days=1))
    paths = {certify.save(each, tmp_path / "certificates") for each in (found, later)}
    assert len(paths) == 1
    assert certificate.parse(paths.pop().read_bytes()) == later
    other = certify.save(dataclasses.replace(found, variant="fp32"), tmp_path / "certificates")
    assert sorted((tmp_path / "certificates").iterdir()) == sorted(
        {other, certify.save(found, tmp_path / "certificates")}
    )


def test_too_few_items_are_said_with_the_number_needed(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    few = with_images(items, items.inputs["image"][:58])
    with pytest.raises(BadInput, match=r"58 independent scenes are too few .* at least 59 are"):
        issue(edge, hub, few)
    with pytest.raises(BadInput, match="at least 3505 are needed"):
        issue(edge, hub, few, certify.Terms(0.001, 0.03))
    assert issue(edge, hub, with_images(items, items.inputs["image"][:59])).allowed_losses == 0


def test_items_of_one_class_are_refused(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    one = with_images(items, np.repeat(items.inputs["image"][:1], 100, axis=0))
    with pytest.raises(BadInput, match=r"all 100 calibration items the same answer \('\d'\)"):
        issue(edge, hub, one)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda images: images.astype(np.float64), "expected datatype FP32, got FP64"),
        (lambda images: images.astype(np.complex64), "no Open Inference datatype"),
        (lambda images: images[:, :, :7], r"expected shape \[-1, 1, 8, 8\], got \[350, 1, 7, 8\]"),
        (lambda images: np.where(images > 0.9, np.nan, images), "holds values that are not finite"),
    ],
)
def test_items_that_the_model_does_not_take_are_refused(
    edge: BundleDirectory,
    hub: BundleDirectory,
    items: Items,
    change: Callable[[Array], Array],
    says: str,
) -> None:
    with pytest.raises(BadInput, match=says):
        issue(edge, hub, with_images(items, change(items.inputs["image"])))


def test_inputs_of_another_name_are_refused(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    renamed = dataclasses.replace(items, inputs={"picture": items.inputs["image"]})
    with pytest.raises(
        BadInput,
        match=r"takes 'image', and the calibration set has no array input\.image, only input\.picture",
    ):
        issue(edge, hub, renamed)
    bare = dataclasses.replace(renamed, extra=items.inputs)
    with pytest.raises(BadInput, match=r"calls it image: name the array input\.image"):
        issue(edge, hub, bare)
    more = dataclasses.replace(items, inputs={**items.inputs, **renamed.inputs})
    with pytest.raises(
        BadInput, match=r"set has input\.picture, which digits 1\.0\.0 does not take"
    ):
        issue(edge, hub, more)


def test_bundles_that_are_no_pair_are_refused(
    edge: BundleDirectory, hub: BundleDirectory, items: Items, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"digits-hub 1\.0\.0 escalates to no model"):
        issue(hub, edge, items, variant="fp32")
    with pytest.raises(BadInput, match=r"escalates to digits-hub with bundle .*got digits 1\.0\.0"):
        issue(edge, edge, items)
    other = rebuilt(hub, tmp_path / "hub", hub.file("variants/int8-qdq.onnx").read_bytes())
    with pytest.raises(BadInput, match=f"got digits-hub 1.0.0 with bundle {other.sha256[:16]}"):
        issue(edge, other, items)


def test_a_model_file_that_is_none_is_refused(
    edge: BundleDirectory, hub: BundleDirectory, items: Items, tmp_path: Path
) -> None:
    broken = rebuilt(edge, tmp_path / "edge", b"no model", Pairing(hub.bundle.model, hub.sha256))
    with pytest.raises(BadInput, match=r"int8-qdq\.onnx: onnxruntime refuses it"):
        issue(broken, hub, items)


def test_a_variant_or_provider_that_is_not_there_is_named(
    edge: BundleDirectory, hub: BundleDirectory, items: Items
) -> None:
    with pytest.raises(BadInput, match="has no variant 'fp16', it has int8-qdq, fp32"):
        issue(edge, hub, items, variant="fp16")
    with pytest.raises(BadInput, match="provider MadeUpProvider is not in this onnxruntime"):
        certify.certify(
            edge,
            hub,
            items,
            TERMS,
            issued_at=NOW,
            variant="fp32",
            provider="MadeUpProvider",
        )


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, float("nan")])
def test_terms_that_cannot_be_are_refused(wrong: float) -> None:
    with pytest.raises(BadInput, match="alpha must lie between 0 and 1"):
        certify.Terms(alpha=wrong)
    with pytest.raises(BadInput, match="delta must lie between 0 and 1"):
        certify.Terms(delta=wrong)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"image": np.zeros((3, 1))}, r"expected arrays named input\.<name>, found image"),
        ({}, r"expected arrays named input\.<name>, found nothing"),
        ({"input.image": np.zeros((0, 1))}, "expected one row per item"),
        ({"input.image": np.float32(3)}, "found a single number"),
        ({"input.image": np.zeros((3, 1)), "scene": np.arange(2)}, "'scene': 2"),
        ({"input.image": np.zeros((3, 1)), "input.mask": np.zeros(4)}, "'input.mask': 4"),
    ],
)
def test_a_calibration_file_that_contradicts_itself_is_refused(
    tmp_path: Path, arrays: dict[str, Array], says: str
) -> None:
    path = tmp_path / "calibration.npz"
    path.write_bytes(archive.to_bytes({name: np.asarray(a) for name, a in arrays.items()}))
    with pytest.raises(BadInput, match=says):
        data.read(path)


def test_without_scenes_every_item_stands_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    path.write_bytes(archive.to_bytes({"input.image": np.zeros((3, 1), np.float32)}))
    found = data.read(path)
    assert found.independent.tolist() == [0, 1, 2]
    assert found.sampling == "not stated"
