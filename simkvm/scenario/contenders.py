"""What else takes ``mmu_lock``: the contenders of a scenario, one model each.

A model's ``sizes`` are checked against the guest that it works on. To add a contender: its model
here and in :data:`Contender`, its thread in ``simkvm/contenders/``, a line in the registry there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from simkvm import units
from simkvm.scenario.fields import Duration, Model, Rate, Size, Span
from simkvm.units import MIB

MS = units.NS_PER_MS


class ContenderModel(Model):
    """What every contender has.

    ``resizes``: it makes the guest's leaves differ in size, so that each page needs a place of its
    own. ``logs``: writes of the guest are logged. ``pages_only``: it needs a guest that is mapped
    by pages. ``dates_touches``: it asks when pages were touched last.
    """

    resizes: ClassVar[bool] = False
    logs: ClassVar[bool] = False
    pages_only: ClassVar[bool] = False
    dates_touches: ClassVar[bool] = False

    guest: str = Field(
        description="The guest that it works on. The name of a group of guests (count) means all: "
        "one thread that serves them in turn, its rate shared equally; NAME07 means that one."
    )
    start: Duration = Field(default=0, description="Simulated time at which it starts.")

    def sizes(self) -> dict[str, int]:
        """Its keys that have to be multiples of the guest's page size and fit into its memory."""
        return {}

    def complaints(self) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) for what two of its own keys tell together."""
        yield from ()

    def share(self, number: int, guests: int) -> Self:
        """What guest ``number`` of ``guests`` gets of a thread that serves them in turn.

        A ``rate`` is that of the thread, so each guest's calls are rarer and begin one call later
        than its neighbour's; everything else is the same for each.
        """
        rate = getattr(self, "rate", None)
        if rate is None:
            return self
        later_ns = int(number * units.NS_PER_S / rate)
        return self.model_copy(update={"rate": rate / guests, "start": self.start + later_ns})


class MadviseDontneed(ContenderModel):
    """Calls of madvise(MADV_DONTNEED) on the guest's memory, as a VMM makes them."""

    kind: Literal["madvise_dontneed"] = "madvise_dontneed"
    range: Size = Field(description="Length of the range that one call gives up.")
    rate: Rate = Field(description="Calls a second.")
    align: Size | None = Field(default=None, description="Alignment of the ranges; default: range.")
    order: Literal["random", "sequential"] = Field(
        default="random", description="How the ranges follow one another in the guest's memory."
    )
    arrivals: Literal["periodic", "poisson"] = Field(
        default="periodic", description="Equal or exponential times between calls."
    )
    stop: Duration | None = Field(
        default=None, description="Simulated time at which it stops; null: the end of the run."
    )

    def sizes(self) -> dict[str, int]:
        """Range and alignment."""
        return {"range": self.range} | ({} if self.align is None else {"align": self.align})

    def complaints(self) -> Iterator[tuple[str, str]]:
        """A thread that stops before it starts."""
        if self.stop is not None and self.stop <= self.start:
            yield "stop", f"{units.exact_duration(self.stop)} is not after start"


class FreePageReporting(ContenderModel):
    """Free page reporting: blocks the guest no longer uses go back to the host.

    mm/page_reporting.c, v6.12: 2 s between passes, pageblock-sized blocks, 32 a request; the VMM
    answers each with one MADV_DONTNEED.
    """

    kind: Literal["free_page_reporting"] = "free_page_reporting"
    dates_touches: ClassVar[bool] = True
    block: Size = Field(
        default=2 * MIB, description="Size of a reported block (pageblock, page_reporting_order)."
    )
    delay: Span = Field(
        default=2 * units.NS_PER_S,
        description="Time between two passes (PAGE_REPORTING_DELAY, mm/page_reporting.c).",
    )
    batch: int = Field(default=32, ge=1, description="Blocks a request (PAGE_REPORTING_CAPACITY).")
    idle: Duration = Field(
        default=units.NS_PER_S,
        description="Blocks that the guest has not touched for this long count as free.",
    )

    def sizes(self) -> dict[str, int]:
        """The block."""
        return {"block": self.block}

    def complaints(self) -> Iterator[tuple[str, str]]:
        """A block that no buddy allocator has."""
        if self.block & (self.block - 1):
            yield "block", f"{units.exact_size(self.block)} is not a power of two"


class Balloon(ContenderModel):
    """A virtio balloon that inflates: the guest gives pages, the VMM drops them."""

    kind: Literal["balloon"] = "balloon"
    target: Size = Field(description="Memory to take from the guest.")
    rate: Rate = Field(description="Pages a second.")
    batch: int = Field(
        default=256, ge=1, description="Pages a request (VIRTIO_BALLOON_ARRAY_PFNS_MAX)."
    )
    merge: bool = Field(
        default=False, description="Whether the VMM joins neighbouring pages into one call."
    )

    def sizes(self) -> dict[str, int]:
        """The target."""
        return {"target": self.target}


