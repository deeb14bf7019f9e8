import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Bundle(_message.Message):
    __slots__ = ("model", "version", "escalates_to", "inputs", "outputs", "max_batch", "labels", "score", "variants", "self_test", "files", "description", "task", "parent", "pre_processing", "post_processing")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: File
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[File, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ESCALATES_TO_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    SELF_TEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PRE_PROCESSING_FIELD_NUMBER: _ClassVar[int]
    POST_PROCESSING_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    escalates_to: Pairing
    inputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    outputs: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    max_batch: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    score: Score
    variants: _containers.RepeatedCompositeFieldContainer[Variant]
    self_test: SelfTest
    files: _containers.MessageMap[str, File]
    description: str
    task: str
    parent: Parent
    pre_processing: _containers.RepeatedCompositeFieldContainer[Processing]
    post_processing: _containers.RepeatedCompositeFieldContainer[Processing]
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., escalates_to: _Optional[_Union[Pairing, _Mapping]] = ..., inputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., max_batch: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., score: _Optional[_Union[Score, _Mapping]] = ..., variants: _Optional[_Iterable[_Union[Variant, _Mapping]]] = ..., self_test: _Optional[_Union[SelfTest, _Mapping]] = ..., files: _Optional[_Mapping[str, File]] = ..., description: _Optional[str] = ..., task: _Optional[str] = ..., parent: _Optional[_Union[Parent, _Mapping]] = ..., pre_processing: _Optional[_Iterable[_Union[Processing, _Mapping]]] = ..., post_processing: _Optional[_Iterable[_Union[Processing, _Mapping]]] = ...) -> None: ...

class Parent(_message.Message):
    __slots__ = ("version", "bundle_sha256")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    version: str
    bundle_sha256: str
    def __init__(self, version: _Optional[str] = ..., bundle_sha256: _Optional[str] = ...) -> None: ...

class Processing(_message.Message):
    __slots__ = ("kind", "files", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    files: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.ScalarMap[str, str]
    def __init__(self, kind: _Optional[str] = ..., files: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Pairing(_message.Message):
    __slots__ = ("model", "bundle_sha256")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle_sha256: str
    def __init__(self, model: _Optional[str] = ..., bundle_sha256: _Optional[str] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "datatype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATATYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    datatype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., datatype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("function", "output", "parameters", "mask")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    function: str
    output: str
    parameters: _containers.ScalarMap[str, float]
    mask: str
    def __init__(self, function: _Optional[str] = ..., output: _Optional[str] = ..., parameters: _Optional[_Mapping[str, float]] = ..., mask: _Optional[str] = ...) -> None: ...

class Variant(_message.Message):
    __slots__ = ("name", "path", "precision", "providers", "processors", "max_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    PROVIDERS_FIELD_NUMBER: _ClassVar[int]
    PROCESSORS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    precision: str
    providers: _containers.RepeatedScalarFieldContainer[str]
    processors: _containers.RepeatedScalarFieldContainer[str]
    max_rows: int
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., precision: _Optional[str] = ..., providers: _Optional[_Iterable[str]] = ..., processors: _Optional[_Iterable[str]] = ..., max_rows: _Optional[int] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("sha256", "bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    bytes: int
    def __init__(self, sha256: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class SelfTest(_message.Message):
    __slots__ = ("path", "tolerances")
    class TolerancesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Tolerance
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Tolerance, _Mapping]] = ...) -> None: ...
    PATH_FIELD_NUMBER: _ClassVar[int]
    TOLERANCES_FIELD_NUMBER: _ClassVar[int]
    path: str
    tolerances: _containers.MessageMap[str, Tolerance]
    def __init__(self, path: _Optional[str] = ..., tolerances: _Optional[_Mapping[str, Tolerance]] = ...) -> None: ...

class Tolerance(_message.Message):
    __slots__ = ("max_abs_error", "min_agreement", "by_provider")
    class ByProviderEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Tolerance
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Tolerance, _Mapping]] = ...) -> None: ...
    MAX_ABS_ERROR_FIELD_NUMBER: _ClassVar[int]
    MIN_AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    BY_PROVIDER_FIELD_NUMBER: _ClassVar[int]
    max_abs_error: float
    min_agreement: float
    by_provider: _containers.MessageMap[str, Tolerance]
    def __init__(self, max_abs_error: _Optional[float] = ..., min_agreement: _Optional[float] = ..., by_provider: _Optional[_Mapping[str, Tolerance]] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("schema", "model", "version", "variant", "variant_sha256", "hub_model", "hub_sha256", "hardware_class", "score", "risk", "alpha", "delta", "method", "items", "scenes", "allowed_losses", "threshold", "escalation_rate", "escalation_rate_upper", "reference_score_quantiles", "calibration_sha256", "sampling", "issued_at", "expires_at")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    VARIANT_SHA256_FIELD_NUMBER: _ClassVar[int]
    HUB_MODEL_FIELD_NUMBER: _ClassVar[int]
    HUB_SHA256_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_CLASS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    SCENES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_LOSSES_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ESCALATION_RATE_FIELD_NUMBER: _ClassVar[int]
    ESCALATION_RATE_UPPER_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_SCORE_QUANTILES_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_SHA256_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    schema: int
    model: str
    version: str
    variant: str
    variant_sha256: str
    hub_model: str
    hub_sha256: str
    hardware_class: str
    score: Score
    risk: str
    alpha: float
    delta: float
    method: str
    items: int
    scenes: int
    allowed_losses: int
    threshold: float
    escalation_rate: float
    escalation_rate_upper: float
    reference_score_quantiles: _containers.RepeatedScalarFieldContainer[float]
    calibration_sha256: str
    sampling: str
    issued_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    def __init__(self, schema: _Optional[int] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., variant: _Optional[str] = ..., variant_sha256: _Optional[str] = ..., hub_model: _Optional[str] = ..., hub_sha256: _Optional[str] = ..., hardware_class: _Optional[str] = ..., score: _Optional[_Union[Score, _Mapping]] = ..., risk: _Optional[str] = ..., alpha: _Optional[float] = ..., delta: _Optional[float] = ..., method: _Optional[str] = ..., items: _Optional[int] = ..., scenes: _Optional[int] = ..., allowed_losses: _Optional[int] = ..., threshold: _Optional[float] = ..., escalation_rate: _Optional[float] = ..., escalation_rate_upper: _Optional[float] = ..., reference_score_quantiles: _Optional[_Iterable[float]] = ..., calibration_sha256: _Optional[str] = ..., sampling: _Optional[str] = ..., issued_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ReleaseIndex(_message.Message):
    __slots__ = ("model", "release", "version", "bundle_sha256", "block_bytes", "files")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: IndexedFile
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[IndexedFile, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    model: str
    release: int
    version: str
    bundle_sha256: str
    block_bytes: int
    files: _containers.MessageMap[str, IndexedFile]
    def __init__(self, model: _Optional[str] = ..., release: _Optional[int] = ..., version: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., block_bytes: _Optional[int] = ..., files: _Optional[_Mapping[str, IndexedFile]] = ...) -> None: ...

class IndexedFile(_message.Message):
    __slots__ = ("sha256", "bytes", "blocks")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    bytes: int
    blocks: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sha256: _Optional[str] = ..., bytes: _Optional[int] = ..., blocks: _Optional[_Iterable[str]] = ...) -> None: ...
