"""What runs on a CPU, as far as RCU and the timer tick can tell.

An actor (vCPU, ageing thread, reclaimer...) computes ahead until its next event and says here,
in order of time, what its CPU will be doing until then. The tick and the grace-period kthread
look later, always at a time that has come. A CPU that nobody ever spoke for is idle for ever.

Memory is bounded: the last :data:`DEPTH` things told and the last few moments that count as
quiescent. An actor may therefore tell up to that many things ahead of the clock; anything older
that is forgotten is read as "preemption off", which can delay a grace period but never cut one
short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Final

NEVER: Final = 1 << 62
DEPTH: Final = 16  #: things told that a CPU remembers
MOMENTS: Final = 8  #: quiescent moments that a CPU remembers


class CpuState(IntEnum):
    """What a CPU does at one moment."""

    IDLE = 0
    GUEST = 1
    USER = 2
    KERNEL = 3  #: preemptible, and in a place where ``cond_resched()`` comes soon
    ATOMIC = 4  #: preemption off: a spin lock held or waited for, or an RCU reader


IDLE: Final = CpuState.IDLE
GUEST: Final = CpuState.GUEST
USER: Final = CpuState.USER
KERNEL: Final = CpuState.KERNEL
ATOMIC: Final = CpuState.ATOMIC


class Cpu:
    """One host CPU.

    ``nohz_full``: no tick while it runs one thread, context tracking on. ``offloaded``: kthreads
    invoke its RCU callbacks (rcu_nocbs=); those of a nohz_full CPU always are
    (rcu_init_nohz() in kernel/rcu/tree_nocb.h, v6.12).
    ``stolen_ns``: softirq time not yet collected by the actor that it was taken from.
    ``halted``: whether a guest that runs here waits (WFI) at a moment, if it is one that may.
    """

    __slots__ = (
        *("_extended", "_quiet", "_told"),
        *("halted", "id", "node", "nohz_full", "offloaded", "stolen_ns"),
    )

    def __init__(
        self, cpu_id: int, node: int = 0, nohz_full: bool = False, offloaded: bool = False
    ) -> None:
        self.id = cpu_id
        self.node = node
        self.nohz_full = nohz_full
        self.offloaded = offloaded or nohz_full
        self.stolen_ns = 0
        self.halted: Callable[[int], bool] | None = None
        self._told: deque[tuple[int, int, CpuState]] = deque(maxlen=DEPTH)  # (from, until, state)
        self._quiet: deque[int] = deque(maxlen=MOMENTS)  # context switches and guest entries
        self._extended: deque[int] = deque(maxlen=MOMENTS)  # entries to an extended quiescent state

    # -- told by actors -----------------------------------------------------------------------

    def enter_guest(self, t_ns: int, until_ns: int) -> None:
        """The guest runs in [t, until), then the kernel."""
        self._told.append((t_ns, until_ns, GUEST))  # a quiescent moment by itself
        if self.nohz_full:
            self._extended.append(t_ns)

    def leave_guest_at(self, until_ns: int) -> None:
        """The guest that was told last runs until then, not until what was told with it."""
        since_ns, _, _ = self._told.pop()
        self._told.append((since_ns, until_ns, GUEST))

    def enter_user(self, t_ns: int, until_ns: int) -> None:
        """User mode in [t, until), then the kernel."""
        self._told.append((t_ns, until_ns, USER))
        if self.nohz_full:
            self._extended.append(t_ns)

    def enter_kernel(self, t_ns: int) -> None:
        """The kernel runs from ``t`` on, preemptible."""
        self._wake(t_ns)
        self._told.append((t_ns, NEVER, KERNEL))

    def spin(self, t_ns: int) -> None:
        """Preemption is off from ``t`` until the next thing told."""
        told = self._told
        if not told or told[-1][2] is IDLE:
            self._wake(t_ns)
        told.append((t_ns, NEVER, ATOMIC))

    def atomic(self, t_ns: int, until_ns: int) -> None:
        """Preemption is off in [t, until), then the kernel runs on, preemptible."""
        self._wake(t_ns)
        self._told.append((t_ns, until_ns, ATOMIC))

    def sleep(self, t_ns: int) -> None:
        """Idle from ``t`` until the next thing told."""
        self._told.append((t_ns, NEVER, IDLE))
        self._quiet.append(t_ns)
        self._extended.append(t_ns)

    def context_switch(self, t_ns: int) -> None:
        """The scheduler ran at ``t``; what is told to run does not change."""
        self._quiet.append(t_ns)

    def switch(self, t_ns: int) -> None:
        """At ``t`` the scheduler goes from one thread to another, which is in the kernel.

        If it was said that the CPU would be idle from then on, it is not.
        """
        if self._told and self._told[-1] == (t_ns, NEVER, IDLE):
            self._told.pop()
            self._extended.pop()
        else:
            self._quiet.append(t_ns)
        self._told.append((t_ns, NEVER, KERNEL))

    def _wake(self, t_ns: int) -> None:
        """Leaving idle is a context switch."""
        told = self._told
        if not told or told[-1][2] is IDLE:
            self._quiet.append(t_ns)

    # -- time taken by softirqs ---------------------------------------------------------------

    def steal(self, t_ns: int, ns: int) -> None:
        """Take ``ns`` from whoever runs at ``t``; an idle CPU has nobody to take it from."""
        if self.state(t_ns) is not IDLE:
            self.stolen_ns += ns

    def take_stolen(self) -> int:
        """Nanoseconds stolen since the last call; the actor adds them to its own time."""
        stolen = self.stolen_ns
        self.stolen_ns = 0
        return stolen

    # -- asked by RCU: t is never later than now -----------------------------------------------

    def state(self, t_ns: int) -> CpuState:
        """What the CPU does at ``t``."""
        for since, until, state in reversed(self._told):
            if since <= t_ns:
                if state is GUEST and self.halted is not None and self.halted(t_ns):
                    return IDLE
                return state if t_ns < until else KERNEL
        return IDLE if len(self._told) < DEPTH else ATOMIC

    def in_extended_quiescent_state(self, t_ns: int) -> bool:
        """Idle, or under context tracking in user or guest mode (kernel/context_tracking.c)."""
        state = self.state(t_ns)
        return state is IDLE or (self.nohz_full and state in (GUEST, USER))

    def extended_between(self, since_ns: int, t_ns: int) -> bool:
        """Whether an extended quiescent state began in (since, t]."""
        return any(since_ns < moment <= t_ns for moment in self._extended)

    def switched_between(self, since_ns: int, t_ns: int) -> bool:
        """Whether the CPU switched context or entered a guest in (since, t]."""
        return any(since_ns < moment <= t_ns for moment in self._quiet) or any(
            state is GUEST and since_ns < moment <= t_ns for moment, _, state in self._told
        )

    def preemptible_between(self, since_ns: int, t_ns: int) -> bool:
        """Whether preemption was on at any moment in (since, t]."""
        end = t_ns + 1  # what came later is known to begin here
        for since, until, state in reversed(self._told):
            if since > t_ns:
                continue
            begin = until if state is ATOMIC else since
            if max(begin, since_ns + 1) < end:
                return True
            if since <= since_ns:
                return False
            end = since
        return len(self._told) < DEPTH and since_ns + 1 < end
