"""The memory cgroup of the program that drove KVM, where its runs evict.

The guest's memory was not alone in it. There were the pages that the VMM itself used, some that it
did not use any more, and files in tmpfs that it and earlier runs had written: pages that nobody
maps, which eviction writes to swap unasked. They were there before the guest's memory, so they are
the first that eviction comes by, and part of its first batch. And the last pages that the guest's
memory got were not on the LRU yet: each CPU keeps up to 31 new pages to itself before it puts them
there (``lru_add``), and eviction knows nothing of them. What there was of all that is not the
model's to say: it is state that a run begins with, read from the trace (:class:`Others`).

Pages of the VMM lie in no memory slot. Here they are a second guest of the same memcg that never
runs: calls about them reach no slot and take no ``mmu_lock`` of the guest that is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from simkvm.kernel.host_memory import YOUNG
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.pageout import Pageout
from simkvm.kernel.sites import NAMES
from simkvm.kernel.swappable import CACHED, DIRTY, SLOT, SwappableMemory
from simkvm.kernel.vmscan import Reclaimer
from simkvm.units import GIB, KIB
from simkvm.validate.traced.lab import Lab, account

VMM_BYTES: Final = 256 * KIB
HOST: Final = {"memory": {"size": GIB}, "swap": {"kind": "zram"}}  #: never short of anything
SWAPPINESS: Final = 200  #: what the program writes to lru_gen

Counts = Counter[str]


@dataclass(frozen=True)
class Others:
    """What else there was, in pages, and which generations.

    ``min_seq``, ``max_seq``: before the first command. ``waiting``: pages of the guest's memory,
    the last that it got, that never were on the LRU; ``code_listed``: whether the page of code was.
    ``files``: pages of tmpfs. Of the VMM's pages ``used`` ones, used before each command, and
    ``cold`` ones, never used, of which it wants ``back`` when the vCPU runs at last.

    Where they were read: ``files`` are calls of folio_referenced() more than of
    lru_gen_look_around(), ``cold`` notifier ranges more than unmaps, ``used`` pgrefill of the run
    whose guest is cold (the other runs have the same number), ``back`` faults of the last command
    more than unmaps before it. ``waiting`` is by how much nr_anon_pages grew more than
    nr_active_anon over the first command, less the VMM's two pages of those if they waited, too;
    in the run of MADV_PAGEOUT the addresses of its ranges say the same. The page of code was listed
    if its page tables went with it.
    """

    waiting: int
    code_listed: bool
    files: int = 0
    used: int = 0
    cold: int = 0
    back: int = 0
    min_seq: int = 0
    max_seq: int = 3


def guests(vm: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of the scenario: the guest ``vm``, and the VMM's own pages."""
    both = {"access": {"pattern": "populate"}, "memcg": "lab"}
    return {"vm": both | vm, "vmm": {**both, "memory": VMM_BYTES}}


