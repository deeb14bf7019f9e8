import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.twin import (
    MAX_DESIRED_BYTES,
    Adopt,
    DesiredState,
    Held,
    Ignore,
    ModelStanding,
    Phase,
    Refuse,
    Twin,
    decide,
    read_desired,
)
from fogline_protocol import documents
from fogline_protocol.mqtt import MAX_PACKET_BYTES
from fogline_protocol.v1 import fleet_pb2 as pb

GENERATIONS = st.integers(1, 1 << 53)


class Counting:
    def __init__(self) -> None:
        self._next = itertools.count(1)

    def next_sequence(self) -> int:
        return next(self._next)


def release(model: str = "digits", number: int = 2, **more: object) -> dict[str, object]:
    return {
        "model": model,
        "release": number,
        "version": "1.1.0",
        "index_target": f"{model}/{number}/index.json",
        **more,
    }


def desired(generation: int, *releases: dict[str, object], **more: object) -> bytes:
    document = {
        "schema": 1,
        "generation": str(generation),
        "hub_epoch": "e",
        "releases": list(releases) or [release()],
        **more,
    }
    return json.dumps(document).encode()


def verdict(payload: bytes, applied: int = 0) -> Adopt | Ignore | Refuse:
    return decide(payload, applied=applied, working=None, held={})


def test_a_newer_generation_is_adopted_with_what_it_asks_for() -> None:
    decision = verdict(desired(7), applied=6)
    assert isinstance(decision, Adopt)
    assert decision.desired.generation == 7
    assert [one.index_target for one in decision.install] == ["digits/2/index.json"]
    assert not decision.preempts


def test_only_what_differs_is_installed_and_what_is_not_named_stays() -> None:
    payload = desired(
        7,
        release("a", 1),
        release("b", 2),
        release("c", 3, certificate_targets=["certificates/c/3/x.json"]),
    )
    held = {"a": Held(1), "b": Held(1), "c": Held(3), "by-hand": Held(0)}
    decision = decide(payload, applied=0, working=None, held=held)
    assert isinstance(decision, Adopt)
    assert [one.model for one in decision.install] == ["b"]
    assert [one.model for one in decision.recertify] == ["c"]


def test_a_newer_generation_preempts_the_one_being_worked_on() -> None:
    twin = Twin("dev", Counting(), applied=4)
    twin.consider(desired(5), {})
    decision = twin.consider(desired(6), {})
    assert isinstance(decision, Adopt)
    assert decision.preempts
    assert not twin.finished(5)
    assert twin.finished(6)
    assert twin.applied == 6
    assert twin.working is None


@pytest.mark.parametrize("generation", [1, 4, 5])
def test_a_stale_or_repeated_generation_is_ignored(generation: int) -> None:
    assert isinstance(verdict(desired(generation), applied=5), Ignore)


def test_an_emptied_topic_is_no_wish_to_remove_anything() -> None:
    assert isinstance(verdict(b""), Ignore)


def test_one_generation_with_two_contents_is_reported_and_the_first_is_kept() -> None:
    twin = Twin("dev", Counting())
    twin.consider(desired(5), {})
    conflict = twin.consider(desired(5, release("digits", 9)), {})
    assert isinstance(conflict, Refuse)
    assert (conflict.code, conflict.generation) == ("desired/conflict", 5)
    # A hub that has restarted publishes the same wish under another epoch.
    assert isinstance(twin.consider(desired(5, hub_epoch="other"), {}), Ignore)
    twin.finished(5)
    assert isinstance(twin.consider(desired(5, release("digits", 9)), {}), Refuse)
    # After a restart of the agent the content is not known any more, and the number decides.
    assert isinstance(verdict(desired(5, release("digits", 9)), applied=5), Ignore)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"not json", "desired/malformed"),
        (b"[]", "desired/schema"),
        (b'"' + b"\xff" + b'"', "desired/malformed"),
        (b'{"schema":1,"generation":"7","surprise":1}', "desired/malformed"),
        (b'{"schema":1,"generation":-1}', "desired/malformed"),
        (b"[" * 2000, "desired/malformed"),
        (b" " * (MAX_DESIRED_BYTES + 1), "desired/too-large"),
        (desired(7, schema=2), "desired/schema"),
        (desired(0), "desired/generation"),
        (desired((1 << 53) + 1), "desired/generation"),
        (desired((1 << 64) - 1), "desired/generation"),
        (desired(7, *(release(f"m{n}") for n in range(33))), "desired/releases"),
        (desired(7, release(), release()), "desired/twice"),
        (desired(7, release("../up")), "desired/model"),
        (desired(7, release("")), "desired/model"),
        (desired(7, release("a\n")), "desired/model"),
        (desired(7, release(number=0)), "desired/release"),
        (desired(7, release(number=(1 << 53) + 1)), "desired/release"),
        (desired(7, release(version="1" * 65)), "desired/version"),
        (desired(7, release(certificate_targets=["a"] * 17)), "desired/certificates"),
        (desired(7, release(index_target="")), "desired/target"),
        (desired(7, release(index_target="/etc/passwd")), "desired/target"),
        (desired(7, release(index_target="a/../b")), "desired/target"),
        (desired(7, release(index_target="a//b")), "desired/target"),
        (desired(7, release(index_target="a/%2e%2e/b")), "desired/target"),
        (desired(7, release(index_target="a" * 513)), "desired/target"),
        (desired(7, release(certificate_targets=["c/./x"])), "desired/target"),
    ],
)
def test_what_must_not_be_adopted_is_refused_with_code_and_sentence(
    payload: bytes, code: str
) -> None:
    decision = verdict(payload)
    assert isinstance(decision, Refuse)
    assert decision.code == code
    assert 20 < len(decision.sentence) <= 500
    assert decision.generation in (0, 7)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_no_bytes_at_all_make_the_decision_fail(payload: bytes) -> None:
    assert isinstance(verdict(payload), Ignore | Refuse)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["schema", "generation", "releases", "model", "release"]), inner
            )
        ),
    )
)
def test_no_json_makes_the_decision_fail_or_the_refusal_unsayable(value: object) -> None:
    decision = verdict(json.dumps(value).encode())
    if isinstance(decision, Refuse):
        document = Twin("dev", Counting()).report_refusal(decision, [])
        documents.parse(document, pb.Reported(), "report")


