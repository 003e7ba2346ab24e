"""MGLRU's page-table walk over a guest: whom it asks, what it holds, what it finds.

Source: mm/vmscan.c (walk_mm, walk_pte_range) and virt/kvm/kvm_main.c, v6.12; the calls in windows
of 64 from message 20230526234435.662652-1-yuzhao@google.com, patch 10 of 10.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from lab import FAST, Lab, account, events, world

from simkvm.kernel.aging import fetched_lines
from simkvm.kernel.aging_call import CALLS, Pass
from simkvm.kernel.host_memory import OWN, PRESENT, YOUNG
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.sites import AGE, TEARDOWN
from simkvm.kernel.stage2 import AF
from simkvm.scenario.kernel import POLICIES
from simkvm.units import GIB, KIB, MIB


def lab(call: str, lock: str, memory: int = 2 * MIB, fill: bool = True, **guest: Any) -> Lab:
    kernel = {"base": "linux-6.12", "set": {"ageing_call": call, "ageing_lock": lock}}
    made = Lab(memory, guest, kernel=kernel)
    if fill:
        made.fill()
        forget(made)
    return made


def forget(made: Lab) -> None:
    """Nobody has used anything: neither the guest nor the host."""
    made.kvm.stage2.leaf.entries[:] &= np.uint8(~AF & 0xFF)
    made.kvm.host.state[:] &= np.uint8(PRESENT | OWN)


def use(made: Lab, *leaves: int) -> None:
    """The guest used ``leaves``."""
    made.kvm.stage2.leaf.entries[list(leaves)] |= np.uint8(AF)


def found(made: Lab) -> list[int]:
    """Leaves that the walk moved to the youngest generation; call before the next pass."""
    lru = made.kvm.host.lru
    youngest = (lru.max_seq - 1) % 4  # the pass has opened a new one since
    return np.flatnonzero(lru._generation == youngest).tolist()


def aged(made: Lab) -> Kvm:
    """The guest of ``made``, its folios one generation old, so that a promotion shows."""
    made.kvm.host.lru.inc_max_seq()
    return made.kvm


# -- whom it asks -----------------------------------------------------------------------------


def test_every_way_to_ask_has_a_policy() -> None:
    assert set(CALLS) == set(POLICIES["ageing_call"])


def test_a_blind_walk_sees_the_host_only() -> None:
    """Up to v6.11: the host's own flag, no notifier call."""
    made = lab("blind", "write")
    aged(made)
    use(made, 1, 2, 3)
    made.kvm.host.state[[3, 7]] |= 4
    report = made.age()
    assert (report.calls, report.scanned, report.young) == (0, 512, 2)
    assert found(made) == [3, 7]
    assert made.young() == 3, "the guest's flags are as they were"
    assert not made.kvm.mmu_lock.rows


@pytest.mark.parametrize("lock", ["write", "read", "none"])
def test_one_call_for_each_present_page(lock: str) -> None:
    made = lab("per_pte", lock)
    aged(made)
    use(made, 5, 200)
    made.kvm.host.state[200] |= 4
    made.kvm.host.state[300] |= 4
    report = made.age()
    assert (report.calls, report.scanned, report.young) == (512, 512, 3)
    assert found(made) == [5, 200, 300]
    assert made.young() == 0
    modes = {"write": {("age", "write"): 512}, "read": {("age", "read"): 512}, "none": {}}
    assert made.acquisitions() == modes[lock]


@pytest.mark.parametrize("lock", ["write", "read", "none"])
def test_one_call_for_each_large_folio(lock: str) -> None:
    """v7.1: the entries of one folio that lie in a row are asked for together."""
    made = lab("per_folio", lock, folio=64 * KIB)
    aged(made)
    use(made, 5, 200, 201)
    report = made.age()
    assert (report.calls, report.scanned, report.young) == (32, 512, 3)
    assert found(made) == [5, 200, 201]
    assert made.young() == 0
    assert sum(made.acquisitions().values()) == (0 if lock == "none" else 32)


