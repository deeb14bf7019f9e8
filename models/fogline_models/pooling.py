"""From the vectors of a text's tokens to the one vector of the text, as a Sentence Transformer does.

Such a folder says in ``modules.json`` what comes after the transformer: pooling, normalizing.
optimum exports the transformer alone, whose answer is ``[n, tokens, width]``, padding included: not
what anybody compares texts by, and a hundred times the bytes. Here the rest becomes nodes behind
it, so that device and hub answer with ``sentence_embedding``, ``[n, width]``.

What the nodes compute is computed once more here, in numpy, to compare with.
"""

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models.errors import BadInput
from fogline_protocol.answers import ATTENTION_MASK
from fogline_protocol.tensors import Array

STEP = "export"
HIDDEN = "last_hidden_state"  # what transformers calls the vectors of tokens
EMBEDDING = "sentence_embedding"  # what Sentence Transformers calls the vector of a text
MODULES = "modules.json"
LENGTHS = "sentence_*_config.json"  # bert, roberta and others
PROMPTS = "config_sentence_transformers.json"
TOKENIZER = "tokenizer_config.json"
LEAST_TOKENS = 1e-9  # where a mask counts none; both as in Sentence Transformers
LEAST_NORM = 1e-12
NOTHING = float(np.finfo(np.float32).min)

