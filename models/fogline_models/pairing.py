"""Whether one model can answer what another one is asked: an edge and its hub. Pure.

Tensors have names and no order: a request carries them by name, from the device to the hub. What
the hub gets is what the edge got, so it must take that and may take more shapes; what is decided
on must be there on both sides, and classes are told by their names. The hub holds every bundle
that arrives against the same rule; here it is asked as early as a build can know the answer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fogline_protocol.release import Bundle
from fogline_protocol.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Contract:
    """What one side takes and gives."""

    title: str  # what people call it
    inputs: Mapping[str, TensorSpec]  # by name
    outputs: Mapping[str, TensorSpec | None]  # by name; None: nothing is known but the name
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, bundle: Bundle) -> "Contract":
        """Return what a bundle promises."""
        return cls(
            f"{bundle.model} {bundle.version}",
            by_name(bundle.inputs),
            by_name(bundle.outputs),
            bundle.labels,
        )


def by_name(specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """Return tensors as they are asked for."""
    return {spec.name: spec for spec in specs}


def problem(edge: Contract, hub: Contract) -> str | None:
    """Say why ``hub`` cannot answer what ``edge`` escalates, or None if it can."""
    inputs = tuple(_unfit(edge.title, edge.inputs, hub.title, hub.inputs))
    if inputs:
        return f"{edge.title} and {hub.title} take different inputs: {'; '.join(inputs)}"
    for name, spec in edge.outputs.items():
        if name not in hub.outputs:
            return (
                f"{hub.title} gives no output {name!r}, only {_named(hub.outputs)}: what is "
                "compared must call its answers alike"
            )
        theirs = hub.outputs[name]
        if spec is not None and theirs is not None and not _fits(theirs, spec):
            return f"the answers differ in form: {_both(edge.title, spec, hub.title, theirs)}"
    if edge.labels and hub.labels and edge.labels != hub.labels:
        return _labels(edge, hub)
    return None


def takes(asked: Mapping[str, TensorSpec], by: Mapping[str, TensorSpec]) -> bool:
    """Return whether what takes ``by`` can be given everything that fits ``asked``."""
    return not any(_unfit("", asked, "", by))


def differences(a: Sequence[TensorSpec], b: Sequence[TensorSpec]) -> str:
    """Say how the inputs of A and B differ; nothing, if only their order does."""
    mine, theirs = by_name(a), by_name(b)
    same = mine == theirs
    return "" if same else "; ".join(_unfit("A", mine, "B", theirs, exact=True))


def _unfit(
    title: str,
    asked: Mapping[str, TensorSpec],
    other: str,
    taken: Mapping[str, TensorSpec],
    *,
    exact: bool = False,
) -> Iterator[str]:
    only = [name for name in asked if name not in taken]
    if only:
        yield f"{other} does not take {_named(only)}"
    more = [name for name in taken if name not in asked]
    if more:
        yield f"{other} also needs {_named(more)}"
    for name, spec in asked.items():
        if name in taken and not (spec == taken[name] if exact else _fits(spec, taken[name])):
            yield _both(title, spec, other, taken[name])


def _fits(given: TensorSpec, wanted: TensorSpec) -> bool:
    """Return whether every tensor like ``given`` is one like ``wanted``."""
    return (
        given.datatype == wanted.datatype
        and len(given.shape) == len(wanted.shape)
        and all(want in (-1, have) for have, want in zip(given.shape, wanted.shape, strict=True))
    )


def _both(title: str, spec: TensorSpec, other: str, theirs: TensorSpec) -> str:
    return (
        f"{spec.name!r} is {spec.datatype} {list(spec.shape)} for {title} and "
        f"{theirs.datatype} {list(theirs.shape)} for {other}"
    )


def _labels(edge: Contract, hub: Contract) -> str:
    for number, (mine, theirs) in enumerate(zip(edge.labels, hub.labels, strict=False)):
        if mine != theirs:
            return (
                f"class {number} is called {mine!r} by {edge.title} and {theirs!r} by "
                f"{hub.title}: name classes alike and in one order"
            )
    return (
        f"{edge.title} tells {len(edge.labels)} classes apart and {hub.title} {len(hub.labels)}: "
        "they must be the same"
    )


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
