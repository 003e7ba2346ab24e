"""Do bounds on hit ratios hold where they are known, and does a wrong LRU fall out of them?"""

from __future__ import annotations

import numpy as np
import pytest

from simkvm.kernel.folio_list import NOBODY, FolioList, Ids
from simkvm.validate import theory_reclaim
from simkvm.validate.row import TheoryRow


def test_uniform_touches_hit_what_there_is_room_for() -> None:
    p = np.full(100, 0.01)
    assert theory_reclaim.lru_hits(p, 30) == pytest.approx(0.3)
    assert theory_reclaim.fifo_hits(p, 30) == pytest.approx(0.3)


def test_against_caches_that_hear_of_every_touch_or_of_none() -> None:
    """Plain LRU and FIFO caches of 400 of 1000 pages, with zipf touches."""
    p = np.arange(1, 1001) ** -0.9
    p /= p.sum()
    string = np.random.default_rng(3).choice(1000, 60_000, p=p).tolist()
    for expected, moves in ((theory_reclaim.lru_hits, True), (theory_reclaim.fifo_hits, False)):
        cache: dict[int, None] = {}
        hits = 0
        for page in string:
            if page in cache:
                hits += 1
                if not moves:
                    continue
                del cache[page]
            elif len(cache) == 400:
                del cache[next(iter(cache))]
            cache[page] = None
        assert hits / len(string) == pytest.approx(expected(p, 400), abs=0.01)


def row(name: str, monkeypatch: pytest.MonkeyPatch) -> TheoryRow:
    """A row of a shorter run, computed afresh."""
    monkeypatch.setattr(theory_reclaim, "SAMPLES", 40)
    theory_reclaim._hits.cache_clear()
    (form,) = (form for form in theory_reclaim.closed_forms() if form.id == f"reclaim/{name}")
    found = form.row()
    theory_reclaim._hits.cache_clear()
    return found


def test_eviction_of_the_newest_falls_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists that are taken from at the wrong end."""

    def newest(self: FolioList, most: int) -> Ids:
        self._seal()
        found = []
        while most > 0 and self._pieces:
            piece = self._pieces.pop()
            found.append(piece[-most:][::-1])
            if len(piece) > most:
                self._pieces.append(piece[:-most])
            most -= len(found[-1])
        return np.concatenate(found) if found else NOBODY

    monkeypatch.setattr(FolioList, "take", newest)
    found = row("classic", monkeypatch)
    assert found.verdict == "outside"
    assert found.simulated < found.expected


@pytest.mark.parametrize("exponent", [0.8, 1.0])
def test_other_popularity_is_noticed(exponent: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of touches that are spread a little otherwise do not hold the model."""
    p = np.arange(1, theory_reclaim.PAGES + 1) ** -exponent
    monkeypatch.setattr(theory_reclaim, "probabilities", lambda: p / p.sum())
    assert row("lru-gen", monkeypatch).verdict == "outside"
