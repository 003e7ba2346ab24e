"""Dirty logging, eager splits, collapses, khugepaged and THP splits, against the kernel's rules.

Rules: virt/kvm/kvm_main.c, arch/arm64/kvm/mmu.c, mm/khugepaged.c, v6.12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lab import Lab, account

from simkvm import contenders
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel import host_change, sites
from simkvm.kernel.dirty_log import DirtyLog
from simkvm.kernel.stage2 import AF, BLOCK, VALID, WRITE
from simkvm.scenario import contenders as schema
from simkvm.units import GIB, KIB, MIB

SECOND = 1_000_000_000
BLOCKS = {"mapping": 2 * MIB}
PROTECT, SPLIT = ("write_protect", "write"), ("eager_split", "write")
GET, CLEAR = ("dirty_log_get", "write"), ("dirty_log_clear", "write")
RELAX, FAULT = ("permission_fault", "read"), ("fault", "read")
START, END = ("range_start", "write"), ("range_end", "write")
Touch = tuple[int, bool]


class Logged:
    """A guest with one vCPU that touches in phases a second apart, and a thread that asks."""

    def __init__(self, *phases: list[Touch], memory: int = 8 * MIB, **keys: Any) -> None:
        keys.setdefault("contenders", {"log": {"kind": "dirty_log", "guest": "vm"}})
        self.lab = Lab(memory, keys.pop("guest", BLOCKS), **keys)
        self.kvm, self.log = self.lab.kvm, self.lab.kvm.dirty_log
        self.slot = range(self.kvm.leaves)
        touches = []
        for phase in phases:
            gaps = [0] * (len(phase) - 1) + [SECOND]
            touches += [(page, write, gap) for (page, write), gap in zip(phase, gaps, strict=True)]
        self.vcpu: Vcpu | None = self.lab.touch(*touches) if touches else None
        self._phase = 0
        self._faults = 0

    def touch(self) -> int:
        """The next phase; returns the faults that it takes."""
        assert self.vcpu is not None
        self.lab.t_ns = self._phase * SECOND + SECOND // 2
        self.lab.env.run(self.lab.t_ns)
        self._phase += 1
        before, self._faults = self._faults, self.vcpu.fault.faults
        return self._faults - before

    def do(self, what: str, *args: Any) -> int:
        """An ioctl: returns how long it takes."""
        lab, began = self.lab, self.lab.t_ns
        lab.t_ns = lab.run(getattr(self.log, what)(lab.task, began, self.slot, *args))
        return lab.t_ns - began

    def locks(self) -> Counter[tuple[str, str]]:
        return self.lab.acquisitions()

    def bits(self) -> list[int]:
        return np.flatnonzero(self.log._bitmap).tolist()

    def holds(self, site: int) -> list[int]:
        rows = account(self.kvm.mmu_lock.rows)
        return [row["hold"] for row in rows if row["site"] == site]


def all_pages(pages: int = 2048, write: bool = True, step: int = 1) -> list[Touch]:
    return [(page, write) for page in range(0, pages, step)]


# -- on ---------------------------------------------------------------------------------------


def test_logging_on_protects_chunk_by_chunk_and_flushes_once() -> None:
    """One hold (two chunks here, nobody in the way), then a flush that no lock is held for."""
    made = Logged(memory=2 * GIB)
    for block in (0, 5, 700):
        made.kvm.stage2.map_block(512 * block, WRITE)
    took_ns = made.do("enable")
    assert made.lab.broadcasts() == 1
    costs, log = made.kvm.costs, made.log
    # A GiB of 512 blocks and holes, the second one too, each with a table.
    hold_ns = 1024 * costs.unmap.visit_ns + 3 * log._store_ns
    assert made.holds(sites.WRITE_PROTECT) == [hold_ns]
    assert made.locks() == {PROTECT: 1, SPLIT: 1}, "the lock is taken for no split, too"
    assert took_ns >= 2 * costs.wakeup_ns + hold_ns + costs.tlbi_all_ns
    assert not (made.kvm.stage2.leaf.entries & WRITE).any()


def test_with_all_bits_set_nothing_is_protected() -> None:
    made = Logged(all_pages(step=512))
    made.touch()
    made.locks()
    made.log.initially_set = True
    made.do("enable")
    assert not made.locks()
    assert made.log.dirty(made.slot) == 2048
    assert (made.kvm.stage2.leaf.entries & WRITE).all()


@pytest.mark.parametrize(("kernel", "asked"), [("linux-6.12", 1), ("linux-6.4", 0)])
def test_only_a_kernel_that_can_split_takes_the_lock_to_look(kernel: str, asked: int) -> None:
    made = Logged(kernel=kernel)
    made.do("enable")
    assert made.locks()[SPLIT] == asked


# -- faults under logging -------------------------------------------------------------------------


def test_a_write_splits_the_block_and_fills_in_one_page() -> None:
    made = Logged(all_pages(step=512), [(7, True)], [(8, False), (9, True)])
    assert made.touch() == 4
    made.do("enable")
    made.locks()
    flushes = made.lab.broadcasts()
    assert made.touch() == 1
    assert made.locks() == {RELAX: 1}, "a permission fault, as a read"
    assert made.kvm.splits == 1
    assert made.lab.broadcasts() == flushes + 1, "one IPA"
    entries = made.kvm.stage2.leaf.entries
    assert np.flatnonzero(entries[:512]).tolist() == [7]
    assert made.kvm.stage2.levels[3].counts.tolist() == [1, 0, 0, 0]
    assert made.bits() == [7]
    # The other 511 fault back: what is only read comes back read-only, and unmarked.
    assert made.touch() == 2
    assert made.locks() == {FAULT: 2}
    assert [int(entries[leaf]) for leaf in (7, 8, 9)] == [
        VALID | AF | WRITE,
        VALID | AF,
        VALID | AF | WRITE,
    ]
    assert made.bits() == [7, 9]


def test_a_write_to_a_protected_page_relaxes_in_place() -> None:
    made = Logged([(9, False)], [(7, False), (7, True)], guest={}, memory=2 * MIB)
    made.lab.fill(range(512))
    made.touch()
    made.do("enable")
    made.locks()
    tables, flushes = made.kvm.tables_allocated, made.lab.broadcasts()
    assert made.touch() == 1, "reading needs no fault"
    assert made.locks() == {RELAX: 1}
    assert made.kvm.tables_allocated == tables
    assert made.lab.broadcasts() == flushes, "a local invalidation"
    assert made.bits() == [7]


@pytest.mark.parametrize(
    ("kernel", "mode", "flushes"),
    [("linux-6.1", "read", 1), ("linux-6.4", "read", 1), ("linux-6.12", "read", 0)],
)
def test_who_relaxes_takes_its_kernels_lock(kernel: str, mode: str, flushes: int) -> None:
    made = Logged([(9, False)], [(7, True)], guest={}, memory=2 * MIB, kernel=kernel)
    made.lab.fill(range(512))
    made.touch()
    made.do("enable")
    made.locks()
    before = made.lab.broadcasts()
    made.touch()
    assert made.locks() == {("permission_fault", mode): 1}
    assert made.lab.broadcasts() - before == flushes


@pytest.mark.parametrize(("policy", "found"), [("none", {}), ("write", {("x", "write"): 1})])
def test_the_lock_of_permission_faults_is_a_policy(policy: str, found: dict[Any, int]) -> None:
    kernel = {"base": "linux-6.12", "set": {"permission_fault_lock": policy}}
    made = Logged([(9, False)], [(7, True)], guest={}, memory=2 * MIB, kernel=kernel)
    made.lab.fill(range(512))
    made.touch()
    made.do("enable")
    made.locks()
    assert made.touch() == 1
    assert made.locks() == {("permission_fault", mode): n for (_, mode), n in found.items()}
    assert made.bits() == [7]


def test_what_the_host_protects_is_not_mapped_writable() -> None:
    """A page that fork or KSM protected: a read must not give the right to write."""
    from simkvm.kernel import host_change

    made = Logged([(3, False), (700, False)])
    made.kvm.host.install_huge(0, 512)
    for leaf in range(512, 1024):
        made.kvm.host.install(leaf, True)
    host_change.write_protect(made.kvm.host, 0, 1024)
    made.touch()
    entries = made.kvm.stage2.leaf.entries
    assert int(entries[3]) | AF == VALID | AF | BLOCK
    assert int(entries[700]) == VALID | AF


# -- get and clear --------------------------------------------------------------------------------


def test_get_without_manual_protection_is_one_hold_with_a_walk_a_word() -> None:
    written = [(0, True), (63, True), (64, True), (200, True)]
    made = Logged([(9, False)], written, guest={}, memory=4 * MIB)
    made.lab.fill(range(512))
    made.touch()
    made.log.manual_protect = False
    made.do("enable")
    made.touch()
    assert made.bits() == [0, 63, 64, 200]
    made.kvm.mmu_lock.rows.clear()
    flushes = made.lab.broadcasts()
    made.do("get")
    costs, log = made.kvm.costs, made.log
    # 1024 pages are 16 words; three have bits: pages 0..63, 64 and 200.
    hold_ns = (
        16 * log._word_ns
        + 3 * costs.ageing.walk_ns
        + (64 + 1 + 1) * costs.unmap.visit_ns
        + 4 * log._store_ns
    )
    assert made.holds(sites.DIRTY_LOG_GET) == [hold_ns]
    assert made.locks() == {GET: 1}
    assert made.lab.broadcasts() == flushes + 1
    assert made.bits() == []
    assert not (made.kvm.stage2.leaf.entries & WRITE).any()


def test_get_of_a_clean_log_flushes_nothing() -> None:
    made = Logged(guest={}, memory=4 * MIB)
    made.log.manual_protect = False
    made.do("enable")
    flushes = made.lab.broadcasts()
    made.do("get")
    assert made.lab.broadcasts() == flushes


def test_get_with_manual_protection_takes_no_lock_and_clears_nothing() -> None:
    made = Logged([(5, True)], guest={}, memory=4 * MIB)
    made.do("enable")
    made.touch()
    made.locks()
    made.do("get")
    assert not made.locks()
    assert made.bits() == np.flatnonzero(made.log.got).tolist() == [5]


def test_clear_is_one_hold_an_ioctl() -> None:
    made = Logged(all_pages(1024, step=100), guest={}, memory=4 * MIB)
    made.do("enable")
    made.touch()
    made.do("get")
    made.locks()
    for first in range(0, 1024, 256):
        made.do("clear", first, 256)
    assert made.locks() == {CLEAR: 4}
    assert made.bits() == []


def test_what_is_written_between_get_and_clear_stays_in_the_log() -> None:
    """Clear gets the bitmap that get returned: only those bits go, their pages are protected."""
    made = Logged([(5, True)], [(6, True)], guest={}, memory=4 * MIB)
    made.do("enable")
    made.touch()
    made.do("get")
    made.touch()
    made.do("clear", 0, 1024)
    assert made.bits() == [6]
    made.do("get")
    assert np.flatnonzero(made.log.got).tolist() == [6]


def test_clear_without_manual_protection_is_refused() -> None:
    made = Logged(guest={}, memory=4 * MIB)
    made.log.manual_protect = False
    made.do("enable")
    with pytest.raises(ValueError, match="manual"):
        made.do("clear", 0, 64)


def test_a_clear_of_a_word_protects_the_whole_block_that_it_touches() -> None:
    """With all bits set at first, blocks stay writable until then."""
    made = Logged(all_pages(step=512), [(100, True)])
    made.touch()
    made.log.initially_set = True
    made.do("enable")
    made.do("get")
    made.do("clear", 0, 64)
    assert not (made.kvm.stage2.leaf.entries[:512] & WRITE).any()
    assert (made.kvm.stage2.leaf.entries[512:] & WRITE).all()
    assert made.bits() == list(range(64, 2048))
    assert made.touch() == 1, "so another page of the block faults, and splits it"
    assert made.kvm.splits == 1


# -- eager split ------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "holds"), [(2 * MIB, 1 + 4), (4 * MIB, 1 + 2), (8 * MIB, 2)])
def test_eager_split_lets_go_before_each_chunk_it_has_no_tables_for(chunk: int, holds: int) -> None:
    """The cache is filled to one chunk's need: the first hold ends at once, then one a chunk."""
    made = Logged(all_pages(step=512))
    made.touch()
    made.log.split_chunk_bytes = chunk
    made.locks()
    made.do("enable")
    assert made.locks() == {PROTECT: 1, SPLIT: holds}
    assert made.kvm.splits == 4
    assert made.kvm.stage2.linked_tables == 1 + 4
    assert made.kvm.stage2.levels[3].counts.tolist() == [512] * 4
    assert (made.kvm.stage2.leaf.entries == VALID | AF).all(), "protected before they are split"


