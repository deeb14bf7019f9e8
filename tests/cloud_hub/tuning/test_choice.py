"""Which settings are tried, and which one is taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.tuning import choice
from cloud_hub.tuning.choice import Engines, Measurement, Setting, Space

ONE = Engines(1, 1)


def measured(setting, rate, p99_s=0.01, cpu_s=0.001, trouble=""):
    return Measurement(setting, 10, rate, p99_s / 2, p99_s, cpu_s, 1, trouble)


spaces = st.builds(
    choice.space,
    st.builds(
        Setting, st.builds(Engines, st.integers(1, 4), st.integers(1, 9)), st.integers(1, 99)
    ),
    cores=st.integers(1, 20),
    largest_batch=st.integers(1, 200),
    single_engine=st.booleans(),
    on_cpu=st.booleans(),
)
figures = st.floats(0.001, 10.0)
results = st.lists(
    st.builds(
        lambda instances, threads, batch, rate, p99_s, cpu_s, trouble: measured(
            Setting(Engines(instances, threads), batch), rate, p99_s, cpu_s, trouble
        ),
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 8),
        figures, figures, figures, st.sampled_from(["", "", "", "it failed"]),
    ),
    unique_by=lambda one: one.setting,
)  # fmt: skip


def climb(space, limit_s, measure):
    """Measure whatever comes next until nothing is left; every setting at most once."""
    done = []
    while left := choice.remaining(space, done, limit_s):
        setting = left[0][0]
        assert setting not in [one.setting for one in done]
        done.append(measure(setting))
    return done


@given(results, figures)
def test_the_choice_was_measured_is_within_the_limit_and_beaten_by_little(done, limit_s):
    chosen = choice.choose(done, limit_s)
    able = [one for one in done if not one.trouble and one.p99_s <= limit_s]
    if chosen is None:
        assert not able
        return
    assert chosen in able
    assert chosen.samples_per_s >= (1 - choice.TIE) * max(one.samples_per_s for one in able)


@given(results, figures)
def test_who_is_as_fast_and_takes_clearly_less_cpu_is_not_passed_over(done, limit_s):
    chosen = choice.choose(done, limit_s)
    for one in done:
        if chosen and not one.trouble and one.p99_s <= limit_s:
            as_fast = one.samples_per_s >= chosen.samples_per_s
            clearly_less = one.cpu_s_per_sample * (1 + choice.TIE) < chosen.cpu_s_per_sample
            assert not (as_fast and clearly_less)


def test_of_ties_the_one_with_less_cpu_is_taken_then_the_smaller_batch():
    small, large, costly = (Setting(ONE, 4), Setting(ONE, 8), Setting(Engines(2, 1), 2))
    done = [
        measured(large, 100, cpu_s=0.0100),
        measured(small, 98, cpu_s=0.0101),
        measured(costly, 101, cpu_s=0.0200),
    ]
    assert choice.choose(done, 1.0).setting == small
    done[1] = measured(small, 98, cpu_s=0.0110)
    assert choice.choose(done, 1.0).setting == large
    done[1] = measured(small, 90, cpu_s=0.0001)
    assert choice.choose(done, 1.0).setting == large


@given(spaces, st.data())
def test_the_climb_ends_and_never_leaves_the_space(space, data):
    done = climb(
        space, 1.0, lambda one: measured(one, data.draw(figures), data.draw(st.floats(0.1, 3.0)))
    )
    assert done[0].setting == Setting(space.now.engines, 1)
    assert len(done) <= len(space)
    for one in done:
        assert one.setting.engines in space.engines
        assert one.setting.batch in space.batches


@given(spaces)
def test_what_only_gets_better_is_tried_to_the_end(space):
    done = climb(space, 1.0, lambda one: measured(one, one.batch))
    assert len(done) == len(space)


@given(spaces)
def test_a_curve_ends_when_it_fell_twice_in_a_row(space):
    done = climb(space, 1.0, lambda one: measured(one, 1 / one.batch))
    for engines in space.engines:
        tried = [one.setting.batch for one in done if one.setting.engines == engines]
        expected = space.batches[:3]
        if engines == space.now.engines and space.now.batch not in expected:
            expected = [*expected, space.now.batch]  # the choice is held against it
        assert tried == expected


def test_a_fall_that_may_be_chance_ends_nothing():
    space = Space(Setting(ONE, 1), (ONE,), (1, 2, 4, 8))
    done = [measured(Setting(ONE, batch), rate) for batch, rate in ((1, 100), (2, 99), (4, 98))]
    assert choice.remaining(space, done, 1.0) == [[Setting(ONE, 8)]]


@pytest.mark.parametrize("end", [{"p99_s": 3.0}, {"trouble": "out of memory"}])
def test_a_curve_ends_where_it_is_too_slow_or_fails(end):
    space = Space(Setting(ONE, 1), (ONE, Engines(2, 1)), (1, 2, 4, 8))
    done = [measured(Setting(ONE, 1), 1), measured(Setting(ONE, 2), 2, **end)]
    assert [curve[0].engines for curve in choice.remaining(space, done, 1.0)] == [Engines(2, 1)]


@given(spaces, st.integers(1, 20))
def test_what_is_tried_fits_the_machine(space, cores):
    now = Setting(ONE, 1)
    found = choice.space(now, cores=cores, largest_batch=48, single_engine=False, on_cpu=True)
    assert found.engines[0] == ONE
    assert all(e.instances * e.threads <= cores for e in found.engines)
    assert Engines(1, cores) in found.engines
    assert Engines(cores, 1) in found.engines
    assert found.batches == [1, 2, 4, 8, 16, 32, 48]


def test_a_model_whose_requests_keep_their_order_has_one_engine():
    found = choice.space(Setting(ONE, 1), cores=8, largest_batch=1, single_engine=True, on_cpu=True)
    assert {engines.instances for engines in found.engines} == {1}


@given(st.floats(-1.0, 700.0), st.integers(1, 90), st.floats(0.0, 40.0))
def test_a_slice_leaves_the_others_theirs_and_ends_in_time(left_s, settings, run_s):
    for_s = choice.slice_s(left_s, settings, run_s)
    assert for_s + run_s <= left_s + 1e-9
    assert for_s * settings <= max(left_s, 0) + 1e-9


def test_sizes_are_preferred_only_where_batches_are_held_and_smaller_ones_are_as_good():
    done = [measured(Setting(ONE, b), rate) for b, rate in ((1, 50), (4, 98), (8, 100), (16, 120))]
    chosen = Setting(ONE, 8)
    assert choice.preferred(done, chosen, delay_us=500) == (4, 8)
    assert choice.preferred(done, chosen, delay_us=0) == ()
    assert choice.preferred(done, Setting(ONE, 16), delay_us=500) == ()
