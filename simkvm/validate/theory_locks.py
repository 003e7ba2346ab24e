"""The queued rwlock and the line of its word against queueing theory.

Free atomics and hand-overs leave a single server, first come first served, for writers, and none
for readers. With costs, what nobody draws is periodic and known to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from simpy import Environment, Event

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.qrwlock import FAST, ROW, QueuedRwlock
from simkvm.kernel.task import acquired, reach
from simkvm.validate import queueing
from simkvm.validate.closed_form import ClosedForm, Estimate, replicated, streams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REPLICATIONS = 30
SERVICE_NS = 10_000
LONG = 2.0  #: a wait is long beyond so many services
READ, WRITE = 0, 1
FREE = LineCosts(same_ns=0, transfer_ns=0, remote_ns=0, cpus_per_node=64)

Draw = Callable[["np.random.Generator"], int]


class Account(NamedTuple):
    """Acquisitions in order of arrival, a column each; all times in ns."""

    mode: NDArray[np.int64]
    arrival: NDArray[np.int64]
    wait: NDArray[np.int64]
    hold: NDArray[np.int64]
    met: NDArray[np.int64]

    @classmethod
    def of(cls, lock: QueuedRwlock) -> Account:
        """The account of ``lock``."""
        import numpy as np

        _, *columns = np.array(lock.rows, np.int64).reshape(-1, ROW).T
        order = np.argsort(columns[1], kind="stable")
        return cls(*(column[order] for column in columns))

    def where(self, kept: NDArray[np.bool_] | slice) -> Account:
        """Some of them."""
        return Account(*(column[kept] for column in self))


def closed_forms() -> list[ClosedForm]:
    """Open and closed queues of writers, readers, both, and the line of the lock word."""
    return [
        *_open_writers("m-d-1", 0.5),
        *_open_writers("m-d-1", 0.8),
        *_open_writers("m-m-1", 0.5),
        *_open_writers("m-m-1", 0.7),
        _readers_inside(),
        *(form for law in ("constant", "exponential") for n in (2, 8) for form in _closed(law, n)),
    ]


# -- open: Poisson arrivals ------------------------------------------------------------------------


def exponential(mean_ns: float) -> Draw:
    """Draws of an exponential time."""
    return lambda rng: round(rng.exponential(mean_ns))


def constant(value_ns: int) -> Draw:
    """The same every time."""
    return lambda _: value_ns


def poisson(
    rng: np.random.Generator, gap_ns: float, service: Draw, mode: int, count: int, warm_up: int
) -> Account:
    """Poisson arrivals at a free lock, each on its own CPU, without the first ``warm_up``."""
    import numpy as np

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
    return Account.of(lock).where(slice(warm_up, None))


def _busy(account: Account) -> float:
    """Time inside over time, from the first arrival to the last."""
    return float(account.hold[:-1].sum() / (account.arrival[-1] - account.arrival[0]))


def _open_writers(law: str, load: float) -> list[ClosedForm]:
    """Writers that arrive at random and hold for a constant or an exponential time."""
    name = f"lock/{law}/{load}"
    said = f"{'M/D/1' if law == 'm-d-1' else 'M/M/1'} writers, load {load}"
    draw = constant(SERVICE_NS) if law == "m-d-1" else exponential(SERVICE_NS)
    variability = 0.0 if law == "m-d-1" else 1.0
    wait_ns = queueing.mean_wait(load, SERVICE_NS, variability)

    @cache
    def runs() -> list[Account]:
        return [
            poisson(rng, SERVICE_NS / load, draw, WRITE, count=12_000, warm_up=500)
            for rng in streams(name, REPLICATIONS)
        ]

    def mean(of: Callable[[Account], float]) -> Callable[[], Estimate]:
        return lambda: replicated([float(of(run)) for run in runs()])

    if law == "m-d-1":
        longer = queueing.waits_longer_m_d_1(load, LONG)
        longer_source = "Erlang, Nyt Tidsskrift for Matematik B 20 (1909), 33-39"
    else:
        longer = queueing.waits_longer_m_m_1(load, LONG)
        longer_source = "Kleinrock, Queueing Systems I, section 5.7"
    return [
        ClosedForm(
            f"{name}/wait",
            f"{said}: mean wait",
            "ns",
            wait_ns,
            mean(lambda run: run.wait.mean()),
            "Pollaczek and Khinchine; Kleinrock, Queueing Systems I, eq. 5.70",
        ),
        ClosedForm(
            f"{name}/long",
            f"{said}: share that waits longer than {LONG:g} services",
            "1",
            longer,
            mean(lambda run: (run.wait > LONG * SERVICE_NS).mean()),
            longer_source,
        ),
        ClosedForm(
            f"{name}/busy",
            f"{said}: share of time that the lock is held",
            "1",
            load,
            mean(_busy),
            "utilisation law; Denning and Buzen, Computing Surveys 10 (1978), 225-261",
        ),
        ClosedForm(
            f"{name}/idle",
            f"{said}: share that finds the lock free",
            "1",
            1 - load,
            mean(lambda run: (run.met == FAST).mean()),
            "Poisson arrivals see time averages; Wolff, Operations Research 30 (1982), 223-231",
        ),
        ClosedForm(
            f"{name}/met",
            f"{said}: waiters that one meets in the line",
            "writers",
            wait_ns * load / SERVICE_NS,
            mean(lambda run: run.met.clip(0).mean()),
            "Little's law; Little, Operations Research 9 (1961), 383-387",
        ),
    ]


def _readers_inside() -> ClosedForm:
    """Mean number inside is rate * hold, whatever the number of readers."""
    name, inside = "lock/m-d-infinity", 5

    def measure() -> Estimate:
        runs = [
            poisson(rng, SERVICE_NS / inside, constant(SERVICE_NS), READ, count=8_000, warm_up=50)
            for rng in streams(name, REPLICATIONS)
        ]
        assert not any(run.wait.any() or (run.met != FAST).any() for run in runs), "readers wait"
        return replicated([_busy(run) for run in runs])

    return ClosedForm(
        f"{name}/inside",
        "M/D/infinity readers: mean number inside",
        "readers",
        inside,
        measure,
        "Little's law; Kleinrock, Queueing Systems I, section 3.4",
    )


# -- closed: N threads, each thinks, then asks -----------------------------------------------------


def closed(
    threads: Sequence[int],
    think: Draw,
    service: dict[int, Draw],
    until_ns: int,
    rng: np.random.Generator,
    costs: LineCosts = FREE,
    handoff_ns: int = 0,
    next_ns: int = 0,
) -> Account:
    """``threads``: the mode of each, on CPUs of their own; nobody asks after ``until_ns``."""
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
    return Account.of(lock)


def _closed(law: str, threads: int) -> list[ClosedForm]:
    """Writers that think for an exponential time: throughput, and by Little's law the wait."""
    name, think_ns = f"lock/repair/{law}/{threads}", 50_000.0
    until_ns = 240_000_000 // threads  # about as many sections for any number
    warm_ns = 10 * think_ns
    if law == "constant":
        draw, transform = constant(SERVICE_NS), queueing.constant(SERVICE_NS)
        throughput = queueing.machine_repair(threads, think_ns, SERVICE_NS, transform)
        source = "Takacs, Introduction to the Theory of Queues, chapter 5"
    else:
        draw = exponential(SERVICE_NS)
        throughput = queueing.closed_network(threads, think_ns, SERVICE_NS)[0]
        source = "mean value analysis; Reiser and Lavenberg, J. ACM 27 (1980), 313-322"

    @cache
    def runs() -> list[Account]:
        made = []
        for rng in streams(name, REPLICATIONS):
            account = closed([WRITE] * threads, exponential(think_ns), {WRITE: draw}, until_ns, rng)
            made.append(account.where((account.arrival >= warm_ns) & (account.arrival < until_ns)))
        return made

    said = f"{threads} writers that think, {law} service"
    return [
        ClosedForm(
            f"{name}/rate",
            f"{said}: sections",
            "1/s",
            throughput * 1e9,
            lambda: replicated([len(run.wait) / (until_ns - warm_ns) * 1e9 for run in runs()]),
            source,
        ),
        ClosedForm(
            f"{name}/wait",
            f"{said}: mean wait",
            "ns",
            threads / throughput - think_ns - SERVICE_NS,
            lambda: replicated([float(run.wait.mean()) for run in runs()]),
            f"{source}, with Little's law",
        ),
    ]
