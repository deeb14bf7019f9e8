"""The hub against the raw ONNX Runtime session and against PyTriton, side by side.

    ./run bench serving [--row ROW] [--json FILE]

    mid      mid_u8 at concurrency 16, against the raw session at the batch the hub came to
    busy     tiny at concurrency 64, against PyTriton
    single   tiny, one request at a time, against PyTriton
    rows     tiny, 32 samples in one request against one
    idle     memory at rest and cold start, against PyTriton
    fronts   tiny at concurrency 64, two front processes against none
    switch   tiny under steady load, while its model is loaded anew again and again

Machine and load generator are shared with everything else, so absolute figures mean little.
Every row is a ratio: both sides take turns, each turn is one round, and the row is the median
of the rounds' ratios.
"""

import concurrent.futures
import contextlib
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import tritonclient.grpc

from tests.benchmarks import h2load, servers
from tests.benchmarks.h2load import Load
from tests.benchmarks.servers import Model, Server

ROUNDS = 9
SECONDS = 1.0  # of one side in one round: short, so that both see the same neighbors
SETTLE_S = 2.0  # after the first answer, before a server counts as idle
GRPCIO = ("--door", "grpcio")
STEADY_PER_S = 200.0  # well below what one core can do, as a server has it that is not overloaded
STEADY_S = 3.0  # enough answers for a 99th percentile
SWITCH_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One ratio and the bar it is held to."""

    what: str
    ratio: float | None  # None: not offered
    bar: float
    least: bool  # whether the bar is the least that will do, or the most
    figures: str  # the absolute ones behind it, for the curious
    rounds: tuple[float, ...] = ()
    clean: bool = True  # False: something happened that no ratio excuses

    @property
    def passed(self) -> bool:
        """Whether the bar is reached."""
        if self.ratio is None or not self.clean:
            return False
        return self.ratio >= self.bar if self.least else self.ratio <= self.bar

    @property
    def verdict(self) -> str:
        """Return what the table says."""
        return "not offered" if self.ratio is None else "pass" if self.passed else "miss"


def at_least(bar: float, what: str, rounds: list[float], figures: str) -> Figure:
    """Return the median of ratios that should be large."""
    return Figure(what, statistics.median(rounds), bar, True, figures, tuple(rounds))


def at_most(
    bar: float, what: str, rounds: list[float], figures: str, *, clean: bool = True
) -> Figure:
    """Return the median of ratios that should be small."""
    return Figure(what, statistics.median(rounds), bar, False, figures, tuple(rounds), clean)


def main(rows: list[str] | None = None, report: Path | None = None) -> None:
    """Measure and print the named rows, or all; write them to ``report`` as JSON."""
    h2load.require()
    servers.put_first(os.getpid())  # the raw session and the load generator; servers are too
    print(f"serving: {ROUNDS} rounds of {SECONDS:g} s a side, {os.cpu_count()} cores, "
          f"{platform.machine()}, ONNX Runtime {onnxruntime.__version__}, one thread per run\n\n"
          "| what | bar | measured | | behind it | command |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    document = []
    for row in rows or list(ROWS):
        command = f"./run bench serving --row {row}"
        for figure in ROWS[row]():
            sign = "≥" if figure.least else "≤"
            measured = "" if figure.ratio is None else f"{figure.ratio:.3g}"
            print(f"| {figure.what} | {sign} {figure.bar:g} | {measured} | {figure.verdict} | "
                  f"{figure.figures} | `{command}` |", flush=True)  # fmt: skip
            document.append(
                {**asdict(figure), "row": row, "verdict": figure.verdict, "command": command}
            )
    if report is not None:
        report.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def mid() -> list[Figure]:
    """Compare the hub with the session it runs."""
    model = servers.mid_u8()
    raw = servers.session(model.file)
    rates, costs, at, through = [], [], [], []
    with servers.hub(model) as hub:
        hub.wait_for(model)
        per_s = h2load.estimate(hub, model, connections=4, streams=4)
        for _ in range(ROUNDS):
            runs, rows = _runs_and_rows(hub, model)
            load = _busy(hub, model, per_s, connections=4, streams=4)
            more_runs, more_rows = _runs_and_rows(hub, model)
            batch = round((more_rows - rows) / (more_runs - runs))
            raw_per_s, raw_cpu_s = _raw(raw, model, batch)
            rates.append(load.per_second / raw_per_s)
            costs.append(load.cpu_s / raw_cpu_s)
            at.append(batch)
            through.append((load.per_second, raw_per_s, load.cpu_s, raw_cpu_s))
        hub.check(model)
    hub_per_s, raw_per_s, hub_cpu_s, raw_cpu_s = (
        statistics.median(each) for each in zip(*through, strict=True)
    )
    return [
        at_least(0.95, "mid_u8, concurrency 16: hub / raw session, samples/s", rates,
                 f"{hub_per_s:.0f} / {raw_per_s:.0f} per s, batch {statistics.median(at):g}"),
        at_most(1.10, "mid_u8, concurrency 16: hub / raw session, CPU", costs,
                f"{hub_cpu_s * 1e3:.1f} / {raw_cpu_s * 1e3:.1f} ms"),
    ]  # fmt: skip


def busy() -> list[Figure]:
    """Compare both servers as far as they can go."""
    ours, theirs = _against_pytriton(connections=8, streams=8)
    return [
        at_least(1.2, "tiny, concurrency 64: hub / PyTriton, requests/s",
                 _ratios(ours, theirs, lambda load: load.per_second),
                 _behind(ours, theirs, lambda load: load.per_second, ".0f per s")),
        at_most(0.8, "tiny, concurrency 64: hub / PyTriton, server CPU",
                _ratios(ours, theirs, lambda load: load.cpu_s),
                _behind(ours, theirs, lambda load: load.cpu_s * 1e3, ".3f ms")),
    ]  # fmt: skip


def single() -> list[Figure]:
    """Compare what one caller waits for."""
    ours, theirs = _against_pytriton(connections=1, streams=1)
    return [
        at_most(0.25, "tiny, concurrency 1: hub / PyTriton, p50",
                _ratios(ours, theirs, lambda load: load.p50_s),
                _behind(ours, theirs, lambda load: load.p50_s * 1e3, ".2f ms")),
    ]  # fmt: skip


def many_rows() -> list[Figure]:
    """Compare one request of 32 samples with 32 requests."""
    one, many = servers.tiny(), servers.tiny(32)
    alone, together = [], []
    with servers.hub(one) as hub:
        hub.wait_for(one)
        hub.check(many)
        per_s = [h2load.estimate(hub, model, connections=4, streams=2) for model in (one, many)]
        for _ in range(ROUNDS):
            alone.append(_busy(hub, one, per_s[0], connections=4, streams=2))
            together.append(_busy(hub, many, per_s[1], connections=4, streams=2))
        hub.check(many)
    return [
        at_most(0.10, "tiny, 32 samples in one request / one, CPU per sample",
                [b.cpu_s / 32 / a.cpu_s for a, b in zip(alone, together, strict=True)],
                _behind(together, alone, lambda load: load.cpu_s * 1e3, ".3f ms per request")),
    ]  # fmt: skip


def idle() -> list[Figure]:
    """Compare starting and doing nothing."""
    model = servers.tiny()
    figures: dict[str, list[tuple[int, float]]] = {"hub": [], "pytriton": []}
    for _ in range(3):
        for name, start in (("hub", servers.hub), ("pytriton", servers.pytriton)):
            began = time.monotonic()
            with start(model) as server:
                took_s = server.wait_for(model) - began
                time.sleep(SETTLE_S)
                figures[name].append((server.memory_bytes(), took_s))
    pairs = list(zip(figures["hub"], figures["pytriton"], strict=True))
    ours, theirs = (
        [statistics.median(each) for each in zip(*figures[name], strict=True)]
        for name in ("hub", "pytriton")
    )
    return [
        at_most(0.5, "idle memory of the process tree: hub / PyTriton",
                [our[0] / their[0] for our, their in pairs],
                f"{ours[0] / 2**20:.0f} / {theirs[0] / 2**20:.0f} MiB"),
        at_most(0.3, "cold start to the first answer: hub / PyTriton",
                [our[1] / their[1] for our, their in pairs],
                f"{ours[1]:.2f} / {theirs[1]:.2f} s"),
    ]  # fmt: skip


def fronts() -> list[Figure]:
    """Compare two front processes with none, where gRPC is the limit: on grpcio.

    Our own door takes less than handing a call on does, so there fronts only cost.
    """
    what = "tiny, concurrency 64, --door grpcio: two front processes / none, requests/s"
    model = servers.tiny()
    with (
        servers.hub(model, options=(*GRPCIO, "--front-processes", "2")) as two,
        servers.hub(model, options=GRPCIO) as none,
    ):
        first, second = _turns(model, two, none, connections=8, streams=8)
    return [
        at_least(1.4, what, _ratios(first, second, lambda load: load.per_second),
                 _behind(first, second, lambda load: load.per_second, ".0f per s") + "; CPU "
                 + _behind(first, second, lambda load: load.cpu_s * 1e3, ".3f ms")),
    ]  # fmt: skip


def switch() -> list[Figure]:
    """Compare the slowest answers while versions are switched with those while none is."""
    model, other = servers.tiny(), servers.mid_u8()
    quiet: list[Load] = []
    during: dict[str, list[Load]] = {model.name: [], other.name: []}
    switched = dict.fromkeys(during, 0)
    with servers.hub(model, other, options=("--model-control", "explicit")) as hub:
        for each in (model, other):
            hub.wait_for(each, load=True)
        for _ in range(ROUNDS):
            quiet.append(_steady(hub, model))
            for each in (model, other):
                with _switching(hub, each) as times:
                    during[each.name].append(_steady(hub, model))
                switched[each.name] += len(times)
        hub.check(model)
    lost = {name: sum(load.lost for load in loads) for name, loads in during.items()}
    return [
        at_most(1.5, f"tiny, steady load: p99 while {what} / without",
                _ratios(during[name], quiet, lambda load: load.p99_s),
                _behind(during[name], quiet, lambda load: load.p99_s * 1e3, ".2f ms")
                + f", {switched[name]} loads, {lost[name]} failed",
                clean=lost[name] == 0)
        for name, what in (
            (model.name, "its model is loaded anew"),
            (other.name, "another one, in a child process, is"),
        )
    ]  # fmt: skip


def _against_pytriton(*, connections: int, streams: int) -> tuple[list[Load], list[Load]]:
    model = servers.tiny()
    with servers.hub(model) as hub, servers.pytriton(model) as peer:
        return _turns(model, hub, peer, connections=connections, streams=streams)


def _turns(
    model: Model, first: Server, second: Server, *, connections: int, streams: int
) -> tuple[list[Load], list[Load]]:
    """Load both servers in turn; the other one rests meanwhile."""
    pair = (first, second)
    for server in pair:
        server.wait_for(model)
    per_s = [h2load.estimate(s, model, connections=connections, streams=streams) for s in pair]
    loads: tuple[list[Load], list[Load]] = ([], [])
    for _ in range(ROUNDS):
        for server, rate, done in zip(pair, per_s, loads, strict=True):
            done.append(_busy(server, model, rate, connections=connections, streams=streams))
    for server in pair:
        server.check(model)
    return loads


def _busy(server: Server, model: Model, per_s: float, *, connections: int, streams: int) -> Load:
    requests = max(round(per_s * SECONDS), connections * streams)
    return h2load.run(server, model, requests=requests, connections=connections, streams=streams)


def _steady(server: Server, model: Model) -> Load:
    return h2load.run(
        server, model, requests=round(STEADY_S * STEADY_PER_S), connections=4, streams=4,
        steady=STEADY_PER_S, lossless=False,
    )  # fmt: skip


@contextlib.contextmanager
def _switching(server: Server, model: Model) -> Iterator[list[float]]:
    """Have a model loaded anew, again and again; yields how long each load took."""
    took_s: list[float] = []
    done = threading.Event()

    def keep_loading() -> None:
        while not done.wait(SWITCH_EVERY_S):
            began = time.monotonic()
            server.load(model)
            took_s.append(time.monotonic() - began)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        loading = thread.submit(keep_loading)
        try:
            yield took_s
        finally:
            done.set()
        loading.result()  # a load that failed ends the benchmark


def _raw(session: onnxruntime.InferenceSession, model: Model, batch: int) -> tuple[float, float]:
    """Return samples per second and CPU seconds per sample of the session alone."""
    feed = {model.input: np.concatenate([model.rows] * batch)}
    session.run(None, feed)
    runs = 0
    cpu_s = time.process_time()
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        session.run(None, feed)
        runs += 1
    took_s = time.perf_counter() - started
    return runs * batch / took_s, (time.process_time() - cpu_s) / (runs * batch)


def _runs_and_rows(server: Server, model: Model) -> tuple[int, int]:
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(server.grpc)) as client:
        (found,) = client.get_inference_statistics(model.name).model_stats
    return found.execution_count, found.inference_count


def _ratios(
    first: Sequence[Load], second: Sequence[Load], figure: Callable[[Load], float]
) -> list[float]:
    return [figure(a) / figure(b) for a, b in zip(first, second, strict=True)]


def _behind(
    first: Sequence[Load],
    second: Sequence[Load],
    figure: Callable[[Load], float],
    text: str,
) -> str:
    form, unit = text.split(" ", 1)
    ours, theirs = (statistics.median(map(figure, loads)) for loads in (first, second))
    return f"{ours:{form}} / {theirs:{form}} {unit}"


ROWS: Mapping[str, Callable[[], list[Figure]]] = {
    "mid": mid,
    "busy": busy,
    "single": single,
    "rows": many_rows,
    "idle": idle,
    "fronts": fronts,
    "switch": switch,
}
