"""The hub's options: precedence, and a precise refusal of everything else."""

from pathlib import Path

import pytest

from cloud_hub import config
from cloud_hub.config import HubConfig
from cloud_hub.errors import ConfigRefused


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path, monkeypatch):
    file = tmp_path / "hub.toml"
    file.write_text('max_batch = 8\nthreads = 2\nname = "file"\n')
    monkeypatch.setenv("FOGLINE_HUB_THREADS", "3")
    monkeypatch.setenv("FOGLINE_HUB_NAME", "environment")
    loaded = config.load({"name": "flag"}, file)
    assert (loaded.max_batch, loaded.threads, loaded.name) == (8, 3, "flag")
    assert loaded.max_queue_rows == 1024


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_bach = 8", "unknown option 'max_bach' in .*did you mean 'max_batch'"),
        ('max_batch = "many"', "max_batch: must be a whole number, got 'many'"),
        ("max_batch = true", "max_batch: must be a whole number, got True"),
        ("max_batch = 0", "max_batch: must be at least 1, got 0"),
        ("max_queue_rows = 0", "max_queue_rows: must be at least 1, got 0"),
        ("threads = 257", "threads: must be at most 256, got 257"),
        ("poll_s = nan", "poll_s: must be greater than 0, got nan"),
        ("drain_s = nan", "drain_s: must be at least 0, got nan"),
        ('drain_s = "soon"', "drain_s: must be a number, got 'soon'"),
        ("name = 8", "name: must be a text, got 8"),
        ('data = ""', "data: must be a path, got ''"),
        ("allow_shared_memory = 2", "allow_shared_memory: must be true or false, got 2"),
        ('door = "smoke"', "door: must be http2 or grpcio, got 'smoke'"),
        ("door = []", r"door: must be http2 or grpcio, got \[\]"),
        ('mqtt = "http://broker"', "mqtt: "),
        ('grpc = "8001"', "grpc: '8001' is not HOST:PORT"),
        ('grpc = "127.0.0.1:99999"', "is not HOST:PORT"),
        ('grpc = "0.0.0.0:8001"', "can be reached from other machines.*fogline token create"),
        ('http = "[::]:80"', "can be reached from other machines"),
        ('tls_cert = "absent.pem"', "belong together"),
        ("caller_rate = inf", "caller_rate: .*finite"),
        ("caller_rate = 1e-9", "caller_rate: 0 is no limit, otherwise it is at least 0.001"),
        ('models = "absent"', "models: absent is not a directory"),
        ("door_memory_bytes = 1000", "door_memory_bytes: must hold 4 requests .* 268435456 bytes"),
        (
            "front_processes = 2\nmax_message_bytes = 65536\ndoor_memory_bytes = 786431",
            "4 requests of max_message_bytes in each of 3 processes, which are 786432 bytes, got",
        ),
        ("max_batch = ", "hub.toml: "),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(tmp_path, text, words):
    file = tmp_path / "hub.toml"
    file.write_text(text)
    with pytest.raises(ConfigRefused, match=words):
        config.load({}, file)


def test_memory_that_just_suffices_for_every_process_is_taken(tmp_path):
    file = tmp_path / "hub.toml"
    file.write_text("front_processes = 2\nmax_message_bytes = 65536\ndoor_memory_bytes = 786432\n")
    assert config.load({}, file).door_memory_bytes == 12 * 65536


def test_a_missing_file_and_an_unknown_variable_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigRefused, match="No such file"):
        config.load({}, tmp_path / "absent.toml")
    monkeypatch.setenv("FOGLINE_HUB_GRCP", "127.0.0.1:1")
    with pytest.raises(ConfigRefused, match="'grcp' in the environment: did you mean 'grpc'"):
        config.load({}, None)


def test_the_environment_says_in_text_what_the_file_says_in_types(tmp_path, monkeypatch):
    file = tmp_path / "hub.toml"
    file.write_text('data = "d"\nmax_batch = 8\nrun_limit_s = 5\nallow_shared_memory = true\n')
    from_file = config.load({}, file)
    for key, text in (
        ("DATA", "d"), ("MAX_BATCH", "8"), ("RUN_LIMIT_S", "5"), ("ALLOW_SHARED_MEMORY", "True"),
    ):  # fmt: skip
        monkeypatch.setenv(f"FOGLINE_HUB_{key}", text)
    assert config.load({}, None) == from_file == HubConfig(
        data=Path("d"), max_batch=8, run_limit_s=5.0, allow_shared_memory=True
    )  # fmt: skip
    monkeypatch.setenv("FOGLINE_HUB_ALLOW_SHARED_MEMORY", "perhaps")
    with pytest.raises(ConfigRefused, match="must be true or false, got 'perhaps'"):
        config.load({}, None)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:0", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("hub.example:1", False),
    ],
)
def test_only_addresses_of_this_machine_are_loopback(address, loopback):
    assert config.is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("address", "called"),
    [
        ("0.0.0.0:8000", "127.0.0.1:8000"),
        ("[::]:8000", "[::1]:8000"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("hub.example:8000", "hub.example:8000"),
        ("[fd00::1]:8000", "[fd00::1]:8000"),
    ],
)
def test_this_machine_calls_a_wildcard_by_its_loopback(address, called):
    assert config.called_here(address) == called
