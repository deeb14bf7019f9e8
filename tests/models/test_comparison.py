"""``inspect`` and ``compare`` on the committed digits: verified, exact, and one sentence if not."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fogline_models import archive, comparison, report
from fogline_models.cli import main
from fogline_models.errors import BadInput
from fogline_protocol import documents, release
from fogline_protocol.release import BundleDirectory, File, Parent
from fogline_protocol.release_index import BLOCK_BYTES
from fogline_protocol.tensors import TensorSpec
from tests.models.reporting import document


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_sentence(result: Result) -> str:
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    return result.output


@pytest.fixture
def first(digits: Path) -> BundleDirectory:
    return release.read(digits / "bundles" / "digits-1.0.0")


@pytest.fixture
def better(digits: Path) -> BundleDirectory:
    return release.read(digits / "bundles" / "digits-1.1.0")


@pytest.fixture
def copied(tmp_path: Path, digits: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(digits / "bundles" / "digits-1.0.0", target)
    return target


def with_root(source: BundleDirectory, target: Path, **changed: Any) -> BundleDirectory:
    """Write ``source`` with another root document and read it back."""
    shutil.copytree(source.path, target, dirs_exist_ok=True)
    shutil.rmtree(target / "certificates", ignore_errors=True)
    root = dataclasses.replace(source.bundle, **changed)
    (target / release.ROOT).write_bytes(root.to_json())
    return release.read(target)


# inspect


def test_inspect_says_everything_that_is_in_a_bundle(first: BundleDirectory) -> None:
    result = invoke("inspect", first.path)
    assert result.exit_code == 0
    said = result.output
    assert said.startswith("digits 1.0.0  Handwritten digits, 8 by 8 pixels")
    assert f"{first.sha256}, intact" in said
    for name, file in first.bundle.files.items():
        assert f"{file.sha256}  {file.bytes:>12,}  {name}" in said
    assert "image FP32 [-1, 1, 8, 8]" in said
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in said
    assert "max_softmax of logits" in said
    assert first.bundle.escalates_to is not None
    assert f"to digits-hub, bundle {first.bundle.escalates_to.bundle_sha256[:16]}" in said
    assert "32 golden rows" in said
    for certificate in first.certificates:
        assert certificate.id in said
        assert f"above {certificate.threshold:.4f} answers locally" in said
    assert "does not hold here" not in said
    assert said.count("not covered by the digest") == 4  # two certificates, two forms of report


def test_inspect_as_json_holds_the_same(first: BundleDirectory) -> None:
    result = invoke("inspect", first.path, "--json")
    told = json.loads(result.output)
    assert told["sha256"] == first.sha256
    assert {v["name"]: v["sha256"] for v in told["variants"]} == {
        v.name: first.variant_sha256(v) for v in first.bundle.variants
    }
    assert [c["threshold"] for c in told["certificates"]] == [
        c.threshold for c in first.certificates
    ]
    assert told["bytes"] == sum(file.bytes for file in first.bundle.files.values())


def test_every_byte_of_a_bundle_counts_for_inspect(copied: Path) -> None:
    for name in ("bundle.json", "README.md", "selftest.npz", "variants/fp32.onnx"):
        path = copied / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        said = one_sentence(invoke("inspect", copied))
        assert "is not an intact bundle" in said
        path.write_bytes(whole)
    assert invoke("inspect", copied).exit_code == 0
    (copied / "variants" / "fp32.onnx").unlink()
    assert "fp32.onnx: No such file" in one_sentence(invoke("inspect", copied))


def test_a_certificate_for_another_file_is_shown_with_what_is_wrong(
    copied: Path, better: BundleDirectory
) -> None:
    (path,) = (copied / "certificates").glob("*.fp32.json")
    stray = dataclasses.replace(
        next(c for c in better.certificates if c.variant == "fp32"), version="1.0.0"
    )
    path.write_bytes(stray.to_json())
    assert "does not hold here: it was measured on another file" in invoke("inspect", copied).output


def test_inspect_tells_what_the_gates_decided(copied: Path) -> None:
    report.write(copied, document())
    said = invoke("inspect", copied).output
    assert "gates, as report.json says" in said
    assert "int8 ships although loses 2.5 points" in said
    (copied / "report.json").write_text('{"figures": {"schema": 1}, "decisions": 3}')
    assert "without its decisions or machine" in one_sentence(invoke("inspect", copied))


def test_what_a_bundle_says_cannot_steer_the_terminal(
    first: BundleDirectory, tmp_path: Path
) -> None:
    hostile = with_root(first, tmp_path / "hostile", description="red \x1b[31m\nbundle   forged")
    said = invoke("inspect", hostile.path).output
    assert "\x1b" not in said
    assert r"red \x1b[31m\x0abundle   forged" in said


def test_inspect_and_compare_load_nothing_that_trains(first: BundleDirectory) -> None:
    for arguments in (["inspect", str(first.path)], ["compare", str(first.path), str(first.path)]):
        code = (
            f"import sys\nfrom fogline_models.cli import main\n"
            f"main({arguments!r}, standalone_mode=False)\n"
            f"print({{'torch', 'onnx', 'sklearn', 'jinja2'}} & {{m.split('.')[0] for m in sys.modules}})"
        )
        output = subprocess.check_output([sys.executable, "-W", "error", "-c", code], text=True)
        assert output.splitlines()[-1] == "set()"


# compare


def test_compare_tells_what_a_device_gets_with_the_better_release(
    first: BundleDirectory, better: BundleDirectory, digits: Path
) -> None:
    result = invoke("compare", first.path, better.path, "--data", digits / "calibration.npz")
    assert result.exit_code == 0, result.output
    said = result.output
    assert said.startswith("digits 1.0.0  ->  digits 1.1.0\n")
    assert "Inputs, outputs, labels and score are the same." in said
    before, after = (b.bundle.files["variants/int8-qdq.onnx"].bytes for b in (first, better))
    assert f"int8-qdq: {before:,} -> {after:,} bytes ({after / before:.2f} x)" in said
    old, new = (next(c for c in b.certificates if c.variant == "int8-qdq") for b in (first, better))
    assert f"threshold {old.threshold:.4f} -> {new.threshold:.4f}, escalates" in said
    assert "of 350 items" in said
    assert "digits 1.1.0 is right on" in said
    assert "A in rows, B in columns" in said


def test_the_matrix_of_a_comparison_counts_every_item(
    first: BundleDirectory, better: BundleDirectory, digits: Path
) -> None:
    there = comparison.compare(first, better, digits / "calibration.npz").answers
    back = comparison.compare(better, first, digits / "calibration.npz").answers
    assert there is not None
    assert back is not None
    matrix = np.array(there.matrix)
    assert matrix.sum() == 350
    assert matrix.trace() / 350 == there.agreement.value
    assert (matrix == np.array(back.matrix).T).all()
    assert there.accuracy_a == back.accuracy_b


def test_vectors_are_compared_by_their_angle(
    first: BundleDirectory, better: BundleDirectory
) -> None:
    sides = [
        dataclasses.replace(
            side, bundle=dataclasses.replace(side.bundle, task="feature-extraction", score=None)
        )
        for side in (first, better)
    ]
    found = comparison.compare(*sides)
    assert found.answers is None
    assert "No answers but vectors: those of int8-qdq have a cosine of 0." in found.answers_missing
    assert "stray by" in found.answers_missing
    same = comparison.compare(sides[0], sides[0]).answers_missing
    assert "a cosine of 1.0000 (worst 1.0000)" in same
    assert "stray by 0 % of their length" in same


def test_without_data_the_self_test_vectors_show_what_is_broken(
    better: BundleDirectory, digits: Path
) -> None:
    broken = release.read(digits / "bundles" / "broken" / "digits-1.2.0")
    found = comparison.compare(better, broken)
    assert found.answers is not None
    assert found.answers.agreement.value == 0.0
    assert found.answers.accuracy_a is None
    said = "\n".join(comparison.lines(found))
    assert "'3' becomes '4': 8" in said
    assert "the certificate is gone" in said


def test_a_bundle_compared_with_itself_changes_nothing_and_costs_nothing(
    first: BundleDirectory,
) -> None:
    found = comparison.compare(first, first)
    assert all(each.same_file and each.fetch_bytes == 0 for each in found.variants)
    said = "\n".join(comparison.lines(found))
    assert "The very same bundle." in said
    assert "int8-qdq: the very same file" in said
    assert "A in rows" not in said
    assert comparison.sentences(found)


def test_a_device_fetches_the_blocks_it_does_not_have(
    first: BundleDirectory, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.bytes(3 * BLOCK_BYTES + 500)
    changed = weights[:BLOCK_BYTES] + rng.bytes(BLOCK_BYTES) + weights[2 * BLOCK_BYTES :]

    def grown(target: Path, content: bytes) -> BundleDirectory:
        shutil.copytree(first.path, target)
        (target / "variants" / "fp32.onnx.data").write_bytes(content)
        files = dict(first.bundle.files)
        files["variants/fp32.onnx.data"] = File(documents.sha256(content), len(content))
        return with_root(first, target, files=files)

    a, b = grown(tmp_path / "a", weights), grown(tmp_path / "b", changed)
    fetched, needed = comparison.delta_bytes(a, b, "fp32")
    root = len((b.path / release.ROOT).read_bytes())
    assert fetched == BLOCK_BYTES + root  # the block in the middle, and the document naming it
    others = {"variants/int8-qdq.onnx"}
    assert needed == root + sum(b.bundle.files[n].bytes for n in b.bundle.files.keys() - others)
    # The other variant carries none of that data.
    assert comparison.delta_bytes(a, b, "int8-qdq")[1] < needed - 3 * BLOCK_BYTES


def test_the_parent_is_told_from_the_root_document(
    first: BundleDirectory, better: BundleDirectory, tmp_path: Path
) -> None:
    orphan = with_root(better, tmp_path / "orphan", parent=None)
    assert "names no parent" in comparison.compare(first, orphan).lineage
    there = with_root(better, tmp_path / "child", parent=Parent("1.0.0", first.sha256))
    assert comparison.compare(first, there).lineage == "A is B's parent."
    assert "A is not B's parent" in comparison.compare(better, there).lineage


def test_another_contract_is_told_and_answers_are_not_compared(
    first: BundleDirectory, tmp_path: Path
) -> None:
    labels = (*first.bundle.labels[:9], "nine")
    other = with_root(first, tmp_path / "labels", labels=labels, max_batch=32)
    found = comparison.compare(first, other)
    assert found.contract == (
        "Largest batch: 64 -> 32.",
        "Labels: 10 -> 10, 1 gone ('9'), 1 new ('nine').",
    )
    wider = with_root(
        first, tmp_path / "wider", inputs=(TensorSpec("image", "FP32", (-1, 1, 16, 16)),)
    )
    found = comparison.compare(first, wider)
    assert found.answers is None
    assert found.answers_missing == (
        "Not compared: the two take different inputs: 'image' is FP32 [-1, 1, 8, 8] for A and "
        "FP32 [-1, 1, 16, 16] for B."
    )
    assert "Inputs: image FP32 [-1, 1, 8, 8] -> image FP32 [-1, 1, 16, 16]." in found.contract


def test_compare_as_json_is_json_even_without_a_finite_threshold(
    copied: Path, better: BundleDirectory
) -> None:
    for path in (copied / "certificates").iterdir():
        found = next(c for c in release.read(copied).certificates if c.variant in path.name)
        path.write_bytes(
            dataclasses.replace(found, threshold=float("inf"), allowed_losses=-1).to_json()
        )
    result = invoke("compare", copied, better.path, "--json")
    told = json.loads(result.output, parse_constant=pytest.fail)
    assert {each["threshold_a"] for each in told["certificates"]} == {"Infinity"}
    assert told["a"]["version"] == "1.0.0"
    assert invoke("inspect", copied).output.count("never answers locally") == 2


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input.picture": np.zeros((3, 1, 8, 8), np.float32)}, "there is no 'input.image'"),
        ({"input.image": np.zeros((3, 1, 9, 9), np.float32)}, "input 'image'"),
        (
            {"input.image": np.zeros((3, 1, 8, 8), np.float32), "label": np.zeros(2, int)},
            "'label': 2",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(
    first: BundleDirectory, tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    path = tmp_path / "items.npz"
    archive.save(path, arrays)
    said = one_sentence(invoke("compare", first.path, first.path, "--data", path))
    assert says in said


def test_a_variant_that_one_of_them_lacks_is_named(first: BundleDirectory) -> None:
    with pytest.raises(
        BadInput, match=r"digits 1\.0\.0 has no variant 'fp8', it has int8-qdq, fp32"
    ):
        comparison.compare(first, first, variant="fp8")


def test_a_bundle_that_is_not_intact_is_not_compared(first: BundleDirectory, copied: Path) -> None:
    (copied / "selftest.npz").unlink()
    assert "is not an intact bundle" in one_sentence(invoke("compare", first.path, copied))
