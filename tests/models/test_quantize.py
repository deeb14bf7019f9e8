"""Every form on real files: what it is made of, what it keeps, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")

from fogline_models import graph, quantize  # noqa: E402 - only after onnx is known to be there
from fogline_models.errors import BadInput  # noqa: E402
from fogline_models.forms import FORMS, Way  # noqa: E402
from fogline_models.quantize import prepared  # noqa: E402
from fogline_models.session import Session  # noqa: E402
from fogline_protocol.tensors import Array  # noqa: E402
from tests.models import onnx_nets as nets  # noqa: E402

pytestmark = pytest.mark.workshop

RNG = np.random.default_rng(0)
PIXELS = {"image": RNG.standard_normal((70, 3, 8, 8)).astype(np.float32)}  # more than one batch
ROWS = {"x": RNG.standard_normal((32, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def traffic(digits: Path) -> dict[str, dict[str, Array]]:
    """Scanned digits to read ranges off, and others to compare answers on."""
    with np.load(digits / "traffic.npz") as archive:
        images = archive["input.image"]
    return {"ranges": {"image": images[:300]}, "items": {"image": images[300:700]}}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return nets.save(nets.cnn(), tmp_path / "fp32.onnx")


def written(fp32: Path, form: str, ranges: dict[str, Array] | None, **keep: Any) -> Any:
    path = fp32.with_name(f"{form}.onnx")
    quantize.quantize(fp32, form, ranges, {"form": form}, path, **keep)
    return onnx.load(str(path))


def arrays(model: Any) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(model: Any) -> set[str]:
    return {node.op_type for node in model.graph.node}


def of(model: Any, operator: str, place: int) -> list[Array]:
    """Return the constants that nodes of one kind have as their input number ``place``."""
    constants = arrays(model)
    return [constants[node.input[place]] for node in model.graph.node if node.op_type == operator]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("release", ["digits-1.1.0", "digits-hub-1.0.0"])
def test_every_form_of_a_trained_net_answers_as_fp32_does(
    digits: Path, tmp_path: Path, traffic: dict[str, dict[str, Array]], form: str, release: str
) -> None:
    fp32 = digits / "bundles" / release / "variants" / "fp32.onnx"
    files = [tmp_path / "one.onnx", tmp_path / "other.onnx"]
    for path in files:
        quantize.quantize(fp32, form, traffic["ranges"], {"a": "1"}, path)
    assert files[0].read_bytes() == files[1].read_bytes()
    # As written, because integer kernels of this processor may not be those it is meant for.
    answers = [
        Session(path, as_written=True).run(traffic["items"], 64)["logits"]
        for path in (fp32, files[0])
    ]
    assert (answers[0].argmax(axis=1) == answers[1].argmax(axis=1)).mean() >= 0.99
    # Dynamic quantization leaves convolutions alone, and these nets hardly have anything else.
    if FORMS[form].way is not Way.DYNAMIC:
        assert files[0].stat().st_size < 0.75 * fp32.stat().st_size


def test_finishing_a_committed_file_again_changes_no_byte(digits: Path, tmp_path: Path) -> None:
    for path in sorted(digits.glob("bundles/**/variants/*.onnx")):
        model = graph.load(path, step="test")
        props = {entry.key: entry.value for entry in model.metadata_props}
        graph.finish(model, props, tmp_path / "again.onnx", opset=20)
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_int8_qdq_has_unsigned_activations_and_weights_of_7_bits(net: Path) -> None:
    model = written(net, "int8-qdq", PIXELS)
    assert {array.dtype for array in of(model, "QuantizeLinear", 2)} == {np.dtype(np.uint8)}
    weights = [
        array for array in arrays(model).values() if array.dtype == np.int8 and array.ndim > 1
    ]
    assert len(weights) == 3
    assert {int(np.abs(array.astype(int)).max()) for array in weights} <= {63, 64}


def test_int8_vnni_uses_all_bits(net: Path) -> None:
    model = written(net, "int8-vnni", PIXELS)
    assert {array.dtype for array in of(model, "QuantizeLinear", 2)} == {np.dtype(np.uint8)}
    weights = [
        array for array in arrays(model).values() if array.dtype == np.int8 and array.ndim > 1
    ]
    assert {int(np.abs(array.astype(int)).max()) for array in weights} == {127}


def test_int8_trt_is_symmetric_and_leaves_biases_in_float(net: Path) -> None:
    model = written(net, "int8-trt", PIXELS)
    zero_points = [*of(model, "QuantizeLinear", 2), *of(model, "DequantizeLinear", 2)]
    assert {array.dtype for array in zero_points} == {np.dtype(np.int8)}
    assert not any(array.any() for array in zero_points)
    assert np.dtype(np.int32) not in {array.dtype for array in arrays(model).values()}


def test_int8_arm_has_signed_activations_of_the_whole_range(net: Path) -> None:
    model = written(net, "int8-arm", PIXELS)
    zero_points = of(model, "QuantizeLinear", 2)
    assert {array.dtype for array in zero_points} == {np.dtype(np.int8)}
    assert any(array.any() for array in zero_points)  # what follows a Relu begins at -128


def test_int8_dynamic_needs_no_inputs_and_touches_no_convolution(net: Path) -> None:
    model = written(net, "int8-dynamic", None)
    assert {"Conv", "DynamicQuantizeLinear", "MatMulInteger"} <= operators(model)
    assert "ConvInteger" not in operators(model)
    (weights,) = of(model, "MatMulInteger", 1)
    assert int(np.abs(weights.astype(int)).max()) in (63, 64)


def test_fp16_keeps_float32_at_its_ends(net: Path) -> None:
    model = written(net, "fp16", PIXELS)
    assert {array.dtype for array in arrays(model).values() if array.ndim > 1} == {
        np.dtype(np.float16)
    }
    ends = [*model.graph.input, *model.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {nets.FLOAT}


def test_ranges_measured_once_give_the_same_file(net: Path, tmp_path: Path) -> None:
    alone = written(net, "int8-qdq", PIXELS).SerializeToString(deterministic=True)
    with prepared(net, PIXELS) as ready:
        ready.write("int8-trt", {}, tmp_path / "first.onnx")
        ready.write("int8-qdq", {"form": "int8-qdq"}, tmp_path / "second.onnx")
    assert (tmp_path / "second.onnx").read_bytes() == alone


def test_ranges_of_large_tensors_are_read_off_a_few_rows_at_once_with_the_same_result(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(net, "int8-qdq", PIXELS).SerializeToString(deterministic=True)
    asked: list[int] = []
    runs = graph.runs

    def recorded(found: Any, inputs: Any, rows: int) -> Any:
        asked.append(rows)
        return runs(found, inputs, rows)

    monkeypatch.setattr(graph, "runs", recorded)
    monkeypatch.setattr(quantize, "RANGE_BYTES", 100_000)
    said: list[str] = []
    monkeypatch.setattr("fogline_models.steps.SAY_EVERY_S", 0.0)
    few = written(net, "int8-qdq", PIXELS, say=said.append)
    assert few.SerializeToString(deterministic=True) == whole
    assert max(rows for rows in asked if rows != quantize.RANGE_BATCH) > 1
    assert "reading ranges, 0 of 70" in said
    monkeypatch.setattr(quantize, "RANGE_BYTES", 1)
    written(net, "int8-qdq", PIXELS, say=said.append)
    assert "reading ranges, 1 of 70" in said


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.needs_inputs])
def test_forms_that_read_ranges_say_so_when_they_get_none(net: Path, form: str) -> None:
    with pytest.raises(BadInput, match=f"^quantize: form {form} reads ranges off training inputs"):
        written(net, form, None)
    assert not net.with_name(f"{form}.onnx").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_node_that_is_kept_stays_fp32_in_every_form(tmp_path: Path, form: str) -> None:
    weights = [nets.random(8, 8, seed=seed) for seed in range(3)]
    net = nets.save(nets.mlp(*weights), tmp_path / "fp32.onnx")
    model = written(net, form, ROWS, keep=["dense1"])
    (kept,) = [node for node in model.graph.node if node.name == "dense1"]
    assert kept.op_type == "MatMul"
    np.testing.assert_array_equal(arrays(model)[kept.input[1]], weights[1])
    others = [array for array in arrays(model).values() if array.shape == (8, 8)]
    assert sorted(str(array.dtype) for array in others).count("float32") == 1


def test_a_gemm_can_be_kept_out_of_dynamic_quantization(net: Path) -> None:
    with prepared(net, None) as ready:
        (gemm,) = [node for node in ready.nodes("int8-dynamic") if node.operator == "Gemm"]
    with pytest.raises(BadInput, match="finds nothing to quantize"):  # it was the only one
        written(net, "int8-dynamic", None, keep=[gemm.name])


def test_nodes_without_names_get_names_to_be_kept_by(net: Path) -> None:
    with prepared(net, PIXELS) as ready:
        nodes = ready.nodes("int8-qdq")
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert all(names)
    assert [node.operator for node in nodes if node.weighs] == ["Conv", "Conv", "Gemm"]
    model = written(net, "int8-qdq", PIXELS, keep=[names[0]])
    assert names[0] in {node.name for node in model.graph.node}


def test_a_pattern_keeps_every_node_that_it_fits(tmp_path: Path) -> None:
    weights = [nets.random(8, 8, seed=seed) for seed in range(3)]
    net = nets.save(nets.mlp(*weights), tmp_path / "fp32.onnx")
    model = written(net, "int8-qdq", ROWS, keep=["dense[01]"])
    others = [array for array in arrays(model).values() if array.shape == (8, 8)]
    assert sorted(str(array.dtype) for array in others) == ["float32", "float32", "int8"]
    with pytest.raises(BadInput, match=r"cannot keep 'front_end/\*': .* the nearest are"):
        written(net, "int8-qdq", ROWS, keep=["dense*", "front_end/*"])


def test_keeping_what_does_not_exist_names_what_is_near(tmp_path: Path) -> None:
    net = nets.save(nets.mlp(nets.random(8, 8), nets.random(8, 8)), tmp_path / "fp32.onnx")
    with pytest.raises(BadInput, match=r"cannot keep 'dense2'.*'dense[01]'"):
        written(net, "int8-qdq", ROWS, keep=["dense2"])


@pytest.mark.parametrize(
    ("ranges", "says"),
    [
        ({"picture": PIXELS["image"]}, "takes image, the training inputs has picture"),
        ({"image": PIXELS["image"].astype(np.float64)}, "expected datatype FP32, got FP64"),
        ({"image": PIXELS["image"][:, :, :4]}, r"expected shape \[-1, 3, 8, 8\]"),
        ({"image": PIXELS["image"][:0]}, "at least 1, got 0"),
        ({"image": np.full((2, 3, 8, 8), np.nan, np.float32)}, "NaN or infinite somewhere"),
    ],
)
def test_training_inputs_that_do_not_fit_are_refused(
    net: Path, ranges: dict[str, Array], says: str
) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        written(net, "int8-qdq", ranges)
    assert str(refused.value).startswith("quantize: ")


def test_an_unknown_form_is_refused_with_those_there_are(net: Path) -> None:
    with pytest.raises(BadInput, match="unknown form 'int4', known are int8-qdq, int8-vnni"):
        written(net, "int4", PIXELS)


def test_a_net_with_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    made = nets.model(
        [onnx.helper.make_node("Exp", ["x"], ["y"])],
        [nets.tensor("x", ["n", 8])],
        [nets.tensor("y", ["n", 8])],
    )
    net = nets.save(made, tmp_path / "fp32.onnx")
    for form in ("int8-qdq", "int8-dynamic"):
        with pytest.raises(BadInput, match=f"form {form} finds nothing to quantize .* has Exp"):
            written(net, form, ROWS)


def test_a_file_that_answers_infinity_once_quantized_is_refused(tmp_path: Path) -> None:
    # The logarithm of small numbers is one, that of the zero which they are rounded to is not.
    made = nets.model(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["h"]),
            onnx.helper.make_node("Log", ["h"], ["y"]),
        ],
        [nets.tensor("x", ["n", 2])],
        [nets.tensor("y", ["n", 2])],
        {"w": np.eye(2, dtype=np.float32)},
    )
    net = nets.save(made, tmp_path / "fp32.onnx")
    rows = {"x": np.array([[1e-4, 1.0], [1.0, 1e-4]], np.float32)}
    with pytest.raises(BadInput, match=r"form int8-qdq .*output 'y' is NaN or infinite in 2 of 4"):
        written(net, "int8-qdq", rows)
    assert not net.with_name("int8-qdq.onnx").exists()


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    huge = nets.random(8, 8)
    huge[3, 3] = 1e5
    net = nets.save(nets.mlp(huge, nets.random(8, 8)), tmp_path / "fp32.onnx")
    with pytest.raises(BadInput, match=r"tensor 'w0' reaches 1e\+05, float16 ends at 65504: keep"):
        written(net, "fp16", ROWS)


def test_values_between_nodes_beyond_float16_are_refused_until_their_nodes_are_kept(
    tmp_path: Path,
) -> None:
    # Each weight fits; what they make together does not, and the last layer brings it back.
    large, small = nets.random(8, 8) * 1e3, nets.random(8, 8) * 1e-5
    net = nets.save(nets.mlp(large, large, small), tmp_path / "fp32.onnx")
    with pytest.raises(BadInput, match=r"tensor 'h1' reaches .* keep node"):
        written(net, "fp16", ROWS)
    written(net, "fp16", ROWS, keep=["dense1", "relu1", "dense2"])


def test_an_output_of_a_kept_node_never_goes_through_float16(tmp_path: Path) -> None:
    net = nets.save(nets.mlp(nets.random(8, 8), nets.random(8, 8) * 1e6), tmp_path / "fp32.onnx")
    with pytest.raises(BadInput, match="reaches"):
        written(net, "fp16", ROWS)
    written(net, "fp16", ROWS, keep=["relu0", "dense1"])
    assert Session(net.with_name("fp16.onnx"), as_written=True).run(ROWS, 32)["y"].max() > 65504


def masked_net(path: Path) -> Path:
    """Write what attention does with its scores, and return where."""
    made = nets.model(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["h"]),
            onnx.helper.make_node("Relu", ["h"], ["r"]),
            onnx.helper.make_node("MatMul", ["r", "v"], ["s"]),
            onnx.helper.make_node("Add", ["s", "mask"], ["masked"]),
            onnx.helper.make_node("Softmax", ["masked"], ["y"]),
        ],
        [nets.tensor("x", ["n", 8])],
        [nets.tensor("y", ["n", 8])],
        {
            "w": nets.random(8, 8),
            "v": nets.random(8, 8),
            "mask": np.array([0.0] * 6 + [np.finfo(np.float32).min] * 2, np.float32),
        },
    )
    return nets.save(made, path)


def test_masks_may_saturate_in_float16(tmp_path: Path) -> None:
    net = masked_net(tmp_path / "fp32.onnx")
    written(net, "fp16", ROWS)
    answers = Session(net.with_name("fp16.onnx")).run(ROWS, 32)["y"]
    assert not answers[:, 6:].any()


def test_a_mask_does_not_take_the_steps_of_the_scores(tmp_path: Path) -> None:
    net = masked_net(tmp_path / "fp32.onnx")
    written(net, "int8-qdq", ROWS)
    wanted = Session(net).run(ROWS, 32)["y"]
    found = Session(net.with_name("int8-qdq.onnx"), as_written=True).run(ROWS, 32)["y"]
    assert np.abs(found - wanted).max() < 0.1


@pytest.mark.parametrize("bias", [(1, 3), (1, 1), (1,), ()])
@pytest.mark.parametrize("form", ["int8-qdq", "int8-trt"])
def test_a_bias_that_broadcasts_is_quantized(
    tmp_path: Path, bias: tuple[int, ...], form: str
) -> None:
    made = nets.model(
        [
            onnx.helper.make_node("MatMul", ["x", "w0"], ["h"]),
            onnx.helper.make_node("Add", ["h", "b0"], ["a"]),  # as TensorFlow writes a dense layer
            onnx.helper.make_node("Gemm", ["a", "w1", "b1"], ["y"], transB=1),
        ],
        [nets.tensor("x", ["n", 8])],
        [nets.tensor("y", ["n", 3])],
        {
            "w0": nets.random(8, 3),
            "b0": np.full((1, 3), 0.5, np.float32),
            "w1": nets.random(3, 3, seed=1),
            "b1": np.full(bias, 0.5, np.float32),
        },
    )
    fp32 = nets.save(made, tmp_path / "fp32.onnx")
    written(fp32, form, ROWS)
    want, found = (
        Session(tmp_path / name, as_written=True).run(ROWS, 32)["y"]
        for name in ("fp32.onnx", f"{form}.onnx")
    )
    np.testing.assert_allclose(found, want, atol=0.1)


def test_what_the_quantizer_cannot_do_is_said_with_what_to_leave_out(tmp_path: Path) -> None:
    made = nets.model(
        [onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        [nets.tensor("x", [2, 8])],
        [nets.tensor("y", [2, 3])],
        {"w": nets.random(8, 3), "b": nets.random(2, 3)},  # a bias for each row
    )
    fp32 = nets.save(made, tmp_path / "fp32.onnx")
    with pytest.raises(BadInput, match=r"cannot give .* the form int8-qdq, leave the form out: "):
        written(fp32, "int8-qdq", ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.onnx"]


def test_a_model_of_an_old_opset_is_quantized_at_the_first_that_can(tmp_path: Path) -> None:
    net = nets.save(nets.cnn(opset=11), tmp_path / "fp32.onnx")
    assert graph.opset_of(written(net, "int8-qdq", PIXELS)) == quantize.PER_CHANNEL_OPSET


def test_a_model_with_a_fixed_batch_is_fed_that_many_at_a_time(tmp_path: Path) -> None:
    net = nets.save(nets.cnn(batch=4), tmp_path / "fp32.onnx")
    model = written(net, "int8-qdq", PIXELS)
    assert graph.signature(model, step="test").inputs[0].shape == (4, 3, 8, 8)
    with pytest.raises(BadInput, match="at least 4, got 3"):
        written(net, "int8-qdq", {"image": PIXELS["image"][:3]})


def test_progress_counts_the_rows_that_a_fixed_batch_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nets.save(nets.cnn(batch=4), tmp_path / "fp32.onnx")
    said: list[str] = []
    monkeypatch.setattr("fogline_models.steps.SAY_EVERY_S", 0.0)
    written(net, "int8-qdq", PIXELS, say=said.append)
    # The rest of two is left out, as runs does.
    assert said == [f"reading ranges, {given} of 70" for given in range(0, 70, 4)]


@pytest.mark.parametrize("form", ["int8-qdq", "int8-dynamic"])
@pytest.mark.parametrize("make", [nets.loop, lambda: nets.branches("")])
def test_models_with_graphs_inside_are_quantized(tmp_path: Path, make: Any, form: str) -> None:
    net = nets.save(make(), tmp_path / "fp32.onnx")
    rows = {"x": RNG.standard_normal((16, 4)).astype(np.float32)}
    written(net, form, rows)
    at_once = 1 if form == "int8-dynamic" else 16  # which branch is taken depends on all of a run
    want, found = (
        Session(path).run(rows, at_once)["y"] for path in (net, net.with_name(f"{form}.onnx"))
    )
    assert np.abs(want - found).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize("form", ["int8-qdq", "int8-dynamic", "fp16"])
def test_what_only_a_branch_reads_is_computed_before_it(tmp_path: Path, form: str) -> None:
    branches = {
        f"{name}_branch": onnx.helper.make_graph(
            [onnx.helper.make_node(operator, ["h"], [f"{name}_y"])],
            name,
            [],
            [nets.tensor(f"{name}_y", None)],
        )
        for name, operator in (("then", "Relu"), ("else", "Neg"))
    }
    made = nets.model(
        [
            onnx.helper.make_node("MatMul", ["x", "w0"], ["h"], name="dense0"),
            onnx.helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            onnx.helper.make_node("Greater", ["most", "zero"], ["positive"]),
            onnx.helper.make_node("If", ["positive"], ["chosen"], **branches),
            onnx.helper.make_node("MatMul", ["chosen", "w1"], ["y"], name="dense1"),
        ],
        [nets.tensor("x", ["n", 8])],
        [nets.tensor("y", ["n", 3])],
        {
            "w0": nets.random(8, 8),
            "w1": nets.random(8, 3, seed=1),
            "zero": np.zeros((), np.float32),
        },
    )
    fp32 = nets.save(made, tmp_path / "fp32.onnx")
    rows = {"x": np.abs(ROWS["x"])}  # far from where the branches part
    written(fp32, form, rows)
    want, found = (
        Session(tmp_path / name, as_written=True).run(rows, 32)["y"]
        for name in ("fp32.onnx", f"{form}.onnx")
    )
    np.testing.assert_allclose(found, want, atol=0.2)


@pytest.mark.parametrize("form", ["int8-qdq", "int8-dynamic", "fp16"])
def test_sequences_between_nodes_do_not_stop_a_form(tmp_path: Path, form: str) -> None:
    made = nets.model(
        [
            onnx.helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=1),
            onnx.helper.make_node("SequenceAt", ["parts", "first"], ["h"]),
            onnx.helper.make_node("MatMul", ["h", "w"], ["y"]),
        ],
        [nets.tensor("x", ["n", 8])],
        [nets.tensor("y", ["n", 3])],
        {
            "sizes": np.array([4, 4], np.int64),
            "first": np.zeros((), np.int64),
            "w": nets.random(4, 3),
        },
    )
    fp32 = nets.save(made, tmp_path / "fp32.onnx")
    written(fp32, form, ROWS)
    want, found = (
        Session(tmp_path / name, as_written=True).run(ROWS, 32)["y"]
        for name in ("fp32.onnx", f"{form}.onnx")
    )
    np.testing.assert_allclose(found, want, atol=0.2)


def test_a_fault_of_our_own_is_not_said_to_be_onnxruntimes(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("ours")

    with prepared(net, PIXELS) as ready:
        monkeypatch.setattr(graph, "runs", broken)  # first of all, to measure a single row
        with pytest.raises(AttributeError, match="ours"):
            ready.write("int8-qdq", {}, net.with_name("int8-qdq.onnx"))


def test_a_model_of_onnx_itself_is_quantized(tmp_path: Path) -> None:
    net = (
        Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_squeezenet.onnx"
    )
    graph.adopt(net, {}, tmp_path / "fp32.onnx")
    signature = graph.signature(onnx.load(str(tmp_path / "fp32.onnx")), step="test")
    written(tmp_path / "fp32.onnx", "int8-qdq", graph.random_inputs(signature, 1))


def test_a_model_with_external_data_is_quantized(tmp_path: Path) -> None:
    net = nets.save(nets.cnn(), tmp_path / "fp32.onnx", external=True)
    whole = nets.save(nets.cnn(), tmp_path / "whole.onnx")
    assert written(net, "int8-qdq", PIXELS) == written(whole, "int8-qdq", PIXELS)
