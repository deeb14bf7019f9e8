from dataclasses import replace

import pytest

from cloud_hub.console import views
from cloud_hub.console.figures import NOTHING
from tests.cloud_hub.console.stage import BROKEN, DIGITS, NOW, busy, device, empty


def test_the_overview_says_what_was_counted() -> None:
    page = views.overview(busy(), [DIGITS], now=NOW)
    text = {name: value.replace("\N{NO-BREAK SPACE}", " ") for name, value in page.text.items()}
    assert text["requests"] == "25.0"
    assert text["share_edge"] == "82.3%"
    assert (text["p95_edge"], text["p95_edge_unit"]) == ("0.52", "ms")
    assert text["p95_hub_note"] == "p50 4.60 ms, p99 18.2 ms"
    assert text["degraded"] == "2.1%"
    assert text["degraded_note"] == "hub unreachable 150, deadline 11"
    assert (text["online"], text["online_of"]) == ("2", "of 3")
    assert text["sent_total"] == "193 MB"


def test_the_parts_of_the_bar_fill_it_exactly() -> None:
    shapes = views.overview(busy(), [], now=NOW).shapes
    ends = 0.0
    for part in ("edge", "degraded", "hub"):
        shape = shapes[f"split_{part}"]
        assert float(shape["x"]) == pytest.approx(ends, abs=0.11)
        ends = float(shape["x"]) + float(shape["width"])
    assert ends == pytest.approx(1000, abs=0.11)


def test_nothing_measured_is_a_dash_and_never_a_zero() -> None:
    quiet = replace(empty(), agents_seen=1, devices=[device("lab", online=False)])
    page = views.overview(quiet, [], now=NOW)
    for name in ("share_edge", "degraded", "p95_edge", "p95_hub", "part_hub"):
        assert page.text[name] == NOTHING
    assert all(chart.empty for chart in page.charts.values())
    assert page.shapes["split_hub"]["width"] == "0.0"


def test_before_the_first_report_the_page_welcomes() -> None:
    page = views.overview(empty(), [], now=NOW)
    assert page.flags["empty"]
    assert not page.flags["seen"]
    assert page.announcement == "No device has reported yet."


def test_devices_that_are_offline_come_first() -> None:
    rows = views.overview(busy(), [], now=NOW).tables["devices"]
    assert [(row.key, row.state) for row in rows] == [
        ("shelf", "offline"),
        ("camera", "online"),
        ("gate", "online"),
    ]
    assert rows[0].cells["last_seen"].text == "4\N{NO-BREAK SPACE}min ago"
    assert rows[0].cells["last_seen"].at.endswith("Z")


@pytest.mark.parametrize(
    ("state", "online", "said"),
    [
        ("closed", True, "works"),
        ("open", True, "down"),
        ("half-open", True, "down"),
        ("", True, NOTHING),
        ("<b>", True, NOTHING),
        ("closed", False, NOTHING),
    ],
)
def test_a_link_is_told_in_words_and_only_of_devices_that_are_there(
    state: str, online: bool, said: str
) -> None:
    line = replace(device("camera", online=online), link=state)
    (row,) = views.overview(replace(busy(), devices=[line]), [], now=NOW).tables["devices"]
    assert row.cells["link"].text == said


def test_a_large_fleet_is_shown_in_part_and_the_page_says_so() -> None:
    devices = [device(f"d{i:04}") for i in range(1000)]
    page = views.overview(replace(busy(), devices=devices, agents_seen=1000), [], now=NOW)
    assert len(page.tables["devices"]) == views.DEVICES_SHOWN
    assert page.flags["more_devices"]
    assert page.text["devices_shown"].startswith("50 of 1,000 devices")


def test_many_reasons_are_summed_up() -> None:
    reasons = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    page = views.overview(replace(busy(), degraded_reasons=reasons), [], now=NOW)
    assert page.text["degraded_note"] == "e 5, d 4, c 3, other 3"


def test_a_model_that_is_not_ready_says_why() -> None:
    rows = views.overview(busy(), [DIGITS, BROKEN], now=NOW).tables["models"]
    assert [(row.state, row.cells["state"].text) for row in rows] == [
        ("ready", "Ready"),
        ("unavailable", "Unavailable"),
    ]
    assert rows[1].cells["reason"].text == "model.onnx is not an ONNX file"
    assert rows[1].cells["provider"].text == NOTHING
