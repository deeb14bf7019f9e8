"""One vector for a text, as Sentence Transformers would give it: as nodes behind the net."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fogline[models]'")

from fogline_models import pooling  # noqa: E402 - only after onnx is known to be there
from fogline_models.errors import BadInput  # noqa: E402
from fogline_models.pooling import EMBEDDING, HIDDEN, Pooling  # noqa: E402
from fogline_models.session import Session  # noqa: E402
from fogline_protocol.tensors import Array  # noqa: E402

pytestmark = pytest.mark.workshop

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((5, 7, 4)).astype(np.float32)
MASK = (np.arange(7) < np.array([[7], [1], [3], [0], [6]])).astype(np.int64)


def folder(
    place: Path, settings: dict[str, object], *kinds: str, length: int | None = None
) -> Path:
    """Write what a Sentence Transformer says of itself, besides the transformer's own files."""
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, kind in enumerate(kinds, 1):
        path = f"{number}_{kind}"
        modules.append(
            {"idx": number, "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        (place / path).mkdir(parents=True)
        (place / path / "config.json").write_text(json.dumps(settings))
    (place / "modules.json").write_text(json.dumps(modules))
    if length is not None:
        (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    return place


def tokens_only(output: str = HIDDEN) -> Any:
    """Return a net that hands its vectors on, with the mask that a transformer takes."""
    helper, kind = onnx.helper, onnx.TensorProto
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["vectors"], [output])],
            "net",
            [
                helper.make_tensor_value_info("vectors", kind.FLOAT, ("batch", "tokens", 4)),
                helper.make_tensor_value_info("attention_mask", kind.INT64, ("batch", "tokens")),
            ],
            [helper.make_tensor_value_info(output, kind.FLOAT, ("batch", "tokens", 4))],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def answers(made: Pooling, path: Path, *, keep_tokens: bool = False) -> dict[str, Array]:
    model = tokens_only()
    made.fold(model, keep_tokens=keep_tokens)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return Session(path).run({"vectors": VECTORS, "attention_mask": MASK}, 2)


def of_one(mode: str, vectors: Array) -> Array:
    """Return what a mode makes of the vectors that count, ``[tokens, 4] -> [4]``."""
    found = {
        "cls": lambda: vectors[0],
        "max": lambda: vectors.max(axis=0),
        "mean": lambda: vectors.mean(axis=0),
        "mean_sqrt_len": lambda: vectors.sum(axis=0) / np.sqrt(len(vectors)),
    }[mode]()
    return np.asarray(found)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    "modes", [("mean",), ("cls",), ("max",), ("mean_sqrt_len",), ("cls", "max", "mean")]
)
def test_the_vector_of_a_text_is_made_of_the_tokens_that_count(
    modes: tuple[str, ...], normalized: bool, tmp_path: Path
) -> None:
    made = Pooling(modes, normalized)
    (found,) = answers(made, tmp_path / "net.onnx").values()
    assert found.shape == (5, 4 * len(modes))
    for row, (vectors, mask) in enumerate(zip(VECTORS, MASK, strict=True)):
        if not mask.any():
            continue
        want = np.concatenate([of_one(mode, vectors[mask != 0]) for mode in modes])
        if normalized:
            want /= np.linalg.norm(want)
        np.testing.assert_allclose(found[row], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.apply(VECTORS, MASK), found, rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()  # a text of which no token counts, too


def test_vectors_of_tokens_come_behind_if_they_are_asked_for(tmp_path: Path) -> None:
    found = answers(Pooling(("mean",), True), tmp_path / "net.onnx", keep_tokens=True)
    assert list(found) == [EMBEDDING, HIDDEN]
    np.testing.assert_array_equal(found[HIDDEN], VECTORS)


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, ("mean",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        ({"word_embedding_dimension": 4, "pooling_mode": "cls"}, ("cls",)),
        ({"pooling_mode": ["mean", "cls"]}, ("cls", "mean")),
    ],
)
def test_a_folder_says_how_it_pools(
    settings: dict[str, object], modes: tuple[str, ...], tmp_path: Path
) -> None:
    assert pooling.read(tmp_path) is None  # it does not say anything yet
    folder(tmp_path, settings, "Pooling", "Normalize", length=64)
    assert pooling.read(tmp_path) == Pooling(modes, True, 64)


