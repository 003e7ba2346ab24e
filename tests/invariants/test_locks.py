"""Does the queued rwlock keep its rules, whoever comes when, and whatever the lock word costs?

Requests are drawn; the rules are read from the lock's own account. Where atomics and hand-overs
are free, every entry is also compared with a plain model of the lock, written here from the rules
of kernel/locking/qrwlock.c (v6.12): a list of holders and a line of waiters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy import Environment, Event
from worlds import MS, US, Acquisition, acquisitions, journal, run, world

from invariants import rules
from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.qrwlock import FAST, OPEN, QueuedRwlock
from simkvm.kernel.sites import FAULT
from simkvm.kernel.task import acquired, reach
from simkvm.units import MIB

FREE = LineCosts(same_ns=0, transfer_ns=0, remote_ns=0, cpus_per_node=4)


class Request(NamedTuple):
    """One critical section: when, by whom, how, how long; ``open``: released by its own hand."""

    at: int
    cpu: int
    write: bool
    hold: int
    open: bool


def requests(most: int) -> st.SearchStrategy[list[Request]]:
    """Requests crowded enough to wait for one another."""
    one = st.builds(
        Request,
        st.integers(0, 400),
        st.integers(0, 7),
        st.booleans(),
        st.integers(1, 90),
        st.booleans(),
    )
    return st.lists(one, min_size=1, max_size=most).map(
        lambda drawn: [r._replace(open=r.open and r.write) for r in sorted(drawn)]
    )


def held(
    wanted: list[Request], costs: LineCosts = FREE, handoff_ns: int = 0, next_ns: int = 0
) -> list[Acquisition]:
    """The account of a lock that all of ``wanted`` asked for, one each; the site is its number."""
    env = Environment()
    lock = QueuedRwlock(env, costs, handoff_ns, next_ns)

    def section(request: Request) -> Any:
        def inside(entry: int) -> tuple[int, int]:
            return (OPEN, entry) if request.open else (request.hold, entry + request.hold)

        return inside

    def ask(number: int, request: Request) -> Generator[Event, Any, None]:
        yield from reach(env, request.at)
        how = lock.write if request.write else lock.read
        t_ns = yield from acquired(how(request.at, request.cpu, number, section(request)))
        if request.open:
            t_ns = yield from reach(env, t_ns + request.hold)
            lock.release(t_ns)

    for number, request in enumerate(wanted):
        env.process(ask(number, request))
    env.run()
    return acquisitions(lock.rows)


def entries_by_the_rules(wanted: list[Request]) -> list[int]:
    """When each of ``wanted`` (in order of time) gets in, if atomics and hand-overs are free."""
    inside: list[tuple[int, bool]] = []  # (release, write)
    line: deque[int] = deque()
    entries = [0] * len(wanted)

    def enter(number: int, t_ns: int) -> None:
        entries[number] = t_ns
        inside.append((t_ns + wanted[number].hold, wanted[number].write))

    def let_go(until: float) -> None:
        while inside and min(inside)[0] <= until:
            first = min(inside)
            inside.remove(first)
            if inside or not line:
                continue
            enter(head := line.popleft(), first[0])
            while line and not wanted[head].write and not wanted[line[0]].write:
                enter(line.popleft(), first[0])

    for number, request in enumerate(wanted):
        let_go(request.at)
        writers = any(write for _, write in inside)
        if line or writers or (request.write and inside):
            line.append(number)
        else:
            enter(number, request.at)
    let_go(float("inf"))
    return entries


@settings(max_examples=300)
@given(requests(12))
def test_every_entry_is_the_one_that_the_rules_give(wanted: list[Request]) -> None:
    rows = held(wanted)
    assert [row.site for row in rows if row.wait < 0] == []
    assert {row.site: row.entry for row in rows} == dict(enumerate(entries_by_the_rules(wanted)))


@settings(max_examples=200)
@given(
    requests(20),
    st.tuples(st.integers(0, 9), st.integers(0, 70), st.integers(0, 70)),
    st.integers(0, 120),
    st.integers(0, 50),
)
def test_rules_hold_whatever_the_line_costs(
    wanted: list[Request], costs: tuple[int, int, int], handoff_ns: int, next_ns: int
) -> None:
    same, more, still_more = costs
    line = LineCosts(same, same + more, same + more + still_more, cpus_per_node=4)
    rows = held(wanted, line, handoff_ns, next_ns)
    assert sorted(row.site for row in rows) == list(range(len(wanted))), "everybody gets in, once"
    assert all(row.hold == wanted[row.site].hold for row in rows)
    rules.writers_exclude_all(rows)
    rules.the_line_is_fifo(rows)
    rules.waiting_writers_shut_the_door(rows)
    _handed_over_in_time(rows, handoff_ns)


def _handed_over_in_time(rows: list[Acquisition], handoff_ns: int) -> None:
    """The head of the line sees a release only ``handoff_ns`` after it."""
    for place, row in enumerate(rows):
        earlier = [other for other in rows[:place] if row.mode or other.mode]
        if row.met != FAST and earlier:
            assert row.entry >= max(other.release for other in earlier) + handoff_ns


@given(requests(20))
def test_readers_alone_never_wait(wanted: list[Request]) -> None:
    rows = held([request._replace(write=False, open=False) for request in wanted])
    assert [(row.wait, row.met) for row in rows] == [(0, FAST)] * len(wanted)


def test_a_guest_that_only_faults_never_queues() -> None:
    """Degenerate case, in a world: faults read, nobody writes, so the line stays empty."""
    with journal() as notes:
        run(guest={"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate", "repeat": 2}})
    rows = notes.rows()
    assert len(rows) >= 2048
    assert {(row.site, row.mode, row.met) for row in rows} == {(FAULT, 0, FAST)}


@pytest.mark.parametrize("ties", ["fifo", "shuffle"])
@pytest.mark.parametrize("fault_lock", ["read", "write"])
def test_a_crowded_lock_keeps_its_rules(fault_lock: str, ties: str) -> None:
    """Faults, locked ageing and long unmaps of several chunks on one lock."""
    with journal() as notes:
        made = world(
            machine="graviton3-64c",
            kernel={"base": "linux-6.12", "set": {"fault_lock": fault_lock}},
            guest={"vcpus": 8, "memory": 8 * MIB, "access": {"pattern": "populate", "repeat": 9}},
            ageing={"start": 100 * US},
            contenders={
                name: {
                    "kind": "madvise_dontneed",
                    "guest": "vm0",
                    "range": 2 * MIB,
                    "rate": 4000.0,
                    "arrivals": "poisson",
                }
                for name in ("a", "b")
            },
            duration=4 * MS,
            ties=ties,
        )
        made.run()
    rows = notes.rows()
    assert sum(row.met != FAST for row in rows) > 100, "crowded"
    assert max(row.met for row in rows) >= 3
    rules.writers_exclude_all(rows)
    rules.the_line_is_fifo(rows)
    rules.waiting_writers_shut_the_door(rows)
    rules.ranges_take_the_lock_twice(made.kvms[0], rows)
