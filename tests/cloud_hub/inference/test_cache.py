"""The cache against a naive model of it, and the hub with it against the hub without."""

import asyncio
import gc
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cloud_hub.engines.launch import Launcher
from cloud_hub.inference import cache as module
from cloud_hub.inference.admission import CALLER, LOCAL
from cloud_hub.inference.cache import Key, ResponseCache, hash_of, size_of
from cloud_hub.inference.repository import Limits, Repository
from cloud_hub.inference.server import HubServer
from cloud_hub.metrics import Metrics
from fogline_protocol.errors import BadRequest
from fogline_protocol.inference import InferRequest
from fogline_protocol.tensors import BF16
from tests.edge_agent.bundles import DATA
from tests.fakes import HUB_MODEL, FakeHub, Serving

BOUND, TTL = 12_000, 10.0

KEYS = [  # few, so that they meet, and every part makes a difference somewhere
    Key(*parts, (), inputs)
    for *parts, inputs in (
        ("default", "m", "1", "a", b"x"), ("other", "m", "1", "a", b"x"),
        ("default", "m", "1", "b", b"x"), ("default", "m", "2", "a", b"x"),
        ("default", "n", "1", "a", b"x"), ("default", "m", "1", "a", b"y"),
    )
]  # fmt: skip
keys = st.sampled_from(KEYS)


class AgainstANaiveModel(RuleBasedStateMachine):
    """A list of what was put, in order of use, with what never holds entries in parts."""

    def __init__(self):
        super().__init__()
        self.cache = ResponseCache(BOUND, TTL)
        self.now = 0.0
        self.entries = []  # (key, mark, size, expires), used longest ago first
        self.marks = 0

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(key=keys, elements=st.sampled_from([0, 500, 1000, 5000]))
    def put(self, key, elements):
        self.marks += 1
        outputs = {"y": np.full(elements + 1, self.marks, np.int32)}
        self.cache.put(key, outputs, self.now)
        outputs["y"][0] = -1  # what was put is ours no longer
        self.entries = [entry for entry in self.entries if entry[0] != key]
        size = size_of(outputs)
        if size > BOUND:
            return
        while sum(entry[2] for entry in self.entries) + size > BOUND:
            del self.entries[0]
        self.entries.append((key, self.marks, size, self.now + TTL))

    @rule(key=keys)
    def get(self, key):
        found = self.cache.get(key, self.now)
        (expected,) = [e for e in self.entries if e[0] == key] or [None]
        if expected is not None:
            self.entries.remove(expected)
            if expected[3] > self.now:
                self.entries.append(expected)
            else:
                expected = None
        assert (found is None) == (expected is None)
        if found is not None:
            assert set(found["y"].tolist()) == {expected[1]}
            with pytest.raises(ValueError, match="read-only"):
                found["y"][0] = 0
            with pytest.raises(TypeError):
                found["z"] = 0

    @rule(
        model=st.sampled_from(["m", "n"]),
        served=st.dictionaries(st.sampled_from(["1", "2"]), st.sampled_from(["a", "b"])),
    )
    def switch(self, model, served):
        self.cache.keep(model, served)
        self.entries = [
            e
            for e in self.entries
            if e[0].model != model or served.get(e[0].version) == e[0].digest
        ]

    @invariant()
    def the_bytes_are_those_of_what_is_kept_and_within_the_bound(self):
        assert self.cache.bytes == sum(entry[2] for entry in self.entries) <= BOUND
        assert len(self.cache) == len(self.entries)


