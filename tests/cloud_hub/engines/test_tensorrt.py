"""The TensorRT session on a GPU that exists in memory: its order of calls, and every refusal."""

import hashlib
import re

import numpy as np
import pytest

from cloud_hub.engines.engine import EngineLost
from cloud_hub.engines.tensorrt import api
from cloud_hub.engines.tensorrt.cuda import Cuda
from cloud_hub.engines.tensorrt.errors import (
    GpuUnavailable,
    OutOfDeviceMemory,
    PlanRefused,
    PlanUnusable,
)
from cloud_hub.engines.tensorrt.plan_builder import Task, build
from cloud_hub.engines.tensorrt.plan_key import BuildOptions, Profile
from cloud_hub.engines.tensorrt.session import TensorRtSession
from cloud_hub.errors import ModelRefused
from fogline_protocol.errors import BadRequest
from tests import onnx_bytes
from tests.contracts.tensorrt import DOUBLE, DOUBLES, TensorRtContract, batches, copies, make_plan
from tests.fake_gpu import ILLEGAL_ADDRESS, Gpu

SHRINKING = onnx_bytes.model(
    [
        ("Shape", ["x"], ["s"]),
        ("Sub", ["nine", "s"], ["left"]),
        ("ConstantOfShape", ["left"], ["y"]),
    ],
    [("x", "FP32", ["n", 3])],
    [("y", "FP32", ["m", 3])],
    constants={"nine": [9, 6]},
)  # [n, 3] -> zeros [9 - n, 3]

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(params=["11.4.0.26", "10.13.3.9"])
def gpu(request):
    gpu = Gpu(version=request.param)
    yield gpu
    assert gpu.faults == []
    assert gpu.held == 0


@pytest.fixture
def trt(gpu):
    return gpu.trt


@pytest.fixture
def cuda(gpu):
    return gpu.cuda


@pytest.fixture
def plan(tmp_path, gpu):
    made = make_plan(tmp_path, DOUBLE, DOUBLES, gpu.trt, gpu.cuda)
    gpu.calls.clear()
    return made


def load(gpu, plan, **options):
    return TensorRtSession(plan, trt=gpu.trt, cuda=gpu.cuda, **options)


class TestTheFakeGpu(TensorRtContract):
    """The contract; the tests below are about what only the fake can show."""

    @pytest.mark.parametrize("datatype", ["INT8", "UINT8"])
    def test_bytes_come_through(self, open_model, datatype):
        self.copied(open_model, datatype)


def test_a_run_sets_shapes_copies_in_executes_copies_out_and_waits(gpu, plan):
    session = load(gpu, plan)
    gpu.calls.clear()
    session.run({"x": X})
    assert gpu.calls == [
        "cudaSetDevice",
        "set_input_shape",
        "infer_shapes",
        "get_tensor_shape",
        "cudaMemcpyAsync",
        "execute_async_v3",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
    ]
    session.close()


def test_shapes_that_have_not_changed_are_not_told_again(gpu, plan):
    session = load(gpu, plan)
    session.run({"x": X})
    gpu.calls.clear()
    session.run({"x": X})
    assert gpu.calls[:2] == ["cudaSetDevice", "cudaMemcpyAsync"]
    session.close()


def test_nothing_is_allocated_in_a_run(gpu, plan):
    session = load(gpu, plan)
    gpu.calls.clear()
    for rows in range(1, 9):
        session.run({"x": np.ones((rows, 3), np.float32)})
    assert not {"cudaMalloc", "cudaHostAlloc"} & set(gpu.calls)
    session.close()


def test_closing_waits_and_gives_back_from_the_inside_out(gpu, plan):
    session = load(gpu, plan)
    gpu.calls.clear()
    session.close()
    assert gpu.calls == [
        "cudaSetDevice",
        "cudaStreamSynchronize",
        "~ExecutionContext",
        "~CudaEngine",
        "~Runtime",
        "cudaStreamDestroy",
        *["cudaFree", "cudaFreeHost"] * 2,
    ]


