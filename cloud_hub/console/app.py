"""Adds the console to the hub's HTTP door.

    GET  /                       overview              people
    GET  /devices, ...           fleet_pages.py        people
    POST /devices/{name}/forget  a device less         people
    GET  /models, /deploy, ...   release_pages.py      people
    POST /deploy                 what is wanted        people
    POST .../withdraw            what is certified     people
    GET  /login  POST /login     sign in               anyone
    POST /logout                 sign out              anyone
    GET  /api/v1/examples ...    examples_api.py       programs
    GET  /api/v1/overview        the same as JSON      programs
    GET  /api/v1/live            WebSocket             people, programs
    GET  /static/{digest}/...    scripts and styles    anyone

The rules of ``access.py`` hold for these routes and for no others. Bodies are held in the
application's ``rest_service.BODIES``.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from aiohttp import web

from cloud_hub.console.access import Audience, Authenticate, Door
from cloud_hub.console.api import Api, Insight
from cloud_hub.console.assets import Assets
from cloud_hub.console.examples_api import ExamplesApi
from cloud_hub.console.fleet_api import FleetApi
from cloud_hub.console.fleet_pages import DevicesTopic, DeviceTopic, FleetPages
from cloud_hub.console.live import Live
from cloud_hub.console.pages import OverviewTopic, Pages
from cloud_hub.console.release_pages import ReleasePages
from cloud_hub.console.roster import Roster
from cloud_hub.console.views import Model
from cloud_hub.fleet.devices import Devices
from cloud_hub.fleet.fleet import Fleet
from cloud_hub.insight.examples import Examples


def add_console(
    app: web.Application,
    *,
    history: Insight,
    devices: Devices,
    fleet: Fleet,
    scratch: Path,
    models: Callable[[], Iterable[Model]],
    examples: Examples,
    authenticate: Authenticate | None,
    hub_name: str,
    grpc_address: str,
    clock: Callable[[], float] = time.time,
) -> None:
    """Add the console's routes to ``app``.

    Args:
        app: the hub's HTTP door, before it starts.
        history: what the fleet did.
        devices: the devices and the rule of presence.
        fleet: releases, and what is wanted of devices.
        scratch: a folder for uploads.
        models: returns the models of the hub and their states.
        examples: what devices let the hub keep.
        authenticate: who a token stands for; None where only this machine reaches the hub.
        hub_name: how the hub calls itself.
        grpc_address: where agents find the hub, ``host:port``.
        clock: seconds since the epoch.
    """
    door = Door(authenticate, clock)
    assets = Assets()
    overview = OverviewTopic(history, models, clock)
    pages = Pages(overview, assets, door, hub_name=hub_name, grpc_address=grpc_address, clock=clock)
    api = Api(history, clock)
    roster = Roster(fleet.controller, devices, clock)
    table = DevicesTopic(roster, clock)
    device = DeviceTopic(roster, fleet.controller, fleet.certificates, history, clock)
    fleet_pages = FleetPages(pages, fleet, roster, table, device, clock)
    release_pages = ReleasePages(pages, fleet, roster, examples, door, clock)
    live = Live(
        {"overview": overview, "devices": table, "device": device},
        build=assets.digest,
        admits=door.admits,
    )

    for method, path, handler, audience in (
        ("GET", "/", pages.overview, Audience.PEOPLE),
        ("GET", "/login", pages.login, Audience.ANYONE),
        ("POST", "/login", pages.sign_in, Audience.ANYONE),
        ("POST", "/logout", pages.sign_out, Audience.ANYONE),
        ("GET", "/api/v1/overview", api.overview, Audience.PROGRAMS),
        # Anyone may knock: the WebSocket tells strangers by its close code, which is all that
        # a page can read of a refusal.
        ("GET", "/api/v1/live", live.serve, Audience.ANYONE),
        ("GET", "/static/{digest}/{name}", assets.serve, Audience.ANYONE),
        ("GET", "/favicon.ico", assets.icon, Audience.ANYONE),
    ):
        add = app.router.add_get if method == "GET" else app.router.add_post
        add(path, door.guarded(handler, audience))
    for method, path, page in (*fleet_pages.routes(), *release_pages.routes()):
        app.router.add_route(method, path, door.guarded(page, Audience.PEOPLE))
    for method, path, operate in FleetApi(fleet, devices, scratch, clock).routes():
        app.router.add_route(method, path, door.guarded(operate, Audience.PROGRAMS))
    for method, path, operate in ExamplesApi(examples, door).routes():
        app.router.add_route(method, path, door.guarded(operate, Audience.PROGRAMS))
    # Open sockets would hold the hub's drain until its time is up.
    app.on_shutdown.append(live.close)
