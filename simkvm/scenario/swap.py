"""The host's swap device: compressed memory, or a drive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from simkvm.scenario.fields import Model, Size, Span
from simkvm.scenario.machine import Machine
from simkvm.units import exact_duration, exact_size

KIND: Final = "Which swap device this is."
MOST_SPREAD: Final = 9.2
"""p99.99 over mean, at most; an exponential time has ln(10,000), see `simkvm.kernel.latency`."""

Way = Literal["read", "write"]
WAYS: Final[tuple[Way, ...]] = ("read", "write")


class Device(Model):
    """What all swap devices have."""

    size: Size | None = Field(
        default=None,
        description="What it holds, in uncompressed pages, a multiple of the guests' page_size "
        "(/proc/swaps; zram: disksize); null: more than anybody needs.",
    )


class Zram(Device):
    """Compressed memory (drivers/block/zram): a CPU's time, and a pool in host memory."""

    kind: Literal["zram"] = Field(default="zram", description=KIND)
    algorithm: Literal["lz4", "zstd"] = Field(
        default="lz4",
        description="What compresses (comp_algorithm in sysfs); costs are the machine's "
        "zram_in_..., zram_out_... of that name.",
    )
    ratio: float = Field(
        default=0.35,
        gt=0,
        le=1,
        description="Share of a page that a page takes when it is compressed, on average; it "
        "depends on content and algorithm, and is the same here for both until set.",
    )
    incompressible: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the pages that do not compress and are stored whole (huge_pages in "
        "mm_stat).",
    )

    @property
    def stored(self) -> float:
        """Share of a page that a page takes in the pool on average, incompressible ones too."""
        return self.incompressible + (1 - self.incompressible) * self.ratio


class Drive(Device):
    """What drives have; null: as the machine's table has it for this kind."""

    named: ClassVar[str]  #: of the machine's parameters

    channels: int | None = Field(
        default=None,
        ge=1,
        le=1 << 16,
        description="Requests that the drive works on at once, each of which takes a latency; "
        "null: the machine's nvme_channels or optane_channels.",
    )
    queue_depth: int = Field(
        default=1023,
        ge=1,
        le=1 << 16,
        description="Requests that one CPU may have in flight, each CPU having a queue of its own "
        "(nvme.io_queue_depth=1024, one entry of which stays free); who has one more sleeps.",
    )
    read_latency: Span | None = Field(
        default=None,
        description="Mean time of a lone 4 KiB read as a program sees it (fio, queue depth 1), the "
        "host's part included; null: the machine's nvme_in_mean_ns or optane_in_mean_ns.",
    )
    read_p9999: Span | None = Field(
        default=None,
        description="What one read in 10,000 exceeds, otherwise alike; from 1 to 9.2 times the "
        "mean; null: the machine's nvme_in_p9999_ns or optane_in_p9999_ns.",
    )
    write_latency: Span | None = Field(
        default=None,
        description="Mean time of a lone 4 KiB write, like read_latency; null: the machine's "
        "nvme_out_mean_ns or optane_out_mean_ns.",
    )
    write_p9999: Span | None = Field(
        default=None,
        description="What one write in 10,000 exceeds, like read_p9999; null: the machine's "
        "nvme_out_p9999_ns or optane_out_p9999_ns.",
    )
    read_bandwidth: Size | None = Field(
        default=None,
        description="Bytes that all reads together move in a second; null: the machine's "
        "nvme_read_bytes_per_s or optane_read_bytes_per_s.",
    )
    write_bandwidth: Size | None = Field(
        default=None,
        description="Bytes that all writes together move in a second, in sequence; null: the "
        "machine's nvme_write_bytes_per_s or optane_write_bytes_per_s.",
    )

    def latency_ns(self, machine: Machine, way: Way) -> tuple[float, float]:
        """Mean and p99.99 of a lone 4 KiB ``way`` on ``machine``."""
        mean, p9999 = {
            "read": (self.read_latency, self.read_p9999),
            "write": (self.write_latency, self.write_p9999),
        }[way]
        name = f"{self.named}_{'in' if way == 'read' else 'out'}"
        return (
            machine[f"{name}_mean_ns"] if mean is None else mean,
            machine[f"{name}_p9999_ns"] if p9999 is None else p9999,
        )

    def bytes_per_s(self, machine: Machine, way: Way) -> int:
        """Bandwidth of ``way`` on ``machine``."""
        said = self.read_bandwidth if way == "read" else self.write_bandwidth
        return round(machine[f"{self.named}_{way}_bytes_per_s"]) if said is None else said

    def parallel(self, machine: Machine) -> int:
        """Requests that it serves at once on ``machine``."""
        return round(machine[f"{self.named}_channels"]) if self.channels is None else self.channels


class Nvme(Drive):
    """A flash drive behind NVMe."""

    named = "nvme"
    kind: Literal["nvme"] = Field(default="nvme", description=KIND)


class Optane(Drive):
    """A drive of the Optane class behind NVMe: a tenth of flash's latency."""

    named = "optane"
    kind: Literal["optane"] = Field(default="optane", description=KIND)


Swap = Annotated[Zram | Nvme | Optane, Field(discriminator="kind")]


def swap_problems(
    swap: Swap, machine: Machine, page_bytes: Mapping[str, int]
) -> Iterator[tuple[str | None, str]]:
    """What makes a device impossible: the key of ``swap``, None for the whole, and why.

    ``page_bytes``: pages of the guests, by name.
    """
    sizes = sorted(set(page_bytes.values()))
    if len(sizes) > 1:
        said = " and ".join(map(exact_size, sizes))
        yield None, f"slots hold pages of one size, guests have pages of {said}"
        return
    for page in sizes:
        if swap.size is not None and swap.size % page:
            message = f"{exact_size(swap.size)} is not a multiple of the guests' page_size"
            yield "size", f"{message}, {exact_size(page)}"
    if not isinstance(swap, Zram):
        for way in WAYS:
            yield from _spread(swap, machine, way)


def _spread(drive: Drive, machine: Machine, way: Way) -> Iterator[tuple[str | None, str]]:
    mean_ns, p9999_ns = drive.latency_ns(machine, way)
    if mean_ns <= p9999_ns <= MOST_SPREAD * mean_ns:
        return
    mean, p9999 = exact_duration(round(mean_ns)), exact_duration(round(p9999_ns))
    message = f"{p9999} is not 1 to {MOST_SPREAD:g} times the mean, {mean}"
    keys = (f"{way}_p9999", f"{way}_latency")
    yield next((key for key in keys if getattr(drive, key) is not None), None), message
