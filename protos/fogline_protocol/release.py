"""The bundle: the directory that the workshop produces and that hub and device accept.

    bundle.json            the root: names every file that counts by SHA-256
    variants/*.onnx        one artifact per class of hardware
    selftest.npz           golden inputs and the fp32 reference's outputs
    README.md              model card
    certificates/*.json    one per hardware class      } outside the root's digest: they can be
    report.json            figures, timings            } issued again without a new release

``read`` is the only way in. It trusts nothing: names that leave the directory, links, files
that are missing, longer or different, and documents that contradict themselves are refused.
"""

import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fogline_protocol import certificate, documents, hardware
from fogline_protocol.certificate import Certificate
from fogline_protocol.documents import DocumentError
from fogline_protocol.score import Score
from fogline_protocol.tensors import DTYPES, TensorSpec
from fogline_protocol.v1 import release_pb2 as pb

ROOT = "bundle.json"
CPU = "CPUExecutionProvider"
CERTIFICATES = "certificates"
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SEMANTIC_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?")


class BundleRefused(Exception):
    """The directory is not an intact bundle. The message says what is wrong with which file."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The hub's model that a bundle escalates to."""

    model: str
    bundle_sha256: str


@dataclass(frozen=True, slots=True)
class Parent:
    """The release that a bundle was made to replace."""

    version: str
    bundle_sha256: str


@dataclass(frozen=True, slots=True)
class Processing:
    """What an application does to a value because the graph does not do it itself."""

    kind: str  # tokenizer, resize, argmax, ...
    files: tuple[str, ...] = ()  # of the bundle
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say it, with what: ``tokenizer (tokenizer.json, max_length 128)``."""
        known = [
            *self.files,
            *(f"{name} {self.parameters[name]}" for name in sorted(self.parameters)),
        ]
        return f"{self.kind} ({', '.join(known)})" if known else self.kind


@dataclass(frozen=True, slots=True)
class Variant:
    """One artifact of a bundle."""

    name: str
    path: str
    precision: str
    providers: tuple[str, ...]
    processors: tuple[str, ...] = ()  # whose CPU kernels compute it as written; none: all
    max_rows: int = 0  # of one run; 0: as many as the bundle allows

    def providers_on(self, usable: Collection[str], processor: str) -> tuple[str, ...]:
        """Return the providers it is meant for, best first, on a machine with ``usable`` ones."""
        return tuple(
            name
            for name in self.providers
            if name in usable and (name != CPU or hardware.suits(processor, self.processors))
        )


@dataclass(frozen=True, slots=True)
class File:
    """What a file of a bundle must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a device's outputs may stray from the golden ones."""

    max_abs_error: float
    min_agreement: float
    by_provider: Mapping[str, "Tolerance"] = field(default_factory=dict)

    def on(self, provider: str) -> "Tolerance":
        """Return what holds on an execution provider."""
        return self.by_provider.get(provider, self)


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Golden vectors, and the tolerance of each variant by name."""

    path: str
    tolerances: Mapping[str, Tolerance]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The root document of a bundle."""

    model: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int  # 0: the model has no batch dimension
    variants: tuple[Variant, ...]
    self_test: SelfTest
    files: Mapping[str, File]
    labels: tuple[str, ...] = ()
    score: Score | None = None
    escalates_to: Pairing | None = None
    description: str = ""
    task: str = ""
    parent: Parent | None = None
    pre_processing: tuple[Processing, ...] = ()
    post_processing: tuple[Processing, ...] = ()

    @property
    def decisive_output(self) -> str:
        """The output that holds the answer, and that ``labels`` are of."""
        return self.score.output if self.score is not None else self.outputs[0].name

    def variant(self, name: str) -> Variant:
        """Return the variant called ``name``.

        Raises:
            KeyError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    def files_for(self, variants: Collection[str]) -> frozenset[str]:
        """Return the files that a device needs to run ``variants``: all but the other artifacts.

        What lies beside an artifact under a longer name (external data, say) goes with it.

        Raises:
            KeyError: there is no variant of one of these names.
        """
        wanted = tuple(self.variant(name).path for name in variants)
        others = tuple(v.path for v in self.variants if v.path not in wanted)
        return frozenset(
            name for name in self.files if name.startswith(wanted) or not name.startswith(others)
        )

    def to_json(self) -> bytes:
        """Return the canonical root document."""
        message = pb.Bundle(
            model=self.model,
            version=self.version,
            max_batch=self.max_batch,
            labels=self.labels,
            description=self.description,
            task=self.task,
            pre_processing=[_processing_message(p) for p in self.pre_processing],
            post_processing=[_processing_message(p) for p in self.post_processing],
            inputs=[_spec_message(s) for s in self.inputs],
            outputs=[_spec_message(s) for s in self.outputs],
            variants=[
                pb.Variant(
                    name=v.name,
                    path=v.path,
                    precision=v.precision,
                    providers=v.providers,
                    processors=v.processors,
                    max_rows=v.max_rows,
                )
                for v in self.variants
            ],
            self_test=pb.SelfTest(
                path=self.self_test.path,
                tolerances={
                    name: _tolerance_message(t) for name, t in self.self_test.tolerances.items()
                },
            ),
            files={
                path: pb.File(sha256=file.sha256, bytes=file.bytes)
                for path, file in self.files.items()
            },
        )
        if self.score is not None:
            message.score.CopyFrom(certificate.score_message(self.score))
        if self.escalates_to is not None:
            message.escalates_to.CopyFrom(
                pb.Pairing(
                    model=self.escalates_to.model, bundle_sha256=self.escalates_to.bundle_sha256
                )
            )
        if self.parent is not None:
            message.parent.CopyFrom(
                pb.Parent(version=self.parent.version, bundle_sha256=self.parent.bundle_sha256)
            )
        return documents.canonical(message)


@dataclass(frozen=True, slots=True)
class BundleDirectory:
    """An intact bundle on disk: every named file was read and has the digest it should have."""

    path: Path
    bundle: Bundle
    sha256: str  # of the root document
    certificates: tuple[Certificate, ...] = field(default=())
    present: frozenset[str] | None = None  # names of the variants that are here; None: all are

    def file(self, name: str) -> Path:
        """Return where the file ``name`` of the bundle lies."""
        return self.path / name

    def variant_sha256(self, variant: Variant) -> str:
        """Return the digest of a variant's artifact."""
        return self.bundle.files[variant.path].sha256


