"""Reverse-map chains of x86's shadow MMU: which entries map a guest page.

Source: arch/x86/kvm/mmu/mmu.c (``struct pte_list_desc``, ``pte_list_add``, ``__kvm_rmap_lock``,
``kvm_rmap_age_gfn_range``), v6.12 and v6.15. Each page and level has a head. A single entry is kept
in the head itself, more of them in chunks of 14. To age a page is to walk its chain: no table is
descended, each entry is a cache miss of its own.

Since v6.15 an ageing walk holds a bit of the head instead of ``mmu_lock``. Nobody else walks the
chain then, and whoever adds or removes an entry, under ``mmu_lock``, waits for the bit. An empty
chain is not locked.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

PTE_LIST_EXT: Final = 14  #: entries in a chunk of a chain
HEADS: Final = 3  #: heads looked at for one page: of 4 KiB, 2 MiB and 1 GiB mappings

#: Values of ``ageing_lock`` that do without ``mmu_lock``.
WITHOUT_MMU_LOCK: Final = ("none", "rmap_bit")

Leaves = NDArray[np.int64]


def chain_ns(length: int, miss_ns: int, visit_ns: int) -> int:
    """What walking the chains of one page costs, ``length`` entries in all.

    The head and each entry and chunk are misses; heads of the larger levels are shared by
    neighbours and stay near.
    """
    chunks = -(-length // PTE_LIST_EXT) if length > 1 else 0
    return (1 + length + chunks) * miss_ns + (HEADS - 1) * visit_ns


class Held(NamedTuple):
    """Chains of ``leaves`` (ascending), locked one after the other.

    That of leaf number *k* is locked for ``busy_ns`` from ``start_ns + k * period_ns`` on.
    """

    leaves: Leaves
    start_ns: int
    period_ns: int
    busy_ns: int

    @property
    def end_ns(self) -> int:
        """When the last one is let go."""
        return self.start_ns + (len(self.leaves) - 1) * self.period_ns + self.busy_ns

    def wait_ns(self, leaf: int, t_ns: int) -> int:
        """How long somebody waits for the chain of ``leaf`` at ``t_ns``."""
        place = int(np.searchsorted(self.leaves, leaf))
        if place == len(self.leaves) or self.leaves[place] != leaf:
            return 0
        locked_ns = self.start_ns + place * self.period_ns
        return locked_ns + self.busy_ns - t_ns if 0 <= t_ns - locked_ns < self.busy_ns else 0


class RmapLocks:
    """The bit locks of one guest's chains, as ageing walks have planned to hold them."""

    def __init__(self) -> None:
        self._held: deque[Held] = deque()
        self.waits = 0

    def hold(self, held: Held) -> None:
        """An ageing walk will hold these chains; it tells when it begins."""
        while self._held and self._held[0].end_ns <= held.start_ns:
            self._held.popleft()
        self._held.append(held)

    def wait_ns(self, leaf: int, t_ns: int) -> int:
        """How long whoever changes the chain of ``leaf`` at ``t_ns`` waits for its bit."""
        waited = max((held.wait_ns(leaf, t_ns) for held in self._held), default=0)
        self.waits += waited > 0
        return waited

    def waits_of(self, leaves: Leaves, begins_ns: Leaves) -> Leaves:
        """What a walk that comes to each of ``leaves`` at ``begins_ns`` waits for its chain.

        A wait puts off those behind it; that is left out, one is shorter than a step of the walk.
        """
        waits = np.zeros(len(leaves), np.int64)
        for held in self._held:
            if not len(leaves) or held.end_ns <= begins_ns[0] or held.start_ns > begins_ns[-1]:
                continue
            _, mine, theirs = np.intersect1d(leaves, held.leaves, return_indices=True)
            into = begins_ns[mine] - held.start_ns - theirs * held.period_ns
            met = (into >= 0) & (into < held.busy_ns)
            waits[mine[met]] = held.busy_ns - into[met]
        self.waits += int(np.count_nonzero(waits))
        return waits
