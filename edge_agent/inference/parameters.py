"""What a request may ask of the agent: its parameters, read and refused by name.

Ours carry the prefix ``fogline.``. They are obeyed here and not handed on; what else a request
carries is the model's business, and travels with an escalation.
"""

from collections.abc import Mapping
from typing import NamedTuple

from edge_agent.inference.policy import Mode
from fogline_protocol import examples
from fogline_protocol.errors import BadRequest
from fogline_protocol.examples import KEEP, SOURCE
from fogline_protocol.inference import Parameter

PREFIX = "fogline."
MODE = "fogline.mode"
PRIVATE = "fogline.private"
PER_ROW = "fogline.per_row"
_KNOWN = f"{MODE} ({', '.join(Mode)}), {PRIVATE}, {PER_ROW} and {KEEP} (true or false), {SOURCE} (a text)"
# Ours to obey, not the hub's: the time left travels as the call's deadline.
_NOT_FORWARDED = ("fogline.", "triton_", "timeout")


class Options(NamedTuple):
    """What the request's parameters ask for."""

    mode: Mode = Mode.PREFER_EDGE
    private: bool = False
    per_row: bool = False
    keep: bool | None = None  # None: as the agent was configured
    source: str = ""


_MODES: Mapping[Parameter, Mode] = {mode.value: mode for mode in Mode}


def read_options(parameters: Mapping[str, Parameter], defaults: Options) -> Options:
    """Return what ``parameters`` ask for, beyond the agent's own ``defaults``.

    Raises:
        BadRequest: one of ours is unknown or has a value that makes no sense.
    """
    mode, private, per_row, keep, source = defaults
    for key, value in parameters.items():
        if not key.startswith(PREFIX):
            continue
        if key == MODE:
            if value not in _MODES:
                raise BadRequest(f"{MODE} must be one of {', '.join(Mode)}, got {value!r}")
            mode = _MODES[value]
        elif key == PRIVATE:
            private = _flag(key, value) or defaults.private
        elif key == PER_ROW:
            per_row = _flag(key, value)
        elif key == KEEP:
            keep = _flag(key, value)
        elif key == SOURCE:
            if not examples.is_source(value):
                raise BadRequest(
                    f"{SOURCE} must be printable text of at most {examples.LONGEST_SOURCE} "
                    f"characters, got {value!r:.250}"
                )
            source = str(value)
        else:
            raise BadRequest(f"unknown parameter {key!r}, known are {_KNOWN}")
    return Options(mode, private, per_row, keep, source)


def _flag(key: str, value: Parameter) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false, got {value!r}")
    return value


def forwarded(parameters: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
    """Return what travels with an escalation."""
    if not parameters:
        return parameters
    return {k: v for k, v in parameters.items() if not k.startswith(_NOT_FORWARDED)}
