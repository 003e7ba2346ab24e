"""A memslot of a guest deleted, created and moved (``KVM_SET_USER_MEMORY_REGION``).

Source: virt/kvm/kvm_main.c (``kvm_set_memslot``, ``kvm_swap_active_memslots``), v6.12, and
arch/arm64/kvm/mmu.c (``kvm_arch_flush_shadow_memslot``). Delete and move mark the slot invalid,
unmap all of it under ``mmu_lock``, and then put the new slots in place; so each swaps the active
slots twice, and create once. A swap waits for the invalidations that are active, then for every
vCPU that may still read the old slots (an expedited grace period of ``kvm->srcu``).

No notifier call is involved: nothing counts as in progress and the sequence does not move. A
fault that still saw the slot was waited for and is undone by the unmapping; one that sees it
invalid or gone is MMIO, which goes to user space. The host's own mappings stay.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from simpy import Event

from simkvm.kernel.mmu_notifier import unmap_range
from simkvm.kernel.sites import MEMSLOT
from simkvm.kernel.task import Task, acquired, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]

#: How long an expedited grace period spins before it looks at its readers again
#: (``SRCU_DEFAULT_RETRY_CHECK_DELAY``, kernel/rcu/srcutree.c, v6.12).
RETRY_CHECK_NS: Final = 5_000


class Refusal(NamedTuple):
    """Leaves ``first`` up to ``last`` whose faults go to user space; ``reads``: not only writes."""

    first: int
    last: int
    reads: bool


class MemslotUpdate:
    """What ``task`` does to memslot ``slot`` of ``kvm``."""

    def __init__(self, kvm: Kvm, task: Task, slot: int = 0) -> None:
        self._kvm = kvm
        self._task = task
        self._slot = slot
        first, last = kvm.memslots[slot]
        self._refusal = Refusal(first, last, reads=True)
        self.grace_periods = 0

    def delete(self, t_ns: int) -> Steps:
        """Delete the slot; returns when that is done."""
        t_ns = yield from self._invalidate(t_ns)
        return (yield from self._swap(t_ns, self._gone))

    def create(self, t_ns: int) -> Steps:
        """Create it where it was, or for the first time."""
        return (yield from self._swap(t_ns, self._there))

    def move(self, t_ns: int) -> Steps:
        """Move it by a multiple of the largest block; the guest's accesses follow it."""
        t_ns = yield from self._invalidate(t_ns)
        return (yield from self._swap(t_ns, self._there))

    def move_away(self, t_ns: int) -> Steps:
        """Move it to where the guest does not come: what it accesses here is MMIO from now on."""
        t_ns = yield from self._invalidate(t_ns)
        return (yield from self._swap(t_ns, lambda: None))

    def move_back(self, t_ns: int) -> Steps:
        """Undo :meth:`move_away`; where the slot was meanwhile, nothing is mapped."""
        kvm, task = self._kvm, self._task
        hold_ns = kvm.costs.unmap.visit_ns  # one hole, seen from the root
        t_ns = yield from self._swap(t_ns, lambda: None)
        t_ns = yield from reach(kvm.env, t_ns)
        task.cpu.spin(t_ns)
        grant = kvm.mmu_lock.write(
            t_ns, task.cpu.id, MEMSLOT, lambda at_ns: (hold_ns, at_ns + hold_ns)
        )
        t_ns = yield from acquired(grant)
        task.cpu.enter_kernel(t_ns)
        return (yield from self._swap(t_ns, self._there))

    def change_flags(self, t_ns: int, becomes: Callable[[], None]) -> Steps:
        """Logging goes on or off: one swap, nothing is unmapped (``kvm_update_flags_memslot``)."""
        return (yield from self._swap(t_ns, becomes))

    # -- what a swap puts in place ------------------------------------------------------------

    def _invalid(self) -> None:
        self._kvm.refusals.append(self._refusal)

    def _gone(self) -> None:
        self._kvm.memslots.gone.add(self._slot)

    def _there(self) -> None:
        self._kvm.memslots.gone.discard(self._slot)
        if self._refusal in self._kvm.refusals:
            self._kvm.refusals.remove(self._refusal)

    # -- steps --------------------------------------------------------------------------------

    def _invalidate(self, t_ns: int) -> Steps:
        """Nobody may use the slot any more; then unmap it (``kvm_invalidate_memslot``)."""
        kvm, (first, last, _) = self._kvm, self._refusal
        t_ns = yield from self._swap(t_ns, self._invalid)
        return (
            yield from unmap_range(
                kvm, self._task, t_ns, first, last, MEMSLOT, lambda entry_ns: entry_ns
            )
        )

    def _swap(self, t_ns: int, becomes: Callable[[], None]) -> Steps:
        kvm, task = self._kvm, self._task
        t_ns = yield from reach(kvm.env, t_ns)
        while (active := kvm.notifier.idle()) is not None:
            kvm.sched.sleep(task, t_ns)
            ended: int = yield active
            t_ns = max(t_ns, ended + kvm.costs.wakeup_ns)
            t_ns = yield from kvm.sched.wake(task, t_ns)
            t_ns = yield from reach(kvm.env, t_ns)
        becomes()
        return (yield from self._synchronize_srcu_expedited(t_ns))

    def _synchronize_srcu_expedited(self, t_ns: int) -> Steps:
        """Wait for the faults in flight; without any it takes two wake-ups of the worker."""
        kvm, task = self._kvm, self._task
        self.grace_periods += 1
        inside = [(vcpu, vcpu.fault.faults) for vcpu in kvm.vcpus if vcpu.faulting]
        kvm.sched.sleep(task, t_ns)
        t_ns = yield from reach(kvm.env, t_ns + 2 * kvm.costs.wakeup_ns)
        while any(vcpu.faulting and vcpu.fault.faults == number for vcpu, number in inside):
            t_ns = yield from reach(kvm.env, t_ns + RETRY_CHECK_NS)
        return (yield from kvm.sched.wake(task, t_ns))