TestAgainstANaiveModel = AgainstANaiveModel.TestCase
TestAgainstANaiveModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_large_model_that_is_switched_is_freed_in_parts(monkeypatch):
    cache = ResponseCache(10 << 20, TTL)
    old = [Key("t", "m", "1", "a", (), bytes([at // 256, at % 256])) for at in range(1000)]
    for key in old:
        cache.put(key, {"y": np.zeros(1)}, 0.0)
    monkeypatch.setattr(module, "SWEEP", 300)
    cache.keep("m", {"1": "b"})
    assert len(cache) == 700
    # Back to the old digest while some are not freed yet: they are right, and may be replaced.
    cache.keep("m", {"1": "a"})
    left = next(key for key in old if key in cache._entries)
    cache.put(left, {"y": np.ones(1)}, 0.0)
    for _ in range(5):
        cache.get(left, 1.0)
    assert len(cache) == 1
    assert cache.get(left, 1.0)["y"] == 1
    cache.keep("m", {"1": "b"})
    assert len(cache) == 0


@pytest.mark.parametrize(
    "outputs",
    [
        {"y": np.zeros(1, np.float32)},
        {"y": np.zeros((1, 1000), np.float32), "z": np.zeros(1, np.int64)},
        {"y": np.array([b"x" * 100, b"", b"abc"], dtype=object)},
        {"y": np.zeros((64, 10), np.float32)[3:4]},
    ],
)
def test_the_size_of_an_entry_is_no_less_than_what_it_takes(outputs):
    outputs = {name: array.copy() for name, array in outputs.items()}
    cache = ResponseCache(1 << 30, TTL)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for at in range(2000):
            fresh = {
                "".join(name): np.array([bytes(bytearray(e)) for e in array], dtype=object)
                if array.dtype == object
                else array
                for name, array in outputs.items()
            }
            cache.put(Key("t", "m", "1", "a", (), at.to_bytes(32)), fresh, float(at))
        del fresh
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= cache.bytes <= 3 * taken


def test_a_row_of_a_large_batch_does_not_hold_on_to_the_batch():
    cache = ResponseCache(1 << 20, TTL)
    batch = np.zeros((64, 100_000), np.float32)
    key = Key("t", "m", "1", "a", (), b"x")
    cache.put(key, {"y": batch[3:4, :10]}, 0.0)
    assert cache.get(key, 0.0)["y"].base is None


arrays = st.one_of(
    hnp.arrays(
        st.sampled_from(["?", "u1", "<i4", "<i8", "<f4", "<f8", "<f2"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ),
    hnp.arrays(object, hnp.array_shapes(max_dims=2, max_side=3), elements=st.binary(max_size=3)),
)
tensors = st.dictionaries(st.text(max_size=3), arrays, max_size=3)


def described(inputs):
    return {
        name: (array.dtype.str, array.shape, array.tolist() if array.dtype == object else array.tobytes())
        for name, array in inputs.items()
    }  # fmt: skip


@given(tensors, tensors)
def test_two_requests_have_one_hash_exactly_if_they_are_the_same(first, second):
    assert (hash_of(first) == hash_of(second)) == (described(first) == described(second))


@given(tensors)
def test_neither_order_nor_layout_of_the_tensors_matters(inputs):
    other = {name: inputs[name].copy(order="F") for name in reversed(inputs)}
    assert hash_of(other) == hash_of(inputs)


def test_where_a_name_or_a_tensor_ends_makes_a_difference():
    one, two = np.zeros(1, np.uint8), np.zeros(2, np.uint8)
    seen = [
        {"a": two}, {"a": one}, {"a": one, "b": one}, {"ab": two}, {"a": two.reshape(1, 2)},
        {"a": np.zeros(1, np.int16)}, {"a": np.zeros(1, BF16)}, {"a": np.zeros(1, np.float16)},
        {"a": np.array([b"\0\0"], dtype=object)}, {"a": np.array([b"\0", b"\0"], dtype=object)},
    ]  # fmt: skip
    assert len({hash_of(inputs) for inputs in seen}) == len(seen)


def make(folder):
    """Write a model that doubles and asks for the cache."""
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes((DATA / "double.onnx").read_bytes())
    (folder / "config.pbtxt").write_text("response_cache { enable: true }")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "models" / "double")


@pytest.fixture
async def repository(folder):
    repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=8), "explicit")
    await repository.load_directory(folder.parent)
    await repository.reload("double")
    yield repository
    await repository.close()


@pytest.fixture
def cache():
    return ResponseCache(1 << 20, 60.0)


@pytest.fixture
def server(repository, cache):
    return HubServer("hub", repository, Metrics(), cache=cache)


def request(*values, model="double", **parameters):
    x = np.array(values, np.float32).reshape(-1, 1).repeat(3, 1)
    return InferRequest(model, {"x": x}, parameters=parameters)


async def ask(server, *values, **options):
    response = await server.infer(request(*values, **options), None)
    return response.outputs["logits"][:, 0].tolist(), response.parameters.get("fogline.cached")


async def test_the_same_request_is_answered_from_the_cache_and_says_so(server):
    assert await ask(server, 1, 2) == ([2, 4], None)
    assert await ask(server, 1, 2) == ([2, 4], True)
    assert await ask(server, 2, 1) == ([4, 2], None)
    assert server.model_config("double", "").response_cache


async def test_hits_are_counted_as_the_statistics_extension_says(server):
    for _ in range(3):
        await ask(server, 1, 2)
    (found,) = server.model_statistics("double", "")
    assert (found.cache_hit.count, found.cache_miss.count) == (2, 1)
    assert min(found.cache_hit.ns, found.cache_miss.ns) > 0
    assert (found.success.count, found.queue.count) == (3, 3)
    assert (found.inference_count, found.execution_count) == (2, 1)
    assert found.compute_infer.count == 1


async def test_a_request_may_leave_the_cache_out(server):
    options = {"fogline.cache": False}
    assert await ask(server, 1, **options) == ([2], None)
    assert await ask(server, 1) == ([2], None)  # it was not kept either
    assert await ask(server, 1, **options) == ([2], None)
    assert await ask(server, 1, **{"fogline.cache": True}) == ([2], True)
    with pytest.raises(BadRequest, match=r"fogline\.cache must be true or false, got 'false'"):
        await ask(server, 1, **{"fogline.cache": "false"})
    (found,) = server.model_statistics("double", "")
    assert (found.cache_hit.count, found.cache_miss.count) == (1, 1)


async def test_no_tenant_gets_what_another_paid_for(server):
    await ask(server, 1)
    before = CALLER.set(replace(LOCAL, tenant="other"))
    assert await ask(server, 1) == ([2], None)
    assert await ask(server, 1) == ([2], True)
    CALLER.reset(before)


async def test_outputs_and_classes_are_chosen_from_what_is_kept(server):
    await ask(server, 1)
    again = request(1)
    again.outputs = ["logits"]
    assert (await server.infer(again, None)).parameters["fogline.cached"] is True
    again.outputs = ["nothing"]
    with pytest.raises(BadRequest, match="unknown output"):
        await server.infer(again, None)


async def test_what_was_answered_cannot_be_changed_by_who_got_it(server):
    await ask(server, 1)
    first = await server.infer(request(1), None)
    with pytest.raises(ValueError, match="read-only"):
        first.outputs["logits"][0] = 7
    assert await ask(server, 1) == ([2], True)


async def test_an_inline_answer_that_its_caller_changes_is_not_the_one_kept(server):
    first = await server.infer(request(1), None)
    if first.outputs["logits"].flags.writeable:
        first.outputs["logits"][:] = 7
    assert await ask(server, 1) == ([2], True)


async def test_a_switch_drops_what_the_old_version_said(server, repository, cache, folder):
    await ask(server, 1)
    assert len(cache) == 1
    (folder / "2").mkdir()
    file = folder / "2" / "model.onnx"
    file.write_bytes((DATA / "double.onnx").read_bytes())
    await repository.reload("double")
    assert await ask(server, 1) == ([2], None)
    assert len(cache) == 1
    # The same version from other bytes: what follows the graph in the file means nothing to it.
    file.write_bytes((DATA / "double.onnx").read_bytes() + b"\x22\x01x")
    await repository.reload("double")
    assert await ask(server, 1) == ([2], None)
    assert len(cache) == 1


async def test_without_the_option_or_the_models_wish_nothing_is_kept(repository, folder, cache):
    server = HubServer("hub", repository, Metrics())
    await ask(server, 1)
    assert await ask(server, 1) == ([2], None)
    assert not server.model_config("double", "").response_cache
    (folder / "config.pbtxt").write_text("")
    await repository.reload("double")
    server = HubServer("hub", repository, Metrics(), cache=cache)
    await ask(server, 1)
    assert await ask(server, 1) == ([2], None)
    assert len(cache) == 0
    (found,) = server.model_statistics("double", "")
    assert found.cache_miss.count == 0


async def test_a_large_input_is_hashed_off_the_loop_and_found_again(server, monkeypatch):
    monkeypatch.setattr(module, "SHORT_BYTES", 0)
    await ask(server, 1)
    assert await ask(server, 1) == ([2], True)


async def test_an_answer_that_failed_is_not_kept(server, cache):
    with pytest.raises(BadRequest):
        await server.infer(InferRequest("double", {"x": np.zeros((1, 4), np.float32)}), None)
    assert len(cache) == 0


class Named(FakeHub):
    """A fake hub that names its digest in the metadata, as a real one does."""

    def model_metadata(self, name, version):
        found = super().model_metadata(name, version)
        return replace(found, properties={"fogline.digest": self.digest} if self.digest else {})


@pytest.mark.parametrize("digest", ["b" * 64, ""])
async def test_an_upstream_is_cached_if_it_names_what_computes(tmp_path, cache, digest):
    hub = Named()
    hub.digest = digest
    async with Serving(hub) as door:
        folder = tmp_path / "models" / HUB_MODEL
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(
            'backend: "upstream" response_cache { enable: true }\n'
            f'parameters {{ key: "url" value {{ string_value: "grpc://{door.address}" }} }}'
        )
        repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=8))
        await repository.load_directory(folder.parent)
        server = HubServer("hub", repository, Metrics(), cache=cache)
        await ask(server, 1, model=HUB_MODEL)
        again = await server.infer(request(1, model=HUB_MODEL), None)
        assert again.parameters.get("fogline.cached", False) == bool(digest)
        assert again.parameters.get("fogline.digest", "") == digest
        assert again.outputs.keys() == {"logits"}
        if digest:
            # Switched without our knowledge: the answer is of another model than was asked for.
            hub.digest = "c" * 64
            await ask(server, 2, model=HUB_MODEL)
            hub.digest = digest
            await repository.find(HUB_MODEL).engine._ask()
            assert await ask(server, 2, model=HUB_MODEL) == ([102], None)
            # A new digest, once it is known, is another model.
            hub.digest = "c" * 64
            await repository.find(HUB_MODEL).engine._ask()
            assert await ask(server, 1, model=HUB_MODEL) == ([101], None)
            assert len(cache) == 1
        await repository.close()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=12))
def test_many_rows_and_few_get_the_same_with_and_without_the_cache(requests):
    async def check():
        repository = Repository(Metrics(), Launcher(threads=1), Limits(max_batch=8))
        with tempfile.TemporaryDirectory() as root:
            make(Path(root, "double"))
            await repository.load_directory(Path(root))
        plain = HubServer("hub", repository, Metrics())
        cached = HubServer("hub", repository, Metrics(), cache=ResponseCache(1 << 20, 60))
        for _ in range(2):
            answers = await asyncio.gather(*(ask(cached, *values) for values in requests))
            expected = await asyncio.gather(*(ask(plain, *values) for values in requests))
            assert [a[0] for a in answers] == [e[0] for e in expected]
        assert all(answer[1] for answer in answers)
        await repository.close()

    asyncio.run(check())
