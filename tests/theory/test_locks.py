"""The queued rwlock against queueing theory.

Free atomics and hand-overs leave a single server, first come first served, for writers. Means are
compared by independent replications: the closed form has to lie inside Student's interval around
their mean. The confidence is 99.9 % for each row, so that all rows together are wrong once in some
thirty sets of seeds; the seeds below were taken once. What is deterministic is compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from math import comb, exp, prod, sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import stats
from simpy import Environment, Event
from worlds import Acquisition, acquisitions

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.qrwlock import FAST, QueuedRwlock
from simkvm.kernel.task import acquired, reach

CONFIDENCE = 0.999
REPLICATIONS = 20
SERVICE_NS = 10_000
FREE = LineCosts(same_ns=0, transfer_ns=0, remote_ns=0, cpus_per_node=64)
READ, WRITE = 0, 1

Draw = Callable[[np.random.Generator], int]


def streams(row: int) -> list[np.random.Generator]:
    """A random stream for each replication of table row ``row``."""
    return [np.random.default_rng([20230526, row, number]) for number in range(REPLICATIONS)]


def interval(means: list[float]) -> tuple[float, float]:
    """Student's interval for the mean of independent replications."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * np.std(means, ddof=1)
    centre = float(np.mean(means))
    return centre - half / sqrt(len(means)), centre + half / sqrt(len(means))


def agrees(theory: float, means: list[float]) -> None:
    low, high = interval(means)
    deviation = float(np.mean(means)) / theory - 1
    assert low <= theory <= high, f"theory {theory:.6g}, measured {low:.6g} to {high:.6g}"
    assert abs(deviation) < 0.1, f"too few samples to tell: off by {deviation:.1%}"


def exponential(mean_ns: float) -> Draw:
    return lambda rng: round(rng.exponential(mean_ns))


def constant(value_ns: int) -> Draw:
    return lambda _: value_ns


# -- open: Poisson arrivals ------------------------------------------------------------------------


class Sampled(NamedTuple):
    """Acquisitions of one run after its warm-up, and the time that they span."""

    rows: list[Acquisition]
    span_ns: int


def poisson(
    rng: np.random.Generator, gap_ns: float, service: Draw, mode: int, count: int, warm_up: int
) -> Sampled:
    """Poisson arrivals at a lock whose sections last ``service``, each from a CPU of its own."""
    env = Environment()
    lock = QueuedRwlock(env, FREE, handoff_ns=0, next_ns=0)
    ask = lock.write if mode == WRITE else lock.read
    arrivals = np.cumsum(rng.exponential(gap_ns, count)).astype(np.int64).tolist()

    def section(entry: int) -> tuple[int, int]:
        hold = service(rng)
        return hold, entry + hold

    def source() -> Generator[Event, Any, None]:
        for number, t_ns in enumerate(arrivals):
            yield from reach(env, t_ns)
            ask(t_ns, number % 64, 0, section)

    env.process(source())
    env.run()
    rows = acquisitions(lock.rows)
    assert len(rows) == count
    kept = sorted(rows, key=lambda row: row.arrival)[warm_up:]
    return Sampled(kept, kept[-1].arrival - kept[0].arrival)


@pytest.fixture(
    scope="module", params=[("M/D/1", 0.5), ("M/D/1", 0.8), ("M/M/1", 0.5), ("M/M/1", 0.7)]
)
def writers(request: pytest.FixtureRequest) -> tuple[str, float, list[Sampled]]:
    """(law of service, load, replications), warmed up for several relaxation times."""
    law, load = request.param
    service = constant(SERVICE_NS) if law == "M/D/1" else exponential(SERVICE_NS)
    row = 100 * (law == "M/M/1") + round(10 * load)
    runs = [
        poisson(rng, SERVICE_NS / load, service, WRITE, count=8000, warm_up=500)
        for rng in streams(row)
    ]
    return law, load, runs


def test_writers_wait_as_pollaczek_and_khinchine_say(
    writers: tuple[str, float, list[Sampled]],
) -> None:
    """Mean wait = load * E[S^2] / (2 E[S] (1 - load)): half as long if service is constant."""
    law, load, runs = writers
    second_moment = (1 if law == "M/D/1" else 2) * SERVICE_NS**2
    theory = load / SERVICE_NS * second_moment / (2 * (1 - load))
    agrees(theory, [float(np.mean([row.wait for row in run.rows])) for run in runs])


