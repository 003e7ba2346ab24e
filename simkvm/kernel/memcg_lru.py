"""The order in which memcgs are reclaimed from (``struct lru_gen_memcg``).

Source: include/linux/mmzone.h and mm/vmscan.c (``lru_gen_rotate_memcg``, ``shrink_many``), v6.12.
Three slots hold the memcgs of two generations, each in eight bins. Reclaim goes through the old
generation, from a bin that is drawn; who has been aged goes to the young one, and when the old one
is empty the young one takes its place. So each is reclaimed from once a round, however large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

MEMCG_NR_GENS: Final = 3
MEMCG_NR_BINS: Final = 8

NOP: Final = 0  #: what to do with a memcg, or its segment of a bin
HEAD: Final = 1
TAIL: Final = 2
OLD: Final = 3
YOUNG: Final = 4


class MemcgLru:
    """Memcgs by number; ``rng``: draws bins, as the kernel does."""

    def __init__(self, memcgs: int, rng: np.random.Generator) -> None:
        self._rng = rng
        self.seq = MEMCG_NR_GENS  # any will do
        self.fifo: list[list[list[int]]] = [
            [[] for _ in range(MEMCG_NR_BINS)] for _ in range(MEMCG_NR_GENS)
        ]
        self._bins = [0] * memcgs
        self.gens = [self.seq % MEMCG_NR_GENS] * memcgs
        self.segments = [NOP] * memcgs
        for memcg in range(memcgs):
            self._bins[memcg] = self.draw()
            self.fifo[self.gens[memcg]][self._bins[memcg]].append(memcg)

    def draw(self) -> int:
        """A bin."""
        return int(self._rng.integers(MEMCG_NR_BINS))

    @property
    def old(self) -> int:
        """The slot of the old generation."""
        return self.seq % MEMCG_NR_GENS

    def members(self, gen: int) -> int:
        """Memcgs in slot ``gen``."""
        return sum(map(len, self.fifo[gen]))

    def rotate(self, memcg: int, operation: int) -> None:
        """Move a memcg: to the head or the tail of its generation, or to the old or young one."""
        old = new = self.gens[memcg]
        if operation == OLD:
            new = self.seq % MEMCG_NR_GENS
        elif operation == YOUNG:
            new = (self.seq + 1) % MEMCG_NR_GENS
        self.segments[memcg] = operation if operation in (HEAD, TAIL) else NOP
        self.gens[memcg] = new
        self.fifo[old][self._bins[memcg]].remove(memcg)
        self._bins[memcg] = chosen = self.draw()
        if operation in (HEAD, OLD):
            self.fifo[new][chosen].insert(0, memcg)
        else:
            self.fifo[new][chosen].append(memcg)
        if old == self.old and not self.members(old):
            self.seq += 1
