"""What may go wrong before or beside a request, named by what the operator does next.

Each class has its own exit code, so that scripts and systemd can tell them apart.
"""


class HubError(Exception):
    """The command cannot go on; the message says what to do."""

    exit_code = 1


class ConfigRefused(HubError):
    """An option is unknown, mistyped or contradicts another: correct it."""

    exit_code = 2


class StartRefused(HubError):
    """The hub cannot start here and now: a port in use, a data directory in use, no rights."""

    exit_code = 3


class ModelRefused(HubError):
    """A file is not a model this hub can serve: the message says why."""

    exit_code = 4


class UpstreamDown(ModelRefused):
    """The upstream does not answer for the model; it may later, without a change here."""


class StoreFailed(HubError):
    """The database cannot be used or cannot take a change: see to disk, rights or version."""

    exit_code = 5
