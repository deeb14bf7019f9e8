"""The risk certificate: a threshold, and what holds for answers above it.

    P(disagreement <= alpha) >= 1 - delta     over all requests drawn like the calibration set

``disagreement`` is the share of requests that were answered locally *and* differently from
the hub's model: in any token that counts, where a row has an answer for each. The device answers
locally iff ``score > threshold``. How the threshold is found is the workshop's business
(``fogline_models.certify``); what the document says, and when it may be relied on, is decided
here for everybody.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fogline_protocol import documents
from fogline_protocol.documents import DocumentError
from fogline_protocol.score import Score
from fogline_protocol.v1 import release_pb2 as pb

SCHEMA = 1
NEVER = math.inf  # a threshold no score exceeds: always escalate


@dataclass(frozen=True, slots=True)
class Certificate:
    """One signed statement about one artifact on one hardware class against one hub model."""

    model: str
    version: str
    variant: str
    variant_sha256: str
    hub_model: str
    hub_sha256: str
    hardware_class: str
    score: Score  # the one that the threshold is of, with its parameters
    alpha: float
    delta: float
    items: int
    scenes: int  # independent items: the n of the bound
    allowed_losses: int  # k*
    threshold: float
    escalation_rate: float
    escalation_rate_upper: float
    reference_score_quantiles: tuple[float, ...]
    calibration_sha256: str
    sampling: str
    issued_at: datetime.datetime
    expires_at: datetime.datetime
    risk: str = "disagreement"
    method: str = "clopper-pearson"

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the document's digest."""
        return documents.sha256(self.to_json())[:16]

    def objection(
        self, *, variant_sha256: str, hardware_class: str, now: datetime.datetime
    ) -> str | None:
        """Say why this certificate does not cover an artifact here and now, or None if it does."""
        if self.variant_sha256 != variant_sha256:
            return "it was measured on another file"
        if self.hardware_class != hardware_class:
            return f"it was measured on {self.hardware_class}, this is {hardware_class}"
        if now >= self.expires_at:
            return f"it expired at {self.expires_at.isoformat()}"
        return None

    def to_json(self) -> bytes:
        """Return the canonical document."""
        message = pb.Certificate(
            schema=SCHEMA,
            score=score_message(self.score),
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
        )
        message.reference_score_quantiles.extend(self.reference_score_quantiles)
        message.issued_at.FromDatetime(self.issued_at)
        message.expires_at.FromDatetime(self.expires_at)
        return documents.canonical(message)


_PLAIN_FIELDS: Sequence[str] = (
    "model", "version", "variant", "variant_sha256", "hub_model", "hub_sha256", "hardware_class",
    "risk", "alpha", "delta", "method", "items", "scenes", "allowed_losses", "threshold",
    "escalation_rate", "escalation_rate_upper", "calibration_sha256", "sampling",
)  # fmt: skip


def parse(data: bytes) -> Certificate:
    """Read a certificate.

    Raises:
        DocumentError: not a certificate, of another schema, or with figures that cannot be.
    """
    message = documents.parse(data, pb.Certificate(), "certificate")
    if message.schema != SCHEMA:
        raise DocumentError(f"certificate: schema {message.schema}, this software knows {SCHEMA}")
    if message.risk != "disagreement":
        raise DocumentError(f"certificate: unknown risk {message.risk!r}")
    if not (0 < message.alpha < 1 and 0 < message.delta < 1):
        raise DocumentError("certificate: alpha and delta must lie between 0 and 1")
    if math.isnan(message.threshold):
        raise DocumentError("certificate: the threshold is not a number")
    if message.scenes > message.items:
        raise DocumentError("certificate: more scenes than items")
    if message.allowed_losses < 0 and message.threshold != NEVER:
        raise DocumentError("certificate: too few scenes for the bound, yet a finite threshold")
    scale = score_of(message.score)
    if scale.problem is not None:
        raise DocumentError(f"certificate: {scale.problem}")
    return Certificate(
        score=scale,
        reference_score_quantiles=tuple(message.reference_score_quantiles),
        issued_at=message.issued_at.ToDatetime(datetime.UTC),
        expires_at=message.expires_at.ToDatetime(datetime.UTC),
        **{name: getattr(message, name) for name in _PLAIN_FIELDS},
    )


def score_of(message: pb.Score) -> Score:
    """Return what a bundle's or a certificate's message says of the score."""
    return Score(message.function, message.output, dict(message.parameters), message.mask)


def score_message(score: Score) -> pb.Score:
    """Return the same as a message."""
    return pb.Score(
        function=score.function, output=score.output, parameters=score.parameters, mask=score.mask
    )
