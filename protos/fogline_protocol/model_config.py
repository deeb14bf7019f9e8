"""The configuration of a model: what a server says of it, and what a ``config.pbtxt`` says.

Two shapes of the same tensors exist in this protocol. Metadata carry the whole shape, the
batch dimension included; the configuration leaves the batch dimension out whenever
``max_batch_size`` is above 0. ``TensorSpec`` is always the whole shape, so the difference is
made here and nowhere else.

Source: triton-inference-server/common model_config.proto and server docs/user_guide.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fogline_protocol.tensors import TensorSpec
from fogline_protocol.v1 import inference_pb2 as pb
from fogline_protocol.v1 import model_config_pb2 as mc

BACKEND = "onnxruntime"
PLATFORM = "onnxruntime_onnx"
UPSTREAM = "upstream"  # backend and platform of a model that another server runs
THREADS = "fogline.threads"  # a parameter: threads of one run, for models that run here
MAX_THREADS = 256

log = logging.getLogger("fogline.model_config")


class ConfigError(ValueError):
    """A ``config.pbtxt`` that cannot be obeyed: its text says what to change."""


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions of a model are served: the newest ``latest``, ``specific`` ones, or all."""

    latest: int = 1
    specific: tuple[int, ...] = ()
    all: bool = False

    def choose(self, versions: Sequence[int]) -> Sequence[int]:
        """Return the versions to serve, in ascending order."""
        found = sorted(versions)
        if self.all:
            return found
        if self.specific:
            return [version for version in found if version in self.specific]
        return found[-self.latest :]


@dataclass(frozen=True, slots=True)
class WarmUpTensor:
    """One input of a warm-up request."""

    datatype: str
    dims: tuple[int, ...]  # without the batch dimension
    data: str  # "zero", "random", or the name of a file with the raw tensor


