"""Invalidation of stage-2 translations: one machine-wide path, and how often it is taken.

Source: arch/arm64/kvm/hyp/vhe/tlb.c and hyp/pgtable.c (stage2_unmap_put_pte,
stage2_unmap_defer_tlb_flush), v6.12; that broadcasts are served one after the other machine-wide:
message 20221112081714.2169495-1-ricarkol@google.com.
"""

from __future__ import annotations

import pytest
from lab import Lab

from simkvm.kernel.tlb import TlbiPath
from simkvm.units import KIB, MIB

LATENCY, SERVICE = 1500, 1300


def path() -> TlbiPath:
    return TlbiPath(LATENCY, SERVICE)


# -- the path ---------------------------------------------------------------------------------


def test_a_flush_alone_takes_its_latency() -> None:
    made = path()
    assert made.flush(1000) == 2500
    assert made.flush(10_000, 400) == 11_300, "but never less than its service"
    assert made.flush(20_000, 9000) == 29_000
    assert made.broadcasts == 3


def test_flushes_of_one_moment_are_served_in_turn() -> None:
    """N CPUs that flush all the time wait N services each."""
    made = path()
    assert [made.flush(1000) for _ in range(4)] == [2500, 3600, 4900, 6200]
    assert made.flush(6200) == 6200 + LATENCY, "free again exactly then"


def test_a_walk_that_flushes_again_and_again_slows_the_others() -> None:
    """A CPU has one flush in flight, so k walks make each wait for at most k - 1 others."""
    made = path()
    assert made.each_ns(0) == LATENCY
    made.walk(10_000, 5)
    assert made.each_ns(0) == 2 * SERVICE
    made.walk(20_000, 5)
    assert made.each_ns(9999) == 3 * SERVICE
    assert made.each_ns(10_000) == 2 * SERVICE, "the first walk is over"
    assert made.each_ns(20_000) == LATENCY
    assert made.broadcasts == 10


def test_a_walk_with_one_flush_is_no_stream() -> None:
    made = path()
    made.walk(10_000, 1)
    made.walk(10_000, 0)
    assert made.each_ns(0) == LATENCY
    assert made.broadcasts == 1


def test_a_flush_beside_walks_waits_for_one_of_each() -> None:
    made = path()
    made.walk(10_000, 5)
    made.walk(10_000, 5)
    assert made.flush(1000) == 1000 + 3 * SERVICE


# -- how often --------------------------------------------------------------------------------


def lab(machine: str, policy: str = "deferred", memory: int = 4 * MIB) -> Lab:
    return Lab(
        memory, machine=machine, kernel={"base": "linux-6.12", "set": {"unmap_tlbi": policy}}
    )


@pytest.mark.parametrize(
    ("machine", "policy", "per_leaf"),
    [
        ("graviton3-64c", "deferred", False),
        ("graviton3-64c", "per_leaf", True),
        ("ampere-altra-80c", "deferred", True),
        ("ampere-altra-80c", "per_leaf", True),
    ],
)
def test_leaves_are_flushed_at_the_end_if_kernel_and_machine_can(
    machine: str, policy: str, per_leaf: bool
) -> None:
    """Since v6.6, with range TLBI and forced write-back both; tables are never left to the end."""
    made = lab(machine, policy)
    made.fill()
    made.drop(0, 3 * MIB)
    assert made.broadcasts() == (768 if per_leaf else 1) + 1


@pytest.mark.parametrize("flag", ["tlbirange", "fwb"])
def test_both_features_are_needed(flag: str) -> None:
    machine = {"base": "graviton3-64c", "set": {flag: False}}
    made = Lab(2 * MIB, machine=machine)
    made.fill()
    made.drop(0, MIB)
    assert made.broadcasts() == 256


def test_an_empty_range_is_flushed_only_if_deferred() -> None:
    """kvm_pgtable_stage2_unmap() flushes the whole range then, whatever was there."""
    for machine, flushes in (("graviton3-64c", 1), ("ampere-altra-80c", 0)):
        made = lab(machine)
        made.drop()
        assert made.broadcasts() == flushes


def test_the_hold_contains_every_flush_of_a_leaf() -> None:
    holds = {}
    for policy in ("per_leaf", "deferred"):
        made = lab("graviton3-64c", policy)
        made.fill()
        made.drop(0, MIB)
        holds[policy] = made.lock_rows("range_start")[0]["hold"]
    costs = made.kvm.costs
    assert holds["per_leaf"] - holds["deferred"] == 256 * costs.tlbi_ns - costs.tlbi_all_ns


# -- what the guest pays ----------------------------------------------------------------------


def run_beside(machine: str, *ranges: tuple[int, int]) -> int:
    """When a vCPU is done that touches 100 pages, pauses, and touches them again.

    Meanwhile ``ranges`` (first byte, size) of other pages are taken back.
    """
    made = lab(machine)
    made.fill()
    made.drop(3 * MIB, 512 * KIB)
    done = made.t_ns
    touches = [(page, True, 0) for page in range(100)]
    pause = (99, True, done + 10_000_000)
    vcpu = made.touch(*touches[:99], pause, *touches)
    made.t_ns = done + 1000
    made.env.run(made.t_ns)
    for first, size in ranges:
        made.drop(first, size)
    made.env.run(vcpu.process)
    return vcpu.finished_ns


@pytest.mark.parametrize("machine", ["graviton3-64c", "ampere-altra-80c"])
def test_a_flush_costs_the_guest_its_translations(machine: str) -> None:
    """Each flush kills the VM's stage-1 entries on all CPUs."""
    usual = run_beside(machine)
    made = lab(machine)
    refill = made.kvm.costs.tlb_refill_ns
    assert run_beside(machine, (2 * MIB, 4 * KIB)) == usual + 100 * refill


def test_an_empty_range_costs_the_guest_too_where_it_is_flushed() -> None:
    usual = run_beside("graviton3-64c")
    refill = lab("graviton3-64c").kvm.costs.tlb_refill_ns
    assert run_beside("graviton3-64c", (3 * MIB, 4 * KIB)) == usual + 100 * refill


def test_nothing_is_lost_where_nothing_is_flushed() -> None:
    """Per leaf, and no leaf was valid: no TLBI was issued."""
    usual = run_beside("ampere-altra-80c")
    assert run_beside("ampere-altra-80c", (3 * MIB, 4 * KIB)) == usual


def test_ageing_flushes_nothing() -> None:
    made = lab("ampere-altra-80c")
    made.fill()
    made.age()
    made.age()
    assert made.broadcasts() == 0


@pytest.mark.parametrize("flushed", [False, True])
def test_a_flush_makes_use_visible_again(flushed: bool) -> None:
    """Ageing sees a page again when its translation is gone: only a TLB miss sets the flag."""
    made = lab("graviton3-64c")
    made.fill()
    rounds = [(page, True, 0) for page in range(99)] + [(99, True, 1_000_000)]
    made.touch(*rounds, *rounds, *rounds)
    made.env.run(400_000)
    made.t_ns = 400_000
    assert made.age().young == 1024, "all were mapped young"
    if flushed:
        made.drop(3 * MIB, 4 * KIB)
    assert made.t_ns < 900_000
    made.env.run(1_500_000)
    made.t_ns = 1_500_000
    assert made.age().young == (100 if flushed else 0)
    made.env.run(2_500_000)
    made.t_ns = 2_500_000
    assert made.age().young == 0, "cached again"
