"""What the page of models says of kept examples. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloud_hub.console import figures
from cloud_hub.insight.example_rows import Kept
from cloud_hub.insight.examples import Bounds


@dataclass(frozen=True, slots=True)
class KeptLine:
    """What is kept of one device model."""

    name: str
    tenant: str
    examples: str
    size: str
    oldest: str
    oldest_at: str
    newest: str
    newest_at: str


@dataclass(frozen=True, slots=True)
class KeptCard:
    """The examples of all models that the reader may see."""

    lines: Sequence[KeptLine]
    sentence: str
    trouble: str
    command: str  # what comes next, to copy


def kept_card(found: Sequence[Kept], bounds: Bounds, trouble: str, *, now: float) -> KeptCard:
    """Return the card of kept examples."""
    held = sum(one.bytes for one in found)
    if not bounds.quota_bytes:
        sentence = (
            "This hub keeps no examples: devices' consent means nothing until it has a quota."
        )
        command = "fogline serve --examples-quota-bytes 1000000000"
    else:
        age = (
            f"An example goes {figures.span(bounds.retention_s)} after it last came."
            if bounds.retention_s
            else "No example goes for its age."
        )
        sentence = (
            f"{figures.size(held)} of {figures.size(bounds.quota_bytes)} "
            f"({figures.percent(min(held / bounds.quota_bytes, 1.0))}) are in use; beyond it the "
            f"oldest go. {age}"
        )
        command = (
            f"fogline data export {found[0].model} --since 7d --out {found[0].model}-hard.npz"
            if found
            else "fogline-agent run --keep digits --hub HOST:PORT --bundle DIR"
        )
    return KeptCard(
        lines=[
            KeptLine(
                name=one.model,
                tenant=one.tenant,
                examples=figures.count(one.examples),
                size=str(figures.size(one.bytes)),
                oldest=figures.ago(now - one.oldest),
                oldest_at=figures.iso(one.oldest),
                newest=figures.ago(now - one.newest),
                newest_at=figures.iso(one.newest),
            )
            for one in found
        ],
        sentence=sentence,
        trouble=trouble,
        command=command,
    )
