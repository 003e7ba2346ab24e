"""Lock-free ageing whose compare-and-swap meets an entry that somebody changed.

K: the failure is ignored, the page counts as young, and the entry is what the other made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lab import Lab

from simkvm.kernel.cmpxchg_race import KEPT, CmpxchgRaces, Loads
from simkvm.kernel.host_memory import OWN, PRESENT
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.units import KIB, MIB

WINDOW = 7


def array(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def load(races: CmpxchgRaces, leaf: int, t_ns: int, young: bool = True) -> bool:
    """Whether the compare-and-swap after a load at ``t_ns`` fails, as far as is known yet."""
    batch = Loads(array(leaf), lambda: array(t_ns), t_ns, t_ns)
    failed = races.loaded(batch, np.array([young]))
    return failed is not None and bool(failed[0])


@pytest.mark.parametrize(
    ("stored", "fails"), [(99, False), (100, False), (101, True), (107, True), (108, False)]
)
def test_it_fails_if_the_store_comes_between_the_load_and_the_swap(
    stored: int, fails: bool
) -> None:
    """Loaded at 100, swapped at 107; it is the same whoever of the two is computed first."""
    races = CmpxchgRaces(WINDOW)
    races.stored(array(4, 5, 6), array(stored - 40, stored, stored + 40))
    assert load(races, 5, 100) == fails
    assert races.failed == fails
    races = CmpxchgRaces(WINDOW)
    assert not load(races, 5, 100)
    races.stored(array(4, 5, 6), array(stored - 40, stored, stored + 40))
    assert races.failed == fails


def test_another_leaf_is_no_matter() -> None:
    races = CmpxchgRaces(WINDOW)
    races.stored(array(4), array(103))
    assert not load(races, 5, 100)
    races.stored(array(6), array(103))
    assert races.failed == 0


def test_a_leaf_that_is_old_gets_no_swap() -> None:
    races = CmpxchgRaces(WINDOW)
    load(races, 5, 100, young=False)
    races.stored(array(5), array(103))
    assert races.failed == 0


def test_the_logs_are_bounded() -> None:
    races = CmpxchgRaces(WINDOW)
    for n in range(3 * KEPT):
        load(races, n, 100 * n)
        races.stored(array(n), array(100 * n + 50))
    assert len(races._loads) <= KEPT
    assert len(races._stores) <= 2, "what lies before a load cannot meet the next"


# -- in a guest ------------------------------------------------------------------------------------


def lab(window_ns: int = 0, kernel: Any = "linux-7.1-lockless") -> Lab:
    """Everything mapped and young; between load and swap lie ``window_ns``."""
    costs = {"stage2_cmpxchg_ns": float(window_ns)} if window_ns else {}
    made = Lab(2 * MIB, machine={"base": "graviton3-64c", "set": costs}, kernel=kernel)
    made.fill()
    made.kvm.host.state[:] &= np.uint8(PRESENT | OWN)
    return made


def load_ns(made: Lab, leaf: int) -> int:
    """When the first pass of an idle machine loads ``leaf``: promotions come after each 64.

    It begins when mmap_lock is had: its line comes, for the count, and the owner is written.
    """
    costs = made.kvm.costs.ageing
    each = costs.call_ns + costs.walk_ns + costs.scan_ns
    windows, rest = divmod(leaf, 64)
    line = made.kvm.costs.line
    start = line.transfer_ns + line.same_ns + windows * 64 * (each + costs.promote_ns)
    return start + rest * each + costs.call_ns + costs.walk_ns


def at(made: Lab, t_ns: int, act: Any) -> None:
    def steps() -> Iterator[Any]:
        yield made.env.timeout(t_ns)
        act()

    made.env.process(steps())


@pytest.mark.parametrize("late", [0, 1, 7, 8])
def test_a_store_of_a_fault_within_the_window(late: int) -> None:
    """A change of permissions ``late`` ns after the load, announced while the walk is under way."""
    made = lab(window_ns=7)
    kvm, leaf = made.kvm, 70
    when = load_ns(made, leaf) + late

    def fault() -> None:
        kvm.leaf_changes(leaf, when)
        kvm.stage2.map_leaf(leaf, WRITE)

    # Announced before the walk comes to that window: the swap finds another entry than it loaded.
    at(made, load_ns(made, 64) - 200, fault)
    report = made.age()
    fails = 0 < late <= 7
    assert kvm.races is not None
    assert kvm.races.failed == fails
    assert report.young == 512, "it was young when it was loaded"
    entry = int(kvm.stage2.leaf.entries[leaf])
    assert entry == (VALID | WRITE | AF if fails else VALID | WRITE)


def test_what_an_unmap_takes_meanwhile_stays_gone_and_counts_as_young() -> None:
    made = lab(window_ns=400)
    kvm, leaf = made.kvm, 65
    costs = kvm.costs
    # A walk of one page stores half-way; the swap of this leaf lies 400 ns behind its load.
    start = load_ns(made, 64) - costs.ageing.call_ns - costs.ageing.walk_ns - 1
    at(made, start, lambda: kvm.unmap_chunk(9, start, leaf, leaf + 1))
    report = made.age()
    assert kvm.races is not None
    assert kvm.races.failed == 1
    assert int(kvm.stage2.leaf.entries[leaf]) == 0
    assert report.young == 512


@pytest.mark.parametrize("kernel", ["linux-6.12", "linux-6.4"])
def test_a_kernel_that_ages_under_the_lock_keeps_no_log(kernel: str) -> None:
    assert lab(kernel=kernel).kvm.races is None


def test_nothing_fails_where_nobody_interferes() -> None:
    made = lab(window_ns=400)
    made.age()
    made.drop(4 * KIB * 64, 4 * KIB * 64)
    assert made.kvm.races is not None
    assert made.kvm.races.failed == 0
    assert made.young() == 0
