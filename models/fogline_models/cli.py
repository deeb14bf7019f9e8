"""``fogline-models``: the workshop's command line.

Thin: it reads options, loads a family's recipe, calls the steps, and turns their errors into
one sentence and exit code 1. Nothing heavy is imported before a command runs.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fogline_models.errors import BadInput, MissingExtra, require

if TYPE_CHECKING:
    from fogline_models.recipe import Recipe, Source
    from fogline_models.steps import Say, Steps
    from fogline_protocol.release import BundleDirectory

PROVIDER = "CPUExecutionProvider"  # repeated from session.py, which imports numpy
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
PATH = click.Path(path_type=Path)

_cache = click.option(
    "--cache",
    type=FOLDER,
    help="Where finished steps are kept; by default $FOGLINE_MODELS_CACHE or ~/.cache/fogline-models.",
)
_again = click.option(
    "--again",
    multiple=True,
    metavar="STEP",
    help="Run this step anew though nothing changed: data, export, run, measure, 'quantize int8-qdq'.",
)


_mask = click.option(
    "--mask",
    default="",
    metavar="INPUT",
    help="Of a token classifier: what is not 0 where a token counts; by default attention_mask.",
)


_dynamic = click.option(
    "--dynamic",
    default="",
    metavar="TOML",
    help="Axes besides the batch that vary, and how far, as in a recipe: "
    "'{tokens = {1 = [\"length\", 1, 128]}}'; equal bounds fix an axis of an ONNX file.",
)


@click.group()
@click.version_option(package_name="fogline")
@click.option("--traceback", is_flag=True, help="Show where in a recipe's own Python it failed.")
def main(traceback: bool) -> None:
    """Turn trained models into releases that a fleet can trust.

    \b
    From a recipe:     recipe (every key of one), build
    Step by step:      export, quantize, evaluate, bundle, certify
    To look at it:     inspect, compare, doctor
    To the fleet:      fogline release push BUNDLE

    A bundle is a folder: variants of one model for classes of hardware, golden vectors, model
    card, report, and the certificates of what a local answer may cost in quality.
    """  # noqa: D301 - click reads the backspace as "leave this paragraph as it is"


@main.command()
@click.argument("recipe", type=PATH)
@click.option("--out", type=FOLDER, help="Where to write; by default into the recipe's folder.")
@_cache
@_again
def build(recipe: Path, out: Path | None, cache: Path | None, again: tuple[str, ...]) -> None:
    """Make every release of RECIPE: from data to certified bundles.

    RECIPE is a recipe.toml, the folder that holds one, or the name of a family below ./models.
    To write one, start from what 'fogline-models recipe' prints: it has every key.
    A build that was interrupted goes on where it stopped; steps whose inputs did not change are
    not run again. Bundles are written below OUT/bundles, each whole or not at all.
    """
    with _one_sentence():
        from fogline_models import recipe as recipes

        _build(recipes.read(recipe), out, cache, again)


@main.command("recipe")
def print_recipe() -> None:
    """Print a recipe to start from, with every key, what it means, and its default.

    \b
    fogline-models recipe > pumps/recipe.toml
    """  # noqa: D301 - click reads the backspace as "leave this paragraph as it is"
    with _one_sentence():
        from fogline_models import reference

        click.echo(reference.text(), nl=False)


@main.command()
@click.argument("source")
@click.option(
    "--data", required=True, type=FILE, help="Training items, an .npz: a function sees them all."
)
@click.option(
    "--out", required=True, type=FOLDER, help="A folder for fp32.onnx and what is known of it."
)
@click.option(
    "--task",
    default="image-classification",
    show_default=True,
    help="Of a Hugging Face model: what it was trained for.",
)
@click.option(
    "--output",
    "outputs",
    multiple=True,
    default=("logits",),
    show_default=True,
    help="Names for what a torch module returns.",
)
@click.option("--max-batch", default=64, show_default=True, help="Rows in one run; 0: no batch.")
@click.option(
    "--argument",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of a torch function; the value as in TOML.",
)
@_dynamic
@_cache
def export(
    source: str,
    data: Path,
    out: Path,
    task: str,
    outputs: tuple[str, ...],
    max_batch: int,
    arguments: tuple[str, ...],
    dynamic: str,
    cache: Path | None,
) -> None:
    """Turn SOURCE into an fp32 ONNX file that is checked against it.

    SOURCE is a torch module as FILE.py:FUNCTION, an ONNX file, or the folder of a Hugging Face
    model. FUNCTION(splits, progress) returns the module in eval mode; splits["training"] holds the
    items, progress(done, total, note) may tell how far it is. An .npz of items holds input.NAME,
    label and, where items depend on each other, scene: one row each per item.
    """
    with _one_sentence():
        from fogline_models import build as builder

        recipe = _without_a_file(
            _source(source, outputs, arguments, dynamic),
            {"training": data},
            task=task,
            max_batch=max_batch,
        )
        folder = builder.export_only(recipe, _steps(cache, ()))
        _copy(folder, out)
        click.echo(str(out / "fp32.onnx"))


@main.command()
@click.argument("model", type=FILE)
@click.option("--form", required=True, help="What to make of it, such as int8-qdq; see 'doctor'.")
@click.option("--data", type=FILE, help="Training items, an .npz, for static forms and --sweep.")
@click.option("--keep", multiple=True, metavar="NODE", help="A node that stays fp32.")
@click.option(
    "--sweep",
    type=click.FloatRange(0, 1),
    help="Find the fewest nodes to keep for this agreement with fp32 on the items of --data.",
)
@click.option(
    "--mask",
    default="",
    metavar="INPUT",
    help="For --sweep, where outputs are for tokens: what is not 0 where one counts; by default "
    "attention_mask.",
)
@click.option(
    "--vectors",
    is_flag=True,
    help="For --sweep: outputs are features, which agree as far as their mean cosine says.",
)
@click.option("--out", required=True, type=FILE, help="The ONNX file to write.")
def quantize(
    model: Path,
    form: str,
    data: Path | None,
    keep: tuple[str, ...],
    sweep: float | None,
    mask: str,
    vectors: bool,
    out: Path,
) -> None:
    """Write one form of the fp32 file MODEL: int8, fp16, or mixed with fp32."""
    with _one_sentence():
        require("onnx", "onnxruntime", extra="models")
        from fogline_models import build as builder
        from fogline_models import data as datasets
        from fogline_models import steps

        ranges = None if data is None else datasets.read(data).inputs
        with steps.never_silent(_speaking(), "quantize") as say:
            kept = builder.quantize_file(
                model,
                form,
                ranges,
                out,
                keep=keep,
                sweep=sweep,
                mask=mask,
                vectors=vectors,
                say=say,
            )
        click.echo(f"{out}: {out.stat().st_size / model.stat().st_size:.2f} x the bytes of {model}")
        for node in kept:
            click.echo(f"left fp32: {node}")


@main.command()
@click.argument("models", nargs=-1, required=True, type=FILE)
@click.option("--data", required=True, type=FILE, help="Held-out items, an .npz.")
@click.option("--hub", type=FILE, help="The ONNX file that answers escalations, to agree with.")
@click.option("--vectors", is_flag=True, help="Outputs are features, not one logit per class.")
@click.option(
    "--tokens", is_flag=True, help="Outputs are logits for every token; so labels [n, tokens] say."
)
@_mask
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def evaluate(
    models: tuple[Path, ...],
    data: Path,
    hub: Path | None,
    vectors: bool,
    tokens: bool,
    mask: str,
    as_json: bool,
) -> None:
    """Say what each of MODELS is worth and costs here; the first is what others are compared with."""
    with _one_sentence():
        require("onnxruntime", extra="edge")
        from fogline_models import side_by_side, steps

        with steps.never_silent(_speaking(), "evaluate"):
            found = side_by_side.evaluate(
                models, data, hub, vectors=vectors, tokens=tokens, mask=mask
            )
        _print(side_by_side.document(found), as_json, side_by_side.lines(found))


@main.command()
@click.argument("model", type=FILE)
@click.option("--name", required=True, help="Of the model, as requests name it.")
@click.option("--version", required=True, help="Semantic, such as 1.0.0.")
@click.option(
    "--training", required=True, type=FILE, help="Items, an .npz: for ranges and self-test."
)
@click.option("--evaluation", required=True, type=FILE, help="Held-out items, an .npz.")
@click.option("--calibration", type=FILE, help="Items for certificates, an .npz.")
@click.option(
    "--task",
    required=True,
    help="What it is asked, in Hugging Face's words: tabular-classification, image-classification, ...",
)
@click.option("--labels", default="", help="Names of the classes, separated by commas.")
@_mask
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help="A form, best first; by default int8 for any x86_64, then fp32.",
)
@click.option("--escalates-to", type=FOLDER, help="The bundle of the hub's model.")
@click.option("--parent", type=FOLDER, help="The bundle that it replaces.")
@click.option("--max-batch", default=64, show_default=True, help="Rows in one run; 0: no batch.")
@_dynamic
@click.option("--alpha", default=0.01, show_default=True, help="Largest risk of disagreement.")
@click.option("--out", required=True, type=FOLDER, help="A folder; the bundle goes below it.")
@_cache
@_again
def bundle(
    model: Path,
    name: str,
    version: str,
    training: Path,
    evaluation: Path,
    calibration: Path | None,
    task: str,
    labels: str,
    mask: str,
    variants: tuple[str, ...],
    escalates_to: Path | None,
    parent: Path | None,
    max_batch: int,
    dynamic: str,
    alpha: float,
    out: Path,
    cache: Path | None,
    again: tuple[str, ...],
) -> None:
    """Make a bundle of the ONNX file MODEL without a recipe: quantize, evaluate, certify, report."""
    with _one_sentence():
        splits = {"training": training, "evaluation": evaluation}
        if calibration is not None:
            splits["calibration"] = calibration
        recipe = _without_a_file(
            _source(str(model), (), (), dynamic),
            splits,
            task=task,
            labels=tuple(label.strip() for label in labels.split(",") if label.strip()),
            max_batch=max_batch,
            name=name,
            version=version,
            mask=mask,
            variants=variants,
            escalates_to="" if escalates_to is None else str(escalates_to.resolve()),
            parent="" if parent is None else str(parent.resolve()),
            alpha=alpha,
        )
        _build(recipe, out, cache, again)


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

    The items must be none that the model was trained on or its score was fitted to, or the bound
    does not hold. Needs numpy and onnxruntime only, so it runs on a machine of the devices'
    hardware class.
    """
    with _one_sentence():
        import datetime

        from fogline_models import certify as step
        from fogline_models import data as datasets
        from fogline_models import provenance

        edge, peer = _read(bundle), _read(hub)
        terms = step.Terms(alpha, delta, datetime.timedelta(days=valid_days))
        calibration = datasets.read(data)
        for side in (edge, peer):
            if caution := provenance.check_unseen(side, calibration, str(data)):
                click.echo(f"Warning: {caution}", err=True)
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
            click.echo(f"{certificate.model} {certificate.version} {step.sentence(certificate)}")
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


