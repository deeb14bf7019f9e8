"""A release in service under one certificate, and who uses its engine."""

import logging
import math
import time
from collections.abc import Mapping

from edge_agent.inference.parameters import forwarded
from edge_agent.inference.policy import Terms
from edge_agent.runtime.engine import Engine
from edge_agent.runtime.release import Release
from fogline_protocol.inference import Parameter
from fogline_protocol.statistics import ModelStatistics

log = logging.getLogger("fogline.agent.served")

DIGEST = "fogline.digest"  # of the hub's model file, in the hub's answers


class Lease:
    """Who uses an engine; the last one of a retired release closes it."""

    __slots__ = ("_engine", "_retired", "_users")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._users = 0
        self._retired = False

    def enter(self) -> None:
        """Count a request in."""
        self._users += 1

    def leave(self) -> None:
        """Count a request out."""
        self._users -= 1
        if self._retired and self._users == 0:
            self._engine.close()

    def retire(self) -> None:
        """Take no new requests; those in flight finish on the old engine."""
        self._retired = True
        if self._users == 0:
            self._engine.close()


class Served:
    """One release in service under one certificate, and what changes about it while it is."""

    __slots__ = (
        "certificate_id",
        "edge_sha256",
        "expires_at",
        "label",
        "lease",
        "output_names",
        "release",
        "statistics",
        "terms",
        "uncertified",
        "version",
        "voided_by",
    )

    def __init__(self, release: Release, before: "Served | None" = None) -> None:
        """Serve ``release``; ``before`` is the same one under another certificate."""
        certificate = release.choice.certificate
        paired = release.bundle.escalates_to is not None and release.score is not None
        self.release = release
        self.label = release.label
        self.version = release.version
        self.edge_sha256 = release.directory.variant_sha256(release.choice.variant)
        self.lease = Lease(release.engine)
        self.statistics = ModelStatistics(release.bundle.model, release.version)
        self.output_names = [spec.name for spec in release.bundle.outputs]
        self.uncertified = Terms(paired)
        self.terms = self.uncertified
        self.certificate_id = ""
        self.expires_at = math.inf
        if certificate is not None:
            self.terms = Terms(paired, certificate.threshold)
            self.certificate_id = certificate.id  # computed once: it hashes the document
            self.expires_at = certificate.expires_at.timestamp()
        self.voided_by = ""  # the digest of a hub model that the certificate does not speak of
        if before is not None:
            self.lease, self.statistics = before.lease, before.statistics
            if certificate is not None and before.voided_by != certificate.hub_sha256:
                self.voided_by = before.voided_by

    def terms_now(self) -> Terms:
        """Return what local answers may claim at this moment."""
        if self.voided_by or time.time() >= self.expires_at:
            return self.uncertified
        return self.terms

    def asking(self, parameters: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
        """Return what the hub is told with a request that carried ``parameters``.

        A hub that serves several versions answers with the one that the certificate compares with.
        """
        certificate = self.release.choice.certificate
        passed_on = forwarded(parameters)
        return passed_on if certificate is None else {**passed_on, DIGEST: certificate.hub_sha256}

    def learn_digest(self, digest: Parameter | None) -> None:
        """Hold the hub's model against the one that the certificate compares with.

        A hub that does not say which model computed, as one in front of Triton, may have any.
        """
        certificate = self.release.choice.certificate
        if certificate is None:
            return
        found = digest if isinstance(digest, str) and digest else "unknown"
        changed = found if found != certificate.hub_sha256 else ""
        if changed == self.voided_by:
            return
        self.voided_by = changed
        if changed:
            log.warning(
                "certificate %s of %s is void: the hub's %s is %s now, not %s; everything escalates",
                self.certificate_id,
                self.release.label,
                certificate.hub_model,
                changed,
                certificate.hub_sha256,
            )
        else:
            log.info("certificate %s of %s holds again", self.certificate_id, self.release.label)
