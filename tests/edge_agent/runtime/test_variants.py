import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime import providers, release, variants
from edge_agent.runtime.providers import CPU
from fogline_protocol.release import read
from fogline_protocol.score import Score
from tests.edge_agent import bundles
from tests.edge_agent.bundles import NOW

TWO = ("int8", "fp32")


def chosen(
    path: Path,
    usable: tuple[str, ...] = (CPU,),
    now: datetime.datetime = NOW,
    hardware_class: Callable[[str], str] = providers.hardware_class,
    processor: str = "",
) -> variants.Choice:
    return variants.choose(read(path), usable, hardware_class, now, processor)


def test_a_certified_variant_comes_before_an_earlier_one_without(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b", variants=TWO, certified=False)
    bundles.add_certificate(made, "fp32")
    found = chosen(made.path)
    assert found.variant.name == "fp32"
    assert found.certificate is not None
    assert found.why.startswith("fp32 on CPUExecutionProvider: certified for ")


def test_a_variant_that_was_not_fetched_is_not_chosen_whatever_speaks_for_it(
    tmp_path: Path,
) -> None:
    made = bundles.make(tmp_path / "b", variants=TWO, certified=False)
    bundles.add_certificate(made, "int8")
    (made.path / "int8.onnx").unlink()
    found = variants.choose(
        read(made.path, variants=("fp32",)), (CPU,), providers.hardware_class, NOW
    )
    assert (found.variant.name, found.certificate) == ("fp32", None)
    assert found.aside == "int8 on CPUExecutionProvider: its artifact is not on this device"
    assert found.meant == ("int8", CPU)
    with pytest.raises(ReleaseRefused, match="its artifact is not on this device"):
        variants.choose(read(made.path, variants=()), (CPU,), providers.hardware_class, NOW)


def test_the_certificate_issued_last_that_holds_is_the_one(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b", variants=TWO, certified=False)
    day = datetime.timedelta(days=1)
    bundles.add_certificate(made, "fp32", issued_at=NOW - 3 * day)
    last = bundles.add_certificate(made, "fp32", issued_at=NOW - day, expires_at=NOW + day)
    bundles.add_certificate(made, "fp32", issued_at=NOW, hardware_class="elsewhere")
    found = chosen(made.path)
    assert found.certificate == last
    directory = read(made.path)
    later = variants.under(directory, found, providers.hardware_class, NOW + 2 * day)
    assert later.certificate is not None
    assert later.certificate.issued_at == NOW - 3 * day
    assert later.why.startswith("fp32 on CPUExecutionProvider: certified for ")
    never = variants.under(directory, found, providers.hardware_class, NOW + 40 * day)
    assert (never.variant, never.provider, never.certificate) == (found.variant, CPU, None)
    assert "does not hold: it expired at" in never.why


def test_among_equals_the_bundles_order_decides(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b", variants=TWO, certified=False)
    assert chosen(made.path).variant.name == "int8"
    bundles.add_certificate(made, "int8")
    bundles.add_certificate(made, "fp32")
    assert chosen(made.path).variant.name == "int8"


@pytest.mark.parametrize(
    ("changes", "why_not"),
    [
        ({"hardware_class": "mips/CPUExecutionProvider/onnxruntime-1.0"}, "measured on mips"),
        ({"expires_at": NOW}, "it expired at"),
        ({"variant_sha256": "0" * 64}, "it was measured on another file"),
        ({"hub_model": "other"}, "which the bundle does not escalate to"),
        ({"score": Score("max_softmax", "x")}, "its threshold lives on another score"),
        (
            {"score": Score("logistic", "logits", {"bias": 0.0, "log_odds": 1.0, "spread": 0.0})},
            "its threshold lives on another score",
        ),
    ],
)
def test_a_certificate_that_does_not_hold_here_is_not_relied_on(
    tmp_path: Path, changes: dict[str, Any], why_not: str
) -> None:
    made = bundles.make(tmp_path / "b", certified=False)
    bundles.add_certificate(made, **changes)
    found = chosen(made.path)
    assert found.certificate is None
    assert why_not in found.why


def test_a_certificate_holds_for_the_very_parameters_of_its_score(tmp_path: Path) -> None:
    head = {"bias": 0.5, "log_odds": 1.0, "spread": 0.25}
    made = bundles.make(tmp_path / "b", score=Score("logistic", "logits", head))
    assert chosen(made.path).certificate is not None
    for path in (made.path / "certificates").iterdir():
        path.unlink()
    other = Score("logistic", "logits", {**head, "spread": 0.25000000000000006})
    bundles.add_certificate(made, score=other)
    found = chosen(made.path)
    assert found.certificate is None
    assert "its threshold lives on another score" in found.why


def test_the_newest_valid_certificate_counts(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b", certified=False)
    day = datetime.timedelta(days=1)
    bundles.add_certificate(made, threshold=0.5, issued_at=NOW - 3 * day)
    newest = bundles.add_certificate(made, threshold=0.6, issued_at=NOW - 2 * day)
    bundles.add_certificate(made, threshold=0.7, issued_at=NOW - day, expires_at=NOW)
    assert chosen(made.path).certificate == newest


def test_a_bundle_for_other_hardware_is_refused(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b", variant_providers=("QNNExecutionProvider",))
    with pytest.raises(
        ReleaseRefused, match="has variants for QNNExecutionProvider, this device runs CPU"
    ):
        chosen(made.path)


def test_a_variant_that_this_processor_would_get_wrong_is_left_aside(tmp_path: Path) -> None:
    vnni = {"int8": ("x86_64+vnni", "aarch64")}
    made = bundles.make(tmp_path / "b", variants=TWO, certified=False, processors=vnni)
    assert chosen(made.path, processor="x86_64+avx512_vnni").variant.name == "int8"
    assert chosen(made.path, processor="aarch64+i8mm").variant.name == "int8"
    found = chosen(made.path, processor="x86_64+avx2")
    assert found.variant.name == "fp32"
    assert "int8: meant for x86_64+vnni, aarch64" in found.why
    # An accelerator computes it rightly, whatever processor stands beside it.
    other = bundles.make(
        tmp_path / "c", variants=("int8",), variant_providers=("CUDAExecutionProvider", CPU),
        processors=vnni,
    )  # fmt: skip
    with pytest.raises(ReleaseRefused, match=r"runs CPUExecutionProvider on x86_64\+avx2: int8: m"):
        chosen(other.path, processor="x86_64+avx2")
    both = ("CUDAExecutionProvider", CPU)
    assert chosen(other.path, both, processor="x86_64+avx2").provider == "CUDAExecutionProvider"


CUDA = "CUDAExecutionProvider"


def told(found: variants.Choice) -> tuple[str, str, tuple[str, str], str]:
    return found.variant.name, found.provider, found.meant, found.aside


def test_a_choice_says_what_was_meant_for_this_hardware_and_why_it_was_left_aside(
    tmp_path: Path,
) -> None:
    both = bundles.make(tmp_path / "both", variants=TWO, certified=False)
    assert told(chosen(both.path)) == ("int8", CPU, ("int8", CPU), "")
    bundles.add_certificate(both, "fp32")
    missing = f"int8 on {CPU}: no certificate was issued for it"
    assert told(chosen(both.path)) == ("fp32", CPU, ("int8", CPU), missing)
    bundles.add_certificate(both, "int8")
    assert told(chosen(both.path)) == ("int8", CPU, ("int8", CPU), "")
    # What is meant for other processors is no loss, and worth a word.
    vnni = {"int8": ("x86_64+vnni",)}
    other = bundles.make(tmp_path / "other", variants=TWO, certified=False, processors=vnni)
    found = told(chosen(other.path, processor="x86_64+avx2"))
    assert found == ("fp32", CPU, ("fp32", CPU), "int8: meant for x86_64+vnni")


def test_an_accelerator_that_is_installed_and_does_not_run_is_a_loss_and_an_absent_one_is_none(
    tmp_path: Path,
) -> None:
    made = bundles.make(tmp_path / "b", variant_providers=(CUDA, CPU))
    assert told(chosen(made.path)) == ("fp32", CPU, ("fp32", CPU), "")
    found = variants.choose(
        read(made.path), (CPU,), providers.hardware_class, NOW, broken={CUDA: "no driver"}
    )
    assert told(found) == ("fp32", CPU, ("fp32", CUDA), f"fp32 on {CUDA}: no driver")
    assert found.certificate is not None
    only = bundles.make(tmp_path / "only", variant_providers=(CUDA,))
    with pytest.raises(ReleaseRefused, match=f"fp32 on {CUDA}: no driver"):
        variants.choose(
            read(only.path), (CPU,), providers.hardware_class, NOW, broken={CUDA: "no driver"}
        )


def test_the_variants_order_of_providers_decides_between_usable_ones(tmp_path: Path) -> None:
    made = bundles.make(
        tmp_path / "b", variant_providers=("CUDAExecutionProvider", CPU), certified=False
    )
    assert chosen(made.path, usable=(CPU, "CUDAExecutionProvider")).provider.startswith("CUDA")
    bundles.add_certificate(made)  # holds on the CPU
    assert chosen(made.path, usable=(CPU, "CUDAExecutionProvider")).provider == CPU


def test_the_probe_runs_on_the_cpu_and_never_leaves_the_device() -> None:
    found = {provider.name: provider for provider in providers.probe()}
    assert found[CPU].usable
    assert "AzureExecutionProvider" not in found


@pytest.mark.parametrize("absent", ["CUDAExecutionProvider", "AzureExecutionProvider"])
def test_a_session_on_an_absent_provider_is_refused_and_not_moved_to_the_cpu(absent: str) -> None:
    with pytest.raises(ReleaseRefused, match=absent):
        providers.strict_session(bundles.DATA / "double.onnx", absent, 1)


def test_a_demanded_provider_that_is_not_here_is_named(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b")
    with pytest.raises(
        ReleaseRefused, match="provider TensorrtExecutionProvider cannot be used on this device"
    ):
        release.load(release.read(made.path), provider="TensorrtExecutionProvider")


def test_a_changed_file_is_refused_with_its_name(tmp_path: Path) -> None:
    made = bundles.make(tmp_path / "b")
    with (made.path / "fp32.onnx").open("r+b") as file:
        file.write(b"X")
    with pytest.raises(ReleaseRefused, match=r"fp32\.onnx: SHA-256 is .*, the root document says"):
        release.read(made.path)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseRefused, match=r"bundle\.json: No such file"):
        release.read(tmp_path)


def test_the_committed_digits_run_here() -> None:
    digits = release.load(release.read(bundles.DIGITS))
    assert digits.label == "digits@1.0.0"
    assert digits.version == "1"
    digits.engine.close()
