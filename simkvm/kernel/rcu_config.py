"""What RCU is built and booted with: HZ, thresholds, and what its steps cost.

Names and defaults are those of kernel/rcu/tree.{c,h} and kernel/softirq.c, v6.12.
"""

from __future__ import annotations

from dataclasses import dataclass

from simkvm.units import NS_PER_S


@dataclass(frozen=True, slots=True)
class RcuConfig:
    """Build and boot parameters.

    ``preemptible``: CONFIG_PREEMPT_RCU, which any CONFIG_PREEMPTION (also dynamic, lazy) selects.
    ``lazy``: CONFIG_RCU_LAZY, not switched off by rcutree.enable_rcu_lazy; it matters to offloaded
    CPUs only. ``nr_cpu_ids`` is the host's, whatever number of CPUs is simulated.
    """

    hz: int
    preemptible: bool
    nr_cpu_ids: int
    blimit: int = 10
    max_blimit: int = 10_000
    qhimark: int = 10_000
    qlowmark: int = 100
    qovld: int = 20_000
    lazy: bool = False
    divisor: int = 7
    resched_ns: int = 3_000_000  #: rcu_resched_ns, the time cap of batches above 100
    softirq_restarts: int = 10  #: MAX_SOFTIRQ_RESTART
    softirq_ms: int = 2  #: MAX_SOFTIRQ_TIME
    stall_s: int = 21  #: CONFIG_RCU_CPU_STALL_TIMEOUT

    @property
    def jiffies_till_fqs(self) -> int:
        """Jiffies to the first and between later scans for quiescent states (rcu_init_geometry)."""
        return 1 + (self.hz > 250) + (self.hz > 500) + self.nr_cpu_ids // 256

    @property
    def jiffies_to_sched_qs(self) -> int:
        """Age at which a grace period begins to press CPUs (adjust_jiffies_till_sched_qs)."""
        return max(3 * self.jiffies_till_fqs, self.hz // 10 + self.nr_cpu_ids // 256)

    @property
    def nobypass_per_jiffy(self) -> int:
        """Calls a jiffy from which on an offloaded CPU uses its bypass list (tree_nocb.h)."""
        return 16 * 1000 // self.hz

    @property
    def lazy_flush_jiffies(self) -> int:
        """How long lazy callbacks may stay in the bypass list (LAZY_FLUSH_JIFFIES): 10 s."""
        return 10 * self.hz

    @property
    def softirq_jiffies(self) -> int:
        """Jiffies that one run of softirqs may see pass: msecs_to_jiffies() rounds up."""
        return -(-self.softirq_ms * self.hz // 1000)

    @property
    def slice_ns(self) -> int:
        """How long ksoftirqd and a busy thread run in turn.

        The scheduler's base slice, 0.75 ms * (1 + log2 of up to 8 CPUs), ends at a tick
        (kernel/sched/fair.c, sysctl_sched_base_slice), so it is rounded up to whole ticks.
        """
        base_ns = 750_000 * min(8, self.nr_cpu_ids).bit_length()
        return self.tick_ns(self.jiffies(base_ns - 1) + 1)

    def jiffies(self, t_ns: int) -> int:
        """Number of ticks up to and including ``t``."""
        return ((t_ns + 1) * self.hz - 1) // NS_PER_S

    def tick_ns(self, jiffy: int) -> int:
        """Time of tick number ``jiffy``: the same on all CPUs."""
        return jiffy * NS_PER_S // self.hz

    def tick_after(self, t_ns: int) -> int:
        """Time of the first tick later than ``t``."""
        return self.tick_ns(self.jiffies(t_ns) + 1)


def timer_wheel(jiffy: int, delta: int) -> int:
    """The jiffy at which a timer fires that was armed at ``jiffy`` for ``delta`` jiffies later.

    Levels of the wheel have 64 buckets, each level's eight times as coarse as those of the one
    below; the expiry is rounded up to the next bucket, so that no timer is early
    (calc_wheel_index() in kernel/time/timer.c, v6.12). The farthest level is not reached here.
    """
    shift = 0
    while delta >= 63 << shift:
        shift += 3
    return ((jiffy + delta >> shift) + 1) << shift


@dataclass(frozen=True, slots=True)
class RcuCosts:
    """What the steps cost, in nanoseconds.

    ``call_rcu_ns`` is returned to whoever calls; ``core_ns`` is a pass of the RCU core in softirq
    up to its first callback; ``callback_invoke_ns`` is the dispatch of one callback, on top of what
    the callback itself says it costs; a woken kthread runs ``wakeup_ns`` plus
    ``context_switch_ns`` later; a scan takes ``core_ns`` plus ``fqs_scan_per_cpu_ns`` for each CPU
    that it looks at.
    """

    call_rcu_ns: int
    callback_invoke_ns: int
    wakeup_ns: int
    context_switch_ns: int
    core_ns: int = 500
    fqs_scan_per_cpu_ns: int = 50

    @property
    def switch_ns(self) -> int:
        """From waking a kthread until it runs."""
        return self.wakeup_ns + self.context_switch_ns
