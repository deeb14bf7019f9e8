"""Export, quantization and a whole build, with torch: skipped where it is not installed."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="needs torch: pip install 'fogline[models]' in an environment of its own"
)
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'fogline[models]'")

from digits import data, nets  # noqa: E402 - only after torch is known to be there
from fogline_models import recipe as recipes  # noqa: E402
from fogline_models.build import build  # noqa: E402
from fogline_models.errors import BadInput  # noqa: E402
from fogline_models.export import export  # noqa: E402
from fogline_models.gates import Gates  # noqa: E402
from fogline_models.graph import Signature, signature  # noqa: E402
from fogline_models.quantize import quantize  # noqa: E402
from fogline_models.session import Session  # noqa: E402
from fogline_models.steps import Steps  # noqa: E402
from fogline_protocol import release  # noqa: E402
from fogline_protocol.tensors import Array, TensorSpec  # noqa: E402

pytestmark = pytest.mark.workshop

INPUTS = (TensorSpec("image", "FP32", (-1, 1, data.SIDE, data.SIDE)),)
OUTPUTS = (TensorSpec("logits", "FP32", (-1, nets.CLASSES)),)


def examples(count: int = 7) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {"image": rng.random((count, 1, data.SIDE, data.SIDE), dtype=np.float32)}


def net() -> Any:
    torch.manual_seed(0)
    return nets.edge_net(4).eval()


def export_to(folder: Path, module: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fp32.onnx"
    export(module, INPUTS, OUTPUTS, examples(), 16, {"b": "2", "a": "1"}, path)
    return path


def test_nodes_are_named_after_the_module_that_they_come_from(tmp_path: Path) -> None:
    inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(data.SIDE**2, 10))
    module = torch.nn.Sequential()
    module.add_module("front_end", torch.nn.Sigmoid())
    module.add_module("classifier", inner)
    model = onnx.load(str(export_to(tmp_path, module.eval())))
    owners = {node.op_type: node.name.rpartition("/")[0] for node in model.graph.node}
    assert owners["Sigmoid"] == "front_end"
    assert owners["Gemm"] == "classifier.1"


def test_a_file_that_differs_from_torch_only_on_zeros_is_refused(tmp_path: Path) -> None:
    class Loud(torch.nn.Module):  # type: ignore[misc]  # unknown where torch is not installed
        def forward(self, image: Any) -> Any:
            return torch.log(image * image + 1e-9).flatten(1)[:, :10]

    # The exporter drops the addition: on silence the file answers -inf where torch has -20.7.
    with pytest.raises(BadInput, match=r"^export: output 'logits' differs .* on inputs of zeros"):
        export_to(tmp_path, Loud().eval())


def test_an_export_computes_what_torch_computes_at_any_batch(tmp_path: Path) -> None:
    module = net()
    session = Session(export_to(tmp_path, module))
    for count in (1, 5, 16):
        with torch.no_grad():
            want = module(torch.from_numpy(examples(count)["image"])).numpy()
        np.testing.assert_allclose(session.run(examples(count), 16)["logits"], want, atol=1e-5)


def test_the_same_net_gives_the_same_bytes_in_another_folder(tmp_path: Path) -> None:
    first = export_to(tmp_path / "a", net())
    second = export_to(tmp_path / "somewhere" / "else", net())
    assert first.read_bytes() == second.read_bytes()
    assert b".py" not in first.read_bytes()
    found = onnx.load(str(first))
    assert [(p.key, p.value) for p in found.metadata_props] == [("a", "1"), ("b", "2")]
    quantized = [path.with_name("int8.onnx") for path in (first, second)]
    for source, target in zip((first, second), quantized, strict=True):
        quantize(source, "int8-qdq", examples(100), {}, target)
    assert quantized[0].read_bytes() == quantized[1].read_bytes()


def test_quantizing_keeps_the_answers_and_uses_integers(tmp_path: Path) -> None:
    fp32 = export_to(tmp_path, net())
    quantize(fp32, "int8-qdq", examples(100), {}, tmp_path / "int8.onnx")
    operators = {node.op_type for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    before = Session(fp32).run(examples(100), 16)["logits"]
    after = Session(tmp_path / "int8.onnx").run(examples(100), 16)["logits"]
    assert np.abs(before - after).max() < 0.1 * np.abs(before).max()


def test_quantized_weights_leave_room_for_the_sums_of_processors_without_vnni(
    tmp_path: Path,
) -> None:
    fp32 = export_to(tmp_path, net())
    quantize(fp32, "int8-qdq", examples(100), {}, tmp_path / "int8.onnx")
    graph = onnx.load(str(tmp_path / "int8.onnx")).graph
    arrays = map(onnx.numpy_helper.to_array, graph.initializer)
    weights = [array for array in arrays if array.dtype == np.int8 and array.ndim > 1]
    assert len(weights) == 3  # two convolutions and a linear layer
    assert {int(np.abs(array.astype(int)).max()) for array in weights} <= {63, 64}


def test_a_net_in_train_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"train mode, call \.eval\(\)"):
        export_to(tmp_path, net().train())
    assert list(tmp_path.iterdir()) == []


def test_a_net_with_a_part_in_train_mode_is_refused_with_its_name(tmp_path: Path) -> None:
    module = net()
    module[1].train()
    with pytest.raises(BadInput, match=r"1 \(\w+\), a part of the module, is in train mode"):
        export_to(tmp_path, module)
    assert list(tmp_path.iterdir()) == []


class Named(torch.nn.Module):  # type: ignore[misc]
    """Answers as models of transformers do: by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, image: Any) -> Any:
        return {"logits": self.net(image)}


