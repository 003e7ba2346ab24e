"""A swap drive: channels that serve in parallel, and a bandwidth that they share.

A request waits for the channel that is free first, first come first served, and keeps it for a
latency that is drawn from the drive's own stream (:mod:`simkvm.kernel.latency`). All data go
through one server more, whose pace is the bandwidth: a lone request does not feel it, together they
get no more. Both are recurrences, as :mod:`simkvm.kernel.tlb`: a request costs no event beyond the
reader's own sleep, and requests come in order of time.

A latency is published as a program sees it, so the host's part of a lone request (submission,
interrupt, wake-up) is taken off, and paid where it arises. Reads do not overtake writes.

Host side: block/blk-core.c, blk-mq.c, mm/page_io.c, v6.12. Reclaim writes under a plug: pages in
consecutive slots are merged into requests of up to :data:`PLUG_BYTES`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace, nsmallest
from typing import TYPE_CHECKING, Any, Final

from simpy import Environment, Event

from simkvm.kernel.latency import Latencies, LatencyLaw
from simkvm.kernel.swap import SwapDevice, Written
from simkvm.kernel.task import Task, reach
from simkvm.scenario.swap import WAYS
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    import numpy as np

    from simkvm.kernel.dram import Dram
    from simkvm.scenario import swap
    from simkvm.scenario.machine import Machine

PLUG_BYTES: Final = 128 << 10
"""A plugged request of that size is sent when the next begins (BLK_PLUG_FLUSH_SIZE)."""

MEASURED_BYTES: Final = 4096  #: of the request whose latency is published


@dataclass(frozen=True)
class BlockCosts:
    """The host's part, in ns on the CPU that asks."""

    slot_ns: int  #: taking a slot and giving it back
    cache_ns: int  #: into the swap cache and out of it
    bio_ns: int  #: each page's part of a request
    request_ns: int
    interrupt_ns: int  #: the end of a request
    wakeup_ns: int
    switch_ns: int  #: going to sleep, while the drive works

    @classmethod
    def of(cls, machine: Machine) -> BlockCosts:
        """Of ``machine``."""
        return cls(
            slot_ns=round(machine["swap_slot_ns"]),
            cache_ns=round(machine["swap_cache_ns"]),
            bio_ns=round(machine["bio_ns"]),
            request_ns=round(machine["block_request_ns"]),
            interrupt_ns=round(machine["block_interrupt_ns"]),
            wakeup_ns=round(machine["wakeup_ns"]),
            switch_ns=round(machine["context_switch_ns"]),
        )

    @property
    def around_ns(self) -> int:
        """Of a lone request to a file opened for direct I/O: what is not the drive's."""
        return self.bio_ns + self.request_ns + self.interrupt_ns + self.wakeup_ns


class Media:
    """The drive itself: when a request that comes at a time is served.

    Reads and writes share the channels and the server of all data, each at its own pace.
    """

    def __init__(self, channels: int) -> None:
        self._free_ns = [0] * channels  # a heap: when each channel is
        self._moved_ns = 0  # when the data of all requests so far are
        self._begins_ns: deque[int] = deque()  # of those that wait
        self.largest_queue = 0

    def serve(self, t_ns: int, latency_ns: int, size: int, bytes_per_s: int) -> int:
        """A request of ``size`` bytes at ``t_ns``, not before any other's; when it is complete."""
        begin_ns = max(t_ns, self._free_ns[0])
        self._queue(t_ns, begin_ns)
        move_ns = round(size * NS_PER_S / bytes_per_s)
        self._moved_ns = max(self._moved_ns, begin_ns) + move_ns
        further_ns = round(max(0, size - MEASURED_BYTES) * NS_PER_S / bytes_per_s)
        end_ns = max(begin_ns + latency_ns + further_ns, self._moved_ns)
        heapreplace(self._free_ns, end_ns)
        return end_ns

    def _queue(self, t_ns: int, begin_ns: int) -> None:
        begins = self._begins_ns
        while begins and begins[0] <= t_ns:
            begins.popleft()
        if begin_ns > t_ns:
            begins.append(begin_ns)
            self.largest_queue = max(self.largest_queue, len(begins))


