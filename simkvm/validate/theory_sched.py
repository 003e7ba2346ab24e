"""The fair scheduler against processor sharing, and against what no scheduler can get around.

Threads that only compute share CPUs; a switch is free. While they all run, each has its part of
the CPU up to a slice, so slowly changing numbers of threads see processor sharing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.rcu_config import RcuConfig
from simkvm.kernel.sched import FairScheduler, Scheduler
from simkvm.kernel.task import Task, reach
from simkvm.units import NS_PER_S
from simkvm.validate import queueing
from simkvm.validate.closed_form import ClosedForm, Estimate, exactly, replicated, streams

if TYPE_CHECKING:
    import numpy as np

Steps = Generator[Event, Any, int]

HZ = 1000
TICK_NS = NS_PER_S // HZ
SERVICE_NS = 20 * TICK_NS
LOAD = 0.5
REPLICATIONS, JOBS, WARM_UP = 30, 800, 50
KLEINROCK = "Kleinrock, Queueing Systems II (1976), section 4.4"


class Stretch(NamedTuple):
    """A thread had a CPU in [begin, end)."""

    cpu: int
    begin_ns: int
    end_ns: int


class Computing:
    """A thread that computes in user space, and may be preempted at any time."""

    def __init__(self, env: Environment, sched: Scheduler, task: Task) -> None:
        self.env = env
        self.task = task
        self._sched = sched
        self._over = Event(env)
        self.stretches: list[Stretch] = []
        sched.add(task, self)

    def compute(self, t_ns: int, demand_ns: int) -> Steps:
        """Compute for ``demand_ns`` on a CPU, ready at ``t``; returns when that is done."""
        t_ns = yield from self._sched.wake(self.task, t_ns)
        while True:
            end_ns = t_ns + demand_ns
            self._over = over = Event(self.env)
            self._at(end_ns, over)
            at_ns: int = yield over
            self.stretches.append(Stretch(self.task.cpu.id, t_ns, at_ns))
            demand_ns = end_ns - at_ns
            if not demand_ns:
                return at_ns
            t_ns = yield from self._sched.checkpoint(self.task, at_ns)

    def _at(self, t_ns: int, over: Event) -> None:
        def ended(_: Event) -> None:
            if not over.triggered:
                over.succeed(t_ns)

        timer = self.env.timeout(t_ns - int(self.env.now))
        assert timer.callbacks is not None
        timer.callbacks.append(ended)

    def run(self, t_ns: int, demand_ns: int) -> Steps:
        """A thread that computes once, from ``t`` on; returns when it is done."""
        t_ns = yield from reach(self.env, t_ns)
        t_ns = yield from self.compute(t_ns, demand_ns)
        self._sched.sleep(self.task, t_ns)
        return t_ns

    def preempted(self, t_ns: int) -> None:
        """Stop at ``t``, or when the switch to this thread is over."""
        if not self._over.triggered:
            self._over.succeed(t_ns)

    def placed(self, cpu: Cpu) -> None:
        """All CPUs are alike."""


class Host:
    """``cpus`` CPUs under the fair scheduler, and threads that compute."""

    def __init__(self, cpus: int, hz: int = HZ, switch_ns: int = 0) -> None:
        self.env = Environment()
        self.cpus = [Cpu(number) for number in range(cpus)]
        config = RcuConfig(hz, True, cpus)
        self.sched = FairScheduler(self.env, self.cpus, switch_ns, config.tick_after)
        self.threads: list[Computing] = []

    def thread(self, cpu: int | None = None) -> Computing:
        """Another thread, which ran on ``cpu`` before; without that they have CPUs in turn."""
        number = len(self.threads)
        before = self.cpus[number % len(self.cpus) if cpu is None else cpu]
        task = Task(f"thread{number}", before)
        self.threads.append(Computing(self.env, self.sched, task))
        return self.threads[-1]

    def sojourns(self, arrivals_ns: Sequence[int], demands_ns: Sequence[int]) -> list[int]:
        """A thread for each arrival: how long it took until each had what it came for."""
        took_ns = [0] * len(arrivals_ns)

        def life(number: int, thread: Computing, demand_ns: int) -> Generator[Event, Any, None]:
            arrival_ns = arrivals_ns[number]
            took_ns[number] = (yield from thread.run(arrival_ns, demand_ns)) - arrival_ns

        for number, demand_ns in enumerate(demands_ns):
            self.env.process(life(number, self.thread(), demand_ns))
        self.env.run()
        return took_ns


def closed_forms() -> list[ClosedForm]:
    """Threads in turn, processor sharing with arrivals, and no CPU idle while a thread waits."""
    return [
        *(_in_turn(threads) for threads in (2, 3, 8)),
        _processor_sharing(),
        _closed(5),
        *(_conserved(cpus) for cpus in (1, 3)),
    ]


def _in_turn(threads: int, slices: int = 50) -> ClosedForm:
    """On one CPU the slice of 0.75 ms ends at each tick, so turns last a tick."""

    def measured() -> Estimate:
        found = Host(1).sojourns([0] * threads, [slices * TICK_NS] * threads)
        return exactly(sum(found) / threads / (slices * TICK_NS))

    return ClosedForm(
        id=f"sched/in-turn/{threads}",
        about=f"{threads} threads on a CPU, each with as much to do: time taken over CPU time had",
        unit="",
        expected=threads - (threads - 1) / 2 / slices,
        measure=measured,
        source=f"round robin: {KLEINROCK}; a turn is a tick (update_deadline(), "
        "kernel/sched/fair.c, v6.12)",
        drawn=False,
    )


# -- threads that come and go ----------------------------------------------------------------------


def _processor_sharing() -> ClosedForm:
    """First come first served, threads with as much to do would take 3/4 of the time."""

    def measured() -> Estimate:
        return replicated([_mean_sojourn(rng) for rng in streams("sched/m-g-1-ps", REPLICATIONS)])

    return ClosedForm(
        id="sched/m-g-1-ps",
        about=f"threads that come at random, each for as long, load {LOAD}: mean time to be done",
        unit="ns",
        expected=SERVICE_NS / (1 - LOAD),
        measure=measured,
        source=f"M/G/1 with processor sharing: {KLEINROCK}",
    )


def _mean_sojourn(rng: np.random.Generator) -> float:
    import numpy as np

    arrivals = np.cumsum(rng.exponential(SERVICE_NS / LOAD, JOBS)).astype(np.int64).tolist()
    return float(np.mean(Host(1).sojourns(arrivals, [SERVICE_NS] * JOBS)[WARM_UP:]))


def _closed(threads: int, think: float = 4.0) -> ClosedForm:
    """First come, first served, 6 % more would be computed: stretches are of equal length."""

    def measured() -> Estimate:
        return replicated(
            [_cycles(rng, threads, think) for rng in streams("sched/closed", REPLICATIONS)]
        )

    throughput, _ = queueing.closed_network(threads, think, 1.0)
    return ClosedForm(
        id=f"sched/closed/{threads}",
        about=f"{threads} threads that sleep at random, then compute, over and over: CPU used",
        unit="",
        expected=throughput,
        measure=measured,
        source="Baskett, Chandy, Muntz and Palacios, J. ACM 22 (1975), 248-260; mean values by "
        "Reiser and Lavenberg, J. ACM 27 (1980), 313-322",
    )


def _cycles(rng: np.random.Generator, threads: int, think: float, cycles: int = 1000) -> float:
    """Stretches computed in the time of one, after a tenth of them."""
    host = Host(1)
    ends: list[int] = []

    def life(thread: Computing) -> Generator[Event, Any, None]:
        t_ns = 0
        while len(ends) < cycles:
            t_ns = yield from reach(host.env, t_ns + round(rng.exponential(think * SERVICE_NS)))
            t_ns = yield from thread.run(t_ns, SERVICE_NS)
            ends.append(t_ns)

    for _ in range(threads):
        host.env.process(life(host.thread()))
    host.env.run()
    first = cycles // 10
    return (cycles - first) * SERVICE_NS / (ends[cycles] - ends[first])


# -- work conservation -----------------------------------------------------------------------------


def _conserved(cpus: int, threads: int = 12) -> ClosedForm:
    @cache
    def found() -> tuple[int, int]:
        return _busy_while_waiting(cpus, threads)

    return ClosedForm(
        id=f"sched/work-conserved/{cpus}",
        about=f"{threads} threads on {cpus} CPUs: CPU time used while any thread waits",
        unit="ns",
        expected=lambda: cpus * found()[1],
        measure=lambda: exactly(found()[0]),
        source="no CPU is idle while a thread waits: Kleinrock (1976), section 3.1; "
        "sched_balance_newidle(), kernel/sched/fair.c, v6.12",
        drawn=False,
    )


def _busy_while_waiting(cpus: int, threads: int) -> tuple[int, int]:
    """CPU time that threads had while others waited, and how long that was, from their account."""
    host = Host(cpus)
    (rng,) = streams(f"sched/work-conserved/{cpus}", 1)
    arrivals = rng.integers(0, 40 * TICK_NS, threads).tolist()
    demands = rng.integers(1, 20 * TICK_NS, threads).tolist()
    sojourns = host.sojourns(arrivals, demands)
    ready = [(begin, begin + took) for begin, took in zip(arrivals, sojourns, strict=True)]
    ran = [stretch[1:] for thread in host.threads for stretch in thread.stretches]
    edges = sorted({edge for span in (*ready, *ran) for edge in span})
    busy_ns = waited_ns = 0
    for begin, end in pairwise(edges):
        running = sum(since <= begin and end <= until for since, until in ran)
        wanting = sum(since <= begin and end <= until for since, until in ready)
        if wanting > running:
            busy_ns += running * (end - begin)
            waited_ns += end - begin
    return busy_ns, waited_ns
