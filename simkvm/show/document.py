"""What `--json` prints: one document, plain JSON, no number that JSON does not know."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from simkvm.show.points import OneOrMany, ResultLike, listed, summary_of
from simkvm.study.store import plain


def run_document(result: ResultLike) -> dict[str, Any]:
    """One run: fingerprint, safety, summary, locks (a mapping a row), grace periods, phases of a
    selftest (a mapping a row), scenario, axes.

    `safety.expected` is what the scenario expects, "safe", "unsafe" or "any". Units are in the
    names, as in the tables; a value that does not exist is null.
    """
    summary = summary_of(result)
    document = {
        "fingerprint": result.fingerprint,
        "safety": {
            "verdict": summary.get("safety", "violated" if result.violations else "clean"),
            "violations": result.violations,
            "expected": result.scenario.get("expect", "safe"),
        },
        "summary": summary,
        "locks": result.locks.to_dict("records"),
        "grace_periods": grace_periods(result.grace_periods),
        "phases": phases_of(result),
        "scenario": result.scenario,
        "axes": result.axes,
    }
    return dict(plain(document))


def phases_of(result: ResultLike) -> list[dict[str, Any]]:
    """What a selftest measured and printed; empty for other workloads."""
    phases = getattr(result, "phases", None)
    return [] if phases is None else list(phases.to_dict("records"))


def sweep_document(results: OneOrMany, failed: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A sweep: a document for each finished point, in their order, and why others failed."""
    return {
        "points": [run_document(result) for result in listed(results)],
        "failed": [plain(failure) for failure in failed],
    }


def grace_periods(periods: pd.DataFrame) -> dict[str, Any]:
    """How many grace periods there were and how long they took, in nanoseconds."""
    took = (periods["end_ns"] - periods["start_ns"]).sort_values(ignore_index=True)
    return {
        "count": len(took),
        "mean_ns": took.mean(),
        "p50_ns": _ranked(took, 0.5),
        "p99_ns": _ranked(took, 0.99),
        "max_ns": _ranked(took, 1.0),
    }


def _ranked(rising: pd.Series[int], share: float) -> int | None:
    """The smallest value that is not exceeded by this share of all."""
    if rising.empty:
        return None
    return int(rising.iloc[math.ceil(share * len(rising)) - 1])


def as_json(document: Any) -> str:
    """The text of a document."""
    return json.dumps(document, indent=2, allow_nan=False)
