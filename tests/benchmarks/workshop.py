"""What the workshop makes of two nets: export, every form for this processor, the command line.

    ./run bench workshop [--json FILE]

    cnn      a MobileNetV2-like net, 224 by 224, int8 against fp32
    bert     a BERT-like encoder, 64 tokens, int8 against fp32
    export   both, against torch
    help     fogline-models --help

Needs the workshop's environment (torch, transformers). Weights are random with a fixed seed,
which costs a run exactly what trained ones do and says nothing about accuracy. One thread;
variants take turns, every turn is one round, and a row is the median of the rounds' ratios of
processor time. Bars on latency were set for processors with VNNI: elsewhere the row is
measured and printed, and held to nothing.
"""

import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models import graph
from fogline_models.export import MAX_RELATIVE_DIFFERENCE, export
from fogline_models.forms import FORMS, Way, forms_for
from fogline_models.quantize import prepared
from fogline_models.session import Session
from fogline_protocol import hardware
from fogline_protocol.tensors import Array, TensorSpec

ROUNDS = 15
RUNS = 8  # of one variant in one round; the quickest counts, the others met a neighbor
HELP_RUNS = 9
RANGE_ITEMS = 32
TOKENS = 64
VOCABULARY = 4000
ON_VNNI = "processors with VNNI"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure and the bar it is held to."""

    what: str
    measured: float
    bar: float
    applies: str | None  # to whom the bar speaks, if not to this processor
    behind: str  # the absolute figures, for the curious
    rounds: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """Return what the table says."""
        if self.applies is not None:
            return f"not held to it: the bar is for {self.applies}"
        return "pass" if self.measured <= self.bar else "miss"


@dataclass(frozen=True, slots=True)
class Made:
    """One net's files, and how far the export is from torch."""

    files: Mapping[str, Path]  # fp32 and every form
    row: Mapping[str, Array]  # one item
    difference: float


