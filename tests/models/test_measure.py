"""What a variant costs: told for every batch, as ratios of one run, in a process of its own."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fogline_models import measure
from fogline_models.errors import BadInput
from fogline_models.session import Session
from fogline_protocol.tensors import Array

IMAGES = {"image": np.zeros((8, 1, 8, 8), np.float32)}


@pytest.fixture
def files(digits: Path) -> dict[str, Path]:
    folder = digits / "bundles" / "digits-hub-1.0.0" / "variants"
    return {"int8": folder / "int8-qdq.onnx", "fp32": folder / "fp32.onnx"}


def test_time_memory_and_loading_are_told_for_every_variant(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TURNS", 3)
    monkeypatch.setattr(measure, "MAX_RUNS", 5)
    monkeypatch.setattr(measure, "STARTS", 1)
    found = measure.measure(files, IMAGES, (1, 8))
    assert list(found) == ["int8", "fp32"]
    for cost in found.values():
        assert list(cost.latency_us) == list(cost.ratio) == [1, 8]
        for spread in (*cost.latency_us.values(), *cost.ratio.values(), cost.load_ms):
            assert 0 < spread.low <= spread.median <= spread.high
    assert {spread.median for spread in found["fp32"].ratio.values()} == {1.0}
    assert found["fp32"].memory_mb is not None
    # Weights of half a megabyte and what the runtime allocates, but never this whole process.
    assert 0.5 < found["fp32"].memory_mb.median < 40


def test_how_far_it_is_is_said_and_what_takes_long_is_run_once_in_a_turn(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fogline_models.steps.SAY_EVERY_S", 0.0)
    monkeypatch.setattr(measure, "LONG_S", 0.0)
    monkeypatch.setattr(measure, "TURN_S", 0.0)
    monkeypatch.setattr(measure, "STARTS", 1)
    runs: list[int] = []
    run = Session.run

    def counted(session: Session, inputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
        runs.append(rows)
        return run(session, inputs, rows)

    monkeypatch.setattr(Session, "run", counted)
    said: list[str] = []
    measure.measure(files, IMAGES, (8,), say=said.append)
    assert len(runs) == 2 * (2 + measure.TURNS)  # to allocate and to know how long it takes
    assert said[0] == "timing 8 rows, turn, 0 of 9"
    assert said[-2:] == ["starting int8, 0 of 1", "starting fp32, 0 of 1"]


def test_the_size_of_a_model_counts_the_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "fp32.onnx").write_bytes(b"1234")
    (tmp_path / "fp32.onnx.data").write_bytes(b"56")
    (tmp_path / "int8.onnx").write_bytes(b"7")
    assert measure.size_of(tmp_path / "fp32.onnx") == 6


def test_the_machine_is_told_in_words() -> None:
    found = measure.machine()
    assert {"hardware class", "processor", "cores", "python", "onnxruntime"} <= found.keys()
    assert all(found.values())


@pytest.mark.parametrize(
    ("batches", "reference", "says"),
    [
        ((1, 9), "fp32", r"batches of \[1, 9\] rows, there are 8 rows"),
        ((), "fp32", "batches of"),
        ((0,), "fp32", "batches of"),
        ((1,), "fp16", "no variant 'fp16' to compare with"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    files: dict[str, Path], batches: tuple[int, ...], reference: str, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        measure.measure(files, IMAGES, batches, reference=reference)


def test_a_model_that_does_not_run_in_a_process_of_its_own_is_named(
    files: dict[str, Path], tmp_path: Path
) -> None:
    example = tmp_path / "inputs.npz"
    np.savez(example, other=IMAGES["image"])
    model = tmp_path / "fp32.onnx"
    shutil.copy(files["fp32"], model)
    with pytest.raises(BadInput, match=r"fp32\.onnx does not run in a process of its own: .*image"):
        measure._start(model, measure.CPU, example)
    model.write_bytes(b"not a model")
    with pytest.raises(BadInput, match=r"process of its own: .*onnxruntime refuses it"):
        measure._start(model, measure.CPU, example)


def test_a_model_that_hangs_is_given_up(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "START_TIMEOUT_S", 0.001)
    with pytest.raises(BadInput, match="did not load and run within"):
        measure._start(files["fp32"], measure.CPU, tmp_path / "inputs.npz")
