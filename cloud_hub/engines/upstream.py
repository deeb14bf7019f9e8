"""An engine that is another server: Triton, KServe, another hub, anything of the protocol.

    start ─► asked for the contract ─► up ◄──────────────────────────┐
                └─ no answer: UpstreamDown     │                     │ an answer, same contract
                          a run failed, or a check ─► doubted ─ asked ┤
                                                        ▲             │ none: in trouble
                                                        └─ ever later ┘

A run that meets ``UNAVAILABLE`` is made once more if the budget (``retry_budget.py``) has a retry
left. The first attempt may have been executed all the same: inference changes nothing at the
server, so twice costs time and no more. While the upstream is in trouble runs fail at once, so
that callers turn elsewhere instead of waiting for a machine that may be gone.

What a caller is told of an upstream's refusal: the fault of its own values, that too much is
asked, that time is up and a failure of the model are passed on as they are. That the upstream
does not know us, or the model, is our operator's to repair and not the caller's, so it reads
``UNAVAILABLE`` with the reason.

What passes through of an answer's ``fogline.*`` parameters is the digest of the model that
computed it, for every row (``engine.DIGEST``): a device holds it against its certificate. All
others are said by this hub of itself. A server that names no digest (Triton) leaves it unknown.
"""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from cloud_hub.config import is_loopback, split_address
from cloud_hub.engines.engine import DIGEST, Arrays, EngineLost, join
from cloud_hub.engines.retry_budget import RetryBudget
from cloud_hub.errors import ModelRefused, UpstreamDown
from fogline_protocol import tensors
from fogline_protocol.client import Client, Credentials
from fogline_protocol.errors import (
    DeadlineExceeded,
    Forbidden,
    InferenceError,
    NotFound,
    ServerFault,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from fogline_protocol.inference import InferRequest, InferResponse
from fogline_protocol.tensors import TensorError, TensorSpec

CHECK_S = 5.0  # between two checks of an upstream that answers
PROBE_S = 5.0  # for one check: a hub may be busy with a batch
FIRST_WAIT_S = 0.25  # before the second check of one that does not answer; doubles
MAX_WAIT_S = 10.0
RETRY_PAUSE_S = 0.1  # before a retry: gRPC opens a broken connection anew after as long
MAX_PAUSE_S = 1.0  # a server that wants to be left alone for longer is not waited for

_PARAMETERS = ("url", "model", "version", "token_file", "ca_file", "timeout_ms", "plaintext")
_SCHEMES = {"grpc": False, "grpcs": True}  # whether over TLS

# Refusals that our configuration or the upstream's is the reason for.
_NOT_THE_CALLERS = (Unauthenticated, Forbidden, NotFound, Unsupported)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a model really runs."""

    address: str  # HOST:PORT
    model: str
    version: str = ""  # asked for; empty: the upstream chooses
    tls: bool = False
    token_file: Path | None = None
    ca_file: Path | None = None  # None: the system's authorities
    timeout_s: float = 30.0  # of one run, a retry included

    @property
    def url(self) -> str:
        """Where it is, as it is configured."""
        return f"{'grpcs' if self.tls else 'grpc'}://{self.address}"

    @classmethod
    def parse(
        cls, name: str, parameters: Mapping[str, str], locate: Callable[[str], Path]
    ) -> "Upstream":
        """Read the ``parameters`` of a model's ``config.pbtxt``.

        Args:
            name: of the model, here and, unless they say otherwise, there.
            parameters: ``url`` and any other of those this file knows.
            locate: returns the path of a file that the folder of the model names, or raises
                ``ModelRefused``.

        Raises:
            ModelRefused: they cannot be obeyed; the text says what to change.
        """
        unknown = sorted(parameters.keys() - set(_PARAMETERS))
        if unknown:
            raise ModelRefused(
                f"unknown parameters {unknown} of an upstream, known are {', '.join(_PARAMETERS)}"
            )
        scheme, separator, address = parameters.get("url", "").partition("://")
        try:
            if not separator or scheme not in _SCHEMES:
                raise ValueError("it starts with neither grpc:// nor grpcs:// (over TLS)")
            _, port = split_address(address)
            if port == 0:
                raise ValueError("port 0 is nobody's")
        except ValueError as error:
            raise ModelRefused(
                f"parameter 'url' of an upstream must be like grpc://127.0.0.1:8001, got "
                f"{parameters.get('url', '')!r}: {error}"
            ) from None
        tls = _SCHEMES[scheme]
        plaintext = parameters.get("plaintext", "")
        if plaintext not in ("", "allowed"):
            raise ModelRefused(f"parameter 'plaintext' can only be 'allowed', got {plaintext!r}")
        if not tls and not is_loopback(address) and not plaintext:
            raise ModelRefused(
                f"the upstream {address} is another machine: use grpcs://, or say that everything "
                "may be read and changed on the way with the parameter plaintext: 'allowed'"
            )
        files = {key: parameters[key] for key in ("token_file", "ca_file") if key in parameters}
        if files and not tls:
            raise ModelRefused(f"{' and '.join(files)} need TLS: use grpcs://")
        version = parameters.get("version", "")
        if version and not version.isdecimal():
            raise ModelRefused(f"parameter 'version' must be a whole number, got {version!r}")
        version = version and str(int(version))
        timeout = parameters.get("timeout_ms", "30000")
        if not timeout.isdecimal() or int(timeout) == 0:
            raise ModelRefused(
                f"parameter 'timeout_ms' must be whole milliseconds from 1 on, got {timeout!r}"
            )
        located = {key: locate(file) for key, file in files.items()}
        return cls(
            address,
            parameters.get("model", "") or name,
            version,
            tls,
            located.get("token_file"),
            located.get("ca_file"),
            int(timeout) / 1e3,
        )

    def credentials(self) -> Credentials | None:
        """Read what a connection needs: each time anew, because tokens are renewed.

        Raises:
            Unavailable: a file cannot be read, or does not hold what it should.
        """
        if not self.tls:
            return None
        pem = None if self.ca_file is None else _content(self.ca_file)
        token = ""
        if self.token_file is not None:
            try:
                token = _content(self.token_file).decode("ascii").strip()
            except UnicodeDecodeError:
                raise Unavailable(f"{self.token_file} holds no token: it is not ASCII") from None
        return Credentials(pem, token)


class _Contract(NamedTuple):
    """What must not change while an engine stands for the upstream."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int | None

    def __str__(self) -> str:
        specs = (*self.inputs, *self.outputs)
        each = ", ".join(f"{s.name} {s.datatype} {list(s.shape)}" for s in specs)
        return f"{each}, at most {self.max_batch} rows" if self.max_batch else each


class UpstreamEngine:
    """A model of another server. Used on one event loop; runs may overlap.

    Owner of the connection and of the task that watches it. ``_settled`` is not set while it is
    being found out whether the upstream still answers.
    """

    platform = "upstream"

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._budget = RetryBudget()
        self._contract = _Contract((), (), None)
        self._settled = asyncio.Event()
        self._up = asyncio.Event()
        self._doubted = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._client: Client | None = None  # None: before the first, and while files are missing
        self._sent = self._received = 0  # by connections that are closed
        self.provider = f"upstream {upstream.url}"
        self.trouble = ""
        self._told = False  # whoever waits to run knows of the trouble
        self.digest = ""
        self.memory_bytes = 0
        self.retries = 0

    def __repr__(self) -> str:
        return f"<UpstreamEngine {self._upstream.model} at {self._upstream.url} {self.trouble or 'up'}>"

    @classmethod
    async def start(cls, upstream: Upstream) -> "UpstreamEngine":
        """Return an engine that knows the contract of its model.

        Raises:
            UpstreamDown: there is no answer, or none that can be served.
        """
        engine = cls(upstream)
        try:
            engine._contract = await engine._ask()
        except InferenceError as error:
            await engine._disconnect()
            raise UpstreamDown(engine._says(str(error))) from None
        except BaseException:
            await engine._disconnect()
            raise
        engine._recovered()
        engine._watcher = asyncio.create_task(engine._watch(), name="watch-upstream")
        engine._watcher.add_done_callback(_report)
        return engine

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it takes; see ``Contract``."""
        return self._contract.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it gives; see ``Contract``."""
        return self._contract.outputs

    @property
    def max_batch(self) -> int | None:
        """How many rows the upstream takes at once; 0: no rows, None: it does not say."""
        return self._contract.max_batch

    @property
    def bytes_sent(self) -> int:
        """In messages to the upstream so far."""
        return self._sent + (self._client.bytes_sent if self._client else 0)

    @property
    def bytes_received(self) -> int:
        """In messages of the upstream so far."""
        return self._received + (self._client.bytes_received if self._client else 0)

    async def ready(self) -> None:
        """Return when the upstream answers; see ``Engine``.

        Raises:
            EngineLost: it was lost. Called again, it waits for its return.
        """
        await self._settled.wait()
        if self.trouble and not self._told:
            self._told = True
            raise EngineLost(self.trouble)
        await self._up.wait()

    def join(self, requests: Sequence[Arrays]) -> Arrays:
        """Return the rows of several requests one after the other; see ``Engine``."""
        return join(requests)

    async def run(self, inputs: Arrays, deadline: float | None = None) -> Arrays:
        """Return every output and ``DIGEST``; see ``Engine``.

        Raises:
            EngineLost: the upstream does not answer, or not for us.
            InferenceError: it refused, failed, or the deadline passed.
        """
        finish = time.monotonic() + self._upstream.timeout_s
        if deadline is not None:
            finish = min(finish, deadline)
        await self._settled.wait()  # as long as a check at most
        if self.trouble:
            raise EngineLost(self.trouble)
        self._budget.request()
        request = InferRequest(self._upstream.model, inputs, self._upstream.version)
        try:
            try:
                response = await self._attempt(request, finish, deadline)
            except EngineLost:
                raise
            except Unavailable as error:
                pause_s = _pause_s(error)
                if time.monotonic() + pause_s >= finish or not self._budget.take():
                    raise
                await asyncio.sleep(pause_s)
                self.retries += 1
                response = await self._attempt(request, finish, deadline)
        except Unavailable as error:
            self._doubt()
            raise EngineLost(
                str(error) if isinstance(error, EngineLost) else self._says(str(error)),
                retry_after_s=error.retry_after_s,
            ) from None
        return self._checked(response, inputs)

    async def close(self) -> None:
        """Disconnect."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._disconnect()

    async def _attempt(
        self, request: InferRequest, finish: float, deadline: float | None
    ) -> InferResponse:
        timeout_s = finish - time.monotonic()
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before the upstream was asked")
        if self._client is None:
            raise Unavailable("there is no connection")
        try:
            return await self._client.infer(request, timeout_s)
        except DeadlineExceeded as error:
            if finish == deadline:
                raise
            limit_ms = self._upstream.timeout_s * 1e3
            raise EngineLost(
                self._says(f"no answer within {limit_ms:g} ms (timeout_ms): {error}")
            ) from None
        except _NOT_THE_CALLERS as error:
            raise EngineLost(self._says(f"{error.grpc_code}: {error}")) from None

    def _checked(self, response: InferResponse, inputs: Arrays) -> Arrays:
        """Return the outputs of an answer with the digest of what computed them."""
        outputs = dict(response.outputs)
        expected = [spec.name for spec in self.outputs]
        if sorted(outputs) != sorted(expected):
            raise ServerFault(
                self._says(f"its answer has the outputs {sorted(outputs)}, expected {expected}")
            )
        for spec in self.outputs:
            problem = spec.mismatch(outputs[spec.name])
            if problem is not None:
                raise ServerFault(self._says(f"output {spec.name!r} of its answer: {problem}"))
        found = response.parameters.get(DIGEST)
        digest = found if isinstance(found, str) else ""
        if self.digest and digest:  # where the metadata name one, an answer is the newer word
            self.digest = digest
        first = next(iter(inputs.values()), None)
        rows = 1 if first is None or not first.ndim else len(first)
        outputs[DIGEST] = np.full(rows, digest.encode(), tensors.BYTES)
        return outputs

    def _says(self, text: str) -> str:
        return f"upstream {self._upstream.url}, model {self._upstream.model!r}: {text}"

    def _doubt(self) -> None:
        """A run has failed: have the upstream checked before the next one."""
        if self.trouble:
            return  # it is being watched for its return
        self._settled.clear()
        self._doubted.set()

    async def _watch(self) -> None:
        """Check the upstream now and then, and when it is in doubt, until cancelled."""
        wait_s = FIRST_WAIT_S
        while True:
            if self.trouble:
                # Not in step with the other hubs that wait for it.
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, MAX_WAIT_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_S):
                        await self._doubted.wait()
                wait_s = FIRST_WAIT_S
            self._doubted.clear()
            try:
                contract = await self._ask()
                if contract != self._contract:
                    raise Unavailable(
                        f"its contract is now {contract}; it was {self._contract}: load the model "
                        "again, or start the hub again, to serve the new one"
                    )
            except InferenceError as error:
                self._in_trouble(str(error))
                # Packets vanish, which TCP takes long to find out; or the token has been renewed.
                # Otherwise the connection stays: who drains still finishes what is in flight.
                if isinstance(error, DeadlineExceeded | Unauthenticated):
                    await self._disconnect()
            else:
                self._recovered()

    async def _ask(self) -> _Contract:
        """Return the contract of a model that is ready, and learn the digest of what computes it.

        Raises:
            InferenceError: the model cannot be served from there at the moment.
        """
        if self._client is None:
            credentials = await asyncio.to_thread(self._upstream.credentials)
            self._client = Client(self._upstream.address, credentials=credentials)
        client, model, version = self._client, self._upstream.model, self._upstream.version
        if not await client.model_ready(model, version, PROBE_S):
            raise Unavailable("the model is not ready there")
        metadata = await client.model_metadata(model, version, PROBE_S)
        max_batch: int | None
        try:
            max_batch = await client.max_batch_size(model, version, PROBE_S)
        except Unsupported:
            max_batch = None
        for spec in (*metadata.inputs, *metadata.outputs):
            try:
                tensors.dtype_of(spec.datatype)
            except TensorError as error:
                raise ServerFault(f"tensor {spec.name!r}: {error}") from None
        if DIGEST in [spec.name for spec in metadata.outputs]:
            raise ServerFault(
                f"the model has an output {DIGEST!r}, which is a name of fogline's own"
            )
        self.digest = metadata.properties.get(DIGEST, "")
        return _Contract(tuple(metadata.inputs), tuple(metadata.outputs), max_batch)

    def _in_trouble(self, why: str) -> None:
        if not self.trouble:
            log.warning("upstream lost", upstream=self._upstream.url, why=why)
        self.trouble = self._says(f"{why}; it is being tried again")
        self._up.clear()
        self._settled.set()

    def _recovered(self) -> None:
        if self.trouble:
            log.info("upstream is back", upstream=self._upstream.url)
        self.trouble = ""
        self._told = False
        self._up.set()
        self._settled.set()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._sent += client.bytes_sent
            self._received += client.bytes_received
            await client.close()


def _pause_s(error: Unavailable) -> float:
    """Return how long to wait before a retry; ``math.inf``: there must be none."""
    if error.retry_after_s is None:
        return RETRY_PAUSE_S * random.uniform(0.5, 1.0)
    return error.retry_after_s if error.retry_after_s <= MAX_PAUSE_S else math.inf


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Unavailable(f"{file}: {error.strerror}") from None
    if not content.strip():
        raise Unavailable(f"{file} is empty")
    return content


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("an upstream is watched no longer", exc_info=task.exception())
