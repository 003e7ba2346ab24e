"""Does the stage-2 tree stay a tree, and does every table live exactly once?

The tree alone is compared with one computed anew from the set of mapped leaves; in a world the
lives of tables are followed from their link to their free.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from worlds import MS, US, after_every_event, journal, world

from invariants import rules
from simkvm.kernel.geometry import Geometry
from simkvm.kernel.stage2 import AF, VALID, WRITE, Stage2, TableId
from simkvm.kernel.unmap import UnmapCosts, UnmapWalk, chunks
from simkvm.scenario.kernel import POLICIES
from simkvm.units import KIB, MIB

COSTS = UnmapCosts(
    visit_ns=3,
    descend_ns=40,
    table_visit_ns=11,
    leaf_ns=7,
    leaf_flush_ns=13,
    table_flush_ns=90,
    table_free_ns=61,
)


@st.composite
def slots(draw: st.DrawFn) -> Stage2:
    """A small memory slot that begins anywhere, near a table's edge for preference."""
    page = draw(st.sampled_from([4 * KIB, 4 * KIB, 4 * KIB, 16 * KIB, 64 * KIB]))
    geometry = Geometry(page, draw(st.sampled_from([32, 36, 40, 44, 48, 52])))
    sizes = [s for s in geometry.leaf_sizes() if geometry.leaf_level(s) >= geometry.start_level]
    size = draw(st.sampled_from([page, *sizes]))
    level, entries = geometry.leaf_level(size), geometry.entries
    leaves = draw(st.sampled_from([1, 40, entries - 1, entries + 1, 2 * entries, 3 * entries + 7]))
    leaves = leaves if size == page else min(leaves, 40)
    most = (1 << geometry.ipa_bits) // size - leaves
    tables_in = draw(st.integers(0, 1 << 20)) * geometry.entries ** draw(st.integers(1, 2))
    first = min(most, max(0, tables_in - draw(st.integers(0, 3)))) if level else 0
    return Stage2(geometry, first * size, leaves * size // page, size)


class Tree(RuleBasedStateMachine):
    """Stage2 and its unmap walk against the set of leaves that are mapped."""

    @initialize(stage2=slots())
    def begin(self, stage2: Stage2) -> None:
        self.stage2 = stage2
        self.leaves = len(stage2.leaf.entries)
        self.entries = stage2.geometry.entries
        self.mapped: set[int] = set()
        self.alive: set[TableId] = set()
        self.dead: set[TableId] = set()

    def places(self, leaf: int) -> list[tuple[int, int]]:
        """(level, place in the whole address space) of the tables below the root to ``leaf``."""
        geometry, whole = self.stage2.geometry, self.stage2.first_leaf + leaf
        bits = geometry.index_bits
        depth = self.stage2.leaf_level - geometry.start_level
        return [
            (geometry.start_level + n, whole >> bits * (depth - n + 1)) for n in range(1, depth + 1)
        ]

    def wanted(self) -> set[tuple[int, int]]:
        return {place for leaf in self.mapped for place in self.places(leaf)}

    def linked(self) -> set[tuple[int, int]]:
        """The linked tables, by level and place in the whole address space."""
        found = set()
        for table in self.stage2.all_tables():
            level = self.stage2.levels[table.level]
            below = self.stage2.geometry.index_bits * (self.stage2.leaf_level - table.level)
            first_entry = (self.stage2.first_leaf >> below) - level.phase
            found.add((table.level, (first_entry >> self.stage2.geometry.index_bits) + table.index))
        return found

    @rule(data=st.data())
    def map_one(self, data: st.DataObject) -> None:
        self._map(data.draw(st.integers(0, self.leaves - 1)))

    @rule(data=st.data())
    def map_a_row(self, data: st.DataObject) -> None:
        edge = data.draw(st.sampled_from([n for n in (0, 1, 2) if n * self.entries < self.leaves]))
        first = min(self.leaves - 1, max(0, edge * self.entries - data.draw(st.integers(0, 30))))
        for leaf in range(first, min(self.leaves, first + data.draw(st.integers(1, 70)))):
            self._map(leaf)

    def _map(self, leaf: int) -> None:
        stage2 = self.stage2
        lacking = [place for place in self.places(leaf) if place not in self.wanted()]
        assert stage2.missing(leaf) == len(lacking)
        made = stage2.map_leaf(leaf, WRITE) or []
        self.mapped.add(leaf)
        assert [table.level for table in made] == [level for level, _ in lacking], "top down"
        assert not self.dead & set(made), "linked again after unlink"
        assert not self.alive & set(made)
        self.alive |= set(made)
        assert stage2.path(leaf) == [stage2.identity(*at) for at in stage2.places(leaf)]
        assert stage2.leaf.entries[leaf] == VALID | AF | WRITE

    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        first = data.draw(st.just(0) | st.integers(0, self.leaves - 1))
        last = data.draw(st.just(self.leaves) | st.integers(first + 1, self.leaves))
        for low, high in chunks(self.stage2, first, last):
            self._unmap(low, high)

    def _unmap(self, first: int, last: int) -> None:
        gone = {leaf for leaf in self.mapped if first <= leaf < last}
        walk = UnmapWalk(self.stage2, first, last, COSTS)
        self.mapped -= gone
        assert walk.leaves == len(gone)
        assert walk.elapsed_ns > 0
        assert len(set(walk.tables)) == len(walk.tables)
        assert set(walk.tables) <= self.alive
        self.alive -= set(walk.tables)
        self.dead |= set(walk.tables)
        assert all(a <= b for a, b in pairwise([0, *walk.unlinked_ns, walk.elapsed_ns]))
        self._children_first(walk.tables)

    def _children_first(self, tables: list[TableId]) -> None:
        """No table of the walk is unlinked before one that hung from it."""
        bits = self.stage2.geometry.index_bits
        for place, table in enumerate(tables):
            if table.level == self.stage2.leaf_level:
                continue
            below = self.stage2.levels[table.level + 1]
            entries = self.stage2.levels[table.level]
            first = (table.index << bits) - entries.phase
            children = range(max(0, first), min(len(below.counts), first + (1 << bits)))
            assert not any(
                t.level == table.level + 1 and t.index in children for t in tables[place:]
            )

    @invariant()
    def is_the_tree_of_its_leaves(self) -> None:
        if not hasattr(self, "stage2"):
            return
        rules.counts_are_entries(self.stage2)
        rules.tree_hangs_together(self.stage2)
        assert set(np.flatnonzero(self.stage2.leaf.entries & VALID).tolist()) == self.mapped
        listed = self.stage2.all_tables()
        assert set(listed) == self.alive
        assert len(listed) == len(self.alive) == self.stage2.linked_tables
        assert self.linked() == self.wanted()
        order = [table.level for table in self.stage2.all_tables()]
        assert order == sorted(order, reverse=True), "children before parents"


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=12)


