"""Everything at once, for a short while; `./run bench soak` does it for two minutes."""

import pytest

from tests import soak

pytestmark = pytest.mark.system


async def test_every_request_has_one_outcome_and_the_counts_add_up(tmp_path):
    report = await soak.run(tmp_path, seconds=10, callers=200)
    assert report.problems == []
    # That all of it happened.
    assert report.switches >= 2
    assert report.kills >= 1
    for way in soak.WAYS:
        assert report.total(way=way) > 0, way
    assert report.total(outcome=soak.LEFT) > 100
    assert report.total(outcome="DEADLINE_EXCEEDED") > 0
    assert report.total(way="grpc, too large", outcome="RESOURCE_EXHAUSTED") > 0
    assert report.unknown_calls > 0
    assert set(report.answered) >= {("inline", "1"), ("inline", "2"), ("apart", "1")}