def test_eager_split_of_1_gib_makes_513_tables_in_one_hold() -> None:
    made = Logged(guest={"mapping": GIB}, memory=GIB)
    made.kvm.host.install_huge(0, 262_144)
    made.kvm.stage2.map_block(0, WRITE)
    made.log.split_chunk_bytes = GIB
    made.do("enable")
    assert made.kvm.stage2.linked_tables == 513
    costs = made.kvm.costs
    rows = made.holds(sites.EAGER_SPLIT)
    assert len(rows) == 2
    assert rows[1] == costs.unmap.visit_ns + 262_144 * costs.split_entry_ns + costs.tlbi_ns


def test_logging_that_ends_frees_what_eager_splitting_left_over() -> None:
    """Two pages a chunk of 2 MiB, of which each block takes one; whoever ends it fills it anew."""
    made = Logged(all_pages(step=512))
    made.touch()
    made.log.split_chunk_bytes = 2 * MIB
    made.do("enable")
    assert made.kvm.split_cache.pages == 2 - 1
    made.do("disable")
    assert made.kvm.split_cache.pages == 0
    made.do("enable")
    assert made.kvm.split_cache.pages == 2
    made.do("disable")
    assert not made.kvm.oracle.violations


def test_what_is_split_is_not_split_again() -> None:
    """The cache stays full, so all chunks are one hold."""
    made = Logged(all_pages(step=512))
    made.touch()
    made.log.split_chunk_bytes = 2 * MIB
    made.do("enable")
    made.do("disable")
    made.kvm.split_cache.top_up(2)
    made.locks()
    made.do("enable")
    assert made.locks() == {PROTECT: 1, SPLIT: 1}


