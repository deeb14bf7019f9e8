"""What lies between the data that an application has and the tensors that a Hugging Face net takes.

    text    a tokenizer. ONNX has no operators for it, so it goes into the bundle as one
            tokenizer.json, with length, padding and truncation in it: ``tokenizers`` alone reads
            it, and whoever does gets exactly the net's inputs.
    image   an image processor. Rescaling, normalizing and bilinear resizing to a fixed size
            become nodes in front of the net, which then takes pixels as they are: uint8, height,
            width, channels. Cropping, sizes that depend on the image and other resampling stay
            with the application: onnxruntime's bicubic strays from Pillow's by 12 levels of 255.

Whatever is done here is compared with what the folder's own tokenizer or processor does.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models.data import Items
from fogline_models.errors import BadInput
from fogline_models.session import Session
from fogline_protocol.release import Processing
from fogline_protocol.tensors import Array

STEP = "export"
TEXT, PAIR, IMAGE = "text", "text_pair", "image"  # names below raw.*
TOKENIZER = "tokenizer.json"
PROCESSOR = "preprocessor_config.json"
SEQUENCE = "sequence_length"  # what optimum calls the axis of tokens
PIXELS = "pixel_values"  # what transformers calls the input of an image net
COMPARED = 64  # items that are put through both ways
MAX_DIFFERENCE = 1e-5  # of normalized pixels, where nothing is resized
MAX_LEVELS = 2.0  # of 255, where something is: the processor rounds to bytes twice
RESAMPLING = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}  # Pillow's

Tensors = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to raw items, and what of it is in the graph."""

    prepare: Callable[[Items], Tensors]  # raw items -> what the file takes
    inner: Callable[[Tensors], Tensors]  # what the file takes -> what the net itself takes
    steps: tuple[Processing, ...] = ()  # what is left to the application
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of open axes, by name
    fold: Callable[[Any], None] = lambda model: None  # puts the rest into an onnx.ModelProto


def none(bounds: Mapping[str, tuple[int, int]]) -> Preprocessing:
    """Return what happens to items that already are what the net takes."""
    return Preprocessing(lambda items: items.inputs, lambda tensors: tensors, bounds=bounds)


