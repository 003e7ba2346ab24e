"""The safety oracle: each offence is found, with its time and story, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab import world

from simkvm.kernel.stage2 import TableId
from simkvm.observe.oracle import KEPT, ROOT, Oracle, Walk, name
from simkvm.units import KIB, MIB

L2, L3, OTHER = TableId(2, 0, 1), TableId(3, 4, 1), TableId(3, 5, 1)


def oracle(*linked: TableId) -> Oracle:
    made = Oracle("vm0")
    made.allocated(linked or (L2, L3), 100)
    return made


def kinds(made: Oracle) -> list[str]:
    return [violation.kind for violation in made.violations]


def walk(
    start: int, busy: int, period: int = 0, count: int = 1, *tables: TableId, name: str = "ageing"
) -> Walk:
    return Walk(name, frozenset(tables or (ROOT, L2, L3)), start, period or busy, busy, count)


# -- a walk in time ---------------------------------------------------------------------------


def test_a_walk_is_inside_after_its_begin_and_before_its_end() -> None:
    one = walk(1000, 50)
    inside = [t for t in range(990, 1060) if one.inside(t)]
    assert (inside[0], inside[-1], len(inside)) == (1001, 1049, 49)


def test_reads_of_a_walk_come_with_gaps() -> None:
    many = walk(1000, 10, 100, 3)
    inside = [t for t in range(900, 1400) if many.inside(t)]
    assert inside == [*range(1001, 1010), *range(1101, 1110), *range(1201, 1210)]
    assert many.end_ns == 1210


# -- use after free ---------------------------------------------------------------------------


@pytest.mark.parametrize(("freed_at", "found"), [(1000, 0), (1001, 1), (1049, 1), (1050, 0)])
def test_a_table_freed_under_a_walker(freed_at: int, found: int) -> None:
    made = oracle()
    made.walk(walk(1000, 50))
    made.unlinked(L3, 990)
    made.freed(L3, freed_at, deferred=False)
    assert kinds(made) == ["use_after_free"] * found


@pytest.mark.parametrize(("freed_at", "found"), [(1000, 0), (1001, 1), (1049, 1), (1050, 0)])
def test_a_free_that_is_planned_when_the_walk_begins(freed_at: int, found: int) -> None:
    """The unmapper computed ahead: its section's end lies in the future."""
    made = oracle()
    made.unlinked(L3, 990)
    made.freed(L3, freed_at, deferred=False)
    made.walk(walk(1000, 50))
    assert kinds(made) == ["use_after_free"] * found


def test_a_walker_elsewhere_does_no_harm() -> None:
    made = oracle(L2, L3, OTHER)
    made.walk(walk(1000, 50, 0, 1, ROOT, L2, OTHER))
    made.unlinked(L3, 1010)
    made.freed(L3, 1020, deferred=False)
    assert not made.violations


def test_a_walk_of_the_table_that_hung_there_before_is_another_one() -> None:
    again = TableId(3, 4, 2)
    made = oracle(L2, L3)
    made.unlinked(L3, 200)
    made.freed(L3, 210, deferred=False)
    made.allocated([again], 300)
    made.walk(walk(1000, 50, 0, 1, ROOT, L2, L3))
    made.unlinked(again, 1010)
    made.freed(again, 1020, deferred=False)
    assert not made.violations


def test_the_gap_between_two_reads_is_safe() -> None:
    made = oracle()
    made.walk(walk(1000, 10, 100, 3))
    made.unlinked(L3, 1050)
    made.freed(L3, 1050, deferred=False)
    assert not made.violations


def test_the_story_of_a_use_after_free() -> None:
    made = oracle()
    made.walk(walk(1000, 50))
    made.unlinked(L3, 1010)
    made.freed(L3, 1020, deferred=False)
    (found,) = made.violations
    assert (found.kind, found.time_ns, found.guest) == ("use_after_free", 1020, "vm0")
    assert found.message == "ageing reads L3 table 4 (incarnation 1) after its page was freed"
    told = [line.partition(": ")[2] for line in found.timeline]
    assert told == [
        "L3 table 4 (incarnation 1) linked",
        "ageing enters, holding no lock",
        "L3 table 4 (incarnation 1) unlinked",
        "use_after_free: " + found.message,
        "ageing leaves",
    ]
    assert found.timeline[0].startswith("100 ns (100 ns)")


@pytest.mark.parametrize("told", ["before", "after"])
@pytest.mark.parametrize(
    ("freed_at", "time_ns"), [(900, 1000), (1000, 1000), (1001, 1001), (1049, 1049), (1050, None)]
)
def test_the_root_freed_under_a_walker(freed_at: int, time_ns: int | None, told: str) -> None:
    """It takes the root without looking whether the VM still has it, so a late one reads it too."""
    made = oracle()
    if told == "before":
        made.walk(walk(1000, 50))
    made.root_freed(freed_at)
    if told == "after":  # a free is told when it is planned, walks that come first a little later
        made.walk(walk(1000, 50))
    assert [(v.kind, v.time_ns) for v in made.violations] == (
        [] if time_ns is None else [("root_freed_under_walker", time_ns)]
    )


