"""The settings extensions: what a server traces and logs, asked for and changed by callers.

A setting of a trace is a list of texts, a setting of the log a flag, a number or a text; no
value clears a setting, so that it follows what it inherits from again.

Source: triton-inference-server/server docs/protocol/extension_trace.md, extension_logging.md.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fogline_protocol.errors import BadRequest, Unsupported
from fogline_protocol.v1 import inference_pb2 as pb

TraceSettings = Mapping[str, Sequence[str]]
TraceChanges = Mapping[str, Sequence[str] | None]  # None: clear it
LogValue = bool | int | str

LISTS = ("trace_level",)  # in JSON a list; the other settings are one text


class TraceControl(Protocol):
    """A server whose traces callers may see and change. May raise ``InferenceError``."""

    def change_trace(self, model: str, changes: TraceChanges) -> TraceSettings:
        """Change what holds for a model, for all if ``model`` is empty, and return what does."""
        ...


def decode_trace(message: pb.TraceSettingRequest) -> TraceChanges:
    """Return the changes that a caller asks for; a setting without values is cleared."""
    return {name: list(value.value) or None for name, value in message.settings.items()}


def encode_trace(settings: TraceSettings) -> bytes:
    """Return the settings as a ``TraceSettingResponse``."""
    message = pb.TraceSettingResponse()
    for name, values in settings.items():
        message.settings[name].value.extend(values)
    return message.SerializeToString()


def trace_changes(document: Mapping[str, Any]) -> TraceChanges:
    """Return the changes that a JSON object asks for; null clears a setting.

    Raises:
        BadRequest: a value is neither text nor a list of texts.
    """
    changes: dict[str, Sequence[str] | None] = {}
    for name, value in document.items():
        values = value if isinstance(value, list) else [value]
        if value is None:
            changes[name] = None
        elif all(isinstance(v, str) for v in values):
            changes[name] = values or None
        else:
            raise BadRequest(f"{name} must be a text, a list of texts or null, got {value!r}")
    return changes


def trace_document(settings: TraceSettings) -> Mapping[str, Any]:
    """Return the settings as a JSON-ready document."""
    return {name: list(values) if name in LISTS else values[0] for name, values in settings.items()}


class LogSettings:
    """The log settings of this process, as far as they act: on what fogline itself logs.

    ``log_info``, ``log_warning`` and ``log_error`` let records of a level through or not,
    ``log_verbose_level`` above 0 adds those of level DEBUG, among them one per call. Where
    records go and in which form is the operator's: those settings are shown and keep their
    value. Logging belongs to the process, so all servers in it share one state.
    """

    def __init__(self, root: str = "fogline", *others: str) -> None:
        """Act on these loggers and those below them; the settings shown are those of ``root``."""
        self._logger = logging.getLogger(root)
        self._others = [LogSettings(other) for other in others]

    def get(self) -> Mapping[str, LogValue]:
        """Return what holds now."""
        gate = self._gate()
        return {
            "log_file": "",  # the standard error stream
            "log_info": gate.passes["log_info"],
            "log_warning": gate.passes["log_warning"],
            "log_error": gate.passes["log_error"],
            "log_verbose_level": int(self._logger.level == logging.DEBUG),
            "log_format": "ISO8601",
        }

    def change(self, changes: Mapping[str, LogValue | None]) -> Mapping[str, LogValue]:
        """Change all that is named, or nothing, and return what holds then.

        Raises:
            BadRequest: there is no such setting, or its value has another type.
            Unsupported: the setting can only be changed by the operator.
        """
        now = self.get()
        for name, value in changes.items():
            if name not in now:
                raise BadRequest(f"there is no log setting {name!r}, known are {', '.join(now)}")
            if type(value) is not type(now[name]):
                kind = type(now[name]).__name__
                raise BadRequest(f"log setting {name!r} is of type {kind}, got {value!r}")
            if isinstance(value, str) and value != now[name]:
                raise Unsupported(
                    f"log setting {name!r} cannot be changed from {now[name]!r} by a caller: "
                    "where the log goes and in which form is set where this server is started"
                )
        level = changes.get("log_verbose_level")
        if isinstance(level, int) and level not in (0, 1):
            raise Unsupported(f"log_verbose_level is 0 or 1 here, got {level}")
        if changes:
            # Before and whatever holds: nobody goes silent without a word.
            self._logger.warning("log settings changed by a caller: %s", dict(changes))
        gate = self._gate()
        gate.passes |= {name: value for name, value in changes.items() if name in gate.passes}
        if level is not None:
            self._logger.setLevel(logging.DEBUG if level else logging.NOTSET)
        for other in self._others:
            other.change(changes)
        return self.get()

    def _gate(self) -> "_Gate":
        for handler in self._logger.handlers:
            if isinstance(handler, _Gate):
                return handler
        gate = _Gate(self._logger)
        self._logger.addHandler(gate)
        self._logger.propagate = False
        return gate


class _Gate(logging.Handler):
    """Hands records on to the handlers above ``logger``, or not, by their level."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._above = logger.parent or logging.root
        self.passes: dict[str, Any] = {"log_info": True, "log_warning": True, "log_error": True}

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on if those of its level are wanted."""
        name = (
            "log_error"
            if record.levelno >= logging.ERROR
            else "log_warning"
            if record.levelno >= logging.WARNING
            else "log_info"
            if record.levelno >= logging.INFO
            else ""  # verbose: already chosen by the level of the logger
        )
        if not name or self.passes[name]:
            self._above.callHandlers(record)


def decode_log(message: pb.LogSettingsRequest) -> Mapping[str, LogValue | None]:
    """Return the changes that a caller asks for."""
    changes: dict[str, LogValue | None] = {}
    for name, value in message.settings.items():
        kind = value.WhichOneof("parameter_choice")
        changes[name] = None if kind is None else getattr(value, kind)
    return changes


def encode_log(settings: Mapping[str, LogValue]) -> bytes:
    """Return the settings as a ``LogSettingsResponse``."""
    message = pb.LogSettingsResponse()
    for name, value in settings.items():
        found = message.settings[name]
        if isinstance(value, bool):
            found.bool_param = value
        elif isinstance(value, int):
            found.uint32_param = value
        else:
            found.string_param = value
    return message.SerializeToString()
