"""Offloaded callbacks, which kthreads look after (kernel/rcu/tree_nocb.h, v6.12).

The callbacks of CPUs named by rcu_nocbs=, and of all nohz_full ones, wait for no tick of their
CPU. A call on a CPU without pending callbacks wakes its rcuog kthread. That numbers them, sleeps
until the end of the grace period that they wait for, and hands them to the rcuo kthread, which
invokes all that are ready. What is queued meanwhile is numbered when rcuog runs again. Both run on
a housekeeping CPU.

Calls are looked at in order of time but late, at the latest when rcuog would run because of one:
until then nothing depends on them.

Left out: kthread groups (each CPU has its own rcuog), callbacks that are advanced by the caller
or by rcuo, rcu_nocb_poll, and the memory shrinker, which flushes lazy callbacks.
"""

from __future__ import annotations

from collections.abc import Callable

from simpy import Environment

from simkvm.kernel.cpu import NEVER, Cpu
from simkvm.kernel.rcu_bypass import Defer
from simkvm.kernel.rcu_config import RcuConfig, timer_wheel
from simkvm.kernel.rcu_data import RcuData
from simkvm.kernel.rcu_softirq import Invocation, at


class Offload:
    """The rcuog and rcuo kthreads.

    ``number(data, t)`` advances and numbers the callbacks of a CPU; ``housekeeping(t)`` chooses
    where a kthread runs; ``wake_ns`` passes from the wake-up of a kthread until it runs.
    """

    def __init__(
        self,
        env: Environment,
        invocation: Invocation,
        config: RcuConfig,
        *,
        number: Callable[[RcuData, int], None],
        housekeeping: Callable[[int], Cpu],
        wake_ns: int,
    ) -> None:
        self._env = env
        self._invocation = invocation
        self._config = config
        self._number = number
        self._housekeeping = housekeeping
        self._wake_ns = max(1, wake_ns)  # a call is not seen in its own nanosecond
        self._waiting: list[RcuData] = []

    def queued(self, data: RcuData) -> None:
        """Callbacks were queued, for now or later."""
        self._plan(data)

    def see(self, data: RcuData, t_ns: int) -> None:
        """Look at the calls before ``t``."""
        self._calls(data, t_ns)
        self._plan(data)

    def grace_period_ended(self, t_ns: int, completed: int) -> None:
        """Wake who waits for this one (rcu_nocb_gp_cleanup); others sleep on."""
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            if data.callbacks.wait_number > completed:
                self._waiting.append(data)
                continue
            data.nocb_waiting = False
            data.nocb_run_ns = min(data.nocb_run_ns, t_ns + self._wake_ns)
            self._plan(data)

    # -- calls ----------------------------------------------------------------------------------

    def _calls(self, data: RcuData, t_ns: int) -> None:
        arriving = data.callbacks.arriving
        while arriving and arriving[0][0] < t_ns:
            entry = arriving.popleft()
            all_done = not data.callbacks.waiting
            if data.bypass.call(entry, self._config.jiffies(entry[0])):
                self._tell(data, all_done, entry[0])

    def _tell(self, data: RcuData, all_done: bool, t_ns: int) -> None:
        """Wake rcuog, now or later, if the call at ``t`` needs it (call_rcu_nocb_wake)."""
        if all_done:
            data.qlen_last_fqs_check = data.length
            if data.bypass.lazy and data.bypass.only_lazy:
                self._defer(data, Defer.LAZY, t_ns)
            else:
                self._disarm(data)
                data.nocb_run_ns = min(data.nocb_run_ns, t_ns + self._wake_ns)
        elif data.length > data.qlen_last_fqs_check + self._config.qhimark:
            data.qlen_last_fqs_check = data.length
            nobody = not data.nocb_invoking or data.callbacks.ready == data.extracted
            if nobody and data.nocb_timer_ns == NEVER:
                self._defer(data, Defer.FORCE, t_ns)

    def _defer(self, data: RcuData, kind: Defer, t_ns: int) -> None:
        """Arm the timer that wakes rcuog (wake_nocb_gp_defer)."""
        if kind is Defer.LAZY and data.nocb_defer is Defer.NOT:
            self._arm(data, t_ns, self._config.lazy_flush_jiffies)
        elif kind is Defer.BYPASS:
            self._arm(data, t_ns, 2)
        else:
            if data.nocb_defer < Defer.WAKE:
                self._arm(data, t_ns, 1)
                if kind >= Defer.WAKE and not data.cpu.nohz_full:
                    # The CPU's own tick does it before the timer (rcu_pending).
                    data.nocb_timer_ns = self._config.tick_after(t_ns) + self._wake_ns
            kind = max(kind, data.nocb_defer)
        data.nocb_defer = kind

    def _arm(self, data: RcuData, t_ns: int, delta: int) -> None:
        jiffy = timer_wheel(self._config.jiffies(t_ns), delta)
        data.nocb_timer_ns = self._config.tick_ns(jiffy) + self._wake_ns

    def _disarm(self, data: RcuData) -> None:
        data.nocb_defer = Defer.NOT
        data.nocb_timer_ns = NEVER

    # -- the kthreads ---------------------------------------------------------------------------

    def _plan(self, data: RcuData) -> None:
        """Have an event when rcuog runs, or may be woken by a call that was told ahead."""
        look_ns = min(data.nocb_run_ns, data.nocb_timer_ns)
        if data.nocb_run_ns == NEVER:
            look_ns = min(look_ns, self._next_call_ns(data))
        if look_ns < data.nocb_look_ns:
            look_ns = max(look_ns, int(self._env.now))
            data.nocb_look_ns = look_ns
            at(self._env, look_ns, lambda: self._look(data, look_ns))

    def _next_call_ns(self, data: RcuData) -> int:
        """When rcuog would run because of a call: the first one, or the one that is too many."""
        arriving = data.callbacks.arriving
        place = 0
        if data.callbacks.waiting:
            place = max(0, data.qlen_last_fqs_check + self._config.qhimark - data.length)
        return arriving[place][0] + self._wake_ns if place < len(arriving) else NEVER

    def _look(self, data: RcuData, t_ns: int) -> None:
        if t_ns != data.nocb_look_ns:
            return  # there was an earlier one
        data.nocb_look_ns = NEVER
        self._calls(data, t_ns)
        if min(data.nocb_run_ns, data.nocb_timer_ns) <= t_ns:
            self._rcuog(data, t_ns)
        self._plan(data)

    def _rcuog(self, data: RcuData, t_ns: int) -> None:
        """One round of nocb_gp_wait()."""
        data.nocb_run_ns = NEVER
        self._disarm(data)
        callbacks = data.callbacks
        data.bypass.flush_if_old(self._config.jiffies(t_ns))
        self._number(data, t_ns)
        if callbacks.ready and not data.nocb_invoking:
            data.nocb_invoking = True
            run_ns = t_ns + self._wake_ns
            at(self._env, run_ns, lambda: self._rcuo(data, run_ns))
        if len(data.bypass):
            self._defer(data, Defer.LAZY if data.bypass.only_lazy else Defer.BYPASS, t_ns)
        if callbacks.waiting and not data.nocb_waiting:
            data.nocb_waiting = True
            self._waiting.append(data)

    def _rcuo(self, data: RcuData, t_ns: int) -> None:
        self._invocation.run_offloaded(data, self._housekeeping(t_ns), t_ns)