@pytest.mark.parametrize("policy", list(POLICIES["table_free"]))
def test_tables_are_linked_waiting_or_free_after_every_event(policy: str) -> None:
    """Conservation, and the order of each table's life, for every free policy."""
    with journal() as notes:
        made = world(
            machine="graviton3-64c",
            kernel={"base": "linux-6.12", "set": {"table_free": policy}},
            host={"hz": 1000},
            guest={
                "vcpus": 2,
                "memory": 3 * MIB + 4 * KIB,
                "access": {"pattern": "populate", "repeat": 1000, "think": 6 * US},
            },
            contenders={
                "vmm": {"kind": "madvise_dontneed", "guest": "vm0", "range": 2 * MIB, "rate": 500.0}
            },
            duration=20 * MS,
        )
        (kvm,) = made.kvms
        held = []

        def check() -> None:
            rules.counts_are_entries(kvm.stage2)
            rules.tree_hangs_together(kvm.stage2)
            rules.tables_are_conserved(kvm, made.rcu, notes)
            rules.nothing_maps_what_the_host_took(kvm)
            rules.open_ranges_stay_empty(kvm, notes)
            held.append(kvm.tables_allocated - kvm.stage2.linked_tables - kvm.tables_freed)

        after_every_event(made, check)
        record = made.run()
    rules.every_table_lives_once(notes)
    rules.children_go_first(notes, kvm.entries)
    rules.frees_wait_for_a_grace_period(notes, made.recorder.grace_periods)
    assert record.summary["tables_freed"] >= 4
    assert len(notes.callbacks) == (0 if policy == "inline" else len(notes.unlinked))
    assert bool(max(held)) == (policy != "inline")
    _timeline_agrees(record.timeline, kvm.table_bytes, made)


def _timeline_agrees(timeline: dict[str, list[int]], table_bytes: int, made: object) -> None:
    """Bytes never go below nothing, and none waits that is not held."""
    waiting, held = np.array(timeline["deferred_bytes"]), np.array(timeline["table_bytes"])
    reported = np.array(timeline["reported_table_bytes"])
    assert waiting.min() >= 0
    assert (waiting <= held).all()
    assert (reported <= held).all()
    assert (waiting % table_bytes == 0).all()
