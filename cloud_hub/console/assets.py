"""Scripts and styles, under an address that changes with their content.

The address holds one digest over all files. So a browser may keep them for good, modules can
import each other by relative names, and a new release of the hub never meets an old script.
"""

import hashlib
from collections.abc import Mapping
from importlib import resources

from aiohttp import web

_TYPES = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class Assets:
    """The files of ``static/``, read once."""

    def __init__(self) -> None:
        self._files: Mapping[str, bytes] = {
            entry.name: entry.read_bytes()
            for entry in sorted(
                (resources.files("cloud_hub.console") / "static").iterdir(),
                key=lambda entry: entry.name,
            )
            if entry.is_file() and _type(entry.name)
        }
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        self.digest = digest.hexdigest()[:16]

    def url(self, name: str) -> str:
        """Return where a file is served.

        Raises:
            KeyError: there is no such file.
        """
        if name not in self._files:
            raise KeyError(name)
        return f"/static/{self.digest}/{name}"

    async def serve(self, request: web.Request) -> web.Response:
        """Answer ``GET /static/{digest}/{name}``."""
        content = self._files.get(request.match_info["name"])
        if content is None or request.match_info["digest"] != self.digest:
            raise web.HTTPNotFound(text="no such file in this release of the hub: reload the page")
        return web.Response(
            body=content,
            content_type=_type(request.match_info["name"]),
            charset="utf-8",
            headers={"Cache-Control": "public, max-age=31536000, immutable"},
        )

    async def icon(self, _request: web.Request) -> web.Response:
        """Answer ``GET /favicon.ico``, which browsers ask for on pages without a head of ours."""
        raise web.HTTPMovedPermanently(self.url("icon.svg"), headers={"Cache-Control": "no-cache"})


def _type(name: str) -> str:
    return _TYPES.get(name[name.rfind(".") :], "")
