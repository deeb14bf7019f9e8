"""The answer from here: a request on this device's own engine, with a score for each row."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edge_agent.runtime.release import Release
from fogline_protocol import tensors
from fogline_protocol.answers import mask_problem
from fogline_protocol.errors import BadRequest
from fogline_protocol.release import Bundle
from fogline_protocol.statistics import ModelStatistics
from fogline_protocol.tensors import Array

_AT_ONCE = (0,)  # the waiting time of the only request in a batch


async def run_here(
    release: Release,
    statistics: ModelStatistics,
    inputs: Mapping[str, Array],
    names: Sequence[str],
    rows: int,
    deadline: float | None,
) -> tuple[dict[str, Array], list[float], Array | None]:
    """Return the outputs ``names``, one score per row, and the output that was scored.

    NaN and None where there is no score.
    """
    bundle = release.bundle
    wanted = names
    if bundle.score is not None and bundle.score.output not in names:
        wanted = [*names, bundle.score.output]
    limit = release.choice.variant.max_rows or bundle.max_batch or 1
    started = time.monotonic_ns()
    if rows == 0:
        values = _no_rows(bundle.outputs, wanted)
    elif rows <= limit:
        values = await release.engine.run(inputs, wanted, rows, deadline)
    else:
        parts = [
            await release.engine.run(
                {name: array[at : at + limit] for name, array in inputs.items()},
                wanted,
                min(limit, rows - at),
                deadline,
            )
            for at in range(0, rows, limit)
        ]
        values = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    if rows <= limit:
        # Inputs are taken as they are and nothing waits for anything here.
        statistics.executed(rows, _AT_ONCE, 0, time.monotonic_ns() - started, 0)
    else:
        statistics.split(rows, limit, time.monotonic_ns() - started)
    outputs = dict(zip(wanted, values, strict=True))
    if release.score is None or bundle.score is None:
        scored, scores = None, [math.nan] * rows
    else:
        scored = outputs[bundle.score.output]
        if len(wanted) > len(names):
            del outputs[bundle.score.output]
        if not rows:
            scores = []
        elif bundle.score.mask:
            scores = _scores_of_tokens(release.score, bundle, scored, inputs)
        elif bundle.max_batch:
            scores = release.score(scored).tolist()
        else:
            scores = release.score(scored[np.newaxis]).tolist()
    return outputs, scores, scored


def _scores_of_tokens(
    score: Callable[..., Array], bundle: Bundle, scored: Array, inputs: Mapping[str, Array]
) -> list[float]:
    """Return one score per row from the tokens that the request's own mask counts.

    Raises:
        BadRequest: the mask is not of those tokens, though the model took it.
    """
    named = bundle.score
    assert named is not None  # or nothing would be scored
    mask = inputs[named.mask]
    if (problem := mask_problem(named, scored, mask)) is not None:
        raise BadRequest(problem)
    if not bundle.max_batch:
        scored, mask = scored[np.newaxis], mask[np.newaxis]
    scores: list[float] = score(scored, mask).tolist()
    return scores


def _no_rows(specs: Sequence[tensors.TensorSpec], names: Sequence[str]) -> list[Array]:
    """Return empty outputs, so that no engine has to know what zero rows mean."""
    by_name = {spec.name: spec for spec in specs}
    return [
        np.empty(
            [max(dim, 0) for dim in by_name[name].shape], tensors.dtype_of(by_name[name].datatype)
        )
        for name in names
    ]
