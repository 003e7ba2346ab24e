"""What a scenario may say: frozen typed models of host, guests, ageing and contenders.

Every field carries its unit and, where it has one, the place in Linux or in the KVM selftests
that it is named after; `simkvm explain KEY` prints them. Sizes are ints in bytes, durations ints
in nanoseconds, rates floats per second.

Only what one field or one mapping can tell is checked here; what needs two mappings, a machine
or another file is checked in `simkvm.scenario.check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from simkvm import units
from simkvm.scenario.fields import (
    GIB,
    KIB,
    MIB,
    AnySize,
    Duration,
    FrozenDict,
    Model,
    Name,
    Rate,
    Size,
    Span,
    refuse,
)
from simkvm.scenario.reference import KernelRef, MachineRef

BLOCK_BYTES: Mapping[int, tuple[int, ...]] = {
    4 * KIB: (2 * MIB, GIB),
    16 * KIB: (32 * MIB,),
    64 * KIB: (512 * MIB,),
}
"""Stage-2 block sizes by granule, smallest first (arm64 kvm_pgtable.h, KVM_PGTABLE_MIN_BLOCK_LEVEL,
v6.12): level 1 is a block only with a 4 KiB granule."""


def _granule(value: int) -> int:
    if value not in BLOCK_BYTES:
        allowed = [units.exact_size(size) for size in BLOCK_BYTES]
        raise refuse(f"{units.exact_size(value)} is not a granule: {', '.join(allowed)}")
    return value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


# --- host ------------------------------------------------------------------------------------


class Rcu(Model):
    """RCU's callback limits, as `rcutree` takes them on the kernel command line."""

    blimit: int = Field(
        default=10, ge=1, description="Callbacks invoked in one batch (rcutree.blimit, rcu/tree.c)."
    )
    qhimark: int = Field(
        default=10000,
        ge=1,
        description="Queued callbacks of one CPU above which batches grow (rcutree.qhimark).",
    )
    qlowmark: int = Field(
        default=100,
        ge=0,
        description="Queued callbacks of one CPU below which batches shrink back "
        "(rcutree.qlowmark).",
    )


class Host(Model):
    """The host's CPUs and the configuration of its kernel."""

    cpus: int | None = Field(
        default=None, ge=1, description="CPUs in use; default: every core of the machine."
    )
    hz: Literal[100, 250, 300, 1000] = Field(
        default=250, description="Timer ticks a second (CONFIG_HZ); grace periods last whole ticks."
    )
    preemption: Literal["none", "voluntary", "full", "lazy"] = Field(
        default="full",
        description="Preemption model at run time (preempt= on the command line, "
        "sched/preempt in debugfs); decides whether a contended mmu_lock is dropped half-way.",
    )
    nohz_full: Literal["none", "vcpus"] = Field(
        default="none",
        description="CPUs without ticks in guest mode (nohz_full=): none, or those that run vCPUs. "
        "Such a CPU is an extended quiescent state for RCU while in the guest.",
    )
    rcu: Rcu = Field(default=Rcu(), description="RCU's callback limits.")


# --- what guests do --------------------------------------------------------------------------

Touches = Annotated[
    int | None,
    Field(
        ge=1,
        description="Touches that each vCPU makes, then it stops; null: endless, which needs "
        "`duration`.",
    ),
]
Think = Annotated[
    Duration,
    Field(description="Time between two touches of one vCPU, beyond the touch itself."),
]
WriteRatio = Annotated[
    float, Field(ge=0, le=1, description="Share of the touches that write, 0 to 1.")
]
Repeat = Annotated[
    int | None, Field(ge=1, description="Rounds; null: endless, which needs `duration`.")
]


class Populate(Model):
    """Each vCPU walks through its share of the memory, every page once a round.

    The first touch of kvm's access_tracking_perf_test and dirty_log_perf_test, and the passes of
    max_guest_memory_test (mmu_stress_test from v6.14 on).
    """

    pattern: Literal["populate"] = "populate"
    write: bool = Field(default=True, description="Write (true) or read (false).")
    repeat: int = Field(default=1, ge=1, description="Rounds over the vCPU's share of the memory.")
    think: Think = 0


class Uniform(Model):
    """Each vCPU touches pages of the whole guest at random, all equally often."""

    pattern: Literal["uniform"] = "uniform"
    touches: Touches = None
    write_ratio: WriteRatio = 0.5
    think: Think = 0


