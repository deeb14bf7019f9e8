"""A self-test finds what is wrong with a candidate, says it in one sentence, and leaves nothing."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_agent.update.lifecycle import StepEnded, StepFailed, StepRefused
from edge_agent.update.selftest import ChildSelfTest, Limits, run_here, supervise
from fogline_protocol import documents, golden, release
from fogline_protocol.golden import FAR_OFF, Deviates, GoldenVectors, VectorsUnusable, judge
from fogline_protocol.release import BundleDirectory, File, Tolerance
from fogline_protocol.tensors import TensorSpec
from tests.edge_agent.update.contracts import Candidates, SelfTestContract
from tests.edge_agent.update.fakes import StubSelfTest, make_bundle, multiply

BUNDLES = Path(__file__).parents[3] / "models/digits/bundles"
CPU = "CPUExecutionProvider"


class TestStub(SelfTestContract):
    @pytest.fixture
    def candidates(self, tmp_path: Path) -> Candidates:
        right = make_bundle(tmp_path / "right", "1.0.0")
        wrong = make_bundle(tmp_path / "wrong", "1.1.0", factor=-2.0)
        return Candidates(StubSelfTest(), right, wrong, "int8")


class TestChild(SelfTestContract):
    @pytest.fixture(params=["int8-qdq", "fp32"])
    def candidates(self, request: pytest.FixtureRequest) -> Candidates:
        right = release.read(BUNDLES / "digits-1.1.0")
        wrong = release.read(BUNDLES / "broken/digits-1.2.0")
        return Candidates(ChildSelfTest(), right, wrong, request.param)


@pytest.fixture
def doubler(tmp_path: Path) -> BundleDirectory:
    return make_bundle(tmp_path / "doubler", "1.0.0")


def child(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def result(code: str = "", sentence: str = "", **figures: float) -> str:
    return json.dumps({"code": code, "sentence": sentence, "figures": figures})


async def failure_of(script: str, **limits: float) -> StepEnded:
    allowed = Limits(**{"time_s": 20.0, "memory_bytes": 1 << 30, **limits})
    with pytest.raises(StepEnded) as failure:
        await supervise(child(script), allowed)
    return failure.value


async def test_a_child_that_hangs_is_stopped_at_its_time_limit() -> None:
    failure = await failure_of("while True: pass", time_s=0.3)
    assert isinstance(failure, StepFailed)
    assert (failure.code, failure.sentence) == ("self-test/timeout", "no result after 0.3 s")


async def test_a_child_that_takes_too_much_memory_is_stopped() -> None:
    failure = await failure_of(
        "import time; held = bytearray(b'x') * (200 << 20); time.sleep(20)",
        memory_bytes=100 << 20,
    )
    assert failure.code == "self-test/memory"
    assert "100 MiB are allowed" in failure.sentence
    assert failure.figures["peak_bytes"] > 100 << 20


async def test_a_peak_between_two_looks_is_seen_afterwards() -> None:
    failure = await failure_of(f"print('''{result(peak_bytes=2e9)}''')", memory_bytes=1 << 30)
    assert failure.code == "self-test/memory"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was killed by signal 11 SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "as the kernel does when memory runs out"),
        ("raise SystemExit('no such thing')", "ended with exit status 1: no such thing"),
        ("pass", "ended without a result"),
        ("print('half a li')", "ended without a result"),
        ("print('[]')", "ended without a result"),
    ],
)
async def test_a_child_that_crashes_is_a_failure_that_may_be_tried_again(script, sentence) -> None:
    failure = await failure_of(script)
    assert isinstance(failure, StepFailed)
    assert failure.code == "self-test/crash"
    assert sentence in failure.sentence


async def test_what_the_child_prints_before_its_result_does_not_matter() -> None:
    script = f"print('a library says hello'); print('''{result(agreement=1.0)}''')"
    figures = await supervise(child(script), Limits(20.0))
    assert figures["agreement"] == 1.0
    assert figures["seconds"] > 0.0


async def test_whoever_leaves_leaves_no_child_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(supervise(child(LINGER.format(file=str(pid_file))), Limits()))
    async with asyncio.timeout(20):
        while not (pid := _pid_in(pid_file)):
            await asyncio.sleep(0.005)  # a file has no event
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _state(pid) == "Z"


def test_a_self_test_dies_with_its_agent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    inner = "from edge_agent.update import selftest; selftest._become_expendable();"
    inner += LINGER.format(file=str(pid_file))
    agent = subprocess.Popen(
        child(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])")
    )
    deadline = time.monotonic() + 20
    while not (pid := _pid_in(pid_file)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    agent.kill()
    agent.wait()
    while _state(pid) != "Z":  # gone, or dead and nobody's child yet
        assert time.monotonic() < deadline
        time.sleep(0.005)


LINGER = (
    "import os, pathlib, time; file = pathlib.Path({file!r}); part = file.with_suffix('.part');"
    " part.write_text(str(os.getpid())); part.rename(file); time.sleep(60)"
)


def _pid_in(file: Path) -> int:
    return int(file.read_text()) if file.exists() else 0


def _state(pid: int) -> str:
    """Return the state letter of a process; Z also stands for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def changed(bundle: BundleDirectory, name: str, data: bytes) -> Path:
    """Replace a file of ``bundle`` and make the root document agree."""
    (bundle.path / name).write_bytes(data)
    files = {**bundle.bundle.files, name: File(documents.sha256(data), len(data))}
    (bundle.path / release.ROOT).write_bytes(replace(bundle.bundle, files=files).to_json())
    return bundle.path


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x09" * 50])
async def test_a_file_that_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    shutil.copytree(BUNDLES / "digits-1.0.0", tmp_path / "bundle")
    bundle = release.read(tmp_path / "bundle")
    changed(bundle, bundle.bundle.variant("fp32").path, data)
    with pytest.raises(StepRefused) as refusal:
        await ChildSelfTest().run(bundle, "fp32", CPU)
    assert refusal.value.code == "self-test/load"
    assert refusal.value.figures["peak_bytes"] > 1 << 20


