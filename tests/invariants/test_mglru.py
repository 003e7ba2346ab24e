"""Do generations keep their shape, and does ageing touch only what it was told is young?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray
from simpy import Event
from worlds import MS, US, before, journal, world

from invariants import rules
from simkvm.kernel.aging_call import Bitmap, Pass, PerFolio
from simkvm.kernel.mglru import MAX_NR_GENS, MIN_LRU_BATCH, MIN_NR_GENS, LruGen
from simkvm.kernel.sites import AGE
from simkvm.kernel.stage2 import AF, VALID, Stage2
from simkvm.units import MIB

LEAVES = 40
Leaves = NDArray[np.int64]
SETS = st.sets(st.integers(0, LEAVES - 1))


def array(leaves: set[int]) -> Leaves:
    return np.array(sorted(leaves), np.int64)


class Generations(RuleBasedStateMachine):
    """LruGen against a dictionary: for each folio that is there, the number of its generation."""

    @initialize(two_step=st.booleans())
    def begin(self, two_step: bool) -> None:
        self.lru = LruGen(LEAVES, two_step)
        self.two_step = two_step
        self.born: dict[int, int] = {}
        self.seen: set[int] = set()

    @rule(leaves=SETS)
    def fault(self, leaves: set[int]) -> None:
        for leaf in sorted(leaves - set(self.born)):
            self.lru.add(leaf)
            self.born[leaf] = self.lru.max_seq

    @rule(leaves=SETS)
    def free(self, leaves: set[int]) -> None:
        gone = leaves & set(self.born)
        self.lru.remove(array(gone))
        for leaf in gone:
            del self.born[leaf]
        self.seen -= gone

    @rule(leaves=SETS)
    def see_young(self, leaves: set[int]) -> None:
        young = leaves & set(self.born)
        promoted = young & self.seen if self.two_step else young
        self.seen = (self.seen | young) - promoted if self.two_step else self.seen
        older = [leaf for leaf in promoted if self.born[leaf] != self.lru.max_seq]
        for leaf in promoted:
            self.born[leaf] = self.lru.max_seq
        assert self.lru.promote(array(young)) == len(older), "only a change of generation counts"

    @rule()
    def age(self) -> None:
        oldest, last = self.lru.min_seq, self.lru.max_seq
        full = last - oldest + 1 == MAX_NR_GENS
        left_behind = [leaf for leaf, seq in self.born.items() if seq == oldest] if full else []
        assert self.lru.inc_max_seq() == len(left_behind)
        for leaf in left_behind:
            self.born[leaf] = oldest + 1
        assert self.lru.max_seq == last + 1

    @invariant()
    def shape(self) -> None:
        if not hasattr(self, "lru"):
            return
        lru = self.lru
        assert MIN_NR_GENS <= lru.max_seq - lru.min_seq + 1 <= MAX_NR_GENS
        assert lru.min_seq <= lru.max_seq - 1
        sizes = Counter(seq % MAX_NR_GENS for seq in self.born.values())
        assert lru.sizes == [sizes[slot] for slot in range(MAX_NR_GENS)]
        assert lru.total == len(self.born)
        assert all(lru.min_seq <= seq <= lru.max_seq for seq in self.born.values())


TestGenerations = Generations.TestCase
TestGenerations.settings = settings(max_examples=40, stateful_step_count=30)

AGED = {
    "guest": {
        "vcpus": 3,
        "memory": 5 * MIB,
        "access": {"pattern": "hot_cold", "write_ratio": 0.7, "think": 1 * US},
    },
    "ageing": {"interval": 200 * US, "passes": 12},  # over before the run is
    "contenders": {
        "vmm": {"kind": "madvise_dontneed", "guest": "vm0", "range": 2 * MIB, "rate": 1000.0}
    },
    "duration": 8 * MS,
}


@pytest.mark.parametrize("kernel", ["linux-6.4-yuzhao-v2", "linux-7.1-lockless", "linux-6.12"])
def test_a_page_is_promoted_only_to_the_youngest(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = LruGen.promote
    moves = []

    def promote(lru: LruGen, leaves: Leaves) -> int:
        sizes, youngest = list(lru.sizes), lru.max_seq % MAX_NR_GENS
        moved = done(lru, leaves)
        grown = [slot for slot, size in enumerate(lru.sizes) if size > sizes[slot]]
        assert set(grown) <= {youngest}
        assert sum(lru.sizes) == sum(sizes)
        assert moved <= len(leaves)
        moves.append(moved)
        return moved

    monkeypatch.setattr(LruGen, "promote", promote)
    world(kernel=kernel, **AGED).run()
    assert sum(moves) > 30


def _watch_calls(
    monkeypatch: pytest.MonkeyPatch, ageing_call: type, most: int, bits: int
) -> Counter[str]:
    """Check each question that ageing asks about one host table; returns what was seen.

    At most ``most`` notifier calls for each group of ``bits`` leaves in a row; only leaves that
    were asked about, and were young then, are cleared; nothing but AF changes.
    """
    asked: list[Leaves] = []
    seen: Counter[str] = Counter()
    ask = ageing_call.ask
    clear = Stage2.clear_young

    def watched(
        call: Any, t_ns: int, leaves: Leaves, report: Pass
    ) -> Generator[Event, Any, tuple[int, Leaves]]:
        calls = report.calls
        asked.append(leaves)
        end, young = yield from ask(call, t_ns, leaves, report)
        asked.pop()
        groups = len(np.unique(leaves // bits))
        assert groups <= report.calls - calls <= most * groups
        assert end >= t_ns
        assert set(young.tolist()) <= set(leaves.tolist())
        seen["young"] += len(young)
        return end, young

    def clear_young(stage2: Stage2, leaves: Leaves) -> None:
        earlier = stage2.leaf.entries.copy()
        assert set(leaves.tolist()) <= set(asked[-1].tolist())
        assert ((earlier[leaves] & (VALID | AF)) == (VALID | AF)).all()
        clear(stage2, leaves)
        assert np.array_equal(np.flatnonzero(earlier != stage2.leaf.entries), np.sort(leaves))
        assert ((earlier ^ stage2.leaf.entries) & ~np.uint8(AF) == 0).all()
        seen["cleared"] += len(leaves)

    monkeypatch.setattr(ageing_call, "ask", watched)
    monkeypatch.setattr(Stage2, "clear_young", clear_young)
    return seen


def test_a_window_costs_two_calls_at_most_and_clears_only_what_it_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = _watch_calls(monkeypatch, Bitmap, most=2, bits=MIN_LRU_BATCH)
    world(kernel="linux-6.4-yuzhao-v2", **AGED).run()
    assert seen["cleared"] == seen["young"] > 100


def test_one_call_for_each_pte_clears_only_what_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _watch_calls(monkeypatch, PerFolio, most=1, bits=1)
    world(kernel="linux-7.1-lockless", **AGED).run()
    assert seen["cleared"] == seen["young"] > 100


@pytest.mark.parametrize("policy", ["write", "read", "none"])
def test_ageing_takes_the_lock_that_its_kernel_says(policy: str) -> None:
    kernel = {
        "base": "linux-7.1-lockless",
        "set": {"ageing_lock": policy, "table_free": "put_page_rcu"},
    }
    with journal() as notes:
        made = world(kernel=kernel, **AGED)
        record = made.run()
    rows = notes.rows()
    rules.ageing_locks_as_its_kernel_says(made.kvms[0], rows)
    locked = sum(row.site == AGE for row in rows)
    calls = record.summary["ageing_calls"]
    assert locked == (0 if policy == "none" else calls)
    assert bool(notes.walks) == (policy == "none")


def test_blind_ageing_asks_nobody() -> None:
    with journal() as notes:
        called = []
        with pytest.MonkeyPatch.context() as patch:
            before(patch, Stage2, "clear_young", lambda *_: called.append(1))
            record = world(kernel="linux-6.4", **AGED).run()
    assert record.summary["ageing_calls"] == 0
    assert record.summary["young_pages"] > 0, "the host's own accessed flags"
    assert (notes.walks, called) == ([], [])
    assert all(row.site != AGE for row in notes.rows())