@pytest.mark.parametrize(
    "call",
    ["deserialize_cuda_engine", "create_execution_context", "set_input_shape", "infer_shapes",
     "get_tensor_shape", "set_tensor_address"],
)  # fmt: skip
def test_a_load_that_tensorrt_refuses_raises_and_holds_nothing(gpu, plan, call):
    gpu.refuse(call, "because it may")
    with pytest.raises((ModelRefused, EngineLost)) as refused:
        load(gpu, plan)
    assert call == "get_tensor_shape" or "because it may" in str(refused.value)
    if call != "infer_shapes":  # that error's traceback holds a frame of the fake
        # From the inside out, though the error and its traceback are still at hand.
        released = [made for made in gpu.calls if made[0] == "~" or made == "cudaStreamDestroy"]
        assert released[-2:] == ["~Runtime", "cudaStreamDestroy"]
    assert gpu.held == 0
    gpu.relent()
    load(gpu, plan).close()


@pytest.mark.parametrize(
    ("call", "after"),
    [("cudaStreamCreateWithFlags", 0), *[("cudaMalloc", n) for n in range(2)],
     *[("cudaHostAlloc", n) for n in range(2)]],
)  # fmt: skip
def test_a_full_gpu_is_an_ordinary_event_at_every_allocation(gpu, plan, call, after):
    gpu.fail(call, 2, after=after)
    with pytest.raises(OutOfDeviceMemory, match="out of memory"):
        load(gpu, plan)
    assert gpu.held == 0


def test_a_full_gpu_is_recognised_by_tensorrts_words(gpu, plan):
    gpu.refuse("deserialize_cuda_engine", "[defaultAllocator.cpp] Error Code 1: OutOfMemory")
    with pytest.raises(OutOfDeviceMemory, match="no memory to load the plan"):
        load(gpu, plan)
    gpu.relent()
    gpu.refuse("create_execution_context", "nothing left")
    with pytest.raises(OutOfDeviceMemory, match="needs 4096 bytes, 1000 are free: nothing left"):
        load(gpu, plan)


