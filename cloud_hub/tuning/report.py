"""What the operator sees of tuning: progress beside the result, then the curve and the choice."""

import json
import time
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from cloud_hub.inference import directory
from cloud_hub.tuning.choice import Measurement, Setting
from cloud_hub.tuning.settings import Target, Written
from cloud_hub.tuning.tune import Tuned
from fogline_protocol import model_config

WIDTH = 160  # of a table that nobody's terminal limits


class Progress:
    """Tells on standard error how far it is: a bar on a terminal, else a line per measurement."""

    def __init__(self, seconds: float) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        # Not refreshed by a thread of its own: it would be measured along.
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed:.0f} of at most {task.total:.0f} s"),
            console=console, auto_refresh=False, transient=True, disable=not self._terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("loading", total=seconds)
        self._began = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def trying(self, setting: Setting, left: int) -> None:
        """A setting is measured next; so many are left with it."""
        self._bar.update(
            self._task,
            description=f"{_words(setting)}, at most {left} settings left",
            completed=time.monotonic() - self._began,
            refresh=True,
        )

    def measured(self, found: Measurement) -> None:
        """It was."""
        if not self._terminal:
            at_s = time.monotonic() - self._began
            result = found.trouble or (
                f"{found.samples_per_s:,.0f} samples/s, p99 {found.p99_s * 1e3:.2f} ms"
            )
            click.echo(f"{at_s:5.1f} s  {_words(found.setting)}: {result}", err=True)


def show(
    found: Tuned, target: Target, written: Written | None, *, as_json: bool, dry_run: bool
) -> None:
    """Print everything: as one document, or as a table with sentences."""
    if as_json:
        click.echo(json.dumps(document(found, target, written), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table(found))
    if found.untried:
        click.echo(f"no time was left for {found.untried} settings: raise --seconds")
    chosen, now = found.chosen, found.now
    if chosen is None:
        return
    click.echo(f"chosen: {_words(chosen.setting)}{_gain(chosen, now)}")
    if written is not None:
        kept = (
            ""
            if written.backup is None
            else f"; what it said before, comments too: {written.backup}"
        )
        click.echo(f"written: {written.config}{kept}")
        click.echo("a hub with --model-control poll follows by itself, another when it starts")
        return
    reason = "nothing was written" if dry_run else "a file alone has no settings"
    click.echo(f"{reason}: in a model directory its {directory.CONFIG} would say\n")
    click.echo(model_config.tuned("", found.tuning()).rstrip())


def document(found: Tuned, target: Target, written: Written | None) -> dict[str, Any]:
    """Return everything, JSON-ready."""
    chosen, now = found.chosen, found.now
    return {
        "model": target.name,
        "file": str(target.file),
        "provider": found.provider,
        "latency_limit_ms": found.wish.limit_s * 1e3,
        "took_s": round(found.took_s, 3),
        "measurements": [_figures(one) for one in found.measurements],
        "untried": found.untried,
        "now": None if now is None else _figures(now),
        "chosen": None if chosen is None else _figures(chosen),
        "settings": None if chosen is None else model_config.tuned("", found.tuning()),
        "written": None if written is None else str(written.config),
        "backup": None if written is None or written.backup is None else str(written.backup),
    }


def table(found: Tuned) -> Table:
    """Return the curve, in the order of its settings, with the choice and the present marked."""
    shown = Table(
        title=f"{found.provider}, {found.took_s:.0f} s of at most {found.wish.seconds:g} s; "
        f"p99 of a batch may be {found.wish.limit_s * 1e3:g} ms",
        caption="p50 and p99: of a batch, its wait behind another one included; memory: resident, "
        "with this process",
    )
    for name in ("instances", "threads", "batch"):
        shown.add_column(name, justify="right")
    for name in ("samples/s", "p50 ms", "p99 ms", "CPU-ms/sample", "MiB", "batches"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    chosen = found.chosen
    in_order = sorted(found.measurements, key=lambda one: (one.setting.engines, one.setting.batch))
    for one in in_order:
        setting = one.setting
        marks = [
            *(["chosen"] if chosen is one else []),
            *(["now"] if setting == found.space.now else []),
            *(["too slow"] if one.p99_s > found.wish.limit_s else []),
            *([one.trouble] if one.trouble else []),
        ]
        figures = (
            ["-"] * 6
            if one.trouble
            else [
                f"{one.samples_per_s:,.0f}", f"{one.p50_s * 1e3:.2f}", f"{one.p99_s * 1e3:.2f}",
                f"{one.cpu_s_per_sample * 1e3:.4f}", f"{one.memory_bytes / (1 << 20):.0f}",
                str(one.runs),
            ]
        )  # fmt: skip
        shown.add_row(
            str(setting.engines.instances), str(setting.engines.threads or "-"),
            str(setting.batch), *figures, ", ".join(marks),
            style="bold" if chosen is one else None,
        )  # fmt: skip
    return shown


def _figures(one: Measurement) -> dict[str, Any]:
    return {
        "instances": one.setting.engines.instances,
        "threads": one.setting.engines.threads,
        "batch": one.setting.batch,
        "batches_run": one.runs,
        "samples_per_s": one.samples_per_s,
        "p50_ms": one.p50_s * 1e3,
        "p99_ms": one.p99_s * 1e3,
        "cpu_ms_per_sample": one.cpu_s_per_sample * 1e3,
        "memory_bytes": one.memory_bytes,
        "trouble": one.trouble,
    }


def _words(setting: Setting) -> str:
    engines = setting.engines
    threads = f" of {_count(engines.threads, 'thread')}" if engines.threads else ""
    return f"{_count(engines.instances, 'instance')}{threads}, batch {setting.batch}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _gain(chosen: Measurement, now: Measurement | None) -> str:
    if now is None or now.trouble or now is chosen:
        return ": as it is served now" if now is chosen else ""
    rate = chosen.samples_per_s / now.samples_per_s
    cpu = chosen.cpu_s_per_sample / now.cpu_s_per_sample
    return f": {rate:.2f} times the samples/s of now, {cpu:.2f} times its CPU per sample"
