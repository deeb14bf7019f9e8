"""Engines in real child processes, which the tests kill, stop and starve."""

import asyncio
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.engines.engine import EngineLost
from cloud_hub.engines.inline import InlineEngine
from cloud_hub.engines.launch import INLINE_MAX_BYTES, Launcher
from cloud_hub.engines.priority import NICER, at_low_priority
from cloud_hub.engines.process import Job, ProcessEngine
from cloud_hub.errors import ModelRefused
from fogline_protocol.errors import BadRequest, ServerFault
from tests import onnx_bytes

DATA = Path(__file__).parents[2] / "edge_agent" / "data"
DOUBLE = DATA / "double.onnx"  # x FP32 [n, 3] -> its double
TEXT = DATA / "text.onnx"
X = {"x": np.ones((2, 3), np.float32)}


@pytest.fixture
async def engine():
    engine = await ProcessEngine.start(Job("onnxruntime", DOUBLE, threads=1, run_limit_s=0.5))
    yield engine
    await engine.close()


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def priorities(pid):
    """The nice value of every thread of a process."""
    threads = map(int, os.listdir(f"/proc/{pid}/task"))
    return {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_it_knows_the_contract_of_its_model(engine):
    assert [(s.name, s.datatype, s.shape) for s in engine.inputs] == [("x", "FP32", (-1, 3))]
    assert len(engine.outputs) == 1
    assert engine.platform == "onnxruntime_onnx"
    assert engine.provider == "CPUExecutionProvider"
    assert 0 < engine.row_s < 1


@pytest.mark.parametrize("threads", [1, 2])
async def test_it_serves_at_the_priority_of_its_hub_though_it_loaded_at_a_lower_one(threads):
    engine = await ProcessEngine.start(Job("onnxruntime", DOUBLE, threads=threads))
    nice = priorities(engine.pid)
    assert nice.pop(engine.pid) == os.getpriority(os.PRIO_PROCESS, 0)
    await engine.close()
    # Those of numpy and of the runtime itself, which no run waits for, keep what they began with.
    pool = [value for value in nice.values() if value == os.getpriority(os.PRIO_PROCESS, 0)]
    assert len(pool) == threads - 1


def test_work_at_low_priority_is_done_at_one_and_its_outcome_is_told():
    def work():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert at_low_priority(work) == min(before + NICER, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    with pytest.raises(ZeroDivisionError):
        at_low_priority(lambda: 1 // 0)


def test_a_worker_imports_nothing_that_only_doors_need():
    program = """
import sys
import cloud_hub.engines.worker, cloud_hub.engines.onnx_runtime
heavy = {"asyncio", "google.protobuf", "grpc", "structlog"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_answers_stay_what_they_were_when_the_next_run_is_over(engine):
    first = await engine.run(X)
    await engine.run({"x": np.full((2, 3), 7, np.float32)})
    (doubled,) = first.values()
    np.testing.assert_array_equal(doubled, 2 * X["x"])


async def test_what_was_joined_for_one_that_died_runs_on_its_successor(engine):
    joined = engine.join([X, {"x": np.full((1, 3), 4, np.float32)}])
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.starts == 2)
    (values,) = (await engine.run(joined)).values()
    np.testing.assert_array_equal(values, [[2, 2, 2], [2, 2, 2], [8, 8, 8]])


async def test_requests_are_joined_while_it_is_replaced(engine):
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while engine.pid is not None:  # looked at every turn: it is not for long
            await asyncio.sleep(0)
    (values,) = (await engine.run(engine.join([X, X]))).values()
    np.testing.assert_array_equal(values, np.full((4, 3), 2))


async def test_texts_are_joined_too():
    engine = await Launcher(threads=1).open(TEXT)
    (spec,) = engine.inputs
    texts = [np.array(words, object).reshape(-1, 1) for words in ([b"a"], [b"", b"long" * 9])]
    requests = [{spec.name: text} for text in texts]
    joined = await engine.run(engine.join(requests))
    apart = [await engine.run(request) for request in requests]
    for name, values in joined.items():
        expected = np.concatenate([outputs[name] for outputs in apart])
        np.testing.assert_array_equal(values, expected)
    await engine.close()


async def test_one_that_dies_over_a_batch_costs_that_batch_and_is_replaced(engine):
    before = engine.pid
    os.kill(before, signal.SIGSTOP)  # so that the run is in flight when it dies
    run = asyncio.create_task(engine.run(X))
    await asyncio.sleep(0)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(EngineLost, match="killed by signal 9 while it ran this batch"):
        await run
    await asyncio.wait_for(engine.ready(), 20)
    assert engine.trouble == ""
    assert engine.pid != before
    (doubled,) = (await engine.run(X)).values()
    np.testing.assert_array_equal(doubled, 2 * X["x"])


async def test_one_that_hangs_is_killed_and_replaced(engine):
    before = engine.pid
    os.kill(before, signal.SIGSTOP)
    with pytest.raises(EngineLost, match=r"hung: no answer in 0\.5 s"):
        await engine.run(X)
    await asyncio.wait_for(engine.ready(), 20)
    assert not is_alive(before)
    await engine.run(X)


async def test_one_that_dies_idle_costs_no_batch(engine):
    before = engine.pid
    os.kill(before, signal.SIGKILL)
    await until(lambda: engine.starts == 2)
    await engine.run(X)  # waits for the new one
    assert engine.pid != before


@pytest.fixture
async def from_file(tmp_path):
    """An engine, and the file it was loaded from, which tests may do away with."""
    file = tmp_path / "model.onnx"
    file.write_bytes(DOUBLE.read_bytes())
    engine = await ProcessEngine.start(Job("onnxruntime", file, threads=1))
    yield engine, file
    await engine.close()


TRIPLE = DOUBLE.read_bytes().replace(struct.pack("<f", 2), struct.pack("<f", 3))


async def test_it_is_replaced_by_the_same_model_when_its_path_leads_elsewhere(from_file):
    engine, file = from_file
    for do in ("remove", "replace"):
        if do == "remove":
            file.unlink()
        else:
            file.with_name("new").write_bytes(TRIPLE)
            file.with_name("new").rename(file)
        starts = engine.starts
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.starts > starts)  # noqa: B023  awaited here
        (doubled,) = (await engine.run(X)).values()
        np.testing.assert_array_equal(doubled, 2 * X["x"])


async def test_a_file_that_takes_its_place_while_it_loads_is_not_what_answers(from_file):
    engine, file = from_file
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.starts == 2)
    # The child is only just starting its interpreter.
    file.with_name("new").write_bytes(TRIPLE)
    file.with_name("new").rename(file)
    (doubled,) = (await engine.run(X)).values()
    np.testing.assert_array_equal(doubled, 2 * X["x"])


async def test_it_is_not_replaced_by_another_model_that_was_written_over_its_file(from_file):
    engine, file = from_file
    first = file.stat()
    file.write_bytes(TRIPLE)
    os.utime(file, ns=(0, 0))
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: engine.trouble)
    # Nobody waits for an engine that may never come, and its end is not the batch's fault.
    for _ in range(2):
        with pytest.raises(EngineLost, match=r"cannot be started again.*written over"):
            await asyncio.wait_for(engine.run(X), 20)
    # It goes on trying.
    file.write_bytes(DOUBLE.read_bytes())
    os.utime(file, ns=(first.st_atime_ns, first.st_mtime_ns))
    await asyncio.wait_for(engine.ready(), 20)
    (doubled,) = (await engine.run(X)).values()
    np.testing.assert_array_equal(doubled, 2 * X["x"])


async def test_a_caller_who_leaves_in_the_middle_gets_nobody_a_wrong_answer(engine):
    os.kill(engine.pid, signal.SIGSTOP)
    run = asyncio.create_task(engine.run({"x": np.full((2, 3), 100, np.float32)}))
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    (doubled,) = (await engine.run(X)).values()
    np.testing.assert_array_equal(doubled, 2 * X["x"])


async def test_what_the_runtime_refuses_costs_nothing_but_its_answer(engine):
    before = engine.pid
    with pytest.raises(ServerFault, match="y"):
        await engine.run({"y": X["x"]})
    await engine.run(X)
    assert engine.pid == before


async def test_values_that_do_not_suit_the_model_are_the_callers_fault():
    engine = await ProcessEngine.start(Job("onnxruntime", TEXT, threads=1))
    with pytest.raises(BadRequest, match="not UTF-8"):
        await engine.run({"s": np.array([[b"\xff"]], dtype=object)})
    texts = np.array([[b"caf\xc3\xa9"], [b""]], dtype=object)
    assert (await engine.run({"s": texts}))["t"].tolist() == texts.tolist()
    await engine.close()


async def test_a_file_that_is_no_model_is_refused_and_leaves_no_process(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a model")
    before = children()
    with pytest.raises(ModelRefused, match="ONNX Runtime cannot load it"):
        await ProcessEngine.start(Job("onnxruntime", file))
    assert children() == before


async def test_one_that_does_not_load_in_time_is_refused():
    with pytest.raises(ModelRefused, match=r"hung: not loaded after 0\.001 s"):
        await ProcessEngine.start(Job("onnxruntime", DOUBLE, load_limit_s=0.001))


async def test_its_process_ends_with_it(engine):
    pid = engine.pid
    await engine.close()
    assert not is_alive(pid)


async def test_it_outlives_signals_that_are_meant_for_the_hub(engine):
    os.kill(engine.pid, signal.SIGTERM)
    os.kill(engine.pid, signal.SIGINT)
    before = engine.pid
    await engine.run(X)
    assert engine.pid == before


def test_it_does_not_outlive_its_hub():
    code = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from cloud_hub.engines.process import Job, ProcessEngine\n"
        "async def main():\n"
        f"    engine = await ProcessEngine.start(Job('onnxruntime', Path({str(DOUBLE)!r})))\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as hub:
        pid = int(hub.stdout.readline())
        os.kill(pid, signal.SIGSTOP)  # a hung one does not see that its hub hung up
        hub.kill()
    limit = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < limit
        time.sleep(0.01)


async def test_short_runs_stay_in_the_hub_and_others_do_not(tmp_path):
    launcher = Launcher(threads=1)
    short = await launcher.open(DOUBLE)
    assert isinstance(short, InlineEngine)
    unknown = await launcher.open(TEXT)
    assert isinstance(unknown, ProcessEngine)
    large = tmp_path / "large.onnx"
    large.write_bytes(DOUBLE.read_bytes())
    os.truncate(large, INLINE_MAX_BYTES + 1)
    with pytest.raises(ModelRefused):  # zeros behind a model are none, but it was tried apart
        await launcher.open(large)
    await short.close()
    await unknown.close()


def test_a_slow_model_that_was_tried_in_the_hub_leaves_no_memory_there(tmp_path):
    # 12 layers of 1 MiB: pieces that glibc keeps when they are freed.
    names = [f"c{layer}" for layer in range(12)]
    values = ["x", *(f"y{layer}" for layer in range(11)), "y"]
    nodes = [("Add", [values[i], names[i]], [values[i + 1]]) for i in range(12)]
    large = onnx_bytes.model(
        nodes, [("x", "INT64", ["n", 1])], [("y", "INT64", ["n", 1 << 17])],
        constants={name: range(i, i + (1 << 17)) for i, name in enumerate(names)},
    )  # fmt: skip
    (tmp_path / "slow.onnx").write_bytes(large)
    code = f"""
import asyncio, re
from pathlib import Path
from cloud_hub.engines import launch
from cloud_hub.engines.process import ProcessEngine

launch.ON_LOOP_BELOW_S = 0.0  # how long it takes is the machine's affair: it counts as slow

def anonymous_kb():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

async def main():
    engine = await launch.Launcher(threads=1).open(Path({str(tmp_path / "slow.onnx")!r}))
    assert isinstance(engine, ProcessEngine)
    await engine.close()

before = anonymous_kb()
asyncio.run(main())
assert anonymous_kb() - before < 8 << 10, (before, anonymous_kb())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_an_engine_has_the_threads_that_its_settings_say():
    def threads_of(engine):
        assert isinstance(engine, ProcessEngine)
        return len(os.listdir(f"/proc/{engine.pid}/task"))

    one, three = [await Launcher(threads=1).open(TEXT, threads=threads) for threads in (1, 3)]
    await until(lambda: threads_of(three) - threads_of(one) == 2)  # loading needed more for a while
    await one.close()
    await three.close()


async def test_who_closes_waits_for_the_child_that_was_being_ended():
    engine = await Launcher(threads=1).open(TEXT)
    assert isinstance(engine, ProcessEngine)
    process = engine._process
    ending = asyncio.create_task(engine._end())
    await asyncio.sleep(0)  # it has sent the signal, and waits
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    await engine.close()
    assert process.returncode == -signal.SIGKILL
