"""What the KVM selftests' ``-m`` and ``-s`` stand for: guest modes and backing sources.

Source: tools/testing/selftests/kvm/lib/{kvm_util.c,guest_modes.c,test_util.c}, v6.12.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from simkvm.units import GIB, KIB, MIB


class GuestMode(NamedTuple):
    """Guest-physical and virtual address bits, and the page size of the *guest's* tables."""

    pa_bits: int
    va_bits: int
    page_size: int
    text: str

    def __str__(self) -> str:
        """As the selftests print it; "ANY" stands for what the CPU has."""
        bits, page = f"{self.text},", f"{self.page_size // KIB}K"
        return f"PA-bits:{bits:<5}VA-bits:{self.va_bits}, {page:>3} pages"


def _mode(pa_bits: int, va_bits: int, page_size: int, text: str = "") -> GuestMode:
    return GuestMode(pa_bits, va_bits, page_size * KIB, text or str(pa_bits))


MODES: Final[tuple[GuestMode, ...]] = (
    _mode(52, 48, 4),
    _mode(52, 48, 16),
    _mode(52, 48, 64),
    _mode(48, 48, 4),
    _mode(48, 48, 16),
    _mode(48, 48, 64),
    _mode(40, 48, 4),
    _mode(40, 48, 16),
    _mode(40, 48, 64),
    _mode(48, 48, 4, "ANY"),
    _mode(47, 64, 4),
    _mode(44, 64, 4),
    _mode(36, 48, 4),
    _mode(36, 48, 16),
    _mode(36, 48, 64),
    _mode(36, 47, 16),
)
"""By number, as ``enum vm_guest_mode`` counts them."""

DEFAULT_MODE: Final[Mapping[str, int]] = {"arm64": 6, "x86": 9}
"""``VM_MODE_DEFAULT``: 40 address bits and 4 KiB pages on arm64."""

OF_ARCH: Final[Mapping[str, tuple[int, ...]]] = {
    "arm64": (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15),
    "x86": (9,),
}
"""Modes that a machine of each architecture can have (``guest_modes_append_default``)."""

BackingSource = Literal[
    "anonymous",
    "anonymous_thp",
    "anonymous_hugetlb",
    "anonymous_hugetlb_16kb",
    "anonymous_hugetlb_64kb",
    "anonymous_hugetlb_512kb",
    "anonymous_hugetlb_1mb",
    "anonymous_hugetlb_2mb",
    "anonymous_hugetlb_8mb",
    "anonymous_hugetlb_16mb",
    "anonymous_hugetlb_32mb",
    "anonymous_hugetlb_256mb",
    "anonymous_hugetlb_512mb",
    "anonymous_hugetlb_1gb",
    "anonymous_hugetlb_2gb",
    "anonymous_hugetlb_16gb",
    "shmem",
    "shared_hugetlb",
]
SHARED: Final = ("shmem", "shared_hugetlb")
_UNIT: Final = {"kb": KIB, "mb": MIB, "gb": GIB}

#: Sizes of a PMD, what huge pages exist (with contiguous ones), by host page size (arm64 v6.12).
PMD_BYTES: Final[Mapping[int, int]] = {4 * KIB: 2 * MIB, 16 * KIB: 32 * MIB, 64 * KIB: 512 * MIB}
HUGE_PAGES: Final[Mapping[int, tuple[int, ...]]] = {
    4 * KIB: (64 * KIB, 2 * MIB, 32 * MIB, GIB),
    16 * KIB: (2 * MIB, 32 * MIB, GIB),
    64 * KIB: (2 * MIB, 512 * MIB, 16 * GIB),
}


def backing_bytes(source: str, host_page: int) -> int:
    """What the selftests call the page size of a backing source (``get_backing_src_pagesz``)."""
    if source in ("anonymous", "shmem"):
        return host_page
    size = source.removeprefix("anonymous_hugetlb_")
    if size[-2:] in _UNIT and size[:-2].isdecimal():
        return int(size[:-2]) * _UNIT[size[-2:]]
    return PMD_BYTES[host_page]


def stage2_bytes(backing: int, host_page: int) -> int:
    """The leaf that a stage-2 fault installs for huge pages of ``backing`` bytes.

    Contiguous ones are mapped by the next smaller size that has a level of its own
    (arch/arm64/kvm/mmu.c, ``user_mem_abort``).
    """
    levels = (GIB,) if host_page == 4 * KIB else ()
    sizes: tuple[int, ...] = (host_page, PMD_BYTES[host_page], *levels)
    return max(size for size in sizes if size <= backing)
