"""Configurations: completed from the graph, read from config.pbtxt, and told to clients."""

import contextlib
import dataclasses
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fogline_protocol import model_config
from fogline_protocol.model_config import (
    ConfigError,
    ModelConfig,
    QueuePolicy,
    VersionPolicy,
    Wanted,
    parse_pbtxt,
)
from fogline_protocol.tensors import DTYPES, TensorSpec

X = TensorSpec("x", "FP32", (-1, 3))
Y = TensorSpec("y", "BYTES", (-1, 2))
FIXED = TensorSpec("x", "FP32", (1, 3))

FULL = """
name: "m"  # a comment with max_batch_size
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3 ] } ]
output [ { name: "y" data_type: TYPE_STRING dims: [ 2 ] label_filename: "labels.txt" } ]
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
instance_group [ { count: 2 kind: KIND_CPU } ]
version_policy: { specific { versions: [ 2, 5 ] } }
"""


def test_without_a_file_the_graph_decides():
    config = Wanted().completed("m", (X,), (Y,), 64)
    assert (config.max_batch_size, config.batches) == (64, True)
    assert Wanted().completed("m", (FIXED,), (Y,), 64).max_batch_size == 0


def test_a_file_says_what_it_wants_and_the_graph_completes_it():
    config = parse_pbtxt(FULL).completed("m", (X,), (Y,), 64)
    assert config.max_batch_size == 8
    assert config.batching.preferred_batch_sizes == (4, 8)
    assert config.batching.max_queue_delay_us == 100
    assert config.instances == 2
    assert config.versions.specific == (2, 5)
    assert config.label_files == {"y": "labels.txt"}
    document = model_config.document(config)
    assert document["input"][0]["dims"] == [3]
    assert document["output"][0]["data_type"] == "TYPE_STRING"
    assert document["version_policy"] == {"specific": {"versions": [2, 5]}}
    assert document["dynamic_batching"]["max_queue_delay_microseconds"] == 100


def test_priorities_and_queue_policies_are_read_and_told():
    text = """
    dynamic_batching {
      priority_levels: 3
      default_priority_level: 2
      default_queue_policy { default_timeout_microseconds: 500 max_queue_size: 9 }
      priority_queue_policy {
        key: 3 value { timeout_action: DELAY default_timeout_microseconds: 7 allow_timeout_override: true }
      }
    }
    """
    config = parse_pbtxt(text).completed("m", (X,), (Y,), 64)
    batching = config.batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    assert batching.default_policy == QueuePolicy(timeout_us=500, max_requests=9)
    assert batching.policies == {3: QueuePolicy(7, delays=True, allow_timeout_override=True)}
    told = model_config.document(config)["dynamic_batching"]
    assert told["default_queue_policy"]["max_queue_size"] == 9
    assert told["priority_queue_policy"]["3"]["timeout_action"] == "DELAY"
    assert (
        "default_queue_policy"
        not in model_config.document(Wanted().completed("m", (X,), (Y,), 64))["dynamic_batching"]
    )


def test_a_model_without_batching_keeps_its_whole_shapes():
    config = parse_pbtxt("max_batch_size: 0").completed("m", (X,), (Y,), 64)
    document = model_config.document(config)
    assert document["max_batch_size"] == 0
    assert document["input"][0]["dims"] == [-1, 3]
    assert "dynamic_batching" not in document
    # A comment is not a word on it.
    assert parse_pbtxt("# max_batch_size: 0").max_batch_size is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name:", "cannot be read"),
        ("max_batch_size: 1.5", "cannot be read"),
        ('backend: "pytorch"', "'pytorch' is not served here"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ('input { name: "x" reshape { shape: [1] } }', "reshape"),
        ('name: "other"', "names 'other'"),
        ("max_batch_size: -1", "at least 0"),
        ("dynamic_batching { preferred_batch_size: [ 4, 65 ] }", r"\[65\] is not between 1 and"),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level must be between 1"),
        (
            "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
            "priority_queue_policy { key: 3 value {} } }",
            r"names the levels \[3\], priority_levels is 2",
        ),
        (
            "dynamic_batching { preserve_ordering: true } instance_group { count: 2 }",
            "preserve_ordering cannot be kept",
        ),
        ('input { name: "z" data_type: TYPE_FP32 dims: 3 }', "names the input 'z'"),
        ('input { name: "x" data_type: TYPE_FP64 dims: 3 }', "says FP64"),
        ('input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }', r"says FP32 \[-1, 3\]"),
    ],
)
def test_a_file_that_cannot_be_obeyed_says_why(text, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_pbtxt(text).completed("m", (X,), (Y,), 64)


def test_a_batch_size_needs_a_batch_dimension():
    with pytest.raises(ConfigError, match="may vary"):
        parse_pbtxt("max_batch_size: 4").completed("m", (FIXED,), (Y,), 64)


def test_unknown_fields_are_named_and_skipped(caplog):
    with caplog.at_level(logging.WARNING, "fogline.model_config"):
        wanted = parse_pbtxt("optimization { priority: 1 }\nmax_batch_size: 4")
    assert wanted.max_batch_size == 4
    assert "optimization" in caplog.text


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (VersionPolicy(), [10]),
        (VersionPolicy(latest=2), [9, 10]),
        (VersionPolicy(latest=9), [1, 9, 10]),
        (VersionPolicy(all=True), [1, 9, 10]),
        (VersionPolicy(specific=(9, 4)), [9]),
        (VersionPolicy(specific=(4,)), []),
    ],
)
def test_the_version_policy_chooses(policy, chosen):
    assert policy.choose([10, 1, 9]) == chosen


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", VersionPolicy()),
        ("version_policy { all {} }", VersionPolicy(all=True)),
        ("version_policy { latest { num_versions: 3 } }", VersionPolicy(latest=3)),
    ],
)
def test_the_version_policy_is_read(text, policy):
    assert parse_pbtxt(text).versions == policy


