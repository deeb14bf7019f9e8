"""The operator's commands: ``fogline release``, ``certificate``, ``device`` and ``data``, over the hub's API.

They find the hub through DATA/endpoints.json on its own machine, and know its certificate from
there; or by ``--hub URL``, where authorities that the system does not know are read from
$SSL_CERT_FILE (OpenSSL's). A token is read from $FOGLINE_TOKEN.
"""

import contextlib
import datetime
import json
import os
import re
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import click

from cloud_hub.config import ENDPOINTS
from cloud_hub.errors import ConfigRefused, HubError
from cloud_hub.fleet import upload
from cloud_hub.insight.dataset import Dataset, sampling
from cloud_hub.insight.example_codec import ExampleDamaged, FrameReader, read_example

PROGRESS_S = 2.0  # between two words about a long export


class OperationRefused(HubError):
    """The hub refused; the sentence is the hub's own."""

    exit_code = 6


class HubAway(HubError):
    """There is no hub where it was looked for: start it, or say where it is."""

    exit_code = 7


@dataclass(frozen=True, slots=True)
class HubUrl:
    """Where a hub's API is, and by what it is known to be that hub."""

    url: str
    certificate: str = ""  # that it must show, as PEM; empty: any by an authority that is known

    def __str__(self) -> str:
        return self.url


def hub_url(given: str | None, data: Path) -> HubUrl:
    """Return where the hub's API is.

    Raises:
        HubAway: no URL was given and no hub runs on ``data``.
        ConfigRefused: what was given is no URL.
    """
    if given:
        parts = urlsplit(given)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigRefused(f"--hub {given!r} is not http://HOST:PORT or https://HOST:PORT")
        return HubUrl(given.rstrip("/"))
    try:
        endpoints = json.loads((data / ENDPOINTS).read_text(encoding="ascii"))
        return HubUrl(str(endpoints["url"]), str(endpoints.get("certificate", "")))
    except (OSError, ValueError, KeyError, TypeError):
        raise HubAway(
            f"no hub runs on {data}: start it with `fogline serve --data {data}`, or name "
            "another with --hub URL"
        ) from None


Query = Sequence[tuple[str, str]]


async def call(
    url: HubUrl, method: str, path: str, body: Any = None, data: Any = None, params: Query = ()
) -> Any:
    """Return the hub's answer as JSON.

    Raises:
        OperationRefused: it said no; the text says why.
        HubAway: nobody answers, or something that is no hub.
    """
    try:
        async with (
            _session(url) as session,
            session.request(method, path, params=params, json=body, data=data) as answer,
        ):
            text = await answer.text(errors="replace")
    except aiohttp.ClientError as error:
        raise _away(url, error) from None
    if answer.status >= 400:
        raise _refused(url, answer.status, text)
    try:
        return json.loads(text)
    except ValueError:
        raise HubAway(f"what answers at {url} is no fogline hub") from None


async def export(url: HubUrl, model: str, params: Query, dataset: Dataset) -> tuple[int, int]:
    """Fill a data set; return how many examples are in it, and how many were left out.

    Raises:
        OperationRefused: the hub said no, or what is selected makes no data set.
        DatasetRefused: see ``Dataset``.
        HubAway: the hub cannot be reached, or broke off.
    """
    reader = FrameReader()
    ended = None
    try:
        async with (
            _session(url) as session,
            session.get(f"/api/v1/examples/{quote(model, safe='')}", params=params) as answer,
        ):
            if answer.status >= 400:
                raise _refused(url, answer.status, await answer.text(errors="replace"))
            with dataset, _Progress() as progress:
                async for chunk in answer.content.iter_any():
                    for document, payload in reader.feed(chunk):
                        if "layouts" in document:
                            progress.total = _whole(model, document["layouts"])
                        elif "end" in document:
                            ended = int(document["left_out"])
                        else:
                            # Disk and digests: nothing else runs in this process.
                            dataset.add(read_example(document, payload))
                            progress.step()
                if ended is None:
                    raise HubAway(f"the hub at {url} broke off in the middle: try again")
                if not progress.done:
                    raise OperationRefused(
                        f"all {ended} selected examples are damaged on the hub's disk, see its log"
                    )
                told = sampling(model, dataset.table.reasons)
                return dataset.finish(told), ended
    except aiohttp.ClientError as error:
        raise _away(url, error) from None
    except ExampleDamaged as error:
        raise HubAway(f"what the hub at {url} sends is damaged: {error}") from None