@pytest.mark.parametrize(
    ("settings", "kinds", "asked"),
    [
        ({"pooling_mode_mean_tokens": True}, ("Pooling", "Dense"), "Dense"),
        ({"pooling_mode_lasttoken": True}, ("Pooling",), "pooling_mode_lasttoken"),
        ({"pooling_mode": "lasttoken"}, ("Pooling",), "lasttoken"),
        ({"pooling_mode": ["mean", {}]}, ("Pooling",), r"\{\}"),
        ({}, ("Pooling",), "no pooling"),
    ],
)
def test_what_cannot_be_put_behind_a_net_is_said_with_what_to_ask_for(
    settings: dict[str, object], kinds: tuple[str, ...], asked: str, tmp_path: Path
) -> None:
    folder(tmp_path, settings, *kinds)
    with pytest.raises(BadInput, match=rf'{asked}.*source\.outputs = \["last_hidden_state"\]'):
        pooling.read(tmp_path)


def test_a_net_without_vectors_of_tokens_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r'source\.outputs = \["logits"\]'):
        Pooling(("mean",), True).fold(tokens_only("logits"), keep_tokens=False)


def test_a_damaged_description_is_said(tmp_path: Path) -> None:
    folder(tmp_path, {"pooling_mode_mean_tokens": True}, "Pooling")
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"^export: .*config\.json cannot be read"):
        pooling.read(tmp_path)


MEAN = {"pooling_mode_mean_tokens": True}
BERT = "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", {"a": 1}),
        ("modules.json", [{}]),
        ("modules.json", ["Pooling"]),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling"}]),
        ("modules.json", [{"type": 1, "path": ""}]),
        ("modules.json", [{"type": "models.Pooling", "path": "\0"}]),
        ("1_Pooling/config.json", [1]),
        (BERT, [1]),
        (BERT, {"max_seq_length": "abc"}),
        (BERT, {"max_seq_length": 0}),
        (BERT, {"max_seq_length": True}),
        ("sentence_roberta_config.json", {"max_seq_length": 1.5}),
        ("config_sentence_transformers.json", "prompts"),
    ],
)
def test_a_description_of_another_shape_is_said_with_its_file(
    file: str, content: object, tmp_path: Path
) -> None:
    folder(tmp_path, MEAN, "Pooling")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=rf"^export: \S*{file} must hold .*, got "):
        pooling.read(tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_folder_does_not_point_outside_itself(absolute: bool, tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", tmp_path / "outside"
    folder(inside, MEAN, "Pooling")
    (inside / "1_Pooling").rename(outside)
    path = str(outside) if absolute else "../outside"
    (inside / "modules.json").write_text(json.dumps([{"type": "models.Pooling", "path": path}]))
    with pytest.raises(BadInput, match="paths within its folder, got"):
        pooling.read(inside)


def test_texts_are_cut_as_any_of_the_length_files_says(tmp_path: Path) -> None:
    folder(tmp_path, MEAN, "Pooling")
    (tmp_path / "sentence_roberta_config.json").write_text('{"max_seq_length": 32}')
    assert pooling.read(tmp_path) == Pooling(("mean",), False, 32)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (BERT, "do_lower_case", True),
        ("config_sentence_transformers.json", "default_prompt_name", "query"),
    ],
)
def test_what_only_the_application_can_do_to_a_text_is_refused(
    file: str, key: str, value: object, tmp_path: Path
) -> None:
    folder(tmp_path, MEAN, "Pooling")
    (tmp_path / file).write_text(json.dumps({key: value}))
    with pytest.raises(BadInput, match=rf"asks for {key}.*remove the key, or.*last_hidden_state"):
        pooling.read(tmp_path)
    (tmp_path / file).write_text(json.dumps({key: None}))
    assert pooling.read(tmp_path) is not None


def test_a_tokenizer_that_lowers_texts_itself_leaves_nothing_to_do(tmp_path: Path) -> None:
    folder(tmp_path, MEAN, "Pooling")
    (tmp_path / BERT).write_text('{"do_lower_case": true}')
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert pooling.read(tmp_path) == Pooling(("mean",), False)
