"""The access engine of guests whose vCPUs work off jobs: see :mod:`simkvm.guest.accesses`.

Every touch is planned, as with *explicit* vCPUs, but who takes a page away asks only those vCPUs
that plan to touch it, and nobody if no plan had it lately: most pages that are taken are cold. An
invalidation of all translations is a number that each vCPU looks at when it next settles its
accounts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.cpu import GUEST

if TYPE_CHECKING:
    from simkvm.guest.job_vcpu import JobVcpu

FEW: Final = 16  #: leaves up to which looking each of them up is cheaper than looking at all plans


class JobAccesses:
    """Of ``vcpus`` of a guest of ``leaves``, whose translations go by broadcast, or one by one.

    ``flushes``: broadcasts so far that emptied all TLBs. ``marks``: 1 for each leaf that is in a
    plan, and for some that were.
    """

    def __init__(self, vcpus: list[JobVcpu], leaves: int, broadcast: bool) -> None:
        self._vcpus = vcpus
        self._broadcast = broadcast
        self._found = bytearray(leaves)
        self.marks: NDArray[np.uint8] = np.frombuffer(self._found, np.uint8)
        self.flushes = 0

    def catch_up(self, t_ns: int, first: int, last: int) -> None:
        """For few leaves, only by the vCPUs that have touched one of them lately; for none, all."""
        if last - first > FEW or first == last:
            for vcpu in self._vcpus:
                if vcpu.due_ns < t_ns:
                    vcpu.catch_up(t_ns)
            return
        for vcpu in self._planning(first, last):
            if vcpu.due_ns < t_ns and vcpu.has_touched(range(first, last), t_ns):
                vcpu.catch_up(t_ns)

    def going(self, t_ns: int, first: int, last: int) -> None:
        """Touches that were made before set their flags first."""
        self.catch_up(t_ns, first, last)

    def interrupted(self, t_ns: int, lost_ns: int) -> int:
        """One after the other."""
        running = 0
        for vcpu in self._vcpus:
            inside = vcpu.task.on_cpu and vcpu.cpu.state(t_ns) is GUEST
            vcpu.interrupted(t_ns, lost_ns if inside else 0)
            running += inside
        return running

    def cleared(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """The hardware sets the flags again."""

    def flushed(self, t_ns: int, first: int, last: int) -> None:
        """All TLBs are empty; plans change only for what was mapped in the range."""
        self.flushes += self._broadcast
        if first < last:
            self.unmapped(t_ns, first, last)

    def unmapped(self, t_ns: int, first: int, last: int) -> None:
        """Who plans to touch one of these leaves may fault there."""
        for vcpu in self._planning(first, last):
            vcpu.unmapped(t_ns)

    def _planning(self, first: int, last: int) -> list[JobVcpu]:
        """The vCPUs that may have one of these leaves in their plans."""
        if self._found.find(1, first, last) < 0:
            return []
        if last - first > FEW:
            return self._vcpus
        leaves = range(first, last)
        planning = [
            vcpu
            for vcpu in self._vcpus
            if not (vcpu.planned or vcpu.look_ahead()).isdisjoint(leaves)
        ]
        if not planning:
            self.marks[first:last] = 0
        return planning
