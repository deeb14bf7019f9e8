"""The command line: certifying without torch, and one sentence for whatever is wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fogline_models import archive
from fogline_models.cli import main
from fogline_models.session import hardware_class
from fogline_protocol import release

HEAVY = "{'torch', 'onnx', 'onnxscript', 'sklearn', 'scipy', 'onnxruntime', 'numpy'}"


def invoke(*arguments: str | float | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def edge(tmp_path: Path, digits: Path) -> Path:
    """A copy of the edge bundle, without certificates."""
    copy = tmp_path / "digits-1.0.0"
    shutil.copytree(digits / "bundles" / "digits-1.0.0", copy)
    shutil.rmtree(copy / "certificates")
    return copy


@pytest.fixture
def hub(digits: Path) -> Path:
    return digits / "bundles" / "digits-hub-1.0.0"


@pytest.fixture
def data(digits: Path) -> Path:
    return digits / "calibration.npz"


def one_sentence(result: Result) -> str:
    """Check that a command failed as it should, and return what it said."""
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
    assert isinstance(result.exception, SystemExit)
    return result.output


def loaded_by(code: str) -> str:
    """Return which heavy packages a fresh interpreter holds after running ``code``."""
    script = f"import sys\n{code}\nprint({HEAVY} & {{m.split('.')[0] for m in sys.modules}})"
    output = subprocess.check_output([sys.executable, "-W", "error", "-c", script], text=True)
    return output.splitlines()[-1]


def test_asking_for_help_loads_nothing_heavy() -> None:
    code = "from fogline_models.cli import main\nmain(['--help'], standalone_mode=False)"
    assert loaded_by(code) == "set()"


def test_certifying_writes_valid_certificates_and_needs_no_torch(
    edge: Path, hub: Path, data: Path
) -> None:
    arguments = ["certify", str(edge), "--hub", str(hub), "--data", str(data), "--alpha", "0.05"]
    code = f"from fogline_models.cli import main\nmain({arguments!r}, standalone_mode=False)"
    assert set(loaded_by(code).strip("{}").split(", ")) == {"'numpy'", "'onnxruntime'"}
    found = release.read(edge).certificates
    assert {c.variant for c in found} == {"int8-qdq", "fp32"}
    assert {c.hardware_class for c in found} == {hardware_class()}
    assert {c.alpha for c in found} == {0.05}


def test_one_variant_can_be_certified_into_another_folder(
    edge: Path, hub: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = invoke(
        "certify", edge, "--hub", hub, "--data", data, "--alpha", 0.05, "--delta", 0.1,
        "--variant", "int8-qdq", "--valid-days", 7, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "answers locally above 0." in result.output
    assert "disagreement at most 0.05 with confidence 0.9" in result.output
    (written,) = out.iterdir()
    assert str(written) in result.output
    assert release.read(edge).certificates == ()


def test_a_missing_calibration_file_is_named(edge: Path, hub: Path, tmp_path: Path) -> None:
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", tmp_path / "none.npz"))
    assert "none.npz: No such file" in said


def test_a_missing_bundle_is_named(hub: Path, data: Path, tmp_path: Path) -> None:
    said = one_sentence(invoke("certify", tmp_path / "none", "--hub", hub, "--data", data))
    assert "none is no bundle, there is no bundle.json in it: a bundle is the folder of a" in said
    assert "fogline-models build RECIPE" in said
    said = one_sentence(invoke("certify", hub.parent, "--hub", hub, "--data", data))
    assert f"is no bundle, there is no bundle.json in it: do you mean {hub.parent}/digits-" in said


def test_a_bundle_altered_in_one_byte_is_refused(edge: Path, hub: Path, data: Path) -> None:
    path = edge / "variants" / "int8-qdq.onnx"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", data))
    assert "variants/int8-qdq.onnx: SHA-256 is" in said


def test_the_wrong_hub_is_refused(edge: Path, data: Path) -> None:
    said = one_sentence(invoke("certify", edge, "--hub", edge, "--data", data))
    assert "escalates to digits-hub with bundle" in said


def test_too_few_items_are_refused_with_the_number_needed_and_nothing_is_written(
    edge: Path, hub: Path, data: Path
) -> None:
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", data, "--alpha", 0.001))
    assert "350 independent scenes are too few" in said
    assert "at least 2995 are needed" in said
    assert not (edge / "certificates").exists()


def test_items_of_one_class_are_refused(edge: Path, hub: Path, data: Path, tmp_path: Path) -> None:
    image = archive.read(data)["input.image"][:1]
    path = tmp_path / "one.npz"
    path.write_bytes(archive.to_bytes({"input.image": np.repeat(image, 400, axis=0)}))
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", path))
    assert "calibrate on items of every class" in said


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--alpha", "0", "alpha must lie between 0 and 1, got 0"),
        ("--delta", "1", "delta must lie between 0 and 1, got 1"),
        ("--variant", "fp8", "has no variant 'fp8'"),
        ("--hub-variant", "fp8", "digits-hub 1.0.0 has no variant 'fp8'"),
        ("--provider", "XProvider", "provider XProvider is not in this onnxruntime"),
    ],
)
def test_an_option_that_cannot_be_met_is_refused(
    edge: Path, hub: Path, data: Path, option: str, value: str, says: str
) -> None:
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", data, option, value))
    assert says in said


def test_a_folder_that_cannot_be_written_is_said(
    edge: Path, hub: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "certificates"
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", data, "--out", out))
    assert "cannot write" in said


def test_without_torch_building_says_what_to_install(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    said = one_sentence(invoke("build", digits))
    assert "torch" in said
    assert "pip install 'fogline[models]'" in said


def test_without_onnxruntime_certifying_says_what_to_install(
    edge: Path, hub: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = one_sentence(invoke("certify", edge, "--hub", hub, "--data", data))
    assert "pip install 'fogline[edge]'" in said


def test_an_unknown_family_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = one_sentence(invoke("build", "letters"))
    assert "expected a file, or recipe.toml in letters or models/letters" in said