def parse(data: bytes) -> Bundle:
    """Read a root document and check that it does not contradict itself.

    Raises:
        DocumentError: not a root document, or one that cannot describe a bundle.
    """
    message = documents.parse(data, pb.Bundle(), ROOT)
    bundle = Bundle(
        model=message.model,
        version=message.version,
        inputs=tuple(_spec(s) for s in message.inputs),
        outputs=tuple(_spec(s) for s in message.outputs),
        max_batch=message.max_batch,
        labels=tuple(message.labels),
        description=message.description,
        variants=tuple(
            Variant(
                v.name, v.path, v.precision, tuple(v.providers), tuple(v.processors), v.max_rows
            )
            for v in message.variants
        ),
        self_test=SelfTest(
            message.self_test.path,
            {name: _tolerance(t) for name, t in message.self_test.tolerances.items()},
        ),
        files={path: File(f.sha256, f.bytes) for path, f in message.files.items()},
        score=certificate.score_of(message.score) if message.HasField("score") else None,
        escalates_to=Pairing(message.escalates_to.model, message.escalates_to.bundle_sha256)
        if message.HasField("escalates_to")
        else None,
        task=message.task,
        parent=Parent(message.parent.version, message.parent.bundle_sha256)
        if message.HasField("parent")
        else None,
        pre_processing=tuple(map(_processing, message.pre_processing)),
        post_processing=tuple(map(_processing, message.post_processing)),
    )
    problem = _contradiction(bundle)
    if problem is not None:
        raise DocumentError(f"{ROOT}: {problem}")
    return bundle


