"""The LRU without generations: an active and an inactive list for each type of folios.

Source: mm/vmscan.c (``shrink_lruvec``, ``shrink_active_list``, ``get_scan_count``,
``prepare_scan_control``, ``inactive_is_low``, ``kswapd_age_node``), mm/swap.c
(``folio_mark_accessed``, ``lru_note_cost``) and mm/workingset.c, v6.12. A folio begins on the
inactive list; the second use that somebody notes there activates it. Reclaim takes from the old end
of the inactive list and gives one chance more: what was used is marked (PG_referenced), and
activated if it was marked. Active folios come to the inactive list when that is low, used or not.
An evicted folio that comes back before as many were evicted and activated as would fit is activated
at once. All reclaim is the node's, so balance, costs and distances are those of the root's lruvec,
which stands for all memcgs.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.folio_list import NOBODY, TICKET_SHIFT, Ids
from simkvm.kernel.listed import (
    ABSENT,
    ANON,
    FILE,
    ISOLATED,
    MAX_SWAPPINESS,
    NO_SHADOW,
    TYPES,
    FolioLists,
    ListedLru,
)
from simkvm.kernel.scan_control import DEF_PRIORITY, SWAP_CLUSTER_MAX, ScanControl
from simkvm.kernel.swappable import DIRTY, WRITEBACK
from simkvm.kernel.task import reach
from simkvm.kernel.vmstat import Vmstat
from simkvm.units import GIB

if TYPE_CHECKING:
    from simkvm.kernel.vmscan import Reclaimer

Steps = Generator[Event, Any, int]
INACTIVE: Final = 0
ACTIVE: Final = 1
REFERENCED: Final = 1  #: flags of a folio
WORKINGSET: Final = 2
RECLAIM: Final = 4  #: passed by while it was dirty or being written
List = tuple[int, int]  #: type, and INACTIVE or ACTIVE
LISTS: Final[tuple[List, ...]] = tuple((t, n) for t in TYPES for n in (INACTIVE, ACTIVE))


class RootLruvec:
    """What the lists of all memcgs of the node amount to. ``page_bytes``: for their ratio."""

    def __init__(self, page_bytes: int = 4096) -> None:
        self.gib_pages = GIB // page_bytes
        self.memcgs: list[ClassicLruvec] = []
        self.nonresident_age = 0  #: evictions and activations so far
        self.costs = [0, 0]  #: of reclaim, by type, as ``get_scan_count`` weighs them
        self.refaults = [0, 0]  #: activated refaults by type, and as they were when reclaim ended
        self.refaults_before = [0, 0]

    def size(self, of_type: int, number: int) -> int:
        """Folios on lists of one kind."""
        return sum(lruvec.on_list[of_type][number] for lruvec in self.memcgs)

    @property
    def total(self) -> int:
        """Folios on all lists."""
        return sum(self.size(of_type, number) for of_type, number in LISTS)

    def inactive_is_low(self, of_type: int) -> bool:
        """Whether the node has few inactive folios."""
        return self.is_low(self.size(of_type, INACTIVE), self.size(of_type, ACTIVE))

    def is_low(self, inactive: int, active: int) -> bool:
        """Whether the inactive ones of so many folios are too few (``inactive_is_low``)."""
        gib = (inactive + active) // self.gib_pages
        return inactive * (isqrt(10 * gib) if gib else 1) < active

    def may_deactivate(self, of_type: int) -> bool:
        """Whether active folios may go: few are inactive, or the working set changes."""
        moved = self.refaults[of_type] != self.refaults_before[of_type]
        return moved or self.inactive_is_low(of_type)

    def snapshot_refaults(self) -> None:
        """A reclaim ends: by what comes back from now on the next one sees changes."""
        self.refaults_before = list(self.refaults)

    def note_cost(self, of_type: int, pages_of_io: int, rotated: int) -> None:
        """What reclaim of a type cost; the past counts less and less (``lru_note_cost``)."""
        self.costs[of_type] += pages_of_io * SWAP_CLUSTER_MAX + rotated
        if sum(self.costs) > self.total // 4:
            self.costs = [cost // 2 for cost in self.costs]


class ClassicLruvec(FolioLists):
    """The lists of one memcg; ``root``: of its node."""

    def __init__(
        self,
        guests: Sequence[tuple[int, int]],
        line: LineCosts,
        root: RootLruvec | None = None,
        vmstat: Vmstat | None = None,
    ) -> None:
        super().__init__(guests, 2, line, vmstat)
        self.root = root or RootLruvec()
        self.root.memcgs.append(self)
        self.listed_guests: list[ClassicLru] = []
        for number, (_, of_type) in enumerate(guests):
            self.listed_guests.append(ClassicLru(self, number, of_type))
        self.guests = list(self.listed_guests)

    def inactive_is_low(self, of_type: int) -> bool:
        """Whether the inactive list is to be refilled."""
        inactive, active = self.on_list[of_type]
        return self.root.is_low(inactive, active)

    def isolate(self, of_type: int, number: int, most: int) -> Ids:
        """Take up to ``most`` folios off the old end of a list."""
        found: list[Ids] = []
        left = most
        while left:
            entries = self.lists[of_type][number].take(left)
            if not len(entries):
                break
            ids = self._valid(entries, number)
            self.on_list[of_type][number] -= len(ids)
            for lru, part in self.by_guest(ids):
                lru.sizes[number] -= len(part)
            self.listed[ids] = ISOLATED
            found.append(ids)
            left -= len(ids)
        return np.concatenate(found) if found else NOBODY

    def settle(self, used: Ids, active: Ids, writeback: Ids) -> int:
        """Back to the lists: what was used is activated if it was marked, or marked.

        What was being written before is activated too; what is since now goes on from where it was.
        """
        again = (self.states[used] & REFERENCED) != 0
        self.states[used] |= np.uint8(REFERENCED)
        met = (self.states[writeback] & RECLAIM) != 0
        activated = np.concatenate((used[again], active, writeback[met]))
        self.root.nonresident_age += len(self.still_isolated(activated))
        self.put(activated, ACTIVE)
        self.put(np.concatenate((used[~again], writeback[~met])), INACTIVE)
        return len(activated)

    def put(self, ids: Ids, number: int) -> None:
        """Isolated folios go to the new end of a list, if nobody freed them meanwhile."""
        ids = self.still_isolated(ids)
        for lru, part in self.by_guest(ids):
            lru.sizes[number] += len(part)
            self._relist(part, lru.of_type, number, were_listed=False)


class ClassicLru(ListedLru):
    """One guest's folios; ``sizes`` of the inactive and the active list."""

    def __init__(self, lruvec: ClassicLruvec, number: int, of_type: int) -> None:
        super().__init__(lruvec, number, of_type, two_step=False)
        self._lists = lruvec
        self.sizes = [0, 0]

    # -- folios that come and go ------------------------------------------------------------------

    def add(self, leaf: int) -> None:
        """A fault brought ``leaf`` in: to the inactive list, unless it came back soon."""
        lruvec = self._lists
        if self._fast_listed[leaf] != ABSENT:
            return
        number = ACTIVE if self._fast_state[leaf] & REFERENCED else INACTIVE
        self._fast_state[leaf] &= WORKINGSET
        self._fast_listed[leaf] = number
        self._fast_ticket[leaf] = ticket = (self._fast_ticket[leaf] + 1) & 0xFF
        self.sizes[number] += 1
        lruvec.on_list[self.of_type][number] += 1
        lruvec.lists[self.of_type][number].append((self.base + leaf) | (ticket << TICKET_SHIFT))

    def add_all(self, first: int, last: int) -> None:
        """As :meth:`add`, for the leaves ``first`` up to ``last``."""
        self.add_many(np.arange(first, last, dtype=np.int64))

    def add_many(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, none present) were brought in, in this order."""
        self._listed[leaves] = ISOLATED
        self._lists.put(leaves + self.base, INACTIVE)

    def remove(self, leaves: NDArray[np.int64]) -> None:
        """``leaves`` (distinct, all present) were freed; an isolated one is its isolator's."""
        self._states[leaves] = 0
        self._listed[leaves[self._listed[leaves] == ISOLATED]] = ABSENT
        leaves = leaves[self._listed[leaves] != ABSENT]
        self.uncount(leaves + self.base)
        self._listed[leaves] = ABSENT

    def uncount(self, ids: Ids) -> None:
        """Folios leave their lists."""
        counts = np.bincount(self._lists.listed[ids], minlength=2)
        for number, gone in enumerate(counts.tolist()):
            self.sizes[number] -= gone
            self._lists.on_list[self.of_type][number] -= gone

    def all_old(self) -> None:
        """They are inactive from the start."""

    def rotate(self, leaf: int) -> None:
        """The page of ``leaf`` is clean at last: to the old end of the inactive list."""
        if self._fast_listed[leaf] < ISOLATED:
            state = self._fast_state[leaf]
            self.remove(np.array([leaf]))
            self._fast_state[leaf] = state
            self.sizes[INACTIVE] += 1
            ids = np.array([self.base + leaf])
            self._lists._relist(ids, self.of_type, INACTIVE, old_end=True, were_listed=False)

    def written_back(self, leaf: int) -> None:
        """Reclaim has passed it by before: now it is where reclaim looks first."""
        if self._fast_state[leaf] & RECLAIM:
            self._fast_state[leaf] &= ~RECLAIM & 0xFF
            self.rotate(leaf)

    # -- use --------------------------------------------------------------------------------------

    def promote(self, leaves: NDArray[np.int64]) -> int:
        """Only the multi-gen LRU learns from walks of page tables."""
        return 0

    def accessed(self, leaf: int, times: int) -> None:
        """Mark the folio; the second mark on the inactive list activates it."""
        for _ in range(times):
            if self._fast_listed[leaf] == ABSENT:
                return
            if not self._fast_state[leaf] & REFERENCED:
                self._fast_state[leaf] |= REFERENCED
            elif self._fast_listed[leaf] == INACTIVE:
                self._activate(leaf)

    def _activate(self, leaf: int) -> None:
        lruvec = self._lists
        self._fast_state[leaf] &= ~REFERENCED & 0xFF
        self.sizes[INACTIVE] -= 1
        self.sizes[ACTIVE] += 1
        lruvec._relist(np.array([self.base + leaf]), self.of_type, ACTIVE)
        lruvec.root.nonresident_age += 1
        lruvec.vmstat.pgactivate += 1

    # -- eviction and return ----------------------------------------------------------------------

    def evicted(self, leaf: int) -> None:
        """A shadow says how many were evicted or activated before (``workingset_eviction``)."""
        lruvec, state = self._lists, self._fast_state[leaf]
        self._fast_listed[leaf] = ABSENT
        self._fast_state[leaf] = 0
        self._shadows[leaf] = lruvec.root.nonresident_age << 1 | bool(state & WORKINGSET)
        lruvec.root.nonresident_age += 1

    def refault(self, leaf: int) -> bool:
        """Whether so few went since then that it might be here still (``workingset_refault``)."""
        root, shadow, vmstat = self._lists.root, int(self._shadows[leaf]), self._lists.vmstat
        self._shadows[leaf] = NO_SHADOW
        if shadow == NO_SHADOW:
            return False
        vmstat.workingset_refault += 1
        distance = root.nonresident_age - (shadow >> 1)
        if distance > root.total - root.size(self.of_type, INACTIVE):
            return False
        self._fast_state[leaf] = REFERENCED  # :meth:`add` puts it on the active list
        root.nonresident_age += 1
        root.refaults[self.of_type] += 1
        vmstat.workingset_activate += 1
        if shadow & 1:
            self._fast_state[leaf] |= WORKINGSET
            root.note_cost(self.of_type, 1, 0)
            vmstat.workingset_restore += 1
        return True