@pytest.mark.parametrize("lock", ["write", "none"])
@pytest.mark.parametrize(
    ("taken", "calls"),
    [
        ([range(5)], 32),  # the first folio lacks its head
        ([range(11, 16)], 32),  # and its tail
        ([range(16)], 31),  # a whole one is gone
        ([range(1, 2), range(3, 4), range(5, 6)], 32 + 3),
        ([range(8, 24)], 32),  # two that lack half each
    ],
)
def test_a_partial_folio_is_a_call_for_each_run(taken: list[range], calls: int, lock: str) -> None:
    """16 entries each: only consecutive present ones of the same folio share a call."""
    made = lab("per_folio", lock, folio=64 * KIB)
    for run in taken:
        made.drop(4 * KIB * run.start, 4 * KIB * len(run))
    made.kvm.mmu_lock.rows.clear()
    report = made.age()
    assert (report.calls, report.scanned) == (calls, 512 - sum(map(len, taken)))
    assert sum(made.acquisitions().values()) == (0 if lock == "none" else calls)


@pytest.mark.parametrize(("folio", "calls"), [(4 * KIB, 512), (16 * KIB, 128), (2 * MIB, 1)])
def test_calls_by_folio_size(folio: int, calls: int) -> None:
    assert lab("per_folio", "write", folio=folio).age().calls == calls


def test_a_hole_ends_the_run() -> None:
    """folio_pte_batch() counts consecutive present entries: two runs around a hole."""
    made = lab("per_folio", "write", folio=64 * KIB)
    made.drop(4 * KIB * 5, 4 * KIB)
    made.kvm.mmu_lock.rows.clear()
    assert made.age().calls == 33


@pytest.mark.parametrize("lock", ["write", "read", "none"])
def test_two_calls_for_a_page_that_is_young_and_one_for_an_old_one(lock: str) -> None:
    made = lab("per_pte_twice", lock)
    aged(made)
    use(made, 5, 200)
    made.kvm.host.state[300] |= 4
    report = made.age()
    assert (report.calls, report.scanned, report.young) == (512 + 2, 512, 3)
    assert found(made) == [5, 200, 300]
    assert made.young() == 0
    modes = {"write": {("age", "write"): 514}, "read": {("age", "read"): 514}, "none": {}}
    assert made.acquisitions() == modes[lock]
    told = made.kvm.young_calls
    assert (told.locked, told.lockless) == ((0, 514) if lock == "none" else (514, 0))


@pytest.mark.parametrize("lock", ["read", "none"])
def test_a_page_that_is_young_costs_a_second_call(lock: str) -> None:
    """SRCU and memslot, an atomic to get in if there is a lock, the walk; then the promotion."""
    lengths = []
    for young in ([], [5, 200]):
        made = lab("per_pte_twice", lock)
        use(made, *young)
        report = made.age()
        lengths.append(report.end_ns - report.start_ns)
    costs, line = made.kvm.costs.ageing, made.kvm.costs.line
    call_ns = costs.call_ns + costs.walk_ns + (line.same_ns if lock == "read" else 0)
    # The two entries lie in two lines.
    assert lengths[1] - lengths[0] == 2 * (call_ns + costs.promote_ns + line.transfer_ns)


def test_a_huge_page_is_tested_and_cleared() -> None:
    lengths, calls = [], []
    for leaves in ([], [5, 200]):
        made = lab("per_pte_twice", "read", fill=False, folio=2 * MIB)
        made.fill()
        made.kvm.host.huge[0] = True
        forget(made)
        use(made, *leaves)
        report = made.age()
        calls.append((report.calls, report.young))
        lengths.append(report.end_ns - report.start_ns)
    assert calls == [(1, 0), (2, 1)]
    costs, line = made.kvm.costs.ageing, made.kvm.costs.line
    walk_ns = costs.walk_ns + 511 * costs.visit_ns
    assert lengths[1] - lengths[0] == costs.call_ns + line.same_ns + walk_ns + costs.promote_ns


def test_a_window_of_64_is_tested_and_cleared() -> None:
    """At most two calls a window; the second covers the first to the last bit that is set."""
    made = lab("bitmap", "none")
    aged(made)
    use(made, 64 + 10, 64 + 20, 448)
    report = made.age()
    assert (report.calls, report.scanned, report.young) == (8 + 2, 512, 3)
    assert found(made) == [74, 84, 448]
    assert made.young() == 0
    assert not made.kvm.mmu_lock.rows