def test_a_net_that_answers_with_a_dictionary_is_told_to_return_tensors(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"returns dict, not tensors: wrap it in a module"):
        export_to(tmp_path, Named().eval())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_net_is_told_to_come_as_a_module_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot export TorchScript.* or give an ONNX file"):
        export_to(tmp_path, torch.jit.trace(net(), torch.zeros(1, 1, 8, 8)))


def test_a_net_in_half_precision_is_told_to_come_in_float32(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is float16: return the module in float32, \.float\(\)"):
        export_to(tmp_path, net().half())


def test_a_net_that_answers_nan_is_refused(tmp_path: Path) -> None:
    module = net()
    with torch.no_grad():
        module[-1].bias[3] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        export_to(tmp_path, module)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


class Encoder(torch.nn.Module):  # type: ignore[misc]
    """Tokens and their mask, ``[n, s]`` twice, to a mean ``[n, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = torch.nn.Linear(16, 3)

    def forward(self, tokens: Any, mask: Any) -> Any:
        hidden = self.layer(self.embed(tokens), src_key_padding_mask=mask == 0)
        seen = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * seen).sum(1) / seen.sum(1).clamp(min=1))


TOKENS = tuple(TensorSpec(name, "INT64", (-1, -1)) for name in ("tokens", "mask"))
MEAN = (TensorSpec("mean", "FP32", (-1, 3)),)
SEQUENCE = {spec.name: {1: ("sequence", 2, 64)} for spec in TOKENS}


def sentences(count: int = 3, length: int = 12) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, length + 1, (count, 1))
    mask = (np.arange(length) < lengths).astype(np.int64)
    return {"tokens": rng.integers(0, 50, (count, length)), "mask": mask}


def test_an_export_may_vary_in_several_axes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = Encoder().eval(), tmp_path / "fp32.onnx"
    export(module, TOKENS, MEAN, sentences(), 16, {}, path, dynamic=SEQUENCE)
    session = Session(path)
    for count, length in ((1, 2), (16, 64), (5, 7)):
        given = sentences(count, length)
        with torch.no_grad():
            want = module(*map(torch.from_numpy, given.values())).numpy()
        np.testing.assert_allclose(session.run(given, 16)["mean"], want, atol=1e-5)
    found = signature(onnx.load(str(path)), {"sequence": (2, 64)}, step="test")
    assert found == Signature(TOKENS, MEAN, True, SEQUENCE)


def test_examples_beyond_their_bounds_are_refused(tmp_path: Path) -> None:
    for length in (1, 65):
        with pytest.raises(BadInput, match=rf"axis 1 \(sequence\) is {length}, its bounds are 2"):
            export(
                Encoder().eval(), TOKENS, MEAN, sentences(3, length), 16, {},
                tmp_path / "fp32.onnx", dynamic=SEQUENCE,
            )  # fmt: skip


class Bessel(torch.nn.Module):  # type: ignore[misc]
    def forward(self, image: Any) -> Any:
        return torch.special.bessel_j0(image.flatten(1)[:, :10])


class Branch(torch.nn.Module):  # type: ignore[misc]
    def forward(self, image: Any) -> Any:
        logits = image.flatten(1)[:, :10]
        return logits * 2 if logits.sum() > 0 else logits


class OfSeven(torch.nn.Module):  # type: ignore[misc]
    def forward(self, image: Any) -> Any:
        return image.reshape(7, -1)[:, :10]


class LovesSeven(torch.nn.Module):  # type: ignore[misc]
    def forward(self, image: Any) -> Any:
        logits = image.flatten(1)[:, :10]
        return logits * 2 if len(image) == 7 else logits


class Twins(torch.nn.Module):  # type: ignore[misc]
    def forward(self, image: Any) -> Any:
        logits = image.flatten(1)[:, :10]
        return logits, logits + 1


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Bessel, r"the module uses prims\.bessel_j0, which torch cannot write in ONNX opset 20"),
        (Branch, r"branches on the values of a tensor .*: write it with torch\.where"),
        (OfSeven, r"the module itself fails on inputs of shape image \[1, 1, 8, 8\]"),
        (LovesSeven, r"axis 0 \(batch\) of input 'image' came out fixed at 7"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], module: Any, says: str
) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        export_to(tmp_path, module().eval())
    assert str(refused.value).startswith("export: ")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")  # torch would print pages


def test_more_outputs_than_were_named_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^export: "):
        export_to(tmp_path, Twins().eval())
    assert list(tmp_path.iterdir()) == []


class Forgetful(torch.nn.Module):  # type: ignore[misc]
    """Computes something else while it is exported."""

    def forward(self, image: Any) -> Any:
        logits = image.flatten(1)[:, :10]
        return logits * 2 if torch.compiler.is_exporting() else logits


def test_a_file_that_computes_something_else_than_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"differs from torch by .* on the examples, at most 1e-04"):
        export_to(tmp_path, Forgetful().eval())
    assert list(tmp_path.iterdir()) == []


def test_no_two_splits_share_a_digit_by_content() -> None:
    images = [{image.tobytes() for image in split.images} for split in data.splits().values()]
    for one, other in itertools.combinations(images, 2):
        assert one.isdisjoint(other)
    assert sum(map(len, images)) == data.TOTAL


def test_training_again_gives_the_same_weights() -> None:
    items = data.make()["clean"]
    runs = [
        nets.train(lambda: nets.edge_net(4), nets.Training(epochs=2), items, lambda *_: None)
        for _ in range(2)
    ]
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(one, other)


def briefly(path: Path) -> recipes.Recipe:
    """Return the family's recipe with a few epochs: the steps are the same, the nets are worse."""
    found = recipes.read(path)
    return dataclasses.replace(
        found,
        gates=Gates(max_accuracy_loss=None, min_agreement=None, max_latency_ratio=None),
        release=tuple(
            dataclasses.replace(
                each,
                gates=None,
                source=dataclasses.replace(
                    each.source, arguments={**each.source.arguments, "epochs": 2}
                ),
            )
            for each in found.release
        ),
    )


@pytest.mark.timeout(300)
def test_a_build_in_another_folder_gives_the_same_digests(tmp_path: Path, digits: Path) -> None:
    lines: list[str] = []
    places = [tmp_path / "a", tmp_path / "somewhere" / "else"]
    for at, folder in enumerate(places):
        steps = Steps(tmp_path / f"cache{at}", lines.append)
        build(briefly(digits), folder, steps, lines.append)
    assert any("training, loss" in line for line in lines)
    for name in ("digits-1.0.0", "digits-1.1.0", "digits-hub-1.0.0", "broken/digits-1.2.0"):
        first, second = (release.read(place / "bundles" / name) for place in places)
        assert first.sha256 == second.sha256
    for name in ("calibration.npz", "traffic.npz", "drift.npz", "splits.json"):
        one, other = ((place / name).read_bytes() for place in places)
        assert one == other
