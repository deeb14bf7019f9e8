"""What both doors do with a request beside carrying it, and what they offer beside inference."""

from collections.abc import Sequence
from dataclasses import dataclass

from fogline_protocol import classification
from fogline_protocol.inference import InferenceServer, InferRequest, InferResponse
from fogline_protocol.settings import LogSettings, TraceControl
from fogline_protocol.shared_memory import SharedMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """The parts of the protocol that a server may offer; those that are None are refused."""

    shared_memory: SharedMemory | None = None
    trace: TraceControl | None = None
    trace_refusal: str = "traces are not offered by this server"
    logs: LogSettings | None = None

    def advertised(self, extensions: Sequence[str]) -> list[str]:
        """Return the names of ``extensions`` and of what is offered here beside them."""
        offered = {
            "system_shared_memory": self.shared_memory,
            "trace": self.trace,
            "logging": self.logs,
        }
        return [*extensions, *(name for name, part in offered.items() if part is not None)]


NOTHING_EXTRA = Extras()


async def answer(
    server: InferenceServer, request: InferRequest, deadline: float | None
) -> InferResponse:
    """Return the server's answer, its outputs in the form that the caller asked for.

    Raises:
        InferenceError: the server's, an output that has no order, or one that does not fit the
            shared memory it was to be put into.
    """
    response = await server.infer(request, deadline)
    if request.classification:
        config = server.model_config(request.model, request.version)
        response.outputs = classification.apply(
            response.outputs, request.classification, config.labels, batched=config.batches
        )
    if request.places:
        for name, place in request.places.items():
            if name in response.outputs:
                place.put(name, response.outputs[name])
        response.elsewhere = request.places.keys()
    return response
