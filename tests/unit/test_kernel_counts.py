"""What the traced kernel did and no row of `simkvm validate traces` says.

The run that a case was seen in is named as there (`simkvm/validate/traced/record.py`); the counts
themselves are held in `tests/validation/test_traces.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lab import Lab, Tally, fill_sparsely, scenario

from simkvm.kernel.host_memory import OWN, PRESENT
from simkvm.kernel.stage2 import AF
from simkvm.kernel.world import World
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.machine import load_machine
from simkvm.units import GIB, MIB
from simkvm.validate.traced.labvm import LabVm

MS = 1_000_000
START, END = ("range_start", "write"), ("range_end", "write")
POPULATE = {"pattern": "populate"}


# -- taking memory back -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "length", "chunks"),
    [
        (0, 4 * GIB, [1048576] * 4),
        (MIB, 3 * GIB, [1047552, 1048576, 1048576, 1024]),
    ],
    ids=["sparse2-c/1", "sparse2-c/3"],
)
def test_chunks_of_a_range(first: int, length: int, chunks: list[int]) -> None:
    """Calls of kvm_pgtable_stage2_unmap() by size in KiB: cut at guest-physical 1 GiB."""
    lab = Lab(4 * GIB)
    tally = Tally(lab)
    lab.drop(first, length)
    assert [(walk.last - walk.first) * 4 for walk in tally.walks] == chunks


@pytest.mark.parametrize(
    ("preemption", "waiter", "entries"),
    [("full", False, 1), ("full", True, 2), ("lazy", True, 2), ("none", True, 1)],
)
def test_the_lock_is_let_go_only_with_a_reason(preemption: str, waiter: bool, entries: int) -> None:
    """sparse2-c/1: __cond_resched_rwlock_write() is called 3 times in 4 GiB; only some let go.

    In locks-sparse/1 one of the three did, because the only CPU had another thread to run: three
    write acquisitions for the range instead of two. Here CPUs have one thread, so contention is
    the one reason, and only for a kernel that is preemptible at run time (rwlock_needbreak()).
    """
    lab = Lab(4 * GIB, host={"preemption": preemption})
    fill_sparsely(lab, 2 * MIB)
    if waiter:
        lab.env.process(read_at(lab, 5000))
    tally = Tally(lab)
    lab.drop()
    assert tally.take()["calls"] == 4
    assert lab.acquisitions()[START] == entries


def read_at(lab: Lab, t_ns: int) -> Iterator[Any]:
    yield lab.env.timeout(t_ns)
    grant = lab.kvm.mmu_lock.read(t_ns, 5, 0, lambda at: (10, at + 10))
    assert not isinstance(grant, int), "the lock was not held"


def run_world(**keys: Any) -> tuple[World, dict[str, Any], Counter[tuple[str, str]]]:
    """A run to its end: the world, its summary, acquisitions by site and mode."""
    spec = scenario(**keys)
    built = World(spec, load_machine(spec.machine), load_kernel(spec.kernel))
    record = built.run()
    sites = zip(record.locks["site"], record.locks["mode"], strict=True)
    counts = dict(zip(sites, record.locks["acquisitions"], strict=True))
    return built, record.summary, Counter(counts)


# -- ageing -----------------------------------------------------------------------------------


def test_each_pass_finds_what_was_touched_since_and_never_flushes() -> None:
    """age-c: as many calls whatever is young. The host's own 19 pages belong to no slot."""
    lab, calls = Lab(8 * MIB), 2048
    lab.fill()
    touched = {0: calls, 1: 0, 2: 256, 3: 0}
    for number, young in touched.items():
        if number == 2:
            lab.kvm.stage2.leaf.entries[1:512:2] |= np.uint8(AF)
        lab.kvm.host.state[:] &= np.uint8(PRESENT | OWN)  # the host itself touches nothing
        report = lab.age()
        assert (report.calls, report.scanned, report.young) == (calls, calls, young)
        assert lab.acquisitions() == {("age", "write"): calls}
        assert lab.young() == 0
    assert lab.broadcasts() == 0


def test_generations_of_a_new_group() -> None:
    """locks-age: "+" makes min 0, 1, 2 and max 4, 5, 6; pages count as active for two generations.

    Pass 1 finds all young, pass 2 none (2048 pages leave the active lists), then all are touched
    and pass 3 brings them back.
    """
    lab = Lab(8 * MIB)
    lab.fill()
    lru = lab.kvm.host.lru
    assert (lru.min_seq, lru.max_seq) == (0, 3)
    seen = []
    for number in range(3):
        if number == 2:
            lab.kvm.stage2.leaf.entries[:] |= np.uint8(AF)
        lab.age()
        active = lru.sizes[lru.max_seq % 4] + lru.sizes[(lru.max_seq - 1) % 4]
        seen.append((lru.min_seq, lru.max_seq, active))
    assert seen == [(1, 4, 2048), (2, 5, 0), (3, 6, 2048)]


