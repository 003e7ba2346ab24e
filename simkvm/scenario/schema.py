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
from simkvm.scenario.access import Access, Populate, Uniform
from simkvm.scenario.contenders import Contender
from simkvm.scenario.fields import (
    AnySize,
    Duration,
    FrozenDict,
    Model,
    Name,
    Size,
    Span,
    as_tuple,
    refuse,
)
from simkvm.scenario.memory import Memory
from simkvm.scenario.reference import KernelRef, MachineRef
from simkvm.scenario.selftest import Vm
from simkvm.scenario.selftests import AnySelftest
from simkvm.scenario.swap import Swap
from simkvm.units import GIB, KIB, MIB

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


# --- host ------------------------------------------------------------------------------------


class Rcu(Model):
    """RCU as it is built and booted: limits of `rcutree`, offloading, lazy callbacks."""

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
    nocbs: Literal["none", "vcpus", "all"] = Field(
        default="none",
        description="CPUs whose callbacks are left to the rcuog and rcuo kthreads (rcu_nocbs=, "
        "rcu/tree_nocb.h): none, those that run vCPUs, or all. nohz_full CPUs always are.",
    )
    lazy: bool = Field(
        default=False,
        description="Whether call_rcu() on an offloaded CPU may sit for 10 s to save power "
        "(CONFIG_RCU_LAZY with rcutree.enable_rcu_lazy). What the kernel's policy table_callback "
        "says decides whether tables wait with it; needs an offloaded CPU.",
    )
    preemptible: bool | None = Field(
        default=None,
        description="Whether RCU readers can be preempted (CONFIG_PREEMPT_RCU); null: as "
        "`preemption` says. A PREEMPT_DYNAMIC kernel booted with preempt=none has true.",
    )


class Host(Model):
    """The host's CPUs and the configuration of its kernel."""

    cpus: int | None = Field(
        default=None, ge=1, description="CPUs in use; default: every core of the machine."
    )
    scheduler: Literal["none", "fair"] = Field(
        default="none",
        description="Who shares CPUs: with none every vCPU and every other thread has one to "
        "itself; fair: they share them after EEVDF (kernel/sched/fair.c), and there may be fewer.",
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
    rcu: Rcu = Field(default=Rcu(), description="How RCU is built and booted.")
    memory: Memory | None = Field(
        default=None, description="Memory that can run out; null: there is always enough."
    )
    swap: Swap | None = Field(
        default=None,
        description="Where anonymous pages go when memory is short: one swap device; null: none, "
        "and they stay.",
    )

    @property
    def preemptible(self) -> bool:
        """Whether the kernel runs preemptible (sched/core.c, preempt_model_preemptible())."""
        return self.preemption in ("full", "lazy")

    @property
    def preemptible_rcu(self) -> bool:
        """Whether the kernel is built with CONFIG_PREEMPT_RCU."""
        return self.preemptible if self.rcu.preemptible is None else self.rcu.preemptible


class Teardown(Model):
    """The end of a virtual machine while others go on."""

    order: Literal["process_exit", "close_vm", "both"] = Field(
        description="What comes first: the process exits (exit_mmap calls the notifier's "
        "release), or the VM's file is closed (kvm_destroy_vm unregisters it); or both at once, "
        "by two processes (exit_mm of the owner while another drops the last reference)."
    )
    at: Duration = Field(description="Simulated time at which the teardown starts.")
    close_at: Duration | None = Field(
        default=None,
        description="Of order both: simulated time at which the other process drops the last "
        "reference; null: at.",
    )
    split_cache: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="Pages in the VM's cache for eager splitting from the start, for a VM that "
        "ends while its writes are logged (KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE: 2 with chunks of "
        "2 MiB, 513 with 1 GiB). Logging that splits eagerly fills the cache itself.",
    )


def _page_size(data: dict[str, int]) -> int:
    return data.get("page_size", 4 * KIB)


def _folio(data: dict[str, int]) -> int:
    return max(data.get("mapping", 0), _page_size(data))


