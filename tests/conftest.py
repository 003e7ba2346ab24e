"""What all tests share: property tests that always try the same examples, and the golden option."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("worlds", "invariants.rules")

# The same examples in every run, and no limit on the time that one takes: tests time nothing.
settings.register_profile(
    "simkvm", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("simkvm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden``: write what runs give now instead of comparing with it."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.json")