def test_the_story_of_a_walk_after_the_roots_free() -> None:
    made = oracle()
    made.root_freed(1070)
    made.walk(Walk("ageing", frozenset({ROOT}), 1000, 100, 50, 3))
    (found,) = made.violations
    assert found.time_ns == 1100, "the first read that begins after it"
    told = [line.partition(": ")[2] for line in found.timeline]
    assert told == [
        "the root freed",
        "ageing enters, holding no lock",
        "root_freed_under_walker: ageing walks the root after it was freed",
        "ageing leaves",
    ]


# -- what a walker finds ----------------------------------------------------------------------


def test_what_is_unlinked_later_is_still_there() -> None:
    """A lock holder's section has its whole effect at its start, but walkers come in between."""
    made = oracle()
    made.unlinked(L3, 1010)
    made.unlinked(L2, 1020)
    places = [(2, 0), (3, 4)]
    assert made.still_linked([], places, 1009) == {ROOT, L2, L3}
    assert made.still_linked([], places, 1010) == {ROOT, L2}
    assert made.still_linked([], places, 1020) == {ROOT}
    assert made.still_linked([], [(2, 0), (3, 5)], 1009) == {ROOT, L2}, "another way"


# -- grace periods ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "safe"),
    [
        *(((1000, 2000), True), ((1500, 1900), True)),
        *(((999, 2000), False), ((1000, 2001), False), ((100, 900), False)),
    ],
)
def test_a_deferred_free_needs_a_full_grace_period(period: tuple[int, int], safe: bool) -> None:
    made = oracle()
    made.unlinked(L3, 1000)
    made.grace_period(*period)
    made.freed(L3, 2000, deferred=True)
    assert kinds(made) == ([] if safe else ["free_before_grace_period"])


def test_a_deferred_free_without_any_grace_period() -> None:
    made = oracle()
    made.unlinked(L3, 1000)
    made.freed(L3, 9000, deferred=True)
    assert kinds(made) == ["free_before_grace_period"]


def test_a_free_under_the_lock_needs_none() -> None:
    made = oracle()
    made.unlinked(L3, 1000)
    made.freed(L3, 1000, deferred=False)
    assert not made.violations


# -- broken lives -----------------------------------------------------------------------------


def test_a_table_is_unlinked_once() -> None:
    made = oracle()
    made.unlinked(L3, 1000)
    made.unlinked(L3, 1100)
    made.unlinked(OTHER, 1200)
    assert kinds(made) == ["unlink_twice", "unlink_twice"]
    assert "L3 table 5" in made.violations[1].message


def test_a_table_is_unlinked_empty() -> None:
    """The page's count has to be one."""
    made = oracle()
    made.unlinked(L3, 1000, entries_left=3)
    assert kinds(made) == ["unlink_with_entries"]
    assert "3 entries" in made.violations[0].message


def test_a_table_is_freed_once() -> None:
    made = oracle()
    made.unlinked(L3, 1000)
    made.freed(L3, 1010, deferred=False)
    made.freed(L3, 1020, deferred=False)
    assert kinds(made) == ["double_free"]


@pytest.mark.parametrize("freed", [True, False])
def test_a_table_that_nobody_frees_leaks(freed: bool) -> None:
    made = oracle(L3)
    made.unlinked(L3, 1000)
    if freed:
        made.freed(L3, 1010, deferred=False)
    made.finished(5000)
    assert kinds(made) == ([] if freed else ["leak"])


def test_what_waits_for_a_callback_is_no_leak() -> None:
    made = oracle(L2, L3)
    made.unlinked(L3, 1000)
    made.unlinked(L2, 1000)
    made.finished(5000, {L3})
    assert [violation.message for violation in made.violations] == [f"nobody freed {name(L2)}"]


def test_a_callback_that_ran_must_have_freed_its_table() -> None:
    """The leak of 2023: found when the callback is over, and told once."""
    made = oracle(L2, L3)
    for table in (L2, L3):
        made.unlinked(table, 1000)
    made.grace_period(1100, 1900)
    made.freed(L2, 2000, deferred=True)
    made.callback_done(L2, 2000)
    made.callback_done(L3, 2010)
    made.finished(5000)
    (found,) = made.violations
    assert (found.kind, found.time_ns) == ("leak", 2010)
    told = [line.partition(": ")[2] for line in found.timeline]
    assert told == [f"{name(L3)} linked", f"{name(L3)} unlinked", f"leak: {found.message}"]


def test_a_root_is_freed_once() -> None:
    made = oracle()
    made.root_freed(1000)
    made.root_freed(1500)
    (found,) = made.violations
    assert (found.kind, found.time_ns) == ("double_free", 1500)
    told = [line.partition(": ")[2] for line in found.timeline]
    assert told == ["the root freed", "double_free: the root was free already"]


