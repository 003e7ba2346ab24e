"""``max_guest_memory_test``: every vCPU writes to its part of the memory, and again.

Source: tools/testing/selftests/kvm/max_guest_memory_test.c, v6.12. All memslots map the same file,
which is written to beforehand, so no fault allocates. vCPU threads spin at a rendezvous; the main
thread looks every 100 us, and the timer's slack of 50 us adds to each of its naps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from simpy import Event

from simkvm.guest.patterns import CHUNK_TOUCHES, Chunk
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.scenario.selftests import FilledMemory
from simkvm.selftests.main_thread import Killed, MainThread, Thread, seconds
from simkvm.selftests.rendezvous import Wait
from simkvm.units import GIB

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, None]
NAP_NS = 100_000 + 50_000  #: usleep(100), with the default timer slack of a thread


class MaxGuestMemory(MainThread):
    """The test; ``mmu_stress_test`` goes on from it."""

    name: ClassVar[str] = "max_guest_memory_test"
    ending: ClassVar[str] = "process_exit"
    runs: ClassVar[tuple[str, ...]] = ("spawning", "run 1", "reset", "run 2")

    def __init__(self, world: World, spec: FilledMemory) -> None:
        self.spec = spec
        super().__init__(world)
        self.vcpus = len(self.kvm.vcpus)
        page, memory = spec.page_size, spec.slots * spec.slot_size
        self._guest_page = spec.guest_mode.page_size
        self.share = memory // self.vcpus // self._guest_page * self._guest_page
        self._host_page = page
        self._threads = self.flags(self.kvm)
        self.kvm.host.populate(0, self.kvm.leaves, self.kvm.huge_pages)

    def guest_code(self, index: int, write: bool) -> Iterator[Chunk]:
        """One pass over the part of vCPU ``index``, a page at a time."""
        first, pages = index * self.share, self.share // self._guest_page
        for start in range(0, pages, CHUNK_TOUCHES):
            numbers = np.arange(start, min(start + CHUNK_TOUCHES, pages), dtype=np.int64)
            touched = (first + numbers * self._guest_page) // self._host_page
            yield Chunk(touched, np.full(len(touched), write), 0)

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """Run, meet, have registers reset, meet, run again, meet."""
        wait = Wait(self._threads)
        yield wait
        yield from self._write_all(index)
        yield wait
        yield wait
        yield from self._write_all(index)
        yield wait

    def _write_all(self, index: int) -> Thread:
        yield self.run_vcpu
        yield from self.guest_code(index, True)
        yield self.ucall

    def main(self) -> Steps:
        """Four times: wait for all, take the time, let them go."""
        self.create_threads(self.vcpus)
        memory = self.spec.slots * self.spec.slot_size
        self.message(f"Running with {memory // GIB}gb of guest memory and {self.vcpus} vCPUs")
        times: list[int] = []
        names = ("run1", "reset", "run2")
        try:
            for name in self.runs:
                times.append((yield from self.rendezvous(name)))
        except Killed:
            self.took(times, names)  # which it would have printed in the end
            raise
        lengths = self.took(times, names)
        self.message(
            f"run1 = {lengths[0]}, reset = {lengths[1]}, run2 =  {lengths[2]}",
        )
        yield from self.clean_up()

    def took(self, times: list[int], names: tuple[str, ...]) -> list[str]:
        """Record the phases between ``times``, as many as there were; their lengths as printed."""
        spans = list(pairwise(times))
        for name, (begin, end) in zip(names, spans, strict=False):
            self.world.recorder.phase(name, 0, begin, end)
        return [seconds(end - begin) for begin, end in spans]

    def rendezvous(self, name: str) -> Generator[Event, Any, int]:
        """``rendezvous_with_vcpus``: returns the time at which the last one was seen."""
        self.message(f"Waiting for vCPUs to finish {name}...")
        began = self.t_ns
        if not self._threads.complete:
            self.task.cpu.sleep(began)
        seen = yield from self._threads.all_arrived(began)
        if seen > began:
            nap = NAP_NS + self.ioctl_ns + self.kvm.costs.wakeup_ns
            self.t_ns = began + -(-(seen - began) // nap) * nap
        self.message(f"All vCPUs finished {name}, releasing...")
        self._threads.release(self.t_ns)
        return self.t_ns

    def clean_up(self) -> Steps:
        """Delete every other memslot, from the last one down, and see the threads end."""
        for slot in range(self.spec.slots - 1 & ~1, -1, -2):
            memslot = MemslotUpdate(self.kvm, self.task, slot)
            begin = self.t_ns
            yield from self.ioctl(memslot.delete(self.t_ns + self.ioctl_ns))
            self.phase("delete memslot", begin, iteration=slot + 1)
        yield from self.join(self.kvm)
