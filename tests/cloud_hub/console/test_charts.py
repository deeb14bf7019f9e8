import re

from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import charts
from cloud_hub.console.charts import HEIGHT, WIDTH, Line

values = st.lists(st.none() | st.floats(0, 1e9), min_size=1, max_size=90)


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path)]


@given(st.floats(1e-6, 1e12))
def test_a_linear_scale_reaches_its_highest_value_in_few_round_steps(top: float) -> None:
    scale = charts.linear(top)
    assert 3 <= len(scale.ticks) <= 5
    assert scale.ticks[-1] == "0"
    assert 0.2 < scale.place(top) <= 1 + 1e-9


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_a_logarithmic_scale_holds_everything_between(a: float, b: float) -> None:
    low, high = sorted((a, b))
    scale = charts.decades(low, high)
    assert -1e-6 <= scale.place(low) <= scale.place(high) <= 1 + 1e-6


def test_ticks_of_a_logarithmic_scale_are_decades_from_top_to_bottom() -> None:
    assert charts.decades(0.4, 12).ticks == ["100 ms", "10 ms", "1 ms", "0.1 ms"]
    assert charts.decades(500, 1500).ticks == ["10 s", "1 s", "100 ms"]


@given(values)
def test_nothing_is_drawn_outside_the_box(given_values: list[float | None]) -> None:
    chart = charts.lines(
        "c",
        [Line("edge", "Edge", given_values)],
        [0.0] * len(given_values),
        scale=charts.linear(max((v for v in given_values if v is not None), default=1)),
        words=str,
        summary="",
        filled=True,
    )
    points = numbers(chart.series[0].line + chart.series[0].area)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


@given(values)
def test_a_line_has_every_measured_point_and_no_other(given_values: list[float | None]) -> None:
    line = charts.lines(
        "c",
        [Line("edge", "Edge", given_values)],
        [0.0] * len(given_values),
        scale=charts.linear(1e9),
        words=str,
        summary="",
    ).series[0]
    assert len(numbers(line.line)) == sum(v is not None for v in given_values)
    assert line.area == ""


def test_where_nothing_was_measured_the_line_has_a_gap() -> None:
    line = charts.lines(
        "c",
        [Line("hub", "Hub", [1.0, None, 1.0, 1.0])],
        [0.0] * 4,
        scale=charts.linear(1),
        words=str,
        summary="",
    ).series[0]
    assert line.line == "M0,0h0M400,0L600,0"


def test_stacked_series_stand_on_each_other() -> None:
    chart = charts.stacked(
        "c",
        [Line("edge", "Edge", [1.0, 1.0]), Line("hub", "Hub", [1.0, 3.0])],
        [0.0, 1.0],
        words=str,
        summary="",
    )
    assert chart.ticks == ["4", "2", "0"] or chart.ticks == ["4", "3", "2", "1", "0"]
    assert numbers(chart.series[0].line) == [(0, 120), (600, 120)]
    assert numbers(chart.series[1].line) == [(0, 80), (600, 0)]
    assert numbers(chart.series[1].area) == [(0, 80), (600, 0), (600, 120), (0, 120)]


def test_a_chart_of_zeros_says_that_it_is_empty() -> None:
    assert charts.stacked("c", [Line("e", "E", [0.0, 0.0])], [0, 1], words=str, summary="").empty
    assert not charts.stacked("c", [Line("e", "E", [0, 1])], [0, 1], words=str, summary="").empty


def test_a_sparkline_of_silence_lies_on_the_ground() -> None:
    assert charts.spark([0.0, 0.0]) == "M0,160L600,160"
    assert charts.spark([]) == ""
