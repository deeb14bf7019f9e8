"""What may go wrong with a request, named by what its caller does next.

Every door translates these to its own status codes, and the client translates them back.
"""

from collections.abc import Mapping


class InferenceError(Exception):
    """A request that got no answer. The class says what the caller does next.

    The text is never empty: Triton's C++ client takes an error without text for success.
    """

    grpc_code = "INTERNAL"
    http_status = 500

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        """Make an error that tells the caller ``text`` and, where that is known, when to return.

        ``retry_after_s`` travels as ``grpc-retry-pushback-ms`` and ``Retry-After``: before it the
        same request will meet the same end. ``math.inf``: it should not be made again.
        """
        super().__init__(text or f"{type(self).__name__}: no further information")
        self.retry_after_s = retry_after_s


class BadRequest(InferenceError):
    """The caller's fault: the same request will fail again."""

    grpc_code, http_status = "INVALID_ARGUMENT", 400


class TooLarge(BadRequest):
    """Longer than this server reads: send less at once."""

    http_status = 413


class AlreadyExists(InferenceError):
    """The name is taken: remove what has it first, or choose another."""

    grpc_code, http_status = "ALREADY_EXISTS", 409


class Unauthenticated(InferenceError):
    """The caller must say who it is."""

    grpc_code, http_status = "UNAUTHENTICATED", 401


class Forbidden(InferenceError):
    """The caller is known and may not do this."""

    grpc_code, http_status = "PERMISSION_DENIED", 403


class NotFound(InferenceError):
    """There is no such model or version here."""

    grpc_code, http_status = "NOT_FOUND", 404


class Overloaded(InferenceError):
    """Too much is waiting already: come back later."""

    grpc_code, http_status = "RESOURCE_EXHAUSTED", 429


class Unsupported(InferenceError):
    """The protocol knows this, this server does not."""

    grpc_code, http_status = "UNIMPLEMENTED", 501


class Unavailable(InferenceError):
    """Nobody can answer at the moment: another server, or the same one later, may."""

    grpc_code, http_status = "UNAVAILABLE", 503


class DeadlineExceeded(InferenceError):
    """The caller's time ran out before there was an answer."""

    grpc_code, http_status = "DEADLINE_EXCEEDED", 504


class ServerFault(InferenceError):
    """The server's own fault, its log knows more."""


ERRORS: Mapping[str, type[InferenceError]] = {
    error.grpc_code: error
    for error in (
        BadRequest, AlreadyExists, Unauthenticated, Forbidden, NotFound, Overloaded, Unsupported,
        Unavailable, DeadlineExceeded, ServerFault,
    )
}  # fmt: skip
