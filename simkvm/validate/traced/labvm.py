"""The program that drove KVM in the traced experiments, on the model's parts.

It is a VMM without a guest operating system. Its guest has one page of code in a memory slot of its
own, 1 GiB below a slot of memory at 2 GiB, and touches pages with the stage-1 MMU off. A run is a
list of commands, done one after the other; `LabVm.do` does one and returns what the kernel
would have counted meanwhile, by the name of the function or the lock that was traced.

Commands take numbers, offsets and lengths in KiB, a length of 0 being the rest of memory:

    pop:OFFSET,LENGTH,WRITE          vCPUs touch each page of the range once, split evenly
    pops:OFFSET,LENGTH,WRITE,STRIDE  the same, a page each STRIDE KiB
    rand:OFFSET,LENGTH,N,WRITE       each vCPU touches N random pages of the range
    host:OFFSET,LENGTH               the VMM itself writes each page of the range
    dn:OFFSET,LENGTH                 one madvise(MADV_DONTNEED); munmap is the same to KVM
    dnc:OFFSET,LENGTH,PIECE          MADV_DONTNEED piece by piece
    dnr:OFFSET,LENGTH,N              N times one page, at random places
    dirty:ON, slotdel                dirty logging of the slot, its end
    bgrand:OFFSET,LENGTH,WRITE       vCPUs touch random pages of the range from now on
    bgstop                           until now
    age:SWAPPINESS                   a pass of MGLRU's ageing over the memcg (lru_gen in debugfs)
    evict:AHEAD,N                    eviction of up to N pages of the generation AHEAD of the oldest
    pageout:OFFSET,LENGTH            one madvise(MADV_PAGEOUT)
    sleep:MS, destroy                as they say

The model has one memory slot. A guest of small pages gets the page of code in front of its memory,
in the GiB below, where it costs what it cost there: two tables and a leaf. A guest on huge pages
cannot have it there, nor one whose slot goes; its two tables and one page are then added to what is
counted. A run that evicts has the rest of its memcg with it (:mod:`simkvm.validate.traced.memcg`);
its page of code has a host table to itself, so that memory begins where a host table does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from itertools import islice, pairwise
from typing import Any, Final

import numpy as np
from simpy import Event

from simkvm.guest.patterns import Chunk
from simkvm.guest.pause import Pause
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.kernel.task import Task, reach
from simkvm.units import GIB, KIB, MIB
from simkvm.validate.traced.lab import Lab, Tally
from simkvm.validate.traced.memcg import Memcg, Others, guests

PAGE: Final = 4 * KIB
CODE_PAGES: Final = 1
CODE_TABLES: Final = 2
TABLE_PAGES: Final = 512
MS: Final = 1_000_000
BACKGROUND_TOUCHES: Final = 512
BACKGROUND_GAP_NS: Final = 1000
ROUND_TRIP_NS: Final = 100_000  #: between two commands, a snapshot of /proc/vmstat apart

#: Knuth's MMIX generator, which the program uses for every random choice.
MULTIPLIER: Final = 6364136223846793005
INCREMENT: Final = 1442695040888963407

Counts = Counter[str]


class Orders(Pause):
    """The threads of the vCPUs wait for the next command, asleep."""

    def __init__(self, vcpus: int) -> None:
        self._waiting: list[Event] = []
        self._vcpus = vcpus
        self.last_ns = 0  #: when the last thread came

    def spend(self, vcpu: Vcpu, t_ns: int) -> Generator[Event, Any, int]:
        """Wait on the CPU of ``vcpu``; returns when it was told to go on."""
        t_ns = yield from reach(vcpu.kvm.env, t_ns)
        vcpu.cpu.sleep(t_ns)
        told = Event(vcpu.kvm.env)
        self._waiting.append(told)
        self.last_ns = max(self.last_ns, t_ns)
        at_ns: int = yield told
        vcpu.cpu.enter_kernel(at_ns)
        return at_ns

    @property
    def all_wait(self) -> bool:
        """Whether no thread is under way."""
        return len(self._waiting) == self._vcpus

    def give(self, t_ns: int) -> None:
        """Let all go on, at ``t_ns``, which is now or later."""
        waiting, self._waiting = self._waiting, []
        for told in waiting:
            told._ok = True
            told._value = t_ns
            told.env.schedule(told, delay=max(0, t_ns - int(told.env.now)))


class LabVm:
    """A VM of ``memory`` bytes. ``thp``: on huge pages. ``lab`` as :class:`Lab`'s ``keys``.

    ``apart``: the page of code is only added to what is counted; ``meet``: vCPUs may touch the
    same page at the same time; ``others``: what else is in the memcg of a run that evicts.
    """

    def __init__(
        self,
        memory: int,
        vcpus: int = 1,
        thp: bool = False,
        *,
        apart: bool = False,
        meet: bool = False,
        others: Others | None = None,
        **lab: Any,
    ) -> None:
        self._memory = memory
        self._apart = apart or thp
        guest: dict[str, Any] = {"vcpus": vcpus}
        if meet:
            guest["access"] = {"pattern": "uniform", "touches": 1}
        if thp:
            guest["mapping"] = 2 * MIB
            lab.setdefault("contenders", {"log": {"kind": "dirty_log", "guest": "vm"}})
        # The page of the slot where memory begins.
        self._first = 0 if self._apart else 1 if others is None else TABLE_PAGES
        guest["ipa_base"] = 2 * GIB - self._first * PAGE
        if others is not None:
            guest["memory"] = memory + self._first * PAGE
            lab["guests"] = guests(guest)
        self.lab = Lab(memory + self._first * PAGE, guest, **lab)
        self._memcg = None if others is None else Memcg(self.lab, others)
        self._kvm = self.lab.kvm
        self._tally = Tally(self.lab)
        self._offers = 0  # to break the lock
        self._count_offers()
        self._orders = Orders(vcpus)
        self._jobs: list[Iterator[Chunk]] = [iter(())] * vcpus
        self._stop = self._over = self._populated = False
        for index in range(vcpus):
            kind = type(self.lab.vcpus[0])
            cpu = self.lab.world.cpus[index]
            self.lab.start(kind(self._kvm, index, cpu, self._thread(index)))
        self._random = 88172645463325252
        self._draw_seeds()
        if not self._apart:
            self._touch([np.array([self._first - 1])])
        self._before = self._totals()
        self.lab.acquisitions()

    def _count_offers(self) -> None:
        lock_break = self._kvm.lock_break

        def counted(task: Task, t_ns: int) -> bool:
            self._offers += 1
            return lock_break(task, t_ns)

        self._kvm.lock_break = counted  # type: ignore[method-assign]

    # -- commands -----------------------------------------------------------------------------

    def do(self, command: str) -> Counts:
        """Do ``command``; what was counted by its end, without what is zero."""
        name, _, text = command.partition(":")
        numbers = [int(each) for each in text.split(",")] if text else []
        lab = self.lab
        lab.t_ns += ROUND_TRIP_NS
        lab.env.run(lab.t_ns)
        extra = getattr(self, f"_{name}")(*numbers) or {}
        return self._count(Counter(extra))

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        """First byte and bytes of a range, in the slot of memory."""
        first = offset * KIB
        return first, length * KIB or self._memory - first

    def _pop(self, offset: int = 0, length: int = 0, write: int = 0) -> Counts:
        return self._pops(offset, length, write, PAGE // KIB)

    def _pops(self, offset: int, length: int, write: int, stride: int) -> Counts:
        first, size = self._range(offset, length)
        step, vcpus = stride * KIB, len(self._jobs)
        self._draw_seeds()
        share = size // vcpus // step * step
        ends = [(v + 1) * share for v in range(vcpus - 1)] + [size]
        pages = [
            np.arange(first + v * share, first + end, step, dtype=np.int64) // PAGE
            for v, end in enumerate(ends)
        ]
        counts = self._touch([self._first + each for each in pages], bool(write))
        if self._memcg is not None and not self._populated:
            self._memcg.unlist(self._first - 1, self._first, self._kvm.leaves)
            self._populated = True
        return counts

    def _draw_seeds(self) -> list[int]:
        """Every job of a vCPU gets a seed, whether or not its touches are random."""
        seeds = []
        for _ in self._jobs:
            self._random = _next(self._random)
            seeds.append(self._random)
        return seeds

    def _rand(self, offset: int, length: int, number: int, write: int) -> Counts:
        first, size = self._range(offset, length)
        pages = []
        for seed in self._draw_seeds():
            drawn = islice(_drawn(seed, size // PAGE), number)
            pages.append(self._first + first // PAGE + np.fromiter(drawn, np.int64))
        return self._touch(pages, bool(write))

    def _touch(self, pages: list[Any], write: bool = True) -> Counts:
        """Have vCPUs touch ``pages``, each its own; each ends with one access to a device."""
        faults = [vcpu.fault for vcpu in self._kvm.vcpus]
        before = [(fault.faults, fault.retries) for fault in faults]
        if self._memcg is not None:  # where the page of code may be gone
            self._memcg.bring_back()
            pages = [np.append(self._first - 1, part) for part in pages]
        for index, part in enumerate(pages):
            if len(part):
                chunk = Chunk(part.astype(np.int64), np.full(len(part), write), 0)
                self._jobs[index] = iter([chunk])
        self._give()
        self._wait()
        taken = sum(fault.faults for fault in faults) - sum(n for n, _ in before)
        again = sum(fault.retries for fault in faults) - sum(n for _, n in before)
        aborts, maps = taken + len(faults), taken - again
        return Counter(
            {
                "kvm_handle_guest_abort": aborts,
                "kvm_guest_fault": aborts,  # an event, where the function was not traced
                "kvm_pgtable_stage2_map": maps,
                # A visit of the entry at each level; pages only.
                "stage2_map_walker": maps * len(self._kvm.stage2.levels),
            }
        )

    def _give(self) -> None:
        """Have the guest run. The emulated processor's TLB is empty then: HCR_EL2 was written."""
        self.lab.env.run(max(self.lab.t_ns, int(self.lab.env.now) + 1))
        for vcpu in self._kvm.vcpus:
            vcpu.forget_translations()
        self._orders.give(self.lab.t_ns)

    def _wait(self) -> None:
        while not self._orders.all_wait:
            self.lab.env.step()
        self.lab.t_ns = max(self.lab.t_ns, self._orders.last_ns, int(self.lab.env.now))

    def _bgrand(self, offset: int, length: int, write: int) -> None:
        first, size = self._range(offset, length)
        self._stop = False
        for index, seed in enumerate(self._draw_seeds()):
            low, drawn = self._first + first // PAGE, _drawn(seed, size // PAGE)
            self._jobs[index] = self._background(low, drawn, bool(write))
        self._give()

    def _background(self, first: int, drawn: Iterator[int], write: bool) -> Iterator[Chunk]:
        """Random touches until :attr:`_stop`.

        Slower than those traced, but as there all pages are touched again between two commands.
        """
        writes = np.full(BACKGROUND_TOUCHES, write)
        while not self._stop:
            pages = first + np.fromiter(islice(drawn, BACKGROUND_TOUCHES), np.int64)
            yield Chunk(pages, writes, BACKGROUND_GAP_NS)

    def _bgstop(self) -> None:
        self._stop = True
        self._wait()

    def _host(self, offset: int = 0, length: int = 0) -> None:
        first, size = self._range(offset, length)
        for page in range(first // PAGE, (first + size) // PAGE):
            self._kvm.host.install(self._first + page, True)

    def _dn(self, offset: int = 0, length: int = 0) -> None:
        first, size = self._range(offset, length)
        self.lab.drop(self._first * PAGE + first, size)

    _munmap = _dn

    def _dnc(self, offset: int, length: int, piece: int) -> None:
        first, size = self._range(offset, length)
        self.lab.drop_in_pieces(piece * KIB, self._first * PAGE + first, size)

    def _dnr(self, offset: int, length: int, number: int) -> None:
        first, size = self._range(offset, length)
        for page in islice(_drawn(12345, size // PAGE), number):  # the program's own seed
            self.lab.drop((self._first + page) * PAGE + first, PAGE)

    def _dirty(self, on: int) -> None:
        log = self._kvm.dirty_log
        ask = log.enable if on else log.disable
        self.lab.t_ns = self.lab.run(ask(self.lab.task, self.lab.t_ns, range(self._kvm.leaves)))

    def _slotdel(self) -> Counts:
        lab = self.lab
        update = MemslotUpdate(self._kvm, lab.task)
        lab.t_ns = lab.run(update.delete(lab.t_ns))
        return Counter({"synchronize_srcu_expedited": update.grace_periods})

    def _age(self, swappiness: int) -> Counts:
        if self._memcg is not None:
            return self._memcg.age(swappiness)
        calls = self.lab.age().calls + (CODE_PAGES if self._apart else 0)
        return Counter({"kvm_age_gfn": calls})

    def _evict(self, ahead: int, number: int) -> Counts:
        assert self._memcg is not None
        return self._memcg.evict(ahead, number)

    def _pageout(self, offset: int, length: int) -> None:
        assert self._memcg is not None
        first, size = self._range(offset, length)
        page = self._first + first // PAGE
        self._memcg.pageout(page, page + size // PAGE)

    def _sleep(self, ms: int) -> None:
        self.lab.t_ns += ms * MS
        self.lab.env.run(self.lab.t_ns)

    def _destroy(self, way: str = "close_vm") -> Counts:
        counts = sum(int(level.counts.sum()) for level in self._kvm.stage2.levels.values())
        tables = self._kvm.stage2.linked_tables
        self._end_threads()
        visits = self.lab.destroy(way).visits
        if self._apart:
            visits += CODE_TABLES * self._kvm.entries
            counts, tables = counts + CODE_PAGES + CODE_TABLES, tables + CODE_TABLES
        return Counter({"stage2_free_walker": visits, "kvm_s2_put_page": counts + tables})

    def _exit(self) -> Counts:
        """The end of the process, which no command is."""
        return self._destroy("process_exit")

    def _end_threads(self) -> None:
        self._over = True
        self._orders.give(self.lab.t_ns)
        self.lab.env.run(int(self.lab.env.now) + 1)

    def _thread(self, index: int) -> Iterator[Chunk | Pause]:
        while True:
            yield self._orders
            if self._over:
                return
            job, self._jobs[index] = self._jobs[index], iter(())
            yield from job

    # -- what is counted ----------------------------------------------------------------------

    def _totals(self) -> Counts:
        kvm, batches = self._kvm, self.lab.world.recorder.batches
        return Counter(
            {
                "stage2_memcache_zalloc_page": kvm.tables_allocated,
                "__kvm_tlb_flush_vmid_ipa, _range": self.lab.broadcasts(),
                "stage2_free_unlinked_table": kvm.collapses,
                "stage2_free_unlinked_table_rcu_cb": kvm.tables_called_back,
                "splits": kvm.splits,
                "rcu_do_batch": len(batches),
                "__cond_resched_rwlock_write": self._offers,
            }
        )

    def _count(self, counts: Counts) -> Counts:
        totals = self._totals()
        counts.update(totals - self._before)
        self._before = totals
        for (site, mode), number in self.lab.acquisitions().items():
            counts[f"mmu_lock {mode}"] += number
            if site in ("range_start", "range_end"):
                counts[f"kvm_mmu_notifier_invalidate_{site}"] += number
            if site == "range_start":
                counts["kvm_unmap_gfn_range"] += number
        for walk in self._tally.walks:
            size = (walk.last - walk.first) * PAGE // KIB
            counts[f"kvm_pgtable_stage2_unmap of {size} KiB"] += 1
        starts = [walk.first for walk in self._tally.walks]
        counts["kvm_unmap_hva_range backwards"] = sum(a > b for a, b in pairwise(starts))
        found = self._tally.take()
        counts["kvm_pgtable_stage2_unmap"] += found["calls"]
        counts["stage2_unmap_walker"] += found["visits"]
        # A leaf drops the reference that it had of its table; a table one of the table above and
        # its own; a block or table that makes room for the other, its entry's.
        counts["kvm_s2_put_page"] += found["leaves"] + 2 * found["tables"]
        counts["kvm_s2_put_page"] += counts["splits"] + counts["stage2_free_unlinked_table"]
        if self._memcg is not None:
            counts.update(self._memcg.counts())
        counts["nr_sec_page_table_pages"] = self._table_pages()
        counts["min_seq"], counts["max_seq"] = (
            self._kvm.host.lru.min_seq,
            self._kvm.host.lru.max_seq,
        )
        return counts

    def _table_pages(self) -> int:
        """Pages of tables that are in use: linked or waiting, with the root's."""
        kvm = self._kvm
        if not kvm.stage2.attached:
            return 0
        pages = kvm.stage2.geometry.root_pages + kvm.stage2.linked_tables + len(kvm.waiting)
        return pages + (CODE_TABLES if self._apart else 0)


def _drawn(state: int, pages: int) -> Iterator[int]:
    """Pages drawn by the generator from ``state`` on."""
    while True:
        state = _next(state)
        yield (state >> 33) % pages


def _next(state: int) -> int:
    return (state * MULTIPLIER + INCREMENT) & ((1 << 64) - 1)
