"""Which MMU of KVM maps a guest: what it makes of faults, of unmaps and of an ageing walk's steps.

Source: arch/arm64/kvm/mmu.c; arch/x86/kvm/mmu/{tdp_mmu.c,mmu.c}, v6.12. A new MMU is a class with a
``name``, listed in :data:`MMUS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from simkvm.kernel.costs import Costs
from simkvm.kernel.fault import FaultPath
from simkvm.kernel.fault_sized import SizedFaultPath
from simkvm.kernel.rmap import chain_ns
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.x86_fault import ShadowFault, TdpFault
from simkvm.kernel.yielding_walk import Walk
from simkvm.kernel.zap_leafs import rmap_walk, table_walk
from simkvm.scenario.kernel import KernelVariant

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class SizedTdpFault(SizedFaultPath, TdpFault):
    """The TDP MMU's faults of a guest with blocks and pages."""


class SizedShadowFault(SizedFaultPath, ShadowFault):
    """The shadow MMU's faults of a guest with blocks and pages."""


class SwapTdpFault(SwapFaultPath, TdpFault):
    """The TDP MMU's faults on a host that may run out of memory."""

    def _hopeless(self) -> bool:
        return self._gave_up


class SwapShadowFault(SwapFaultPath, ShadowFault):
    """The shadow MMU's faults on a host that may run out of memory."""

    def _hopeless(self) -> bool:
        return self._gave_up


class Stage2Mmu:
    """arm64's stage-2 table."""

    name: ClassVar[str] = "stage2"
    fault: ClassVar[type[FaultPath]] = FaultPath
    sized_fault: ClassVar[type[FaultPath]] = SizedFaultPath  #: of guests with blocks and pages
    swap_fault: ClassVar[type[FaultPath]] = SwapFaultPath  #: on a host that may run out of memory

    def __init__(self, kernel: KernelVariant, chain: int) -> None:
        self.kernel = kernel
        self.chain = chain  #: entries that map one page; only the shadow MMU has more than one

    def costs(self, costs: Costs) -> Costs:
        """What ``costs`` of the machine are for this MMU."""
        return costs

    def walk(self, kvm: Kvm, first: int, last: int, t_ns: int) -> Walk:
        """The steps of a zap of the leaves ``first`` up to ``last``, from ``t_ns`` on."""
        return table_walk(kvm, first, last)


class TdpMmu(Stage2Mmu):
    """x86's table for guests that the CPU translates by two tables."""

    name = "tdp"
    fault = TdpFault
    swap_fault = SwapTdpFault
    sized_fault = SizedTdpFault


class ShadowMmu(Stage2Mmu):
    """x86's tables without TDP: everything goes by reverse-map chains."""

    name = "shadow"
    fault = ShadowFault
    swap_fault = SwapShadowFault
    sized_fault = SizedShadowFault

    def costs(self, costs: Costs) -> Costs:
        """An ageing walk goes along a chain, also for each further page of a folio."""
        unmap, ageing = costs.unmap, costs.ageing
        walk_ns = chain_ns(self.chain, unmap.descend_ns, unmap.visit_ns)
        if self.kernel["ageing_lock"] == "rmap_bit":
            walk_ns += 2 * costs.line.same_ns  # setting and clearing the head's bit
        return replace(costs, ageing=replace(ageing, walk_ns=walk_ns, visit_ns=walk_ns))

    def walk(self, kvm: Kvm, first: int, last: int, t_ns: int) -> Walk:
        """Page by page, along the chains."""
        return rmap_walk(kvm, first, last, t_ns)


MMUS: dict[str, type[Stage2Mmu]] = {mmu.name: mmu for mmu in (Stage2Mmu, TdpMmu, ShadowMmu)}
"""By the value of ``mmu``."""
