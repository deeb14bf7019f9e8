import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import figures, report_views
from fogline_models import wording
from tests.cloud_hub.console import workshop

MINUS = "\N{MINUS SIGN}"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=30,
)


def texts(value: Any) -> Iterator[str]:
    """Yield every text that a page gets."""
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts(each)


@st.composite
def spoilt(draw: st.DrawFn) -> dict[str, Any]:
    """A report with something else in a few of its places."""
    document = copy.deepcopy(workshop.report())
    for _ in range(draw(st.integers(1, 4))):
        at: Any = document
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = draw(st.sampled_from(list(keys)))
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                at[key] = draw(anything | st.just(workshop.HOSTILE) | st.just("\ud800\x00"))
                break
            at = inner
    return document


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_console_rounds_intervals_as_the_workshop_does(one: float, other: float) -> None:
    lower, upper = sorted((one, other))
    document = workshop.report()
    accuracy = document["figures"]["evaluation"]["variants"]["fp32"]["accuracy"]
    accuracy |= {"lower": lower, "upper": upper}
    found = report_views.read(document)
    assert found is not None
    low, high = found.variants["fp32"].accuracy.note.removesuffix("%").split(" to ")
    if float(upper) >= 0.001:  # below, the console says that it is less
        assert (float(low), float(high)) == wording.outward(lower, upper)


def test_figures_are_said_with_their_intervals() -> None:
    found = report_views.read(workshop.report())
    assert found is not None
    assert found.held_out == "2,100 held-out items of 105 scenes: scanned copies of digits"
    int8, fp32, fp16 = found.variants.values()
    assert (int8.accuracy.value, int8.accuracy.note) == ("94.5%", "93.4 to 95.5%")
    assert (int8.loss.value, int8.loss.note) == (f"{MINUS}0.1", f"{MINUS}0.5 to +0.3, within noise")
    assert (fp16.loss.value, fp16.loss.note) == ("+3.1", "+2.7 to +3.5")
    assert fp32.loss.value == fp32.agreement.value == figures.NOTHING
    assert (int8.latency.note, int8.slow, fp32.slow) == (
        "1.31 \N{MULTIPLICATION SIGN}",
        True,
        False,
    )
    assert [one.verdict for one in found.variants.values()] == ["Waived", "Ships", "Refused"]
    assert fp16.sentence.startswith("fp16 refused: loses 3.1 points")
    assert [part.name for part in found.slices] == [f"writers {n}" for n in range(14, 6, -1)]
    assert found.more_slices == 7
    (gain,) = found.gains
    assert (gain.name, gain.items, gain.gained.value) == ("writers 3", "40", "+4.2")
    assert gain.gained.note == "+1.0 to +7.0"
    ((data, items, models),) = found.also
    assert (data, items) == ("new writers", "240")
    assert [(name, accuracy.value) for name, accuracy in models] == [
        ("int8-qdq", "87.1%"),
        ("digits-hub", figures.NOTHING),
    ]


def test_what_counts_tokens_says_so() -> None:
    document = workshop.report()
    document["figures"]["evaluation"]["counted"] = "tokens"
    found = report_views.read(document)
    assert found is not None
    assert (found.counted, found.held_out[:22]) == ("token", "2,100 held-out tokens ")


def test_vectors_have_a_cosine_and_no_accuracy() -> None:
    document = workshop.report()
    evaluation = document["figures"]["evaluation"]
    evaluation["classes"] = []
    for one in evaluation["variants"].values():
        one |= {"accuracy": None, "loss": None, "slices": [], "cosine": 0.9991, "cosine_worst": 0.9}
    found = report_views.read(document)
    assert found is not None
    assert (found.labelled, found.classes, found.slices) == (False, False, [])
    assert found.variants["fp32"].cosine.note == "worst 0.90000"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.clear(),
        lambda d: d["figures"].update(schema=2),
        lambda d: d["figures"].pop("evaluation"),
        lambda d: d["figures"]["evaluation"].update(variants=[]),
        lambda d: d.update(figures="none"),
    ],
)
def test_a_document_of_another_form_is_no_report(spoil: Callable[[Any], Any]) -> None:
    document = workshop.report()
    spoil(document)
    assert report_views.read(document) is None
    report_views.facts(document)


@given(spoilt())
def test_whatever_a_report_holds_it_is_said_in_texts_that_a_page_can_hold(
    document: dict[str, Any],
) -> None:
    found = report_views.read(document)
    groups = report_views.facts(document)
    for text in texts([groups, found]):
        assert text.replace("\N{NO-BREAK SPACE}", " ").isprintable()
    if found is not None:
        assert len(found.variants) <= report_views.VARIANTS_SHOWN
        assert len(found.slices) <= report_views.SLICES_SHOWN
        for part in found.slices:
            assert all(0 <= edge <= 100 for edge in part.bar)


def test_long_and_many_are_cut() -> None:
    document = workshop.report()
    evaluation = document["figures"]["evaluation"]
    one = evaluation["variants"]["fp32"]
    evaluation["variants"] = {f"v{n}": one for n in range(1000)}
    document["figures"]["held_out"] = "x" * 100_000
    document["figures"]["steps"] = [{"name": "n" * 9999, "did": "d" * 9999}] * 9999
    document["machine"] = {f"m{n}": "x" * 9999 for n in range(9999)}
    found = report_views.read(document)
    assert found is not None
    assert len(found.variants) == report_views.VARIANTS_SHOWN
    assert len(found.steps) == len(found.machine) == report_views.LINES_SHOWN
    assert len(str(found)) < 300_000


def test_a_text_that_no_encoding_takes_is_said_all_the_same() -> None:
    document = workshop.report(machine={"\ud800": "\udfff\x00"})
    document["figures"]["held_out"] = document["timings"] = "\ud800"
    groups = report_views.facts({"\ud800": "\udfff\x00", "list": ["\ud800", {"\ud800": 1}]})
    for text in texts([groups, report_views.read(document)]):
        text.encode()