@pytest.mark.parametrize(
    ("variant", "sentence"), [("fp64", "no variant 'fp64'"), ("int8", "selftest.npz: ")]
)
def test_what_is_missing_is_refused_by_name(doubler: BundleDirectory, variant, sentence) -> None:
    if variant == "int8":
        doubler.file("selftest.npz").unlink()
    with pytest.raises(StepRefused, match=sentence) as refusal:
        run_here(
            doubler.path, variant, CPU, lambda bundle, path: multiply(doubler, "variants/int8.onnx")
        )
    assert refusal.value.code == "self-test/load"


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"input.x": np.zeros((2, 3), np.float32)}, "output.y: it is missing"),
        (
            {"input.x": np.zeros((2, 3), np.float32), "output.y": np.zeros((1, 3), np.float32)},
            "have \\[1, 2\\] rows",
        ),
        (
            {"input.x": np.zeros((0, 3), np.float32), "output.y": np.zeros((0, 3), np.float32)},
            "have \\[0\\] rows",
        ),
        (
            {"input.x": np.zeros((2, 3)), "output.y": np.zeros((2, 3), np.float32)},
            "expected datatype FP32, got FP64",
        ),
        ({"input.x": np.array([[1, "two"]], object)}, "pickle|Object arrays"),
        ({"input.x": np.zeros((2, 3), complex)}, "no Open Inference datatype"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(doubler, arrays, sentence) -> None:
    path = doubler.file("selftest.npz")
    np.savez(path, **arrays)
    with pytest.raises(VectorsUnusable, match=sentence):
        GoldenVectors.read(doubler.bundle, path)


def test_texts_are_vectors_too(doubler: BundleDirectory) -> None:
    spec = TensorSpec("s", "BYTES", (-1, 1))
    bundle = replace(doubler.bundle, inputs=(spec,), outputs=(spec,))
    path = doubler.file("selftest.npz")
    words = np.array([["\N{GREEK SMALL LETTER MU}".encode()], [b""]])
    np.savez(path, **{"input.s": words, "output.s": words})
    vectors = GoldenVectors.read(bundle, path)
    assert vectors.inputs["s"].tolist() == words.tolist()
    assert vectors.inputs["s"].dtype == object
    exact = Tolerance(0.0, 1.0)
    judge(bundle, vectors, [{"s": words.astype(object)}], exact)
    with pytest.raises(Deviates):
        judge(bundle, vectors, [{"s": words[::-1].astype(object)}], exact)


def test_vectors_damaged_at_any_byte_are_refused_or_read_as_something(doubler) -> None:
    path = doubler.file("selftest.npz")
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with contextlib.suppress(VectorsUnusable):  # and nothing else
            GoldenVectors.read(doubler.bundle, path)
    for at in range(0, len(data), 101):
        path.write_bytes(data[:at])
        with pytest.raises(VectorsUnusable):
            GoldenVectors.read(doubler.bundle, path)


def test_runs_take_at_most_the_rows_of_a_batch_and_cover_all(doubler: BundleDirectory) -> None:
    vectors = GoldenVectors.read(doubler.bundle, doubler.file("selftest.npz"))
    whole = doubler.bundle.variants[0]
    batches = list(vectors.batches(whole))
    assert [len(b["x"]) for b in batches] == [5, 3]
    assert [len(b["x"]) for b in vectors.batches(replace(whole, max_rows=3))] == [3, 3, 2]
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), vectors.inputs["x"])


