"""Chooses which artifact of a bundle serves on this device, and on which provider.

Certified comes first: a variant that is faster but has no certificate here would have to
escalate everything. Among equals the bundle's order and the variant's order of providers
decide, which the workshop sets by measurement.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edge_agent.errors import ReleaseRefused
from fogline_protocol import hardware
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import Bundle, BundleDirectory, Variant


@dataclass(frozen=True, slots=True)
class Choice:
    """What to serve. ``why`` and ``aside`` are sentences for a person."""

    variant: Variant
    provider: str
    certificate: Certificate | None
    why: str
    meant: tuple[str, str] = ("", "")  # the first variant and provider meant for this hardware
    aside: str = ""  # what comes before it in the bundle, and why it is not served


def choose(
    directory: BundleDirectory,
    usable: Sequence[str],
    hardware_class: Callable[[str], str],
    now: datetime.datetime,
    processor: str = "",
    broken: Mapping[str, str] | None = None,
) -> Choice:
    """Return the best of what the bundle offers for the providers in ``usable``.

    Args:
        directory: the bundle; variants that are not present in it are left aside.
        usable: providers that run here.
        hardware_class: of this device on a provider.
        now: decides which certificates hold.
        processor: the instruction set of this machine, by default looked up.
        broken: providers that the runtime was installed with and that do not run here, with the
            reason: nothing is served on them, and what was meant for them is a loss to tell of.

    Raises:
        ReleaseRefused: no variant is meant for any of the usable providers.
    """
    bundle = directory.bundle
    processor = processor or hardware.this_machine()
    broken = broken or {}
    installed = {*usable, *broken}
    fallback: Choice | None = None
    meant: tuple[str, str] | None = None
    objections: list[str] = []
    for variant in bundle.variants:
        providers = variant.providers_on(installed, processor)
        if not providers and installed & set(variant.providers):
            objections.append(f"{variant.name}: meant for {', '.join(variant.processors)}")
        for provider in providers:
            meant = meant or (variant.name, provider)
            place = f"{variant.name} on {provider}"
            if provider in broken:
                objections.append(f"{place}: {broken[provider]}")
                continue
            if directory.present is not None and variant.name not in directory.present:
                objections.append(f"{place}: its artifact is not on this device")
                continue
            here = hardware_class(provider)
            certificate, why_not = _valid_certificate(directory, variant, here, now)
            aside = "; ".join(objections)
            if certificate is not None:
                why = f"{place}: certified for {here}"
                return Choice(variant, provider, certificate, why, meant, aside)
            objections.append(f"{place}: {why_not}")
            if fallback is None:
                fallback = Choice(variant, provider, None, "", meant, aside)
    if fallback is None:
        wanted = sorted({name for variant in bundle.variants for name in variant.providers})
        raise ReleaseRefused(
            f"{directory.path}: {bundle.model} {bundle.version} has variants for "
            f"{', '.join(wanted) or 'no provider'}, this device runs {', '.join(usable) or 'none'} "
            f"on {processor}{': ' * bool(objections)}{'; '.join(objections)}"
        )
    return replace(fallback, why="; ".join(objections))


def under(
    directory: BundleDirectory,
    choice: Choice,
    hardware_class: Callable[[str], str],
    now: datetime.datetime,
) -> Choice:
    """Return the same variant on the same provider under what is certified of it now."""
    here = hardware_class(choice.provider)
    certificate, why_not = _valid_certificate(directory, choice.variant, here, now)
    place = f"{choice.variant.name} on {choice.provider}"
    why = f"{place}: {why_not}" if certificate is None else f"{place}: certified for {here}"
    return replace(choice, certificate=certificate, why=why)


def _valid_certificate(
    directory: BundleDirectory, variant: Variant, here: str, now: datetime.datetime
) -> tuple[Certificate | None, str]:
    """Return the certificate that covers ``variant`` here and now, or why there is none."""
    bundle = directory.bundle
    if bundle.escalates_to is None:
        return None, "the bundle names no model to escalate to, so there is nothing to certify"
    issued = [c for c in directory.certificates if c.variant == variant.name]
    why_not = "no certificate was issued for it"
    # The newest first: it was made with what was learned since.
    for certificate in sorted(issued, key=lambda c: c.issued_at, reverse=True):
        objection = certificate.objection(
            variant_sha256=directory.variant_sha256(variant), hardware_class=here, now=now
        ) or _contradiction(bundle, certificate)
        if objection is None:
            return certificate, ""
        why_not = f"certificate {certificate.id} does not hold: {objection}"
    return None, why_not


def _contradiction(bundle: Bundle, certificate: Certificate) -> str | None:
    pairing = bundle.escalates_to
    if pairing is None or certificate.hub_model != pairing.model:
        return f"it compares with {certificate.hub_model!r}, which the bundle does not escalate to"
    if certificate.score != bundle.score:
        return "its threshold lives on another score"
    return None