class Guest(Model):
    """One virtual machine: its vCPUs, its memory, how that is mapped and how it is used."""

    count: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Identical guests of this kind. Above 1 they are called NAME0, NAME1... (with "
        "as many digits as the last needs), each with its own mmu_lock, tables and random streams; "
        "NAME then stands for all of them.",
    )
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
        "40 is KVM's default); with the granule it decides the levels of the stage-2 table. "
        "x86: the guest's MAXPHYADDR; four levels up to 48 bits, else five.",
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
    memslots: int = Field(
        default=1,
        ge=1,
        le=32764,
        description="Equal memslots that the memory is cut into (selftests: -x, -s; at most "
        "KVM_USER_MEM_SLOTS of x86). A look-up goes a level deeper each time they double.",
    )
    memcg: Name | None = Field(
        default=None,
        description="Memory cgroup of the VMM. Guests that name the same one share its lruvec, and "
        "an ageing command walks them all before it opens a generation; null: each has its own.",
    )
    rmap_chain: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Entries that map one page, by as many shadow roots: the length of its "
        "reverse-map chain (x86's shadow MMU only).",
    )
    access: Access = Field(description="What each vCPU touches.")
    backing: Literal["anonymous", "file"] = Field(
        default="anonymous",
        description="What the memory is, on a host whose memory can run out (host.memory): "
        "anonymous, swapped out if there is swap; or a shared mapping of a file on a drive, whose "
        "pages are dropped when they are clean and written back when they are not.",
    )
    engine: Literal["explicit", "lazy"] = Field(
        default="explicit",
        description="How touches are followed: one by one, or (lazy) counted, with accessed flags "
        "and faults drawn when somebody could tell, so that a run costs what its faults and scans "
        "cost however much is touched. lazy is for uniform, zipf and hot_cold, and gives the same "
        "in distribution, not touch for touch.",
    )
    async_pf: bool = Field(
        default=False,
        description="Whether a vCPU goes on while a kworker reads the page that it faulted on "
        "(KVM_ASYNC_PF, virt/kvm/async_pf.c): the guest puts the thread to sleep and runs another, "
        "if it has one (`threads` of memcached). For pages that a drive has to be asked for; zram "
        "is read by the vCPU itself. Merged for x86 only; on arm64 it tells what it would give.",
    )
    mapped: bool = Field(
        default=False,
        description="Whether all of the memory is mapped, in the host and in stage 2, when the "
        "run begins, as if every page had been written to.",
    )
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

    method: Literal["lru_gen", "page_idle", "folio_referenced"] = Field(
        default="lru_gen",
        description='What a pass does: MGLRU\'s walk of the page table (debugfs lru_gen, "+"); '
        "idle page tracking, which reads back and marks every page (mm/page_idle.c); or eviction's "
        "check of every folio (mm/rmap.c, folio_referenced).",
    )
    interval: Duration = Field(
        default=0,
        description="Pause between two passes; 0: the next starts at once, as in the selftest.",
    )
    start: Duration = Field(default=0, description="Simulated time of the first pass.")
    passes: int | None = Field(default=None, ge=1, description="Passes to make; null: endless.")


class Scenario(Model):
    """One simulation: a machine, a kernel, guests and what contends with them."""

    name: str = Field(min_length=1, description="A short name, for tables and figures.")
    description: str = Field(default="", description="What the scenario is for.")
    seed: int = Field(default=1, ge=0, description="Seed of every random stream.")
    replication: int = Field(
        default=0, ge=0, description="Which independent repetition of the same seed this is."
    )
    machine: MachineRef = Field(
        description="The host's machine: a name (`simkvm machines`), the path of a profile "
        "(./mine.toml, `simkvm calibrate`), or {base, set} to change costs of either."
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
        default_factory=lambda: FrozenDict({}),
        description="The virtual machines, by name; none if a selftest makes them.",
    )
    selftest: AnySelftest | None = Field(
        default=None,
        description="A KVM selftest that makes its virtual machine, `vm`, itself and runs to its "
        "end; stands in place of `guests`.",
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
    bugs: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="Known mistakes to put back into the kernel (`simkvm bugs` lists them): what "
        "the safety oracle has to find.",
    )
    expect: Literal["safe", "unsafe", "any"] = Field(
        default="safe",
        description="Whether the safety oracle should find nothing, or a violation, or whether "
        "that is the question: the run fails (exit status 1) if it is safe that was expected and "
        "a violation was found.",
    )

    def made_by_selftest(self, cpus: int, arch: str) -> Mapping[str, Guest]:
        """The virtual machines that a selftest makes on a host of ``cpus``; without one, none."""
        if self.selftest is None:
            return {}
        vms = self.selftest.on(arch).vms(cpus)
        return {name: _made_by_selftest(vm) for name, vm in vms.items()}


def _made_by_selftest(vm: Vm) -> Guest:
    """Its vCPUs do what the test says; the pattern only tells whether they meet."""
    return Guest(
        vcpus=vm.vcpus,
        memory=vm.memory,
        page_size=vm.page_size,
        ipa_bits=vm.ipa_bits,
        ipa_base=vm.base,
        mapping=vm.mapping,
        folio=vm.folio,
        memslots=vm.memslots,
        access=Uniform() if vm.overlap else Populate(),
    )
