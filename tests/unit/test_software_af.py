"""Access-flag faults: where the CPU does not set the flag, software does, at the next TLB miss.

Source: arch/arm64/kvm/mmu.c (handle_access_fault), v6.1 and v6.12.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lab import Lab, account, world

from simkvm.kernel.memslot import Refusal
from simkvm.kernel.sites import ACCESS_FAULT
from simkvm.kernel.stage2 import AF, WRITE
from simkvm.kernel.world import World
from simkvm.units import KIB, MIB

THINK = 1000  #: after each touch, ns


def software(**costs: Any) -> dict[str, Any]:
    return {"base": "graviton3-64c", "set": {"hw_af": False, **costs}}


def lab(pages: int = 64, tlb: int = 16, hw_af: bool = False, kernel: str = "linux-6.12") -> Lab:
    """A guest whose pages are all mapped; its TLB has ``tlb`` entries."""
    machine = software(tlb_l2_entries=tlb, hw_af=hw_af)
    guest = {"vcpus": 2, "access": {"pattern": "uniform", "touches": 1}}
    made = Lab(pages * 4 * KIB, guest, machine=machine, kernel=kernel)
    made.fill()
    return made


def touched(made: Lab, *pages: int, write: bool = True) -> int:
    """Have a new vCPU touch ``pages`` in order; returns its access-flag faults."""
    vcpu = made.touch(*((page, write, THINK) for page in pages))
    made.env.run(vcpu.process)
    made.t_ns = vcpu.finished_ns
    assert vcpu.touches == len(pages)
    return vcpu.access_faults


def clear(made: Lab, *pages: int) -> None:
    made.kvm.clear_young(np.array(pages), int(made.env.now))


def faults(made: Lab) -> list[dict[str, int]]:
    return [row for row in account(made.kvm.mmu_lock.rows) if row["site"] == ACCESS_FAULT]


# -- when ---------------------------------------------------------------------------------------


def test_a_cleared_flag_costs_one_fault_at_the_next_touch() -> None:
    made = lab()
    clear(made, 3, 5, 9)
    assert touched(made, 1, 3, 5, 3, 5, 7) == 2  # 9 is not touched
    assert len(faults(made)) == 2
    assert made.young() == 63


def test_a_new_leaf_has_its_flag_set() -> None:
    """kvm_pgtable_stage2_map() installs leaves with AF: no second fault follows the first."""
    made = Lab(MIB, machine=software())
    assert touched(made, *range(256)) == 0
    assert made.acquisitions() == {("fault", "read"): 256}


def test_with_the_flag_in_hardware_there_are_none() -> None:
    made = lab(hw_af=True)
    clear(made, 3)
    assert touched(made, 3, 3) == 0
    assert made.young() == 64


def test_a_translation_in_the_tlb_does_not_fault() -> None:
    """Ageing invalidates nothing: who has the translation goes on, flag or not."""
    made = lab()
    vcpu = made.touch((3, True, THINK), (3, True, 50 * THINK), (3, True, THINK), (19, True, THINK))
    made.env.run(10 * THINK)
    clear(made, 3)
    made.env.run(vcpu.process)
    assert (vcpu.touches, vcpu.access_faults) == (4, 0)
    assert made.kvm.stage2.leaf.entries[3] & AF == 0


def test_it_does_once_its_translation_was_displaced() -> None:
    """3 and 19 share a slot of 16 entries."""
    made = lab()
    vcpu = made.touch((3, True, 50 * THINK), (19, True, THINK), (3, True, THINK), (3, True, THINK))
    made.env.run(10 * THINK)
    clear(made, 3)
    made.env.run(vcpu.process)
    assert (vcpu.touches, vcpu.access_faults) == (4, 1)


def test_it_does_once_the_tlb_was_invalidated() -> None:
    made = lab()
    vcpu = made.touch((3, True, 50 * THINK), (3, True, THINK), (3, True, THINK))
    made.env.run(10 * THINK)
    clear(made, 3)
    made.kvm.flush_vmid(11 * THINK)
    made.env.run(vcpu.process)
    assert (vcpu.touches, vcpu.access_faults) == (3, 1)


def test_a_flag_that_is_cleared_after_the_last_touch_costs_nothing() -> None:
    made = lab()
    vcpu = made.touch((3, True, THINK), (4, True, 50 * THINK), (5, True, THINK))
    made.env.run(10 * THINK)
    clear(made, 3, 4)
    made.env.run(vcpu.process)
    assert vcpu.access_faults == 0


def test_who_shares_the_page_faults_only_if_he_is_first() -> None:
    made = lab()
    clear(made, 3)
    first = made.touch((3, True, THINK))
    second = made.touch((1, True, 20 * THINK), (3, True, THINK))
    for vcpu in (first, second):
        made.env.run(vcpu.process)
    assert (first.access_faults, second.access_faults) == (1, 0)


def test_a_page_that_is_not_writable_either_faults_for_its_flag_first() -> None:
    """The walker reports an access-flag fault before a permission fault."""
    made = lab()
    made.kvm.stage2.leaf.entries[3] &= np.uint8(~WRITE & 0xFF)
    clear(made, 3)
    vcpu = made.touch((3, True, THINK))
    made.env.run(vcpu.process)
    assert (vcpu.access_faults, vcpu.fault.faults) == (1, 1)
    sites = [row["site"] for row in account(made.kvm.mmu_lock.rows)]
    assert sites.index(ACCESS_FAULT) == 0


# -- what it costs --------------------------------------------------------------------------------


def test_on_an_idle_machine_it_takes_what_the_machine_says() -> None:
    lengths = []
    for cleared in (False, True):
        made = lab()
        made.kvm.mmu_lock.idle_for(0, 0)
        if cleared:
            clear(made, 3, 4)
        touched(made, 3, 4)
        lengths.append(made.t_ns)
    costs, line = made.kvm.costs, made.kvm.costs.line
    # The exit comes when the access is tried, and it is tried again afterwards. Nobody had the
    # lock's line before; the second time the CPU has it.
    tried = 2 * costs.touch_ns
    assert lengths[1] - lengths[0] == 2 * 550 + tried + (line.transfer_ns - line.same_ns)


def test_it_takes_the_lock_once_and_asks_the_host_nothing() -> None:
    made = lab()
    clear(made, *range(10))
    visits = made.kvm.host.mmap_lock.free_ns
    touched(made, *range(10))
    rows = faults(made)
    assert len(rows) == len(account(made.kvm.mmu_lock.rows)) == 10
    assert {row["hold"] for row in rows} == {made.kvm.costs.access_fault.hold_ns}
    assert made.kvm.host.mmap_lock.free_ns == visits


@pytest.mark.parametrize(
    ("kernel", "mode"), [("linux-6.1", "write"), ("linux-6.4", "read"), ("linux-6.12", "read")]
)
def test_the_mode_of_the_lock(kernel: str, mode: str) -> None:
    """For write up to v6.1."""
    made = lab(kernel=kernel)
    clear(made, 3)
    touched(made, 3)
    assert made.acquisitions() == {("access_fault", mode): 1}


def test_without_a_lock_it_costs_as_much_and_takes_none() -> None:
    ends = {}
    for policy in ("read", "none"):
        kernel = {"base": "linux-6.12", "set": {"access_fault_lock": policy}}
        made = Lab(64 * 4 * KIB, machine=software(tlb_l2_entries=16), kernel=kernel)
        made.fill()
        made.kvm.mmu_lock.advance(0)
        clear(made, 3, 4)
        assert touched(made, 3, 4) == 2
        ends[policy] = made.t_ns
        assert len(faults(made)) == (2 if policy == "read" else 0)
    line = made.kvm.costs.line
    assert ends["read"] - ends["none"] == line.transfer_ns - line.same_ns


def test_an_invalidation_in_progress_does_not_make_it_give_up() -> None:
    """handle_access_fault() has no retry test."""
    made = lab()
    clear(made, 3)
    made.kvm.notifier.in_progress = 1
    assert touched(made, 3) == 1


def test_a_page_that_is_gone_meanwhile_is_left_alone() -> None:
    """The walk finds nothing; the guest faults again, for the translation this time."""
    made = lab()
    clear(made, 3)
    vcpu = made.touch((3, True, THINK))
    exit_ns = made.kvm.costs.touch_ns + made.kvm.costs.access_fault.exit_ns
    made.env.run(exit_ns - 1)
    made.kvm.unmap_chunk(9, exit_ns - 1, 3, 4)
    made.kvm.host.zap(3, 4)
    made.env.run(vcpu.process)
    assert (vcpu.access_faults, vcpu.fault.faults, vcpu.touches) == (1, 1, 1)


def test_a_read_that_needs_the_flag_is_no_write() -> None:
    """Where only writes are refused, a read fault goes through."""
    made = Lab(MIB, machine=software())
    made.kvm.refusals.append(Refusal(0, 256, reads=False))
    vcpu = made.touch((3, False, 0))
    made.env.timeout(100 * THINK)  # else a guest that is refused goes on for ever
    made.env.run(100 * THINK)
    assert (vcpu.touches, vcpu.fault.user_exits) == (1, 0)


# -- beside ageing --------------------------------------------------------------------------------


def aged(hw_af: bool, method: str, kernel: str = "linux-6.12") -> World:
    access = {"pattern": "uniform", "touches": 20_000, "think": 100, "write_ratio": 1.0}
    phases = [{"pattern": "populate"}, access]
    built = world(
        guest={"memory": 2 * MIB, "access": {"pattern": "phases", "phases": phases}},
        machine=software(tlb_l2_entries=64, hw_af=hw_af),
        kernel=kernel,
        ageing={"method": method, "start": 2_000_000, "interval": 100_000, "passes": 3},
    )
    built.run()
    return built


@pytest.mark.parametrize("method", ["page_idle", "folio_referenced"])
def test_every_cleared_flag_that_was_set_again_was_one_acquisition(method: str) -> None:
    """Young at the end + cleared by ageing = mapped + access-flag faults; none in hardware."""
    built = aged(False, method)
    kvm = built.kvms[0]
    vcpu = kvm.vcpus[0]
    stat = built.recorder.locks["vm"]
    taken = {row["site"]: row["acquisitions"] for row in stat.rows()}
    assert vcpu.access_faults == taken["access_fault"] > 300
    assert taken["fault"] == 512
    assert "access_fault" not in {r["site"] for r in aged(True, method).recorder.locks["vm"].rows()}


def test_every_flag_that_was_cleared_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = 0
    from simkvm.kernel.kvm import Kvm

    clear_young = Kvm.clear_young

    def counted(kvm: Kvm, leaves: Any, t_ns: int) -> None:
        nonlocal cleared
        cleared += len(leaves)
        clear_young(kvm, leaves, t_ns)

    monkeypatch.setattr(Kvm, "clear_young", counted)
    built = aged(False, "page_idle")
    kvm = built.kvms[0]
    young = int(np.count_nonzero(kvm.stage2.young(0, kvm.leaves)))
    assert young + cleared == 512 + kvm.vcpus[0].access_faults
    assert cleared > 1000


def test_mglru_only_opens_a_generation() -> None:
    """try_to_inc_max_seq() does not walk if arch_has_hw_pte_young() says no."""
    made = lab()
    before = made.kvm.host.lru.max_seq
    report = made.age()
    assert (report.scanned, report.calls, report.young) == (0, 0, 0)
    assert made.kvm.host.lru.max_seq == before + 1
    assert made.young() == 64
    assert not made.kvm.mmu_lock.rows
