"""The hardware class: the key of variants, measurements and certificates.

A threshold measured on one class says nothing on another: the same int8 file scores
differently on AVX2, VNNI and ARM (microsoft/onnxruntime#20479, #14642, #28609). So edge,
hub and workshop must name classes identically, and this file does it for all three:

    x86_64+avx512_vnni/CPUExecutionProvider/onnxruntime-1.32
"""

import functools
import platform
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from pathlib import Path

# The strongest set that changes which integer kernels run comes first.
_LADDER = {
    "x86_64": ("avx512_vnni", "avx_vnni", "avx512f", "avx2"),
    "aarch64": ("i8mm", "asimddp"),
}


def instruction_set(machine: str, flags: AbstractSet[str]) -> str:
    """Return the part of the class that names the processor, e.g. ``x86_64+avx2``."""
    for flag in _LADDER.get(machine, ()):
        if flag in flags:
            return f"{machine}+{flag}"
    return machine


def sums_saturate(processor: str) -> bool:
    """Return whether uint8 times int8 overflows on an instruction set like ``x86_64+avx2``.

    x86 without VNNI adds two products in 16 bits; int8 weights of 7 bits always fit.
    """
    return processor.partition("+")[0] == "x86_64" and "vnni" not in processor


def suits(processor: str, wanted: Collection[str]) -> bool:
    """Return whether a processor like ``x86_64+avx512_vnni`` is one of ``wanted``; none: any is.

    ``x86_64`` stands for all of its kind, ``x86_64+vnni`` for those with VNNI of either width.
    """
    machine, _, features = processor.partition("+")
    for each in wanted:
        kind, _, feature = each.partition("+")
        if kind == machine and feature in features:
            return True
    return not wanted


@functools.cache
def this_machine() -> str:
    """Return the instruction set of the machine this runs on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
            break
    return instruction_set(platform.machine(), flags)


def hardware_class(provider: str, runtime: str, runtime_version: str) -> str:
    """Return the class of this machine for one execution provider and runtime.

    Only major and minor version count: a patch release does not change kernels.
    """
    version = ".".join(runtime_version.split(".")[:2])
    return f"{this_machine()}/{provider}/{runtime}-{version}"
