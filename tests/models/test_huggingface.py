"""The Hugging Face source on tiny models made from a config: skipped where optimum is missing."""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
torch = pytest.importorskip(
    "torch", reason="needs torch: pip install 'fogline[models]' in an environment of its own"
)
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'fogline[models,hf]'"
)
pytest.importorskip("optimum.onnxruntime", reason="needs optimum: pip install 'fogline[hf]'")

import onnx  # noqa: E402 - only after torch is known to be there
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from fogline_models import build, data, graph, huggingface, inspection, sources, steps  # noqa: E402
from fogline_models.data import Items  # noqa: E402
from fogline_models.errors import BadInput, MissingExtra  # noqa: E402
from fogline_models.recipe import Data, Recipe, ReleaseRecipe, Source, read  # noqa: E402
from fogline_models.session import Session  # noqa: E402
from fogline_protocol import documents  # noqa: E402
from fogline_protocol.tensors import Array  # noqa: E402
from tests.models import small_family, test_pooling  # noqa: E402
from tests.models.small_family import change  # noqa: E402

pytestmark = pytest.mark.workshop

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "pump", "valve", "is", "hot", "cold", "leaks")
TEXTS = (
    "the pump is hot",
    "the valve leaks",
    "cold",
    "the pump leaks the valve is hot hot hot hot",
)
LABELS = ("fine", "worn", "broken")
LENGTH = 10


def tokenizer(**options: Any) -> Any:
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **{"model_max_length": LENGTH, **special, **options}
    )


def bert(kind: str = "BertForSequenceClassification", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        id2label=dict(enumerate(LABELS)),
        label2id={label: n for n, label in enumerate(LABELS)},
        **options,
    )
    return getattr(transformers, kind)(config).eval()


def saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def texts(*found: str) -> Items:
    count = len(found)
    return Items({}, np.arange(count) % 3, raw={"text": np.array(found)}, scenes=np.arange(count))


def recipe(folder: Path, task: Any = "text-classification", **changes: Any) -> Recipe:
    source = {"huggingface": folder.name, **changes.pop("source", {})}
    release = ReleaseRecipe(model="pumps", version="1.0.0", source=Source(**source), max_batch=8)
    settings = {"labels": LABELS, **changes}
    return Recipe(
        family="pumps",
        task=task,
        data=Data(make="data.py:make"),
        release=(release,),
        folder=folder.parent,
        **settings,
    )


def made(wanted: Recipe, splits: Mapping[str, Items], into: Path) -> Path:
    into.mkdir(parents=True)
    huggingface.make(wanted, wanted.release[0], splits, into, lambda line: None)
    return into


def test_a_text_classifier_takes_tokens_and_answers_as_torch_does(tmp_path: Path) -> None:
    net, words = bert(), tokenizer()
    folder = saved(tmp_path / "model", net, words)
    splits = {"self_test": texts(*TEXTS), "evaluation": texts(*TEXTS[::-1])}
    out = made(recipe(folder), splits, tmp_path / "out")

    evaluation = data.read(out / sources.PREPARED / "evaluation.npz")
    assert evaluation.inputs["input_ids"].shape == (len(TEXTS), LENGTH)
    assert not evaluation.raw
    with torch.no_grad():
        encoded = words(list(TEXTS[::-1]), padding=True, truncation=True, return_tensors="pt")
        want = net(**encoded).logits.numpy()
    found = Session(out / sources.FP32).run(evaluation.inputs, 3)["logits"]
    np.testing.assert_allclose(found, want, atol=1e-5)

    exported = sources.Exported.read(out)
    (step,) = exported.pre_processing
    assert step.kind == "tokenizer"
    assert step.parameters["max_length"] == str(LENGTH)
    assert exported.labels == LABELS
    signature = graph.signature(
        graph.load(out / sources.FP32, step="test"), exported.bounds, step="test"
    )
    assert signature.batched
    assert signature.dynamic["input_ids"] == {1: ("sequence_length", 1, LENGTH)}