def main(report: Path | None = None) -> None:
    """Measure and print every row; write them to ``report`` as JSON."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise SystemExit(
            f"bench workshop: {' and '.join(absent)} missing: run it in the workshop's "
            "environment, pip install 'fogline[models,hf]'"
        )
    import onnxruntime
    import torch

    torch.set_num_threads(1)
    print(f"workshop: {ROUNDS} rounds, {hardware.this_machine()}, ONNX Runtime "
          f"{onnxruntime.__version__}, torch {torch.__version__}, one thread\n\n"
          "| what | bar | measured | | behind it |\n"
          "|---|---|---|---|---|")  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in _rows(Path(folder)):
            print(f"| {row.what} | ≤ {row.bar:g} | {row.measured:.3g} | {row.verdict} | "
                  f"{row.behind} |", flush=True)  # fmt: skip
            rows.append(row)
    if report is not None:
        document = {
            "processor": hardware.this_machine(),
            "python": platform.python_version(),
            "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
        }
        report.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _rows(folder: Path) -> Iterator[Row]:
    nets: Mapping[str, tuple[Callable[[Path], Made], bool, float, float | None]] = {
        "MobileNet-like": (_cnn, False, 0.55, 0.30),
        "BERT-like": (_bert, True, 0.45, None),
    }
    for name, (make, transformer, latency_bar, size_bar) in nets.items():
        made = make(folder / name)
        yield Row(
            f"{name}: export against torch, relative difference",
            made.difference,
            MAX_RELATIVE_DIFFERENCE,
            None,
            f"{made.files['fp32'].stat().st_size / 1e6:.1f} MB",
        )
        here = hardware.this_machine()
        first = forms_for([here], transformer=transformer)[0]
        times = _cpu_ms(made)
        for form in sorted(set(made.files) - {"fp32"}, key=lambda form: form != first):
            rounds = [a / b for a, b in zip(times[form], times["fp32"], strict=True)]
            applies = ON_VNNI if hardware.sums_saturate(here) else None
            if form != first:
                applies = f"{first}, the form for this processor"
            yield Row(
                f"{name}: {form} / fp32, CPU time of one item",
                statistics.median(rounds),
                latency_bar,
                applies,
                f"{min(times[form]):.2f} / {min(times['fp32']):.2f} ms",
                tuple(rounds),
            )
        if size_bar is not None:
            sizes = [made.files[form].stat().st_size for form in (first, "fp32")]
            yield Row(
                f"{name}: {first} / fp32, size",
                sizes[0] / sizes[1],
                size_bar,
                None,
                f"{sizes[0] / 1e6:.2f} / {sizes[1] / 1e6:.2f} MB",
            )
    yield _help()


def _cnn(folder: Path) -> Made:
    import torch

    torch.manual_seed(0)
    net = _mobile_net()
    rng = np.random.default_rng(0)
    images = {"image": rng.standard_normal((RANGE_ITEMS, 3, 224, 224)).astype(np.float32)}
    with torch.no_grad():
        for _ in range(3):  # statistics of its normalizations, as training would leave them
            net(torch.from_numpy(images["image"]))
    inputs = (TensorSpec("image", "FP32", (-1, 3, 224, 224)),)
    return _make(folder, net.eval(), inputs, 1000, images, None, Way.STATIC)


def _bert(folder: Path) -> Made:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=8,
        )
    )

    class Logits(torch.nn.Module):  # type: ignore[misc]  # its types are not looked at
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, tokens: Any, mask: Any) -> Any:
            return self.bert(input_ids=tokens, attention_mask=mask).logits

    rng = np.random.default_rng(0)
    lengths = rng.integers(TOKENS // 2, TOKENS + 1, (RANGE_ITEMS, 1))
    lengths[0] = TOKENS  # the item that is timed
    items = {
        "tokens": rng.integers(0, VOCABULARY, (RANGE_ITEMS, TOKENS)),
        "mask": (np.arange(TOKENS) < lengths).astype(np.int64),
    }
    inputs = tuple(TensorSpec(name, "INT64", (-1, -1)) for name in items)
    dynamic = {name: {1: ("sequence", 2, 512)} for name in items}
    return _make(folder, Logits().eval(), inputs, 8, items, dynamic, None)


def _make(
    folder: Path,
    net: Any,
    inputs: tuple[TensorSpec, ...],
    classes: int,
    items: Mapping[str, Array],
    dynamic: graph.Dynamic | None,
    only: Way | None,
) -> Made:
    """Export a net and give it every CPU form, or only those made in one way."""
    folder.mkdir()
    files = {"fp32": folder / "fp32.onnx"}
    outputs = (TensorSpec("logits", "FP32", (-1, classes)),)
    few = {name: array[:4] for name, array in items.items()}
    want = export(net, inputs, outputs, few, 64, {}, files["fp32"], dynamic=dynamic)["logits"]
    found = Session(files["fp32"]).run(few, 4)["logits"]
    with prepared(files["fp32"], items) as ready:
        for form in FORMS.values():
            if form.way is not Way.CAST and only in (None, form.way):
                files[form.name] = folder / f"{form.name}.onnx"
                ready.write(form.name, {}, files[form.name])
    row = {name: array[:1] for name, array in items.items()}
    return Made(files, row, float(np.abs(found - want).max() / np.abs(want).max()))


def _cpu_ms(made: Made) -> Mapping[str, list[float]]:
    sessions = {name: Session(path) for name, path in made.files.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            session.run(made.row, 1)  # warm caches again after the others' turn
            spent: list[float] = []
            for _ in range(RUNS):
                start = time.process_time()
                session.run(made.row, 1)
                spent.append(time.process_time() - start)
            times[name].append(min(spent) * 1e3)
    return times


def _help() -> Row:
    command = [sys.executable, "-c", "from fogline_models.cli import main; main(['--help'])"]
    spent: list[float] = []
    waited: list[float] = []
    for _ in range(HELP_RUNS):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        waited.append(time.perf_counter() - start)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # It only imports, so that on an idle machine it lasts as long as it computes.
    return Row(
        "fogline-models --help, CPU s",
        statistics.median(spent),
        0.4,
        None,
        f"quickest {min(waited):.2f} s on the clock",
        tuple(spent),
    )


def _mobile_net() -> Any:
    """Return MobileNetV2 (Sandler et al. 2018, table 2), 1,000 classes, 3.5 million parameters."""
    from torch import nn

    def conv(inside: int, out: int, kernel: int, stride: int = 1, group: int = 1) -> list[Any]:
        return [
            nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=group, bias=False),
            nn.BatchNorm2d(out),
        ]

    class Block(nn.Module):  # type: ignore[misc]  # its types are not looked at
        def __init__(self, inside: int, out: int, expansion: int, stride: int) -> None:
            super().__init__()
            wide = inside * expansion
            widen = [] if expansion == 1 else [*conv(inside, wide, 1), nn.ReLU6()]
            depthwise = [*conv(wide, wide, 3, stride, wide), nn.ReLU6()]
            self.path = nn.Sequential(*widen, *depthwise, *conv(wide, out, 1))
            self.residual = stride == 1 and inside == out

        def forward(self, x: Any) -> Any:
            y = self.path(x)
            return x + y if self.residual else y

    blocks = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
        (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip
    parts: list[Any] = [*conv(3, 32, 3, 2), nn.ReLU6()]
    inside = 32
    for expansion, out, count, first_stride in blocks:
        for index in range(count):
            parts.append(Block(inside, out, expansion, first_stride if index == 0 else 1))
            inside = out
    parts += [*conv(inside, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*parts, nn.Linear(1280, 1000))
