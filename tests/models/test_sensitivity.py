"""Which layers quantization hurts, and the fewest to keep: decided from measurements, pure."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models.errors import BadInput
from fogline_models.forms import FORMS, forms_for
from fogline_models.quantize import Node
from fogline_models.sensitivity import Ask, Loss, Measurement, compare, fewest, layers, rank


def nodes(pattern: str) -> list[Node]:
    """Return a node for every letter: w has weights."""
    return [Node(f"{letter}{place}", "Op", letter == "w") for place, letter in enumerate(pattern)]


def pattern(groups: Sequence[Sequence[Node]]) -> str:
    return " ".join("".join(node.name[0] for node in group) for group in groups)


@pytest.mark.parametrize(
    ("given_nodes", "most", "expected"),
    [
        ("wrwrw", 9, "wr wr w"),
        ("rrwrw", 9, "rrwr w"),  # what comes before the first weights belongs to them
        ("www", 2, "ww w"),
        ("wrwrwrwrw", 2, "wrwrwr wrw"),
        ("rr", 9, "rr"),
        ("", 9, ""),
    ],
)
def test_a_layer_is_a_node_with_weights_and_what_follows_it(
    given_nodes: str, most: int, expected: str
) -> None:
    assert pattern(layers(nodes(given_nodes), most)) == expected


@settings(deadline=None)
@given(st.text("wr", max_size=60), st.integers(1, 20))
def test_layers_lose_no_node_and_are_never_too_many(text: str, most: int) -> None:
    given_nodes = nodes(text)
    found = layers(given_nodes, most)
    assert list(itertools.chain.from_iterable(found)) == given_nodes
    assert len(found) <= most
    assert all(found)


def measurement(name: str, agreement: float, sqnr_db: float) -> Measurement:
    return Measurement((name,), ("Op",), Loss(agreement, sqnr_db))


def test_the_layer_that_makes_most_noise_alone_comes_first() -> None:
    found = [measurement("a", 1.0, 40), measurement("b", 0.9, 20), measurement("c", 1.0, 30)]
    assert [m.nodes[0] for m in rank(found, Ask.ONLY)] == ["b", "c", "a"]


def test_the_layer_without_which_there_is_least_noise_comes_first() -> None:
    found = [measurement("a", 1.0, 20), measurement("b", 0.9, 40), measurement("c", 1.0, 30)]
    assert [m.nodes[0] for m in rank(found, Ask.WITHOUT)] == ["b", "c", "a"]


def test_layers_that_tie_stay_in_the_order_of_the_graph() -> None:
    found = [measurement(name, 1.0, math.inf) for name in "abc"]
    assert [m.nodes[0] for m in rank(found, Ask.ONLY)] == ["a", "b", "c"]


@settings(deadline=None)
@given(st.integers(2, 60), st.data())
def test_the_fewest_layers_are_found_with_few_measurements(count: int, data: st.DataObject) -> None:
    needed = data.draw(st.integers(0, count - 1))
    ranked = [measurement(str(place), 1.0, float(place)) for place in range(count)]
    asked: list[int] = []

    def measure(keep: Sequence[str]) -> Loss:
        asked.append(len(keep))
        return Loss(1.0 if len(keep) >= needed else 0.5, 30.0)

    choice = fewest(ranked, 0.99, measure)
    assert choice.keep == tuple(str(place) for place in range(needed))
    assert choice.layers == needed
    assert len(asked) == len(set(asked)) <= 3 + 2 * math.log2(count)


def test_a_target_out_of_reach_is_refused_with_what_was_reached() -> None:
    ranked = [measurement(name, 0.5, 1.0) for name in "abc"]
    with pytest.raises(BadInput, match=r"99\.9% is out of reach: with 2 of 3 layers .* 75\.0%"):
        fewest(ranked, 0.999, lambda keep: Loss(0.75, 10.0))
    with pytest.raises(BadInput, match="between 0 and 1, got 99"):
        fewest(ranked, 99, lambda keep: Loss(1.0, 10.0))


def test_equal_answers_have_no_noise_and_unequal_ones_have_theirs() -> None:
    want = {"y": np.array([[3.0, 0.0], [0.0, 4.0]], np.float32), "ids": np.array([1, 2])}
    assert compare(want, want) == Loss(1.0, math.inf)
    found = {"y": np.array([[3.0, 0.0], [5.0, 4.0]], np.float32), "ids": np.array([9, 9])}
    assert compare(want, found) == Loss(0.5, 0.0)  # noise as strong as the signal


def test_tokens_that_do_not_count_make_no_noise() -> None:
    want = {"y": np.array([[[1.0, 0.0], [0.0, 9.0]], [[0.0, 2.0], [7.0, 0.0]]])}
    found = {"y": np.array([[[1.0, 0.0], [9.0, 0.0]], [[2.0, 0.0], [0.0, 7.0]]])}
    one = np.array([[True, False], [False, False]])
    assert compare(want, found, one) == Loss(1.0, math.inf)
    assert compare(want, found, np.array([[True, False], [True, False]])).agreement == 0.5
    assert compare(want, found, np.zeros((2, 2), bool)) == Loss(1.0, math.inf)  # nothing to compare
    rows = {"y": want["y"][:, 0]}  # one answer a row, although the model takes a mask
    assert compare(rows, {"y": found["y"][:, 0]}, one).agreement == 0.5


@pytest.mark.parametrize(
    ("targets", "transformer", "forms"),
    [
        (["x86_64"], False, ("int8-qdq",)),
        (["x86_64+avx2"], False, ("int8-qdq",)),
        (["x86_64+avx512f"], True, ("int8-dynamic", "int8-qdq")),
        (["x86_64+vnni"], False, ("int8-vnni",)),
        (["x86_64+avx512_vnni"], True, ("int8-vnni", "int8-dynamic")),
        (["x86_64+avx_vnni"], False, ("int8-vnni",)),
        (["aarch64"], False, ("int8-arm",)),
        (["aarch64+i8mm"], True, ("int8-dynamic", "int8-arm")),
        (["tensorrt"], False, ("int8-trt", "fp16")),
        (["x86_64", "x86_64+vnni", "x86_64"], False, ("int8-qdq", "int8-vnni")),
        ([], False, ()),
    ],
)
def test_every_hardware_class_has_its_forms(
    targets: list[str], transformer: bool, forms: tuple[str, ...]
) -> None:
    assert forms_for(targets, transformer=transformer) == forms


def test_an_unknown_target_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"target 'riscv64': name x86_64, x86_64\+vnni, aarch64"):
        forms_for(["riscv64"], transformer=False)


def test_only_weights_of_8_bits_saturate_and_only_without_vnni() -> None:
    cut_off = {name for name, form in FORMS.items() if form.saturates_on("x86_64+avx2")}
    assert cut_off == {"int8-vnni", "int8-trt", "int8-arm"}
    for processor in ("x86_64+avx512_vnni", "aarch64+i8mm"):
        assert not any(form.saturates_on(processor) for form in FORMS.values())


def test_every_form_says_what_it_is_for_and_where_that_is_known_from() -> None:
    for name, form in FORMS.items():
        assert name == form.name
        assert form.hardware
        assert form.source


def test_vectors_agree_by_their_angle_whichever_number_is_the_largest() -> None:
    want = {"vectors": np.array([[1.0, 1.01], [3.0, 0.0]])}
    found = {"vectors": np.array([[1.01, 1.0], [0.0, 3.0]])}
    assert compare(want, found).agreement == 0.0
    assert compare(want, found, vectors=True).agreement == pytest.approx(0.5, abs=1e-3)
    one = np.array([[True], [False]])
    tokens, others = ({"vectors": each["vectors"][:, None]} for each in (want, found))
    assert compare(tokens, others, one, vectors=True).agreement > 0.99
