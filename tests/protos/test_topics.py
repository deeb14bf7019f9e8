import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol.topics import (
    DeviceTopic,
    EpochTopic,
    Kind,
    TopicError,
    check_name,
    every_device,
    parse,
)

FIRST = string.ascii_lowercase + string.digits
NAMES = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(FIRST),
    st.text(FIRST + "_-", max_size=62),
)


@given(NAMES, NAMES, st.sampled_from(Kind))
def test_what_is_built_is_parsed_back(tenant: str, device: str, kind: Kind) -> None:
    topic = DeviceTopic(tenant, device, kind)
    assert parse(str(topic)) == topic
    assert parse(str(EpochTopic(tenant))) == EpochTopic(tenant)


@given(st.text())
def test_any_text_is_a_topic_of_ours_or_refused_by_name(text: str) -> None:
    try:
        topic = parse(text)
    except TopicError:
        return
    assert str(topic) == text


@given(st.text(min_size=1), st.sampled_from(Kind))
def test_no_accepted_name_changes_the_shape_of_its_topic(name: str, kind: Kind) -> None:
    try:
        topic = str(DeviceTopic("default", name, kind))
    except TopicError:
        return
    assert topic.count("/") == 4
    assert not set("+#$\0\n") & set(topic)


@pytest.mark.parametrize(
    "name",
    ["", "-a", "_a", "A", "a/b", "a+", "#", "a\n", "a b", "é", "a" * 64, "$sys", "..", "a\0"],
)
def test_a_name_outside_the_charset_is_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(TopicError, match="use 1 to 63 of a-z"):
        check_name(name, "device")


@pytest.mark.parametrize(
    "topic",
    [
        "v2/default/d/a/desired",
        "v1/default/d/a/cmd",
        "v1/default/d/a",
        "v1/default/d/a/desired/x",
        "/v1/default/d/a/desired",
        "v1/default/d/+/desired",
        "v1/default/hub/tuf",
        "$SYS/broker/uptime",
    ],
)
def test_a_foreign_topic_is_refused(topic: str) -> None:
    with pytest.raises(TopicError):
        parse(topic)


def test_the_hub_shares_one_subscription_per_kind() -> None:
    assert every_device(Kind.TELEMETRY) == "$share/hub/v1/+/d/+/tm"
