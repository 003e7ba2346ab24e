"""Tree RCU: how long a callback waits (kernel/rcu/tree.c and tree_plugin.h, v6.12).

``call_rcu()`` only queues. At its next tick the CPU's RCU core gives the callbacks the number of
the next *full* grace period and asks the grace-period kthread for it. The kthread waits until
every CPU has been seen in a quiescent state: a busy CPU notices the grace period at one tick and
reports at the next; an idle one, or a nohz_full one in guest mode, is credited when the kthread's
timer fires. The queueing CPU learns the end at its next tick and invokes what is ready. So the
length of a grace period comes from HZ and from what CPUs do, and is neither a constant nor drawn.

Ticks come at the same moments on all CPUs; at one moment CPUs take them in the order of their
number, and before any kthread that they wake. A callback queued in the very nanosecond of a tick is
seen by the next one. Ticks are simulated only while a grace period runs or a callback waits; when
nothing is pending no event is scheduled.

Left out: the rcu_node tree (reports go straight to the root), preempted readers, expedited and
polled grace periods, CPU hotplug, priority boosting, strict grace periods.
"""

from __future__ import annotations

from collections.abc import Sequence

from simpy import Environment, Event

from simkvm.kernel.cpu import GUEST, IDLE, KERNEL, NEVER, USER, Cpu, CpuState
from simkvm.kernel.rcu_config import RcuConfig, RcuCosts
from simkvm.kernel.rcu_data import RcuData
from simkvm.kernel.rcu_gp import GracePeriodHook, GracePeriods, StallHook
from simkvm.kernel.rcu_nocb import Offload
from simkvm.kernel.rcu_segcblist import Callback, IndexedCallback
from simkvm.kernel.rcu_softirq import BatchHook, Invocation, at

__all__ = ["Rcu", "RcuConfig", "RcuCosts"]