def test_with_all_bits_set_a_clear_splits() -> None:
    made = Logged(all_pages(step=512))
    made.touch()
    made.log.initially_set, made.log.split_chunk_bytes = True, 2 * MIB
    made.do("enable")
    made.do("get")
    made.locks()
    made.do("clear", 0, 1024)
    assert made.kvm.splits == 2
    assert made.locks() == {CLEAR: 1, SPLIT: 2}


# -- off --------------------------------------------------------------------------------------


def collapsed(kernel: Any = "linux-6.12") -> Logged:
    """Two blocks split by a write each, logging off, then the blocks come back."""
    made = Logged(
        all_pages(1024, step=512), [(0, True), (512, True)], [(1, False), (513, False)],
        memory=4 * MIB, kernel=kernel,
    )  # fmt: skip
    made.touch()
    made.do("enable")
    made.touch()
    made.do("disable")
    made.locks()
    return made


def test_faults_put_blocks_back_and_leave_a_subtree_each_to_rcu() -> None:
    made = collapsed()
    flushes = made.lab.broadcasts()
    assert made.touch() == 2
    assert made.locks() == {FAULT: 2}
    assert (made.kvm.collapses, made.kvm.stage2.linked_tables) == (2, 1)
    assert made.lab.broadcasts() == flushes + 2, "the span of each table's entry"
    assert made.kvm.tables_freed == made.kvm.tables_called_back == 2
    assert not made.kvm.oracle.total


