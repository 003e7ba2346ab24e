"""Who runs where: threads that have a CPU each, or that share the CPUs under a fair scheduler.

Source: kernel/sched/fair.c and core.c, v6.12; the order on one CPU is in
:mod:`simkvm.kernel.run_queue`. The rules between CPUs:

* A thread that wakes up goes to the CPU where it ran last if that is idle, else to an idle one, of
  its own node if there is one (``select_idle_sibling``), else it waits where it ran last. It takes
  the CPU from the running thread if it is the one to be picked now: it is eligible, and the
  running thread is not, or has had its slice and the later deadline.
* The slice, 0.75 ms x (1 + log2 of up to 8 CPUs), ends at a tick. Ticks for that are simulated only
  while somebody waits.
* A CPU that has nothing left to run takes the thread that has waited longest from the longest
  queue (``sched_balance_newidle``). There is no other balancing.

A switch from one thread to another costs ``context_switch_ns``, which nobody is charged. What
waking up costs is in the time that a thread gives to :meth:`Scheduler.wake`, as far as its wake-up
is modelled: it then pays nothing more on an idle CPU, so that without sharing all is as with
CPUs of one's own.

**The kernel is not preempted.** A thread that has to go finds out at its next checkpoint: a
``cond_resched()``, the return to user space or to the guest; spinning for a lock, or holding one,
it goes on. A thread that sleeps in SimPy while it runs outside the kernel, as a vCPU in its guest
does, is registered by :meth:`Scheduler.add` with a :class:`Preemptible`, and is called when it has
to go. It leaves what it does, and its process comes to :meth:`Scheduler.checkpoint` with the time
at which it did so.

Times may run ahead of the clock. Waking up, and a checkpoint at which somebody waits, reach their
time first; what is told of a time to come (a thread sleeps from then on) is acted on at that time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, Final, Protocol

from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.run_queue import Preemptible, RunQueue, Thread
from simkvm.kernel.task import Task, reach

__all__ = ["FairScheduler", "OwnCpus", "Preemptible", "Scheduler"]

Steps = Generator[Event, Any, int]
BASE_SLICE_NS: Final = 750_000  #: sysctl_sched_base_slice, for one CPU


class Scheduler(Protocol):
    """What threads ask of it; ``t_ns`` may be ahead of the clock.

    ``shares``: whether a thread that has nothing to do should say so at once.
    """

    shares: ClassVar[bool]

    def add(self, task: Task, preemptible: Preemptible | None = None) -> None:
        """Make ``task`` known before it runs, with who is to be told when it has to go."""
        ...

    def wake(self, task: Task, t_ns: int) -> Steps:
        """``task`` is ready to run at ``t``: returns when it runs, on ``task.cpu``."""
        ...

    def sleep(self, task: Task, t_ns: int) -> None:
        """``task`` gives its CPU up at ``t``: it waits for something, or is done."""
        ...

    def exit(self, task: Task, t_ns: int) -> None:
        """``task`` is done, and perhaps asleep already."""
        ...

    def checkpoint(self, task: Task, t_ns: int) -> Steps:
        """``task`` may be preempted at ``t``: returns when it goes on.

        A thread that has not got a CPU, because it has just begun, gets one first.
        """
        ...


class OwnCpus:
    """Every thread has a CPU to itself: nobody waits, and only the states of CPUs are told."""

    shares: ClassVar[bool] = False

    def add(self, task: Task, preemptible: Preemptible | None = None) -> None:
        """It will never have to go."""

    def wake(self, task: Task, t_ns: int) -> Steps:
        """At once."""
        task.cpu.enter_kernel(t_ns)
        yield from ()
        return t_ns

    def sleep(self, task: Task, t_ns: int) -> None:
        """The CPU is idle."""
        task.cpu.sleep(t_ns)

    def exit(self, task: Task, t_ns: int) -> None:
        """What it told last stays."""

    def checkpoint(self, task: Task, t_ns: int) -> Steps:
        """It goes on."""
        yield from ()
        return t_ns

    def summary(self, end_ns: int) -> dict[str, int | float | str]:
        """Nothing to tell."""
        return {}


class FairScheduler:
    """Threads share ``cpus``. ``tick_after``: the first timer tick later than a time."""

    shares: ClassVar[bool] = True

    def __init__(
        self,
        env: Environment,
        cpus: Sequence[Cpu],
        context_switch_ns: int,
        tick_after: Callable[[int], int],
    ) -> None:
        slice_ns = BASE_SLICE_NS * min(8, len(cpus)).bit_length()
        limit_ns = max(2 * slice_ns, tick_after(0))
        self._env = env
        self._switch_ns = context_switch_ns
        self.queues = [RunQueue(cpu, slice_ns, limit_ns, tick_after) for cpu in cpus]
        self.threads: dict[Task, Thread] = {}  # in the order in which they were met
        self._waiting = 0  # threads that wait,
        self._running = 0  # and that have a CPU

    # -- asked by threads ---------------------------------------------------------------------

    def add(self, task: Task, preemptible: Preemptible | None = None) -> None:
        """See :class:`Scheduler`; the thread prefers the CPU that it has now."""
        self._thread(task).preemptible = preemptible

    def wake(self, task: Task, t_ns: int) -> Steps:
        """See :class:`Scheduler`. For a thread that runs it is a checkpoint."""
        thread = self._thread(task)
        if task.on_cpu:
            at_ns = yield from self.checkpoint(task, t_ns)
            if at_ns == t_ns:
                task.cpu.enter_kernel(t_ns)
            return at_ns
        t_ns = yield from reach(self._env, t_ns)
        queue = self._select(thread, t_ns)
        over = queue.account(t_ns)
        queue.place(thread)
        if queue.idle(t_ns):
            self._run(queue, thread, t_ns)
            queue.cpu.enter_kernel(t_ns)
            return t_ns
        self._wait(thread, t_ns)
        if queue.current is not None:
            if queue.pick() is thread or (over and len(queue.waiting) > 1):
                self._resched(queue, t_ns)
            else:
                self._arm(queue)
        return (yield from _turn(thread))

    def sleep(self, task: Task, t_ns: int) -> None:
        """See :class:`Scheduler`; a thread without a CPU has nothing to give up."""
        thread = self._thread(task)
        if not task.on_cpu:
            return
        queue = thread.queue
        queue.remove(thread, t_ns)
        queue.left_ns = t_ns
        self._running -= 1
        task.on_cpu = task.need_resched = False
        if self._waiting:
            queue.cpu.context_switch(t_ns)
            self._leave(queue)
        else:
            queue.cpu.sleep(t_ns)

    def exit(self, task: Task, t_ns: int) -> None:
        """See :class:`Scheduler`."""
        self.sleep(task, t_ns)

    def checkpoint(self, task: Task, t_ns: int) -> Steps:
        """See :class:`Scheduler`."""
        thread = self._thread(task)
        if not task.on_cpu:
            return (yield from self.wake(task, t_ns))
        queue = thread.queue
        if not queue.waiting and not task.need_resched:
            return t_ns
        t_ns = yield from reach(self._env, t_ns)
        if not task.need_resched:
            return t_ns
        task.need_resched = False
        queue.account(t_ns)
        following = queue.pick()
        if following is thread:
            self._arm(queue)
            return t_ns
        task.on_cpu = False
        queue.put_back()
        self._running -= 1
        self._waiting += 1
        thread.since_ns, thread.turn = t_ns, Event(self._env)
        self._switch(queue, following, t_ns)
        return (yield from _turn(thread))

    def summary(self, end_ns: int) -> dict[str, int | float | str]:
        """What the threads waited and the CPUs were busy up to ``end``; once, when a run is over.

        Busy is who has a CPU, softirqs on an idle one left out.
        """
        for queue in self.queues:
            queue.account(end_ns)
        threads = self.threads.values()
        waits = [thread.wait_ns for thread in threads]
        waits += [end_ns - each.since_ns for queue in self.queues for each in queue.waiting]
        busy_ns = sum(thread.run_ns for thread in threads)
        busy_ns += sum(queue.switch_ns for queue in self.queues)
        return {
            "runqueue_wait_total_ns": sum(waits),
            "cpu_busy_ratio": busy_ns / (len(self.queues) * max(1, end_ns)),
            "context_switches": sum(thread.switches for thread in threads),
        }

    # -- steps --------------------------------------------------------------------------------

    def _thread(self, task: Task) -> Thread:
        thread = self.threads.get(task)
        if thread is None:
            thread = self.threads[task] = Thread(task, self.queues[task.cpu.id])
            task.on_cpu = False
        return thread

    def _select(self, thread: Thread, t_ns: int) -> RunQueue:
        """Where a thread that wakes up at ``t`` goes (select_task_rq_fair)."""
        before = thread.queue
        if self._running == len(self.queues) or before.idle(t_ns):
            return before
        first, node = before.cpu.id, before.cpu.node
        around = self.queues[first:] + self.queues[:first]
        idle = [queue for queue in around if queue.idle(t_ns)]
        near = [queue for queue in idle if queue.cpu.node == node]
        return (near or idle or [before])[0]

    def _wait(self, thread: Thread, t_ns: int) -> None:
        """``thread`` waits from ``t`` on; CPUs that are about to be idle will look for it."""
        thread.since_ns, thread.turn = t_ns, Event(self._env)
        thread.queue.waiting.append(thread)
        self._waiting += 1
        for queue in self.queues:
            if queue.current is None and not queue.leaving:
                self._leave(queue)

    def _leave(self, queue: RunQueue) -> None:
        """Choose who is next on a CPU when its thread has left it."""
        queue.leaving = True
        delay_ns = queue.left_ns - int(self._env.now)
        if delay_ns <= 0:
            self._choose(queue)
            return
        event = self._env.timeout(delay_ns)
        assert event.callbacks is not None
        event.callbacks.append(lambda _: self._choose(queue))

    def _choose(self, queue: RunQueue) -> None:
        """The CPU is free: a thread of its own, else one of the longest queue, else it idles."""
        t_ns = queue.left_ns
        queue.leaving = False
        if queue.waiting:
            self._switch(queue, queue.pick(), t_ns)
            return
        longest = self._longest()
        if longest is None:
            queue.cpu.sleep(t_ns)
            return
        pulled = longest.waiting[0]
        longest.remove(pulled, t_ns)
        left = pulled.deadline - pulled.vruntime
        queue.place(pulled)
        pulled.deadline = pulled.vruntime + left
        self._switch(queue, pulled, t_ns)

    def _longest(self) -> RunQueue | None:
        """The queue in which most threads wait; None if nobody waits."""
        longest = max(self.queues, key=lambda queue: len(queue.waiting))
        return longest if longest.waiting else None

    def _switch(self, queue: RunQueue, thread: Thread, t_ns: int) -> None:
        """The CPU goes from one thread to ``thread``, which has waited, at ``t``."""
        t_ns = max(t_ns, int(self._env.now))  # a thread that leaves may be late
        self._waiting -= 1
        thread.wait_ns += t_ns - thread.since_ns
        queue.switch_ns += self._switch_ns
        start_ns = t_ns + self._switch_ns
        self._run(queue, thread, start_ns)
        queue.cpu.switch(t_ns)
        assert thread.turn is not None
        thread.turn._ok, thread.turn._value = True, start_ns
        self._env.schedule(thread.turn, delay=max(0, start_ns - int(self._env.now)))
        if queue.waiting:
            self._arm(queue)

    def _run(self, queue: RunQueue, thread: Thread, t_ns: int) -> None:
        queue.run(thread, t_ns)
        thread.switches += 1
        self._running += 1
        task = thread.task
        task.cpu, task.on_cpu = queue.cpu, True
        if thread.preemptible is not None:
            thread.preemptible.placed(queue.cpu)

    def _resched(self, queue: RunQueue, t_ns: int) -> None:
        """The current thread has to go at its next checkpoint (resched_curr)."""
        thread = queue.current
        assert thread is not None
        if not thread.task.need_resched:
            thread.task.need_resched = True
            if thread.preemptible is not None:
                thread.preemptible.preempted(t_ns)

    def _arm(self, queue: RunQueue) -> None:
        """Look at the current thread again at the tick at which its slice is over."""
        tick_ns = queue.next_tick()
        if queue.tick_ns == tick_ns:
            return
        queue.tick_ns = tick_ns
        event = self._env.timeout(tick_ns - int(self._env.now))
        assert event.callbacks is not None
        event.callbacks.append(lambda _: self._tick(queue, tick_ns))

    def _tick(self, queue: RunQueue, tick_ns: int) -> None:
        if queue.tick_ns != tick_ns:
            return  # another thread runs since
        queue.tick_ns = -1
        if queue.current is None or not queue.waiting:
            return
        if queue.account(tick_ns):
            self._resched(queue, tick_ns)
        else:
            self._arm(queue)


def _turn(thread: Thread) -> Steps:
    assert thread.turn is not None
    at_ns: int = yield thread.turn
    return at_ns
