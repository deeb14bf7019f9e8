"""Certificates as tests need them: one that is in order, but for what a test says."""

import datetime

from fogline_protocol.certificate import Certificate
from fogline_protocol.score import Score

WHEN = datetime.datetime(2026, 10, 1, tzinfo=datetime.UTC)


def certificate(**changes: object) -> Certificate:
    """Return a certificate of digits 1.0.0 on a CPU, issued at ``WHEN`` for a year."""
    fields: dict[str, object] = {
        "model": "digits",
        "version": "1.0.0",
        "variant": "fp32",
        "variant_sha256": "2" * 64,
        "hub_model": "digits-hub",
        "hub_sha256": "1" * 64,
        "hardware_class": "x86_64+avx2/CPUExecutionProvider/onnxruntime-1.32",
        "score": Score("max_softmax", "y"),
        "alpha": 0.05,
        "delta": 0.05,
        "items": 100,
        "scenes": 100,
        "allowed_losses": 1,
        "threshold": 0.9,
        "escalation_rate": 0.1,
        "escalation_rate_upper": 0.2,
        "reference_score_quantiles": (0.1, 0.9),
        "calibration_sha256": "3" * 64,
        "sampling": "all",
        "issued_at": WHEN,
        "expires_at": WHEN + datetime.timedelta(days=365),
    }
    return Certificate(**{**fields, **changes})  # type: ignore[arg-type]
