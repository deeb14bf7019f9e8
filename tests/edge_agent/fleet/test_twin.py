import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.fleet.twin import (
    HAS_SERVING,
    MAX_DESIRED_BYTES,
    DesiredRefused,
    ModelStanding,
    Phase,
    Refuse,
    Serving,
    read_desired,
    refused,
    reported,
)
from fogline_protocol import documents
from fogline_protocol.mqtt import MAX_PACKET_BYTES
from fogline_protocol.v1 import fleet_pb2 as pb

GENERATIONS = st.integers(1, 1 << 53)


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


def refusal_of(payload: bytes) -> Refuse:
    with pytest.raises(DesiredRefused) as caught:
        read_desired(payload)
    return caught.value.refusal


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"not json", "desired/malformed"),
        (b"[]", "desired/malformed"),
        (b"{}", "desired/schema"),
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
    refusal = refusal_of(payload)
    assert refusal.code == code
    assert 20 < len(refusal.sentence) <= 500
    assert refusal.generation in (0, 7)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_no_bytes_at_all_are_more_than_refused(payload: bytes) -> None:
    refusal_of(payload)


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
def test_no_json_is_more_than_refused_and_the_refusal_can_be_said(value: object) -> None:
    try:
        read_desired(json.dumps(value).encode())
    except DesiredRefused as error:
        read_report(reported("dev", 1, 1, refused([], error.refusal), HAS_SERVING))


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
    assert state.generation == generation
    assert [one.model for one in state.releases] == sorted(models)


# Reports


def read_report(document: bytes) -> pb.Reported:
    return documents.parse(document, pb.Reported(), "report")


def test_a_report_says_how_every_model_stands() -> None:
    standings = [
        ModelStanding("digits", Phase.SELF_TEST, desired_release=2, active_release=1),
        ModelStanding("shelf", Phase.DOWNLOADING, bytes_done=5, bytes_total=9, attempt=2),
    ]
    report = read_report(reported("dev", 7, 4, standings, HAS_SERVING))
    assert (report.schema, report.device, report.sequence, report.generation) == (1, "dev", 7, 4)
    digits, shelf = report.models
    assert (digits.phase, digits.desired_release, digits.active_release) == ("self-test", 2, 1)
    assert (shelf.phase, shelf.bytes_done, shelf.bytes_total) == ("downloading", 5, 9)


SERVING = Serving(
    variant="fp32",
    provider="CPUExecutionProvider",
    hardware_class="x86_64+avx2/CPUExecutionProvider/onnxruntime-1.27",
    certificate="0123456789abcdef",
    meant_variant="int8-qdq",
    meant_provider="CPUExecutionProvider",
    aside="int8-qdq on CPUExecutionProvider: no certificate was issued for it",
)


def test_a_report_says_what_answers_and_what_was_left_aside() -> None:
    standings = [
        ModelStanding("digits", Phase.COMMITTED, active_release=1, serving=SERVING),
        ModelStanding("shelf", Phase.DOWNLOADING),
    ]
    digits, shelf = read_report(reported("dev", 7, 4, standings, HAS_SERVING)).models
    assert {name: getattr(digits.serving, name) for name in Serving.__slots__} == {
        name: getattr(SERVING, name) for name in Serving.__slots__
    }
    assert not shelf.HasField("serving")


def test_an_older_hub_is_sent_no_field_that_it_would_refuse_the_document_for() -> None:
    standing = ModelStanding("digits", Phase.COMMITTED, active_release=1)
    told = reported("dev", 7, 4, [replace(standing, serving=SERVING)], revision=0)
    assert told == reported("dev", 7, 4, [standing], HAS_SERVING)
    assert b"serving" not in told


def test_a_refusal_is_told_even_by_a_device_without_a_model() -> None:
    refusal = Refuse("desired/model", "No.", 9)
    (nobody,) = refused([], refusal)
    assert (nobody.model, nobody.phase, nobody.code) == ("", "rejected", "desired/model")
    standing = ModelStanding("digits", Phase.COMMITTED, active_release=1, active_version="1.0.0")
    (model,) = refused([standing], refusal)
    assert (model.model, model.active_release, model.phase) == ("digits", 1, "rejected")
    assert model.sentence == "No."


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_whatever_a_bundle_and_a_runtime_call_things_the_report_can_be_sent(
    variant: str, aside: str
) -> None:
    serving = replace(SERVING, variant=variant, meant_variant=variant, aside=aside + "\n\udcff")
    standings = [ModelStanding(f"m{n}", Phase.COMMITTED, serving=serving) for n in range(32)]
    document = reported("dev", 1, 1, standings, HAS_SERVING)
    assert len(document) < MAX_PACKET_BYTES
    for model in read_report(document).models:
        assert len(model.serving.variant) <= 500
        assert len(model.serving.aside) <= 500
        assert "\n" not in model.serving.aside


@given(
    st.text(max_size=2000),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=80), st.floats(), max_size=40),
)
def test_whatever_went_wrong_the_report_can_be_sent_and_read(
    sentence: str, figures: dict[str, float]
) -> None:
    standing = ModelStanding("digits", Phase.REJECTED, sentence=sentence, figures=figures)
    document = reported("dev", 1, 1, [standing], HAS_SERVING)
    assert len(document) < MAX_PACKET_BYTES
    (model,) = read_report(document).models
    assert all(math.isfinite(value) for value in model.figures.values())


def test_a_file_name_that_is_no_utf8_does_not_silence_the_device() -> None:
    standing = ModelStanding("digits", Phase.REJECTED, sentence="cannot read 'a\udcff'")
    (model,) = read_report(reported("dev", 1, 1, [standing], HAS_SERVING)).models
    assert model.sentence == "cannot read 'a?'"
