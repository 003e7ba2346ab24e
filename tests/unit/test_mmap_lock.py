"""What faults do to the line of ``mmap_lock``: count, owner and count again.

Source: kernel/locking/rwsem.c (``rwsem_set_reader_owned``), v6.12.
"""

from __future__ import annotations

import numpy as np
import pytest
from lab import Lab

from simkvm.kernel.mmap_lock import LOCK, UNLOCK
from simkvm.units import KIB

PAGES = 128  #: of each vCPU


def populated(vcpus: int, present: bool, **keys: object) -> Lab:
    """vCPUs that touch ``PAGES`` pages each, whose host pages are there or not."""
    lab = Lab(
        vcpus * PAGES * 4 * KIB,
        {"vcpus": vcpus, "access": {"pattern": "populate"}},
        **keys,
    )
    if present:
        for leaf in range(lab.kvm.leaves):
            lab.kvm.host.install(leaf, True)
    return lab


def apart_ns(lab: Lab) -> float:
    """Time between faults in the middle of the run, where all vCPUs are at it."""
    lab.touch_all()
    arrivals = np.sort([row["arrival"] for row in lab.lock_rows("fault")])
    middle = arrivals[len(arrivals) // 4 : -len(arrivals) // 4]
    return float((middle[-1] - middle[0]) / (len(middle) - 1))


def test_taking_it_is_two_changes_of_its_line_and_letting_go_one() -> None:
    assert (LOCK, UNLOCK) == (2, 1)


@pytest.mark.parametrize("vcpus", [24, 48])
@pytest.mark.parametrize("transfer_ns", [50, 90])
def test_faults_on_pages_that_are_there_come_three_transfers_apart(
    vcpus: int, transfer_ns: int
) -> None:
    """The line is saturated, so that each of a fault's three changes fetches it, from however many.

    mmu_lock, with two transfers a fault, is not what binds.
    """
    machine = {
        "base": "ampere-altra-80c",
        "set": {"atomic_contended_service_ns": transfer_ns},
    }
    assert apart_ns(populated(vcpus, True, machine=machine)) == pytest.approx(
        3 * transfer_ns, rel=0.01
    )


def test_faults_that_allocate_come_six_transfers_apart() -> None:
    """Five on the way in, among them GUP's own locking, and one to let go of it."""
    lab = populated(48, False, machine="ampere-altra-80c")
    assert apart_ns(lab) == pytest.approx(6 * 50, rel=0.02)


def test_few_vcpus_are_not_bound_by_it() -> None:
    """One fault takes 1.5 us on an idle machine."""
    lab = populated(1, True, machine="ampere-altra-80c")
    assert apart_ns(lab) == pytest.approx(1500 + lab.kvm.costs.touch_ns, abs=10)


def test_x86_finds_pages_that_are_there_without_it() -> None:
    lab = populated(24, True, machine="x86-icelake-64c", kernel="linux-6.12-x86")
    lab.touch_all()
    assert lab.kvm.host.mmap_lock.owner == -1