@dataclass(frozen=True, slots=True)
class WarmUp:
    """A request that a model answers before it may serve."""

    name: str
    batch_size: int
    count: int  # how often; 0 stands for once
    inputs: Mapping[str, WarmUpTensor]


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How requests of one priority level may wait for an engine.

    ``allow_timeout_override`` is reported and changes nothing: a request's own ``timeout`` is
    always its deadline, and may so shorten its wait, never lengthen it.
    """

    timeout_us: int = 0  # 0: as long as their callers do
    delays: bool = False  # past it they come last in their level; otherwise they are refused
    allow_timeout_override: bool = False
    max_requests: int = 0  # 0: no limit


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """Which requests leave together, and in whose turn. The defaults: whatever waits, at once."""

    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0  # 0: all requests have one, whatever they ask for
    default_priority_level: int = 0
    default_policy: QueuePolicy = QueuePolicy()
    policies: Mapping[int, QueuePolicy] = field(default_factory=dict)  # by level

    def check(self, max_batch_size: int, instances: int) -> None:
        """Refuse what contradicts itself or cannot be kept.

        Raises:
            ConfigError: the text says what to change.
        """
        wrong = [size for size in self.preferred_batch_sizes if not 1 <= size <= max_batch_size]
        if wrong:
            raise ConfigError(
                f"preferred_batch_size {wrong} is not between 1 and max_batch_size, {max_batch_size}"
            )
        levels = self.priority_levels
        if levels and not 1 <= self.default_priority_level <= levels:
            raise ConfigError(
                f"default_priority_level must be between 1 and priority_levels, {levels}, got "
                f"{self.default_priority_level}"
            )
        strange = sorted(level for level in self.policies if not 1 <= level <= levels)
        if strange:
            raise ConfigError(
                f"priority_queue_policy names the levels {strange}, priority_levels is {levels}"
            )
        if not self.preserve_ordering:
            return
        policies = (self.default_policy, *self.policies.values())
        if instances > 1 or levels > 1 or any(policy.delays for policy in policies):
            raise ConfigError(
                "preserve_ordering cannot be kept with several instances, several priority_levels or "
                "timeout_action DELAY: leave out one or the other"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a server does with a model. Shapes are whole: they start with the batch dimension."""

    name: str
    max_batch_size: int  # 0: the model has no batch dimension
    inputs: Sequence[TensorSpec] = ()
    outputs: Sequence[TensorSpec] = ()
    platform: str = PLATFORM
    backend: str = BACKEND
    versions: VersionPolicy = VersionPolicy()
    batching: DynamicBatching = DynamicBatching()
    instances: int = 1
    threads: int = 0  # of one run; 0: as the server is told
    label_files: Mapping[str, str] = field(default_factory=dict)  # by output
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by output, read from them
    response_cache: bool = False  # whether the same request may get the same answer again

    @property
    def batches(self) -> bool:
        """Whether requests of several rows share one run."""
        return self.max_batch_size > 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a ``config.pbtxt`` asks for; None where it says nothing and the graph decides."""

    name: str = ""
    max_batch_size: int | None = None
    inputs: Sequence[tuple[str, str, tuple[int, ...]]] = ()  # name, datatype, dims without batch
    outputs: Sequence[tuple[str, str, tuple[int, ...]]] = ()
    versions: VersionPolicy = VersionPolicy()
    batching: DynamicBatching = DynamicBatching()
    instances: int = 1
    label_files: Mapping[str, str] = field(default_factory=dict)
    warm_ups: tuple[WarmUp, ...] = ()
    backend: str = BACKEND
    parameters: Mapping[str, str] = field(default_factory=dict)
    response_cache: bool = False
    threads: int = 0

    def completed(
        self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], limit: int
    ) -> ModelConfig:
        """Return the configuration of the model whose graph has these tensors.

        Without a word on ``max_batch_size`` a model batches up to ``limit`` if all of its
        tensors start with a dimension that may vary.

        Raises:
            ConfigError: the file contradicts the graph.
        """
        if self.name not in ("", name):
            raise ConfigError(f"config.pbtxt names {self.name!r}, its directory is {name!r}")
        can_batch = all(spec.shape[:1] == (-1,) for spec in (*inputs, *outputs))
        size = self.max_batch_size
        if size is None:
            size = limit if can_batch else 0
        elif size < 0:
            raise ConfigError(f"max_batch_size must be at least 0, got {size}")
        elif size and not can_batch:
            raise ConfigError(
                f"max_batch_size is {size}, but not every tensor of the graph starts with a "
                "dimension that may vary: export it so, or say max_batch_size: 0"
            )
        self.batching.check(size, self.instances)
        _agree("input", self.inputs, inputs, size)
        _agree("output", self.outputs, outputs, size)
        return ModelConfig(
            name=name,
            max_batch_size=size,
            inputs=inputs,
            outputs=outputs,
            versions=self.versions,
            batching=self.batching,
            instances=self.instances,
            threads=self.threads,
            label_files=self.label_files,
            platform=UPSTREAM if self.backend == UPSTREAM else PLATFORM,
            backend=self.backend,
            response_cache=self.response_cache,
        )


def parse_pbtxt(text: str) -> Wanted:
    """Read a ``config.pbtxt``.

    Raises:
        ConfigError: it is not one, or asks for what is not served here.
    """
    message = mc.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        first = str(error)
        message.Clear()
        try:
            # Triton's files name many things that mean nothing here.
            text_format.Parse(text, message, allow_unknown_field=True)
        except text_format.ParseError as second:
            raise ConfigError(f"config.pbtxt cannot be read: {second}") from None
        log.warning("config.pbtxt has fields that are not known here and are ignored: %s", first)
    backend = message.backend or message.platform
    if backend not in ("", BACKEND, PLATFORM, UPSTREAM):
        raise ConfigError(
            f"backend {backend!r} is not served here, {BACKEND!r} and {UPSTREAM!r} are"
        )
    if message.model_transaction_policy.decoupled:
        raise ConfigError("decoupled models are not served here")
    for tensor in message.input:
        if tensor.HasField("reshape") or tensor.allow_ragged_batch:
            raise ConfigError(
                f"input {tensor.name!r}: reshape and allow_ragged_batch are not offered here"
            )
    groups = message.instance_group
    return Wanted(
        name=message.name,
        max_batch_size=message.max_batch_size if _says_size(text) else None,
        inputs=[(t.name, _datatype(t.data_type), tuple(t.dims)) for t in message.input],
        outputs=[(t.name, _datatype(t.data_type), tuple(t.dims)) for t in message.output],
        versions=_policy(message.version_policy),
        batching=_batching(message.dynamic_batching),
        instances=max(1, sum(max(1, group.count) for group in groups)),
        label_files={t.name: t.label_filename for t in message.output if t.label_filename},
        warm_ups=tuple(_warm_up(warm_up) for warm_up in message.model_warmup),
        backend=UPSTREAM if backend == UPSTREAM else BACKEND,
        parameters={key: value.string_value for key, value in message.parameters.items()},
        response_cache=message.response_cache.enable,
        threads=_threads(message),
    )


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a ``config.pbtxt`` is to say from now on about how a model is run; None: as before."""

    max_batch_size: int | None
    instances: int
    threads: int | None
    preferred_batch_sizes: tuple[int, ...]


