"""The KVM selftests as workloads: one model a test, with every option that the test has.

Source: tools/testing/selftests/kvm/*.c, v6.12; ``mmu_stress_test`` of v6.14, and the options
``-l`` and ``-p`` of ``access_tracking_perf_test`` from message
20240529180510.2295118-1-jthoughton@google.com. Defaults are the tests' own. What a key is called
on the test's command line stands in brackets. A test makes its virtual machines itself: ``vms``
says which, and the threads of :mod:`simkvm.selftests` drive them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from simkvm.scenario.fields import AnySize, Duration, Size
from simkvm.scenario.guest_modes import (
    HUGE_PAGES,
    MODES,
    OF_ARCH,
    SHARED,
    BackingSource,
    GuestMode,
    backing_bytes,
    stage2_bytes,
)
from simkvm.scenario.memslot_selftest import MemslotPerf
from simkvm.scenario.selftest import GRANULES, Pin, Selftest, Vcpus, Vm, whole
from simkvm.units import GIB, exact_size


class OnBackingSource(Selftest):
    """A test to which one says the guest's mode and what memory is behind it."""

    backing_src: BackingSource = Field(
        default="anonymous", description="Type of the host memory behind the guest's (-s)."
    )
    mode: int | None = Field(
        default=None,
        ge=0,
        lt=len(MODES),
        description="Guest mode by number (-m): address bits and the guest's page size; 3, 4, 5: "
        "48 bits with 4, 16, 64 KiB; 6, 7, 8: 40 bits; 12, 13, 14: 36 bits; null: the "
        "default, 6 on arm64, 9 (what the CPU has) on x86.",
    )

    @property
    def guest_mode(self) -> GuestMode:
        """As ``mode`` says."""
        return super().guest_mode if self.mode is None else MODES[self.mode]

    @property
    def backing_bytes(self) -> int:
        """Page size of the backing source."""
        return backing_bytes(self.backing_src, self.page_size)


class Memstress(OnBackingSource):
    """What the tests around ``lib/memstress.c`` share."""

    vcpus: Vcpus = Field(default=1, description="vCPUs (-v).")
    vcpu_memory: Size = Field(default=GIB, description="Memory that each vCPU touches (-b).")
    overlap: bool = Field(
        default=False,
        description="Every vCPU touches the memory of all instead of a part of its own (-o).",
    )

    @property
    def memory(self) -> int:
        """Memory of all vCPUs, whole pages of host and guest."""
        unit = max(self.page_size, self.guest_mode.page_size)
        return whole(self.vcpus * self.vcpu_memory, unit)

    @property
    def parts(self) -> int:
        """Memslots that the memory is cut into."""
        return 1

    def leaf_bytes(self) -> int:
        """Size of the stage-2 leaves that faults install."""
        return stage2_bytes(self.backing_bytes, self.page_size)

    def folio_bytes(self) -> int:
        """Size of the host's folios, as far as mapped at once."""
        leaf = self.leaf_bytes()
        return leaf if leaf > self.page_size else self.backing_bytes

    def vms(self, cpus: int) -> Mapping[str, Vm]:
        """One, its memory at the top of its addresses."""
        return {
            "vm": Vm(
                vcpus=self.vcpus,
                memory=self.memory,
                page_size=self.page_size,
                ipa_bits=self.guest_mode.pa_bits,
                base=self._at_the_top(self.memory, max(self.backing_bytes, self.page_size)),
                mapping=self.leaf_bytes(),
                folio=self.folio_bytes(),
                overlap=self.overlap,
                memslots=self.parts,
            )
        }

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """Modes and huge pages that the machine does not have, sizes that are no whole pages."""
        yield from super().complaints(arch, cpus)
        yield from _backing(self, arch)
        for page in (self.page_size, self.guest_mode.page_size):
            if self.vcpu_memory % page:
                size = exact_size(self.vcpu_memory)
                yield "vcpu_memory", f"{size} is not a multiple of the page size {exact_size(page)}"
                return


def _backing(spec: Memstress | KvmPageTable, arch: str) -> Iterator[tuple[str, str]]:
    if spec.mode is not None and spec.mode not in OF_ARCH[arch]:
        modes = ", ".join(map(str, OF_ARCH[arch]))
        yield "mode", f"{spec.mode} ({spec.guest_mode}) is no mode of {arch}: {modes}"
    if spec.page_size not in GRANULES:
        return
    sizes = HUGE_PAGES[spec.page_size]
    backing = spec.backing_bytes
    if "hugetlb" in spec.backing_src and backing not in sizes:
        yield (
            "backing_src",
            f"a host with pages of {exact_size(spec.page_size)} has no huge pages of "
            f"{exact_size(backing)}: {', '.join(map(exact_size, sizes))}",
        )


