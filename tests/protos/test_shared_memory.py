"""Tensors in shared memory: with tritonclient's own regions, on both doors, and what is refused."""

import asyncio
import contextlib
import functools
import gc
import os
import secrets
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as shm
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fogline_protocol import inference, shared_memory
from fogline_protocol.client import Client
from fogline_protocol.doors import Extras
from fogline_protocol.errors import (
    AlreadyExists,
    BadRequest,
    InferenceError,
    NotFound,
    Overloaded,
    TooLarge,
    Unsupported,
)
from fogline_protocol.grpc_service import SERVICE
from fogline_protocol.shared_memory import RegionStatus, SharedMemory
from fogline_protocol.v1 import inference_pb2 as pb
from tests.protos.echo import EchoServer, grpc_door, rest_door

ROW = np.array([[0.25, 3.0, -1.0, 3.0]], np.float32)
KEYS = st.text(min_size=0, max_size=300)


@pytest.fixture
def table():
    return SharedMemory(max_request_bytes=1 << 20)


@pytest.fixture
def memory():
    """Return a function that makes shared memory of a size and returns its key and handle."""
    made = []

    def make(byte_size):
        key = f"/fogline-test-{secrets.token_hex(6)}"
        made.append(shm.create_shared_memory_region(key, key, byte_size))
        return key, made[-1]

    yield make
    for handle in made:
        shm.destroy_shared_memory_region(handle)


@pytest.fixture
def file(memory):
    """Return the file of 64 bytes of shared memory, and its key."""
    key, _ = memory(64)
    return f"/dev/shm{key}", key


@pytest.fixture
def echo():
    return EchoServer()


