"""How long RCU callbacks wait, by HZ, from ticks alone: with free costs all else takes no time.

The rules (kernel/rcu/tree.c, v6.12), in ticks of T = 1 / HZ:

* A CPU that runs something notices a grace period at the first tick after its start and reports
  at the second (`rcu_sched_clock_irq`), so a period of busy CPUs lasts 2 ticks.
* Idle CPUs report nothing. The grace-period kthread credits them when it scans for quiescent
  states (`rcu_gp_fqs_loop`), first after J = 1 + (HZ > 250) + (HZ > 500) jiffies. No timer is
  early, the wheel adds a jiffy, so the period lasts J + 1 ticks: 2 at HZ 100 and 250, 3 at 300,
  4 at 1000.
* A callback gets a number when its CPU's core next runs: of the next period if none runs, else of
  the one after the running one (`rcu_seq_snap`). The CPU's core runs at ticks at which it has
  something to do: at the start and the end of a period, and to report.
* It is invoked by its CPU at the first tick after the end of its period.

So a callback that comes while RCU is idle waits half a tick on average to be numbered, P ticks of
the period, and one more until its CPU looks: (P + 3/2) T.

While periods follow one another a callback that comes before tick k of a period of P ticks, k = 1
to P, is numbered at the start's tick (k = 1) or the report's (k = 2) with the period after this
one, and waits 2 P + 1 - k whole ticks; one that comes later is numbered at tick 1 of the next
period and waits 3 P + 1 - k. Half a tick comes on top in the mean. Only the CPU on which the
kthread itself runs numbers the later ones, too, before the next period starts (`rcu_gp_cleanup`):
there it is 2 P + 1 - k for all k.

A callback of an offloaded CPU is numbered when it comes, by a kthread (tree_nocb.h). Alone, its
period starts at once, so that half a tick of the first one is over on average, and nobody has to
notice the end: (P - 1/2) T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING

from simpy import Environment

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.rcu import Rcu, RcuConfig, RcuCosts
from simkvm.units import NS_PER_MS, NS_PER_S
from simkvm.validate.closed_form import ClosedForm, Estimate, exactly, replicated, streams

if TYPE_CHECKING:
    import numpy as np

MS = NS_PER_MS
EVER = 1 << 50
CPUS = 4
COUNT = 10_000  #: callbacks under continuous grace periods; every single wait is independent
LONE = 2_500
FREE = RcuCosts(0, 0, 0, 0, 0, 0)
#: Ticks of a grace period that waits for an idle CPU, by HZ.
PERIODS = {100: 2, 250: 2, 300: 3, 1000: 4}
BUSY = 2  #: ticks of one that waits for busy CPUs only
#: Jiffies of a timer's bucket ten seconds ahead (kernel/time/timer.c, v6.12).
BUCKETS = {100: 64, 250: 64, 300: 64, 1000: 512}

TICKS = "kernel/rcu/tree.c, v6.12: ticks and jiffies_till_first_fqs, see simkvm.validate.theory_rcu"
NOCB = "kernel/rcu/tree_nocb.h, v6.12, see simkvm.validate.theory_rcu"


def closed_forms() -> list[ClosedForm]:
    """Grace periods, waits of lone callbacks and of streams of them, and batches."""
    return [
        *(form for hz in PERIODS for form in _idle_host(hz)),
        *(_busy_host(hz) for hz in (250, 1000)),
        *(_alone(hz, offloaded=False) for hz in PERIODS),
        *(_alone(hz, offloaded=True) for hz in PERIODS),
        *(_lazy(hz) for hz in PERIODS),
        *(_batches(backlog) for backlog in (3_000, 30_000)),
        *(_flood(hz) for hz in (250, 1000)),
    ]


class Stream:
    """Callbacks of CPU 0, queued at ``times_ns``, on a host with guests on ``busy`` CPUs.

    Afterwards: ``invoked`` when, ``periods`` as (number, start, end, scans) and ``batches`` as
    (cpu, begin, callbacks, duration), all in ns; ``stolen_ns`` from CPU 0.
    """

    def __init__(
        self,
        times_ns: Sequence[int],
        hz: int,
        busy: int,
        cpus: int = CPUS,
        cost_ns: int = 0,
        offloaded: bool = False,
        lazy: bool = False,
        costs: RcuCosts = FREE,
    ) -> None:
        env = Environment()
        hosts = [Cpu(i, offloaded=offloaded) for i in range(cpus)]
        for cpu in hosts[:busy]:
            cpu.enter_guest(0, EVER)
        self.periods: list[tuple[int, int, int, int]] = []
        self.batches: list[tuple[int, int, int, int]] = []
        self.queued = times_ns
        self.invoked = [0] * len(times_ns)
        config = RcuConfig(hz, True, cpus, lazy=lazy)
        self.rcu = Rcu(
            env,
            hosts,
            config,
            costs,
            on_grace_period=lambda *row: self.periods.append(row),
            on_batch=lambda *row: self.batches.append(row),
        )

        def callback(t_ns: int, index: int) -> int:
            self.invoked[index] = t_ns
            return cost_ns

        self.rcu.call_rcu_many(times_ns, 0, callback)
        env.run()
        self.stolen_ns = hosts[0].stolen_ns
        self.tick_ns = config.tick_ns(1)

    @property
    def waits(self) -> list[int]:
        """From queueing to invocation, in the order of queueing."""
        return [t - q for q, t in zip(self.queued, self.invoked, strict=True)]


# -- continuous grace periods ----------------------------------------------------------------------


def waits_in_ticks(period: int, kthreads_own: bool = False) -> list[int]:
    """Ticks from the one that sees a callback to its invocation, for each tick of a period."""
    return [
        (2 if kthreads_own or tick <= BUSY else 3) * period + 1 - tick
        for tick in range(1, period + 1)
    ]


def mean_wait(period: int, kthreads_own: bool = False) -> float:
    """The mean of these, and half a tick before the first one."""
    return fmean(waits_in_ticks(period, kthreads_own)) + 0.5


def _continuous(name: str, hz: int, busy: int) -> Stream:
    """Callbacks at random, sixteen in a tick: no period ends without another one wanted."""
    (rng,) = streams(name, 1)
    gaps_ns = rng.exponential(NS_PER_S / hz / 16, COUNT)
    return Stream([int(t) for t in accumulate(gaps_ns.tolist())], hz, busy)


def _waits(stream: Stream) -> Estimate:
    """Waits are functions of the place in a period, which arrivals at random draw independently."""
    settled = 10 * stream.tick_ns
    waits = zip(stream.queued, stream.waits, strict=True)
    return replicated([wait / MS for queued_ns, wait in waits if queued_ns > settled])


def _length(stream: Stream, periods: int) -> Estimate:
    """Mean length of ``periods`` grace periods without a pause: a second of them is exact."""
    spans = stream.periods[1 : periods + 1]
    return exactly((spans[-1][2] - spans[0][1]) / periods / MS)


def _idle_host(hz: int) -> list[ClosedForm]:
    """An idle CPU besides the one that queues: its credit ends each period."""
    name, period = f"rcu/continuous/{hz}", PERIODS[hz]
    elsewhere = cache(lambda: _continuous(name, hz, busy=1))
    forms = [
        ClosedForm(
            f"{name}/period",
            f"HZ={hz}, some CPU idle, callbacks all the time: length of a grace period",
            "ms",
            period * NS_PER_S / hz / MS,
            lambda: _length(_regular(hz, busy=1), hz // period),
            TICKS,
            drawn=False,
        ),
        ClosedForm(
            f"{name}/wait",
            f"HZ={hz}, some CPU idle, callbacks all the time: mean wait of one",
            "ms",
            mean_wait(period) * NS_PER_S / hz / MS,
            lambda: _waits(elsewhere()),
            TICKS,
        ),
    ]
    if period > BUSY:
        own = f"{name}/kthreads-own"
        forms.append(
            ClosedForm(
                f"{own}/wait",
                f"HZ={hz}, the same on the CPU of RCU's kthread: mean wait of one",
                "ms",
                mean_wait(period, kthreads_own=True) * NS_PER_S / hz / MS,
                lambda: _waits(_continuous(own, hz, busy=0)),
                TICKS,
            )
        )
    return forms


def _regular(hz: int, busy: int) -> Stream:
    """Four callbacks in each tick of a little more than a second."""
    gap_ns = NS_PER_S // (4 * hz)
    return Stream(range(gap_ns // 2, NS_PER_S + 20 * NS_PER_S // hz, gap_ns), hz, busy)


def _busy_host(hz: int) -> ClosedForm:
    """Every CPU runs a guest: two ticks a period at any HZ."""
    name = f"rcu/continuous/{hz}/all-busy"
    return ClosedForm(
        f"{name}/wait",
        f"HZ={hz}, all CPUs busy, callbacks all the time: mean wait of one",
        "ms",
        mean_wait(BUSY) * NS_PER_S / hz / MS,
        lambda: _waits(_continuous(name, hz, busy=CPUS)),
        TICKS,
    )


# -- callbacks that come alone ---------------------------------------------------------------------


def _alone(hz: int, offloaded: bool) -> ClosedForm:
    """Callbacks so far apart that RCU is idle at each, at any moment of a tick."""
    name = f"rcu/alone/{hz}/{'offloaded' if offloaded else 'softirq'}"
    tick_ns = NS_PER_S / hz
    ticks = PERIODS[hz] - 0.5 if offloaded else PERIODS[hz] + 1.5

    def draw(rng: np.random.Generator) -> list[float]:
        return [float(gap) for gap in tick_ns * (20 + 30 * rng.random(LONE))]

    return ClosedForm(
        f"{name}/wait",
        f"HZ={hz}, idle host: mean wait of a lone callback{', offloaded' if offloaded else ''}",
        "ms",
        ticks * tick_ns / MS,
        lambda: _apart(name, hz, draw, offloaded=offloaded),
        NOCB if offloaded else TICKS,
    )


def _lazy(hz: int) -> ClosedForm:
    """A timer of ten seconds, rounded up to its bucket of the wheel, then a grace period.

    The bucket ends at any moment of its length after the ten seconds; the timer runs in a tick,
    so the period that it starts takes its whole P ticks.
    """
    name, tick_ns = f"rcu/lazy/{hz}", NS_PER_S / hz

    def draw(rng: np.random.Generator) -> list[float]:
        return [float(gap) for gap in NS_PER_S * (12 + 3 * rng.random(LONE))]

    return ClosedForm(
        f"{name}/wait",
        f"HZ={hz}, idle host: mean wait of a lone lazy callback beyond 10 s",
        "ms",
        (BUCKETS[hz] / 2 + PERIODS[hz]) * tick_ns / MS,
        lambda: _apart(name, hz, draw, offloaded=True, lazy=True, beyond_ns=10 * NS_PER_S),
        "LAZY_FLUSH_JIFFIES in kernel/rcu/tree_nocb.h, buckets in kernel/time/timer.c, v6.12",
    )


def _apart(
    name: str,
    hz: int,
    draw: Callable[[np.random.Generator], list[float]],
    offloaded: bool,
    lazy: bool = False,
    beyond_ns: int = 0,
) -> Estimate:
    (rng,) = streams(name, 1)
    times = [int(t) for t in accumulate(draw(rng))]
    stream = Stream(times, hz, busy=0, offloaded=offloaded, lazy=lazy)
    assert len(stream.periods) == LONE, "RCU was idle each time"
    return replicated([(wait - beyond_ns) / MS for wait in stream.waits])


# -- batches ---------------------------------------------------------------------------------------


def batches_of(backlog: int, blimit: int = 10, divisor: int = 7) -> int:
    """Batches that a backlog takes: each is a 128th of what is ready, and no less than blimit."""
    taken = 0
    while backlog > 0:
        backlog -= max(blimit, backlog >> divisor)
        taken += 1
    return taken


def _batches(backlog: int) -> ClosedForm:
    """All are queued in one moment on a CPU that runs a guest, which is what limits a batch."""
    return ClosedForm(
        f"rcu/batches/{backlog}",
        f"{backlog} callbacks ready at once on a busy CPU: batches",
        "batches",
        batches_of(backlog),
        lambda: exactly(len(Stream([500_000] * backlog, 250, CPUS, cost_ns=100).batches)),
        "rcu_do_batch() in kernel/rcu/tree.c, v6.12: blimit 10, rcu_divisor 7",
        drawn=False,
    )


def _flood(hz: int) -> ClosedForm:
    """All are queued in one moment on an idle CPU, which invokes them one after the other.

    A tick numbers them, the period follows, one tick more and the first one is invoked.
    """
    count, cost_ns, at_ns = 9_000, 200, 500_000
    first_ns = (PERIODS[hz] + 2) * NS_PER_S // hz - at_ns
    return ClosedForm(
        f"rcu/flood/{hz}/wait",
        f"HZ={hz}, idle host: mean wait of {count} callbacks queued at once, {cost_ns} ns each",
        "ms",
        (first_ns + (count - 1) * cost_ns / 2) / MS,
        lambda: exactly(fmean(Stream([at_ns] * count, hz, 0, cost_ns=cost_ns).waits) / MS),
        TICKS,
        drawn=False,
    )
