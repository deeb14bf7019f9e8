"""The operator's commands: ``fogline release`` and ``fogline device``, over the hub's API.

They find the hub through DATA/endpoints.json on its own machine, or by ``--hub URL``.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import click

from cloud_hub.config import ENDPOINTS
from cloud_hub.errors import ConfigRefused, HubError
from cloud_hub.fleet import upload


class OperationRefused(HubError):
    """The hub refused; the sentence is the hub's own."""

    exit_code = 6


class HubAway(HubError):
    """There is no hub where it was looked for: start it, or say where it is."""

    exit_code = 7


def hub_url(given: str | None, data: Path) -> str:
    """Return where the hub's API is.

    Raises:
        HubAway: no URL was given and no hub runs on ``data``.
        ConfigRefused: what was given is no URL.
    """
    if given:
        parts = urlsplit(given)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigRefused(f"--hub {given!r} is not http://HOST:PORT or https://HOST:PORT")
        return given.rstrip("/")
    try:
        endpoints = json.loads((data / ENDPOINTS).read_text(encoding="ascii"))
        return f"http://{endpoints['http']}"
    except (OSError, ValueError, KeyError, TypeError):
        raise HubAway(
            f"no hub runs on {data}: start it with `fogline serve --data {data}`, or name "
            "another with --hub URL"
        ) from None


async def call(url: str, method: str, path: str, body: Any = None, data: Any = None) -> Any:
    """Return the hub's answer as JSON.

    Raises:
        OperationRefused: it said no; the text says why.
        HubAway: nobody answers, or something that is no hub.
    """
    headers = {}
    token = os.environ.get("FOGLINE_TOKEN", "").strip()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
    try:
        async with (
            aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session,
            session.request(method, path, json=body, data=data) as answer,
        ):
            text = await answer.text(errors="replace")
    except aiohttp.ClientError as error:
        raise HubAway(f"the hub at {url} cannot be reached: {error}") from None
    if answer.status >= 400:
        raise OperationRefused(_detail(text, answer.status))
    try:
        return json.loads(text)
    except ValueError:
        raise HubAway(f"what answers at {url} is no fogline hub") from None


async def push(url: str, bundle: Path, *, force: bool) -> Any:
    """Send a bundle and return the release that it became.

    Raises:
        OperationRefused, HubAway: see ``call``.
    """
    with _packed(bundle) as archive:
        return await call(url, "POST", f"/api/v1/releases?force={int(force)}", data=archive)


@contextlib.contextmanager
def _packed(bundle: Path) -> Iterator[Any]:
    if not (bundle / "bundle.json").is_file():
        raise OperationRefused(f"{bundle} is no bundle: it has no bundle.json")
    with tempfile.TemporaryFile() as archive:
        try:
            upload.pack(bundle, archive)
        except (OSError, ValueError) as error:  # tarfile's word for a name that is too long
            raise OperationRefused(f"{bundle} cannot be packed: {error}") from None
        archive.seek(0)
        yield archive


def release_lines(releases: list[dict[str, Any]]) -> Iterator[str]:
    """Return releases as a table."""
    if not releases:
        yield "no release: make one with `fogline release push BUNDLE`"
    for one in releases:
        accepted = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["accepted_at"]))
        pair = f"escalates to {one['escalates_to']}" if one["escalates_to"] else ""
        forced = "FORCED past its self-test" if one["forced"] else ""
        size = f"{one['size_bytes'] / 1000:,.1f} kB"
        told = "  ".join(part for part in (accepted, _descent(one), pair, forced) if part)
        yield f"{one['release']:<20} {one['version']:<10} {size:>12}  {told}"
        yield from (f"  note: {note}" for note in one.get("notes", ()))


def _descent(one: dict[str, Any]) -> str:
    """Return where a release comes from and what came from it."""
    parent, children = one.get("parent"), one.get("children", ())  # an older hub tells neither
    said = []
    if parent is not None:
        said.append(f"from {parent['release'] or parent['version'] + ' (unknown to this hub)'}")
    if children:
        said.append(f"parent of {', '.join(children)}")
    return ", ".join(said)


def device_lines(devices: list[dict[str, Any]]) -> Iterator[str]:
    """Return devices as a table, one line per model."""
    if not devices:
        yield "no device has reported: start one with `fogline-agent run --hub HOST:PORT`"
    for one in devices:
        presence = "online" if one["online"] else "offline"
        yield f"{one['name']:<20} {presence:<8} {one['standing']:<9} generation {one['generation']}"
        for model in one["models"]:
            yield f"  {model_line(model)}"


def model_line(model: dict[str, Any]) -> str:
    """Return how one model stands, in one line."""
    wanted = int(model["desired_release"])
    active = int(model["active_release"])
    line = f"{model['model']}: runs {active or 'its own'} ({model['active_version'] or '-'})"
    if wanted and wanted != active:
        line += f", wanted {wanted}"
    line += f", {model['phase']}"
    total = int(model["bytes_total"])
    if model["phase"] == "downloading" and total:
        line += f" {int(model['bytes_done']) / total:.0%}"
    return line + (f" [{model['code']}] {model['sentence']}" if model["code"] else "")


def echo(document: Any, as_json: bool, lines: Iterator[str]) -> None:
    """Print JSON or lines."""
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines))


def _detail(text: str, status: int) -> str:
    try:
        document = json.loads(text)
        code = f" [{document['code']}]" if "code" in document else ""
        return f"the hub refused{code}: {document['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"the hub answered {status}: {text[:200]}"
