"""What a TensorRT session promises, on the fake here and on a GPU in ``tests/gpu``."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.engines.engine import EngineLost
from cloud_hub.engines.tensorrt import api, plan_builder
from cloud_hub.engines.tensorrt.errors import PlanRefused, PlanUnusable
from cloud_hub.engines.tensorrt.plan_key import BuildOptions, Profile, profile_for
from cloud_hub.engines.tensorrt.session import TensorRtSession
from fogline_protocol import tensors
from fogline_protocol.errors import BadRequest
from fogline_protocol.tensors import TensorSpec
from tests import onnx_bytes

DOUBLE = onnx_bytes.model(
    [("Add", ["x", "x"], ["y"])], [("x", "FP32", ["n", 3])], [("y", "FP32", ["n", 3])]
)
SUM = onnx_bytes.model(
    [("Add", ["a", "b"], ["c"])],
    [("a", "FP32", ["n", "w"]), ("b", "FP32", ["n", "w"])],
    [("c", "FP32", ["n", "w"])],
)
FIXED = onnx_bytes.model(
    [("Add", ["x", "x"], ["y"])], [("x", "FP32", [2, 3])], [("y", "FP32", [2, 3])]
)
TWO_OUTPUTS = onnx_bytes.model(
    [("Add", ["x", "x"], ["y"]), ("Neg", ["x"], ["z"])],
    [("x", "FP32", ["n", 3])],
    [("y", "FP32", ["n", 3]), ("z", "FP32", ["n", 3])],
)

Open = Callable[..., TensorRtSession]


def copies(datatype: str) -> bytes:
    """Return a model that gives back what it gets. TensorRT has UINT8 only beside casts."""
    return onnx_bytes.model(
        [("Identity", ["x"], ["y"])], [("x", datatype, ["n", 4])], [("y", datatype, ["n", 4])]
    )


def make_plan(
    folder: Path, onnx: bytes, profile: Profile, trt: api.Module, cuda: api.CudaRuntime
) -> Path:
    """Build a plan in this process and return its file."""
    model = folder / "model.onnx"
    model.write_bytes(onnx)
    task = plan_builder.Task(
        model=model,
        sha256=hashlib.sha256(onnx).hexdigest(),
        profile=profile,
        options=BuildOptions(workspace_bytes=64 << 20),
        device=0,
        plan=folder / "model.plan",
        timings=folder / "kernels.timings",
    )
    plan_builder.build(task, trt, cuda, lambda phase, step, steps: None)
    return task.plan


def batches(*inputs: tuple[str, str, tuple[int, ...]], most: int = 8) -> Profile:
    return profile_for([TensorSpec(*one) for one in inputs], max_batch=most)


DOUBLES = batches(("x", "FP32", (-1, 3)))


class TensorRtContract:
    """Subclasses give the fixtures ``trt`` and ``cuda``."""

    @pytest.fixture
    def open_model(self, tmp_path, trt, cuda):
        """Open a session of a model; every one is closed in the end."""
        opened: list[TensorRtSession] = []

        def open_model(onnx: bytes, profile: Profile) -> TensorRtSession:
            plan = make_plan(tmp_path, onnx, profile, trt, cuda)
            opened.append(TensorRtSession(plan, trt=trt, cuda=cuda))
            return opened[-1]

        yield open_model
        for session in opened:
            session.close()

    def test_it_says_what_the_model_takes_and_gives(self, open_model):
        session = open_model(DOUBLE, DOUBLES)
        assert session.inputs == (TensorSpec("x", "FP32", (-1, 3)),)
        assert session.outputs == (TensorSpec("y", "FP32", (-1, 3)),)
        assert (session.platform, session.provider) == ("tensorrt_plan", "TensorRT")

    @pytest.mark.parametrize("rows", [1, 3, 8])
    def test_any_number_of_rows_within_the_profile_is_computed(self, open_model, rows):
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        answer = open_model(DOUBLE, DOUBLES).run({"x": x})
        np.testing.assert_array_equal(answer["y"], x * 2)

    def test_one_run_after_another_never_shows_an_earlier_one(self, open_model):
        session = open_model(DOUBLE, DOUBLES)
        answers = []
        for rows in (8, 1, 5, 5, 2):
            x = np.full((rows, 3), len(answers) + 1, np.float32)
            answers.append(session.run({"x": x})["y"])
        for number, answer in enumerate(answers, start=1):  # the first ones are still their own
            np.testing.assert_array_equal(answer, np.full(answer.shape, number * 2, np.float32))
        assert [len(answer) for answer in answers] == [8, 1, 5, 5, 2]

    def test_several_outputs_and_inputs_find_their_places(self, open_model):
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        answer = open_model(TWO_OUTPUTS, DOUBLES).run({"x": x})
        np.testing.assert_array_equal(answer["y"], x * 2)
        np.testing.assert_array_equal(answer["z"], -x)

    def test_dimensions_beside_the_batch_vary_within_their_bounds(self, open_model):
        session = open_model(SUM, self.wide())
        for shape in ((1, 2), (4, 6), (2, 3)):
            a = np.random.default_rng(1).random(shape, np.float32)
            np.testing.assert_array_equal(session.run({"b": a, "a": a})["c"], a + a)

    def test_shapes_that_do_not_fit_together_are_the_callers_fault(self, open_model):
        session = open_model(SUM, self.wide())
        a, b = np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)
        np.testing.assert_array_equal(session.run({"a": a, "b": a})["c"], a + a)
        with pytest.raises(BadRequest):
            session.run({"a": a, "b": b})
        np.testing.assert_array_equal(session.run({"a": a, "b": a})["c"], a + a)

    def test_a_model_without_a_batch_dimension_runs(self, open_model):
        x = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.testing.assert_array_equal(open_model(FIXED, Profile()).run({"x": x})["y"], x * 2)

    @pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16", "INT32", "INT64", "BOOL"])
    def test_a_datatype_comes_through_bit_by_bit(self, open_model, datatype):
        self.copied(open_model, datatype)

    def copied(self, open_model: Open, datatype: str) -> None:
        dtype = tensors.dtype_of(datatype)
        session = open_model(copies(datatype), batches(("x", datatype, (-1, 4))))
        count = 3 * 4 * dtype.itemsize
        raw = bytes(i % 2 if datatype == "BOOL" else i * 5 % 120 for i in range(count))
        answer = session.run({"x": np.frombuffer(raw, dtype).reshape(3, 4)})["y"]
        assert answer.dtype == dtype
        assert answer.shape == (3, 4)
        assert answer.tobytes() == raw

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            ({}, "input 'x' is missing"),
            ({"x": np.zeros((1, 3), np.float32), "q": np.zeros(1)}, "no input 'q'"),
            ({"x": np.zeros((1, 3), np.float64)}, "expected datatype FP32, got FP64"),
            ({"x": np.zeros((1, 4), np.float32)}, r"expected shape \[-1, 3\], got \[1, 4\]"),
            ({"x": np.zeros((9, 3), np.float32)}, r"\[9, 3\] is outside .* \[1, 3\] to \[8, 3\]"),
            ({"x": np.zeros((0, 3), np.float32)}, r"\[0, 3\] is outside"),
        ],
    )
    def test_what_does_not_fit_is_refused_in_words_and_costs_nothing(
        self, open_model, inputs, words
    ):
        session = open_model(DOUBLE, DOUBLES)
        with pytest.raises(BadRequest, match=words):
            session.run(inputs)
        x = np.ones((2, 3), np.float32)
        np.testing.assert_array_equal(session.run({"x": x})["y"], x * 2)

    def test_an_array_that_is_not_contiguous_is_read_right(self, open_model):
        x = np.arange(12, dtype=np.float32).reshape(3, 4).T
        np.testing.assert_array_equal(open_model(DOUBLE, DOUBLES).run({"x": x})["y"], x * 2)

    def test_a_closed_session_runs_no_more_and_closes_again(self, open_model):
        session = open_model(DOUBLE, DOUBLES)
        session.close()
        session.close()
        with pytest.raises(EngineLost, match="closed"):
            session.run({"x": np.ones((1, 3), np.float32)})

    def test_what_is_no_plan_is_to_be_built_again(self, tmp_path, trt, cuda):
        (tmp_path / "no.plan").write_bytes(b"not a plan" * 100)
        with pytest.raises(PlanUnusable, match="damaged or from another version"):
            TensorRtSession(tmp_path / "no.plan", trt=trt, cuda=cuda)
        with pytest.raises(PlanUnusable, match="No such file"):
            TensorRtSession(tmp_path / "gone.plan", trt=trt, cuda=cuda)

    def test_a_file_that_is_no_model_is_refused_with_what_the_parser_says(
        self, tmp_path, trt, cuda
    ):
        with pytest.raises(PlanRefused, match=r"TensorRT cannot build it: ."):
            make_plan(tmp_path, b"this is no model", Profile(), trt, cuda)

    def test_two_sessions_of_one_plan_do_not_disturb_each_other(self, tmp_path, trt, cuda):
        plan = make_plan(tmp_path, DOUBLE, DOUBLES, trt, cuda)
        first, second = (TensorRtSession(plan, trt=trt, cuda=cuda) for _ in range(2))
        x = np.ones((2, 3), np.float32)
        first.close()
        np.testing.assert_array_equal(second.run({"x": x})["y"], x * 2)
        second.close()

    @staticmethod
    def wide() -> Profile:
        document = {name: [[1, 2], [2, 4], [4, 6]] for name in ("a", "b")}
        return Profile.from_json(document)
