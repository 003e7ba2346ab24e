"""Active and inactive lists (mm/vmscan.c, mm/swap.c, mm/workingset.c, v6.12), and their hits."""

from __future__ import annotations

from collections.abc import Generator
from math import isqrt
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pressed import MS, Pressed, ScanControl
from simpy import Event

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.classic_lru import INACTIVE, Classic, ClassicLruvec, RootLruvec
from simkvm.kernel.host_memory import OWN, YOUNG
from simkvm.kernel.listed import ANON, FILE
from simkvm.kernel.sites import AGE
from simkvm.kernel.stage2 import AF, WRITE
from simkvm.units import MIB

LINE = LineCosts(1, 2, 2, 64)
PAGES, ROOM, TOUCHES = 512, 300, 6000


def array(*leaves: int) -> NDArray[np.int64]:
    return np.array(leaves, np.int64)


def lists(pages: int = 8, of_type: int = ANON) -> ClassicLruvec:
    made = ClassicLruvec([(pages, of_type)], LINE)
    for leaf in range(pages):
        made.listed_guests[0].add(leaf)
    return made


def test_a_fresh_folio_is_inactive_and_its_second_mark_activates_it() -> None:
    """folio_mark_accessed()."""
    made = lists()
    lru = made.listed_guests[0]
    lru.accessed(3, 1)
    assert made.on_list[ANON] == [8, 0]
    lru.accessed(3, 1)
    assert made.on_list[ANON] == [7, 1]
    assert made.root.nonresident_age == 1
    lru.accessed(3, 3)
    assert made.on_list[ANON] == [7, 1]


def test_the_second_chance() -> None:
    """folio_check_references(): used once, it is marked and stays inactive; used twice, active."""
    made = lists(3)
    ids = made.isolate(ANON, INACTIVE, 2)
    assert ids.tolist() == [0, 1]
    made.settle(ids, array(), array())
    assert made.on_list[ANON] == [3, 0]
    assert made.isolate(ANON, INACTIVE, 3).tolist() == [2, 0, 1]
    made.settle(array(0), array(), array(1, 2))
    assert made.on_list[ANON] == [2, 1]


