"""A list of an LRU: folios by number, in at one end and out at the other.

Pieces are arrays, so that moving or adding many costs as much as one. A folio that leaves a list
from its middle is not looked for: its entry stays and is stale. An entry carries the ticket that
the folio had when it was put there, and a folio gets a new ticket each time; who takes entries off
compares.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
TICKET_SHIFT: Final = 44  #: an entry is a folio's number and, above it, its ticket
NUMBER: Final = (1 << TICKET_SHIFT) - 1
NOBODY: Ids = np.empty(0, np.int64)


class FolioList:
    """Entries from the oldest to the newest."""

    __slots__ = ("_new", "_pieces")

    def __init__(self) -> None:
        self._pieces: deque[Ids] = deque()
        self._new: list[int] = []  # entries behind the last piece

    def append(self, entry: int) -> None:
        """Add one at the new end."""
        self._new.append(entry)

    def extend(self, entries: Ids) -> None:
        """Add several at the new end, the last one newest."""
        self._seal()
        if len(entries):
            self._pieces.append(entries)

    def extend_old(self, entries: Ids) -> None:
        """Add several at the old end, the first one oldest."""
        if len(entries):
            self._pieces.appendleft(entries)

    def take(self, most: int) -> Ids:
        """Take up to ``most`` off the old end, oldest first; stale ones among them."""
        self._seal()
        found: list[Ids] = []
        while most > 0 and self._pieces:
            piece = self._pieces.popleft()
            found.append(piece[:most])
            if len(piece) > most:
                self._pieces.appendleft(piece[most:])
            most -= len(found[-1])
        if not found:
            return NOBODY
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _seal(self) -> None:
        if self._new:
            self._pieces.append(np.array(self._new, np.int64))
            self._new = []

    def __len__(self) -> int:
        return sum(map(len, self._pieces)) + len(self._new)
