"""Taking in ONNX files that somebody else made, and what every file of ours is stripped of."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")

from fogline_models import graph  # noqa: E402 - only after onnx is known to be there
from fogline_models.errors import BadInput  # noqa: E402
from fogline_models.session import Session  # noqa: E402
from fogline_protocol.tensors import TensorSpec  # noqa: E402
from tests.models import onnx_nets as nets  # noqa: E402

pytestmark = pytest.mark.workshop

BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
PIXELS = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)


def refusal(made: Any, tmp_path: Path, **dynamic: dict[int, tuple[str, int, int]]) -> str:
    source = nets.save(made, tmp_path / "given.onnx")
    with pytest.raises(BadInput) as refused:
        graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic=dynamic)
    assert [path.name for path in tmp_path.iterdir()] == ["given.onnx"]  # nothing half-written
    return str(refused.value)


def test_a_model_in_two_files_becomes_one_that_computes_the_same(tmp_path: Path) -> None:
    whole = nets.save(nets.cnn(), tmp_path / "whole.onnx")
    (tmp_path / "parts").mkdir()
    parts = nets.save(nets.cnn(), tmp_path / "parts" / "net.onnx", external=True)
    assert parts.stat().st_size < whole.stat().st_size
    found = graph.adopt(parts, {"by": "us"}, tmp_path / "taken.onnx")
    assert found.batched
    assert found.inputs == (TensorSpec("image", "FP32", (-1, 3, 8, 8)),)
    assert found.outputs == (TensorSpec("logits", "FP32", (-1, 5)),)
    want = Session(whole).run({"image": PIXELS}, 3)["logits"]
    (tmp_path / "parts" / "weights").unlink()
    np.testing.assert_array_equal(
        Session(tmp_path / "taken.onnx").run({"image": PIXELS}, 3)["logits"], want
    )


def test_external_data_that_is_missing_is_named(tmp_path: Path) -> None:
    path = nets.save(nets.cnn(), tmp_path / "net.onnx", external=True)
    (tmp_path / "weights").unlink()
    with pytest.raises(BadInput, match=r"^export: .*net\.onnx keeps tensor 'w0' in weights, which"):
        graph.adopt(path, {}, tmp_path / "taken.onnx")


def test_external_data_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = nets.save(nets.cnn(), tmp_path / "net.onnx", external=True)
    with (tmp_path / "weights").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(BadInput, match=r"^export: .*external data"):
        graph.adopt(path, {}, tmp_path / "taken.onnx")
    assert not (tmp_path / "taken.onnx").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no graph"),
        (b"\x00not onnx", "not an intact ONNX file"),
        (b"PK\x03\x04 a zip", "not an intact ONNX file"),
        (None, "No such file"),
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=says) as refused:
        graph.load(path, step="quantize")
    assert str(refused.value).startswith("quantize: ")
    assert "\n" not in str(refused.value)


def test_a_model_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    content = nets.cnn().SerializeToString()
    path = tmp_path / "net.onnx"
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(BadInput, match=r"^export: "):
            graph.adopt(path, {}, tmp_path / "taken.onnx")
    assert not (tmp_path / "taken.onnx").exists()


def test_operators_that_onnxruntime_lacks_are_named(tmp_path: Path) -> None:
    def using(operator: str, domain: str) -> Any:
        return nets.model(
            [onnx.helper.make_node(operator, ["x"], ["y"], domain=domain)],
            [nets.tensor("x", ["n", 4])],
            [nets.tensor("y", ["n", 4])],
            domains=[domain] if domain else [],
        )

    said = refusal(using("Fancy", "com.acme"), tmp_path)
    assert said.startswith("export: ")
    assert "has no operator com.acme:Fancy" in said
    assert "write the model without it" in said
    assert "Fancy" in refusal(using("Fancy", ""), tmp_path)


def test_an_opset_from_the_future_is_refused_with_the_one_that_runs(tmp_path: Path) -> None:
    made = nets.cnn()
    made.opset_import[0].version = 1000
    assert refusal(made, tmp_path).startswith("export: ")


@pytest.mark.parametrize("name", ["light_squeezenet", "light_shufflenet"])
def test_a_model_of_onnx_itself_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    source = BACKEND / f"{name}.onnx"
    before = graph.opset_of(graph.load(source, step="test"))
    found = graph.adopt(source, {"origin": "onnx"}, tmp_path / "taken.onnx")
    taken = graph.load(tmp_path / "taken.onnx", step="test")
    assert graph.opset_of(taken) == before != 20
    assert not found.batched  # these have a batch of one
    assert found.inputs[0].shape == (1, 3, 224, 224)


def test_traces_are_stripped_from_subgraphs_and_functions_too(tmp_path: Path) -> None:
    written = []
    for trace in ("/home/alice/net.py", "/srv/build/17/net.py"):
        source = nets.save(nets.branches(trace), tmp_path / "given.onnx")
        graph.adopt(source, {"b": "2", "a": "1"}, tmp_path / "taken.onnx")
        written.append((tmp_path / "taken.onnx").read_bytes())
        assert trace.encode() in source.read_bytes()
        assert b"net.py" not in written[-1]
    assert written[0] == written[1]
    taken = onnx.load_from_string(written[0])
    # An opset that only a branch uses stays, one that nothing uses goes.
    assert {entry.domain for entry in taken.opset_import} == {"", "com.microsoft", "local"}
    assert [entry.key for entry in taken.metadata_props] == ["a", "b"]


def test_a_loop_is_taken_in(tmp_path: Path) -> None:
    source = nets.save(nets.loop(), tmp_path / "given.onnx")
    assert graph.adopt(source, {}, tmp_path / "taken.onnx").batched


def open_axes(first: int | str | None, second: int | str | None) -> Any:
    return nets.model(
        [onnx.helper.make_node("Relu", ["tokens"], ["y"])],
        [nets.tensor("tokens", [first, second])],
        [nets.tensor("y", [first, second])],
    )


@pytest.mark.parametrize(
    ("axes", "bounds", "batched", "shape"),
    [
        (("n", 4), {}, True, (-1, 4)),
        ((None, 4), {}, True, (-1, 4)),
        ((1, 4), {}, False, (1, 4)),
        (("n", "s"), {"s": (1, 9)}, True, (-1, -1)),
        ((None, None), {"tokens[1]": (1, 9)}, True, (-1, -1)),
        ((1, "s"), {"s": (2, 9)}, False, (1, -1)),
    ],
)
def test_the_batch_is_the_axis_that_everything_has_open(
    axes: tuple[int | str | None, int | str | None],
    bounds: dict[str, tuple[int, int]],
    batched: bool,
    shape: tuple[int, int],
) -> None:
    found = graph.signature(open_axes(*axes), bounds, step="import")
    assert found.batched == batched
    assert found.inputs == (TensorSpec("tokens", "FP32", shape),)
    assert {axis for axes in found.dynamic.values() for axis in axes} == ({1} if bounds else set())


def test_an_open_axis_without_bounds_is_refused_with_what_to_write(tmp_path: Path) -> None:
    said = refusal(open_axes("n", "sequence"), tmp_path)
    assert said.startswith("export: axis 1 of input 'tokens' is open")
    assert 'dynamic = { "tokens" = { 1 = ["sequence", SIZE, SIZE] } }' in said
    assert '["tokens1", SIZE, SIZE]' in refusal(open_axes("n", None), tmp_path)
    assert "rise from 1" in refusal(open_axes("n", "s"), tmp_path, tokens={1: ("s", 9, 2)})


def pixels(rows: Any, *sizes: Any) -> Any:
    """The mean of each channel, ``pixels [rows, 3, *sizes] -> y [rows, 3]``."""
    return nets.model(
        [onnx.helper.make_node("ReduceMean", ["pixels"], ["y"], axes=[2, 3], keepdims=0)],
        [nets.tensor("pixels", [rows, 3, *sizes])],
        [nets.tensor("y", [rows, 3])],
    )


@pytest.mark.parametrize(
    "open_size",
    [None, "?", "None", -1, 0],
    ids=["without a name", "question mark", "none", "minus one", "zero"],
)
def test_every_way_to_write_open_is_understood_and_bounded_by_its_axis(
    tmp_path: Path, open_size: Any
) -> None:
    source = nets.save(pixels(open_size, open_size, open_size), tmp_path / "given.onnx")
    examples = {"pixels": np.zeros((2, 3, 4, 9), np.float32)}
    with pytest.raises(BadInput) as refused:
        graph.adopt(source, {}, tmp_path / "taken.onnx", examples=examples)
    proposed = str(refused.value).partition("say ")[2].partition(" in the recipe")[0]
    assert tomllib.loads(proposed) == {
        "dynamic": {"pixels": {"2": ["pixels2", 4, 4], "3": ["pixels3", 9, 9]}}
    }
    dynamic = {"pixels": {2: ("height", 4, 4), 3: ("width", 8, 16)}}
    found = graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic=dynamic, examples=examples)
    assert found.batched
    assert found.inputs == (TensorSpec("pixels", "FP32", (-1, 3, 4, -1)),)  # equal bounds fix it
    assert found.dynamic == {"pixels": {3: ("width", 8, 16)}}
    taken = graph.load(tmp_path / "taken.onnx", step="test")
    assert graph.signature(taken, {"width": (8, 16)}, step="test") == found


@pytest.mark.parametrize(
    ("sound", "state"),
    [(["n", 8], [2, "n", 8]), ([None, None], [2, None, 8]), ([1, 8], [2, 1, 8])],
    ids=["named", "without names", "fixed"],
)
def test_a_state_whose_batch_is_not_in_front_is_refused_with_what_to_transpose(
    tmp_path: Path, sound: list[Any], state: list[Any]
) -> None:
    made = nets.model(
        [
            onnx.helper.make_node("Add", ["sound", "state"], ["next"]),
            onnx.helper.make_node("ReduceSum", ["next"], ["y"], keepdims=0),
        ],
        [nets.tensor("sound", sound), nets.tensor("state", state)],
        [nets.tensor("next", state), nets.tensor("y", [])],
    )
    source = nets.save(made, tmp_path / "given.onnx")
    examples = {"sound": PIXELS[:, 0, 0], "state": np.zeros((2, 1, 8), np.float32)}
    with pytest.raises(BadInput) as refused:
        graph.adopt(source, {}, tmp_path / "taken.onnx", examples=examples)
    said = str(refused.value)
    assert "no first axis in common: sound [" in said
    assert f"state [2, {state[1] or '?'}, 8], next [2, {state[1] or '?'}, 8], y []" in said
    assert "Transpose what has its batch elsewhere, such as a state" in said


def test_bounds_hold_for_every_axis_of_that_name(tmp_path: Path) -> None:
    made = nets.model(
        [onnx.helper.make_node("Add", ["tokens", "mask"], ["y"])],
        [nets.tensor("tokens", ["n", "seq"]), nets.tensor("mask", ["n", "seq"])],
        [nets.tensor("y", ["n", "seq"])],
    )
    source = nets.save(made, tmp_path / "given.onnx")
    for most, shape in ((9, (-1, -1)), (2, (-1, 2))):
        dynamic = {"tokens": {1: ("length", 2, most)}}
        found = graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic=dynamic)
        assert [spec.shape for spec in (*found.inputs, *found.outputs)] == [shape] * 3
    both = {"tokens": {1: ("length", 2, 9)}, "mask": {1: ("other", 2, 8)}}
    with pytest.raises(BadInput, match="axes named 'seq' are of one size"):
        graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic=both)


@pytest.mark.parametrize("name", ["None", "?", "N"])
def test_bounds_of_an_axis_that_is_named_as_the_batch_leave_the_batch_open(
    tmp_path: Path, name: str
) -> None:
    made = nets.model(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        [nets.tensor("x", [name, name, 8])],
        [nets.tensor("y", [name, name, 8])],
    )
    said = refusal(made, tmp_path)
    assert 'dynamic = { "x" = { 1 = ["x1", SIZE, SIZE] } }' in said
    source = tmp_path / "given.onnx"
    for own in ("x1", name):  # also in the words of a recipe that took the file's name
        found = graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic={"x": {1: (own, 4, 4)}})
        assert found.batched
        assert found.inputs == (TensorSpec("x", "FP32", (-1, 4, 8)),)
        found = graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic={"x": {1: (own, 2, 4)}})
        assert found.inputs == (TensorSpec("x", "FP32", (-1, -1, 8)),)
        ((_, least, most),) = found.dynamic["x"].values()
        assert (least, most) == (2, 4)


def test_a_new_name_of_an_axis_is_one_that_nothing_else_has(tmp_path: Path) -> None:
    made = nets.model(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        [nets.tensor("x", ["n", "n", "x1"])],
        [nets.tensor("y", ["n", "n", "x1"])],
    )
    source = nets.save(made, tmp_path / "given.onnx")
    dynamic = {"x": {1: ("n", 2, 4), 2: ("x1", 3, 9)}}
    found = graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic=dynamic)
    assert found.dynamic == {"x": {1: ("x1_", 2, 4), 2: ("x1", 3, 9)}}


def test_who_bounds_the_first_axis_too_means_what_the_file_says(tmp_path: Path) -> None:
    made = nets.model(
        [onnx.helper.make_node("MatMul", ["links", "nodes"], ["y"])],
        [nets.tensor("links", ["n", "n"]), nets.tensor("nodes", ["n", 8])],
        [nets.tensor("y", ["n", 8])],
    )
    source = nets.save(made, tmp_path / "given.onnx")
    dynamic = {"links": {0: ("n", 5, 5), 1: ("n", 5, 5)}}
    found = graph.adopt(source, {}, tmp_path / "taken.onnx", dynamic=dynamic)
    assert [spec.shape for spec in found.inputs] == [(5, 5), (5, 8)]


def test_bounds_for_what_the_file_does_not_have_open_are_refused(tmp_path: Path) -> None:
    made = pixels("n", "h", "w")
    said = refusal(made, tmp_path, image={2: ("h", 1, 4)})
    assert said == "export: dynamic speaks of an input 'image', the model takes pixels"
    said = refusal(made, tmp_path, pixels={1: ("c", 1, 4)})
    assert said == "export: axis 1 of input 'pixels' is 3 in the file: leave it out of dynamic"
    assert "is absent in the file" in refusal(made, tmp_path, pixels={4: ("d", 1, 4)})


def test_two_first_axes_of_different_names_are_no_batch() -> None:
    made = nets.model(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["y"])],
        [nets.tensor("a", ["rows", 4]), nets.tensor("b", ["inner", 3])],
        [nets.tensor("y", ["rows", 3])],
    )
    found = graph.signature(made, {"rows": (1, 8), "inner": (4, 4)}, step="import")
    assert not found.batched
    assert found.dynamic == {"a": {0: ("rows", 1, 8)}, "b": {0: ("inner", 4, 4)}}


def test_a_tensor_that_no_request_can_carry_is_refused(tmp_path: Path) -> None:
    made = open_axes("n", 4)
    made.graph.output[0].CopyFrom(
        onnx.helper.make_tensor_sequence_value_info("y", nets.FLOAT, ["n", 4])
    )
    with pytest.raises(BadInput, match="'y' is a sequence_type: requests carry plain tensors"):
        graph.signature(made, step="import")


def test_weights_listed_as_inputs_are_no_inputs() -> None:
    made = nets.cnn()
    made.graph.input.append(nets.tensor("w0", [8, 3, 3, 3]))  # as files before IR 4 have it
    assert [spec.name for spec in graph.signature(made, step="import").inputs] == ["image"]


def test_a_model_that_answers_nan_is_refused(tmp_path: Path) -> None:
    made = nets.mlp(np.full((4, 2), np.nan, np.float32))
    assert "output 'y' is NaN or infinite in 4 of 4 values" in refusal(made, tmp_path)


def test_examples_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    source = nets.save(nets.cnn(), tmp_path / "given.onnx")
    for examples, says in (
        ({"picture": PIXELS}, "takes image, an example has picture"),
        ({"image": PIXELS[:, :1]}, r"input 'image' of an example: expected shape \[-1, 3, 8, 8\]"),
        ({"image": PIXELS[:0]}, "at least 1, got 0"),
    ):
        with pytest.raises(BadInput, match=says):
            graph.adopt(source, {}, tmp_path / "taken.onnx", examples=examples)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^export: cannot write .*No such file or directory"):
        graph.finish(nets.cnn(), {}, tmp_path / "absent" / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_put_in_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(BadInput, match="cannot write"):
        graph.finish(nets.cnn(), {}, tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_another_opset_than_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="asked for opset 20, the tool answered with 17"):
        graph.finish(nets.cnn(), {}, tmp_path / "net.onnx", opset=20)
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_finishing_a_finished_model_changes_no_byte(
    tmp_path_factory: pytest.TempPathFactory, props: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("finish") / "net.onnx"
    graph.finish(nets.branches("/a/b.py"), props, path)
    first = path.read_bytes()
    graph.finish(graph.load(path, step="test"), dict(reversed(props.items())), path)
    assert path.read_bytes() == first


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_sorting_restores_an_order_that_runs(order: list[int]) -> None:
    made = nets.cnn()
    nodes = list(made.graph.node)
    made.graph.ClearField("node")
    made.graph.node.extend(nodes[index] for index in order)
    graph.sort_nodes(made)
    assert list(made.graph.node) == nodes


def test_sorting_leaves_what_runs_as_it_is() -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Relu", ["x"], ["root"]),
        *(node("Relu", ["root"], [f"side{index}"]) for index in range(5)),
        node("Sum", [f"side{index}" for index in range(5)], ["y"]),
    ]
    made = nets.model(nodes, [nets.tensor("x", ["n"])], [nets.tensor("y", ["n"])])
    graph.sort_nodes(made)
    assert list(made.graph.node) == nodes


def test_sorting_sees_what_a_branch_reads() -> None:
    made = nets.branches("")
    nodes = list(made.graph.node)
    made.graph.ClearField("node")
    made.graph.node.extend(reversed(nodes))
    graph.sort_nodes(made)
    assert list(made.graph.node) == nodes


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)])
def test_sorting_keeps_branches_that_name_their_output_as_the_node_does(
    order: tuple[int, ...],
) -> None:
    node = onnx.helper.make_node

    def branch(operator: str) -> Any:
        return onnx.helper.make_graph(
            [node(operator, ["h"], ["y"])], operator, [], [nets.tensor("y", None)]
        )

    nodes = [
        node("Neg", ["x"], ["h"]),
        node("ReduceMax", ["h"], ["most"], keepdims=0),
        node("Greater", ["most", "zero"], ["positive"]),
        node("If", ["positive"], ["y"], then_branch=branch("Relu"), else_branch=branch("Neg")),
        node("Neg", ["y"], ["z"]),
    ]
    made = nets.model(
        [nodes[index] for index in order],
        [nets.tensor("x", ["n", 8])],
        [nets.tensor("z", ["n", 8])],
        {"zero": np.zeros((), np.float32)},
    )
    graph.sort_nodes(made)
    assert list(made.graph.node) == nodes


def test_what_a_graph_inside_makes_itself_is_not_read() -> None:
    (made,) = (node for node in nets.loop().graph.node if node.op_type == "Loop")
    assert set(graph.reads(made)) == {"three", "", "x", "w"}


def test_sorting_loses_no_node_of_a_circle() -> None:
    node = onnx.helper.make_node
    nodes = [
        node("Add", ["x", "b"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Neg", ["x"], ["c"]),
        node("Sum", ["a", "c"], ["y"]),
    ]
    made = nets.model(nodes, [nets.tensor("x", ["n"])], [nets.tensor("y", ["n"])])
    graph.sort_nodes(made)
    assert list(made.graph.node) == [nodes[2], nodes[0], nodes[1], nodes[3]]