class Memcg:
    """The memcg of ``lab``'s guests, before anything of the guest's memory is there."""

    def __init__(self, lab: Lab, others: Others) -> None:
        pgdat = lab.world.pgdat
        assert pgdat is not None
        lruvec = pgdat.lruvecs[0]
        assert isinstance(lruvec, ListedLruvec)
        self._lab, self._others, self._pgdat, self._lruvec = lab, others, pgdat, lruvec
        self._lru = lruvec.listed_guests[1]
        self._vmm: SwappableMemory = pgdat.memory(0, 1)
        self._reclaimer = Reclaimer(pgdat, lab.task)
        self._pageout = Pageout(pgdat, lab.task)
        self._batches: Counts = Counter()
        self._watch(self._reclaimer)
        self._watch(self._pageout.reclaimer)
        self._set_generations()
        self._files, self._used, self._cold = self._fill()
        self._before = self._totals()

    def _set_generations(self) -> None:
        lruvec, others = self._lruvec, self._others
        lruvec.max_seq, lruvec.min_seq = others.max_seq, others.min_seq
        lruvec.min_seqs = [others.min_seq for _ in lruvec.min_seqs]
        lruvec.mms.seq = others.max_seq - 1

    def _fill(self) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        others, vmm, pages = self._others, self._vmm, self._pgdat.pages
        ends = np.cumsum([0, others.files, others.used, others.cold])
        files, used, cold = (np.arange(first, last) for first, last in pairwise(ends.tolist()))
        pages.take(int(ends[-1]))
        for leaf in files.tolist():
            assert vmm.device is not None
            vmm.device.allocate(1)
            vmm.fast_swap[leaf] = SLOT | CACHED | DIRTY
            self._lru.add(leaf)
        for leaf in [*used.tolist(), *cold.tolist()]:
            vmm.install(leaf, own=True)
        vmm.state[cold] &= np.uint8(~YOUNG & 0xFF)
        return [files, used, cold]

    def _watch(self, reclaimer: Reclaimer) -> None:
        """Count its batches."""
        evict, shrink = reclaimer.lru_gen.evict_folios, reclaimer.shrink_folio_list

        def evict_folios(*args: Any) -> Generator[Any, Any, tuple[int, int]]:
            scanned, t_ns = yield from evict(*args)
            self._batches["evict_folios"] += 1
            self._batches["mm_vmscan_lru_shrink_inactive nr_scanned"] += scanned
            return scanned, t_ns

        def shrink_folio_list(*args: Any) -> Generator[Any, Any, int]:
            self._batches["shrink_folio_list"] += 1
            return (yield from shrink(*args))

        reclaimer.lru_gen.evict_folios = evict_folios  # type: ignore[method-assign,assignment]
        reclaimer.shrink_folio_list = shrink_folio_list  # type: ignore[method-assign,assignment]

    # -- between commands -----------------------------------------------------------------------

    def unlist(self, code: int, first: int, last: int) -> None:
        """Memory of the leaves ``first`` up to ``last`` is there: what of it is not on the LRU."""
        waiting = np.arange(last - self._others.waiting, last, dtype=np.int64)
        leaves = waiting if self._others.code_listed else np.append(waiting, code)
        self._lruvec.listed_guests[0].remove(leaves)

    def run_vmm(self) -> None:
        """The VMM uses its pages."""
        self._vmm.state[self._used] |= np.uint8(YOUNG)

    def bring_back(self) -> None:
        """The VMM wants pages that it had not used for long."""
        for leaf in self._cold[: self._others.back].tolist():
            if self._vmm.fast_swap[leaf] == SLOT:
                vmstat = self._pgdat.vmstat
                vmstat.pswpin += 1
                vmstat.pgmajfault += 1
                self._lru.refault(leaf)
                self._vmm.install(leaf, own=True)
                self._vmm.swapped_in(leaf, write=True)

    # -- commands -------------------------------------------------------------------------------

    def age(self, swappiness: int) -> Counts:
        """Write ``+`` to lru_gen."""
        self.run_vmm()
        lab, lruvec = self._lab, self._lruvec
        steps = self._reclaimer.age_on_command(lruvec, lruvec.max_seq, lab.t_ns, swappiness)
        return self._done(steps)

    def evict(self, ahead: int, nr: int) -> Counts:
        """Write ``-`` to lru_gen, for the generation ``ahead`` of the oldest."""
        self.run_vmm()
        lab, lruvec = self._lab, self._lruvec
        seq = lruvec.min_seqs[0] + ahead
        return self._done(self._reclaimer.evict_on_command(lruvec, seq, nr, lab.t_ns, SWAPPINESS))

    def pageout(self, first: int, last: int) -> None:
        """madvise(MADV_PAGEOUT) over the leaves ``first`` up to ``last``."""
        lab = self._lab
        lab.t_ns = lab.run(self._pageout.run(0, 0, first, last, lab.t_ns))

    def _done(self, steps: Generator[Any, Any, tuple[int, int]]) -> Counts:
        error, self._lab.t_ns = self._lab.run(steps)
        return Counter({"errno": error})

    # -- what is counted ------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Since the last call."""
        totals = self._totals()
        found = totals - self._before
        self._before = totals
        for site in self._sites_of_vmm():
            if site in ("range_start", "range_end"):
                found[f"kvm_mmu_notifier_invalidate_{site}"] += 1
        return found

    def _sites_of_vmm(self) -> list[str]:
        rows = self._lab.world.kvms[1].mmu_lock.rows
        sites = [NAMES[row["site"]] for row in account(rows)]
        rows.clear()
        return sites

    def _totals(self) -> Counts:
        vmstat, lab = self._pgdat.vmstat, self._lab
        report = self._reclaimer.report
        files = int(np.count_nonzero(self._vmm.swap[self._files] & CACHED))
        return Counter(
            {
                **self._batches,
                "kvm_age_gfn": lab.kvm.young_calls.locked + lab.kvm.young_calls.lockless,
                "lru_gen_look_around": report.scanned,
                "folio_referenced": report.scanned + self._others.files - files,
                "kvm_mmu_notifier_clear_young": report.calls,
                "pgscan_direct": vmstat.pgscan_direct,
                "pgsteal_direct": vmstat.pgsteal_direct,
                "pgrefill": vmstat.pgrefill,
                "pswpout": vmstat.pswpout,
                "pswpin": vmstat.pswpin,
                "pgmajfault": vmstat.pgmajfault,
                "workingset_refault_anon": vmstat.workingset_refault,
                "workingset_activate_anon": vmstat.workingset_activate,
                "workingset_restore_anon": vmstat.workingset_restore,
            }
        )
