"""A device that fetched one variant of a bundle reads it as strictly as a whole one."""

import pytest

from fogline_protocol import documents, release
from fogline_protocol.release import Bundle, BundleRefused, File, SelfTest, Tolerance, Variant
from fogline_protocol.tensors import TensorSpec

CONTENT = {
    "variants/fp32.onnx": b"weights",
    "variants/fp32.onnx.data": b"more weights",
    "variants/int8.onnx": b"small weights",
    "selftest.npz": b"vectors",
    "README.md": b"card",
}


@pytest.fixture
def folder(tmp_path):
    bundle = Bundle(
        model="digits",
        version="1.0.0",
        inputs=(TensorSpec("x", "FP32", (-1, 3)),),
        outputs=(TensorSpec("y", "FP32", (-1, 3)),),
        max_batch=8,
        variants=tuple(Variant(n, f"variants/{n}.onnx", n, ("CPU",)) for n in ("fp32", "int8")),
        self_test=SelfTest("selftest.npz", {n: Tolerance(1e-3, 1.0) for n in ("fp32", "int8")}),
        files={name: File(documents.sha256(data), len(data)) for name, data in CONTENT.items()},
    )
    (tmp_path / "variants").mkdir()
    for name, data in {**CONTENT, release.ROOT: bundle.to_json()}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_variant_needs_its_own_files_and_not_those_of_the_others(folder):
    bundle = release.read(folder).bundle
    common = {"selftest.npz", "README.md"}
    assert bundle.files_for({"int8"}) == common | {"variants/int8.onnx"}
    assert bundle.files_for({"fp32"}) == common | {
        "variants/fp32.onnx",
        "variants/fp32.onnx.data",
    }
    assert bundle.files_for(()) == common
    assert bundle.files_for({"fp32", "int8"}) == set(CONTENT)
    with pytest.raises(KeyError):
        bundle.files_for({"fp16"})


def test_the_other_variants_and_the_model_card_may_be_missing(folder):
    for name in ("variants/fp32.onnx", "variants/fp32.onnx.data"):
        (folder / name).unlink()
    assert release.read(folder, variants={"int8"}).bundle.model == "digits"
    assert release.read(folder, variants=()).sha256
    with pytest.raises(BundleRefused, match=r"variants/fp32\.onnx"):
        release.read(folder)
    with pytest.raises(BundleRefused, match=r"variants/fp32\.onnx"):
        release.read(folder, variants={"int8", "fp32"})
    (folder / "README.md").unlink()
    assert release.read(folder, variants={"int8"}).bundle.model == "digits"


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("variants/int8.onnx", "int8"),
        ("variants/fp32.onnx.data", "fp32"),
        ("selftest.npz", "int8"),
    ],
)
def test_what_a_variant_runs_on_must_be_there_and_intact(folder, name, variant):
    (folder / name).write_bytes(b"x" * len(CONTENT[name]))
    with pytest.raises(BundleRefused, match=f"{name}: SHA-256"):
        release.read(folder, variants={variant})
    (folder / name).unlink()
    with pytest.raises(BundleRefused, match=name):
        release.read(folder, variants={variant})


def test_a_model_card_that_is_there_must_be_intact(folder):
    (folder / "README.md").write_bytes(b"dark")
    with pytest.raises(BundleRefused, match=r"README\.md: SHA-256"):
        release.read(folder, variants={"int8"})
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("nowhere")
    with pytest.raises(BundleRefused, match=r"README\.md: links are not allowed"):
        release.read(folder, variants={"int8"})


def test_a_variant_that_does_not_exist_is_refused_by_name(folder):
    with pytest.raises(BundleRefused, match="no variant 'fp16', only fp32, int8"):
        release.read(folder, variants={"fp16"})