def _whole(model: str, layouts: dict[str, int]) -> int:
    """Return how many examples will come.

    Raises:
        OperationRefused: none, or inputs of several shapes.
    """
    if not layouts:
        raise OperationRefused(
            f"no example of {model} is selected: `fogline data list` shows what is kept, and "
            "`fogline-agent run --keep MODEL` lets a hub keep what escalates"
        )
    if len(layouts) > 1:
        several = ", ".join(f"{layout} ({n})" for layout, n in sorted(layouts.items())[:8])
        raise OperationRefused(
            f"the selected examples have inputs of {len(layouts)} shapes, which are not one array: "
            f"{several}; choose one with --shape NAME=1x8x8 and export each by itself"
        )
    return sum(layouts.values())


class _Progress:
    """Tells on standard error how far an export is, once it has taken two seconds."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self._said_at = time.monotonic()
        self._end = "\r" if sys.stderr.isatty() else "\n"
        self._said = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_error: object) -> None:
        if self._said and self._end == "\r":
            click.echo(err=True)

    def step(self) -> None:
        """One more has come."""
        self.done += 1
        if time.monotonic() - self._said_at >= PROGRESS_S:
            self._said_at, self._said = time.monotonic(), True
            line = f"{self.done:,} of {self.total:,} examples"
            click.echo(f"{line}{self._end}", nl=False, err=True)


def moment(text: str, now: float) -> float:
    """Return seconds since the epoch of a date, a time, or how long ago: ``7d``, ``12h``, ``30min``.

    Dates and times without a zone are UTC.

    Raises:
        ValueError: it is neither.
    """
    ago = re.fullmatch(r"(\d{1,6})(d|h|min)", text)
    if ago:
        return now - int(ago[1]) * {"d": 86400, "h": 3600, "min": 60}[ago[2]]
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no time: say 2026-11-01, 2026-11-01T12:30, or how long ago, as 7d, 12h, 30min"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).timestamp()


async def push(url: HubUrl, bundle: Path, *, force: bool) -> Any:
    """Send a bundle and return the release that it became.

    Raises:
        OperationRefused, HubAway: see ``call``.
    """
    with _packed(bundle) as archive:
        return await call(url, "POST", f"/api/v1/releases?force={int(force)}", data=archive)


def _session(url: HubUrl) -> aiohttp.ClientSession:
    headers = {}
    token = os.environ.get("FOGLINE_TOKEN", "").strip()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600)
    connector = aiohttp.TCPConnector(ssl=_only(url.certificate) if url.certificate else True)
    return aiohttp.ClientSession(url.url, headers=headers, timeout=timeout, connector=connector)


def _only(certificate: str) -> ssl.SSLContext:
    """Return a context that trusts whoever holds the key of this certificate, and nobody else.

    So the token goes to that hub alone, by whatever name or address it is called here.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it is known by more than its name
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not have signed itself
    try:
        context.load_verify_locations(cadata=certificate)
    except ssl.SSLError as error:
        raise HubAway(f"{ENDPOINTS} is damaged ({error}): start the hub again") from None
    return context


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


def named_release(text: str) -> str:
    """Return the path of the release ``MODEL@NUMBER`` or ``MODEL@VERSION`` below the API.

    Raises:
        OperationRefused: it does not say which.
    """
    model, _, number = text.partition("@")
    if not model or not number:
        raise OperationRefused(
            f"{text!r} is no release: say MODEL@NUMBER; `fogline release list` shows them"
        )
    return f"/api/v1/releases/{quote(model, safe='')}/{quote(number, safe='')}"


async def issue(url: HubUrl, name: str, files: Sequence[Path]) -> list[Any]:
    """Attach the certificates in ``files`` to the release ``name``, one by one, and return them.

    Raises:
        OperationRefused: one of them was refused, by name; those before it are issued.
        HubAway: see ``call``.
    """
    path = f"{named_release(name)}/certificates"
    made = []
    for file in files:
        try:
            with file.open("rb") as document:
                made.append(await call(url, "POST", path, data=document))
        except OSError as error:
            raise OperationRefused(f"{file}: {error.strerror or error}") from None
        except OperationRefused as error:
            before = f" ({len(made)} before it are issued)" if made else ""
            raise OperationRefused(f"{file}: {error}{before}") from None
    return made


