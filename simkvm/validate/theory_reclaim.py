"""Hit ratios of a guest larger than its host, with independent references.

Che's approximation says what a cache of C pages keeps of touches that each hit page i with
probability p_i: under LRU a page is there if it was touched within a time T, under FIFO (and random
replacement) with odds p_i T, where T is such that C pages are there (Che, Tung and Wang, IEEE JSAC
20 (2002), 1305-1314; Gast and Van Houdt, SIGMETRICS 2015). An LRU that only hears of a page when
somebody looks at its accessed flag should do no worse than FIFO, which never hears, and no better
than LRU, which hears of every touch. The page there is one that the host has: mapped, or in
the swap cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.world import World
from simkvm.validate.closed_form import SEED, ClosedForm, Estimate, batched
from simkvm.validate.theory_worlds import world

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGES = 2048  #: of the guest
HOST_PAGES = 1536
EXPONENT = 0.9
THINK_NS = 2_000
STEP_NS = 2_000_000  #: between two samples
WARM_UP, SAMPLES = 20, 100
#: Accessed flags that a TLB hides, and pages that a walk of others' finds first, are other rows'.
MACHINE = {"base": "ampere-altra-80c", "set": {"tlb_l2_entries": 1}}
SOURCE = "Che, Tung and Wang, IEEE JSAC 20 (2002), 1305-1314; Gast and Van Houdt, SIGMETRICS 2015"
LRUS: dict[str, tuple[str, int, str]] = {
    "lru-gen": ("linux-6.12", 0xF, "multi-gen LRU, v6.12"),
    "lru-gen-two-step": ("linux-7.1", 0xF, "multi-gen LRU, promotion in two steps"),
    "classic": ("linux-6.12", 0, "active and inactive lists"),
}


def closed_forms() -> list[ClosedForm]:
    """A bound for each LRU: the nearest figure between FIFO and LRU to what the model shows."""
    return [
        ClosedForm(
            f"reclaim/{name}",
            f"{PAGES} pages, zipf, host of {HOST_PAGES}: hits, {about}, from FIFO to LRU",
            "1",
            lambda name=name: _nearest(name),  # type: ignore[misc]
            lambda name=name: _hits(name).hits,  # type: ignore[misc]
            SOURCE,
        )
        for name, (_, _, about) in LRUS.items()
    ]


# -- closed forms ----------------------------------------------------------------------------------


def probabilities() -> NDArray[np.float64]:
    """Of each page, the most popular first."""
    import numpy as np

    weights = np.arange(1, PAGES + 1) ** -EXPONENT
    return np.asarray(weights / weights.sum())


def lru_hits(p: NDArray[np.float64], room: float) -> float:
    """Hit ratio of LRU with ``room`` pages."""
    import numpy as np

    return _hits_of(p, room, lambda x: 1 - np.exp(-x))


def fifo_hits(p: NDArray[np.float64], room: float) -> float:
    """Hit ratio of FIFO with ``room`` pages."""
    return _hits_of(p, room, lambda x: x / (1 + x))


def _hits_of(
    p: NDArray[np.float64],
    room: float,
    there: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> float:
    low, high = 0.0, 1.0
    while there(p * high).sum() < room:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if there(p * middle).sum() < room:
            low = middle
        else:
            high = middle
    return float((p * there(p * high)).sum())


def _nearest(name: str) -> float:
    met = _hits(name)
    p = probabilities()
    least, most = fifo_hits(p, met.room), lru_hits(p, met.room)
    return min(max(met.hits.value, least), most)


# -- the model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hits:
    """Hit ratio, and pages of the guest that the host had on average."""

    hits: Estimate
    room: float


@cache
def _hits(name: str) -> Hits:
    import numpy as np

    kernel, lru_gen, _ = LRUS[name]
    made = world(
        {
            "vcpus": 1,
            "memory": PAGES * 4096,
            "access": {
                "pattern": "phases",
                "phases": [
                    {"pattern": "populate", "write": True},
                    {
                        "pattern": "zipf",
                        "exponent": EXPONENT,
                        "think": THINK_NS,
                        "write_ratio": 1.0,
                    },
                ],
            },
        },
        seed=SEED,
        machine=MACHINE,
        kernel=kernel,
        host={
            "memory": {"size": HOST_PAGES * 4096, "min_free": 64 * 4096, "lru_gen": lru_gen},
            "swap": {"kind": "optane"},
        },
        duration=(WARM_UP + SAMPLES) * STEP_NS + 1,
    )
    samples: list[tuple[int, int, int]] = []
    made.env.process(_sample(made, samples))
    made.run()
    assert made.kvms[0].alive, "a guest that was killed misses nothing"
    touches, misses, room = np.array(samples[WARM_UP - 1 :]).T
    ratios = 1 - np.diff(misses) / np.maximum(1, np.diff(touches))
    return Hits(batched(ratios.tolist()), float(room.mean()))


def _sample(made: World, samples: list[tuple[int, int, int]]) -> Generator[Event, Any, None]:
    assert made.pgdat is not None
    vmstat, kvm = made.pgdat.vmstat, made.kvms[0]
    while True:
        yield made.env.timeout(STEP_NS)
        misses = vmstat.pgmajfault + vmstat.first_faults
        pages = made.pgdat.memory(0, 0).page_count
        samples.append((kvm.vcpus[0].touches_by(int(made.env.now)), misses, pages))
