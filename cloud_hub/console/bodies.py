"""What comes with a request: forms and documents, given up as at the doors of inference.

They are held in the memory that all doors share. Who stops sending is given up after a minute,
sooner where others need the memory; so is an upload, which goes to the disk as it comes.
"""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from fogline_protocol import rest_bodies
from fogline_protocol.errors import DeadlineExceeded
from fogline_protocol.rest_service import BODIES

PIECE_BYTES = 1 << 20  # of an upload


async def read(request: web.Request, longest: int) -> bytes:
    """Return a body of at most ``longest`` bytes. Strangers may send one, so more is not read.

    Raises:
        InferenceError: it is too large, does not arrive, or there is no memory for it.
    """
    async with request.app[BODIES].arrived(request, longest) as body:
        return body


async def pieces(request: web.Request) -> AsyncIterator[bytes]:
    """Return an upload as it comes.

    Raises:
        DeadlineExceeded: it does not.
    """
    while True:
        try:
            async with asyncio.timeout(rest_bodies.ARRIVAL_S):
                piece = await request.content.read(PIECE_BYTES)
        except TimeoutError:
            raise DeadlineExceeded(
                f"nothing of the upload arrived for {rest_bodies.ARRIVAL_S:g} s"
            ) from None
        if not piece:
            return
        yield piece
