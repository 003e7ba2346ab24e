"""How many tables a mapped guest needs, by arithmetic alone.

Independent of :mod:`simkvm.kernel.geometry`: a table holds page / 8 entries, a walk resolves
log2(page / 8) bits a level, at most 16 roots lie side by side (arch/arm64/include/asm/
stage2_pgtable.h, v6.12), so levels are counted as for an address four bits shorter.
"""

from __future__ import annotations

from math import ceil, log2

import numpy as np
import pytest
from worlds import KIB, MIB, run, scenario, world

from simkvm.kernel.geometry import Geometry
from simkvm.kernel.stage2 import WRITE, Stage2
from simkvm.scenario.errors import InputError

GIB, TIB = 1 << 30, 1 << 40
PAGES = [4 * KIB, 16 * KIB, 64 * KIB]


def filled(page: int, memory: int, mapping: int = 0, base: int = GIB, bits: int = 40) -> Stage2:
    """The tree of a guest with ``memory`` bytes from ``base`` on.

    One leaf is mapped in each leaf-level table, and the last of all: that links every table.
    """
    geometry = Geometry(page, bits)
    stage2 = Stage2(geometry, base, memory // page, mapping or page)
    leaves = len(stage2.leaf.entries)
    for leaf in range(0, leaves, geometry.entries):
        stage2.map_leaf(leaf, WRITE)
    stage2.map_leaf(leaves - 1, WRITE)
    return stage2


def tables_by_level(stage2: Stage2) -> dict[int, int]:
    """Linked tables below the root, by level."""
    levels = [table.level for table in stage2.all_tables()]
    return {level: levels.count(level) for level in sorted(set(levels))}


def expected(page: int, memory: int, levels: int, skip: int = 0) -> dict[int, int]:
    """Tables below the root of ``levels`` for aligned ``memory``; ``skip`` levels hold blocks."""
    entries = page // 8
    return {
        level: ceil(memory / (page * entries ** (4 - level)))
        for level in range(4 - levels + 1, 4 - skip)
    }


def levels_of(page: int, bits: int) -> int:
    """stage2_pgtable_levels(): four bits go to concatenated roots, never below two levels."""
    return max(2, ceil((bits - 4 - log2(page)) / log2(page // 8)))


@pytest.mark.parametrize(
    ("page", "memory", "tables"),
    [
        (4 * KIB, GIB, {2: 1, 3: 512}),
        (4 * KIB, 64 * GIB, {2: 64, 3: 32768}),
        (16 * KIB, GIB, {3: 32}),
        (16 * KIB, 64 * GIB, {3: 2048}),
        (64 * KIB, GIB, {3: 2}),
        (64 * KIB, 64 * GIB, {3: 128}),
    ],
)
def test_a_gib_of_pages_needs(page: int, memory: int, tables: dict[int, int]) -> None:
    """512 leaf tables a GiB at 4 KiB, 32 at 16 KiB, 2 at 64 KiB; 40 address bits."""
    stage2 = filled(page, memory, base=0)
    assert tables_by_level(stage2) == tables
    assert tables == expected(page, memory, levels_of(page, 40))
    assert stage2.linked_tables == sum(tables.values())


def test_a_guest_of_64_gib_holds_128_mib_of_tables() -> None:
    """4 KiB: 32768 + 64 tables are 128.25 MiB, and two root pages come on top."""
    stage2 = filled(4 * KIB, 64 * GIB)
    assert stage2.linked_tables == 32768 + 64
    assert stage2.linked_tables * 4 * KIB == 128.25 * MIB
    assert (stage2.linked_tables + stage2.geometry.root_pages) * 4 * KIB == 128.25 * MIB + 8 * KIB


@pytest.mark.parametrize(
    ("page", "mapping", "memory", "tables"),
    [
        (4 * KIB, 2 * MIB, 64 * GIB, {2: 64}),
        (4 * KIB, GIB, 64 * GIB, {}),
        (16 * KIB, 32 * MIB, 64 * GIB, {}),
        (64 * KIB, 512 * MIB, 64 * GIB, {}),
    ],
)
def test_blocks_need_no_table_below_them(
    page: int, mapping: int, memory: int, tables: dict[int, int]
) -> None:
    stage2 = filled(page, memory, mapping)
    assert tables_by_level(stage2) == tables
    assert len(stage2.leaf.entries) == memory // mapping


@pytest.mark.parametrize("bits", [32, 34])
def test_no_block_lies_above_the_root(bits: int) -> None:
    """Up to 34 bits the root of a 4 KiB granule is at level 2: no entry maps a GiB there."""
    assert levels_of(4 * KIB, bits) == 2
    guest = {"memory": 2 * GIB, "ipa_bits": bits, "mapping": GIB, "access": {"pattern": "populate"}}
    with pytest.raises(InputError, match="1 GiB"):
        scenario(guest=guest)


#: Granule, address bits: level of the root, concatenated root pages.
ROOTS = {
    4 * KIB: {
        **{32: (2, 4), 36: (1, 1), 39: (1, 1), 40: (1, 2), 42: (1, 8), 43: (1, 16)},
        **{44: (0, 1), 48: (0, 1), 52: (0, 16)},
    },
    16 * KIB: {
        **{32: (2, 1), 36: (2, 1), 39: (2, 8), 40: (2, 16), 42: (1, 1), 43: (1, 1)},
        **{44: (1, 1), 48: (1, 2), 52: (0, 1)},
    },
    64 * KIB: {
        **{32: (2, 1), 36: (2, 1), 39: (2, 1), 40: (2, 1), 42: (2, 1), 43: (2, 2)},
        **{44: (2, 4), 48: (1, 1), 52: (1, 1)},
    },
}


@pytest.mark.parametrize(("page", "bits"), [(page, bits) for page in PAGES for bits in ROOTS[page]])
def test_roots_stand_where_the_address_says(page: int, bits: int) -> None:
    geometry = Geometry(page, bits)
    assert (geometry.start_level, geometry.root_pages) == ROOTS[page][bits]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("bits", range(32, 53))
def test_every_address_width_by_its_formula(page: int, bits: int) -> None:
    """Start level, roots that just reach, and one cached table for each level below the root."""
    geometry, entries = Geometry(page, bits), page // 8
    levels = levels_of(page, bits)
    assert geometry.start_level == 4 - levels
    assert geometry.root_pages == max(1, (1 << bits) // (page * entries**levels))
    assert geometry.root_pages <= 16
    assert geometry.cache_minimum == levels - 1


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("bits", [36, 40, 44, 48, 52])
def test_the_formula_holds_for_whole_trees(page: int, bits: int) -> None:
    memory = 3 * GIB + 12 * MIB
    stage2 = filled(page, memory, base=0, bits=bits)
    assert tables_by_level(stage2) == expected(page, memory, levels_of(page, bits))


def test_a_slot_that_straddles_tables_needs_one_more_at_each_level() -> None:
    """A GiB from half a GiB on: 512 leaf tables, but two level-2 tables instead of one."""
    stage2 = filled(4 * KIB, GIB, base=GIB // 2)
    assert tables_by_level(stage2) == {2: 2, 3: 512}
    unaligned = filled(4 * KIB, GIB, base=GIB - 4 * KIB)
    assert tables_by_level(unaligned) == {2: 2, 3: 513}


@pytest.mark.parametrize(
    ("page", "memory"), [(4 * KIB, 34 * MIB), (16 * KIB, 80 * MIB), (64 * KIB, 600 * MIB)]
)
def test_a_world_that_fills_its_guest_allocates_that_many(page: int, memory: int) -> None:
    """The same numbers through faults: allocated, and held at the end, root included."""
    record = run(
        guest={
            "vcpus": 3,
            "memory": memory,
            "page_size": page,
            "access": {"pattern": "populate"},
        }
    )
    tables = sum(expected(page, memory, levels_of(page, 40)).values())
    assert record.summary["tables_allocated"] == tables
    assert record.timeline["table_bytes"][-1] == (tables + Geometry(page, 40).root_pages) * page
    assert record.timeline["table_bytes"] == sorted(record.timeline["table_bytes"])


def test_a_world_begins_with_its_roots() -> None:
    made = world(guest={"memory": 4 * MIB, "access": {"pattern": "populate"}})
    timeline = made.memory.timeline(0)
    assert timeline["table_bytes"].tolist() == [2 * 4 * KIB]
    assert np.array_equal(timeline["reported_table_bytes"], timeline["table_bytes"])
