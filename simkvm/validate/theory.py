"""Every closed form that the model should obey, each from a run of its own."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from simkvm.scenario.errors import InputError, nearest
from simkvm.validate.closed_form import ClosedForm
from simkvm.validate.row import TheoryRow


def rows(only: str = "*") -> Iterator[TheoryRow]:
    """The rows whose id matches the pattern `only`, each as it is computed.

    Raises InputError if there is none.
    """
    forms = closed_forms()
    chosen = [form for form in forms if fnmatchcase(form.id, only)]
    if not chosen:
        hint = nearest(only, (form.id for form in forms))
        raise InputError(f"no row of the theory matches '{only}'", key="--only", hint=hint)
    return (form.row() for form in chosen)


def closed_forms() -> list[ClosedForm]:
    """All of them, in the order in which they are shown; nothing is run yet."""
    from simkvm.validate import (
        theory_deferred,
        theory_lazy,
        theory_locks,
        theory_rcu,
        theory_reclaim,
        theory_requests,
        theory_rounds,
        theory_sched,
        theory_swap,
        theory_tables,
        theory_young,
    )

    subjects = (
        theory_locks,
        theory_rounds,
        theory_rcu,
        theory_reclaim,
        theory_deferred,
        theory_young,
        theory_lazy,
        theory_tables,
        theory_swap,
        theory_sched,
        theory_requests,
    )
    return [form for subject in subjects for form in subject.closed_forms()]
