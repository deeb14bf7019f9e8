"""The bundle's root document and the way in: an intact directory, or a refusal by name."""

import dataclasses
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol import certificate, documents, release
from fogline_protocol.documents import DocumentError
from fogline_protocol.release import (
    Bundle,
    BundleRefused,
    File,
    Pairing,
    Parent,
    Processing,
    SelfTest,
    Tolerance,
    Variant,
)
from fogline_protocol.score import Score
from fogline_protocol.tensors import TensorSpec
from tests import certificates

CONTENT = {"variants/fp32.onnx": b"not really a model", "selftest.npz": b"vectors"}


def a_bundle(**changes):
    fields = {
        "model": "digits",
        "version": "1.0.0",
        "inputs": (TensorSpec("image", "FP32", (-1, 1, 8, 8)),),
        "outputs": (TensorSpec("logits", "FP32", (-1, 10)),),
        "max_batch": 64,
        "variants": (
            Variant("fp32", "variants/fp32.onnx", "fp32", ("CPUExecutionProvider",), ("x86_64",)),
        ),
        "self_test": SelfTest(
            "selftest.npz",
            {"fp32": Tolerance(1e-3, 1.0, {"CUDAExecutionProvider": Tolerance(1e-2, 0.99)})},
        ),
        "files": {path: File(documents.sha256(data), len(data)) for path, data in CONTENT.items()},
        "labels": ("0", "1"),
        "score": Score("max_softmax", "logits"),
        "escalates_to": Pairing("digits-hub", "ab" * 32),
        "description": "a digit",
        "task": "image-classification",
        "parent": Parent("0.9.0", "cd" * 32),
        "pre_processing": (Processing("resize", parameters={"height": "8", "width": "8"}),),
        "post_processing": (Processing("argmax"),),
    }
    return Bundle(**{**fields, **changes})


def a_certificate(**changes):
    fields = {
        "variant_sha256": documents.sha256(CONTENT["variants/fp32.onnx"]),
        "score": Score("max_softmax", "logits"),
    }
    return certificates.certificate(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "digits-1.0.0"
    for path, data in CONTENT.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / release.ROOT).write_bytes(a_bundle().to_json())
    (root / release.CERTIFICATES).mkdir()
    (root / release.CERTIFICATES / "here.json").write_bytes(a_certificate().to_json())
    return root


def test_a_root_document_survives_the_disk():
    assert release.parse(a_bundle().to_json()) == a_bundle()


def test_how_many_rows_a_variant_takes_survives_the_disk_and_is_silent_where_it_is_the_bundles():
    (whole,) = a_bundle().variants
    mixing = a_bundle(variants=(dataclasses.replace(whole, max_rows=1),))
    assert release.parse(mixing.to_json()) == mixing
    assert b"max_rows" in mixing.to_json()
    assert b"max_rows" not in a_bundle().to_json()


HEAD = Score("logistic", "logits", {"bias": 0.1, "log_odds": 1 / 3, "spread": -2e-9})


def test_a_scores_parameters_survive_the_disk_to_the_last_bit():
    assert release.parse(a_bundle(score=HEAD).to_json()) == a_bundle(score=HEAD)
    certified = a_certificate(score=HEAD)
    assert certificate.parse(certified.to_json()) == certified
    other = Score("logistic", "logits", {**HEAD.parameters, "bias": 0.2})
    assert a_bundle(score=other).to_json() != a_bundle(score=HEAD).to_json()


def test_a_score_without_parameters_is_written_as_before_there_were_any():
    for document in (a_bundle(), a_certificate()):
        assert json.loads(document.to_json())["score"] == {
            "function": "max_softmax",
            "output": "logits",
        }


TOKENS = Score("least_softmax", "logits", mask="attention_mask")


def a_tagger(mask=("INT64", (-1, -1)), output=(-1, -1, 5), score=TOKENS, **changes):
    return a_bundle(
        inputs=(
            TensorSpec("input_ids", "INT64", (-1, -1)),
            TensorSpec("attention_mask", mask[0], mask[1]),
        ),
        outputs=(TensorSpec("logits", "FP32", output),),
        score=score,
        **changes,
    )


def test_a_scores_mask_survives_the_disk():
    assert release.parse(a_tagger().to_json()) == a_tagger()
    certified = a_certificate(score=TOKENS)
    assert certificate.parse(certified.to_json()) == certified
    assert json.loads(certified.to_json())["score"]["mask"] == "attention_mask"


