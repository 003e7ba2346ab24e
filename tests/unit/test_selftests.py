"""The selftests: counts by the rules of what they do, phases, printed lines, options."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from selftest_runs import MS, SMALL, acquisitions, lines, phases, run, run_scenario, scenario, world

from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.errors import InputError
from simkvm.scenario.guest_modes import MODES, backing_bytes, stage2_bytes
from simkvm.scenario.load import load
from simkvm.scenario.selftests import AnySelftest
from simkvm.selftests.max_guest_memory import NAP_NS
from simkvm.selftests.memstress import GuestRandom
from simkvm.selftests.mmu_stress import MmuStress
from simkvm.units import KIB, MIB

X86 = ("linux-6.15-x86", "linux-6.12-x86-shadow", "linux-6.15-x86-shadow")
S = r"\d+\.\d{9}s"
MODELS = {
    get_args(model.model_fields["test"].annotation)[0]: model
    for model in get_args(get_args(AnySelftest)[0])
}


# -- lines and phases -------------------------------------------------------------------------

VM = [
    r"Testing guest mode: PA-bits:40,  VA-bits:48,  4K pages",
    r"guest physical test memory: \[0x[0-9a-f]+, 0x[0-9a-f]+\)",
]
ACCESSES = ("Writing to populated memory   ", "Reading from populated memory ")
MEETINGS = ("spawning", "run 1", "reset", "run 2")
MET = [
    f"{text}"
    for name in MEETINGS
    for text in (
        f"Waiting for vCPUs to finish {name}...",
        f"All vCPUs finished {name}, releasing...",
    )
]
PRINTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "access tracking by page_idle": (
        {"test": "access_tracking_perf_test", "vcpus": 1},
        [
            *VM,
            "",
            f"Populating memory             : {S}",
            *(f"{text}: {S}" for text in ACCESSES),
            f"Mark memory idle              : {S}",
            f"Writing to idle memory        : {S}",
            f"Mark memory idle              : {S}",
            f"Reading from idle memory      : {S}",
        ],
    ),
    "access tracking by MGLRU": (
        {"test": "access_tracking_perf_test", "lru_gen": True, "idle_pages": "warn"},
        [
            "Using lru_gen for aging",
            *VM,
            "",
            f"Populating memory             : {S}",
            r"Initial aging pass \(lru_gen\)",
            f"Re-populating memory          : {S}",
            *(f"{text}: {S}" for text in ACCESSES),
            rf"Mark memory idle \(lru_gen\)    : {S}",
            f"Writing to idle memory        : {S}",
            rf"Mark memory idle \(lru_gen\)    : {S}",
            f"Reading from idle memory      : {S}",
        ],
    ),
    "ageing while populating": (
        {"test": "access_tracking_perf_test", "lru_gen": True, "age_while_populating": True},
        [
            *VM,
            r"Running lru_gen benchmark\.\.\.",
            r"Populating memory \(async\)     ",
            f"vcpu wall time                : {S}",
            rf"lru_gen avg pass duration     : {S}, \(passes:\d+, total:{S}\)",
        ],
    ),
    "demand paging": (
        {"test": "demand_paging_test"},
        [
            *VM,
            "Finished creating vCPUs and starting uffd threads",
            "Started all vCPUs",
            "All vCPU threads joined",
            f"Total guest execution time:\t{S}",
            r"Per-vcpu demand paging rate:\t\d+\.\d{6} pgs/sec/vcpu",
            r"Overall demand paging rate:\t\d+\.\d{6} pgs/sec",
        ],
    ),
    "dirty log": (
        {"test": "dirty_log_perf_test"},
        [
            "Test iterations: 2",
            *VM,
            f"Populate memory time: {S}",
            f"Enabling dirty logging time: {S}",
            "",
            *(
                f"Iteration {n} {what} time: {S}"
                for n in (1, 2)
                for what in ("dirty memory", "get dirty log", "clear dirty log")
            ),
            f"Disabling dirty logging time: {S}",
            rf"Get dirty log over 2 iterations took {S}\. \(Avg {S}/iteration\)",
            rf"Clear dirty log over 2 iterations took {S}\. \(Avg {S}/iteration\)",
        ],
    ),
    "page table": (
        {"test": "kvm_page_table_test"},
        [
            VM[0],
            "Testing memory backing src type: anonymous",
            "Testing memory backing src granularity: 0x1000",
            "Testing memory size\\(aligned\\): 0x400000",
            "Guest physical test memory offset: 0x[0-9a-f]+",
            "Number of testing vCPUs: 2",
            "Started all vCPUs successfully",
            *(
                line
                for stage in ("CREATE", "UPDATE", "ADJUST")
                for line in (f"KVM_{stage}_MAPPINGS: total execution time: {S}", "")
            ),
        ],
    ),
    "max guest memory": (
        {"test": "max_guest_memory_test"},
        [
            "Running with 0gb of guest memory and 2 vCPUs",
            *MET,
            f"run1 = {S}, reset = {S}, run2 =  {S}",
        ],
    ),
    "mmu stress": (
        {"test": "mmu_stress_test"},
        [
            "Running with 0gb of guest memory and 2 vCPUs",
            *MET,
            *(
                text
                for name in ("mprotect RO", "mprotect RW")
                for text in (
                    f"Waiting for vCPUs to finish {name}...",
                    f"All vCPUs finished {name}, releasing...",
                )
            ),
            f"run1 = {S}, reset = {S}, run2 = {S}, ro = {S}, rw = {S}",
        ],
    ),
    "memslots": (
        {"test": "memslot_perf_test", "first": 4},
        [
            "Testing move inactive area performance with 1 runs, 0.001 seconds each",
            rf"Test took {S} for slot setup \+ {S} all iterations",
            rf"Done \d+ iterations, avg {S} each",
            rf"Best runtime result was {S} per iteration \(with \d+ iterations\)",
            "",
            "Testing RW performance with 1 runs, 0.001 seconds each",
            rf"Test took {S} for slot setup \+ {S} all iterations",
            rf"Done \d+ iterations, avg {S} each",
            rf"Best runtime result was {S} per iteration \(with \d+ iterations\)",
            f"Best slot setup time for the whole test area was {S}",
        ],
    ),
}


@pytest.mark.parametrize("case", PRINTED)
def test_lines_are_those_of_the_selftest_and_phases_follow_one_another(case: str) -> None:
    options, wanted = PRINTED[case]
    _, record = run(**options)
    printed = lines(record)
    assert len(printed) == len(wanted), printed
    for line, pattern in zip(printed, wanted, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    found = phases(record)
    assert found
    assert all(0 <= phase["begin_ns"] <= phase["end_ns"] for phase in found)
    ends = [phase["end_ns"] for phase in found]
    assert ends[-1] <= record.summary["sim_ns"]
    for phase in found:  # what a phase prints is what it took
        said = re.search(rf"[ :=\t]({S})$", phase["line"].rstrip("\n"))
        if said:
            took = phase["end_ns"] - phase["begin_ns"]
            assert said[1] == f"{took // 10**9}.{took % 10**9:09}s"
    assert record.summary["safety"] == "clean"


def test_phases_that_follow_one_another_add_up() -> None:
    _, record = run("mmu_stress_test")
    found = {phase["name"]: phase for phase in phases(record)}
    names = ["run1", "reset", "run2", "ro", "rw"]
    for before, after in pairwise(names):
        assert found[before]["end_ns"] == found[after]["begin_ns"]
    assert found["ro"]["begin_ns"] <= found["mprotect RO"]["begin_ns"]
    assert found["mprotect RO"]["end_ns"] <= found["ro"]["end_ns"]


# -- counts -----------------------------------------------------------------------------------


@cache
def page_idle_run() -> tuple[World, Record]:
    return run("access_tracking_perf_test", vcpus=1)


def test_populating_takes_the_read_lock_once_a_page_and_later_touches_do_not() -> None:
    _, record = page_idle_run()
    pages = 10 * MIB // (4 * KIB)
    assert record.summary["faults"] == acquisitions(record, "fault", "read") == pages
    assert record.summary["touches"] == 5 * pages, "five rounds of access"
    # One page below the top of the addresses: the region begins and ends inside a table.
    assert record.summary["tables_allocated"] == pages // 512 + 1 + 1
    assert record.summary["tables_freed"] == record.summary["tables_allocated"]


def test_a_round_of_touches_is_two_flags_one_trip_to_user_space_and_the_touches() -> None:
    built, record = page_idle_run()
    test, costs = built.selftest, built.kvms[0].costs
    trip = 2 * round(test.machine["exit_to_user_ns"] / 2)
    wanted = 2 * costs.line.transfer_ns + trip + 2560 * costs.touch_ns
    took = {phase["name"]: phase["end_ns"] - phase["begin_ns"] for phase in phases(record)}
    assert took["Writing to populated memory"] == took["Reading from idle memory"] == wanted


def idle_walks(pages: int, rounds: int, stays: range) -> int:
    """Walks of ``rounds`` of marking by one thread; translations of ``stays`` are never dropped.

    Reading a page's bit walks for each page of its word that is marked (mm/page_idle.c).
    """
    idle, walks = [False] * pages, 0
    for number in range(rounds):
        young = [number == 0 or page not in stays for page in range(pages)]
        for page in range(pages):
            word = page - page % 64
            marked = [other for other in range(word, min(word + 64, pages)) if idle[other]]
            walks += len(marked)
            for other in marked:
                idle[other], young[other] = not young[other], False
            if not idle[page]:
                walks += 1
                idle[page], young[page] = True, False
    return walks


def test_page_idle_walks_for_each_marked_page_of_a_word_and_to_mark() -> None:
    _, record = page_idle_run()
    words = 10 * MIB // (64 * 4 * KIB)
    first, second = 64 * 63 // 2 + 64, 64 + 64 * 63 // 2 + 64
    assert idle_walks(2560, 2, range(0)) == words * (first + second)
    assert acquisitions(record, "age", "write") == words * (first + second)


def test_pages_behind_the_first_of_a_huge_page_have_no_idle_bit() -> None:
    options = {"backing_src": "anonymous_thp", "vcpus": 1, "vcpu_memory": 4 * MIB}
    built, record = run("access_tracking_perf_test", **options, idle_pages="warn")
    # A round reads the word of each folio's first page 64 times, once it is marked.
    assert acquisitions(record, "age", "write") == 2 * (1 + 63 + 64)
    (marked,) = built.selftest.marked.values()
    assert (marked.pages, marked.still_idle) == (1024, 2)


def test_pages_whose_translation_stayed_cached_look_idle_still() -> None:
    # 1664 pages on 1280 slots: 384 slots are used twice a round, 896 keep their page.
    options = {"vcpu_memory": 1664 * 4 * KIB, "idle_pages": "warn"}
    built, record = run("access_tracking_perf_test", **options)
    assert built.kvms[0].costs.tlb_entries == 1280
    marked = built.selftest.marked
    assert [mark.pages for mark in marked.values()] == [1664, 1664]
    assert [mark.still_idle for mark in marked.values()] == [896, 896]
    walks = idle_walks(1664, 2, range(384, 1280))
    assert acquisitions(record, "age", "write") == 2 * walks


def test_a_test_with_too_many_idle_pages_ends_or_warns() -> None:
    small = {"vcpu_memory": 512 * KIB}  # the TLB holds all of it, so no flag is ever set again
    _, record = run("access_tracking_perf_test", **small)
    assert lines(record)[-1] == "  vCPU0: Too many pages still idle (128 out of 128)"
    _, record = run("access_tracking_perf_test", **small, idle_pages="warn")
    said = [line for line in lines(record) if line.startswith("WARNING")]
    assert said == [
        f"WARNING: vCPU{n}: Too many pages still idle (128 out of 128), "
        "this will affect performance results."
        for n in (0, 1)
    ]
    assert lines(record)[-1].startswith("Reading from idle memory")


def test_mglru_asks_once_a_present_page_in_each_pass() -> None:
    _, record = run("access_tracking_perf_test", lru_gen=True, idle_pages="warn")
    pages = 2 * 10 * MIB // (4 * KIB)
    assert record.passes["calls"] == [pages] * 3
    assert acquisitions(record, "age", "write") == 3 * pages


def test_ageing_while_populating_goes_on_until_the_last_vcpu_is_done() -> None:
    _, record = run("access_tracking_perf_test", lru_gen=True, age_while_populating=True)
    wall, average = phases(record)
    assert record.passes["end_ns"][-1] >= wall["end_ns"] > record.passes["start_ns"][-1]
    assert f"passes:{len(record.passes['end_ns'])}," in average["line"]
    assert wall["begin_ns"] == average["begin_ns"]


def test_each_page_is_one_message_and_one_fault_through_userfaultfd() -> None:
    built, record = run("demand_paging_test")
    pages = 2 * 2 * MIB // (4 * KIB)
    assert [uffd.messages for uffd in built.selftest.uffds] == [pages // 2] * 2
    assert sum(reader.pages for reader in built.selftest.readers) == pages
    assert acquisitions(record, "fault", "read") == pages
    assert record.summary["faults"] == pages
    # A fault sleeps until a reader was woken and woke it: two wake-ups.
    wakeups = 2 * built.kvms[0].costs.wakeup_ns
    took = phases(record)[0]
    assert took["end_ns"] - took["begin_ns"] > pages // 2 * wakeups


def test_vcpus_that_want_the_same_page_are_woken_by_one_copy() -> None:
    built, record = run("demand_paging_test", overlap=True)
    (uffd,) = built.selftest.uffds
    pages = 2 * 2 * MIB // (4 * KIB)
    assert pages <= uffd.messages <= 2 * pages
    assert acquisitions(record, "fault", "read") >= pages
    assert uffd.messages - uffd.collisions == pages, "every page is installed once"
    built, _ = run("demand_paging_test", overlap=True, readers_per_uffd=2)
    (uffd,) = built.selftest.uffds
    assert uffd.collisions > 0, "both readers took a message of the same page"
    assert uffd.messages - uffd.collisions == pages


def test_a_huge_copy_fills_the_pages_around_the_fault() -> None:
    built, record = run("demand_paging_test", backing_src="anonymous_thp")
    assert sum(uffd.messages for uffd in built.selftest.uffds) == 2, "one for each 2 MiB"
    assert record.summary["faults"] == 1024, "but stage 2 is mapped a page at a time"


def test_minor_faults_copy_nothing() -> None:
    def took(**options: Any) -> int:
        _, record = run("demand_paging_test", backing_src="shmem", **options)
        total = phases(record)[0]
        return int(total["end_ns"] - total["begin_ns"])

    assert took(uffd_mode="MINOR") < took(uffd_mode="MISSING")


def test_prefaulted_memory_needs_one_fault_a_page_and_a_second_run_none() -> None:
    built, record = run("max_guest_memory_test")
    pages = 8 * MIB // (4 * KIB)
    assert record.summary["faults"] == acquisitions(record, "fault", "read") == pages
    assert record.summary["touches"] == 2 * pages
    # Memslots 4 and 2 are deleted: one hold each, whatever their size.
    assert acquisitions(record, "memslot", "write") == 2
    assert record.summary["unmapped_pages"] == pages // 2
    naps = NAP_NS + built.selftest.ioctl_ns + built.kvms[0].costs.wakeup_ns
    lengths = {phase["name"]: phase["end_ns"] - phase["begin_ns"] for phase in phases(record)}
    assert all(lengths[name] % naps == 0 for name in ("run1", "reset", "run2"))
    assert lengths["reset"] == naps, "the main thread naps once: threads were there at once"
    assert {name: record.summary[f"{name}_ns"] for name in ("run1", "reset", "run2")} == {
        name: lengths[name] for name in ("run1", "reset", "run2")
    }
    assert np.isnan(run("demand_paging_test")[1].summary["run2_ns"])


def test_reading_debugfs_is_part_of_each_ageing_command() -> None:
    """``lru_gen_read_memcg_stats``: a command to debugfs names a generation, read before."""
    took: list[dict[str, int]] = []
    passes: list[list[int]] = []
    for read_ns in (0, 700_000):
        machine = {"base": "ampere-altra-80c", "set": {"lru_gen_read_ns": read_ns}}
        top = {"machine": machine}
        built, record = run("access_tracking_perf_test", top, lru_gen=True, idle_pages="warn")
        assert len(built.selftest.passes) == 3, "the initial one, and one before each idle access"
        spent = [(row["name"], row["end_ns"] - row["begin_ns"]) for row in phases(record)]
        took.append({name: ns for name, ns in spent if "idle" in name.lower()})
        passes.append([done.end_ns - done.start_ns for done in built.selftest.passes])
    marking = "Mark memory idle (lru_gen)"
    assert took[1][marking] - took[0][marking] == 700_000
    assert passes[0] == passes[1], "the walk itself is not longer"


def test_mprotect_is_one_range_each_way_and_every_write_fails_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: dict[int, list[int]] = {0: [], 1: []}
    efault = MmuStress._efault

    def noted(self: MmuStress, vcpu: Vcpu, t_ns: int) -> int:
        if vcpu.index in self._skipping:
            refused[vcpu.index].append(vcpu._list[vcpu._position])
        return efault(self, vcpu, t_ns)

    monkeypatch.setattr(MmuStress, "_efault", noted)
    built, record = run("mmu_stress_test")
    pages = 8 * MIB // (4 * KIB)
    assert acquisitions(record, "range_start", "write") == 2
    assert acquisitions(record, "range_end", "write") == 2
    failed = [vcpu.fault.user_exits for vcpu in built.kvms[0].vcpus]
    assert all(failed)
    # From the first that fails on all do, up to the end of the part, in whose middle it may lie,
    # and in every further round: one ends when all vCPUs have failed.
    for index, leaves in refused.items():
        low, part = index * pages // 2, pages // 2
        assert leaves[-1] == low + part - 1
        assert {(b - a) % part for a, b in pairwise(leaves)} == {1}
    made = acquisitions(record, "fault", "read")
    assert record.summary["faults"] == made + sum(failed)


def test_nothing_is_writable_while_the_memory_is_read_only() -> None:
    from simkvm.kernel.stage2 import VALID, WRITE

    built = world("mmu_stress_test")
    kvm = built.kvms[0]
    entries = kvm.stage2.leaf.entries
    seen: set[int] = set()
    step = built.env.step

    def checked() -> None:
        step()
        read_only = any(not refusal.reads for refusal in kvm.refusals)
        if read_only and kvm.host.mmap_writer is None:
            valid = entries[(entries & VALID) != 0]
            seen.update(np.unique(valid & WRITE).tolist())

    built.env.step = checked  # type: ignore[method-assign]
    built.run()
    assert seen == {0}


@pytest.mark.parametrize(("subtest", "name"), [(0, "map"), (1, "unmap"), (2, "unmap-chunked")])
def test_unmapping_is_a_range_for_each_memslot_that_is_met(subtest: int, name: str) -> None:
    built, record = run("memslot_perf_test", first=subtest, last=subtest)
    iterations = sum(phase["name"].endswith("iteration") for phase in phases(record))
    run_of = built.selftest._subtests[name]
    pages, slot = run_of.pages, run_of.pages_per_slot
    extra = 16  # pages of the flags, in front
    step = {"map": pages // 2, "unmap": 1, "unmap-chunked": 512}[name]
    cuts = {p for p in range(extra, extra + pages) if p % slot == 0 and p // slot < 33}
    starts = {extra + p for p in range(0, pages, step)}
    assert acquisitions(record, "range_start", "write", name) == iterations * len(cuts | starts)


def test_moving_a_memslot_takes_the_lock_once_and_srcu_twice() -> None:
    built, record = run("memslot_perf_test", first=3, last=3)
    iterations = [phase for phase in phases(record) if phase["name"].endswith("iteration")]
    name = "move-active-area"
    assert acquisitions(record, "memslot", "write", name) == 2 * len(iterations)
    # Two expedited grace periods a move, each of two wake-ups at least.
    wakeups = 2 * 2 * built.kvms[0].costs.wakeup_ns
    assert all(p["end_ns"] - p["begin_ns"] >= wakeups for p in iterations)
    assert built.kvms[0].vcpus[0].fault.user_exits > 0, "half of the area is away"


def test_a_guest_beside_the_memslot_that_moves_is_not_disturbed() -> None:
    built, record = run("memslot_perf_test", first=4, last=4)
    assert built.kvms[0].vcpus[0].fault.user_exits == 0
    assert record.summary["faults"] == 3 * 64 * KIB // (4 * KIB), "each page once"


def test_reading_and_writing_faults_each_page_once_and_unmaps_none() -> None:
    _, record = run("memslot_perf_test", first=5, last=5, length=3 * MS)
    assert record.summary["faults"] == 16 * MIB // (4 * KIB)
    assert acquisitions(record, "range_start", "write", "RW") == 0


def test_memslots_that_a_sub_test_cannot_have_are_refused_as_the_selftest_does() -> None:
    # An eighth of 32 MiB and 64 KiB are 1040 pages: at most so many memslots and the reserved one.
    _, record = run("memslot_perf_test", slots=1100, memory=64 * MIB, first=0, last=1, length=1)
    said = lines(record)
    assert said[1] == "Memslot count too high for this test, decrease the cap (max is 1041)"
    assert said[3].startswith("Testing unmap performance")


PROTECT = ("permission_fault", "read")


def test_each_round_clears_each_memslot_in_one_hold_and_then_every_page_faults() -> None:
    built, record = run("dirty_log_perf_test", memslots=2, iterations=3)
    assert built.kvms[0].dirty_log.manual_protect
    pages = 2 * 2 * MIB // (4 * KIB)
    assert acquisitions(record, "dirty_log_clear", "write") == 3 * 2
    # With the bitmap initially set nothing is protected before the first clear: the first round
    # does not fault, the second and the third do, and only to relax.
    assert acquisitions(record, "write_protect", "write") == 0
    assert acquisitions(record, "dirty_log_get", "write") == 0
    assert acquisitions(record, "fault", "read") == pages
    assert acquisitions(record, *PROTECT) == 2 * pages


def test_without_manual_protect_reading_protects_and_nothing_is_cleared() -> None:
    _, record = run("dirty_log_perf_test", manual_protect=False)
    assert acquisitions(record, "dirty_log_clear", "write") == 0
    assert acquisitions(record, "write_protect", "write") == 1
    assert acquisitions(record, "dirty_log_get", "write") == 2
    # Protected when logging began and after each reading: two rounds of faults.
    assert acquisitions(record, *PROTECT) == 2 * 2 * 2 * MIB // (4 * KIB)


def test_blocks_are_split_by_the_first_write_after_a_clear_and_the_rest_faults_in() -> None:
    built, record = run("dirty_log_perf_test", backing_src="anonymous_thp")
    blocks = 2 * 2 * MIB // (2 * MIB)
    assert built.kvms[0].splits == blocks
    # Populating, in two halves of a block as the memory begins inside one; then 4 KiB pages.
    assert record.summary["faults"] == blocks + blocks * 512
    assert acquisitions(record, *PROTECT) == blocks, "a block has one entry to protect"


@pytest.mark.parametrize("slots", [1, 2])
def test_writes_of_a_round_are_what_reading_the_log_finds(slots: int) -> None:
    built = world("dirty_log_perf_test", memslots=slots, write_percent=40, iterations=3)
    kvm, found = built.kvms[0], []
    get = kvm.dirty_log.get

    def counted(task: Any, t_ns: int, slot: range) -> Any:
        found.append(kvm.dirty_log.dirty(slot))
        return get(task, t_ns, slot)

    kvm.dirty_log.get = counted  # type: ignore[method-assign]
    built.run()
    pages = 2 * 2 * MIB // (4 * KIB)
    assert sum(found[:slots]) == pages, "initially set"
    assert 0.3 * pages < sum(found[-slots:]) < 0.5 * pages


@pytest.mark.parametrize("kernel", ["linux-6.12", "linux-6.12-x86", *X86])
def test_split_blocks_come_back_when_logging_ends_and_their_tables_go(kernel: str) -> None:
    machine = "x86-icelake-64c" if "x86" in kernel else "ampere-altra-80c"
    top = {"machine": machine, "kernel": kernel}
    built, record = run("kvm_page_table_test", top, vcpus=1, backing_src="anonymous_thp")
    (kvm,) = built.kvms
    assert (kvm.splits, kvm.collapses) == (2, 2), "4 MiB are two blocks"
    assert record.summary["violations"] == 0
    assert kvm.tables_freed + len(kvm.waiting) == kvm.tables_allocated


def test_after_logging_each_block_is_one_fault_and_one_callback() -> None:
    built, record = run("kvm_page_table_test", vcpus=1, backing_src="anonymous_thp")
    stages = [phase["name"] for phase in phases(record)]
    assert stages == ["KVM_CREATE_MAPPINGS", "KVM_UPDATE_MAPPINGS", "KVM_ADJUST_MAPPINGS"]
    # Create: a block each. Update: the write splits and maps a page, the second half faults in.
    # Adjust: the first page is mapped, the second one's fault puts the block in the table's place.
    assert record.summary["faults"] == 2 * (1 + (1 + 256) + 1)
    assert len(built.kvms[0].waiting) + built.kvms[0].tables_called_back == 2


@pytest.mark.parametrize("kernel", X86)
@pytest.mark.parametrize("test", sorted(SMALL))
def test_every_test_runs_on_x86(test: str, kernel: str) -> None:
    top = {"machine": "x86-icelake-64c", "kernel": kernel}
    small = {"lru_gen": True, "idle_pages": "warn"} if test.startswith("access") else {}
    _, record = run(test, top, **small)
    assert record.summary["violations"] == 0
    assert phases(record)
    modes = [line for line in lines(record) if line.startswith("Testing guest mode")]
    assert all("PA-bits:ANY" in line for line in modes)


def test_a_page_that_userfaultfd_serves_takes_two_faults_on_no_architecture() -> None:
    top = {"machine": "x86-icelake-64c", "kernel": "linux-6.15-x86"}
    built, record = run("demand_paging_test", top)
    pages = 2 * 2 * MIB // (4 * KIB)
    assert sum(uffd.messages for uffd in built.selftest.uffds) == pages
    assert record.summary["faults"] == acquisitions(record, "fault", "read") == pages


def test_vcpus_run_while_logging_is_switched_off_if_asked() -> None:
    _, still = run("dirty_log_perf_test")
    _, running = run("dirty_log_perf_test", run_while_disabling=True)
    assert running.summary["touches"] > still.summary["touches"]


def test_every_vcpu_of_the_page_table_test_touches_all_the_memory() -> None:
    _, record = run("kvm_page_table_test", vcpus=3)
    pages = 4 * MIB // (4 * KIB)
    assert record.summary["touches"] == 3 * 3 * pages, "create, update and adjust"


def test_large_pages_are_written_at_their_start_and_read_in_their_second_half() -> None:
    built, record = run("kvm_page_table_test", vcpus=1, backing_src="anonymous_thp")
    large, pages = 2, 4 * MIB // (4 * KIB)
    assert record.summary["touches"] == large + large * (1 + 256) + pages
    built.selftest._stage = "KVM_UPDATE_MAPPINGS"
    (chunk,) = built.selftest.guest_code(0)
    assert chunk.pages[:3].tolist() == [0, 256, 257]
    assert chunk.writes[:3].tolist() == [True, False, False]
    assert chunk.pages[257] == 512


# -- the guest's generator, modes, sizes ------------------------------------------------------


def test_the_guest_draws_what_the_selftest_draws() -> None:
    state, wanted = 7, []
    for _ in range(5000):
        state = state * 48271 % (2**31 - 1)
        wanted.append(state)
    random = GuestRandom(7)
    drawn = np.concatenate([random.draw(count) for count in (1, 999, 4000)])
    assert drawn.tolist() == wanted


def test_random_access_draws_a_page_and_then_a_coin() -> None:
    built = world("dirty_log_perf_test", vcpus=1, random_seed=3, vcpu_memory=64 * KIB)
    test = built.selftest
    test.random_access, test.write_percent = True, 30
    (chunk,) = test.guest_code(0)
    state, pages, writes = 3, [], []
    for _ in range(16):
        state = state * 48271 % (2**31 - 1)
        pages.append(state % 16)
        state = state * 48271 % (2**31 - 1)
        writes.append(state % 100 < 30)
    assert chunk.pages.tolist() == pages
    assert chunk.writes.tolist() == writes


def test_modes_are_numbered_and_named_as_in_the_selftests() -> None:
    assert str(MODES[0]) == "PA-bits:52,  VA-bits:48,  4K pages"
    assert str(MODES[4]) == "PA-bits:48,  VA-bits:48, 16K pages"
    assert str(MODES[9]) == "PA-bits:ANY, VA-bits:48,  4K pages"
    assert str(MODES[15]) == "PA-bits:36,  VA-bits:47, 16K pages"
    assert (MODES[3].pa_bits, MODES[3].page_size) == (48, 4 * KIB)
    assert (MODES[14].pa_bits, MODES[14].page_size) == (36, 64 * KIB)


@pytest.mark.parametrize(
    ("source", "page", "backing", "leaf"),
    [
        ("anonymous", 4, 4 * KIB, 4 * KIB),
        ("anonymous_thp", 4, 2 * MIB, 2 * MIB),
        ("anonymous_hugetlb_64kb", 4, 64 * KIB, 4 * KIB),
        ("anonymous_hugetlb_32mb", 4, 32 * MIB, 2 * MIB),
        ("anonymous_hugetlb_1gb", 4, 1 << 30, 1 << 30),
        ("shared_hugetlb", 16, 32 * MIB, 32 * MIB),
        ("anonymous_thp", 64, 512 * MIB, 512 * MIB),
        ("anonymous_hugetlb_2mb", 64, 2 * MIB, 64 * KIB),
    ],
)
def test_backing_sources_have_the_sizes_of_the_host(
    source: str, page: int, backing: int, leaf: int
) -> None:
    assert backing_bytes(source, page * KIB) == backing
    assert stage2_bytes(backing, page * KIB) == leaf


def test_the_mode_decides_granule_and_address_bits_and_the_host_page_only_the_granule() -> None:
    built = world("access_tracking_perf_test", mode=5)
    geometry = built.kvms[0].stage2.geometry
    assert (geometry.page_bytes, geometry.ipa_bits) == (64 * KIB, 48)
    built, record = run("access_tracking_perf_test", mode=5, host_page_size=4 * KIB)
    assert built.kvms[0].stage2.geometry.page_bytes == 4 * KIB
    assert record.summary["faults"] == 2 * 10 * MIB // (64 * KIB), "one touch a guest page"


def test_memory_lies_one_guest_page_below_the_top() -> None:
    (vm,) = scenario("access_tracking_perf_test", vcpus=1, mode=12).selftest.vms(64).values()
    assert vm.base + vm.memory == (1 << 36) - 4 * KIB


def test_the_number_of_vcpus_follows_the_host_where_it_does_in_the_selftest() -> None:
    wide = {"vcpus": None, "slot_size": 8 * MIB}
    spec = scenario("max_guest_memory_test", **wide).selftest
    assert spec.vms(64)["vm"].vcpus == 48
    assert spec.vms(1)["vm"].vcpus == 1


def test_threads_run_where_they_are_pinned_to() -> None:
    built = world("dirty_log_perf_test", pin=(9, 4, 7))
    assert [vcpu.cpu.id for vcpu in built.kvms[0].vcpus] == [9, 4]
    assert built.selftest.task.cpu.id == 7


# -- options ----------------------------------------------------------------------------------

THP = {"vcpu_memory": 2 * MIB}
CHANGES: dict[str, dict[str, Any]] = {
    "access_tracking_perf_test": {
        "host_page_size": 16 * KIB,
        "vcpus": 3,
        "vcpu_memory": 6 * MIB,
        "overlap": True,
        "backing_src": "anonymous_thp",
        "mode": 4,
        "lru_gen": ({"vcpu_memory": 2 * MIB}, False),
        "age_while_populating": True,
        "idle_pages": ({"lru_gen": False, "vcpu_memory": MIB}, "fail"),
    },
    "demand_paging_test": {
        "host_page_size": 16 * KIB,
        "vcpus": 3,
        "vcpu_memory": 4 * MIB,
        "overlap": True,
        "backing_src": "anonymous_hugetlb_2mb",
        "mode": 3,
        "uffd_mode": None,
        "single_uffd": True,
        "uffd_delay": 10_000,
        "readers_per_uffd": ({"vcpus": 4, "single_uffd": True}, 2),
        "pin": None,
    },
    "dirty_log_perf_test": {
        "host_page_size": 16 * KIB,
        "vcpus": 3,
        "vcpu_memory": 4 * MIB,
        "overlap": True,
        "backing_src": "anonymous_thp",
        "mode": 3,
        "iterations": 3,
        "write_percent": 40,
        "random": True,
        "random_seed": ({"random": True}, 5),
        "memslots": 2,
        "manual_protect": False,
        "run_while_disabling": True,
        "nested": None,
        "phys_offset": None,
        "pin": None,
    },
    "kvm_page_table_test": {
        "host_page_size": 16 * KIB,
        "vcpus": 3,
        "memory": 6 * MIB,
        "backing_src": "anonymous_thp",
        "mode": 3,
        "phys_offset": 1 << 30,
    },
    "max_guest_memory_test": {
        "host_page_size": 16 * KIB,
        "vcpus": 3,
        "memory": 6 * MIB,
        "slot_size": 4 * MIB,
        "hugepages": True,
    },
    "mmu_stress_test": {
        "host_page_size": 16 * KIB,
        "vcpus": 3,
        "memory": 6 * MIB,
        "slot_size": 4 * MIB,
        "hugepages": True,
    },
    "memslot_perf_test": {
        "host_page_size": ({"slots": 2, "first": 5}, 16 * KIB),
        "slots": 66,
        "first": 5,
        "last": 0,
        "length": 4 * MS,
        "runs": 2,
        "verify": ({"first": 0, "last": 0}, True),
        "verbose": True,
        "disable_slot_zap_quirk": None,
        "memory": 32 * MIB,
    },
}
"""Another value for every option, with what else it needs; None: without effect, see below."""

WITHOUT_EFFECT = {
    "pin": "CPUs of one node are alike; see the test of pinning",
    "phys_offset": "the selftest reads it and does not use it",
    "nested": "not modelled: refused",
    "disable_slot_zap_quirk": "x86 only",
}


def test_every_option_of_every_test_is_tried() -> None:
    for test, model in MODELS.items():
        assert set(CHANGES[test]) == set(model.model_fields) - {"test"}, test


@pytest.mark.parametrize(
    ("test", "option"),
    [(test, option) for test, options in CHANGES.items() for option in options],
)
def test_every_option_changes_what_happens_or_says_that_it_does_not(test: str, option: str) -> None:
    change = CHANGES[test][option]
    if change is None and not (test == "demand_paging_test" and option == "uffd_mode"):
        assert option in WITHOUT_EFFECT
        assert re.search("does not use|x86|-c", MODELS[test].model_fields[option].description)
        return
    needed, value = change if isinstance(change, tuple) else ({}, change)
    assert fingerprint(test, needed) != fingerprint(test, {**needed, option: value})


KNOWN: dict[str, str] = {}


def fingerprint(test: str, options: dict[str, Any]) -> str:
    key = f"{test} {sorted(options.items(), key=str)}"
    if key not in KNOWN:
        base = {"first": 3, "last": 5} if test == "memslot_perf_test" else {}
        if options.get("last") == 0:
            base = {"first": 0}
        if test == "access_tracking_perf_test":  # marking pages idle takes long
            base = {"lru_gen": True, "idle_pages": "warn"}
        KNOWN[key] = run(test, **{**base, **options})[1].fingerprint
    return KNOWN[key]


# -- the command line -------------------------------------------------------------------------

SHIPPED = sorted((Path(__file__).parents[2] / "workloads" / "selftests").glob("*.yaml"))
SMALLER = {
    "vcpu_memory": "2 MiB",
    "memory": "16 MiB",
    "slot_size": "4 MiB",
    "length": "1 ms",
}


def test_every_selftest_is_shipped_as_a_workload() -> None:
    assert [path.stem for path in SHIPPED] == sorted(MODELS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workloads_run_with_options_set_from_outside(path: Path) -> None:
    fields = MODELS[path.stem].model_fields
    sets = [f"selftest.{key}={value}" for key, value in SMALLER.items() if key in fields]
    study = load(path, [*sets, "selftest.host_page_size=4 KiB"])
    (point,) = study.points
    assert point.scenario.selftest is not None
    record = run_scenario(point.scenario)[1]
    assert len(lines(record)) > 3
    assert phases(record)


def test_an_option_can_be_swept() -> None:
    (path,) = (path for path in SHIPPED if path.stem == "demand_paging_test")
    study = load(path, ["selftest.vcpus=[1, 2]", "selftest.uffd_mode=[null, MISSING]"])
    assert study.axes == ("selftest.vcpus", "selftest.uffd_mode")
    assert len(study.points) == 4


def test_the_report_shows_the_lines_and_json_the_phases() -> None:
    from simkvm.show import document, tables
    from simkvm.show.text import render
    from simkvm.study.point import certificate
    from simkvm.study.result import Result

    spec = scenario("mmu_stress_test")
    record = run_scenario(spec)[1]
    result = Result.from_record(record, certificate(spec, record.fingerprint, 0.0, {}))
    report = render(tables.run_report(result)).split("\n")
    start = report.index("As the selftest prints it") + 1
    said = lines(record)
    assert report[start : start + len(said)] == said
    assert any(line.startswith("  selftest     mmu_stress_test: vcpus 2") for line in report)
    found = document.run_document(result)["phases"]
    assert [row["name"] for row in found if row["name"] != "message"] == [
        phase["name"] for phase in phases(record)
    ]
    assert list(result.phases.columns) == ["name", "iteration", "begin_ns", "end_ns", "line"]


# -- wrong input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "options", "message"),
    [
        (
            "access_tracking_perf_test",
            {"age_while_populating": True},
            "selftest.age_while_populating: needs lru_gen",
        ),
        ("access_tracking_perf_test", {"mode": 9}, "selftest.mode: 9 .* is no mode of arm64"),
        (
            "access_tracking_perf_test",
            {"backing_src": "anonymous_hugetlb_16kb"},
            "selftest.backing_src: a host with pages of 4 KiB has no huge pages of 16 KiB",
        ),
        (
            "access_tracking_perf_test",
            {"vcpu_memory": 5 * KIB},
            "selftest.vcpu_memory: 5 KiB is not a multiple of the page size 4 KiB",
        ),
        ("dirty_log_perf_test", {"memslots": 3}, "selftest.memslots: 4 MiB cannot be cut evenly"),
        ("dirty_log_perf_test", {"nested": True}, "selftest.nested: is not modelled"),
        ("dirty_log_perf_test", {"pin": (1,)}, "selftest.pin: needs one CPU for each of 2 vCPUs"),
        ("demand_paging_test", {"uffd_mode": "MINOR"}, "selftest.uffd_mode: MINOR needs shared"),
        ("demand_paging_test", {"readers_per_uffd": 40}, "81 threads of the test need 83 CPUs"),
        ("memslot_perf_test", {"first": 3, "last": 1}, "selftest.last: 1 is before first, 3"),
        ("memslot_perf_test", {"memory": 24 * MIB}, "selftest.memory: 24 MiB is not a multiple"),
        ("memslot_perf_test", {"slots": 2}, "selftest.slots: leaves no memory in front"),
    ],
)
def test_impossible_options_are_refused(test: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(test, **options)


def test_a_selftest_stands_in_place_of_guests_and_ends_by_itself() -> None:
    guests = {"vm0": {"memory": MIB, "access": {"pattern": "populate"}}}
    with pytest.raises(InputError, match=r"selftest: makes its virtual machine itself"):
        scenario("max_guest_memory_test", {"guests": guests})
    with pytest.raises(InputError, match=r"duration: a selftest runs to its own end"):
        scenario("max_guest_memory_test", {"duration": MS})


def test_contenders_and_ageing_work_on_the_test_s_guest() -> None:
    drop = {"kind": "madvise_dontneed", "guest": "vm", "range": 2 * MIB, "rate": 2000.0}
    top = {"ageing": {"interval": MS}, "contenders": {"vmm": drop}}
    _, record = run("access_tracking_perf_test", top, idle_pages="warn")
    assert record.summary["unmap_calls"] > 0
    assert record.summary["ageing_passes"] > 0
    with pytest.raises(InputError, match=r"no guest 'vm0'.*expected one of vm|did you mean 'vm'"):
        scenario("max_guest_memory_test", {"contenders": {"vmm": {**drop, "guest": "vm0"}}})


def test_a_contender_that_needs_pages_among_blocks_works_on_a_test_s_guest() -> None:
    log = {"kind": "dirty_log", "guest": "vm", "interval": "200 us", "rounds": 2}
    split = {"kind": "thp_split", "guest": "vm", "rate": 20_000.0}
    options = {"vcpus": 1, "backing_src": "anonymous_thp", "vcpu_memory": 8 * MIB}
    idle = {"lru_gen": True, "idle_pages": "warn"}
    for contender in (log, split):
        built, record = run(
            "access_tracking_perf_test", {"contenders": {"c": contender}}, **options, **idle
        )
        assert built.kvms[0].stage2.blocks is not None
        assert record.summary["safety"] == "clean"
    with pytest.raises(InputError, match="dirty_log_perf_test logs the writes of vm itself"):
        scenario("dirty_log_perf_test", {"contenders": {"c": log}})


@pytest.mark.parametrize("mode", ["MISSING", "MINOR"])
def test_userfaultfd_serves_a_guest_of_blocks_and_pages(mode: str) -> None:
    log = {"kind": "dirty_log", "guest": "vm", "interval": "200 us", "rounds": 2}
    options = {"uffd_mode": mode, "backing_src": "shared_hugetlb"}
    built, record = run("demand_paging_test", {"contenders": {"c": log}}, **options)
    assert sum(uffd.messages for uffd in built.selftest.uffds) == 2, "one for each huge page"
    assert built.kvms[0].host.huge.all()
    assert record.summary["safety"] == "clean"


def test_small_options_are_there_for_every_test() -> None:
    assert set(SMALL) == set(MODELS) == set(CHANGES)
