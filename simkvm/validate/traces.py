"""What a traced kernel counted, each experiment rebuilt as a scenario."""

from __future__ import annotations

from collections.abc import Iterator

from simkvm.validate.row import TraceRow


def rows() -> Iterator[TraceRow]:
    """The rows, each as it is computed."""
    yield from ()