@pytest.mark.parametrize(
    "made",
    [
        a_tagger(("BOOL", (-1, 7)), (-1, -1, 5)),
        a_tagger(("FP32", (-1, -1)), (-1, 7, 5)),
        a_tagger(score=Score("least_softmax", "logits")),
        a_tagger(("INT64", (7,)), (7, 5), max_batch=0),
    ],
)
def test_a_mask_may_be_of_any_numbers_and_leave_the_length_open(made):
    assert release.parse(made.to_json()) == made


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (a_tagger(score=Score("least_softmax", "logits", mask="mask")), "'mask' is not an input"),
        (a_tagger(("BYTES", (-1, -1))), "mask 'attention_mask' is BYTES, expected numbers"),
        (
            a_tagger(("INT64", (-1, 6)), (-1, 7, 5)),
            r"shape \[-1, 6\], expected one number for each",
        ),
        (a_tagger(("INT64", (-1, -1, 1))), r"shape \[-1, -1, 1\], expected one number for each"),
        (a_tagger(output=(-1, 5)), r"'logits' has the shape \[-1, 5\]: no axis for tokens"),
        (
            a_tagger(score=Score("max_softmax", "logits", mask="attention_mask")),
            "max_softmax is of whole rows and takes no mask",
        ),
    ],
)
def test_a_mask_that_cannot_tell_tokens_apart_is_refused(made, text):
    with pytest.raises(DocumentError, match=text):
        release.parse(made.to_json())


def test_a_certificate_for_half_a_score_is_refused():
    with pytest.raises(DocumentError, match="certificate: the score logistic takes the param"):
        certificate.parse(a_certificate(score=Score("logistic", "logits")).to_json())


def test_a_provider_without_a_tolerance_of_its_own_has_the_variants():
    tolerance = a_bundle().self_test.tolerances["fp32"]
    assert tolerance.on("CUDAExecutionProvider") == Tolerance(1e-2, 0.99)
    assert tolerance.on("CPUExecutionProvider") == tolerance


def test_processing_whose_files_are_not_listed_is_refused():
    stray = a_bundle(pre_processing=(Processing("tokenizer", ("tokenizer.json",)),))
    with pytest.raises(DocumentError, match=r"'tokenizer' names the file 'tokenizer\.json'"):
        release.parse(stray.to_json())


def test_an_intact_directory_is_read_with_its_certificates(folder):
    read = release.read(folder)
    assert read.bundle == a_bundle()
    assert read.certificates == (a_certificate(),)
    assert read.sha256 == documents.sha256(a_bundle().to_json())
    assert read.variant_sha256(read.bundle.variant("fp32")) == a_certificate().variant_sha256


@pytest.mark.parametrize("path", [*CONTENT, release.ROOT])
def test_a_bundle_altered_in_any_byte_is_refused(folder, path):
    intact = (folder / path).read_bytes()
    for at in range(len(intact)):
        altered = bytearray(intact)
        altered[at] ^= 1
        (folder / path).write_bytes(altered)
        try:
            # A changed root may still be a root; then it is another bundle, by its digest.
            assert release.read(folder).sha256 != documents.sha256(intact)
            assert path == release.ROOT
        except BundleRefused:
            pass


def test_files_that_are_missing_longer_or_links_are_refused_by_name(folder):
    model = folder / "variants/fp32.onnx"
    model.write_bytes(CONTENT["variants/fp32.onnx"] + b"!")
    with pytest.raises(BundleRefused, match=r"variants/fp32\.onnx: 19 bytes, .* says 18"):
        release.read(folder)
    model.unlink()
    with pytest.raises(BundleRefused, match="No such file"):
        release.read(folder)
    os.symlink("/etc/passwd", model)
    with pytest.raises(BundleRefused, match="links are not allowed"):
        release.read(folder)
    model.unlink()
    model.mkdir()
    with pytest.raises(BundleRefused, match="not a regular file"):
        release.read(folder)


def test_a_linked_folder_inside_a_bundle_is_refused(folder, tmp_path):
    (folder / "variants").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "variants")
    with pytest.raises(BundleRefused, match="links are not allowed"):
        release.read(folder)