@pytest.mark.parametrize(("gib", "ratio"), [(0, 1), (1, 3), (10, 10), (100, 31)])
def test_the_inactive_list_is_low_by_the_root_of_the_size(gib: int, ratio: int) -> None:
    """inactive_is_low(): int_sqrt(10 * gib) active pages for one, as the table in it says."""
    assert (isqrt(10 * gib) if gib else 1) == ratio
    made = lists(1)
    made.root.gib_pages = 1000
    active = (gib * 1000 + 999) * ratio // (ratio + 1)
    made.on_list[ANON] = [active // ratio, active]
    low = made.on_list[ANON][INACTIVE] * ratio < active
    assert made.inactive_is_low(ANON) is low
    made.on_list[ANON] = [active // ratio - 1, active]
    assert made.inactive_is_low(ANON)


def test_a_refault_is_active_if_so_few_went_since() -> None:
    """workingset_refault(): the distance fits into the lists without the type's inactive one."""
    made = lists(40)
    lru = made.listed_guests[0]
    for leaf in range(10, 20):
        lru.accessed(leaf, 2)
    ids = made.isolate(ANON, INACTIVE, 20)
    for leaf in ids.tolist():
        lru.evicted(leaf)
    assert made.on_list[ANON] == [10, 10]
    # The last ten went within a distance of ten active pages.
    assert [lru.refault(leaf) for leaf in ids.tolist()[:10]] == [False] * 10
    assert lru.refault(int(ids[10]))
    lru.add(int(ids[10]))
    assert made.on_list[ANON] == [10, 11]
    assert (made.vmstat.workingset_refault, made.vmstat.workingset_activate) == (11, 1)


def test_active_folios_are_asked_and_go_used_or_not() -> None:
    """shrink_active_list(): with clear_flush_young, which takes the TLB's translation too."""
    made = pressed()
    lruvec, lru = made.pgdat.lruvecs[0], made.host.lru
    for leaf in range(32):
        lru.accessed(leaf, 2)  # type: ignore[attr-defined]
    made.use(0, 1, 2)
    flushes = made.world.remote_flush.broadcasts
    made.do(classic(made)._shrink_active(0, ANON, 32, made.now()))
    assert lruvec.on_list[ANON] == [512, 0]
    assert made.kvms[0].mmu_lock.rows[::6].count(AGE) == 32
    assert made.world.remote_flush.broadcasts > flushes
    assert made.pgdat.vmstat.pgdeactivate == 32


def test_types_are_weighed_by_what_they_cost() -> None:
    """get_scan_count(), SCAN_FRACT: at 60, 30 of 100 folios are anonymous if costs are equal."""
    made = pressed()
    lruvec = made.pgdat.lruvecs[0]
    assert isinstance(lruvec, ClassicLruvec)
    lruvec.on_list[ANON], lruvec.on_list[FILE] = [4096, 4096], [4096, 8192]
    sc = ScanControl(32, False, priority=6)
    counts = scan_count(made, sc)
    assert counts[ANON, INACTIVE] == 64 * 60 // 200
    assert counts[FILE, INACTIVE] == 64 * 140 // 200
    lruvec.root.costs = [3000, 0]  # anonymous ones were dear
    assert scan_count(made, sc)[ANON, INACTIVE] < 64 * 60 // 200
    lruvec.on_list[FILE] = [8192, 64]  # plenty of inactive ones, and no refaults
    counts = scan_count(made, sc)
    assert (counts[ANON, INACTIVE], counts[FILE, INACTIVE]) == (0, 128)


def test_tiny_files_are_left_alone() -> None:
    """prepare_scan_control(): with hardly a page of a file, all comes from old anonymous ones."""
    made = pressed()
    lruvec, pages = made.pgdat.lruvecs[0], made.pgdat.pages
    assert isinstance(lruvec, ClassicLruvec)
    lruvec.on_list[ANON], lruvec.on_list[FILE] = [4096, 1024], [8, 8]
    lruvec.root.costs = [3000, 0]
    sc = ScanControl(32, True, priority=6)
    assert scan_count(made, sc)[ANON, INACTIVE] < 64, "there are pages enough"
    pages.take(pages.free - pages.marks.high + 16)
    assert scan_count(made, sc)[ANON, INACTIVE] == 64
    made.pgdat.swappiness = 0  # out of memory is worse than swap
    assert scan_count(made, sc)[ANON, INACTIVE] == 64
    lruvec.on_list[ANON] = [1024, 4096]  # active ones would have to go
    assert scan_count(made, sc)[ANON, INACTIVE] == 0


# -- what is decided for the whole node ------------------------------------------------------------


def activate(made: Pressed, first: int, last: int, guest: int = 0) -> None:
    for leaf in range(first, last):
        made.pgdat.memory(guest, 0).lru.accessed(leaf, 2)  # type: ignore[attr-defined]


def on_list(made: Pressed, guest: int = 0) -> list[int]:
    return made.pgdat.lruvecs[guest].on_list[ANON]


def test_the_ratio_of_the_lists_is_the_nodes() -> None:
    """prepare_scan_control(): of the root's lruvec, whatever it is in a single memcg."""
    made, sc = pressed(guests=2), ScanControl(32, False)
    activate(made, 0, 500)
    classic(made).prepare(sc)
    assert sc.may_deactivate == [False, False], "524 of 1024 are inactive"
    activate(made, 0, 100, guest=1)
    classic(made).prepare(sc)
    assert sc.may_deactivate == [True, False]


def test_costs_and_distances_are_the_nodes() -> None:
    """lru_note_cost() and workingset_age_nonresident() go up to the root."""
    root = RootLruvec()
    first, second = (ClassicLruvec([(64, ANON)], LINE, root) for _ in range(2))
    for lruvec in (first, second):
        lruvec.listed_guests[0].add_all(0, 64)
    for leaf in range(20):
        second.listed_guests[0].accessed(leaf, 2)
    gone = first.isolate(ANON, INACTIVE, 1)
    first.listed_guests[0].evicted(int(gone[0]))
    for leaf in second.isolate(ANON, INACTIVE, 20).tolist():
        second.listed_guests[0].evicted(leaf)
    assert not first.listed_guests[0].refault(0), "21 went since, and 20 are active"
    assert second.listed_guests[0].refault(39)


def test_a_change_of_the_working_set_lasts_for_a_whole_reclaim() -> None:
    """snapshot_refaults(): at the end of it, not after a round."""
    made = pressed(guests=2)
    lruvec = made.pgdat.lruvecs[0]
    assert isinstance(lruvec, ClassicLruvec)
    lruvec.root.refaults = [3, 0]
    for priority in (12, 11):
        sc = ScanControl(32, True, priority)
        made.shrink(sc)
        assert sc.may_deactivate == [True, False]
    made.do(made.reclaimer.direct(made.now()))
    assert not lruvec.root.may_deactivate(ANON)


def test_kswapd_makes_some_folios_inactive_before_each_round() -> None:
    """kswapd_age_node(): 32 of each memcg, if anonymous folios can go anywhere."""
    made, sc = pressed(guests=2), ScanControl(32, True)
    activate(made, 0, 500)
    made.do(made.reclaimer.age_node(sc, made.now()))
    assert on_list(made) == [12, 500]
    activate(made, 0, 40, guest=1)
    made.do(made.reclaimer.age_node(sc, made.now()))
    assert (on_list(made), on_list(made, 1)) == ([44, 468], [504, 8])
    made.pgdat.swap = None
    activate(made, 0, 512, guest=1)
    made.do(made.reclaimer.age_node(sc, made.now()))
    assert on_list(made) == [44, 468]


def test_who_gets_nothing_begins_again_and_spares_nobody() -> None:
    """do_try_to_free_pages(): skipped_deactivate, then force_deactivate."""
    made = pressed()
    activate(made, 0, 250)
    sc = ScanControl(32, False, priority=1)
    made.shrink(sc)
    assert (sc.skipped_deactivate, sc.may_deactivate) == (True, [False, False])
    sc.force_deactivate = True
    classic(made).prepare(sc)
    assert sc.may_deactivate == [True, True]

    rounds: list[bool] = []

    def in_vain(sc: ScanControl, t_ns: int) -> Generator[Event, Any, int]:
        rounds.append(sc.force_deactivate)
        sc.skipped_deactivate = not sc.force_deactivate
        yield from ()
        return t_ns

    classic(made).shrink_node = in_vain  # type: ignore[method-assign]
    made.do(made.reclaimer.direct(made.now()))
    assert rounds == [False] * 13 + [True] * 13


# -- folios that are being written -----------------------------------------------------------------


def test_a_folio_met_while_it_is_written_is_activated() -> None:
    """shrink_folio_list(): activate_locked; keep is for what pageout() just sent."""
    made = pressed(swap="nvme")
    order, sc = classic(made), ScanControl(32, False)
    made.do(order._shrink_inactive(0, ANON, 1, sc, made.now()))
    assert made.pgdat.write_pending() == 1
    assert on_list(made) == [512, 0]
    made.pgdat.lruvecs[0].lists[ANON][INACTIVE].take(511)  # the others are not looked at
    made.do(order._shrink_inactive(0, ANON, 1, sc, made.now()))
    assert made.pgdat.write_pending() == 1
    assert on_list(made) == [511, 1]
    made.world.env.run(made.now() + 100 * MS)
    assert made.pgdat.write_pending() == 0
    assert on_list(made) == [512, 0], "rotated, and inactive again"


def test_dirty_pages_of_a_file_come_first_when_they_are_written() -> None:
    """PG_reclaim: folio_end_writeback() rotates what reclaim has passed by, and nothing else."""
    made = Pressed(2 * MIB, host={"lru_gen": 0, "size": 64 * MIB}, backing="file", mapped=False)
    host, lruvec = made.host, made.pgdat.lruvecs[0]
    for leaf in range(64):
        host.swapped_in(leaf, write=leaf % 2 == 0)
        made.pgdat.pages.take()
        host.lru.add(leaf)  # type: ignore[attr-defined]
    sc = ScanControl(32, False)
    made.do(classic(made)._shrink_inactive(0, FILE, 32, sc, made.now()))
    assert (sc.reclaimed, lruvec.on_list[FILE]) == (16, [32, 16])
    made.world.env.process(made.world.flusher.run())  # type: ignore[union-attr]
    made.world.env.run(made.now() + 1)
    made.pgdat.wake_flusher()
    made.world.env.run(made.now() + 100 * MS)
    assert lruvec.on_list[FILE] == [48, 0]
    assert set(lruvec.isolate(FILE, INACTIVE, 16).tolist()) == set(range(0, 32, 2))


# -- the same reference string, plainly ------------------------------------------------------------


def pressed(**keys: Any) -> Pressed:
    return Pressed(PAGES * 4096, host={"lru_gen": 0, "size": 64 * MIB}, **keys)


def scan_count(made: Pressed, sc: ScanControl, memcg: int = 0) -> dict[tuple[int, int], int]:
    order, lruvec = classic(made), made.pgdat.lruvecs[memcg]
    assert isinstance(lruvec, ClassicLruvec)
    order.prepare(sc)
    return order.scan_count(lruvec, sc)


def classic(made: Pressed) -> Classic:
    order = made.reclaimer._order
    assert isinstance(order, Classic)
    return order


class Plain:
    """Second chance on two lists, a list of page numbers each: the oldest first."""

    def __init__(self) -> None:
        self.lists: list[list[int]] = [[], []]
        self.used: set[int] = set()
        self.marked: set[int] = set()
        self.shadows: dict[int, int] = {}
        self.age = self.hits = 0

    def touch(self, page: int) -> None:
        if any(page in part for part in self.lists):
            self.hits += 1
            self.used.add(page)
            return
        fits = self.age - self.shadows.pop(page, -(10**9)) <= len(self.lists[1])
        self.age += fits
        self.lists[fits].append(page)
        self.used.add(page)
        if not fits:  # marked by GUP and by KVM: active at once
            self.lists[0].remove(page)
            self.lists[1].append(page)
            self.age += 1
        else:
            self.marked.add(page)
        while sum(map(len, self.lists)) > ROOM:
            self.shrink()

    def shrink(self) -> None:
        batch, self.lists[0] = self.lists[0][:32], self.lists[0][32:]
        again, stay = [], []
        for page in batch:
            if page not in self.used:
                self.marked.discard(page)
                self.shadows[page] = self.age
                self.age += 1
            elif page in self.marked:
                again.append(page)
            else:
                self.marked.add(page)
                stay.append(page)
            self.used.discard(page)
        self.lists[0] += stay
        self.lists[1] += again
        self.age += len(again)
        if len(self.lists[0]) < len(self.lists[1]):
            batch, self.lists[1] = self.lists[1][:32], self.lists[1][32:]
            self.used -= set(batch)
            self.lists[0] += batch


class Real:
    """The same with the model's own lists, checks and notifier calls."""

    def __init__(self) -> None:
        self.made = pressed()
        host, kvm = self.made.host, self.made.kvms[0]
        host.zap(0, PAGES)
        kvm.zap_leaves(0, 0, PAGES)
        self.order = classic(self.made)
        self.hits = 0

    def touch(self, page: int) -> None:
        made, host, kvm = self.made, self.made.host, self.made.kvms[0]
        if host.fast[page] & OWN:
            self.hits += 1
            made.use(page)
            return
        made.pgdat.pages.take()
        host.lru.refault(page)  # type: ignore[attr-defined]
        host.install(page, own=True)
        if host.fast_swap[page]:
            host.swapped_in(page, write=True)
        host.fast[page] &= ~YOUNG & 0xFF
        kvm.stage2.map_leaf(page, WRITE)
        kvm.stage2.leaf.entries[page] |= np.uint8(AF)
        host.lru.accessed(page, 2)  # type: ignore[attr-defined]
        while host.page_count > ROOM:
            sc = ScanControl(32, False)
            made.do(self.order._shrink_inactive(0, ANON, 32, sc, made.now()))
            lruvec = made.pgdat.lruvecs[0]
            assert isinstance(lruvec, ClassicLruvec)
            if lruvec.inactive_is_low(ANON):
                made.do(self.order._shrink_active(0, ANON, 32, made.now()))


def test_hits_are_those_of_a_plain_simulation() -> None:
    """Touch for touch; and near those of CLOCK, with one list and a page at a time."""
    rng = np.random.default_rng(5)
    weights = np.arange(1, PAGES + 1) ** -0.8
    string = rng.choice(rng.permutation(PAGES), TOUCHES, p=weights / weights.sum()).tolist()
    plain, real = Plain(), Real()
    for page in string:
        plain.touch(page)
        real.touch(page)
        assert real.hits == plain.hits
    lruvec = real.made.pgdat.lruvecs[0]
    assert lruvec.on_list[ANON] == [len(part) for part in plain.lists]
    assert real.hits / TOUCHES == pytest.approx(clock(string) / TOUCHES, abs=0.03)


def clock(string: list[int]) -> int:
    """Hits of CLOCK with as much room."""
    ring: list[int] = []
    used: set[int] = set()
    hits = 0
    for page in string:
        if page in ring:
            hits += 1
        else:
            while len(ring) >= ROOM:
                oldest = ring.pop(0)
                if oldest in used:
                    used.discard(oldest)
                    ring.append(oldest)
            ring.append(page)
        used.add(page)
    return hits
