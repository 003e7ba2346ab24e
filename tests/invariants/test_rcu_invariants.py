"""What RCU promises, whatever the CPUs do.

Hypothesis draws what every CPU does (guest, user, kernel, locks, sleep, context switches; one or
several things told ahead) and when callbacks are queued. An independent record of the CPUs is
then held against the grace periods and the callbacks:

* grace periods are numbered one after the other, and only one runs at a time;
* no reader (preemption off) that began before a grace period is still in it at the end;
* every CPU was quiescent in every grace period, if not by itself then because a kthread ran there;
* each callback runs exactly once, in order on its CPU, a full grace period after it was queued;
* what was queued is all invoked in the end, and then no event is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.rcu import Rcu, RcuConfig, RcuCosts

COSTS = RcuCosts(call_rcu_ns=106, callback_invoke_ns=50, wakeup_ns=3900, context_switch_ns=1400)

#: What an actor does for a while: (kind, duration in ns).
Step = tuple[str, int]
#: (time in ns, index of the CPU, callbacks, apart by ns, cost in ns each); a single one hurries.
Call = tuple[int, int, int, int, int]

KINDS = ("guest", "user", "kernel", "atomic", "spin", "sleep", "switch")


@dataclass
class Run:
    hz: int
    preemptible: bool
    nohz_full: frozenset[int]
    offloaded: frozenset[int]
    lazy: bool
    steps: list[list[Step]]
    calls: list[Call]
    small: bool  # small thresholds, so that floods happen
    ahead: int  # steps told at once


@dataclass
class Seen:
    """The independent record."""

    rcu: Rcu
    env: Environment
    periods: list[tuple[int, int, int, int]] = field(default_factory=list)
    #: cpu -> [(begin, end, kind)] in order; kernel where nothing is said.
    did: list[list[tuple[int, int, str]]] = field(default_factory=list)
    queued: list[list[tuple[int, int]]] = field(default_factory=list)  # cpu -> (time, serial)
    invoked: list[list[tuple[int, int]]] = field(default_factory=list)


def steps(tick_ns: int) -> st.SearchStrategy[list[Step]]:
    durations = st.one_of(
        st.integers(1, 5_000), st.integers(1, 3 * tick_ns), st.sampled_from([tick_ns, 2 * tick_ns])
    )
    return st.lists(st.tuples(st.sampled_from(KINDS), durations), max_size=14)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    hz = draw(st.sampled_from([100, 250, 300, 1000]))
    cpus = draw(st.integers(1, 4))
    tick_ns = 1_000_000_000 // hz
    times = st.one_of(st.integers(1, 12 * tick_ns), st.sampled_from([k * tick_ns for k in (1, 4)]))
    call = st.tuples(
        times,
        st.integers(0, cpus - 1),
        st.sampled_from([1, 1, 2, 15, 150]),
        st.sampled_from([0, 1, 1_000, 100_000]),
        st.sampled_from([0, 100, 20_000, 300_000]),
    )
    return Run(
        hz=hz,
        preemptible=draw(st.booleans()),
        nohz_full=frozenset(draw(st.sets(st.integers(1, 3), max_size=2))),
        offloaded=frozenset(draw(st.sets(st.integers(0, 3), max_size=4))),
        lazy=draw(st.booleans()),
        steps=[draw(steps(tick_ns)) for _ in range(cpus)],
        calls=draw(st.lists(call, min_size=1, max_size=8)),
        small=draw(st.booleans()),
        ahead=draw(st.integers(1, 4)),
    )


def tell(cpu: Cpu, kind: str, begin: int, end: int) -> None:
    match kind:
        case "guest":
            cpu.enter_guest(begin, end)
        case "user":
            cpu.enter_kernel(begin)
            cpu.enter_user(begin, end)
        case "kernel":
            cpu.enter_kernel(begin)
        case "atomic":
            cpu.atomic(begin, end)
        case "spin":
            cpu.spin(begin)
        case "sleep":
            cpu.sleep(begin)
        case _:
            cpu.context_switch(begin)
            cpu.enter_kernel(begin)


def actor(seen: Seen, cpu: Cpu, todo: list[Step], ahead: int) -> Iterator[Event]:
    """Tell ``ahead`` steps, wait until they are over, and so on; sleep at the end."""
    did = seen.did[cpu.id]
    for first in range(0, len(todo), ahead):
        t = int(seen.env.now)
        for kind, duration in todo[first : first + ahead]:
            tell(cpu, kind, t, t + duration)
            did.append((t, t + duration, kind))
            t += duration
        yield seen.env.timeout(t - int(seen.env.now))
    cpu.sleep(int(seen.env.now))
    did.append((int(seen.env.now), 1 << 60, "sleep"))


def caller(seen: Seen, call: Call) -> Iterator[Event]:
    """Queue some callbacks, told ahead of the clock."""
    t, cpu, count, apart, cost = call
    yield seen.env.timeout(max(0, t - 50_000))
    begin = max(t, int(seen.env.now))
    times = [begin + i * apart for i in range(count)]
    serials = [sum(map(len, seen.queued)) + i for i in range(count)]
    seen.queued[cpu].extend(zip(times, serials, strict=True))

    def invoke(t_ns: int, index: int) -> int:
        seen.invoked[cpu].append((t_ns, serials[index]))
        return cost

    if count == 1:
        seen.rcu.call_rcu_hurry(times[0], cpu, lambda t_ns: invoke(t_ns, 0))
    else:
        seen.rcu.call_rcu_many(times, cpu, invoke)


def simulate(run: Run) -> Seen:
    env = Environment()
    count = len(run.steps)
    cpus = [Cpu(i, 0, i in run.nohz_full, i in run.offloaded) for i in range(count)]
    marks = {"qhimark": 20, "qlowmark": 5, "qovld": 60} if run.small else {}
    config = RcuConfig(run.hz, run.preemptible, nr_cpu_ids=count, lazy=run.lazy, **marks)
    periods: list[tuple[int, int, int, int]] = []
    rcu = Rcu(env, cpus, config, COSTS, on_grace_period=lambda *row: periods.append(row))
    seen = Seen(rcu, env, periods)
    for cpu, todo in zip(cpus, run.steps, strict=True):
        seen.did.append([])
        seen.queued.append([])
        seen.invoked.append([])
        env.process(actor(seen, cpu, todo, run.ahead))  # type: ignore[arg-type]
    for call in run.calls:
        env.process(caller(seen, call))  # type: ignore[arg-type]
    env.run()
    return seen


def quiescent(did: list[tuple[int, int, str]], start: int, end: int) -> bool:
    """Whether a CPU was somewhere in [start, end] where no reader can be: outside the kernel."""
    if not did or start < did[0][0]:
        return True
    for begin, until, kind in did:
        if kind in ("guest", "user", "sleep") and begin <= end and until >= start:
            return True
        if kind == "switch" and start <= begin <= end:
            return True
    return False


def one_at_a_time(run: Run, seen: Seen) -> None:
    assert [row[0] for row in seen.periods] == list(range(1, len(seen.periods) + 1))
    for _, start, end, _ in seen.periods:
        assert start < end
    for (_, _, end, _), (_, start, _, _) in pairwise(seen.periods):
        assert end <= start


def no_reader_outlives_a_grace_period_that_it_precedes(run: Run, seen: Seen) -> None:
    for _, start, end, _ in seen.periods:
        for did in seen.did:
            for begin, until, kind in did:
                if kind in ("atomic", "spin") and begin < start:
                    assert until <= end, f"reader [{begin}, {until}) over [{start}, {end}]"


def every_cpu_is_quiescent_in_every_grace_period(run: Run, seen: Seen) -> None:
    """Preemption on is enough in a preemptible kernel, and in others once they are pressed."""
    press_ns = 0 if run.small else 100_000_000
    for _, start, end, _ in seen.periods:
        not_quiescent = 0
        for did in seen.did:
            preemptible = any(
                kind in ("kernel", "switch") and begin <= end and until > start
                for begin, until, kind in did
            )
            if preemptible and (run.preemptible or end - start > press_ns):
                continue
            not_quiescent += not quiescent(did, start, end)
        assert not_quiescent <= 1, "the only exception is where the kthread ran"


def callbacks_run_once_in_order_and_after_a_full_grace_period(run: Run, seen: Seen) -> None:
    for queued, invoked in zip(seen.queued, seen.invoked, strict=True):
        in_time = sorted(queued, key=lambda row: row[0])  # stable: as called, at one time
        when = {serial: t for t, serial in queued}
        assert sorted(serial for _, serial in invoked) == sorted(when)
        assert [when[serial] for _, serial in invoked] == [t for t, _ in in_time]
        assert all(a <= b for (a, _), (b, _) in pairwise(invoked))
        for t_invoked, serial in invoked:
            assert any(
                when[serial] < start and end <= t_invoked for _, start, end, _ in seen.periods
            ), f"queued {when[serial]}, invoked {t_invoked}, periods {seen.periods}"


def in_the_end_all_is_done_and_nothing_is_planned(run: Run, seen: Seen) -> None:
    assert seen.rcu.idle
    assert not seen.rcu.running
    assert seen.env.peek() == float("inf")


PROMISES = (
    one_at_a_time,
    no_reader_outlives_a_grace_period_that_it_precedes,
    every_cpu_is_quiescent_in_every_grace_period,
    callbacks_run_once_in_order_and_after_a_full_grace_period,
    in_the_end_all_is_done_and_nothing_is_planned,
)


#: Overload on the only CPU: as a grace period ends, the kthread itself asks for the next one.
OVERLOAD = Run(
    hz=300,
    preemptible=True,
    nohz_full=frozenset(),
    offloaded=frozenset(),
    lazy=False,
    steps=[[]],
    calls=[
        (361_228, 0, 150, 1, 100),
        (13_333_332, 0, 15, 1, 100),
        (3_333_333, 0, 150, 1_000, 100),
        (9_663, 0, 15, 1, 300_000),
        (9_663, 0, 150, 1_000, 100),
        (3_333_333, 0, 150, 1_000, 100),
        (295, 0, 1, 1, 0),
        (1_288, 0, 150, 1_000, 100),
    ],
    small=True,
    ahead=3,
)


@example(OVERLOAD)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_rcu_keeps_its_promises(run: Run) -> None:
    seen = simulate(run)
    for promise in PROMISES:
        promise(run, seen)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_the_same_run_twice_is_the_same(run: Run) -> None:
    first, second = simulate(run), simulate(run)
    assert first.periods == second.periods
    assert first.invoked == second.invoked
