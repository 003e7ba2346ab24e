"""Eager splitting: blocks become tables of pages before a guest writes to them.

Source: arch/arm64/kvm/mmu.c (``kvm_mmu_split_huge_pages``) and arch/arm64/kvm/hyp/pgtable.c
(``stage2_split_walker``), v6.12; arch/x86/kvm/mmu/tdp_mmu.c (``kvm_tdp_mmu_try_split_huge_pages``).
Under the write lock, chunk by chunk: a full table is built beside the tree, the block's entry is
broken, the table put in its place. Before a chunk the lock is dropped if it is contended or if the
cache of tables is short of what a chunk may need; the cache is then filled to that.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.apply_range import open_for_write
from simkvm.kernel.sites import EAGER_SPLIT
from simkvm.kernel.stage2 import VALID
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class EagerSplit:
    """Splits the blocks of one guest, into tables from its ``split_page_cache``."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        # x86 replaces a huge entry by a table that says the same: nothing has to be invalidated.
        self._breaks = kvm.kernel["mmu"] == "stage2"

    def run(self, task: Task, t_ns: int, first: int, last: int, chunk_bytes: int) -> Steps:
        """Take the lock and split what lies in the leaves ``first`` up to ``last``.

        ``chunk_bytes``: 0 for nothing, which takes the lock all the same. Returns the end.
        """
        kvm = self._kvm
        t_ns = yield from open_for_write(kvm, task, t_ns, EAGER_SPLIT)
        t_ns = yield from self.under_lock(task, t_ns, first, last, chunk_bytes)
        kvm.mmu_lock.release(t_ns)
        task.cpu.enter_kernel(t_ns)
        return t_ns

    def under_lock(self, task: Task, t_ns: int, first: int, last: int, chunk_bytes: int) -> Steps:
        """As :meth:`run`, for a caller that holds the lock for write and will hold it after."""
        kvm = self._kvm
        step = chunk_bytes // kvm.stage2.leaf_bytes
        if kvm.stage2.blocks is None or not step:
            return t_ns
        position = first
        while position < last:
            if kvm.split_cache.pages < self._needed(step) or kvm.lock_break(task, t_ns):
                t_ns = yield from self._refill(task, t_ns, self._needed(step))
            # The zap of x86's roots is planned ahead: nothing may be added to them any more.
            if not kvm.stage2.attached or not (self._breaks or kvm.alive):
                break
            end = min(last, (position // step + 1) * step)
            t_ns = yield from self._chunk(t_ns, position, end)
            position = end
        return t_ns

    def _needed(self, leaves: int) -> int:
        """Tables that ``leaves`` may need (``kvm_mmu_split_nr_page_tables``)."""
        entries, tables = self._kvm.entries, -(-leaves // self._kvm.entries)
        if self._kvm.stage2.geometry.chunk_bytes > entries * self._kvm.page_bytes:
            tables += -(-leaves // entries**2)
        return tables

    def _refill(self, task: Task, t_ns: int, pages: int) -> Steps:
        """Let go of the lock, fill the cache, take the lock again."""
        kvm = self._kvm
        kvm.mmu_lock.release(t_ns)
        task.cpu.enter_kernel(t_ns)
        lacking = kvm.split_cache.top_up(pages)
        t_ns = yield from kvm.let_others_run(task, t_ns + lacking * kvm.costs.fault.object_ns)
        return (yield from open_for_write(kvm, task, t_ns, EAGER_SPLIT))

    def _chunk(self, t_ns: int, first: int, last: int) -> Steps:
        """Walk the leaves of one chunk and split what is a block."""
        kvm = self._kvm
        level, size = kvm.stage2.blocks, kvm.stage2.block_leaves
        assert level is not None
        t_ns += kvm.stage2.leaf_visits(first, last) * kvm.costs.unmap.visit_ns
        for entry in range(first // size, (last - 1) // size + 1):
            if level.fast[entry] & VALID:
                t_ns = yield from reach(kvm.env, self._split(t_ns, entry * size))
        return (yield from reach(kvm.env, t_ns))

    def _split(self, t_ns: int, leaf: int) -> int:
        kvm = self._kvm
        first, last = kvm.stage2.block_span(leaf)
        end_ns = t_ns + (last - first) * kvm.costs.split_entry_ns
        kvm.leaf_changes(leaf, end_ns)
        if self._breaks:
            end_ns = kvm.flush_ns(end_ns)
            kvm.forget_translations(t_ns)
        kvm.splits += 1
        tables = kvm.stage2.fill_block(leaf)
        kvm.split_cache.take(len(tables))
        kvm.tables_linked(tables, end_ns)
        return end_ns
