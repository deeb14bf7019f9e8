"""What the hub wants of this device and what the device says, as documents.

Reads desired documents and refuses what no honest hub writes; writes reported documents that
can always be sent. Nothing here touches network, clock or disk, or remembers anything: which
generation is newer is the updater's business, and numbers of reports come from it.
"""

import enum
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fogline_protocol import documents
from fogline_protocol.documents import DocumentError
from fogline_protocol.release import MODEL_NAME
from fogline_protocol.release_index import MAX_CERTIFICATES
from fogline_protocol.v1 import fleet_pb2 as pb

SCHEMA = 1
HAS_SERVING = 1  # the revision of Reported since when it says what serves
MAX_DESIRED_BYTES = 4 << 10
# JSON numbers are exact up to here, and no honest counter gets near it: a document beyond it
# would make the device deaf to every later one.
MAX_COUNTER = 1 << 53
MAX_RELEASES = 32
_MAX_VERSION = 64
_MAX_TARGET = 512
_MAX_SENTENCE = 500
_MAX_FIGURES = 32
# Relative, no empty or dotted level: a target path becomes part of a URL and of a file name.
_TARGET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")


class Phase(enum.StrEnum):
    """Where a model stands on its way to the desired release."""

    ACCEPTED = "accepted"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    SELF_TEST = "self-test"
    SHADOW = "shadow"
    TRIAL = "trial"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class WantedRelease:
    """One model as the hub wants it."""

    model: str
    release: int
    version: str
    index_target: str  # TUF target path
    certificate_targets: tuple[str, ...] = ()  # TUF target paths


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All that the hub wants of this device, under one generation."""

    generation: int
    hub_epoch: str
    releases: tuple[WantedRelease, ...]  # by model name; one per model


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the hub: a stable ``code`` and a sentence for a person."""

    code: str
    sentence: str
    generation: int = 0  # the one refused, as far as it could be read


@dataclass(frozen=True, slots=True)
class Serving:
    """What answers for one model; see ``Serving`` in fleet.proto."""

    variant: str
    provider: str
    hardware_class: str
    certificate: str  # its id; empty: uncertified
    meant_variant: str
    meant_provider: str
    aside: str


@dataclass(frozen=True, slots=True)
class ModelStanding:
    """How one model stands, for the next report."""

    model: str
    phase: Phase
    desired_release: int = 0
    active_release: int = 0  # 0: none from the hub
    previous_release: int = 0
    active_version: str = ""
    code: str = ""  # empty while nothing is wrong
    sentence: str = ""
    attempt: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    bytes_done: int = 0
    bytes_total: int = 0
    serving: Serving | None = None  # None: nothing answers


class DesiredRefused(Exception):
    """A desired document that must not be adopted."""

    def __init__(self, code: str, sentence: str, generation: int = 0) -> None:
        super().__init__(sentence)
        self.refusal = Refuse(code, sentence, generation)


def read_desired(payload: bytes) -> DesiredState:
    """Return the desired state that ``payload`` describes.

    Raises:
        DesiredRefused: it is too large, malformed, of another schema, or absurd.
    """
    if len(payload) > MAX_DESIRED_BYTES:
        raise DesiredRefused(
            "desired/too-large",
            f"The desired document has {len(payload)} bytes; at most {MAX_DESIRED_BYTES} are "
            "accepted. Name fewer releases or certificates.",
        )
    try:
        document = documents.parse(payload, pb.Desired(), "desired document")
    except DocumentError as error:
        raise DesiredRefused(
            "desired/malformed", _shortened(f"The desired document cannot be read: {error}")
        ) from None
    if document.schema != SCHEMA:
        raise DesiredRefused(
            "desired/schema",
            f"The desired document is written in schema {document.schema}; this agent reads "
            f"{SCHEMA}. Update the older of the two.",
        )
    generation = document.generation
    if not 1 <= generation <= MAX_COUNTER:
        raise DesiredRefused(
            "desired/generation",
            f"Generation {generation} is absurd: expected 1 to 2^53. Adopting it would make "
            "this device deaf to every later one.",
        )
    if len(document.releases) > MAX_RELEASES:
        raise DesiredRefused(
            "desired/releases",
            f"{len(document.releases)} releases are wanted at once; at most {MAX_RELEASES} are "
            "accepted.",
            generation,
        )
    wanted = {one.model: _wanted(one, generation) for one in document.releases}
    if len(wanted) != len(document.releases):
        raise DesiredRefused(
            "desired/twice", "The desired document names a model more than once.", generation
        )
    return DesiredState(
        generation, document.hub_epoch, tuple(wanted[model] for model in sorted(wanted))
    )


