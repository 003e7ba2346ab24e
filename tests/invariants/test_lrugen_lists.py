"""Do the lists of the multi-gen LRU do what a plain model with an object a folio does?"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from invariants.plain_lru import PlainLru
from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.listed import ANON, FILE, TYPES
from simkvm.kernel.lru_tiers import REFERENCED, WORKINGSET
from simkvm.kernel.lrugen import ListedLruGen, ListedLruvec
from simkvm.kernel.mglru import MAX_NR_GENS, MIN_NR_GENS

LEAVES = 150  #: of each of two guests: more than two batches
PICKS = st.lists(st.integers(0, 2 * LEAVES - 1), min_size=1, max_size=40, unique=True)
RANGES = st.tuples(st.integers(0, 2 * LEAVES - 1), st.integers(1, 2 * LEAVES))


class Waiting:
    """Folios of one guest that wait for the end of a write."""

    def __init__(self, base: int, folios: set[int]) -> None:
        self.base, self.folios = base, folios

    def waiting(self, leaves: NDArray[np.int64], file: bool) -> NDArray[np.bool_]:
        return np.isin(leaves + self.base, list(self.folios))


class Lists(RuleBasedStateMachine):
    """Two guests of one memcg, the second one of a file; folios have their numbers in both."""

    @initialize(two_step=st.booleans(), both=st.booleans())
    def begin(self, two_step: bool, both: bool) -> None:
        kinds = ((LEAVES, ANON), (LEAVES, FILE if both else ANON))
        self.made = ListedLruvec(kinds, two_step, LineCosts(1, 2, 2, 64))
        self.plain = PlainLru(two_step)
        self.file = [False, both]
        self.isolated: list[int] = []
        self.written: set[int] = set()
        for lru in self.made.listed_guests:
            lru.pages = Waiting(lru.base, self.written)
        self.fault((0, 2 * LEAVES))
        for _ in range(3):  # so that eviction has something to do from the start
            self.age()

    def lru(self, folio: int) -> ListedLruGen:
        return self.made.owner(folio)  # type: ignore[return-value]

    def at(self, folio: int) -> int:
        return folio - self.lru(folio).base

    def is_file(self, folio: int) -> bool:
        return self.file[folio // LEAVES]

    # -- faults, frees, use -----------------------------------------------------------------------

    @rule(span=RANGES)
    def fault(self, span: tuple[int, int]) -> None:
        for folio in range(span[0], min(2 * LEAVES, sum(span))):
            if folio in self.plain.folios:
                continue
            if folio in self.plain.shadows:
                found = self.lru(folio).refault(self.at(folio))
                assert found == self.plain.refault(folio, self.is_file(folio))
            self.lru(folio).add(self.at(folio))
            self.plain.add(folio, self.is_file(folio))

    @rule(picks=PICKS)
    def free(self, picks: list[int]) -> None:
        for folio in picks:
            if folio in self.plain.folios:
                self.lru(folio).remove(np.array([self.at(folio)]))
                self.plain.free(folio)
        self.isolated = [folio for folio in self.isolated if folio in self.plain.folios]

    @rule(picks=PICKS, times=st.integers(1, 3))
    def mark_accessed(self, picks: list[int], times: int) -> None:
        for folio in picks:
            self.lru(folio).accessed(self.at(folio), times)
            for _ in range(times if folio in self.plain.folios else 0):
                self.plain.accessed(folio)

    @rule(picks=PICKS, late=st.booleans())
    def see_young(self, picks: list[int], late: bool) -> None:
        seq = self.made.max_seq - late
        there = sorted(folio for folio in picks if folio in self.plain.folios)
        for lru in self.made.listed_guests:
            part = [folio - lru.base for folio in there if self.lru(folio) is lru]
            lru.promote(np.array(part, np.int64), seq)
        for folio in there:
            self.plain.see_young(folio, seq)

    @rule(picks=PICKS)
    def write_begins_or_ends(self, picks: list[int]) -> None:
        self.written.symmetric_difference_update(picks)

    # -- generations ------------------------------------------------------------------------------

    @rule()
    def age(self) -> None:
        self.made.inc_max_seq()
        self.plain.age()

    @rule()
    def advance(self) -> None:
        self.made.advance_min_seq()
        self.plain.advance()

    # -- eviction ---------------------------------------------------------------------------------

    @rule(of_type=st.sampled_from(TYPES), tier=st.integers(0, 3))
    def scan(self, of_type: int, tier: int) -> None:
        self.advance()
        if self.made.nr_gens(of_type) == MIN_NR_GENS:
            self.age()
        ids, examined = self.made.scan(of_type, tier)
        taken = self.plain.scan(of_type, tier, self.written)
        assert ids.tolist() == taken, "in this order"
        assert examined >= len(taken)
        self.isolated += taken

    @precondition(lambda self: getattr(self, "isolated", None))
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        which = data.draw(st.lists(st.integers(0, 3), min_size=len(self.isolated)))
        # One type at a time, as in a batch.
        file = self.is_file(self.isolated[0])
        batch = [folio for folio in self.isolated if self.is_file(folio) == file]
        self.isolated = [folio for folio in self.isolated if self.is_file(folio) != file]
        ends: list[list[int]] = [[], [], [], []]
        for folio, end in zip(batch, which, strict=False):
            ends[end].append(folio)
        used, active, writing, gone = ends
        for folio in gone:
            self.lru(folio).evicted(self.at(folio))
            self.plain.evict(folio)
        self.made.settle(*(np.array(part, np.int64) for part in (used, active, writing)))
        both = [(folio, True) for folio in used] + [(folio, False) for folio in active]
        if not self.plain.reworked:
            order = both
        else:  # those that go to the youngest are put there together, before the others

            def youngest(entry: tuple[int, bool]) -> bool:
                folio = self.plain.folios[entry[0]]
                marked = folio.referenced or folio.workingset
                return marked if entry[1] else folio.workingset

            order = sorted(both, key=lambda entry: not youngest(entry))
        for folio, was_used in order:
            self.plain.keep(folio, was_used)
        for folio in writing:
            self.plain.put_back(folio)

    @rule(picks=PICKS, times=st.integers(2, 5), late=st.booleans(), of_type=st.sampled_from(TYPES))
    def use_and_scan(self, picks: list[int], times: int, late: bool, of_type: int) -> None:
        self.mark_accessed(picks, times)
        self.see_young(picks[:3], late)
        self.scan(of_type, 0)

    @rule(of_type=st.sampled_from(TYPES), ages=st.integers(0, 3))
    def evict_and_bring_back(self, of_type: int, ages: int) -> None:
        before = len(self.isolated)
        self.scan(of_type, 3)
        gone, self.isolated = self.isolated[before:], self.isolated[:before]
        for folio in gone:
            self.lru(folio).evicted(self.at(folio))
            self.plain.evict(folio)
        for _ in range(ages):
            self.age()
        self.advance()
        for folio in sorted(gone):
            self.fault((folio, 1))

    @rule(picks=PICKS)
    def write_ends(self, picks: list[int]) -> None:
        for folio in picks:
            plain = self.plain.folios.get(folio)
            self.lru(folio).rotate(self.at(folio))
            if plain is not None and plain.on >= 0:
                self.plain.place(plain, self.plain.min_seqs[plain.file], old_end=True)

    def order(self, of_type: int) -> list[list[int]]:
        """Folios of each list, from the oldest to the newest."""
        found = []
        for generation, part in enumerate(self.made.lists[of_type]):
            pieces = [*part._pieces, np.array(part._new, np.int64)]
            found.append(self.made._valid(np.concatenate(pieces), generation).tolist())
        return found

    # -- what holds after each --------------------------------------------------------------------

    @invariant()
    def shape(self) -> None:
        if not hasattr(self, "made"):
            return
        made = self.made
        assert (made.max_seq, made.min_seqs) == (self.plain.max_seq, self.plain.min_seqs)
        assert all(MIN_NR_GENS <= made.nr_gens(t) <= MAX_NR_GENS for t in TYPES)
        for of_type in TYPES:
            assert made.sizes_of(of_type) == self.plain.sizes(of_type)
            lists = [len(part) for part in self.plain.lists[of_type]]
            assert made.on_list[of_type] == lists
            assert self.order(of_type) == [
                [folio.leaf for folio in part] for part in self.plain.lists[of_type]
            ]
            assert sum(lists) == sum(made.sizes_of(of_type)), "none is lost or counted twice"

    @invariant()
    def flags(self) -> None:
        if not hasattr(self, "made"):
            return
        for folio in self.plain.folios.values():
            state = int(self.made.states[folio.leaf])
            found = (bool(state & REFERENCED), bool(state & WORKINGSET), state >> 2)
            assert found == (folio.referenced, folio.workingset, folio.refs)


TestLists = Lists.TestCase
TestLists.settings = settings(max_examples=60, stateful_step_count=25)