@pytest.mark.parametrize("call", ["execute_async_v3", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_failure_while_running_loses_the_engine_for_good(gpu, plan, call):
    session = load(gpu, plan)
    if call.startswith("cuda"):
        gpu.fail(call, ILLEGAL_ADDRESS)
    else:
        gpu.refuse(call)
    with pytest.raises(EngineLost, match="must be replaced") as lost:
        session.run({"x": X})
    assert lost.tb is not None  # and holds nothing of TensorRT
    gpu.relent()
    # Copies of the failed run may still be under way in these buffers.
    with pytest.raises(EngineLost, match="must be replaced"):
        session.run({"x": X})
    gpu.calls.clear()
    session.close()
    assert [made for made in gpu.calls if made[0] == "~" or made == "cudaStreamDestroy"] == [
        "~ExecutionContext", "~CudaEngine", "~Runtime", "cudaStreamDestroy",
    ]  # fmt: skip


def test_the_second_copy_in_a_run_failing_leaves_nothing_under_the_gpus_hands(gpu, plan):
    session = load(gpu, plan)
    gpu.fail("cudaMemcpyAsync", ILLEGAL_ADDRESS, after=1)
    with pytest.raises(EngineLost):
        session.run({"x": X})
    session.close()  # waits first: the fixture sees memory that is freed under a running copy


def test_a_gpu_that_is_gone_can_still_be_closed(gpu, plan, caplog):
    session = load(gpu, plan)
    gpu.fail("cudaStreamSynchronize", ILLEGAL_ADDRESS)
    session.close()
    assert "closing a TensorRT engine: the GPU failed: cudaErrorIllegalAddress" in caplog.text


def test_a_shape_that_tensorrt_refuses_costs_only_its_own_request(gpu, plan):
    session = load(gpu, plan)
    gpu.refuse("set_input_shape", "not this one")
    with pytest.raises(BadRequest, match=r"refuses shape \[2, 3\]: not this one"):
        session.run({"x": X})
    gpu.relent()
    np.testing.assert_array_equal(session.run({"x": X})["y"], X * 2)
    session.close()


def test_a_bool_of_any_byte_reaches_tensorrt_as_0_or_1(gpu, tmp_path):
    plan = make_plan(tmp_path, copies("BOOL"), batches(("x", "BOOL", (-1, 4))), gpu.trt, gpu.cuda)
    session = load(gpu, plan)
    odd = np.frombuffer(b"\0\1\2\xff", np.bool_).reshape(1, 4)
    assert session.run({"x": odd})["y"].tobytes() == b"\0\1\1\1"
    session.close()


def test_an_output_that_grows_while_its_input_shrinks_gets_the_room(gpu, tmp_path):
    session = load(gpu, make_plan(tmp_path, SHRINKING, DOUBLES, gpu.trt, gpu.cuda))
    gpu.calls.clear()
    assert session.run({"x": X})["y"].tolist() == [[0.0] * 3] * 7
    assert [call for call in gpu.calls if call.startswith(("cudaM", "cudaF", "cudaH", "set_t"))] == [
        "cudaFree", "cudaFreeHost", "cudaMalloc", "cudaHostAlloc", "set_tensor_address",
        "cudaMemcpyAsync", "cudaMemcpyAsync",
    ]  # fmt: skip
    session.close()


def test_a_gpu_that_is_full_when_an_output_grows_loses_the_engine_and_nothing_else(gpu, tmp_path):
    session = load(gpu, make_plan(tmp_path, SHRINKING, DOUBLES, gpu.trt, gpu.cuda))
    gpu.fail("cudaMalloc", 2)
    with pytest.raises(EngineLost, match="out of memory"):
        session.run({"x": X})
    session.close()


@pytest.mark.parametrize("name", ["shape_x", "host_x"])
def test_values_that_decide_shapes_are_left_to_onnx_runtime(gpu, tmp_path, name):
    onnx = onnx_bytes.model(
        [("Add", [name, name], ["y"])], [(name, "FP32", [2])], [("y", "FP32", [2])]
    )
    plan = make_plan(tmp_path, onnx, Profile(), gpu.trt, gpu.cuda)
    with pytest.raises(ModelRefused, match="decide shapes"):
        load(gpu, plan)


def test_a_datatype_that_the_protocol_lacks_is_refused_at_load(gpu, tmp_path):
    onnx = onnx_bytes.model(
        [("Identity", ["x"], ["y"])], [("x", "BYTES", [2])], [("y", "BYTES", [2])]
    )
    plan = make_plan(tmp_path, onnx, Profile(), gpu.trt, gpu.cuda)  # the fake calls it FP8
    with pytest.raises(ModelRefused, match=r"'x' is .*FP8, which cannot be served: cast it"):
        load(gpu, plan)


def test_a_plan_of_another_version_is_to_be_built_again(gpu, plan):
    other = Gpu(version="11.4.1.3")
    with pytest.raises(PlanUnusable, match=r"11\.4\.1\.3 does not take the plan.*the plan is of"):
        load(other, plan)
    assert other.held == 0


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"driver": 0}, "there is no NVIDIA driver"),
        ({"driver": 12040}, r"made for CUDA 12\.4, this installation needs 13\.0"),
        ({"devices": 0}, "sees no such GPU"),
    ],
)
def test_a_machine_without_a_gpu_says_what_is_missing(plan, machine, words):
    bare = Gpu(**machine)
    with pytest.raises(GpuUnavailable, match=words):
        load(bare, plan)
    with pytest.raises(GpuUnavailable):
        Cuda(bare.cuda).devices()
    assert bare.held == 0


def test_another_gpu_than_there_is_is_refused(gpu, plan):
    with pytest.raises(GpuUnavailable, match="cudaErrorInvalidDevice"):
        load(gpu, plan, device=3)


def test_a_device_says_what_plans_depend_on(gpu):
    (found,) = Cuda(gpu.cuda).devices()
    assert (found.name, found.compute_capability, found.multiprocessors) == ("Fake GPU", "9.0", 132)
    assert found.uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert found.driver.endswith("CUDA 13.1")


@pytest.mark.parametrize("version", ["9.3.0.1", "10.0.1.6", "12.0.0.1", "dev", ""])
def test_an_unknown_tensorrt_is_an_error_that_names_the_known_ones(version):
    with pytest.raises(GpuUnavailable, match=re.escape("install 10.1 or a newer one of 10 or 11")):
        api.version(Gpu(version=version).trt)


