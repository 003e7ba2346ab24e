"""The plan of a vCPU that works off jobs: which it does when, and what is settled between them.

A plan is jobs in a row with the time of each touch, up to the first touch that stage 2 does not
allow, or some dozens of jobs. What takes a planned page away cuts it there: the jobs behind go
back to their clients, as if they had never been planned. Jobs are drawn by number, so nothing is
drawn in vain, and a run does not depend on how far is planned ahead.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Final

import numpy as np

from simkvm.guest.jobs import Stage
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.cpu import NEVER, Cpu
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.observe.requests import Answers

if TYPE_CHECKING:
    from simkvm.guest.job_accesses import JobAccesses
    from simkvm.kernel.kvm import Kvm
    from simkvm.scenario.workloads import Workload

SETTLE_NS: Final = 1_000_000
JOBS_AHEAD: Final = 64  #: planned at once, at most
FEW: Final = 4  #: touches up to which a loop finds a fault faster than an array
WINDOW: Final = 64  #: touches looked at once then, doubled while none of them faults
FAR: Final = NEVER


class JobPlan(Vcpu):
    """What a vCPU of ``kvm`` is going to do, as far as that is known, and what it has done.

    ``due_ns``: when the first touch or end of a job comes that is not applied yet.
    """

    def __init__(
        self,
        kvm: Kvm,
        index: int,
        cpu: Cpu,
        access: Workload,
        accesses: JobAccesses,
    ) -> None:
        super().__init__(kvm, index, cpu, iter(()))
        self._accesses = accesses
        self._jobs_ahead = JOBS_AHEAD
        self._wakeup_ns = kvm.costs.wakeup_ns
        self.answers: Answers = Answers(access.unit)
        self._warmup_ns = access.warmup
        # The batch being worked on.
        self._last_batch = False
        self._offsets: list[int] = [0]
        self._at: list[int] = []
        self._totals: list[int] = []
        self._before: list[int] = [0]  #: CPU time of all jobs before each
        self._work_before: list[int] = [0]
        self._gaps: list[int] = []
        # Its clients: those without a job under way, by when they ask; how often each has asked.
        self._stage = Stage(iter(()), counts=False)
        self._clients: list[tuple[int, int]] = []
        self._asked: list[int] = []
        # The plan: jobs ``_job``, ``_job + 1``... of the batch, touches up to ``_run_to``.
        self._job = 0
        self._origins: list[int] = []  #: when each would have begun if nothing had stopped it since
        self._ends: list[int] = []
        self._arrivals: list[int] = []
        self._askers: list[int] = []
        self._shares: list[int] = []  #: what each pays of the debt
        self._faults = False  #: whether the plan ends with a fault, in its last job
        self._free_ns = 0  #: when the vCPU is done with the plan, but for a job that faults
        self._idle_from_ns = 0  #: when it was done with all jobs that are not in the plan any more
        self.due_ns = FAR
        self.planned: set[int] | None = None  #: see :meth:`look_ahead`
        # Accounts: of invalidations and interrupts, paid by later jobs.
        self._settle_at_ns = SETTLE_NS
        self._hot = min(access.hot_pages, kvm.costs.tlb_entries)
        self._hot_interval_ns = access.hot_interval
        self._refill_each_ns = kvm.costs.tlb_refill_ns
        self._seen = 0
        self._own_flushes = 0
        self._lost_ns = 0
        self._busy_ns = 0  #: CPU time of jobs since the last settlement,
        self._counted_ns = 0  #: and how much of the present job is in it
        self._ended = 0  #: jobs since then
        self._debt_ns = 0
        self._share_ns = 0
        # Where threads sleep while their pages are read (:mod:`simkvm.guest.job_threads`).
        self._ready_waits = False  #: whether one of them goes on when the job under way is done
        self._resumed = False  #: whether the first job is one that has gone on
        # Where CPUs are shared.
        self._halts = False  #: whether its thread gives its CPU up when there is no job
        self._halts_until_ns = 0  #: the plan ends with that, up to then

    # -- stages and batches -------------------------------------------------------------------

    def _begin(self, stage: Stage, t_ns: int) -> None:
        if stage.counts and not self._stage.counts:
            self.answers.begin_ns = t_ns + self._warmup_ns
        self._stage = stage
        self._clients = sorted((t_ns + at, client) for client, at in enumerate(stage.first_ns))
        self._asked = [0] * len(self._clients)
        self._free_ns = t_ns

    def _next_batch(self) -> bool:
        """Load the next batch; returns whether there is one with a job in it."""
        jobs = next(self._stage.batches, None) if self._clients else None
        if jobs is None or not len(jobs):
            return False
        kvm = self.kvm
        self._last_batch = jobs.last
        self._offsets = jobs.offsets.tolist()
        self._leaves = jobs.pages if kvm.leaf_pages == 1 else kvm.stage2.leaves_of(jobs.pages)
        self._needs = np.where(jobs.writes, VALID | WRITE, VALID).astype(np.uint8)
        self._list = memoryview(self._leaves)  # type: ignore[arg-type,assignment]  # a buffer
        self._need_list = memoryview(self._needs)  # type: ignore[arg-type,assignment]
        self._at = memoryview(np.ascontiguousarray(jobs.at_ns))  # type: ignore[arg-type,assignment]
        self._totals = jobs.total_ns.tolist()
        self._before = [0, *np.cumsum(jobs.total_ns).tolist()]
        self._work_before = [0, *np.cumsum(jobs.work).tolist()]
        self._gaps = jobs.gap_ns.tolist()
        self._job = self._position = self._run_to = 0
        return True

    # -- planning -----------------------------------------------------------------------------

    def _plan_jobs(self, position: int) -> int:
        """Plan on, touches from ``position`` on; returns when the host, or a new plan, is due.

        If the last job of the plan has no end, it was about to fault.
        """
        offsets, totals, gaps = self._offsets, self._totals, self._gaps
        origins, ends = self._origins, self._ends
        clients, asked, each = self._clients, self._asked, self._stage.each
        job = self._job + len(origins)  # the next to be planned
        ahead = 0 if self._ready_waits else self._jobs_ahead
        stop = min(len(totals), job + ahead)
        under_way = bool(ends) and ends[-1] == FAR
        free_ns = origins[-1] + totals[job - 1] if under_way else self._free_ns
        room_ns = self._settle_at_ns - free_ns  # no job begins later than that
        stop = max(job, bisect_left(self._before, self._before[job] + room_ns, job, stop))
        touch = self._first_fault(position, offsets[stop])
        faults = touch < offsets[stop]
        faulting = bisect_right(offsets, touch) - 1 if faults else stop
        self.planned = None
        if under_way and faulting < job:  # it faults again
            free_ns = self._free_ns
        elif under_way:
            ends[-1] = free_ns
            if asked[self._askers[-1]] < each:
                heappush(clients, (free_ns + gaps[job - 1], self._askers[-1]))
        settle_at_ns, wakeup_ns, debt_ns = self._settle_at_ns, self._wakeup_ns, self._debt_ns
        begin_ns, halts = FAR, self._halts
        while job <= faulting and clients:
            arrival_ns, client = clients[0]
            begin_ns = free_ns if arrival_ns <= free_ns else arrival_ns + wakeup_ns
            if begin_ns >= settle_at_ns or job == stop or (halts and begin_ns > free_ns):
                break
            share_ns = 0
            if debt_ns:
                share_ns = self._share_ns if self._share_ns < debt_ns else debt_ns
                debt_ns -= share_ns
            origin_ns = begin_ns + share_ns
            origins.append(origin_ns)
            self._arrivals.append(arrival_ns)
            self._askers.append(client)
            self._shares.append(share_ns)
            asked[client] = served = asked[client] + 1
            if job == faulting:
                ends.append(FAR)
                heappop(clients)
            else:
                free_ns = origin_ns + totals[job]
                ends.append(free_ns)
                if served < each:
                    heapreplace(clients, (free_ns + gaps[job], client))
                else:
                    heappop(clients)
            job += 1
        self._debt_ns, self._free_ns = debt_ns, free_ns
        self._faults = faults and job == faulting + 1
        self._run_to = run_to = touch if self._faults else offsets[job]
        if run_to > position:
            self._accesses.marks[self._leaves[position:run_to]] = 1
        self._due()
        if self._faults:
            return self._fault_at(touch)
        self._exit_ns = FAR
        over = not clients or (job == len(totals) and self._last_batch)
        self._halts_until_ns = begin_ns if halts and begin_ns > free_ns and not over else 0
        return free_ns if over or self._halts_until_ns or self._ready_waits else begin_ns

    def _fault_at(self, touch: int) -> int:
        """The plan ends with a fault at ``touch``: returns when it comes to the host."""
        leaf = self._list[touch]
        if self._shared:
            self._expect(leaf)
        self._exit_ns = exit_ns = self._origins[-1] + self._at[touch] + self._touch_ns
        if self.fault.slotted:
            exit_ns += self.fault.slot_ns(leaf)
        return self.fault.arrival_ns(exit_ns)

    def _first_fault(self, position: int, stop: int) -> int:
        """First touch from ``position`` on that stage 2 does not allow; ``stop`` if all are."""
        entries, leaves, needs = self._entries, self._list, self._need_list
        for touch in range(position, min(position + FEW, stop)):
            need = needs[touch]
            if entries[leaves[touch]] & need != need:
                return touch
        position, window = min(position + FEW, stop), WINDOW
        leaf = self.kvm.stage2.leaf.entries
        while position < stop:
            end = min(position + window, stop)
            wanted = self._needs[position:end]
            lacks = (leaf[self._leaves[position:end]] & wanted) != wanted
            first = int(lacks.argmax())
            if lacks[first]:
                return position + first
            position, window = end, 2 * window
        return stop

    def _cut(self, touch: int) -> int:
        """The plan ends with a fault at ``touch``; the jobs behind go back to their clients."""
        self._unplan(bisect_right(self._offsets, touch) - self._job)
        self._faults = True
        self._halts_until_ns = 0
        self._run_to = touch
        self._due()
        return self._fault_at(touch)

    def _unplan(self, count: int) -> None:
        """The first ``count`` jobs of the plan stay, the last of them without an end."""
        askers, arrivals, asked = self._askers, self._arrivals, self._asked
        asking = {client: at for at, client in self._clients}
        for job in range(len(askers) - 1, count - 1, -1):
            asking[askers[job]] = arrivals[job]
            asked[askers[job]] -= 1
            self._debt_ns += self._shares[job]
        for planned in (self._origins, self._ends, arrivals, askers, self._shares):
            del planned[count:]
        if count:
            asking.pop(askers[-1], None)
            self._ends[-1] = FAR
        self._clients = [(at, client) for client, at in asking.items()]
        heapify(self._clients)

    # -- settling -----------------------------------------------------------------------------

    def _settle(self, t_ns: int) -> int:
        """Settle accounts at ``t_ns``; returns the time that softirqs took, already passed.

        An invalidation costs the hot pages that were used since the one before it. That and
        interrupts are paid by the jobs to come, spread over as many as have ended since the last
        time.
        """
        self._settle_at_ns = (t_ns // SETTLE_NS + 1) * SETTLE_NS
        flushes = self._accesses.flushes + self._own_flushes
        lost_ns, self._lost_ns = self._lost_ns, 0
        if flushes > self._seen:
            used = self._busy_ns * self._hot // self._hot_interval_ns
            lost_ns += min((flushes - self._seen) * self._hot, used) * self._refill_each_ns
            self._seen = flushes
        self._debt_ns += lost_ns
        self._share_ns = -(-self._debt_ns // max(1, self._ended))
        self._busy_ns = self._ended = 0
        if not self.cpu.stolen_ns:
            return 0
        stolen_ns = self.cpu.take_stolen()
        self._free_ns = max(self._free_ns, t_ns) + stolen_ns
        return stolen_ns

    # -- what lies in the past ----------------------------------------------------------------

    def _reached(self, t_ns: int) -> int:
        """Position behind the last touch planned before ``t_ns``."""
        position = self._position
        begun = bisect_left(self._origins, t_ns)
        if not self._running or not begun:
            return position
        job = self._job + begun - 1
        low = max(position, self._offsets[job])
        into_ns = t_ns - self._origins[begun - 1]
        reached = bisect_left(self._at, into_ns, low, max(low, self._offsets[job + 1]))
        return min(reached, self._run_to)

    def _apply(self, reached: int) -> None:
        """The touches before ``reached`` are made."""
        first = self._position
        if reached <= first:
            return
        if reached - first <= 2 * FEW:
            entries, leaves = self._entries, self._list
            for touch in range(first, reached):
                entries[leaves[touch]] |= AF
        else:
            self.kvm.stage2.leaf.entries[self._leaves[first:reached]] |= np.uint8(AF)
        if self._last_touch is not None:
            self._note_times(first, reached)
        self.touches += reached - first
        self._position = reached

    def _note_times(self, first: int, reached: int) -> None:
        last_touch = self._last_touch
        assert last_touch is not None
        for touch in range(first, reached):
            planned = bisect_right(self._offsets, touch) - 1 - self._job
            last_touch[self._list[touch]] = self._origins[planned] + self._at[touch]

    def _commit(self, count: int) -> None:
        """The first ``count`` jobs of the plan are done: they cannot be taken back any more."""
        if not count:
            return
        job, stage = self._job, self._stage
        self._job = job + count
        ends = self._ends
        self._idle_from_ns = ends[count - 1]
        if stage.requests:
            extra_ns = stage.extra_ns
            latencies = [
                end - arrival + extra_ns
                for end, arrival in zip(ends[:count], self._arrivals, strict=False)
            ]
            self.answers.add(ends[:count], latencies)
        if stage.counts:
            late = bisect_left(ends, self.answers.begin_ns, 0, count)
            self.answers.done += self._work_before[job + count] - self._work_before[job + late]
        self._busy_ns += self._before[job + count] - self._before[job] - self._counted_ns
        self._counted_ns = 0
        self._ended += count
        for planned in (self._origins, ends, self._arrivals, self._askers, self._shares):
            del planned[:count]

    def _due(self) -> None:
        """Note when something has to be applied next."""
        if not self._origins:
            self.due_ns = FAR
            return
        due_ns, position = self._ends[0], self._position
        if position < self._run_to:
            job = 0
            while self._offsets[self._job + job + 1] <= position:
                job += 1
            due_ns = min(due_ns, self._origins[job] + self._at[position])
        self.due_ns = due_ns

    # -- asked --------------------------------------------------------------------------------

    def look_ahead(self) -> set[int]:
        """The leaves that the plan touches, and perhaps some that it touched lately."""
        self.planned = planned = set(self._list[self._position : self._run_to])
        return planned

    def has_touched(self, leaves: range, t_ns: int) -> bool:
        """Whether a touch planned before ``t_ns``, and not applied yet, is of one of ``leaves``."""
        made = self._list[self._position : self._reached(t_ns)]
        return any(leaf in leaves for leaf in made)

    def touches_by(self, t_ns: int) -> int:
        """Touches made before ``t_ns``; unlike :meth:`catch_up` this changes nothing."""
        return self.touches + self._reached(t_ns) - self._position

    def halted(self, t_ns: int) -> bool:
        """Whether the vCPU waits for a job at ``t_ns``, not later than now."""
        begun = bisect_right(self._origins, t_ns)
        if not self._running:
            return False
        if begun < len(self._origins) and t_ns >= self._origins[begun] - self._shares[begun]:
            return False  # it pays its share of the debt first
        return t_ns >= (self._ends[begun - 1] if begun else self._idle_from_ns)
