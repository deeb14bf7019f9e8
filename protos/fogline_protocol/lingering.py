"""The end of a connection, slow enough that its peer can read all of what it was sent.

A socket that is closed while its peer still sends answers with a reset, which takes along what the
peer has not read yet. TLS is worse: after its goodbye whatever arrives is an error, and asyncio
waits for the goodbye of the other side no longer than it was told, whatever is still to be sent.
So we say all there is to say, and close when the peer has it and has been quiet for a while.
"""

import asyncio
import contextlib
import fcntl
import sys
import termios

LINGER_S = 1.0  # of quiet after the peer has everything
UNREAD_S = 60.0  # for the peer to take it at all, and to become quiet


class Lingering:
    """Closes a transport that nothing more is written to; begins at once, unless its peer closes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        """Take ``transport`` over; what arrives on it is told to ``heard``, and to nobody else."""
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._quiet_since = self._loop.time()
        self._until = self._quiet_since + UNREAD_S
        if transport.can_write_eof():  # TLS cannot say that it only listens on
            with contextlib.suppress(OSError):  # the peer is gone already
                transport.write_eof()
        self._look()

    def heard(self) -> None:
        """Note that the peer still sends."""
        self._quiet_since = self._loop.time()

    def _look(self) -> None:
        transport, now = self._transport, self._loop.time()
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() or _unacknowledged(transport):
            self._quiet_since = now
        if now < self._until and now - self._quiet_since < LINGER_S:
            self._loop.call_later(LINGER_S / 20, self._look)
        else:
            transport.close()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel holds for the peer (Linux: TIOCOUTQ)."""
    found = transport.get_extra_info("socket")
    if found is None or found.fileno() < 0:
        return 0
    try:
        return int.from_bytes(
            fcntl.ioctl(found.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder
        )
    except OSError:
        return 0
