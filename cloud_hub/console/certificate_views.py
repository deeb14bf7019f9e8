"""What a certificate promises, in a sentence and in a word. Pure."""

from cloud_hub.console.figures import many
from cloud_hub.fleet.certificates import Issued
from fogline_protocol.certificate import NEVER, Certificate


def promise(certificate: Certificate) -> str:
    """Return what a certificate says, in one sentence."""
    scenes = many(certificate.scenes, "calibration scene")
    if certificate.threshold == NEVER:
        return (
            f"{scenes} are too few to promise anything, so {certificate.variant} escalates every "
            f"request to {certificate.hub_model}."
        )
    return (
        f"With {100 * (1 - certificate.delta):.4g}% confidence, at most "
        f"{100 * certificate.alpha:.3g}% of all requests are answered by "
        f"{certificate.variant} on the device and differently than by {certificate.hub_model}, as "
        f"long as they are drawn like the {scenes}."
    )


def state(one: Issued, now: float) -> str:
    """Return one word: Holds, Withdrawn or Expired."""
    if one.withdrawn_at is not None:
        return "Withdrawn"
    return "Expired" if one.certificate.expires_at.timestamp() <= now else "Holds"
