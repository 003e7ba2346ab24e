"""Locks and lines that nothing drawn disturbs: what repeats, repeats to the nanosecond."""

from __future__ import annotations

from heapq import heapify, heapreplace
from math import nan
from typing import TYPE_CHECKING, Any

from simpy import Environment

from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.qrwlock import QueuedRwlock, Section
from simkvm.kernel.tlb import TlbiPath
from simkvm.validate import queueing
from simkvm.validate.closed_form import ClosedForm, Estimate, exactly, replicated, streams
from simkvm.validate.theory_locks import FREE, READ, WRITE, Account, closed, constant

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

QRWLOCK = "kernel/locking/qrwlock.c, v6.12"
LINE_NS = 65
COSTS = LineCosts(same_ns=7, transfer_ns=LINE_NS, remote_ns=LINE_NS, cpus_per_node=64)
REPLICATIONS = 30


def closed_forms() -> list[ClosedForm]:
    """Rounds of the lock, its line under readers, and the machine's one path for invalidations."""
    return [
        _writers_in_turn(6),
        *(_rounds(readers, writers) for readers, writers in ((1, 1), (3, 1), (5, 2))),
        _batch_behind_a_writer(8),
        _reader_behind_a_waiting_writer(),
        _lone_reader(),
        *(_saturated_readers(threads) for threads in (16, 48)),
        _line_repair(8),
        _invalidations_at_random(0.7),
        *(_invalidations_in_turn(cpus) for cpus in (1, 16)),
    ]


def entries(account: Account) -> NDArray[np.int64]:
    """When each got in, in order of arrival."""
    entered: NDArray[np.int64] = account.arrival + account.wait
    return entered


def section(hold_ns: int) -> Section:
    """One that is held so long."""
    return lambda entry: (hold_ns, entry + hold_ns)


def _nothing_drawn() -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(0)


