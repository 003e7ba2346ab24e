"""Every closed form of ``simkvm validate theory``: the model's interval contains it."""

from __future__ import annotations

from collections import Counter

import pytest

from simkvm.scenario.errors import InputError
from simkvm.validate.closed_form import CONFIDENCE, ClosedForm
from simkvm.validate.theory import closed_forms, rows

FORMS = closed_forms()
COARSE = 0.06
"""Half an interval over theory, at most; most are a few times as narrow."""


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.id)
def test_theory_lies_inside(form: ClosedForm) -> None:
    row = form.row()
    assert row.verdict == "inside", f"{row.expected:.6g} not in {row.low:.6g} to {row.high:.6g}"
    assert form.drawn == (row.low < row.high), "what is not drawn is compared exactly"
    assert row.half_width <= COARSE, "an interval that says something"


def test_ids_are_unique_and_patterns_choose_among_them() -> None:
    assert max(Counter(form.id for form in FORMS).values()) == 1
    assert [row.id for row in rows("lock/m-d-inf*")] == ["lock/m-d-infinity/inside"]
    with pytest.raises(InputError, match="did you mean 'lock/m-d-infinity/inside'"):
        rows("lock/m-d-infinity/insid")


def test_all_rows_together_are_wrong_once_in_thirty_sets_of_seeds() -> None:
    drawn = sum(form.drawn for form in FORMS)
    assert drawn * (1 - CONFIDENCE) <= 1 / 30
