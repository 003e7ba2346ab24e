"""Every closed form that the model should obey, each from a run of its own."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from simkvm.validate.closed_form import ClosedForm
from simkvm.validate.row import TheoryRow


def rows(only: str = "*") -> Iterator[TheoryRow]:
    """The rows whose id matches the pattern `only`, each as it is computed."""
    return (form.row() for form in closed_forms() if fnmatchcase(form.id, only))


def closed_forms() -> list[ClosedForm]:
    """All of them, in the order in which they are shown; nothing is run yet."""
    from simkvm.validate import (
        theory_deferred,
        theory_locks,
        theory_rcu,
        theory_rounds,
        theory_tables,
        theory_young,
    )

    subjects = (
        theory_locks,
        theory_rounds,
        theory_rcu,
        theory_deferred,
        theory_young,
        theory_tables,
    )
    return [form for subject in subjects for form in subject.closed_forms()]
