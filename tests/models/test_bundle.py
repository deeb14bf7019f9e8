"""A bundle is written whole or not at all, and the same contents give the same digest."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fogline_models import bundle
from fogline_models.errors import BadInput
from fogline_protocol import release
from fogline_protocol.release import Bundle, SelfTest, Tolerance, Variant
from fogline_protocol.tensors import TensorSpec


def contents(version: str = "1.0.0") -> bundle.Contents:
    root = Bundle(
        model="tiny",
        version=version,
        inputs=(TensorSpec("x", "FP32", (-1, 2)),),
        outputs=(TensorSpec("y", "FP32", (-1, 3)),),
        max_batch=4,
        variants=(Variant("fp32", "variants/fp32.onnx", "fp32", ("CPUExecutionProvider",)),),
        self_test=SelfTest("selftest.npz", {"fp32": Tolerance(0.1, 0.9)}),
        files={},
    )
    return bundle.Contents(
        root=root,
        variants={"fp32": b"any bytes will do: nobody runs them here"},
        golden_inputs={"x": np.zeros((2, 2), np.float32)},
        golden_outputs={"y": np.zeros((2, 3), np.float32)},
        card=bundle.model_card({"library_name": "onnx"}, "# tiny"),
    )


def test_the_same_contents_give_the_same_digest_wherever_they_are_written(tmp_path: Path) -> None:
    digests = set()
    for target in (tmp_path / "a", tmp_path / "deep" / "er"):
        with bundle.assembled(target, contents()) as directory:
            (directory.path / "report.json").write_text(str(target))
        digests.add(release.read(target).sha256)
    assert len(digests) == 1


def test_what_is_added_in_the_block_is_there_and_outside_the_digest(tmp_path: Path) -> None:
    with bundle.assembled(tmp_path / "tiny", contents()) as directory:
        (directory.path / "report.json").write_text("{}")
    found = release.read(tmp_path / "tiny")
    assert found.sha256 == directory.sha256
    assert (tmp_path / "tiny" / "report.json").read_text() == "{}"
    assert "report.json" not in found.bundle.files


def test_a_failure_in_the_block_leaves_the_older_bundle_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    with bundle.assembled(target, contents()):
        pass
    with pytest.raises(ZeroDivisionError), bundle.assembled(target, contents("1.1.0")):
        raise ZeroDivisionError
    assert release.read(target).bundle.version == "1.0.0"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_newer_bundle_replaces_the_older_one_and_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    with bundle.assembled(target, contents()) as directory:
        (directory.path / "report.json").write_text("{}")
    with bundle.assembled(target, contents("1.1.0")):
        pass
    assert release.read(target).bundle.version == "1.1.0"
    assert not (target / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_contents_that_make_no_bundle_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    good = contents()
    bad = dataclasses.replace(good, root=dataclasses.replace(good.root, version="one"))
    with (
        pytest.raises(BadInput, match="'one' is not a semantic version"),
        bundle.assembled(tmp_path / "tiny", bad),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_damages_the_bundle_does_not_get_it_published(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInput, match=r"variants/fp32\.onnx"),
        bundle.assembled(tmp_path / "tiny", contents()) as directory,
    ):
        directory.file("variants/fp32.onnx").write_bytes(b"something else")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(BadInput, match="cannot write beside"),
        bundle.assembled(tmp_path / "file" / "tiny", contents()),
    ):
        pass


def test_a_card_opens_with_a_head_that_hugging_face_reads() -> None:
    card = bundle.model_card({"license": "apache-2.0", "tags": ["onnx"]}, "\n# x\n")
    assert card == '---\nlicense: "apache-2.0"\ntags: ["onnx"]\n---\n\n# x\n'
