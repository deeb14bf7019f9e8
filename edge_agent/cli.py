"""The command ``fogline-agent``: run an agent, and ask what a device is capable of."""

import asyncio
import datetime
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_agent import config as config_module
from edge_agent.config import AgentConfig
from edge_agent.errors import AgentError

if TYPE_CHECKING:  # these load ONNX Runtime and gRPC, for which `--help` need not wait
    from edge_agent.agent import Agent
    from edge_agent.runtime.release import Release

HUB_PATIENCE_S = 3.0  # of `doctor`, for a hub that does not answer


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fogline")
def main() -> None:
    """The device's half of fogline: answers here, and asks the hub for what is uncertain.

    Every option may also come from the environment (FOGLINE_AGENT_DEADLINE_S=0.5) or a TOML
    file (--config, deadline_s = 0.5); flags win over the environment, which wins over the file.

    Exit codes: 1 something is wrong (doctor), 2 an option, 3 a port or directory in use,
    4 a bundle that is not intact, cannot run on this device or fails its self-test here.
    """


_PATH = click.Path(path_type=Path)
_COMMON = [
    click.option("--config", "config_file", type=_PATH, help="TOML file with any of the options."),
    click.option("--data", type=_PATH, help="The agent's own directory [default: fogline-agent]."),
    click.option("--device", metavar="NAME", help="Name of this device [default: the host's]."),
    click.option(
        "--bundle",
        type=_PATH,
        multiple=True,
        help="Serve the release in this directory, as the workshop built it. Repeatable.",
    ),
    click.option("--hub", metavar="HOST:PORT", help="The hub's gRPC door. Without: no escalation."),
    click.option("--hub-ca", type=_PATH, help="PEM of the authority behind the hub's certificate."),
    click.option("--hub-token-file", type=_PATH, help="Bearer token for a hub elsewhere."),
    click.option(
        "--provider",
        metavar="NAME",
        help="Run on this ONNX Runtime execution provider or not at all [default: the best one].",
    ),
    click.option("--threads", type=int, help="Threads of one engine, 0: every core [default: 0]."),
]


def _common(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_COMMON):
        command = option(command)
    return command


@main.command()
@_common
@click.option("--grpc", metavar="HOST:PORT", help="Open Inference gRPC [default: 127.0.0.1:8101].")
@click.option("--http", metavar="HOST:PORT", help="Open Inference REST [default: 127.0.0.1:8100].")
@click.option(
    "--door",
    type=click.Choice(config_module.TRANSPORTS),
    help="What speaks gRPC: our own HTTP/2, which costs a small request least, or Google's library "
    "[default: http2].",
)
@click.option("--unix", metavar="PATH", help="Open Inference gRPC on a Unix socket [default: off].")
@click.option(
    "--private/--no-private",
    default=None,
    help="Nothing that applications send ever leaves this device.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="MODEL[/SOURCE]",
    help="The hub may keep what escalates of this model, or only of this source of it, to learn "
    "from. Repeatable [default: nothing].",
)
@click.option(
    "--audit-rate",
    type=float,
    help="Share of what is answered here and may be kept that the hub answers too, so that what it "
    "keeps speaks of all requests; 0: none [default: 0.01].",
)
@click.option(
    "--allow-shared-memory/--no-allow-shared-memory",
    default=None,
    help="Applications may name POSIX shared memory to read inputs from and write outputs to: "
    "whatever this process may open [default: off].",
)
@click.option(
    "--deadline-s", type=float, help="Time for calls that bring no deadline [default: 2]."
)
@click.option(
    "--max-concurrency", type=int, help="Requests at once; more are refused [default: 64]."
)
@click.option("--max-message-bytes", type=int, help="Largest request [default: 16 MiB].")
@click.option(
    "--door-memory-bytes",
    type=int,
    help="Memory for requests and unread answers, 0: a quarter of the machine's [default: 0].",
)
@click.option(
    "--escalation-rows", type=int, help="Rows that escalate in one request [default: 32]."
)
@click.option("--escalation-requests", type=int, help="Escalation requests in flight [default: 4].")
@click.option(
    "--telemetry-interval-s", type=float, help="Between reports to the hub, 0: none [default: 1]."
)
@click.option(
    "--hub-root",
    type=_PATH,
    help="The hub's signed root of trust; on loopback the first one met is trusted.",
)
@click.option(
    "--probation-s",
    type=float,
    help="A new release serves under watch this long before it is kept [default: 30].",
)
@click.option("--drain-s", type=float, help="Time for requests in flight at the end [default: 5].")
def run(config_file: Path | None, **flags: Any) -> None:
    """Serve local applications until told to stop (Ctrl-C, SIGTERM).

    The doors are open to this machine only; port 0 takes a free one, "off" closes a door.
    The addresses in use are written to DATA/endpoints.json once all doors are open.

    Example: fogline-agent run --bundle digits-1.0.0 --hub 127.0.0.1:8001 --data /var/lib/fogline
    """
    _run(lambda: _serve(_load(flags, config_file)))


