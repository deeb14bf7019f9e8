"""An engine in front of a fake hub over real gRPC, which the tests take away and bring back."""

import asyncio
import datetime
import ipaddress
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub.engines import upstream as module
from cloud_hub.engines.engine import DIGEST, EngineLost
from cloud_hub.engines.upstream import Upstream, UpstreamEngine
from cloud_hub.errors import ModelRefused, UpstreamDown
from cloud_hub.fleet.callers import Caller
from cloud_hub.inference.admission import Callers, admitting
from cloud_hub.metrics import Metrics
from fogline_protocol import grpc_service, grpc_transport, grpcio_door
from fogline_protocol.errors import (
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    Overloaded,
    ServerFault,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from fogline_protocol.tensors import TensorSpec
from tests.fakes import HUB_DIGEST, HUB_MODEL, FakeHub, Serving, Valve

X = {"x": np.ones((2, 3), np.float32)}


class Hub(FakeHub):
    """A fake hub that names its digest in the metadata, as a real one, and notes deadlines."""

    def __init__(self):
        super().__init__()
        self.in_metadata = True
        self.width = 3
        self.deadlines = []

    def model_metadata(self, name, version):
        found = super().model_metadata(name, version)
        properties = {DIGEST: self.digest} if self.in_metadata else {}
        return replace(
            found, properties=properties, inputs=(TensorSpec("x", "FP32", (-1, self.width)),)
        )

    async def infer(self, request, deadline):
        self.deadlines.append(deadline)
        return await super().infer(request, deadline)


async def returned(engine):
    """Wait until it can run; that it was lost meanwhile it says once."""
    while True:
        try:
            return await engine.ready()
        except EngineLost:
            assert engine.trouble


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "MAX_WAIT_S", 0.05)
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.001)


@pytest.fixture
def hub():
    return Hub()


@pytest.fixture
async def door(hub):
    async with Serving(hub) as door:
        yield door


@pytest.fixture
async def engine(door):
    engine = await UpstreamEngine.start(Upstream(door.address, HUB_MODEL))
    yield engine
    await engine.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_it_learns_what_its_model_is(engine, door):
    assert [(s.name, s.shape) for s in engine.inputs] == [("x", (-1, 3))]
    assert [(s.name, s.shape) for s in engine.outputs] == [("logits", (-1, 3))]
    assert engine.max_batch == 64
    assert engine.provider == f"upstream grpc://{door.address}"
    assert engine.digest == HUB_DIGEST


async def test_every_row_carries_the_digest_of_what_computed_it(engine, hub):
    outputs = await engine.run(X)
    np.testing.assert_array_equal(outputs["logits"], X["x"] + 100)
    assert outputs[DIGEST].tolist() == [HUB_DIGEST.encode()] * 2
    hub.digest = "c" * 64
    assert (await engine.run(X))[DIGEST].tolist() == [b"c" * 64] * 2
    assert engine.digest == "c" * 64


async def test_a_digest_that_nobody_names_is_not_known(door, hub):
    hub.in_metadata = False
    hub.digest = ""
    engine = await UpstreamEngine.start(Upstream(door.address, HUB_MODEL))
    assert (await engine.run(X))[DIGEST].tolist() == [b"", b""]
    assert engine.digest == ""
    await engine.close()


async def test_a_new_digest_is_learnt_without_a_request(engine, hub, monkeypatch):
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    engine._doubted.set()  # so that the new interval is in force
    hub.digest = "d" * 64
    await until(lambda: engine.digest == "d" * 64)


async def test_an_upstream_that_is_unavailable_once_is_asked_once_more(engine, hub):
    hub.errors = [Unavailable("just then")]
    np.testing.assert_array_equal((await engine.run(X))["logits"], X["x"] + 100)
    assert engine.retries == 1
    hub.errors = [Unavailable("just then"), Unavailable("again")]
    with pytest.raises(EngineLost, match=r"upstream grpc://.*model 'judge': again"):
        await engine.run(X)
    assert engine.retries == 2


async def test_retries_end_with_their_budget(engine, hub):
    hub.error = Unavailable("always")
    for _ in range(30):
        with pytest.raises(EngineLost, match="always"):
            await engine.run(X)
    assert len(hub.requests) == 30 + engine.retries
    assert engine.retries <= 10 + 3


async def test_what_was_refused_for_its_values_or_for_load_is_passed_on_and_not_retried(
    engine, hub
):
    for error in (BadRequest("nan"), Overloaded("full"), ServerFault("broken")):
        hub.error = error
        with pytest.raises(type(error), match=str(error)):
            await engine.run(X)
        assert engine.trouble == ""
    assert len(hub.requests) == 3


