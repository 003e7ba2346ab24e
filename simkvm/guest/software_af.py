"""A vCPU on a CPU that does not set the accessed flag.

A touch that misses the TLB and finds the flag of its leaf clear is an access-flag fault. What the
TLB holds after a touch does not depend on whether it faulted, so which touches of a chunk miss is
known as soon as the chunk is: such a touch needs the flag, as a write needs a writable leaf. The
plan then finds access-flag faults like any other, and changes only where ageing clears a flag that
it counted on, or an invalidation empties the TLB.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.guest.patterns import Chunk
from simkvm.guest.pause import Pause
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.access_fault import AccessFault
from simkvm.kernel.cpu import Cpu
from simkvm.kernel.stage2 import AF, VALID

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class SoftwareAfVcpu(Vcpu):
    """As :class:`Vcpu`; ``access_faults``: those handled so far."""

    def __init__(self, kvm: Kvm, index: int, cpu: Cpu, chunks: Iterator[Chunk | Pause]) -> None:
        super().__init__(kvm, index, cpu, chunks)
        self._access_fault = AccessFault(kvm, self)
        #: For each touch of the chunk, the one before it in its slot of the TLB; -1: not in here.
        self._before: NDArray[np.int64] = np.empty(0, np.int64)
        self._relied_on: set[int] | None = None  #: leaves whose flags the plan needs

    def _load(self, chunk: Chunk) -> None:
        super()._load(chunk)
        leaves = self._leaves
        slots = leaves % self._tlb_entries
        order = np.argsort(slots, kind="stable")
        same = np.flatnonzero(slots[order[1:]] == slots[order[:-1]])
        self._before = before = np.full(len(leaves), -1, np.int64)
        before[order[same + 1]] = order[same]
        held = np.where(before < 0, self._tags[slots], leaves[before])
        self._need_flags(0, held != leaves)

    def _need_flags(self, first: int, missed: NDArray[np.bool_]) -> None:
        """Touches from ``first`` on that miss the TLB need the accessed flag."""
        self._needs[first:][missed] |= np.uint8(AF)
        self._need_list[first:] = self._needs[first:].tolist()

    def _refill_ns(self) -> int:
        first = self._position
        self._need_flags(first, self._before[first:] < first)
        return super()._refill_ns()

    # -- faults -------------------------------------------------------------------------------

    def _plan(self, start: int) -> int:
        next_ns = super()._plan(start)
        target = self._run_to
        self._relied_on = None
        self.lacks_flag = False
        if target < len(self._list) and self._needs[target] & AF:
            self.lacks_flag = self._entries[self._list[target]] & (VALID | AF) == VALID
            if self.lacks_flag:
                return self._exit_ns + self._access_fault.exit_ns
        return next_ns

    def set_flag(self, t_ns: int) -> Generator[Event, Any, int]:
        """Handle the access-flag fault of the present position; ``mmu_lock`` is near at ``t_ns``.

        Returns when the guest needs the host next.
        """
        self.access_faults += 1
        grant = self._access_fault.handle(t_ns, self._list[self._position])
        if isinstance(grant, int):
            self.next_ns = grant
        else:
            self.cpu.spin(t_ns)
            self.alarm = grant
            yield grant
        return self.next_ns

    def accessed(self, t_ns: int) -> int:
        """The flag is set; the guest goes on at ``t_ns``. Returns when it needs the host next."""
        return self.mapped(t_ns)

    def mapped(self, t_ns: int) -> int:
        """As :meth:`Vcpu.mapped`; what the touch needs may still not all be there."""
        if not self.kvm.alive:
            return t_ns
        position = self._position
        leaf, need = self._list[position], self._need_list[position]
        if self._entries[leaf] & need != need:
            return self.enter(t_ns)
        self.touches += 1
        if self._last_touch is not None:
            self._last_touch[leaf] = t_ns
        self._fast_tags[leaf % self._tlb_entries] = leaf
        self._position = position + 1
        return self.enter(t_ns, self._cost_list[position + 1] - self._cost_list[position])

    def cleared(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """Ageing cleared the flags of ``leaves`` at ``t_ns``: the plan may have relied on them."""
        if not self._running or self.alarm is None:
            return
        if self._relied_on is None:
            planned = slice(self._position, self._run_to + 1)  # with the one that will fault
            needed = (self._needs[planned] & AF) != 0
            self._relied_on = set(self._leaves[planned][needed].tolist())
        if self._relied_on.isdisjoint(leaves.tolist()):
            return
        self.catch_up(t_ns)
        if self._position == self._run_to and t_ns > self._run_from_ns:
            return  # its faulting touch lies in the past: it is on its way out
        moved = self._plan(self._run_from_ns)
        if moved < self.next_ns:
            self._wake_at(moved)
        self.next_ns = moved
        self.cpu.enter_guest(t_ns, self._exit_ns)

    # -- touches ------------------------------------------------------------------------------

    def _touch_few(self, leaves: list[int]) -> None:
        """The TLB only: software sets the flags."""
        tags, size = self._fast_tags, self._tlb_entries
        for leaf in leaves:
            tags[leaf % size] = leaf

    def _touch(self, leaves: NDArray[np.int64]) -> None:
        """As :meth:`_touch_few`; of several in one slot the last one stays."""
        self._tags[leaves % self._tlb_entries] = leaves


def vcpu_class(kvm: Kvm) -> type[Vcpu]:
    """The kind of vCPU that ``kvm`` has on its CPUs."""
    return SoftwareAfVcpu if kvm.software_af else Vcpu