class Zipf(Model):
    """Each vCPU touches pages of the whole guest at random, the k-th page k**-exponent as often."""

    pattern: Literal["zipf"] = "zipf"
    touches: Touches = None
    exponent: float = Field(
        default=0.99, ge=0, le=10, description="Skew: 0 is uniform, 0.99 is YCSB's."
    )
    write_ratio: WriteRatio = 0.5
    think: Think = 0


class HotCold(Model):
    """Each vCPU touches a hot part of the guest often and the rest seldom."""

    pattern: Literal["hot_cold"] = "hot_cold"
    touches: Touches = None
    hot_ratio: float = Field(default=0.1, gt=0, le=1, description="Hot share of the memory.")
    hot_access_ratio: float = Field(
        default=0.9, ge=0, le=1, description="Share of the touches that go to the hot part."
    )
    write_ratio: WriteRatio = 0.5
    think: Think = 0


class Phases(Model):
    """One pattern after another, each to its end; vCPUs do not wait for one another."""

    pattern: Literal["phases"] = "phases"
    phases: Annotated[tuple[Access, ...], BeforeValidator(_tuple)] = Field(
        min_length=1, description="The patterns, in order."
    )
    repeat: Repeat = 1


class Trace(Model):
    """Touches recorded from a real program.

    Each vCPU replays the whole trace on memory of its own: vCPU v's copy begins v footprints
    behind the start, so the guest needs memory for vcpus footprints.
    """

    pattern: Literal["trace"] = "trace"
    file: str = Field(
        min_length=1, description="The trace, relative to the folder of the scenario file."
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Digest of the trace's content; filled in on loading. If given, the trace has "
        "to match it.",
    )
    repeat: Repeat = 1
    think: Think = 0


Access = Annotated[
    Populate | Uniform | Zipf | HotCold | Phases | Trace, Field(discriminator="pattern")
]
Phases.model_rebuild()


class Teardown(Model):
    """The end of a virtual machine while others go on."""

    order: Literal["process_exit", "close_vm"] = Field(
        description="What comes first: the process exits (exit_mmap calls the notifier's "
        "release), or the VM's file is closed (kvm_destroy_vm unregisters it)."
    )
    at: Duration = Field(description="Simulated time at which the teardown starts.")


def _page_size(data: dict[str, int]) -> int:
    return data.get("page_size", 4 * KIB)


def _folio(data: dict[str, int]) -> int:
    return max(data.get("mapping", 0), _page_size(data))


class Guest(Model):
    """One virtual machine: its vCPUs, its memory, how that is mapped and how it is used."""

    vcpus: int = Field(default=1, ge=1, le=4096, description="Virtual CPUs (selftests: -v).")
    memory: Size | None = Field(
        default=None, description="Memory of the guest; give this or memory_per_vcpu."
    )
    memory_per_vcpu: Size | None = Field(
        default=None, description="Memory for each vCPU (selftests: -b); give this or memory."
    )
    page_size: Annotated[Size, AfterValidator(_granule)] = Field(
        default=4 * KIB,
        description="Host page and stage-2 granule: 4, 16 or 64 KiB (CONFIG_ARM64_4K_PAGES...).",
    )
    ipa_bits: int = Field(
        default=40,
        ge=32,
        le=52,
        description="Guest-physical address bits (machine type of KVM_CREATE_VM; "
        "40 is KVM's default); with the granule it decides the levels of the stage-2 table.",
    )
    ipa_base: AnySize = Field(
        default=GIB,
        description="Guest-physical address at which memory starts; a multiple of the largest "
        "block.",
    )
    mapping: Size = Field(
        default_factory=_page_size,
        description="Size of a stage-2 leaf: page_size, or a block of that granule (4 KiB: 2 MiB, "
        "1 GiB; 16 KiB: 32 MiB; 64 KiB: 512 MiB). Default: page_size.",
    )
    folio: Size = Field(
        default_factory=_folio,
        description="Size of the host folios behind the memory, a power-of-two multiple of "
        "page_size; it is `mapping` if that is a block. Default: mapping.",
    )
    access: Access = Field(description="What each vCPU touches.")
    teardown: Teardown | None = Field(
        default=None, description="End this VM during the run; null: it lives to the end."
    )

    @model_validator(mode="after")
    def _one_memory(self) -> Self:
        if (self.memory is None) == (self.memory_per_vcpu is None):
            raise refuse("needs exactly one of memory and memory_per_vcpu")
        return self

    @property
    def memory_bytes(self) -> int:
        """Memory of the whole guest, in bytes."""
        return self.memory or (self.memory_per_vcpu or 0) * self.vcpus

    @property
    def memory_pages(self) -> int:
        """Memory of the whole guest, in pages of `page_size`."""
        return self.memory_bytes // self.page_size


