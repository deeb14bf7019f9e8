"""The story: what a hub and three agents do with real digits, counted from their answers.

    1  steady traffic: edge only, hub only and hybrid on the same inputs
    2  the hub is killed under load and comes back

Ends with a summary and exits with 1 if a promise was not kept.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.demo import traffic
from deploy.demo.fleet import DemoFailed, Fleet
from deploy.demo.traffic import Answer, Application
from fogline_models import certify
from fogline_models.session import hardware_class
from fogline_protocol import release
from fogline_protocol.certificate import Certificate
from fogline_protocol.tensors import Array

FAMILY = Path(__file__).resolve().parents[2] / "models" / "digits"
EDGE_BUNDLE = FAMILY / "bundles" / "digits-1.0.0"
HUB_BUNDLE = FAMILY / "bundles" / "digits-hub-1.0.0"

VARIANT = "int8-qdq"
ALPHA = 0.05  # what 350 independent digits can carry; see models/digits/README.md

CALLERS = 2  # per agent, in act 1
OUTAGE_RATE = 60.0  # requests per second over all agents, in act 2

console = Console(highlight=False)


@dataclass(slots=True)
class Traffic:
    """The digits that the applications ask about, with their labels."""

    images: Array
    labels: Array


@dataclass(slots=True)
class Figures:
    """What ``--report`` writes: every number is counted from answers."""

    alpha: float
    requests: int = 0
    errors: int = 0
    accuracy_edge: float = 0.0
    accuracy_hub: float = 0.0
    accuracy_hybrid: float = 0.0
    disagreement: float = 0.0
    share_edge: float = 0.0
    p50_ms_edge: float = 0.0
    p99_ms_edge: float = 0.0
    p50_ms_hub: float = 0.0
    p99_ms_hub: float = 0.0
    bytes_escalated: int = 0
    outage: dict[str, Any] = field(default_factory=dict)
    broken_promises: list[str] = field(default_factory=list)


def main() -> None:
    """Run the demo."""
    options = _options()
    try:
        kept = asyncio.run(_demo(options))
    except KeyboardInterrupt:
        console.print("\nstopped, and every process with it")
        kept = True
    except DemoFailed as error:
        console.print(f"[bold red]the demo cannot go on:[/] {error}")
        kept = False
    sys.exit(0 if kept else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__.split("\n")[0])
    parser.add_argument("--once", action="store_true", help="end after the summary")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--data", type=Path, help="keep data and logs here [default: temporary]")
    return parser.parse_args()


async def _demo(options: argparse.Namespace) -> bool:
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        if options.data is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fogline-demo-")))
        else:
            root = options.data.resolve()
            root.mkdir(parents=True, exist_ok=True)
        digits = _load_traffic()
        edge_bundle, certificate = await asyncio.to_thread(certified_bundle, root)
        hub_file = HUB_BUNDLE / _hub_variant(certificate)

        console.rule("[bold]fogline[/]: answer on the device, ask the hub when unsure")
        with console.status("starting one hub and three agents, each in its own process"):
            fleet = await stack.enter_async_context(
                Fleet(root, hub_file, edge_bundle, _console_address())
            )
            apps = await traffic.applications(fleet.agents, stack)
        address = f"http://{fleet.hub.endpoints['http']}/"
        console.print(f"console: [bold]{address}[/] (open it now, the figures move)")

        figures = Figures(alpha=certificate.alpha)
        await _steady_traffic(fleet, apps, digits, certificate, figures)
        await _outage(fleet, apps, digits, figures)
        _summary(figures, time.monotonic() - started)
        if options.report is not None:
            options.report.write_text(json.dumps(_report(figures), indent=2) + "\n")
            console.print(f"figures written to {options.report}")
        if not options.once:
            await _stay(apps, digits, address)
    return not figures.broken_promises


def _load_traffic() -> Traffic:
    with np.load(FAMILY / "traffic.npz") as file:
        return Traffic(file["main_images"], file["main_labels"])


def certified_bundle(root: Path) -> tuple[Path, Certificate]:
    """Copy the edge bundle and make sure that it is certified for this machine.

    A certificate holds for one hardware class. On another one the agents would rightly
    escalate everything, so the demo measures this machine first, from the committed data.
    """
    target = root / EDGE_BUNDLE.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(EDGE_BUNDLE, target)
    edge = release.read(target)
    here = hardware_class()
    now = datetime.datetime.now(datetime.UTC)
    digest = edge.variant_sha256(edge.bundle.variant(VARIANT))
    for found in edge.certificates:
        if found.objection(variant_sha256=digest, hardware_class=here, now=now) is None:
            return target, found
    console.print(f"no certificate for {here} yet: measuring this machine")
    data = certify.read_calibration(FAMILY / "calibration.npz")
    terms = certify.Terms(alpha=ALPHA)
    made = certify.certify(
        edge, release.read(HUB_BUNDLE), data, terms, issued_at=now, variant=VARIANT
    )
    certify.save(made, certify.folder_of(edge))
    return target, made


def _hub_variant(certificate: Certificate) -> str:
    """Return the file of the hub bundle that the certificate compares with."""
    bundle = release.read(HUB_BUNDLE)
    for variant in bundle.bundle.variants:
        if bundle.variant_sha256(variant) == certificate.hub_sha256:
            return variant.path
    raise DemoFailed(f"{HUB_BUNDLE} does not hold the model that the certificate names")


def _console_address() -> str:
    """Return 127.0.0.1:8080 if it is free, any free port otherwise."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8080))
        except OSError:
            return "127.0.0.1:0"
    return "127.0.0.1:8080"