def steady(values: NDArray[Any], period: int = 1) -> Estimate:
    """Mean of a quantity that repeats every ``period`` values.

    Only the middle half is looked at: a run begins and ends otherwise. NaN if nothing repeats.
    """
    rounds = values[: len(values) // period * period].reshape(-1, period)
    quarter = len(rounds) // 4
    if not quarter:
        return exactly(nan)
    return exactly(float(rounds[quarter:-quarter].mean()))


# -- the lock --------------------------------------------------------------------------------------


def _writers_in_turn(threads: int) -> ClosedForm:
    """No think time: one after the other, each waits for all the others."""
    hold_ns, handoff_ns = 700, 40

    def measure() -> Estimate:
        account = closed(
            [WRITE] * threads,
            constant(0),
            {WRITE: constant(hold_ns)},
            500_000,
            _nothing_drawn(),
            handoff_ns=handoff_ns,
        )
        return steady(account.wait, threads)

    return ClosedForm(
        f"lock/in-turn/{threads}/wait",
        f"{threads} writers that never think: each waits for all others and {threads} hand-overs",
        "ns",
        (threads - 1) * hold_ns + threads * handoff_ns,
        measure,
        f"first come first served; {QRWLOCK}",
        drawn=False,
    )


def _rounds(readers: int, writers: int) -> ClosedForm:
    """Nobody thinks: a round is one batch of readers, then the writers one by one.

    Queued readers enter ``next_ns`` after one another, so the last of R leaves (R - 1) next_ns
    later, and every change of holder costs a hand-over.
    """
    read_ns, write_ns, handoff_ns, next_ns = 900, 400, 30, 11

    def measure() -> Estimate:
        import numpy as np

        account = closed(
            [READ] * readers + [WRITE] * writers,
            constant(0),
            {READ: constant(read_ns), WRITE: constant(write_ns)},
            400_000,
            _nothing_drawn(),
            handoff_ns=handoff_ns,
            next_ns=next_ns,
        )
        order = np.argsort(entries(account), kind="stable")
        mode, entry = account.mode[order], entries(account)[order]
        first = entry[1:][(mode[1:] == READ) & (mode[:-1] == WRITE)]
        return steady(np.diff(first))

    return ClosedForm(
        f"lock/rounds/{readers}-{writers}",
        f"{readers} readers and {writers} writers that never think: one round",
        "ns",
        read_ns + (readers - 1) * next_ns + handoff_ns + writers * (write_ns + handoff_ns),
        measure,
        f"readers that stand in a row enter together; {QRWLOCK}",
        drawn=False,
    )


def _batch_behind_a_writer(readers: int) -> ClosedForm:
    """Reader k of a batch, from 0, gets in one hand-over and k times ``next_ns`` after the writer.

    They come 1 ns after one another, so their waits are shorter by as much.
    """
    hold_ns, handoff_ns, next_ns = 5_000, 30, 11

    def measure() -> Estimate:
        env = Environment()
        lock = QueuedRwlock(env, FREE, handoff_ns, next_ns)
        lock.write(0, 0, 0, section(hold_ns))
        for cpu in range(1, readers + 1):
            lock.read(cpu, cpu, 0, section(900))
        env.run()
        account = Account.of(lock)
        return exactly(float(account.wait[account.arrival > 0].mean()))

    middle = (readers - 1) / 2
    return ClosedForm(
        f"lock/batch/{readers}/wait",
        f"{readers} readers behind a writer: mean wait",
        "ns",
        hold_ns + handoff_ns + middle * next_ns - (1 + middle),
        measure,
        f"readers that stand in a row enter together; {QRWLOCK}",
        drawn=False,
    )


def _reader_behind_a_waiting_writer() -> ClosedForm:
    """A writer waits for the last of the readers inside, and shuts the door behind it.

    A reader that comes meanwhile could share the lock with those, but waits for them and for the
    writer, with a hand-over before each of the two.
    """
    read_ns, write_ns, handoff_ns, arrival_ns = (900, 2_000, 1_300), 400, 30, 100

    def measure() -> Estimate:
        env = Environment()
        lock = QueuedRwlock(env, FREE, handoff_ns, next_ns=0)
        for cpu, hold_ns in enumerate(read_ns):
            lock.read(0, cpu, 0, section(hold_ns))
        lock.write(50, 3, 0, section(write_ns))
        lock.read(arrival_ns, 4, 0, section(900))
        env.run()
        return exactly(float(Account.of(lock).wait[-1]))

    return ClosedForm(
        "lock/behind-waiting-writer/wait",
        "a reader that comes when a writer waits for readers: wait",
        "ns",
        max(read_ns) + handoff_ns + write_ns + handoff_ns - arrival_ns,
        measure,
        f"a writer that waits shuts the fast path; {QRWLOCK}",
        drawn=False,
    )


# -- the line of the lock word ---------------------------------------------------------------------


def _read_cycle(threads: int, think_ns: int, hold_ns: int) -> Estimate:
    """Mean time between two sections of readers that think, over whole cycles of all threads."""
    import numpy as np

    account = closed(
        [READ] * threads,
        constant(think_ns),
        {READ: constant(hold_ns)},
        400_000,
        _nothing_drawn(),
        COSTS,
    )
    return steady(np.diff(np.sort(entries(account))), threads)


def _lone_reader() -> ClosedForm:
    """It keeps the line: each section costs one atomic on the way in."""
    think_ns, hold_ns = 600, 100
    return ClosedForm(
        "line/lone-reader",
        "a reader alone: time from section to section",
        "ns",
        think_ns + hold_ns + COSTS.same_ns,
        lambda: _read_cycle(1, think_ns, hold_ns),
        "nobody to wait for: think, atomic, hold",
        drawn=False,
    )


def _saturated_readers(threads: int) -> ClosedForm:
    """Each section is two atomics, each fetches the line: not one reader more gets in."""
    think_ns, hold_ns = 600, 100
    assert threads * 2 * LINE_NS > think_ns + hold_ns + 2 * LINE_NS, "enough to keep the line busy"
    return ClosedForm(
        f"line/readers/{threads}",
        f"{threads} readers keep the line of the lock word busy: time between two sections",
        "ns",
        2 * LINE_NS,
        lambda: _read_cycle(threads, think_ns, hold_ns),
        "service demand law, two transfers a section; Denning and Buzen, Computing Surveys 10 "
        "(1978), 225-261",
        drawn=False,
    )


def _line_repair(cpus: int) -> ClosedForm:
    """CPUs that think for an exponential time, then need the line: the machine-repair model."""
    name, think_ns, until_ns = f"line/repair/{cpus}", 400.0, 1_000_000
    always = LineCosts(LINE_NS, LINE_NS, LINE_NS, cpus_per_node=64)

    def atomics(rng: np.random.Generator) -> float:
        line = CacheLine(always)
        due = [(int(rng.exponential(think_ns)), cpu) for cpu in range(cpus)]
        heapify(due)
        done = 0
        while due[0][0] < until_ns:
            t_ns, cpu = due[0]
            served_ns = line.visit(cpu, t_ns, 1)
            heapreplace(due, (served_ns + round(rng.exponential(think_ns)), cpu))
            done += t_ns >= until_ns // 50
        return done / (until_ns - until_ns // 50) * 1e9

    return ClosedForm(
        f"{name}/rate",
        f"{cpus} CPUs that think, then need one line: atomics",
        "1/s",
        queueing.machine_repair(cpus, think_ns, LINE_NS, queueing.constant(LINE_NS)) * 1e9,
        lambda: replicated([atomics(rng) for rng in streams(name, REPLICATIONS)]),
        "Takacs, Introduction to the Theory of Queues, chapter 5",
    )


# -- TLB invalidation ------------------------------------------------------------------------------

TLBI_NS = 1_300
TLBI = "one broadcast after the other, machine-wide; arch/arm64/kvm/hyp/vhe/tlb.c, v6.12"


def _invalidations_at_random(load: float) -> ClosedForm:
    """Flushes of many CPUs at random moments: M/D/1, the flush itself included."""
    name = f"tlbi/m-d-1/{load}"

    def latency_ns(rng: np.random.Generator) -> float:
        import numpy as np

        path = TlbiPath(TLBI_NS, TLBI_NS)
        times = np.cumsum(rng.exponential(TLBI_NS / load, 8_000)).astype(np.int64).tolist()
        return float(np.mean([path.flush(t_ns) - t_ns for t_ns in times][500:]))

    return ClosedForm(
        f"{name}/latency",
        f"TLB invalidations at random, load {load}: time to completion",
        "ns",
        TLBI_NS + queueing.mean_wait(load, TLBI_NS, 0),
        lambda: replicated([latency_ns(rng) for rng in streams(name, REPLICATIONS)]),
        f"Pollaczek and Khinchine; {TLBI}",
    )


def _invalidations_in_turn(cpus: int) -> ClosedForm:
    """CPUs that do nothing else: each waits for all of them, or as long as one alone takes."""
    alone_ns = 2 * TLBI_NS

    def measure() -> Estimate:
        import numpy as np

        path = TlbiPath(alone_ns, TLBI_NS)
        due = [(0, cpu) for cpu in range(cpus)]
        took = []
        for _ in range(20 * cpus):
            t_ns, cpu = due[0]
            done_ns = path.flush(t_ns)
            took.append(done_ns - t_ns)
            heapreplace(due, (done_ns, cpu))
        return steady(np.array(took), cpus)

    return ClosedForm(
        f"tlbi/in-turn/{cpus}/latency",
        f"{cpus} CPU{'s' if cpus > 1 else ''} always invalidating: time to completion",
        "ns",
        max(alone_ns, cpus * TLBI_NS),
        measure,
        f"asymptotic bounds; Denning and Buzen, Computing Surveys 10 (1978), 225-261; {TLBI}",
        drawn=False,
    )