def test_the_second_call_walks_from_the_first_bit_to_the_last() -> None:
    """Its cost shows it, apart from the lines (of eight entries) that the guest's CPU wrote."""
    lengths = {}
    for leaves, lines in {(70,): 1, (70, 71): 1, (70, 127): 2, (64, 127): 2}.items():
        made = lab("bitmap", "none")
        use(made, *leaves)
        costs = made.kvm.costs.ageing
        report = made.age()
        length = report.end_ns - report.start_ns - len(leaves) * costs.promote_ns
        length -= lines * made.kvm.costs.line.transfer_ns
        lengths[leaves] = length - costs.call_ns - costs.walk_ns
    costs = made.kvm.costs.ageing
    base = lengths[70,]
    assert lengths[70, 71] - base == costs.visit_ns
    assert lengths[70, 127] - base == 57 * costs.visit_ns
    assert lengths[64, 127] - base == 63 * costs.visit_ns


def test_only_pages_on_the_lists_are_asked_for() -> None:
    """walk_pte_range() skips holes and zero pages."""
    made = lab("per_pte", "write", fill=False)
    made.fill(range(0, 512, 4))
    made.kvm.host.install(1, False)
    report = made.age()
    assert (report.calls, report.scanned) == (128, 128)


def test_an_unmapped_page_that_the_host_has_is_asked_for_in_vain() -> None:
    made = lab("per_pte", "write", fill=False)
    made.kvm.host.install(9, True)
    forget(made)
    report = made.age()
    assert (report.calls, report.young) == (1, 0)
    assert made.acquisitions() == {("age", "write"): 1}


# -- what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("young", [0, 100, 512])
def test_a_locked_call_on_an_idle_machine(young: int) -> None:
    """SRCU and memslot, one atomic, the walk, and the scan of the host's entry.

    At the end of the table the lines of young entries are paid for, eight entries each.
    """
    made = lab("per_pte", "write")
    use(made, *range(young))
    costs, same_ns = made.kvm.costs.ageing, made.kvm.costs.line.same_ns
    report = made.age()
    rows = account(made.kvm.mmu_lock.rows)
    assert {(row["hold"], row["met"]) for row in rows} == {(costs.walk_ns, FAST)}
    assert {row["wait"] for row in rows[1:]} == {same_ns}
    each = costs.call_ns + same_ns + costs.walk_ns + costs.scan_ns
    length = rows[-1]["entry"] - rows[0]["entry"]
    assert length == 511 * each + min(young, 511) * costs.promote_ns
    last = costs.walk_ns + costs.scan_ns + (young == 512) * costs.promote_ns
    last += {0: 0, 100: 13, 512: 64}[young] * made.kvm.costs.line.transfer_ns
    assert report.end_ns - rows[-1]["entry"] == last + costs.lru_lock_ns + costs.resched_ns


@pytest.mark.parametrize(
    ("by_host", "by_guest", "lines"),
    [
        ([], [], 0),
        ([], [8], 1),
        ([], [7, 8], 2),  # eight entries a line, 0 to 7 and 8 to 15
        ([], range(512), 64),
        ([3], [], 1 + 1),  # its struct page and the host's entry
        ([3, 4, 500], [], 3 + 2),
        ([3, 4, 500], [3, 501], 3 + 2 + 2),  # host entries and stage-2 entries are other lines
        (range(512), range(512), 512 + 64 + 64),
    ],
)
def test_lines_that_a_walk_over_a_table_fetches(
    by_host: Iterable[int], by_guest: Iterable[int], lines: int
) -> None:
    host, guest = (np.array([*leaves], np.int64) for leaves in (by_host, by_guest))
    assert fetched_lines(host, guest) == lines
    lengths = []
    for transfer in (45, 145):
        made = Lab(
            2 * MIB,
            machine={
                "base": "graviton3-64c",
                "set": {"atomic_contended_service_ns": transfer},
            },
            kernel="linux-6.12",
        )
        made.fill()
        forget(made)
        use(made, *guest)
        made.kvm.host.state[host] |= np.uint8(YOUNG)
        report = made.age()
        lengths.append(report.end_ns - report.start_ns)
    # mmap_lock and mmu_lock come from elsewhere too.
    assert lengths[1] - lengths[0] == 100 * (lines + 2)


