"""A vCPU that works off jobs with several threads, and async page faults between them.

Source: arch/x86/kernel/kvm.c (``kvm_async_pf_task_wait_schedule``, ``kvm_async_pf_task_wake``) and
arch/x86/kvm/x86.c (``kvm_arch_async_page_not_present``), v6.12. A job that touches a page which has
to be read is parked, and with it all clients of its thread: none of their jobs may overtake it. The
vCPU goes on with those of other threads; without any it halts. When the page is there the vCPU is
kicked, and the parked job goes on as soon as the job under way is done, before any new one.

A parked job is worked off as a batch of one job, for which the batch at hand is set aside. The
touch is then made again, and faults once more on a page that the host has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from heapq import heapify
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.guest.job_plan import FAR
from simkvm.guest.job_vcpu import JobVcpu
from simkvm.kernel.async_pf import PER_VCPU, AsyncPf
from simkvm.kernel.swap_fault import SwapFaultPath


class Batch(NamedTuple):
    """Jobs being worked on, as :class:`simkvm.guest.job_plan.JobPlan` has them."""

    last: bool
    offsets: list[int]
    leaves: NDArray[np.int64]
    needs: NDArray[np.uint8]
    at: list[int]
    totals: list[int]
    before: list[int]
    work_before: list[int]
    gaps: list[int]
    job: int
    position: int


@dataclass(frozen=True, eq=False)
class Parked:
    """A job that waits for a page: what is left of it, and whose it is."""

    batch: Batch
    client: int
    arrival_ns: int
    held: list[tuple[int, int]]  #: clients of its thread, by when they ask


class ThreadedVcpu(JobVcpu):
    """A vCPU whose threads sleep for themselves while their pages are read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parked: list[Parked] = []
        self._ready: deque[Parked] = deque()  #: of those: whose page has come
        self._aside: Batch | None = None
        self.awaited: list[AsyncPf] = []  #: pages that kworkers take in

    # -- a page that is not there -------------------------------------------------------------

    def _fault(self, next_ns: int) -> Generator[Event, Any, int]:
        """As :meth:`JobVcpu._fault`.

        It is waited for if a kworker has been asked for the page before (KVM_REQ_APF_HALT), or if
        too many are.
        """
        fault, leaf = self.fault, self._list[self._position]
        assert isinstance(fault, SwapFaultPath)
        asked = any(work.leaf == leaf for work in self.awaited)
        fault.asynchronous = not asked and len(self.awaited) < PER_VCPU
        return (yield from super()._fault(next_ns))

    def _put_to_sleep(self, t_ns: int) -> int:
        """The job at hand is parked at ``t_ns``; returns when the host is needed next."""
        kvm, costs, leaf = self.kvm, self.kvm.costs, self._list[self._position]
        self.fault.not_present = False
        assert kvm.pgdat is not None
        kvm.pgdat.vmstat.async_page_faults += 1
        work = AsyncPf(kvm, self, self.cpu, leaf)
        self.awaited.append(work)
        parked = self._park()
        self._env.process(self._take_in(work, parked, t_ns + costs.wakeup_ns))
        t_ns += costs.fault.enter_ns + costs.switch_ns
        self._idle_from_ns = self._free_ns = t_ns
        return self._start(t_ns)

    def _park(self) -> Parked:
        job, position = self._job, self._position
        low, high = self._offsets[job], self._offsets[job + 1]
        done_ns = self._at[position]
        self._busy_ns += done_ns - self._counted_ns
        self._counted_ns = 0
        client, threads = self._askers[0], self._stage.threads
        batch = Batch(
            last=False,
            offsets=[0, high - low],
            leaves=self._leaves[low:high],
            needs=self._needs[low:high],
            at=list(self._at[low:high]),
            totals=[self._totals[job]],
            before=[0, self._totals[job]],
            work_before=[0, self._work_before[job + 1] - self._work_before[job]],
            gaps=[self._gaps[job]],
            job=0,
            position=position - low,
        )
        held = [each for each in self._clients if each[1] % threads == client % threads]
        parked = Parked(batch, client, self._arrivals[0], held)
        self._clients = [each for each in self._clients if each[1] % threads != client % threads]
        heapify(self._clients)
        for planned in (self._origins, self._ends, self._arrivals, self._askers, self._shares):
            planned.clear()
        self._job, self._position, self._run_to = job + 1, high, high
        self._faults = self._resumed = False
        self._parked.append(parked)
        return parked

    def _take_in(self, work: AsyncPf, parked: Parked, t_ns: int) -> Generator[Event, Any, None]:
        """The kworker, which wakes up at ``t_ns``."""
        env = self._env
        t_ns, ran_ns = yield from work.take_in(t_ns)
        if t_ns > env.now:
            yield env.timeout(t_ns - int(env.now))
        self.awaited.remove(work)
        if self.kvm.alive:
            self.cpu.steal(t_ns, ran_ns)
            self._page_ready(parked, t_ns)

    # -- and is there -------------------------------------------------------------------------

    def _page_ready(self, parked: Parked, t_ns: int) -> None:
        """The page has come: kick the vCPU out of the guest, or wake it up."""
        self._ready.append(parked)
        self._ready_waits = True
        costs = self.kvm.costs
        if self._halted:
            if t_ns + costs.wakeup_ns < self.next_ns:
                self.next_ns = t_ns + costs.wakeup_ns
                self._wake_at(self.next_ns)
            return
        if not self._running or self.alarm is None:
            return  # in the host: the interrupt comes with its next entry
        idle = self.halted(t_ns)
        self.catch_up(t_ns)
        if self._faults and t_ns > self._exit_ns - self._touch_ns:
            return  # on its way out already
        inside = t_ns > self._entry_ns
        self._leave_guest(t_ns if inside else self._entry_ns)
        self._reenter_ns = (costs.wakeup_ns if idle else costs.kick_ns) if inside else 0
        self._wake_at(self.next_ns)

    def _go_on(self, t_ns: int) -> bool:
        """As :meth:`JobPlan._go_on`: parked jobs whose pages are there come first.

        With nothing to do but for pages that are not, the vCPU halts.
        """
        exhausted = self._job + len(self._origins) == len(self._totals)
        if self._ready or (exhausted and self._aside is not None):
            self._apply(self._run_to)
            self._commit(len(self._origins))
            self._resumed = False
            if self._ready:
                self._take_up(t_ns)
                return True
            assert self._aside is not None
            self._load_batch(self._aside)
            self._aside = None
            exhausted = self._job == len(self._totals)
        if self._parked and (not self._clients or (exhausted and self._last_batch)):
            self._apply(self._run_to)
            self._commit(len(self._origins))
            self._halts_until_ns = FAR
            self.next_ns = t_ns
            return True
        return super()._go_on(t_ns)

    def _take_up(self, t_ns: int) -> None:
        """A parked job whose page is there goes on at ``t_ns``, its thread switched to."""
        parked = self._ready.popleft()
        self._parked.remove(parked)
        self._ready_waits = bool(self._ready)
        if self._aside is None:
            self._aside = self._batch()
        self._load_batch(parked.batch)
        self._clients += parked.held
        heapify(self._clients)
        done_ns = self._at[self._position]
        self._origins.append(t_ns + self.kvm.costs.switch_ns - done_ns)
        self._ends.append(FAR)
        self._arrivals.append(parked.arrival_ns)
        self._askers.append(parked.client)
        self._shares.append(0)
        self._counted_ns = done_ns
        self._free_ns = t_ns
        self._idle_from_ns = FAR  # it works from now on, if only at the switch
        self._resumed = True
        self.next_ns = self._plan_jobs(self._position)
        self.cpu.leave_guest_at(self._exit_ns)

    def _batch(self) -> Batch:
        """The batch at hand, all of its plan worked off."""
        return Batch(
            last=self._last_batch,
            offsets=self._offsets,
            leaves=self._leaves,
            needs=self._needs,
            at=self._at,
            totals=self._totals,
            before=self._before,
            work_before=self._work_before,
            gaps=self._gaps,
            job=self._job,
            position=self._position,
        )

    def _load_batch(self, batch: Batch) -> None:
        self._last_batch = batch.last
        self._offsets = batch.offsets
        self._leaves, self._needs = batch.leaves, batch.needs
        self._list = memoryview(batch.leaves)  # type: ignore[arg-type,assignment]  # a buffer
        self._need_list = memoryview(batch.needs)  # type: ignore[arg-type,assignment]
        self._at = batch.at
        self._totals, self._before = batch.totals, batch.before
        self._work_before, self._gaps = batch.work_before, batch.gaps
        self._job = batch.job
        self._position = self._run_to = batch.position