@main.command()
@_cache
def doctor(cache: Path | None) -> None:
    """Say what this environment can export, quantize and measure."""
    from fogline_models import doctor as step
    from fogline_models import steps

    findings = []
    for finding in step.examine(cache or steps.default_cache()):
        findings.append(finding)
        click.echo(str(finding))
    if any(finding.level is step.Level.WRONG for finding in findings):
        raise SystemExit(1)


def _print(told: Mapping[str, object], as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for line in lines:  # a bundle's words must not steer the terminal
            click.echo("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line))


def _read(folder: Path) -> "BundleDirectory":
    from fogline_models import bundle

    return bundle.read(folder)


def _build(recipe: "Recipe", out: Path | None, cache: Path | None, again: tuple[str, ...]) -> None:
    torch = ("torch", "onnxscript") if any(each.source.torch for each in recipe.release) else ()
    require(*torch, "onnx", "onnxruntime", "jinja2", extra="models")
    from fogline_models import build as builder

    for built in builder.build(recipe, out or recipe.folder, _steps(cache, again), _speaking()):
        click.echo(str(built.directory.path))


def _steps(cache: Path | None, again: tuple[str, ...]) -> "Steps":
    from fogline_models import steps

    return steps.Steps(cache or steps.default_cache(), _speaking(), again=frozenset(again))


def _source(
    text: str, outputs: tuple[str, ...], arguments: tuple[str, ...], dynamic: str
) -> "Source":
    from fogline_models.recipe import Source

    vary = _toml(f"dynamic = {dynamic or '{}'}", f"--dynamic {dynamic}", '{x = {1 = ["n", 1, 9]}}')
    if ".py:" in text:
        given = _toml(
            "\n".join(arguments),
            f"--argument {' --argument '.join(arguments)}",
            "width=12, and texts stand in quotes of their own: 'name=\"wide\"'",
        )
        return Source(torch=text, arguments=given, outputs=outputs, **vary)
    if text.endswith(".py"):
        raise BadInput(f"{text}: which function returns the torch module? Say {text}:FUNCTION")
    path = Path(text).resolve()
    if path.is_dir():
        return Source(huggingface=str(path), **vary)
    return Source(onnx=path, **vary)


def _toml(text: str, option: str, example: str) -> dict[str, Any]:
    """Return what options say in TOML."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{option}: {error}; values are TOML's, such as {example}") from None


def _without_a_file(
    source: "Source",
    splits: Mapping[str, Path],
    *,
    task: str,
    max_batch: int,
    name: str = "model",
    version: str = "0.0.0",
    alpha: float = 0.01,
    labels: tuple[str, ...] = (),
    **release: Any,
) -> "Recipe":
    """Return what a recipe file would say."""
    from fogline_models import recipe as recipes

    folder = Path()
    if source.torch:  # the function's own folder is the recipe's
        file, _, function = source.torch.rpartition(":")
        folder = Path(file).resolve().parent
        source = dataclasses.replace(source, torch=f"{Path(file).name}:{function}")
    document = {
        "family": name,
        "task": task,
        "labels": labels,
        "data": recipes.Data(files={key: path.resolve() for key, path in splits.items()}),
        "certificate": recipes.Certificate(alpha=alpha),
        "release": [
            {
                "model": name,
                "version": version,
                "source": dataclasses.asdict(source),
                "max_batch": max_batch,
                **release,
            }
        ],
        "folder": folder,
    }
    return recipes.checked(document, "the options")


def _copy(step: Path, out: Path) -> None:
    """Copy what a step made, every file whole or not at all."""
    import shutil

    from fogline_models.steps import RECORD

    for path in sorted(step.rglob("*")):
        target = out / path.relative_to(step)
        if not path.is_file() or path == step / RECORD:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.unfinished")
        try:
            shutil.copyfile(path, unfinished)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def _speaking() -> "Say":
    """Return what tells progress on the stderr of now.

    Not on what is in its place when a line comes: while torch and optimum are at work theirs is
    thrown away.
    """
    stream = sys.stderr
    return lambda line: click.echo(line, file=stream)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn what the caller can mend into one sentence and exit code 1; the rest is our bug."""
    try:
        yield
    except (BadInput, MissingExtra) as error:
        said = str(error)
        if error.__cause__ is not None:  # raised in a recipe's own Python
            if click.get_current_context().find_root().params["traceback"]:
                import traceback

                click.echo("".join(traceback.format_exception(error.__cause__)), err=True, nl=False)
            else:
                said += "; fogline-models --traceback shows all of it"
        raise click.ClickException(said) from None
    except OSError as error:  # the disk is full, or a folder is not ours to write
        where = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(f"{where}{error.strerror or error}") from None
