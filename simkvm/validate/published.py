"""Every published figure of the record, its benchmark run again in the model."""

from __future__ import annotations

from collections.abc import Iterator

from simkvm.validate.row import PublishedRow


def rows() -> Iterator[PublishedRow]:
    """The rows, each as it is computed."""
    yield from ()