def tuned(text: str, tuning: Tuning) -> str:
    """Return a ``config.pbtxt`` with everything it said but for what ``tuning`` decides.

    Comments are lost, and the order of fields is that of their numbers.

    Raises:
        ConfigError: it is no configuration, or has fields that only other servers know, which
            would be lost.
    """
    message = mc.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigError(
            f"config.pbtxt cannot be rewritten without losing what is not understood here: {error}"
        ) from None
    says_size = _says_size(text)
    if tuning.max_batch_size is not None:
        message.max_batch_size, says_size = tuning.max_batch_size, True
    if not message.instance_group:
        message.instance_group.add()
    del message.instance_group[1:]  # their counts were added up
    message.instance_group[0].count = tuning.instances
    if tuning.threads is not None:
        message.parameters[THREADS].string_value = str(tuning.threads)
    if message.dynamic_batching.preferred_batch_size or tuning.preferred_batch_sizes:
        message.dynamic_batching.preferred_batch_size[:] = tuning.preferred_batch_sizes
    written = text_format.MessageToString(message, as_utf8=True)
    if says_size and not message.max_batch_size:
        written = "max_batch_size: 0\n" + written  # a plain 0 is not printed, and means something
    return written


def encode(config: ModelConfig) -> bytes:
    """Return the configuration as a ``ModelConfigResponse``."""
    return pb.ModelConfigResponse(config=_message(config)).SerializeToString()