@contextlib.asynccontextmanager
async def blocking(module, address):
    """Give a function that calls a client of tritonclient in a thread, always the same one."""
    client = module.InferenceServerClient(address)
    with ThreadPoolExecutor(1) as thread:

        async def call(name, *args, **kwargs):
            work = functools.partial(getattr(client, name), *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(thread, work)

        yield call
        await call("close")


@pytest.fixture(params=["grpc", "http"])
async def triton(request, echo, table):
    """The module of tritonclient, and a function that calls its client, which blocks."""
    extras = Extras(shared_memory=table)
    door = grpc_door if request.param == "grpc" else rest_door
    module = triton_grpc if request.param == "grpc" else triton_http
    async with door(echo, extras=extras) as address, blocking(module, address) as call:
        yield module, call


def tensor(module, array, region=None, offset=0, size=None, name="x"):
    made = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    if region is None:
        made.set_data_from_numpy(array)
    else:
        made.set_shared_memory(region, array.nbytes if size is None else size, offset)
    return made


def output(module, region, size, offset=0, name="x"):
    made = module.InferRequestedOutput(name)
    made.set_shared_memory(region, size, offset)
    return made


async def test_tensors_go_through_shared_memory_both_ways(triton, memory):
    module, call = triton
    (in_key, lent), (out_key, taken) = memory(64), memory(64)
    shm.set_shared_memory_region(lent, [ROW], offset=16)
    await call("register_system_shared_memory", "in", in_key, 64)
    await call("register_system_shared_memory", "out", out_key, 48, offset=16)
    result = await call(
        "infer", "echo", [tensor(module, ROW, "in", 16)], outputs=[output(module, "out", 32, 8)]
    )
    # The region starts at byte 16 of the object, the tensor at byte 8 of the region.
    found = shm.get_contents_as_numpy(taken, np.float32, [1, 4], offset=24)
    np.testing.assert_array_equal(found, ROW)
    told = result.get_output("x")
    if module is triton_grpc:
        response = result.get_response()
        assert list(response.raw_output_contents) == [b""]  # one entry per output, this one empty
        assert (told.datatype, list(told.shape)) == ("FP32", [1, 4])
    else:
        # Triton's C++ client takes any parameters for those of raw bytes.
        assert told == {"name": "x", "datatype": "FP32", "shape": [1, 4]}


async def test_only_inputs_that_are_not_in_shared_memory_have_raw_bytes(triton, memory):
    module, call = triton
    key, lent = memory(16)
    shm.set_shared_memory_region(lent, [ROW])
    await call("register_system_shared_memory", "r", key, 16)
    inputs = [
        tensor(module, ROW * 2, name="a"),
        tensor(module, ROW, "r", name="b"),
        tensor(module, ROW * 3, name="c"),
    ]
    result = await call("infer", "echo", inputs)
    for name, factor in (("a", 2), ("b", 1), ("c", 3)):
        np.testing.assert_array_equal(result.as_numpy(name), ROW * factor)


async def test_texts_go_through_shared_memory_as_well(triton, memory):
    module, call = triton
    texts = np.array([b"", b"\xff\x00", b"text"], dtype=object)
    raw = b"".join(len(t).to_bytes(4, "little") + t for t in texts)
    (in_key, lent), (out_key, taken) = memory(len(raw)), memory(64)
    shm.set_shared_memory_region(lent, [np.frombuffer(raw, np.uint8)])
    await call("register_system_shared_memory", "in", in_key, len(raw))
    await call("register_system_shared_memory", "out", out_key, 64)
    given_texts = module.InferInput("x", [3], "BYTES")
    given_texts.set_shared_memory("in", len(raw))
    await call("infer", "echo", [given_texts], outputs=[output(module, "out", 64)])
    assert bytes(shm.get_contents_as_numpy(taken, np.uint8, [len(raw)])) == raw


async def test_regions_are_listed_and_taken_back(triton, memory):
    module, call = triton
    key, _ = memory(64)
    await call("register_system_shared_memory", "a", key, 16, offset=8)
    await call("register_system_shared_memory", "b", key, 64)

    async def listed(name=""):
        found = await call("get_system_shared_memory_status", name)
        if module is triton_grpc:
            return {(r.name, r.key, r.offset, r.byte_size) for r in found.regions.values()}
        return {(r["name"], r["key"], r["offset"], r["byte_size"]) for r in found}

    assert await listed() == {("a", key, 8, 16), ("b", key, 0, 64)}
    assert await listed("a") == {("a", key, 8, 16)}
    with pytest.raises(InferenceServerException, match="registered already") as caught:
        await call("register_system_shared_memory", "a", key, 16)
    assert caught.value.status() in ("StatusCode.ALREADY_EXISTS", "409")
    await call("unregister_system_shared_memory", "a")
    await call("unregister_system_shared_memory", "never was")  # as with Triton no error
    assert await listed() == {("b", key, 0, 64)}
    await call("unregister_system_shared_memory")
    assert await listed() == set()
    with pytest.raises(InferenceServerException, match=r"'a'.*not registered") as caught:
        await listed("a")
    assert caught.value.status() in ("StatusCode.NOT_FOUND", "404")
    with pytest.raises(InferenceServerException, match="not registered"):
        await call("infer", "echo", [tensor(module, ROW, "a")])


async def test_cuda_regions_are_none_and_cannot_be_registered(triton):
    _, call = triton
    found = await call("get_cuda_shared_memory_status")
    assert not getattr(found, "regions", found)
    await call("unregister_cuda_shared_memory")  # perf_analyzer stops if this fails
    for name, args in (
        ("register_cuda_shared_memory", ("r", b"", 0, 16)),
        ("unregister_cuda_shared_memory", ("r",)),
        ("get_cuda_shared_memory_status", ("r",)),
    ):
        with pytest.raises(InferenceServerException, match="use system shared memory") as caught:
            await call(name, *args)
        assert caught.value.status() in ("StatusCode.UNIMPLEMENTED", "501")


async def test_the_extension_is_named_only_where_it_works(triton, echo):
    module, call = triton
    found = await call("get_server_metadata")
    names = found.extensions if module is triton_grpc else found["extensions"]
    assert list(names) == ["statistics", "system_shared_memory"]
    async with grpc_door(echo) as bare, triton_aio.InferenceServerClient(bare) as client:
        assert list((await client.get_server_metadata()).extensions) == ["statistics"]


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_a_server_that_does_not_offer_it_names_the_option(echo, kind):
    door, module = (grpc_door, triton_grpc) if kind == "grpc" else (rest_door, triton_http)
    async with door(echo) as address, blocking(module, address) as call:
        for name, args in (
            ("get_system_shared_memory_status", ()),
            ("register_system_shared_memory", ("r", "/k", 16)),
            ("unregister_system_shared_memory", ()),
            ("get_cuda_shared_memory_status", ()),
            ("register_cuda_shared_memory", ("r", b"", 0, 16)),
            ("unregister_cuda_shared_memory", ()),
            ("infer", ("echo", [tensor(module, ROW, "r")])),
        ):
            with pytest.raises(InferenceServerException, match="--allow-shared-memory") as caught:
                await call(name, *args)
            assert caught.value.status() in ("StatusCode.UNIMPLEMENTED", "501")


async def test_a_stream_reads_and_writes_shared_memory(echo, table, memory):
    key, handle = memory(80)
    shm.set_shared_memory_region(handle, [np.arange(12, dtype=np.float32)])
    table.register(RegionStatus("r", key, 0, 80))

    async def requests():
        for at in range(3):
            yield {
                "model_name": "echo",
                "inputs": [tensor(triton_aio, ROW, "r", 16 * at)],
                "outputs": [output(triton_aio, "r" if at < 2 else "gone", 16, 48 + 16 * at)],
            }

    errors = []
    async with (
        grpc_door(echo, extras=Extras(shared_memory=table)) as address,
        triton_aio.InferenceServerClient(address) as client,
    ):
        async for result, error in client.stream_infer(requests()):
            errors.append(error and error.message())
            if result:
                assert list(result.get_response().raw_output_contents) == [b""]
    assert errors[:2] == [None, None]
    assert "'gone'" in errors[2]
    found = shm.get_contents_as_numpy(handle, np.float32, [8], offset=48)
    np.testing.assert_array_equal(found, np.arange(8))


async def test_a_region_stays_until_the_last_request_that_uses_it(echo, table, memory):
    key, handle = memory(32)
    table.register(RegionStatus("r", key, 0, 32))
    before = opened(key)
    echo.gates["slow"] = asyncio.Event()
    async with (
        grpc_door(echo, extras=Extras(shared_memory=table)) as address,
        triton_aio.InferenceServerClient(address) as client,
    ):
        outputs = [output(triton_aio, "r", 16, 16)]
        call = asyncio.create_task(
            client.infer("echo", [tensor(triton_aio, ROW)], outputs=outputs, request_id="slow")
        )
        async with asyncio.timeout(10):
            while not echo.calls:
                await asyncio.sleep(0.001)
        await client.unregister_system_shared_memory()
        echo.gates["slow"].set()
        await call
    found = shm.get_contents_as_numpy(handle, np.float32, [1, 4], offset=16)
    np.testing.assert_array_equal(found, ROW)
    del call
    echo.calls.clear()
    gc.collect()
    assert opened(key) == before - 1  # and then its file is closed; the caller has it open, too


def opened(key: str) -> int:
    """Return how often this process has a shared memory object open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) == f"/dev/shm{key}" for link in links if os.path.islink(link))


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (("", "{key}", 0, 16), BadRequest, "the name of a region has 1 to 255 bytes"),
        (("n" * 256, "{key}", 0, 16), BadRequest, "1 to 255 bytes"),
        (("r", "", 0, 16), BadRequest, "no name of a POSIX shared memory object"),
        (("r", "/", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "..", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "/..", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "//{key}", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "/../../etc/passwd", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "/a/b", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "/a\0b", 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "/" + "k" * 256, 0, 16), BadRequest, "no name of a POSIX"),
        (("r", "/fogline-no-such", 0, 16), NotFound, "create it before"),
        (("r", "{key}", 0, 0), BadRequest, "byte_size must lie between 1 and"),
        (("r", "{key}", 0, -1), BadRequest, "byte_size must lie between 1 and"),
        (("r", "{key}", 0, 2**64 - 1), BadRequest, "byte_size must lie between 1 and"),
        (("r", "{key}", -1, 16), BadRequest, "offset must be at least 0"),
        (("r", "{key}", 49, 16), BadRequest, "to byte 65 of .*, which has 64 bytes"),
        (("r", "{key}", 2**64 - 1, 16), BadRequest, "which has 64 bytes"),
    ],
)
def test_a_region_that_cannot_be_is_refused_by_name(table, file, status, kind, text):
    name, key, offset, size = status
    with pytest.raises(kind, match=text):
        table.register(RegionStatus(name, key.replace("{key}", file[1]), offset, size))
    assert not table.status("")


@given(KEYS)
@settings(max_examples=300, deadline=None)
def test_no_key_reaches_a_file_outside(tmp_path_factory, key):
    root = tmp_path_factory.mktemp("shm")
    (root / "secret").write_bytes(bytes(64))
    inside = root / "inside"
    inside.mkdir()
    table = SharedMemory(max_request_bytes=64, directory=inside)
    for tried in (key, f"../{key}", f"/../secret{key}", "../secret"):
        with pytest.raises(InferenceError):
            table.register(RegionStatus("r", tried, 0, 16))


def test_links_folders_and_pipes_are_no_shared_memory(tmp_path):
    table = SharedMemory(max_request_bytes=64, directory=tmp_path)
    (tmp_path / "outside").write_bytes(bytes(64))
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for key in ("link", "folder", "pipe"):
        with pytest.raises(BadRequest, match=f"'{key}'"):
            table.register(RegionStatus("r", key, 0, 16))


def test_the_table_is_bounded(file):
    table = SharedMemory(max_request_bytes=64, max_regions=2, max_region_bytes=32)
    for name in "ab":
        table.register(RegionStatus(name, file[1], 0, 32))
    with pytest.raises(Overloaded, match="2 shared memory regions are registered, the limit"):
        table.register(RegionStatus("c", file[1], 0, 32))
    table.unregister("a")
    with pytest.raises(BadRequest, match="between 1 and 32"):
        table.register(RegionStatus("c", file[1], 0, 33))
    table.register(RegionStatus("c", file[1], 0, 32))
    with pytest.raises(AlreadyExists, match="'c'"):
        table.register(RegionStatus("c", file[1], 0, 32))


PARAMETERS = {"shared_memory_region": "r", "shared_memory_byte_size": 16}


@pytest.mark.parametrize(
    ("parameters", "kind", "text"),
    [
        ({"shared_memory_byte_size": None}, BadRequest, "belong together"),
        ({"shared_memory_region": None}, BadRequest, "belong together"),
        ({"shared_memory_region": 5}, BadRequest, "belong together"),
        ({"shared_memory_region": ""}, BadRequest, "belong together"),
        ({"shared_memory_region": "s"}, NotFound, "'s': it is not registered"),
        ({"shared_memory_byte_size": "16"}, BadRequest, "must be a number of bytes"),
        ({"shared_memory_byte_size": True}, BadRequest, "must be a number of bytes"),
        ({"shared_memory_byte_size": -1}, BadRequest, "must be a number of bytes"),
        ({"shared_memory_offset": -1}, BadRequest, "must be a number of bytes"),
        ({"shared_memory_offset": 0.5}, BadRequest, "must be a number of bytes"),
        ({"shared_memory_offset": 49}, BadRequest, "16 bytes at offset 49 reach beyond"),
        ({"shared_memory_offset": 2**63 - 1}, BadRequest, "reach beyond"),
        ({"shared_memory_byte_size": 2**63 - 1}, BadRequest, "reach beyond"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_name(table, file, parameters, kind, text):
    table.register(RegionStatus("r", file[1], 0, 64))
    given_parameters = {k: v for k, v in {**PARAMETERS, **parameters}.items() if v is not None}
    with pytest.raises(kind, match=text):
        table.place("x", given_parameters)
    with pytest.raises(Unsupported, match="--allow-shared-memory"):
        shared_memory.find(None, "x", given_parameters)


def message(*inputs, raw=(), outputs=()):
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=list(raw))
    for name, shape, parameters in inputs:
        made = request.inputs.add(name=name, datatype="FP32", shape=shape)
        for key, value in parameters.items():
            kind = "string_param" if isinstance(value, str) else "int64_param"
            setattr(made.parameters[key], kind, value)
    for name, parameters in outputs:
        wanted = request.outputs.add(name=name)
        for key, value in parameters.items():
            kind = "string_param" if isinstance(value, str) else "int64_param"
            setattr(wanted.parameters[key], kind, value)
    return request


def test_a_tensor_must_be_as_large_as_its_part_of_the_region(table, file):
    table.register(RegionStatus("r", file[1], 0, 64))
    for shape in ([1, 3], [1, 5], [2**31], [-1, 4]):
        with pytest.raises(BadRequest, match="input 'x'"):
            inference.decode_request(message(("x", shape, PARAMETERS)).SerializeToString(), table)


def test_data_must_come_one_way(table, file):
    table.register(RegionStatus("r", file[1], 0, 64))
    lent = ("x", [1, 4], PARAMETERS)
    with pytest.raises(BadRequest, match="not in shared memory: 0, got 1"):
        inference.decode_request(message(lent, raw=[bytes(16)]).SerializeToString(), table)
    both = message(lent)
    both.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    with pytest.raises(BadRequest, match="'x', which is in shared memory"):
        inference.decode_request(both.SerializeToString(), table)
    ranked = message(outputs=[("y", {**PARAMETERS, "classification": 1})])
    with pytest.raises(BadRequest, match="exclude each other"):
        inference.decode_request(ranked.SerializeToString(), table)


def test_inputs_in_shared_memory_count_towards_the_limit_of_a_request(file):
    table = SharedMemory(max_request_bytes=40)
    table.register(RegionStatus("r", file[1], 0, 64))
    names = [(name, [1, 4], PARAMETERS) for name in "abc"]
    inference.decode_request(message(*names[:2]).SerializeToString(), table)
    with pytest.raises(TooLarge, match="--max-message-bytes"):
        inference.decode_request(message(*names).SerializeToString(), table)


async def test_memory_that_was_made_shorter_is_the_callers_fault_and_nobody_dies(
    echo, table, file, memory
):
    path, key = file
    other, lent = memory(16)
    shm.set_shared_memory_region(lent, [ROW])
    table.register(RegionStatus("r", key, 0, 64))
    table.register(RegionStatus("whole", other, 0, 16))
    os.truncate(path, 8)
    whole = {**PARAMETERS, "shared_memory_region": "whole"}
    async with grpc_door(echo, extras=Extras(shared_memory=table)) as address:
        ours = Client(address)
        for request in (
            message(("x", [1, 4], PARAMETERS)),
            message(("x", [1, 4], whole), outputs=[("x", PARAMETERS)]),
        ):
            with pytest.raises(BadRequest, match="ends at 8 now: it was made shorter"):
                await ours.call(f"/{SERVICE}/ModelInfer", request.SerializeToString())
        assert os.stat(path).st_size == 8  # nor is it made longer again
        ours_too = message(("x", [1, 4], whole))
        await ours.call(f"/{SERVICE}/ModelInfer", ours_too.SerializeToString())
        await ours.close()


async def test_a_place_too_small_for_its_output_is_named_and_untouched(echo, table, memory):
    key, handle = memory(32)
    table.register(RegionStatus("r", key, 0, 32))
    small = {**PARAMETERS, "shared_memory_byte_size": 12}
    request = message(("x", [1, 4], {}), raw=[ROW.tobytes()], outputs=[("x", small)])
    async with grpc_door(echo, extras=Extras(shared_memory=table)) as address:
        ours = Client(address)
        with pytest.raises(BadRequest, match=r"\(12 bytes\) should be at least 16 bytes"):
            await ours.call(f"/{SERVICE}/ModelInfer", request.SerializeToString())
        await ours.close()
    assert not shm.get_contents_as_numpy(handle, np.uint8, [32]).any()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "key must be"),
        ({"key": 5}, "key must be"),
        ({"key": "/k"}, "byte_size must be a number"),
        ({"key": "/k", "byte_size": "1"}, "byte_size must be a number"),
        ({"key": "/k", "byte_size": 1, "offset": 0.5}, "offset must be a number"),
        ({"key": "\ud800", "byte_size": 1}, "key"),
        ({"key": "/k", "byte_size": 10**400}, "byte_size must lie between"),
    ],
)
async def test_a_region_over_http_is_refused_by_name(echo, table, body, text):
    async with (
        rest_door(echo, extras=Extras(shared_memory=table)) as address,
        aiohttp.ClientSession(f"http://{address}") as session,
        session.post("/v2/systemsharedmemory/region/r/register", json=body) as answer,
    ):
        assert answer.status == 400
        assert text in (await answer.json())["error"]


async def test_no_bytes_at_the_shared_memory_calls_are_a_fault_of_ours(echo, table):
    names = [f"{kind}SharedMemory{call}" for kind in ("System", "Cuda") for call in
             ("Status", "Register", "Unregister")]  # fmt: skip
    async with (
        grpc_door(echo, extras=Extras(shared_memory=table)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        for name in names:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/{name}")(b"\xff")
            assert caught.value.code() is not grpc.StatusCode.INTERNAL
            assert caught.value.details()
