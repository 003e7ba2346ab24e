"""Shape of a stage-2 table.

Source: arch/arm64/include/asm/{kvm_pgtable,stage2_pgtable,kvm_arm}.h, v6.12.
"""

from __future__ import annotations

import pytest

from simkvm.kernel.geometry import Geometry

K, M, G, T = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize(
    ("page", "entries", "spans"),
    [
        (4 * K, 512, {0: 512 * G, 1: G, 2: 2 * M, 3: 4 * K}),
        (16 * K, 2048, {0: 128 * T, 1: 64 * G, 2: 32 * M, 3: 16 * K}),
        (64 * K, 8192, {1: 4 * T, 2: 512 * M, 3: 64 * K}),
    ],
)
def test_a_table_is_one_page_of_8_byte_entries(
    page: int, entries: int, spans: dict[int, int]
) -> None:
    """ARM64_HW_PGTABLE_LEVEL_SHIFT: 2**((page_shift - 3) * (4 - n) + 3) bytes at level n."""
    geometry = Geometry(page, 40)
    assert geometry.entries == entries == page // 8
    assert {level: geometry.span_bytes(level) for level in spans} == spans
    for level in list(spans)[:-1]:
        assert geometry.span_bytes(level) == entries * geometry.span_bytes(level + 1)


ROOTS = [  # granule, IPA bits, level of the root, concatenated root pages
    *((4 * K, 32, 2, 4), (4 * K, 34, 2, 16), (4 * K, 35, 1, 1), (4 * K, 36, 1, 1)),
    *((4 * K, 39, 1, 1), (4 * K, 40, 1, 2), (4 * K, 42, 1, 8), (4 * K, 43, 1, 16)),
    *((4 * K, 44, 0, 1), (4 * K, 48, 0, 1), (4 * K, 52, 0, 16)),
    *((16 * K, 32, 2, 1), (16 * K, 36, 2, 1), (16 * K, 39, 2, 8), (16 * K, 40, 2, 16)),
    *((16 * K, 42, 1, 1), (16 * K, 47, 1, 1), (16 * K, 48, 1, 2), (16 * K, 52, 0, 1)),
    *((64 * K, 32, 2, 1), (64 * K, 40, 2, 1), (64 * K, 42, 2, 1), (64 * K, 43, 2, 2)),
    *((64 * K, 44, 2, 4), (64 * K, 48, 1, 1), (64 * K, 52, 1, 1)),
]


@pytest.mark.parametrize(("page", "bits", "level", "pages"), ROOTS)
def test_up_to_16_roots_are_concatenated(page: int, bits: int, level: int, pages: int) -> None:
    """stage2_pgtable_levels(ipa) is the level count for 4 bits less, and never below 2."""
    geometry = Geometry(page, bits)
    assert (geometry.start_level, geometry.root_pages) == (level, pages)


@pytest.mark.parametrize("page", [4 * K, 16 * K, 64 * K])
def test_the_roots_cover_the_address_space_exactly(page: int) -> None:
    for bits in range(32, 53):
        geometry = Geometry(page, bits)
        reach = geometry.root_pages * geometry.entries * geometry.span_bytes(geometry.start_level)
        assert reach >= 1 << bits
        assert geometry.root_pages <= 16
        if geometry.root_pages > 1:
            assert reach == 1 << bits, "concatenated only as far as needed"


@pytest.mark.parametrize(
    ("page", "bits", "minimum"),
    [
        *((4 * K, 32, 1), (4 * K, 36, 2), (4 * K, 40, 2), (4 * K, 43, 2), (4 * K, 44, 3)),
        *((4 * K, 48, 3), (4 * K, 52, 3), (16 * K, 40, 1), (64 * K, 40, 1), (64 * K, 48, 2)),
    ],
)
def test_a_fault_wants_a_table_for_each_level_below_the_root(
    page: int, bits: int, minimum: int
) -> None:
    """kvm_mmu_cache_min_pages(): levels minus one."""
    assert Geometry(page, bits).cache_minimum == minimum


@pytest.mark.parametrize(
    ("page", "sizes"),
    [
        (4 * K, [4 * K, 2 * M, G]),
        (16 * K, [16 * K, 32 * M]),
        (64 * K, [64 * K, 512 * M]),
    ],
)
def test_blocks_and_the_chunk_of_a_range_operation(page: int, sizes: list[int]) -> None:
    """KVM_PGTABLE_MIN_BLOCK_LEVEL: 1 for 4 KiB, else 2; stage2_apply_range() goes by that size."""
    geometry = Geometry(page, 48)
    assert geometry.leaf_sizes() == sizes
    assert [geometry.leaf_level(size) for size in sizes] == [3, 2, 1][: len(sizes)]
    assert geometry.chunk_bytes == sizes[-1]


@pytest.mark.parametrize(("page", "size"), [(4 * K, 512 * G), (4 * K, 8 * K), (16 * K, 64 * G)])
def test_no_leaf_of_another_size(page: int, size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Geometry(page, 48).leaf_level(size)


def test_tables_of_a_large_guest() -> None:
    """64 GiB in 4 KiB pages: 32768 + 64 tables, 128.25 MiB of them."""
    geometry = Geometry(4 * K, 40)
    tables = 64 * G // geometry.span_bytes(2) + 64 * G // geometry.span_bytes(1)
    assert tables == 32768 + 64
    assert tables * 4 * K == 128.25 * M
