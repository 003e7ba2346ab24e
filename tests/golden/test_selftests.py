"""Did a change of the code change what the selftests do? Each fingerprint covers phases and locks.

After a change that is meant to change results: ``python -m pytest tests/golden --update-golden``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import selftest_runs

from golden.stored import as_they_were

GOLDEN = Path(__file__).with_name("selftests.json")
CASES: dict[str, dict[str, Any]] = {
    **{test: {"test": test} for test in selftest_runs.SMALL},
    "access_tracking_perf_test": {"test": "access_tracking_perf_test", "vcpus": 1},
    "ageing while populating": {
        "test": "access_tracking_perf_test",
        "lru_gen": True,
        "age_while_populating": True,
    },
}


def outcome(case: str) -> dict[str, Any]:
    _, record = selftest_runs.run(**CASES[case])
    lengths: dict[str, int] = {}
    for phase in selftest_runs.phases(record):
        took = phase["end_ns"] - phase["begin_ns"]
        lengths[phase["name"]] = lengths.get(phase["name"], 0) + took
    return {
        "fingerprint": record.fingerprint,
        **{key: record.summary[key] for key in ("sim_ns", "touches", "faults", "unmapped_pages")},
        **lengths,
    }


def test_selftests_are_as_they_were(request: pytest.FixtureRequest) -> None:
    found = {case: outcome(case) for case in CASES}
    as_they_were(request, GOLDEN, found)


def test_a_second_run_in_the_process_feels_nothing_of_the_first() -> None:
    assert outcome("mmu_stress_test") == outcome("mmu_stress_test")
