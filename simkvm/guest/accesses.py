"""What the kernel's side asks of all vCPUs of a guest at once: the two access engines' contract.

Whoever reads accessed flags asks first that they be brought up to date, for the leaves that it is
about to look at; whoever takes mappings or translations away says so afterwards. *Explicit* vCPUs
have every touch planned, so each applies its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.cpu import GUEST

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu


class Accesses(Protocol):
    """An access engine. ``first`` up to ``last`` are leaves of the guest."""

    def catch_up(self, t_ns: int, first: int, last: int) -> None:
        """Let the accessed flags of these leaves show what was touched before ``t_ns``.

        Of no leaves at all: only the numbers of touches are asked for.
        """
        ...

    def going(self, t_ns: int, first: int, last: int) -> None:
        """Mappings of these leaves are about to go at ``t_ns``; :meth:`flushed` says so then."""
        ...

    def cleared(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """Ageing cleared the accessed flags of ``leaves`` at ``t_ns``."""
        ...

    def flushed(self, t_ns: int, first: int, last: int) -> None:
        """The VM's translations were invalidated at ``t_ns``; mappings in the range may be gone.

        An empty range: no mapping is, and nobody has asked for :meth:`catch_up` before.
        """
        ...

    def interrupted(self, t_ns: int, lost_ns: int) -> int:
        """As :meth:`flushed`, by an interrupt that costs who runs the guest ``lost_ns``.

        Returns how many vCPUs did.
        """
        ...

    def unmapped(self, t_ns: int, first: int, last: int) -> None:
        """Mappings in the range may have gone at ``t_ns``; whoever took them flushes later."""
        ...


class Explicit:
    """Every touch is drawn or replayed, by the vCPU that makes it."""

    def __init__(self, vcpus: list[Vcpu]) -> None:
        self._vcpus = vcpus

    def catch_up(self, t_ns: int, first: int, last: int) -> None:
        """All planned touches are applied, whatever the range."""
        for vcpu in self._vcpus:
            vcpu.catch_up(t_ns)

    def going(self, t_ns: int, first: int, last: int) -> None:
        """What was touched before is applied first."""
        self.catch_up(t_ns, first, last)

    def cleared(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """Where software sets the flag a plan may count on it."""
        for vcpu in self._vcpus:
            vcpu.cleared(leaves, t_ns)

    def flushed(self, t_ns: int, first: int, last: int) -> None:
        """Each vCPU's TLB is empty, and its next fault may come earlier."""
        if first == last:  # nobody asked for any leaf's flag, but touches so far met a full TLB
            self.catch_up(t_ns, first, last)
        for vcpu in self._vcpus:
            vcpu.flushed(t_ns)

    def interrupted(self, t_ns: int, lost_ns: int) -> int:
        """One after the other."""
        running = 0
        for vcpu in self._vcpus:
            inside = vcpu.task.on_cpu and vcpu.cpu.state(t_ns) is GUEST
            vcpu.catch_up(t_ns)
            vcpu.interrupted(t_ns, lost_ns if inside else 0)
            running += inside
        return running

    def unmapped(self, t_ns: int, first: int, last: int) -> None:
        """Each vCPU's next fault may come earlier."""
        for vcpu in self._vcpus:
            vcpu.unmapped(t_ns)
