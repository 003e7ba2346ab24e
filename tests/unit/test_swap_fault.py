"""One fault at a time on a host whose memory can run out (mm/memory.c, v6.12)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import worlds
from simpy import Event
from worlds import MS

from simkvm.kernel.host_memory import OWN, PRESENT, WRPROTECT
from simkvm.kernel.stage2 import VALID, WRITE
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, WRITEBACK, SwappableMemory
from simkvm.kernel.task import Task
from simkvm.units import MIB

LEAF = 7
IDLE = {"pattern": "phases", "phases": [{"pattern": "uniform", "touches": 1, "think": 10**12}]}


class Bench:
    """A guest that lies still, and faults that are taken for it by hand."""

    def __init__(self, kind: str = "optane", kernel: str = "linux-6.12", **swap: Any) -> None:
        arch = "x86-icelake-64c" if "x86" in kernel else "ampere-altra-80c"
        self.world = worlds.world(
            guest={"memory": 4 * MIB, "access": IDLE, "vcpus": 2},
            machine=arch,
            kernel=kernel,
            host={"memory": {"size": 16 * MIB}, "swap": {"kind": kind, **swap}},
        )
        assert self.world.pgdat is not None
        self.pgdat, self.env, self.kvm = self.world.pgdat, self.world.env, self.world.kvms[0]
        host = self.kvm.host
        assert isinstance(host, SwappableMemory)
        self.host, self.device = host, self.pgdat.swap
        self.pages, self.vmstat = self.pgdat.pages, self.pgdat.vmstat
        self.ends: list[int] = []
        self.made = 0

    # -- who faults ---------------------------------------------------------------------------

    def mapped(self, t_ns: int) -> int:
        self.made += 1
        return t_ns

    def enter(self, t_ns: int) -> int:
        return t_ns

    def forget_translations(self) -> None:
        """Nothing is cached."""

    def fault(self, t_ns: int, write: bool, leaf: int = LEAF, cpu: int = 10) -> SwapFaultPath:
        """Start a fault at ``t_ns`` on a CPU of its own."""
        task = Task(f"test{cpu}", self.world.cpus[cpu])
        path = self.kvm.fault_path(self.kvm, self, task)
        assert isinstance(path, SwapFaultPath)
        self.env.process(self._steps(path, t_ns, leaf, write))
        return path

    def _steps(
        self, path: SwapFaultPath, t_ns: int, leaf: int, write: bool
    ) -> Generator[Event, Any, None]:
        yield self.env.timeout(t_ns - int(self.env.now))
        t_ns = path.look_up(t_ns, leaf, write)
        yield self.env.timeout(t_ns - int(self.env.now))
        rest = path.install(t_ns) if path.lacking else None
        if rest is not None:
            t_ns = yield from rest
        yield self.env.timeout(max(0, t_ns - int(self.env.now)))
        grant = path.take(t_ns)
        self.ends.append(grant if isinstance(grant, int) else (yield grant))

    def at(self, t_ns: int, what: Callable[[], object]) -> None:
        """Do something at a time."""
        self.env.timeout(t_ns - int(self.env.now)).callbacks.append(lambda _: what())  # type: ignore[union-attr]

    def run(self, t_ns: int = 50 * MS) -> Bench:
        self.env.run(int(self.env.now) + t_ns)
        return self

    # -- pages by hand ------------------------------------------------------------------------

    def swap_out(self, leaf: int = LEAF) -> None:
        """Its content is in swap alone."""
        assert self.device is not None
        self.device.allocate(1)
        self.host.swap[leaf] = SLOT

    def cache(self, more: int = 0, leaf: int = LEAF) -> None:
        """Eviction has unmapped it: it is in the swap cache."""
        self.swap_out(leaf)
        self.host.swap[leaf] |= CACHED | more
        self.pages.take()
        self.host.lru.add(leaf)

    def zap(self) -> None:
        """MADV_DONTNEED of the page."""
        self.kvm.stage2.leaf.entries[LEAF] = 0
        self.host.zap(LEAF, LEAF + 1)

    @property
    def entry(self) -> int:
        return int(self.kvm.stage2.leaf.entries[LEAF]) & (VALID | WRITE)


def conserved(bench: Bench, *paths: SwapFaultPath) -> bool:
    """Whether every page that was taken is somewhere."""
    host, kvm = bench.host, bench.kvm
    held = host.page_count + host.table_pages + kvm.tables_allocated - kvm.tables_freed
    held += kvm.stage2.geometry.root_pages + sum(path.cached for path in paths)
    held += sum(path.in_flight for path in paths)
    assert bench.device is not None
    return bench.pages.total - bench.pages.free == held + bench.device.pool_pages


def test_a_fresh_page_for_a_write() -> None:
    bench = Bench()
    path = bench.fault(0, write=True)
    bench.run()
    assert bench.host.fast[LEAF] & (PRESENT | OWN) == PRESENT | OWN
    assert (bench.vmstat.first_faults, bench.vmstat.pgmajfault) == (1, 0)
    assert bench.entry == VALID | WRITE
    assert conserved(bench, path)


def test_a_read_of_nothing_takes_no_page() -> None:
    bench = Bench()
    path = bench.fault(0, write=False)
    bench.run()
    assert (bench.host.page_count, bench.host.fast[LEAF] & PRESENT) == (0, PRESENT)
    assert bench.entry == VALID
    assert conserved(bench, path)


def test_the_first_of_two_faults_reads_and_the_other_waits() -> None:
    bench = Bench()
    bench.swap_out()
    paths = bench.fault(0, write=False), bench.fault(200, write=False, cpu=11)
    bench.run()
    assert (bench.vmstat.pgmajfault, bench.device and bench.device.reads) == (1, 1)
    assert bench.host.page_count == 1
    assert not bench.host.folio_locked(LEAF)
    assert conserved(bench, *paths)


def test_a_drive_keeps_the_slot_of_a_page_that_is_read() -> None:
    """``should_try_to_free_swap``; a write takes the slot, and zram keeps none."""
    for kind, write, state in (
        ("optane", False, SLOT | CACHED),
        ("optane", True, 0),
        ("zram", False, 0),
    ):
        bench = Bench(kind)
        bench.swap_out()
        bench.fault(0, write=write)
        bench.run()
        assert bench.host.swap[LEAF] == state
        assert bench.device is not None
        assert bench.device.used == bool(state)


def test_a_full_device_keeps_no_slots() -> None:
    """``mem_cgroup_swap_full``: more than half is in use."""
    bench = Bench(size=64 * 4096)
    for leaf in range(LEAF, LEAF + 33):
        bench.swap_out(leaf)
    bench.fault(0, write=False)
    bench.run()
    assert bench.host.swap[LEAF] == 0


def test_a_clean_page_of_the_swap_cache_is_written_only_after_a_fault() -> None:
    """It is mapped read-only, else eviction would drop what the guest wrote."""
    bench = Bench()
    bench.swap_out()
    bench.fault(0, write=False)
    bench.run()
    assert bench.host.fast[LEAF] & WRPROTECT
    assert bench.entry == VALID
    path = bench.fault(60 * MS, write=True)
    bench.run()
    assert bench.host.swap[LEAF] == 0  # the slot is gone
    assert bench.entry == VALID | WRITE
    assert bench.host.page_count == 1
    assert path.in_flight == 0


def test_a_page_in_the_swap_cache_is_mapped_again_without_a_read() -> None:
    bench = Bench()
    bench.cache()
    path = bench.fault(0, write=True)
    bench.run()
    assert (bench.vmstat.swap_cache_hits, bench.vmstat.pgmajfault) == (1, 0)
    assert bench.host.swap[LEAF] == 0
    assert conserved(bench, path)


def test_a_write_to_a_page_under_writeback_makes_it_dirty_again() -> None:
    bench = Bench()
    bench.cache(WRITEBACK)
    bench.fault(0, write=True)
    bench.run()
    assert bench.host.swap[LEAF] == SLOT | CACHED | WRITEBACK | DIRTY


def test_a_fault_waits_for_who_evicts_the_page() -> None:
    bench = Bench()
    bench.cache()
    bench.host.trylock_folio(LEAF)
    bench.fault(0, write=False)
    bench.run(MS)
    assert bench.ends == []
    bench.at(2 * MS, lambda: bench.host.unlock_folio(LEAF, 2 * MS))
    bench.run()
    assert len(bench.ends) == 1
    assert bench.ends[0] > 2 * MS + bench.kvm.costs.wakeup_ns
    assert bench.pgdat.stalls == []  # the page was there: no stall of memory


def test_a_page_given_up_while_it_is_read_is_not_mapped() -> None:
    """``pte_same`` fails; the slot went with the page, and GUP begins anew: with nothing there."""
    bench = Bench()
    bench.swap_out()
    path = bench.fault(0, write=True)
    bench.at(6000, bench.zap)
    bench.run()
    assert bench.vmstat.pgmajfault == 1
    assert bench.vmstat.first_faults == 1
    assert bench.host.swap[LEAF] == 0
    assert bench.device is not None
    assert bench.device.used == 0
    assert conserved(bench, path)


def test_a_protected_page_given_up_meanwhile_is_allocated_anew() -> None:
    bench = Bench()
    bench.swap_out()
    first = bench.fault(0, write=False)
    bench.run()
    began_ns = int(bench.env.now)
    second = bench.fault(began_ns, write=True)
    bench.at(began_ns + second.exit_ns + 200, bench.zap)
    bench.run()
    assert bench.host.page_count == 1
    assert conserved(bench, first, second)


def test_two_copies_of_the_zero_page_become_one() -> None:
    bench = Bench()
    first = bench.fault(0, write=False)
    bench.run()
    began_ns = int(bench.env.now)
    others = [bench.fault(began_ns, write=True, cpu=cpu) for cpu in (11, 12, 13)]
    bench.run()
    assert bench.host.page_count == 1
    assert bench.vmstat.first_faults == 1
    assert conserved(bench, first, *others)


def test_two_tables_for_one_place_become_one() -> None:
    bench = Bench()
    short = bench.pages.free - bench.pages.marks.min - 5
    bench.pages.take(short)
    bench.pages.reclaimable = lambda: 10**6  # so that nobody is killed meanwhile
    bench.pages.out_of_memory = lambda t_ns: None
    paths = [bench.fault(0, write=True, leaf=LEAF + n, cpu=10 + n) for n in range(4)]
    for path in paths:
        path.cached = 40
    bench.pages.take(4 * 40)
    bench.at(MS, lambda: bench.pages.put(short))
    bench.run()
    assert bench.vmstat.first_faults == 4
    assert bench.host.table_pages == 1
    assert conserved(bench, *paths)


def test_pages_for_the_memory_cache_are_reclaimed_before_the_sequence_is_noted() -> None:
    bench = Bench()
    free = bench.pages.free - bench.pages.marks.min - 5
    bench.pages.take(free)
    path = bench.fault(0, write=True)
    noted: list[int] = []

    def give() -> None:
        bench.pages.put(free)
        noted.append(path._noted_ns)

    bench.at(MS, give)
    bench.pages.reclaimable = lambda: 10**6
    bench.pages.out_of_memory = lambda t_ns: None
    bench.run()
    assert path._noted_ns > noted[0]
    assert path.cached == 40 - bench.kvm.tables_allocated
    assert bench.entry == VALID | WRITE


@pytest.mark.parametrize(("swapped", "at_ns"), [(True, 6000), (False, 1200), (False, 800)])
def test_a_victim_maps_nothing_any_more(swapped: bool, at_ns: int) -> None:
    """MMF_UNSTABLE: even where the host's entry is what it was, as that of a page never touched."""
    bench = Bench()
    if swapped:
        bench.swap_out()
    path = bench.fault(0, write=True)

    def kill() -> None:
        bench.kvm.alive = False
        bench.host.give_all_up()

    bench.at(at_ns, kill)
    bench.run()
    assert bench.env.now > at_ns
    assert bench.host.page_count == 0
    assert bench.made == 0
    assert bench.device is not None
    assert bench.device.used == 0
    assert conserved(bench, path)


def test_only_pages_of_the_working_set_stall() -> None:
    """PSI counts a read if the page went a short time ago (``workingset_refault``)."""
    for recent in (False, True):
        bench = Bench()
        bench.swap_out()
        bench.host.lru.refault = lambda leaf, recent=recent: recent  # type: ignore[attr-defined]
        bench.fault(0, write=False)
        bench.fault(3000, write=False, cpu=11)
        bench.run()
        assert len(bench.pgdat.stalls) == (4 if recent else 0)


def test_a_table_that_x86_brought_in_vain_is_free_again() -> None:
    bench = Bench(kernel="linux-6.12-x86")
    path = bench.fault(0, write=True)
    bench.pages.take(40)
    path.fill_cache()
    taken = bench.pages.total - bench.pages.free
    path._beaten_ns()
    assert bench.pages.total - bench.pages.free == taken - 1