class Rcu:
    """RCU of one host. ``cpus[i].id`` must be ``i``.

    ``on_grace_period(number, start, end, scans)`` is called when one ends, ``on_batch(cpu, begin,
    callbacks, duration)`` when a batch does, ``on_stall(t, cpus)`` when a grace period is found
    to be older than 21 s (what Linux warns of; it goes on waiting).
    """

    def __init__(
        self,
        env: Environment,
        cpus: Sequence[Cpu],
        config: RcuConfig,
        costs: RcuCosts,
        *,
        on_grace_period: GracePeriodHook | None = None,
        on_batch: BatchHook | None = None,
        on_stall: StallHook | None = None,
    ) -> None:
        self._env = env
        self._config = config
        self._costs = costs
        self._data = [RcuData(cpu, config) for cpu in cpus]
        self._next_tick_ns = NEVER
        self._gp = GracePeriods(
            env,
            self._data,
            config,
            costs,
            note=self._note_gp_changes,
            started=self._plan_tick,
            ended=self._wake_offloaded,
            on_grace_period=on_grace_period,
            on_stall=on_stall,
        )
        self._softirq = Invocation(
            env,
            config,
            costs,
            core=self._core,
            need_resched=self._gp.need_resched,
            batch_done=self._batch_done,
            on_batch=on_batch,
        )
        self._offload = Offload(
            env,
            self._softirq,
            config,
            number=self._number,
            housekeeping=self._gp.housekeeping,
            wake_ns=costs.switch_ns,
        )

    # -- for the rest of the kernel -----------------------------------------------------------

    def call_rcu(self, t_ns: int, cpu_id: int, callback: Callback) -> int:
        """Queue ``callback`` at ``t``, now or later, on a CPU. Returns what the call costs in ns.

        ``callback(t)`` runs after a full grace period, in softirq on the same CPU (or in a kthread
        elsewhere if that is offloaded), and returns how many nanoseconds it takes. On an offloaded
        CPU of a kernel with lazy callbacks it may first sit for ten seconds.
        """
        return self._call(t_ns, cpu_id, callback, self._config.lazy)

    def call_rcu_hurry(self, t_ns: int, cpu_id: int, callback: Callback) -> int:
        """As :meth:`call_rcu`, but never lazy; what is lazy on that CPU goes with it."""
        return self._call(t_ns, cpu_id, callback, lazy=False)

    def _call(self, t_ns: int, cpu_id: int, callback: Callback, lazy: bool) -> int:
        data = self._data[cpu_id]
        data.callbacks.enqueue(t_ns, callback, lazy)
        self._queued(data, t_ns)
        return self._costs.call_rcu_ns

    def call_rcu_many(self, times_ns: Sequence[int], cpu_id: int, callback: IndexedCallback) -> int:
        """Queue one ``callback(t, index)`` at each of ``times_ns``, which must not decrease."""
        if times_ns:
            data = self._data[cpu_id]
            data.callbacks.enqueue_many(times_ns, callback, self._config.lazy)
            self._queued(data, times_ns[0])
        return self._costs.call_rcu_ns * len(times_ns)

    def synchronize_rcu(self, cpu_id: int, t_ns: int | None = None) -> Event:
        """Wait for a grace period: the event happens when the caller runs again.

        ``t_ns`` is when the caller asks, if it is ahead of the clock; it also tells its CPU that
        it sleeps (kernel/rcu/update.c, wait_rcu_gp()).
        """
        done = self._env.event()

        def wake(t_ns: int) -> int:
            at(self._env, t_ns + self._costs.wakeup_ns, done.succeed)
            return 0

        self.call_rcu_hurry(self._now() if t_ns is None else t_ns, cpu_id, wake)
        return done

    def barrier(self, t_ns: int) -> Event:
        """Wait for every callback queued up to ``t``, now (kernel/rcu/tree.c, rcu_barrier()).

        Each CPU that has callbacks gets one more behind them, which waits for no grace period of
        its own. The event happens when the caller runs again.
        """
        done = self._env.event()
        left = 0

        def reached(at_ns: int) -> int:
            nonlocal left
            left -= 1
            if not left:
                at(self._env, at_ns + self._costs.wakeup_ns, done.succeed)
            return 0

        for data in self._data:
            if data.callbacks.entrain(t_ns, reached):
                left += 1
                self._queued(data, t_ns)
        if not left:
            at(self._env, t_ns, done.succeed)
        return done

    @property
    def completed(self) -> int:
        """Grace periods that have ended."""
        return self._gp.completed

    @property
    def running(self) -> bool:
        """Whether a grace period is in progress."""
        return self._gp.running

    @property
    def per_cpu(self) -> list[RcuData]:
        """What RCU keeps for each CPU."""
        return self._data

    @property
    def idle(self) -> bool:
        """Whether every callback queued so far, also for later, has been invoked."""
        return not any(data.callbacks for data in self._data)

    def pending(self, cpu_id: int) -> int:
        """Callbacks of a CPU, also those queued for later, that have not been invoked."""
        return len(self._data[cpu_id].callbacks)

    def _now(self) -> int:
        return int(self._env.now)

    # -- queueing -----------------------------------------------------------------------------

    def _queued(self, data: RcuData, t_ns: int) -> None:
        if data.offloaded:
            self._offload.queued(data)
            return
        if t_ns < self._next_tick_ns:
            self._plan_tick(t_ns)
        flood = data.qlen_last_fqs_check + self._config.qhimark
        if len(data.callbacks) + data.taken > flood:
            self._plan_flood_check(data, 0, 0)

    def _plan_flood_check(self, data: RcuData, checked: int, not_before_ns: int) -> None:
        """Look at the queue when the callback comes that makes it too long.

        ``checked`` of the callbacks that have not been seen are not looked at again.
        """
        arriving = data.callbacks.arriving
        room = data.qlen_last_fqs_check + self._config.qhimark - data.length
        place = max(checked, room)
        while place < len(arriving) and arriving[place][0] < not_before_ns:
            place += 1
        if place < len(arriving) and arriving[place][0] < data.flood_check_ns:
            check_ns = arriving[place][0]
            data.flood_check_ns = check_ns
            at(self._env, max(check_ns, self._now()), lambda: self._flood_check(data, check_ns))

    def _flood_check(self, data: RcuData, check_ns: int) -> None:
        """What call_rcu() does on a long queue (__call_rcu_core)."""
        if check_ns != data.flood_check_ns:
            return  # there was an earlier one
        data.flood_check_ns = NEVER
        now = self._now()
        data.callbacks.see(now)
        due = data.callbacks.due(now)  # counted now, but seen only later, as at a tick
        length = data.length + due
        not_before_ns = 0
        if length > data.qlen_last_fqs_check + self._config.qhimark:
            self._note_gp_changes(data, now)
            if not self.running:
                self._accelerate(data)
                not_before_ns = self._gp.will_run_ns()
            else:
                data.blimit = self._config.max_blimit
                if self._gp.n_force_qs == data.n_force_qs_snap and data.callbacks.waiting:
                    self._gp.force_scan(now)
                data.n_force_qs_snap = self._gp.n_force_qs
                data.qlen_last_fqs_check = length
        self._plan_flood_check(data, due, not_before_ns)

    def _batch_done(self, data: RcuData) -> None:
        """Leave flood mode when enough is gone (the end of rcu_do_batch)."""
        if data.offloaded:
            self._offload.see(data, self._now())
        else:
            data.callbacks.see(self._now())
        if data.blimit >= self._config.max_blimit and data.length <= self._config.qlowmark:
            data.blimit = self._config.blimit
        if data.length == 0 and data.qlen_last_fqs_check:
            data.qlen_last_fqs_check = 0
            data.n_force_qs_snap = self._gp.n_force_qs
        elif data.length < data.qlen_last_fqs_check - self._config.qhimark:
            data.qlen_last_fqs_check = data.length

    # -- ticks --------------------------------------------------------------------------------

    def tick_after(self, t_ns: int) -> int:
        """Time of the first timer tick later than ``t``."""
        return self._config.tick_after(t_ns)

    def _plan_tick(self, t_ns: int) -> None:
        """Have the first tick after ``t`` simulated."""
        tick_ns = self._config.tick_after(t_ns)
        if tick_ns < self._next_tick_ns:
            self._next_tick_ns = tick_ns
            at(self._env, tick_ns, lambda: self._tick(tick_ns))

    def _tick(self, tick_ns: int) -> None:
        if tick_ns != self._next_tick_ns:
            return  # planned before an earlier one was
        self._next_tick_ns = NEVER
        self._gp.timer_interrupt(tick_ns)
        follow_ns = tick_ns if self.running else NEVER
        for data in self._data:
            if data.cpu.nohz_full:
                if data.forced_tick:
                    self._sched_clock_irq(data, tick_ns)
                continue
            pending = not data.offloaded and len(data.callbacks) > 0
            if data.gp_seq != self._gp.seq or data.core_needs_qs or pending:
                self._sched_clock_irq(data, tick_ns)
            if data.offloaded:
                continue
            if data.callbacks.seen:
                follow_ns = tick_ns
            elif data.callbacks.arriving:
                follow_ns = min(follow_ns, data.callbacks.arriving[0][0])
        if follow_ns != NEVER:
            self._plan_tick(follow_ns)

    def _sched_clock_irq(self, data: RcuData, t_ns: int) -> None:
        """The tick of one CPU (rcu_sched_clock_irq); an idle one has it only for its callbacks."""
        data.see(t_ns)
        state = data.cpu.state(t_ns)
        if state is IDLE and (data.offloaded or not data.callbacks.seen):
            return
        if data.core_needs_qs and data.cpu_no_qs and not data.in_softirq(t_ns):
            self._look_for_quiescent_state(data, state, t_ns)
        if self._core_is_needed(data):
            self._softirq.raise_softirq(data, t_ns)
        elif state is GUEST and not data.in_softirq(t_ns):
            data.quiescent()  # the tick took it out of the guest, and now it goes back

    def _look_for_quiescent_state(self, data: RcuData, state: CpuState, t_ns: int) -> None:
        if (
            state in (USER, IDLE)
            or (state is KERNEL and self._config.preemptible)
            or data.cpu.switched_between(data.armed_ns, t_ns)
            or data.cpu.preemptible_between(max(data.resched_ns, data.armed_ns), t_ns)
        ):
            data.quiescent()
        elif data.urgent_qs and data.resched_ns == NEVER:
            data.resched_ns = t_ns  # set_tsk_need_resched(): it schedules when preemption is on
        data.urgent_qs = False

    def _core_is_needed(self, data: RcuData) -> bool:
        """rcu_pending()."""
        return (
            data.gp_seq != self._gp.seq
            or (data.core_needs_qs and not data.cpu_no_qs)
            or data.ready > 0
            or (not data.offloaded and not self.running and data.callbacks.unnumbered > 0)
        )

    # -- the core of one CPU, in softirq ------------------------------------------------------

    def _core(self, data: RcuData, t_ns: int) -> None:
        """rcu_core() up to its batch."""
        data.see(t_ns)
        self._note_gp_changes(data, t_ns)
        if data.core_needs_qs and not data.cpu_no_qs:
            self._report(data, t_ns)
        if not self.running and not data.offloaded and data.callbacks.unnumbered:
            self._accelerate(data)

    def _note_gp_changes(self, data: RcuData, t_ns: int) -> None:
        """Notice the end and the start of grace periods (__note_gp_changes)."""
        old, new = data.gp_seq, self._gp.seq
        if old == new:
            return
        if not data.offloaded:
            data.callbacks.advance(self.completed)
            self._accelerate(data)
        if old < (new & ~1):
            data.core_needs_qs = False
        if new & 1:
            data.core_needs_qs = data.cpu_no_qs = self._gp.waits_for(data)
            data.armed_ns = t_ns
        data.gp_seq = new

    def _accelerate(self, data: RcuData) -> None:
        """Number what it can, and ask for that grace period (rcu_accelerate_cbs)."""
        number = self.completed + 1 + self.running  # the next full one (rcu_seq_snap)
        if data.callbacks.waiting and data.callbacks.accelerate(number):
            self._gp.request(number, self._now())

    def _number(self, data: RcuData, t_ns: int) -> None:
        """The same for an offloaded CPU, by its rcuog kthread."""
        data.callbacks.advance(self.completed)
        self._accelerate(data)

    def _report(self, data: RcuData, t_ns: int) -> None:
        """Tell the root that this CPU was quiescent (rcu_report_qs_rdp)."""
        data.core_needs_qs = False
        if self._gp.waits_for(data):
            if not data.offloaded:
                self._accelerate(data)  # this grace period cannot have ended yet
            self._gp.report(data, t_ns)

    def _wake_offloaded(self, t_ns: int) -> None:
        self._offload.grace_period_ended(t_ns, self.completed)