def test_a_certificate_of_another_release_is_refused(folder):
    other = a_certificate(version="2.0.0").to_json()
    (folder / release.CERTIFICATES / "here.json").write_bytes(other)
    with pytest.raises(BundleRefused, match=r"it speaks of digits 2\.0\.0"):
        release.read(folder)


ROWS_65 = Variant("fp32", "variants/fp32.onnx", "fp32", (), max_rows=65)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "../up"}, "model name"),
        ({"version": "1"}, "semantic version"),
        ({"inputs": ()}, "inputs and outputs"),
        ({"inputs": (TensorSpec("i", "FP33", (-1,)),)}, "unknown datatype"),
        ({"inputs": (TensorSpec("i", "FP32", (1, 8)),)}, "batch dimension"),
        ({"variants": ()}, "at least one variant"),
        ({"variants": (Variant("x", "absent.onnx", "fp32", ()),)}, "not listed"),
        ({"max_batch": 64, "variants": (ROWS_65,)}, "allows 65 rows in a run, the bundle 64"),
        ({"max_batch": 0, "variants": (ROWS_65,)}, "allows 65 rows in a run, the bundle none"),
        ({"self_test": SelfTest("selftest.npz", {})}, "no self-test tolerance"),
        ({"self_test": SelfTest("absent.npz", {"fp32": Tolerance(0, 0)})}, "vectors are not"),
        ({"score": Score("max_softmax", "z")}, "not an output"),
        ({"score": Score("logistic", "logits", {"bias": 1.0})}, "logistic takes the parameters"),
        ({"score": None}, "needs a score"),
        ({"files": {"/etc/passwd": File("ab" * 32, 1)}}, "plain path"),
        ({"files": {"a/../b": File("ab" * 32, 1)}}, "plain path"),
        ({"files": {"a//b": File("ab" * 32, 1)}}, "plain path"),
        ({"files": {"a\\b": File("ab" * 32, 1)}}, "plain path"),
        ({"files": {"certificates/x.json": File("ab" * 32, 1)}}, "reserved"),
        ({"files": {"a": File("short", 1)}}, "no SHA-256"),
        ({"parent": Parent("latest", "ab" * 32)}, "parent's version 'latest'"),
        ({"parent": Parent("1.0.0", "ab\0")}, "parent has no SHA-256"),
    ],
)
def test_a_root_document_that_contradicts_itself_is_refused(changes, text):
    with pytest.raises(DocumentError, match=text):
        release.parse(a_bundle(**changes).to_json())


def test_an_unknown_field_is_refused():
    fields = json.loads(a_bundle().to_json())
    fields["surprise"] = 1
    with pytest.raises(DocumentError, match="surprise"):
        release.parse(json.dumps(fields).encode())


@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b'"x"', b"{", b"\xff", b"[" * 100_000])
def test_json_that_is_no_object_is_no_document(data):
    with pytest.raises(DocumentError):
        release.parse(data)


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_no_root_document_and_no_certificate(data):
    with pytest.raises(DocumentError):
        release.parse(data)
    with pytest.raises(DocumentError):
        certificate.parse(data)


@pytest.mark.parametrize("threshold", [0.5, 0.0, -math.inf, math.inf])
def test_a_certificate_survives_the_disk_with_every_threshold(threshold):
    document = a_certificate(threshold=threshold)
    assert certificate.parse(document.to_json()) == document
    assert len(document.id) == 16


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"alpha": 0.0}, "alpha and delta"),
        ({"threshold": math.nan}, "not a number"),
        ({"scenes": 400}, "more scenes than items"),
        ({"allowed_losses": -1}, "too few scenes"),
        ({"risk": "regret"}, "unknown risk"),
    ],
)
def test_a_certificate_with_figures_that_cannot_be_is_refused(changes, text):
    with pytest.raises(DocumentError, match=text):
        certificate.parse(a_certificate(**changes).to_json())


def test_a_certificate_covers_one_file_on_one_hardware_class_until_it_expires():
    document = a_certificate()
    here = {
        "variant_sha256": document.variant_sha256,
        "hardware_class": document.hardware_class,
        "now": document.issued_at,
    }
    assert document.objection(**here) is None
    assert "another file" in document.objection(**{**here, "variant_sha256": "00"})
    assert "was measured on x86_64+avx2" in document.objection(
        **{**here, "hardware_class": "aarch64"}
    )
    assert "expired" in document.objection(**{**here, "now": document.expires_at})
