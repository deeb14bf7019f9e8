"""The command ``fogline``: run a hub, and operate it."""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import click

from cloud_hub import config as config_module
from cloud_hub.errors import HubError, StoreFailed

if TYPE_CHECKING:
    from cloud_hub.operate import HubUrl


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Have imports take ``module`` for not installed."""
    known = sys.modules.get(module)
    sys.modules[module] = known  # type: ignore[assignment]  # None is how Python spells it
    try:
        yield
    finally:
        if known is None:
            del sys.modules[module]


# Where it is installed, structlog imports it to color tracebacks: 7 MiB of every hub.
with _without("rich"):
    import structlog

T = TypeVar("T")

_DATA = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data directory of the hub [default: fogline-hub].",
)
_CONFIG = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with any of the options, e.g. max_batch = 64.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fogline")
def main() -> None:
    """The hub of fogline: answers what devices escalate, and is operated from here.

    Every option may also come from the environment (FOGLINE_HUB_MAX_BATCH=64) or a TOML file
    (--config); flags win over the environment, which wins over the file.
    """


@main.command()
@_CONFIG
@_DATA
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
    _run(lambda: _serve(config_module.load(given, config_file)))


async def _serve(config: config_module.HubConfig) -> None:
    # What a start makes stays. To look through it for garbage takes a tenth of the start, and
    # would take as long again in the middle of answers, every time that all is looked through.
    gc.disable()
    from cloud_hub.hub import Hub  # here, so that --help does not wait for ONNX Runtime

    _log_to_stderr()
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
@_CONFIG
@_DATA
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

    if _run(work):
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

        _log_to_stderr(logging.CRITICAL)  # an engine that is lost stands in the table
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

    _run(work)


@main.group()
def token() -> None:
    """Bearer tokens for callers from other machines."""


@token.command("create")
@_CONFIG
@_DATA
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
@_CONFIG
@_DATA
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
@_CONFIG
@_DATA
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

    async def run() -> T:
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

    return _run(run)


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


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run to the end; a refusal becomes one sentence and its exit code."""
    try:
        return asyncio.run(work())
    except HubError as error:
        click.echo(f"fogline: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def _log_to_stderr(level: int = logging.INFO) -> None:
    """JSON lines for machines, plain lines for a terminal; the standard library's too."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


_HUB = click.option("--hub", metavar="URL", help="Where the hub's HTTP door is, if not in DATA.")
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def _url(config_file: Path | None, data: Path | None, hub: str | None) -> "HubUrl":
    from cloud_hub import operate

    given = {} if data is None else {"data": data}
    return operate.hub_url(hub, config_module.load(given, config_file).data)


@main.group()
def release() -> None:
    """Releases: bundles that the hub has accepted, numbered and signed."""


@release.command("push")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.option("--force", is_flag=True, help="Accept it although its self-test fails on the hub.")
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False, exists=True))
def release_push(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    force: bool,
    bundle: Path,
) -> None:
    """Make the bundle in directory BUNDLE a release.

    The hub verifies every file, checks the pair it escalates to, runs its self-test on its own
    engine, then numbers, stores and signs it. The workshop's report.json and report.html go along.
    Pushing the same bundle again changes nothing.
    """
    from cloud_hub import operate

    async def work() -> None:
        made = await operate.push(_url(config_file, data, hub), bundle, force=force)
        operate.echo(made, as_json, operate.release_lines([made]))

    _run(work)


@release.command("list")
@_CONFIG
@_DATA
@_HUB
@_JSON
def release_list(
    config_file: Path | None, data: Path | None, hub: str | None, as_json: bool
) -> None:
    """List every release, newest first."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(_url(config_file, data, hub), "GET", "/api/v1/releases")
        operate.echo(found, as_json, operate.release_lines(found))

    _run(work)


@release.command("show")
@_CONFIG
@_DATA
@_HUB
@click.argument("name", metavar="MODEL@NUMBER")
def release_show(config_file: Path | None, data: Path | None, hub: str | None, name: str) -> None:
    """Show one release in full, as JSON: contract, variants, lineage, certificates, report."""
    from cloud_hub import operate

    model, _, number = name.partition("@")

    async def work() -> None:
        path = f"/api/v1/releases/{model}/{number or '0'}"
        found = await operate.call(_url(config_file, data, hub), "GET", path)
        operate.echo(found, True, iter(()))

    _run(work)


@main.group()
def certificate() -> None:
    """Certificates: what a local answer of a release may cost in quality, signed by this hub.

    They can be issued for a release that is out, replaced and withdrawn; its devices follow at
    once, without an update.
    """


@certificate.command("list")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.argument("name", metavar="[MODEL[@NUMBER]]", default="")
def certificate_list(
    config_file: Path | None, data: Path | None, hub: str | None, as_json: bool, name: str
) -> None:
    """List certificates, also withdrawn ones, the latest first."""
    from cloud_hub import operate

    model, _, number = name.partition("@")
    given = {"model": model, "release": number}

    async def work() -> None:
        url = _url(config_file, data, hub)
        params = [(key, value) for key, value in given.items() if value]
        found = await operate.call(url, "GET", "/api/v1/certificates", params=params)
        operate.echo(found, as_json, operate.certificate_lines(found, time.time()))

    _run(work)


@certificate.command("issue")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.argument("name", metavar="MODEL@NUMBER")
@click.argument(
    "files",
    metavar="FILE...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
)
def certificate_issue(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    name: str,
    files: tuple[Path, ...],
) -> None:
    """Attach certificates to a release that is out: FILEs that `fogline-models certify` wrote.

    Certify on a machine of the hardware class that devices have. Of several for one variant and
    hardware class devices take the one certified last. One that was withdrawn holds again.
    """
    from cloud_hub import operate

    async def work() -> None:
        made = await operate.issue(_url(config_file, data, hub), name, files)
        operate.echo(made, as_json, operate.change_lines(made, time.time()))

    _run(work)


@certificate.command("withdraw")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.option("--reason", required=True, help="Why, for people who ask later.")
@click.argument("name", metavar="MODEL@NUMBER")
@click.argument("id")
def certificate_withdraw(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    reason: str,
    name: str,
    id: str,
) -> None:
    """Take certificate ID back: devices answer under the next one that holds, or escalate.

    Devices that are away follow when they return. `fogline certificate list` shows the ids.
    """
    from cloud_hub import operate

    async def work() -> None:
        path = f"{operate.named_release(name)}/certificates/{quote(id, safe='')}/withdrawal"
        url = _url(config_file, data, hub)
        found = await operate.call(url, "POST", path, body={"reason": reason})
        operate.echo(found, as_json, operate.change_lines([found], time.time()))

    _run(work)


@main.group()
def device() -> None:
    """Devices: what is wanted of them, and what they say."""


@device.command("list")
@_CONFIG
@_DATA
@_HUB
@_JSON
def device_list(
    config_file: Path | None, data: Path | None, hub: str | None, as_json: bool
) -> None:
    """List every device that has reported."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(_url(config_file, data, hub), "GET", "/api/v1/devices")
        operate.echo(found, as_json, operate.device_lines(found))

    _run(work)


@device.command("show")
@_CONFIG
@_DATA
@_HUB
@click.argument("name")
def device_show(config_file: Path | None, data: Path | None, hub: str | None, name: str) -> None:
    """Show one device in full, as JSON: desired, reported, and its latest changes."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(_url(config_file, data, hub), "GET", f"/api/v1/devices/{name}")
        operate.echo(found, True, iter(()))

    _run(work)


@device.command("set")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.option("--release", "name", required=True, metavar="MODEL@NUMBER", help="What to run.")
@click.option("--all", "everywhere", is_flag=True, help="On every device that has reported.")
@click.argument("devices", nargs=-1)
def device_set(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    name: str,
    everywhere: bool,
    devices: tuple[str, ...],
) -> None:
    """Want a release on DEVICES, or on --all.

    This states what is wanted and returns; devices that are away follow when they return.
    `fogline device list` shows how far they are.
    """
    from cloud_hub import operate

    if everywhere == bool(devices):
        raise click.UsageError("name devices, or say --all: one of the two")

    async def work() -> None:
        body = {"release": name, "devices": list(devices) or None}
        url = _url(config_file, data, hub)
        found = await operate.call(url, "POST", "/api/v1/deployments", body=body)
        line = f"{found['release']} is wanted on {', '.join(found['devices']) or 'no device'}"
        operate.echo(found, as_json, iter([line]))

    _run(work)


@device.command("unset")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.option("--model", required=True, help="Of which no release is wanted any more.")
@click.option("--all", "everywhere", is_flag=True, help="On every device that has reported.")
@click.argument("devices", nargs=-1)
def device_unset(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    model: str,
    everywhere: bool,
    devices: tuple[str, ...],
) -> None:
    """Want no release of a model on DEVICES any more, or on --all.

    A device drops an update that it has not committed. What it has committed goes on answering
    there; no later release of the model comes until one is wanted again.
    """
    from cloud_hub import operate

    if everywhere == bool(devices):
        raise click.UsageError("name devices, or say --all: one of the two")

    async def work() -> None:
        body = {"model": model, "devices": list(devices) or None}
        url = _url(config_file, data, hub)
        found = await operate.call(url, "POST", "/api/v1/deployments/withdrawal", body=body)
        names = ", ".join(found["devices"])
        line = f"no release of {model} is wanted any more on {names}"
        if not names:
            line = f"no release of {model} was wanted there, so nothing changes"
        operate.echo(found, as_json, iter([line]))

    _run(work)


@device.command("forget")
@_CONFIG
@_DATA
@_HUB
@_JSON
@click.argument("names", nargs=-1, required=True)
def device_forget(
    config_file: Path | None,
    data: Path | None,
    hub: str | None,
    as_json: bool,
    names: tuple[str, ...],
) -> None:
    """Forget devices that are gone or are called otherwise now, for good.

    What is wanted of them, their history and their counts go, so the fleet's totals are less by
    those. Examples that they let the hub keep stay (`fogline data delete --device NAME`). Stop the
    agent first: who is online is not forgotten. A device that comes back is a new one, of which
    nothing is wanted.
    """
    from cloud_hub import operate

    async def work() -> None:
        url = _url(config_file, data, hub)
        gone = []
        for name in names:
            path = f"/api/v1/devices/{quote(name, safe='')}"
            found = await operate.call(url, "DELETE", path)
            gone.append(found)
            if not as_json:  # at once: the next one may be unknown
                click.echo(f"{found['device']} is forgotten")
        if as_json:
            click.echo(json.dumps(gone, indent=2))

    _run(work)


@main.group()
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
@_CONFIG
@_DATA
@_HUB
@_JSON
def data_list(config_file: Path | None, data: Path | None, hub: str | None, as_json: bool) -> None:
    """List what is kept, by device model."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(_url(config_file, data, hub), "GET", "/api/v1/examples")
        operate.echo(found, as_json, operate.example_lines(found))

    _run(work)


@data.command("export")
@_CONFIG
@_DATA
@_HUB
@_JSON
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
        url = _url(config_file, data, hub)
        count, left_out = await operate.export(url, model, params, dataset)
        line = f"{count:,} examples of {model} are in {out}"
        if left_out:
            line += f"; {left_out:,} were left out, gone or damaged on the hub's disk"
        found = {"examples": count, "left_out": left_out, "out": str(out)}
        operate.echo(found, as_json, iter([line]))

    _run(work)


@data.command("delete")
@_CONFIG
@_DATA
@_HUB
@_JSON
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
        url = _url(config_file, data, hub)
        found = await operate.call(url, "DELETE", "/api/v1/examples", params=params)
        line = f"{found['examples']:,} examples are deleted, and {found['sightings']:,} times they came"
        operate.echo(found, as_json, iter([line]))

    _run(work)