def test_a_model_without_batches_is_run_once(doubler: BundleDirectory) -> None:
    rows = np.ones((2, 3), np.float32)
    vectors = GoldenVectors({"x": rows}, {"y": rows * 2}, 0)
    bundle = replace(doubler.bundle, max_batch=0, outputs=(TensorSpec("y", "FP32", (2, 3)),))
    assert [b["x"].shape for b in vectors.batches(bundle.variants[0])] == [(2, 3)]
    figures = judge(bundle, vectors, [{"y": rows * 2}], Tolerance(0.0, 1.0))
    assert figures == {"max_abs_error": 0.0, "agreement": 1.0}


def judged(doubler: BundleDirectory, answer, **tolerance: float):
    vectors = GoldenVectors.read(doubler.bundle, doubler.file("selftest.npz"))
    (variant, *_) = doubler.bundle.variants
    answers = [{"y": answer(inputs["x"])} for inputs in vectors.batches(variant)]
    return judge(doubler.bundle, vectors, answers, Tolerance(**tolerance))


def test_figures_say_how_far_the_outputs_stray(doubler: BundleDirectory) -> None:
    figures = judged(doubler, lambda x: x * 2 + 0.25, max_abs_error=0.5, min_agreement=1.0)
    assert figures == {"max_abs_error": 0.25, "agreement": 1.0}


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda x: x * 2 + 1, "up to 1 .allowed 0.5.; 100.0% .* .required 99.0%."),
        (lambda x: (x * 2)[:, ::-1].copy(), "0.0% of the golden rows"),
        (lambda x: x * np.float32("nan"), "up to inf"),
        (lambda x: x * 2.0 * np.float32("inf"), "up to inf"),
        (lambda x: (x * 2).astype(np.float64), "expected datatype FP32, got FP64"),
        (lambda x: (x * 2)[:, :2], "expected shape \\[-1, 3\\], got \\[8, 2\\]"),
        (lambda x: (x * 2)[:-1], "expected shape \\[8, 3\\], got \\[6, 3\\]"),
    ],
)
def test_outputs_that_stray_too_far_are_refused(doubler, answer, sentence) -> None:
    with pytest.raises(Deviates, match=sentence):
        judged(doubler, answer, max_abs_error=0.5, min_agreement=0.99)


def test_outputs_that_are_near_but_decide_otherwise_are_refused(doubler) -> None:
    with pytest.raises(Deviates, match=r"0\.0% of the golden rows"):
        judged(doubler, lambda x: (x * 2)[:, ::-1].copy(), max_abs_error=99.0, min_agreement=0.99)


def test_infinities_that_the_reference_has_too_are_right() -> None:
    wanted = np.array([np.inf, np.nan, -np.inf, 1.0], np.float32)
    assert golden._distance(wanted, wanted.copy()) == 0.0
    assert golden._distance(wanted, np.array([np.inf, 0.0, -np.inf, 1.0], np.float32)) == FAR_OFF


def test_a_model_that_fails_on_golden_inputs_is_a_crash(doubler: BundleDirectory) -> None:
    def load(bundle, path):
        def run(inputs):
            raise ValueError("kernel\nmore")

        return run

    with pytest.raises(StepFailed, match=r"self-test/crash: .* ended in: kernel$"):
        run_here(doubler.path, "int8", CPU, load)
