"""``fogline-models``: the workshop's command line.

Thin: it reads options, loads a family's recipe, calls the steps, and turns their errors into
one sentence and exit code 1. Nothing heavy is imported before a command runs.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fogline_models.errors import BadInput, MissingExtra, require

if TYPE_CHECKING:
    from fogline_protocol.release import BundleDirectory

FAMILIES = Path("models")
PROVIDER = "CPUExecutionProvider"  # repeated from session.py, which imports numpy


@click.group()
def main() -> None:
    """Turn trained models into releases that a fleet can trust."""


@main.command()
@click.argument("family")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write; by default into the family's own folder.",
)
def build(family: str, out: Path | None) -> None:
    """Train, export, quantize, evaluate, certify and bundle FAMILY.

    FAMILY is a folder that holds recipe.py, or the name of one below ./models.
    """
    with _one_sentence():
        folder = _find(family)
        require("torch", "onnx", "onnxscript", "onnxruntime", "sklearn", extra="models")
        _recipe(folder)(out or folder, _say)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--hub", required=True, type=click.Path(path_type=Path), help="The bundle it escalates to."
)
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="Calibration items, an .npz."
)
@click.option("--alpha", default=0.01, show_default=True, help="Largest risk of disagreement.")
@click.option("--delta", default=0.05, show_default=True, help="Chance that the bound fails.")
@click.option("--variant", "variants", multiple=True, help="Which to certify; by default all.")
@click.option("--hub-variant", help="Which file the hub serves; by default its bundle's first.")
@click.option("--provider", default=PROVIDER, show_default=True, help="Where the edge model runs.")
@click.option(
    "--valid-days",
    type=click.IntRange(1, 36500),
    default=365,
    show_default=True,
    help="Days until it expires.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write; by default into the bundle's certificates.",
)
def certify(
    bundle: Path,
    hub: Path,
    data: Path,
    alpha: float,
    delta: float,
    variants: tuple[str, ...],
    hub_variant: str | None,
    provider: str,
    valid_days: int,
    out: Path | None,
) -> None:
    """Find the escalation threshold of BUNDLE on this machine and issue its certificates.

    Needs numpy and onnxruntime only, so it runs on a machine of the devices' hardware class.
    """
    with _one_sentence():
        import datetime

        from fogline_models import certify as step

        edge, peer = _read(bundle), _read(hub)
        terms = step.Terms(alpha, delta, datetime.timedelta(days=valid_days))
        calibration = read_items(data)
        # All are found before any is written: a refusal leaves the folder as it was.
        found = [
            step.certify(
                edge,
                peer,
                calibration,
                terms,
                issued_at=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
                variant=name,
                hub_variant=hub_variant,
                provider=provider,
            )
            for name in variants or [v.name for v in edge.bundle.variants]
        ]
        for certificate in found:
            path = step.save(certificate, out or step.folder_of(edge))
            click.echo(
                f"{certificate.model} {certificate.version} {certificate.variant} on "
                f"{certificate.hardware_class}: answers locally above {certificate.threshold:.4f}, "
                f"escalates {certificate.escalation_rate:.1%}; disagreement at most {alpha:g} with "
                f"confidence {1 - delta:g}, from {certificate.scenes} independent scenes "
                f"({certificate.sampling})"
            )
            click.echo(str(path))


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Verify BUNDLE and say everything that is in it."""
    with _one_sentence():
        from fogline_models import inspection

        told = inspection.document(_read(bundle))
        _print(told, as_json, inspection.lines(told))


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), help="Items for both, an .npz; else B's self-test."
)
@click.option("--variant", help="Which file of both answers; by default B's first that A has, too.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def compare(a: Path, b: Path, data: Path | None, variant: str | None, as_json: bool) -> None:
    """Say what changes for a device that has bundle A and gets bundle B."""
    with _one_sentence():
        from fogline_models import comparison

        found = comparison.compare(_read(a), _read(b), data, variant)
        _print(comparison.document(found), as_json, comparison.lines(found))


def _print(told: Mapping[str, object], as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for line in lines:  # a bundle's words must not steer the terminal
            click.echo("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line))


def _read(folder: Path) -> "BundleDirectory":
    from fogline_protocol import release

    try:
        return release.read(folder)
    except release.BundleRefused as refusal:
        raise BadInput(f"{folder} is not an intact bundle: {refusal}") from None


def _find(family: str) -> Path:
    for folder in (Path(family), FAMILIES / family):
        if (folder / "recipe.py").is_file():
            return folder
    raise BadInput(
        f"no family {family!r}: expected {family}/recipe.py or {FAMILIES / family}/recipe.py"
    )


def _recipe(folder: Path) -> Callable[[Path, Callable[[str], None]], None]:
    """Load a family's folder as a package of its own and return its recipe's ``build``."""
    name = f"fogline_family_{folder.resolve().name}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise BadInput(f"{folder}: a family is a Python package, but it has no __init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    build: Any = getattr(importlib.import_module(f"{name}.recipe"), "build", None)
    if not callable(build):
        raise BadInput(f"{folder / 'recipe.py'}: expected a function build(out, say)")
    recipe: Callable[[Path, Callable[[str], None]], None] = build
    return recipe


def _say(line: str) -> None:
    click.echo(line, err=True)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn what the caller can mend into one sentence and exit code 1; the rest is our bug."""
    try:
        yield
    except (BadInput, MissingExtra) as error:
        raise click.ClickException(str(error)) from None
