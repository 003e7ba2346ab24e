"""Callbacks of nohz_full CPUs, which Linux offloads to kthreads (kernel/rcu/tree_nocb.h, v6.12).

A nohz_full CPU has no tick that could look after its callbacks. Its rcuog kthread numbers them as
soon as it wakes, sleeps until the end of the grace period that they wait for, and hands them to
the rcuo kthread, which invokes all that are ready. Both run on a housekeeping CPU. Left out:
kthread groups (each CPU has its own rcuog), the bypass list, and lazy callbacks.
"""

from __future__ import annotations

from collections.abc import Callable

from simpy import Environment

from simkvm.kernel.cpu import NEVER, Cpu
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
        *,
        number: Callable[[RcuData, int], None],
        housekeeping: Callable[[int], Cpu],
        wake_ns: int,
    ) -> None:
        self._env = env
        self._invocation = invocation
        self._number = number
        self._housekeeping = housekeeping
        self._wake_ns = wake_ns
        self._waiting: list[RcuData] = []

    def queued(self, data: RcuData, t_ns: int) -> None:
        """A callback was queued at ``t``: wake rcuog unless it has callbacks already."""
        if not data.nocb_waiting:
            self._wake(data, t_ns)

    def grace_period_ended(self, t_ns: int) -> None:
        """Wake whoever waits for it (rcu_nocb_gp_cleanup)."""
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            data.nocb_waiting = False
            self._wake(data, t_ns)

    def _wake(self, data: RcuData, t_ns: int) -> None:
        run_ns = t_ns + self._wake_ns
        if run_ns < data.nocb_wake_ns:
            data.nocb_wake_ns = run_ns
            at(self._env, run_ns, lambda: self._rcuog(data, run_ns))

    def _rcuog(self, data: RcuData, t_ns: int) -> None:
        if t_ns != data.nocb_wake_ns:
            return  # it was woken earlier
        data.nocb_wake_ns = NEVER
        callbacks = data.callbacks
        self._number(data, t_ns)
        if callbacks.ready and not data.nocb_invoking:
            data.nocb_invoking = True
            run_ns = t_ns + self._wake_ns
            at(self._env, run_ns, lambda: self._rcuo(data, run_ns))
        if callbacks.waiting:
            data.nocb_waiting = True
            self._waiting.append(data)
        elif callbacks.arriving:
            self._wake(data, callbacks.arriving[0][0] + 1)

    def _rcuo(self, data: RcuData, t_ns: int) -> None:
        self._invocation.run_offloaded(data, self._housekeeping(t_ns), t_ns)
