"""Decides where in a piece of shared memory a large request lies.

Pure: it gives out ranges and takes them back. First fit, neighbours joined: requests are few,
large and short-lived, so the list of gaps stays short.
"""

import bisect

ALIGNMENT = 4096  # whole pages, so that two requests never share one


class Arena:
    """The free ranges of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self._gaps: list[tuple[int, int]] = [(0, size)]  # offset, length; ascending, never adjacent

    @property
    def free(self) -> int:
        """How many bytes are free, in all gaps together."""
        return sum(length for _, length in self._gaps)

    def take(self, size: int) -> int | None:
        """Return the offset of ``size`` bytes that are nobody else's; None if there is no room."""
        wanted = _rounded(size)
        for index, (offset, length) in enumerate(self._gaps):
            if length >= wanted:
                if length == wanted:
                    del self._gaps[index]
                else:
                    self._gaps[index] = (offset + wanted, length - wanted)
                return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Take back what ``take(size)`` gave out at ``offset``."""
        length = _rounded(size)
        index = bisect.bisect(self._gaps, (offset, 0))
        if index < len(self._gaps) and offset + length == self._gaps[index][0]:
            length += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == offset:
            before, its_length = self._gaps.pop(index - 1)
            self._gaps.insert(index - 1, (before, its_length + length))
        else:
            self._gaps.insert(index, (offset, length))


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
