"""Decides, for one model, what TensorRT does next while something serves it. Pure.

ONNX Runtime serves from the first moment; TensorRT takes over when there is a plan. Whoever
integrates this asks after every event and does the one thing it is told:

    STAY    go on as it is
    BUILD   start building a plan; ONNX Runtime goes on serving
    SWITCH  load the plan, warm it, and let it serve
"""

import enum
from dataclasses import dataclass
from typing import Literal

FIRST_RETRY_S = 60.0  # a GPU that was full may be free a minute later
LONGEST_RETRY_S = 3600.0  # builds are expensive for whoever else uses the GPU

Server = Literal["onnxruntime", "tensorrt"]


class Action(enum.StrEnum):
    """What to do next."""

    STAY = "stay"
    BUILD = "build"
    SWITCH = "switch"


@dataclass(frozen=True, slots=True)
class Failure:
    """The latest build or load of a plan that failed, for this model on this machine."""

    reason: str
    at: float  # seconds, of the same clock as ``now``
    count: int = 1  # in a row
    lasting: bool = False  # the same would happen again: an operator that TensorRT lacks


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of one model. Objections are empty where there is none."""

    serving: Server
    tensorrt_objection: str = ""  # why TensorRT cannot be imported here
    gpu_objection: str = ""  # why no GPU can be used
    plan_is_kept: bool = False  # one of the right key
    building: bool = False
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One action and its reason, a sentence for console and log."""

    action: Action
    reason: str
    again_at: float | None = None  # ask again then, if nothing happens before


def decide(situation: Situation, now: float) -> Decision:
    """Return what to do. Asking twice gives the same answer."""
    if situation.serving == "tensorrt":
        return Decision(Action.STAY, "TensorRT serves")
    for objection in (situation.gpu_objection, situation.tensorrt_objection):
        if objection:
            return Decision(Action.STAY, f"ONNX Runtime serves: {objection}")
    failure = situation.failure
    if failure is not None:
        if failure.lasting:
            return Decision(Action.STAY, f"ONNX Runtime serves for good: {failure.reason}")
        due = failure.at + retry_after(failure.count)
        if now < due and not situation.building:
            return Decision(
                Action.STAY,
                f"ONNX Runtime serves, TensorRT is tried again in {due - now:.0f} s: "
                f"{failure.reason}",
                due,
            )
    if situation.building:
        return Decision(Action.STAY, "ONNX Runtime serves while a TensorRT plan is built")
    if situation.plan_is_kept:
        return Decision(Action.SWITCH, "a TensorRT plan is ready")
    return Decision(Action.BUILD, "a TensorRT plan is needed for this machine")


def retry_after(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return min(FIRST_RETRY_S * 2.0 ** min(failures - 1, 10), LONGEST_RETRY_S)