def test_the_lock_is_busy_for_rate_times_service(
    writers: tuple[str, float, list[Sampled]],
) -> None:
    """Utilisation law; and who finds it idle does not wait (arrivals see time averages)."""
    _, load, runs = writers
    agrees(load, [sum(row.hold for row in run.rows[:-1]) / run.span_ns for run in runs])
    agrees(1 - load, [float(np.mean([row.met == FAST for row in run.rows])) for run in runs])


def test_the_queue_is_rate_times_wait(writers: tuple[str, float, list[Sampled]]) -> None:
    """Little's law: Poisson arrivals meet the mean queue, which is rate times mean wait."""
    law, load, runs = writers
    theory = load**2 / (1 - load) / (2 if law == "M/D/1" else 1)
    agrees(theory, [float(np.mean([max(row.met, 0) for row in run.rows])) for run in runs])


def test_readers_never_wait_and_overlap_as_m_d_infinity() -> None:
    """Mean number inside = rate * hold, whatever the number of readers: here 5 at a time."""
    runs = [
        poisson(rng, SERVICE_NS / 5, constant(SERVICE_NS), READ, count=5000, warm_up=50)
        for rng in streams(300)
    ]
    assert {(row.wait, row.met) for run in runs for row in run.rows} == {(0, FAST)}
    agrees(5, [sum(row.hold for row in run.rows[:-1]) / run.span_ns for run in runs])


# -- closed: N threads, each thinks, then asks -----------------------------------------------------


def closed(
    threads: list[int],
    think: Draw,
    service: dict[int, Draw],
    until_ns: int,
    rng: np.random.Generator,
    costs: LineCosts = FREE,
    handoff_ns: int = 0,
    next_ns: int = 0,
) -> list[Acquisition]:
    """``threads``: the mode of each, all on CPUs of their own. Returns the lock's account."""
    env = Environment()
    lock = QueuedRwlock(env, costs, handoff_ns, next_ns)

    def thread(cpu: int, mode: int) -> Generator[Event, Any, None]:
        ask = lock.write if mode == WRITE else lock.read

        def section(entry: int) -> tuple[int, int]:
            hold = service[mode](rng)
            return hold, entry + hold

        t_ns = think(rng)
        while t_ns < until_ns:
            yield from reach(env, t_ns)
            t_ns = yield from acquired(ask(t_ns, cpu, mode, section))
            t_ns += think(rng)

    for cpu, mode in enumerate(threads):
        env.process(thread(cpu, mode))
    env.run()
    return acquisitions(lock.rows)


def mean_value_analysis(threads: int, think_ns: float, service_ns: float) -> tuple[float, float]:
    """Throughput per ns and mean wait of the closed network with exponential service, exactly."""
    queue = throughput = response = 0.0
    for population in range(1, threads + 1):
        response = service_ns * (1 + queue)
        throughput = population / (think_ns + response)
        queue = throughput * response
    return throughput, response - service_ns


def machine_repair(
    threads: int, think_ns: float, service_ns: float, transform: Callable[[float], float]
) -> float:
    """Throughput per ns of M/G/1//N, from its mean busy period (Takacs, Theory of Queues, 1962).

    ``transform``: Laplace-Stieltjes transform of the service time.
    """
    rate = 1 / think_ns
    services = sum(
        comb(threads - 1, i) * prod(1 / transform(j * rate) - 1 for j in range(1, i + 1))
        for i in range(threads)
    )
    return services / (services * service_ns + think_ns / threads)


@pytest.mark.parametrize("threads", [1, 2, 5, 12])
def test_the_two_closed_forms_agree_where_both_apply(threads: int) -> None:
    think, service = 60_000.0, 10_000.0
    throughput = machine_repair(threads, think, service, lambda s: 1 / (1 + s * service))
    assert throughput == pytest.approx(mean_value_analysis(threads, think, service)[0])


@pytest.mark.parametrize("law", ["constant", "exponential"])
@pytest.mark.parametrize("threads", [2, 8])
def test_closed_loop_writers_repair_machines(threads: int, law: str) -> None:
    """Throughput, and by Little's law the wait, of N writers that think for a random time."""
    think_ns, until_ns = 50_000.0, 25_000_000
    if law == "constant":
        service, theory = (
            constant(SERVICE_NS),
            machine_repair(threads, think_ns, SERVICE_NS, lambda s: exp(-s * SERVICE_NS)),
        )
    else:
        service = exponential(SERVICE_NS)
        theory = mean_value_analysis(threads, think_ns, SERVICE_NS)[0]
    warm_ns = 10 * think_ns
    rates, waits = [], []
    for rng in streams(400 + threads + 50 * (law == "constant")):
        rows = closed([WRITE] * threads, exponential(think_ns), {WRITE: service}, until_ns, rng)
        kept = [row for row in rows if warm_ns <= row.arrival < until_ns]
        rates.append(len(kept) / (until_ns - warm_ns))
        waits.append(float(np.mean([row.wait for row in kept])))
    agrees(theory, rates)
    agrees(threads / theory - think_ns - SERVICE_NS, waits)


