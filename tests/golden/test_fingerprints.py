"""Did a change of the code change what runs do? Each fingerprint covers every event of a run.

After a change that is meant to change results: ``python -m pytest tests/golden --update-golden``,
then look at what the diff says of the summaries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import worlds

GOLDEN = Path(__file__).with_name("fingerprints.json")
UPDATE = "python -m pytest tests/golden --update-golden"
MS = 1_000_000
MIB = 1 << 20
DONTNEED = {"kind": "madvise_dontneed", "guest": "vm0", "range": 2 * MIB, "rate": 2000.0}
ZIPF = {"pattern": "zipf", "think": 200, "write_ratio": 0.7}

CASES: dict[str, dict[str, Any]] = {
    "populate, write lock": {
        "guest": {"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate"}},
        "ageing": {},
    },
    "populate, read lock": {
        "guest": {"vcpus": 4, "memory": 8 * MIB, "access": {"pattern": "populate"}},
        "kernel": "linux-7.1-read-locked",
        "ageing": {},
    },
    "populate, no lock, granule of 16 KiB": {
        "guest": {
            "vcpus": 4,
            "memory": 32 * MIB,
            "page_size": 16384,
            "access": {"pattern": "populate"},
        },
        "kernel": "linux-7.1-lockless",
        "ageing": {},
    },
    "windows and frees by RCU": {
        "guest": {"vcpus": 2, "memory": 16 * MIB, "access": ZIPF},
        "kernel": "linux-6.4-yuzhao-v2",
        "ageing": {"interval": MS},
        "contenders": {"vmm": DONTNEED},
        "duration": 30 * MS,
    },
    "free_removed_table": {
        "guest": {"vcpus": 2, "memory": 16 * MIB, "access": ZIPF},
        "kernel": "linux-6.4-upton",
        "host": {"hz": 1000, "nohz_full": "vcpus"},
        "contenders": {"vmm": DONTNEED},
        "duration": 30 * MS,
    },
    "blocks": {
        "guest": {
            "vcpus": 2,
            "memory": 64 * MIB,
            "mapping": 2 * MIB,
            "access": {"pattern": "uniform", "think": 500},
        },
        "machine": "graviton3-64c",
        "ageing": {"interval": MS},
        "contenders": {"vmm": {**DONTNEED, "rate": 500.0}},
        "duration": 20 * MS,
    },
    "blind, then the process exits": {
        "guest": {
            "vcpus": 2,
            "memory": 4 * MIB,
            "access": ZIPF,
            "teardown": {"order": "process_exit", "at": 3 * MS},
        },
        "kernel": "linux-6.4",
        "ageing": {"interval": MS},
        "duration": 6 * MS,
    },
    "software AF, idle page tracking": {
        "guest": {"vcpus": 2, "memory": 8 * MIB, "access": ZIPF},
        "machine": {"base": "ampere-altra-80c", "set": {"hw_af": False}},
        "ageing": {"method": "page_idle", "interval": MS, "start": 5 * MS},
        "contenders": {"vmm": DONTNEED},
        "duration": 20 * MS,
    },
    "eviction's check with a flush": {
        "guest": {"vcpus": 2, "memory": 4 * MIB, "access": ZIPF},
        "kernel": "linux-6.4",
        "ageing": {"method": "folio_referenced", "start": 4 * MS},
        "duration": 10 * MS,
    },
    "eviction's check that looks around": {
        "guest": {"vcpus": 2, "memory": 4 * MIB, "access": ZIPF},
        "ageing": {"method": "folio_referenced", "start": 4 * MS},
        "duration": 10 * MS,
    },
    "a flush for each call": {
        "guest": {"vcpus": 2, "memory": 4 * MIB, "access": ZIPF},
        "kernel": "linux-6.4-yuzhao-v1-baseline",
        "ageing": {"start": 4 * MS},
        "duration": 10 * MS,
    },
    "balloon and reporting": {
        "guest": {"vcpus": 2, "memory": 16 * MIB, "access": {"pattern": "populate", "repeat": 9}},
        "kernel": "linux-7.1-lockless",
        "ageing": {"interval": MS},
        "contenders": {
            "balloon": {"kind": "balloon", "guest": "vm0", "target": MIB, "rate": 20000.0},
            "reporting": {
                "kind": "free_page_reporting",
                "guest": "vm0",
                "delay": 2 * MS,
                "idle": MS,
            },
        },
    },
}
KEPT = (
    *("sim_ns", "touches", "faults", "fault_retries", "ageing_calls", "young_pages"),
    *("grace_periods", "callbacks", "tables_allocated", "tables_freed", "tlbi_broadcasts"),
    *("unmapped_pages", "mmu_lock_wait_total_ns", "mmu_lock_hold_total_ns", "safety"),
)


def outcome(case: str) -> dict[str, Any]:
    record = worlds.run(**CASES[case])
    return {"fingerprint": record.fingerprint, **{key: record.summary[key] for key in KEPT}}


def test_fingerprints_are_as_they_were(request: pytest.FixtureRequest) -> None:
    found = {case: outcome(case) for case in CASES}
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())
    changed = [
        f"{case}: {key} was {stored.get(case, {}).get(key)}, is {value}"
        for case, values in found.items()
        for key, value in values.items()
        if stored.get(case, {}).get(key) != value
    ]
    assert not changed, "\n".join([*changed, f"if that is meant: {UPDATE}"])
    assert len({values["fingerprint"] for values in found.values()}) == len(CASES)


def test_a_second_run_in_the_process_feels_nothing_of_the_first() -> None:
    case = "windows and frees by RCU"
    assert outcome(case) == outcome(case)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from golden.test_fingerprints import outcome
print(outcome(sys.argv[2])["fingerprint"])
"""


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_with_another_hash_seed_gives_the_same(hash_seed: str) -> None:
    case = "balloon and reporting"
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tests, case],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == outcome(case)["fingerprint"]