def test_fetching_them_is_part_of_holding_the_host_table() -> None:
    """A fault that waits for the table waits for that too: see test_fault.py for the sum."""
    made = Lab(2 * MIB, kernel="linux-6.12")
    made.fill(range(511))
    left = []
    unlock = made.kvm.host.unlock_table
    made.kvm.host.unlock_table = lambda table, t_ns: (left.append(t_ns), unlock(table, t_ns))  # type: ignore[method-assign]
    report = made.age()
    costs = made.kvm.costs.ageing
    assert left == [report.end_ns - costs.lru_lock_ns - costs.resched_ns]
    last = account(made.kvm.mmu_lock.rows)[-1]
    fetch_ns = (511 + 64 + 64) * made.kvm.costs.line.transfer_ns
    assert left[0] - (last["entry"] + last["hold"]) == fetch_ns + costs.scan_ns + costs.promote_ns


def test_a_call_for_a_folio_walks_once_and_visits_its_other_leaves() -> None:
    made = lab("per_folio", "write", folio=64 * KIB)
    costs = made.kvm.costs.ageing
    made.age()
    rows = account(made.kvm.mmu_lock.rows)
    assert {row["hold"] for row in rows} == {costs.walk_ns + 15 * costs.visit_ns}


def test_without_a_lock_there_is_no_atomic() -> None:
    lengths = {}
    for lock in ("write", "none"):
        made = lab("per_pte", lock)
        report = made.age()
        lengths[lock] = report.end_ns - report.start_ns
    line = made.kvm.costs.line
    assert lengths["write"] - lengths["none"] == 511 * line.same_ns + line.transfer_ns


