import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.console import figures


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, figures.NOTHING),
        (0.0, "0%"),
        (1.0, "100%"),
        (0.823, "82.3%"),
        (0.0001, "<0.1%"),
        (0.9999, "99.9%"),
    ],
)
def test_a_share_is_all_or_none_only_if_it_really_is(share: float | None, text: str) -> None:
    assert figures.percent(share) == text


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_no_share_between_is_rounded_to_all_or_none(share: float) -> None:
    assert figures.percent(share) not in ("0%", "0.0%", "100%", "100.0%")


@pytest.mark.parametrize(
    ("per_s", "text"),
    [(0, "0"), (0.02, "<0.1"), (0.4, "0.4"), (12.53, "12.5"), (99.96, "100.0"), (1250, "1,250")],
)
def test_a_rate_is_as_exact_as_it_means_something(per_s: float, text: str) -> None:
    assert figures.rate(per_s) == text


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (None, figures.NOTHING),
        (0.312, "0.31 ms"),
        (12.34, "12.3 ms"),
        (340.2, "340 ms"),
        (1234.0, "1.23 s"),
    ],
)
def test_a_duration_has_the_unit_that_keeps_it_short(ms: float | None, text: str) -> None:
    assert str(figures.duration(ms)) == text.replace(" ", "\N{NO-BREAK SPACE}")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (84_300_000, "84.3 MB"), (1.2e9, "1.20 GB"), (3e15, "3,000 TB")],
)
def test_a_size_is_in_decimal_units(n: float, text: str) -> None:
    assert str(figures.size(n)) == text.replace(" ", "\N{NO-BREAK SPACE}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "now"), (0.4, "now"), (42, "42 s ago"), (252, "4 min ago"), (90_000, "1 d ago")],
)
def test_what_is_past_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert figures.ago(seconds) == text.replace(" ", "\N{NO-BREAK SPACE}", 1)


def test_moments_are_utc() -> None:
    assert figures.clock(0) == "00:00:00"
    assert figures.iso(1_790_000_000) == "2026-09-21T14:13:20Z"
