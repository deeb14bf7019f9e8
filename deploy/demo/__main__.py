"""The story: what a hub and three agents do with real digits, counted from their answers.

    1  steady traffic: edge only, hub only and hybrid on the same inputs
    2  the hub is killed under load and comes back
    3  a better edge release is pushed, and devices switch to it under load
    4  a broken release is forced past the hub, and every device refuses it
    5  broker and device are killed in the middle of an update, and all devices arrive

Ends with a summary and exits with 1 if a promise was not kept.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cloud_hub.operate import OperationRefused
from deploy.demo import traffic
from deploy.demo.fleet import DemoFailed, Fleet, Process
from deploy.demo.operator import Operator
from deploy.demo.traffic import Answer, Application
from fogline_models import certify, data
from fogline_models.session import hardware_class
from fogline_protocol import release
from fogline_protocol.certificate import Certificate
from fogline_protocol.tensors import Array

FAMILY = Path(__file__).resolve().parents[2] / "models" / "digits"
EDGE_BUNDLE = FAMILY / "bundles" / "digits-1.0.0"
BETTER_BUNDLE = FAMILY / "bundles" / "digits-1.1.0"
BROKEN_BUNDLE = FAMILY / "bundles" / "broken" / "digits-1.2.0"
HUB_BUNDLE = FAMILY / "bundles" / "digits-hub-1.0.0"

VARIANT = "int8-qdq"
ALPHA = 0.05  # what 350 independent digits can carry; see models/digits/README.md

CALLERS = 2  # per agent, in act 1
RATE = 60.0  # requests per second over all agents, in acts 2 to 5

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
    update: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, Any] = field(default_factory=dict)
    convergence: dict[str, Any] = field(default_factory=dict)
    broken_promises: list[str] = field(default_factory=list)


def main() -> None:
    """Run the demo."""
    options = _options()
    # A signal of the process manager ends the story as Ctrl-C does: with every process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    options = parser.parse_args()
    if options.report is not None and not options.report.absolute().parent.is_dir():
        parser.error(f"--report: there is no folder {options.report.parent}")
    return options


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
        better_bundle, _ = await asyncio.to_thread(certified_bundle, root, BETTER_BUNDLE)
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
        await _better_release(fleet, apps, digits, better_bundle, figures)
        await _broken_release(fleet, apps, digits, figures)
        await _convergence(fleet, apps, digits, edge_bundle, figures)
        _summary(figures, time.monotonic() - started)
        if options.report is not None:
            options.report.write_text(json.dumps(_report(figures), indent=2) + "\n")
            console.print(f"figures written to {options.report}")
        if not options.once:
            await _stay(apps, digits, address)
    return not figures.broken_promises


def _load_traffic() -> Traffic:
    items = data.read(FAMILY / "traffic.npz")
    assert items.labels is not None
    return Traffic(items.inputs["image"], items.labels)


def certified_bundle(root: Path, source: Path = EDGE_BUNDLE) -> tuple[Path, Certificate]:
    """Copy an edge bundle and make sure that it is certified for this machine.

    A certificate holds for one hardware class. On another one the agents would rightly
    escalate everything, so the demo measures this machine first, from the committed data.
    """
    target = root / source.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    edge = release.read(target)
    here = hardware_class()
    now = datetime.datetime.now(datetime.UTC)
    digest = edge.variant_sha256(edge.bundle.variant(VARIANT))
    for found in edge.certificates:
        if found.objection(variant_sha256=digest, hardware_class=here, now=now) is None:
            return target, found
    console.print(f"{source.name} has no certificate for {here} yet: measuring this machine")
    items = data.read(FAMILY / "calibration.npz")
    terms = certify.Terms(alpha=ALPHA)
    made = certify.certify(
        edge, release.read(HUB_BUNDLE), items, terms, issued_at=now, variant=VARIANT
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
    async with traffic.Stream(apps, digits.images, RATE) as stream:
        await asyncio.sleep(2)
        console.print(f"kill -9 {fleet.hub.pid}: the hub's process is gone, the traffic goes on")
        await fleet.hub.stop(signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.sleep(4)
        console.print("the hub starts again on the same data and the same ports")
        await fleet.restart_hub()
        returned = time.monotonic()

        def resumed() -> float | None:
            by_hub = (a.at for a in stream.answers if a.at >= returned and a.tier == "hub")
            return min(by_hub, default=None)

        await _until(lambda: resumed() is not None, 20)
    recovered = resumed()
    during = [answer for answer in stream.answers if killed <= answer.at < returned]
    degraded = Counter(answer.reason for answer in during if answer.quality == "degraded")
    figures.outage = {
        "requests": len(stream.answers),
        "errors": stream.failed,
        "degraded": sum(degraded.values()),
        "recovered": recovered is not None,
        "seconds_down": round(returned - killed, 2),
        "seconds_to_recover": None if recovered is None else round(recovered - returned, 2),
        "degraded_reasons": dict(degraded),
    }
    slowest = max((answer.seconds for answer in during), default=0.0)
    console.print(
        f"{len(during)} requests while it was away: {stream.failed} failed, "
        f"{sum(degraded.values())} were due for the hub and say so in their answer "
        f"({', '.join(f'{reason} {n}' for reason, n in degraded.items()) or 'none'}); "
        f"the slowest took {slowest * 1000:.0f} ms."
    )
    if recovered is not None:
        console.print(
            f"escalation resumed by itself {recovered - returned:.1f} s after its return."
        )
    promise = _promises(figures)
    promise(stream.failed == 0, f"{stream.failed} requests failed in act 2")
    promise(recovered is not None, "escalation did not resume after the hub's return")
    promise(bool(degraded), "no answer was marked degraded while the hub was away")


async def _better_release(
    fleet: Fleet, apps: Sequence[Application], digits: Traffic, bundle: Path, figures: Figures
) -> None:
    console.print()
    console.rule("act 3: a better release", align="left")
    operator = Operator(fleet)
    await operator.push(HUB_BUNDLE)
    release = await operator.push(bundle)
    console.print(
        f"fogline release push {bundle.name}: accepted as {release}, numbered, signed. "
        f"fogline device set --all --release {release}"
    )
    async with traffic.Stream(apps, digits.images, RATE) as stream:
        await asyncio.sleep(1)
        wanted = time.monotonic()
        await operator.want(release)
        on_it = await operator.until_committed(release)
        seconds = time.monotonic() - wanted
        await asyncio.sleep(1)
    after = await _ask_all(apps, digits, "edge_only", "edge only")
    served = {answer.release for answer in after}
    figures.update = {
        "devices": len(fleet.agents),
        "on_new_release": on_it,
        "seconds": round(seconds, 2),
        "failed_requests": stream.failed + sum(bool(answer.error) for answer in after),
        "accuracy_edge_before": figures.accuracy_edge,
        "accuracy_edge_after": _accuracy(after, digits),
    }
    console.print(
        f"{on_it} of {len(fleet.agents)} devices fetched, tested and switched in {seconds:.1f} s "
        f"while {len(stream.answers)} requests were answered: {stream.failed} failed. "
        f"Right at the edge alone: {figures.accuracy_edge:.1%} before, "
        f"[bold]{figures.update['accuracy_edge_after']:.1%}[/] now."
    )
    promise = _promises(figures)
    promise(on_it == len(fleet.agents), f"only {on_it} devices took the better release")
    promise(figures.update["failed_requests"] == 0, "requests failed during the update")
    promise(len(served) == 1, f"devices answer with different releases: {sorted(served)}")
    promise(
        figures.update["accuracy_edge_after"] > figures.accuracy_edge,
        "the better release is not better",
    )


async def _broken_release(
    fleet: Fleet, apps: Sequence[Application], digits: Traffic, figures: Figures
) -> None:
    console.print()
    console.rule("act 4: a broken release", align="left")
    operator = Operator(fleet)
    try:
        await operator.push(BROKEN_BUNDLE)
    except OperationRefused as error:
        console.print(f"fogline release push {BROKEN_BUNDLE.name}: {escape(str(error))}")
        by_hub = True
    else:
        by_hub = False
    async with traffic.Stream(apps, digits.images, RATE) as stream:
        release = await operator.push(BROKEN_BUNDLE, force=True)
        console.print(f"forced past the hub it becomes {release}, and is wanted on all devices")
        await operator.want(release)
        refusals = await operator.until_refused(release)
        await asyncio.sleep(1)
    wrong = sum(answer.release.endswith("1.2.0") for answer in stream.answers)
    figures.broken = {
        "devices": len(fleet.agents),
        "refused": len(refusals),
        "reasons": sorted(set(refusals.values())),
        "refused_by_hub": by_hub,
        "requests": len(stream.answers),
        "failed_requests": stream.failed,
    }
    console.print(
        f"{len(refusals)} of {len(fleet.agents)} devices refused it "
        f"({', '.join(figures.broken['reasons'])}) and serve what they served: "
        f"{len(stream.answers)} requests, {stream.failed} failed, {wrong} answered by it."
    )
    promise = _promises(figures)
    promise(by_hub, "the hub accepted a broken release without force")
    promise(len(refusals) == len(fleet.agents), f"only {len(refusals)} devices refused it")
    promise(stream.failed == 0 and wrong == 0, "requests failed or met the broken release")


async def _convergence(
    fleet: Fleet, apps: Sequence[Application], digits: Traffic, bundle: Path, figures: Figures
) -> None:
    console.print()
    console.rule("act 5: everything breaks, all devices arrive", align="left")
    operator = Operator(fleet)
    release = await operator.push(bundle)
    victim = fleet.agents[1]
    # The victim's own application waits while its device is dead; the others go on.
    others = [app for app, agent in zip(apps, fleet.agents, strict=True) if agent is not victim]
    async with traffic.Stream(others, digits.images, RATE) as stream:
        os.kill(fleet.broker_pid(), signal.SIGKILL)
        console.print(f"the broker is killed, its memory is gone; then {release} is wanted")
        wanted = time.monotonic()
        await operator.want(release)
        halfway = await _kill_while_downloading(victim)
        console.print(
            f"kill -9 of the device {victim.name} "
            + ("in the middle of its download" if halfway else "just after its download")
            + ", and its return"
        )
        await victim.start()
        converged = await operator.until_committed(release)
        seconds = time.monotonic() - wanted
    figures.convergence = {
        "devices": len(fleet.agents),
        "converged": converged,
        "seconds": round(seconds, 2),
        "killed_while_downloading": halfway,
        "requests": len(stream.answers),
        "failed_requests": stream.failed,
    }
    console.print(
        f"{converged} of {len(fleet.agents)} devices run {release} after {seconds:.1f} s; "
        f"{len(stream.answers)} requests meanwhile, {stream.failed} failed."
    )
    promise = _promises(figures)
    promise(converged == len(fleet.agents), f"only {converged} devices converged")
    promise(stream.failed == 0, f"{stream.failed} requests failed in act 5")


async def _kill_while_downloading(agent: Process) -> bool:
    """Kill the agent once its download has begun; return whether it was still under way."""
    models = agent.data / "releases" / "models"

    def fetching() -> bool:
        return any(models.glob("*/*.part"))

    limit = time.monotonic() + 30
    while not fetching() and time.monotonic() < limit:
        await asyncio.sleep(0.001)
    await agent.stop(signal.SIGKILL)
    return await asyncio.to_thread(fetching)


async def _until(condition: Callable[[], bool], limit_s: float) -> None:
    """Wait for a condition, or until its time is over; the caller looks again."""
    limit = time.monotonic() + limit_s
    while not condition() and time.monotonic() < limit:
        await asyncio.sleep(0.05)


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
    for words, act, key in (
        ("better release: devices on it", figures.update, "on_new_release"),
        ("broken release: devices refusing", figures.broken, "refused"),
        ("broker and device killed: arrived", figures.convergence, "converged"),
    ):
        table.add_row(words, "", "", f"{act[key]} of {act['devices']}")
    failed = sum(
        a["failed_requests"] for a in (figures.update, figures.broken, figures.convergence)
    )
    table.add_row("failed, acts 3 to 5", "", "", str(failed))
    console.print(table)
    console.print(f"the whole story took {seconds:.0f} s")
    for broken in figures.broken_promises:
        console.print(f"[bold red]promise broken:[/] {broken}")


async def _stay(apps: Sequence[Application], digits: Traffic, address: str) -> None:
    """Keep gentle traffic flowing until Ctrl-C, so that the console lives."""
    console.print(f"\neverything stays up: [bold]{address}[/]   Ctrl-C ends it")
    async with traffic.Stream(apps, digits.images, 12.0) as stream:
        while True:
            await asyncio.sleep(60)
            stream.answers.clear()


if __name__ == "__main__":
    main()