def text(
    folder: Path, names: Sequence[str], length: int, examples: Items, files: Path
) -> Preprocessing:
    """Return how text becomes the inputs ``names``, ``length`` tokens each; writes the tokenizer.

    Args:
        folder: with the tokenizer, as transformers saves it.
        names: of the net's inputs.
        length: of every row, in tokens: shorter ones are padded, longer ones cut off.
        examples: with ``raw.text`` and, for pairs, ``raw.text_pair``.
        files: where what the bundle has to carry is written.

    Raises:
        BadInput: there is no tokenizer, it is none that one file describes, or it does not give
            what the net takes.
    """
    from transformers import AutoTokenizer

    try:
        original = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        # A TypeError is what it says of a folder without any of a tokenizer's files.
        raise BadInput(f"{STEP}: {folder} has no usable tokenizer: {_first_line(error)}") from None
    if not original.is_fast:
        raise BadInput(
            f"{STEP}: the tokenizer of {folder} exists in Python only: save it as a fast one, "
            f"with {TOKENIZER}"
        )
    if original.pad_token_id is None:
        raise BadInput(
            f"{STEP}: the tokenizer of {folder} has no padding token, so texts of different "
            "length cannot be in one batch: set tokenizer.pad_token and save it again"
        )
    strange = [name for name in names if name not in _ENCODED]
    if strange:
        raise BadInput(
            f"{STEP}: the net takes {', '.join(strange)}, which no tokenizer gives: give the "
            "splits as input.* instead of raw.*"
        )
    tokenizer = original.backend_tokenizer
    tokenizer.enable_truncation(length, direction=original.truncation_side)
    tokenizer.enable_padding(
        direction=original.padding_side,
        pad_id=original.pad_token_id,
        pad_type_id=original.pad_token_type_id,
        pad_token=original.pad_token,
        length=length,
    )
    files.mkdir(exist_ok=True)
    tokenizer.save(str(files / TOKENIZER), pretty=False)
    prepare = tokenized(files / TOKENIZER, names)
    some = examples.rows(slice(COMPARED))
    want = original(
        *(some.raw[name].tolist() for name in (TEXT, PAIR) if name in some.raw),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    for name, found in prepare(some).items():
        if name in want and not np.array_equal(found, want[name]):
            raise BadInput(
                f"{STEP}: {TOKENIZER} alone gives another {name} than the tokenizer of {folder}: "
                "something of it is written in Python; give the splits as input.*"
            )
    parameters = {
        "inputs": " ".join(names),
        "max_length": str(length),
        "padding": f"max_length, {original.padding_side}",
        "truncation": f"longest_first, {original.truncation_side}",
    }
    return Preprocessing(
        prepare,
        lambda tensors: tensors,
        (Processing("tokenizer", (TOKENIZER,), parameters),),
        {SEQUENCE: (1, length)},
    )


# What transformers calls the tensors of an encoding, and what ``tokenizers`` calls them.
_ENCODED = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def tokenized(file: Path, names: Sequence[str]) -> Callable[[Items], Tensors]:
    """Return what turns ``raw.text`` into tensors with a bundle's tokenizer, as applications do.

    Raises:
        BadInput: (when called) the items have no text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    def prepare(items: Items) -> Tensors:
        if TEXT not in items.raw:
            raise BadInput(f"{STEP}: a tokenizer takes raw.{TEXT}, the items have {_names(items)}")
        texts = items.raw[TEXT].tolist()
        given = (
            list(zip(texts, items.raw[PAIR].tolist(), strict=True)) if PAIR in items.raw else texts
        )
        encoded = tokenizer.encode_batch(given)
        return {
            name: np.array([getattr(each, _ENCODED[name]) for each in encoded], np.int64)
            for name in names
        }

    return prepare


def image(folder: Path, examples: Items, files: Path) -> Preprocessing:
    """Return how pixels ``raw.image``, uint8 ``[n, height, width, channels]``, reach the net.

    Args:
        folder: with the image processor, as transformers saves it.
        examples: with ``raw.image``; all images of all splits are of their size.
        files: where what the bundle has to carry is written.

    Raises:
        BadInput: there is no image processor, the images are no bytes, or what the graph would
            do to them is not what the processor does.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, use_fast=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInput(
            f"{STEP}: {folder} has no usable image processor: {_first_line(error)}"
        ) from None
    plan = _Plan.of(processor, _pixels(examples))
    front = plan.model()
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place) / "front.onnx"
        alone.write_bytes(front.SerializeToString())
        session = Session(alone)
    some = plan.prepare(examples.rows(slice(COMPARED)))
    found = session.run({IMAGE: some}, 1)[PIXELS]
    outside = {"do_resize": False, "do_center_crop": False} if plan.outside else {}
    want = _processed(processor, some, **outside)
    allowed = MAX_DIFFERENCE + (MAX_LEVELS * float(plan.scale.max()) if plan.resized else 0.0)
    difference = float(np.abs(found - want).max()) if found.shape == want.shape else np.inf
    if not difference <= allowed:
        raise BadInput(
            f"{STEP}: folding the image processor of {folder} into the graph changes normalized "
            f"pixels by {difference:.1e}, at most {allowed:.0e} is accepted: give the splits as "
            f"input.{PIXELS}"
        )
    return Preprocessing(
        lambda items: {IMAGE: plan.prepare(items)},
        lambda tensors: session.run(tensors, 1),
        plan.steps(folder, files),
        {},
        lambda model: _put_before(model, front),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What of an image processor becomes nodes: all, or all behind its resizing and cropping."""

    processor: Any
    given: tuple[int, int]  # height and width of raw images
    taken: tuple[int, int]  # of what the file takes
    resized: tuple[int, int] | None  # to what the graph resizes
    resampling: str
    scale: Array  # float32 [channels]
    offset: Array  # float32 [channels]

    @classmethod
    def of(cls, processor: Any, pixels: Array) -> "_Plan":
        given = (pixels.shape[1], pixels.shape[2])
        channels = pixels.shape[3]
        factor = processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
        mean, std = np.zeros(channels), np.ones(channels)
        if getattr(processor, "do_normalize", False):
            mean, std = (
                np.broadcast_to(np.asarray(value, np.float64), channels)
                for value in (processor.image_mean, processor.image_std)
            )
        size = getattr(processor, "size", None) or {}
        fixed = (
            (int(size["height"]), int(size["width"])) if {"height", "width"} <= {*size} else None
        )
        resampling = RESAMPLING.get(int(getattr(processor, "resample", -1)), "")
        crops = bool(getattr(processor, "do_center_crop", False))
        geometry = crops or getattr(processor, "do_resize", False)
        if not geometry or (given == fixed and not crops):
            taken, resized = given, None
        elif fixed is not None and resampling == "bilinear" and not crops:
            taken, resized = given, fixed
        else:
            one = _processed(processor, pixels[:1], do_rescale=False, do_normalize=False)
            taken, resized = (one.shape[2], one.shape[3]), None
        return cls(
            processor,
            given,
            taken,
            resized,
            resampling,
            (factor / std).astype(np.float32),
            (mean / std).astype(np.float32),
        )

    @property
    def outside(self) -> bool:
        """Whether resizing and cropping are left to the application."""
        return self.taken != self.given

    def prepare(self, items: Items) -> Array:
        """Return what the file takes: pixels, resized and cropped where the graph does not."""
        pixels = _pixels(items)
        if not self.outside:
            return pixels
        placed = _processed(self.processor, pixels, do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(placed.transpose(0, 2, 3, 1).round().astype(np.uint8))

    def steps(self, folder: Path, files: Path) -> tuple[Processing, ...]:
        """Return what the application has to do; writes the processor's settings if that is much."""
        height, width = self.taken
        pixels = {"type": "uint8", "layout": "height, width, channels", "channels": "RGB"}
        if len(self.scale) != 3:
            pixels["channels"] = str(len(self.scale))
        found = [Processing("pixels", (), {**pixels, "height": str(height), "width": str(width)})]
        if self.outside:
            files.mkdir(exist_ok=True)
            (files / PROCESSOR).write_bytes((folder / PROCESSOR).read_bytes())
            parameters = {"resampling": self.resampling or "see the file"}
            found.insert(0, Processing("resize", (PROCESSOR,), parameters))
        return tuple(found)

    def model(self) -> Any:
        """Return the nodes as a model of their own: uint8 NHWC pixels to the net's input."""
        from onnx import TensorProto, helper, numpy_helper

        height, width = self.taken
        channels = len(self.scale)
        out_height, out_width = self.resized or self.taken
        constants: dict[str, Array] = {
            "image.scale": self.scale[:, None, None],
            "image.offset": self.offset[:, None, None],
        }
        nodes = [
            helper.make_node("Cast", [IMAGE], ["image.float"], "image.cast", to=TensorProto.FLOAT),
            helper.make_node(
                "Transpose", ["image.float"], ["image.planes"], "image.transpose", perm=(0, 3, 1, 2)
            ),
        ]
        last = "image.planes"
        if self.resized:
            constants["image.size"] = np.array(self.resized, np.int64)
            constants["image.black"] = np.array(0, np.float32)
            constants["image.white"] = np.array(255, np.float32)
            nodes += [
                helper.make_node(
                    "Resize",
                    [last, "", "", "image.size"],
                    ["image.resized"],
                    "image.resize",
                    axes=(2, 3),
                    mode="linear",
                    antialias=1,
                    coordinate_transformation_mode="half_pixel",
                ),
                # A processor resizes bytes, so what comes out of it are whole levels.
                helper.make_node("Round", ["image.resized"], ["image.levels"], "image.round"),
                helper.make_node(
                    "Clip",
                    ["image.levels", "image.black", "image.white"],
                    ["image.bytes"],
                    "image.clip",
                ),
            ]
            last = "image.bytes"
        nodes += [
            helper.make_node("Mul", [last, "image.scale"], ["image.scaled"], "image.mul"),
            helper.make_node("Sub", ["image.scaled", "image.offset"], [PIXELS], "image.sub"),
        ]
        return helper.make_model(
            helper.make_graph(
                nodes,
                "image",
                [helper.make_tensor_value_info(
                    IMAGE, TensorProto.UINT8, ("batch_size", height, width, channels)
                )],
                [helper.make_tensor_value_info(
                    PIXELS, TensorProto.FLOAT, ("batch_size", channels, out_height, out_width)
                )],
                [numpy_helper.from_array(value, name) for name, value in constants.items()],
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )  # fmt: skip


OPSET = 18  # of what optimum exports; the first whose Resize can smooth before it shrinks
IR_VERSION = 8


def _put_before(model: Any, front: Any) -> None:
    """Put the nodes of ``front`` before a net, whose input they give."""
    graph = model.graph
    (old,) = (value for value in graph.input if value.name == PIXELS)
    position = [value.name for value in graph.input].index(PIXELS)
    graph.input.remove(old)
    graph.input.insert(position, front.graph.input[0])
    nodes = list(graph.node)
    graph.ClearField("node")
    graph.node.extend([*front.graph.node, *nodes])
    graph.initializer.extend(front.graph.initializer)


def _processed(processor: Any, pixels: Array, **options: Any) -> Array:
    found: Array = processor(
        list(pixels), return_tensors="np", input_data_format="channels_last", **options
    )[PIXELS]
    return found


def _pixels(items: Items) -> Array:
    if IMAGE not in items.raw:
        raise BadInput(
            f"{STEP}: an image processor takes raw.{IMAGE}, the items have {_names(items)}"
        )
    pixels = items.raw[IMAGE]
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise BadInput(
            f"{STEP}: raw.{IMAGE} must be uint8 [n, height, width, channels], got {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    return pixels


def _names(items: Items) -> str:
    names = [*(f"raw.{name}" for name in items.raw), *(f"input.{name}" for name in items.inputs)]
    return ", ".join(names) or "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
