"""The classification extension: an output as its ``k`` best classes instead of its tensor.

Each class becomes a BYTES element ``value:index`` or ``value:index:label``, best first. A model
with a batch dimension is ranked row by row.

Source: triton-inference-server/server docs/protocol/extension_classification.md.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fogline_protocol import tensors
from fogline_protocol.errors import BadRequest
from fogline_protocol.tensors import Array


def apply(
    outputs: Mapping[str, Array],
    wanted: Mapping[str, int],
    labels: Mapping[str, Sequence[str]],
    *,
    batched: bool,
) -> dict[str, Array]:
    """Return ``outputs`` with those named in ``wanted`` ranked, up to so many classes each.

    Raises:
        BadRequest: an output's datatype has no order.
    """
    return {
        name: rank(name, array, wanted[name], labels.get(name, ()), batched=batched)
        if name in wanted
        else array
        for name, array in outputs.items()
    }


def rank(name: str, array: Array, k: int, labels: Sequence[str], *, batched: bool) -> Array:
    """Return the ``k`` best of every row: ``[n, ...] -> [n, min(k, classes)]``.

    Raises:
        BadRequest: the datatype has no order.
    """
    if array.dtype.kind not in "iuf":
        raise BadRequest(
            f"output {name!r} is {tensors.datatype_of(array)}, classification needs numbers"
        )
    rows = len(array) if batched else 1
    flat = array.reshape(rows, -1) if array.size else array.reshape(rows, 0)
    best = np.argsort(-flat.astype(np.float64), axis=1, kind="stable")[:, :k]
    found = np.empty(best.shape, dtype=object)
    for row, indices in enumerate(best):
        for place, index in enumerate(indices):
            value = flat[row, index]
            text = f"{value:f}" if array.dtype.kind == "f" else str(value)
            label = f":{labels[index]}" if index < len(labels) else ""
            found[row, place] = f"{text}:{index}{label}".encode()
    return found if batched else found[0]