class Ageing(Model):
    """The thread that ages guests (lru_gen's "+" command, access_tracking_perf_test's loop)."""

    interval: Duration = Field(
        default=0,
        description="Pause between two passes; 0: the next starts at once, as in the selftest.",
    )
    start: Duration = Field(default=0, description="Simulated time of the first pass.")
    passes: int | None = Field(default=None, ge=1, description="Passes to make; null: endless.")


# --- contenders ------------------------------------------------------------------------------

GuestName = Annotated[str, Field(description="The guest that it works on.")]
Start = Annotated[Duration, Field(description="Simulated time at which it starts.")]


class MadviseDontneed(Model):
    """Calls of madvise(MADV_DONTNEED) on the guest's memory, as a VMM makes them."""

    kind: Literal["madvise_dontneed"] = "madvise_dontneed"
    guest: GuestName
    range: Size = Field(description="Length of the range that one call gives up.")
    rate: Rate = Field(description="Calls a second.")
    align: Size | None = Field(default=None, description="Alignment of the ranges; default: range.")
    order: Literal["random", "sequential"] = Field(
        default="random", description="How the ranges follow one another in the guest's memory."
    )
    arrivals: Literal["periodic", "poisson"] = Field(
        default="periodic", description="Equal or exponential times between calls."
    )
    start: Start = 0
    stop: Duration | None = Field(
        default=None, description="Simulated time at which it stops; null: the end of the run."
    )


class FreePageReporting(Model):
    """Free page reporting: blocks the guest no longer uses go back to the host.

    mm/page_reporting.c, v6.12: 2 s between passes, pageblock-sized blocks, 32 a request; the VMM
    answers each with one MADV_DONTNEED.
    """

    kind: Literal["free_page_reporting"] = "free_page_reporting"
    guest: GuestName
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
    start: Start = 0


class Balloon(Model):
    """A virtio balloon that inflates: the guest gives pages, the VMM drops them."""

    kind: Literal["balloon"] = "balloon"
    guest: GuestName
    target: Size = Field(description="Memory to take from the guest.")
    rate: Rate = Field(description="Pages a second.")
    batch: int = Field(
        default=256, ge=1, description="Pages a request (VIRTIO_BALLOON_ARRAY_PFNS_MAX)."
    )
    merge: bool = Field(
        default=False, description="Whether the VMM joins neighbouring pages into one call."
    )
    start: Start = 0


Contender = Annotated[MadviseDontneed | FreePageReporting | Balloon, Field(discriminator="kind")]


class Scenario(Model):
    """One simulation: a machine, a kernel, guests and what contends with them."""

    name: str = Field(min_length=1, description="A short name, for tables and figures.")
    description: str = Field(default="", description="What the scenario is for.")
    seed: int = Field(default=1, ge=0, description="Seed of every random stream.")
    replication: int = Field(
        default=0, ge=0, description="Which independent repetition of the same seed this is."
    )
    machine: MachineRef = Field(
        description="The host's machine: a name (`simkvm machines`), or {base, set} to change "
        "costs."
    )
    kernel: KernelRef = Field(
        description="The host's kernel: a name (`simkvm kernels`), or {base, set} to change "
        "policies."
    )
    host: Host = Field(default=Host(), description="CPUs and kernel configuration.")
    duration: Span | None = Field(
        default=None,
        description="Simulated time to run; null: until every vCPU has finished.",
    )
    guests: Annotated[dict[Name, Guest], AfterValidator(FrozenDict)] = Field(
        min_length=1, description="The virtual machines, by name."
    )
    ageing: Ageing | None = Field(
        default=None, description="The thread that ages guests; null: nobody does."
    )
    contenders: Annotated[dict[Name, Contender], AfterValidator(FrozenDict)] = Field(
        default_factory=lambda: FrozenDict({}),
        description="What else takes mmu_lock, by name; default: nothing.",
    )
    ties: Literal["fifo", "shuffle"] = Field(
        default="fifo",
        description="Order of simultaneous events: as scheduled, or a seeded shuffle.",
    )
    expect: Literal["safe", "unsafe"] = Field(
        default="safe",
        description="Whether the safety oracle should find nothing, or a violation: the run fails "
        "(exit status 1) if it is safe that was expected and a violation was found.",
    )
