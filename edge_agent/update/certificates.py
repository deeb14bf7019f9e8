"""Which certificates hold of a release that is here, and how it gets other ones.

They are lighter than releases: whoever answers under others answers with the same engine. So one
that the hub takes back is left at once, and what it issues is taken without an update, as long
as the variant that serves is still the best choice under it.
"""

from dataclasses import replace

from edge_agent.errors import ReleaseRefused
from edge_agent.update.lifecycle import StepRefused
from edge_agent.update.slots import Target, certificate_id
from edge_agent.update.surroundings import Place, Surroundings
from fogline_protocol import certificate, release
from fogline_protocol.certificate import Certificate
from fogline_protocol.documents import DocumentError
from fogline_protocol.release import Bundle, BundleDirectory, BundleRefused


def holding(
    bundle: BundleDirectory, target: Target, wish: Target | None, gone: frozenset[str]
) -> BundleDirectory:
    """Return ``bundle``, which is ``target``, with the certificates that hold as far as is known.

    An accepted wish is durable. So what it does not name any more is not answered under from then
    on, also after a restart and without a network. Of another release it says nothing: there
    ``gone``, the ids that the hub does not sign any more, are left.
    """
    spoken_of = wish is not None and wish.is_of_the_release_of(target)
    named = wish.certificate_ids if wish is not None else frozenset()
    held = (c for c in bundle.certificates if (c.id in named if spoken_of else c.id not in gone))
    return replace(bundle, certificates=tuple(held))


async def renewed(
    around: Surroundings, held: Target, serves: BundleDirectory, target: Target
) -> BundleDirectory | None:
    """Return what serves in the slot of ``target``, the same release under other certificates.

    Only those that are not here are fetched. None: nothing was done, because another variant is
    the better choice under them, or because it is not what answers, or not intact.

    Args:
        around: of the machine that asks.
        held: what is committed.
        serves: the same, in its slot.
        target: of the release of ``held``.

    Raises:
        StepEnded: the certificates do not come, or are none of this release.
        DiskFull, DiskFault: the slot was not made, or may not have been.
    """
    slot = around.slots.folder(target)
    sealed = await around.on_disk(around.slots.is_sealed, target)
    fetched: dict[str, bytes] = {}
    if sealed:
        try:
            there = await around.on_disk(release.read, around.root / slot, variants=())
        except BundleRefused:
            return None  # which is said, and made good, when it is verified
        known = {c.id: c for c in there.certificates}
    else:
        known = {c.id: c for c in serves.certificates}
        missing = [t for t in target.certificate_targets if certificate_id(t) not in known]
        fetched |= await around.fetch.certificates(missing)
        known |= {id: _certificate(data, serves.bundle) for id, data in fetched.items()}
    if not target.certificate_ids <= known.keys():
        return None
    named = tuple(known[id] for id in sorted(target.certificate_ids))
    found = replace(serves, path=around.root / slot, certificates=named)
    try:
        choice = around.choose(replace(found, present=None))
    except ReleaseRefused:
        return None
    place = Place(target.release, choice.variant.name, choice.provider)
    if place != around.serving.place(target.model):
        return None
    if sealed and not (found.path / choice.variant.path).is_file():
        return None  # it was fetched when another variant was the better choice
    if not sealed:
        await around.on_disk(around.slots.renew, held, target, fetched)
    return found


def _certificate(data: bytes, bundle: Bundle) -> Certificate:
    """Return the certificate in a signed document.

    Raises:
        StepRefused: it is none, or not of this bundle.
    """
    try:
        found = certificate.parse(data)
    except DocumentError as error:
        raise StepRefused("certificate/malformed", str(error)) from None
    if (found.model, found.version) != (bundle.model, bundle.version):
        raise StepRefused(
            "certificate/other",
            f"certificate {found.id} speaks of {found.model} {found.version}, what serves is "
            f"{bundle.model} {bundle.version}",
        )
    return found
