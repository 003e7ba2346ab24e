"""Rows that could not fail would prove nothing: a mistake in the model puts them outside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from simkvm.guest.faulting import FaultingLeaves
from simkvm.guest.lazy_flags import LazyFlags
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel import latency
from simkvm.kernel.cacheline import CacheLine, LineCosts
from simkvm.kernel.dram import Dram
from simkvm.kernel.drive import Media
from simkvm.kernel.geometry import Geometry
from simkvm.kernel.qrwlock import QueuedRwlock, Section
from simkvm.kernel.rcu import Rcu, RcuConfig
from simkvm.kernel.run_queue import RunQueue, Thread
from simkvm.kernel.sched import FairScheduler
from simkvm.kernel.stage2 import AF
from simkvm.kernel.tlb import TlbiPath
from simkvm.kernel.unmap import UnmapWalk
from simkvm.validate import theory_locks, theory_rounds, theory_swap
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


def drives_are_slower(patch: Patch) -> None:
    """By 3 %."""
    served = Media.serve

    def longer(media: Media, t_ns: int, latency_ns: int, *args: int) -> int:
        return served(media, t_ns, round(1.03 * latency_ns), *args)

    patch.setattr(Media, "serve", longer)


def a_channel_more(patch: Patch) -> None:
    made = Media.__init__
    patch.setattr(Media, "__init__", lambda media, channels: made(media, channels + 1))


def channels_take_turns(patch: Patch) -> None:
    """A request waits for the next channel, not for the one that is free first."""

    class InTurn(Media):
        turn = 0

        def serve(self, t_ns: int, latency_ns: int, size: int, bytes_per_s: int) -> int:
            self.turn = (self.turn + 1) % len(self.free)
            self.free[self.turn] = max(t_ns, self.free[self.turn]) + latency_ns
            return self.free[self.turn]

        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.free = [0] * channels

    patch.setattr("simkvm.kernel.drive.Media", InTurn)


def data_take_no_time(patch: Patch) -> None:
    served = Media.serve

    def free(media: Media, t_ns: int, latency_ns: int, *_: int) -> int:
        return served(media, t_ns, latency_ns, 1, 1 << 60)

    patch.setattr(Media, "serve", free)


def the_tail_is_that_of_1000(patch: Patch) -> None:
    patch.setattr(latency, "TAIL", 6.908)


def there_is_no_tail(patch: Patch) -> None:
    """Every time is the mean."""
    law = latency.LatencyLaw
    patch.setattr(law, "of", classmethod(lambda made, mean, *_: made(mean, 0)))


def decompressing_is_free_of_memory(patch: Patch) -> None:
    patch.setattr(Dram, "write", lambda dram, t_ns, end_ns, size: end_ns)


def a_thread_runs_to_its_end(patch: Patch) -> None:
    """First come, first served."""
    pick = RunQueue.pick
    patch.setattr(RunQueue, "pick", lambda queue: queue.current or pick(queue))


def the_latest_slice_comes_first(patch: Patch) -> None:
    """Whoever is there already waits for those who come."""

    def pick(queue: RunQueue) -> Thread:
        threads = [*queue.waiting, *([queue.current] if queue.current else [])]
        return max(threads, key=lambda thread: thread.deadline)

    patch.setattr(RunQueue, "pick", pick)


def idle_cpus_pull_nobody(patch: Patch) -> None:
    patch.setattr(FairScheduler, "_longest", lambda _: None)


def turns_are_of_three_slices(patch: Patch) -> None:
    made = RunQueue.__init__
    patch.setattr(RunQueue, "__init__", lambda q, cpu, slice_ns, *a: made(q, cpu, 3 * slice_ns, *a))


@pytest.mark.parametrize(
    ("mistake", "seen_by"),
    [
        (a_thread_runs_to_its_end, ["sched/in-turn/*", "sched/m-g-1-ps", "sched/closed/*"]),
        (the_latest_slice_comes_first, ["sched/m-g-1-ps"]),
        (idle_cpus_pull_nobody, ["sched/work-conserved/3"]),
        (turns_are_of_three_slices, ["sched/in-turn/*"]),
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
        (drives_are_slower, ["swap/alone/*", "swap/m-d-4/*", "swap/saturated/channels/*"]),
        (a_channel_more, ["swap/m-[dg]-*", "swap/repair/*", "swap/saturated/channels/*"]),
        (channels_take_turns, ["swap/repair/*"]),
        (data_take_no_time, ["swap/saturated/bandwidth/*"]),
        (the_tail_is_that_of_1000, ["swap/p9999/*"]),
        (there_is_no_tail, ["swap/p9999/*", "swap/m-g-1/*", "swap/repair/*"]),
        (decompressing_is_free_of_memory, ["swap/saturated/zram"]),
    ],
)
def test_a_mistake_is_found(
    mistake: Callable[[Patch], None], seen_by: list[str], monkeypatch: Patch
) -> None:
    for subject in (theory_locks, theory_rounds, theory_swap):  # fewer are enough to see that much
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
