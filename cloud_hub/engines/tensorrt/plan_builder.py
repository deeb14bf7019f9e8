"""Builds one TensorRT plan: the child process of ``plans``.

    python -m cloud_hub.engines.tensorrt.plan_builder

One task comes as a line of JSON on stdin (``{"platform": DEVICE}`` asks what machine this is); progress goes as lines of JSON to stdout, and the
last line is the outcome: ``{"built": BYTES}`` or ``{"refused": SENTENCE, "lasting": BOOL}``.
When stdin ends the process ends, in the middle of a build too: that is how it is cancelled, and
how it follows a parent that was killed.
"""

import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cloud_hub.engines.engine import EngineLost
from cloud_hub.engines.tensorrt import api
from cloud_hub.engines.tensorrt.cuda import Cuda
from cloud_hub.engines.tensorrt.errors import GpuUnavailable, OutOfDeviceMemory, PlanRefused
from cloud_hub.engines.tensorrt.log import Reasons, is_out_of_memory
from cloud_hub.engines.tensorrt.plan_key import BuildOptions, Platform, Profile

_ERRORS_SHOWN = 10  # of a parser; the first ones are the causes


@dataclass(frozen=True, slots=True)
class Task:
    """One plan to build."""

    model: Path
    sha256: str  # of the model file; another file is not built
    profile: Profile
    options: BuildOptions
    device: int
    plan: Path  # written to
    timings: Path  # measured kernels of earlier builds, read and replaced

    def to_json(self) -> dict[str, Any]:
        """Return the task as a JSON document."""
        return {
            "model": str(self.model),
            "sha256": self.sha256,
            "profile": self.profile.to_json(),
            "options": dataclasses.asdict(self.options),
            "device": self.device,
            "plan": str(self.plan),
            "timings": str(self.timings),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Task":
        """Read what ``to_json`` wrote."""
        return cls(
            model=Path(document["model"]),
            sha256=document["sha256"],
            profile=Profile.from_json(document["profile"]),
            options=BuildOptions(**document["options"]),
            device=document["device"],
            plan=Path(document["plan"]),
            timings=Path(document["timings"]),
        )


Tell = Callable[[str, int, int], None]  # phase, step, steps


def build(task: Task, trt: api.Module, cuda: api.CudaRuntime, tell: Tell) -> int:
    """Build the plan, write it, and return its size in bytes. Blocks for minutes.

    Raises:
        PlanRefused: there is no plan; the reason names every part that TensorRT objects to.
    """
    reasons = Reasons(trt)
    _check_model(task)
    Cuda(cuda).use(task.device)
    builder = trt.Builder(reasons.logger)
    network = builder.create_network(api.network_flags(trt))
    config = builder.create_builder_config()
    if network is None or config is None:
        raise _refusal("TensorRT cannot start a build", reasons)
    parser = trt.OnnxParser(network, reasons.logger)
    if not parser.parse_from_file(str(task.model)):
        raise PlanRefused(f"{task.model}: TensorRT cannot build it: {_objections(parser)}")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, task.options.workspace_bytes)
    config.builder_optimization_level = task.options.optimization_level
    if not task.options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    _add_profile(task, builder, network, config, reasons)
    _use_timings(task, config)
    reasons.take()  # what it thought of old timings is no reason for what follows
    config.progress_monitor = _monitor(trt, tell)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refusal(f"{task.model}: TensorRT built no plan", reasons)
    with task.plan.open("wb") as file:
        file.write(plan)
    _keep_timings(task, config)
    return plan.nbytes


def platform(device: int, trt: api.Module, cuda: api.CudaRuntime) -> Platform:
    """Return the kind of machine this is.

    Raises:
        GpuUnavailable: no driver or no such GPU.
    """
    found = Cuda(cuda).device(device)
    return Platform(
        gpu=found.name,
        compute_capability=found.compute_capability,
        multiprocessors=found.multiprocessors,
        driver=found.driver,
        tensorrt=trt.__version__,
    )


def _check_model(task: Task) -> None:
    try:
        with task.model.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PlanRefused(f"{task.model}: {error.strerror}", lasting=False) from None
    if found != task.sha256:
        raise PlanRefused(
            f"{task.model} is not the file that was asked for: its SHA-256 is {found}, "
            f"expected {task.sha256}",
            lasting=False,
        )


