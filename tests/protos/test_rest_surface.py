"""The REST door beyond JSON inference: raw bytes, compression, statistics, repository."""

import asyncio
import functools
import gzip
import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fogline_protocol.doors import Extras
from fogline_protocol.settings import LogSettings
from fogline_protocol.shared_memory import SharedMemory
from tests.protos.echo import EchoServer, rest_door

ROW = np.array([[0.25, 3.0, -1.0, 3.0]], np.float32)


@pytest.fixture
def echo():
    return EchoServer()


@pytest.fixture
async def address(echo):
    async with rest_door(echo, echo) as address:
        yield address


@pytest.fixture
async def http(address):
    async with aiohttp.ClientSession(f"http://{address}", auto_decompress=False) as session:
        yield session


@pytest.fixture
async def ask(address):
    """Return a function that calls tritonclient, which blocks, in a thread, always the same one."""
    client = triton.InferenceServerClient(address)
    with ThreadPoolExecutor(1) as thread:

        async def call(name, *args, **kwargs):
            work = functools.partial(getattr(client, name), *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(thread, work)

        yield call
        await call("close")


def given(array, name="x", binary=True):
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


ARRAYS = [
    np.array([[True, False]]),
    *(np.array([[1, 2, 3]], dtype) for dtype in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")),
    *(np.array([[0.5, -1.0]], dtype) for dtype in ("f2", "f4", "f8")),
    np.array([[np.inf, np.nan]], np.float32),
    np.array([[b"", b"\xff\x00", b"text"]], dtype=object),
    np.zeros((0, 4), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
async def test_every_datatype_goes_there_and_back_as_bytes(ask, array):
    result = await ask("infer", "echo", [given(array)], request_id="3")
    np.testing.assert_array_equal(result.as_numpy("x"), array)
    assert result.get_response()["id"] == "3"
    assert "data" not in result.get_output("x")


async def test_each_output_leaves_as_it_was_asked_for(ask):
    outputs = [
        triton.InferRequestedOutput("a", binary_data=True),
        triton.InferRequestedOutput("b", binary_data=False),
    ]
    inputs = [given(ROW, "a", binary=False), given(ROW, "b")]
    result = await ask("infer", "echo", inputs, outputs=outputs)
    assert "data" not in result.get_output("a")
    assert result.get_output("b")["data"] == [0.25, 3.0, -1.0, 3.0]
    np.testing.assert_array_equal(result.as_numpy("a"), ROW)


async def test_classification_over_http(ask):
    output = triton.InferRequestedOutput("x", class_count=1)
    result = await ask("infer", "echo", [given(ROW)], outputs=[output])
    assert result.as_numpy("x").tolist() == [[b"3.000000:1:dog"]]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_bodies_are_compressed_both_ways(ask, http, algorithm):
    big = np.zeros((1000, 4), np.float32)
    result = await ask(
        "infer", "echo", [given(big)],
        request_compression_algorithm=algorithm, response_compression_algorithm=algorithm,
    )  # fmt: skip
    np.testing.assert_array_equal(result.as_numpy("x"), big)
    body = json.dumps(
        {"inputs": [{"name": "x", "datatype": "INT64", "shape": [900], "data": [0] * 900}]}
    ).encode()
    packed = gzip.compress(body) if algorithm == "gzip" else zlib.compress(body)
    headers = {"Content-Encoding": algorithm, "Accept-Encoding": algorithm}
    async with http.post("/v2/models/echo/infer", data=packed, headers=headers) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Encoding"] == algorithm
        data = await answer.read()
    data = gzip.decompress(data) if algorithm == "gzip" else zlib.decompress(data)
    assert json.loads(data)["outputs"][0]["shape"] == [900]


async def test_a_body_that_only_claims_to_be_compressed_is_the_callers_fault(http):
    for body in (b"not gzip", gzip.compress(b"{}" * 500)[:-9]):
        async with http.post(
            "/v2/models/echo/infer", data=body, headers={"Content-Encoding": "gzip"}
        ) as answer:
            assert answer.status == 400


async def test_a_small_body_cannot_unpack_into_a_huge_one(http):
    bomb = gzip.compress(b" " * (64 << 20))
    async with http.post(
        "/v2/models/echo/infer", data=bomb, headers={"Content-Encoding": "gzip"}
    ) as answer:
        assert answer.status == 413
        assert "too large" in (await answer.json())["error"]


async def test_header_value_zero_takes_the_whole_body_as_the_only_input(http):
    headers = {"Inference-Header-Content-Length": "0"}
    async with http.post("/v2/models/echo/infer", data=ROW.tobytes(), headers=headers) as answer:
        assert answer.status == 200
        length = int(answer.headers["Inference-Header-Content-Length"])
        data = await answer.read()
    head = json.loads(data[:length])
    assert head["outputs"][0]["shape"] == [1, 4]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert data[length:] == ROW.tobytes()
    async with http.post("/v2/models/echo/infer", data=b"123", headers=headers) as answer:
        assert answer.status == 400
        assert "expected 16 bytes" in (await answer.json())["error"]


HEAD = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]}]}


