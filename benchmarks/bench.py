"""Speed and memory as ratios measured side by side in one run (``make bench``).

Every figure has a baseline that runs in the same process a moment before or after, several times in
turn, and the medians are compared: a slow machine slows both. Writes ``benchmarks/latest.json``.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from heapq import heapreplace
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from simkvm.guest.patterns import CHUNK_TOUCHES
from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.qrwlock import QueuedRwlock
from simkvm.kernel.world import World
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario

HERE = Path(__file__).parent
ROUNDS = 5
HOLD_NS = 100


def timed(work: Callable[[], int]) -> float:
    """Units of work a second of CPU time."""
    start = time.process_time()
    done = work()
    return done / (time.process_time() - start)


def side_by_side(ours: Callable[[], int], baseline: Callable[[], int]) -> tuple[float, float]:
    """Median rates of both, run in turn; one round of each first, uncounted."""
    rates: list[tuple[float, float]] = [(timed(ours), timed(baseline)) for _ in range(ROUNDS + 1)]
    return (
        statistics.median(rate for rate, _ in rates[1:]),
        statistics.median(rate for _, rate in rates[1:]),
    )


# -- the lock -----------------------------------------------------------------------------------


def our_lock(waiters: int = 10, cycles: int = 6000) -> int:
    """Writers that take the lock over and over, with accounting on."""
    env = simpy.Environment()
    lock = QueuedRwlock(env, LineCosts(7, 65, 65, 80), handoff_ns=100, next_ns=50)

    def section(entry_ns: int) -> tuple[int, int]:
        return HOLD_NS, entry_ns + HOLD_NS

    def writer(cpu: int) -> Any:
        t_ns = 0
        for _ in range(cycles):
            grant = lock.write(t_ns, cpu, 0, section)
            if isinstance(grant, int):
                yield env.timeout(grant - t_ns)
                t_ns = grant
            else:
                t_ns = yield grant

    for cpu in range(waiters):
        env.process(writer(cpu))
    env.run()
    assert len(lock.rows) == 6 * waiters * cycles
    return waiters * cycles


def simpy_lock(waiters: int = 10, cycles: int = 6000) -> int:
    """The same with ``simpy.Resource``, without any accounting."""
    env = simpy.Environment()
    lock = simpy.Resource(env)

    def writer() -> Any:
        for _ in range(cycles):
            with lock.request() as request:
                yield request
                yield env.timeout(HOLD_NS)

    for _ in range(waiters):
        env.process(writer())
    env.run()
    return waiters * cycles


# -- faults -------------------------------------------------------------------------------------


def scenario(**changes: Any) -> Scenario:
    """The access-tracking selftest: 32 vCPUs fill memory while a thread ages it."""
    content: dict[str, Any] = {
        "name": "bench",
        "machine": "ampere-altra-80c",
        "kernel": "linux-6.12",
        "guests": {
            "vm0": {
                "vcpus": 32,
                "memory_per_vcpu": 8 << 20,
                "access": {"pattern": "populate"},
            }
        },
        "ageing": {},
    }
    return Scenario.model_validate(content | changes)


def world_of(scene: Scenario) -> World:
    """Its world, not yet run."""
    return World(scene, load_machine(scene.machine), load_kernel(scene.kernel))


def fault_run() -> tuple[float, float]:
    """Faults and SimPy events a second of CPU time of one run, its building apart."""
    world = world_of(scenario())
    start = time.process_time()
    record = world.run()
    spent = time.process_time() - start
    return int(record.summary["faults"]) / spent, int(record.summary["events"]) / spent


def bare_loop(processes: int = 32, events: int = 3000) -> int:
    """SimPy's own speed: processes that only sleep."""
    env = simpy.Environment()

    def sleeper(delay: int) -> Any:
        for _ in range(events):
            yield env.timeout(delay)

    for number in range(processes):
        env.process(sleeper(100 + number))
    env.run()
    return processes * events


# -- touches ------------------------------------------------------------------------------------

TOUCHES = 200 * CHUNK_TOUCHES


def touch_run() -> int:
    """Touches of warm memory by one vCPU, with ageing and the TLB."""
    guest = {
        "memory": 64 << 20,
        "access": {
            "pattern": "phases",
            "phases": [
                {"pattern": "populate"},
                {"pattern": "uniform", "touches": TOUCHES, "think": 20},
            ],
        },
    }
    world = world_of(scenario(guests={"vm0": guest}, ageing={"interval": 1_000_000}))
    return int(world.run().summary["touches"])