def read(path: Path, *, variants: Collection[str] | None = None) -> BundleDirectory:
    """Read and verify the bundle in the directory ``path``.

    Args:
        path: the directory.
        variants: names of the only variants that have to be there, on a device that fetched no
            others; their artifacts and the self-test vectors must be intact, the model card and
            the like may be missing. The artifacts of other variants are not looked at: do not
            run them.

    Raises:
        BundleRefused: anything at all is missing, different or out of place.
    """
    try:
        data = _regular_file(path, ROOT).read_bytes()
        bundle = parse(data)
        for name, want in _expected(bundle, path, variants).items():
            file = _regular_file(path, name)
            size = file.stat().st_size
            if size != want.bytes:
                raise BundleRefused(f"{name}: {size} bytes, the root document says {want.bytes}")
            found = documents.sha256_of_file(file)
            if found != want.sha256:
                raise BundleRefused(
                    f"{name}: SHA-256 is {found}, the root document says {want.sha256}"
                )
        return BundleDirectory(
            path,
            bundle,
            documents.sha256(data),
            _certificates(path, bundle),
            None if variants is None else frozenset(variants),
        )
    except DocumentError as error:
        raise BundleRefused(f"{path}: {error}") from None
    except OSError as error:
        raise BundleRefused(f"{error.filename or path}: {error.strerror or error}") from None


def _expected(bundle: Bundle, path: Path, variants: Collection[str] | None) -> Mapping[str, File]:
    if variants is None:
        return bundle.files
    try:
        needed = bundle.files_for(variants)
    except KeyError as error:
        names = ", ".join(v.name for v in bundle.variants)
        raise BundleRefused(f"there is no variant {error.args[0]!r}, only {names}") from None
    artifacts = tuple(bundle.variant(name).path for name in variants)
    return {
        name: file
        for name, file in bundle.files.items()
        if name in needed
        and (
            name.startswith(artifacts)
            or name == bundle.self_test.path
            or (path / name).is_symlink()
            or (path / name).exists()
        )
    }


def _certificates(path: Path, bundle: Bundle) -> tuple[Certificate, ...]:
    folder = path / CERTIFICATES
    if not folder.is_dir():
        return ()
    found = []
    for file in sorted(folder.glob("*.json")):
        document = certificate.parse(
            _regular_file(path, f"{CERTIFICATES}/{file.name}").read_bytes()
        )
        if (document.model, document.version) != (bundle.model, bundle.version):
            raise BundleRefused(
                f"{CERTIFICATES}/{file.name}: it speaks of {document.model} {document.version}"
            )
        found.append(document)
    return tuple(found)


def _regular_file(root: Path, name: str) -> Path:
    """Return ``root / name`` if nothing on the way below ``root`` is a link or a surprise."""
    at = root
    for part in PurePosixPath(name).parts:
        at = at / part
        if stat.S_ISLNK(at.lstat().st_mode):
            raise BundleRefused(f"{name}: links are not allowed in a bundle")
    if not stat.S_ISREG(at.lstat().st_mode):
        raise BundleRefused(f"{name}: not a regular file")
    return at


