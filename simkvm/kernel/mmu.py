"""Which MMU of KVM maps a guest: what it makes of faults, of unmaps and of an ageing walk's steps.

Source: arch/arm64/kvm/mmu.c; arch/x86/kvm/mmu/{tdp_mmu.c,mmu.c}, v6.12. A new MMU is a class with a
``name``, listed in :data:`MMUS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from simkvm.kernel.costs import Costs
from simkvm.kernel.fault import FaultPath
from simkvm.kernel.rmap import chain_ns
from simkvm.kernel.stage2 import VALID
from simkvm.kernel.x86_fault import ShadowFault, TdpFault
from simkvm.kernel.zap_leafs import Walk, ZapCosts, table_walk
from simkvm.scenario.kernel import KernelVariant

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Stage2Mmu:
    """arm64's stage-2 table."""

    name: ClassVar[str] = "stage2"
    fault: ClassVar[type[FaultPath]] = FaultPath

    def __init__(self, kernel: KernelVariant, chain: int) -> None:
        self.kernel = kernel
        self.chain = chain  #: entries that map one page; only the shadow MMU has more than one

    def costs(self, costs: Costs) -> Costs:
        """What ``costs`` of the machine are for this MMU."""
        return costs

    def walk(self, kvm: Kvm, first: int, last: int) -> Walk:
        """The steps of a zap of the leaves ``first`` up to ``last``, if it began now."""
        unmap = kvm.costs.unmap
        costs = ZapCosts(unmap.visit_ns, unmap.descend_ns, unmap.leaf_ns)
        return table_walk(kvm.stage2, first, last, costs)


class TdpMmu(Stage2Mmu):
    """x86's table for guests that the CPU translates by two tables."""

    name = "tdp"
    fault = TdpFault


class ShadowMmu(Stage2Mmu):
    """x86's tables without TDP: everything goes by reverse-map chains."""

    name = "shadow"
    fault = ShadowFault

    def costs(self, costs: Costs) -> Costs:
        """An ageing walk goes along a chain, also for each further page of a folio."""
        unmap, ageing = costs.unmap, costs.ageing
        walk_ns = chain_ns(self.chain, unmap.descend_ns, unmap.visit_ns)
        if self.kernel["ageing_lock"] == "rmap_bit":
            walk_ns += 2 * costs.line.same_ns  # setting and clearing the head's bit
        return replace(costs, ageing=replace(ageing, walk_ns=walk_ns, visit_ns=walk_ns))

    def walk(self, kvm: Kvm, first: int, last: int) -> Walk:
        """``walk_slot_rmaps``: head after head, mapped or not; each entry of a chain is zapped."""
        unmap, now = kvm.costs.unmap, int(kvm.env.now)
        leaves = np.arange(first, last, dtype=np.int64)
        valid = (kvm.stage2.leaf.entries[first:last] & VALID) != 0
        spent = unmap.visit_ns + valid * (self.chain * unmap.leaf_ns)
        ends = np.cumsum(spent)
        waits = np.zeros_like(ends)
        mapped = np.flatnonzero(valid)
        waits[mapped] = kvm.rmap.waits_of(leaves[mapped], now + (ends - spent)[mapped])
        return Walk(leaves, ends + np.cumsum(waits), last)


MMUS: dict[str, type[Stage2Mmu]] = {mmu.name: mmu for mmu in (Stage2Mmu, TdpMmu, ShadowMmu)}
"""By the value of ``mmu``."""
