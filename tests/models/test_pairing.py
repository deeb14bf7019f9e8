"""Which hub can answer what an edge is asked, and how that is said."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_models import pairing
from fogline_models.pairing import Contract, by_name
from fogline_protocol.tensors import TensorSpec

READINGS = TensorSpec("readings", "FP32", (-1, 8))
STATE = TensorSpec("state", "INT64", (-1, 2))
LOGITS = TensorSpec("logits", "FP32", (-1, 3))
EDGE = Contract("pump 1.0.0", by_name([READINGS, STATE]), by_name([LOGITS]), ("ok", "worn", "dry"))
HUB = dataclasses.replace(EDGE, title="pump-hub 1.0.0")


def hub(*inputs: TensorSpec) -> Contract:
    return dataclasses.replace(HUB, inputs=by_name(inputs))


def test_the_order_of_inputs_is_nobodys_business() -> None:
    assert pairing.problem(EDGE, hub(STATE, READINGS)) is None
    assert pairing.differences([READINGS, STATE], [STATE, READINGS]) == ""


def test_a_hub_may_take_more_shapes_and_never_fewer() -> None:
    wide = dataclasses.replace(READINGS, shape=(-1, -1))
    assert pairing.problem(EDGE, hub(wide, STATE)) is None
    other = dataclasses.replace(EDGE, inputs=by_name([wide, STATE]))
    assert pairing.problem(other, HUB) == (
        "pump 1.0.0 and pump-hub 1.0.0 take different inputs: 'readings' is FP32 [-1, -1] for "
        "pump 1.0.0 and FP32 [-1, 8] for pump-hub 1.0.0"
    )
    assert pairing.differences([wide], [READINGS])  # of two releases, any difference counts


def test_every_difference_of_inputs_is_said_in_words() -> None:
    said = pairing.problem(EDGE, hub(dataclasses.replace(READINGS, name="x"), STATE))
    assert said == (
        "pump 1.0.0 and pump-hub 1.0.0 take different inputs: pump-hub 1.0.0 does not take "
        "'readings'; pump-hub 1.0.0 also needs 'x'"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"outputs": {"y": LOGITS}}, "pump-hub 1.0.0 gives no output 'logits', only 'y'"),
        (
            {"outputs": by_name([dataclasses.replace(LOGITS, shape=(-1, 4))])},
            "'logits' is FP32 [-1, 3] for pump 1.0.0 and FP32 [-1, 4] for pump-hub 1.0.0",
        ),
        ({"labels": ("ok", "dry", "worn")}, "class 1 is called 'worn' by pump 1.0.0 and 'dry' by"),
        ({"labels": ("ok",)}, "pump 1.0.0 tells 3 classes apart and pump-hub 1.0.0 1: they must"),
        ({"labels": ()}, None),
        ({"outputs": {"logits": None}}, None),
    ],
)
def test_answers_must_be_called_alike(change: dict[str, object], says: str | None) -> None:
    said = pairing.problem(EDGE, dataclasses.replace(HUB, **change))  # type: ignore[arg-type]
    assert said is None if says is None else says in (said or "")


SPECS = st.builds(
    TensorSpec,
    st.sampled_from("abc"),
    st.sampled_from(["FP32", "INT64"]),
    st.lists(st.sampled_from([-1, 1, 2]), max_size=2).map(tuple),
)
INPUTS = st.lists(SPECS, min_size=1, unique_by=lambda spec: spec.name)


@given(INPUTS, INPUTS, st.randoms())
def test_no_order_changes_what_is_a_pair(
    a: list[TensorSpec], b: list[TensorSpec], rng: object
) -> None:
    def shuffled(specs: list[TensorSpec]) -> list[TensorSpec]:
        return sorted(specs, key=lambda _: rng.random())  # type: ignore[attr-defined]

    one = pairing.takes(by_name(a), by_name(b))
    assert pairing.takes(by_name(shuffled(a)), by_name(shuffled(b))) == one
    assert pairing.takes(by_name(a), by_name(a))
    assert (pairing.differences(a, b) == "") == (by_name(a) == by_name(b))
