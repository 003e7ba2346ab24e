"""The sub-tests of ``memslot_perf_test``: guest code and the host's loop of each.

Source: tools/testing/selftests/kvm/memslot_perf_test.c, v6.12. Offsets are in guest pages behind
the extra ones that hold the flags. A host that reads or writes guest memory pays a touch and a
TLB miss a page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from simpy import Environment, Event

from simkvm.guest.patterns import CHUNK_TOUCHES, Chunk
from simkvm.guest.pause import Pause
from simkvm.kernel.cpu import NEVER, Cpu
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.kernel.mmap_lock import LOCK
from simkvm.kernel.task import Task, reach
from simkvm.scenario.memslot_selftest import EXTRA, MOVE_SIZE
from simkvm.selftests.memstress import leaf_range
from simkvm.selftests.rendezvous import Rendezvous, Wait
from simkvm.units import MIB

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu
    from simkvm.selftests.memslot_perf import MemslotPerf

Steps = Generator[Event, Any, None]
GuestCode = Iterator[Chunk | Pause]
CHUNK_BYTES = 2 * MIB  #: ``MEM_TEST_UNMAP_CHUNK_SIZE``


class GuestFlags(Rendezvous):
    """Flags in guest memory: the guest spins on them without an exit."""

    def __init__(self, env: Environment, seen_ns: int) -> None:
        super().__init__(env, 1, seen_ns)

    def idle(self, cpu: Cpu, t_ns: int) -> None:
        """The guest goes on running."""
        cpu.enter_guest(t_ns, NEVER)

    def meet(self, t_ns: int) -> Generator[Event, Any, int]:
        """``host_perform_sync``: the host sets a flag, the guest clears it, the host sees that."""
        yield from self.all_arrived(t_ns)
        t_ns = max(t_ns, *self.arrivals)
        self.release(t_ns)
        return t_ns + 2 * self._seen_ns


class Subtest(ABC):
    """One run of a sub-test on its own ``kvm``."""

    def __init__(self, test: MemslotPerf, kvm: Kvm, name: str) -> None:
        self.test = test
        self.kvm = kvm
        self.name = name
        spec = test.spec
        self.page = spec.guest_mode.page_size
        self._host_page = spec.page_size
        self.pages = spec.memory_of(name) // self.page
        everything = spec.pages_of(name)
        self.memslots = spec.memslots
        self.pages_per_slot, self.extra_pages = divmod(everything, self.memslots)
        self._everything = everything
        kvm.memslots.gone.update(range(self.memslots))  # until they are created
        kvm.user_exit = self._access_device
        self.flags = GuestFlags(kvm.env, kvm.costs.line.transfer_ns)
        self.guest_waits = Wait(self.flags)
        self.exit = False
        self._look_ns = kvm.costs.touch_ns + kvm.costs.tlb_refill_ns

    # -- the guest ----------------------------------------------------------------------------

    @abstractmethod
    def guest_code(self) -> GuestCode:
        """From the start flag to the exit flag."""

    def touches(self, first: int, count: int) -> Iterator[Chunk]:
        """Writes to ``count`` pages from page ``first`` of the test memory on."""
        for start in range(first, first + count, CHUNK_TOUCHES):
            pages = np.arange(start, min(start + CHUNK_TOUCHES, first + count), dtype=np.int64)
            yield self.chunk(EXTRA + pages * self.page)

    def chunk(self, addresses: Any) -> Chunk:
        """Writes to these addresses of guest memory, counted from its start."""
        return Chunk(addresses // self._host_page, np.full(len(addresses), True), 0)

    def _access_device(self, vcpu: Vcpu, t_ns: int) -> int:
        """User space takes an access without a memslot for one to a device, and ignores it."""
        vcpu.pass_over()
        return t_ns

    # -- the host -----------------------------------------------------------------------------

    @abstractmethod
    def loop(self) -> Steps:
        """One iteration of the host."""

    def clear_memory(self) -> int:
        """``memset`` of all memory; returns how long that takes."""
        new = self.kvm.host.populate(0, self.kvm.leaves, self.kvm.huge_pages)
        return new * self.kvm.costs.fault.gup_alloc_ns

    def make_guest_exit(self) -> Steps:
        """Set the exit flag, which the guest looks at while it waits for the other one."""
        self.test.t_ns = yield from self.flags.all_arrived(self.test.t_ns)
        self.exit = True
        self.flags.release(self.test.t_ns)

    def sync(self) -> Steps:
        """Meet the guest."""
        self.test.t_ns = yield from self.flags.meet(self.test.t_ns)

    def check(self, *pages: int) -> None:
        """``test_memslot_map_unmap_check``: look at values, if that was asked for."""
        if self.test.spec.verify:
            self.test.t_ns += len(pages) * self._look_ns

    def look_at_all(self) -> None:
        """Read or write every page of the test memory from the host."""
        self.test.t_ns += self.pages * self._look_ns

    def unmap(self, first: int, count: int) -> Steps:
        """``test_memslot_do_unmap``: MADV_DONTNEED, one call for each memslot that is met."""
        done = 0
        while done < count:
            page = EXTRA // self.page + first + done
            slot = min(page // self.pages_per_slot, self.memslots - 1)
            end = (slot + 1) * self.pages_per_slot
            if slot == self.memslots - 1:
                end = self._everything
            pages = min(end - page, count - done)
            yield from self.test.ioctl(
                madvise_dontneed(
                    self.kvm,
                    self.test.task,
                    self.test.t_ns + self.test.ioctl_ns,
                    page * self.page,
                    pages * self.page,
                )
            )
            done += pages


def madvise_dontneed(
    kvm: Kvm, task: Task, t_ns: int, first_byte: int, size: int
) -> Generator[Event, Any, int]:
    """One call of ``madvise(MADV_DONTNEED)``, in the kernel at ``t_ns``."""
    t_ns = yield from reach(kvm.env, t_ns)
    mmap_lock = kvm.host.mmap_lock
    t_ns = mmap_lock.visit(task.cpu.id, t_ns, LOCK)
    first, last = leaf_range(kvm, first_byte, size)
    return (yield from kvm.notifier.invalidate(task, t_ns, first, last, leaving=mmap_lock))


class Map(Subtest):
    """The guest maps one half while the host unmaps the other."""

    def guest_code(self) -> GuestCode:
        """Half after half, in turn."""
        half = self.pages // 2
        while True:
            for first in (0, half):
                yield from self.touches(first, half)
                yield self.guest_waits
                if self.exit:
                    return

    def loop(self) -> Steps:
        """Behind the guest by one half."""
        half = self.pages // 2
        yield from self.unmap(half, half)
        yield from self.sync()
        self.check(0, half - 1)
        yield from self.unmap(0, half)
        yield from self.sync()
        self.check(half, self.pages - 1)


class Unmap(Subtest):
    """The host unmaps page by page; the guest maps one page of each half."""

    step_bytes: ClassVar[int] = 0

    def guest_code(self) -> GuestCode:
        """The first page of one half, then of the other."""
        while True:
            for first in (0, self.pages // 2):
                yield from self.touches(first, 1)
                yield self.guest_waits
                if self.exit:
                    return

    def loop(self) -> Steps:
        """Half after half, in steps of a host page, or of 2 MiB."""
        half = self.pages // 2
        step = max(1, (self.step_bytes or self._host_page) // self.page)
        for first in (0, half):
            yield from self.sync()
            self.check(first)
            for page in range(first, first + half, step):
                yield from self.unmap(page, step)


class UnmapChunked(Unmap):
    """The same in chunks."""

    step_bytes = CHUNK_BYTES


class Move(Subtest):
    """The last memslot moves away and back; the guest writes, half of it there."""

    active: ClassVar[bool] = True

    def __init__(self, test: MemslotPerf, kvm: Kvm, name: str) -> None:
        super().__init__(test, kvm, name)
        start = (self.memslots - 1) * self.pages_per_slot * self.page
        self._memslot = MemslotUpdate(kvm, test.task, self.memslots - 1)
        first = start - MOVE_SIZE // (2 if self.active else 1)
        addresses = np.arange(first, first + MOVE_SIZE, self.page, dtype=np.int64)
        self._area = self.chunk(addresses)

    def guest_code(self) -> GuestCode:
        """Over and over, without meeting the host."""
        while not self.exit:
            yield self._area

    def loop(self) -> Steps:
        """Two calls of KVM_SET_USER_MEMORY_REGION."""
        test = self.test
        yield from test.ioctl(self._memslot.move_away(test.t_ns + test.ioctl_ns))
        yield from test.ioctl(self._memslot.move_back(test.t_ns + test.ioctl_ns))

    def make_guest_exit(self) -> Steps:
        """The guest looks at the flag after each round."""
        self.test.t_ns = yield from reach(self.kvm.env, self.test.t_ns)
        self.exit = True


class MoveInactive(Move):
    """The guest writes just in front of the memslot that moves."""

    active = False


class ReadWrite(Subtest):
    """Guest and host read and write all of the memory in turn."""

    def guest_code(self) -> GuestCode:
        """Write all, meet; read and write all, meet."""
        while True:
            for _ in range(2):
                yield from self.touches(0, self.pages)
                yield self.guest_waits
                if self.exit:
                    return

    def loop(self) -> Steps:
        """Write the values that the guest reads, read those that it writes."""
        self.look_at_all()
        yield from self.sync()
        self.look_at_all()
        yield from self.sync()


SUBTESTS: dict[str, Callable[[MemslotPerf, Kvm, str], Subtest]] = {
    "map": Map,
    "unmap": Unmap,
    "unmap chunked": UnmapChunked,
    "move active area": Move,
    "move inactive area": MoveInactive,
    "RW": ReadWrite,
}
