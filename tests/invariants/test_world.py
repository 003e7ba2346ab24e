"""Do the rules hold in whole worlds, after every event, and do worlds degenerate as they should?"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from worlds import MS, US, Journal, after_every_event, before, journal, run, scenario, world

from invariants import drawn, rules
from invariants.written import watched_writes
from simkvm.contenders.contender import Contender
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.schema import Scenario
from simkvm.units import KIB, MIB

# -- whatever is combined with whatever ------------------------------------------------------------


def watched(spec: Scenario) -> tuple[World, Journal, Record]:
    """The world of ``spec``, run, with every rule about its state checked after each event."""
    with journal() as notes, watched_writes() as writes:
        made = world(spec)
        (kvm,) = made.kvms
        # x86's zap at the end of dirty logging leaves what it empties, on whatever it is put.
        keeps = kvm.keep_tables or kvm.kernel["recover_huge"] == "zap"
        seen = -1

        def check() -> None:
            nonlocal seen
            rules.tables_are_conserved(kvm, made.rcu, notes)
            rules.notifier_counts(kvm, notes)
            writes.check()
            if notes.changes != seen:  # else nothing that the arrays hold has moved
                rules.counts_are_entries(kvm.stage2)
                rules.tree_hangs_together(kvm.stage2, keeps)
                rules.shadows_agree_with_blocks(kvm.stage2)
                rules.a_block_has_one_flag(kvm)
                rules.blocks_lie_in_huge_pages(kvm)
                rules.nothing_maps_what_the_host_took(kvm)
                rules.open_ranges_stay_empty(kvm, notes)
                rules.host_counts_its_entries(kvm)
                rules.generations_hold(kvm)
            seen = notes.changes

        after_every_event(made, check)
        record = made.run()
    return made, notes, record


def every_rule_holds(spec: Scenario) -> None:
    made, notes, record = watched(spec)
    (kvm,) = made.kvms
    rows, periods = notes.rows(), made.recorder.grace_periods
    rules.writers_exclude_all(rows)
    rules.the_line_is_fifo(rows)
    rules.waiting_writers_shut_the_door(rows)
    rules.ranges_take_the_lock_twice(kvm, rows)
    rules.ageing_locks_as_its_kernel_says(kvm, rows)
    rules.every_table_lives_once(notes)
    rules.children_go_first(notes, kvm.entries)
    rules.grace_periods_follow_one_another(periods)
    rules.frees_wait_for_a_grace_period(notes, periods)
    assert rules.offences(notes) == {}
    # The one bug that a kernel here has: the root of a collapsed subtree leaks.
    leaks = [violation for violation in record.violations if violation["kind"] == "leak"]
    assert len(leaks) == min(len(record.violations), kvm.tables_leaked)
    assert len(leaks) == len(record.violations)


@settings(max_examples=12, phases=[Phase.generate])
@given(drawn.scenarios(teardown=False))
def test_every_rule_holds_after_every_event(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=7, phases=[Phase.generate])
@given(drawn.scenarios(teardown=True))
def test_every_rule_holds_while_a_vm_is_torn_down(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=12, phases=[Phase.generate])
@given(drawn.scenarios(takers=True))
def test_every_rule_holds_whatever_takes_the_lock(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=7, phases=[Phase.generate])
@given(drawn.scenarios(teardown=False, sized=True))
def test_every_rule_holds_where_leaves_differ_in_size(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=6, phases=[Phase.generate])
@given(drawn.scenarios(takers=True, sized=True))
def test_every_rule_holds_whatever_takes_leaves_that_differ(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=5, phases=[Phase.generate])
@given(drawn.scenarios(takers=True, sized=True, arch="x86"))
def test_every_rule_holds_on_x86_whatever_takes_leaves_that_differ(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=6, phases=[Phase.generate])
@given(drawn.scenarios(teardown=True, sized=True))
def test_every_rule_holds_at_the_end_of_a_vm_with_leaves_that_differ(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=8, phases=[Phase.generate])
@given(drawn.scenarios(sized=True, arch="x86"))
def test_every_rule_holds_on_x86_where_leaves_differ_in_size(spec: Scenario) -> None:
    every_rule_holds(spec)


@settings(max_examples=8, phases=[Phase.generate])
@given(drawn.scenarios(arch="x86"))
def test_every_rule_holds_on_x86(spec: Scenario) -> None:
    every_rule_holds(spec)


def ending(at: int) -> Scenario:
    """A VM closed while its one host table is aged without the lock, its root freed in release."""
    return scenario(
        expect="unsafe",
        kernel={"base": "linux-7.1-lockless", "set": {"root_free": "in_release"}},
        guest={
            "memory": 2 * MIB,
            "access": {"pattern": "populate", "repeat": 5000},
            "teardown": {"order": "close_vm", "at": at},
        },
        ageing={"start": 4 * MS},  # once all is mapped: a fault in flight would be waited for
        duration=6 * MS,
    )


def test_the_oracle_misses_nothing_and_invents_nothing() -> None:
    """Lock-free walkers and frees at once: what it found against every walk and every free."""
    found: Counter[str] = Counter()
    specs = [drawn.drawn(Random(number), safe=False, teardown=False) for number in range(8)]
    for spec in [*specs, *(ending(5 * MS + number * 11 * US) for number in range(8))]:
        with journal() as notes:
            made = world(spec)
            record = made.run()
        (kvm,) = made.kvms
        offences = rules.offences(notes)
        assert kvm.oracle.total == offences.total()
        assert {violation["kind"] for violation in record.violations} <= set(offences)
        found += offences
    assert found["use_after_free"] > 0
    assert found["root_freed_under_walker"] > 0


# -- degenerate cases ------------------------------------------------------------------------------

BUSY: dict[str, Any] = {
    "guest": {
        "vcpus": 3,
        "memory": 6 * MIB,
        "access": {"pattern": "uniform", "write_ratio": 0.6, "think": 1 * US},
    },
    "contenders": {
        "vmm": {
            "kind": "madvise_dontneed",
            "guest": "vm0",
            "range": 2 * MIB,
            "rate": 1500.0,
            "arrivals": "poisson",
        }
    },
    "host": {"hz": 1000},
    "duration": 8 * MS,
}


def differing(one: Record, other: Record) -> set[str]:
    """Keys of the summary that two runs do not agree on; what is no number is equal to itself."""
    pairs = {key: (value, other.summary[key]) for key, value in one.summary.items()}
    return {key for key, (a, b) in pairs.items() if repr(a) != repr(b)}


@pytest.mark.parametrize(
    ("kernel", "contenders"),
    [("linux-6.12", True), ("linux-7.1-read-locked", True), ("linux-7.1-lockless", False)],
)
def test_ageing_that_never_comes_is_no_ageing(kernel: str, contenders: bool) -> None:
    """An infinite time before the first pass, event for event: the account of the lock says so.

    Where frees wait for RCU there is no contender: the sleeping thread has a CPU, which moves the
    contender to the next one and gives the grace-period kthread another choice.
    """
    busy = {**BUSY, "contenders": BUSY["contenders"] if contenders else {}}
    with journal() as never:
        late = world(kernel=kernel, ageing={"start": 8 * MS - 1, "interval": 10**15}, **busy).run()
    with journal() as without:
        none = world(kernel=kernel, **busy).run()
    assert never.rows() == without.rows()
    assert len(without.rows()) > 1000
    assert [c.invoked_ns for c in never.callbacks] == [c.invoked_ns for c in without.callbacks]
    assert never.unlinked == without.unlinked
    assert late.series == none.series
    assert differing(late, none) <= {"events", "ageing_passes"}


@pytest.mark.parametrize(
    "taker",
    [
        {"kind": "khugepaged", "guest": "vm0", "start": 8 * MS - 1},
        {"kind": "dirty_log", "guest": "vm0", "start": 8 * MS - 1},
    ],
    ids=lambda taker: taker["kind"],
)
@pytest.mark.parametrize("vcpus", [1, 3])
def test_a_guest_that_could_have_blocks_but_has_none_is_one_of_pages(
    taker: dict[str, Any], vcpus: int
) -> None:
    """Whoever makes the leaves differ in size comes too late: lock for lock the same run."""
    busy = {**BUSY, "guest": {**BUSY["guest"], "vcpus": vcpus}}
    with journal() as never:
        late = world(ageing={}, **{**busy, "contenders": {**BUSY["contenders"], "z": taker}}).run()
    with journal() as without:
        none = world(ageing={}, **busy).run()
    assert never.rows() == without.rows()
    assert len(without.rows()) > 1000
    assert never.unlinked == without.unlinked
    assert late.series == none.series
    assert differing(late, none) <= {"events"}


def test_without_contenders_nothing_is_unmapped() -> None:
    record = run(
        guest={"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate", "repeat": 3}},
        ageing={},
    )
    assert record.summary["ageing_passes"] > 0
    assert record.summary["unmapped_pages"] == 0
    assert record.summary["tables_freed"] == 0
    assert record.summary["fault_retries"] == 0
    assert set(record.locks["site"]) == {"fault", "age"}


def test_pages_that_stay_are_faulted_once_each_in_order() -> None:
    """One vCPU, no pressure: as many faults as pages, however often they are touched."""
    record = run(guest={"memory": 4 * MIB, "access": {"pattern": "populate", "repeat": 7}})
    assert record.summary["faults"] == 1024
    assert record.summary["touches"] == 7 * 1024


# -- touches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "wanted"),
    [
        ({"pattern": "populate", "repeat": 5}, 5 * 1500),
        ({"pattern": "uniform", "touches": 3000, "write_ratio": 0.3}, 3 * 3000),
        ({"pattern": "zipf", "touches": 5000}, 3 * 5000),
        (
            {
                "pattern": "phases",
                "repeat": 2,
                "phases": [{"pattern": "populate"}, {"pattern": "hot_cold", "touches": 4000}],
            },
            2 * (1500 + 3 * 4000),
        ),
    ],
)
def test_every_touch_of_a_pattern_is_made_once(access: dict[str, Any], wanted: int) -> None:
    """Whatever is aged, taken back and faulted in again meanwhile, no touch is lost or repeated."""
    record = run(
        guest={"vcpus": 3, "memory": 1500 * 4 * KIB, "access": access},
        ageing={"interval": 200 * US},
        contenders=BUSY["contenders"],
    )
    assert record.summary["touches"] == wanted
    assert record.summary["unmap_calls"] > 0
    touches = np.array(record.series["touches"])
    assert (np.diff(touches) >= 0).all()
    assert touches.size == 0 or touches.max() <= wanted


# -- identity --------------------------------------------------------------------------------------


def test_a_seed_gives_one_run_and_another_seed_another() -> None:
    prints = [run(seed=seed, ageing={}, **BUSY).fingerprint for seed in (5, 5, 6)]
    assert prints[0] == prints[1] != prints[2]
    repeated = run(seed=5, replication=1, ageing={}, **BUSY).fingerprint
    assert repeated not in prints


def test_a_scenario_without_chance_does_not_feel_the_seed() -> None:
    def populated(seed: int) -> str:
        guest = {"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate", "repeat": 3}}
        return run(seed=seed, guest=guest, ageing={}).fingerprint

    assert populated(1) == populated(2)


def touched(made: World, vcpu: int, chunks: int = 2) -> list[list[int]]:
    """The first pages that a vCPU's pattern yields."""
    pattern = made.kvms[0].vcpus[vcpu]._chunks
    return [chunk.pages.tolist() for chunk in islice(pattern, chunks)]


