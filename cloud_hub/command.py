"""What the commands of ``fogline`` share: options, the log, and how a command ends."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cloud_hub import config as config_module
from cloud_hub.errors import HubError

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

DATA = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data directory of the hub [default: fogline-hub].",
)
CONFIG = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with any of the options, e.g. max_batch = 64.",
)
HUB = click.option("--hub", metavar="URL", help="Where the hub's HTTP door is, if not in DATA.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run to the end; a refusal becomes one sentence and its exit code."""
    try:
        return asyncio.run(work())
    except HubError as error:
        click.echo(f"fogline: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def url_of(config_file: Path | None, data: Path | None, hub: str | None) -> "HubUrl":
    """Return where the hub is that a command is for: ``--hub``, else the one that runs on DATA.

    Raises:
        HubAway: neither.
    """
    from cloud_hub import operate

    given = {} if data is None else {"data": data}
    return operate.hub_url(hub, config_module.load(given, config_file).data)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write JSON lines for machines, plain lines for a terminal; the standard library's too."""
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
