"""Swap devices: slots, and what reading and writing a page takes.

Two kinds (mm/page_io.c, mm/memory.c, mm/swapfile.c, v6.12). A *synchronous* device
(SWP_SYNCHRONOUS_IO: zram, :mod:`simkvm.kernel.zram`) does its work on the caller's CPU;
``do_swap_page()`` passes the swap cache by, and the slot is free when the page is back. An
asynchronous one (:mod:`simkvm.kernel.drive`) lets the reader sleep; the page goes through the
swap cache, and may keep its slot: if it is clean when it is next evicted, nothing is
written.

Pages are read one at a time: readahead is off (vm.page-cluster = 0), as hosts have it whose guests'
memory is swapped, because neighbours in the device are no neighbours in the guest.

``read`` takes what a swap-in costs *beyond* a host fault that allocates a page and does not clear
it; ``write`` takes what ``add_to_swap()`` and ``pageout()`` cost beyond choosing and unmapping
the page. Who writes to an asynchronous device does not wait: a page may be freed when its
write is complete (mm/filemap.c, folio_end_writeback()), not when ``write`` returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Environment, Event

from simkvm.kernel.sched import OwnCpus, Scheduler
from simkvm.kernel.task import Task
from simkvm.observe.histogram import Histogram

if TYPE_CHECKING:
    import numpy as np

    from simkvm.kernel.dram import Dram
    from simkvm.scenario.machine import Machine
    from simkvm.scenario.swap import Swap

ENDLESS = 1 << 62  #: slots of a device without a size
HELD = 4096  #: reads not yet in the histogram

Written = tuple[int, list[int]]


class SwapDevice(ABC):
    """One swap device. ``capacity``: slots, each of a page of ``page_bytes``."""

    synchronous: ClassVar[bool]

    def __init__(self, env: Environment, capacity: int, page_bytes: int) -> None:
        self.env = env
        self.sched: Scheduler = OwnCpus()  #: whom readers leave their CPUs to
        self.capacity = capacity
        self.page_bytes = page_bytes
        self.used = 0
        self.most_used = 0
        self.reads = 0
        self.writes = 0
        self.read_ns = 0  #: from asking until the reader goes on, summed over reads
        self.write_ns = 0  #: from asking until a page is written, summed over pages
        self._latencies = Histogram()
        self._recent: list[int] = []

    @staticmethod
    def of(
        env: Environment,
        spec: Swap,
        machine: Machine,
        rng: np.random.Generator,
        dram: Dram,
        page_bytes: int = 4096,
    ) -> SwapDevice:
        """The device of ``spec`` in ``machine``. ``rng``: its own stream, for times of a drive."""
        from simkvm.kernel.drive import Drive
        from simkvm.kernel.zram import Zram
        from simkvm.scenario import swap

        capacity = ENDLESS if spec.size is None else spec.size // page_bytes
        if isinstance(spec, swap.Zram):
            return Zram.made(env, spec, machine, dram, capacity, page_bytes)
        return Drive.made(env, spec, machine, rng, dram, capacity, page_bytes)

    # -- slots --------------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        """Slots left (``get_nr_swap_pages()``)."""
        return self.capacity - self.used

    @property
    def full(self) -> bool:
        """Whether slots are scarce: more than half are in use (swap.h, ``vm_swap_full()``)."""
        return 2 * self.free_slots < self.capacity

    def allocate(self, pages: int) -> int:
        """Take slots for ``pages``, or as many as are left; returns how many (add_to_swap())."""
        taken = min(pages, self.free_slots)
        self.used += taken
        self.most_used = max(self.most_used, self.used)
        return taken

    def free(self, pages: int) -> None:
        """Give slots back: their pages are in memory again, changed, or gone."""
        if not 0 <= pages <= self.used:
            raise ValueError(f"{pages} slots freed, {self.used} in use")
        self.used -= pages

    def keeps_slot(self, write: bool) -> bool:
        """Whether a page that was just read for a ``write``, or a read, stays in the swap cache.

        If not its slot is to be freed (memory.c, should_try_to_free_swap(); its only user has it).
        """
        return not (self.synchronous or write or self.full)

    @property
    def pool_pages(self) -> int:
        """Pages of host memory that what is stored takes."""
        return self.pool_with(0)

    def pool_with(self, pages: int) -> int:
        """As :attr:`pool_pages`, if so many ``pages`` more were stored."""
        return 0

    # -- reading and writing ------------------------------------------------------------------

    @abstractmethod
    def read(self, task: Task, t_ns: int) -> Generator[Event, Any, int]:
        """Read one page into memory, asked for at ``t_ns``; returns when the reader goes on."""

    @abstractmethod
    def write(self, task: Task, t_ns: int, pages: int) -> Generator[Event, Any, Written]:
        """Write ``pages``, whose slots are allocated, from ``t_ns`` on.

        Returns when the caller goes on, and when each page is written, in order.
        """

    @property
    def largest_queue(self) -> int:
        """Requests that waited for the device at one moment, at most."""
        return 0

    # -- account ------------------------------------------------------------------------------

    @property
    def latencies(self) -> Histogram:
        """Of all reads: ns from asking until the reader goes on."""
        import numpy as np

        self._latencies.add(np.array(self._recent, np.int64))
        self._recent.clear()
        return self._latencies

    def _was_read(self, began_ns: int, end_ns: int) -> None:
        took_ns = end_ns - began_ns
        self.reads += 1
        self.read_ns += took_ns
        self._recent.append(took_ns)
        if len(self._recent) >= HELD:
            _ = self.latencies

    def _were_written(self, began_ns: int, ends_ns: list[int]) -> None:
        self.writes += len(ends_ns)
        self.write_ns += sum(ends_ns) - len(ends_ns) * began_ns
