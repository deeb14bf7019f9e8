"""Says what this environment can export, quantize and measure: one sentence per finding."""

import enum
import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fogline_models.forms import FORMS, Form
from fogline_models.session import CPU, hardware_class
from fogline_protocol import hardware

MIN_FREE_BYTES = 1 << 30

# What each step needs: distributions, and the extra of fogline that brings them. Of the runtime
# there are two distributions, see ``_runtime``; it is missing only where both are.
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "certify, evaluate": (("numpy", "onnxruntime"), "edge"),
    "build recipes": (("pydantic", "jinja2"), "models"),
    "export from torch": (("torch", "onnx", "onnxscript"), "models"),
    "quantize": (("onnx", "onnxruntime"), "models"),
    "export Hugging Face": (("transformers", "optimum-onnx", "torch"), "hf"),
    "family digits": (("scikit-learn", "torch"), "models"),
}


class Level(enum.StrEnum):
    """What a finding means for work here."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5}  {self.what:<22}  {self.text}"


def examine(cache: Path) -> Iterator[Finding]:
    """Look at everything; ``cache`` is where steps are kept."""
    installed = _installed()
    yield _runtime(installed)
    for step, (packages, extra) in NEEDS.items():
        yield needs(step, packages, extra, installed)
    yield _tool("espeak-ng", "family keywords", "it synthesizes the speech")
    processor = hardware.this_machine()
    yield _processor(processor)
    for form in FORMS.values():
        yield _form(form, processor)
    if any(name in installed for name in RUNTIMES):
        yield from _providers()
    yield _space(cache)


def needs(step: str, packages: Sequence[str], extra: str, installed: Mapping[str, str]) -> Finding:
    """Say whether a step's packages are there."""
    packages = [
        next((each for each in RUNTIMES if each in installed), name) if name in RUNTIMES else name
        for name in packages
    ]
    absent = [name for name in packages if name not in installed]
    if absent:
        how = f"pip install 'fogline[{extra}]'"
        verb = "is" if len(absent) == 1 else "are"
        return Finding(Level.NOTE, step, f"cannot: {', '.join(absent)} {verb} missing: {how}")
    return Finding(Level.OK, step, ", ".join(f"{name} {installed[name]}" for name in packages))


def _installed() -> dict[str, str]:
    names = {name for packages, _ in NEEDS.values() for name in packages} | {*RUNTIMES}
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _runtime(installed: Mapping[str, str]) -> Finding:
    if all(name in installed for name in RUNTIMES):
        return Finding(
            Level.WRONG,
            "ONNX Runtime",
            "onnxruntime and onnxruntime-gpu own the same files: uninstall both, install one",
        )
    for name in RUNTIMES:
        if name in installed:
            return Finding(Level.OK, "ONNX Runtime", f"{name} {installed[name]}")
    return Finding(Level.WRONG, "ONNX Runtime", "missing: pip install 'fogline[edge]'")


def _tool(command: str, what: str, why: str) -> Finding:
    path = shutil.which(command)
    if path is None:
        return Finding(
            Level.NOTE, what, f"cannot: {command} is missing ({why}): apt-get install {command}"
        )
    return Finding(Level.OK, what, f"{command} is at {path}")


def _processor(processor: str) -> Finding:
    if hardware.sums_saturate(processor):
        return Finding(
            Level.NOTE,
            "processor",
            f"{processor} has no VNNI: int8 of 8-bit weights saturates here, its latency and "
            "answers say nothing about processors that have it",
        )
    return Finding(Level.OK, "processor", processor)


def _form(form: Form, processor: str) -> Finding:
    """Say what a form of quantization is for, and whether its figures here mean anything."""
    if form.saturates_on(processor):
        return Finding(Level.NOTE, f"form {form.name}", f"{form.hardware}; not to be measured here")
    return Finding(Level.OK, f"form {form.name}", form.hardware)


def _providers() -> Iterator[Finding]:
    import onnxruntime

    for name in onnxruntime.get_available_providers():
        if name == CPU:
            yield Finding(Level.OK, "measures and certifies", hardware_class(CPU))
        else:
            yield Finding(Level.OK, "provider", f"{name} is in this build of onnxruntime")


def _space(cache: Path) -> Finding:
    place = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Finding(Level.WRONG, "disk", f"{place} cannot be written: name another with --cache")
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free for kept steps in {cache}"
    if free < MIN_FREE_BYTES:
        return Finding(Level.WRONG, "disk", f"only {text}: name another place with --cache")
    return Finding(Level.OK, "disk", text)
