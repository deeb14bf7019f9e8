"""The commands ``fogline release``, ``certificate`` and ``device``: the fleet, over the hub's REST."""

import time
from pathlib import Path
from urllib.parse import quote

import click

from cloud_hub.command import CONFIG, DATA, HUB, JSON, run, url_of


@click.group()
def release() -> None:
    """Releases: bundles that the hub has accepted, numbered and signed."""


@release.command("push")
@CONFIG
@DATA
@HUB
@JSON
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
        made = await operate.push(url_of(config_file, data, hub), bundle, force=force)
        operate.echo(made, as_json, operate.release_lines([made]))

    run(work)


@release.command("list")
@CONFIG
@DATA
@HUB
@JSON
def release_list(
    config_file: Path | None, data: Path | None, hub: str | None, as_json: bool
) -> None:
    """List every release, newest first."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(url_of(config_file, data, hub), "GET", "/api/v1/releases")
        operate.echo(found, as_json, operate.release_lines(found))

    run(work)


@release.command("show")
@CONFIG
@DATA
@HUB
@click.argument("name", metavar="MODEL@NUMBER")
def release_show(config_file: Path | None, data: Path | None, hub: str | None, name: str) -> None:
    """Show one release in full, as JSON: contract, variants, lineage, certificates, report."""
    from cloud_hub import operate

    model, _, number = name.partition("@")

    async def work() -> None:
        path = f"/api/v1/releases/{quote(model, safe='')}/{quote(number or '0', safe='')}"
        found = await operate.call(url_of(config_file, data, hub), "GET", path)
        operate.echo(found, True, iter(()))

    run(work)


@click.group()
def certificate() -> None:
    """Certificates: what a local answer of a release may cost in quality, signed by this hub.

    They can be issued for a release that is out, replaced and withdrawn; its devices follow at
    once, without an update.
    """


@certificate.command("list")
@CONFIG
@DATA
@HUB
@JSON
@click.argument("name", metavar="[MODEL[@NUMBER]]", default="")
def certificate_list(
    config_file: Path | None, data: Path | None, hub: str | None, as_json: bool, name: str
) -> None:
    """List certificates, also withdrawn ones, the latest first."""
    from cloud_hub import operate

    model, _, number = name.partition("@")
    given = {"model": model, "release": number}

    async def work() -> None:
        url = url_of(config_file, data, hub)
        params = [(key, value) for key, value in given.items() if value]
        found = await operate.call(url, "GET", "/api/v1/certificates", params=params)
        operate.echo(found, as_json, operate.certificate_lines(found, time.time()))

    run(work)


@certificate.command("issue")
@CONFIG
@DATA
@HUB
@JSON
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
        made = await operate.issue(url_of(config_file, data, hub), name, files)
        operate.echo(made, as_json, operate.change_lines(made, time.time()))

    run(work)


@certificate.command("withdraw")
@CONFIG
@DATA
@HUB
@JSON
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
        url = url_of(config_file, data, hub)
        found = await operate.call(url, "POST", path, body={"reason": reason})
        operate.echo(found, as_json, operate.change_lines([found], time.time()))

    run(work)


@click.group()
def device() -> None:
    """Devices: what is wanted of them, and what they say."""


@device.command("list")
@CONFIG
@DATA
@HUB
@JSON
def device_list(
    config_file: Path | None, data: Path | None, hub: str | None, as_json: bool
) -> None:
    """List every device that has reported."""
    from cloud_hub import operate

    async def work() -> None:
        found = await operate.call(url_of(config_file, data, hub), "GET", "/api/v1/devices")
        operate.echo(found, as_json, operate.device_lines(found))

    run(work)


@device.command("show")
@CONFIG
@DATA
@HUB
@click.argument("name")
def device_show(config_file: Path | None, data: Path | None, hub: str | None, name: str) -> None:
    """Show one device in full, as JSON: desired, reported, and its latest changes."""
    from cloud_hub import operate

    async def work() -> None:
        path = f"/api/v1/devices/{quote(name, safe='')}"
        found = await operate.call(url_of(config_file, data, hub), "GET", path)
        operate.echo(found, True, iter(()))

    run(work)


@device.command("set")
@CONFIG
@DATA
@HUB
@JSON
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
        url = url_of(config_file, data, hub)
        found = await operate.call(url, "POST", "/api/v1/deployments", body=body)
        line = f"{found['release']} is wanted on {', '.join(found['devices']) or 'no device'}"
        operate.echo(found, as_json, iter([line]))

    run(work)


@device.command("unset")
@CONFIG
@DATA
@HUB
@JSON
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
        url = url_of(config_file, data, hub)
        found = await operate.call(url, "POST", "/api/v1/deployments/withdrawal", body=body)
        names = ", ".join(found["devices"])
        line = f"no release of {model} is wanted any more on {names}"
        if not names:
            line = f"no release of {model} was wanted there, so nothing changes"
        operate.echo(found, as_json, iter([line]))

    run(work)


@device.command("forget")
@CONFIG
@DATA
@HUB
@JSON
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
        url = url_of(config_file, data, hub)
        gone = []
        try:
            for name in names:
                path = f"/api/v1/devices/{quote(name, safe='')}"
                found = await operate.call(url, "DELETE", path)
                gone.append(found)
                if not as_json:
                    click.echo(f"{found['device']} is forgotten")
        finally:  # the next one may be unknown, and those before it are gone for good
            if as_json and gone:
                operate.echo(gone, True, iter(()))

    run(work)
