"""How many tables a mapped guest needs and how many an unmap gives back, by arithmetic alone.

Independent of :mod:`simkvm.kernel.geometry`: a table holds page / 8 entries, a walk resolves
log2(page / 8) bits a level, at most 16 roots lie side by side (arch/arm64/include/asm/
stage2_pgtable.h, v6.12), so levels are counted as for an address four bits shorter.
"""

from __future__ import annotations

from functools import partial
from math import ceil, log2

from simkvm.kernel.geometry import Geometry
from simkvm.kernel.stage2 import WRITE, Stage2
from simkvm.kernel.unmap import UnmapCosts, UnmapWalk
from simkvm.units import GIB, KIB, MIB, format_size
from simkvm.validate.closed_form import ClosedForm, Estimate, exactly

PAGES = (4 * KIB, 16 * KIB, 64 * KIB)
WIDTHS = range(32, 53)
IPA_BITS = 40

GEOMETRY = "arch/arm64/include/asm/stage2_pgtable.h, v6.12: 8-byte entries, at most 16 roots"
BLOCKS = "arch/arm64/include/asm/kvm_pgtable.h, v6.12: KVM_PGTABLE_MIN_BLOCK_LEVEL"
UNMAP = "arch/arm64/kvm/hyp/pgtable.c, v6.12: a table that counts no entry is unlinked"
FREE = UnmapCosts(0, 0, 0, 0, 0, 0, 0)


def closed_forms() -> list[ClosedForm]:
    """Levels, roots, blocks, tables of whole guests, and what unmapping ranges frees."""
    return [
        *(_widths(page) for page in PAGES),
        *(_roots(page) for page in PAGES),
        *(_block(page) for page in PAGES),
        *(_tables(page, 64 * GIB) for page in PAGES),
        _tables(4 * KIB, 64 * GIB, 2 * MIB),
        _straddling(),
        *(_populated(page, memory) for page, memory in zip(PAGES, (34, 80, 600), strict=True)),
        *(_unmapped(page, size, 0) for page, size in zip(PAGES, (64, 512, 2048), strict=True)),
        _unmapped(4 * KIB, 64, 4 * KIB),
        _all_unmapped(),
    ]


# -- arithmetic ------------------------------------------------------------------------------------