def numpy_touches() -> int:
    """What NumPy alone needs to draw as many pages and mark them."""
    rng = np.random.Generator(np.random.Philox(1))
    state = np.zeros(16384, np.uint8)
    for _ in range(TOUCHES // CHUNK_TOUCHES):
        state[rng.integers(0, 16384, CHUNK_TOUCHES)] |= 1
    return TOUCHES


# -- requests -----------------------------------------------------------------------------------

WORKERS, CONNECTIONS = 64, 256
SERVICE_NS, NETWORK_NS = 15_000, 50_000


def request_run() -> int:
    """Requests of a server on 64 vCPUs that has all its memory."""
    access = {
        "pattern": "memcached",
        "clients": CONNECTIONS,
        "service": SERVICE_NS,
        "network": NETWORK_NS,
    }
    guest = {"vcpus": WORKERS, "memory": 1 << 30, "mapped": True, "access": access}
    scene = scenario(guests={"vm0": guest}, ageing=None, duration=50_000_000)
    return int(world_of(scene).run().summary["requests"])


def heap_of_requests(requests: int = 200_000) -> int:
    """The same queues alone, as a heap for each worker: who asks when."""
    each = CONNECTIONS // WORKERS
    for _ in range(WORKERS):
        clients, free = [(at, at) for at in range(each)], 0
        for _ in range(requests // WORKERS):
            arrival, client = clients[0]
            free = max(free, arrival) + SERVICE_NS
            heapreplace(clients, (free + NETWORK_NS, client))
    return requests


# -- memory -------------------------------------------------------------------------------------

BIG_GUEST = """
import resource, sys
sys.path.insert(0, {folder!r})
from bench import scenario, world_of
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
guest = {{"vcpus": 4, "memory": 64 << 30, "access": {{"pattern": "uniform", "touches": 2000}}}}
world = world_of(scenario(guests={{"vm0": guest}}, ageing={{"passes": 2}}))
kvm = world.kvms[0]
for array in (kvm.stage2.leaf.entries, kvm.host.state,
              kvm.host.lru._generation, kvm.host.lru._referenced):
    array.fill(array[0])   # every page of every array is really there
record = world.run()
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def big_guest_bytes() -> tuple[int, int]:
    """Peak resident memory before and with a guest of 64 GiB at 4 KiB."""
    code = BIG_GUEST.format(folder=str(HERE))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, peak = (int(word) * 1024 for word in done.stdout.split())
    return before, peak


@dataclass(frozen=True)
class Figure:
    """One row of the report: a value, and what it is measured against."""

    name: str
    value: float
    unit: str
    baseline: str
    of: float
    goal: str

    @property
    def ratio(self) -> float:
        """The value in units of its baseline."""
        return self.value / self.of


def measure() -> list[Figure]:
    """All figures, each beside its baseline."""
    lock, reference = side_by_side(our_lock, simpy_lock)
    rates = [(*fault_run(), timed(bare_loop)) for _ in range(ROUNDS)]
    faults, events, bare = (statistics.median(column) for column in zip(*rates, strict=True))
    touches, plain = side_by_side(touch_run, numpy_touches)
    requests, queues = side_by_side(request_run, heap_of_requests)
    before, peak = big_guest_bytes()
    sleep = "bare SimPy timeouts"
    return [
        Figure("lock cycles", lock, "/s", "simpy.Resource, 10 waiters", reference, ">= 3x"),
        Figure("fault run, events", events, "/s", sleep, bare, ">= 0.4x"),
        Figure("fault run, faults", faults, "/s", sleep, bare, "-"),
        Figure("touches", touches, "/s", "NumPy draw and mark", plain, "-"),
        Figure("requests", requests, "/s", "a heap for each worker", queues, "-"),
        Figure(
            "64 GiB guest, peak", peak / 1e6, "MB", "the process before", before / 1e6, "<= 500"
        ),
    ]


def main() -> None:
    """Measure, print and write."""
    figures = measure()
    print(f"{'figure':<20}{'value':>12} {'unit':<4}{'baseline':>12}{'ratio':>8}  goal")
    for row in figures:
        print(
            f"{row.name:<20}{row.value:>12,.0f} {row.unit:<4}{row.of:>12,.0f}{row.ratio:>7.2f}x"
            f"  {row.goal:<8} ({row.baseline})"
        )
    report = {
        "python": platform.python_version(),
        "simpy": simpy.__version__,
        "figures": [asdict(row) | {"ratio": row.ratio} for row in figures],
    }
    (HERE / "latest.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
