"""What the answers of a model's outputs are, and which of them count.

A row of most models has one answer, the top one of all its values. A row of a token classifier
has one for each token, and those count that the score's mask says: padding gets answers too, that
nobody asked for.

    score                     answers                             that count
    max_softmax, logistic,    [n]          top of the row         all
    max_probability
    least_softmax,            [n, tokens]  top of each token      where the mask is not 0
    least_probability

Whoever scores, compares or certifies answers asks here, so that the bound of a certificate speaks
of what devices do. Labels say less: transformers leaves special tokens and inner pieces of words
without one (``NO_LABEL``), although the mask counts them. They decide how right a model is; how
two models agree is decided on what a device can know to count.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from fogline_protocol.score import Score, scorer
from fogline_protocol.tensors import Array, TensorError

NO_LABEL = -100  # of a token without a label: transformers' own number
ATTENTION_MASK = "attention_mask"  # transformers' name of the mask that counts tokens


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Which answers to ``n`` rows count. They are told in order, row by row, as ``[answers]``."""

    counts: Array  # bool: [n], one answer a row, or [n, tokens]

    @classmethod
    def of(cls, score: Score, logits: Array, inputs: Mapping[str, Array]) -> Self:
        """Return what is asked of rows whose ``logits`` are ``[n, ...]``.

        Raises:
            TensorError: the outputs have no tokens, or the mask is not there or of other tokens.
        """
        if not score.per_token:
            return cls(np.ones(len(logits), bool))
        if logits.ndim < 3:
            raise TensorError(
                f"output {score.output!r} is {list(logits.shape)}, expected [n, tokens, classes]"
            )
        if not score.mask:
            return cls(np.ones(logits.shape[:-1], bool))
        mask = inputs.get(score.mask)
        if mask is None:
            raise TensorError(f"there is no input {score.mask!r}, which says what tokens count")
        if (problem := mask_problem(score, logits, mask)) is not None:
            raise TensorError(problem)
        return cls(mask != 0)

    def __len__(self) -> int:
        """Return how many answers count."""
        return int(np.count_nonzero(self.counts))

    @property
    def rows(self) -> Array:
        """The row that each answer is of: int ``[answers]``."""
        return np.nonzero(self.counts)[0]

    def logits(self, outputs: Array) -> Array:
        """Return what each answer was chosen by: ``[n, ...] -> [answers, classes]``.

        Raises:
            TensorError: the outputs are of other rows or tokens.
        """
        counts = self.counts
        if counts.ndim == 1 and len(outputs) == len(counts):
            return outputs.reshape(len(counts), outputs[:1].size)  # all of them count
        if outputs.shape[:-1] != counts.shape:
            raise TensorError(
                f"outputs are {list(outputs.shape)} where answers are asked for {list(counts.shape)}"
            )
        chosen: Array = outputs[counts]
        return chosen

    def top(self, outputs: Array) -> Array:
        """Return the answers: ``[n, ...] -> int [answers]``."""
        answers: Array = self.logits(outputs).argmax(axis=1)
        return answers

    def in_rows(self, which: Array) -> Array:
        """Return how many of ``which``, bool ``[answers]``, are in each row: int ``[n]``."""
        return np.bincount(self.rows[which], minlength=len(self.counts))

    def differ(self, outputs: Array, others: Array) -> Array:
        """Return in which rows any answer differs: ``[n, ...]`` twice ``-> bool [n]``."""
        differs: Array = self.in_rows(self.top(outputs) != self.top(others)) > 0
        return differs


def scores_of(score: Score, outputs: Array, asked: Asked) -> Array:
    """Return what a device computes of outputs whose answers are asked for: ``[n, ...] -> [n]``.

    Raises:
        KeyError: there is no function of the score's name.
    """
    function = scorer(score)
    return function(outputs, asked.counts) if score.per_token else function(outputs)


def mask_problem(score: Score, logits: Array, mask: Array) -> str | None:
    """Say why ``mask`` cannot tell which tokens of ``logits`` count, or None if it can."""
    if mask.shape == logits.shape[:-1]:
        return None
    return (
        f"input {score.mask!r} says which tokens count and is {list(mask.shape)}, but output "
        f"{score.output!r} is {list(logits.shape)}: expected a number for each token"
    )
