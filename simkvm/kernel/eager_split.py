"""Eager splitting: blocks become tables of pages before a guest writes to them.

Source: arch/arm64/kvm/mmu.c (``kvm_mmu_split_huge_pages``) and arch/arm64/kvm/hyp/pgtable.c
(``stage2_split_walker``), v6.12; arch/x86/kvm/mmu/tdp_mmu.c (``kvm_tdp_mmu_try_split_huge_pages``).
Chunk by chunk under the write lock: a full table is built beside the tree, the block's entry is
broken, the table put in its place. Between chunks the lock is dropped to fill the cache of tables
again, if it is short of pages or contended.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.qrwlock import OPEN
from simkvm.kernel.sites import EAGER_SPLIT
from simkvm.kernel.stage2 import VALID
from simkvm.kernel.task import Task, acquired, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]


class EagerSplit:
    """Splits the blocks of one guest."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        # x86 replaces a huge entry by a table that says the same: nothing has to be invalidated.
        self._breaks = kvm.kernel["mmu"] == "stage2"

    def run(self, task: Task, t_ns: int, first: int, last: int, chunk_bytes: int) -> Steps:
        """Split what lies in the leaves ``first`` up to ``last``; returns when it is done."""
        kvm = self._kvm
        if kvm.stage2.blocks is None:
            return t_ns
        step = max(1, chunk_bytes // kvm.stage2.leaf_bytes)
        position = first
        while position < last:
            end = min(last, position + step)
            blocks = self._blocks(position, end)
            if blocks:
                t_ns = yield from self._chunk(task, self._fill_cache(t_ns, blocks), blocks)
            position = end
        return t_ns

    def _blocks(self, first: int, last: int) -> list[int]:
        """The first leaf of each block in the range."""
        level, size = self._kvm.stage2.blocks, self._kvm.stage2.block_leaves
        assert level is not None
        return [
            entry * size
            for entry in range(first // size, (last - 1) // size + 1)
            if level.fast[entry] & VALID
        ]

    def _tables_each(self) -> int:
        """Tables that one block becomes: one, or below the largest block 512 and one."""
        leaves, entries, tables = self._kvm.stage2.block_leaves, self._kvm.entries, 0
        while leaves > 1:
            leaves = -(-leaves // entries)
            tables += leaves
        return tables

    def _fill_cache(self, t_ns: int, blocks: list[int]) -> int:
        return t_ns + len(blocks) * self._tables_each() * self._kvm.costs.fault.object_ns

    def _chunk(self, task: Task, t_ns: int, blocks: list[int]) -> Steps:
        """One hold of the lock. With nothing in the way the next chunk's follows at once."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns)
        task.cpu.spin(t_ns)
        grant = kvm.mmu_lock.write(t_ns, task.cpu.id, EAGER_SPLIT, lambda at: (OPEN, at))
        t_ns = yield from reach(kvm.env, (yield from acquired(grant)))
        for leaf in blocks:
            if kvm.stage2.attached and kvm.stage2.is_block(leaf):
                t_ns = yield from reach(kvm.env, self._split(t_ns, leaf))
        kvm.mmu_lock.release(t_ns)
        task.cpu.enter_kernel(t_ns)
        return t_ns

    def _split(self, t_ns: int, leaf: int) -> int:
        kvm = self._kvm
        first, last = kvm.stage2.block_span(leaf)
        end_ns = t_ns + (last - first) * kvm.costs.split_entry_ns
        if self._breaks:
            end_ns = kvm.flush_ns(end_ns)
            kvm.forget_translations()
        for vcpu in kvm.vcpus:
            vcpu.catch_up(t_ns)
        kvm.splits += 1
        kvm.tables_linked(kvm.stage2.fill_block(leaf), end_ns)
        return end_ns