def levels_of(page: int, bits: int) -> int:
    """stage2_pgtable_levels(): four bits go to concatenated roots, never below two levels."""
    return max(2, ceil((bits - 4 - log2(page)) / log2(page // 8)))


def roots_of(page: int, bits: int) -> int:
    """Root pages that just reach 2 ** ``bits`` bytes."""
    reached: int = page * (page // 8) ** levels_of(page, bits)
    return max(1, (1 << bits) // reached)


def tables_of(page: int, memory: int, levels: int, skip: int = 0) -> dict[int, int]:
    """Tables by level, below the root of ``levels``, for aligned ``memory``.

    The ``skip`` lowest levels are none's: blocks lie above them.
    """
    entries = page // 8
    return {
        level: ceil(memory / (page * entries ** (4 - level)))
        for level in range(4 - levels + 1, 4 - skip)
    }


# -- the model -------------------------------------------------------------------------------------


def filled(
    page: int, memory: int, mapping: int = 0, base: int = GIB, bits: int = IPA_BITS
) -> Stage2:
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


def _name(page: int) -> str:
    return format_size(page).replace(" ", "").removesuffix("iB").lower()


def _widths(page: int) -> ClosedForm:
    """Start level, root pages and the tables that a fault caches, for every width of an address."""

    def agree(bits: int) -> bool:
        geometry, levels = Geometry(page, bits), levels_of(page, bits)
        return (geometry.start_level, geometry.root_pages, geometry.cache_minimum) == (
            4 - levels,
            roots_of(page, bits),
            levels - 1,
        )

    return ClosedForm(
        f"tables/{_name(page)}/widths",
        f"{format_size(page)} pages: widths of 32 to 52 bits with the right levels and roots",
        "widths",
        len(WIDTHS),
        lambda: exactly(sum(agree(bits) for bits in WIDTHS)),
        GEOMETRY,
        drawn=False,
    )


def _roots(page: int) -> ClosedForm:
    return ClosedForm(
        f"tables/{_name(page)}/roots",
        f"{format_size(page)} pages, {IPA_BITS} bits: concatenated roots",
        "tables",
        roots_of(page, IPA_BITS),
        lambda: exactly(Geometry(page, IPA_BITS).root_pages),
        GEOMETRY,
        drawn=False,
    )


def _block(page: int) -> ClosedForm:
    """At 4 KiB a block may lie two levels above the pages, at other granules one."""

    def largest() -> Estimate:
        geometry = Geometry(page, IPA_BITS)
        return exactly(geometry.span_bytes(geometry.min_block_level) / MIB)

    return ClosedForm(
        f"tables/{_name(page)}/block",
        f"{format_size(page)} pages: what the largest block covers",
        "MiB",
        page * (page // 8) ** (2 if page == 4 * KIB else 1) / MIB,
        largest,
        BLOCKS,
        drawn=False,
    )


def _tables(page: int, memory: int, mapping: int = 0) -> ClosedForm:
    """Memory in tables of a guest that has touched everything, root included."""
    skip = 0 if not mapping else round(log2(mapping // page) / log2(page // 8))
    below = tables_of(page, memory, levels_of(page, IPA_BITS), skip)

    def measure() -> Estimate:
        stage2 = filled(page, memory, mapping, base=0)
        return exactly((stage2.linked_tables + stage2.geometry.root_pages) * page / KIB)

    leaves = f"{format_size(mapping)} blocks" if mapping else f"{format_size(page)} pages"
    return ClosedForm(
        f"tables/{_name(page)}/{f'blocks-{_name(mapping)}' if mapping else 'pages'}",
        f"{format_size(memory)} in {leaves}: memory in tables",
        "KiB",
        (sum(below.values()) + roots_of(page, IPA_BITS)) * page / KIB,
        measure,
        GEOMETRY,
        drawn=False,
    )


def _straddling() -> ClosedForm:
    """A GiB from a page below a GiB on: one more table at each level below the root."""
    page = 4 * KIB
    below = tables_of(page, GIB, levels_of(page, IPA_BITS))
    return ClosedForm(
        "tables/4k/straddling",
        "1 GiB that is not aligned, in 4 KiB pages: tables below the root",
        "tables",
        sum(below.values()) + len(below),
        lambda: exactly(filled(page, GIB, base=GIB - page).linked_tables),
        GEOMETRY,
        drawn=False,
    )


def _populated(page: int, mib: int) -> ClosedForm:
    """The same number through faults of three vCPUs of a whole simulated host."""
    memory = mib * MIB

    def measure() -> Estimate:
        from simkvm.validate.theory_worlds import run

        guest = {
            "vcpus": 3,
            "memory": memory,
            "page_size": page,
            "access": {"pattern": "populate"},
        }
        return exactly(float(run(guest=guest).summary["tables_allocated"]))

    return ClosedForm(
        f"tables/{_name(page)}/faults",
        f"{format_size(memory)} populated by 3 vCPUs, {format_size(page)} pages: tables allocated",
        "tables",
        sum(tables_of(page, memory, levels_of(page, IPA_BITS)).values()),
        measure,
        GEOMETRY,
        drawn=False,
    )


def _unmapped(page: int, mib: int, offset: int) -> ClosedForm:
    """Every leaf table that lies wholly within the range goes, and of those above none."""
    memory, size = 4 * GIB, mib * MIB
    covers = page * page // 8
    whole = (offset + size) // covers - ceil(offset / covers)
    off = "" if not offset else f", {format_size(offset)} off a table"
    return ClosedForm(
        f"tables/{_name(page)}/unmap{'-unaligned' if offset else ''}",
        f"{format_size(size)} of {format_size(page)} pages unmapped{off}: tables freed",
        "KiB",
        whole * page / KIB,
        partial(_unmap, page, memory, covers + offset, size),
        UNMAP,
        drawn=False,
    )


def _unmap(page: int, memory: int, first: int, size: int) -> Estimate:
    """KiB of the tables that unmapping ``size`` bytes from ``first`` on unlinks, all mapped."""
    stage2 = Stage2(Geometry(page, IPA_BITS), 0, memory // page, page)
    stage2.map_all(WRITE)
    walk = UnmapWalk(stage2, first // page, (first + size) // page, FREE)
    return exactly(len(walk.tables) * page / KIB)


def _all_unmapped() -> ClosedForm:
    """All goes but the root, which stays however empty."""
    page, memory = 4 * KIB, 4 * GIB
    return ClosedForm(
        "tables/4k/unmap-all",
        f"{format_size(memory)} of 4 KiB pages unmapped: tables freed",
        "KiB",
        sum(tables_of(page, memory, levels_of(page, IPA_BITS)).values()) * page / KIB,
        partial(_unmap, page, memory, 0, memory),
        UNMAP,
        drawn=False,
    )
