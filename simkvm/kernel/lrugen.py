"""The lists of the multi-gen LRU, for a host whose memory can run out (mm/vmscan.c, v6.12).

Where memory is short generations are also lists, one for each type and generation, and eviction
takes folios off the oldest one. A folio that ageing promoted has the number of its new generation
but stays on its old list until eviction comes by and sorts it (``sort_folio``). The two types
share the youngest generation; each has an oldest of its own.

Folios are numbered through all guests of a memcg: ``base`` of a guest and the number of the leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.folio_list import NOBODY, NUMBER, TICKET_SHIFT, FolioList, Ids
from simkvm.kernel.mglru import (
    MAX_LRU_BATCH,
    MAX_NR_GENS,
    MIN_LRU_BATCH,
    MIN_NR_GENS,
    LruGen,
    Lruvec,
)

ANON: Final = 0
FILE: Final = 1
TYPES: Final = (ANON, FILE)
ABSENT: Final = 255  #: the list of a folio that is on none,
NO_SHADOW: Final = -1
ISOLATED: Final = 254  #: or that somebody has taken off to look at it


class ListedLruvec(Lruvec):
    """Generations of one memcg as lists; ``leaves`` of each guest, and its type."""

    def __init__(self, guests: Sequence[tuple[int, int]], two_step: bool, line: LineCosts) -> None:
        super().__init__()
        self.listed_guests: list[ListedLruGen] = []
        self.min_seqs = [0, 0]
        self.lock = CacheLine(line)  #: the lruvec's spin lock: served first come, first served
        leaves = sum(n for n, _ in guests)
        self.generation: NDArray[np.uint8] = np.zeros(leaves, np.uint8)
        self.listed: NDArray[np.uint8] = np.full(leaves, ABSENT, np.uint8)
        self.referenced: NDArray[np.bool_] = np.zeros(leaves, np.bool_)
        self.ticket: NDArray[np.uint8] = np.zeros(leaves, np.uint8)
        self.lists = [[FolioList() for _ in range(MAX_NR_GENS)] for _ in TYPES]
        self.on_list = [[0] * MAX_NR_GENS for _ in TYPES]  #: folios on each, stale entries apart
        self.bases: NDArray[np.int64] = np.cumsum([0, *(n for n, _ in guests)], dtype=np.int64)
        for number, (_, of_type) in enumerate(guests):
            self.listed_guests.append(ListedLruGen(self, number, of_type, two_step))
        self.guests = list(self.listed_guests)

    # -- generations ----------------------------------------------------------------------------

    @property
    def types(self) -> list[int]:
        """The types of folios that there are."""
        return sorted({lru.of_type for lru in self.listed_guests})

    def nr_gens(self, of_type: int) -> int:
        """Generations that a type has."""
        return self.max_seq - self.min_seqs[of_type] + 1

    def sizes_of(self, of_type: int) -> list[int]:
        """Folios of a type in each generation, by its number modulo four."""
        ours = [lru.sizes for lru in self.listed_guests if lru.of_type == of_type]
        return [sum(sizes) for sizes in zip(*ours, strict=True)] if ours else [0] * MAX_NR_GENS

    def inc_max_seq(self) -> int:
        """Open a new generation; returns how many folios had to be moved up first."""
        moved = sum(self.inc_min_seq(t) for t in TYPES if self.nr_gens(t) == MAX_NR_GENS)
        self.max_seq += 1
        self.min_seq = min(self.min_seqs[t] for t in self.types)
        return moved

    def inc_min_seq(self, of_type: int) -> int:
        """Empty the oldest generation of a type into the next; returns how many folios moved.

        One after the other goes to the old end of its new list (``list_move_tail``), which turns
        their order round.
        """
        oldest = self.min_seqs[of_type] % MAX_NR_GENS
        ids = self._valid(self.lists[of_type][oldest].take(1 << 62), oldest)
        following = (oldest + 1) % MAX_NR_GENS
        stay = self.generation[ids] == oldest
        self._regenerate(ids[stay], following)
        for generation in range(MAX_NR_GENS):
            part = ids[self.generation[ids] == generation]
            self._relist(part[::-1], of_type, generation, old_end=True)
        self.min_seqs[of_type] += 1
        return len(ids)

    def advance_min_seq(self) -> bool:
        """Step over generations that are empty (``try_to_inc_min_seq``); whether any was."""
        before = list(self.min_seqs)
        ends = list(before)
        for of_type in TYPES:
            while ends[of_type] + MIN_NR_GENS <= self.max_seq:
                if self.on_list[of_type][ends[of_type] % MAX_NR_GENS]:
                    break
                ends[of_type] += 1
        # Swap is on: the anonymous type must not be ahead of the other one.
        ends[ANON] = min(ends)
        ends[FILE] = max(ends[ANON], before[FILE])
        self.min_seqs = ends
        self.min_seq = min(ends[t] for t in self.types)
        return ends != before

    def should_run_aging(self) -> tuple[bool, int]:
        """Whether eviction should age first, and how many folios there are.

        It should if the oldest type has no generation but the two youngest; with three, if the
        youngest holds more than half of the folios or the oldest less than a quarter.
        """
        types = self.types
        sizes = [sum(each) for each in zip(*map(self.sizes_of, types), strict=True)]
        total = sum(sizes)
        oldest = min(self.min_seqs[t] for t in types)
        if oldest + MIN_NR_GENS > self.max_seq:
            return True, 0
        if oldest + MIN_NR_GENS < self.max_seq:
            return False, total
        young = sizes[self.max_seq % MAX_NR_GENS]
        old = sizes[(self.max_seq - MIN_NR_GENS) % MAX_NR_GENS]
        return young * MIN_NR_GENS > total or old * (MIN_NR_GENS + 2) < total, total

    # -- eviction -------------------------------------------------------------------------------

    def scan(self, of_type: int) -> tuple[Ids, int]:
        """Take a batch off the oldest generation of a type (``scan_folios``).

        Stops at 64 isolated or 4096 examined. Folios that were promoted go to the list of their
        generation. Returns what was isolated, oldest first, and how many were examined.
        """
        oldest = self.min_seqs[of_type] % MAX_NR_GENS
        source = self.lists[of_type][oldest]
        found: list[Ids] = []
        examined = isolated = 0
        while isolated < MIN_LRU_BATCH and examined < MAX_LRU_BATCH:
            entries = source.take(min(MIN_LRU_BATCH - isolated, MAX_LRU_BATCH - examined))
            if not len(entries):
                break
            ids = self._valid(entries, oldest)
            examined += len(ids)
            now = self.generation[ids]
            for generation in np.unique(now[now != oldest]).tolist():
                self._relist(ids[now == generation], of_type, generation)
            taken = ids[now == oldest]
            self._isolate(taken)
            found.append(taken)
            isolated += len(taken)
        return (np.concatenate(found) if found else NOBODY), examined

    def putback(self, ids: Ids, seq: int, old_end: bool = False) -> None:
        """Isolated folios, all of one type, go back to generation ``seq``, if still there."""
        ids = ids[self.listed[ids] == ISOLATED]
        self._put(ids, seq, old_end)

    def _put(self, ids: Ids, seq: int, old_end: bool = False) -> None:
        if not len(ids):
            return
        of_type = self.owner(int(ids[0])).of_type
        generation = seq % MAX_NR_GENS
        self.generation[ids] = generation
        for lru, part in self.by_guest(ids):
            lru.sizes[generation] += len(part)
        self._relist(ids, of_type, generation, old_end, were_listed=False)

    def by_guest(self, ids: Ids) -> list[tuple[ListedLruGen, Ids]]:
        """Cut folios by the guest that they belong to, in the order of guests."""
        if len(self.listed_guests) == 1:
            return [(self.listed_guests[0], ids)] if len(ids) else []
        owners = np.searchsorted(self.bases, ids, side="right") - 1
        return [(self.listed_guests[n], ids[owners == n]) for n in np.unique(owners).tolist()]

    def guest_of(self, folio: int) -> int:
        """The number of the guest that a folio belongs to."""
        return int(np.searchsorted(self.bases, folio, side="right")) - 1

    def owner(self, folio: int) -> ListedLruGen:
        """The guest that a folio belongs to."""
        return self.listed_guests[self.guest_of(folio)]

    # -- lists ----------------------------------------------------------------------------------

    def _valid(self, entries: Ids, generation: int) -> Ids:
        """The folios of entries that are not stale, taken off the list ``generation``."""
        ids = entries & NUMBER
        tickets = (entries >> TICKET_SHIFT).astype(np.uint8)
        there = (self.listed[ids] == generation) & (self.ticket[ids] == tickets)
        valid: Ids = ids[there]
        return valid

    def _relist(
        self,
        ids: Ids,
        of_type: int,
        generation: int,
        old_end: bool = False,
        were_listed: bool = True,
    ) -> None:
        """Put folios, all on one list of their type or on none, on another one."""
        if not len(ids):
            return
        if were_listed:
            self.on_list[of_type][int(self.listed[ids[0]])] -= len(ids)
        self.on_list[of_type][generation] += len(ids)
        self.ticket[ids] += np.uint8(1)
        self.listed[ids] = generation
        entries = ids | (self.ticket[ids].astype(np.int64) << TICKET_SHIFT)
        target = self.lists[of_type][generation]
        if old_end:
            target.extend_old(entries)
        else:
            target.extend(entries)

    def _regenerate(self, ids: Ids, generation: int) -> None:
        """Give folios another generation; their lists stay."""
        for lru, part in self.by_guest(ids):
            lru.uncount(part)
            lru.sizes[generation] += len(part)
        self.generation[ids] = generation

    def _isolate(self, ids: Ids) -> None:
        for lru, part in self.by_guest(ids):
            lru.uncount(part)
            self.on_list[lru.of_type][int(self.listed[part[0]])] -= len(part)
        self.listed[ids] = ISOLATED


class ListedLruGen(LruGen):
    """One guest's folios on the lists of ``lruvec``."""

    def __init__(self, lruvec: ListedLruvec, number: int, of_type: int, two_step: bool) -> None:
        self.base = int(lruvec.bases[number])
        end = int(lruvec.bases[number + 1])
        super().__init__(end - self.base, two_step)
        self.lruvec = self._lists = lruvec
        self.of_type = of_type
        self._generation = lruvec.generation[self.base : end]
        self._referenced = lruvec.referenced[self.base : end]
        self._listed = lruvec.listed[self.base : end]
        self._fast_ticket = memoryview(lruvec.ticket)[self.base : end]  # type: ignore[arg-type]
        self._shadows: NDArray[np.int32] = np.full(end - self.base, NO_SHADOW, np.int32)
        self._fast_listed = memoryview(self._listed)  # type: ignore[arg-type]  # a buffer
        self._fast = memoryview(self._generation)  # type: ignore[arg-type]  # a buffer

    def add(self, leaf: int) -> None:
        """A fault brought ``leaf`` in, or mapped it again: then it may be on a list already."""
        lruvec = self._lists
        if self._fast_listed[leaf] != ABSENT:
            if self._fast_listed[leaf] != ISOLATED:
                self.promote(np.array([leaf]))
            return
        youngest = lruvec.max_seq % MAX_NR_GENS
        self._fast[leaf] = youngest
        self._fast_listed[leaf] = youngest
        self._fast_ticket[leaf] = ticket = (self._fast_ticket[leaf] + 1) & 0xFF
        self.sizes[youngest] += 1
        lruvec.on_list[self.of_type][youngest] += 1
        lruvec.lists[self.of_type][youngest].append((self.base + leaf) | (ticket << TICKET_SHIFT))

    def add_all(self, first: int, last: int) -> None:
        """As :meth:`add`, for the leaves ``first`` up to ``last``."""
        self.add_many(np.arange(first, last, dtype=np.int64))

    def add_many(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, none present) were brought in, in this order."""
        self._lists._put(leaves + self.base, self._lists.max_seq)

    def remove(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, all present) were freed; an isolated one is its isolator's."""
        self._listed[leaves[self._listed[leaves] == ISOLATED]] = ABSENT
        leaves = leaves[self._listed[leaves] != ABSENT]
        counts = np.bincount(self._listed[leaves], minlength=MAX_NR_GENS)
        for generation, gone in enumerate(counts.tolist()):
            self._lists.on_list[self.of_type][generation] -= gone
        self.uncount(leaves + self.base)
        self._listed[leaves] = ABSENT
        self._referenced[leaves] = False

    def promote(self, leaves: NDArray[np.int64]) -> int:
        """As :meth:`LruGen.promote`: lists stay as they are, and isolated folios are left alone."""
        leaves = leaves[self._listed[leaves] < ISOLATED]
        if self._two_step:
            first = ~self._referenced[leaves]
            self._referenced[leaves[first]] = True
            leaves = leaves[~first]
        youngest = self.max_seq % MAX_NR_GENS
        self._referenced[leaves] = False
        leaves = leaves[self._generation[leaves] != youngest]
        self.uncount(leaves + self.base)
        self._generation[leaves] = youngest
        self.sizes[youngest] += len(leaves)
        return len(leaves)

    def all_old(self) -> None:
        """Ageing came by often enough for all folios to be in the oldest generation."""
        leaves = np.flatnonzero(self._listed < ISOLATED)
        self.remove(leaves)
        self._lists._put(leaves + self.base, self._lists.min_seqs[self.of_type])

    def rotate(self, leaf: int) -> None:
        """The page of ``leaf`` is clean at last: eviction shall find it next."""
        if self._fast_listed[leaf] < ISOLATED:
            self.remove(np.array([leaf]))
            oldest = self._lists.min_seqs[self.of_type]
            self._lists._put(np.array([self.base + leaf]), oldest, old_end=True)

    def evicted(self, leaf: int) -> None:
        """The isolated folio of ``leaf`` is gone; a shadow says when (``lru_gen_eviction``)."""
        self._fast_listed[leaf] = ABSENT
        self._shadows[leaf] = self._lists.min_seqs[self.of_type]

    def refault(self, leaf: int) -> bool:
        """The page of ``leaf`` is read again: whether it went a short time ago."""
        shadow = int(self._shadows[leaf])
        self._shadows[leaf] = NO_SHADOW
        return shadow == self._lists.min_seqs[self.of_type]

    def uncount(self, ids: Ids) -> None:
        """Folios, by their numbers in the lruvec, leave their generations."""
        now = np.bincount(self._lists.generation[ids], minlength=MAX_NR_GENS)
        for number, gone in enumerate(now.tolist()):
            self.sizes[number] -= gone
