"""The benchmarks behind the published figures of reclaim under overcommit, as scenarios.

**The scale rule.** The machine, the vCPUs, their clients and every cost stay as published; only
memory is cut: that of the guest, of the host, and the watermarks with it. So the rates of
requests, faults, evictions and lock cycles are those of the whole machine, and so is what follows
from their ratios: the share of touches that miss, how often a page is touched between two looks
at it, how many looks it takes to evict one. What shrinks is the time that reclaim needs to come
round. Times of whole passes over the memory are those of the part times the cut; latencies,
rates and shares are as they are. Some things are fixed in pages (a batch of 64, a memory cache of
40 a vCPU), so the part must be large against vCPUs times batch; the distance between the
watermarks is a hundredth of the part instead of a thousandth of the whole, for the same reason.

A service time of which nothing is published was fitted to rows named for that
(``data/hosts.toml``), and to no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from simkvm.scenario.schema import Scenario
from simkvm.units import GIB, KIB, MIB
from simkvm.validate.benchmarks import NS, Benchmark, Figure, Run

if TYPE_CHECKING:
    from simkvm.study.result import Result
    from simkvm.validate.hosts import Host

PAGE: Final = 4 * KIB
WATERMARK_SCALE: Final = 100
CACHE_PAGES: Final = 40  #: of each vCPU (KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE on arm64)


def host_memory(
    touched: int,
    guest: int,
    vcpus: int,
    overcommit: float,
    scale: int = WATERMARK_SCALE,
    step: int = MIB,
) -> int:
    """Bytes of a host of which a guest touches ``overcommit`` times as much as there is room.

    ``guest`` bytes have page tables of the host and of stage 2; each vCPU has its memory cache; and
    the high watermark of a ``watermark_scale`` stays free. In steps of ``step`` bytes, which
    is much of a small part.
    """
    tables = 2 * (guest // PAGE // 512 + 4)
    room = int(touched / overcommit) + (tables + vcpus * CACHE_PAGES) * PAGE
    total = room * 10_000 // (10_000 - 3 * scale)  # min, and twice the distance
    return total // step * step


@dataclass(frozen=True)
class MemcachedUnderPressure:
    """memcached with memtier GETs, keys at random, in a guest that does not quite fit its node.

    120 million items in chunks of 2368 bytes are 265 GiB, 1.03 times the node. But both kernels
    need a struct page of 64 bytes for each page, which the guest has in its own memory: with these
    4.7 GiB and a hash table of 1 GiB it touches 270 GiB. Of the node's 256 GiB the host's own take
    4, and the page tables of host and stage 2 another 1.1. That makes 1.08.
    """

    vcpus: ClassVar[int] = 64
    clients: ClassVar[int] = 92
    keys: ClassVar[int] = 120_000_000
    chunk: ClassVar[int] = 2368  #: of an item with 2000 bytes (simkvm.guest.memcached)
    overcommit: ClassVar[float] = 1.08
    largest: ClassVar[int] = GIB  #: of which more is not needed
    kernels: ClassVar[Mapping[str, str]] = {
        "before": "linux-6.4",
        "lock-free, batched": "linux-6.4-yuzhao-v2",
    }
    columns: ClassVar[Mapping[str, str]] = {
        "latency_avg": "latency_mean_ns",
        "latency_p50": "latency_p50_ns",
        "latency_p99": "latency_p99_ns",
        "latency_p999": "latency_p999_ns",
        "throughput": "requests_per_s",
    }

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """One run an arm; all figures of an arm are of the same run."""
        memory = min(limit_bytes, self.largest)
        keys = (memory - 3 * MIB) // MIB * (MIB // self.chunk)
        touched = -(-keys // (MIB // self.chunk)) * MIB + MIB
        access = {
            "pattern": "memcached",
            "clients": self.clients,
            "keys": keys,
            "value_size": "2000 B",
            "get_ratio": 1.0,
            **host.workload,
            "warmup": "2500 ms",
        }
        guest = {
            "vcpus": self.vcpus,
            "memory": memory,
            "mapped": True,
            "access": access,
        }
        document = {
            "name": figure.id,
            "machine": host.machine(),
            "kernel": self.kernels[figure.arm],
            "duration": "3 s",
            "host": {
                "memory": {
                    "size": host_memory(touched, memory, self.vcpus, self.overcommit),
                    "watermark_scale": WATERMARK_SCALE,
                },
                "swap": {"kind": "optane"},
            },
            "guests": {"vm": guest},
        }
        return Run(Scenario.model_validate(document), keys / self.keys)

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """A latency in milliseconds, or requests a second: as they are."""
        value = float(result.summary[self.columns[figure.metric]])
        return value if figure.unit == "ops_per_s" else value / NS[figure.unit]


@dataclass(frozen=True)
class SparkSort:
    """Twenty sorts of four billion integers in a guest that is larger than its node."""

    vcpus: ClassVar[int] = 64
    guest_bytes: ClassVar[int] = 300 * GIB
    node_bytes: ClassVar[int] = 256 * GIB
    rounds: ClassVar[int] = 20
    largest: ClassVar[int] = 512 * MIB
    kernels: ClassVar[Mapping[str, str]] = MemcachedUnderPressure.kernels

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """One sort; the others are like it. All of the guest's memory is used."""
        memory = min(limit_bytes, self.largest) // (2 * MIB * self.vcpus) * 2 * MIB * self.vcpus
        overcommit = self.guest_bytes / (self.node_bytes * 63 // 64)  # its struct pages
        access = {
            "pattern": "sort",
            "data": memory // 2,
            "block": 64 * KIB,
            "load": True,
            **host.workload,
        }
        document = {
            "name": figure.id,
            "machine": host.machine(),
            "kernel": self.kernels[figure.arm],
            "host": {
                "memory": {
                    "size": host_memory(memory, memory, self.vcpus, overcommit),
                    "watermark_scale": WATERMARK_SCALE,
                },
                "swap": {"kind": "optane"},
            },
            "guests": {"vm": {"vcpus": self.vcpus, "memory": memory, "access": access}},
        }
        return Run(Scenario.model_validate(document), memory / self.guest_bytes)

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds of all sorts of the whole memory."""
        took = float(result.summary["vcpu_wall_ns"])
        return took * self.rounds / scale / NS[figure.unit]


@dataclass(frozen=True)
class MaxGuestMemory:
    """``max_guest_memory_test -c 64 -m 250 -s 250`` on a host with hardly more than that."""

    vcpus: ClassVar[int] = 64
    guest_bytes: ClassVar[int] = 250 * GIB
    largest: ClassVar[int] = 500 * MIB
    kernels: ClassVar[Mapping[str, Any]] = {
        "before (no per-PTE flush)": {
            "base": "linux-6.12-x86",
            "set": {"ageing_call": "blind", "ageing_flush": "none"},
        },
        "lock-free, batched": {
            "base": "linux-6.12-x86",
            "set": {"ageing_call": "bitmap", "ageing_lock": "none"},
        },
    }
    columns: ClassVar[Mapping[str, str]] = {
        "kswapd_share_folio_referenced": "kswapd_share_folio_referenced_ratio",
        "kswapd_share_notifier": "kswapd_share_notifier_ratio",
        "kswapd_share_write_lock": "kswapd_share_write_lock_ratio",
    }

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """Both passes; the figures of an arm are of the same run."""
        memory = min(limit_bytes, self.largest)
        selftest = {
            "test": "max_guest_memory_test",
            "vcpus": self.vcpus,
            "memory": memory,
            "slot_size": memory,
        }
        document = {
            "name": figure.id,
            "machine": host.machine(),
            "kernel": self.kernels[figure.arm],
            "host": {
                "memory": {
                    "size": host_memory(memory, memory, self.vcpus, host.workload["overcommit"]),
                    "watermark_scale": WATERMARK_SCALE,
                },
                "swap": {"kind": "zram"},
            },
            "selftest": selftest,
        }
        return Run(Scenario.model_validate(document), memory / self.guest_bytes)

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds of the second pass over the whole memory, or percent of kswapd's time."""
        if figure.unit == "percent":
            return 100 * float(result.summary[self.columns[figure.metric]])
        phases = result.phases
        run2 = phases[phases["name"] == "run2"]
        return float((run2["end_ns"] - run2["begin_ns"]).sum()) / scale / NS[figure.unit]


RECLAIM: Mapping[str, Benchmark] = {
    "V2-[12]": MaxGuestMemory(),
    "V2-3": SparkSort(),
    "V2-6": MemcachedUnderPressure(),
}
"""Which of these benchmarks shows which figures, by their ids."""
