"""Lists of generations, tiers and refaults, rule by rule.

Source: mm/vmscan.c, mm/workingset.c, include/linux/mm_inline.h, v6.12, and v6.14 where a test says
"reworked".
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.folio_list import FolioList
from simkvm.kernel.listed import ANON, FILE, ISOLATED
from simkvm.kernel.lru_tiers import (
    COUNT,
    FIRST,
    REFERENCED,
    REWORKED,
    WORKINGSET,
    Controller,
    may_evict,
)
from simkvm.kernel.lrugen import ListedLruGen, ListedLruvec
from simkvm.kernel.mglru import MAX_NR_GENS

LINE = LineCosts(1, 2, 2, 64)


def array(*leaves: int) -> NDArray[np.int64]:
    return np.array(leaves, np.int64)


def lruvec(*guests: tuple[int, int], two_step: bool = False) -> ListedLruvec:
    return ListedLruvec(guests, two_step, LINE)


def lru_of(made: ListedLruvec, guest: int = 0) -> ListedLruGen:
    return made.listed_guests[guest]


def aged(pages: int, two_step: bool = False, of_type: int = ANON) -> ListedLruvec:
    """Folios 0, 1, 2... in the oldest of four generations, in that order."""
    made = lruvec((pages, of_type), two_step=two_step)
    lru_of(made).add_many(np.arange(pages))
    for _ in range(3 - two_step):
        made.inc_max_seq()
    made.advance_min_seq()
    return made


def by_age(made: ListedLruvec, of_type: int = ANON) -> list[int]:
    sizes = made.sizes_of(of_type)
    return [sizes[(made.max_seq - age) % MAX_NR_GENS] for age in range(MAX_NR_GENS)]


def taken(made: ListedLruvec, of_type: int = ANON, **keys: int) -> list[int]:
    ids: list[int] = made.scan(of_type, **keys)[0].tolist()
    return ids


# -- order -----------------------------------------------------------------------------------------


def test_a_list_gives_out_what_came_first() -> None:
    made = FolioList()
    for entry in range(3):
        made.append(entry)
    made.extend(array(3, 4))
    made.extend_old(array(8, 9))
    assert made.take(3).tolist() == [8, 9, 0]
    assert made.take(9).tolist() == [1, 2, 3, 4]
    assert not len(made)


def test_eviction_order_is_fault_order() -> None:
    made = aged(200)
    assert [*taken(made), *taken(made), *taken(made), *taken(made)] == list(range(200))


def test_emptying_the_oldest_turns_its_order_round() -> None:
    """inc_min_seq(): from the old end of one list to the old end of the next, one by one."""
    made = aged(4)
    made.inc_max_seq()
    assert taken(made) == [3, 2, 1, 0]


def test_with_two_generations_there_is_nothing_to_scan() -> None:
    made = aged(10)
    made.min_seqs[:] = [made.max_seq - 1] * 2
    assert made.scan(ANON)[1] == 0


# -- sorting ---------------------------------------------------------------------------------------


def test_what_was_promoted_goes_to_the_list_of_its_generation() -> None:
    made = aged(4)
    assert lru_of(made).promote(array(1, 2)) == 2
    assert by_age(made) == [2, 0, 0, 2]
    assert made.on_list[ANON][made.min_seqs[ANON] % MAX_NR_GENS] == 4, "still on its old list"
    assert taken(made) == [0, 3]
    assert made.on_list[ANON][made.max_seq % MAX_NR_GENS] == 2
    assert made.vmstat.pgrefill == 2


@pytest.mark.parametrize("two_step", [False, True])
def test_what_waits_for_writeback_goes_to_the_next_generation(two_step: bool) -> None:
    made = aged(4, two_step)

    class Writing:
        def waiting(self, leaves: NDArray[np.int64], file: bool) -> NDArray[np.bool_]:
            found: NDArray[np.bool_] = leaves % 2 == 1
            return found

    lru_of(made).pages = Writing()
    assert taken(made) == [0, 2]
    assert by_age(made)[-2:] == [2, 0]


@pytest.mark.parametrize(("two_step", "order"), [(False, [5, 4]), (True, [4, 5])])
def test_tiers_above_the_last_evicted_one_are_protected(two_step: bool, order: list[int]) -> None:
    """They go to the old end of the next generation, one before the other; reworked: the new."""
    made = aged(6, two_step)
    for leaf in (4, 5):
        lru_of(made).accessed(leaf, 2)
    assert taken(made, tier=0) == [0, 1, 2, 3]
    assert made.vmstat.lru_gen_protected == 2
    assert sum(made.controllers[ANON].protected) == 2
    made.advance_min_seq()
    made.inc_max_seq()
    lru_of(made).promote(array())
    assert made._valid(made.lists[ANON][made.min_seqs[ANON] % 4].take(9), made.min_seqs[ANON] % 4).tolist() == order  # fmt: skip # noqa: E501


def test_a_folio_is_found_where_it_was_put_last() -> None:
    """Tickets: entries that folios left behind are stale, even when they come back."""
    made = aged(3)
    lru = lru_of(made)
    lru.remove(array(1))
    lru.add(1)
    lru.rotate(0)
    assert taken(made) == [0, 2]
    assert by_age(made) == [1, 0, 0, 0]


def test_isolated_folios_are_on_no_list_and_go_back() -> None:
    made = aged(3)
    ids = made.scan(ANON)[0]
    assert by_age(made) == [0] * 4
    assert (made.listed[ids] == ISOLATED).all()
    lru_of(made).remove(array(1))  # freed by somebody else
    made.activate(ids, np.zeros(3, np.bool_))
    assert by_age(made) == [2, 0, 0, 0]


def test_a_look_around_marks_isolated_folios() -> None:
    made = aged(3)
    made.scan(ANON)
    lru = lru_of(made)
    assert lru.promote(array(1)) == 0
    assert [lru.marked(leaf) for leaf in range(3)] == [False, True, False]
    assert lru.askable(array(0, 1)).tolist() == [0, 1]
    reworked = aged(3, two_step=True)
    reworked.scan(ANON)
    assert not len(lru_of(reworked).askable(array(0, 1)))


# -- promotion in two steps ------------------------------------------------------------------------


def test_reworked_a_fresh_folio_is_in_the_second_youngest_generation() -> None:
    """lru_gen_folio_seq(): the youngest is for what is known to be of the working set."""
    made = lruvec((2, ANON), two_step=True)
    lru_of(made).add(0)
    assert by_age(made) == [0, 1, 0, 0]


def test_reworked_what_is_known_of_the_working_set_comes_back_to_the_youngest() -> None:
    made = aged(1, two_step=True)
    lru = lru_of(made)
    for _ in range(2):
        lru.promote(array(0))
    for _ in range(3):
        made.inc_max_seq()
    made.advance_min_seq()
    assert taken(made) == [0]
    lru.evicted(0)
    assert lru.refault(0)
    lru.add(0)
    assert by_age(made) == [1, 0, 0, 0]
    assert made.vmstat.workingset_restore == 1


def test_reworked_once_promoted_a_folio_needs_one_sighting_more_each_time() -> None:
    """folio_update_gen() leaves PG_workingset behind."""
    made = aged(2, two_step=True)
    lru = lru_of(made)
    assert [lru.promote(array(0)) for _ in range(2)] == [0, 1]
    made.inc_max_seq()
    assert lru.promote(array(0)) == 1


def test_reworked_what_eviction_finds_used_goes_to_the_second_youngest_first() -> None:
    """lru_gen_set_refs(): the first time it is only marked."""
    made = aged(1, two_step=True)
    ids = made.scan(ANON)[0]
    made.activate(ids, np.ones(1, np.bool_))
    assert by_age(made) == [0, 1, 0, 0]
    for _ in range(2):
        made.inc_max_seq()
    made.advance_min_seq()
    ids = made.scan(ANON)[0]
    made.activate(ids, np.ones(1, np.bool_))
    assert by_age(made) == [1, 0, 0, 0]


# -- tiers -----------------------------------------------------------------------------------------


def uses(rules: object, times: int) -> list[int]:
    state, tiers = 0, []
    for _ in range(times + 1):
        tiers.append(int(rules.tier[state]))  # type: ignore[attr-defined]
        state = int(rules.accessed[state])  # type: ignore[attr-defined]
    return tiers


def test_tiers_by_uses() -> None:
    """N uses: tier order_base_2(N), 0 and 1 alike; five uses are the most that is counted."""
    assert uses(FIRST, 7) == [0, 0, 1, 2, 2, 3, 3, 3]
    assert uses(REWORKED, 6) == [0, 0, 1, 2, 2, 3, 3]
    top = COUNT * 3 | WORKINGSET | REFERENCED
    assert FIRST.highest[top]
    assert REWORKED.highest[top]
    assert FIRST.highest[top & ~REFERENCED]
    assert not REWORKED.highest[top & ~REFERENCED]


def test_a_refault_count_below_64_never_matters() -> None:
    assert may_evict((0, 10**6), 1, (63, 64), 1)
    assert not may_evict((0, 10**6), 1, (64, 64), 1)


@pytest.mark.parametrize(("rules", "fold"), [(FIRST, 2.0), (REWORKED, 1.5)])
def test_a_tier_is_protected_that_refaults_so_much_more(rules: object, fold: float) -> None:
    """Gains 1:2 in favour of eviction; reworked 2:3."""
    for factor, protected in ((fold * 0.95, False), (fold * 1.05, True)):
        made = Controller(rules)  # type: ignore[arg-type]
        made.refaulted[0], made.evicted[0] = 10_000, 100_000 - 64
        made.refaulted[1], made.evicted[1] = round(10_001 * factor), 100_000
        assert (made.last_evicted_tier() == 0) is protected


def test_averages_are_halved_with_each_generation() -> None:
    made = Controller(FIRST)
    made.refaulted[1], made.evicted[1], made.protected[1] = 100, 200, 100
    made.carry_over()
    assert made.position(1) == (50, 150)
    made.evicted[1] = 10
    made.carry_over()
    assert made.position(1) == (25, 80)


# -- refaults --------------------------------------------------------------------------------------


def test_a_refault_counts_while_the_oldest_generation_is_the_same() -> None:
    made = aged(70)
    lru = lru_of(made)
    ids = made.scan(ANON)[0]
    for leaf in ids.tolist():
        lru.evicted(leaf)
    assert lru.refault(0)
    assert not lru.refault(0), "the shadow is gone"
    assert made.controllers[ANON].refaulted == [1, 0, 0, 0]
    lru.add(0)
    made.inc_max_seq()
    assert not lru.refault(1)
    assert (made.vmstat.workingset_refault, made.vmstat.workingset_restore) == (2, 1)


def test_what_came_back_soon_is_in_the_highest_tier() -> None:
    """lru_gen_refault() in a fault: all of its counter, so sort_folio() protects it once."""
    made = aged(1)
    lru = lru_of(made)
    made.scan(ANON)
    lru.evicted(0)
    lru.refault(0)
    lru.add(0)
    for _ in range(3):
        made.inc_max_seq()
    made.advance_min_seq()
    assert taken(made) == []
    assert by_age(made)[-2:] == [1, 0]


def test_reworked_a_refault_is_recent_within_four_generations() -> None:
    made = aged(3, two_step=True)
    lru = lru_of(made)
    made.scan(ANON)
    for leaf in range(3):
        lru.evicted(leaf)
    seq = made.min_seqs[ANON]
    assert made.max_seq - seq < MAX_NR_GENS
    assert lru.refault(0)
    made.max_seq = seq + 3
    assert lru.refault(1)
    made.max_seq = seq + 4
    assert not lru.refault(2)


# -- types -----------------------------------------------------------------------------------------


def both(two_step: bool = False) -> ListedLruvec:
    """Ten anonymous folios and ten of a file, all old, in two guests."""
    made = lruvec((10, ANON), (10, FILE), two_step=two_step)
    for lru in made.listed_guests:
        lru.add_many(np.arange(10))
    for _ in range(3 - two_step):
        made.inc_max_seq()
    made.advance_min_seq()
    return made


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize(("swappiness", "of_type"), [(0, FILE), (1, FILE), (200, ANON)])
def test_swappiness_at_its_ends(swappiness: int, of_type: int, two_step: bool) -> None:
    made = both(two_step)
    ids, _ = made.isolate(swappiness)
    assert {made.owner(folio).of_type for folio in ids.tolist()} == {of_type}


def test_the_type_with_the_older_generation_comes_first() -> None:
    made = both()
    made.scan(FILE)
    made.min_seqs[FILE] += 1
    assert made._choose(1)[0] == ANON


def test_the_type_that_refaults_less_is_evicted() -> None:
    """At 100 both weigh the same; 60 asks for more of anonymous folios."""
    for refaults, of_type in (((500, 100), FILE), ((100, 500), ANON)):
        made = both()
        for controller, count in zip(made.controllers, refaults, strict=True):
            controller.refaulted[0], controller.evicted[0] = count, 1000
        assert made._choose(100)[0] == of_type
    made = both()
    for controller in made.controllers:
        controller.refaulted[0], controller.evicted[0] = 500, 1000
    assert (made._choose(60)[0], made._choose(140)[0]) == (FILE, ANON)


def test_the_other_type_is_tried_if_one_has_nothing() -> None:
    made = both()
    made.scan(FILE)
    ids, examined = made.isolate(1)
    assert (len(ids), examined) == (10, 10)


def test_without_swap_anonymous_folios_stay_where_they_are() -> None:
    """inc_min_seq() with can_swap false: the number goes on, the folios do not."""
    made = both()
    assert made.inc_max_seq(swappiness=0) == 10, "the file's alone move"
    assert by_age(made, FILE) == [0, 0, 0, 10]
    assert by_age(made, ANON)[0] == 10, "an old generation's number is the youngest's now"


def test_anonymous_generations_do_not_run_ahead() -> None:
    made = lruvec((10, ANON), (10, FILE))
    lru_of(made, 1).add_many(np.arange(10))
    for _ in range(3):
        made.inc_max_seq()
    made.advance_min_seq()
    assert made.min_seqs == [3, 3], "there is nothing in it, but the file's are waited for"


# -- when to age -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [((40, 30, 30), False), ((51, 20, 29), True), ((30, 50, 20), True), ((50, 24, 26), False)],
)
def test_ageing_with_three_generations(sizes: tuple[int, int, int], wanted: bool) -> None:
    """The youngest has more than half, or the oldest less than a quarter; reworked: always."""
    for two_step in (False, True):
        made = lruvec((100, ANON), two_step=two_step)
        lru = lru_of(made)
        made.min_seqs[:] = [1, 1]
        done = 0
        for age, size in enumerate(sizes):
            made._put(np.arange(done, done + size), made.max_seq - age)
            done += size
        assert made.should_run_aging() == (wanted or two_step, 100)
        made.min_seqs[:] = [0, 0]
        assert made.should_run_aging() == (False, 100)
        made.min_seqs[:] = [2, 2]
        assert made.should_run_aging()[0]
        assert lru.total == 100