def _contradiction(bundle: Bundle) -> str | None:
    if not MODEL_NAME.fullmatch(bundle.model):
        return f"model name {bundle.model!r} must be lower-case letters, digits, '_' and '-'"
    if not SEMANTIC_VERSION.fullmatch(bundle.version):
        return f"version {bundle.version!r} is not a semantic version"
    if not bundle.inputs or not bundle.outputs:
        return "inputs and outputs must be named"
    for spec in (*bundle.inputs, *bundle.outputs):
        if spec.datatype not in DTYPES:
            return f"tensor {spec.name!r} has the unknown datatype {spec.datatype!r}"
        if bundle.max_batch and (not spec.shape or spec.shape[0] != -1):
            return f"tensor {spec.name!r} must start with the batch dimension -1"
    for name, file in bundle.files.items():
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name != "/".join(parts)
            or name.startswith("/")
            or ".." in parts
            or "\\" in name
        ):
            return f"file name {name!r} is not a plain path inside the bundle"
        if parts[0] == CERTIFICATES or name == ROOT:
            return f"file name {name!r} is reserved"
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            return f"file {name!r} has no SHA-256"
    if not bundle.variants:
        return "a bundle needs at least one variant"
    names = [variant.name for variant in bundle.variants]
    if len(set(names)) != len(names):
        return f"variant names repeat: {names}"
    for variant in bundle.variants:
        if variant.path not in bundle.files:
            return f"variant {variant.name!r} names the file {variant.path!r}, which is not listed"
        if variant.max_rows > bundle.max_batch:
            return (
                f"variant {variant.name!r} allows {variant.max_rows} rows in a run, the bundle "
                f"{bundle.max_batch or 'none'}"
            )
        if variant.name not in bundle.self_test.tolerances:
            return f"variant {variant.name!r} has no self-test tolerance"
    if bundle.self_test.path not in bundle.files:
        return "the self-test vectors are not listed"
    if bundle.parent is not None:
        if not SEMANTIC_VERSION.fullmatch(bundle.parent.version):
            return f"the parent's version {bundle.parent.version!r} is not a semantic version"
        if not re.fullmatch(r"[0-9a-f]{64}", bundle.parent.bundle_sha256):
            return "the parent has no SHA-256"
    for step in (*bundle.pre_processing, *bundle.post_processing):
        for name in step.files:
            if name not in bundle.files:
                return f"processing {step.kind!r} names the file {name!r}, which is not listed"
    if bundle.score is not None:
        return _score_contradiction(bundle, bundle.score)
    if bundle.escalates_to is not None:
        return "a bundle that escalates needs a score"
    return None


def _score_contradiction(bundle: Bundle, score: Score) -> str | None:
    output = next((spec for spec in bundle.outputs if spec.name == score.output), None)
    if output is None:
        return f"the score reads {score.output!r}, which is not an output"
    if score.problem is not None:
        return score.problem
    if score.per_token and len(output.shape) < (3 if bundle.max_batch else 2):
        return (
            f"the score {score.function} is of tokens, but output {output.name!r} has the shape "
            f"{list(output.shape)}: no axis for tokens before that of classes"
        )
    if not score.mask:
        return None
    mask = next((spec for spec in bundle.inputs if spec.name == score.mask), None)
    if mask is None:
        return f"the score's mask {score.mask!r} is not an input"
    if DTYPES[mask.datatype].kind not in "biuf":
        return f"the score's mask {mask.name!r} is {mask.datatype}, expected numbers or BOOL"
    tokens = output.shape[:-1]
    if len(mask.shape) != len(tokens) or any(
        -1 not in (one, other) and one != other
        for one, other in zip(mask.shape, tokens, strict=True)
    ):
        return (
            f"the score's mask {mask.name!r} has the shape {list(mask.shape)}, expected one number "
            f"for each token of {output.name!r} {list(output.shape)}"
        )
    return None


def _spec(message: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, message.datatype, tuple(message.shape))


def _spec_message(spec: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _processing(message: pb.Processing) -> Processing:
    return Processing(message.kind, tuple(message.files), dict(message.parameters))


def _processing_message(step: Processing) -> pb.Processing:
    return pb.Processing(kind=step.kind, files=step.files, parameters=step.parameters)


def _tolerance(message: pb.Tolerance) -> Tolerance:
    return Tolerance(
        message.max_abs_error,
        message.min_agreement,
        {name: _tolerance(other) for name, other in message.by_provider.items()},
    )


def _tolerance_message(tolerance: Tolerance) -> pb.Tolerance:
    return pb.Tolerance(
        max_abs_error=tolerance.max_abs_error,
        min_agreement=tolerance.min_agreement,
        by_provider={
            name: _tolerance_message(other) for name, other in tolerance.by_provider.items()
        },
    )
