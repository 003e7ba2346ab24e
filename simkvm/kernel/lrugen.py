"""The lists of the multi-gen LRU, for a host whose memory can run out (mm/vmscan.c, v6.12).

Where memory is short generations are also lists, one for each type and generation, and eviction
takes folios off the oldest one. A folio that ageing promoted has the number of its new generation
but stays on its old list until eviction comes by and sorts it (``sort_folio``). The two types
share the youngest generation; each has an oldest of its own.

Folios are numbered through all guests of a memcg: ``base`` of a guest and the number of the leaf.
How often each was used is a state of four bits (:mod:`simkvm.kernel.lru_tiers`). An evicted folio
leaves a shadow: that state, and a generation to tell by when it comes back whether it was gone for
a short time (mm/workingset.c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.folio_list import NOBODY, TICKET_SHIFT, Ids
from simkvm.kernel.listed import (
    ABSENT,
    ANON,
    DEFAULT_SWAPPINESS,
    FILE,
    ISOLATED,
    MAX_SWAPPINESS,
    NO_SHADOW,
    TYPES,
    FolioLists,
    ListedLru,
)
from simkvm.kernel.lru_tiers import (
    MAX_NR_TIERS,
    REFERENCED,
    STATES,
    WORKINGSET,
    Controller,
    may_evict,
    rules,
)
from simkvm.kernel.mglru import (
    MAX_LRU_BATCH,
    MAX_NR_GENS,
    MIN_LRU_BATCH,
    MIN_NR_GENS,
)
from simkvm.kernel.mm_list import MmList
from simkvm.kernel.vmstat import Vmstat
from simkvm.units import DURATION_NS

IDLE_NS: Final = DURATION_NS["h"]  #: how long ago the last generation of an idle guest began


def evictable(swappiness: int) -> tuple[int, ...]:
    """Types that may be evicted: no anonymous ones with a swappiness of 0, none but them at 201."""
    if not swappiness:
        return (FILE,)
    return (ANON,) if swappiness > MAX_SWAPPINESS else TYPES


class ListedLruvec(FolioLists):
    """Generations of one memcg as lists; ``guests``: leaves of each, and its type of folios.

    ``two_step``: the rules since v6.14. ``now``: the time, for the ages of generations.
    """

    def __init__(
        self,
        guests: Sequence[tuple[int, int]],
        two_step: bool,
        line: LineCosts,
        now: Callable[[], int] = lambda: 0,
        vmstat: Vmstat | None = None,
    ) -> None:
        super().__init__(guests, MAX_NR_GENS, line, vmstat)
        self.rules = rules(two_step)
        self.min_seqs = [0, 0]
        self.controllers = [Controller(self.rules) for _ in TYPES]
        self.mms = MmList(len(guests), self.vmstat)
        self.now = now
        self.birth_ns = [now()] * MAX_NR_GENS  #: of each generation, by its number modulo four
        self.generation: NDArray[np.uint8] = np.zeros(len(self.listed), np.uint8)
        self.listed_guests: list[ListedLruGen] = []
        for number, (_, of_type) in enumerate(guests):
            self.listed_guests.append(ListedLruGen(self, number, of_type, two_step))
        self.guests = list(self.listed_guests)

    # -- generations ----------------------------------------------------------------------------

    def nr_gens(self, of_type: int) -> int:
        """Generations that a type has."""
        return self.max_seq - self.min_seqs[of_type] + 1

    def sizes_of(self, of_type: int) -> list[int]:
        """Folios of a type in each generation, by its number modulo four."""
        ours = [lru.sizes for lru in self.listed_guests if lru.of_type == of_type]
        return [sum(sizes) for sizes in zip(*ours, strict=True)] if ours else [0] * MAX_NR_GENS

    def inc_max_seq(self, swappiness: int = DEFAULT_SWAPPINESS) -> int:
        """Open a new generation; returns how many folios had to be moved up first."""
        moved = sum(
            self.inc_min_seq(of_type, of_type in evictable(swappiness))
            for of_type in reversed(TYPES)
            if self.nr_gens(of_type) == MAX_NR_GENS
        )
        self.mms.opened(self.max_seq)
        self.max_seq += 1
        self.birth_ns[self.max_seq % MAX_NR_GENS] = self.now()
        self._min_seqs_moved()
        return moved

    def inc_min_seq(self, of_type: int, moves: bool = True) -> int:
        """Empty the oldest generation of a type into the next; returns how many folios moved.

        One after the other goes to the old end of its new list (``list_move_tail``), which turns
        their order round. Those of a type that cannot be evicted stay where they are. Since v6.14
        those that move count as protected.
        """
        oldest = self.min_seqs[of_type] % MAX_NR_GENS
        ids = NOBODY
        if moves:
            ids = self._valid(self.lists[of_type][oldest].take(1 << 62), oldest)
            if self.rules.two_step:
                self._count_protected(self.states[ids], of_type)
            stay = self.generation[ids] == oldest
            self._move_up(ids[stay], (oldest + 1) % MAX_NR_GENS)
            for generation in range(MAX_NR_GENS):
                part = ids[self.generation[ids] == generation]
                self._relist(part[::-1], of_type, generation, old_end=True)
        self.controllers[of_type].carry_over()
        self.min_seqs[of_type] += 1
        return len(ids)

    def advance_min_seq(self, swappiness: int = DEFAULT_SWAPPINESS) -> bool:
        """Step over generations that are empty (``try_to_inc_min_seq``); whether any was."""
        before = list(self.min_seqs)
        ends = list(before)
        types = evictable(swappiness)
        for of_type in types:
            while ends[of_type] + MIN_NR_GENS <= self.max_seq:
                if self.on_list[of_type][ends[of_type] % MAX_NR_GENS]:
                    break
                ends[of_type] += 1
        if types == TYPES:
            self._keep_together(ends, before)
        for of_type in types:
            if ends[of_type] > before[of_type]:
                self.controllers[of_type].carry_over()
                self.min_seqs[of_type] = ends[of_type]
        self._min_seqs_moved()
        return self.min_seqs != before

    def _keep_together(self, ends: list[int], before: list[int]) -> None:
        """The types' oldest generations must not be too far apart."""
        if not self.rules.two_step:  # the anonymous type's must not be ahead of the other's
            ends[ANON] = min(ends)
            ends[FILE] = max(ends[ANON], before[FILE])
            return
        seq = self.max_seq - MIN_NR_GENS
        for one, other in (TYPES, TYPES[::-1]):
            if ends[one] > seq and ends[other] < seq:
                ends[one] = seq
                break

    def _min_seqs_moved(self) -> None:
        self.min_seq = min(self.min_seqs[of_type] for of_type in self.types)

    def oldest(self, swappiness: int) -> int:
        """The number of the oldest generation that may be evicted."""
        if self.rules.two_step:
            return min(self.min_seqs[of_type] for of_type in evictable(swappiness))
        return self.min_seqs[evictable(swappiness)[0]]

    def should_run_aging(self, swappiness: int = DEFAULT_SWAPPINESS) -> tuple[bool, int]:
        """Whether eviction should age first, and how many folios there are.

        It should if the oldest type has no generation but the two youngest; with three, up to
        v6.13, if the youngest holds more than half of the folios or the oldest less than a quarter,
        and since then always.
        """
        oldest = self.oldest(swappiness)
        if oldest + MIN_NR_GENS > self.max_seq:
            return True, self._total(swappiness) if self.rules.two_step else 0
        sizes = [sum(each) for each in zip(*map(self.sizes_of, evictable(swappiness)), strict=True)]
        total = sum(sizes)
        if oldest + MIN_NR_GENS < self.max_seq:
            return False, total
        if self.rules.two_step:
            return True, total
        young = sizes[self.max_seq % MAX_NR_GENS]
        old = sizes[(self.max_seq - MIN_NR_GENS) % MAX_NR_GENS]
        return young * MIN_NR_GENS > total or old * (MIN_NR_GENS + 2) < total, total

    def _total(self, swappiness: int) -> int:
        return sum(sum(self.sizes_of(of_type)) for of_type in evictable(swappiness))

    # -- eviction -------------------------------------------------------------------------------

    def isolate(self, swappiness: int, most: int = MAX_LRU_BATCH) -> tuple[Ids, int]:
        """Take a batch of the type whose eviction does less harm (``isolate_folios``).

        Returns what was isolated, oldest first, and how many folios were examined.
        """
        of_type, tier = self._choose(swappiness)
        others = [other for other in evictable(swappiness) if other != of_type]
        for candidate in [of_type, *others][: len(evictable(swappiness))]:
            if tier < 0:
                tier = self.controllers[candidate].last_evicted_tier()
            ids, examined = self.scan(candidate, tier, most)
            if examined:
                return ids, examined
            tier = -1
        return NOBODY, 0

    def _choose(self, swappiness: int) -> tuple[int, int]:
        """The type to begin with, and the highest of its tiers to evict or -1 if not decided."""
        if self.rules.two_step:
            return self._choose_reworked(swappiness), -1
        if not swappiness:
            return FILE, -1
        if self.min_seqs[ANON] < self.min_seqs[FILE]:
            return ANON, -1
        if swappiness in (1, MAX_SWAPPINESS):
            return (FILE if swappiness == 1 else ANON), -1
        gains = (swappiness, MAX_SWAPPINESS - swappiness)
        anon, file = (self.controllers[of_type].position(0) for of_type in TYPES)
        of_type = FILE if may_evict(anon, gains[ANON], file, gains[FILE]) else ANON
        other = TYPES[1 - of_type]
        set_point, gain = self.controllers[other].position(0), gains[other]
        for tier in range(1, MAX_NR_TIERS):
            variable = self.controllers[of_type].position(tier)
            if not may_evict(set_point, gain, variable, gains[of_type]):
                return of_type, tier - 1
        return of_type, MAX_NR_TIERS - 1

    def _choose_reworked(self, swappiness: int) -> int:
        if swappiness <= 1:
            return FILE
        if swappiness >= MAX_SWAPPINESS:
            return ANON
        anon, file = (self.controllers[of_type].whole() for of_type in TYPES)
        return FILE if may_evict(anon, swappiness, file, MAX_SWAPPINESS - swappiness) else ANON

    def scan(
        self, of_type: int, tier: int = MAX_NR_TIERS - 1, most: int = MAX_LRU_BATCH
    ) -> tuple[Ids, int]:
        """Take a batch off the oldest generation of a type (``scan_folios``).

        Stops at 64 isolated or ``most`` examined. Folios that were promoted go to the list of their
        generation, those above ``tier`` and those that wait for something to the next generation.
        Returns what was isolated, oldest first, and how many were examined, or 0 if that led to
        nothing.
        """
        if self.nr_gens(of_type) == MIN_NR_GENS:
            return NOBODY, 0
        oldest = self.min_seqs[of_type] % MAX_NR_GENS
        source = self.lists[of_type][oldest]
        found: list[Ids] = []
        examined = isolated = 0
        while isolated < MIN_LRU_BATCH and examined < most:
            entries = source.take(min(MIN_LRU_BATCH - isolated, most - examined))
            if not len(entries):
                break
            ids = self._valid(entries, oldest)
            examined += len(ids)
            taken = self._sort(ids, of_type, oldest, tier)
            self._isolate(taken)
            found.append(taken)
            isolated += len(taken)
        self.vmstat.pgrefill += examined - isolated
        counts = isolated or examined >= most
        return (np.concatenate(found) if found else NOBODY), examined if counts else 0

    def _sort(self, ids: Ids, of_type: int, oldest: int, tier: int) -> Ids:
        """``sort_folio`` for each; returns those that are to be isolated."""
        states, tiers = self.states[ids], self.rules.tier
        promoted = self.generation[ids] != oldest
        protected = ~promoted & ((tiers[states] > tier) | self.rules.highest[states].astype(bool))
        waiting = ~promoted & ~protected & self._waiting(ids, of_type)
        stay = ~(promoted | protected | waiting)
        if stay.all():
            return ids
        following = (oldest + 1) % MAX_NR_GENS
        self._count_protected(states[protected], of_type)
        for up in (protected, waiting):
            self._move_up(ids[up], following)
        old_end = protected & (not self.rules.two_step)
        now = self.generation[ids]
        for generation in np.unique(now[~stay]).tolist():
            there = ~stay & (now == generation)
            self._relist(ids[there & ~old_end], of_type, generation)
            self._relist(ids[there & old_end][::-1], of_type, generation, old_end=True)
        staying: Ids = ids[stay]
        return staying

    def _count_protected(self, states: NDArray[np.uint8], of_type: int) -> None:
        rules_ = self.rules
        if rules_.two_step:  # those that are promoted late do not count
            states = states[~rules_.highest[states].astype(bool)]
        counts = np.bincount(rules_.tier[states], minlength=MAX_NR_TIERS)
        protected = self.controllers[of_type].protected
        for tier, count in enumerate(counts.tolist()):
            protected[tier] += count
        self.vmstat.lru_gen_protected += len(states)

    def _waiting(self, ids: Ids, of_type: int) -> NDArray[np.bool_]:
        found = np.zeros(len(ids), np.bool_)
        for lru, part in self.by_guest(ids):
            if lru.pages is not None:
                found[np.isin(ids, part)] = lru.pages.waiting(part - lru.base, of_type == FILE)
        return found

    def take_off(self, ids: Ids) -> Ids:
        """Isolate those of ``ids`` that are on a list (``folio_isolate_lru``); returns them."""
        ids = ids[self.listed[ids] < ISOLATED]
        for generation in np.unique(self.listed[ids]).tolist():
            self._isolate(ids[self.listed[ids] == generation])
        return ids

    def settle(self, used: Ids, active: Ids, writeback: Ids) -> int:
        """As :meth:`FolioLists.settle`."""
        both = np.concatenate((used, active))
        activated = self.activate(both, np.arange(len(both)) < len(used))
        writeback = self.still_isolated(writeback)
        if not self.rules.two_step:  # what isolation took from them they get back
            states = self.states[writeback]
            self.states[writeback] = np.where(states & WORKINGSET, states | REFERENCED, states)
        self._put(writeback, self.max_seq - 1)
        return activated + len(active)

    def putback(self, ids: Ids, seq: int, old_end: bool = False) -> None:
        """Isolated folios, all of one type, go back to generation ``seq``, if still there."""
        self._put(self.still_isolated(ids), seq, old_end)

    def activate(self, ids: Ids, used: NDArray[np.bool_]) -> int:
        """Isolated folios that stay go back, ``used`` ones as what they are.

        (``folio_check_references``, and what ``evict_folios`` does with rejected folios.) Returns
        how many of the used ones count as activated: up to v6.13 none does, they are just kept.
        """
        there = self.listed[ids] == ISOLATED
        ids, used = ids[there], used[there]
        if not self.rules.two_step:
            self.states[ids] = 0
            self._put(ids, self.max_seq)
            return 0
        states = self.states[ids]
        seen = self.rules.seen[states]
        again = used & self.rules.promotes(states)
        self.states[ids] = np.where(used, seen, states & WORKINGSET)
        youngest = again | (~used & ((states & WORKINGSET) != 0))
        self._put(ids[youngest], self.max_seq)
        self._put(ids[~youngest], self.max_seq - 1)
        return int(np.count_nonzero(again))

    def _put(self, ids: Ids, seq: int, old_end: bool = False) -> None:
        if not len(ids):
            return
        of_type = self.owner(int(ids[0])).of_type
        generation = seq % MAX_NR_GENS
        self.generation[ids] = generation
        for lru, part in self.by_guest(ids):
            lru.sizes[generation] += len(part)
        self._relist(ids, of_type, generation, old_end, were_listed=False)

    def _move_up(self, ids: Ids, generation: int) -> None:
        """Eviction or ageing gives folios the next generation (``folio_inc_gen``)."""
        for lru, part in self.by_guest(ids):
            lru.uncount(part)
            lru.sizes[generation] += len(part)
        self.generation[ids] = generation
        self.states[ids] = self.rules.moved[self.states[ids]]

    def _isolate(self, ids: Ids) -> None:
        for lru, part in self.by_guest(ids):
            lru.uncount(part)
            self.on_list[lru.of_type][int(self.listed[part[0]])] -= len(part)
        self.listed[ids] = ISOLATED
        self.states[ids] = self.rules.isolated[self.states[ids]]


