"""Shape of the tables that map a guest: levels, entries a table, roots.

Source: arch/arm64/include/asm/{kvm_pgtable.h,stage2_pgtable.h,kvm_arm.h} and
arch/x86/kvm/mmu/{mmu.c,mmu_internal.h}, v6.12. Levels are numbered as arm64 does, 3 maps pages;
x86 counts the other way, from PG_LEVEL_4K (here 3) up to PG_LEVEL_512G (0) and 256T (-1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

LAST_LEVEL = 3
ENTRY_BYTES = 8


@dataclass(frozen=True)
class Geometry:
    """Geometry for one granule (``page_bytes``: 4, 16 or 64 KiB) and ``ipa_bits`` of address."""

    page_bytes: int
    ipa_bits: int

    @property
    def page_shift(self) -> int:
        """log2 of the page size."""
        return self.page_bytes.bit_length() - 1

    @property
    def index_bits(self) -> int:
        """Bits of address that one level resolves: a table is one page of 8-byte entries."""
        return self.page_shift - 3

    @property
    def entries(self) -> int:
        """Entries a table: 512, 2048 or 8192."""
        return 1 << self.index_bits

    def shift(self, level: int) -> int:
        """log2 of the bytes that one entry at ``level`` maps."""
        return self.index_bits * (4 - level) + 3

    def span_bytes(self, level: int) -> int:
        """Bytes that one entry at ``level`` maps."""
        return 1 << self.shift(level)

    @cached_property
    def start_level(self) -> int:
        """Level of the root: up to 16 roots are concatenated, so 4 bits need no level of their own.

        Never fewer than two levels (``stage2_pgtable_levels``).
        """
        resolved = self.ipa_bits - 4 - self.page_shift
        levels = max(2, -(-resolved // self.index_bits))
        return 4 - levels

    @cached_property
    def root_pages(self) -> int:
        """Concatenated root tables."""
        top = self.shift(self.start_level) + self.index_bits
        return 1 << max(0, self.ipa_bits - top)

    @property
    def min_block_level(self) -> int:
        """Highest level that may hold a block (``KVM_PGTABLE_MIN_BLOCK_LEVEL``)."""
        return 1 if self.page_bytes == 4096 else 2

    @property
    def chunk_bytes(self) -> int:
        """What a range operation does in one go: the largest block (``stage2_apply_range``)."""
        return self.span_bytes(self.min_block_level)

    @property
    def cache_minimum(self) -> int:
        """Tables that a fault wants in its memory cache: one for each level below the root."""
        return 3 - self.start_level

    def leaf_level(self, mapping_bytes: int) -> int:
        """Level whose entries map ``mapping_bytes``; ValueError if no leaf may have that size."""
        for level in range(self.min_block_level, LAST_LEVEL + 1):
            if self.span_bytes(level) == mapping_bytes:
                return level
        raise ValueError(f"no level of a {self.page_bytes}-byte granule maps {mapping_bytes} bytes")

    def leaf_sizes(self) -> list[int]:
        """The sizes that a leaf may have, smallest first, in bytes."""
        return [self.span_bytes(n) for n in range(LAST_LEVEL, self.min_block_level - 1, -1)]


#: Most levels of an x86 table (``PT64_ROOT_MAX_LEVEL``): what a fault's memory cache has to hold.
X86_MOST_LEVELS = 5


@dataclass(frozen=True)
class X86Geometry(Geometry):
    """Geometry of x86's direct tables: pages of 4 KiB, one root page, nothing concatenated.

    ``ipa_bits`` is the guest's MAXPHYADDR: four levels up to 48 bits, else five
    (``kvm_mmu_get_tdp_level``).
    """

    @cached_property
    def start_level(self) -> int:
        """Level of the root."""
        return 0 if self.ipa_bits <= 48 else -1

    @cached_property
    def root_pages(self) -> int:
        """One table, whatever it has to reach."""
        return 1

    @property
    def cache_minimum(self) -> int:
        """Tables that a fault wants in its memory cache (``mmu_topup_memory_caches``)."""
        return X86_MOST_LEVELS


GEOMETRIES: dict[str, type[Geometry]] = {"arm64": Geometry, "x86": X86Geometry}
"""By architecture."""
