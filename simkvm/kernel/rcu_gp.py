"""The grace-period kthread of tree RCU (rcu_gp_kthread() in kernel/rcu/tree.c, v6.12).

It waits for a request, starts a grace period, and sleeps until the last CPU has reported or its
timer fires. Then it looks for CPUs that are in an extended quiescent state: the first scan credits
those that are, later ones those that have been, and press the rest by the age of the grace period.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simpy import Environment

from simkvm.kernel.cpu import IDLE, NEVER, Cpu
from simkvm.kernel.rcu_config import RcuConfig, RcuCosts
from simkvm.kernel.rcu_data import RcuData
from simkvm.kernel.rcu_softirq import at

#: Called with (number, start in ns, end in ns, scans for quiescent states).
GracePeriodHook = Callable[[int, int, int, int], None]
#: Called with (time in ns, ids of the CPUs waited for), once a grace period that is too old.
StallHook = Callable[[int, list[int]], None]


class GracePeriods:
    """Starts and ends grace periods, one at a time.

    The kthread runs on the housekeeping CPU that it ran on last if that is idle when it is woken,
    else on the first idle one, else on the first of all. ``note(data, t)`` makes the CPU that it
    runs on notice a start or an end; ``started(t)`` and ``ended(t)`` are told of each.
    """

    def __init__(
        self,
        env: Environment,
        data: Sequence[RcuData],
        config: RcuConfig,
        costs: RcuCosts,
        *,
        note: Callable[[RcuData, int], None],
        started: Callable[[int], None],
        ended: Callable[[int], None],
        on_grace_period: GracePeriodHook | None,
        on_stall: StallHook | None,
    ) -> None:
        self._env = env
        self._data = data
        self._housekeepers = [each for each in data if not each.cpu.nohz_full] or data[:1]
        self._config = config
        self._costs = costs
        self._note = note
        self._started = started
        self._ended = ended
        self._on_grace_period = on_grace_period
        self._on_stall = on_stall

        self.seq = 0  #: twice the grace periods ended, plus one while one runs
        self.n_force_qs = 0  #: scans ever made
        self._needed = 0  # the latest grace period that anybody asked for
        self._holdouts: set[int] = set()
        self._start_ns = 0
        self._start_jiffy = 0
        self._scans = 0
        self._stalled = False

        self._kthread = self._housekeepers[0]  # where it runs or ran last
        self._run_ns = NEVER  # when it goes on, having been woken or being busy
        self._scan_jiffy = 0  # a wake-up from this jiffy on means that a scan is due
        self._timer_jiffy = NEVER  # when its timer fires
        self._scan_forced = False
        self._overload = False
        self._overload_next = False

    @property
    def completed(self) -> int:
        """Grace periods that have ended."""
        return self.seq >> 1

    @property
    def running(self) -> bool:
        """Whether a grace period is in progress."""
        return bool(self.seq & 1)

    def waits_for(self, data: RcuData) -> bool:
        """Whether the running grace period still waits for this CPU."""
        return data.id in self._holdouts

    # -- asked by CPUs ------------------------------------------------------------------------

    def request(self, number: int, t_ns: int) -> None:
        """Have grace period ``number`` happen (rcu_start_this_gp)."""
        if number > self._needed:
            self._needed = number
            if not self.running:
                self._wake(t_ns)

    def report(self, data: RcuData, t_ns: int) -> None:
        """A CPU was quiescent; the last one wakes the kthread (rcu_report_qs_rnp)."""
        self._credit(data)
        if not self._holdouts:
            self._wake(t_ns)

    def force_scan(self, t_ns: int) -> None:
        """Scan now instead of when the timer fires (rcu_force_quiescent_state)."""
        self._scan_forced = True
        self._wake(t_ns)

    def timer_interrupt(self, t_ns: int) -> None:
        """The tick at ``t`` wakes the kthread if its timer is due."""
        if self._config.jiffies(t_ns) >= self._timer_jiffy:
            self._timer_jiffy = NEVER
            self._wake(t_ns)

    def need_resched(self, data: RcuData) -> bool:
        """Whether the woken kthread waits for this CPU."""
        return data is self._kthread and self._run_ns != NEVER

    def housekeeping(self, t_ns: int) -> Cpu:
        """The first idle housekeeping CPU, else the first of all."""
        return self._housekeeper(t_ns).cpu

    def will_run_ns(self) -> int:
        """When the kthread goes on, or 0 if nothing has woken it."""
        return 0 if self._run_ns == NEVER else self._run_ns

    # -- the kthread --------------------------------------------------------------------------

    def _credit(self, data: RcuData) -> None:
        data.drop_urgency()
        self._holdouts.discard(data.id)

    def _housekeeper(self, t_ns: int) -> RcuData:
        for data in self._housekeepers:
            if data.cpu.state(t_ns) is IDLE:
                return data
        return self._housekeepers[0]

    def _wake(self, t_ns: int) -> None:
        if self._run_ns != NEVER:
            return
        if self._kthread.cpu.state(t_ns) is not IDLE:
            self._kthread = self._housekeeper(t_ns)
        self._plan_run(t_ns + self._costs.switch_ns)

    def _plan_run(self, t_ns: int) -> None:
        self._run_ns = t_ns
        at(self._env, t_ns, self._run)

    def _run(self) -> None:
        now = int(self._env.now)
        data = self._kthread
        if data.in_softirq(now) or data.runs_ksoftirqd(now):  # neither is preempted for it
            self._plan_run(max(data.softirq_until_ns, data.turn_begin_ns, now + 1))
            return
        self._run_ns = now  # awake, so nothing that happens now wakes it
        data.cpu.steal(now, 2 * self._costs.context_switch_ns)
        busy = False
        if not self.running:
            busy = self._needed > self.completed and self._start(now)
        elif not self._holdouts:
            busy = self._end(now)
        elif self._config.jiffies(now) >= self._scan_jiffy or self._scan_forced:
            busy = self._scan(now)
        if not busy:
            self._sleep(now)

    def _sleep(self, t_ns: int) -> None:
        self._run_ns = NEVER
        self._kthread.switched(t_ns)

    def _start(self, t_ns: int) -> bool:
        """rcu_gp_init(). True if it goes on with a scan, as under overload."""
        self.seq += 1
        self._holdouts = {data.id for data in self._data}
        self._start_ns = t_ns
        self._start_jiffy = self._config.jiffies(t_ns)
        self._scans = 0
        self._stalled = False
        self._note_here(t_ns)
        self._set_timer(t_ns)
        self._started(t_ns)
        return self._overload and self._scan(t_ns)

    def _note_here(self, t_ns: int) -> None:
        """The kthread updates the CPU that it runs on as it goes."""
        data = self._kthread
        data.see(t_ns)
        self._note(data, t_ns)

    def _set_timer(self, t_ns: int) -> None:
        """Sleep until a scan is due; the timer wheel never fires early (kernel/time/timer.c)."""
        self._scan_jiffy = self._config.jiffies(t_ns) + self._config.jiffies_till_fqs
        self._timer_jiffy = self._scan_jiffy + 1

    def _scan(self, t_ns: int) -> bool:
        """Look for CPUs that are quiescent, or were (force_qs_rnp). True: it takes a while."""
        looked_at = [data for data in self._data if data.id in self._holdouts]
        quiescent = self._in_eqs if self._scans == 0 else self._was_in_eqs
        for data in looked_at:
            if quiescent(data, t_ns):
                self._credit(data)
        self._scans += 1
        self.n_force_qs += 1
        self._overload = self._overload_next
        self._overload_next = any(data.length_at(t_ns) >= self._config.qovld for data in self._data)
        self._check_stall(t_ns)
        duration_ns = self._costs.core_ns + self._costs.fqs_scan_per_cpu_ns * len(looked_at)
        self._kthread.cpu.steal(t_ns, duration_ns)
        self._timer_jiffy = NEVER
        self._run_ns = t_ns + duration_ns
        at(self._env, self._run_ns, self._after_scan)
        return True

    def _after_scan(self) -> None:
        now = int(self._env.now)
        self._scan_forced = False  # also if it was asked for during the scan
        busy = False
        if not self._holdouts:
            busy = self._end(now)
        elif self._overload and self._scans == 1:
            busy = self._scan(now)
        else:
            self._set_timer(now)
        if not busy:
            self._sleep(now)

    def _in_eqs(self, data: RcuData, t_ns: int) -> bool:
        """First scan (dyntick_save_progress_counter)."""
        data.snapshot_ns = t_ns
        return not data.in_softirq(t_ns) and data.cpu.in_extended_quiescent_state(t_ns)

    def _was_in_eqs(self, data: RcuData, t_ns: int) -> bool:
        """Later scans: credit, or press by age (rcu_implicit_dynticks_qs)."""
        cpu = data.cpu
        busy = data.in_softirq(t_ns)
        if (not busy and cpu.in_extended_quiescent_state(t_ns)) or cpu.extended_between(
            data.snapshot_ns, t_ns
        ):
            return True
        if data.need_heavy_qs and cpu.preemptible_between(data.resched_ns, t_ns):
            return True  # it obeyed with rcu_momentary_eqs()
        self._press(data, t_ns)
        return False

    def _press(self, data: RcuData, t_ns: int) -> None:
        config = self._config
        jiffy = config.jiffies(t_ns)
        age = jiffy - self._start_jiffy
        heavy = age > 2 * config.jiffies_to_sched_qs or self._overload
        if heavy or age > config.jiffies_to_sched_qs:
            data.need_heavy_qs |= heavy
            self._urge(data, t_ns)
        since_resched = jiffy - data.last_resched_jiffy
        resched_age = 3 * config.jiffies_to_sched_qs
        if data.cpu.nohz_full and (since_resched > resched_age or self._overload):
            data.last_resched_jiffy = jiffy
            self._urge(data, t_ns)

    def _urge(self, data: RcuData, t_ns: int) -> None:
        """Set rcu_urgent_qs: the next cond_resched() reports, or the next tick asks for one."""
        data.urgent_qs = True
        data.forced_tick = data.cpu.nohz_full
        if not self._config.preemptible and data.resched_ns == NEVER:
            data.resched_ns = t_ns

    def _check_stall(self, t_ns: int) -> None:
        age = self._config.jiffies(t_ns) - self._start_jiffy
        if self._on_stall is not None and not self._stalled:
            self._stalled = age > self._config.stall_s * self._config.hz
            if self._stalled:
                self._on_stall(t_ns, sorted(self._holdouts))

    def _end(self, t_ns: int) -> bool:
        """rcu_gp_cleanup(), and the next one at once if anybody asked for it."""
        self.seq += 1
        self._timer_jiffy = NEVER
        self._scan_forced = False
        if self._on_grace_period is not None:
            self._on_grace_period(self.completed, self._start_ns, t_ns, self._scans)
        self._note_here(t_ns)
        self._ended(t_ns)
        return self._needed > self.completed and self._start(t_ns)
