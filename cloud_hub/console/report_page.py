"""Serves a page that somebody else wrote: the workshop's ``report.html``.

It is shown as it came, and may have been written by anybody who may push a bundle. So the
browser is told to treat it as a document of no origin at all that may run nothing, send
nothing, fetch nothing and be framed by nobody. Its own styles and drawn pictures work; a link
in it works only when somebody follows it, and then says nothing of where it was.
"""

from collections.abc import Mapping

from aiohttp import web

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    # Browsers refuse to open a sandboxed document that wants a group of its own.
    "Cross-Origin-Opener-Policy": "unsafe-none",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def response(page: bytes) -> web.Response:
    """Return ``page``, UTF-8, as an answer that can do nothing."""
    return web.Response(body=page, content_type="text/html", charset="utf-8", headers=HEADERS)