def _pinning(pin: tuple[int, ...] | None, vcpus: int, cpus: int) -> Iterator[tuple[str, str]]:
    if pin is None:
        return
    if len(pin) not in (vcpus, vcpus + 1):
        yield "pin", f"needs one CPU for each of {vcpus} vCPUs, and may name one more: {len(pin)}"
    elif max(pin) >= cpus:
        yield "pin", f"CPU {max(pin)} is not there, the host has {cpus}"
    elif len(set(pin)) < len(pin):
        yield "pin", "names a CPU twice: every thread has one to itself here"


PIN = Field(
    default=None,
    description="CPUs of the vCPU threads, in order, and perhaps that of the main thread (-c); "
    "null: CPUs 0, 1, 2...",
)


class AccessTrackingPerf(Memstress):
    """What access tracking costs a guest: its touches before and after its pages are aged."""

    test: Literal["access_tracking_perf_test"] = "access_tracking_perf_test"
    lru_gen: bool = Field(
        default=False,
        description="Age through MGLRU's debugfs file instead of marking pages idle (-l).",
    )
    age_while_populating: bool = Field(
        default=False,
        description="Only populate, and age meanwhile again and again (-p); needs lru_gen.",
    )
    idle_pages: Literal["fail", "warn"] = Field(
        default="fail",
        description="What more than a tenth of pages that still look idle means (-w 0, -w 1): "
        "the test ends there, or only warns.",
    )

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """As the test itself asserts."""
        yield from super().complaints(arch, cpus)
        if self.age_while_populating and not self.lru_gen:
            yield "age_while_populating", "needs lru_gen: true (-p specified without -l)"


class DirtyLogPerf(Memstress):
    """What dirty logging costs: guest writes and ioctls, round by round."""

    logs: ClassVar[bool] = True

    test: Literal["dirty_log_perf_test"] = "dirty_log_perf_test"
    iterations: int = Field(default=2, ge=2, description="Rounds of dirtying and reading (-i).")
    write_percent: int = Field(
        default=100, ge=0, le=100, description="Share of the touches that write, in percent (-w)."
    )
    random: bool = Field(default=False, description="Touch pages at random, not in order (-a).")
    random_seed: int = Field(
        default=1, ge=1, description="Seed of the guest's own generator (-r), which is the test's."
    )
    memslots: int = Field(default=1, ge=1, description="Memslots that the memory is cut into (-x).")
    manual_protect: bool = Field(
        default=True,
        description="Use KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (false is -g): reading the log does "
        "not protect, clearing does, and all pages begin as dirty.",
    )
    run_while_disabling: bool = Field(
        default=False, description="Let vCPUs run while logging is switched off (-e)."
    )
    nested: bool = Field(
        default=False, description="Run in a nested guest (-n); x86 only, not modelled."
    )
    phys_offset: AnySize | None = Field(
        default=None,
        description="Guest-physical offset (-p): the test reads it and does not use it.",
    )
    pin: Pin | None = PIN

    @property
    def parts(self) -> int:
        """As ``memslots`` says."""
        return self.memslots

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """Memslots of equal size, pinning, and what is not modelled."""
        yield from super().complaints(arch, cpus)
        yield from _pinning(self.pin, self.vcpus, cpus)
        if self.memory // self.leaf_bytes() % self.memslots:
            yield "memslots", f"{exact_size(self.memory)} cannot be cut evenly into {self.memslots}"
        if self.nested:
            yield "nested", "is not modelled"


class DemandPaging(Memstress):
    """How fast memory is paged in, by the kernel or by userfaultfd threads."""

    test: Literal["demand_paging_test"] = "demand_paging_test"
    uffd_mode: Literal["MISSING", "MINOR"] | None = Field(
        default=None, description="Serve faults through userfaultfd, registered so (-u); null: no."
    )
    single_uffd: bool = Field(
        default=False,
        description="One userfaultfd for all memory instead of one a vCPU (-a); implied by "
        "overlap; without effect without uffd_mode.",
    )
    uffd_delay: Duration = Field(
        default=0, description="Sleep before each page is served (-d, there in us)."
    )
    readers_per_uffd: int = Field(
        default=1, ge=1, description="Threads that read from each userfaultfd (-r)."
    )
    pin: Pin | None = PIN

    @property
    def uffds(self) -> int:
        """Userfaultfds."""
        if self.uffd_mode is None:
            return 0
        return 1 if self.single_uffd or self.overlap else self.vcpus

    def threads(self, cpus: int) -> int:
        """The main thread and the readers."""
        return 1 + self.uffds * self.readers_per_uffd

    def leaf_bytes(self) -> int:
        """UFFDIO_COPY fills memory page by page, so it makes no transparent huge page."""
        return self.page_size if self._copied_by_page else super().leaf_bytes()

    def folio_bytes(self) -> int:
        """Single pages then, too."""
        return self.page_size if self._copied_by_page else super().folio_bytes()

    @property
    def _copied_by_page(self) -> bool:
        return self.uffd_mode == "MISSING" and self.backing_src == "anonymous_thp"

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """Minor faults need memory that is shared."""
        yield from super().complaints(arch, cpus)
        yield from _pinning(self.pin, self.vcpus, cpus)
        if self.uffd_mode == "MINOR" and self.backing_src not in SHARED:
            yield "uffd_mode", f"MINOR needs shared memory: backing_src {' or '.join(SHARED)}"


