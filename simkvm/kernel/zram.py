"""zram: swap that is compressed memory, at the price of the CPU that asks.

Source: drivers/block/zram/zram_drv.c, v6.12. The block device is synchronous: a page is compressed,
or brought back, by whoever writes or reads it, on a compression stream of its CPU. So there is no
queue and no limit but CPUs and memory bandwidth. What is stored lies in host memory.

The machine's ``zram_in`` is measured as a whole swap-in; the share of a host fault that
allocates a page without clearing it is taken off, because the fault pays for it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Environment, Event

from simkvm.kernel.swap import SwapDevice, Written
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.dram import Dram
    from simkvm.scenario import swap
    from simkvm.scenario.machine import Machine


class Zram(SwapDevice):
    """``read_ns_each``, ``write_ns_each``: CPU time of a page; ``stored_bytes``: its mean size."""

    synchronous = True

    def __init__(
        self,
        env: Environment,
        capacity: int,
        page_bytes: int,
        dram: Dram,
        read_ns_each: int,
        write_ns_each: int,
        stored_bytes: int,
    ) -> None:
        super().__init__(env, capacity, page_bytes)
        self._dram = dram
        self._read_ns_each = read_ns_each
        self._write_ns_each = write_ns_each
        self._stored_bytes = stored_bytes

    @classmethod
    def made(
        cls,
        env: Environment,
        spec: swap.Zram,
        machine: Machine,
        dram: Dram,
        capacity: int,
        page_bytes: int,
    ) -> Zram:
        """The device of ``spec`` in ``machine``."""
        scale = page_bytes / 4096
        read_ns, write_ns = (machine[f"zram_{way}_{spec.algorithm}_ns"] for way in ("in", "out"))
        fault_ns = machine["s2_fault4k_alloc_total_ns"] - machine["s2_map4k_total_ns"]
        fault_ns -= machine["zero_4k_ns"]
        read_ns = max(read_ns - max(0.0, fault_ns), machine["copy_4k_ns"])
        return cls(
            env,
            capacity,
            page_bytes,
            dram,
            round(read_ns * scale),
            round(write_ns * scale),
            max(1, round(spec.stored * page_bytes)),
        )

    def pool_with(self, pages: int) -> int:
        """Pages of host memory that hold what is stored, without what lies idle between objects."""
        return -(-(self.used + pages) * self._stored_bytes // self.page_bytes)

    def read(self, task: Task, t_ns: int) -> Generator[Event, Any, int]:
        """Bring a page back, on the CPU of ``task``."""
        t_ns = yield from reach(self.env, t_ns)
        end_ns = self._dram.write(t_ns, t_ns + self._read_ns_each, self.page_bytes)
        self._was_read(t_ns, end_ns)
        return end_ns

    def write(self, task: Task, t_ns: int, pages: int) -> Generator[Event, Any, Written]:
        """Compress ``pages`` one after the other, on the CPU of ``task``."""
        t_ns = yield from reach(self.env, t_ns)
        end_ns = self._dram.write(
            t_ns, t_ns + pages * self._write_ns_each, pages * self._stored_bytes
        )
        ends_ns = [t_ns + (end_ns - t_ns) * page // pages for page in range(1, pages + 1)]
        self._were_written(t_ns, ends_ns)
        return end_ns, ends_ns
