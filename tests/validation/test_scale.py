"""The scale rule: memory is cut, and time with it, so a smaller part must show the same ratios.

A memcached like that of workloads/pressure/memcached-arm64.yaml, with fewer vCPUs and a drive and
kernels as there. Before and after see the same keys at one seed, so their ratio is taken in pairs.
The part has 12 MiB a vCPU, its half 6. Below that the rule ends: watermarks lie only batches of
a vCPU apart then, and reclaim stalls guests more than it would (docs/limits.md). As a program this
prints throughput after over before for parts of 12 to 192 MiB.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from simkvm.kernel.world import simulate
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.study.statistics import confidence_interval
from simkvm.units import MIB
from simkvm.validate.reclaim import PAGE, host_memory

VCPUS = 8
OVERCOMMIT = 1.5
WATERMARK_SCALE = 300
REPLICATIONS = 4
PART = 96 * MIB
CONFIDENCE = 0.95


def memcached(memory: int, kernel: str, replication: int) -> dict[str, Any]:
    """Summary of one run over ``memory`` bytes of items."""
    chunks = MIB // 2368
    keys = (memory - MIB) // MIB * chunks
    document = {
        "name": "scale",
        "replication": replication,
        "machine": "ampere-altra-80c",
        "kernel": kernel,
        "duration": f"{280 * memory // PART} ms",
        "host": {
            "memory": {
                "size": host_memory(memory, memory, VCPUS, OVERCOMMIT, WATERMARK_SCALE, PAGE),
                "watermark_scale": WATERMARK_SCALE,
            },
            "swap": {"kind": "optane"},
        },
        "guests": {
            "vm": {
                "vcpus": VCPUS,
                "memory": memory,
                "mapped": True,
                "access": {
                    "pattern": "memcached",
                    "clients": 12,
                    "keys": keys,
                    "value_size": "2000 B",
                    "get_ratio": 1.0,
                    "service": "5 us",
                    "network": "20 us",
                    "think": "0 ns",
                    "warmup": f"{160 * memory // PART} ms",
                },
            }
        },
    }
    scenario = Scenario.model_validate(document)
    record = simulate(scenario, load_machine(scenario.machine), load_kernel(scenario.kernel))
    return dict(record.summary)


def ratios(memory: int) -> list[tuple[float, float]]:
    """After over before in requests a second, and looks an eviction took before; by replication."""
    found = []
    for replication in range(REPLICATIONS):
        before = memcached(memory, "linux-6.4", replication)
        after = memcached(memory, "linux-6.4-yuzhao-v2", replication)
        assert before["pgsteal_kswapd"] > 0 < after["pgsteal_kswapd"]
        found.append(
            (
                float(after["requests_per_s"]) / float(before["requests_per_s"]),
                float(before["young_calls_locked_per_scanned_page"])
                / float(before["pages_stolen_ratio"]),
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_halving_the_scale_moves_ratios_by_less_than_their_interval() -> None:
    whole, half = ratios(PART), ratios(PART // 2)
    for number in range(2):
        moved = [a[number] - b[number] for a, b in zip(whole, half, strict=True)]
        found = confidence_interval(moved, CONFIDENCE)
        effect = fmean(pair[number] for pair in whole) - 1
        assert abs(found.mean) <= found.half_width, (whole, half)
        assert abs(found.mean) < effect / 4, (whole, half)
        assert found.half_width < effect / 2, "had it moved by more, this would have noticed"


if __name__ == "__main__":
    for size in (12, 24, 48, 96, 192):
        print(f"{size} MiB: {fmean(pair[0] for pair in ratios(size * MIB)):.2f}", flush=True)
