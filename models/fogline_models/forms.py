"""The forms of a net: fp32, and what quantization can make of it for a class of hardware. Pure.

Every form is a variant of its own, by the same name. ``FORMS`` says which hardware class each is
for and where that is known from, ``forms_for`` picks them for the classes a recipe names,
``quantize.py`` makes them.

Weights of ``int8-qdq`` use 7 of their 8 bits, so that one file is right on every x86 processor.
Without VNNI a kernel adds two products of uint8 and int8 in 16 bits and cuts off what does not
fit:

    8 bits   255 * 127 * 2 = 64,770 > 32,767   cut off: logits of digits strayed by up to 8.8
    7 bits   255 *  64 * 2 = 32,640            always fits, as on VNNI, which adds in 32 bits

What the lost bit costs in accuracy is measured in models/digits/README.md. Where only
processors with VNNI are meant, ``int8-vnni`` has it back.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fogline_models.errors import BadInput
from fogline_models.session import CPU
from fogline_protocol import hardware

STEP = "quantize"


class Way(enum.StrEnum):
    """How a form comes about."""

    STATIC = "static"  # quantize and dequantize nodes, with ranges from training inputs
    DYNAMIC = "dynamic"  # ranges found anew in every run
    CAST = "cast"  # float16 inside, float32 at inputs and outputs


@dataclass(frozen=True, slots=True)
class Form:
    """One way to make an fp32 file smaller and faster, and where that is true."""

    name: str  # of the variant
    precision: str
    way: Way
    hardware: str  # the classes it is for
    source: str  # how that is known
    activations: str = "uint8"
    weights_of_7_bits: bool = False
    symmetric: bool = False  # zero points are zero, biases stay float32

    @property
    def needs_inputs(self) -> bool:
        """Whether it cannot be made without training inputs."""
        return self.way is Way.STATIC

    def saturates_on(self, processor: str) -> bool:
        """Return whether integer kernels of a processor like ``x86_64+avx2`` cut its sums off.

        What is measured there says nothing of the hardware the form is for; a session that runs
        the file as written still does.
        """
        return (
            self.way is Way.STATIC
            and not self.weights_of_7_bits
            and hardware.sums_saturate(processor)
        )


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form(
            "int8-qdq",
            "int8",
            Way.STATIC,
            "x86_64, with VNNI and without",
            "measured on AVX2 and VNNI; ONNX Runtime docs, Quantization: u8/s8 with reduce_range",
            weights_of_7_bits=True,
        ),
        Form(
            "int8-vnni",
            "int8",
            Way.STATIC,
            "x86_64 with VNNI only: elsewhere its sums saturate",
            "measured on VNNI; ONNX Runtime docs, Quantization: no reduce_range with VNNI",
        ),
        Form(
            "int8-trt",
            "int8",
            Way.STATIC,
            "TensorRT",
            "TensorRT docs, explicit quantization: symmetric int8, biases in float; not measured",
            activations="int8",
            symmetric=True,
        ),
        Form(
            "int8-arm",
            "int8",
            Way.STATIC,
            "aarch64",
            "ONNX Runtime docs, Quantization: s8/s8 QDQ first, all 8 bits on ARM; not measured",
            activations="int8",
        ),
        Form(
            "int8-dynamic",
            "int8",
            Way.DYNAMIC,
            "any processor, transformers and recurrent nets only",
            "measured on AVX2 and VNNI; convolutions would be slower than fp32 and stay fp32",
            weights_of_7_bits=True,
        ),
        Form(
            "fp16",
            "fp16",
            Way.CAST,
            "TensorRT and CUDA; onnxruntime's x86 kernels cast back to float32",
            "TensorRT docs, strong typing: precision is decided in the file; not measured",
        ),
    )
}

# Where a variant may run, best first; all others on the CPU alone.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "fp32": (CPU, "CUDAExecutionProvider"),
    "fp16": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU),
    "int8-trt": ("TensorrtExecutionProvider", CPU),
}


def named(name: str) -> Form:
    """Return the form of this name.

    Raises:
        BadInput: there is none.
    """
    try:
        return FORMS[name]
    except KeyError:
        raise BadInput(f"{STEP}: unknown form {name!r}, known are {', '.join(FORMS)}") from None


def forms_for(targets: Iterable[str], *, transformer: bool) -> tuple[str, ...]:
    """Return the names of the forms that may pay on some hardware, the likeliest first. Pure.

    A target is ``tensorrt`` or a processor: ``x86_64``, ``x86_64+vnni``, ``aarch64``, or as
    hardware classes spell it, ``x86_64+avx512_vnni``. Whether a form does pay is measured by
    whoever has the hardware.

    Raises:
        BadInput: a target is none of these.
    """
    names: list[str] = []
    for target in targets:
        machine, _, _ = target.partition("+")
        match machine:
            case "tensorrt":
                names += ["int8-trt", "fp16"]
            case "aarch64":
                names += ["int8-dynamic", "int8-arm"] if transformer else ["int8-arm"]
            case "x86_64" if hardware.sums_saturate(target):
                # Transformers on AVX2: 0.7 of fp32's time dynamic, 0.8 static.
                names += ["int8-dynamic", "int8-qdq"] if transformer else ["int8-qdq"]
            case "x86_64":
                names += ["int8-vnni", "int8-dynamic"] if transformer else ["int8-vnni"]
            case _:
                raise BadInput(
                    f"{STEP}: no form is known for target {target!r}: name x86_64, x86_64+vnni, "
                    "aarch64 or tensorrt"
                )
    return tuple(dict.fromkeys(names))


def precision_of(variant: str) -> str:
    """Return the precision that a variant computes in, mostly."""
    return FORMS[variant].precision if variant in FORMS else variant


def providers_of(variant: str) -> tuple[str, ...]:
    """Return the execution providers that a variant is meant for, best first."""
    return PROVIDERS.get(variant, (CPU,))


def processors_of(variant: str) -> tuple[str, ...]:
    """Return the processors whose kernels compute a variant as it is written; none: all."""
    if variant in FORMS and FORMS[variant].saturates_on("x86_64"):
        return ("x86_64+vnni", "aarch64")
    return ()


def computes_here(variant: str) -> bool:
    """Return whether this machine's kernels compute a variant as it is written."""
    return hardware.suits(hardware.this_machine(), processors_of(variant))