@pytest.mark.parametrize("kind", [NotFound, Forbidden, Unauthenticated, Unsupported])
async def test_what_our_operator_must_repair_is_not_blamed_on_the_caller(engine, hub, kind):
    hub.errors = [kind("because")]
    with pytest.raises(EngineLost, match=f"{kind.grpc_code}: because"):
        await engine.run(X)
    assert len(hub.requests) == 1
    await engine.run(X)


async def test_the_time_that_is_left_travels_along(engine, hub):
    await engine.run(X)
    await engine.run(X, time.monotonic() + 2)
    unlimited, limited = (deadline - time.monotonic() for deadline in hub.deadlines)
    assert 25 < unlimited < 31  # gRPC rounds what travels
    assert limited < 3
    hub.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await engine.run(X, time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceeded, match="before the upstream was asked"):
        await engine.run(X, time.monotonic() - 1)
    assert engine.trouble == ""
    assert len(hub.requests) == 3


async def test_an_upstream_that_hangs_costs_its_batch_only(door, hub):
    engine = await UpstreamEngine.start(Upstream(door.address, HUB_MODEL, timeout_s=0.1))
    hub.gate.clear()
    with pytest.raises(EngineLost, match=r"no answer within 100 ms \(timeout_ms\)"):
        await engine.run(X)
    assert len(hub.requests) == 1
    hub.gate.set()
    await engine.run(X)
    await engine.close()


async def test_one_that_is_killed_fails_at_once_and_is_back_by_itself(engine, door, hub):
    hub.gate.clear()
    in_flight = asyncio.create_task(engine.run(X))
    await until(lambda: hub.requests)
    await door.stop()
    with pytest.raises(EngineLost):
        await in_flight
    with pytest.raises(EngineLost, match="it is being tried again"):
        await engine.run(X)
    assert engine.trouble
    assert not engine._up.is_set()
    hub.gate.set()
    await door.start()
    await asyncio.wait_for(returned(engine), 20)
    assert engine.trouble == ""
    await engine.run(X)


async def test_one_that_is_not_ready_any_more_is_left_alone_until_it_is(engine, hub, monkeypatch):
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    hub.gate.clear()
    in_flight = asyncio.create_task(engine.run(X))
    await until(lambda: hub.requests)
    engine._doubted.set()
    hub.ready = False
    await until(lambda: "not ready there" in engine.trouble)
    hub.gate.set()
    assert (await in_flight)["logits"].shape == (2, 3)  # who drains still answers
    hub.ready = True
    await asyncio.wait_for(returned(engine), 20)


async def test_a_new_contract_is_not_served_in_place_of_the_old(engine, hub, monkeypatch):
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    engine._doubted.set()
    hub.width = 4
    await until(lambda: "its contract is now x FP32 [-1, 4]" in engine.trouble)
    with pytest.raises(EngineLost, match="load the model again"):
        await engine.run(X)
    hub.width = 3
    await asyncio.wait_for(returned(engine), 20)


async def test_packets_that_vanish_cost_a_check_and_a_new_connection(door, monkeypatch):
    monkeypatch.setattr(module, "PROBE_S", 0.2)
    async with Valve(door.address) as valve:
        engine = await UpstreamEngine.start(Upstream(valve.address, HUB_MODEL, timeout_s=0.2))
        valve.shut()
        with pytest.raises(EngineLost):
            await engine.run(X)
        await until(lambda: engine.trouble)
        valve.open()
        await asyncio.wait_for(returned(engine), 20)
        await engine.run(X)
        sent = engine.bytes_sent
        assert sent > 2 * X["x"].nbytes
        assert engine.bytes_received > 0
        await engine.close()
        assert engine.bytes_sent == sent  # of closed connections too


async def test_an_answer_that_does_not_fit_the_contract_is_a_fault(engine, hub):
    hub.answer = lambda inputs: {"logits": inputs["x"][:, :2]}
    with pytest.raises(ServerFault, match=r"output 'logits' of its answer: expected shape"):
        await engine.run(X)


async def test_an_upstream_without_the_model_is_down(door):
    with pytest.raises(UpstreamDown, match="no model 'nobody' here"):
        await UpstreamEngine.start(Upstream(door.address, "nobody"))


async def test_one_that_nobody_listens_at_is_down(door):
    await door.stop()
    with pytest.raises(UpstreamDown, match=f"upstream grpc://{door.address}, model 'judge'"):
        await UpstreamEngine.start(Upstream(door.address, HUB_MODEL))