def document(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration as a JSON-ready document: Triton's names, numbers as numbers."""
    return _json(_message(config))


def _says_size(text: str) -> bool:
    # proto3 cannot tell 0 from absent, a text can.
    return "max_batch_size" in re.sub(r"#.*", "", text)


def _threads(message: mc.ModelConfig) -> int:
    if THREADS not in message.parameters:
        return 0
    value = message.parameters[THREADS].string_value
    if not (
        value.isascii() and value.isdecimal() and len(value) <= 3 and 1 <= int(value) <= MAX_THREADS
    ):
        raise ConfigError(
            f"parameter {THREADS!r} must be a string_value from 1 to {MAX_THREADS}, got {value!r}"
        )
    return int(value)


def _message(config: ModelConfig) -> mc.ModelConfig:
    skip = 1 if config.batches else 0
    policy = config.versions
    versions = mc.ModelVersionPolicy()
    if policy.all:
        versions.all.SetInParent()
    elif policy.specific:
        versions.specific.versions.extend(policy.specific)
    else:
        versions.latest.num_versions = policy.latest
    message = mc.ModelConfig(
        name=config.name,
        platform=config.platform,
        backend=config.backend,
        version_policy=versions,
        max_batch_size=config.max_batch_size,
        input=[
            mc.ModelInput(name=s.name, data_type=_type_number(s.datatype), dims=s.shape[skip:])
            for s in config.inputs
        ],
        output=[
            mc.ModelOutput(
                name=s.name,
                data_type=_type_number(s.datatype),
                dims=s.shape[skip:],
                label_filename=config.label_files.get(s.name, ""),
            )
            for s in config.outputs
        ],
        instance_group=[
            mc.ModelInstanceGroup(
                name=config.name, count=config.instances, kind=mc.ModelInstanceGroup.KIND_AUTO
            )
        ],
        default_model_filename="" if config.backend == UPSTREAM else "model.onnx",
        response_cache=mc.ModelResponseCache(enable=config.response_cache),
        model_transaction_policy=mc.ModelTransactionPolicy(decoupled=False),
    )
    if config.threads:
        message.parameters[THREADS].string_value = str(config.threads)
    batching = config.batching
    if config.batches or batching != DynamicBatching():
        message.dynamic_batching.CopyFrom(
            mc.ModelDynamicBatching(
                preferred_batch_size=batching.preferred_batch_sizes,
                max_queue_delay_microseconds=batching.max_queue_delay_us,
                preserve_ordering=batching.preserve_ordering,
                priority_levels=batching.priority_levels,
                default_priority_level=batching.default_priority_level,
            )
        )
        if batching.default_policy != QueuePolicy():
            message.dynamic_batching.default_queue_policy.CopyFrom(
                _policy_message(batching.default_policy)
            )
        for level, wait in batching.policies.items():
            message.dynamic_batching.priority_queue_policy[level].CopyFrom(_policy_message(wait))
    return message


def _policy_message(policy: QueuePolicy) -> mc.ModelQueuePolicy:
    return mc.ModelQueuePolicy(
        timeout_action=mc.ModelQueuePolicy.DELAY if policy.delays else mc.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=policy.timeout_us,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_requests,
    )


def _batching(message: mc.ModelDynamicBatching) -> DynamicBatching:
    return DynamicBatching(
        preferred_batch_sizes=tuple(message.preferred_batch_size),
        max_queue_delay_us=message.max_queue_delay_microseconds,
        preserve_ordering=message.preserve_ordering,
        priority_levels=message.priority_levels,
        default_priority_level=message.default_priority_level,
        default_policy=_queue_policy(message.default_queue_policy),
        policies={
            level: _queue_policy(policy) for level, policy in message.priority_queue_policy.items()
        },
    )


def _queue_policy(message: mc.ModelQueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        timeout_us=message.default_timeout_microseconds,
        delays=message.timeout_action == mc.ModelQueuePolicy.DELAY,
        allow_timeout_override=message.allow_timeout_override,
        max_requests=message.max_queue_size,
    )


def _type_number(datatype: str) -> Any:  # the stubs call one enum by two types
    return mc.DataType.Value("TYPE_" + ("STRING" if datatype == "BYTES" else datatype))


def _datatype(number: mc.DataType) -> str:
    name = mc.DataType.Name(number).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _warm_up(message: mc.ModelWarmup) -> WarmUp:
    inputs = {}
    for name, tensor in message.inputs.items():
        kind = tensor.WhichOneof("input_data_type")
        if kind is None:
            raise ConfigError(
                f"warm-up {message.name!r}, input {name!r}: say zero_data: true, random_data: true "
                "or input_data_file"
            )
        data = {"zero_data": "zero", "random_data": "random"}.get(kind, tensor.input_data_file)
        inputs[name] = WarmUpTensor(_datatype(tensor.data_type), tuple(tensor.dims), data)
    return WarmUp(message.name, message.batch_size, message.count, inputs)


def _policy(message: mc.ModelVersionPolicy) -> VersionPolicy:
    match message.WhichOneof("policy_choice"):
        case "all":
            return VersionPolicy(all=True)
        case "specific":
            return VersionPolicy(specific=tuple(message.specific.versions))
        case "latest":
            return VersionPolicy(latest=max(1, message.latest.num_versions))
        case _:
            return VersionPolicy()


def _agree(
    kind: str,
    wanted: Sequence[tuple[str, str, tuple[int, ...]]],
    found: Sequence[TensorSpec],
    max_batch_size: int,
) -> None:
    specs = {spec.name: spec for spec in found}
    for name, datatype, dims in wanted:
        spec = specs.get(name)
        if spec is None:
            raise ConfigError(
                f"config.pbtxt names the {kind} {name!r}, the graph has {sorted(specs)}"
            )
        shape = spec.shape[1:] if max_batch_size else spec.shape
        fits = len(dims) == len(shape) and all(
            -1 in (want, have) or want == have for want, have in zip(dims, shape, strict=True)
        )
        if datatype != spec.datatype or not fits:
            raise ConfigError(
                f"{kind} {name!r} is {spec.datatype} {list(shape)} in the graph, config.pbtxt says "
                f"{datatype} {list(dims)}"
            )


def _json(message: Message) -> dict[str, Any]:
    """Return every set field, and every plain field that a reader may look for, by its name.

    Protobuf's own mapping would write 64-bit integers as texts.
    """
    found: dict[str, Any] = {}
    for field_ in message.DESCRIPTOR.fields:
        value = getattr(message, field_.name)
        if field_.message_type is not None and field_.message_type.GetOptions().map_entry:
            found[field_.name] = {
                str(key): _json(item) if isinstance(item, Message) else item
                for key, item in value.items()
            }
        elif field_.is_repeated:
            found[field_.name] = [_json_value(field_, item) for item in value]
        elif field_.message_type is None or message.HasField(field_.name):
            found[field_.name] = _json_value(field_, value)
    return found


def _json_value(field_: FieldDescriptor, value: Any) -> Any:
    if field_.message_type is not None:
        return _json(value)
    if field_.enum_type is not None:
        return field_.enum_type.values_by_number[value].name
    return value
