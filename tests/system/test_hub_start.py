"""Starting a hub: what it refuses, in which words, and what it lets in."""

import asyncio
import datetime
import ipaddress
import json
import socket

import aiohttp
import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deploy.demo.fleet import script
from fogline_protocol.client import Client, Credentials
from fogline_protocol.errors import Unauthenticated
from fogline_protocol.inference import InferRequest

pytestmark = pytest.mark.system

IMAGE = {"image": np.zeros((1, 1, 8, 8), np.float32)}


async def fogline(*arguments, cwd=None):
    """Run the command to its end and return exit code, output and error text."""
    process = await asyncio.create_subprocess_exec(
        script("fogline"), *map(str, arguments), cwd=cwd,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def test_a_port_in_use_is_named_with_the_way_out(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for door in ("--grpc", "--http"):
            other = "--http" if door == "--grpc" else "--grpc"
            code, _, err = await fogline(
                "serve", "--data", tmp_path / "hub", door, address, other, "127.0.0.1:0"
            )
            assert code == 3
            assert f"cannot listen on {address}" in err
            assert door in err
            assert "Traceback" not in err


async def test_two_hubs_never_share_a_data_directory(make_hub, tmp_path):
    await make_hub()
    code, _, err = await fogline(
        "serve", "--data", tmp_path / "hub", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"
    )
    assert code == 3
    assert "is in use by another hub" in err
    # The refused one must not have taken the running one's addresses away.
    assert "grpc" in json.loads((tmp_path / "hub" / "endpoints.json").read_text())


async def test_options_that_cannot_be_are_refused_before_anything_starts(tmp_path):
    file = tmp_path / "hub.toml"
    file.write_text("max_bach = 3\n")
    code, _, err = await fogline("serve", "--config", file, "--data", tmp_path / "hub")
    assert code == 2
    assert "did you mean 'max_batch'" in err
    code, _, err = await fogline("serve", "--data", tmp_path / "hub", "--grpc", "0.0.0.0:0")
    assert code == 2
    assert "--tls-cert" in err
    assert not (tmp_path / "hub").exists()


async def test_the_http_door_serves_inference_health_metrics_and_console(make_hub):
    hub = await make_hub()
    base = f"http://{hub.endpoints['http']}"
    body = {
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0.0] * 64}]
    }
    async with aiohttp.ClientSession(base) as session:
        async with session.post("/v2/models/digits-hub/infer", json=body) as answer:
            assert answer.status == 200
            assert (await answer.json())["parameters"]["fogline.tier"] == "hub"
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/", 200), ("/v2", 200)):
            async with session.get(path) as answer:
                assert answer.status == status
        async with session.get("/metrics") as answer:
            assert "fogline_hub_requests_total" in await answer.text()
        # A page that points its own name at this machine sees none of it.
        for path in ("/", "/v2", "/metrics", "/readyz"):
            async with session.get(path, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 421
    await hub.stop()
    assert not (hub.data / "endpoints.json").exists()


@pytest.fixture
def tls(tmp_path):
    """A self-signed pair for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "cert.pem").write_bytes(pem)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return tmp_path / "cert.pem", tmp_path / "key.pem", pem


async def test_files_that_are_no_tls_pair_are_named_and_not_the_port(tls, tmp_path):
    cert, key, _ = tls
    key.write_text("no key")
    code, _, err = await fogline(
        "serve", "--data", tmp_path / "hub", "--tls-cert", cert, "--tls-key", key,
        "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
    )  # fmt: skip
    assert code == 3
    assert f"{cert} and {key} are no TLS pair" in err


@pytest.mark.parametrize("fronts", [0, 1])
async def test_doors_that_others_can_reach_let_only_known_callers_in(
    make_hub, tls, tmp_path, processes, fronts
):
    cert, key, pem = tls
    options = ("--tls-cert", str(cert), "--tls-key", str(key))
    code, _, err = await fogline(
        "serve", "--data", tmp_path / "hub", *options, "--grpc", "0.0.0.0:0"
    )
    assert code == 3
    assert "fogline token create" in err

    code, token, _ = await fogline("token", "create", "--data", tmp_path / "hub", "--label", "x")
    assert code == 0
    options += ("--front-processes", str(fronts))
    hub = await make_hub(*options, grpc="0.0.0.0:0", http="0.0.0.0:0")
    target = hub.endpoints["grpc"].replace("0.0.0.0", "127.0.0.1")
    base = "https://" + hub.endpoints["http"].replace("0.0.0.0", "127.0.0.1")

    known = Client(target, credentials=Credentials(pem, token.strip()))
    processes.push_async_callback(known.close)
    assert (await known.infer(InferRequest("digits-hub", IMAGE), 10)).outputs
    for wrong in ("", "fgl_wrong"):
        stranger = Client(target, credentials=Credentials(pem, wrong))
        processes.push_async_callback(stranger.close)
        with pytest.raises(Unauthenticated, match="fogline token create"):
            await stranger.infer(InferRequest("digits-hub", IMAGE), 10)
        # Probes have no tokens, and learn nothing but whether the hub is ready.
        assert await stranger.call("/grpc.health.v1.Health/Check", b"", 10)
    async with grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(pem)) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(
            timeout=10
        )
        with pytest.raises(grpc.aio.AioRpcError, match="fogline token create"):
            await stream.read()  # before it has sent anything

    async with aiohttp.ClientSession(base) as session:
        bearer = {"Authorization": f"Bearer {token.strip()}"}
        for path in ("/v2/models/digits-hub", "/metrics"):
            async with session.get(path, ssl=False) as answer:
                assert answer.status == 401
            async with session.get(path, ssl=False, headers=bearer) as answer:
                assert answer.status == 200
        async with session.get("/v2/health/ready", ssl=False) as answer:
            assert answer.status == 200

    code, listed, _ = await fogline("token", "list", "--data", tmp_path / "hub", "--json")
    (entry,) = json.loads(listed)
    assert entry["label"] == "x"
    assert token.strip() not in listed
    code, _, _ = await fogline("token", "revoke", "--data", tmp_path / "hub", entry["id"])
    assert code == 0
