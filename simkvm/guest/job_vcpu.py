"""A vCPU that works off jobs: requests of clients, bursts, pieces of a scan.

Jobs are planned ahead (:mod:`simkvm.guest.job_plan`) and cost no event. A fault blocks the whole
vCPU, so that the other requests which wait for it wait longer. Without a job the vCPU waits (WFI)
and its CPU is idle.

Every touch sets the accessed flag. There is no TLB: the footprints are far beyond its reach, and
under memory pressure invalidations empty it all the time. What these cost is filling it again with
the pages that every job needs (``hot_pages``). A vCPU settles that, and the time that softirqs took
from it, when it enters the guest after a fault, and once a millisecond when it begins a job.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterator
from heapq import heappush
from typing import TYPE_CHECKING, Any

from simpy import Event
from simpy.events import NORMAL

from simkvm.guest.job_plan import FAR, JobPlan
from simkvm.guest.jobs import Stage
from simkvm.guest.vcpu import IN, certain
from simkvm.kernel.cpu import Cpu
from simkvm.kernel.stage2 import WRITE

if TYPE_CHECKING:
    from simkvm.guest.barrier import Barrier
    from simkvm.guest.job_accesses import JobAccesses
    from simkvm.kernel.kvm import Kvm
    from simkvm.scenario.workloads import Workload


class JobVcpu(JobPlan):
    """One vCPU of ``kvm`` that goes through ``stages``."""

    def __init__(
        self,
        kvm: Kvm,
        index: int,
        cpu: Cpu,
        stages: Iterator[Stage],
        access: Workload,
        accesses: JobAccesses,
        barrier: Barrier,
    ) -> None:
        super().__init__(kvm, index, cpu, access, accesses)
        self._stages = stages
        self._barrier = barrier
        self._arrival = certain(kvm.env)
        cpu.halted = self.halted
        self._halted = False  #: and has given its CPU up
        self._into_ns = 0  #: preempted: how far the job under way had come

    # -- the process --------------------------------------------------------------------------

    def run(self) -> Generator[Event, Any, None]:
        """The vCPU thread: stage after stage until there is none or the VM dies."""
        sched = self.kvm.sched
        if sched.shares:
            self._halts, self.cpu.halted = True, None
        t_ns = yield from sched.checkpoint(self.task, 0)
        for stage in self._stages:
            if not self.kvm.alive:
                break
            t_ns = yield from self._work(stage, t_ns)
            if stage.barrier and self.kvm.alive:
                t_ns = yield from self._meet(t_ns)
        self.finished_ns = t_ns
        sched.sleep(self.task, t_ns)

    def _work(self, stage: Stage, t_ns: int) -> Generator[Event, Any, int]:
        """Go through ``stage`` from ``t_ns`` on; returns when that is done."""
        env, kvm = self._env, self.kvm
        queue, numbers = env._queue, env._eid
        self._begin(stage, t_ns)
        if not self._next_batch():
            return t_ns
        next_ns = self._start(t_ns)
        while kvm.alive:
            if self._left_ns != IN:
                next_ns = yield from self._give_way()
                continue
            while next_ns > env._now and queue and next_ns >= queue[0][0]:
                self.alarm = alarm = self._sleeper
                alarm.callbacks = []
                heappush(queue, (next_ns, NORMAL, next(numbers), alarm))
                yield alarm
                next_ns = self.next_ns  # it may have been moved meanwhile
            self.alarm = None
            if not kvm.alive:
                break  # type: ignore[unreachable]  # a teardown may have come meanwhile
            if self._left_ns != IN:
                continue
            if self._faults:
                self._apply(self._run_to)
                self._commit(len(self._origins) - 1)
                next_ns = yield from self._fault(next_ns)
                continue
            if self._halts_until_ns:
                next_ns = yield from self._halt(next_ns)
                if not kvm.alive:
                    break  # type: ignore[unreachable]  # it may have come meanwhile, too
            if not self._go_on(next_ns):
                self._running = False
                break
            next_ns = self.next_ns
        self.due_ns = FAR
        return next_ns

    def _fault(self, next_ns: int) -> Generator[Event, Any, int]:
        """The touch at the present position faults; the host is reached at ``next_ns``.

        Returns when it is needed next.
        """
        env, kvm, fault = self._env, self.kvm, self.fault
        self._running = False
        self.due_ns = FAR
        position = self._position
        leaf, write = self._list[position], self._need_list[position] & WRITE != 0
        if kvm.refusals or kvm.host.mmap_writer is not None:
            next_ns, refused = yield from self._hindered(next_ns, leaf)
            if refused:
                return next_ns
        t_ns = fault.look_up(next_ns, leaf, write)
        queue = env._queue
        if queue and t_ns >= queue[0][0]:
            arrival = self._arrival  # nobody else ever sees it: the same one every time
            arrival.callbacks = []
            heappush(queue, (t_ns, NORMAL, next(env._eid), arrival))
            yield arrival
        if fault.lacking:
            rest = fault.install(t_ns)
            if rest is not None:
                t_ns = yield from rest
            if fault.not_present:
                return self._put_to_sleep(t_ns)
        grant = fault.take(t_ns)
        if isinstance(grant, int):
            self.next_ns = grant
        else:
            self.cpu.spin(t_ns)
            self.alarm = grant
            yield grant
        return self.next_ns

    def _put_to_sleep(self, t_ns: int) -> int:
        """The page is not present: see :class:`simkvm.guest.job_threads.ThreadedVcpu`."""
        raise NotImplementedError

    def _meet(self, t_ns: int) -> Generator[Event, Any, int]:
        """Wait for the other vCPUs, from ``t_ns`` on; returns when this one goes on."""
        met = self._barrier.arrive(t_ns)
        if isinstance(met, int):
            return met
        self.kvm.sched.sleep(self.task, t_ns)
        self._pausing = True
        all_ns: int = yield met
        t_ns = yield from self.kvm.sched.checkpoint(self.task, all_ns + self._wakeup_ns)
        self._pausing = False
        return t_ns

    # -- sharing a CPU ------------------------------------------------------------------------

    def _halt(self, t_ns: int) -> Generator[Event, Any, int]:
        """Without a job from ``t_ns`` on; returns when the vCPU runs again."""
        env, queue = self._env, self._env._queue
        self._apply(self._run_to)
        self._commit(len(self._origins))
        self._running, self._halted, self._pausing = False, True, True
        self.due_ns = FAR
        self.next_ns, self._halts_until_ns = self._halts_until_ns, 0
        self.kvm.sched.sleep(self.task, t_ns)
        if self.next_ns == FAR:
            self.alarm = Event(env)  # for who has something to do to bring forward
            yield self.alarm
        elif self.next_ns > env.now and queue and self.next_ns >= queue[0][0]:
            self.alarm = alarm = self._sleeper
            alarm.callbacks = []
            heappush(queue, (self.next_ns, NORMAL, next(env._eid), alarm))
            yield alarm
        self.alarm = None
        self._halted = False
        t_ns = yield from self.kvm.sched.wake(self.task, self.next_ns)
        self._pausing = False
        self._free_ns = self._entry_ns = t_ns
        self._running = True
        self.cpu.enter_guest(t_ns, FAR)
        return t_ns

    def preempted(self, t_ns: int) -> None:
        """Leave the guest at ``t`` for another thread; in the kernel, on the way back to it."""
        if not self._running or self.alarm is None:
            return
        self.catch_up(t_ns)
        if self._faults and t_ns > self._exit_ns - self._touch_ns:
            return  # on its way out already
        inside = t_ns > self._entry_ns
        self._leave_guest(t_ns if inside else self._entry_ns)
        self._reenter_ns = self.kvm.costs.fault.enter_ns if inside else 0
        self._wake_at(self.next_ns)

    def _leave_guest(self, t_ns: int) -> None:
        """Out of the guest at ``t``, with what lies before then applied.

        Of the plan only the job under way stays, if there is one.
        """
        self._commit(bisect_right(self._ends, t_ns))
        origins = self._origins
        begun = self._position > self._offsets[self._job]
        kept = bool(origins) and (begun or self._resumed or origins[0] < t_ns)
        self._unplan(int(kept))
        self._into_ns = t_ns - origins[0] if kept else 0
        self._left_ns = 0
        self._running = self._faults = False
        self._halts_until_ns = 0
        self._run_to = self._position
        self.due_ns = FAR
        self.next_ns = t_ns

    def _go_in(self, t_ns: int) -> int:
        self._left_ns = IN
        if not self.kvm.alive:
            return t_ns
        stolen_ns = 0
        if self.cpu.stolen_ns or t_ns >= self._settle_at_ns:
            stolen_ns = self._settle(t_ns)
        if self._origins:
            self._origins[0] = t_ns + stolen_ns - self._into_ns
        else:
            self._free_ns = t_ns + stolen_ns
        self._running = True
        self._entry_ns = t_ns
        self.next_ns = next_ns = self._plan_jobs(self._position)
        self.cpu.enter_guest(t_ns, self._exit_ns)
        return next_ns

    # -- running in the guest -----------------------------------------------------------------

    def _start(self, t_ns: int) -> int:
        """Enter the guest at ``t_ns``, between two jobs."""
        self._settle(t_ns)
        self._running = True
        self._entry_ns = t_ns
        self.next_ns = next_ns = self._plan_jobs(self._position)
        self.cpu.enter_guest(t_ns, self._exit_ns)
        return next_ns

    def _go_on(self, t_ns: int) -> bool:
        """The plan is worked off, without a fault: a job begins at ``t_ns``. Plan on.

        Returns whether there is one. Flags of what was touched wait for somebody to look, or for
        the next settlement, so that they do not hang on how far is planned ahead.
        """
        settles = t_ns >= self._settle_at_ns
        over = self._job + len(self._origins) == len(self._totals) or not self._clients
        if settles or over:
            self._apply(self._run_to)
            self._commit(len(self._origins))
        if over and not self._next_batch():
            return False
        if settles:
            self._settle(t_ns)
        self.next_ns = self._plan_jobs(self._run_to)
        self.cpu.leave_guest_at(self._exit_ns)
        return True

    def mapped(self, t_ns: int) -> int:
        """The page at the present position was mapped; the guest goes on at ``t_ns``."""
        if not self.kvm.alive:
            return t_ns
        position = self._position
        self.touches += 1
        if self._last_touch is not None:
            self._last_touch[self._list[position]] = t_ns
        return self._resume_job(t_ns, position + 1)

    def enter(self, t_ns: int, busy_ns: int = 0) -> int:
        """The touch that faulted is made again from ``t_ns`` on."""
        if not self.kvm.alive:
            return t_ns
        return self._resume_job(t_ns + busy_ns, self._position)

    def _resume_job(self, t_ns: int, position: int) -> int:
        """The job under way goes on at ``t_ns``; its next touch is ``position``."""
        done_ns = self._at[self._position]
        self._busy_ns += done_ns - self._counted_ns
        self._counted_ns = done_ns
        stolen_ns = 0
        owes = self._accesses.flushes + self._own_flushes != self._seen
        if owes or self._lost_ns or self.cpu.stolen_ns:
            stolen_ns = self._settle(t_ns)
        self._origins[0] = t_ns + stolen_ns - done_ns
        self._position = position
        if self.task.need_resched:
            self._leave_guest(t_ns)
            return t_ns
        self._running = True
        self._entry_ns = t_ns
        self.next_ns = next_ns = self._next_fault(position)
        self.cpu.enter_guest(t_ns, self._exit_ns)
        return next_ns

    def _next_fault(self, position: int) -> int:
        """As :meth:`_plan_jobs`, in one go if the job faults at its very next touch again."""
        if position < self._offsets[self._job + 1]:
            need = self._need_list[position]
            if self._entries[self._list[position]] & need != need:
                self._run_to = position
                return self._fault_at(position)
        return self._plan_jobs(position)

    def pass_over(self) -> None:
        """Nobody skips touches of a job."""
        raise NotImplementedError

    # -- seen from outside --------------------------------------------------------------------

    def catch_up(self, t_ns: int) -> None:
        """Apply the touches planned before ``t_ns``, and account for jobs that ended before."""
        if t_ns <= self.due_ns or not self._running:
            return
        self._apply(self._reached(t_ns))
        self._commit(bisect_left(self._ends, t_ns))
        self._due()

    def given(self, leaf: int, t_ns: int) -> None:
        """Another vCPU mapped ``leaf`` at ``t_ns``: a fault planned there may not be one."""
        touch = self._run_to
        if not self._running or not self._faults or self._list[touch] != leaf:
            return
        if self._origins[-1] + self._at[touch] < t_ns:
            return  # touched before: the exit has happened
        self.next_ns = self._plan_jobs(touch)
        self.cpu.leave_guest_at(self._exit_ns)

    def unmapped(self, t_ns: int) -> None:
        """Mappings may have gone at ``t_ns``: look whether the plan still holds."""
        if not self._running or self.alarm is None:
            return
        touch = self._first_fault(self._position, self._run_to)
        if touch == self._run_to:
            return
        moved = self._cut(touch)
        if moved < self.next_ns:
            self._wake_at(moved)
        self.next_ns = moved
        self.cpu.leave_guest_at(self._exit_ns)

    def flushed(self, t_ns: int) -> None:
        """The VM's translations were invalidated, and mappings may have gone, at ``t_ns``."""
        self._own_flushes += 1
        self.unmapped(t_ns)

    def interrupted(self, t_ns: int, lost_ns: int) -> None:
        """An interrupt at ``t_ns`` that flushes and costs a running guest ``lost_ns``, later."""
        self._own_flushes += 1
        self._lost_ns += lost_ns

    def forget_translations(self) -> None:
        """An invalidation emptied this CPU's TLB."""
        self._own_flushes += 1

    def stop(self, t_ns: int) -> None:
        """The VM dies at ``t_ns``: leave the guest; a fault in flight is handled to its end."""
        self._barrier.abandon(t_ns)
        super().stop(t_ns)
        if self._halted and self.alarm is not None and t_ns < self.next_ns:
            self.next_ns = t_ns
            self._wake_at(t_ns)
