"""The report: every figure is there, nothing in it can act, and JSON and page say the same."""

import dataclasses
import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fogline_models import card, gates, plots, report, wording
from fogline_models.card import Words
from fogline_models.errors import BadInput, MissingExtra
from fogline_models.gates import Gates
from fogline_protocol.release import Bundle, Pairing, SelfTest
from fogline_protocol.tensors import TensorSpec
from tests.models.reporting import (
    DIGEST,
    HOSTILE,
    SIZES,
    costs,
    decisions,
    document,
    escalation,
    evaluation,
    subject,
    tokens,
    vectors,
)

VOID = {"meta", "br", "img", "input", "link", "hr"}
ALONE = {"line", "rect", "path", "circle"}  # SVG, closed as they open


class Page(html.parser.HTMLParser):
    """Reads a page strictly: what is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALONE
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words).replace("\N{NO-BREAK SPACE}", " "))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.html(document()))


# The page


def test_nothing_in_the_page_can_act_or_is_fetched(page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "img", "form", "a", "base"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.keys().isdisjoint({"src", "href", "srcset", "action", "xlink:href"})
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    style = (report.TEMPLATES / "report.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_names_from_the_data_are_shown_and_not_obeyed(page: Page) -> None:
    assert "<script" not in report.html(document())
    # Description, parent, input, step, machine, reason, slices and class: all of them said it.
    assert page.text.count(HOSTILE) >= 10
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert any(HOSTILE in (label or "") for label in labels)


def test_every_figure_is_on_the_page(page: Page) -> None:
    found = document()
    for each in found["decisions"]["variants"]:
        assert each["sentence"] in page.text
    for name, one in found["figures"]["evaluation"]["variants"].items():
        assert name in page.text
        for rate in (one["accuracy"], one["agreement"], one["agreement_hub"]):
            if rate is not None:
                assert wording.percent(rate["value"]) in page.text
                assert wording.interval(rate["lower"], rate["upper"]) in page.text
        assert f"{one['macro_f1']:.3f}" in page.text
        assert wording.percent(one["calibration_error"]) in page.text
        for part in one["slices"]:
            assert wording.percent(part["accuracy"]["value"]) in page.text
        for recall in found["figures"]["evaluation"]["variants"]["int8"]["recall"].values():
            assert wording.percent(recall["value"]) in page.text
    for cost in found["timings"].values():
        for batch, spread in cost["latency_us"].items():
            assert wording.micros(spread["median"]) in page.text
            assert f"batch {batch}" in page.text
    for text in (DIGEST, "33.3 kB", "photographs of one zoo", "120 items of 60 scenes", "1.1.0"):
        assert text in page.text
    assert (
        "With 95 % confidence, at most 5 % of all requests are answered at the edge and "
        "differently from animals-hub, as long as they are drawn like the 350 calibration scenes."
    ) in page.text
    assert "threshold: 43 % escalated" in page.text


def test_every_plot_says_in_words_what_it_shows(page: Page) -> None:
    labels = [a.get("aria-label") for tag, a in page.tags if tag == "svg" and a.get("role")]
    assert len(labels) == 6
    for start in ("Accuracy by slice", "Confusion matrix", "Reliability", "Latency relative",
                  "Disagreement with animals-hub", "Accuracy of the pair"):  # fmt: skip
        assert sum((label or "").startswith(start) for label in labels) == 1
    hidden = [a for tag, a in page.tags if tag == "svg" and not a.get("role")]
    assert all(a.get("aria-hidden") == "true" for a in hidden)


def test_a_refusal_is_said_plainly() -> None:
    found = evaluation()
    page = Page(report.html(document(found, decisions(found, {}))))
    assert "1.31 x the latency of fp32, at most 1.00 allowed" in page.text
    assert "int8 refused: " in page.text


@pytest.mark.parametrize(
    "found",
    [
        document(vectors(), decisions(vectors(), {}), ()),
        document(escalations=()),
        document(escalations=(escalation(None),)),
        document(parent=None, inputs=(), steps=()),
        document(evaluation(()), decisions(evaluation(()), {})),
    ],
    ids=["vectors", "no certificate", "never local", "first release", "unnamed classes"],
)
def test_a_release_that_has_less_to_tell_gets_a_page_too(found: report.Document) -> None:
    page = Page(report.html(found))
    assert "None" not in page.text
    assert "animals" in page.text


def test_figures_of_tokens_are_said_to_be_of_tokens() -> None:
    page = Page(report.html(document(tokens(), decisions(tokens(), {"int8": "why"}))))
    assert "120 tokens of 30 scenes, 90 of them with a label." in page.text
    assert "a text is answered by one tier as a whole" in page.text.lower()
    assert "all tokens" in page.text
    assert "Tokens" in page.text
    assert "None" not in page.text
    rows = Page(report.html(document()))
    assert "token" not in rows.text


@pytest.mark.parametrize(("share", "told"), [(0.2, False), (0.75, True)])
def test_tokens_that_nobody_asks_for_and_that_cost_escalations_are_told(
    share: float, told: bool
) -> None:
    found = dataclasses.replace(escalation(), differs=0.4, only_unlabelled=share)
    note = "int8: 40.0% of the texts differ from animals-hub, 75% of these only in tokens without"
    page = Page(report.html(document(tokens(), escalations=(found,))))
    assert (note in page.text) == told


def test_a_certificate_that_never_lets_the_edge_answer_says_so() -> None:
    page = Page(report.html(document(escalations=(escalation(None),))))
    assert "nothing can be promised for answers of the edge" in page.text


def test_a_release_without_a_certificate_says_why_and_one_with_it_does_not(page: Page) -> None:
    told = document(escalations=())
    figures = {**told["figures"], "uncertified": f"5 scenes are too few {HOSTILE}"}
    without = Page(report.html({**told, "figures": figures}))
    assert "No certificate: devices escalate every request" in without.text
    assert f"5 scenes are too few {HOSTILE}" in without.text
    assert "script" not in {tag for tag, _ in without.tags}
    assert "No certificate" not in page.text


def test_many_classes_and_slices_are_told_by_the_worst() -> None:
    from fogline_models import evaluate

    rng = np.random.default_rng(0)
    labels = np.arange(300) % 50
    outputs = {name: np.eye(50)[labels] + rng.random((300, 50)) * 1.4 for name in ("fp32", "int8")}
    slices = np.array([f"speaker {i}" for i in range(60) for _ in range(5)])
    many = evaluate.evaluate(outputs, evaluate.HeldOut(np.arange(300), labels, slices))
    page = Page(report.html(document(many, decisions(many, {"int8": "why"}), ())))
    assert "The weakest 24 of 60 slices" in page.text
    assert all(f"speaker {i}" in page.text for i in range(60))
    labels_of = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert not any((label or "").startswith("Confusion") for label in labels_of)
    assert " taken for " in page.text


@settings(deadline=None, max_examples=25)
@given(text=st.text(min_size=1, max_size=40))
def test_no_text_breaks_the_page(text: str) -> None:
    found = json.loads(json.dumps(document()))
    found["figures"]["description"] = found["machine"]["processor"] = text
    found["figures"]["evaluation"]["classes"][2] = text
    page = Page(report.html(found))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "a"})


def test_without_jinja2_the_report_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    report._template.cache_clear()
    with pytest.raises(MissingExtra, match=r"jinja2.*pip install 'fogline\[models\]'"):
        report.html(document())


# The two files


def test_json_and_page_are_written_and_the_page_follows_from_the_json(tmp_path: Path) -> None:
    found = document(held_out="[\n  1,\n  2\n]")
    report.write(tmp_path, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    again = report.read(tmp_path)
    assert again == found
    assert again is not None
    # A row of the confusion matrix is a line, and no text is taken for one.
    assert re.search(
        r"^ +\[ \d+, \d+, \d+ \],$", (tmp_path / "report.json").read_text(), re.MULTILINE
    )
    assert set(again) == {"figures", "decisions", "timings", "machine"}
    assert report.html(again) == (tmp_path / "report.html").read_text()


def test_figures_hold_nothing_that_was_timed() -> None:
    figures = json.dumps(document()["figures"])
    assert "latency" not in figures
    assert "_us" not in figures
    assert "_ms" not in figures


def test_a_folder_that_cannot_be_written_is_said_and_stays_clean(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(BadInput, match=r"report: cannot write .*report\.html"):
        report.write(tmp_path, document())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_report_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(BadInput, match="not a report"):
        report.read(tmp_path)


def test_a_report_without_its_decisions_is_refused_and_an_older_form_is_left_alone(
    tmp_path: Path, digits: Path
) -> None:
    (tmp_path / "report.json").write_text('{"figures": {"schema": 1}}')
    with pytest.raises(BadInput, match="without its decisions or machine"):
        report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"variants": {}}')
    assert report.read(tmp_path) is None
    (tmp_path / "report.json").unlink()
    assert report.read(tmp_path) is None


def test_a_figure_that_is_not_finite_is_refused() -> None:
    found = evaluation()
    with pytest.raises(BadInput, match="not finite"):
        document(found, escalations=(escalation(float("inf")),))


def test_mistakes_are_told_most_frequent_first() -> None:
    counts = [[5, 1, 0], [3, 5, 0], [0, 0, 5]]
    assert plots.mistakes(counts, "abc") == [("'b' taken for 'a'", 3), ("'a' taken for 'b'", 1)]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (wording.percent(1.0), "100 %"),
        (wording.percent(0.99996), ">99.9 %"),
        (wording.percent(0.0002), "<0.1 %"),
        (wording.interval(0.90019, 0.99989), "90.0\N{EN DASH}100 %"),
        (wording.points(-0.0123), "\N{MINUS SIGN}1.2"),
        (wording.micros(1234.0), "1.23 ms"),
        (wording.size(1_250_000), "1.2 MB"),
    ],
)
def test_figures_read_well_and_never_claim_more_than_they_are(said: str, wanted: str) -> None:
    assert said == wanted


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_an_interval_is_never_said_narrower_than_it_is(one: float, other: float) -> None:
    lower, upper = sorted((one, other))
    low, high = wording.outward(lower, upper)
    assert low <= 100 * lower + 1e-6 < low + 0.1 + 2e-6
    assert high - 0.1 - 2e-6 < 100 * upper - 1e-6 <= high


# The card


def root(**changed: Any) -> Bundle:
    fields: dict[str, Any] = {
        "model": "animals",
        "version": "1.2.0",
        "inputs": (TensorSpec("image", "FP32", (-1, 3, 8, 8)),),
        "outputs": (TensorSpec("logits", "FP32", (-1, 3)),),
        "max_batch": 64,
        "variants": (),
        "self_test": SelfTest("selftest.npz", {}),
        "files": {},
        "labels": ("cat", "dog", "a|b"),
        "escalates_to": Pairing("animals-hub", DIGEST),
    }
    return Bundle(**fields | changed)


WORDS = Words(
    "Tells *animals* apart.",
    pipeline_tag="image-classification",
    license="apache-2.0",
    tags=("edge",),
    dataset="Zoo photographs",
    dataset_id="zoo",
    sections={"Limits": "One zoo."},
)


def written(allow: dict[str, str], ratio: float = 1.31, words: Words = WORDS) -> str:
    found = evaluation()
    return card.card(words, subject(), root(), found, decisions(found, allow, ratio))


def test_the_card_has_the_figures_and_the_metadata_that_hugging_face_reads() -> None:
    text = written({"int8": "half of the bytes"})
    head, body = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    fields = {k: json.loads(v) for k, v in (line.split(": ", 1) for line in head.splitlines())}
    (model,) = fields["model-index"]
    (result,) = model["results"]
    int8 = evaluation().variants["int8"]
    assert int8.accuracy is not None
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "Zoo photographs", "type": "zoo"}
    assert result["metrics"][0] == {"type": "accuracy", "value": round(int8.accuracy.value, 4)}
    assert fields["license"] == "apache-2.0"
    assert body.startswith("# animals 1.2.0\n\nTells *animals* apart.\n")
    assert "Input `image` FP32 `[n, 3, 8, 8]`. Output `logits` FP32 `[n, 3]`." in body
    assert "escalates to `animals-hub`" in body
    assert r"Classes: cat, dog, a\|b." in body
    assert wording.percent(int8.accuracy.value) in body
    assert r"\<script\>" in body
    assert "<script>" not in body
    assert "## Limits\n\nOne zoo." in body


def test_the_card_is_the_same_however_quick_the_machine_was() -> None:
    waiver = {"int8": "half of the bytes"}
    assert written(waiver, 1.31) == written(waiver, 1.6) == written(waiver, 0.5)
    assert "1.31" not in written(waiver)
    assert "Reason given: half of the bytes" in written(waiver)
    assert "loses 2.5 points" in written(waiver)  # a waiver hides no figure of the data


def test_the_card_names_what_was_refused_and_why_the_same_however_quick_it_was() -> None:
    text = written({}, 1.31)
    assert "**int8 is refused**: loses 2.5 points" in text
    assert "slower" not in text
    assert text == written({}, 1.6) == written({}, 0.5)


def test_the_card_of_a_variant_that_is_only_slow_says_so_without_a_time() -> None:
    bars = Gates(max_accuracy_loss=None, min_agreement=None)
    told = {
        card.card(
            WORDS,
            subject(),
            root(),
            evaluation(),
            gates.decide(bars, evaluation(), costs(ratio), SIZES),
        )
        for ratio in (1.31, 1.6)
    }
    (text,) = told
    assert "**int8 is refused**: slower than the recipe allows, with figures in `report.j" in text


def test_without_a_data_set_of_a_name_there_is_no_model_index() -> None:
    assert "model-index" not in written({"int8": "why"}, words=Words("A model."))


def test_a_card_of_tokens_counts_tokens() -> None:
    found = tokens()
    text = card.card(WORDS, subject(), root(), found, decisions(found, {"int8": "why"}))
    assert (
        "Figures on 120 held-out tokens (photographs of one zoo) of 30 independent scenes, 90 of them with a label;"
        in text
    )
    assert "| slice | tokens | scenes | accuracy |" in text


def test_a_card_of_vectors_tells_angles() -> None:
    found = vectors()
    text = card.card(WORDS, subject(), root(labels=()), found, decisions(found, {"int8": "why"}))
    assert "| variant | precision | size | cosine with fp32 | relative error | |" in text
    assert "0.40 %" in text
    assert costs()  # the same release was timed, and nothing of it is here
    assert "µs" not in text
