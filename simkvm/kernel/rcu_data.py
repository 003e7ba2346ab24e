"""What RCU keeps for each CPU: ``struct rcu_data`` (kernel/rcu/tree.h, v6.12)."""

from __future__ import annotations

from simkvm.kernel.cpu import ATOMIC, NEVER, Cpu
from simkvm.kernel.rcu_bypass import Bypass, Defer
from simkvm.kernel.rcu_config import RcuConfig
from simkvm.kernel.rcu_segcblist import SegmentedCallbackList


class RcuData:
    """One CPU's part in RCU.

    ``gp_seq`` is the grace-period sequence that this CPU has noticed: twice the number of grace
    periods ended, plus one if another was running.
    """

    __slots__ = (
        "armed_ns",
        "blimit",
        "bypass",
        "callbacks",
        "core_needs_qs",
        "cpu",
        "cpu_no_qs",
        "extracted",
        "flood_check_ns",
        "forced_tick",
        "gp_seq",
        "id",
        "ksoftirqd",
        "last_resched_jiffy",
        "n_force_qs_snap",
        "need_heavy_qs",
        "nocb_defer",
        "nocb_invoking",
        "nocb_look_ns",
        "nocb_run_ns",
        "nocb_timer_ns",
        "nocb_waiting",
        "offloaded",
        "qlen_last_fqs_check",
        "raised",
        "resched_ns",
        "serving",
        "snapshot_ns",
        "softirq_until_ns",
        "taken",
        "turn_begin_ns",
        "turn_end_ns",
        "urgent_qs",
    )

    def __init__(self, cpu: Cpu, config: RcuConfig) -> None:
        self.cpu = cpu
        self.id = cpu.id
        self.callbacks = SegmentedCallbackList()
        self.offloaded = cpu.offloaded

        # Its quiescent state in the grace period that it knows of.
        self.gp_seq = 0
        self.core_needs_qs = False  # the grace period still waits for this CPU's report
        self.cpu_no_qs = False  # and no quiescent state was seen since armed_ns
        self.armed_ns = 0

        # How the grace-period kthread presses it.
        self.snapshot_ns = 0  # when it was last seen outside an extended quiescent state
        self.urgent_qs = False
        self.need_heavy_qs = False
        self.resched_ns = NEVER  # since when it is due to schedule as soon as it may
        self.forced_tick = False  # a nohz_full CPU that was given its tick back
        self.last_resched_jiffy = -NEVER

        # Its softirqs.
        self.serving = False  # between two events of one run of softirqs
        self.softirq_until_ns = 0  # end of the last part of a run that has been simulated
        self.raised = False
        self.ksoftirqd = False  # awake
        self.turn_begin_ns = 0  # of ksoftirqd, now or soon
        self.turn_end_ns = 0
        self.taken = 0  # callbacks of the running batch that still count as queued

        # Flood control.
        self.blimit = config.blimit
        self.qlen_last_fqs_check = 0
        self.n_force_qs_snap = 0
        self.flood_check_ns = NEVER

        # Its rcuog and rcuo kthreads, if offloaded.
        self.bypass = Bypass(self.callbacks, config)
        self.nocb_run_ns = NEVER  # when rcuog runs, having been woken
        self.nocb_defer = Defer.NOT  # what its timer was armed for
        self.nocb_timer_ns = NEVER  # when rcuog runs if nothing but the timer wakes it
        self.nocb_look_ns = NEVER  # the next event
        self.nocb_waiting = False  # rcuog sleeps until a grace period ends
        self.nocb_invoking = False  # rcuo is awake
        self.extracted = 0  # callbacks in the hands of rcuo that were not invoked yet

    @property
    def length(self) -> int:
        """Callbacks queued as the kernel counts them: a batch is subtracted when it ends."""
        return self.callbacks.seen + self.taken

    @property
    def ready(self) -> int:
        """Callbacks that softirqs may invoke; an offloaded CPU leaves that to its kthread."""
        return 0 if self.offloaded else self.callbacks.ready

    def length_at(self, t_ns: int) -> int:
        """The same as of ``t``: calls on an offloaded CPU are looked at later than they happen."""
        return self.length + (self.callbacks.due(t_ns) if self.offloaded else 0)

    def see(self, t_ns: int) -> None:
        """Look at the calls before ``t``; those of an offloaded CPU are the business of rcuog."""
        if not self.offloaded:
            self.callbacks.see(t_ns)

    def in_softirq(self, t_ns: int) -> bool:
        """Whether the CPU serves softirqs at ``t``."""
        return self.serving or t_ns < self.softirq_until_ns

    def runs_ksoftirqd(self, t_ns: int) -> bool:
        """Whether ksoftirqd has the CPU at ``t``, or is about to get it."""
        return self.ksoftirqd and t_ns < self.turn_end_ns

    def quiescent(self) -> None:
        """Note that a quiescent state was seen (rcu_qs)."""
        self.cpu_no_qs = False

    def switched(self, t_ns: int) -> None:
        """A kthread had the CPU until ``t``, which is a context switch.

        Actors know nothing of kthreads, so one may be in an RCU reader right now; then it is none.
        """
        if self.cpu.state(t_ns) is not ATOMIC:
            self.quiescent()

    def drop_urgency(self) -> None:
        """Stop pressing this CPU (rcu_disable_urgency_upon_qs)."""
        self.urgent_qs = False
        self.need_heavy_qs = False
        self.resched_ns = NEVER
        self.forced_tick = False