async def _steady_traffic(
    fleet: Fleet,
    apps: Sequence[Application],
    digits: Traffic,
    certificate: Certificate,
    figures: Figures,
) -> None:
    console.print()
    console.rule("act 1: steady traffic", align="left")
    console.print(
        f"{len(digits.images):,} scanned digits, asked three times: at the edge only, at the hub "
        f"only, and as fogline decides. Certificate: with {1 - certificate.delta:.0%} confidence at most "
        f"{certificate.alpha:.0%} of all requests are answered locally and differently from the hub "
        f"(calibrated on {certificate.scenes} independent digits)."
    )
    answers: dict[str, list[Answer]] = {}
    for mode, words in (
        ("edge_only", "edge only"),
        ("hub_only", "hub only "),
        ("prefer_edge", "hybrid   "),
    ):
        before = await _bytes_escalated(fleet)
        answers[mode] = await _ask_all(apps, digits, mode, words)
        if mode == "prefer_edge":
            figures.bytes_escalated = await _bytes_escalated(fleet) - before

    hybrid = answers["prefer_edge"]
    by_hub = {answer.item: answer.label for answer in answers["hub_only"] if not answer.error}
    figures.requests = sum(len(found) for found in answers.values())
    figures.errors = sum(bool(a.error) for found in answers.values() for a in found)
    figures.accuracy_edge = _accuracy(answers["edge_only"], digits)
    figures.accuracy_hub = _accuracy(answers["hub_only"], digits)
    figures.accuracy_hybrid = _accuracy(hybrid, digits)
    local = [answer for answer in hybrid if answer.tier == "edge"]
    figures.share_edge = len(local) / len(hybrid)
    figures.disagreement = sum(a.label != by_hub.get(a.item) for a in local) / len(hybrid)
    figures.p50_ms_edge, figures.p99_ms_edge = _latency(hybrid, "edge")
    figures.p50_ms_hub, figures.p99_ms_hub = _latency(hybrid, "hub")

    promise = _promises(figures)
    promise(figures.errors == 0, f"{figures.errors} requests failed in act 1")
    promise(
        figures.disagreement <= figures.alpha,
        f"disagreement {figures.disagreement:.2%} exceeds the certified {figures.alpha:.0%}",
    )
    promise(
        figures.accuracy_hybrid > figures.accuracy_edge,
        "the hybrid was not better than the edge alone",
    )
    promise(figures.share_edge >= 0.6, f"only {figures.share_edge:.0%} answered at the edge")


async def _outage(
    fleet: Fleet, apps: Sequence[Application], digits: Traffic, figures: Figures
) -> None:
    console.print()
    console.rule("act 2: the hub is gone", align="left")
    stop = asyncio.Event()
    stream = asyncio.create_task(traffic.endless(apps, digits.images, stop, OUTAGE_RATE))
    try:
        await asyncio.sleep(2)
        console.print(f"kill -9 {fleet.hub.pid}: the hub's process is gone, the traffic goes on")
        await fleet.hub.stop(signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.sleep(4)
        console.print("the hub starts again on the same data and the same ports")
        await fleet.restart_hub()
        returned = time.monotonic()
        await asyncio.sleep(6)
    finally:
        stop.set()
    answers = await stream

    during = [answer for answer in answers if killed <= answer.at < returned]
    resumed = [a.at for a in answers if a.at >= returned and a.tier == "hub"]
    degraded = Counter(answer.reason for answer in during if answer.quality == "degraded")
    figures.outage = {
        "requests": len(answers),
        "errors": sum(bool(answer.error) for answer in answers),
        "degraded": sum(degraded.values()),
        "recovered": bool(resumed),
        "seconds_down": round(returned - killed, 2),
        "seconds_to_recover": round(min(resumed) - returned, 2) if resumed else None,
        "degraded_reasons": dict(degraded),
    }
    slowest = max((answer.seconds for answer in during), default=0.0)
    console.print(
        f"{len(during)} requests while it was away: {figures.outage['errors']} failed, "
        f"{sum(degraded.values())} were due for the hub and say so in their answer "
        f"({', '.join(f'{reason} {n}' for reason, n in degraded.items()) or 'none'}); "
        f"the slowest took {slowest * 1000:.0f} ms."
    )
    if resumed:
        console.print(
            f"escalation resumed by itself {min(resumed) - returned:.1f} s after its return."
        )
    promise = _promises(figures)
    promise(figures.outage["errors"] == 0, f"{figures.outage['errors']} requests failed in act 2")
    promise(bool(resumed), "escalation did not resume after the hub's return")
    promise(bool(degraded), "no answer was marked degraded while the hub was away")


async def _ask_all(
    apps: Sequence[Application], digits: Traffic, mode: str, words: str
) -> list[Answer]:
    answers: list[Answer] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=console
    ) as bar:
        task = bar.add_task(words, total=len(digits.images), note="")
        items = range(len(digits.images))
        async for answer in traffic.stream(apps, digits.images, items, mode, CALLERS):
            answers.append(answer)
            if len(answers) % 50 == 0 or len(answers) == len(digits.images):
                note = f"{_accuracy(answers, digits):.1%} right"
                bar.update(task, completed=len(answers), note=note)
    return answers


