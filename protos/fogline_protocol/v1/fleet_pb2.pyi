import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Telemetry(_message.Message):
    __slots__ = ("device", "boot_id", "sequence", "reported_at", "agent_version", "hardware_class", "link", "rss_bytes", "models", "escalation_bytes_sent", "escalation_bytes_received", "recent")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REPORTED_AT_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_CLASS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ESCALATION_BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    ESCALATION_BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    device: str
    boot_id: str
    sequence: int
    reported_at: _timestamp_pb2.Timestamp
    agent_version: str
    hardware_class: str
    link: str
    rss_bytes: int
    models: _containers.RepeatedCompositeFieldContainer[ModelTraffic]
    escalation_bytes_sent: int
    escalation_bytes_received: int
    recent: _containers.RepeatedCompositeFieldContainer[Decision]
    def __init__(self, device: _Optional[str] = ..., boot_id: _Optional[str] = ..., sequence: _Optional[int] = ..., reported_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., agent_version: _Optional[str] = ..., hardware_class: _Optional[str] = ..., link: _Optional[str] = ..., rss_bytes: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelTraffic, _Mapping]]] = ..., escalation_bytes_sent: _Optional[int] = ..., escalation_bytes_received: _Optional[int] = ..., recent: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("at", "model", "release", "tier", "quality", "reason", "seconds", "rows")
    AT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    at: float
    model: str
    release: str
    tier: str
    quality: str
    reason: str
    seconds: float
    rows: int
    def __init__(self, at: _Optional[float] = ..., model: _Optional[str] = ..., release: _Optional[str] = ..., tier: _Optional[str] = ..., quality: _Optional[str] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ..., rows: _Optional[int] = ...) -> None: ...

class ModelTraffic(_message.Message):
    __slots__ = ("model", "release", "outcomes", "latencies")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    model: str
    release: str
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    latencies: _containers.RepeatedCompositeFieldContainer[Latency]
    def __init__(self, model: _Optional[str] = ..., release: _Optional[str] = ..., outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ..., latencies: _Optional[_Iterable[_Union[Latency, _Mapping]]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("tier", "quality", "reason", "rows")
    TIER_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    quality: str
    reason: str
    rows: int
    def __init__(self, tier: _Optional[str] = ..., quality: _Optional[str] = ..., reason: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ("tier", "bounds_s", "counts")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    bounds_s: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tier: _Optional[str] = ..., bounds_s: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class TelemetryReceipt(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ContactRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class ContactResponse(_message.Message):
    __slots__ = ("mqtt", "http", "reported_revision")
    MQTT_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    REPORTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    mqtt: str
    http: str
    reported_revision: int
    def __init__(self, mqtt: _Optional[str] = ..., http: _Optional[str] = ..., reported_revision: _Optional[int] = ...) -> None: ...

class Desired(_message.Message):
    __slots__ = ("schema", "generation", "hub_epoch", "releases")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HUB_EPOCH_FIELD_NUMBER: _ClassVar[int]
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    schema: int
    generation: int
    hub_epoch: str
    releases: _containers.RepeatedCompositeFieldContainer[DesiredRelease]
    def __init__(self, schema: _Optional[int] = ..., generation: _Optional[int] = ..., hub_epoch: _Optional[str] = ..., releases: _Optional[_Iterable[_Union[DesiredRelease, _Mapping]]] = ...) -> None: ...

class DesiredRelease(_message.Message):
    __slots__ = ("model", "release", "version", "index_target", "certificate_targets")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_TARGET_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_TARGETS_FIELD_NUMBER: _ClassVar[int]
    model: str
    release: int
    version: str
    index_target: str
    certificate_targets: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., release: _Optional[int] = ..., version: _Optional[str] = ..., index_target: _Optional[str] = ..., certificate_targets: _Optional[_Iterable[str]] = ...) -> None: ...

class Reported(_message.Message):
    __slots__ = ("schema", "device", "sequence", "generation", "models")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    schema: int
    device: str
    sequence: int
    generation: int
    models: _containers.RepeatedCompositeFieldContainer[ReportedModel]
    def __init__(self, schema: _Optional[int] = ..., device: _Optional[str] = ..., sequence: _Optional[int] = ..., generation: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ReportedModel, _Mapping]]] = ...) -> None: ...

class ReportedModel(_message.Message):
    __slots__ = ("model", "desired_release", "active_release", "previous_release", "active_version", "phase", "code", "sentence", "attempt", "figures", "bytes_done", "bytes_total", "serving")
    class FiguresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DESIRED_RELEASE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_RELEASE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_RELEASE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    model: str
    desired_release: int
    active_release: int
    previous_release: int
    active_version: str
    phase: str
    code: str
    sentence: str
    attempt: int
    figures: _containers.ScalarMap[str, float]
    bytes_done: int
    bytes_total: int
    serving: Serving
    def __init__(self, model: _Optional[str] = ..., desired_release: _Optional[int] = ..., active_release: _Optional[int] = ..., previous_release: _Optional[int] = ..., active_version: _Optional[str] = ..., phase: _Optional[str] = ..., code: _Optional[str] = ..., sentence: _Optional[str] = ..., attempt: _Optional[int] = ..., figures: _Optional[_Mapping[str, float]] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., serving: _Optional[_Union[Serving, _Mapping]] = ...) -> None: ...

class Serving(_message.Message):
    __slots__ = ("variant", "provider", "hardware_class", "certificate", "meant_variant", "meant_provider", "aside")
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_CLASS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    MEANT_VARIANT_FIELD_NUMBER: _ClassVar[int]
    MEANT_PROVIDER_FIELD_NUMBER: _ClassVar[int]
    ASIDE_FIELD_NUMBER: _ClassVar[int]
    variant: str
    provider: str
    hardware_class: str
    certificate: str
    meant_variant: str
    meant_provider: str
    aside: str
    def __init__(self, variant: _Optional[str] = ..., provider: _Optional[str] = ..., hardware_class: _Optional[str] = ..., certificate: _Optional[str] = ..., meant_variant: _Optional[str] = ..., meant_provider: _Optional[str] = ..., aside: _Optional[str] = ...) -> None: ...

class DeviceState(_message.Message):
    __slots__ = ("schema", "device", "online", "boot", "connection", "agent_version", "hardware_class", "generation")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    BOOT_FIELD_NUMBER: _ClassVar[int]
    CONNECTION_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_CLASS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    schema: int
    device: str
    online: bool
    boot: int
    connection: int
    agent_version: str
    hardware_class: str
    generation: int
    def __init__(self, schema: _Optional[int] = ..., device: _Optional[str] = ..., online: bool = ..., boot: _Optional[int] = ..., connection: _Optional[int] = ..., agent_version: _Optional[str] = ..., hardware_class: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class HubEpoch(_message.Message):
    __slots__ = ("epoch", "spread_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPREAD_S_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    spread_s: float
    def __init__(self, epoch: _Optional[str] = ..., spread_s: _Optional[float] = ...) -> None: ...
