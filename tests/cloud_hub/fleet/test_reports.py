"""The door for reports: limits on what a device may say of itself."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.fleet import reports
from fogline_protocol.errors import BadRequest
from fogline_protocol.v1 import fleet_pb2 as pb


def report(**changes):
    fields = {"device": "kiosk", "boot_id": "b", "sequence": 1}
    return pb.Telemetry(**{**fields, **changes}).SerializeToString()


def model(**fields):
    return pb.ModelTraffic(model="m", release="r", **fields)


def test_an_ordinary_report_passes():
    latency = pb.Latency(tier="edge", bounds_s=[0.1, 1.0], counts=[1, 2, 3])
    assert reports.parse(report(models=[model(latencies=[latency])])).device == "kiosk"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff\xff", "malformed protobuf"),
        (b"x" * (reports.MAX_BYTES + 1), "at most"),
        (report(device="../up"), "device name"),
        (report(device="a" * 64), "device name"),
        (report(boot_id=""), "boot_id"),
        (report(sequence=2**63), "absurd"),
        (report(models=[model()] * 65), "65 models"),
        (report(models=[model(outcomes=[pb.Outcome()] * 257)]), "more than 256"),
        (report(link="x" * 201), "longer than 200"),
        (report(recent=[pb.Decision()] * 101), "101 decisions"),
        (report(recent=[pb.Decision(reason="x" * 201)]), "longer than 200"),
        (report(recent=[pb.Decision(at=float("nan"))]), "must be a number"),
        (report(models=[model(latencies=[pb.Latency(counts=[1])])]), "bounds"),
        (
            report(models=[model(latencies=[pb.Latency(bounds_s=[1.0], counts=[1])])]),
            "one count more",
        ),
        (
            report(models=[model(latencies=[pb.Latency(bounds_s=[2.0, 1.0], counts=[1, 1, 1])])]),
            "ascending",
        ),
        (
            report(models=[model(latencies=[pb.Latency(bounds_s=[float("nan")], counts=[1, 1])])]),
            "positive",
        ),
        (
            report(
                models=[
                    model(latencies=[pb.Latency(bounds_s=[1.0, float("nan"), 2.0], counts=[1] * 4)])
                ]
            ),
            "positive",
        ),
        (report(rss_bytes=2**63), "a count is larger"),
        (report(escalation_bytes_sent=2**63), "a count is larger"),
        (report(models=[model(outcomes=[pb.Outcome(rows=2**63)])]), "a count is larger"),
        (
            report(models=[model(latencies=[pb.Latency(bounds_s=[1.0], counts=[2**63, 1])])]),
            "a count is larger",
        ),
    ],
)
def test_what_no_agent_ever_sends_is_refused_by_name(data, text):
    with pytest.raises(BadRequest, match=text):
        reports.parse(data)


def test_a_report_that_came_another_way_is_held_to_the_same_limits(caplog):
    accepted = []
    take = reports.checked(accepted.append)
    take(pb.Telemetry(device="kiosk", boot_id="b", sequence=1, rss_bytes=2**63))
    assert not accepted
    assert "a report of 'kiosk' is dropped: a count is larger" in caplog.text
    take(pb.Telemetry(device="kiosk", boot_id="b", sequence=1, rss_bytes=1))
    assert [report.rss_bytes for report in accepted] == [1]


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_a_report_or_refused(data):
    with contextlib.suppress(BadRequest):
        reports.parse(data)
