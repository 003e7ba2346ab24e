"""Requests that were answered, and how long their clients waited."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from simkvm.observe.histogram import Histogram
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.world import World

SUB_BITS: Final = 7  #: of the histogram of latencies: a quantile is off by less than 0.8 %
KEEP: Final = 4096  #: answers kept raw before they are folded into the histogram


class Answers:
    """What one vCPU has answered and done; what ended before ``begin_ns`` does not count.

    ``unit`` is what its work is counted in: "requests", "bytes", "loads".
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.begin_ns = 0
        self.done = 0  #: units of work, added up by the vCPU
        self._latency = Histogram(SUB_BITS)
        self._digest = hashlib.blake2b(digest_size=16)
        self._ends = array("q")  # of answers that are not in the histogram yet,
        self._waited = array("q")  # and their latencies

    def add(self, ends_ns: Sequence[int], latencies_ns: Sequence[int]) -> None:
        """Requests whose answers left at ``ends_ns``, in order."""
        self._ends.extend(ends_ns)
        self._waited.extend(latencies_ns)
        if len(self._ends) > KEEP:
            self._fold()

    @property
    def latency(self) -> Histogram:
        """Latencies so far, in ns."""
        self._fold()
        return self._latency

    @property
    def digest(self) -> bytes:
        """Digest over all answers and the work done so far."""
        self._fold()
        whole = self._digest.copy()
        whole.update(self.done.to_bytes(8, "little"))
        return whole.digest()

    def _fold(self) -> None:
        ends, waited = np.array(self._ends), np.array(self._waited)
        self._digest.update(np.column_stack((ends, waited)).astype("<i8").tobytes())
        self._latency.add(waited[ends >= self.begin_ns])
        del self._ends[:], self._waited[:]


def answers_of(kvm: Kvm) -> list[Answers]:
    """The accounts of a guest's vCPUs; empty if it does not work off jobs."""
    return [vcpu.answers for vcpu in kvm.vcpus if vcpu.answers is not None]


def summary(world: World, end_ns: int) -> dict[str, int | float | str]:
    """What was answered and done in a run that ended at ``end_ns``; NaN for what nobody does.

    Rates are sums over the guests, each over its own time: from the end of its warm-up until its
    last vCPU stops.
    """
    latency = Histogram(SUB_BITS)
    rates: dict[str, float] = {}
    for kvm in world.kvms:
        stops = [end_ns if vcpu.finished_ns < 0 else vcpu.finished_ns for vcpu in kvm.vcpus]
        ended_ns = max(stops, default=0)
        for answers in answers_of(kvm):
            latency.merge(answers.latency)
            span_ns = max(1, ended_ns - answers.begin_ns)
            rate = answers.done * NS_PER_S / span_ns
            rates[answers.unit] = rates.get(answers.unit, 0.0) + rate
    asked = latency.number > 0
    return {
        "requests": latency.number,
        "requests_per_s": rates.get("requests", math.nan),
        "latency_mean_ns": latency.mean if asked else math.nan,
        "latency_p50_ns": latency.quantile(0.5) if asked else math.nan,
        "latency_p99_ns": latency.quantile(0.99) if asked else math.nan,
        "latency_p999_ns": latency.quantile(0.999) if asked else math.nan,
        "latency_max_ns": latency.largest if asked else math.nan,
        "bytes_per_s": rates.get("bytes", math.nan),
        "loads_per_s": rates.get("loads", math.nan),
    }


def histogram_rows(kvm: Kvm) -> Iterator[dict[str, Any]]:
    """The latencies of a guest, one row a bucket, as the site "request" of no lock."""
    latency = Histogram(SUB_BITS)
    for answers in answers_of(kvm):
        latency.merge(answers.latency)
    for low, high, count in latency.rows():
        yield {
            "guest": kvm.name,
            "lock": "",
            "site": "request",
            "mode": "",
            "quantity": "latency",
            "low_ns": low,
            "high_ns": high,
            "count": count,
        }