class Classic:
    """Reclaim by active and inactive lists, for one task."""

    def __init__(self, reclaimer: Reclaimer) -> None:
        self._reclaimer = reclaimer
        self._pgdat = reclaimer.pgdat
        self._env = reclaimer.pgdat.pages.env

    def age_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """Some active anonymous folios of each memcg become inactive, if the node has few of those
        (``kswapd_age_node``).
        """
        if self._pgdat.swap is not None and self._root.inactive_is_low(ANON):
            for memcg in range(len(self._pgdat.lruvecs)):
                t_ns = yield from self._shrink_active(memcg, ANON, SWAP_CLUSTER_MAX, t_ns)
        return t_ns

    def ended(self, sc: ScanControl) -> bool:
        """The end of a reclaim; a direct one that got nothing and spared active folios begins
        again, and spares none (``do_try_to_free_pages``).
        """
        self._root.snapshot_refaults()
        if sc.kswapd or sc.reclaimed or not sc.skipped_deactivate:
            return False
        sc.force_deactivate, sc.skipped_deactivate = True, False
        return True

    def shrink_node(self, sc: ScanControl, t_ns: int) -> Steps:
        """One go over the memcgs; a direct reclaimer stops when it has enough, and the next goes on
        where it was (``shrink_node_memcgs``).
        """
        pgdat = self._pgdat
        lruvecs = pgdat.lruvecs
        self.prepare(sc)
        first = 0 if sc.kswapd else pgdat.next_memcg
        for step in range(len(lruvecs)):
            memcg = (first + step) % len(lruvecs)
            lruvec = self._lruvec(memcg)
            t_ns = yield from self._shrink_lruvec(memcg, lruvec, sc, t_ns)
            if not sc.kswapd and sc.reclaimed >= sc.nr_to_reclaim:
                pgdat.next_memcg = (memcg + 1) % len(lruvecs)
                break
        return t_ns

    @property
    def _root(self) -> RootLruvec:
        return self._lruvec(0).root

    def _lruvec(self, memcg: int) -> ClassicLruvec:
        lruvec = self._pgdat.lruvecs[memcg]
        assert isinstance(lruvec, ClassicLruvec)
        return lruvec

    # -- how much of what -------------------------------------------------------------------------

    def prepare(self, sc: ScanControl) -> None:
        """Before each go, for all memcgs (``prepare_scan_control``)."""
        root, pages = self._root, self._pgdat.pages
        sc.may_deactivate = [
            sc.force_deactivate or root.may_deactivate(of_type) for of_type in TYPES
        ]
        enough = root.size(FILE, INACTIVE) >> sc.priority > 0
        sc.cache_trim_mode = enough and not sc.may_deactivate[FILE]
        # Files alone cannot bring the node over its high watermark, old anonymous folios could.
        file = root.size(FILE, INACTIVE) + root.size(FILE, ACTIVE)
        sc.file_is_tiny = (
            file + pages.free <= pages.marks.high
            and not sc.may_deactivate[ANON]
            and root.size(ANON, INACTIVE) >> sc.priority > 0
        )

    def scan_count(self, lruvec: ClassicLruvec, sc: ScanControl) -> dict[List, int]:
        """How many folios of each list to look at (``get_scan_count``)."""
        swappiness = self._pgdat.swappiness
        if not self._pgdat.can_reclaim_anon:
            weights = (0, 1)
        elif swappiness and not sc.priority:
            weights = (1, 1)
        elif sc.file_is_tiny:
            weights = (1, 0)
        elif sc.cache_trim_mode:
            weights = (0, 1)
        else:
            costs = self._root.costs
            anon, file = (sum(costs) + cost for cost in costs)
            weights = (
                swappiness * (anon + file + 1) // (anon + 1),
                (MAX_SWAPPINESS - swappiness) * (anon + file + 1) // (file + 1),
            )
        whole = 1 if weights == (1, 1) else sum(weights)
        return {
            (of_type, number): (lruvec.on_list[of_type][number] >> sc.priority)
            * weights[of_type]
            // whole
            for of_type, number in LISTS
        }

    def _shrink_lruvec(
        self, memcg: int, lruvec: ClassicLruvec, sc: ScanControl, t_ns: int
    ) -> Steps:
        """``shrink_lruvec``: 32 of each list in turn, until there is enough of both types."""
        counts = self.scan_count(lruvec, sc)
        targets = dict(counts)
        proportional = not sc.kswapd and sc.priority == DEF_PRIORITY
        began, adjusted = sc.reclaimed, False
        while counts[ANON, INACTIVE] or counts[FILE, ACTIVE] or counts[FILE, INACTIVE]:
            for which in LISTS:
                batch = min(counts[which], SWAP_CLUSTER_MAX)
                counts[which] -= batch
                of_type, number = which
                if batch and number == INACTIVE:
                    t_ns = yield from self._shrink_inactive(memcg, of_type, batch, sc, t_ns)
                elif batch and sc.may_deactivate[of_type]:
                    t_ns = yield from self._shrink_active(memcg, of_type, batch, t_ns)
                elif batch:
                    sc.skipped_deactivate = True
            t_ns = yield from self._reclaimer.cond_resched(memcg, t_ns)
            if sc.reclaimed - began < sc.nr_to_reclaim or proportional or adjusted:
                continue
            adjusted = True
            if not _keep_in_proportion(counts, targets):
                break
        if self._pgdat.swap is not None and lruvec.inactive_is_low(ANON):
            t_ns = yield from self._shrink_active(memcg, ANON, SWAP_CLUSTER_MAX, t_ns)
        return t_ns

    # -- lists ------------------------------------------------------------------------------------

    def _isolate(
        self, memcg: int, lruvec: ClassicLruvec, which: List, batch: int, t_ns: int
    ) -> Generator[Event, Any, tuple[Ids, int]]:
        costs, cpu = self._pgdat.kvms[memcg][0].costs, self._reclaimer.task.cpu.id
        t_ns = yield from reach(self._env, t_ns)
        ids = lruvec.isolate(*which, batch)
        hold_ns = len(ids) * costs.reclaim.isolate_ns + costs.line.transfer_ns
        return ids, lruvec.lock.occupy(cpu, t_ns, hold_ns)

    def _shrink_inactive(
        self, memcg: int, of_type: int, batch: int, sc: ScanControl, t_ns: int
    ) -> Steps:
        lruvec = self._lruvec(memcg)
        ids, t_ns = yield from self._isolate(memcg, lruvec, (of_type, INACTIVE), batch, t_ns)
        if not len(ids):
            return t_ns
        self._mark(memcg, lruvec, ids, WRITEBACK)
        vmstat, before = lruvec.vmstat, sc.reclaimed
        written = vmstat.pswpout
        t_ns = yield from self._reclaimer.shrink_folio_list(memcg, lruvec, ids, sc, t_ns)
        kept = len(ids) - (sc.reclaimed - before)
        if kept == len(ids):
            self._pgdat.wake_flusher()  # if it was for dirty pages that all stayed
        if of_type == FILE:
            self._mark(memcg, lruvec, ids, WRITEBACK | DIRTY)
        lruvec.root.note_cost(of_type, vmstat.pswpout - written, kept)
        return t_ns

    def _mark(self, memcg: int, lruvec: ClassicLruvec, ids: Ids, swap: int) -> None:
        """Note which folios are being written, or also are dirty (PG_reclaim)."""
        lruvec.states[ids] &= np.uint8(~RECLAIM & 0xFF)
        for lru, part in lruvec.by_guest(ids):
            flags = self._pgdat.memory(memcg, lru.number).swap[part - lru.base]
            lruvec.states[part[(flags & swap) != 0]] |= np.uint8(RECLAIM)

    def _shrink_active(self, memcg: int, of_type: int, batch: int, t_ns: int) -> Steps:
        """Make active folios inactive, and forget that they were used."""
        lruvec = self._lruvec(memcg)
        ids, t_ns = yield from self._isolate(memcg, lruvec, (of_type, ACTIVE), batch, t_ns)
        lruvec.vmstat.pgrefill += len(ids)
        for folio in ids.tolist():
            t_ns = yield from self._reclaimer.was_referenced(memcg, lruvec, folio, t_ns)
        t_ns = yield from reach(self._env, t_ns)
        ids = lruvec.still_isolated(ids)
        lruvec.states[ids] |= np.uint8(WORKINGSET)
        lruvec.put(ids, INACTIVE)
        lruvec.vmstat.pgdeactivate += len(ids)
        return t_ns


def _keep_in_proportion(counts: dict[List, int], targets: dict[List, int]) -> bool:
    """Enough was reclaimed: spare the smaller type, the larger in proportion; False: stop."""
    left = [sum(counts[of_type, number] for number in (INACTIVE, ACTIVE)) for of_type in TYPES]
    if not all(left):
        return False
    smaller = ANON if left[FILE] > left[ANON] else FILE
    target = sum(targets[smaller, number] for number in (INACTIVE, ACTIVE)) + 1
    percentage = left[smaller] * 100 // target
    for number in (INACTIVE, ACTIVE):
        counts[smaller, number] = 0
        larger = (1 - smaller, number)
        scanned = targets[larger] - counts[larger]
        counts[larger] = max(0, targets[larger] * (100 - percentage) // 100 - scanned)
    return True
