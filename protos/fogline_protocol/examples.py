"""What a device sends with an escalation that the hub may keep as an example to learn from.

Nothing is kept without a mark, and the mark is the device's: ``fogline.keep`` = true on the
request, set where an application or the agent's configuration consents, never on a private one.

    agent                                               hub that keeps examples
      │ fogline.keep                                      │
      ├──────────────────────────────────────────────────►│ answers, says fogline.keeps = true
      │ fogline.keep, fogline.device, .release, .digest   │
      │ + what the edge said, row by row, as tensors      │
      ├──────────────────────────────────────────────────►│ answers, and keeps the rows

So the edge's answer, whose bytes somebody pays for, travels only to a hub that has said it keeps
it; any other Open Inference server sees a parameter that it does not know, and no unknown tensor.
The rows' tensors are inputs whose names begin with ``fogline.``: they are joined, split and handed
on with the rows they speak of.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fogline_protocol.errors import BadRequest
from fogline_protocol.release import MODEL_NAME
from fogline_protocol.tensors import BYTES, Array, Parameter

KEEP = "fogline.keep"  # of a request: what it sends may be kept
KEEPS = "fogline.keeps"  # of an answer to such a request: this hub keeps examples
SOURCE = "fogline.source"  # of an application's request: the camera, session or writer it is from

AUDIT = "audit"  # the reason of a local answer that a coin chose to be checked

LONGEST_SOURCE = 200
_LONGEST_REASON = 32

_DEVICE = "fogline.device"
_RELEASE = "fogline.release"
_EDGE_DIGEST = "fogline.edge_digest"
_OWN = "fogline."
_OUTPUT = "fogline.edge."
_SCORE, _PROPENSITY = "fogline.score", "fogline.propensity"
_REASON, _SOURCES = "fogline.reason", "fogline.source"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class EdgeAnswer:
    """What a device said about the ``n`` rows of one request that may be kept."""

    device: str
    release: str  # MODEL@VERSION
    sha256: str  # of the model file that answered
    outputs: Mapping[str, Array]  # [n, ...]; of a model without batches, one row
    scores: Array  # [n] float32
    propensities: Array  # [n] float64: how probable it was that the hub was asked
    reasons: Sequence[str]  # n: why it was asked
    sources: Sequence[str]  # n; empty: none was named

    @property
    def model(self) -> str:
        """The device's model."""
        return self.release.partition("@")[0]

    def parameters(self) -> Mapping[str, Parameter]:
        """Return what goes beside ``fogline.keep``: equal for all rows of one release."""
        return {_DEVICE: self.device, _RELEASE: self.release, _EDGE_DIGEST: self.sha256}

    def tensors(self) -> Mapping[str, Array]:
        """Return what goes beside the inputs: one row per row."""
        return {
            **{f"{_OUTPUT}{name}": array for name, array in self.outputs.items()},
            _SCORE: self.scores,
            _PROPENSITY: self.propensities,
            _REASON: _texts(self.reasons),
            _SOURCES: _texts(self.sources),
        }


def is_source(text: object) -> bool:
    """Return whether something names a source: printable text of at most 200 characters."""
    return isinstance(text, str) and len(text) <= LONGEST_SOURCE and text.isprintable()


def detach(
    inputs: Mapping[str, Array], parameters: Mapping[str, Parameter]
) -> tuple[Mapping[str, Array], EdgeAnswer | None]:
    """Return the model's own inputs of a marked request, and what the device said about them.

    None: it said nothing, as before it knows that the hub keeps examples.

    Raises:
        BadRequest: it contradicts itself; the text names the part.
    """
    if not any(name.startswith(_OWN) for name in inputs):
        return inputs, None
    own = {name: array for name, array in inputs.items() if not name.startswith(_OWN)}
    texts = {name: parameters.get(name) for name in (_DEVICE, _RELEASE, _EDGE_DIGEST)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadRequest(f"{name} must say whose answer comes with {KEEP}, got {text!r:.100}")
    device, release, sha256 = (str(text) for text in texts.values())
    model, _, version = release.partition("@")
    if not MODEL_NAME.fullmatch(device):
        raise BadRequest(f"{_DEVICE} must be a device's name, got {device!r:.100}")
    if not MODEL_NAME.fullmatch(model) or not _is_text(version, 64) or not version:
        raise BadRequest(f"{_RELEASE} must be MODEL@VERSION, got {release!r:.100}")
    if not _SHA256.fullmatch(sha256):
        raise BadRequest(f"{_EDGE_DIGEST} must be a SHA-256 in hexadecimal, got {sha256!r:.100}")
    scores = _numbers(inputs, _SCORE, np.float32)
    answer = EdgeAnswer(
        device=device,
        release=release,
        sha256=sha256,
        outputs={
            name.removeprefix(_OUTPUT): array
            for name, array in inputs.items()
            if name.startswith(_OUTPUT) and name != _OUTPUT
        },
        scores=scores,
        propensities=_numbers(inputs, _PROPENSITY, np.float64),
        reasons=_read_texts(inputs, _REASON, _LONGEST_REASON),
        sources=_read_texts(inputs, _SOURCES, LONGEST_SOURCE),
    )
    unknown = {name for name in inputs if name.startswith(_OWN)} - set(answer.tensors())
    if unknown:
        raise BadRequest(f"unknown input {sorted(unknown)} beside {KEEP}")
    if not answer.outputs:
        raise BadRequest(f"{KEEP} comes with no output of the edge, expected {_OUTPUT}<name>")
    rows = {name: len(a) if a.ndim else -1 for name, a in answer.tensors().items()}
    if set(rows.values()) != {len(scores)}:
        raise BadRequest(f"what the edge said differs in its number of rows: {rows}")
    if not np.isfinite(scores).all():
        raise BadRequest(f"{_SCORE} must be finite")
    if not ((answer.propensities > 0) & (answer.propensities <= 1)).all():
        raise BadRequest(f"{_PROPENSITY} must lie above 0 and not above 1")
    return own, answer


def _numbers(inputs: Mapping[str, Array], name: str, dtype: type[np.floating]) -> Array:
    array = inputs.get(name)
    if array is None or array.dtype != dtype or array.ndim != 1:
        found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise BadRequest(f"{name} must be {np.dtype(dtype)} with one number per row, got {found}")
    return array


def _read_texts(inputs: Mapping[str, Array], name: str, longest: int) -> Sequence[str]:
    array = inputs.get(name)
    if array is None or array.dtype != BYTES or array.ndim != 1:
        found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise BadRequest(f"{name} must be BYTES with one text per row, got {found}")
    texts = [element.decode(errors="replace") for element in array]
    for text in texts:
        if not _is_text(text, longest):
            raise BadRequest(
                f"{name} must be printable text of at most {longest} characters, got {text!r:.100}"
            )
    return texts


def _is_text(text: str, longest: int) -> bool:
    return len(text) <= longest and text.isprintable()


def _texts(texts: Sequence[str]) -> Array:
    array = np.empty(len(texts), dtype=object)
    array[:] = [text.encode() for text in texts]
    return array
