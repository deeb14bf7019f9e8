"""What a certificate promises, in a sentence and in a word, and what its end would mean. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloud_hub.console.figures import many
from cloud_hub.console.roster import Line
from cloud_hub.fleet.certificates import Issued
from fogline_protocol.certificate import NEVER, Certificate


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """What withdrawing a certificate would do."""

    id: str
    promise: str
    withdrawn: bool  # it is already
    sentences: Sequence[str]


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


def withdrawal(
    one: Issued, issued: Sequence[Issued], lines: Sequence[Line], now: float
) -> Withdrawal:
    """Return what withdrawing ``one`` of the certificates of its release would do.

    Args:
        one: the certificate.
        issued: all of its release.
        lines: the devices.
        now: seconds since the epoch.
    """
    mine = one.certificate
    under = [
        line
        for line in lines
        if (found := line.model(mine.model)) is not None
        and found.running == one.release
        and found.served is not None
        and found.served.certificate == one.id
    ]
    away = sum(not line.online for line in under)
    sentences = [
        f"{many(len(under), 'device')} {'answers' if len(under) == 1 else 'answer'} under it now."
        if under
        else "No device says that it answers under it."
    ]
    others = [
        other
        for other in issued
        if other.id != one.id
        and state(other, now) == "Holds"
        and (other.certificate.variant, other.certificate.hardware_class)
        == (mine.variant, mine.hardware_class)
    ]
    place = f"{mine.variant} on {mine.hardware_class}"
    if others:
        following = max(others, key=lambda other: other.certificate.issued_at)
        sentences.append(f"Then {following.id} is the latest that holds for {place}.")
    else:
        sentences.append(
            f"No other holds for {place}: such devices use another certified variant, or "
            f"escalate every request to {mine.hub_model}."
        )
    sentences.append("Devices follow within seconds, and no request fails.")
    if away:
        sentences.append(
            f"{many(away, 'device')} of them {'is' if away == 1 else 'are'} offline and will "
            "follow when back."
        )
    return Withdrawal(one.id, promise(mine), one.withdrawn_at is not None, sentences)
