"""Which page tables are worth walking: two Bloom filters of one lruvec.

Source: mm/vmscan.c (``struct lru_gen_mm_state``, ``test_bloom_filter``, ``update_bloom_filter``),
v6.12. A walk for generation ``seq`` asks the filter of ``seq`` and fills that of ``seq + 1``; the
two take turns. A filter that is not there lets everything pass. A table is known by where its entry
lies, so here by guest and number; its two bits come from the halves of one hash of that
(lib/hash.c, ``hash_64``), which makes a false positive a matter of arithmetic and not of chance.
"""

from __future__ import annotations

from typing import Final

from simkvm.kernel.vmstat import Vmstat

NR_BLOOM_FILTERS: Final = 2
BLOOM_FILTER_SHIFT: Final = 15
GOLDEN_RATIO_64: Final = 0x61C8864680B583EB
PMD_BYTES: Final = 8  #: an entry's address tells it from its neighbours
TABLES_APART: Final = 1 << 40  #: between two guests: addresses of different page tables


def keys(guest: int, table: int) -> tuple[int, int]:
    """The two bits of host table number ``table`` of a guest (``get_item_key``)."""
    address = (guest + 1) * TABLES_APART + table * PMD_BYTES
    hashed = (address * GOLDEN_RATIO_64) % (1 << 64) >> (64 - 2 * BLOOM_FILTER_SHIFT)
    mask = (1 << BLOOM_FILTER_SHIFT) - 1
    return hashed & mask, hashed >> BLOOM_FILTER_SHIFT


class BloomFilters:
    """The filters; ``vmstat`` counts what tests come to."""

    def __init__(self, vmstat: Vmstat) -> None:
        self._vmstat = vmstat
        self._bits: list[bytearray | None] = [None] * NR_BLOOM_FILTERS
        self._members: list[set[tuple[int, int]]] = [set() for _ in range(NR_BLOOM_FILTERS)]

    def reset(self, seq: int) -> None:
        """Empty the filter of ``seq``, for a walk that begins to fill it."""
        self._bits[seq % NR_BLOOM_FILTERS] = bytearray((1 << BLOOM_FILTER_SHIFT) // 8)
        self._members[seq % NR_BLOOM_FILTERS].clear()

    def add(self, seq: int, guest: int, table: int) -> None:
        """A table is worth walking for generation ``seq``."""
        bits = self._bits[seq % NR_BLOOM_FILTERS]
        if bits is None:
            return
        self._members[seq % NR_BLOOM_FILTERS].add((guest, table))
        for key in keys(guest, table):
            bits[key >> 3] |= 1 << (key & 7)

    def passes(self, seq: int, guest: int, table: int) -> bool:
        """Whether a walk for generation ``seq`` should look at a table."""
        bits = self._bits[seq % NR_BLOOM_FILTERS]
        if bits is None:
            return True
        found = all(bits[key >> 3] >> (key & 7) & 1 for key in keys(guest, table))
        added = (guest, table) in self._members[seq % NR_BLOOM_FILTERS]
        self._vmstat.lru_gen_tables_passed += found
        self._vmstat.lru_gen_tables_skipped += not found
        self._vmstat.lru_gen_false_positives += found and not added
        return found
