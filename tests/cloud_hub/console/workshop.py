"""Bundles as the workshop makes them today: with a parent, a report of schema 1, and its page."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fogline_protocol import release
from fogline_protocol.release import Parent, Processing

DIGITS = Path(__file__).parents[3] / "models/digits/bundles/digits-1.1.0"
HOSTILE = "<script>alert('&')</script>"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Report</title>
<style>h1 { color: rgb(1, 2, 3) }</style><h1 style="margin: 0">A report of \N{SNOWMAN}</h1></html>
"""


def rate(value: float, around: float = 0.01) -> dict[str, float]:
    lower, upper = max(value - around, 0.0), min(value + around, 1.0)
    return {"value": value, "lower": lower, "upper": upper, "items": 2100, "scenes": 105}


def figures(accuracy: float, loss: float | None) -> dict[str, Any]:
    slices = [
        {
            "name": f"writers {place}",
            "items": 140,
            "scenes": 7,
            "accuracy": rate(accuracy - place / 100, 0.05),
            "agreement": None,
            "loss": None,
        }
        for place in range(15)
    ]
    return {
        "accuracy": rate(accuracy),
        "loss": None
        if loss is None
        else {"value": loss, "lower": loss - 0.004, "upper": loss + 0.004},
        "agreement": None if loss is None else rate(0.9952, 0.004),
        "agreement_hub": rate(0.947),
        "macro_f1": 0.94,
        "calibration_error": 0.03,
        "reliability": [],
        "recall": {},
        "confusion": [],
        "cosine": None,
        "cosine_worst": None,
        "relative_error": None,
        "relative_error_worst": None,
        "slices": slices,
    }


def cost(us: float, ratio: float) -> dict[str, Any]:
    return {
        "latency_us": {"1": {"median": us, "low": us - 1, "high": us + 1}},
        "ratio": {"1": {"median": ratio, "low": ratio - 0.02, "high": ratio + 0.02}},
        "load_ms": {"median": 8.5, "low": 7, "high": 9},
        "memory_mb": None,
    }


def report(**changes: Any) -> dict[str, Any]:
    """Return a report of schema 1 with a variant that is waived and one that is refused."""
    refused = "fp16 refused: loses 3.1 points (95 %: 2.7 to 3.5) of accuracy, at most 1.0 allowed"
    waived = "int8-qdq ships although 1.31 x the latency of fp32, at most 1.00 allowed"
    document: dict[str, Any] = {
        "figures": {
            "schema": 1,
            "model": "digits",
            "version": "1.3.0",
            "description": "Digits",
            "held_out": "scanned copies of digits",
            "precisions": {"int8-qdq": "int8", "fp32": "fp32", "fp16": "fp16"},
            "sizes": {"int8-qdq": 11418, "fp32": 25540, "fp16": 13020},
            "parent": {"version": "1.1.0", "bundle_sha256": "ab" * 32, "changes": ["smaller now"]},
            "inputs": [
                {"name": "calibration.npz", "sha256": "cd" * 32, "bytes": 33300, "what": "digits"}
            ],
            "steps": [
                {"name": "export", "did": "opset 20, 6,138 parameters, 3e-8 from torch"},
                {"name": "quantize", "did": "static QDQ int8 per channel, reduced range"},
            ],
            "bundle_sha256": "ab" * 32,
            "evaluation": {
                "items": 2100,
                "scenes": 105,
                "classes": [str(digit) for digit in range(10)],
                "reference": "fp32",
                "variants": {
                    "int8-qdq": figures(0.9448, -0.001),
                    "fp32": figures(0.9438, None),
                    "fp16": figures(0.9128, 0.031),
                },
                "hub_model": "digits-hub",
                "hub": figures(0.97, -0.03),
            },
            "uncertified": "12 scenes cannot carry 1 %: 299 are needed",
            "combined": {
                "function": "logistic",
                "parameters": {"bias": 0.5, "log_odds": 1.0, "spread": 0.25},
                "fitted_on": "tuning",
                "variant": "int8-qdq",
                "alpha": 0.05,
                "escalated": 0.162,
                "escalated_by_max_softmax": 0.164,
                "saved": {"value": 0.002, "lower": -0.01, "upper": 0.014},
                "sentence": "score logistic buys nothing that this data could tell from chance",
            },
            "gains": {
                "new writers": [
                    {
                        "name": "writers 3",
                        "items": 40,
                        "scenes": 10,
                        "accuracy": rate(0.9, 0.05),
                        "agreement": None,
                        "loss": {"value": -0.042, "lower": -0.07, "upper": -0.01},
                    }
                ]
            },
            "also": {
                "new writers": {
                    "items": 240,
                    "scenes": 60,
                    "accuracy": {"int8-qdq": rate(0.871), "digits-hub": None},
                }
            },
            "escalation": [
                {
                    "variant": "int8-qdq",
                    "hardware_class": release.read(DIGITS).certificates[0].hardware_class,
                    "at": {"escalated": 0.25, "disagreement": 0.022, "accuracy": 0.965},
                    "accuracy_edge": 0.865,
                    "accuracy_hub": 0.984,
                }
            ],
        },
        "decisions": {
            "shipped": ["int8-qdq", "fp32"],
            "variants": [
                {"variant": "int8-qdq", "verdict": "waived", "sentence": waived, "checks": []},
                {"variant": "fp32", "verdict": "eligible", "sentence": "fp32 eligible"},
                {"variant": "fp16", "verdict": "refused", "sentence": refused, "checks": []},
            ],
        },
        "timings": {"int8-qdq": cost(74.8, 1.31), "fp32": cost(56.7, 1.0)},
        "machine": {"hardware_class": "x86_64+avx2", "cores": "2"},
    }
    return document | changes


def bundle(
    folder: Path,
    digits: Path,
    *,
    of: str = "digits-1.1.0",
    version: str = "1.3.0",
    parent: Parent | None = None,
    document: Mapping[str, Any] | str | None = None,
    page: str | None = PAGE,
    card: str | None = None,
    certified: bool = True,
    **changes: Any,
) -> Path:
    """Write a bundle like a committed one of the digits, and return its folder."""
    shutil.copytree(digits / "bundles" / of, folder)
    before = release.read(folder)
    files = dict(before.bundle.files)
    if card is not None:
        data = card.encode()
        (folder / "README.md").write_bytes(data)
        files["README.md"] = release.File(release.documents.sha256(data), len(data))
    fields: dict[str, Any] = {
        "version": version,
        "files": files,
        "task": "image-classification",
        "parent": parent,
        "pre_processing": (Processing("resize", parameters={"height": "8", "width": "8"}),),
        "post_processing": (Processing("argmax"),),
    }
    root = replace(before.bundle, **fields | changes)
    (folder / "bundle.json").write_bytes(root.to_json())
    shutil.rmtree(folder / "certificates", ignore_errors=True)
    (folder / "certificates").mkdir()
    for place, one in enumerate(before.certificates if certified else ()):
        own = replace(one, version=version)
        (folder / "certificates" / f"{place}.json").write_bytes(own.to_json())
    text = document if isinstance(document, str) else json.dumps(document or report())
    (folder / "report.json").write_text(text)
    (folder / "report.html").unlink(missing_ok=True)  # the committed one
    if page is not None:
        (folder / "report.html").write_text(page)
    return folder
