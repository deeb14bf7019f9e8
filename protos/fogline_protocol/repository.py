"""The model repository extension: what could be served, and asking for more or less of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fogline_protocol.v1 import inference_pb2 as pb

READY = "READY"
UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """One version of a model in a repository, served or not."""

    name: str
    version: str
    state: str  # READY or UNAVAILABLE, Triton's words
    reason: str = ""  # why it is not READY


class ModelControl(Protocol):
    """A server whose repository callers may see and change. May raise ``InferenceError``."""

    def repository_index(self) -> Sequence[ModelIndex]:
        """Return every model, served or not."""
        ...

    async def load_model(self, name: str, parameters: Sequence[str]) -> None:
        """Serve a model, or serve it anew; ``parameters`` are the names of those given."""
        ...

    async def unload_model(self, name: str) -> None:
        """Serve a model no longer."""
        ...


def encode_index(models: Sequence[ModelIndex]) -> bytes:
    """Return the index as a ``RepositoryIndexResponse``."""
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponse.ModelIndex(
                name=m.name, version=m.version, state=m.state, reason=m.reason
            )
            for m in models
        ]
    ).SerializeToString()


def index_document(models: Sequence[ModelIndex]) -> Sequence[Mapping[str, Any]]:
    """Return the index as a JSON-ready document."""
    return [
        {"name": m.name, "version": m.version, "state": m.state, "reason": m.reason} for m in models
    ]


def chosen(models: Sequence[ModelIndex], ready: bool) -> Sequence[ModelIndex]:
    """Return the models asked for: all, or only those that serve."""
    return [model for model in models if model.state == READY or not ready]
