"""The fleet's operator in the demo: the same calls that ``fogline release`` and ``device`` make."""

import asyncio
import time
from pathlib import Path
from typing import Any

from cloud_hub import operate
from deploy.demo.fleet import Fleet

LIMIT_S = 60.0  # for all devices to follow; usually a few seconds


class Operator:
    """Pushes releases, wants them on all devices, and waits for what devices report."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def push(self, bundle: Path, *, force: bool = False) -> str:
        """Make a bundle a release and return its name, ``MODEL@NUMBER``.

        Raises:
            OperationRefused: the hub does not want it.
        """
        made = await operate.push(self._url, bundle, force=force)
        return str(made["release"])

    async def want(self, release: str) -> None:
        """Want a release on all devices."""
        body = {"release": release, "devices": None}
        await operate.call(self._url, "POST", "/api/v1/deployments", body=body)

    async def devices(self) -> list[dict[str, Any]]:
        """Return every device as the hub knows it."""
        found: list[dict[str, Any]] = await operate.call(self._url, "GET", "/api/v1/devices")
        return found

    async def until_committed(self, release: str) -> int:
        """Return how many devices have committed to the release, once all have or time is up."""
        number = release.partition("@")[2]

        def arrived(model: dict[str, Any]) -> bool:
            return bool(model["active_release"] == number and model["phase"] == "committed")

        return len(await self._until(release, arrived))

    async def until_refused(self, release: str) -> dict[str, str]:
        """Return the codes with which devices refused the release, by device."""
        number = release.partition("@")[2]

        def refused(model: dict[str, Any]) -> bool:
            return bool(
                model["desired_release"] == number
                and model["active_release"] != number
                and model["phase"] == "rejected"
            )

        found = await self._until(release, refused)
        return {device: str(model["code"]) for device, model in found.items()}

    async def _until(self, release: str, holds: Any) -> dict[str, dict[str, Any]]:
        name = release.partition("@")[0]
        limit = time.monotonic() + LIMIT_S
        while True:
            found = {
                device["name"]: model
                for device in await self.devices()
                for model in device["models"]
                if model["model"] == name and holds(model)
            }
            if len(found) == len(self._fleet.agents) or time.monotonic() > limit:
                return found
            await asyncio.sleep(0.1)

    @property
    def _url(self) -> operate.HubUrl:
        return operate.hub_url(None, self._fleet.hub.data)
