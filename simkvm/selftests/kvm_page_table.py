"""``kvm_page_table_test``: mappings are created, updated under dirty logging, and adjusted.

Source: tools/testing/selftests/kvm/kvm_page_table_test.c, v6.12. All vCPUs touch the same memory,
even ones write and odd ones read; threads wait for one another at semaphores. With huge pages the
second stage splits blocks, and the third lets faults put blocks back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.guest.patterns import CHUNK_TOUCHES, Chunk
from simkvm.kernel.kvm import Kvm
from simkvm.scenario import selftests as scenario
from simkvm.selftests.dirty_logging import DirtyLogging
from simkvm.selftests.main_thread import MainThread, Thread, seconds
from simkvm.selftests.rendezvous import Rendezvous, Wait

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, None]
BEFORE, CREATE, UPDATE, ADJUST = STAGES = (
    "KVM_BEFORE_MAPPINGS",
    "KVM_CREATE_MAPPINGS",
    "KVM_UPDATE_MAPPINGS",
    "KVM_ADJUST_MAPPINGS",
)


class KvmPageTable(MainThread):
    """The test."""

    name: ClassVar[str] = "kvm_page_table_test"

    def __init__(self, world: World, spec: scenario.KvmPageTable) -> None:
        self.spec = spec
        super().__init__(world)
        kvm = self.kvm
        self._stage = BEFORE
        self._quit = False
        wakeup_ns = kvm.costs.wakeup_ns
        self._semaphores = Rendezvous(self.env, spec.vcpus, wakeup_ns, sleeping=True)
        self._logging = DirtyLogging(self, kvm, manual_protect=False)
        self._large_pages = max(1, spec.backing_bytes // spec.page_size)

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """Wait for a stage, run it, say so."""
        wait = Wait(self._semaphores)
        yield wait
        while not self._quit:
            yield self.run_vcpu
            yield from self.guest_code(index)
            yield self.ucall
            yield wait

    # -- the guest ----------------------------------------------------------------------------

    def guest_code(self, index: int) -> Iterator[Chunk]:
        """The touches of the present stage."""
        pages = self.kvm.pages
        everything = np.arange(pages, dtype=np.int64)
        if self._stage == CREATE:
            yield from _chunks(everything[:: self._large_pages], index % 2 == 0)
        elif self._stage == UPDATE and self.spec.backing_src == "anonymous":
            yield from _chunks(everything, True)
        elif self._stage == UPDATE:
            yield from self._break_large_pages()
        elif self._stage == ADJUST:
            yield from _chunks(everything, False)

    def _break_large_pages(self) -> Iterator[Chunk]:
        """In each large page a write to the first page, then reads of its second half."""
        large = self._large_pages
        one = np.concatenate([[0], np.arange(large // 2, large // 2 * 2)]).astype(np.int64)
        starts = np.arange(0, self.kvm.pages, large, dtype=np.int64)
        touched = (starts[:, None] + one[None, :]).ravel()
        writes = np.tile(np.arange(len(one)) == 0, len(starts))
        for start in range(0, len(touched), CHUNK_TOUCHES):
            part = slice(start, start + CHUNK_TOUCHES)
            yield Chunk(touched[part], writes[part], 0)

    # -- the main thread ----------------------------------------------------------------------

    def main(self) -> Steps:
        """Stage after stage."""
        spec = self.spec
        self._describe()
        self.create_threads(spec.vcpus)
        self.t_ns = yield from self._semaphores.all_arrived(self.t_ns)
        yield from self._complete(BEFORE)
        self.message("Started all vCPUs successfully")
        yield from self._timed(CREATE)
        yield from self._logging.enable()
        yield from self._timed(UPDATE)
        yield from self._logging.disable()
        yield from self._timed(ADJUST)
        self._quit = True
        self._semaphores.release(self.t_ns)
        yield from self.join(self.kvm)

    def _complete(self, stage: str) -> Steps:
        """``vcpus_complete_new_stage``."""
        self._stage = stage
        self.task.cpu.sleep(self.t_ns)
        self._semaphores.release(self.t_ns)
        self.t_ns = yield from self._semaphores.all_arrived(self.t_ns)

    def _timed(self, stage: str) -> Steps:
        begin = self.t_ns
        yield from self._complete(stage)
        took = seconds(self.t_ns - begin)
        self.phase(stage, begin, f"{stage}: total execution time: {took}\n")

    def _describe(self) -> None:
        spec = self.spec
        base = self.kvm.stage2.first_leaf * self.kvm.stage2.leaf_bytes
        self.message(f"Testing guest mode: {spec.guest_mode}")
        self.message(f"Testing memory backing src type: {spec.backing_src}")
        self.message(f"Testing memory backing src granularity: {spec.backing_bytes:#x}")
        self.message(f"Testing memory size(aligned): {spec.test_memory:#x}")
        self.message(f"Guest physical test memory offset: {base:#x}")
        self.message(f"Number of testing vCPUs: {spec.vcpus}")


def _chunks(pages: NDArray[np.int64], write: bool) -> Iterator[Chunk]:
    for start in range(0, len(pages), CHUNK_TOUCHES):
        part = pages[start : start + CHUNK_TOUCHES]
        yield Chunk(part, np.full(len(part), write), 0)