class DirtyLog(ContenderModel):
    """Live migration's way of finding what was written: rounds of dirty logging.

    Logging is switched on for the whole slot; each round then gets the bitmap and clears it, chunk
    by chunk; at last logging is switched off. virt/kvm/kvm_main.c, v6.12.
    """

    kind: Literal["dirty_log"] = "dirty_log"
    logs: ClassVar[bool] = True
    interval: Duration = Field(
        default=units.NS_PER_S // 10,
        description="Pause before each round (the time that a migration takes to send pages).",
    )
    rounds: int | None = Field(
        default=None, ge=1, description="Rounds, then logging ends; null: to the end of the run."
    )
    clear_chunk: Size | None = Field(
        default=None,
        description="Memory that one KVM_CLEAR_DIRTY_LOG covers (QEMU: 1 GiB by default); null: "
        "the whole slot.",
    )
    manual_protect: bool = Field(
        default=True,
        description="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: getting the bitmap does not clear it.",
    )
    initially_set: bool = Field(
        default=False,
        description="KVM_DIRTY_LOG_INITIALLY_SET: all bits are set when logging begins, and "
        "nothing is write-protected before its bit is cleared.",
    )
    eager_split_chunk: Size | None = Field(
        default=None,
        description="KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE: blocks are split this much at a time "
        "before the guest writes to them; null: off, as by default.",
    )

    def sizes(self) -> dict[str, int]:
        """Both chunks."""
        chunks = {"clear_chunk": self.clear_chunk, "eager_split_chunk": self.eager_split_chunk}
        return {name: size for name, size in chunks.items() if size is not None}

    def complaints(self) -> Iterator[tuple[str, str]]:
        """What needs manual protection."""
        if self.initially_set and not self.manual_protect:
            yield "initially_set", "needs manual_protect"
        if self.clear_chunk is not None and not self.manual_protect:
            yield "clear_chunk", "needs manual_protect: without it getting the log clears it"


class Khugepaged(ContenderModel):
    """khugepaged puts huge pages in the place of small ones (mm/khugepaged.c, v6.12)."""

    kind: Literal["khugepaged"] = "khugepaged"
    resizes: ClassVar[bool] = True
    pages_to_scan: int = Field(
        default=4096,
        ge=1,
        description="PTEs looked at in one go (khugepaged/pages_to_scan).",
    )
    scan_sleep: Duration = Field(
        default=10 * units.NS_PER_S,
        description="Pause between two goes (khugepaged/scan_sleep_millisecs).",
    )
    max_ptes_none: int = Field(
        default=511,
        ge=0,
        description="Pages of a huge one that may be missing (khugepaged/max_ptes_none).",
    )


class ThpSplit(ContenderModel):
    """Huge pages of the host are split, as memory pressure or a partial unmap does.

    mm/huge_memory.c, ``split_huge_page_to_list``, v6.12: one invalidation of the huge page.
    """

    kind: Literal["thp_split"] = "thp_split"
    resizes: ClassVar[bool] = True
    rate: Rate = Field(description="Huge pages split a second.")
    order: Literal["random", "sequential"] = Field(
        default="sequential", description="Which huge page is next."
    )


class Ksm(ContenderModel):
    """The ksmd thread: pages of equal content become one write-protected page."""

    pages_only: ClassVar[bool] = True
    dates_touches: ClassVar[bool] = True

    kind: Literal["ksm"] = "ksm"
    pages_to_scan: int = Field(
        default=100, ge=1, description="Pages looked at before it sleeps (ksm/pages_to_scan)."
    )
    sleep: Span = Field(
        default=20 * MS, description="Sleep between two batches (ksm/sleep_millisecs)."
    )
    smart_scan: bool = Field(
        default=True,
        description="Whether pages that failed to merge are passed over more and more often "
        "(ksm/smart_scan, since v6.7).",
    )
    duplicates: float = Field(
        default=0.5, ge=0, le=1, description="Share of the guest's pages that others are equal to."
    )
    copies: int = Field(default=8, ge=2, description="Pages of each content that is not unique.")


class _PageMover(ContenderModel):
    batch: int
    interval: Span | None


class Migration(_PageMover):
    """Pages of the guest move, as by migrate_pages(2) or a change of cpuset.mems."""

    kind: Literal["migration"] = "migration"
    range: Size | None = Field(
        default=None, description="Memory that moves, from the guest's start; null: all of it."
    )
    batch: int = Field(
        default=512,
        ge=1,
        description="Pages unmapped before the first is copied (NR_MAX_BATCHED_MIGRATION).",
    )
    interval: Span | None = Field(
        default=None, description="From the start of one migration to the next; null: only one."
    )

    def sizes(self) -> dict[str, int]:
        """The range."""
        return {} if self.range is None else {"range": self.range}


