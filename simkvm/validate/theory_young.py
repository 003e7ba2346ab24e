"""Pages that an ageing pass finds young, with independent touches in between.

A page is young if it was touched since the pass before, so of n touches that each hit page i with
probability p_i a pass finds sum(1 - (1 - p_i) ** n) pages: the working set of n references, Denning
and Schwartz, CACM 15 (1972), 191-198. A translation that is still cached hides a page
from the pass (arm64 does not invalidate when it clears an accessed flag), so this needs a TLB of
one entry; of a larger one, direct-mapped, see :func:`missed`.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.aging import AgeingWalk
from simkvm.kernel.task import Task, reach
from simkvm.kernel.world import World
from simkvm.validate.closed_form import SEED, ClosedForm, Estimate, batched
from simkvm.validate.theory_worlds import MS, world

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGES = 4096
TOUCHES = 4096  #: between two passes: one a page
TOUCH_NS = 1_000
PASSES = 80
WARM_UP = 4
TOUCHED_NS = 100  #: of those, the touch itself

HOT_RATIO, HOT_ACCESS_RATIO, EXPONENT = 0.25, 0.75, 0.9
PATTERNS: dict[str, dict[str, Any]] = {
    "uniform": {"pattern": "uniform"},
    "zipf": {"pattern": "zipf", "exponent": EXPONENT},
    "hot-cold": {
        "pattern": "hot_cold",
        "hot_ratio": HOT_RATIO,
        "hot_access_ratio": HOT_ACCESS_RATIO,
    },
}
SOURCE = "working set of independent references; Denning and Schwartz, CACM 15 (1972), 191-198"


def closed_forms() -> list[ClosedForm]:
    """By access pattern, and with a TLB that hides pages."""
    return [
        *(
            ClosedForm(
                f"young/{name}",
                f"{PAGES} pages, {name} touches, one a page: share found young",
                "1",
                found(probabilities(name), TOUCHES) / PAGES,
                partial(measure, name, 1),
                SOURCE,
            )
            for name in PATTERNS
        ),
        *(
            ClosedForm(
                f"young/tlb-{entries}",
                f"{PAGES} pages, uniform touches, one a page, TLB of {entries}: share found young",
                "1",
                found_uniform(entries, TOUCHES) / PAGES,
                partial(measure, "uniform", entries),
                "Markov chain of one TLB place, simkvm.validate.theory_young.missed",
            )
            for entries in (1280, 2048)
        ),
    ]


# -- closed forms ----------------------------------------------------------------------------------


def probabilities(name: str) -> NDArray[np.float64]:
    """Of each page to be the one that is touched, the most popular first, shape (pages,)."""
    import numpy as np

    if name == "uniform":
        return np.full(PAGES, 1 / PAGES)
    if name == "zipf":
        weights = np.arange(1, PAGES + 1) ** -EXPONENT
        return np.asarray(weights / weights.sum())
    hot = round(HOT_RATIO * PAGES)
    ratios = (HOT_ACCESS_RATIO / hot, (1 - HOT_ACCESS_RATIO) / (PAGES - hot))
    return np.repeat(ratios, (hot, PAGES - hot))


def found(p: NDArray[np.float64], touches: int) -> float:
    """Expected number of pages that ``touches`` hit."""
    return float((1 - (1 - p) ** touches).sum())


def missed(touched: float, others: float, touches: int) -> float:
    """Probability that no touch of a page that is cached at the start misses the TLB.

    Its place in a direct-mapped TLB holds the page touched last of those that share it. A touch
    hits the page with probability ``touched`` = a and one of the others with ``others`` = b. It
    misses if one of the others came before, so not if all touches avoid b, or if the first of
    the others is touch k and none of those behind is the page's:
    (1 - b) ** n + sum over k of (1 - b) ** (k - 1) * b * (1 - a) ** (n - k).
    """
    stays, avoids = 1 - others, 1 - touched
    if stays == avoids:
        return float(stays**touches + touches * others * stays ** (touches - 1))
    geometric = (avoids**touches - stays**touches) / (avoids - stays)
    return float(stays**touches + others * geometric)


def found_uniform(entries: int, touches: int) -> float:
    """Pages whose accessed flag ``touches`` set, uniform over all, in a TLB of ``entries``.

    Page number modulo ``entries`` is its place. Of m pages that share one each is the cached one
    with probability 1 / m when the pass comes.
    """
    total = 0.0
    for place in range(entries):
        sharing = len(range(place, PAGES, entries))
        a, b = 1 / PAGES, (sharing - 1) / PAGES
        uncached = 1 - (1 - a) ** touches
        total += (sharing - 1) * uncached + (1 - missed(a, b, touches))
    return total


# -- the model -------------------------------------------------------------------------------------


def measure(name: str, tlb_entries: int, engine: str = "explicit") -> Estimate:
    """Shares of young pages in passes over a guest that touches a page a microsecond.

    Every page has been touched when the first pass counts: by an explicit guest before it starts
    touching as ``name`` says, for a lazy one, which has no phases, before the run.
    """
    period_ns, from_ns = TOUCHES * TOUCH_NS, 20 * MS
    touch = {"write_ratio": 1.0, "think": TOUCH_NS - TOUCHED_NS, **PATTERNS[name]}
    phases = {"pattern": "phases", "phases": [{"pattern": "populate", "write": True}, touch]}
    lazy = engine == "lazy"
    made = world(
        {
            "memory": PAGES * 4096,
            "access": touch if lazy else phases,
            "mapped": lazy,
            "engine": engine,
        },
        seed=SEED,
        machine={
            "base": "ampere-altra-80c",
            "set": {"tlb_l2_entries": tlb_entries, "page_touch_ns": TOUCHED_NS},
        },
        duration=from_ns + (WARM_UP + PASSES + 1) * period_ns,
    )
    shares: list[float] = []
    made.env.process(_passes(made, from_ns, period_ns, shares))
    made.run()
    return batched(shares[WARM_UP:])


def _passes(
    made: World, from_ns: int, period_ns: int, shares: list[float]
) -> Generator[Event, Any, None]:
    """Ageing passes that begin ``period_ns`` apart; what each finds young goes to ``shares``."""
    task = Task("ageing", made.cpus[-1])
    walk = AgeingWalk(made.kvms[0], task)
    for t_ns in count(from_ns, period_ns):
        yield from reach(made.env, t_ns)
        task.cpu.enter_kernel(t_ns)
        report = yield from walk.run(t_ns)
        task.cpu.sleep(report.end_ns)
        assert report.scanned == PAGES, "all have been touched once"
        shares.append(report.young / report.scanned)