@pytest.mark.parametrize(("kernel", "leaked"), [("linux-6.3", 2), ("linux-6.4", 0)])
def test_the_2023_leak_is_one_page_a_collapse(kernel: str, leaked: int) -> None:
    made = collapsed(kernel)
    made.touch()
    assert made.kvm.collapses == 2
    assert made.kvm.tables_leaked == leaked
    assert made.kvm.tables_freed == 2 - leaked
    assert made.kvm.oracle.total == leaked


def test_before_v6_2_a_collapse_frees_under_the_write_lock() -> None:
    made = collapsed("linux-6.1")
    made.touch()
    assert made.locks() == {("fault", "write"): 2}
    assert made.kvm.tables_freed == 2
    assert made.kvm.tables_called_back == 0


@pytest.mark.parametrize(("way", "blocks"), [("zap", False), ("recover", True)])
def test_x86s_ways_act_when_logging_ends(way: str, blocks: bool) -> None:
    kernel = {"base": "linux-6.12", "set": {"recover_huge": way, "collapse_free": "per_table"}}
    made = Logged(
        all_pages(1024, step=512), [(0, True), (512, True)], memory=4 * MIB, kernel=kernel
    )
    made.touch()
    made.do("enable")
    made.touch()
    made.locks()
    made.do("disable")
    assert made.locks() == {("recover_huge", "read"): 1}
    assert made.kvm.stage2.linked_tables == 1 - (not blocks) or not blocks
    assert bool((made.kvm.stage2.leaf.entries & BLOCK).all()) == blocks
    assert bool(made.kvm.stage2.leaf.entries.any()) == blocks
    assert made.kvm.collapses == 2


