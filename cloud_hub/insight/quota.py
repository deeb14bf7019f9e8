"""Decides who gives up kept examples when there are too many. Pure.

The quota is one for all, because there is one disk. The models that hold most give first, down to
a common level, so a model that escalates much cannot push out what others have: below its equal
share nobody loses anything. Within a model the oldest go.
"""

from collections.abc import Hashable, Mapping
from typing import TypeVar

Holder = TypeVar("Holder", bound=Hashable)


def surplus(held: Mapping[Holder, int], quota: int) -> dict[Holder, int]:
    """Return how many bytes each holder must give up for all to keep within ``quota``.

    Who need not give anything is not named.
    """
    over = sum(held.values()) - quota
    if over <= 0:
        return {}
    # The level is where cutting everybody down to it leaves exactly the quota.
    rising = sorted(held.values())
    left, level = quota, 0
    for index, size in enumerate(rising):
        level = left // (len(rising) - index)
        if size > level:
            break
        left -= size
    return {holder: size - level for holder, size in held.items() if size > level}
