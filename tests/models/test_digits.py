"""The committed family: its splits, its bundles, and what its certificates promise."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from digits import data
from fogline_models import certify, evaluate
from fogline_models.data import Items, read
from fogline_models.session import Session, hardware_class
from fogline_protocol import documents, release
from fogline_protocol.release import BundleDirectory
from fogline_protocol.score import max_softmax
from fogline_protocol.tensors import Array
from tests.models import counting

EDGES = ("digits-1.0.0", "digits-1.1.0")
HUB = "digits-hub-1.0.0"
BROKEN = "broken/digits-1.2.0"
ALPHA = 0.05


def bundle(digits: Path, name: str) -> BundleDirectory:
    return release.read(digits / "bundles" / name)


@pytest.fixture
def splits(digits: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((digits / "splits.json").read_text())
    return found


@pytest.fixture(scope="module")
def traffic(digits: Path) -> Items:
    return read(digits / "traffic.npz")


@pytest.fixture(scope="module")
def drift(digits: Path) -> Items:
    return read(digits / "drift.npz")


@pytest.fixture(scope="module")
def calibration(digits: Path) -> Items:
    return read(digits / "calibration.npz")


# Splits


def test_no_digit_serves_two_purposes_and_none_is_forgotten(splits: dict[str, list[int]]) -> None:
    assert splits.pop("ranges") == splits["training"]  # copies of the same digits
    assert splits.pop("clean") == splits["evaluation"]
    everything = list(itertools.chain.from_iterable(splits.values()))
    assert sorted(everything) == list(range(data.TOTAL))


def test_the_committed_splits_are_those_that_the_recipe_makes(
    splits: dict[str, list[int]],
) -> None:
    found = {name: rows.tolist() for name, rows in data.split_rows().items()}
    assert found == {name: rows for name, rows in splits.items() if name in found}


def test_the_writers_of_the_drift_traffic_appear_nowhere_else(
    splits: dict[str, list[int]],
) -> None:
    blocks = {name: {row // data.BLOCK for row in rows} for name, rows in splits.items()}
    drift = blocks.pop("drift") - {data.TOTAL // data.BLOCK + 1}
    assert drift == {11, 12}
    assert all(drift.isdisjoint(others) for others in blocks.values())
    assert blocks["calibration"] == blocks["traffic"] == blocks["evaluation"] == set(range(6, 11))


def test_the_files_hold_digits_of_their_split_only(
    splits: dict[str, list[int]], traffic: Items, drift: Items, calibration: Items
) -> None:
    assert calibration.scenes.tolist() == splits["calibration"]  # one copy each
    for items, split in ((traffic, "traffic"), (drift, "drift")):
        rows, copies = np.unique(items.scenes, return_counts=True)
        assert rows.tolist() == splits[split]
        assert set(copies.tolist()) == {data.TRAFFIC_COPIES}


def test_no_image_is_in_two_files(
    digits: Path, traffic: Items, drift: Items, calibration: Items
) -> None:
    with np.load(digits / "bundles" / HUB / "selftest.npz", allow_pickle=False) as file:
        golden = file["input.image"]
    sets = [*(items.inputs["image"] for items in (calibration, traffic, drift)), golden]
    seen = [{image.tobytes() for image in images} for images in sets]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_the_readme_states_the_counts(
    digits: Path, splits: dict[str, list[int]], traffic: Items, drift: Items
) -> None:
    readme = (digits / "README.md").read_text(encoding="utf-8")
    stated = {
        name.replace("-", "_"): (int(count), items)
        for name, count, items in re.findall(
            r"^\| ([a-z-]+) \| (\d+) \| [\d-]+ \| ([^|]+) \|", readme, re.MULTILINE
        )
    }
    assert {name: count for name, (count, _) in stated.items()} == {
        name: len(splits[name]) for name in data.split_rows()
    }
    assert stated["traffic"][1] == f"{len(traffic):,}"
    assert stated["drift"][1] == f"{len(drift):,}"


def test_items_are_what_the_models_take(traffic: Items, drift: Items, calibration: Items) -> None:
    for items in (traffic, drift, calibration):
        images = items.inputs["image"]
        assert images.dtype == np.float32
        assert images.shape[1:] == (1, data.SIDE, data.SIDE)
        assert images.min() >= 0
        assert images.max() <= 1


def test_the_scanner_is_a_function_of_its_seed_and_spares_nobody() -> None:
    images = np.zeros((50, 1, data.SIDE, data.SIDE), np.float32)
    images[:, :, 2:6, 3:5] = 1
    first, again = (data.scanned(images, np.random.default_rng(0)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({image.tobytes() for image in first}) == len(images)


# Bundles


@pytest.mark.parametrize("name", [*EDGES, HUB, BROKEN])
def test_every_committed_bundle_is_intact(digits: Path, name: str) -> None:
    found = bundle(digits, name)
    assert f"{found.bundle.model}-{found.bundle.version}" == Path(name).name
    assert [variant.path for variant in found.bundle.variants] == [
        f"variants/{variant.name}.onnx" for variant in found.bundle.variants
    ]


@pytest.mark.parametrize("name", [*EDGES, BROKEN])
def test_every_edge_release_is_paired_with_the_hub_and_keeps_its_contract(
    digits: Path, name: str
) -> None:
    edge, hub = bundle(digits, name), bundle(digits, HUB)
    assert edge.bundle.escalates_to is not None
    assert edge.bundle.escalates_to.model == hub.bundle.model
    assert edge.bundle.escalates_to.bundle_sha256 == hub.sha256
    assert edge.bundle.inputs == hub.bundle.inputs
    assert edge.bundle.outputs == hub.bundle.outputs
    assert edge.bundle.labels == hub.bundle.labels == tuple("0123456789")


def test_the_family_stays_small(digits: Path) -> None:
    files = [path for path in digits.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_no_model_file_remembers_where_it_was_made(digits: Path) -> None:
    for path in (digits / "bundles").rglob("*.onnx"):
        content = path.read_bytes()
        assert not any(
            trace in content for trace in (b"/tmp", b"/home", b"/work", b".py", b"site-")
        )


@pytest.mark.parametrize("name", [*EDGES, HUB])
def test_good_releases_pass_their_self_test(digits: Path, name: str) -> None:
    found = bundle(digits, name)
    for variant in found.bundle.variants:
        assert evaluate.golden(found, variant.name).problem is None


def test_no_variant_of_the_broken_release_passes_its_self_test(digits: Path) -> None:
    found = bundle(digits, BROKEN)
    for variant in found.bundle.variants:
        result = evaluate.golden(found, variant.name)
        assert result.problem is not None
        assert result.agreement < 0.2


def test_the_broken_release_is_the_better_one_with_its_answers_moved_by_one(
    digits: Path, traffic: Items
) -> None:
    answers = {
        name: Session(digits / "bundles" / name / "variants" / "fp32.onnx")
        .run(traffic.inputs, 64)["logits"]
        .argmax(axis=1)
        for name in ("digits-1.1.0", BROKEN)
    }
    np.testing.assert_array_equal(answers[BROKEN], (answers["digits-1.1.0"] + 1) % 10)


def test_the_better_release_is_clearly_better(digits: Path, traffic: Items) -> None:
    first, better = (
        counting.accuracy(logits(bundle(digits, name), "int8-qdq", traffic), labels(traffic))
        for name in EDGES
    )
    assert better > first + 0.03


# int8 on every x86 processor

# Where a file keeps its weights, and in which fields of onnx.proto: read by number, because
# the onnx package is not part of an environment that runs these tests.
GRAPH, INITIALIZER = 7, 5  # of ModelProto, of GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA, INT8 = 1, 2, 8, 9, 3  # of TensorProto


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Return the fields of a serialized message as numbers and values, in order."""
    parsed = UnknownFieldSet(Empty.FromString(message))
    return [(field.field_number, field.data) for field in parsed]