def certificate_lines(certificates: list[dict[str, Any]], now: float) -> Iterator[str]:
    """Return certificates as a table."""
    if not certificates:
        yield (
            "no certificate: `fogline-models certify` makes one on a machine of the hardware class "
            "that it is for, and `fogline certificate issue MODEL@NUMBER FILE` attaches it"
        )
    for one in certificates:
        expires = datetime.datetime.fromisoformat(one["expires_at"])
        state = (
            "withdrawn"
            if one["withdrawn"]
            else "expired"
            if expires.timestamp() <= now
            else f"until {expires:%Y-%m-%d}"
        )
        line = f"{one['id']}  {one['release']:<16} {one['variant']:<10} {state:<17} {one['hardware_class']}"
        yield f"{line}  {one['reason']}" if one["reason"] else line


def change_lines(changes: list[dict[str, Any]], now: float) -> Iterator[str]:
    """Return certificates that were issued or withdrawn, and who is told."""
    for one in changes:
        yield from certificate_lines([one], now)
        told = one["devices"]
        names = ", ".join(told[:8]) + (f" and {len(told) - 8:,} more" if len(told) > 8 else "")
        yield f"  told: {names or 'no device'}"


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
    serving = model.get("serving")  # an older hub or agent tells nothing
    if serving:
        line += f", {_serving_words(serving)}"
    line += f", {model['phase']}"
    total = int(model["bytes_total"])
    if model["phase"] == "downloading" and total:
        line += f" {int(model['bytes_done']) / total:.0%}"
    line += f" [{model['code']}] {model['sentence']}" if model["code"] else ""
    # A device may say anything, and a terminal obeys what it is sent.
    return "".join(c if c.isprintable() else " " for c in line)


def _serving_words(serving: dict[str, Any]) -> str:
    """Return which variant answers where, and what it stands in for."""
    here = serving["variant"], serving["provider"]
    meant = serving["meant_variant"], serving["meant_provider"]
    words = f"{here[0]} on {here[1]}"
    words += f" under {serving['certificate']}" if serving["certificate"] else " uncertified"
    if any(meant) and meant != here:
        words += f" INSTEAD OF {meant[0]} on {meant[1]} ({serving['aside']})"
    return words


def example_lines(found: dict[str, Any]) -> Iterator[str]:
    """Return what is kept as a table."""
    if found["trouble"]:
        yield f"the last examples were not kept: {found['trouble']}"
    for one in found["models"]:
        oldest, newest = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one[end]))
            for end in ("oldest", "newest")
        )
        size = f"{one['bytes'] / 1e6:,.1f} MB"
        yield f"{one['model']:<20} {one['tenant']:<12} {one['examples']:>9,} {size:>12}  {oldest} to {newest}"
    if not found["quota_bytes"]:
        yield "this hub keeps no new examples: `fogline serve --examples-quota-bytes N` lets it"
    elif not found["models"]:
        yield "no example yet: `fogline-agent run --keep MODEL` lets the hub keep what escalates"


def echo(document: Any, as_json: bool, lines: Iterator[str]) -> None:
    """Print JSON or lines."""
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines))


def _away(url: HubUrl, error: aiohttp.ClientError) -> HubAway:
    """Return why nobody was reached, and what to do where that is known."""
    told = f"the hub at {url} cannot be reached: {error}"
    if isinstance(error, aiohttp.ClientConnectorCertificateError) and url.certificate:
        told = (
            f"what answers at {url} does not show the certificate that its hub wrote to "
            f"{ENDPOINTS}, or that has expired: {error.certificate_error}"
        )
    elif isinstance(error, aiohttp.ClientConnectorCertificateError):
        told += "; if its authority is your own, name its PEM file in SSL_CERT_FILE"
    elif isinstance(error, aiohttp.ServerDisconnectedError) and url.url.startswith("http:"):
        told += "; a hub with --tls-cert is named with --hub https://NAME:PORT"
    return HubAway(told)


def _refused(url: HubUrl, status: int, text: str) -> OperationRefused | HubAway:
    """Return what an answer that is none means: a hub says why, anything else is no hub."""
    try:
        document = json.loads(text)
        code = f" [{document['code']}]" if "code" in document else ""
        hint = "; commands read theirs from FOGLINE_TOKEN" if status == 401 else ""
        return OperationRefused(f"the hub refused{code}: {document['detail']}{hint}")
    except (ValueError, KeyError, TypeError):
        if status == 404:  # a hub says which of its things there is not
            return HubAway(
                f"what answers at {url} is no fogline hub, or one of another version: name the "
                "hub's HTTP door, which `fogline serve` prints as console"
            )
        return OperationRefused(f"the hub answered {status}: {text[:200]}")
