"""Does the model count what the traced kernel counted, and would it be noticed if it did not?"""

from __future__ import annotations

import pytest

from simkvm.validate import traces
from simkvm.validate.traced import record

RUNS = {run.name: run for run in record.runs()}


@pytest.mark.parametrize("name", RUNS)
def test_counts_are_the_kernels(name: str) -> None:
    for row in traces.counted(RUNS[name]):
        expected = "abstracted" if row.id in traces.ABSTRACTIONS else "equal"
        assert row.verdict == expected, f"{row.id}: {row.measured} traced, {row.simulated} here"


def test_every_count_becomes_a_row_of_its_own() -> None:
    counts = [
        f"{run.name}/{number}/{what}"
        for run in RUNS.values()
        for number, counted in run.counts.items()
        for what in counted
    ]
    assert len(counts) == len(set(counts)) > 300
    assert set(traces.ABSTRACTIONS) <= set(counts)
    for run in RUNS.values():
        assert run.counts, run.name
        assert max(run.counts) < len(run.commands)