def _wanted(one: pb.DesiredRelease, generation: int) -> WantedRelease:
    if MODEL_NAME.fullmatch(one.model) is None:
        raise DesiredRefused(
            "desired/model",
            f"{one.model[:64]!r} is no name of a model: expected 1 to 63 of a-z, 0-9, '-' and "
            "'_', beginning with a letter or digit.",
            generation,
        )
    if not 1 <= one.release <= MAX_COUNTER:
        raise DesiredRefused(
            "desired/release",
            f"Release {one.release} of {one.model} is no number of a release: expected 1 to 2^53.",
            generation,
        )
    if len(one.version) > _MAX_VERSION:
        raise DesiredRefused(
            "desired/version",
            f"The version of {one.model} has {len(one.version)} characters; at most "
            f"{_MAX_VERSION} are accepted.",
            generation,
        )
    if len(one.certificate_targets) > MAX_CERTIFICATES:
        raise DesiredRefused(
            "desired/certificates",
            f"{len(one.certificate_targets)} certificates are named for {one.model}; at most "
            f"{MAX_CERTIFICATES} are accepted.",
            generation,
        )
    for target in (one.index_target, *one.certificate_targets):
        if len(target) > _MAX_TARGET or _TARGET.fullmatch(target) is None:
            raise DesiredRefused(
                "desired/target",
                f"{target[:64]!r} for {one.model} is no target path: expected names joined by "
                "'/', none empty or beginning with a dot.",
                generation,
            )
    return WantedRelease(
        one.model,
        one.release,
        one.version,
        one.index_target,
        tuple(one.certificate_targets),
    )


def reported(
    device: str,
    sequence: int,
    generation: int,
    standings: Sequence[ModelStanding],
    revision: int,
) -> bytes:
    """Return the document that tells the hub how all models of ``device`` stand.

    ``revision`` is what the hub reads: it would refuse the whole document for one field more.
    """
    models = [
        pb.ReportedModel(
            model=one.model,
            desired_release=one.desired_release,
            active_release=one.active_release,
            previous_release=one.previous_release,
            active_version=one.active_version,
            phase=one.phase,
            code=one.code,
            sentence=_shortened(one.sentence),
            attempt=one.attempt,
            figures=_figures(one.figures),
            bytes_done=one.bytes_done,
            bytes_total=one.bytes_total,
            serving=_serving(one.serving) if one.serving and revision >= HAS_SERVING else None,
        )
        for one in standings
    ]
    return documents.canonical(
        pb.Reported(
            schema=SCHEMA,
            device=device,
            sequence=sequence,
            generation=generation,
            models=models,
        )
    )


def refused(standings: Sequence[ModelStanding], refusal: Refuse) -> list[ModelStanding]:
    """Return the standings with the refusal in them, for a report of it."""
    # A device without any model must be able to say no, too.
    return [
        replace(one, phase=Phase.REJECTED, code=refusal.code, sentence=refusal.sentence)
        for one in (standings or [ModelStanding("", Phase.REJECTED)])
    ]


def _serving(one: Serving) -> pb.Serving:
    return pb.Serving(
        variant=_shortened(one.variant),
        provider=one.provider,
        hardware_class=one.hardware_class,
        certificate=one.certificate,
        meant_variant=_shortened(one.meant_variant),
        meant_provider=one.meant_provider,
        # A runtime's own words span lines; here they are part of a sentence.
        aside=_shortened(" ".join(one.aside.split())),
    )


def _shortened(sentence: str) -> str:
    # A file name that is no UTF-8 must not keep the sentence that complains of it from the hub.
    sentence = sentence.encode(errors="replace").decode()
    if len(sentence) <= _MAX_SENTENCE:
        return sentence
    return sentence[: _MAX_SENTENCE - 3] + "..."


def _figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Return figures that JSON can carry everywhere: a deviation of NaN is in the sentence."""
    finite = {name[:64]: value for name, value in figures.items() if math.isfinite(value)}
    return dict(sorted(finite.items())[:_MAX_FIGURES])