@main.command()
@_common
def doctor(config_file: Path | None, **flags: Any) -> None:
    """Say what this device can run and promise; exit with 1 when something is wrong.

    Checks the execution providers by running something on them, runs each bundle's self-test,
    and checks its certificate on this hardware and whether the hub answers. Starts no door.
    """
    found_wrong = False

    async def examine() -> None:
        nonlocal found_wrong
        found_wrong = not await _examine(_load(flags, config_file))

    _run(examine)
    if found_wrong:
        raise SystemExit(1)


def _load(flags: dict[str, Any], file: Path | None) -> AgentConfig:
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    return config_module.load(given, os.environ, file)


async def _serve(config: AgentConfig) -> None:
    from edge_agent.agent import Agent

    _log_to_stderr()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Agent(config) as agent:
        click.echo(_screen(agent))
        await stop.wait()
        click.echo("fogline-agent: finishing what is in flight, then stopping")


def _screen(agent: "Agent") -> str:
    config = agent.config
    doors = agent.endpoints
    lines = [f"fogline agent of {config.device!r} is ready"]
    if "grpc" in doors:
        lines.append(f"  gRPC      {doors['grpc']}")
    if "unix" in doors:
        lines.append(f"  gRPC      unix:{doors['unix']}")
    if "http" in doors:
        lines.append(f"  REST      http://{doors['http']}/v2")
    if not doors:
        lines.append("  doors     none: every one is off")
    lines.append(f"  data      {config.data.absolute()}")
    releases = agent.router.releases()
    for release in releases:
        lines += _described(release)
    if not releases:
        none = "none so far: the hub brings them, or" if config.hub else "none:"
        lines.append(f"  models    {none} give --bundle DIR, a directory that the workshop built")
    if not config.hub:
        lines.append("  hub       none: uncertain answers stay here and are marked degraded")
    else:
        how = "over TLS" if config.hub_uses_tls else "on this machine, not encrypted"
        lines.append(f"  hub       {config.hub}, {how}")
    for entry in config.keep:
        served = agent.router.serving(entry.partition("/")[0]) is not None
        unserved = "" if served else " (not served here now)"
        lines.append(
            f"  keep      the hub may keep what escalates of {entry}{unserved}, to learn from it"
        )
    if config.private:
        lines.append("  private   nothing that applications send leaves this device")
    return "\n".join(lines)


def _described(release: "Release") -> list[str]:
    """Return the lines that say what a release may promise on this device."""
    choice = release.choice
    pairing = release.bundle.escalates_to
    asks = f", escalates to {pairing.model}" if pairing is not None else ", never escalates"
    lines = [f"  model     {release.label}: {choice.variant.name} on {choice.provider}{asks}"]
    certificate = choice.certificate
    if certificate is not None:
        lines.append(
            f"            certified: at most {certificate.alpha:.2%} of all requests are answered "
            f"here and differently from {certificate.hub_model}, with "
            f"{1 - certificate.delta:.0%} confidence"
        )
        lines.append(
            f"            score > {certificate.threshold:.4f} answers here, about "
            f"{1 - certificate.escalation_rate:.0%} of requests; certificate {certificate.id}, "
            f"until {certificate.expires_at:%Y-%m-%d}"
        )
        if choice.aside:
            lines.append(f"            left aside: {choice.aside}")
    elif pairing is not None:
        lines.append(f"            not certified here, so everything escalates: {choice.why}")
    else:
        lines.append(
            "            answers are marked uncertified: there is no model to compare with"
        )
    return lines


