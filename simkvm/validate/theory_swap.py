"""Swap devices against queueing theory, through the calls that faults and reclaim make.

The host's own part is switched off, so that a read takes what the drive takes: M/D/c and M/G/1 of
readers that come at random, M/M/c//N of readers that think and sleep, and what a drive or the
memory gives at most to those that never think.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, Any

from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.dram import Dram
from simkvm.kernel.latency import TAIL, Latencies, LatencyLaw
from simkvm.kernel.swap import SwapDevice
from simkvm.kernel.task import Task, reach
from simkvm.scenario.machine import load_machine
from simkvm.scenario.swap import Nvme, Swap, Zram
from simkvm.units import NS_PER_S
from simkvm.validate import queueing
from simkvm.validate.closed_form import (
    CONFIDENCE,
    ClosedForm,
    Estimate,
    exactly,
    replicated,
    streams,
)

if TYPE_CHECKING:
    import numpy as np

REPLICATIONS = 30
MEAN_NS, P9999_NS = 90_000, 225_000  #: of the machines' NVMe drives
PAGE_BYTES = 4096
FREE = dict.fromkeys(
    (
        *("swap_slot_ns", "swap_cache_ns", "bio_ns", "block_request_ns", "block_interrupt_ns"),
        *("wakeup_ns", "context_switch_ns"),
    ),
    0,
)
LAW = "a floor and an exponential tail, see simkvm.kernel.latency"
DEMAND = "service demand law; Denning and Buzen, Computing Surveys 10 (1978), 225-261"


def closed_forms() -> list[ClosedForm]:
    """The law of latencies, open and closed queues of readers, and what there is at most."""
    return [
        _mean_latency(),
        _longest_in_10000(),
        _readers_at_random("m-d-4", 4, 0.8, MEAN_NS),
        _readers_at_random("m-g-1", 1, 0.7, 6 * MEAN_NS),
        _readers_that_think(8, 2),
        _all_channels(40, 4),
        _all_bandwidth("read"),
        _all_bandwidth("write"),
        _all_memory(),
    ]


# -- the law of latencies --------------------------------------------------------------------------


def _mean_latency() -> ClosedForm:
    """A read that meets nobody, one at a time."""

    def mean_ns(rng: np.random.Generator) -> float:
        drive, task = device(Nvme(), rng), reader()
        gap_ns = 100 * MEAN_NS
        for number in range(4_000):
            at_once(drive.read(task, number * gap_ns))
        return drive.latencies.mean

    name = "swap/alone"
    return ClosedForm(
        f"{name}/mean",
        "reads of an idle drive: mean latency",
        "ns",
        MEAN_NS,
        lambda: replicated([mean_ns(rng) for rng in streams(name, REPLICATIONS)]),
        f"{LAW}, with the published mean",
    )


def _longest_in_10000() -> ClosedForm:
    """Its interval is between two order statistics: no assumption about the law."""
    name, number = "swap/p9999", 200_000

    def measure() -> Estimate:
        import numpy as np

        law = LatencyLaw.of(MEAN_NS, P9999_NS)
        drawn = [Latencies(law, rng).draw(number) for rng in streams(name, REPLICATIONS)]
        longest = np.sort(np.concatenate([np.sort(times)[-number // 100 :] for times in drawn]))
        return _quantile(longest[::-1], REPLICATIONS * number, 1 / 10_000)

    return ClosedForm(
        f"{name}/latency",
        "latencies of a drive: what one in 10,000 exceeds",
        "ns",
        P9999_NS,
        measure,
        f"{LAW}, with the published p99.99",
    )


def _quantile(longest: np.ndarray[Any, Any], number: int, share: float) -> Estimate:
    """What ``share`` of ``number`` values exceed; ``longest``: the largest of them, falling.

    How many exceed the quantile is binomial, by the normal approximation with some hundreds.
    """
    from statistics import NormalDist

    expected = number * share
    spread = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * (expected * (1 - share)) ** 0.5
    ranks = (round(expected), int(expected + spread) + 1, int(expected - spread) - 1)
    value, low, high = (float(longest[rank]) for rank in ranks)
    return Estimate(value, low, high)


# -- readers that come at random -------------------------------------------------------------------


def _readers_at_random(law: str, channels: int, load: float, p9999_ns: int) -> ClosedForm:
    """Poisson arrivals at a drive of ``channels``: the wait for one of them."""
    name = f"swap/{law}/{load}"
    spec = Nvme(
        channels=channels,
        read_latency=MEAN_NS,
        read_p9999=p9999_ns,
        read_bandwidth=1 << 50,
    )

    def wait_ns(rng: np.random.Generator) -> float:
        import numpy as np

        drive, task = device(spec, rng), reader()
        gaps = rng.exponential(MEAN_NS / load / channels, 20_000)
        times = np.cumsum(gaps).astype(np.int64).tolist()
        ends = [at_once(drive.read(task, t_ns)) for t_ns in times]
        return float(np.mean(np.array(ends) - times, where=np.arange(len(times)) >= 500)) - MEAN_NS

    if p9999_ns == MEAN_NS:
        said = f"M/D/{channels}"
        expected = queueing.mean_wait_m_d_c(load, MEAN_NS, channels)
        source = "Crommelin, Post Office Electrical Engineers' Journal 25 (1932), 41-50"
    else:
        said = f"M/G/{channels}"
        tail_ns = (p9999_ns - MEAN_NS) / (TAIL - 1)
        expected = queueing.mean_wait(load, MEAN_NS, (tail_ns / MEAN_NS) ** 2)
        source = f"Pollaczek and Khinchine; Kleinrock, Queueing Systems I, eq. 5.70; {LAW}"
    return ClosedForm(
        f"{name}/wait",
        f"{said} readers of a drive, load {load}: mean wait",
        "ns",
        expected,
        lambda: replicated([wait_ns(rng) for rng in streams(name, REPLICATIONS)]),
        source,
    )


# -- readers that think ----------------------------------------------------------------------------


def _readers_that_think(readers: int, channels: int) -> ClosedForm:
    """Both times exponential: the latency has no floor if p99.99 is ln(10,000) means."""
    name, think_ns, until_ns = f"swap/repair/{readers}-{channels}", 200_000.0, 100_000_000
    spec = Nvme(
        channels=channels,
        read_latency=MEAN_NS,
        read_p9999=int(TAIL * MEAN_NS),
        read_bandwidth=1 << 50,
    )

    def reads(rng: np.random.Generator) -> float:
        env = Environment()
        drive = device(spec, rng, env)

        def think_and_read() -> Generator[Event, Any, None]:
            task, t_ns = reader(), 0
            while t_ns < until_ns:
                t_ns = yield from reach(env, t_ns + round(rng.exponential(think_ns)))
                t_ns = yield from drive.read(task, t_ns)
                counted.append(until_ns // 20 <= t_ns < until_ns)

        counted: list[bool] = []
        for _ in range(readers):
            env.process(think_and_read())
        env.run()
        return sum(counted) / (until_ns - until_ns // 20) * 1e9

    return ClosedForm(
        f"{name}/rate",
        f"{readers} readers that think, then read from a drive of {channels} channels: reads",
        "1/s",
        queueing.channels_repair(readers, think_ns, MEAN_NS, channels) * 1e9,
        lambda: replicated([reads(rng) for rng in streams(name, REPLICATIONS)]),
        "birth and death, M/M/c//N; Kleinrock, Queueing Systems I, section 3.9",
    )


# -- what there is at most -------------------------------------------------------------------------


def _all_channels(readers: int, channels: int) -> ClosedForm:
    """Readers that never think keep all channels busy."""
    spec = Nvme(channels=channels, read_latency=MEAN_NS, read_p9999=MEAN_NS, read_bandwidth=1 << 50)
    return ClosedForm(
        f"swap/saturated/channels/{channels}",
        f"{readers} readers keep {channels} channels busy: time between two reads",
        "ns",
        MEAN_NS / channels,
        partial(_between, spec, "read", readers, channels),
        DEMAND,
        drawn=False,
    )


def _all_bandwidth(way: str) -> ClosedForm:
    """With channels to spare it is the data that take time."""
    page_ns = 2048
    spec = Nvme.model_validate(
        {
            "channels": 1024,
            f"{way}_latency": MEAN_NS,
            f"{way}_p9999": MEAN_NS,
            f"{way}_bandwidth": PAGE_BYTES * NS_PER_S // page_ns,
        }
    )
    return ClosedForm(
        f"swap/saturated/bandwidth/{way}",
        f"a drive of 2 GB/s that is asked all the time: time between two pages, {way}",
        "ns",
        page_ns,
        partial(_between, spec, way, 200, 1),
        DEMAND,
        drawn=False,
    )


def _all_memory() -> ClosedForm:
    """Many CPUs decompress at once: what they write is more than the memory takes."""
    page_ns = 100
    memory = {"dram_bw_total_bytes_per_s": PAGE_BYTES * NS_PER_S // page_ns}
    return ClosedForm(
        "swap/saturated/zram",
        "64 CPUs that decompress pages all the time: time between two, by memory bandwidth",
        "ns",
        page_ns,
        partial(_between, Zram(), "read", 64, 1, memory),
        DEMAND,
        drawn=False,
    )


def _between(
    spec: Swap, way: str, callers: int, together: int, machine: Mapping[str, float] | None = None
) -> Estimate:
    """Mean time between the pages of ``callers`` that ask for one after another.

    Over a whole number of rounds, in each of which ``together`` are complete at once.
    """
    import numpy as np

    made = device(spec, np.random.default_rng(0), machine=machine)
    task, ends = reader(), []
    due = [(0, caller) for caller in range(callers)]
    heapify(due)
    for _ in range(callers * 10):
        t_ns, caller = due[0]
        if way == "read":
            end_ns = at_once(made.read(task, t_ns))
        else:
            (end_ns,) = at_once(made.write(task, t_ns, 1))[1]
        ends.append(end_ns)
        heapreplace(due, (end_ns, caller))
    steady = np.sort(ends)[callers:]
    rounds = (len(steady) - 1) // together * together
    return exactly(float((steady[rounds] - steady[0]) / rounds))


# -- the model -------------------------------------------------------------------------------------


def device(
    spec: Swap,
    rng: np.random.Generator,
    env: Environment | None = None,
    machine: Mapping[str, float] | None = None,
) -> SwapDevice:
    """``spec`` on a host whose own part costs nothing."""
    host = load_machine({"base": "ampere-altra-80c", "set": {**FREE, **(machine or {})}})
    return SwapDevice.of(env or Environment(), spec, host, rng, Dram.of(host))


def reader() -> Task:
    """A thread on a CPU of its own, in the kernel."""
    task = Task("reader", Cpu(0))
    task.cpu.enter_kernel(0)
    return task


def at_once(steps: Generator[Event, Any, Any]) -> Any:
    """What ``steps`` come to where nothing else happens: no event is waited for."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise AssertionError("an event in an empty environment")