@given(st.lists(st.tuples(GENERATIONS, st.booleans()), max_size=30))
def test_in_whatever_order_documents_arrive_the_highest_generation_wins(
    arrivals: list[tuple[int, bool]],
) -> None:
    twin = Twin("dev", Counting())
    adopted = []
    for generation, finishes in arrivals + arrivals[:5]:
        decision = twin.consider(desired(generation), {})
        assert not isinstance(decision, Refuse)
        if isinstance(decision, Adopt):
            adopted.append(generation)
            if finishes:
                assert twin.finished(generation)
    # Strictly increasing: no document is ever adopted twice or after a newer one.
    assert adopted == sorted(set(adopted))
    highest = max((generation for generation, _ in arrivals), default=0)
    assert (adopted[-1] if adopted else 0) == highest


@given(
    GENERATIONS,
    st.lists(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True), unique=True, max_size=5),
)
def test_what_the_hub_writes_is_read_back(generation: int, models: list[str]) -> None:
    written = pb.Desired(
        schema=1,
        generation=generation,
        hub_epoch="e",
        releases=[
            pb.DesiredRelease(model=model, release=3, version="1.0.0", index_target=f"{model}/3/i")
            for model in models
        ],
    )
    state = read_desired(documents.canonical(written))
    assert isinstance(state, DesiredState)
    assert state.generation == generation
    assert [one.model for one in state.releases] == sorted(models)


# Reports


def read_report(document: bytes) -> pb.Reported:
    return documents.parse(document, pb.Reported(), "report")


def test_every_report_has_the_next_number_and_the_generation_being_worked_on() -> None:
    twin = Twin("dev", Counting(), applied=3)
    standing = ModelStanding("digits", Phase.SELF_TEST, desired_release=2, active_release=1)
    first = read_report(twin.report([standing]))
    twin.consider(desired(4), {})
    second = read_report(twin.report([standing]))
    twin.finished(4)
    third = read_report(twin.report([standing]))
    assert [one.sequence for one in (first, second, third)] == [1, 2, 3]
    assert [one.generation for one in (first, second, third)] == [3, 4, 4]
    assert first.device == "dev"
    assert first.models[0].phase == "self-test"


def test_a_refusal_is_told_even_by_a_device_without_a_model() -> None:
    twin = Twin("dev", Counting(), applied=3)
    refusal = Refuse("desired/model", "No.", 9)
    empty = read_report(twin.report_refusal(refusal, []))
    assert (empty.generation, empty.models[0].code) == (9, "desired/model")
    standing = ModelStanding("digits", Phase.COMMITTED, active_release=1, active_version="1.0.0")
    (model,) = read_report(twin.report_refusal(refusal, [standing])).models
    assert (model.model, model.active_release, model.phase) == ("digits", 1, "rejected")
    # A generation that could not be read must not make the hub refuse the report.
    assert read_report(twin.report_refusal(Refuse("x", "y"), [])).generation == 3


@given(
    st.text(max_size=2000),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=80), st.floats(), max_size=40),
)
def test_whatever_went_wrong_the_report_can_be_sent_and_read(
    sentence: str, figures: dict[str, float]
) -> None:
    standing = ModelStanding("digits", Phase.REJECTED, sentence=sentence, figures=figures)
    document = Twin("dev", Counting()).report([standing])
    assert len(document) < MAX_PACKET_BYTES
    (model,) = read_report(document).models
    assert all(math.isfinite(value) for value in model.figures.values())


def test_a_file_name_that_is_no_utf8_does_not_silence_the_device() -> None:
    standing = ModelStanding("digits", Phase.REJECTED, sentence="cannot read 'a\udcff'")
    (model,) = read_report(Twin("dev", Counting()).report([standing])).models
    assert model.sentence == "cannot read 'a?'"
