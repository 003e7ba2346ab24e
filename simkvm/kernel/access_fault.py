"""An access-flag fault: the CPU does not set the flag, so software has to.

Source: arch/arm64/kvm/mmu.c (``handle_access_fault``) and hyp/pgtable.c
(``kvm_pgtable_stage2_mkyoung``), v6.12. Exit, SRCU, memslot; one shared walk to the leaf sets the
flag by compare-and-swap, under ``mmu_lock`` for read (for write up to v6.1); re-enter. Nothing is
looked up in the host, nothing allocated, and no invalidation makes it give up: a leaf that is gone
is left alone, and the guest runs into a translation fault next. Where x86 has no accessed bits the
lock-free fast path of a fault (arch/x86/kvm/mmu/mmu.c, ``fast_page_fault``) restores the entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpy import Event

from simkvm.kernel.sites import ACCESS_FAULT
from simkvm.kernel.stage2 import AF, VALID

if TYPE_CHECKING:
    from simkvm.guest.software_af import SoftwareAfVcpu
    from simkvm.kernel.kvm import Kvm


class AccessFault:
    """The handler, on one vCPU."""

    def __init__(self, kvm: Kvm, vcpu: SoftwareAfVcpu) -> None:
        self._kvm = kvm
        self._vcpu = vcpu
        self._costs = kvm.costs.access_fault
        self._stage2 = kvm.stage2
        self._entries = kvm.stage2.leaf.fast
        self._lock = kvm.kernel["access_fault_lock"]
        self._leaf = 0
        self.exit_ns = self._costs.exit_ns

    def handle(self, t_ns: int, leaf: int) -> int | Event:
        """Set the flag of ``leaf``, reaching ``mmu_lock`` at ``t_ns``.

        Returns when the guest needs the host next, or the event that tells it.
        """
        self._leaf = leaf
        cpu = self._vcpu.cpu.id
        if self._lock == "none":
            return self.locked(t_ns + self._costs.lock_ns)[1]
        take = self._kvm.mmu_lock.write if self._lock == "write" else self._kvm.mmu_lock.read
        return take(t_ns, cpu, ACCESS_FAULT, self.locked)

    def locked(self, entry_ns: int) -> tuple[int, int]:
        """The section: returns the hold and when the guest needs the host next."""
        leaf, costs = self._leaf, self._costs
        entry = self._entries[leaf]
        if entry & VALID and not entry & AF:
            self._stage2.set_young(leaf)
            if self._kvm.expected:
                self._kvm.given(leaf, entry_ns)
        return costs.hold_ns, self._vcpu.accessed(entry_ns + costs.hold_ns + costs.enter_ns)
