"""One cache line, first come first served: what an atomic costs by where the line was."""

from __future__ import annotations

import pytest

from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.scenario.machine import load_machine

COSTS = LineCosts(same_ns=3, transfer_ns=40, remote_ns=100, cpus_per_node=4)


def line() -> CacheLine:
    return CacheLine(COSTS)


def test_the_first_atomic_fetches_the_line_and_the_owner_keeps_it() -> None:
    word = line()
    assert word.serve(0, 1000) == 1040
    assert word.serve(0, 1040) == 1043
    assert word.serve(0, 5000) == 5003
    assert word.owner == 0


def test_another_cpu_pays_a_transfer_and_one_of_another_node_more() -> None:
    word = line()
    word.serve(0, 0)
    assert word.serve(3, 1000) == 1040
    assert word.serve(4, 2000) == 2100, "CPU 4 is on the second node"
    assert word.serve(7, 3000) == 3040
    assert word.serve(0, 4000) == 4100


def test_one_is_served_after_the_other() -> None:
    """Ten CPUs at one moment: the line is the server, each waits for all before it."""
    word = CacheLine(LineCosts(3, 40, 40, 80))
    assert [word.serve(cpu, 1000) for cpu in range(10)] == [1040 + 40 * n for n in range(10)]


def test_a_request_is_served_the_moment_the_line_is_free_and_not_before() -> None:
    word = line()
    word.serve(0, 1000)
    assert word.serve(1, 1039) == 1080
    assert word.serve(0, 1081) == 1121, "one that comes when it is free does not wait"


def test_atomics_in_a_row_fetch_once() -> None:
    word = line()
    assert word.serve(0, 1000, 3) == 1040 + 2 * 3
    assert word.serve(0, 2000, 3) == 2000 + 3 * 3


def test_a_hand_over_takes_its_time_and_moves_the_line() -> None:
    word = line()
    word.serve(0, 1000)
    assert word.occupy(2, 1000, 70) == 1110, "after what is served already"
    assert word.occupy(3, 5000, 70) == 5070
    assert word.serve(3, 5070) == 5073


def test_a_posted_release_is_served_in_its_turn() -> None:
    word = line()
    assert word.visit(0, 1000, 1) == 1040
    word.post(0, 1500)
    assert word.visit(1, 1499, 1) == 1539, "the release has not come"
    assert word.visit(2, 1600, 1) == 1640, "it came at 1539, took till 1579, and is over"
    word.post(2, 2000)
    assert word.visit(3, 2000, 1) == 2043, "a release of the same moment goes first, locally"


def test_posted_releases_are_served_in_order_of_time() -> None:
    word = line()
    word.visit(0, 1000, 1)
    for cpu, at in ((1, 1300), (2, 1100), (3, 1200)):
        word.post(cpu, at)
    word.visit(0, 1250, 1)
    assert word.owner == 0
    assert word.free_ns == 1290, "after the releases of CPUs 2 and 3, long done"
    assert word.visit(1, 1310, 1) == 1340 + 3, "that of CPU 1 is still under way"


def test_atomics_of_one_visit_are_parted_by_those_who_wait() -> None:
    """An uncontended visit fetches the line once, a contended one for each of its atomics."""
    word = line()
    assert word.visit(0, 1000, 2) == 1043
    assert word.visit(1, 1042, 2) == 1043 + 2 * 40, "came while it was busy"
    assert word.visit(2, 2000, 2) == 2043
    assert word.visit(2, 2001, 2) == 2043 + 2 * 3, "its own atomics do not part one another"


@pytest.mark.parametrize("name", ["ampere-altra-80c", "graviton3-64c", "x86-icelake-64c"])
def test_costs_of_a_machine(name: str) -> None:
    machine = load_machine(name)
    costs = LineCosts.of(machine)
    assert 0 < costs.same_ns < costs.transfer_ns <= costs.remote_ns
    assert costs.cpus_per_node * machine.nodes == machine.cores
    assert (costs.remote_ns > costs.transfer_ns) == (machine.nodes > 1)