def test_saturated_writers_share_the_lock_evenly() -> None:
    """No think time: one after the other, each waits for all the others, to the nanosecond."""
    threads, hold, handoff = 6, 700, 40
    rows = closed(
        [WRITE] * threads,
        constant(0),
        {WRITE: constant(hold)},
        500_000,
        np.random.default_rng(0),
        handoff_ns=handoff,
    )
    steady = rows[threads:-threads]
    assert {row.wait for row in steady} == {(threads - 1) * hold + threads * handoff}
    entries = np.array([row.entry for row in steady])
    assert set(np.diff(entries).tolist()) == {hold + handoff}


@pytest.mark.parametrize(("readers", "writers"), [(1, 1), (3, 1), (5, 2)])
def test_readers_and_writers_alternate_in_rounds(readers: int, writers: int) -> None:
    """Nobody thinks, the line is FIFO: a round is one batch of readers, then writers one by one.

    Queued readers enter ``next_ns`` after one another, so the last of R leaves (R - 1) next_ns
    later, and every change of holder costs a hand-over.
    """
    read_ns, write_ns, handoff, following = 900, 400, 30, 11
    rows = closed(
        [READ] * readers + [WRITE] * writers,
        constant(0),
        {READ: constant(read_ns), WRITE: constant(write_ns)},
        400_000,
        np.random.default_rng(0),
        handoff_ns=handoff,
        next_ns=following,
    )
    first_in_round = [
        row.entry for row, last in zip(rows[1:], rows, strict=False) if row.mode < last.mode
    ]
    rounds = np.diff(first_in_round)[2:-1]
    theory = (read_ns + (readers - 1) * following + handoff) + writers * (write_ns + handoff)
    assert len(rounds) > 50
    assert set(rounds.tolist()) == {theory}


# -- the line of the lock word ---------------------------------------------------------------------


def read_rate(threads: int, think_ns: int, hold_ns: int, costs: LineCosts) -> tuple[int, int]:
    """Readers alone: sections begun, in how many nanoseconds."""
    until_ns = 400_000
    rows = closed(
        [READ] * threads,
        constant(think_ns),
        {READ: constant(hold_ns)},
        until_ns,
        np.random.default_rng(0),
        costs,
    )
    entries = sorted(row.entry for row in rows)
    return len(entries) - 1, entries[-1] - entries[0]


@pytest.mark.parametrize("transfer_ns", [50, 65])
@pytest.mark.parametrize("threads", [16, 48])
def test_readers_saturate_at_two_transfers_a_section(threads: int, transfer_ns: int) -> None:
    """Each section is two atomics, each fetches the line: 1 / (2 * transfer), not one reader more.

    A run of n sections cannot differ from that by more than its first and last cycle.
    """
    think_ns, hold_ns = 600, 100
    costs = LineCosts(7, transfer_ns, transfer_ns, cpus_per_node=64)
    assert threads * 2 * transfer_ns > think_ns + hold_ns + 2 * transfer_ns, "more than enough"
    sections, elapsed_ns = read_rate(threads, think_ns, hold_ns, costs)
    cycle_ns = 2 * transfer_ns * threads
    assert abs(elapsed_ns - sections * 2 * transfer_ns) <= 2 * cycle_ns


def test_a_lone_reader_keeps_the_line() -> None:
    costs = LineCosts(7, 65, 65, cpus_per_node=64)
    sections, elapsed_ns = read_rate(1, 600, 100, costs)
    assert elapsed_ns == sections * (600 + 100 + 7)


def test_few_readers_are_not_bound_by_the_line() -> None:
    """Below saturation, a thread's cycle is what it does itself; nobody waits for long."""
    costs = LineCosts(7, 65, 65, cpus_per_node=64)
    sections, elapsed_ns = read_rate(2, 1500, 100, costs)
    least, most = 1500 + 100 + 7, 1500 + 100 + 4 * 65
    assert 2 * elapsed_ns / most - 2 <= sections <= 2 * elapsed_ns / least + 2
