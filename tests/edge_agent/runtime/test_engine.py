import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import ReleaseRefused
from edge_agent.runtime.engine import Engine, RunTimes
from edge_agent.runtime.providers import CPU
from fogline_protocol.errors import BadRequest, DeadlineExceeded, ServerFault, Unavailable
from fogline_protocol.tensors import Array, TensorSpec
from tests.edge_agent.bundles import DATA, SURE, rows

X = TensorSpec("x", "FP32", (-1, 3))
LOGITS = TensorSpec("logits", "FP32", (-1, 3))


def engine(
    path: Path = DATA / "double.onnx",
    inputs: tuple[TensorSpec, ...] = (X,),
    outputs: tuple[TensorSpec, ...] = (LOGITS,),
    inline_below_s: float = 10.0,
) -> Engine:
    return Engine(
        path, provider=CPU, inputs=inputs, outputs=outputs, threads=1, inline_below_s=inline_below_s
    )


async def test_a_run_gives_the_outputs_asked_for() -> None:
    (logits,) = await engine().run(rows(SURE, SURE), ["logits"], 2)
    assert logits.tolist() == [[10, 0, 0], [10, 0, 0]]


@pytest.mark.parametrize(("inline_below_s", "on_the_loop"), [(10.0, True), (0.0, False)])
async def test_short_runs_stay_on_the_loop_and_long_ones_leave_it(
    inline_below_s: float, on_the_loop: bool
) -> None:
    model = engine(inline_below_s=inline_below_s)
    before = threading.active_count()
    assert (await model.run(rows(SURE), ["logits"], 1))[0][0, 0] == 10
    assert (threading.active_count() == before) == on_the_loop
    model.close()


async def test_a_caller_out_of_time_does_not_wait_for_the_worker() -> None:
    model = engine(inline_below_s=0.0)
    release = threading.Event()
    await model.run(rows(SURE), ["logits"], 1)
    assert model._worker is not None
    model._worker.submit(release.wait)  # a run that takes its time
    with pytest.raises(DeadlineExceeded, match="the time ran out"):
        await model.run(rows(SURE), ["logits"], 1, time.monotonic() + 0.05)
    release.set()
    assert (await model.run(rows(SURE), ["logits"], 1))[0][0, 0] == 10
    model.close()


async def test_a_closed_engine_says_so() -> None:
    model = engine()
    model.close()
    with pytest.raises(Unavailable, match="replaced meanwhile"):
        await model.run(rows(SURE), ["logits"], 1)


async def test_a_failing_run_is_the_servers_fault_and_counted() -> None:
    model = engine()
    wrong: dict[str, Array] = {"x": np.zeros((1, 4), np.float32)}
    with pytest.raises(ServerFault, match="the model failed: "):
        await model.run(wrong, ["logits"], 1)
    assert model.faults == 1
    assert (await model.run(rows(SURE), ["logits"], 1))[0][0, 0] == 10


async def test_text_goes_in_and_out_as_bytes() -> None:
    model = engine(
        DATA / "text.onnx",
        (TensorSpec("s", "BYTES", (-1, 1)),),
        (TensorSpec("t", "BYTES", (-1, 1)),),
    )
    said: Array = np.array([["grüß".encode()], [b""]], dtype=object)
    (found,) = await model.run({"s": said}, ["t"], 2)
    assert found.tolist() == said.tolist()
    with pytest.raises(BadRequest, match="input 's': an element is not UTF-8"):
        await model.run({"s": np.array([[b"\xff"]], dtype=object)}, ["t"], 1)


@pytest.mark.parametrize(
    ("inputs", "outputs", "sentence"),
    [
        ((TensorSpec("y", "FP32", (-1, 3)),), (LOGITS,), r"names the inputs \['y'\], the file has"),
        ((X, TensorSpec("y", "FP32", (-1,))), (LOGITS,), "names the inputs"),
        (
            (TensorSpec("x", "INT8", (-1, 3)),),
            (LOGITS,),
            r"input 'x' is FP32 \[-1, 3\], the bundle",
        ),
        ((TensorSpec("x", "FP32", (-1, 4)),), (LOGITS,), "input 'x' is FP32"),
        ((TensorSpec("x", "FP32", (3,)),), (LOGITS,), "input 'x' is FP32"),
        ((X,), (TensorSpec("probabilities", "FP32", (-1, 3)),), "names the outputs"),
        ((X,), (TensorSpec("logits", "FP64", (-1, 3)),), "output 'logits' is FP32"),
    ],
)
def test_a_file_that_breaks_its_bundles_contract_is_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], sentence: str
) -> None:
    with pytest.raises(ReleaseRefused, match=sentence):
        engine(inputs=inputs, outputs=outputs)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(ReleaseRefused, match=r"x\.onnx: not loaded on CPUExecutionProvider"):
        engine(tmp_path / "x.onnx")


async def test_runs_are_measured_by_their_size() -> None:
    model = engine()
    await model.run(rows(*[SURE] * 8), ["logits"], 8)
    known = model.times.predict(8)
    assert known is not None
    assert 0 < known < 1


def test_an_unknown_size_is_scaled_up_from_the_nearest_smaller_one() -> None:
    times = RunTimes()
    assert times.predict(1) is None
    times.learn(1, 0.001)
    assert times.predict(64) == 0.064
    times.learn(64, 0.002)
    assert times.predict(64) == 0.002
    assert times.predict(32) == pytest.approx(0.032)


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-6, 10)), min_size=1))
def test_a_prediction_lies_among_what_was_measured_for_its_size(
    runs: list[tuple[int, float]],
) -> None:
    times = RunTimes()
    for count, seconds in runs:
        times.learn(count, seconds)
    for count, _ in runs:
        same = [s for n, s in runs if n.bit_length() == count.bit_length()]
        found = times.predict(count)
        assert found is not None
        assert min(same) * 0.999 <= found <= max(same) * 1.001


async def test_runs_of_many_callers_do_not_mix() -> None:
    model = engine(inline_below_s=0.0)
    inputs = [rows(SURE * i) for i in range(20)]
    found = await asyncio.gather(*(model.run(x, ["logits"], 1) for x in inputs))
    assert [logits[0, 0] for (logits,) in found] == [10 * i for i in range(20)]
    model.close()