def test_ranges_while_vcpus_run() -> None:
    """locks-run2/3 and 8: 8 ranges of 2 MiB are 16 write acquisitions, one of 16 MiB is 2."""
    # The run ends with the vCPUs, so that no fault is on its way to the lock.
    touching = {"pattern": "uniform", "touches": 40_000, "write_ratio": 1.0, "think": 300}
    access = {"pattern": "phases", "phases": [POPULATE, touching]}
    takes = {"kind": "madvise_dontneed", "guest": "vm", "order": "sequential"}
    _, summary, locks = run_world(
        guest={"memory": 16 * MIB, "vcpus": 2, "access": access},
        contenders={
            "pieces": takes | {"range": 2 * MIB, "rate": 5000, "start": 8 * MS, "stop": 9_500_000},
            "whole": takes | {"range": 16 * MIB, "rate": 100, "start": 12 * MS, "stop": 13 * MS},
        },
    )
    assert locks[START] == locks[END] == 8 + 1
    assert summary["unmap_calls"] == 8 + 1
    assert locks["fault", "read"] == summary["faults"] > 4096
    assert summary["sim_ns"] > 13 * MS, "both have taken all they wanted"
    assert summary["safety"] == "clean"


def test_ageing_while_vcpus_run() -> None:
    """locks-run2/5 and 7: as many acquisitions with two vCPUs that touch pages all the time."""
    phases = [POPULATE, {"pattern": "uniform", "touches": 40_000, "write_ratio": 1.0, "think": 100}]
    guest = {"memory": 16 * MIB, "vcpus": 2, "access": {"pattern": "phases", "phases": phases}}
    world, summary, locks = run_world(guest=guest, ageing={"start": 8_000_000, "passes": 2})
    assert (summary["faults"], summary["tlbi_broadcasts"]) == (4096, 0)
    assert [(p.scanned, p.calls) for p in world.ageing.passes] == [(4096, 4096)] * 2
    assert locks == {("fault", "read"): 4096, ("age", "write"): 2 * 4096}


# -- blocks and pages in one guest --------------------------------------------------------------


def test_blocks_come_back_where_pages_lack() -> None:
    """dirty2-c/5: the callbacks of 8 tables of 32 pages drop 264 references."""
    vm = LabVm(16 * MIB, thp=True)
    for command in ("pop:0,0,1", "dirty:1", "pops:0,0,1,64", "dirty:0"):
        vm.do(command)
    kvm = vm.lab.kvm
    subtrees = [kvm.stage2.subtree(512 * block) for block in range(8)]
    puts = sum(entries + len(tables) for tables, entries in subtrees)
    assert puts == 264, "kvm_s2_put_page() of the callbacks"
    assert vm.do("pop:0,0,1")["stage2_free_unlinked_table"] == kvm.collapses == 8
    vm.do("sleep:300")
    assert (kvm.tables_called_back, kvm.tables_freed) == (8, 8)
    assert kvm.stage2.linked_tables == 1
    assert vm.lab.world.rcu.idle


def test_ageing_calls_once_a_huge_page() -> None:
    """cost-age-thp; so, too, while stage 2 maps it by pages: the call is the host's PMD's."""
    vm = LabVm(64 * MIB, thp=True)
    lab = vm.lab
    vm.do("pop:0,0,1")
    assert lab.age().calls == 32
    assert lab.acquisitions() == {("age", "write"): 32}
    assert lab.young() == 0
    vm.do("dirty:1")
    vm.do("pop:28,4,1")
    report = lab.age()
    assert (report.calls, report.young) == (32, 1)
    assert lab.broadcasts() == 1 + 1, "ageing never flushes"


def test_a_range_that_loses_a_part_keeps_its_host_table() -> None:
    """thp-c/6: taken back page by page, no fault finds the place for a huge page any more.

    Taken back in one piece it does (thp-c/2), and where another process's collapse put one.
    """
    vm = LabVm(8 * MIB, thp=True)
    host = vm.lab.kvm.host
    vm.do("pop:0,0,1")
    vm.do("dn:0,2048")
    vm.do("dn:2048,4")
    vm.do("dn:2048,2048")
    vm.do("dn:4096,2048")
    host.split(3 * 512, 3 * 512 + 1)
    vm.do("dn:6144,2048")
    assert host.kept.tolist() == [False, True, False, True]
    assert vm.do("pop:0,0,1")["kvm_pgtable_stage2_map"] == 1 + 512 + 1 + 512
    host.zap(512, 1024)
    host.install_huge(512, 1024)
    vm.do("dn:2048,2048")
    assert vm.do("pop:0,0,1")["kvm_pgtable_stage2_map"] == 1