def _add_profile(
    task: Task,
    builder: api.Builder,
    network: api.Network,
    config: api.BuilderConfig,
    reasons: Reasons,
) -> None:
    variable: set[str] = set()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = [int(dim) for dim in tensor.shape]
        if -1 in shape:
            variable.add(tensor.name)
            if tensor.name not in task.profile.inputs:
                raise PlanRefused(
                    f"{task.model}: input {tensor.name!r} has variable dimensions {shape} and no "
                    "bounds were given"
                )
    stray = sorted(task.profile.inputs.keys() - variable)
    if stray:
        raise PlanRefused(f"{task.model}: no input with variable dimensions: {', '.join(stray)}")
    if not variable:
        return
    profile = builder.create_optimization_profile()
    if profile is None:
        raise _refusal("TensorRT gives no optimization profile", reasons)
    for name, bounds in task.profile.inputs.items():
        try:
            profile.set_shape(name, bounds.least, bounds.best, bounds.most)
        except (ValueError, RuntimeError) as error:  # the pages say one, the sources the other
            raise PlanRefused(
                f"{task.model}: TensorRT refuses the bounds {bounds} of input {name!r}: {error}"
            ) from None
    if config.add_optimization_profile(profile) < 0:
        raise _refusal(f"{task.model}: TensorRT refuses the profile", reasons)


def _use_timings(task: Task, config: api.BuilderConfig) -> None:
    """Start from what earlier builds measured, or from nothing: it only saves time."""
    try:
        known = task.timings.read_bytes()
    except OSError:
        known = b""
    for content in dict.fromkeys((known, b"")):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _keep_timings(task: Task, config: api.BuilderConfig) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    with tempfile.NamedTemporaryFile(
        dir=task.timings.parent, suffix=".partial", delete=False
    ) as new:
        new.write(cache.serialize())
    Path(new.name).replace(task.timings)


def _monitor(trt: api.Module, tell: Tell) -> Any:
    steps: dict[str, int] = {}

    def phase_start(_: Any, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        steps[phase_name] = num_steps
        tell(phase_name, 0, num_steps)

    def step_complete(_: Any, phase_name: str, step: int) -> bool:
        tell(phase_name, step + 1, steps.get(phase_name, step + 1))
        return True  # False would cancel

    def phase_finish(_: Any, phase_name: str) -> None:
        steps.pop(phase_name, None)

    # A class made here: what it derives from exists only once TensorRT is imported.
    return type(
        "Monitor",
        (trt.IProgressMonitor,),
        {
            "phase_start": phase_start,
            "step_complete": step_complete,
            "phase_finish": phase_finish,
        },
    )()


def _objections(parser: api.OnnxParser) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [
        f"node {error.node_name() or '(unnamed)'} ({error.node_operator() or 'no operator'}): "
        f"{' '.join(error.desc().split())}"
        for error in errors[:_ERRORS_SHOWN]
    ]
    if len(errors) > _ERRORS_SHOWN:
        said.append(f"and {len(errors) - _ERRORS_SHOWN} more")
    return "; ".join(said) or "it gives no reason"


def _refusal(what: str, reasons: Reasons) -> PlanRefused:
    reason = reasons.take()
    return PlanRefused(f"{what}: {reason}", lasting=not is_out_of_memory(reason))


def main() -> None:
    """Do the task on stdin."""
    # TensorRT and its plugins may print: what they say must not look like an outcome.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    if "platform" in request:
        _say(out, _describe(request["platform"]))
    else:
        _say(out, _do(Task.from_json(request), out))


def _describe(device: int) -> dict[str, Any]:
    try:
        found = platform(device, api.tensorrt(), api.cuda_runtime())
    except (GpuUnavailable, OutOfDeviceMemory, EngineLost) as error:
        return {"refused": str(error)}
    return {"platform": dataclasses.asdict(found)}


def _do(task: Task, out: IO[bytes]) -> dict[str, Any]:
    def tell(phase: str, step: int, steps: int) -> None:
        _say(out, {"phase": phase, "step": step, "steps": steps})

    try:
        return {"built": build(task, api.tensorrt(), api.cuda_runtime(), tell)}
    except PlanRefused as error:
        return {"refused": str(error), "lasting": error.lasting}
    except (GpuUnavailable, OutOfDeviceMemory, EngineLost) as error:
        return {"refused": f"{task.model}: {error}", "lasting": False}


def _say(out: IO[bytes], document: dict[str, Any]) -> None:
    # One write for one line: TensorRT reports progress from several threads.
    out.write(json.dumps(document).encode() + b"\n")


def _follow_parent() -> None:
    # TensorRT lets Python run while it builds. Nothing to tidy up: the parent removes the file.
    # Not through sys.stdin, whose lock would be missed when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