async def _examine(config: AgentConfig) -> bool:
    """Print what was found; return whether all is well."""
    from edge_agent.errors import ReleaseRefused
    from edge_agent.runtime import providers
    from edge_agent.runtime import release as releases
    from edge_agent.update import by_hand
    from edge_agent.update.selftest import ChildSelfTest

    well = True

    def say(good: bool, what: str, text: str) -> None:
        nonlocal well
        well = well and good
        click.echo(f"{'ok   ' if good else 'WRONG'}  {what:<9} {text}")

    for provider in providers.probe():
        # One that does not run here is a fact of the device, not a fault, unless it is demanded.
        state = "runs" if provider.usable else f"cannot be used: {provider.objection}"
        say(
            provider.usable or provider.name != config.provider,
            "provider",
            f"{provider.name} {state}",
        )
    if config.provider and config.provider not in [p.name for p in providers.probe()]:
        say(False, "provider", f"{config.provider}: this ONNX Runtime does not have it")
    for name in providers.usable():
        say(True, "hardware", providers.hardware_class(name))
    for path in config.bundle:
        try:
            directory, choice = await asyncio.to_thread(by_hand.read, path, config.provider)
            figures = await by_hand.prove(directory, choice, ChildSelfTest())
            release = await asyncio.to_thread(
                releases.load, directory, threads=config.threads, choice=choice
            )
        except ReleaseRefused as error:
            say(False, "bundle", str(error))
            continue
        say(True, "bundle", f"{release.label} in {path} is intact and runs here")
        say(True, "self-test", _passed(release, figures))
        certificate = release.choice.certificate
        needs_one = release.bundle.escalates_to is not None
        if certificate is None:
            say(not needs_one, "promise", f"{release.label}: {release.choice.why}")
        else:
            left = certificate.expires_at - datetime.datetime.now(datetime.UTC)
            say(
                True,
                "promise",
                f"{release.choice.why}, alpha {certificate.alpha:.2%}, threshold "
                f"{certificate.threshold:.4f}, for {left.days} more days",
            )
            if release.choice.aside:
                say(True, "aside", f"{release.label}: {release.choice.aside}")
        release.engine.close()
    if not config.bundle:
        say(True, "bundle", "none given (--bundle DIR)")
    if config.hub:
        say(*await _hub_answers(config))
    else:
        say(True, "hub", "none given (--hub HOST:PORT)")
    return well


def _passed(release: "Release", figures: Mapping[str, float]) -> str:
    """Return the figures of a self-test beside what was allowed."""
    choice = release.choice
    bundle = release.bundle
    tolerance = bundle.self_test.tolerances[choice.variant.name].on(choice.provider)
    agree = (
        f"{figures['agreement']:.1%} get the reference's answer (required "
        f"{tolerance.min_agreement:.1%}), "
    )
    return (
        f"{choice.variant.name} on {choice.provider}: {figures['rows']:.0f} golden rows, largest "
        f"error {figures['max_abs_error']:.2g} (allowed {tolerance.max_abs_error:.2g}), "
        f"{agree if tolerance.min_agreement else ''}{figures['run_p95_ms']:.1f} ms a run at p95, "
        f"{figures['peak_bytes'] / (1 << 20):.0f} MiB at most"
    )


async def _hub_answers(config: AgentConfig) -> tuple[bool, str, str]:
    from edge_agent.agent import connection
    from fogline_protocol.errors import InferenceError

    client = connection(config)()
    try:
        ready = await client.server_ready(HUB_PATIENCE_S)
    except InferenceError as error:
        return False, "hub", f"{config.hub} does not answer: {error}"
    finally:
        await client.close()
    return ready, "hub", f"{config.hub} answers{'' if ready else ', and says it is not ready'}"


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end; a refusal becomes one sentence and its exit code."""
    try:
        asyncio.run(work())
    except AgentError as error:
        click.echo(f"fogline-agent: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def _log_to_stderr() -> None:
    """JSON lines for machines, plain lines for a terminal; the standard library's too."""
    import structlog  # here, because only a running agent logs

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
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
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