def test_the_tokenizer_of_a_bundle_needs_neither_transformers_nor_settings(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert(), tokenizer(padding_side="left"))
    out = made(recipe(folder), {"self_test": texts(*TEXTS)}, tmp_path / "out")
    (step,) = sources.Exported.read(out).pre_processing
    client = Tokenizer.from_file(str(out / sources.FILES / step.files[0]))
    encoded = [client.encode(text) for text in TEXTS]
    golden = np.load(out / sources.GOLDEN)
    np.testing.assert_array_equal([each.ids for each in encoded], golden["input.input_ids"])
    np.testing.assert_array_equal(
        [each.type_ids for each in encoded], golden["input.token_type_ids"]
    )
    assert encoded[2].ids[0] == 0  # padded on the left, as its owner wanted


def test_much_padding_is_said_with_what_to_write_against_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert(), tokenizer())
    for name, longest in (("short", "cold"), ("long", TEXTS[-1])):
        said: list[str] = []
        wanted, out = recipe(folder), tmp_path / name
        out.mkdir()
        splits = {"self_test": texts("cold"), "training": texts("cold", longest)}
        huggingface.make(wanted, wanted.release[0], splits, out, said.append)
        hints = [line for line in said if line.startswith("texts are padded")]
        assert hints == (
            [
                "texts are padded to 10 tokens, the longest here has 3: answers get cheaper with "
                'source.dynamic = { input_ids = { 1 = ["sequence_length", 1, 3] } }, and longer texts are cut'
            ]
            if name == "short"
            else []
        )


def test_pairs_of_texts_keep_their_types(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert(), tokenizer())
    pair = texts(*TEXTS)
    pair = replace(pair, raw={**pair.raw, "text_pair": np.array(["is cold"] * len(TEXTS))})
    out = made(recipe(folder), {"self_test": pair}, tmp_path / "out")
    assert np.load(out / sources.GOLDEN)["input.token_type_ids"].max() == 1


def test_the_same_folder_gives_the_same_bytes_elsewhere(tmp_path: Path) -> None:
    splits = {"self_test": texts(*TEXTS)}
    files = []
    for place in ("a", "b/c"):
        folder = saved(tmp_path / place / "model", bert(), tokenizer())
        out = made(recipe(folder), splits, tmp_path / place / "out")
        files.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in b"".join(files[0].values())


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "BertModel"])
def test_tokens_and_features_are_exported_with_their_sequence_open(
    kind: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", bert(kind), tokenizer())
    features = kind == "BertModel"
    wanted = recipe(
        folder,
        "feature-extraction" if features else "token-classification",
        labels=() if features else LABELS,
    )
    out = made(wanted, {"self_test": texts(*TEXTS)}, tmp_path / "out")
    name = "last_hidden_state" if features else "logits"
    shorter = {key: array[:, :4] for key, array in
               data.read(out / sources.PREPARED / "self_test.npz").inputs.items()}  # fmt: skip
    assert Session(out / sources.FP32).run(shorter, 8)[name].shape[:2] == (len(TEXTS), 4)


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(LABELS)),
        label2id={label: n for n, label in enumerate(LABELS)},
        **options,
    )
    return transformers.ViTForImageClassification(config).eval()


def processor(**options: Any) -> Any:
    settings = {"size": {"height": 16, "width": 16}, "resample": 2}
    normal = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    return transformers.ViTImageProcessor(**{**settings, **normal, **options})


