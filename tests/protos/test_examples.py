"""What a device says beside an escalation arrives as it was said, or is refused by name."""

import dataclasses
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol import examples, inference
from fogline_protocol.errors import BadRequest
from fogline_protocol.examples import KEEP, EdgeAnswer, detach
from fogline_protocol.inference import InferRequest

PRINTABLE = st.text(st.sampled_from(string.ascii_letters + string.digits + " /-é"), max_size=20)


@st.composite
def answers(draw):
    n = draw(st.integers(1, 5))
    numbers = st.floats(-5, 5, width=32)
    return EdgeAnswer(
        device=draw(st.sampled_from(["kiosk-1", "a"])),
        release=draw(st.sampled_from(["digits@1.0.0", "m@2.1.0-rc.1"])),
        sha256=draw(st.sampled_from(["a" * 64, "0" * 64])),
        outputs={
            "logits": np.array(
                draw(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=n, max_size=n)),
                np.float32,
            )
        },
        scores=np.array(draw(st.lists(numbers, min_size=n, max_size=n)), np.float32),
        propensities=np.array(
            draw(st.lists(st.floats(1e-6, 1), min_size=n, max_size=n)), np.float64
        ),
        reasons=draw(st.lists(PRINTABLE, min_size=n, max_size=n)),
        sources=draw(st.lists(PRINTABLE, min_size=n, max_size=n)),
    )


@given(answers())
def test_what_the_edge_said_goes_over_the_wire_beside_the_inputs(said):
    x = np.zeros((len(said.scores), 4), np.float32)
    request = InferRequest(
        "judge", {"x": x, **said.tensors()}, parameters={KEEP: True, **said.parameters()}
    )
    received = inference.decode_request(inference.encode_request(request))
    inputs, read = detach(received.inputs, received.parameters)
    assert list(inputs) == ["x"]
    for field in dataclasses.fields(EdgeAnswer):
        sent, got = getattr(said, field.name), getattr(read, field.name)
        if field.name == "outputs":
            assert sent.keys() == got.keys()
            sent, got = sent["logits"], got["logits"]
        if isinstance(sent, np.ndarray):
            assert sent.tolist() == got.tolist()
            assert sent.dtype == got.dtype
        else:
            assert sent == got


def test_a_request_that_says_nothing_of_the_edge_is_left_as_it_is():
    inputs = {"x": np.zeros((1, 3), np.float32)}
    assert detach(inputs, {KEEP: True}) == (inputs, None)


GOOD = EdgeAnswer(
    "kiosk", "digits@1.0.0", "a" * 64, {"logits": np.zeros((2, 3), np.float32)},
    np.zeros(2, np.float32), np.ones(2), ["uncertain"] * 2, [""] * 2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "../etc"}, "fogline.device must be a device's name"),
        ({"release": "digits"}, "fogline.release must be MODEL@VERSION"),
        ({"release": "../x@1"}, "fogline.release must be MODEL@VERSION"),
        ({"sha256": "abc"}, "fogline.edge_digest must be a SHA-256"),
        ({"outputs": {}}, "no output of the edge"),
        ({"outputs": {"logits": np.zeros((3, 3), np.float32)}}, "differs in its number of rows"),
        ({"outputs": {"logits": np.zeros((), np.float32)}}, "differs in its number of rows"),
        ({"scores": np.zeros(2)}, "fogline.score must be float32"),
        ({"scores": np.array([np.nan, 0], np.float32)}, "fogline.score must be finite"),
        ({"propensities": np.array([0.0, 1.0])}, "fogline.propensity must lie above 0"),
        ({"propensities": np.array([0.5, 1.5])}, "not above 1"),
        ({"propensities": np.array([np.nan, 1.0])}, "must lie above 0"),
        ({"reasons": ["x" * 33, ""]}, "fogline.reason must be printable text of at most 32"),
        ({"sources": ["nul\0", ""]}, "fogline.source must be printable text of at most 200"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(changes, said):
    answer = dataclasses.replace(GOOD, **changes)
    inputs = {"x": np.zeros((2, 3), np.float32), **answer.tensors()}
    with pytest.raises(BadRequest, match=said):
        detach(inputs, {KEEP: True, **answer.parameters()})


@pytest.mark.parametrize("absent", sorted([*GOOD.tensors(), *GOOD.parameters()]))
def test_whatever_is_missing_is_named(absent):
    inputs = {"x": np.zeros((2, 3), np.float32), **GOOD.tensors()}
    parameters = dict(GOOD.parameters())
    inputs.pop(absent, None)
    parameters.pop(absent, None)
    with pytest.raises(BadRequest, match="edge" if "edge" in absent else absent):
        detach(inputs, parameters)


def test_a_tensor_of_ours_that_nobody_knows_is_refused():
    inputs = {**GOOD.tensors(), "fogline.more": np.zeros(2)}
    with pytest.raises(BadRequest, match=r"unknown input \['fogline.more'\]"):
        detach(inputs, GOOD.parameters())


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("camera-3", True), ("Ä/ 7", True), ("", True), ("x" * 200, True), ("x" * 201, False),
     ("a\nb", False), (7, False), (True, False)],
)  # fmt: skip
def test_a_source_is_a_short_printable_text(text, is_one):
    assert examples.is_source(text) is is_one
