"""What TensorRT does next while something serves."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.engines.tensorrt.plan_policy import (
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    Action,
    Failure,
    Situation,
    decide,
    retry_after,
)

FAILED = Failure("out of memory", at=100.0)
LASTING = Failure("NonZero", at=100.0, lasting=True)

situations = st.builds(
    Situation,
    serving=st.sampled_from(["onnxruntime", "tensorrt"]),
    tensorrt_objection=st.sampled_from(["", "not installed"]),
    gpu_objection=st.sampled_from(["", "no driver"]),
    plan_is_kept=st.booleans(),
    building=st.booleans(),
    failure=st.none()
    | st.builds(
        Failure,
        reason=st.just("why"),
        at=st.floats(0, 1e6),
        count=st.integers(1, 100),
        lasting=st.booleans(),
    ),
)


@pytest.mark.parametrize(
    ("situation", "now", "action", "words"),
    [
        (Situation("onnxruntime"), 0, Action.BUILD, "is needed"),
        (Situation("onnxruntime", building=True), 0, Action.STAY, "is built"),
        (Situation("onnxruntime", plan_is_kept=True), 0, Action.SWITCH, "is ready"),
        (Situation("tensorrt", plan_is_kept=True), 0, Action.STAY, "TensorRT serves"),
        (Situation("onnxruntime", gpu_objection="no driver"), 0, Action.STAY, "no driver"),
        (Situation("onnxruntime", "not installed"), 0, Action.STAY, "not installed"),
        (Situation("onnxruntime", failure=LASTING), 1e9, Action.STAY, "for good: NonZero"),
        (Situation("onnxruntime", failure=FAILED), 130, Action.STAY, "again in 30 s: out of"),
        (Situation("onnxruntime", failure=FAILED), 160, Action.BUILD, "is needed"),
        # A plan that could not be loaded waits as one that could not be built does.
        (Situation("onnxruntime", plan_is_kept=True, failure=FAILED), 130, Action.STAY, "again"),
        (Situation("onnxruntime", plan_is_kept=True, failure=FAILED), 160, Action.SWITCH, "ready"),
    ],
)
def test_the_table(situation, now, action, words):
    decision = decide(situation, now)
    assert decision.action is action
    assert words in decision.reason


@given(situations, st.floats(0, 1e7))
def test_nothing_is_started_without_a_gpu_twice_or_for_nothing(situation, now):
    decision = decide(situation, now)
    assert decision.reason
    assert decide(situation, now) == decision
    if decision.action is not Action.STAY:
        assert situation.serving == "onnxruntime"
        assert not situation.building
        assert not situation.gpu_objection
        assert not situation.tensorrt_objection
        assert (decision.action is Action.SWITCH) == situation.plan_is_kept
        assert situation.failure is None or not situation.failure.lasting


@given(situations, st.floats(0, 1e7))
def test_whoever_asks_again_when_told_gets_on(situation, now):
    decision = decide(situation, now)
    if decision.again_at is not None:
        assert decision.again_at > now
        later = decide(situation, decision.again_at)
        assert later.action is not Action.STAY


@given(st.integers(1, 10_000))
def test_retries_become_rarer_and_never_end(failures):
    assert FIRST_RETRY_S <= retry_after(failures) <= retry_after(failures + 1) <= LONGEST_RETRY_S


def test_objections_win_over_a_plan_that_is_kept():
    kept = Situation("onnxruntime", plan_is_kept=True)
    assert decide(kept, 0).action is Action.SWITCH
    gone = dataclasses.replace(kept, gpu_objection="the driver went away")
    assert decide(gone, 0).action is Action.STAY