class Compaction(_PageMover):
    """Compaction: pages of the guest move out of the way of large folios."""

    kind: Literal["compaction"] = "compaction"
    pages: int = Field(ge=1, description="Pages of the guest that one run moves.")
    batch: int = Field(
        default=32, ge=1, description="Pages isolated at once (COMPACT_CLUSTER_MAX)."
    )
    interval: Span | None = Field(
        default=500 * MS,
        description="From the start of one run to the next (proactive: "
        "HPAGE_FRAG_CHECK_INTERVAL_MSEC); null: only one.",
    )


class NumaBalancing(ContenderModel):
    """Automatic NUMA balancing: windows of memory become inaccessible, to see who uses them."""

    kind: Literal["numa_balancing"] = "numa_balancing"
    scan_size: Size = Field(
        default=256 * MIB, description="Memory a scan changes (numa_balancing/scan_size_mb)."
    )
    period: Span = Field(
        default=units.NS_PER_S,
        description="Time between two scans of a process: 1 s at the least, 60 s at the most "
        "(numa_balancing/scan_period_min_ms, _max_ms); here it does not adapt.",
    )
    delay: Duration = Field(
        default=units.NS_PER_S,
        description="Time from start to the first scan (numa_balancing/scan_delay_ms).",
    )


class Mprotect(ContenderModel):
    """mprotect() of guest memory to read-only and back, as the selftest mmu_stress_test does."""

    kind: Literal["mprotect"] = "mprotect"
    range: Size | None = Field(
        default=None, description="Memory that changes, from the guest's start; null: all of it."
    )
    read_only: Duration = Field(
        default=MS, description="How long it stays read-only; a write gets -EFAULT meanwhile."
    )
    writable: Duration = Field(default=MS, description="How long it stays writable then.")
    cycles: int | None = Field(
        default=None, ge=1, description="Times that this is done; null: until the end."
    )

    def sizes(self) -> dict[str, int]:
        """The range."""
        return {} if self.range is None else {"range": self.range}


class Fork(ContenderModel):
    """The VMM forks a child that does nothing: guest memory is shared until it is written."""

    kind: Literal["fork"] = "fork"
    child: Duration = Field(default=10 * MS, description="How long the child lives.")
    interval: Span | None = Field(
        default=None, description="From one fork to the next; null: only one."
    )

    def complaints(self) -> Iterator[tuple[str, str]]:
        """A child that outlives the next fork."""
        if self.interval is not None and self.child > self.interval:
            yield "child", f"{units.exact_duration(self.child)} is longer than interval"


class OomReaper(ContenderModel):
    """The VMM is killed at `start`, does not get to exit, and the OOM reaper takes its memory."""

    kind: Literal["oom_reaper"] = "oom_reaper"
    delay: Duration = Field(
        default=2 * units.NS_PER_S,
        description="From the kill to the reaper's first try (OOM_REAPER_DELAY, mm/oom_kill.c).",
    )


class Memslot(ContenderModel):
    """A memslot is deleted and created again, or moved (KVM_SET_USER_MEMORY_REGION)."""

    kind: Literal["memslot"] = "memslot"
    slot: int = Field(default=0, ge=0, description="Which of the guest's memslots.")
    operation: Literal["delete", "move"] = Field(
        default="delete",
        description="delete: delete, pause, create; move: both in one call, the guest follows.",
    )
    pause: Duration = Field(default=0, description="Time without the slot (delete only).")
    interval: Span | None = Field(
        default=None, description="From one delete or move to the next; null: only one."
    )


class PreFault(ContenderModel):
    """KVM_PRE_FAULT_MEMORY: memory is mapped before the guest comes to it."""

    kind: Literal["pre_fault"] = "pre_fault"
    range: Size | None = Field(
        default=None, description="Memory to map, from the guest's start; null: all of it."
    )
    call: Size | None = Field(default=None, description="Memory a call; null: all in one.")
    populated: bool = Field(
        default=False,
        description="Whether the VMM populated the range before the run (MAP_POPULATE); else "
        "the call, which only reads, maps the zero page.",
    )

    def sizes(self) -> dict[str, int]:
        """Range and call."""
        given = {"range": self.range, "call": self.call}
        return {name: size for name, size in given.items() if size is not None}


Contender = Annotated[
    MadviseDontneed
    | FreePageReporting
    | Balloon
    | Ksm
    | Migration
    | Compaction
    | NumaBalancing
    | Mprotect
    | Fork
    | OomReaper
    | Memslot
    | PreFault
    | DirtyLog
    | Khugepaged
    | ThpSplit,
    Field(discriminator="kind"),
]
