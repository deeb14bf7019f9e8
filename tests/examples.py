"""Examples for the tests of what the hub keeps: an edge that says twice its input, a hub thrice."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cloud_hub.insight.example_codec import Example, FrameReader, read_example
from cloud_hub.insight.example_rows import Selection
from cloud_hub.insight.examples import Examples
from fogline_protocol.examples import EdgeAnswer
from fogline_protocol.tensors import Array

EDGE_SHA256 = "e" * 64
HUB_SHA256 = "b" * 64


def told(
    x: Array,
    *,
    device: str = "kiosk",
    model: str = "double",
    source: str = "",
    reason: str = "uncertain",
    propensity: float = 1.0,
    version: str = "1.0.0",
    sha256: str = EDGE_SHA256,
) -> EdgeAnswer:
    """Return what the edge says of rows ``[n, 3]``."""
    n = len(x)
    return EdgeAnswer(
        device=device,
        release=f"{model}@{version}",
        sha256=sha256,
        outputs={"logits": x * 2},
        scores=np.linspace(0.1, 0.2, n, dtype=np.float32),
        propensities=np.full(n, propensity),
        reasons=[reason] * n,
        sources=[source] * n,
    )


def offer(
    examples: Examples,
    x: Array,
    *,
    tenant: str = "default",
    hub_sha256: str = HUB_SHA256,
    **edge: Any,
) -> None:
    """Offer rows ``[n, 3]``, as the hub's server would."""
    examples.offer(
        tenant, "judge", hub_sha256, {"x": x}, told(x, **edge), {"logits": x * 3}, batched=True
    )


def numbered(*numbers: float) -> Array:
    """Return one row per number, each of its own content."""
    return np.array([[number, 1, 2] for number in numbers], np.float32)


async def read(
    examples: Examples, model: str = "double", *, tenant: str = "default", **selection: Any
) -> tuple[list[Example], int]:
    """Return what an export gives, and how many it left out."""
    chosen = Selection(model, **selection)
    layouts = await examples.layouts(tenant, chosen)
    reader, found, left_out = FrameReader(), [], -1
    async for one in examples.frames(tenant, chosen, list(layouts)):
        for document, payload in reader.feed(one):
            if "end" in document:
                left_out = document["left_out"]
            else:
                found.append(read_example(document, payload))
    return found, left_out


def numbers_of(found: Sequence[Example]) -> list[float]:
    """Return which rows of ``numbered`` these are."""
    return sorted(float(example.inputs["x"][0]) for example in found)


async def settled(examples: Examples) -> None:
    """Wait until all is written, at most as long as a test may take."""
    await asyncio.wait_for(examples.settled(), 60)


def tensors_equal(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Return whether names, dtypes, shapes and values are the same."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        if one[name].dtype != object
        else one[name].tolist() == other[name].tolist()
        for name in one
    )