def recovered(*pages: int, protect: int | None = None, old: bool = False) -> Logged:
    """Logging ends over a table of ``pages``, in the place of a huge page (``recover``)."""
    kernel = {"base": "linux-6.12", "set": {"recover_huge": "recover", "unmap_tables": "keep"}}
    made = Logged(memory=4 * MIB, kernel=kernel)
    made.kvm.host.install_huge(0, 1024)
    made.lab.fill(pages)
    if protect is not None:
        made.kvm.stage2.write_protect(protect, protect + 1)
    if old:
        made.kvm.stage2.clear_young(np.array(pages))
    made.log._logged.append(made.slot)
    made.do("disable")
    return made


def test_a_recovered_block_has_the_flags_of_the_first_page_there() -> None:
    """tdp_mmu_make_huge_spte() -> make_huge_spte(), v6.13."""
    flags = [
        recovered(3, 4, protect=protect, old=old).kvm.stage2.leaf.fast[9]
        for protect, old in [(None, False), (3, False), (4, False), (4, True)]
    ]
    block = VALID | BLOCK
    assert flags == [block | AF | WRITE, block | AF, block | AF | WRITE, block | WRITE]


def test_a_table_whose_pages_were_taken_back_is_not_recovered() -> None:
    """-ENOENT: nothing else says that an invalidation of the range runs."""
    made = recovered(3, 700)
    assert made.kvm.collapses == 2
    made = Logged(memory=2 * MIB, kernel={"base": "linux-6.12", "set": {"recover_huge": "recover"}})
    made.kvm.host.install_huge(0, 512)
    made.lab.fill([3])
    made.kvm.zap_leaves(0, 0, 512)
    made.log._logged.append(made.slot)
    made.do("disable")
    assert made.kvm.stage2.table_below(0)
    assert not made.kvm.stage2.leaf.entries.any()


# -- khugepaged and THP split ----------------------------------------------------------------------


def contender(lab: Lab, spec: dict[str, Any]) -> Iterator[Any]:
    model = {"khugepaged": schema.Khugepaged, "thp_split": schema.ThpSplit}[spec["kind"]]
    made = contenders.build(
        lab.kvm, lab.task, np.random.default_rng(1), model.model_validate({"guest": "vm", **spec})
    )
    lab.env.process(made.run())
    return made


def khugepaged(**keys: Any) -> dict[str, Any]:
    return {"kind": "khugepaged", "scan_sleep": SECOND, "guest": "vm", **keys}


