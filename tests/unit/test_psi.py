"""Stall shares by hand, and whose time kswapd's functions are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import worlds

from simkvm.kernel.sites import RANGE_END, RANGE_START
from simkvm.observe.pressure import FUNCTIONS, stalled_shares
from simkvm.units import MIB
from simkvm.validate.traced.lab import Lab


@pytest.mark.parametrize(
    ("stalls", "some", "full"),
    [
        ([], 0.0, 0.0),
        ([(10, 30)], 0.2, 0.0),
        ([(10, 30), (20, 60)], 0.5, 0.1),  # both in [20, 30)
        ([(20, 60), (10, 30)], 0.5, 0.1),  # told in any order
        ([(10, 30), (30, 60)], 0.5, 0.0),  # one begins where the other ends
        ([(0, 100), (90, 500)], 1.0, 0.1),  # cut off at the end
        ([(200, 300)], 0.0, 0.0),  # told ahead of an end that came first
    ],
)
def test_shares_of_two_tasks(stalls: list[tuple[int, int]], some: float, full: float) -> None:
    got = stalled_shares(np.array(stalls, np.int64).reshape(-1, 2), 2, 100)
    assert got == pytest.approx((some, full))


def pressed_run(kernel: str, **host: Any) -> Any:
    return worlds.run(
        kernel=kernel,
        host={"memory": {"size": 4 * MIB}, "swap": {"kind": "zram"}, **host},
        guest={
            "memory": 5 * MIB,
            "vcpus": 2,
            "access": {"pattern": "uniform", "touches": 4000, "write_ratio": 0.5, "think": 1000},
        },
    ).summary


@pytest.mark.parametrize("whose", ["kswapd", "direct_reclaim"])
@pytest.mark.parametrize("kernel", ["linux-6.4", "linux-6.12", "linux-7.1-lockless"])
def test_a_function_has_what_its_callees_have(kernel: str, whose: str) -> None:
    shares = pressed_run(kernel)
    share = {name: shares[f"{whose}_share_{name}_ratio"] for name in FUNCTIONS}
    assert all(0 <= each <= 1 for each in share.values())
    top = sum(share[name] for name in ("folio_referenced", "ageing", "unmap", "compression"))
    assert 0.3 < top <= 1  # those that do not call one another
    assert share["look_around"] <= share["folio_referenced"]
    assert share["notifier"] <= share["folio_referenced"] + share["ageing"]
    asking = share["write_lock"] + share["read_lock"]
    assert (asking > 0) == (kernel != "linux-7.1-lockless")
    assert asking <= share["notifier"] + share["ageing"]
    assert 0 < share["unmap_lock"] < share["unmap"]


def test_direct_reclaim_is_what_stalls_but_for_sleep() -> None:
    """Nobody is throttled here, so a stall is all reclaim."""
    summary = pressed_run("linux-6.12")
    assert summary["pgsteal_direct"] > 0
    assert summary["direct_reclaim_ns_total"] == summary["allocstall_ns_total"]


def test_waiting_for_the_lock_is_part_of_an_unmap() -> None:
    """Both acquisitions of an invalidation are ``unmap_lock``, with what they spin."""
    lab = Lab(4 * MIB)
    lab.fill()
    lab.task.functions = {}
    held_ns = 5000
    began_ns = int(lab.env.now) + 1000
    lab.kvm.mmu_lock.write(began_ns - 10, 3, 0, lambda at: (held_ns, at + held_ns))
    lab.env.process(lab.kvm.notifier.invalidate(lab.task, began_ns, 0, 1))
    lab.env.run(began_ns + 100_000)
    rows = np.array(lab.kvm.mmu_lock.rows).reshape(-1, 6)[-2:]
    assert rows[:, 0].tolist() == [RANGE_START, RANGE_END]
    waited_ns = int(rows[:, 3].sum())
    assert waited_ns > held_ns - 1000
    assert lab.task.functions["unmap_lock"] == waited_ns
