import dataclasses
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import cli, config
from edge_agent.config import DEVICE_NAME, AgentConfig, load
from edge_agent.errors import ConfigRefused


def written(folder: Path, text: str) -> Path:
    file = folder / "agent.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, 'threads = 2\ndevice = "in-file"\ndeadline_s = 3\nprivate = true')
    environment = {"FOGLINE_AGENT_THREADS": "3", "FOGLINE_AGENT_DEVICE": "in-env", "HOME": "/"}
    found = load({"threads": 4}, environment, file)
    assert (found.threads, found.device, found.deadline_s) == (4, "in-env", 3.0)
    assert found.private
    assert found.max_concurrency == 64


def test_every_kind_of_option_can_come_from_the_environment() -> None:
    environment = {
        "FOGLINE_AGENT_BUNDLE": os.pathsep.join(["/a", "/b"]),
        "FOGLINE_AGENT_ALLOW_SHARED_MEMORY": "true",
        "FOGLINE_AGENT_DRAIN_S": "0.5",
        "FOGLINE_AGENT_DATA": "/data",
        "FOGLINE_AGENT_KEEP": "digits, faces/door 3",
        "FOGLINE_AGENT_HUB": "127.0.0.1:8001",
    }
    found = load({}, environment, None)
    assert found.keep == ("digits", "faces/door 3")
    assert found.bundle == (Path("/a"), Path("/b"))
    assert (found.allow_shared_memory, found.drain_s, found.data) == (True, 0.5, Path("/data"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("thread = 2", r"unknown option 'thread' in .*agent\.toml: did you mean 'threads'\?"),
        (
            "xyzzy = 2",
            r"unknown option 'xyzzy'.*known are allow_shared_memory, audit_rate, bundle, ",
        ),
        ('threads = "2"', r"threads in .*: expected a whole number, got '2'"),
        ("threads = true", "threads in .*: expected a whole number, got True"),
        ("threads = -1", r"threads: must lie between 0 and 256, got -1"),
        ("deadline_s = nan", "deadline_s: must lie between"),
        ("private = 1", "private in .*: expected true or false, got 1"),
        ("data = 1", "data in .*: expected a path, got 1"),
        ("bundle = [1]", r"bundle in .*: expected a list of paths, got \[1\]"),
        ('device = "Kitchen"', "device: a name is 1 to 63 lower-case.*got 'Kitchen'"),
        ('grpc = "8001"', "grpc: expected HOST:PORT.*got '8001'"),
        ('grpc = "127.0.0.1:99999"', "grpc: expected HOST:PORT"),
        ('http = "0.0.0.0:80"', "http: '0.0.0.0:80' can be reached from other machines"),
        ('hub = "hub"', "hub: expected HOST:PORT"),
        ('hub = "hub:0"', "hub: port 0 is nobody's address"),
        ('hub = "h:1"\nhub_ca = "/none.pem"', r"hub_ca: /none\.pem is not a file"),
        (f'unix = "/{"x" * 107}"', "unix: a socket's path has at most 107 bytes"),
        ('keep = ["digits/"]', "keep: expected MODEL or MODEL/SOURCE, .*got 'digits/'"),
        ('keep = ["Digits"]', "keep: expected MODEL or MODEL/SOURCE"),
        ("keep = [1]", r"keep in .*: expected a list of texts, got \[1\]"),
        ('keep = "digits"\nprivate = true', "keep: this agent is private"),
        ('keep = "digits"', "keep: there is no hub to keep anything; give hub HOST:PORT"),
        ("threads = ", "agent.toml: Invalid value"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigRefused, match=sentence):
        load({}, {}, written(tmp_path, text))


def test_the_environment_is_checked_like_the_file() -> None:
    with pytest.raises(ConfigRefused, match=r"'thread' in the environment: did you mean 'threads'"):
        load({}, {"FOGLINE_AGENT_THREAD": "1"}, None)
    with pytest.raises(ConfigRefused, match="threads in the environment: expected a whole number"):
        load({}, {"FOGLINE_AGENT_THREADS": "many"}, None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused, match=r"gone\.toml: No such file"):
        load({}, {}, tmp_path / "gone.toml")


def test_a_token_travels_over_tls_only(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret", encoding="ascii")
    with pytest.raises(ConfigRefused, match="a token is sent over TLS only"):
        AgentConfig(hub="127.0.0.1:8001", hub_token_file=token)
    with pytest.raises(ConfigRefused, match="there is no hub to use it for"):
        AgentConfig(hub_token_file=token)
    assert AgentConfig(hub="hub.example:8001", hub_token_file=token).hub_uses_tls
    assert not AgentConfig(hub="[::1]:8001").hub_uses_tls
    assert not AgentConfig(hub="localhost:8001").hub_uses_tls


def test_the_memory_of_the_doors_holds_some_of_the_largest_requests() -> None:
    with pytest.raises(ConfigRefused, match="door_memory_bytes: must hold 4 requests"):
        load({"max_message_bytes": 1 << 20, "door_memory_bytes": (4 << 20) - 1}, {}, None)
    load({"max_message_bytes": 1 << 20, "door_memory_bytes": 4 << 20}, {}, None)


@given(st.text())
def test_any_host_name_becomes_a_device_name(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: name)
        assert DEVICE_NAME.fullmatch(config.host_device_name())


def test_every_option_is_a_flag_of_run() -> None:
    flags = {parameter.name for parameter in cli.run.params} - {"config_file"}
    assert flags == {option.name for option in dataclasses.fields(AgentConfig)}


def test_help_names_the_defaults_in_force() -> None:
    text = CliRunner().invoke(cli.main, ["run", "--help"], terminal_width=200).output
    for option in dataclasses.fields(AgentConfig):
        if isinstance(option.default, int | float) and not isinstance(option.default, bool):
            shown = "16 MiB" if option.name == "max_message_bytes" else f"{option.default:g}"
            assert f"[default: {shown}]" in text
