"""Rows that could not fail would prove nothing: a mistake in the model puts them outside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from simkvm.guest.faulting import FaultingLeaves
from simkvm.guest.lazy_flags import LazyFlags
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.geometry import Geometry
from simkvm.kernel.qrwlock import QueuedRwlock, Section
from simkvm.kernel.rcu import Rcu, RcuConfig
from simkvm.kernel.stage2 import AF
from simkvm.kernel.tlb import TlbiPath
from simkvm.kernel.unmap import UnmapWalk
from simkvm.validate import theory_locks, theory_rounds
from simkvm.validate.theory import rows

Patch = pytest.MonkeyPatch


def verdicts(only: str) -> dict[str, str]:
    """What the rows that match say, run anew."""
    found = {row.id: row.verdict for row in rows(only)}
    assert found
    return found


def last_come_first_served(patch: Patch) -> None:
    class Stack(deque[Any]):
        popleft = deque.pop

    made = QueuedRwlock.__init__

    def init(lock: QueuedRwlock, *args: Any, **kwargs: Any) -> None:
        made(lock, *args, **kwargs)
        lock._queue = Stack()

    patch.setattr(QueuedRwlock, "__init__", init)


def holds_are_longer(patch: Patch) -> None:
    """By 3 %."""
    write = QueuedRwlock.write

    def longer(lock: QueuedRwlock, t_ns: int, cpu: int, site: int, section: Section) -> Any:
        def held(entry: int) -> tuple[int, int]:
            hold = round(1.03 * section(entry)[0])
            return hold, entry + hold

        return write(lock, t_ns, cpu, site, held)

    patch.setattr(QueuedRwlock, "write", longer)


def readers_hold_exclusively(patch: Patch) -> None:
    patch.setattr(QueuedRwlock, "read", QueuedRwlock.write)


def waiting_writers_leave_the_door_open(patch: Patch) -> None:
    patch.setattr(QueuedRwlock, "_waiting", property(lambda _: False, lambda *_: None))


def atomics_are_longer(patch: Patch) -> None:
    """By 2 of 65 ns."""
    made = CacheLine.__init__

    def init(line: CacheLine, costs: LineCosts) -> None:
        same, transfer, remote = costs.same_ns, costs.transfer_ns, costs.remote_ns
        made(line, LineCosts(same + 2, transfer + 2, remote + 2, costs.cpus_per_node))

    patch.setattr(CacheLine, "__init__", init)


def each_cpu_invalidates_alone(patch: Patch) -> None:
    patch.setattr(TlbiPath, "flush", lambda path, t_ns: t_ns + path._latency_ns)


def scans_come_a_jiffy_late(patch: Patch) -> None:
    rule = RcuConfig.jiffies_till_fqs.fget  # type: ignore[attr-defined]  # a property
    patch.setattr(RcuConfig, "jiffies_till_fqs", property(lambda config: rule(config) + 1))


def the_running_period_counts(patch: Patch) -> None:
    """A callback is numbered with the running grace period: not a full one."""

    def accelerate(rcu: Rcu, data: Any) -> None:
        number = rcu.completed + 1
        if data.callbacks.waiting and data.callbacks.accelerate(number):
            rcu._gp.request(number, rcu._now())

    patch.setattr(Rcu, "_accelerate", accelerate)


def batches_are_twice_as_large(patch: Patch) -> None:
    made = RcuConfig.__init__
    patch.setattr(RcuConfig, "__init__", lambda c, *a, **k: made(c, *a, **{"divisor": 6, **k}))


def every_touch_sets_the_flag(patch: Patch) -> None:
    """As if no translation was ever cached."""

    def touch(vcpu: Vcpu, leaves: Any) -> None:
        vcpu.kvm.stage2.leaf.entries[leaves] |= AF

    patch.setattr(Vcpu, "_touch", touch)
    patch.setattr(Vcpu, "_touch_few", touch)


def some_touches_are_lost(patch: Patch) -> None:
    """One in thirty-three."""
    touch = Vcpu._touch

    def most(vcpu: Vcpu, leaves: Any) -> None:
        touch(vcpu, leaves[(leaves * 7 + vcpu.touches) % 33 != 0])

    patch.setattr(Vcpu, "_touch", most)


def nothing_is_cached(patch: Patch) -> None:
    """The lazy engine forgets that a cached translation hides a page."""
    patch.setattr("simkvm.guest.lazy_flags._hides", lambda *_: False)


def old_touches_count_again(patch: Patch) -> None:
    """A lazy look counts a twentieth of the touches before the last one again."""
    decide = LazyFlags._decide

    def again(flags: LazyFlags, low: int, high: int, counts: Any) -> None:
        before = flags._looked[:, low:high].copy()
        decide(flags, low, high, counts)
        flags._looked[:, low:high] -= (flags._looked[:, low:high] - before) // 20

    patch.setattr(LazyFlags, "_decide", again)


def faults_are_rarer(patch: Patch) -> None:
    """By 5 %, of a lazy guest."""
    hazard = FaultingLeaves.hazard.fget  # type: ignore[attr-defined]  # a property
    patch.setattr(FaultingLeaves, "hazard", property(lambda leaves: 0.95 * hazard(leaves)))


def eight_roots_at_most(patch: Patch) -> None:
    def start_level(geometry: Geometry) -> int:
        resolved = geometry.ipa_bits - 3 - geometry.page_shift
        return 4 - max(2, -(-resolved // geometry.index_bits))

    patch.setattr(Geometry, "start_level", property(start_level))


def empty_tables_stay(patch: Patch) -> None:
    made = UnmapWalk.__init__
    patch.setattr(UnmapWalk, "__init__", lambda walk, *args: made(walk, *args, keep=True))


@pytest.mark.parametrize(
    ("mistake", "seen_by"),
    [
        (holds_are_longer, ["lock/m-d-1/0.5/[bw]*", "lock/repair/constant/8/*"]),
        (holds_are_longer, ["lock/in-turn/*", "lock/rounds/*"]),
        (readers_hold_exclusively, ["lock/rounds/3-1", "lock/batch/*"]),
        (waiting_writers_leave_the_door_open, ["lock/behind-waiting-writer/*"]),
        (atomics_are_longer, ["line/*"]),
        (each_cpu_invalidates_alone, ["tlbi/m-d-1/*", "tlbi/in-turn/16/*"]),
        (scans_come_a_jiffy_late, ["rcu/alone/300/*", "rcu/continuous/*/period", "rcu/flood/*"]),
        (the_running_period_counts, ["rcu/continuous/250/*wait", "deferred/1000/*"]),
        (batches_are_twice_as_large, ["rcu/batches/*"]),
        (every_touch_sets_the_flag, ["young/tlb-2048"]),
        (some_touches_are_lost, ["young/uniform", "young/hot-cold"]),
        (nothing_is_cached, ["lazy/young/tlb-2048"]),
        (old_touches_count_again, ["lazy/young/*"]),
        (faults_are_rarer, ["lazy/fill/zipf"]),
        (eight_roots_at_most, ["tables/*/widths"]),
        (empty_tables_stay, ["tables/*/unmap*"]),
    ],
)
def test_a_mistake_is_found(
    mistake: Callable[[Patch], None], seen_by: list[str], monkeypatch: Patch
) -> None:
    for subject in (theory_locks, theory_rounds):  # fewer are enough to see that much
        monkeypatch.setattr(subject, "REPLICATIONS", 8)
    mistake(monkeypatch)
    for only in seen_by:
        found = verdicts(only)
        assert set(found.values()) == {"outside"}, found


def test_long_waits_tell_the_order_of_service_and_the_mean_does_not(monkeypatch: Patch) -> None:
    """Why there are both: who serves the last first has the same mean wait."""
    monkeypatch.setattr(theory_locks, "REPLICATIONS", 8)
    last_come_first_served(monkeypatch)
    found = verdicts("lock/m-d-1/0.8/[lw]*")
    assert found == {"lock/m-d-1/0.8/wait": "inside", "lock/m-d-1/0.8/long": "outside"}
