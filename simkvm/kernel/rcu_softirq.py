"""Where callbacks are invoked: softirq on the CPU that queued them, ksoftirqd, rcuo kthreads.

Rules: rcu_do_batch() in kernel/rcu/tree.c, handle_softirqs() and ksoftirqd in kernel/softirq.c,
nocb_cb_wait() in kernel/rcu/tree_nocb.h, all v6.12. Work is simulated in parts of at most
:data:`PART_CALLBACKS` callbacks or about :data:`PART_NS`, one event a part, so nothing is done
much ahead of the clock.

Sharing a CPU: softirq work is stolen from the thread that runs there. ksoftirqd and a busy thread
take equal turns of ``RcuConfig.slice_ns``: ksoftirqd runs until the turn is over or it is done,
then leaves the CPU for as long as it had it. On an idle CPU it just goes on. A waiting ksoftirqd
does not keep the next tick from serving softirqs itself (as it did before v6.5).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final

from simpy import Environment, Event

from simkvm.kernel.cpu import GUEST, IDLE, NEVER, Cpu
from simkvm.kernel.rcu_config import RcuConfig, RcuCosts
from simkvm.kernel.rcu_data import RcuData
from simkvm.kernel.rcu_segcblist import ALONE

PART_CALLBACKS: Final = 32  #: rcu_do_batch() looks at the clock this often
PART_NS: Final = 10_000

#: A piece of work over time: yields when it goes on, returns when it ended.
Work = Generator[int, None, int]
#: Called with (cpu id, begin in ns, callbacks, duration in ns).
BatchHook = Callable[[int, int, int, int], None]


def at(env: Environment, t_ns: int, action: Callable[[], object]) -> None:
    """Run ``action`` when the clock shows ``t``."""

    def run(_: Event) -> None:
        action()

    env.timeout(t_ns - int(env.now)).callbacks.append(run)


def drive(env: Environment, work: Work) -> None:
    """Run ``work`` until it is done, with one event for every time that it yields."""
    t_ns = next(work, None)
    if t_ns is not None:
        at(env, t_ns, lambda: drive(env, work))


class Invocation:
    """Runs the RCU core and its batches in softirq context.

    ``core(data, t)`` does everything but callbacks; ``need_resched(data)`` says whether a woken
    kthread waits for that CPU; ``batch_done(data)`` is told when a batch has been taken off.
    """

    def __init__(
        self,
        env: Environment,
        config: RcuConfig,
        costs: RcuCosts,
        *,
        core: Callable[[RcuData, int], None],
        need_resched: Callable[[RcuData], bool],
        batch_done: Callable[[RcuData], None],
        on_batch: BatchHook | None,
    ) -> None:
        self._env = env
        self._config = config
        self._costs = costs
        self._core = core
        self._need_resched = need_resched
        self._batch_done = batch_done
        self._on_batch = on_batch

    def raise_softirq(self, data: RcuData, t_ns: int) -> None:
        """RCU_SOFTIRQ was raised by the tick at ``t``: serve it on the way out of the interrupt."""
        if data.serving:
            data.raised = True
        elif t_ns < data.softirq_until_ns:
            data.serving = True
            at(self._env, data.softirq_until_ns, lambda: self._start(data))
        else:
            self._start(data)

    def _start(self, data: RcuData) -> None:
        drive(self._env, self._interrupt_exit(data, int(self._env.now)))

    def _interrupt_exit(self, data: RcuData, t_ns: int) -> Work:
        interrupted = data.cpu.state(t_ns)
        t_ns = yield from self._run_softirqs(data, t_ns, interrupted is IDLE, NEVER)
        if interrupted is GUEST:
            data.quiescent()  # back to the guest
        if data.ready and not data.ksoftirqd:
            data.ksoftirqd = True
            wake_ns = t_ns + self._costs.switch_ns
            self._begin_turn(data, wake_ns)
            at(self._env, wake_ns, lambda: drive(self._env, self._ksoftirqd(data, wake_ns)))
        return t_ns

    def _run_softirqs(self, data: RcuData, t_ns: int, idle: bool, turn_end_ns: int) -> Work:
        """One handle_softirqs(): the RCU core again and again while it raises itself.

        It stops early if need_resched(): another thread's turn, or a kthread that was woken
        (ksoftirqd runs its turn to the end first).
        """
        config = self._config
        last_jiffy = config.jiffies(t_ns) + config.softirq_jiffies
        data.serving = True
        for _ in range(config.softirq_restarts):
            data.raised = False
            self._core(data, t_ns)
            data.cpu.steal(int(self._env.now), self._costs.core_ns)
            t_ns += self._costs.core_ns
            data.softirq_until_ns = t_ns
            if data.ready:
                t_ns = yield from self._batch(data, t_ns, idle)
            if not data.ready and not data.raised:
                break
            yield t_ns
            if config.jiffies(t_ns) >= last_jiffy or self._turn_is_over(data, t_ns, turn_end_ns):
                break
        data.serving = False
        return t_ns

    def _turn_is_over(self, data: RcuData, t_ns: int, turn_end_ns: int) -> bool:
        if turn_end_ns == NEVER:
            return self._need_resched(data)
        return t_ns >= turn_end_ns and self._wanted_by_others(data, t_ns)

    def _wanted_by_others(self, data: RcuData, t_ns: int) -> bool:
        return data.cpu.state(t_ns) is not IDLE or self._need_resched(data)

    def _batch(self, data: RcuData, t_ns: int, idle: bool) -> Work:
        """One rcu_do_batch() in softirq context; ``idle``: it interrupted the idle task."""
        ready = data.ready
        limit = max(data.blimit, ready >> self._config.divisor)
        deadline_ns = t_ns + self._config.resched_ns if limit > 100 else NEVER
        begin_ns = t_ns
        done = 0
        while done < ready:
            part_ns = t_ns
            stop = False
            for _ in range(PART_CALLBACKS - done % PART_CALLBACKS):
                t_ns = self._invoke(data, t_ns)
                done += 1
                stop = done >= limit and (not idle or self._need_resched(data))
                if stop or done == ready or t_ns - part_ns >= PART_NS:
                    break
            data.cpu.steal(int(self._env.now), t_ns - part_ns)
            data.softirq_until_ns = t_ns
            if stop or (done % PART_CALLBACKS == 0 and t_ns >= deadline_ns):
                break
            if done < ready:
                yield t_ns
        self._end_batch(data, begin_ns, done, t_ns)
        return t_ns

    def _invoke(self, data: RcuData, t_ns: int) -> int:
        _, callback, index, _ = data.callbacks.take()
        data.taken += 1
        cost_ns = callback(t_ns) if index == ALONE else callback(t_ns, index)
        return t_ns + self._costs.callback_invoke_ns + cost_ns

    def _end_batch(self, data: RcuData, begin_ns: int, done: int, end_ns: int) -> None:
        data.taken -= done
        self._batch_done(data)
        if self._on_batch is not None:
            self._on_batch(data.id, begin_ns, done, end_ns - begin_ns)

    def _ksoftirqd(self, data: RcuData, t_ns: int) -> Work:
        """The kthread that takes over what a run of softirqs left, in turns with the thread."""
        turn_ns = t_ns
        while data.ready:
            if data.in_softirq(t_ns):  # a tick serves them right now
                t_ns = turn_ns = max(data.softirq_until_ns, t_ns + 1)
                yield t_ns
                continue
            self._begin_turn(data, turn_ns)
            t_ns = yield from self._run_softirqs(data, t_ns, False, data.turn_end_ns)
            data.switched(int(self._env.now))  # rcu_softirq_qs() after every run
            if data.ready and t_ns >= data.turn_end_ns:
                if self._wanted_by_others(data, t_ns):
                    t_ns += self._others_turn_ns(data, t_ns, t_ns - turn_ns)
                    yield t_ns
                turn_ns = t_ns
        data.ksoftirqd = False
        return t_ns

    def _begin_turn(self, data: RcuData, t_ns: int) -> None:
        data.turn_begin_ns = t_ns
        data.turn_end_ns = t_ns + self._config.slice_ns

    def _others_turn_ns(self, data: RcuData, t_ns: int, turn_ns: int) -> int:
        """A thread runs as long as ksoftirqd did; the grace-period kthread is soon done."""
        if data.cpu.state(t_ns) is IDLE:
            return 2 * self._costs.context_switch_ns
        return turn_ns

    # -- offloaded callbacks --------------------------------------------------------------------

    def run_offloaded(self, data: RcuData, host: Cpu, t_ns: int) -> None:
        """The rcuo kthread of ``data`` runs on ``host`` from ``t`` on until nothing is ready."""
        data.nocb_invoking = True
        drive(self._env, self._offloaded(data, host, t_ns))

    def _offloaded(self, data: RcuData, host: Cpu, t_ns: int) -> Work:
        """Batches of nocb_cb_wait(): all that is ready, with a resched point after each callback.

        A busy thread on the same CPU has it back after a turn, for as long as rcuo had it.
        """
        turn_ns = t_ns
        while data.callbacks.ready:
            ready = data.extracted = data.callbacks.ready
            data.qlen_last_fqs_check = data.length
            begin_ns = t_ns
            spent_ns = 0
            while data.extracted:
                part_ns = t_ns
                end_ns = min(part_ns + PART_NS, turn_ns + self._config.slice_ns)
                while data.extracted and (t_ns == part_ns or t_ns < end_ns):
                    t_ns = self._invoke(data, t_ns)
                    data.extracted -= 1
                host.steal(part_ns, t_ns - part_ns)
                spent_ns += t_ns - part_ns
                yield t_ns
                if t_ns - turn_ns >= self._config.slice_ns:
                    if host.state(t_ns) is not IDLE:
                        t_ns += t_ns - turn_ns
                        yield t_ns
                    turn_ns = t_ns
            self._end_batch(data, begin_ns, ready, begin_ns + spent_ns)
        data.nocb_invoking = False
        return t_ns
