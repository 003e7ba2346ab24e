"""The list of address spaces of one memcg, which walkers for one lruvec go through together.

Source: mm/vmscan.c (``iterate_mm_list``, ``get_next_mm``, ``iterate_mm_list_nowalk``), v6.12. Each
walker takes the next one off; who comes to the end ends the iteration, and it alone may open a
generation, whether or not others are still walking what they took.
"""

from __future__ import annotations

from collections.abc import Callable

from simkvm.kernel.bloom import BloomFilters
from simkvm.kernel.mglru import MIN_NR_GENS
from simkvm.kernel.vmstat import Vmstat


class MmList:
    """``length`` address spaces, by number; the state is the lruvec's (``lru_gen_mm_state``)."""

    def __init__(self, length: int, vmstat: Vmstat) -> None:
        self.length = length
        self.filters = BloomFilters(vmstat)
        self.seq = MIN_NR_GENS  #: the last generation that was walked for
        self._head: int | None = None  # the last one taken
        self._tail: int | None = None  # the first one that no iteration has come to yet

    def next(
        self, seq: int, forced: bool, wanted: Callable[[int, bool], bool]
    ) -> tuple[int | None, bool, bool]:
        """Take the next one for a walk for generation ``seq``.

        ``wanted``: whether to take the one of a number, and whether by force. Returns its number
        or None, whether the iteration ended with this, and whether the walk is forced from now on:
        what was added since the last iteration is always looked at.
        """
        if seq <= self.seq:
            return None, False, forced
        first = self._head is None
        head = -1 if self._head is None else self._head
        while True:
            head += 1
            if head == self.length:
                self._end()
                return None, True, forced
            self._head = head
            if self._tail is None or self._tail == head:
                self._tail = head + 1
                forced = True
            if wanted(head, forced):
                break
        if first:
            self.filters.reset(seq + 1)
        return head, False, forced

    def skip(self, seq: int) -> bool:
        """End the iteration for ``seq`` without a walk; False if somebody has."""
        if seq <= self.seq:
            return False
        self._tail = None
        self._end()
        return True

    def opened(self, seq: int) -> None:
        """The generation ``seq`` is not the youngest any more."""
        if seq > self.seq:
            self.seq = seq
            self._head = None

    def _end(self) -> None:
        self.seq += 1
        self._head = None
