"""The command ``fogline data``: what devices let the hub keep, over the hub's REST."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cloud_hub.command import CONFIG, DATA, HUB, JSON, run, url_of


@click.group()
def data() -> None:
    """Hard examples that devices let the hub keep: list, export to train on, delete."""


_SELECT = [
    click.option("--device", help="Of this device only."),
    click.option("--source", help="Of this source only, as the application named it."),
    click.option("--since", metavar="TIME", help="That came since 2026-11-01 (UTC), or 7d ago."),
    click.option("--until", metavar="TIME", help="That came before."),
    click.option(
        "--tenant", help="Whose, on a hub that asks for no tokens; '*': all [default: default]."
    ),
]


def _selecting(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_SELECT):
        command = option(command)
    return command


def _selected(options: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the options of a selection as the API's parameters."""
    from cloud_hub import operate

    found = []
    for name in ("device", "source", "since", "until", "tenant"):
        value = options[name]
        if value is not None:
            if name in ("since", "until"):
                try:
                    value = repr(operate.moment(value, time.time()))
                except ValueError as error:
                    raise click.UsageError(f"--{name}: {error}") from None
            found.append((name, value))
    return found


@data.command("list")
@CONFIG
@DATA
@HUB
@JSON
def data_list(config_file: Path | None, data: Path | None, hub: str | None, as_json: bool) -> None:
    """List what is kept, by device model."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(url_of(config_file, data, hub), "GET", "/api/v1/examples")
        operate.echo(found, as_json, operate.example_lines(found))

    run(work)


@data.command("export")
@CONFIG
@DATA
@HUB
@JSON
@_selecting
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=3x224x224",
    help="Only inputs of this shape, where they come in several.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["npz", "parquet"]),
    default="npz",
    show_default=True,
    help="parquet needs pyarrow.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.argument("model")
def data_export(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    shapes: tuple[str, ...],
    kind: str,
    out: Path,
    model: str,
    **selection: Any,
) -> None:
    """Write the kept examples of the device model MODEL as a data set.

    It holds the inputs, both tiers' answers, why the hub was asked and how probable that was; the
    same content is in it once. An older file of that name is replaced when the new one is whole.
    """
    from cloud_hub import operate
    from cloud_hub.insight.dataset import FORMATS

    params = [*_selected(selection), *(("shape", shape) for shape in shapes)]

    async def work() -> None:
        dataset = FORMATS[kind](out)
        url = url_of(config_file, data, hub)
        count, left_out = await operate.export(url, model, params, dataset)
        line = f"{count:,} examples of {model} are in {out}"
        if left_out:
            line += f"; {left_out:,} were left out, gone or damaged on the hub's disk"
        found = {"examples": count, "left_out": left_out, "out": str(out)}
        operate.echo(found, as_json, iter([line]))

    run(work)


@data.command("delete")
@CONFIG
@DATA
@HUB
@JSON
@_selecting
@click.option("--all", "everything", is_flag=True, help="Everything, of every model.")
@click.argument("model", required=False)
def data_delete(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    everything: bool,
    model: str | None,
    **selection: Any,
) -> None:
    """Forget examples, for good: of MODEL, a --device, a --source or a time.

    What another device sent too, and is not selected, stays as that device's.
    """
    from cloud_hub import operate

    params = _selected(selection)
    named = [name for name, _ in params if name != "tenant"]
    if everything == bool(model or named):
        raise click.UsageError("name MODEL, --device, --source, --since or --until; or say --all")
    params += [("model", model)] if model else []
    params += [("all", "1")] if everything else []

    async def work() -> None:
        url = url_of(config_file, data, hub)
        found = await operate.call(url, "DELETE", "/api/v1/examples", params=params)
        line = f"{found['examples']:,} examples are deleted, and {found['sightings']:,} times they came"
        operate.echo(found, as_json, iter([line]))

    run(work)
