"""The command ``fogline``: run a hub, and operate it."""

import asyncio
import gc
import json
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from cloud_hub import cli_data, cli_fleet
from cloud_hub import config as config_module
from cloud_hub.command import CONFIG, DATA, T, log_to_stderr, run
from cloud_hub.errors import StoreFailed


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fogline")
def main() -> None:
    """The hub of fogline: answers what devices escalate, and is operated from here.

    Every option may also come from the environment (FOGLINE_HUB_MAX_BATCH=64) or a TOML file
    (--config); flags win over the environment, which wins over the file.
    """


@main.command()
@CONFIG
@DATA
@click.option("--grpc", metavar="HOST:PORT", help="Open Inference gRPC [default: 127.0.0.1:8001].")
@click.option(
    "--http",
    metavar="HOST:PORT",
    help="REST, console, health and metrics [default: 127.0.0.1:8000]. Port 0 takes a free one.",
)
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False),
    help="Serve this Triton-style directory: NAME/1/model.onnx.",
)
@click.option(
    "--model-control",
    type=click.Choice(["none", "poll", "explicit"]),
    help="none: serve all of --models as it is at the start; poll: follow its files; explicit: "
    "what callers load [default: none].",
)
@click.option("--poll-s", type=float, help="Between two looks at --models, with poll [default: 5].")
@click.option(
    "--door",
    type=click.Choice(["http2", "grpcio"]),
    help="What speaks gRPC: our own HTTP/2, which costs a small request least, or Google's library "
    "[default: http2].",
)
@click.option(
    "--front-processes",
    type=int,
    help="Processes that speak gRPC for the hub, for small models under load with --door grpcio; "
    "0: none [default: 0].",
)
@click.option(
    "--allow-shared-memory",
    is_flag=True,
    default=None,
    help="Callers may name POSIX shared memory of this machine to read inputs from and write "
    "outputs to: whatever this process may open [default: off].",
)
@click.option(
    "--trace-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Callers may have requests traced (TraceSetting) into files in this directory, at most "
    "256 MiB per run [default: no traces].",
)
@click.option(
    "--mqtt",
    metavar="URL",
    help="Broker for device updates, mqtt://HOST:PORT [default: a Mosquitto of our own]; off: none.",
)
@click.option("--name", help="Shown in the console [default: fogline-hub].")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="PEM chain of the doors.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="PEM key of the doors.")
@click.option("--max-batch", type=int, help="Rows in one run of an engine [default: 64].")
@click.option("--max-queue-rows", type=int, help="Rows waiting per model [default: 1024].")
@click.option("--threads", type=int, help="Threads of one engine, 0: all cores [default: 0].")
@click.option(
    "--tensorrt",
    type=click.Choice(["auto", "off"]),
    help="auto: build plans and run them where there is a GPU and TensorRT [default: auto].",
)
@click.option("--run-limit-s", type=float, help="Time for one batch in an engine [default: 30].")
@click.option("--max-message-bytes", type=int, help="Largest request [default: 64 MiB].")
@click.option(
    "--door-memory-bytes",
    type=int,
    help="Memory for requests and unread answers of all callers, 0: a quarter of the machine's "
    "[default: 0].",
)
@click.option(
    "--cache-bytes",
    type=int,
    help="Memory for answers kept, of models with response_cache { enable: true } [default: 0].",
)
@click.option("--cache-ttl-s", type=float, help="How long an answer is kept [default: 300].")
@click.option(
    "--examples-quota-bytes",
    type=int,
    help="Disk for hard examples that devices let the hub keep, the oldest go first; 0: none are "
    "kept [default: 0].",
)
@click.option(
    "--examples-retention-days",
    type=float,
    help="An example goes when it has not come for so long; 0: only by the quota [default: 30].",
)
@click.option(
    "--drain-notice-s", type=float, help="At the end, not ready but serving [default: 0.2]."
)
@click.option("--drain-s", type=float, help="Then time for requests in flight [default: 10].")
@click.option("--caller-rate", type=float, help="Requests/s of a caller, 0: no limit [default: 0].")
@click.option("--caller-concurrency", type=int, help="The same at once, 0: no limit [default: 0].")
@click.option("--offline-after-s", type=float, help="Silence of an offline device [default: 30].")
def serve(config_file: Path | None, **flags: Any) -> None:
    """Run the hub until it is told to stop (Ctrl-C, SIGTERM).

    The addresses in use are written to DATA/endpoints.json once both doors are open. Doors
    that other machines can reach need TLS files and a token for every caller.

    Told to stop, it says at once that it is not ready and serves on for --drain-notice-s, so that
    load balancers turn elsewhere. Then it refuses what is new with a hint when to come back, and
    finishes what is in flight within --drain-s.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    run(lambda: _serve(config_module.load(given, config_file)))


async def _serve(config: config_module.HubConfig) -> None:
    # What a start makes stays. To look through it for garbage takes a tenth of the start, and
    # would take as long again in the middle of answers, every time that all is looked through.
    gc.disable()
    from cloud_hub.hub import Hub  # here, so that --help does not wait for ONNX Runtime

    log_to_stderr()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Hub(config) as hub:
        gc.freeze()
        gc.enable()
        click.echo(_screen(hub))
        await stop.wait()
        click.echo("fogline: draining, then stopping")


def _screen(hub: Any) -> str:
    lines = [
        f"fogline hub {hub.config.name!r} is ready",
        f"  console   {hub.url}/",
        f"  REST      {hub.url}/v2     metrics /metrics, health /readyz",
        f"  gRPC      {hub.grpc_address}",
        f"  MQTT      {hub.fleet.broker or 'none: ' + hub.fleet.trouble}",
        f"  data      {hub.config.data.resolve()}",
    ]
    statuses = hub.repository.status()
    if not statuses:
        lines.append(
            "  models    none yet: push one (`fogline release push BUNDLE`), or start with --models "
            "DIR, laid out as NAME/1/model.onnx"
        )
    for status in statuses:
        where = f"on {status.provider}" if status.state == "READY" else status.reason
        lines.append(
            f"  model     {status.name} version {status.version or '-'}: {status.state} {where}"
        )
    return "\n".join(lines)


@main.command()
@CONFIG
@DATA
@click.option(
    "--gpu", is_flag=True, help="A GPU is required: build a small TensorRT plan and run it."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document per finding.")
def doctor(config_file: Path | None, data: Path | None, gpu: bool, as_json: bool) -> None:
    """Say what this machine has for a hub; exit with 1 when something is wrong.

    Checks ONNX Runtime and its providers by running something on them, the GPU and its driver,
    TensorRT, the data directory and the broker. Starts no door.
    """

    async def work() -> bool:
        from cloud_hub import doctor as examination

        given = {} if data is None else {"data": data}
        wrong = False
        async for finding in examination.examine(config_module.load(given, config_file), gpu=gpu):
            wrong = wrong or finding.level is examination.Level.WRONG
            document = {"level": finding.level, "what": finding.what, "text": finding.text}
            click.echo(json.dumps(document) if as_json else str(finding))
        return wrong

    if run(work):
        raise SystemExit(1)


@main.group()
def bench() -> None:
    """Measure on this machine."""


@bench.command("tune")
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The Triton-style directory that MODEL is a name in; without it MODEL is an ONNX file.",
)
@click.option(
    "--latency-ms",
    type=click.FloatRange(0, min_open=True),
    default=100.0,
    show_default=True,
    help="What 99 % of all batches must keep on a busy hub, their wait behind another included.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="For everything.",
)
@click.option(
    "--max-batch", type=click.IntRange(1, 4096), default=64, show_default=True, help="To try."
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=3x224x224",
    help="Sizes, without the batch, of an input that leaves others than the batch open.",
)
@click.option("--dry-run", is_flag=True, help="Write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.argument("model")
def bench_tune(models: Path | None, dry_run: bool, as_json: bool, model: str, **asked: Any) -> None:
    """Find batch, instances and threads for MODEL, and write them into its config.pbtxt.

    Measures, without a hub, on the engines and the batcher that serve. The setting with the most
    samples/s within --latency-ms is taken; of those that differ by less than 3 % the one with
    the least CPU time, then the smallest batch. The rest of config.pbtxt stays, but for its
    comments; the old file is kept as config.pbtxt.bak. Ctrl-C leaves all as it was.

    Inputs are the first warm-up request of the model's configuration, or zeros.
    """

    async def work() -> None:
        from cloud_hub.tuning import report, tune
        from cloud_hub.tuning.settings import Target, shape_option

        log_to_stderr(logging.CRITICAL)  # an engine that is lost stands in the table
        wish = tune.Wish(
            limit_s=asked["latency_ms"] / 1e3,
            seconds=asked["seconds"],
            largest_batch=asked["max_batch"],
            shapes=dict(shape_option(text) for text in asked["shapes"]),
        )
        target = await asyncio.to_thread(Target.find, model, models)
        if not dry_run:
            target.check_rewritable()
        with report.Progress(wish.seconds) as progress:
            found = await tune.tune(target, wish, progress)
        written = None
        if found.chosen is not None and not dry_run and target.config is not None:
            written = await asyncio.to_thread(target.write, target.rewritten(found.tuning()))
        report.show(found, target, written, as_json=as_json, dry_run=dry_run)
        found.check()

    run(work)


@main.group()
def token() -> None:
    """Bearer tokens for callers from other machines."""


@token.command("create")
@CONFIG
@DATA
@click.option("--tenant", default="default", show_default=True, help="Who pays and may see.")
@click.option("--label", default="", help="What the token is for; shown in lists.")
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True)
@click.option("--rate", type=click.FloatRange(0), default=0.0, help="Requests a second.")
@click.option("--burst", type=click.IntRange(0), default=0, help="At once above it [default: 1 s].")
@click.option("--concurrency", type=click.IntRange(0), default=0, help="Requests in flight.")
def token_create(
    config_file: Path | None,
    data: Path | None,
    tenant: str,
    label: str,
    days: int,
    rate: float,
    burst: int,
    concurrency: int,
) -> None:
    """Make a token and print it: the only time it can be seen.

    Its bearer may ask without limit, unless --rate, --burst and --concurrency say otherwise or
    the hub has limits for all callers (`fogline serve --caller-rate --caller-concurrency`).
    """
    from cloud_hub.fleet.callers import CallerLimits

    limits = CallerLimits(rate, burst, concurrency)

    async def create(identity: Any) -> str:
        made: str = await identity.create(tenant, label, days * 86400.0, time.time(), limits)
        return made

    # The token comes first where other machines reach the hub, so its data may begin here.
    click.echo(_with_identity(config_file, data, create, may_begin=True))


@token.command("list")
@CONFIG
@DATA
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def token_list(config_file: Path | None, data: Path | None, as_json: bool) -> None:
    """List tokens without their secrets."""

    async def rows(identity: Any) -> list[dict[str, Any]]:
        return [
            {
                "id": t.token_id,
                "tenant": t.tenant,
                "label": t.label,
                "expires_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(t.expires_at)),
                "revoked": t.revoked,
                "rate": t.limits.rate,
                "burst": t.limits.burst,
                "concurrency": t.limits.concurrency,
            }
            for t in await identity.tokens()
        ]

    found = _with_identity(config_file, data, rows)
    if as_json:
        click.echo(json.dumps(found))
        return
    for t in found:
        state = "revoked" if t["revoked"] else f"until {t['expires_at']}"
        click.echo(f"{t['id']}  {t['tenant']:<16} {state:<28} {_limits_line(t):<24} {t['label']}")
    if not found:
        click.echo("no token: make one with `fogline token create`")


def _limits_line(token: dict[str, Any]) -> str:
    burst = f" (burst {token['burst']})" if token["burst"] else ""
    parts = (
        f"{token['rate']:g}/s{burst}" if token["rate"] else "",
        f"{token['concurrency']} at once" if token["concurrency"] else "",
    )
    return ", ".join(part for part in parts if part) or "no limits"


@token.command("revoke")
@CONFIG
@DATA
@click.argument("token_id")
def token_revoke(config_file: Path | None, data: Path | None, token_id: str) -> None:
    """End a token by its id, as `fogline token list` shows it."""

    async def revoke(identity: Any) -> bool:
        ended: bool = await identity.revoke(token_id)
        return ended

    if not _with_identity(config_file, data, revoke):
        raise SystemExit(f"fogline: no token {token_id!r}; `fogline token list` shows the ids")
    click.echo(f"token {token_id} is revoked; a running hub notices within seconds")


def _with_identity(
    config_file: Path | None,
    data: Path | None,
    work: Callable[[Any], Coroutine[Any, Any, T]],
    *,
    may_begin: bool = False,
) -> T:
    """Run ``work`` on the token table of the configured data directory."""

    async def work_on_it() -> T:
        from cloud_hub.fleet.identity import Identity
        from cloud_hub.hub import DATABASE
        from cloud_hub.store.store import Store

        given = {} if data is None else {"data": data}
        config = config_module.load(given, config_file)
        await asyncio.to_thread(_check_data, config.data, config.data / DATABASE, may_begin)
        store = await Store.open(f"sqlite:///{config.data / DATABASE}")
        try:
            return await work(Identity(store))
        finally:
            await store.close()

    return run(work_on_it)


def _check_data(data: Path, database: Path, may_begin: bool) -> None:
    """Raise unless ``data`` is a hub's, or may become a new hub's and now is a directory."""
    try:
        if may_begin:
            data.mkdir(parents=True, exist_ok=True)
        elif not database.exists():
            from cloud_hub.operate import HubAway

            raise HubAway(f"{data} holds no hub's data: name the hub's directory with --data")
    except OSError as error:
        raise StoreFailed(f"data directory {data}: {error.strerror}") from None


for _group in (cli_fleet.release, cli_fleet.certificate, cli_fleet.device, cli_data.data):
    main.add_command(_group)
