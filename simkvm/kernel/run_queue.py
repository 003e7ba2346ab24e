"""The run queue of one CPU: who runs, who waits, and who is to be next, after EEVDF.

Source: kernel/sched/fair.c, v6.12. Every thread has nice 0, so its virtual time is the time that it
ran. A queue's threads are entitled to run alike; the average of their virtual times is where each
would be had they. A thread that is not ahead of it is *eligible*, and of the eligible ones the one
whose request, a slice, is to be served first runs (``pick_eevdf``). It keeps the CPU until its
slice is over or it is no longer eligible (``RUN_TO_PARITY``). What a thread is behind or ahead when
it leaves, its lag, is given to it again when it comes back (``update_entity_lag``,
``place_entity``).

Left out: ``DELAY_DEQUEUE`` (a thread that sleeps while it is ahead stays queued until it no longer
is; here it comes back as far ahead as it left, as in v6.6), weights, groups and custom slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from simpy import Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.task import Task


class Preemptible(Protocol):
    """A thread that the scheduler has to tell what it does, because it sleeps while it runs."""

    def preempted(self, t_ns: int) -> None:
        """Another thread is to run: give the CPU up, at ``t`` if that may be, else soon.

        Called at a time that has come; ``task.need_resched`` is set. The thread's process has to
        come to a checkpoint. A thread in the kernel does so on the way out of it: whoever plans
        what it does next outside, ahead of the clock, has to look at ``task.need_resched`` then.
        """
        ...

    def placed(self, cpu: Cpu) -> None:
        """The thread is about to run on ``cpu``, after it slept or waited."""
        ...


@dataclass(eq=False)
class Thread:
    """A thread as the scheduler knows it. All times in ns."""

    task: Task
    queue: RunQueue  #: of the CPU that it runs on or ran on last
    preemptible: Preemptible | None = None
    vruntime: int = 0
    deadline: int = 0  #: virtual time at which its present slice is over
    lag: int = 0  #: what it was behind the average when it left its queue
    turn: Event | None = None  #: succeeds, with the time, when a waiting thread gets its CPU
    since_ns: int = 0  #: waiting since then
    run_ns: int = 0
    wait_ns: int = 0  #: run-queue delay
    switches: int = 0  #: how often it got a CPU


@dataclass(eq=False)
class RunQueue:
    """The threads of ``cpu``. ``tick_after``: the first timer tick later than a time."""

    cpu: Cpu
    slice_ns: int
    lag_limit_ns: int
    tick_after: Callable[[int], int]
    current: Thread | None = None
    waiting: list[Thread] = field(default_factory=list)  #: in order of their coming
    left_ns: int = 0  #: without a current thread: when the last one leaves or left
    leaving: bool = False  #: the next thread is chosen then
    tick_ns: int = -1  #: the tick at which the slice of the current thread is looked at
    switch_ns: int = 0  #: spent on switching between threads
    _since_ns: int = 0  # the current thread is accounted up to here
    _kept: bool = False  # the current thread has not had its slice yet
    _zero: int = 0  # virtual time of an empty queue

    def idle(self, t_ns: int) -> bool:
        """Whether nobody needs the CPU at ``t``."""
        return self.current is None and not self.leaving and self.left_ns <= t_ns

    # -- accounting ---------------------------------------------------------------------------

    def account(self, t_ns: int) -> bool:
        """Charge the current thread up to ``t``; whether its slice was over there (update_curr).

        A slice that is over is renewed when somebody looks: at a tick, or when a thread comes.
        """
        thread = self.current
        if thread is None or t_ns <= self._since_ns:
            return False
        over_ns = self._since_ns + thread.deadline - thread.vruntime
        ran_ns = t_ns - self._since_ns
        thread.run_ns += ran_ns
        thread.vruntime += ran_ns
        self._since_ns = t_ns
        if over_ns > t_ns:
            return False
        self._kept = False
        while (tick_ns := self.tick_after(over_ns - 1)) < t_ns:  # nobody was there to be told
            over_ns = tick_ns + self.slice_ns
        if renewed := over_ns <= t_ns:
            over_ns = t_ns + self.slice_ns
        thread.deadline = thread.vruntime + over_ns - t_ns
        return renewed

    def next_tick(self) -> int:
        """The first tick at which the slice of the current thread is over."""
        assert self.current is not None
        over_ns = self._since_ns + self.current.deadline - self.current.vruntime
        return self.tick_after(over_ns - 1)

    # -- coming and going ---------------------------------------------------------------------

    def place(self, thread: Thread) -> None:
        """Set the virtual time of a thread that comes from sleep or from another queue.

        It comes to where it keeps its lag with itself on the queue, which moves the average.
        """
        others = self._runnable()
        thread.queue = self
        if others:
            lag = _towards_zero(thread.lag * (len(others) + 1), len(others))
            thread.vruntime = sum(other.vruntime for other in others) // len(others) - lag
        else:
            thread.vruntime = self._zero
        thread.deadline = thread.vruntime + self.slice_ns

    def run(self, thread: Thread, t_ns: int) -> None:
        """``thread``, which may have waited here, is the current one from ``t`` on."""
        if thread in self.waiting:
            self.waiting.remove(thread)
        self.current = thread
        self._since_ns = t_ns
        self._kept = True
        self.tick_ns = -1

    def put_back(self) -> None:
        """The current thread waits again (accounted already)."""
        assert self.current is not None
        self.waiting.append(self.current)
        self.current = None

    def remove(self, thread: Thread, t_ns: int) -> None:
        """``thread`` sleeps, or goes to another queue, at ``t``."""
        self.account(t_ns)
        others = self._runnable()
        lag = sum(other.vruntime for other in others) // len(others) - thread.vruntime
        thread.lag = max(-self.lag_limit_ns, min(self.lag_limit_ns, lag))
        if thread is self.current:
            self.current = None
        else:
            self.waiting.remove(thread)
        if len(others) == 1:
            self._zero = max(self._zero, thread.vruntime)

    # -- choosing -----------------------------------------------------------------------------

    def pick(self) -> Thread:
        """Who is to run now; the current thread is accounted already (pick_eevdf)."""
        threads = self._runnable()
        total = sum(thread.vruntime for thread in threads)
        current = self.current
        if current is not None and current.vruntime * len(threads) > total:
            current = None
        if current is not None and self._kept:
            return current
        best = None
        for thread in self.waiting:
            if thread.vruntime * len(threads) <= total and (
                best is None or thread.deadline < best.deadline
            ):
                best = thread
        if best is None or (current is not None and current.deadline < best.deadline):
            assert current is not None
            return current
        return best

    def _runnable(self) -> list[Thread]:
        return self.waiting if self.current is None else [*self.waiting, self.current]


def _towards_zero(number: int, divisor: int) -> int:
    return number // divisor if number >= 0 else -(-number // divisor)
