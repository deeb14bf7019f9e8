"""A certificate rests on items that nothing has learnt from, as far as a bundle can tell."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fogline_models import archive, bundle, data, provenance
from fogline_models.cli import main
from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_protocol import documents, release
from fogline_protocol.release import BundleDirectory


@pytest.fixture(scope="module")
def edge(digits: Path) -> BundleDirectory:
    return release.read(digits / "bundles" / "digits-1.0.0")


@pytest.fixture(scope="module")
def items(digits: Path) -> Items:
    return data.read(digits / "calibration.npz")


def golden(source: BundleDirectory) -> dict[str, np.ndarray]:
    return archive.read(source.file(source.bundle.self_test.path))


def listing(source: BundleDirectory, target: Path, sources: bytes) -> BundleDirectory:
    """Write a bundle like ``source`` that says of itself what it was made from."""
    arrays = golden(source)
    contents = bundle.Contents(
        root=dataclasses.replace(source.bundle, files={}),
        variants={v.name: source.file(v.path).read_bytes() for v in source.bundle.variants},
        golden_inputs={"image": arrays["input.image"]},
        golden_outputs={"logits": arrays["output.logits"]},
        card="",
        extras={provenance.SOURCES: sources},
    )
    with bundle.assembled(target, contents):
        pass
    return release.read(target)


def named(name: str, digest: str) -> bytes:
    return json.dumps({"inputs": {name: {"sha256": digest, "bytes": 1}}}).encode()


def certify(edge: BundleDirectory, digits: Path, path: Path, out: Path) -> Result:
    arguments = ["certify", edge.path, "--hub", digits / "bundles" / "digits-hub-1.0.0"]
    arguments += ["--data", path, "--alpha", 0.05, "--variant", "int8-qdq", "--out", out]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["training", "ranges", "tuning", "self_test", "examples"])
def test_what_a_release_has_learnt_from_is_refused(
    edge: BundleDirectory, digits: Path, tmp_path: Path, name: str
) -> None:
    path = digits / "calibration.npz"
    digest = data.read(path).sha256
    learnt = listing(edge, tmp_path / "edge", named(f"{name}.npz", digest))
    result = certify(learnt, digits, path, tmp_path / "out")
    assert result.exit_code == 1
    assert f"digits 1.0.0 has learnt from these items, as {name}.npz: no bound" in result.output
    assert not (tmp_path / "out").exists()


def test_items_are_known_again_in_a_file_of_another_form(
    edge: BundleDirectory, items: Items, tmp_path: Path
) -> None:
    data.save(tmp_path / "split.npz", items)  # as a build does, of whatever it is given
    digest = documents.sha256_of_file(tmp_path / "split.npz")
    learnt = listing(edge, tmp_path / "edge", named("training.npz", digest))
    arrays = archive.read(tmp_path / "split.npz")
    np.savez(tmp_path / "mine.npz", allow_pickle=False, **arrays)
    again = data.read(tmp_path / "mine.npz")
    assert again.sha256 != digest
    with pytest.raises(BadInput, match=r"mine: digits 1\.0\.0 has learnt from these items"):
        provenance.check_unseen(learnt, again, "mine")


def test_where_the_name_cannot_tell_it_is_a_warning(
    edge: BundleDirectory, digits: Path, tmp_path: Path
) -> None:
    path = digits / "calibration.npz"
    listed = listing(edge, tmp_path / "edge", named("monday.npz", data.read(path).sha256))
    result = certify(listed, digits, path, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.stderr
    assert "lists these items among what it was made from, as monday.npz" in result.stderr


def test_training_items_are_known_by_the_self_test(
    edge: BundleDirectory, items: Items, digits: Path, tmp_path: Path
) -> None:
    of_training = golden(edge)["input.image"]
    for count, says in ((len(of_training), "all 32 self-test items"), (3, "3 of 32 self-test")):
        mixed = np.concatenate([items.inputs["image"], of_training[:count]])
        path = tmp_path / f"{count}.npz"
        archive.save(path, {"input.image": mixed})
        result = certify(edge, digits, path, tmp_path / f"out{count}")
        assert says in result.output
        assert result.exit_code == (count > 3)


@pytest.mark.parametrize("sources", [b"no json", b"[]", b'{"inputs": 3}', b'{"inputs": {"a": 1}}'])
def test_a_bundle_that_lists_nothing_readable_is_no_obstacle(
    edge: BundleDirectory, items: Items, tmp_path: Path, sources: bytes
) -> None:
    assert provenance.check_unseen(listing(edge, tmp_path / "edge", sources), items, "mine") == ""
    assert provenance.check_unseen(edge, items, "mine") == ""  # it lists it as calibration
