"""Stands behind the hub's doors: finds the model, checks the request, answers.

Every answer says that the hub gave it, and which bytes did: a device holds the digest
against its certificate, because another hub model voids a disagreement certificate.
"""

import asyncio
import time
from importlib import metadata

from cloud_hub.inference.repository import Repository, ServedModel
from cloud_hub.metrics import Metrics
from fogline_protocol import inference
from fogline_protocol.inference import (
    Forbidden,
    InferenceError,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ServerMetadata,
    Unavailable,
)


class HubServer:
    """The hub as an Open Inference server."""

    def __init__(self, name: str, repository: Repository, metrics: Metrics) -> None:
        self._name = name
        self._repository = repository
        self._metrics = metrics
        self.draining = False  # set first on shutdown: callers turn elsewhere before doors close

    def server_metadata(self) -> ServerMetadata:
        """Return who this is; no extension is offered yet."""
        return ServerMetadata(self._name, metadata.version("fogline"))

    def server_ready(self) -> bool:
        """Return whether every model that should be served is."""
        return self._repository.ready and not self.draining

    def model_ready(self, name: str, version: str) -> bool:
        """Return whether the model answers now."""
        try:
            self._repository.find(name, version)
        except Unavailable:
            return False
        return not self.draining

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """Return the contract of a model."""
        model = self._repository.find(name, version)
        return ModelMetadata(
            name=model.name,
            versions=(model.version,),
            platform=model.engine.platform,
            inputs=model.engine.inputs,
            outputs=model.engine.outputs,
            properties={"fogline.digest": model.sha256, "fogline.provider": model.engine.provider},
        )

    async def infer(self, request: InferRequest, deadline: float | None) -> InferResponse:
        """Answer one request.

        Raises:
            Forbidden: it is marked private, so it must never have left its device.
            InferenceError: see the batcher and the checks of the protocol.
        """
        model = self._repository.find(request.model, request.version)
        started = time.monotonic()
        outcome = "internal"
        try:
            answer = await self._answer(model, request, deadline)
            outcome = "ok"
            return answer
        except InferenceError as error:
            outcome = error.grpc_code.lower()
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"  # by its caller, who left
            raise
        finally:
            self._metrics.request_done(
                model.name, model.version, outcome, time.monotonic() - started
            )

    async def _answer(
        self, model: ServedModel, request: InferRequest, deadline: float | None
    ) -> InferResponse:
        private = request.parameters.get("fogline.private", False)
        if not isinstance(private, bool):  # "true" would be a promise broken in silence
            raise inference.BadRequest(f"fogline.private must be true or false, got {private!r}")
        if private:
            raise Forbidden(
                "the request is marked private and must not leave its device: the hub does not answer it"
            )
        inference.check_inputs(model.engine.inputs, request.inputs)
        names = inference.check_outputs(model.engine.outputs, request.outputs)
        rows = {len(array) for array in request.inputs.values()} if model.engine.batches else {1}
        if len(rows) != 1:
            raise inference.BadRequest(f"the inputs disagree on the number of rows: {sorted(rows)}")
        if rows == {0}:
            raise inference.BadRequest("the inputs have no rows")
        outputs = await model.batcher.infer(request.inputs, deadline)
        return InferResponse(
            model=model.name,
            version=model.version,
            id=request.id,
            outputs={name: outputs[name] for name in names},
            parameters={
                "fogline.tier": "hub",
                "fogline.quality": "hub",
                "fogline.reason": "asked",
                "fogline.release": f"{model.name}@{model.version}",
                "fogline.digest": model.sha256,
            },
        )
