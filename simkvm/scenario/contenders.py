"""What else takes ``mmu_lock``: the contenders of a scenario, one model each.

A model's ``sizes`` are checked against the guest that it works on. To add a contender: its model
here and in :data:`Contender`, its thread in ``simkvm/contenders/``, a line in the registry there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from simkvm import units
from simkvm.scenario.fields import MIB, Duration, Model, Rate, Size, Span


class ContenderModel(Model):
    """What every contender has.

    ``resizes``: it makes the guest's leaves differ in size, so that each page needs a place of its
    own. ``logs``: writes of the guest are logged.
    """

    resizes: ClassVar[bool] = False
    logs: ClassVar[bool] = False

    guest: str = Field(description="The guest that it works on.")
    start: Duration = Field(default=0, description="Simulated time at which it starts.")

    def sizes(self) -> dict[str, int]:
        """Its keys that have to be multiples of the guest's page size and fit into its memory."""
        return {}

    def complaints(self) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) for what two of its own keys tell together."""
        yield from ()


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
    block: Size = Field(
        default=2 * MIB, description="Size of a reported block (pageblock, page_reporting_order)."
    )
    delay: Span = Field(
        default=2 * units.DURATION_NS["s"],
        description="Time between two passes (PAGE_REPORTING_DELAY, mm/page_reporting.c).",
    )
    batch: int = Field(default=32, ge=1, description="Blocks a request (PAGE_REPORTING_CAPACITY).")
    idle: Duration = Field(
        default=units.DURATION_NS["s"],
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
        default=units.DURATION_NS["s"] // 10,
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
        default=10 * units.DURATION_NS["s"],
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


Contender = Annotated[
    MadviseDontneed | FreePageReporting | Balloon | DirtyLog | Khugepaged | ThpSplit,
    Field(discriminator="kind"),
]
