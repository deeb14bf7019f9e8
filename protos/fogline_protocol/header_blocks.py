"""Header blocks of HTTP/2: reads those of a peer, writes ours without any state.

Reading is ``hpack``'s work, but a caller sends the same few blocks over and over, so whole blocks
are remembered. What a block means depends on the dynamic table: what is remembered holds only
until the table changes, and a block that changed it itself is not remembered.

Ours are literals that no table remembers (RFC 7541, 6.2.2), so there is nothing to keep in step,
and they can be made ahead of time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import hpack
from hpack.hpack import Decoder
from hpack.table import HeaderTable

Headers = Sequence[tuple[bytes, bytes]]
Head = TypeVar("Head")

REMEMBERED = 64  # blocks of one connection
SIZE_UPDATES = 16  # of a table in one block
REMEMBERED_BYTES = 1024  # of one block; longer ones are seldom sent twice


class BadBlock(Exception):
    """The table is out of step from here on: the connection must end."""


class TooLong(BadBlock):
    """More than we promised to take, after decompression."""


class _Table(HeaderTable):
    """Counts its changes."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0
        self.updates = 0  # of its size, in this block

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    @property
    def maxsize(self) -> int:
        return self._maxsize

    @maxsize.setter
    def maxsize(self, size: int) -> None:
        self.changes += 1
        self.updates += 1
        # RFC 7541, 4.2 needs two at most; a block of nothing else costs us far more than its peer.
        if self.updates > SIZE_UPDATES:
            raise hpack.HPACKDecodingError("too many table size updates in a block")
        HeaderTable.maxsize.fset(self, size)  # type: ignore[attr-defined]


class BlockReader(Generic[Head]):
    """Reads the blocks of one connection, in their order.

    ``interpret`` makes of a list of headers whatever their reader needs; it is remembered too, so
    it must depend on nothing else.
    """

    def __init__(self, interpret: Callable[[Headers], Head], max_bytes: int) -> None:
        self._interpret = interpret
        self._decoder = Decoder(max_bytes)
        self._table = self._decoder.header_table = _Table()
        self._known: dict[bytes, Head] = {}
        self._known_at = 0  # changes of the table when it was found out

    def read(self, block: bytes) -> Head:
        """Return what ``interpret`` made of a block.

        Raises:
            BadBlock: it cannot be read, or is too long.
        """
        if self._known_at == self._table.changes and (known := self._known.get(block)) is not None:
            return known
        before = self._table.changes
        self._table.updates = 0
        try:
            headers = [(bytes(n), bytes(v)) for n, v in self._decoder.decode(block, raw=True)]
        except hpack.OversizedHeaderListError as error:
            raise TooLong(str(error)) from None
        except (hpack.HPACKError, IndexError):  # the second for some that end early
            raise BadBlock("a header block cannot be read") from None
        head = self._interpret(headers)
        if self._table.changes != self._known_at:
            self._known.clear()
            self._known_at = self._table.changes
        if before == self._table.changes and len(block) <= REMEMBERED_BYTES:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[block] = head
        return head


def write(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a block that leaves every table as it is."""
    parts: list[bytes] = []
    for name, value in headers:
        parts += (b"\x00", _length(len(name)), name, _length(len(value)), value)
    return b"".join(parts)


def _length(length: int) -> bytes:
    """Return a length as RFC 7541, 5.1 has it: a 7-bit prefix whose highest bit (Huffman) is 0."""
    if length < 127:
        return bytes((length,))
    parts, length = [127], length - 127
    while length >= 128:
        parts.append(length & 127 | 128)
        length >>= 7
    return bytes((*parts, length))
