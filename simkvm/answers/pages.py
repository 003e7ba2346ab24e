"""Every page by name, and the writing of them: a file is replaced whole, when its text is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from simkvm.answers.ageing_locks import AgeingLocks
from simkvm.answers.deferred_tables import DeferredTables
from simkvm.answers.empty_walk import EmptyWalk
from simkvm.answers.page import Page
from simkvm.answers.runs import Runs
from simkvm.answers.sensitivity_page import Assumptions
from simkvm.scenario.errors import InputError, nearest

PAGES: dict[str, Page] = {
    Path(page.path).stem: page
    for page in (AgeingLocks(), DeferredTables(), EmptyWalk(), Assumptions())
}
"""By the name of their file, without its ending."""


def write(names: Sequence[str], folder: Path, runs: Runs) -> Iterator[Path]:
    """Write these pages (all, if none is named) below `folder`; the path of each as it is there.

    Raises InputError for a name that no page has, before anything is run.
    """
    for name in names:
        if name not in PAGES:
            raise InputError(f"no page '{name}'", key="name", hint=nearest(name, PAGES))
    for name in names or PAGES:  # before anything is run
        (folder / PAGES[name].path).parent.mkdir(parents=True, exist_ok=True)
    for name in names or PAGES:
        page = PAGES[name]
        path = folder / page.path
        text = page.write(replace(runs, commands=[]), folder)
        aside = path.with_name(f".{path.name}")
        aside.write_text(text, encoding="utf-8")
        yield aside.replace(path)