def test_version_10_is_asked_for_strong_types_which_11_always_has(tmp_path):
    asked = {}
    for version in ("10.13.3.9", "11.4.0.26"):
        gpu = Gpu(version=version)
        make_plan(tmp_path, DOUBLE, DOUBLES, gpu.trt, gpu.cuda)
        asked[version] = [call for call in gpu.calls if call.startswith("create_network")]
    assert asked == {"10.13.3.9": ["create_network 2"], "11.4.0.26": ["create_network 0"]}


def _task(folder, onnx=DOUBLE, profile=DOUBLES, **options):
    model = folder / "model.onnx"
    model.write_bytes(onnx)
    return Task(
        model=model,
        sha256=hashlib.sha256(onnx).hexdigest(),
        profile=profile,
        options=BuildOptions(**options),
        device=0,
        plan=folder / "p.plan",
        timings=folder / "t.timings",
    )


def test_a_build_tells_its_steps_and_keeps_what_it_measured(gpu, tmp_path):
    told = []
    task = _task(tmp_path, tf32=False, workspace_bytes=77)
    size = build(task, gpu.trt, gpu.cuda, lambda *step: told.append(step))
    assert size == task.plan.stat().st_size
    assert told == [("Building", step, 3) for step in range(4)]
    assert "clear_flag tf32" in gpu.calls
    assert "set_memory_pool_limit workspace 77" in gpu.calls
    assert task.timings.read_bytes() == b"measured;"
    build(task, gpu.trt, gpu.cuda, lambda *step: None)
    assert task.timings.read_bytes() == b"measured;measured;"


def test_timings_of_another_machine_are_replaced(gpu, tmp_path):
    task = _task(tmp_path)
    task.timings.write_bytes(b"from elsewhere")
    build(task, gpu.trt, gpu.cuda, lambda *step: None)
    assert task.timings.read_bytes() == b"measured;"


def test_every_objection_of_the_parser_names_node_and_operator(gpu, tmp_path):
    gpu.refuse("parse_from_file", "no such  kernel")
    with pytest.raises(PlanRefused) as refused:
        build(_task(tmp_path), gpu.trt, gpu.cuda, lambda *step: None)
    assert "node node_0 (NonZero): no such kernel; node node_1 (NonZero)" in str(refused.value)
    assert str(refused.value).endswith("; and 2 more")
    assert refused.value.lasting


@pytest.mark.parametrize("call", ["build_serialized_network", "add_optimization_profile"])
def test_a_build_that_tensorrt_refuses_gives_its_reason(gpu, tmp_path, call):
    gpu.refuse(call, "Could not find any implementation")
    with pytest.raises(PlanRefused, match="Could not find any implementation") as refused:
        build(_task(tmp_path), gpu.trt, gpu.cuda, lambda *step: None)
    assert refused.value.lasting


def test_a_build_without_memory_may_work_later(gpu, tmp_path):
    gpu.refuse("build_serialized_network", "Requested size was 8 GB: out of memory")
    with pytest.raises(PlanRefused) as refused:
        build(_task(tmp_path), gpu.trt, gpu.cuda, lambda *step: None)
    assert not refused.value.lasting


def test_a_profile_must_fit_the_model(gpu, tmp_path):
    with pytest.raises(PlanRefused, match=r"'x' has variable dimensions \[-1, 3\] and no bounds"):
        build(_task(tmp_path, profile=Profile()), gpu.trt, gpu.cuda, lambda *step: None)
    stray = batches(("x", "FP32", (-1, 3)), ("q", "FP32", (-1,)))
    with pytest.raises(PlanRefused, match="no input with variable dimensions: q"):
        build(_task(tmp_path, profile=stray), gpu.trt, gpu.cuda, lambda *step: None)


def test_a_model_that_changed_meanwhile_is_not_built(gpu, tmp_path):
    task = _task(tmp_path)
    task.model.write_bytes(DOUBLE + b"\0")
    with pytest.raises(PlanRefused, match="is not the file that was asked for"):
        build(task, gpu.trt, gpu.cuda, lambda *step: None)