class KvmPageTable(OnBackingSource):
    """Stage-2 mappings from their creation over their splitting to blocks again."""

    memory_key: ClassVar[str] = "memory"
    logs: ClassVar[bool] = True

    test: Literal["kvm_page_table_test"] = "kvm_page_table_test"
    vcpus: Vcpus = Field(default=1, description="vCPUs (-v); all touch the same memory.")
    memory: Size = Field(default=GIB, description="Memory of the guest (-b).")
    phys_offset: AnySize | None = Field(
        default=None,
        description="Guest-physical address of the memory (-p); null: below the top of all.",
    )

    @property
    def test_memory(self) -> int:
        """The memory, whole pages of backing source and guest."""
        return whole(self.memory, max(self.backing_bytes, self.guest_mode.page_size))

    def vms(self, cpus: int) -> Mapping[str, Vm]:
        """One; the memory lies one page lower than the addresses would allow."""
        align = max(self.backing_bytes, self.guest_mode.page_size, self.page_size)
        base = self._at_the_top(self.test_memory, align)
        if self.phys_offset is not None:
            base = self.phys_offset // align * align
        leaf = stage2_bytes(self.backing_bytes, self.page_size)
        return {
            "vm": Vm(
                vcpus=self.vcpus,
                memory=self.test_memory,
                page_size=self.page_size,
                ipa_bits=self.guest_mode.pa_bits,
                base=base,
                mapping=leaf,
                folio=leaf if leaf > self.page_size else self.backing_bytes,
                overlap=True,
            )
        }

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """Modes and huge pages that the machine does not have."""
        yield from super().complaints(arch, cpus)
        yield from _backing(self, arch)


class FilledMemory(Selftest):
    """What ``max_guest_memory_test`` and its successor share."""

    memory_key: ClassVar[str] = "memory"
    fills: ClassVar[bool] = True

    vcpus: Vcpus | None = Field(
        default=None, description="vCPUs (-c); null: three quarters of the host's CPUs."
    )
    memory: Size = Field(
        default=128 * GIB, description="Memory of the guest (-m, there in GiB): whole slots of it."
    )
    slot_size: Size = Field(
        default=2 * GIB,
        description="Size of a memslot (-s, there in GiB); all map the same host memory.",
    )
    hugepages: bool = Field(default=False, description="Back it with hugetlb pages (-H).")

    def number(self, cpus: int) -> int:
        """VCPUs on a host of ``cpus``."""
        return self.vcpus or (cpus * 3 // 4 if cpus >= 2 else cpus)

    @property
    def slots(self) -> int:
        """Memslots: as many as it takes to reach the wanted memory."""
        return -(-self.memory // self.slot_size)

    def vms(self, cpus: int) -> Mapping[str, Vm]:
        """One, from 4 GiB on."""
        leaf = stage2_bytes(
            backing_bytes("anonymous_hugetlb" if self.hugepages else "shmem", self.page_size),
            self.page_size,
        )
        return {
            "vm": Vm(
                vcpus=self.number(cpus),
                memory=self.slots * self.slot_size,
                page_size=self.page_size,
                ipa_bits=self.guest_mode.pa_bits,
                base=4 * GIB,
                mapping=leaf,
                folio=leaf,
                memslots=self.slots,
            )
        }


class MaxGuestMemory(FilledMemory):
    """Filling a guest's memory, twice."""

    test: Literal["max_guest_memory_test"] = "max_guest_memory_test"


class MmuStress(FilledMemory):
    """Filling a guest's memory, twice, then taking the right to write away and giving it back."""

    test: Literal["mmu_stress_test"] = "mmu_stress_test"


AnySelftest = Annotated[
    AccessTrackingPerf
    | DemandPaging
    | DirtyLogPerf
    | KvmPageTable
    | MaxGuestMemory
    | MemslotPerf
    | MmuStress,
    Field(discriminator="test"),
]
