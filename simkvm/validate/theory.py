"""Every closed form that the model should obey, each from a run of its own."""

from __future__ import annotations

from collections.abc import Iterator

from simkvm.validate.row import TheoryRow


def rows() -> Iterator[TheoryRow]:
    """The rows, each as it is computed."""
    yield from ()
