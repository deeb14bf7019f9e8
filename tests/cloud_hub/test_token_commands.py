"""``fogline token``: what is said when a token is made, and what a list shows."""

import json

import pytest
from click.testing import CliRunner

from cloud_hub.cli import main


def fogline(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_token_is_made_with_limits_and_the_list_shows_them_without_its_secret(tmp_path):
    data = ("--data", tmp_path / "hub")
    made = fogline(
        "token", "create", *data, "--tenant", "shop", "--rate", "2.5", "--burst", 9,
        "--concurrency", 4, "--label", "till",
    )  # fmt: skip
    assert made.exit_code == 0
    assert fogline("token", "create", *data).exit_code == 0
    listed = fogline("token", "list", *data, "--json")
    with_limits, without = json.loads(listed.output)
    assert (with_limits["rate"], with_limits["burst"], with_limits["concurrency"]) == (2.5, 9, 4)
    assert (without["rate"], without["burst"], without["concurrency"]) == (0, 0, 0)
    assert made.output.strip() not in listed.output
    first, second = fogline("token", "list", *data).output.splitlines()
    assert "2.5/s (burst 9), 4 at once" in first
    assert "no limits" in second


def test_limits_that_make_no_sense_are_refused_in_one_sentence(tmp_path):
    for options in (("--burst", 3), ("--rate", "nan"), ("--rate", -1)):
        refused = fogline("token", "create", "--data", tmp_path / "hub", *options)
        assert refused.exit_code == 2
        assert "Traceback" not in refused.output


@pytest.mark.parametrize("command", [("list",), ("revoke", "0123456789abcdef")])
def test_a_directory_that_is_no_hubs_is_said_and_left_as_it_is(tmp_path, command):
    for folder in (tmp_path / "elsewhere", tmp_path):
        refused = fogline("token", *command, "--data", folder)
        assert refused.exit_code == 7
        told = f"{folder} holds no hub's data: name the hub's directory with --data"
        assert told in refused.output
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_cannot_be_kept_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused = fogline("token", "create", "--data", tmp_path / "file" / "hub")
    assert refused.exit_code == 5
    assert refused.output == (
        f"fogline: data directory {tmp_path / 'file' / 'hub'}: Not a directory\n"
    )


def test_a_directory_that_cannot_be_written_is_refused_in_one_sentence():
    for data in ("/proc", "/proc/hub"):  # there even root makes no file
        refused = fogline("token", "create", "--data", data)
        assert refused.exit_code == 5
        assert "Traceback" not in refused.output
        assert isinstance(refused.exception, SystemExit)
