"""Tiny bundles, made by code, for models whose answers and scores a test can write down.

    double.onnx       x FP32 [n, 3] -> logits = 2 x
    double_one.onnx   x FP32 [3] -> logits = 2 x, no batch dimension
    text.onnx         s BYTES [n, 1] -> t = s
    mixes.onnx        as double, by way of 8 bits with one scale for all rows of a run
    tokens.onnx       x FP32 [n, tokens, 3] -> logits = 2 x; attention_mask INT64 [n, tokens] is taken

The files were written once with onnx 1.23 (opset 13), which tests do without.
"""

import datetime
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_agent.runtime import providers
from fogline_protocol import documents
from fogline_protocol.certificate import Certificate
from fogline_protocol.release import (
    Bundle,
    BundleDirectory,
    File,
    Pairing,
    SelfTest,
    Tolerance,
    Variant,
    read,
)
from fogline_protocol.score import Score
from fogline_protocol.tensors import Array, TensorSpec
from tests.certificates import certificate as a_certificate
from tests.fakes import HUB_DIGEST, HUB_MODEL

DATA = Path(__file__).parent / "data"
DIGITS = Path(__file__).parents[2] / "models/digits/bundles/digits-1.0.0"
DIGITS_HUB = DIGITS.parent / "digits-hub-1.0.0"
NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)

MAX_SOFTMAX = Score("max_softmax", "logits")
LEAST_SOFTMAX = Score("least_softmax", "logits", mask="attention_mask")
THRESHOLD = 0.9
SURE: Array = np.array([[5, 0, 0]], np.float32)  # scores 0.9999
UNSURE: Array = np.array([[0.1, 0, 0]], np.float32)  # scores 0.379


def rows(*parts: Array) -> dict[str, Array]:
    return {"x": np.concatenate(parts)}


def make(
    path: Path,
    *,
    onnx: str = "double.onnx",
    model: str = "double",
    version: str = "1.0.0",
    max_batch: int = 8,
    paired: bool = True,
    scored: bool = True,
    certified: bool = True,
    variants: tuple[str, ...] = ("fp32",),
    variant_providers: tuple[str, ...] = (providers.CPU,),
    processors: Mapping[str, tuple[str, ...]] | None = None,
    score: Score = MAX_SOFTMAX,
    max_rows: int = 0,
    factor: float = 2.0,
) -> BundleDirectory:
    """Write a bundle to ``path`` and read it back; with another ``factor`` it fails its self-test."""
    path.mkdir(parents=True)
    files: dict[str, File] = {}
    for name in variants:
        shutil.copyfile(DATA / onnx, path / f"{name}.onnx")
        files[f"{name}.onnx"] = _file(path / f"{name}.onnx")
    batch = (-1,) if max_batch else ()
    tensor = ("BYTES", (-1, 1)) if onnx == "text.onnx" else ("FP32", (*batch, 3))
    names = ("s", "t") if onnx == "text.onnx" else ("x", "logits")
    masks: tuple[TensorSpec, ...] = ()
    if onnx == "tokens.onnx":
        tensor = ("FP32", (-1, -1, 3))
        masks = (TensorSpec("attention_mask", "INT64", (-1, -1)),)
    np.savez(path / "selftest.npz", **golden(onnx, factor))
    files["selftest.npz"] = _file(path / "selftest.npz")
    bundle = Bundle(
        model=model,
        version=version,
        inputs=(TensorSpec(names[0], *tensor), *masks),
        outputs=(TensorSpec(names[1], *tensor),),
        max_batch=max_batch,
        variants=tuple(
            Variant(
                name,
                f"{name}.onnx",
                name,
                variant_providers,
                (processors or {}).get(name, ()),
                max_rows,
            )
            for name in variants
        ),
        self_test=SelfTest("selftest.npz", {name: Tolerance(0.1, 0.9) for name in variants}),
        files=files,
        score=score if scored else None,
        escalates_to=Pairing(HUB_MODEL, "c" * 64) if paired and scored else None,
    )
    (path / "bundle.json").write_bytes(bundle.to_json())
    directory = read(path)
    if certified and paired and scored:
        add_certificate(directory)
    return read(path)


def golden(onnx: str, factor: float) -> dict[str, Array]:
    """Return a self-test's vectors: what a model answers that multiplies by ``factor``."""
    if onnx == "text.onnx":
        words = np.array([[b"one"], [b"two"]])
        return {"input.s": words, "output.t": words}
    x = SURE[0] if onnx == "double_one.onnx" else np.concatenate([SURE, UNSURE])
    if onnx == "tokens.onnx":
        x = x[np.newaxis]
        masks = {"input.attention_mask": np.ones(x.shape[:2], np.int64)}
    else:
        masks = {}
    return {"input.x": x, "output.logits": x * np.float32(factor), **masks}


def certificate(directory: BundleDirectory, variant: str = "", **changes: object) -> Certificate:
    """Return a certificate that holds here for one variant, with some fields changed."""
    chosen = directory.bundle.variant(variant or directory.bundle.variants[0].name)
    fields: dict[str, object] = {
        "model": directory.bundle.model,
        "version": directory.bundle.version,
        "variant": chosen.name,
        "variant_sha256": directory.variant_sha256(chosen),
        "hub_model": HUB_MODEL,
        "hub_sha256": HUB_DIGEST,
        "hardware_class": providers.hardware_class(providers.CPU),
        "score": directory.bundle.score,
        "threshold": THRESHOLD,
        "issued_at": NOW - datetime.timedelta(days=1),
        "expires_at": NOW + datetime.timedelta(days=30),
    }
    return a_certificate(**{**fields, **changes})


def add_certificate(
    directory: BundleDirectory, variant: str = "", **changes: object
) -> Certificate:
    """Write a certificate beside the bundle."""
    made = certificate(directory, variant, **changes)
    folder = directory.path / "certificates"
    folder.mkdir(exist_ok=True)
    (folder / f"{made.id}.json").write_bytes(made.to_json())
    return made


def _file(path: Path) -> File:
    return File(documents.sha256_of_file(path), path.stat().st_size)