def test_mmap_lock_is_given_back_after_a_gib_with_4096_promotions() -> None:
    """walk_pud_range(): wanted are 4096 batched promotions; fewer, and the walk goes on."""
    extra = []
    for young in (4095, 4096):
        made = Lab(GIB + 2 * MIB)
        made.fill(range(4096))
        made.fill([GIB // (4 * KIB)])
        forget(made)
        aged(made)
        use(made, *range(young))
        report = made.age()
        costs = made.kvm.costs.ageing
        extra.append(report.end_ns - report.start_ns - young * costs.promote_ns)
    # Letting go is not waited for and over by then; taking it again changes count and owner.
    back = costs.lru_lock_ns + costs.resched_ns + 2 * made.kvm.costs.line.same_ns
    assert extra[1] - extra[0] == back


# -- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "lock", "calls"),
    [("per_pte", "write", 32), ("per_folio", "write", 32), ("bitmap", "none", 32 + 2)],
)
def test_a_block_is_one_entry(call: str, lock: str, calls: int) -> None:
    """One call a block, one visit; with a bitmap one bit, and a second call if it is set."""
    made = lab(call, lock, 64 * MIB, mapping=2 * MIB)
    use(made, 3, 4)
    report = made.age()
    assert (report.calls, report.scanned, report.young) == (calls, 32, 2)
    assert made.young() == 0
    costs = made.kvm.costs.ageing
    for row in account(made.kvm.mmu_lock.rows):
        assert row["hold"] == costs.walk_ns
    if call == "bitmap":
        each = 32 * costs.scan_ns + 34 * (costs.call_ns + costs.walk_ns) + 2 * costs.promote_ns
        line = made.kvm.costs.line
        # mmap_lock's count and owner; and blocks 3 and 4 lie in one line of stage-2 entries.
        rest = line.transfer_ns + line.same_ns + line.transfer_ns
        rest += costs.lru_lock_ns + costs.resched_ns
        assert report.end_ns - report.start_ns == each + rest


# -- a flush for each call --------------------------------------------------------------------


def test_the_baseline_of_the_first_posting_flushes_under_the_lock() -> None:
    """<Y/e6Z+KIl6sYJoRg@google.com>: a call that found something young, and only that one."""
    holds = {}
    for kernel in ("linux-6.4-yuzhao-v1-baseline", "linux-6.12"):
        made = Lab(2 * MIB, kernel=kernel)
        made.fill()
        forget(made)
        use(made, 7, 300)
        assert made.age().young == 2
        holds[kernel] = [row["hold"] for row in account(made.kvm.mmu_lock.rows)]
        assert made.broadcasts() == (2 if "v1" in kernel else 0)
    longer = np.array(holds["linux-6.4-yuzhao-v1-baseline"]) - np.array(holds["linux-6.12"])
    assert np.flatnonzero(longer).tolist() == [7, 300]
    assert set(longer[[7, 300]].tolist()) == {made.kvm.costs.tlbi_all_ns}


def test_the_guest_loses_its_translations_to_it() -> None:
    """With a flush each pass sees what the guest used since; without, the TLB hides it."""
    young = {}
    for flush in ("per_call", "none"):
        access = {"pattern": "uniform", "touches": 100_000, "write_ratio": 1.0, "think": 50}
        phases = [{"pattern": "populate"}, access]
        built = world(
            guest={"memory": 64 * 4 * KIB, "access": {"pattern": "phases", "phases": phases}},
            kernel={"base": "linux-6.4-yuzhao-v1-baseline", "set": {"ageing_flush": flush}},
            ageing={"start": 200_000, "interval": 300_000, "passes": 4},
        )
        built.run()
        young[flush] = [report.young for report in built.ageing.passes]
    assert young["none"] == [64, 0, 0, 0]
    assert min(young["per_call"]) > 60


# -- generations ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "moved"), [("linux-6.12", [40, 40]), ("linux-7.1", [0, 40])])
def test_a_page_seen_young_moves_at_once_or_the_second_time(kernel: str, moved: list[int]) -> None:
    """v7.x: the first sighting only sets the referenced bit."""
    made = Lab(2 * MIB, kernel=kernel)
    made.fill()
    forget(made)
    made.kvm.host.lru.inc_max_seq()
    seen = []
    for _ in range(2):
        use(made, *range(40))
        youngest = made.kvm.host.lru.max_seq % 4
        assert made.age().young == 40
        seen.append(made.kvm.host.lru.sizes[youngest])
    assert seen == moved


def test_a_pass_ends_with_a_new_generation() -> None:
    made = lab("per_pte", "write")
    lru = made.kvm.host.lru
    before = lru.max_seq
    made.age()
    made.age()
    assert lru.max_seq == before + 2


# -- beside a running guest -------------------------------------------------------------------


@pytest.mark.parametrize(("pages", "cached"), [(64, True), (8192, False)])
def test_a_page_whose_translation_is_cached_looks_old(pages: int, cached: bool) -> None:
    """Ageing does not invalidate, so only a TLB miss sets the flag again."""
    access = {"pattern": "uniform", "touches": 500_000, "write_ratio": 1.0, "think": 50}
    phases = [{"pattern": "populate"}, access]
    built = world(
        guest={"memory": pages * 4 * KIB, "access": {"pattern": "phases", "phases": phases}},
        ageing={"start": pages * 3000, "interval": 300_000, "passes": 4},
    )
    assert (pages < built.kvms[0].costs.tlb_entries) == cached
    built.run()
    first, *others = built.ageing.passes
    assert first.young == pages
    assert len(others) == 3
    for report in others:
        assert report.young == 0 if cached else report.young > 1000


def test_what_was_taken_back_meanwhile_is_not_promoted() -> None:
    """100 pages go during the walk of their table, some before and some after it saw them young."""
    made = lab("per_pte", "write", 4 * MIB)
    use(made, *range(1024))

    def drop() -> Iterator[Any]:
        yield made.env.timeout(15_000)
        yield from made.kvm.notifier.invalidate(made.task, 15_000, 100, 200)

    made.env.process(drop())
    report = made.age()
    made.env.run()
    seen = [row["entry"] for row in account(made.kvm.mmu_lock.rows) if row["site"] == AGE]
    assert 100 < sum(entry < 15_000 for entry in seen) < 200
    assert (report.scanned, report.young) == (1024, 924)
    assert made.kvm.host.lru.total == 924


@pytest.mark.parametrize(("call", "folio"), [("per_pte", 4 * KIB), ("per_folio", 2 * MIB)])
def test_a_call_that_finds_the_tree_detached_finds_nothing_young(call: str, folio: int) -> None:
    """mmu->pgt is looked at again under the lock (kvm_age_gfn)."""
    made = lab(call, "write", folio=folio)
    use(made, *range(512))

    def detach(entry_ns: int) -> tuple[int, int]:
        made.kvm.stage2.attached = False
        return 5000, entry_ns + 5000

    made.kvm.mmu_lock.write(0, 5, TEARDOWN, detach)
    report = made.age()
    assert (report.scanned, report.young) == (512, 0)
    assert made.young() == 512


def test_locked_calls_exclude_faults_and_unlocked_ones_do_not() -> None:
    waits = {}
    for lock in ("write", "read", "none"):
        kernel = {"base": "linux-6.12", "set": {"ageing_call": "per_pte", "ageing_lock": lock}}
        built = world(guest={"memory": 8 * MIB, "vcpus": 4}, ageing={"passes": 40}, kernel=kernel)
        record = built.run()
        rows = zip(record.locks["site"], record.locks["contended"], strict=True)
        waits[lock] = dict(rows)["fault"]
        assert not record.violations or lock == "none"
    assert waits["write"] > 0
    assert waits["read"] == waits["none"] == 0


# -- the thread -------------------------------------------------------------------------------


def passes(**ageing: Any) -> list[Pass]:
    built = world(guest={"memory": 2 * MIB}, ageing=ageing, duration=20_000_000)
    built.run()
    return built.ageing.passes


def test_passes_begin_at_the_start_and_an_interval_after_the_last_ended() -> None:
    reports = passes(start=3000, interval=200_000, passes=5)
    assert len(reports) == 5
    assert reports[0].start_ns == 3000
    wakeup = world().kvms[0].costs.wakeup_ns
    for before, after in pairwise(reports):
        assert after.start_ns == before.end_ns + 200_000 + wakeup


def test_without_an_interval_the_next_command_comes_at_once() -> None:
    reports = passes(passes=3)
    switch = world().kvms[0].costs.switch_ns
    gaps = [after.start_ns - before.end_ns for before, after in pairwise(reports)]
    assert gaps == [switch, switch]


def test_no_pass_begins_when_the_vcpus_are_done() -> None:
    """The selftest's thread looks for their end between two commands."""
    built = world(guest={"memory": 2 * MIB}, ageing={})
    built.run()
    finished = built.kvms[0].vcpus[0].finished_ns
    reports = built.ageing.passes
    assert all(report.start_ns <= finished for report in reports)
    assert reports[-1].end_ns + world().kvms[0].costs.switch_ns > finished, "there was no gap"


def test_every_guest_is_aged_in_turn() -> None:
    guest = {"memory": 2 * MIB, "access": {"pattern": "populate"}}
    built = world(guests={"a": guest, "b": guest}, ageing={"start": 100_000, "passes": 2})
    built.run()
    assert [report.guest for report in built.ageing.passes] == ["a", "b", "a", "b"]


# -- events -----------------------------------------------------------------------------------


def pass_events(made: Lab) -> int:
    before = events(made.env)
    made.age()
    return events(made.env) - before


@pytest.mark.parametrize("lock", ["write", "none"])
def test_a_pass_that_nobody_disturbs_needs_a_constant_number(lock: str) -> None:
    """The process itself, whatever there is to scan; and as many when something waits far ahead."""
    seen = set()
    for memory in (2 * MIB, 64 * MIB):
        for far in (False, True):
            made = lab("per_pte", lock, memory)
            if far:
                made.env.timeout(10_000_000_000)
            seen.add(pass_events(made))
    assert len(seen) == 1
    assert seen.pop() <= 4


@pytest.mark.parametrize(("call", "folio"), [("per_pte", 4), ("per_folio", 64), ("bitmap", 4)])
def test_a_window_without_lock_needs_one_event_at_most(call: str, folio: int) -> None:
    """Somebody else has an event every 10 ns; 512 windows of 64 entries and 64 tables."""
    made = lab(call, "none", 128 * MIB, folio=folio * KIB)
    ticks = 0

    def ticker() -> Iterator[Any]:
        nonlocal ticks
        while True:
            yield made.env.timeout(10)
            ticks += 1

    made.env.process(ticker())
    seen = pass_events(made)
    windows, tables = 128 * MIB // (64 * 4 * KIB), 64
    assert seen - ticks - 2 <= windows + tables + 8