def test_every_datatype_has_its_name_in_the_configuration():
    specs = [TensorSpec(name, name, (1,)) for name in DTYPES]
    names = [t["data_type"] for t in model_config.document(
        Wanted().completed("m", specs, (), 1))["input"]]  # fmt: skip
    assert names == ["TYPE_" + ("STRING" if n == "BYTES" else n) for n in DTYPES]


@given(st.text(max_size=200) | st.sampled_from(FULL.split()).flatmap(lambda w: st.just(w * 3)))
def test_no_text_does_more_than_be_refused(text):
    logging.disable(logging.WARNING)
    try:
        with contextlib.suppress(ConfigError):
            parse_pbtxt(text)
    finally:
        logging.disable(logging.NOTSET)


def test_a_model_of_another_server_is_configured_by_parameters():
    text = """
        backend: "upstream"
        parameters { key: "url" value { string_value: "grpc://127.0.0.1:9001" } }
        response_cache { enable: true }
    """
    wanted = parse_pbtxt(text)
    assert (wanted.backend, wanted.parameters) == ("upstream", {"url": "grpc://127.0.0.1:9001"})
    config = wanted.completed("m", (X,), (Y,), 64)
    assert (config.backend, config.platform, config.response_cache) == ("upstream",) * 2 + (True,)
    document = model_config.document(config)
    assert document["response_cache"] == {"enable": True}
    assert document["default_model_filename"] == ""


def test_the_response_cache_is_off_unless_a_model_asks_for_it():
    config = parse_pbtxt("").completed("m", (X,), (Y,), 64)
    assert model_config.document(config)["response_cache"] == {"enable": False}


TUNING = model_config.Tuning(max_batch_size=8, instances=2, threads=3, preferred_batch_sizes=(4, 8))


def test_tuning_changes_what_it_decides_and_keeps_the_rest():
    text = """
        name: "m"  # a comment
        max_batch_size: 32
        instance_group [ { count: 3 kind: KIND_CPU name: "a" }, { count: 4 } ]
        dynamic_batching { preferred_batch_size: 32 max_queue_delay_microseconds: 7 }
        parameters { key: "mine" value { string_value: "kept" } }
        output { name: "y" data_type: TYPE_FP32 dims: 3 label_filename: "läbels.txt" }
    """
    before, after = (parse_pbtxt(text), parse_pbtxt(model_config.tuned(text, TUNING)))
    assert after == dataclasses.replace(
        before,
        max_batch_size=8,
        instances=2,
        threads=3,
        parameters={"mine": "kept", "fogline.threads": "3"},
        batching=dataclasses.replace(before.batching, preferred_batch_sizes=(4, 8)),
    )
    assert "kind: KIND_CPU" in model_config.tuned(text, TUNING)
    assert "läbels.txt" in model_config.tuned(text, TUNING)


def test_tuning_does_not_lose_that_a_model_is_not_to_batch():
    tuning = dataclasses.replace(TUNING, max_batch_size=None, preferred_batch_sizes=())
    assert parse_pbtxt(model_config.tuned("max_batch_size: 0", tuning)).max_batch_size == 0
    assert parse_pbtxt(model_config.tuned("", tuning)).max_batch_size is None


def test_tuning_refuses_to_lose_what_only_other_servers_know():
    with pytest.raises(ConfigError, match=r"without losing .*optimization"):
        model_config.tuned("optimization { priority: PRIORITY_MAX }", TUNING)


@pytest.mark.parametrize("value", ["0", "-1", "257", "two", "", "1.5", "9999999"])
def test_threads_that_are_no_count_are_refused(value):
    with pytest.raises(
        ConfigError, match=r"'fogline\.threads' must be a string_value from 1 to 256"
    ):
        parse_pbtxt(f'parameters {{ key: "fogline.threads" value {{ string_value: "{value}" }} }}')


def test_threads_of_a_model_are_reported_like_any_parameter():
    config = ModelConfig("m", 4, threads=3)
    assert model_config.document(config)["parameters"]["fogline.threads"] == {"string_value": "3"}
    assert model_config.document(ModelConfig("m", 4))["parameters"] == {}
