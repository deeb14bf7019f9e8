"""Asks any Open Inference server: the agent's uplink and a hub's upstream engines.

One channel, asynchronous, errors as ``InferenceError`` with the server's wish when to return. Every byte sent and received is
counted, because on a cellular link the bytes are the bill.
"""

import asyncio
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from fogline_protocol import grpc_calls, inference
from fogline_protocol.errors import ERRORS, ServerFault, Unavailable
from fogline_protocol.grpc_service import DEFAULT_MAX_MESSAGE_BYTES, INFER, SERVICE
from fogline_protocol.inference import InferRequest, InferResponse, ModelMetadata
from fogline_protocol.v1 import inference_pb2 as pb

M = TypeVar("M", bound=Message)
MAX_TIMEOUT_S = 86400.0  # centuries overflow gRPC's clock, and would end a call at once


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to reach a server that is not on loopback: its authority, and who we are."""

    ca_pem: bytes | None = None  # None: the system's authorities
    token: str = ""


class Client:
    """A connection to one server. Use it inside one event loop; ``close`` it in the end."""

    def __init__(
        self,
        target: str,
        *,
        credentials: Credentials | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            # Retries and their budget are decided by the caller, which knows the deadline.
            ("grpc.enable_retries", 0),
            # The default back-off of up to two minutes would keep a link that is up again dark.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        self._metadata: tuple[tuple[str, str], ...] = ()
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            secure = grpc.ssl_channel_credentials(root_certificates=credentials.ca_pem)
            self._channel = grpc.aio.secure_channel(target, secure, options)
            if credentials.token:
                self._metadata = (("authorization", f"Bearer {credentials.token}"),)
        self.target = target
        self.bytes_sent = 0
        self.bytes_received = 0

    async def infer(self, request: InferRequest, timeout_s: float | None = None) -> InferResponse:
        """Return the server's answer.

        Raises:
            InferenceError: the server refused, failed, or could not be reached in time.
        """
        data = inference.encode_request(request)
        return inference.decode_response(await self.call(INFER, data, timeout_s))

    async def server_ready(self, timeout_s: float | None = None) -> bool:
        """Return whether the server says it is ready.

        Raises:
            InferenceError: it could not be asked.
        """
        answer = await self.call(f"/{SERVICE}/ServerReady", b"", timeout_s)
        return _parsed(pb.ServerReadyResponse(), answer).ready

    async def model_metadata(
        self, name: str, version: str = "", timeout_s: float | None = None
    ) -> ModelMetadata:
        """Return a model's contract.

        Raises:
            InferenceError: there is no such model, or the server could not be asked.
        """
        request = pb.ModelMetadataRequest(name=name, version=version).SerializeToString()
        return inference.decode_metadata(
            await self.call(f"/{SERVICE}/ModelMetadata", request, timeout_s)
        )

    async def model_ready(
        self, name: str, version: str = "", timeout_s: float | None = None
    ) -> bool:
        """Return whether a model answers now.

        Raises:
            InferenceError: there is no such model, or the server could not be asked.
        """
        request = pb.ModelReadyRequest(name=name, version=version).SerializeToString()
        answer = await self.call(f"/{SERVICE}/ModelReady", request, timeout_s)
        return _parsed(pb.ModelReadyResponse(), answer).ready

    async def max_batch_size(
        self, name: str, version: str = "", timeout_s: float | None = None
    ) -> int:
        """Return how many rows the server takes in one request; 0: rows are nothing to it.

        Raises:
            Unsupported: the server has no ModelConfig, which is Triton's extension.
            InferenceError: there is no such model, or the server could not be asked.
        """
        request = pb.ModelConfigRequest(name=name, version=version).SerializeToString()
        answer = await self.call(f"/{SERVICE}/ModelConfig", request, timeout_s)
        return _parsed(pb.ModelConfigResponse(), answer).config.max_batch_size

    async def call(self, path: str, request: bytes, timeout_s: float | None = None) -> bytes:
        """Make one unary call over bytes.

        Raises:
            InferenceError: any status but OK, translated; ``retry_after_s`` if the server said so.
        """
        if timeout_s is not None:
            timeout_s = min(timeout_s, MAX_TIMEOUT_S)
        self.bytes_sent += len(request)
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(path)
        try:
            answer = await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            # Not by us, who would see a CancelledError: by a server that stops (see
            # ``grpcio_door.stop``). Another one, or the next start of this one, may answer.
            cancelled = error.code() is grpc.StatusCode.CANCELLED
            kind = Unavailable if cancelled else ERRORS.get(error.code().name, ServerFault)
            raise kind(
                error.details() or error.code().name,
                retry_after_s=grpc_calls.retry_after_s(error.trailing_metadata()),
            ) from None
        except grpc.aio.UsageError:
            raise Unavailable("the connection was closed") from None
        except asyncio.CancelledError:
            # ``close`` under a call cancels it, which must not look as if our own task were.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable("the connection was closed") from None
        self.bytes_received += len(answer)
        return answer

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()


def _parsed(message: M, data: bytes) -> M:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ServerFault(f"the server's answer cannot be read: {error}") from None
    return message
