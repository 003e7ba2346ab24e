"""Where the threads of a test wait for one another: flags in memory, or semaphores.

vCPU threads *arrive* and wait; the main thread sees when the last one has, and *releases* them. A
flag that threads spin on is seen after a transfer of its line; a semaphore after a wake-up.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from simpy import Environment, Event

from simkvm.guest.pause import Pause
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.cpu import NEVER, Cpu
from simkvm.kernel.task import reach

Steps = Generator[Event, Any, int]


class Rendezvous:
    """One of ``number`` threads with the main thread, again and again.

    ``seen_ns``: until one side sees what the other did. ``sleeping``: waiters sleep (semaphores)
    instead of spinning in user mode.
    """

    def __init__(self, env: Environment, number: int, seen_ns: int, sleeping: bool = False) -> None:
        self._env = env
        self._number = number
        self._seen_ns = seen_ns
        self._sleeping = sleeping
        self._waiting: list[Event] = []
        self._complete: Event | None = None
        self._over = False
        self.arrivals: list[int] = []  #: when each thread of this round arrived, in order
        self.last_ns: dict[int, int] = {}  #: when each vCPU arrived last

    # -- vCPU threads -------------------------------------------------------------------------

    def arrive(self, index: int, cpu: Cpu, t_ns: int) -> Steps:
        """Thread ``index`` arrives at ``t_ns`` and waits; returns when it sees the release."""
        t_ns = yield from reach(self._env, t_ns)
        if self._over:
            return t_ns
        released = Event(self._env)
        self._waiting.append(released)
        self.arrivals.append(t_ns)
        self.last_ns[index] = t_ns
        self.idle(cpu, t_ns)
        if len(self.arrivals) == self._number and self._complete is not None:
            self._tell(self._complete, max(self.arrivals))
            self._complete = None
        at_ns: int = yield released
        return at_ns

    def idle(self, cpu: Cpu, t_ns: int) -> None:
        """A thread waits on ``cpu`` from ``t_ns`` on."""
        if self._sleeping:
            cpu.sleep(t_ns)
        else:
            cpu.enter_user(t_ns, NEVER)

    # -- the main thread ----------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether all threads have arrived, or never will."""
        return self._over or len(self.arrivals) == self._number

    def all_arrived(self, t_ns: int) -> Steps:
        """Wait from ``t_ns`` on; returns when the main thread sees the last arrival."""
        t_ns = yield from reach(self._env, t_ns)
        if not self.complete:
            self._complete = Event(self._env)
            t_ns = yield self._complete
        return max(t_ns, max(self.arrivals, default=0) + self._seen_ns)

    def release(self, t_ns: int) -> None:
        """Let everybody that waits go on, at ``t_ns``."""
        waiting, self._waiting = self._waiting, []
        self.arrivals.clear()
        for released in waiting:
            self._tell(released, t_ns)

    def end(self, t_ns: int) -> None:
        """The process is killed at ``t_ns``: nobody waits any more, on either side."""
        self._over = True
        if self._complete is not None:
            self._tell(self._complete, t_ns)
            self._complete = None
        self.release(t_ns)

    def _tell(self, event: Event, t_ns: int) -> None:
        event._ok = True
        event._value = t_ns + self._seen_ns
        self._env.schedule(event, delay=max(0, t_ns + self._seen_ns - int(self._env.now)))


class Wait(Pause):
    """Arrive at a rendezvous and wait for the release."""

    def __init__(self, where: Rendezvous) -> None:
        self._where = where

    def spend(self, vcpu: Vcpu, t_ns: int) -> Steps:
        """Until the main thread lets go."""
        return (yield from self._where.arrive(vcpu.index, vcpu.cpu, t_ns))


class Crossing(Pause):
    """KVM_RUN begins, or ends with a ucall: half of a round trip to user space."""

    def __init__(self, half_ns: int, to_user: bool) -> None:
        self._half_ns = half_ns
        self._to_user = to_user

    def spend(self, vcpu: Vcpu, t_ns: int) -> Steps:
        """Only time; nobody else takes part."""
        yield from ()
        end = t_ns + self._half_ns
        if self._to_user:
            vcpu.cpu.enter_kernel(t_ns)
            vcpu.cpu.enter_user(end, NEVER)
        else:
            vcpu.cpu.enter_kernel(t_ns)
        return end