class Tags:
    """Requests in flight by CPU, at most ``depth`` of each (block/blk-mq-tag.c)."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        # lib/sbitmap.c, sbq_calc_wake_batch(): sleepers are woken by so many tags at once.
        self._batch = min(max(depth // 8, 1), 8)
        self._ends_ns: dict[int, list[int]] = {}  # heaps
        self.sleeps = 0

    def free_ns(self, cpu: int, t_ns: int) -> int:
        """When ``cpu`` may send a request, ``t_ns`` or later."""
        ends = self._ends_ns.setdefault(cpu, [])
        while ends and ends[0] <= t_ns:
            heappop(ends)
        if len(ends) < self._depth:
            return t_ns
        self.sleeps += 1
        return nsmallest(self._batch, ends)[-1]

    def take(self, cpu: int, end_ns: int) -> None:
        """A request of ``cpu`` is in flight until ``end_ns``."""
        heappush(self._ends_ns[cpu], end_ns)


class Drive(SwapDevice):
    """A drive behind the block layer. ``bytes_per_s``: of reads and of writes."""

    synchronous = False

    def __init__(
        self,
        env: Environment,
        capacity: int,
        page_bytes: int,
        dram: Dram,
        costs: BlockCosts,
        media: Media,
        tags: Tags,
        latencies: tuple[Latencies, Latencies],
        bytes_per_s: tuple[int, int],
    ) -> None:
        super().__init__(env, capacity, page_bytes)
        self.media = media
        self.tags = tags
        self._dram = dram
        self._costs = costs
        self._read_latency, self._write_latency = latencies
        self._read_bytes_per_s, self._write_bytes_per_s = bytes_per_s
        self._plug_pages = max(1, PLUG_BYTES // page_bytes)

    @property
    def largest_queue(self) -> int:
        """Requests that waited for a channel at one moment, at most."""
        return self.media.largest_queue

    @classmethod
    def made(
        cls,
        env: Environment,
        spec: swap.Nvme | swap.Optane,
        machine: Machine,
        rng: np.random.Generator,
        dram: Dram,
        capacity: int,
        page_bytes: int,
    ) -> Drive:
        """The device of ``spec`` in ``machine``."""
        costs = BlockCosts.of(machine)
        read, write = (
            Latencies(LatencyLaw.of(*spec.latency_ns(machine, way), costs.around_ns), own)
            for way, own in zip(WAYS, rng.spawn(2), strict=True)
        )
        return cls(
            env,
            capacity,
            page_bytes,
            dram,
            costs,
            Media(spec.parallel(machine)),
            Tags(spec.queue_depth),
            (read, write),
            (spec.bytes_per_s(machine, "read"), spec.bytes_per_s(machine, "write")),
        )

    def read(self, task: Task, t_ns: int) -> Generator[Event, Any, int]:
        """Ask the drive for a page and sleep until it is there."""
        costs, began_ns = self._costs, t_ns
        t_ns += costs.cache_ns + costs.bio_ns + costs.request_ns
        t_ns, end_ns = yield from self._send(
            task, t_ns, self._read_latency, self.page_bytes, self._read_bytes_per_s
        )
        end_ns = self._dram.write(t_ns, end_ns, self.page_bytes)
        asleep_ns = t_ns + costs.switch_ns
        self.sched.sleep(task, asleep_ns)
        woken_ns = max(asleep_ns, end_ns + costs.interrupt_ns) + costs.wakeup_ns
        t_ns = yield from reach(self.env, woken_ns)
        t_ns = yield from self.sched.wake(task, t_ns)
        self._was_read(began_ns, t_ns)
        return t_ns

    def write(self, task: Task, t_ns: int, pages: int) -> Generator[Event, Any, Written]:
        """Send ``pages`` in consecutive slots, a plug's worth at a time, and go on.

        The interrupts at their ends are taken from the CPU that asked, at once.
        """
        costs, began_ns = self._costs, t_ns
        page_ns = costs.slot_ns + costs.cache_ns + costs.bio_ns
        ends_ns: list[int] = []
        while len(ends_ns) < pages:
            together = min(pages - len(ends_ns), self._plug_pages)
            t_ns += together * page_ns + costs.request_ns
            size = together * self.page_bytes
            t_ns, end_ns = yield from self._send(
                task, t_ns, self._write_latency, size, self._write_bytes_per_s
            )
            task.cpu.steal(t_ns, costs.interrupt_ns)
            ends_ns += [end_ns] * together
        self._were_written(began_ns, ends_ns)
        return t_ns, ends_ns

    def _send(
        self, task: Task, t_ns: int, latency: Latencies, size: int, bytes_per_s: int
    ) -> Generator[Event, Any, tuple[int, int]]:
        """A request that is ready at ``t_ns``: when the drive has it, and when it is complete."""
        cpu, costs = task.cpu, self._costs
        t_ns = yield from reach(self.env, t_ns)
        while (free_ns := self.tags.free_ns(cpu.id, t_ns)) > t_ns:
            cpu.sleep(t_ns)
            t_ns = free_ns + costs.interrupt_ns + costs.wakeup_ns
            t_ns = yield from reach(self.env, t_ns)
            cpu.enter_kernel(t_ns)
        end_ns = self.media.serve(t_ns, latency.next(), size, bytes_per_s)
        self.tags.take(cpu.id, end_ns)
        return t_ns, end_ns