_KEY = "pooling_mode_"
# By the key of the module's settings, in the order in which several are joined.
_KEYS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """What becomes of the vectors of tokens."""

    modes: tuple[str, ...]  # of "cls", "max", "mean", "mean_sqrt_len"; several are joined
    normalized: bool  # to length 1
    max_tokens: int | None = None  # that the folder cuts texts to

    def __str__(self) -> str:
        """Say it, for the report."""
        return " and ".join(self.modes) + (", normalized" if self.normalized else "")

    def apply(self, hidden: Array, mask: Array) -> Array:
        """Return the vectors of texts: ``[n, tokens, width]`` and a mask ``[n, tokens]``."""
        counts = mask[..., None].astype(hidden.dtype)
        total = (hidden * counts).sum(axis=1)
        tokens = np.maximum(counts.sum(axis=1), LEAST_TOKENS)
        by_mode: Mapping[str, Callable[[], Array]] = {
            "cls": lambda: hidden[:, 0],
            "max": lambda: np.where(counts != 0, hidden, NOTHING).max(axis=1),
            "mean": lambda: total / tokens,
            "mean_sqrt_len": lambda: total / np.sqrt(tokens),
        }
        found = np.concatenate([by_mode[mode]() for mode in self.modes], axis=1)
        if self.normalized:
            with np.errstate(over="ignore"):  # a text without tokens, whose largest is NOTHING
                length = np.linalg.norm(found, axis=1, keepdims=True)
            found = found / np.maximum(length, LEAST_NORM)
        return found.astype(hidden.dtype)

    def fold(self, model: Any, *, keep_tokens: bool) -> None:
        """Put the nodes behind the net in an ``onnx.ModelProto``; its answer comes first.

        Raises:
            BadInput: the net takes no attention mask or gives no vectors of tokens.
        """
        from onnx import TensorProto, helper, numpy_helper

        graph = model.graph
        outputs = {value.name: value for value in graph.output}
        if HIDDEN not in outputs or ATTENTION_MASK not in {value.name for value in graph.input}:
            raise BadInput(
                f"{STEP}: {MODULES} says how to pool the vectors of tokens, but the net gives "
                f"{', '.join(outputs)} and takes {', '.join(value.name for value in graph.input)}: "
                f'ask for its own answers, source.outputs = ["{next(iter(outputs))}"]'
            )
        batch, _, width = outputs[HIDDEN].type.tensor_type.shape.dim
        nodes, constants = [], dict(self._constants())

        def node(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
            inputs = [f"sentence/{part}" if part in constants else part for part in inputs]
            output = EMBEDDING if name == EMBEDDING else f"sentence/{name}"
            nodes.append(
                helper.make_node(operator, inputs, [output], f"sentence/{name}", **attributes)
            )
            return output

        mask = node("Cast", [ATTENTION_MASK], "mask", to=TensorProto.FLOAT)
        counts = node("Unsqueeze", [mask, "last"], "counts")
        parts = []
        if {"mean", "mean_sqrt_len"} & {*self.modes}:
            counted = node("Mul", [HIDDEN, counts], "counted")
            total = node("ReduceSum", [counted, "tokens"], "total", keepdims=0)
            several = node("ReduceSum", [counts, "tokens"], "several", keepdims=0)
            tokens = node("Max", [several, "least"], "length")
        for mode in self.modes:
            match mode:
                case "cls":
                    parts.append(node("Gather", [HIDDEN, "first"], mode, axis=1))
                case "max":
                    asked = node("Cast", [counts], "asked", to=TensorProto.BOOL)
                    masked = node("Where", [asked, HIDDEN, "nothing"], "masked")
                    parts.append(node("ReduceMax", [masked, "tokens"], mode, keepdims=0))
                case "mean":
                    parts.append(node("Div", [total, tokens], mode))
                case _:
                    root = node("Sqrt", [tokens], "root")
                    parts.append(node("Div", [total, root], mode))
        pooled = parts[0] if len(parts) == 1 else node("Concat", parts, "pooled", axis=1)
        if self.normalized:
            norm = node("ReduceL2", [pooled, "last"], "norm", keepdims=1)
            bounded = node("Max", [norm, "least_norm"], "bounded")
            node("Div", [pooled, bounded], EMBEDDING)
        else:
            node("Identity", [pooled], EMBEDDING)
        graph.node.extend(nodes)
        read = {name for part in nodes for name in part.input}
        graph.initializer.extend(
            numpy_helper.from_array(array, f"sentence/{name}")
            for name, array in constants.items()
            if f"sentence/{name}" in read
        )
        size = width.dim_value * len(self.modes)
        made = helper.make_tensor_value_info(
            EMBEDDING, TensorProto.FLOAT, (batch.dim_param or batch.dim_value, size or None)
        )
        if not keep_tokens:
            graph.output.remove(outputs.pop(HIDDEN))
        rest = list(graph.output)
        graph.ClearField("output")
        graph.output.extend([made, *rest])

    @staticmethod
    def _constants() -> Iterator[tuple[str, Array]]:
        yield "last", np.array([-1], np.int64)
        yield "tokens", np.array([1], np.int64)
        yield "first", np.array(0, np.int64)
        yield "least", np.array(LEAST_TOKENS, np.float32)
        yield "least_norm", np.array(LEAST_NORM, np.float32)
        yield "nothing", np.array(NOTHING, np.float32)


def read(folder: Path) -> Pooling | None:
    """Return what a folder of Sentence Transformers does behind its net; None if it is none.

    Raises:
        BadInput: it is damaged, or does something that is not known here; says what to ask for
            instead.
    """
    if not (folder / MODULES).is_file():
        return None
    modes: tuple[str, ...] = ()
    normalized = False
    for kind, path in _modules(folder):
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                modes = _modes(path / "config.json")
            case "Normalize":
                normalized = True
            case _:
                raise _unknown(folder / MODULES, kind)
    if not modes:
        raise _unknown(folder / MODULES, "no pooling")
    _check_no_prompt(folder)
    return Pooling(modes, normalized, _length(folder))


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the kind of every module and where its settings lie: in the folder, nowhere else."""
    modules, home = _json(folder / MODULES), folder.resolve()
    if not isinstance(modules, list):
        raise _misshapen(folder / MODULES, "a list of modules", modules)
    for module in modules:
        named = module if isinstance(module, dict) else {}
        kind, path = named.get("type"), named.get("path")
        if not (isinstance(kind, str) and isinstance(path, str)):
            raise _misshapen(folder / MODULES, "modules with a type and a path, as texts,", module)
        if "\0" in path or not (home / path).resolve().is_relative_to(home):
            raise _misshapen(folder / MODULES, "paths within its folder", path)
        yield kind.rpartition(".")[2], home / path


def _modes(path: Path) -> tuple[str, ...]:
    settings = _settings(path)
    named = settings.get("pooling_mode")  # as later versions write it: one, or several
    if named is None:
        asked = [key for key, on in settings.items() if key.startswith(_KEY) and on is True]
    else:
        asked = named if isinstance(named, list) else [named]
    for mode in asked:
        if mode not in [*_KEYS, *_KEYS.values()]:
            raise _unknown(path, str(mode))
    return tuple(mode for key, mode in _KEYS.items() if key in asked or mode in asked)


def _length(folder: Path) -> int | None:
    """Return how many tokens texts are cut to, and check that nothing else is done to them."""
    length: int | None = None
    for path in sorted(folder.glob(LENGTHS)):
        settings = _settings(path)
        if settings.get("do_lower_case") and not _tokenizer_lowers(folder):
            raise _of_application(path, "do_lower_case", "lower-case texts")
        found = settings.get("max_seq_length")
        if found is None:
            continue
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise _misshapen(path, "max_seq_length as a whole number above 0", found)
        length = found if length is None else min(length, found)
    return length


def _tokenizer_lowers(folder: Path) -> bool:
    path = folder / TOKENIZER
    return path.is_file() and _settings(path).get("do_lower_case") is True


def _check_no_prompt(folder: Path) -> None:
    path = folder / PROMPTS
    if path.is_file() and _settings(path).get("default_prompt_name") is not None:
        raise _of_application(path, "default_prompt_name", "put the prompt before texts")


def _settings(path: Path) -> dict[str, Any]:
    settings = _json(path)
    if not isinstance(settings, dict):
        raise _misshapen(path, "settings by name", settings)
    return settings


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{STEP}: {path} cannot be read: {error}") from None


def _misshapen(path: Path, wanted: str, found: object) -> BadInput:
    return BadInput(
        f"{STEP}: {path} must hold {wanted}, got {reprlib.repr(found)}: fetch the model anew"
    )


def _of_application(path: Path, key: str, task: str) -> BadInput:
    return BadInput(
        f"{STEP}: {path} asks for {key}, which no node behind the net can do: {task} in the "
        "application and for the recipe's data, and remove the key, or ask for the vectors of "
        f'tokens, source.outputs = ["{HIDDEN}"]'
    )


def _unknown(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{STEP}: {path} asks for {what}, which cannot be put behind the net here: ask for the "
        f'vectors of tokens, source.outputs = ["{HIDDEN}"], and do the rest in the application'
    )