@pytest.mark.parametrize(
    ("pushback", "retries"), [("0", 1), ("-1", 0), ("soon", 0), ("60000", 0), (None, 1)]
)
async def test_a_server_says_itself_when_it_may_be_asked_again(engine, door, pushback, retries):
    async def shed(_data, context):
        trailing = () if pushback is None else (("grpc-retry-pushback-ms", pushback),)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "shedding", trailing)

    await door.stop()
    server = grpcio_door.new_server()
    contract = grpcio_door.handler(grpc_service.methods(Hub()))

    class Shedding(grpc.GenericRpcHandler):
        def service(self, details):
            if details.method.endswith("/ModelInfer"):
                return grpc.unary_unary_rpc_method_handler(shed)
            return contract.service(details)

    server.add_generic_rpc_handlers((Shedding(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    other = await UpstreamEngine.start(Upstream(f"127.0.0.1:{port}", HUB_MODEL))
    with pytest.raises(EngineLost, match="shedding") as caught:
        await other.run(X)
    assert other.retries == retries
    expected = {"0": 0, "-1": float("inf"), "soon": float("inf"), "60000": 60, None: None}
    assert caught.value.retry_after_s == expected[pushback]
    await other.close()
    await server.stop(None)


def outside(file):
    raise ModelRefused(f"{file} is a link that leaves")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "'url' of an upstream must be like grpc://127.0.0.1:8001, got ''"),
        ({"url": "http://127.0.0.1:1"}, "neither grpc:// nor grpcs://"),
        ({"url": "grpc://127.0.0.1"}, "is not HOST:PORT"),
        ({"url": "grpc://127.0.0.1:0"}, "port 0"),
        ({"url": "grpc://10.0.0.1:1"}, "is another machine: use grpcs://"),
        ({"url": "grpc://10.0.0.1:1", "plaintext": "yes"}, "can only be 'allowed', got 'yes'"),
        ({"url": "grpc://127.0.0.1:1", "token_file": "t"}, "token_file need TLS"),
        ({"url": "grpc://127.0.0.1:1", "version": "v1"}, "'version' must be a whole number"),
        ({"url": "grpc://127.0.0.1:1", "timeout_ms": "0"}, "'timeout_ms' must be whole"),
        ({"url": "grpc://127.0.0.1:1", "token": "x"}, r"unknown parameters \['token'\]"),
        ({"url": "grpcs://10.0.0.1:1", "token_file": "../t"}, "leaves"),
    ],
)
def test_a_configuration_that_cannot_be_obeyed_says_what_to_change(parameters, text):
    with pytest.raises(ModelRefused, match=text):
        Upstream.parse("m", parameters, outside)


def test_what_is_left_out_follows_from_the_name(tmp_path):
    found = Upstream.parse("m", {"url": "grpc://127.0.0.1:1"}, outside)
    assert found == Upstream("127.0.0.1:1", "m")
    found = Upstream.parse(
        "m",
        {
            "url": "grpcs://triton.example:8001", "model": "theirs", "version": "007",
            "token_file": "token", "ca_file": "ca.pem", "timeout_ms": "1500",
        },
        tmp_path.joinpath,
    )  # fmt: skip
    assert found == Upstream(
        "triton.example:8001", "theirs", "7", True, tmp_path / "token", tmp_path / "ca.pem", 1.5
    )
    assert found.url == "grpcs://triton.example:8001"
    plain = {"url": "grpc://10.0.0.1:1", "plaintext": "allowed"}
    assert not Upstream.parse("m", plain, outside).tls


def self_signed():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "upstream")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


async def test_over_tls_it_shows_its_token_and_reads_a_renewed_one(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    key, pem = self_signed()
    valid = {"first"}

    async def authenticate(token):
        return Caller("default", "", "id") if token in valid else None

    callers = Callers(authenticate, required=True, metrics=Metrics())
    token, ca, private = tmp_path / "token", tmp_path / "ca.pem", tmp_path / "key.pem"
    ca.write_bytes(pem)
    private.write_bytes(key)
    door = grpc_transport.new_door("http2", grpc_service.methods(hub), admit=admitting(callers))
    port = await door.listen("127.0.0.1", 0, grpc_transport.Pair(ca, private))
    where = Upstream(
        f"127.0.0.1:{port}", HUB_MODEL, tls=True, token_file=token, ca_file=ca, timeout_s=5
    )
    with pytest.raises(UpstreamDown, match="token: No such file"):
        await UpstreamEngine.start(where)
    token.write_text("wrong\n")
    with pytest.raises(UpstreamDown, match="the token is unknown"):
        await UpstreamEngine.start(where)
    token.write_text("first\n")
    engine = await UpstreamEngine.start(where)
    await engine.run(X)
    valid = {"second"}
    await until(lambda: "the token is unknown" in engine.trouble)
    token.write_bytes(b"\xff")
    await until(lambda: "it is not ASCII" in engine.trouble)
    token.write_text("")
    await until(lambda: "is empty" in engine.trouble)
    token.write_text("second\n")
    await asyncio.wait_for(returned(engine), 20)
    await engine.run(X)
    await engine.close()
    await door.stop(0.0)
