"""The MQTT topics: what edge and hub call their mail boxes.

    v1/{tenant}/d/{device}/desired    hub -> device, retained: what the hub wants of it
    v1/{tenant}/d/{device}/reported   device -> hub: what it says of its releases
    v1/{tenant}/d/{device}/state      device -> hub: birth, and death by the broker's will
    v1/{tenant}/d/{device}/tm         device -> hub: counts, at most once
    v1/{tenant}/hub/epoch             hub -> all, retained: report again

Names are so narrow that none can hold a wildcard or a level separator: access rules that
put a certificate's name into a pattern stay literal.
"""

import enum
import re
from dataclasses import dataclass

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_VERSION = "v1"
# All replicas of a hub share one subscription, so each report reaches exactly one of them.
_SHARE = "$share/hub"


class TopicError(ValueError):
    """A name that no topic may hold, or a topic that is not one of ours."""


class Kind(enum.StrEnum):
    """The last level of a device's topics: what is said there."""

    DESIRED = "desired"
    REPORTED = "reported"
    STATE = "state"
    TELEMETRY = "tm"


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it may stand in a topic.

    Raises:
        TopicError: it may not; the message says which characters do.
    """
    # fullmatch, because "$" would let a trailing line feed through.
    if NAME.fullmatch(name) is None:
        raise TopicError(
            f"{what} {name!r} cannot be part of a topic: use 1 to 63 of a-z, 0-9, '-' and '_', "
            "beginning with a letter or digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class DeviceTopic:
    """One topic of one device.

    Raises:
        TopicError: tenant or device has a name that no topic may hold.
    """

    tenant: str
    device: str
    kind: Kind

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")
        check_name(self.device, "device")

    def __str__(self) -> str:
        return f"{_VERSION}/{self.tenant}/d/{self.device}/{self.kind}"


@dataclass(frozen=True, slots=True)
class EpochTopic:
    """The topic on which the hub of one tenant tells every device to report again.

    Raises:
        TopicError: the tenant has a name that no topic may hold.
    """

    tenant: str

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")

    def __str__(self) -> str:
        return f"{_VERSION}/{self.tenant}/hub/epoch"


def parse(topic: str) -> DeviceTopic | EpochTopic:
    """Return what ``topic`` names.

    Raises:
        TopicError: it is not one of ours.
    """
    match topic.split("/"):
        case [version, tenant, "d", device, kind] if version == _VERSION and kind in set(Kind):
            return DeviceTopic(tenant, device, Kind(kind))
        case [version, tenant, "hub", "epoch"] if version == _VERSION:
            return EpochTopic(tenant)
        case _:
            raise TopicError(
                f"topic {topic!r} is not ours: expected v1/TENANT/d/DEVICE/"
                f"{{{','.join(Kind)}}} or v1/TENANT/hub/epoch"
            )


def every_device(kind: Kind) -> str:
    """Return the filter under which the hub's replicas share what all devices publish."""
    return f"{_SHARE}/{_VERSION}/+/d/+/{kind}"
