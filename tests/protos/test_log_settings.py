"""LogSettings act on what is logged, or are refused."""

import asyncio
import logging

import pytest
import tritonclient.grpc.aio as triton
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from fogline_protocol.doors import Extras
from fogline_protocol.errors import BadRequest, Unsupported
from fogline_protocol.settings import LogSettings
from tests.protos.echo import EchoServer, grpc_door, rest_door


@pytest.fixture
def logs():
    """The settings of the real loggers, as they were before and after."""
    logger = logging.getLogger("fogline")
    before = logger.handlers[:], logger.propagate, logger.level
    yield LogSettings()
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


def said(caplog):
    caplog.clear()
    log = logging.getLogger("fogline.test")
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)(level)
    logging.getLogger("not.ours").error("theirs")
    return [r.getMessage() for r in caplog.records]


def test_each_setting_acts_on_its_own_level_and_on_nobody_elses_log(logs, caplog):
    logging.getLogger().setLevel(logging.INFO)
    assert said(caplog) == ["info", "warning", "error", "theirs"]
    logs.change({"log_info": False})
    assert said(caplog) == ["warning", "error", "theirs"]
    logs.change({"log_warning": False, "log_error": False})
    assert said(caplog) == ["theirs"]
    logs.change({"log_verbose_level": 1})
    assert said(caplog) == ["debug", "theirs"]
    logs.change({"log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0})
    assert said(caplog) == ["info", "warning", "error", "theirs"]
    logging.getLogger().setLevel(logging.WARNING)


def test_nobody_goes_silent_without_a_word(logs, caplog):
    logs.change({"log_warning": False, "log_error": False})
    assert "log settings changed by a caller: {'log_warning': False" in caplog.text


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"log_volume": 1}, BadRequest, "no log setting 'log_volume', known are log_file"),
        ({"log_info": 1}, BadRequest, "is of type bool, got 1"),
        ({"log_info": None}, BadRequest, "is of type bool, got None"),
        ({"log_verbose_level": True}, BadRequest, "is of type int, got True"),
        ({"log_verbose_level": 7}, Unsupported, "0 or 1"),
        ({"log_file": "/tmp/x"}, Unsupported, "cannot be changed from '' by a caller"),
        ({"log_format": "default"}, Unsupported, "cannot be changed from 'ISO8601'"),
    ],
)
def test_what_cannot_act_is_refused_and_nothing_is_changed(logs, changes, kind, text):
    before = logs.get()
    with pytest.raises(kind, match=text):
        logs.change({"log_error": False, **changes})
    assert logs.get() == before


async def test_both_doors_show_and_change_the_same_settings(logs, caplog):
    extras = Extras(logs=logs)
    server = EchoServer()
    async with (
        grpc_door(server, extras=extras) as address,
        rest_door(server, extras=extras) as rest,
        triton.InferenceServerClient(address) as client,
    ):
        assert "logging" in (await client.get_server_metadata()).extensions
        changed = (await client.update_log_settings({"log_verbose_level": 1})).settings
        assert changed["log_verbose_level"].uint32_param == 1
        assert changed["log_info"].bool_param
        assert changed["log_format"].string_param == "ISO8601"
        caplog.clear()
        await client.is_server_live()
        assert "ServerLive answered" in caplog.text
        theirs = triton_http.InferenceServerClient(rest)
        found = await asyncio.to_thread(
            lambda: (theirs.update_log_settings({"log_info": False}), theirs.close())[0]
        )
        assert found == {
            "log_file": "", "log_info": False, "log_warning": True, "log_error": True,
            "log_verbose_level": 1, "log_format": "ISO8601",
        }  # fmt: skip
        with pytest.raises(InferenceServerException, match="log_file"):
            await client.update_log_settings({"log_file": "/tmp/x"})
