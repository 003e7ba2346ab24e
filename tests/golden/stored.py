"""Compares what runs gave with what is stored of earlier runs, or stores it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

UPDATE = "python -m pytest tests/golden --update-golden"


def as_they_were(request: pytest.FixtureRequest, path: Path, found: dict[str, Any]) -> None:
    """Each value of each case of ``found`` is that of ``path``, unless an update was asked for."""
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads(path.read_text())
    changed = [
        f"{case}: {key} was {stored.get(case, {}).get(key)}, is {value}"
        for case, values in found.items()
        for key, value in values.items()
        if stored.get(case, {}).get(key) != value
    ]
    assert not changed, "\n".join([*changed, f"if that is meant: {UPDATE}"])
