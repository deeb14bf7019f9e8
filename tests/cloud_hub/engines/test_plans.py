"""Plans are kept whole, bounded, and built in a child that never outlives its parent.

The child is the real one; TensorRT and CUDA in it are the fakes, which it finds where Python
looks for installed packages.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.engines.tensorrt.errors import GpuUnavailable, PlanRefused
from cloud_hub.engines.tensorrt.plan_key import PlanKey, Platform, Profile
from cloud_hub.engines.tensorrt.plans import PlanBuilder, Plans, find_platform, to_remove
from cloud_hub.engines.tensorrt.session import TensorRtSession
from tests import fake_gpu
from tests.contracts.tensorrt import DOUBLE, DOUBLES, batches

ROOT = Path(__file__).parents[3]
PLATFORM = Platform("Fake GPU", "9.0", 132, "CUDA 13.1", "11.4.0.26")  # of the fakes
DIGEST = hashlib.sha256(DOUBLE).hexdigest()


def key(name: str) -> PlanKey:
    return PlanKey(PLATFORM, hashlib.sha256(name.encode()).hexdigest(), Profile())


def keep(plans: Plans, name: str, content: bytes) -> Path:
    with plans.place() as place:
        place.write_bytes(content)
        return plans.keep(key(name), place)


@pytest.fixture
def plans(tmp_path):
    return Plans(tmp_path / "plans", keep_bytes=100)


def test_a_plan_is_found_again_by_its_key_only(plans):
    assert plans.find(key("a")) is None
    path = keep(plans, "a", b"plan a")
    assert plans.find(key("a")) == path
    assert path.read_bytes() == b"plan a"
    assert plans.find(key("b")) is None


@pytest.mark.parametrize("damage", [b"", b"plan ", b"plan b", b"plan a and more"])
def test_a_damaged_plan_is_never_given_out_and_does_not_stay(plans, damage):
    path = keep(plans, "a", b"plan a")
    path.write_bytes(damage)
    assert plans.find(key("a")) is None
    assert not path.exists()


def test_a_plan_takes_the_place_of_an_older_one_of_its_key(plans, tmp_path):
    keep(plans, "a", b"first")
    second = keep(plans, "a", b"second")
    assert list((tmp_path / "plans").iterdir()) == [second]


def test_a_place_leaves_nothing_behind_when_the_build_fails(plans, tmp_path):
    def fail() -> None:
        with plans.place() as place:
            place.write_bytes(b"half a pl")
            raise RuntimeError("the build failed")

    with pytest.raises(RuntimeError, match="the build failed"):
        fail()
    assert list((tmp_path / "plans").iterdir()) == []


def test_what_a_killed_hub_left_is_removed_by_the_next_build(plans, tmp_path):
    keep(plans, "a", b"plan a")
    (tmp_path / "plans" / "tmp123.partial").write_bytes(b"half a pl")
    keep(plans, "b", b"plan b")
    assert not list((tmp_path / "plans").glob("*.partial"))
    assert plans.find(key("a")) is not None


def test_the_plan_used_longest_ago_makes_room(plans):
    paths = {name: keep(plans, name, name.encode() * 40) for name in "ab"}
    for age, name in enumerate("ba"):  # b was used last
        os.utime(paths[name], (1000 - age, 1000 - age))
    assert plans.find(key("a")) is not None  # and now a
    keep(plans, "c", b"c" * 40)
    assert plans.find(key("b")) is None
    assert plans.find(key("a")) is not None
    assert plans.find(key("c")) is not None


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=10),
    st.integers(0, 200),
    st.integers(0, 9),
)
def test_room_is_made_with_as_few_and_as_old_plans_as_possible(sizes, keep_bytes, newest):
    kept = [(Path(f"{i}"), nbytes, float(at)) for i, (nbytes, at) in enumerate(sizes)]
    newest_path = kept[newest % len(kept)][0]
    removed = list(to_remove(kept, keep_bytes, newest_path))
    assert newest_path not in removed
    by_path = {path: (nbytes, at) for path, nbytes, at in kept}
    left = sum(nbytes for path, nbytes, _ in kept if path not in removed)
    assert left <= keep_bytes or set(removed) == {p for p in by_path if p != newest_path}
    if removed:  # without the last removal it would not have fitted
        assert left + by_path[removed[-1]][0] > keep_bytes
    stays = [at for path, (_, at) in by_path.items() if path not in [*removed, newest_path]]
    assert all(by_path[path][1] <= at for path in removed for at in stays)


@pytest.fixture
def environment(tmp_path):
    """Make the environment of a child that finds the fakes installed."""

    def make(**machine: object) -> dict[str, str]:
        packages = fake_gpu.Gpu.install(tmp_path / "packages")
        path = os.pathsep.join([str(packages), str(ROOT), *sys.path])
        return {**os.environ, "PYTHONPATH": path, fake_gpu.ENVIRONMENT: json.dumps(machine)}

    return make


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(DOUBLE)
    return path


def builder(tmp_path, environment, **options):
    return PlanBuilder(tmp_path / "plans", PLATFORM, environment=environment, **options)


async def test_a_plan_is_built_in_a_child_kept_and_runs(tmp_path, environment, model):
    told = []
    made = builder(tmp_path, environment(), on_progress=told.append)
    assert await made.kept(DIGEST, DOUBLES) is None
    path = await made.plan(model, DIGEST, DOUBLES)
    assert [(step.phase, step.step, step.steps) for step in told] == [
        ("Building", step, 3) for step in range(4)
    ]
    assert made.building is None
    gpu = fake_gpu.Gpu()
    session = TensorRtSession(path, trt=gpu.trt, cuda=gpu.cuda)
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], x * 2)
    session.close()
    assert await made.kept(DIGEST, DOUBLES) == path


async def test_two_callers_of_one_plan_get_one_build(tmp_path, environment, model):
    told = []
    made = builder(tmp_path, environment(), on_progress=told.append)
    first, second = await asyncio.gather(*(made.plan(model, DIGEST, DOUBLES) for _ in range(2)))
    assert first == second
    assert len(told) == 4


async def test_a_damaged_plan_is_built_again(tmp_path, environment, model):
    made = builder(tmp_path, environment())
    path = await made.plan(model, DIGEST, DOUBLES)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert (await made.plan(model, DIGEST, DOUBLES)).read_bytes() == whole


async def test_a_plan_that_is_kept_does_not_wait_for_the_build_of_another(
    tmp_path, environment, model
):
    path = await builder(tmp_path, environment()).plan(model, DIGEST, DOUBLES)
    made = builder(tmp_path, environment(hang=True))
    building = asyncio.create_task(
        made.plan(model, DIGEST, batches(("x", "FP32", (-1, 3)), most=4))
    )
    await _building(made)
    assert await made.plan(model, DIGEST, DOUBLES) == path
    building.cancel()
    await asyncio.gather(building, return_exceptions=True)


async def test_a_directory_that_cannot_be_made_is_a_reason(tmp_path, environment, model):
    (tmp_path / "plans").touch()
    made = builder(tmp_path, environment())
    with pytest.raises(PlanRefused, match=r"the plan cannot be kept: .*File exists") as refused:
        await made.plan(model, DIGEST, DOUBLES)
    assert not refused.value.lasting


@pytest.mark.parametrize(
    ("machine", "words", "lasting"),
    [
        ({"refuse": {"parse_from_file": "no"}}, r"node node_0 \(NonZero\): no", True),
        ({"refuse": {"build_serialized_network": "no tactic"}}, "no tactic", True),
        ({"refuse": {"build_serialized_network": "OutOfMemory"}}, "OutOfMemory", False),
        ({"refuse": {"build_serialized_network": "crash"}}, "was ended by SIGABRT", False),
        ({"driver": 0}, "there is no NVIDIA driver", False),
        ({"version": "12.0.0.1"}, r"TensorRT 12\.0\.0\.1 is not supported", False),
    ],
)
async def test_a_build_that_fails_gives_one_reason(
    tmp_path, environment, model, machine, words, lasting
):
    made = builder(tmp_path, environment(**machine))
    with pytest.raises(PlanRefused, match=words) as refused:
        await made.plan(model, DIGEST, DOUBLES)
    assert refused.value.lasting is lasting
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "plans").glob("*.partial"))


async def test_the_machine_is_described_by_a_child(environment):
    before = set(sys.modules)
    found = await find_platform(environment=environment())
    assert found.driver.endswith(
        "CUDA 13.1"
    )  # behind the release of a real driver, if there is one
    assert dataclasses.replace(found, driver=PLATFORM.driver) == PLATFORM
    assert not {"tensorrt", "cuda"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"driver": 0}, "there is no NVIDIA driver"),
        ({"devices": 0}, "no such GPU"),
        ({"version": "9.1.0.4"}, "is not supported"),
    ],
)
async def test_a_machine_that_can_have_no_plans_says_why(environment, machine, words):
    with pytest.raises(GpuUnavailable, match=words):
        await find_platform(environment=environment(**machine))


async def test_a_driver_that_takes_the_process_with_it_is_a_reason(environment, tmp_path):
    there = environment()
    (tmp_path / "packages" / "tensorrt.py").write_text("import os\nos.abort()\n")
    with pytest.raises(GpuUnavailable, match="looked for a GPU was ended by SIGABRT"):
        await find_platform(environment=there)


async def test_without_tensorrt_the_reason_is_that(tmp_path, model):
    path = os.pathsep.join([str(fake_gpu.Gpu.hide(tmp_path / "bare")), str(ROOT), *sys.path])
    bare = {**os.environ, "PYTHONPATH": path}
    with pytest.raises(GpuUnavailable, match="TensorRT is not installed"):
        await find_platform(environment=bare)
    made = builder(tmp_path, bare)
    with pytest.raises(PlanRefused, match="TensorRT is not installed"):
        await made.plan(model, DIGEST, DOUBLES)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


async def _building(made: PlanBuilder) -> None:
    async with asyncio.timeout(30):
        while made.building is None or made.building.step < 3:
            await asyncio.sleep(0.01)


def _children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for children in tasks for pid in children.read_text().split()}


async def test_a_build_that_takes_too_long_is_ended(tmp_path, environment, model):
    before = _children()
    made = builder(tmp_path, environment(hang=True), limit_s=3.0)
    with pytest.raises(PlanRefused, match="was not ready after 3 s") as refused:
        await made.plan(model, DIGEST, DOUBLES)
    assert not refused.value.lasting
    assert _children() == before


async def test_who_leaves_ends_the_build_and_the_next_one_starts(tmp_path, environment, model):
    before = _children()
    made = builder(tmp_path, environment(hang=True))
    waiting = asyncio.create_task(made.plan(model, DIGEST, DOUBLES))
    await _building(made)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert _children() == before
    assert not list((tmp_path / "plans").iterdir())
    made = builder(tmp_path, environment())
    await made.plan(model, DIGEST, DOUBLES)


async def test_a_child_ends_with_a_parent_that_is_killed(tmp_path, environment, model):
    code = textwrap.dedent(
        f"""
        import asyncio
        from pathlib import Path
        from cloud_hub.engines.tensorrt.plans import PlanBuilder
        from tests.cloud_hub.engines.test_plans import DIGEST, DOUBLES, PLATFORM, _children

        def told(progress):
            if progress.step == 3:
                print(*_children(), flush=True)

        made = PlanBuilder(Path({str(tmp_path / "plans")!r}), PLATFORM, on_progress=told)
        asyncio.run(made.plan(Path({str(model)!r}), DIGEST, DOUBLES))
        """
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=subprocess.PIPE, env=environment(hang=True)
    )
    assert parent.stdout is not None
    (child,) = map(int, (await parent.stdout.readline()).split())
    assert _alive(child)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    async with asyncio.timeout(30):
        while _alive(child):
            await asyncio.sleep(0.01)
