"""What a TensorRT plan is made for: the machine, the model, the shapes. Pure.

A plan holds the kernels that were fastest on one kind of GPU under one driver and one build of
TensorRT, for one file and one range of shapes. Whatever of this differs asks for another plan,
so all of it is in the key, and the key is the name under which a plan is kept.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloud_hub.engines.tensorrt.errors import PlanRefused
from fogline_protocol.tensors import TensorSpec

Shape = tuple[int, ...]

PARAMETER = "tensorrt.shapes."  # + the input's name: a parameter of a model's configuration
MAX_DIM = (1 << 31) - 1  # TensorRT reads dimensions of profiles as 32-bit numbers


@dataclass(frozen=True, slots=True)
class Platform:
    """The kind of machine a plan runs on. Two cards of one kind share their plans."""

    gpu: str  # its name; for a slice of a GPU the slice's
    compute_capability: str
    multiprocessors: int  # slices of one GPU differ in it
    driver: str
    tensorrt: str  # with its build: plans of another build are refused

    @property
    def id(self) -> str:
        """Return a short name for files that belong to this kind of machine."""
        return _digest(dataclasses.asdict(self))[:16]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The shapes that one input may take, whole: with the batch dimension."""

    least: Shape
    best: Shape  # what the plan is made fastest for
    most: Shape

    def __post_init__(self) -> None:
        """Refuse what TensorRT would refuse, in words.

        Raises:
            PlanRefused: the ranks differ, or a dimension does not ascend from at least 1.
        """
        if not len(self.least) == len(self.best) == len(self.most):
            raise PlanRefused(f"bounds of different rank: {self}")
        for low, best, high in zip(self.least, self.best, self.most, strict=True):
            if not 1 <= low <= best <= high <= MAX_DIM:
                raise PlanRefused(f"bounds must ascend from at least 1 in every dimension: {self}")

    def __str__(self) -> str:
        return f"{list(self.least)}, {list(self.best)}, {list(self.most)}"


@dataclass(frozen=True, slots=True)
class Profile:
    """The shapes that a plan is built for. Inputs without variable dimensions are not in it."""

    inputs: Mapping[str, Bounds] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the profile as a JSON document."""
        return {
            name: [list(bounds.least), list(bounds.best), list(bounds.most)]
            for name, bounds in sorted(self.inputs.items())
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Profile":
        """Read what ``to_json`` wrote."""
        return cls(
            {
                name: Bounds(*(tuple(int(dim) for dim in shape) for shape in shapes))
                for name, shapes in document.items()
            }
        )


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a plan is built. Precision is not here: it is decided in the ONNX file."""

    tf32: bool = True  # FP32 products on tensor cores with 10 bits of mantissa; TensorRT's default
    optimization_level: int = 3  # 0 to 5: longer builds, faster plans; 3 is TensorRT's default
    workspace_bytes: int = 4 << 30  # upper limit of what one layer may use while it runs

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            PlanRefused: an option is out of its range.
        """
        if not 0 <= self.optimization_level <= 5:
            raise PlanRefused(f"optimization_level is 0 to 5, got {self.optimization_level}")
        if self.workspace_bytes < 0:
            raise PlanRefused(f"workspace_bytes is at least 0, got {self.workspace_bytes}")


DEFAULT_OPTIONS = BuildOptions()


@dataclass(frozen=True, slots=True)
class PlanKey:
    """Everything that makes a plan the right one."""

    platform: Platform
    model_sha256: str
    profile: Profile
    options: BuildOptions = DEFAULT_OPTIONS

    @property
    def id(self) -> str:
        """Return the key as a name for files: equal keys have equal names, others do not."""
        return _digest(
            {
                "platform": dataclasses.asdict(self.platform),
                "model": self.model_sha256,
                "profile": self.profile.to_json(),
                "options": dataclasses.asdict(self.options),
            }
        )[:40]


def profile_for(
    inputs: Sequence[TensorSpec],
    *,
    max_batch: int,
    best_batch: int = 0,
    bounds: Mapping[str, Bounds] | None = None,
) -> Profile:
    """Return the shapes to build for.

    Args:
        inputs: whole shapes of the model's inputs, -1 where variable.
        max_batch: most rows of one run; 0: the model has no batch dimension.
        best_batch: the preferred or measured number of rows; 0: as many as possible.
        bounds: of inputs with other variable dimensions, without the batch dimension.

    Raises:
        PlanRefused: bounds are missing or contradict the model; the text says what to set.
    """
    given = dict(bounds or {})
    best = min(best_batch or max_batch, max_batch)
    made: dict[str, Bounds] = {}
    for spec in inputs:
        rows = spec.shape[:1] if max_batch else ()
        rest = spec.shape[1:] if max_batch else spec.shape
        asked = given.pop(spec.name, None)
        if asked is None:
            if -1 in rest:
                raise PlanRefused(_how_to_bound(spec, rest))
            asked = Bounds(rest, rest, rest) if 0 not in rest else None
        if asked is None:
            raise PlanRefused(f"input {spec.name!r} is always empty: its shape is {spec.shape}")
        if len(asked.most) != len(rest) or any(
            dim != -1 and not low == dim == high
            for dim, low, high in zip(rest, asked.least, asked.most, strict=False)
        ):
            raise PlanRefused(
                f"the bounds of input {spec.name!r}, {asked}, do not fit its shape {list(rest)}"
                f"{', in which the batch dimension is left out' if max_batch else ''}"
            )
        if -1 not in spec.shape:
            continue
        # An input may have rows of its own fixed number beside others that batch.
        least, most = ((1,), (max_batch,)) if rows == (-1,) else (rows, rows)
        middle = (best,) if rows == (-1,) else rows
        made[spec.name] = Bounds(least + asked.least, middle + asked.best, most + asked.most)
    if given:
        raise PlanRefused(
            f"there are bounds for {', '.join(sorted(given))}, but the model's inputs are "
            f"{', '.join(spec.name for spec in inputs)}"
        )
    return Profile(made)


def bounds_from(parameters: Mapping[str, str]) -> dict[str, Bounds]:
    """Read bounds from a model's parameters: ``tensorrt.shapes.image = 3x64x64,3x224x224,3x640x640``.

    Raises:
        PlanRefused: a value is not three shapes that ascend.
    """
    found: dict[str, Bounds] = {}
    for key, value in parameters.items():
        if not key.startswith(PARAMETER):
            continue
        try:
            least, best, most = (
                tuple(int(dim) for dim in shape.split("x")) for shape in value.split(",")
            )
        except ValueError:
            raise PlanRefused(
                f"parameter {key!r} must be three shapes, e.g. 3x64x64,3x224x224,3x640x640 "
                f"(least, best, most; without the batch dimension), got {value!r}"
            ) from None
        found[key.removeprefix(PARAMETER)] = Bounds(least, best, most)
    return found


def _how_to_bound(spec: TensorSpec, rest: Shape) -> str:
    example = ",".join(
        "x".join(str(dim if dim != -1 else free) for dim in rest) for free in (1, 64, 256)
    )
    return (
        f"input {spec.name!r} has variable dimensions {list(rest)}, and TensorRT must know their "
        f'bounds: set parameters {{ key: "{PARAMETER}{spec.name}" value {{ string_value: '
        f'"{example}" }} }} in config.pbtxt (least, best, most; your numbers, without the batch '
        "dimension); until then ONNX Runtime serves it"
    )


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