def taken_back(**keys: Any) -> dict[str, list[tuple[int, int]]]:
    """What each contender of a world took back, in order."""
    calls: dict[str, list[tuple[int, int]]] = {}

    def noted(contender: Contender, _: int, first_byte: int, size: int) -> None:
        calls.setdefault(contender.task.name, []).append((first_byte, size))

    with pytest.MonkeyPatch.context() as patch:
        before(patch, Contender, "take_back", noted)
        world(**keys).run()
    return calls


def test_one_more_vcpu_shifts_nobody_elses_draws() -> None:
    def guest(vcpus: int) -> dict[str, Any]:
        return {"vcpus": vcpus, "memory": 6 * MIB, "access": {"pattern": "zipf"}}

    few, many = world(guest=guest(2), duration=MS), world(guest=guest(5), duration=MS)
    assert [touched(few, n) for n in range(2)] == [touched(many, n) for n in range(2)]
    assert touched(world(guest=guest(2), duration=MS), 0) != touched(few, 1)


def test_one_more_contender_shifts_nobody_elses_draws() -> None:
    vmm = BUSY["contenders"]["vmm"]
    alone = taken_back(**BUSY)
    both = taken_back(**{**BUSY, "contenders": {"another": vmm, "vmm": vmm}})
    shared = min(len(alone["vmm"]), len(both["vmm"]))
    assert shared > 5
    assert alone["vmm"][:shared] == both["vmm"][:shared]
    assert both["another"][:shared] != both["vmm"][:shared], "streams of their own"


def test_another_kernel_shifts_nobodys_draws() -> None:
    """Two variants at one seed see the same demands."""
    one, other = (
        taken_back(kernel=name, ageing={}, **BUSY)["vmm"] for name in ("linux-6.4", "linux-7.1")
    )
    shared = min(len(one), len(other))
    assert shared > 5
    assert one[:shared] == other[:shared]


def test_shuffled_ties_are_another_order_of_the_same_things() -> None:
    """vCPUs that start at one moment: who is first is drawn, and everything else follows."""
    access = {"pattern": "hot_cold", "touches": 2000, "write_ratio": 1.0}
    guest = {"vcpus": 4, "memory": 4 * MIB, "access": access}
    fifo, shuffled, again = (run(guest=guest, ties=ties) for ties in ("fifo", "shuffle", "shuffle"))
    assert shuffled.fingerprint != fifo.fingerprint
    assert shuffled.fingerprint == again.fingerprint
    assert shuffled.summary["touches"] == fifo.summary["touches"] == 8000
