"""The queued rwlock, rule by rule (kernel/locking/qrwlock.c and asm-generic/qrwlock.h, v6.12).

Every test probes: legal exactly now, not a nanosecond before. Times are worked out from the line
of the lock word: an atomic costs ``SAME`` if the CPU had the line last, ``MOVE`` (``FAR`` from the
other node) if not; the head of the line gets in ``HANDOFF`` after the release that it watched for
was served; each that enters with it becomes head ``NEXT`` later.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from lab import FAST, account, events
from simpy import Environment, Event

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.qrwlock import OPEN, QueuedRwlock
from simkvm.kernel.task import acquired

SAME, MOVE, FAR, HANDOFF, NEXT = 3, 40, 100, 70, 30
READ, WRITE = "read", "write"
Row = dict[str, int]


class Bench:
    """A lock and its users. A user's CPU is its name in the account: it stands in ``site``.

    ``cpus_per_node``: 0 for a machine with one node.
    """

    def __init__(self, cpus_per_node: int = 0) -> None:
        self.env = Environment()
        costs = LineCosts(SAME, MOVE, FAR if cpus_per_node else MOVE, cpus_per_node or 1000)
        self.lock = QueuedRwlock(self.env, costs, HANDOFF, NEXT)
        self.entered: list[int] = []  # CPUs in the order in which their sections ran
        self.resumed: dict[int, int] = {}

    def ask(self, mode: str, t_ns: int, cpu: int, hold_ns: int, resume_ns: int = 0) -> None:
        """At ``t``, ``cpu`` takes the lock for ``hold_ns`` and goes on ``resume_ns`` later."""
        self.env.process(self._user(mode, t_ns, cpu, hold_ns, resume_ns))

    def read(self, t_ns: int, cpu: int, hold_ns: int = 0) -> None:
        self.ask(READ, t_ns, cpu, hold_ns)

    def write(self, t_ns: int, cpu: int, hold_ns: int = 0) -> None:
        self.ask(WRITE, t_ns, cpu, hold_ns)

    def _user(
        self, mode: str, t_ns: int, cpu: int, hold_ns: int, resume_ns: int
    ) -> Generator[Event, Any, None]:
        # In two steps, so that it comes after a release that was planned for the same moment.
        yield self.env.timeout(t_ns - 1)
        yield self.env.timeout(1)

        def section(entry_ns: int) -> tuple[int, int]:
            self.entered.append(cpu)
            return hold_ns, entry_ns + hold_ns + resume_ns

        ask = self.lock.read if mode == READ else self.lock.write
        self.resumed[cpu] = yield from acquired(ask(t_ns, cpu, cpu, section))
        assert self.resumed[cpu] >= self.env.now

    def run(self) -> dict[int, Row]:
        """Let everybody get in; the account, by CPU."""
        self.env.run()
        rows = account(self.lock.rows)
        assert not self.lock.contended, "somebody waits for ever"
        return {row["site"]: row for row in rows}


# -- the fast path ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [READ, WRITE])
def test_an_idle_lock_costs_one_atomic_and_no_event(mode: str) -> None:
    bench = Bench(cpus_per_node=2)
    ask = bench.lock.read if mode == READ else bench.lock.write
    expected = []
    for t_ns, cpu, cost in ((1000, 0, MOVE), (2000, 0, SAME), (3000, 1, MOVE), (4000, 2, FAR)):
        assert ask(t_ns, cpu, 7, lambda at: (10, at + 25)) == t_ns + cost + 25
        expected += [7, int(mode == WRITE), t_ns, cost, 10, FAST]
    assert bench.lock.rows == expected
    assert events(bench.env) == 0


def test_readers_share() -> None:
    bench = Bench()
    for cpu in range(4):
        bench.read(1000 + 100 * cpu, cpu, 10_000)
    rows = bench.run()
    assert [rows[cpu]["wait"] for cpu in range(4)] == [MOVE] * 4
    assert all(row["met"] == FAST for row in rows.values())


def test_readers_of_one_moment_queue_for_the_line_only() -> None:
    bench = Bench()
    for cpu in range(5):
        bench.read(1000, cpu, 10_000)
    assert [row["wait"] for row in bench.run().values()] == [MOVE * n for n in range(1, 6)]


# -- who has to wait, and until when ----------------------------------------------------------


@pytest.mark.parametrize("mode", [READ, WRITE])
@pytest.mark.parametrize("before_ns", [0, 1])
def test_a_writer_excludes_up_to_its_release(mode: str, before_ns: int) -> None:
    """One that comes with the release finds the word free; a nanosecond earlier it has to queue."""
    bench = Bench()
    bench.write(1000, 0, 500)
    release = 1000 + MOVE + 500
    bench.ask(mode, release - before_ns, 1, 10)
    row = bench.run()[1]
    if before_ns:
        # It took the line away in order to join, so the release has to fetch it back.
        joined = release - 1 + MOVE + SAME * (2 if mode == READ else 1)
        assert (row["met"], row["entry"]) == (0, joined + MOVE + HANDOFF)
    else:
        assert (row["met"], row["entry"]) == (FAST, release + SAME + MOVE)


@pytest.mark.parametrize("before_ns", [0, 1])
def test_a_writer_waits_for_the_readers_inside(before_ns: int) -> None:
    bench = Bench()
    bench.read(1000, 0, 500)
    release = 1000 + MOVE + 500
    bench.write(release - before_ns, 1, 10)
    row = bench.run()[1]
    if before_ns:
        assert (row["met"], row["entry"]) == (0, release - 1 + MOVE + SAME + MOVE + HANDOFF)
    else:
        assert (row["met"], row["entry"]) == (FAST, release + SAME + MOVE)


@pytest.mark.parametrize("mode", [READ, WRITE])
def test_the_head_gets_in_a_hand_over_after_the_release(mode: str) -> None:
    bench = Bench()
    bench.write(1000, 0, 500)
    bench.ask(mode, 1100, 1, 10)
    assert bench.run()[1]["entry"] == 1000 + MOVE + 500 + MOVE + HANDOFF


def test_a_writer_waits_for_the_last_reader_not_for_the_last_that_came() -> None:
    bench = Bench()
    bench.read(1000, 0, 9000)
    bench.read(1200, 1, 100)
    bench.write(1300, 2, 10)
    assert bench.run()[2]["entry"] == 1000 + MOVE + 9000 + MOVE + HANDOFF


# -- the order of the line --------------------------------------------------------------------


def test_first_in_first_out_whatever_the_kind() -> None:
    bench = Bench()
    bench.write(1000, 0, 10_000)
    order = (3, 1, 6, 2, 5, 4)
    for place, cpu in enumerate(order):
        bench.ask(READ if place % 2 else WRITE, 2000 + 100 * place, cpu, 500)
    rows = bench.run()
    assert bench.entered == [0, *order]
    assert [rows[cpu]["met"] for cpu in order] == [0, 1, 2, 3, 4, 5]


def test_readers_in_a_row_enter_together() -> None:
    """Each becomes head a line transfer after the one before got in, whatever that one holds."""
    bench = Bench()
    bench.write(1000, 0, 10_000)
    for cpu in (1, 2, 3):
        bench.read(1000 + 100 * cpu, cpu, 50_000)
    rows = bench.run()
    first = 1000 + MOVE + 10_000 + MOVE + HANDOFF
    step = NEXT + MOVE
    assert [rows[cpu]["entry"] for cpu in (1, 2, 3)] == [first, first + step, first + 2 * step]


def test_a_writer_behind_readers_waits_for_all_of_them() -> None:
    bench = Bench()
    bench.write(1000, 0, 10_000)
    holds = {1: 100, 2: 5000, 3: 200}
    for cpu, hold_ns in holds.items():
        bench.read(1000 + 100 * cpu, cpu, hold_ns)
    bench.write(1500, 4, 10)
    bench.read(1600, 5, 10)
    rows = bench.run()
    assert bench.entered == [0, 1, 2, 3, 4, 5]
    last = max(rows[cpu]["entry"] + holds[cpu] for cpu in holds)
    assert last == rows[2]["entry"] + 5000
    # CPU 3 released after CPU 1 and had the line; CPU 2 fetches it for its release.
    assert rows[4]["entry"] == last + MOVE + HANDOFF
    assert rows[5]["entry"] == rows[4]["entry"] + 10 + SAME + HANDOFF


@pytest.mark.parametrize(("late_ns", "met"), [(-1, FAST), (0, 1), (1, 1)])
def test_a_head_writer_closes_the_fast_path(late_ns: int, met: int) -> None:
    """Readers are inside and one more could be, but for the writer that asked before it."""
    bench = Bench()
    bench.read(1000, 0, 10_000)
    if late_ns < 0:
        bench.read(2000 + late_ns, 2, 10)
    bench.write(2000, 1, 10)
    if late_ns >= 0:
        bench.read(2000 + late_ns, 2, 10)
    rows = bench.run()
    assert rows[2]["met"] == met
    assert bench.entered == ([0, 2, 1] if late_ns < 0 else [0, 1, 2])


def test_a_reader_does_not_overtake_a_writer_that_stands_behind_readers() -> None:
    """While the lock is held for write every newcomer joins the line, at its end."""
    bench = Bench()
    bench.write(1000, 0, 10_000)
    bench.read(1100, 1, 10)
    bench.write(1200, 2, 10)
    bench.read(1300, 3, 10)
    rows = bench.run()
    assert bench.entered == [0, 1, 2, 3]
    assert rows[3]["met"] == 2


@pytest.mark.parametrize("behind", [None, WRITE])
def test_a_reader_that_comes_while_queued_readers_get_in(behind: str | None) -> None:
    """It may enter with them, unless a writer behind them has closed the fast path by then.

    A hand-over is served in one go: such a reader finds the word as the whole of it left it.
    """
    bench = Bench()
    bench.write(1000, 0, 1000)
    bench.read(1100, 1, 5000)
    if behind:
        bench.write(1200, 2, 10)
    bench.read(1000 + MOVE + 1000 + 1, 3, 10)
    rows = bench.run()
    assert bench.entered == ([0, 1, 2, 3] if behind else [0, 1, 3])
    if behind:
        assert rows[3]["met"] == 1
    else:
        assert rows[3]["met"] == FAST
        assert rows[3]["entry"] == rows[1]["entry"] + MOVE, "the line was busy with the hand-over"


def test_after_the_writer_the_readers_behind_it_go_together() -> None:
    bench = Bench()
    bench.read(1000, 0, 5000)
    bench.write(1100, 1, 700)
    for cpu in (2, 3):
        bench.read(1000 + 100 * cpu, cpu, 5000)
    bench.write(1500, 4, 10)
    rows = bench.run()
    writer = 1000 + MOVE + 5000 + MOVE + HANDOFF
    assert rows[1]["entry"] == writer
    first = writer + 700 + SAME + HANDOFF
    assert [rows[cpu]["entry"] for cpu in (2, 3)] == [first, first + NEXT + MOVE]


# -- ties -------------------------------------------------------------------------------------


def test_requests_of_one_moment_are_served_as_they_ask() -> None:
    for order in ((1, 2), (2, 1)):
        bench = Bench()
        for cpu in order:
            bench.write(1000, cpu, 100)
        bench.run()
        assert bench.entered == list(order)


def test_a_release_goes_before_a_request_of_the_same_moment() -> None:
    """Also if others stand in the line: the newcomer stands behind them."""
    bench = Bench()
    bench.write(1000, 0, 1000)
    release = 1000 + MOVE + 1000
    bench.write(1500, 1, 100)
    bench.read(release, 2, 100)
    rows = bench.run()
    assert rows[1]["entry"] == release + MOVE + HANDOFF
    assert rows[2]["met"] == 0, "CPU 1 has left the line"
    assert bench.entered == [0, 1, 2]


def test_readers_that_leave_in_one_moment_leave_by_number() -> None:
    """What ends together may not depend on who asked first: two nodes would show it."""
    for order in ((3, 1), (1, 3)):
        bench = Bench(cpus_per_node=2)
        bench.read(1000, order[0], 1000)
        bench.read(1000, order[1], 1000 - FAR)
        bench.write(1500, 2, 10)
        # The line goes from CPU 2, which announced itself, to node 0 and back to node 1.
        assert bench.run()[2]["entry"] == 1000 + MOVE + 1000 + 2 * FAR + HANDOFF


# -- holds without a planned end, and lock-break ----------------------------------------------


def hold_open(
    bench: Bench, t_ns: int, cpu: int, times: list[int]
) -> Generator[Event, Any, list[int]]:
    """Take the lock at ``t``, let go at ``times[0]``, ask again at once, and so on: the entries."""
    entries = []
    for release_ns in times:
        yield bench.env.timeout(max(0, t_ns - int(bench.env.now)))

        def section(entry_ns: int) -> tuple[int, int]:
            bench.entered.append(cpu)
            return OPEN, entry_ns

        entry = yield from acquired(bench.lock.write(t_ns, cpu, cpu, section))
        entries.append(entry)
        t_ns = max(entry, release_ns)
        yield bench.env.timeout(t_ns - int(bench.env.now))
        bench.lock.release(t_ns)
    return entries


@pytest.mark.parametrize("before_ns", [0, 1])
def test_an_open_hold_lasts_until_its_release(before_ns: int) -> None:
    bench = Bench()
    bench.env.process(hold_open(bench, 1000, 0, [5000]))
    bench.read(5000 - before_ns, 1, 10)
    rows = bench.run()
    assert (rows[0]["entry"], rows[0]["hold"]) == (1000 + MOVE, 5000 - 1000 - MOVE)
    assert rows[1]["met"] == (0 if before_ns else FAST)
    joined = 4999 + MOVE + 2 * SAME
    expected = joined + MOVE + HANDOFF if before_ns else 5000 + SAME + MOVE
    assert rows[1]["entry"] == expected


def test_a_break_lets_everybody_queued_go_first() -> None:
    """cond_resched_rwlock_write(): release, then queue again as a new writer, at the tail."""
    bench = Bench()
    holder = bench.env.process(hold_open(bench, 1000, 0, [5000, 9000]))
    bench.read(2000, 1, 100)
    bench.write(2100, 2, 200)
    bench.read(2200, 3, 300)
    bench.run()
    assert bench.entered == [0, 1, 2, 3, 0]
    rows = [row for row in account(bench.lock.rows) if row["site"] == 0]
    assert [row["met"] for row in rows] == [FAST, 3 - 1], "CPU 1 got in at the release"
    assert [row["arrival"] for row in rows] == [1000, 5000]
    last = account(bench.lock.rows)[-2]
    assert last["site"] == 3
    # CPU 0 took the line to announce itself when CPU 3 was in, so CPU 3 fetches it to leave.
    assert holder.value[1] == last["entry"] + 300 + MOVE + HANDOFF


def test_a_break_of_an_uncontended_lock_is_two_acquisitions() -> None:
    bench = Bench()
    holder = bench.env.process(hold_open(bench, 1000, 0, [5000, 9000]))
    bench.run()
    assert holder.value == [1000 + MOVE, 5000 + 2 * SAME]
    assert [row["met"] for row in account(bench.lock.rows)] == [FAST, FAST]


def test_contended_says_whether_anybody_stands_in_the_line() -> None:
    """rwlock_is_contended(): not of what kind, and a reader inside is not contention."""
    bench = Bench()
    seen: dict[int, bool] = {}

    def look() -> Generator[Event, Any, None]:
        for t_ns in (1500, 2500, 3500):
            yield bench.env.timeout(t_ns - int(bench.env.now))
            seen[t_ns] = bench.lock.contended

    bench.read(1000, 0, 2000)
    bench.read(1100, 1, 2000)
    bench.write(2000, 2, 10)
    bench.env.process(look())
    bench.run()
    assert seen == {1500: False, 2500: True, 3500: False}


def test_only_the_holder_may_release() -> None:
    bench = Bench()
    with pytest.raises(AssertionError, match="nobody holds open"):
        bench.lock.release(5)


# -- what callers see -------------------------------------------------------------------------


def test_a_caller_goes_on_when_its_section_says_so() -> None:
    bench = Bench()
    bench.ask(WRITE, 1000, 0, 500, resume_ns=3000)
    bench.ask(WRITE, 1100, 1, 10, resume_ns=0)
    bench.ask(READ, 1200, 2, 10, resume_ns=777)
    rows = bench.run()
    for cpu, resume in ((0, 3500), (1, 10), (2, 787)):
        assert bench.resumed[cpu] == rows[cpu]["entry"] + resume


def test_the_account_has_a_row_for_each_acquisition_in_order_of_entry() -> None:
    bench = Bench()
    bench.write(1000, 0, 1000)
    bench.read(1100, 1, 50)
    bench.write(1200, 2, 60)
    bench.env.run()
    release = 1000 + MOVE + 1000
    first = release + MOVE + HANDOFF
    # CPU 2 took the line to announce itself when CPU 1 was in, so CPU 1 fetches it to leave.
    announced = first + NEXT + MOVE
    second = max(first + 50, announced) + MOVE + HANDOFF
    assert bench.lock.rows == [
        *(0, 1, 1000, MOVE, 1000, FAST),
        *(1, 0, 1100, first - 1100, 50, 0),
        *(2, 1, 1200, second - 1200, 60, 1),
    ]


def test_idle_for_is_true_only_for_the_last_owner_of_a_free_word() -> None:
    bench = Bench()
    lock = bench.lock
    assert not lock.idle_for(0, 0), "nobody had it yet"
    lock.write(1000, 0, 0, lambda at: (500, at + 500))
    release = 1000 + MOVE + 500
    assert not lock.idle_for(0, release - 1)
    assert not lock.idle_for(0, release), "the release itself takes an atomic"
    assert lock.idle_for(0, release + SAME)
    assert not lock.idle_for(1, release + SAME)
    lock.advance(release + 1000)
    assert not lock.idle_for(0, release + 999)
    assert lock.idle_for(0, release + 1000)


# -- events -----------------------------------------------------------------------------------


def test_waiting_costs_an_event_for_each_and_one_for_the_head() -> None:
    """An uncontended acquire costs none; a queued one its own; the head one to look at the word."""
    for waiters in (1, 5, 20):
        bench = Bench()
        lock = bench.lock
        lock.write(1000, 0, 0, lambda at: (5000, at + 5000))
        assert events(bench.env) == 0
        for cpu in range(1, waiters + 1):
            lock.read(1000 + cpu, cpu, 0, lambda at: (10, at + 10))
        assert events(bench.env) == 1, "one look at the word, however many wait"
        bench.env.run()
        assert events(bench.env) == 1 + waiters


def test_writers_that_go_on_at_their_release_share_it_with_the_next() -> None:
    waiters = 20
    bench = Bench()
    lock = bench.lock
    lock.write(1000, 0, 0, lambda at: (50_000, at + 50_000))
    for cpu in range(1, waiters + 1):
        lock.write(1000 + cpu, cpu, 0, lambda at: (100, at + 100))
    bench.env.run()
    assert events(bench.env) == 1 + waiters


# -- everything at once -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("write_ratio", [0.05, 0.5, 0.95])
def test_random_traffic_keeps_the_rules(seed: int, write_ratio: float) -> None:
    rng = np.random.default_rng((seed, int(100 * write_ratio)))
    bench = Bench(cpus_per_node=int(rng.choice([0, 8])))
    times = np.cumsum(rng.integers(0, 2 * int(rng.choice([50, 200, 800])), 300)).tolist()
    for number, t_ns in enumerate(times):
        mode = WRITE if rng.random() < write_ratio else READ
        bench.ask(
            mode, 1 + t_ns, number, int(rng.choice([0, 10, 300, 900])), int(rng.integers(3)) * 50
        )
    rows = bench.run()
    assert len(rows) == len(times), "everybody got in, once"
    assert bench.entered == list(rows), "the account is in the order of entry"
    _check_exclusion(list(rows.values()))
    _check_order(list(rows.values()))


@pytest.mark.parametrize("seed", range(4))
def test_one_node_of_two_is_like_a_machine_with_one(seed: int) -> None:
    accounts = []
    for cpus_per_node in (0, 1000):
        rng = np.random.default_rng(seed)
        bench = Bench(cpus_per_node)
        for number, t_ns in enumerate(np.cumsum(rng.integers(0, 300, 300)).tolist()):
            bench.ask(
                str(rng.choice([READ, WRITE])), 1 + t_ns, number % 50, int(rng.choice([10, 600]))
            )
        bench.env.run()
        accounts.append(bench.lock.rows)
    assert accounts[0] == accounts[1]


def _check_exclusion(rows: list[Row]) -> None:
    entries = [row["entry"] for row in rows]
    assert entries == sorted(entries)
    end_of_writers = end_of_all = 0
    for row in rows:
        assert row["entry"] >= end_of_writers, "got in beside a writer"
        if row["mode"]:
            assert row["entry"] >= end_of_all, "a writer got in beside somebody"
            end_of_writers = row["entry"] + row["hold"]
        end_of_all = max(end_of_all, row["entry"] + row["hold"])


def _check_order(rows: list[Row]) -> None:
    queued = [row for row in rows if row["met"] != FAST]
    assert [row["site"] for row in queued] == sorted(row["site"] for row in queued), "not FIFO"
    writers = [(row["site"], row["entry"]) for row in queued if row["mode"]]
    for row in rows:
        if row["met"] == FAST and not row["mode"]:
            passed = [who for who, entry in writers if who < row["site"] and entry > row["entry"]]
            assert not passed, "the fast path was open although a writer waited"
