"""Trees of tables level by level, and the memory of a world; totals are rows of the theory."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import run, scenario, world

from simkvm.kernel.geometry import Geometry
from simkvm.kernel.stage2 import Stage2
from simkvm.scenario.errors import InputError
from simkvm.units import GIB, KIB, MIB
from simkvm.validate.theory_tables import PAGES, filled, levels_of, tables_of


def tables_by_level(stage2: Stage2) -> dict[int, int]:
    """Linked tables below the root, by level."""
    levels = [table.level for table in stage2.all_tables()]
    return {level: levels.count(level) for level in sorted(set(levels))}


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
    assert tables == tables_of(page, memory, levels_of(page, 40))
    assert stage2.linked_tables == sum(tables.values())


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
@pytest.mark.parametrize("bits", [36, 40, 44, 48, 52])
def test_the_formula_holds_for_whole_trees(page: int, bits: int) -> None:
    memory = 3 * GIB + 12 * MIB
    stage2 = filled(page, memory, base=0, bits=bits)
    assert tables_by_level(stage2) == tables_of(page, memory, levels_of(page, bits))


def test_a_slot_that_straddles_tables_needs_one_more_at_each_level() -> None:
    """A GiB from half a GiB on: 512 leaf tables, but two level-2 tables instead of one."""
    stage2 = filled(4 * KIB, GIB, base=GIB // 2)
    assert tables_by_level(stage2) == {2: 2, 3: 512}
    unaligned = filled(4 * KIB, GIB, base=GIB - 4 * KIB)
    assert tables_by_level(unaligned) == {2: 2, 3: 513}


def test_a_world_that_fills_its_guest_holds_what_it_allocated() -> None:
    """The same numbers through faults, root included; nothing goes away meanwhile."""
    page, memory = 16 * KIB, 80 * MIB
    record = run(
        guest={
            "vcpus": 3,
            "memory": memory,
            "page_size": page,
            "access": {"pattern": "populate"},
        }
    )
    tables = sum(tables_of(page, memory, levels_of(page, 40)).values())
    assert record.summary["tables_allocated"] == tables
    assert record.timeline["table_bytes"][-1] == (tables + Geometry(page, 40).root_pages) * page
    assert record.timeline["table_bytes"] == sorted(record.timeline["table_bytes"])


def test_a_world_begins_with_its_roots() -> None:
    made = world(guest={"memory": 4 * MIB, "access": {"pattern": "populate"}})
    timeline = made.memory.timeline(0)
    assert timeline["table_bytes"].tolist() == [2 * 4 * KIB]
    assert np.array_equal(timeline["reported_table_bytes"], timeline["table_bytes"])