def int8_weights(path: Path) -> dict[str, Array]:
    """Return every int8 matrix and kernel of an ONNX file by name."""
    graph = dict(fields(path.read_bytes()))[GRAPH]
    tensors = [fields(value) for number, value in fields(graph) if number == INITIALIZER]
    return {
        dict(tensor)[NAME].decode(): np.frombuffer(dict(tensor)[RAW_DATA], np.int8)
        for tensor in tensors
        if dict(tensor)[DATA_TYPE] == INT8 and sum(number == DIMS for number, _ in tensor) > 1
    }


@pytest.mark.parametrize(("name", "count"), [*((n, 3) for n in (*EDGES, BROKEN)), (HUB, 6)])
def test_int8_weights_leave_room_for_the_sums_of_processors_without_vnni(
    digits: Path, name: str, count: int
) -> None:
    found = int8_weights(digits / "bundles" / name / "variants" / "int8-qdq.onnx")
    assert len(found) == count  # every layer's
    assert {int(np.abs(weights.astype(int)).max()) for weights in found.values()} <= {63, 64}


@pytest.mark.parametrize("name", [*EDGES, HUB])
def test_the_integer_kernels_of_this_machine_compute_what_exact_arithmetic_does(
    digits: Path, traffic: Items, name: str
) -> None:
    """Unoptimized, the file runs on floats between its quantize and dequantize nodes."""
    path = str(digits / "bundles" / name / "variants" / "int8-qdq.onnx")
    answers = []
    for level in (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        answers.append(session.run(["logits"], traffic.inputs)[0])
    exact, here = answers
    # Two of the 255 steps between smallest and largest logit: a rounding may go the other way.
    # Sums that were cut off strayed by ten times as much.
    assert np.abs(exact - here).max() <= 2 / 255 * np.ptp(exact)


# Certificates


def logits(found: BundleDirectory, variant: str, traffic: Items) -> Array:
    session = Session(found.file(found.bundle.variant(variant).path))
    return session.run(traffic.inputs, rows_at_once=1)["logits"]


def labels(traffic: Items) -> Array:
    assert traffic.labels is not None
    return traffic.labels


@pytest.mark.parametrize("name", EDGES)
def test_the_committed_certificates_speak_of_the_committed_files(digits: Path, name: str) -> None:
    edge, hub = bundle(digits, name), bundle(digits, HUB)
    served = hub.variant_sha256(hub.bundle.variants[0])
    assert {c.variant for c in edge.certificates} == {v.name for v in edge.bundle.variants}
    for found in edge.certificates:
        assert found.variant_sha256 == edge.variant_sha256(edge.bundle.variant(found.variant))
        assert (found.hub_model, found.hub_sha256) == (hub.bundle.model, served)
        assert found.calibration_sha256 == documents.sha256_of_file(digits / "calibration.npz")
        assert (found.alpha, found.delta) == (ALPHA, 0.05)
        assert found.items == found.scenes == data.CALIBRATION_DIGITS
        assert found.allowed_losses == 10
        assert len(found.reference_score_quantiles) == 64
        assert (found.expires_at - found.issued_at).days == 365


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("variant", ["int8-qdq", "fp32"])
def test_certified_here_the_traffic_keeps_the_promise_and_gains(
    digits: Path, traffic: Items, name: str, variant: str
) -> None:
    edge, hub = bundle(digits, name), bundle(digits, HUB)
    # Issued anew: the committed one may be for another class of hardware.
    issued = certify.certify(
        edge,
        hub,
        read(digits / "calibration.npz"),
        certify.Terms(alpha=ALPHA),
        issued_at=edge.certificates[0].issued_at,
        variant=variant,
    )
    mine = logits(edge, variant, traffic)
    theirs = logits(hub, hub.bundle.variants[0].name, traffic)
    found = counting.hybrid(mine, theirs, max_softmax(mine), labels(traffic), issued.threshold)
    assert found.disagreement <= ALPHA
    assert found.accuracy_hybrid > found.accuracy_edge
    assert found.accuracy_hub > found.accuracy_edge + 0.02
    assert found.share_edge >= 0.6
    if name == "digits-1.0.0":  # without escalation the promise would be broken
        assert 1 - counting.agreement(mine, theirs) > 2 * ALPHA
        assert found.share_edge <= 0.85


@pytest.mark.parametrize("name", EDGES)
def test_on_the_committed_class_of_hardware_certifying_again_finds_the_same(
    digits: Path, name: str
) -> None:
    edge, hub = bundle(digits, name), bundle(digits, HUB)
    here = hardware_class()
    for committed in edge.certificates:
        if committed.hardware_class != here:
            pytest.skip(f"committed for {committed.hardware_class}, this is {here}")
        again = certify.certify(
            edge,
            hub,
            read(digits / "calibration.npz"),
            certify.Terms(alpha=ALPHA),
            issued_at=committed.issued_at,
            variant=committed.variant,
        )
        # fp32 kernels may differ in the last bit within one class, so not the whole document.
        assert again.threshold == pytest.approx(committed.threshold, rel=1e-5)
        assert again.escalation_rate == pytest.approx(committed.escalation_rate, abs=0.01)