@pytest.mark.parametrize(("missing", "allowed", "made"), [(0, 0, 1), (3, 2, 0), (3, 3, 1)])
def test_khugepaged_counts_what_is_missing(missing: int, allowed: int, made: int) -> None:
    lab = Lab(2 * MIB, contenders={"k": khugepaged()})
    lab.fill(range(512 - missing))
    contender(lab, khugepaged(max_ptes_none=allowed))
    lab.env.run(SECOND // 2)
    assert lab.kvm.host.huge.tolist() == [bool(made)]
    assert lab.acquisitions() == ({START: 1, END: 1} if made else {})
    assert lab.kvm.host.present == [512 if made else 512 - missing]


def test_khugepaged_frees_a_table_in_the_unmap_and_a_fault_maps_the_block() -> None:
    """mmap_lock is held for write from before the range to after the copies."""
    lab = Lab(4 * MIB, contenders={"k": khugepaged()})
    lab.fill()
    vcpu = lab.touch((700, True, SECOND), (700, True, 0), (5, False, 0), (6, True, 0))
    contender(lab, khugepaged(pages_to_scan=512))
    seen: list[int] = []
    lab.env.process(look(lab, seen))
    lab.env.run(SECOND // 2)
    assert lab.kvm.tables_freed == 1
    assert lab.kvm.tables_called_back == 0
    assert lab.kvm.stage2.linked_tables == 2
    copied_ns = 512 * lab.kvm.costs.copy_page_ns
    assert seen[-1] - seen[0] >= copied_ns
    lab.env.run(vcpu.process)
    assert vcpu.fault.faults == 1
    assert lab.kvm.stage2.is_block(511)
    assert lab.kvm.collapses == 0


def look(lab: Lab, seen: list[int]) -> Iterator[Any]:
    while True:
        yield lab.env.timeout(1000)
        if lab.kvm.host.mmap_writer is not None:
            seen.append(int(lab.env.now))


def test_a_thp_split_removes_the_block_and_no_table() -> None:
    spec = {"kind": "thp_split", "guest": "vm", "rate": 1.0}
    lab = Lab(4 * MIB, BLOCKS, contenders={"s": spec})
    lab.kvm.host.install_huge(0, 1024)
    for leaf in (0, 512):
        lab.kvm.stage2.map_block(leaf, WRITE)
    contender(lab, spec)
    lab.env.run(SECOND // 2)
    assert lab.acquisitions() == {START: 1, END: 1}
    assert lab.kvm.host.huge.tolist() == [False, True]
    assert lab.kvm.host.present == [512, 512]
    assert lab.kvm.tables_freed == 0
    assert lab.kvm.stage2.levels[2].counts.tolist() == [1]
    assert not lab.kvm.stage2.leaf.entries[:512].any()


def test_taking_back_part_of_a_huge_page_splits_it() -> None:
    made = Logged(all_pages(step=512), [(5, False)])
    made.touch()
    made.lab.drop(16 * KIB, 4 * KIB)
    assert made.kvm.host.huge.tolist() == [False, True, True, True]
    assert made.kvm.host.present == [511, 512, 512, 512]
    assert not made.kvm.stage2.leaf.entries[:512].any(), "stage 2 loses all of the block"
    assert made.touch() == 1
    assert not made.kvm.stage2.is_block(5)


@pytest.mark.parametrize(
    ("first", "size", "ranges"),
    [(0, 2 * MIB, 1), (4 * KIB, 2 * MIB - 4 * KIB, 2), (MIB, 2 * MIB, 3), (MIB, 5 * MIB, 2)],
)
def test_each_huge_page_that_a_range_cuts_is_a_range_of_its_own(
    first: int, size: int, ranges: int
) -> None:
    """zap_pmd_range() -> __split_huge_pmd(), between the start and the end of the one around it."""
    made = Logged(all_pages(step=512))
    made.touch()
    made.locks()
    made.lab.drop(first, size)
    assert made.locks() == {START: ranges, END: ranges}
    assert made.kvm.notifier.in_progress == 0
    assert made.kvm.notifier.sequence == ranges


def test_a_block_mapped_beside_a_range_goes_with_the_huge_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a fault looks at ranges, one on page 0 is not in the way of pages 57 to 511."""
    made = Logged(all_pages(step=512))
    made.touch()
    start = made.kvm.notifier._start

    def started(task: Any, t_ns: int, first: int, last: int, blockable: bool) -> Iterator[Any]:
        t_ns = yield from start(task, t_ns, first, last, blockable)
        if first == 57:
            made.kvm.stage2.map_block(0, WRITE)
        return t_ns

    monkeypatch.setattr(made.kvm.notifier, "_start", started)
    made.lab.drop(57 * 4 * KIB, MIB)
    assert not made.kvm.host.huge[0]
    assert not made.kvm.stage2.leaf.entries[:512].any()
    assert made.kvm.stage2.leaf.entries[512:].all()


def test_zapping_a_huge_page_is_one_entry() -> None:
    lab = Lab(4 * MIB, BLOCKS, contenders={"l": {"kind": "dirty_log", "guest": "vm"}})
    lab.kvm.host.install_huge(0, 1024)
    assert lab.kvm.host.zap(0, 512) == 1
    assert lab.kvm.host.zap(512, 1023) == 511


def test_zapping_a_huge_page_on_its_way_is_none() -> None:
    """A PMD migration entry maps nothing (``zap_huge_pmd``); its neighbour is one entry."""
    lab = Lab(4 * MIB, BLOCKS, contenders={"l": {"kind": "dirty_log", "guest": "vm"}})
    host = lab.kvm.host
    host.install_huge(0, 1024)
    host_change.depart(host, 0, 512)
    assert host.zap(0, 1024) == 1
    assert host.present == [0, 0]
    assert not host.huge.any()


# -- costs ------------------------------------------------------------------------------------


def test_unmapping_a_block_cleans_all_of_it() -> None:
    """Neoverse N1 cannot force write-back: 40 us for 2 MiB where 80 ns are a page's."""
    uniform = Lab(4 * MIB, BLOCKS, machine="ampere-altra-80c")
    among = Logged(machine="ampere-altra-80c").kvm
    assert uniform.kvm.unmap_costs(0).leaf_ns == 520 - 80 + 40_000
    assert among.unmap_costs(0).leaf_ns == 520
    assert among.unmap_costs(0).block_ns == 520 - 80 + 40_000
    forced = Logged().kvm.unmap_costs(0)
    assert forced.leaf_ns == forced.block_ns


def test_a_relaxed_page_is_not_cleaned() -> None:
    costs = Lab(machine="ampere-altra-80c").kvm.costs.fault
    assert costs.hold_ns - costs.relax_hold_ns == 80
    total = costs.exit_ns + costs.vma_ns + costs.relax_hit_ns + costs.relax_hold_ns + costs.enter_ns
    line = Lab(machine="ampere-altra-80c").kvm.costs.line
    atomics = 3 + 2  # mmap_lock's count twice and its owner; mmu_lock's word twice
    assert abs(total + atomics * line.same_ns - 850) <= 3, "perm_fault_total_ns"


def test_other_vcpus_hear_of_a_block() -> None:
    """Shares that meet inside a block: who planned to fault on a page of it does not."""
    lab = Lab(
        2 * MIB, {**BLOCKS, "vcpus": 2}, contenders={"l": {"kind": "dirty_log", "guest": "vm"}}
    )
    first = lab.touch((0, True, 0))
    second = lab.touch((300, False, 0), (9, True, 0))
    lab.env.run(SECOND)
    assert lab.kvm.shared
    assert first.fault.faults + second.fault.faults <= 2
    assert lab.kvm.stage2.leaf.counts.sum() == 0


def test_the_log_knows_its_slot() -> None:
    made = Logged()
    assert isinstance(made.log, DirtyLog)
    assert not made.log.logs(0)
    made.do("enable")
    assert made.log.logs(2047)
    assert not made.log.logs(2048)
    made.do("disable")
    assert not made.log.logs(0)
