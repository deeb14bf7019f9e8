"""What may go wrong, named by what the caller does next.

Errors of a request are ``fogline_protocol.inference.InferenceError``: the doors translate
them. The ones here end the start of an agent, each with its own exit code, or tell the
router that the hub gave no answer; they never reach an application.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that only prints its help need not wait for numpy
    from fogline_protocol.errors import InferenceError


class AgentError(Exception):
    """The command cannot go on; the message says what to do."""

    exit_code = 1


class ConfigRefused(AgentError):
    """An option is unknown, mistyped or contradicts another: correct it."""

    exit_code = 2


class StartRefused(AgentError):
    """The agent cannot start here and now: a port or the data directory in use, no rights."""

    exit_code = 3


class ReleaseRefused(AgentError):
    """A bundle is not intact, cannot run here or answers wrongly: keep what is served, report why."""

    exit_code = 4


class HubUnavailable(Exception):
    """The hub was not reached or had no room: answer here."""


class HubLate(HubUnavailable):
    """The hub did not answer in the time that there was: answer here."""


class HubRefused(Exception):
    """The hub answered, and with a refusal: answer here; asking again will not help.

    ``refusal`` is what the hub said, for callers who want no other answer.
    """

    def __init__(self, refusal: InferenceError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
