"""``demand_paging_test``: how fast guest memory comes in when it is touched first.

Source: tools/testing/selftests/kvm/{demand_paging_test.c,lib/userfaultfd_util.c}, v6.12. Without
``uffd_mode`` the kernel serves the faults; with it, reader threads do, each on a CPU of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Event

from simkvm.kernel.kvm import Kvm
from simkvm.kernel.task import Task
from simkvm.kernel.userfaultfd import UffdCosts, UffdReader, Userfaultfd, registered
from simkvm.scenario import selftests as scenario
from simkvm.selftests.main_thread import Thread, seconds
from simkvm.selftests.memstress import MemstressTest
from simkvm.selftests.rendezvous import Wait
from simkvm.units import KIB, NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.world import World


class DemandPaging(MemstressTest):
    """The test."""

    name: ClassVar[str] = "demand_paging_test"
    spec: scenario.DemandPaging

    def __init__(self, world: World, spec: scenario.DemandPaging) -> None:
        super().__init__(world, spec)
        self._started = self.flags(self.kvm)
        self.uffds: list[Userfaultfd] = []
        self.readers: list[UffdReader] = []
        if spec.uffd_mode is not None:
            self._register()

    def _register(self) -> None:
        """The file descriptors, their readers, and the vCPUs whose faults they serve."""
        kvm, spec = self.kvm, self.spec
        costs = UffdCosts.of(self.machine, spec.uffd_mode == "MINOR")
        size = spec.backing_bytes  # demand_paging_size
        served, pages = max(1, size // kvm.stage2.leaf_bytes), max(1, size // (4 * KIB))
        self.uffds = [Userfaultfd(kvm, costs, served, pages) for _ in range(spec.uffds)]
        for number, uffd in enumerate(self.uffds):
            for reader in range(spec.readers_per_uffd):
                task = Task(f"uffd{number}/reader{reader}", next(self.spare_cpus))
                self.readers.append(UffdReader(uffd, task, spec.uffd_delay))
        for vcpu in kvm.vcpus:
            uffd = self.uffds[vcpu.index % len(self.uffds)]
            vcpu.fault = registered(vcpu, uffd)

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """Wait until all threads run, touch all memory once, end."""
        yield Wait(self._started)
        yield self.run_vcpu
        yield from self.guest_code(index)
        yield self.ucall

    def main(self) -> Generator[Event, Any, None]:
        """Start, wait for the end, do the sums."""
        spec = self.spec
        self.describe_vm()
        if spec.uffd_mode == "MINOR":
            self._prefault()
        self.create_threads(len(self.readers))
        for reader in self.readers:
            self.env.process(reader.run())
        self.message("Finished creating vCPUs and starting uffd threads")
        begin = self.t_ns
        self.create_threads(spec.vcpus)
        self.t_ns = yield from self._started.all_arrived(self.t_ns)
        self._started.release(self.t_ns)
        self.message("Started all vCPUs")
        yield from self.join(self.kvm)
        took = self.t_ns - begin
        self.message("All vCPU threads joined")
        for uffd in self.uffds:
            uffd.stop(self.t_ns)
        self.phase(
            "Total guest execution time",
            begin,
            f"Total guest execution time:\t{seconds(took)}",
        )
        rate = self.pages * NS_PER_S / took
        self.message(f"Per-vcpu demand paging rate:\t{rate:f} pgs/sec/vcpu")
        self.message(f"Overall demand paging rate:\t{rate * spec.vcpus:f} pgs/sec")

    def _prefault(self) -> None:
        """Write to the memory through its alias, so that the page cache has it."""
        pages = self.spec.memory // (4 * KIB)
        page_ns = self.machine["page_alloc_free_ns"] + self.machine["copy_4k_ns"]
        self.t_ns += round(pages * page_ns)