class ListedLruGen(ListedLru):
    """One guest's folios on the lists of ``lruvec``."""

    def __init__(self, lruvec: ListedLruvec, number: int, of_type: int, two_step: bool) -> None:
        super().__init__(lruvec, number, of_type, two_step)
        self._lists = lruvec
        self._generation = lruvec.generation[self.base : self.base + len(self._listed)]
        self._fast = memoryview(self._generation)  # type: ignore[arg-type]  # a buffer
        self._accessed = lruvec.rules.accessed.tolist()

    # -- folios that come and go ------------------------------------------------------------------

    def add(self, leaf: int) -> None:
        """A fault brought ``leaf`` in, or mapped it again: then it may be on a list already."""
        lruvec = self._lists
        if self._fast_listed[leaf] != ABSENT:
            return
        seq = lruvec.max_seq
        if lruvec.rules.two_step and not self._fast_state[leaf] & WORKINGSET:
            seq -= 1  # lru_gen_folio_seq(): fresh, but not known to be of the working set
        generation = seq % MAX_NR_GENS
        self._fast[leaf] = generation
        self._fast_listed[leaf] = generation
        self._fast_ticket[leaf] = ticket = (self._fast_ticket[leaf] + 1) & 0xFF
        self.sizes[generation] += 1
        lruvec.on_list[self.of_type][generation] += 1
        lruvec.lists[self.of_type][generation].append((self.base + leaf) | (ticket << TICKET_SHIFT))

    def add_all(self, first: int, last: int) -> None:
        """As :meth:`add`, for the leaves ``first`` up to ``last``."""
        self.add_many(np.arange(first, last, dtype=np.int64))

    def add_many(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, none present) were brought in, in this order."""
        older = self._lists.rules.two_step
        self._lists._put(leaves + self.base, self._lists.max_seq - older)

    def remove(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, all present) were freed; an isolated one is its isolator's."""
        self._listed[leaves[self._listed[leaves] == ISOLATED]] = ABSENT
        self._states[leaves] = 0
        leaves = leaves[self._listed[leaves] != ABSENT]
        counts = np.bincount(self._listed[leaves], minlength=MAX_NR_GENS)
        for generation, gone in enumerate(counts.tolist()):
            self._lists.on_list[self.of_type][generation] -= gone
        self.uncount(leaves + self.base)
        self._listed[leaves] = ABSENT

    def all_old(self) -> None:
        """Ageing came by often enough for all folios to be in the oldest generation, and for an
        hour now there was no need to.
        """
        lruvec = self._lists
        lruvec.birth_ns = [lruvec.now() - IDLE_NS] * MAX_NR_GENS
        leaves = np.flatnonzero(self._listed < ISOLATED)
        self.remove(leaves)
        self._lists._put(leaves + self.base, self._lists.min_seqs[self.of_type])

    def rotate(self, leaf: int) -> None:
        """The page of ``leaf`` is clean at last: eviction shall find it next."""
        if self._fast_listed[leaf] < ISOLATED:
            state = self._fast_state[leaf]
            self.remove(np.array([leaf]))
            self._fast_state[leaf] = state
            oldest = self._lists.min_seqs[self.of_type]
            self._lists._put(np.array([self.base + leaf]), oldest, old_end=True)

    # -- use --------------------------------------------------------------------------------------

    def promote(self, leaves: NDArray[np.int64], seq: int | None = None) -> int:
        """As :meth:`LruGen.promote`, to generation ``seq`` (``folio_update_gen``): lists stay.

        An isolated folio is marked, and eviction may find that.
        """
        lruvec = self._lists
        isolated = self._listed[leaves] >= ISOLATED
        marked = leaves[isolated]
        if len(marked):
            if lruvec.rules.two_step:
                marked = marked[self._states[marked] & (REFERENCED | WORKINGSET) == 0]
            self._states[marked] |= np.uint8(REFERENCED)
            leaves = leaves[~isolated]
        states = self._states[leaves]
        self._states[leaves] = lruvec.rules.seen[states]
        leaves = leaves[lruvec.rules.promotes(states)]
        target = (lruvec.max_seq if seq is None else seq) % MAX_NR_GENS
        leaves = leaves[self._generation[leaves] != target]
        self.uncount(leaves + self.base)
        self._generation[leaves] = target
        self.sizes[target] += len(leaves)
        lruvec.vmstat.lru_gen_promoted += len(leaves)
        return len(leaves)

    def accessed(self, leaf: int, times: int) -> None:
        """A fault of KVM's used the folio of ``leaf`` (``folio_mark_accessed``)."""
        if self._fast_listed[leaf] != ABSENT:
            for _ in range(times):
                self._fast_state[leaf] = self._accessed[self._fast_state[leaf]]

    def marked(self, leaf: int) -> bool:
        """Whether something has marked the isolated folio of ``leaf`` as used (up to v6.13)."""
        return not self._lists.rules.two_step and bool(self._fast_state[leaf] & REFERENCED)

    def askable(self, leaves: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of ``leaves`` those that a walk asks for: since v6.14 no isolated ones."""
        if self._lists.rules.two_step:
            return leaves[self._listed[leaves] < ISOLATED]
        return leaves

    # -- eviction and return ----------------------------------------------------------------------

    def evicted(self, leaf: int) -> None:
        """The isolated folio of ``leaf`` is gone; a shadow says when (``lru_gen_eviction``)."""
        lruvec, state = self._lists, self._fast_state[leaf]
        self._fast_listed[leaf] = ABSENT
        self._fast_state[leaf] = 0
        lruvec.controllers[self.of_type].evicted[lruvec.rules.tier[state]] += 1
        self._shadows[leaf] = lruvec.min_seqs[self.of_type] * STATES + state

    def refault(self, leaf: int) -> bool:
        """The page of ``leaf`` is read again: whether it went a short time ago."""
        lruvec, shadow = self._lists, int(self._shadows[leaf])
        self._shadows[leaf] = NO_SHADOW
        if shadow == NO_SHADOW:
            return False
        seq, state = divmod(shadow, STATES)
        vmstat = lruvec.vmstat
        vmstat.workingset_refault += 1
        if lruvec.rules.two_step:
            recent = abs(lruvec.max_seq - seq) < MAX_NR_GENS
        else:
            recent = seq == lruvec.min_seqs[self.of_type]
        if not recent:
            return False
        lruvec.controllers[self.of_type].refaulted[lruvec.rules.tier[state]] += 1
        vmstat.workingset_activate += 1
        self._fast_state[leaf] = restored = int(lruvec.rules.restored[state])
        vmstat.workingset_restore += bool(restored & WORKINGSET)
        return True

    def uncount(self, ids: Ids) -> None:
        """Folios, by their numbers in the lruvec, leave their generations."""
        now = np.bincount(self._lists.generation[ids], minlength=MAX_NR_GENS)
        for number, gone in enumerate(now.tolist()):
            self.sizes[number] -= gone
