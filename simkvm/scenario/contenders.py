"""What else takes ``mmu_lock``: the contenders of a scenario, one model each.

A model's ``sizes`` are checked against the guest that it works on. To add a contender: its model
here and in :data:`Contender`, its thread in ``simkvm/contenders/``, a line in the registry there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field

from simkvm import units
from simkvm.scenario.fields import MIB, Duration, Model, Rate, Size, Span


class ContenderModel(Model):
    """What every contender has."""

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
        later_ns = int(number * units.DURATION_NS["s"] / rate)
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


Contender = Annotated[MadviseDontneed | FreePageReporting | Balloon, Field(discriminator="kind")]