def _accuracy(answers: Sequence[Answer], digits: Traffic) -> float:
    right = sum(bool(a.label == digits.labels[a.item]) for a in answers)
    return right / max(len(answers), 1)


def _latency(answers: Sequence[Answer], tier: str) -> tuple[float, float]:
    seconds = [answer.seconds for answer in answers if answer.tier == tier]
    if not seconds:
        return 0.0, 0.0
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return round(float(p50), 3), round(float(p99), 3)


async def _bytes_escalated(fleet: Fleet) -> int:
    """Return the agents' own count of bytes sent to the hub, once it has settled there."""
    url = f"http://{fleet.hub.endpoints['http']}/api/v1/overview"
    async with aiohttp.ClientSession() as session:
        last = -1
        for _ in range(20):
            async with session.get(url) as answer:
                now = int((await answer.json())["escalation_bytes_sent_total"])
            if now == last:
                break
            last = now
            await asyncio.sleep(1.2)  # agents report once a second
    return last


def _promises(figures: Figures) -> Any:
    def promise(kept: bool, otherwise: str) -> None:
        if not kept:
            figures.broken_promises.append(otherwise)

    return promise


def _report(figures: Figures) -> dict[str, Any]:
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name in Figures.__slots__
        for value in [getattr(figures, name)]
    }


def _summary(figures: Figures, seconds: float) -> None:
    console.print()
    table = Table(title="what happened, counted from the answers", title_justify="left")
    for heading in ("", "edge only", "hub only", "hybrid"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    right = (figures.accuracy_edge, figures.accuracy_hub, figures.accuracy_hybrid)
    table.add_row("right answers", *(f"{share:.1%}" for share in right), style="bold")
    table.add_row("answered at the edge", "100%", "0%", f"{figures.share_edge:.0%}")
    table.add_row("here and other than the hub", "", "", f"{figures.disagreement:.1%}")
    table.add_row("  certified: at most", "", "", f"{figures.alpha:.0%}")
    edge = f"{figures.p50_ms_edge:.1f} / {figures.p99_ms_edge:.1f} ms"
    hub = f"{figures.p50_ms_hub:.1f} / {figures.p99_ms_hub:.1f} ms"
    table.add_row("hybrid, p50 / p99 at the edge", "", "", edge)
    table.add_row("hybrid, p50 / p99 via the hub", "", "", hub)
    table.add_row("hybrid, sent to the hub", "", "", f"{figures.bytes_escalated / 1000:.1f} kB")
    table.add_row("failed, all of act 1", "", "", str(figures.errors))
    table.add_row("failed, while the hub was away", "", "", str(figures.outage["errors"]))
    table.add_row("  answered and marked degraded", "", "", str(figures.outage["degraded"]))
    console.print(table)
    console.print(f"{figures.requests + figures.outage['requests']:,} requests in {seconds:.0f} s")
    for broken in figures.broken_promises:
        console.print(f"[bold red]promise broken:[/] {broken}")


async def _stay(apps: Sequence[Application], digits: Traffic, address: str) -> None:
    """Keep gentle traffic flowing until Ctrl-C, so that the console lives."""
    console.print(f"\neverything stays up: [bold]{address}[/]   Ctrl-C ends it")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    while not stop.is_set():
        pause = asyncio.Event()
        timer = loop.call_later(10, pause.set)
        waiter = asyncio.create_task(stop.wait())
        waiter.add_done_callback(lambda _task, pause=pause: pause.set())  # type: ignore[misc]
        await traffic.endless(apps, digits.images, pause, 12.0)
        timer.cancel()
        waiter.cancel()
    console.print("stopping every process")


if __name__ == "__main__":
    main()
