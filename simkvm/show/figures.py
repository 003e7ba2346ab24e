"""Every figure by name: which results it applies to, and how to draw and write it.

A figure takes one result or many, as a run or a study yields them, and returns a matplotlib figure.
Nothing here shows a window. A new figure is one function and one line in `FIGURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from simkvm.scenario.errors import InputError, nearest
from simkvm.show.figure_callbacks import callback_cost, frees_in_callbacks
from simkvm.show.figure_deferred import (
    deferred_memory,
    deferred_panel,
    deferred_peak,
    deferred_vs_rate,
    defers,
)
from simkvm.show.figure_locks import lock_distribution, lock_sites, takes_lock
from simkvm.show.figure_pressure import is_pressed, under_pressure
from simkvm.show.figure_scaling import ageing_scaling, ages
from simkvm.show.points import OneOrMany, ordered_axis

__all__ = [
    "FIGURES",
    "FigureKind",
    "ageing_scaling",
    "callback_cost",
    "deferred_memory",
    "deferred_panel",
    "deferred_peak",
    "deferred_vs_rate",
    "draw",
    "lock_distribution",
    "lock_sites",
    "under_pressure",
    "write",
    "write_all",
]

DPI = 150
FORMATS = ("png", "svg", "pdf")


class FigureKind(NamedTuple):
    """How to draw a figure, whether it says anything about some results, and what it needs."""

    function: Callable[[OneOrMany], Figure]
    applies: Callable[[OneOrMany], bool]
    needs: str


FIGURES: dict[str, FigureKind] = {
    "lock_hold": FigureKind(
        partial(lock_distribution, quantity="hold"),
        takes_lock,
        "a run in which somebody takes mmu_lock",
    ),
    "lock_wait": FigureKind(
        partial(lock_distribution, quantity="wait"),
        takes_lock,
        "a run in which somebody takes mmu_lock",
    ),
    "deferred_memory": FigureKind(
        deferred_memory, defers, "a run in which a table waits for a grace period"
    ),
    "deferred_peak": FigureKind(
        deferred_peak, defers, "a run in which a table waits for a grace period"
    ),
    "deferred_vs_rate": FigureKind(
        deferred_vs_rate,
        lambda results: ordered_axis(results, ".rate") is not None and defers(results),
        "a sweep over the rate of a contender, with tables that wait for grace periods",
    ),
    "ageing_scaling": FigureKind(
        ageing_scaling,
        lambda results: ordered_axis(results, ".vcpus") is not None and ages(results),
        "a sweep over the number of vCPUs of a guest, with ageing",
    ),
    "under_pressure": FigureKind(
        under_pressure,
        lambda results: ordered_axis(results, ".memory.size") is not None and is_pressed(results),
        "a sweep over the host's memory, with pages that were reclaimed",
    ),
    "callback_cost": FigureKind(
        callback_cost,
        lambda results: (
            ordered_axis(results, ".page_size") is not None and frees_in_callbacks(results)
        ),
        "a sweep over page sizes, with tables that callbacks free",
    ),
}
"""All figures, in the order in which they are written."""


def draw(name: str, results: OneOrMany) -> Figure:
    """Draw one figure by name. Raises InputError for an unknown name or results it cannot show."""
    if name not in FIGURES:
        raise InputError(f"unknown figure '{name}'", key="figure", hint=nearest(name, FIGURES))
    kind = FIGURES[name]
    if not kind.applies(results):
        raise InputError(f"{name} needs {kind.needs}", key="figure")
    return kind.function(results)


def write(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure as png (of `dpi` dots an inch), svg or pdf, by the ending of `path`; whole or
    not at all.

    The same figure gives the same bytes: dates and versions are left out of the file. Raises
    InputError for another ending.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise InputError(
            f"a figure can be written as {', '.join(FORMATS)}, not '{path.name}'",
            key="out",
            hint=nearest(kind, FORMATS),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    with mpl.rc_context({"svg.hashsalt": "simkvm"}):
        figure.savefig(aside, format=kind, dpi=dpi, metadata=_anonymous(kind))
    return aside.replace(path)


def write_all(results: OneOrMany, folder: str | Path) -> list[Path]:
    """Draw every figure that applies to `results` and write it to `folder` as NAME.png."""
    return [
        write(kind.function(results), Path(folder) / f"{name}.png")
        for name, kind in FIGURES.items()
        if kind.applies(results)
    ]


def needs() -> list[str]:
    """What results need for any figure, each need once."""
    return list(dict.fromkeys(kind.needs for kind in FIGURES.values()))


def _anonymous(kind: str) -> dict[str, None]:
    fields = {"png": ["Software"], "pdf": ["CreationDate", "Creator", "Producer"]}
    return dict.fromkeys(fields.get(kind, ["Creator", "Date", "Format", "Type"]))
