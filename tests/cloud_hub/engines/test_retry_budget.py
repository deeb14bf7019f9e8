from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.engines.retry_budget import RetryBudget


@given(
    st.integers(1, 20),
    st.integers(0, 20),
    st.lists(st.booleans(), max_size=300),
    st.integers(0, 300),
)
def test_over_any_stretch_retries_stay_within_the_reserve_and_a_share_of_the_requests(
    per_retry, reserve, fails, start
):
    budget = RetryBudget(per_retry, reserve)
    taken = []
    for failed in fails:
        budget.request()
        taken.append(failed and budget.take())
    stretch = taken[start:]
    assert sum(stretch) <= reserve + len(stretch) / per_retry


def test_a_server_that_fails_now_and_then_is_always_asked_again():
    budget = RetryBudget(10, 1)
    for _ in range(100):
        for _ in range(10):
            budget.request()
        assert budget.take()


def test_a_server_that_always_fails_is_asked_hardly_more_often_than_it_is_needed():
    budget = RetryBudget(10, 10)
    retries = 0
    for _ in range(10_000):
        budget.request()
        retries += budget.take()
    assert retries == 10 + 1000 - 1