def images(count: int, height: int, width: int) -> Items:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 5, 6, 3))
    pixels = coarse.repeat(-(-height // 5), 1).repeat(-(-width // 6), 2)[:, :height, :width]
    noisy = np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)
    return Items({}, np.arange(count) % 3, raw={"image": noisy})


@pytest.mark.parametrize("size", [(16, 16), (40, 52), (9, 11)], ids=["as it is", "shrunk", "grown"])
def test_an_image_net_takes_the_pixels_of_a_camera(size: tuple[int, int], tmp_path: Path) -> None:
    net, original = vit(), processor()
    folder = saved(tmp_path / "model", net, original)
    pixels = images(4, *size)
    out = made(recipe(folder, "image-classification"), {"self_test": pixels}, tmp_path / "out")
    found = Session(out / sources.FP32).run({"image": pixels.raw["image"]}, 3)["logits"]
    with torch.no_grad():
        want = net(**original(list(pixels.raw["image"]), return_tensors="pt")).logits.numpy()
    # Resized bytes may differ by one or two of 255 levels.
    np.testing.assert_allclose(found, want, atol=1e-5 if size == (16, 16) else 5e-3)
    steps = sources.Exported.read(out).pre_processing
    assert [step.kind for step in steps] == ["pixels"]
    assert steps[0].parameters["height"] == str(size[0])


def cropped() -> Any:
    size = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    return transformers.CLIPImageProcessor(**size)


@pytest.mark.parametrize("make", [cropped, lambda: processor(resample=3)], ids=["crop", "bicubic"])
def test_what_the_graph_cannot_do_is_left_to_the_application_and_said(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    net, original = vit(), make()
    folder = saved(tmp_path / "model", net, original)
    pixels = images(4, 30, 40)
    out = made(recipe(folder, "image-classification"), {"self_test": pixels}, tmp_path / "out")
    steps = sources.Exported.read(out).pre_processing
    assert [step.kind for step in steps] == ["resize", "pixels"]
    assert steps[0].parameters["resampling"] == "bicubic"
    assert (out / sources.FILES / steps[0].files[0]).is_file()
    prepared = data.read(out / sources.PREPARED / "self_test.npz").inputs
    assert prepared["image"].shape == (4, 16, 16, 3)
    with torch.no_grad():
        want = net(**original(list(pixels.raw["image"]), return_tensors="pt")).logits.numpy()
    found = Session(out / sources.FP32).run(prepared, 4)["logits"]
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("outputs", [(), ("sentence_embedding", "last_hidden_state")])
def test_a_sentence_transformer_answers_with_one_vector_for_a_text(
    outputs: tuple[str, ...], tmp_path: Path
) -> None:
    net, words = bert("BertModel"), tokenizer()
    folder = test_pooling.folder(
        saved(tmp_path / "model", net, words),
        {"pooling_mode_mean_tokens": True},
        "Pooling",
        "Normalize",
        length=LENGTH - 2,
    )
    wanted = recipe(
        folder, "feature-extraction", labels=(), source={"outputs": outputs} if outputs else {}
    )
    out = made(wanted, {"self_test": texts(*TEXTS)}, tmp_path / "out")
    exported = sources.Exported.read(out)
    assert exported.facts["pooling"] == "mean, normalized"
    assert exported.pre_processing[0].parameters["max_length"] == str(LENGTH - 2)
    encoded = words(
        list(TEXTS), padding=True, truncation=True, max_length=LENGTH - 2, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = net(**encoded).last_hidden_state
    mean = [
        each[mask != 0].mean(0)
        for each, mask in zip(hidden, encoded["attention_mask"], strict=True)
    ]
    want = torch.nn.functional.normalize(torch.stack(mean)).numpy()
    given = {name: array.numpy() for name, array in encoded.items()}
    found = Session(out / sources.FP32).run(given, 3)
    assert list(found) == list(outputs or ("sentence_embedding",))
    np.testing.assert_allclose(found["sentence_embedding"], want, atol=1e-5)


def test_a_sentence_transformer_gives_vectors_of_tokens_to_who_asks_for_them(
    tmp_path: Path,
) -> None:
    folder = test_pooling.folder(
        saved(tmp_path / "model", bert("BertModel"), tokenizer()), {}, "Pooling", "Dense"
    )
    wanted = recipe(
        folder, "feature-extraction", labels=(), source={"outputs": ("last_hidden_state",)}
    )
    out = made(wanted, {"self_test": texts(*TEXTS)}, tmp_path / "out")
    (spec,) = graph.signature(
        graph.load(out / sources.FP32, step="test"),
        sources.Exported.read(out).bounds,
        step="test",
    ).outputs
    assert (spec.name, spec.shape) == ("last_hidden_state", (-1, -1, 16))


def test_inputs_that_are_ready_pass_as_they_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", vit())
    rng = np.random.default_rng(0)
    ready = Items({"pixel_values": rng.standard_normal((3, 3, 16, 16)).astype(np.float32)})
    out = made(recipe(folder, "image-classification"), {"self_test": ready}, tmp_path / "out")
    assert not (out / sources.PREPARED).exists()
    signature = graph.signature(graph.load(out / sources.FP32, step="test"), step="test")
    assert signature.inputs[0].shape == (-1, 3, 16, 16)


def test_a_function_of_the_recipe_may_write_the_folder(tmp_path: Path) -> None:
    saved(tmp_path / "original", bert(), tokenizer())
    (tmp_path / "nets.py").write_text(
        "import shutil\n"
        "def edge(splits, progress, into, *, source):\n"
        "    assert sorted(splits) == ['self_test', 'training'], sorted(splits)\n"
        "    progress(1, 1, 'copying')\n"
        "    shutil.copytree(source, into, dirs_exist_ok=True)\n"
    )
    wanted = recipe(
        tmp_path / "unused",
        source={"huggingface": "nets.py:edge", "arguments": {"source": str(tmp_path / "original")}},
    )
    items = texts(*TEXTS)
    splits = {"self_test": items, "training": items, "evaluation": items}
    out = made(wanted, splits, tmp_path / "out")
    assert sources.Exported.read(out).origin == "huggingface"


def test_another_file_in_the_folder_is_another_export(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert(), tokenizer())
    data.save(tmp_path / "training.npz", texts(*TEXTS))
    wanted = replace(recipe(folder), data=Data(files={"training": Path("training.npz")}))
    kept = steps.Steps(tmp_path / "cache", lambda line: None)
    made = build.export_only(wanted, kept)
    assert build.export_only(wanted, kept) == made
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert build.export_only(wanted, kept) != made


def without_head(folder: Path) -> Recipe:
    return recipe(saved(folder, bert("BertModel"), tokenizer()))


def without_tokenizer(folder: Path) -> Recipe:
    return recipe(saved(folder, bert()))


def without_padding(folder: Path) -> Recipe:
    return recipe(saved(folder, bert(), tokenizer(pad_token=None)))


def with_other_labels(folder: Path) -> Recipe:
    return recipe(saved(folder, bert(), tokenizer()), labels=("fine", "broken", "worn"))


def with_fewer_labels(folder: Path) -> Recipe:
    return recipe(saved(folder, bert(), tokenizer()), labels=LABELS[:2])


def with_another_output(folder: Path) -> Recipe:
    return recipe(saved(folder, bert(), tokenizer()), source={"outputs": ("scores",)})


def with_long_texts(folder: Path) -> Recipe:
    dynamic = {"input_ids": {1: ("sequence_length", 1, LENGTH + 1)}}
    return recipe(saved(folder, bert(), tokenizer()), source={"dynamic": dynamic})


def with_broken_weights(folder: Path) -> Recipe:
    saved(folder, bert(), tokenizer())
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    return recipe(folder)


def with_nan(folder: Path) -> Recipe:
    net = bert()
    with torch.no_grad():
        net.classifier.bias.fill_(float("nan"))
    return recipe(saved(folder, net, tokenizer()))


def of_sound(folder: Path) -> Recipe:
    return recipe(saved(folder, bert(), tokenizer()), "audio-classification")


def of_nowhere(folder: Path) -> Recipe:
    return recipe(folder.parent / "some-user-some-model")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (without_head, r"lacks weights that text-classification needs, classifier\.bias"),
        (without_tokenizer, "has no usable tokenizer"),
        (without_padding, "no padding token"),
        (with_other_labels, "class 1 is 'worn' in the model's config and 'broken' in the recipe"),
        (with_fewer_labels, "tells 3 classes apart, the recipe names 2"),
        (with_another_output, "has no output 'scores', it gives logits"),
        (with_long_texts, "the recipe allows 11 tokens, the net has 10 positions"),
        (with_broken_weights, "export: .*model"),
        (with_nan, "output 'logits' is NaN or infinite in 12 of 12 values"),
        (of_sound, "audio-classification cannot be taken from a Hugging Face folder"),
        (of_nowhere, "Nothing is downloaded in a build"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    wrong: Callable[[Path], Recipe], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        made(wrong(tmp_path / "model"), {"self_test": texts(*TEXTS)}, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("nets.py:egde", "nets.py has no function egde"),
        ("stem.py:edge", "there is no stem.py beside the recipe"),
        ("nets.py:", "'nets.py:' must name a function as file.py:function"),
        ("model", "there is no folder"),
    ],
)
def test_a_source_that_is_not_there_is_told_before_anything_is_made(
    named: str, says: str, tmp_path: Path
) -> None:
    family = small_family.write(tmp_path / "points", torch=True)
    change(
        family / "recipe.toml",
        'torch = "nets.py:edge", outputs = ["y"]',
        f'huggingface = "{named}"',
    )
    result = small_family.build(family)
    assert f"Error: release points 1.0.0: source.huggingface: {says}" in result.stderr
    assert not (tmp_path / "steps").exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    with pytest.raises(MissingExtra, match=r"needs transformers, .* pip install 'fogline\[hf\]'"):
        made(of_nowhere(tmp_path / "model"), {"self_test": texts(*TEXTS)}, tmp_path / "out")


def test_optimum_quantizes_weights_and_leaves_products_of_activations(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert(), tokenizer())
    out = made(recipe(folder), {"self_test": texts(*TEXTS)}, tmp_path / "out")
    target = tmp_path / "int8.onnx"
    huggingface.quantize_dynamic(
        out / sources.FP32, target, operators=("MatMul", "Gemm", "Gather"), exclude=(),
        per_channel=True, reduce_range=True,
    )  # fmt: skip
    kinds = [node.op_type for node in onnx.load(str(target)).graph.node]
    fp32 = [node.op_type for node in onnx.load(str(out / sources.FP32)).graph.node]
    assert kinds.count("MatMul") == 2 * 2  # two in the attention of each layer
    quantized = fp32.count("MatMul") + fp32.count("Gemm") - kinds.count("MatMul")
    assert kinds.count("MatMulInteger") == quantized
    inputs = data.read(out / sources.PREPARED / "self_test.npz").inputs
    want: Array = Session(out / sources.FP32).run(inputs, 8)["logits"]
    np.testing.assert_allclose(Session(target).run(inputs, 8)["logits"], want, atol=0.02)


def test_a_whole_build_ships_the_tokenizer_and_bounds_the_sequence(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", bert(), tokenizer())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for name, start in (("training", 0), ("evaluation", 100), ("calibration", 200)):
        numbered = texts(*(f"the pump {n} is {n % 3}" for n in range(start, start + 80)))
        data.save(tmp_path / f"{name}.npz", replace(numbered, scenes=np.arange(start, start + 80)))
    (tmp_path / "recipe.toml").write_text(
        'family = "pumps"\n'
        'task = "text-classification"\n'
        'labels = ["fine", "worn", "broken"]\n'
        "[data.files]\n"
        'training = "training.npz"\n'
        'evaluation = "evaluation.npz"\n'
        'calibration = "calibration.npz"\n'
        "[gates]\n"
        "max_latency_ratio = 100.0\n"
        "min_agreement = 0.0\n"
        "max_accuracy_loss = 1.0\n"
        "[[release]]\n"
        'model = "pumps"\n'
        'version = "1.0.0"\n'
        'source = { huggingface = "model" }\n'
        'variants = ["int8-dynamic", "fp32"]\n'
    )
    kept = steps.Steps(tmp_path / "cache", lambda line: None)
    (built,) = build.build(read(tmp_path), tmp_path / "out", kept, lambda line: None)
    bundle = built.directory.bundle
    assert [spec.shape for spec in bundle.inputs] == [(-1, -1)] * 3
    assert [(variant.name, variant.max_rows) for variant in bundle.variants] == [
        ("int8-dynamic", 1),  # its scales are those of a run
        ("fp32", 0),
    ]
    (step,) = bundle.pre_processing
    told = "tokenizer (tokenizer.json, inputs input_ids"
    assert f"  before it   {told}" in "\n".join(
        inspection.lines(inspection.document(built.directory))
    )
    card = built.directory.file("README.md").read_text()
    assert r"Left to the application before it: tokenizer \(tokenizer.json" in card
    client = Tokenizer.from_file(str(built.directory.file(step.files[0])))
    golden = np.load(built.directory.file(bundle.self_test.path))
    text = data.read(tmp_path / "training.npz").raw["text"][0]
    np.testing.assert_array_equal(client.encode(text).ids, golden["input.input_ids"][0])
    listed = json.loads(built.directory.file("sources.json").read_text())["inputs"]
    for name in ("config.json", "1_Pooling/config.json"):
        assert listed[name]["sha256"] == documents.sha256_of_file(folder / name)
