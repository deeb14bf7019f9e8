"""Exports a torch module to an ONNX file that depends on nothing but the module.

The exporter leaves absolute source paths in every node, does not notice a module in train
mode, and may quietly answer with another opset (model-workshop 3); all three are dealt with
here. Whatever is written passed ONNX's checker and was compared with torch.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fogline_models.errors import BadInput
from fogline_models.session import Session
from fogline_protocol.tensors import Array, TensorSpec

OPSET = 20
MAX_RELATIVE_DIFFERENCE = 1e-4  # to torch, of the largest output; measured: 3e-8 to 1e-6


def export(
    module: Any,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    examples: Mapping[str, Array],
    max_batch: int,
    props: Mapping[str, str],
    path: Path,
) -> dict[str, Array]:
    """Write ``module`` to ``path`` and return torch's own outputs for ``examples``.

    ``module`` takes the inputs in order and returns one tensor per output; every tensor has
    the batch dimension first, which stays variable up to ``max_batch``.

    Raises:
        BadInput: the module is in train mode, is not exported with the opset asked for, or the
            file computes something else than torch.
    """
    import torch

    if module.training:
        raise BadInput("export: the module is in train mode, call .eval() first")
    arguments = tuple(torch.from_numpy(examples[spec.name]) for spec in inputs)
    with _quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=tuple(
                {0: torch.export.Dim("batch", min=1, max=max_batch)} for _ in inputs
            ),
        )
    if program is None:
        raise BadInput("export: the exporter returned nothing for this module")
    finish(program.model_proto, props, path)
    with torch.no_grad():
        results = module(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    expected = {spec.name: result.numpy() for spec, result in zip(outputs, results, strict=True)}
    _compare(path, examples, expected, max_batch)
    return expected


def finish(model: Any, props: Mapping[str, str], path: Path) -> None:
    """Strip what tools left in an ``onnx.ModelProto``, add our metadata, check it, write it.

    Raises:
        BadInput: the model does not have the opset asked for.
    """
    import onnx

    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph, model):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    used = {node.domain for node in graph.node}
    keep = [entry for entry in model.opset_import if entry.domain in used]
    model.ClearField("opset_import")
    model.opset_import.extend(keep)  # preparing for quantization leaves eight unused ones
    found = [entry.version for entry in keep if entry.domain == ""]
    if found != [OPSET]:
        raise BadInput(f"export: asked for opset {OPSET}, the exporter answered with {found}")
    onnx.helper.set_model_props(model, dict(sorted(props.items())))
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch says about itself: torchvision's absence, its own deprecations."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _compare(
    path: Path, examples: Mapping[str, Array], expected: Mapping[str, Array], max_batch: int
) -> None:
    found = Session(path).run(examples, max_batch)
    for name, want in expected.items():
        if not np.isfinite(want).all():
            raise BadInput(f"export: torch's output {name!r} is not finite on the examples")
        difference = float(np.abs(found[name] - want).max() / max(np.abs(want).max(), 1e-12))
        if difference > MAX_RELATIVE_DIFFERENCE:
            raise BadInput(
                f"export: output {name!r} differs from torch by {difference:.1e} of its largest "
                f"value, at most {MAX_RELATIVE_DIFFERENCE:.0e} is accepted"
            )