@pytest.mark.parametrize(
    ("header", "parameters", "extra", "text"),
    [
        ("-1", {}, b"", "must be a number of bytes"),
        ("1e3", {}, b"", "must be a number of bytes"),
        ("99999", {}, b"", "the body has"),
        (None, {"binary_data_size": 16}, b"", "claims 16 bytes"),
        (True, {"binary_data_size": 17}, bytes(16), "claims 17 bytes"),
        (True, {"binary_data_size": 16}, bytes(17), "1 bytes are left over"),
        (True, {"binary_data_size": 12}, bytes(12), "expected 16 bytes"),
        (True, {"binary_data_size": "16"}, bytes(16), "must be a number of bytes"),
        (True, {"shared_memory_region": "r"}, b"", "shared memory is not offered"),
    ],
)
async def test_bytes_that_contradict_their_header_are_refused(
    http, header, parameters, extra, text
):
    document = {"inputs": [{**HEAD["inputs"][0], "parameters": parameters}]}
    body = json.dumps(document).encode()
    headers = {}
    if header is not None:
        value = str(len(body)) if header is True else header
        headers["Inference-Header-Content-Length"] = value
    async with http.post("/v2/models/echo/infer", data=body + extra, headers=headers) as answer:
        assert answer.status in (400, 501)
        assert text in (await answer.json())["error"]


async def test_statistics_are_numbers_and_complete(ask):
    await ask("infer", "echo", [given(ROW)])
    for found in (
        await ask("get_inference_statistics"),
        await ask("get_inference_statistics", "echo"),
        await ask("get_inference_statistics", "echo", "1"),
    ):
        (model,) = found["model_stats"]
        assert set(model["inference_stats"]) == {
            "success", "fail", "queue", "compute_input", "compute_infer", "compute_output",
            "cache_hit", "cache_miss",
        }  # fmt: skip
        assert model["inference_stats"]["queue"] == {"count": 1, "ns": 5}
        for duration in model["inference_stats"].values():
            assert all(type(value) is int for value in duration.values())
        assert type(model["last_inference"]) is int
        assert model["batch_stats"][0]["batch_size"] == 1


async def test_the_configuration_has_numbers_and_flags_where_clients_look(ask):
    config = await ask("get_model_config", "echo")
    assert config["max_batch_size"] == 8
    assert config["input"][0]["dims"] == [4]
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["model_transaction_policy"] == {"decoupled": False}


async def test_the_repository_is_listed_and_asked_over_http(ask, echo, http):
    assert [m["name"] for m in await ask("get_model_repository_index")] == ["echo", "broken"]
    await ask("load_model", "echo")
    await ask("unload_model", "echo")
    assert [call[:2] for call in echo.calls] == [("load", "echo"), ("unload", "echo")]
    async with http.post("/v2/repository/index", json={"ready": True}) as answer:
        assert [m["name"] for m in json.loads(await answer.read())] == ["echo"]
    async with http.post("/v2/repository/index", data=b"[]") as answer:
        assert answer.status == 400


async def test_what_is_not_offered_is_501_and_what_does_not_exist_404(ask, http):
    for name in ("get_system_shared_memory_status", "get_trace_settings", "get_log_settings"):
        with pytest.raises(InferenceServerException, match="not offered") as caught:
            await ask(name)
        assert caught.value.status() == "501"
    for method, path in (("GET", "/v2/nothing"), ("DELETE", "/v2/models/echo")):
        async with http.request(method, path) as answer:
            assert answer.status == 404
            assert path in json.loads(await answer.read())["error"]
    async with (
        rest_door(EchoServer()) as bare,
        aiohttp.ClientSession(f"http://{bare}") as session,
        session.post("/v2/repository/index") as answer,
    ):
        assert answer.status == 501


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parameters": {"triton_x": 1}}, "reserved"),
        ({"parameters": {"priority": -1}}, "priority"),
        ({"parameters": {"n": 1 << 64}}, "64 bits"),
        ({"id": "\ud800"}, "not Unicode text"),
        ({"outputs": [{"name": "x", "parameters": {"classification": 0}}]}, "at least 1"),
        ({"outputs": [{"name": "x", "parameters": {"shared_memory_region": "r"}}]}, "not offered"),
        (
            {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["\udfff"]}]},
            "text",
        ),
    ],
)
async def test_a_request_that_cannot_be_is_refused_by_name(http, change, text):
    body = {"inputs": [{"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}], **change}
    async with http.post("/v2/models/echo/infer", data=json.dumps(body)) as answer:
        assert answer.status in (400, 501)
        assert text in (await answer.json())["error"]


async def test_only_inference_may_have_a_large_body(echo):
    here = SharedMemory(max_request_bytes=1 << 20)
    extras = Extras(shared_memory=here, trace=echo, logs=LogSettings("large", "bodies"))
    head = "POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    async with rest_door(echo, echo, extras) as address:
        for path in (
            "/v2/repository/index",
            "/v2/repository/models/echo/load",
            "/v2/repository/models/echo/unload",
            "/v2/systemsharedmemory/region/r/register",
            "/v2/systemsharedmemory/unregister",
            "/v2/cudasharedmemory/unregister",
            "/v2/trace/setting",
            "/v2/logging",
        ):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(head.format(path).encode() + bytes(65537))  # and no more
            answer = await asyncio.wait_for(reader.readuntil(b"}"), 10)
            assert answer.startswith(b"HTTP/1.1 413 "), path
            assert b"at most 65536 bytes" in answer
            writer.close()
            await writer.wait_closed()  # or the door waits for the rest until it has closed