def test_a_page_that_is_no_table_is_freed_once() -> None:
    made = oracle()
    made.page_freed("page 7 of the split cache", 1000, "one")
    made.page_freed("page 8 of the split cache", 1000, "one")
    assert not made.violations
    made.page_freed("page 7 of the split cache", 1200, "another")
    (found,) = made.violations
    assert (found.kind, found.message) == (
        "double_free",
        "another frees page 7 of the split cache, which is free",
    )
    assert found.timeline[0].endswith("page 7 of the split cache freed by one")


@pytest.mark.parametrize(("read_at", "found"), [(999, 0), (1000, 1), (2000, 1)])
def test_a_walk_that_comes_back_to_what_it_freed(read_at: int, found: int) -> None:
    made = oracle()
    made.read("teardown", L3, 500)
    made.read("teardown", ROOT, 500)
    made.freed(L3, 1000, deferred=False)
    made.root_freed(1000)
    made.read("teardown", L3, read_at)
    made.read("teardown", ROOT, read_at)
    made.read("teardown", OTHER, read_at)
    assert kinds(made) == ["use_after_free"] * (2 * found)


def test_a_mapping_that_survives_its_range() -> None:
    made = oracle()
    made.invalidated(10, 20, 0, 1000)
    assert not made.violations
    made.invalidated(10, 20, 2, 1500)
    assert kinds(made) == ["leaf_after_invalidate"]
    assert "10..19" in made.violations[0].message


# -- memory -----------------------------------------------------------------------------------


def test_only_so_many_are_kept_but_all_are_counted() -> None:
    made = oracle()
    for _ in range(100):
        made.invalidated(0, 1, 1, 1000)
    assert (len(made.violations), made.total) == (KEPT, 100)


def test_what_no_walk_can_meet_any_more_is_forgotten() -> None:
    made = Oracle("vm0")
    for number in range(1, 2000):
        table = TableId(3, 0, number)
        t_ns = number * 1_000_000
        made.allocated([table], t_ns)
        made.unlinked(table, t_ns + 10)
        made.freed(table, t_ns + 10, deferred=False)
        made.walk(walk(t_ns + 500, 50, 0, 1, ROOT))
    assert len(made._lives) + len(made._recent) + len(made._leaving) + len(made._walks) < 20


# -- whole kernels: the negative controls -----------------------------------------------------


def kernel_run(duration: int = 5_000_000, interval: int = 0, **policies: str) -> set[str]:
    """Kinds of violations under ageing and ranges of one table each, taken back all the time."""
    built = world(
        kernel={"base": "linux-7.1-lockless", "set": policies},
        guest={"access": {"pattern": "uniform", "touches": None, "think": 2000}},
        ageing={"interval": interval},
        contenders={
            "c": {"kind": "madvise_dontneed", "guest": "vm", "range": 2 * MIB, "rate": 10_000}
        },
        host={"hz": 1000},
        duration=duration,
    )
    record = built.run()
    assert record.summary["tables_freed"] > 10
    return {violation["kind"] for violation in record.violations}


@pytest.mark.parametrize("call", ["per_pte", "per_folio", "bitmap"])
def test_inline_frees_under_lockless_ageing_are_found(call: str) -> None:
    assert kernel_run(table_free="inline", ageing_call=call) == {"use_after_free"}


@pytest.mark.parametrize(
    ("call", "table_free"),
    [
        ("per_pte", "put_page_rcu"),
        ("per_folio", "free_removed_table"),
        ("bitmap", "free_removed_table_count_test"),
    ],
)
def test_deferred_frees_under_lockless_ageing_are_safe(call: str, table_free: str) -> None:
    assert not kernel_run(16_000_000, 20_000, table_free=table_free, ageing_call=call)


@pytest.mark.parametrize("lock", ["write", "read"])
def test_inline_frees_under_locked_ageing_are_safe(lock: str) -> None:
    assert not kernel_run(2_000_000, table_free="inline", ageing_lock=lock)


def test_a_grace_period_of_nothing_would_be_found() -> None:
    """A kernel that calls back at once: the oracle does not trust the policy's word."""
    built = world(kernel="linux-6.4-yuzhao-v2", guest={"memory": 256 * KIB})
    kvm = built.kvms[0]

    def at_once(t_ns: int, cpu: int, table: TableId) -> None:
        kvm.table_free.callback(kvm, table, t_ns)

    def steps() -> Iterator[Any]:
        yield built.env.timeout(1)
        kvm.tables_linked(kvm.stage2.map_leaf(0, 0), 1)
        kvm.call_rcu = at_once  # type: ignore[method-assign]
        yield from kvm.notifier.invalidate(kvm.vcpus[0].task, 1000, 0, 1)

    built.env.run(built.env.process(steps()))
    assert kinds(kvm.oracle) == ["free_before_grace_period"] * 2
