"""What both doors do with a request beside carrying it."""

from fogline_protocol import classification
from fogline_protocol.inference import InferenceServer, InferRequest, InferResponse


async def answer(
    server: InferenceServer, request: InferRequest, deadline: float | None
) -> InferResponse:
    """Return the server's answer, its outputs ranked where the caller asked for classes.

    Raises:
        InferenceError: the server's, or an output that has no order.
    """
    response = await server.infer(request, deadline)
    if request.classification:
        config = server.model_config(request.model, request.version)
        response.outputs = classification.apply(
            response.outputs, request.classification, config.labels, batched=config.batches
        )
    return response
