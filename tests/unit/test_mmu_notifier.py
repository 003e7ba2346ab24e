"""Taking memory back: the two calls of an invalidation, what lies between, and SRCU.

Source: virt/kvm/kvm_main.c (kvm_mmu_notifier_invalidate_range_start and _end), mm/mmu_notifier.c,
arch/arm64/kvm/mmu.c (stage2_apply_range), kernel/rcu/srcutree.c, v6.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lab import FAST, Lab, account, fill_sparsely
from simpy import Environment

from simkvm.kernel.mmu_notifier import Srcu
from simkvm.kernel.sites import AGE, RANGE_END, RANGE_START
from simkvm.kernel.task import acquired
from simkvm.units import GIB, KIB, MIB

WAKEUP = 3500


def steps_of(lab: Lab, first: int, last: int, t_ns: int = 0, blockable: bool = True) -> Any:
    return lab.env.process(
        lab.kvm.notifier.invalidate(lab.task, t_ns, first, last, blockable=blockable)
    )


def reader(lab: Lab, t_ns: int, hold_ns: int = 10, cpu: int = 5) -> Any:
    """Somebody who wants to read at ``t`` and says when he got in."""

    def steps() -> Iterator[Any]:
        yield lab.env.timeout(t_ns)
        inside: list[int] = []

        def section(entry_ns: int) -> tuple[int, int]:
            inside.append(entry_ns)
            return hold_ns, entry_ns + hold_ns

        yield from acquired(lab.kvm.mmu_lock.read(t_ns, cpu, AGE, section))
        return inside[0]

    return lab.env.process(steps())


def watched(lab: Lab, look: Any, running: Any, every_ns: int = 10) -> list[tuple[int, Any]]:
    """Look at each event, and ``every_ns``, until ``running`` is over: changes, with their time."""
    seen = [(0, look())]

    def tick() -> Iterator[Any]:
        while running.is_alive:
            yield lab.env.timeout(every_ns)

    lab.env.process(tick())
    while running.is_alive:
        lab.env.step()
        if look() != seen[-1][1]:
            seen.append((int(lab.env.now), look()))
    return seen


# -- one range --------------------------------------------------------------------------------


def test_what_a_range_does_and_when() -> None:
    """Start: counted and unmapped, under the lock. Then the host's page. End: sequence moved."""
    lab = Lab(2 * MIB)
    lab.fill()
    notifier, costs = lab.kvm.notifier, lab.kvm.costs
    running = steps_of(lab, 7, 8)
    state = watched(
        lab,
        lambda: (
            notifier.in_progress,
            notifier.sequence,
            int(lab.kvm.stage2.leaf.entries[7] > 0),
            int(lab.kvm.host.state[7] > 0),
        ),
        running,
    )
    start, end = account(lab.kvm.mmu_lock.rows)
    counted_only = (1, 0, 1, 1)  # for a moment: the walk comes after the bookkeeping
    assert [values for _, values in state if values != counted_only] == [
        (0, 0, 1, 1),
        (1, 0, 0, 1),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
    ]
    assert start["site"] == RANGE_START
    assert end["site"] == RANGE_END
    assert start["arrival"] == costs.ageing.call_ns
    after_start = start["entry"] + start["hold"]
    assert end["arrival"] == after_start + costs.unmap.host_page_ns + costs.ageing.call_ns
    assert running.value == end["entry"] + end["hold"]


def test_the_hold_of_a_start_is_the_walk_and_its_invalidation() -> None:
    lab = Lab(2 * MIB)
    lab.fill()
    lab.drop(28 * KIB, 4 * KIB)
    start, end = account(lab.kvm.mmu_lock.rows)
    costs = lab.kvm.costs
    steps = costs.unmap
    walk = 2 * steps.descend_ns + steps.visit_ns + 2 * steps.table_visit_ns + steps.leaf_ns
    assert start["hold"] == steps.bookkeeping_ns + walk + costs.tlbi_all_ns
    assert end["hold"] == steps.bookkeeping_ns


def test_the_host_pays_for_each_page_that_it_has() -> None:
    lab = Lab(4 * MIB)
    lab.fill(range(0, 1024, 2))
    lab.drop()
    start, end = account(lab.kvm.mmu_lock.rows)
    between = end["arrival"] - start["entry"] - start["hold"] - lab.kvm.costs.ageing.call_ns
    assert between == 512 * lab.kvm.costs.unmap.host_page_ns
    assert lab.kvm.unmapped_pages == 512
    assert not lab.kvm.host.state.any()
    assert lab.kvm.host.present == [0, 0]


def test_only_the_range_is_taken() -> None:
    lab = Lab(4 * MIB)
    lab.fill()
    lab.drop(100 * 4 * KIB, 600 * 4 * KIB)
    gone = np.flatnonzero(lab.kvm.stage2.leaf.entries == 0)
    assert gone.tolist() == list(range(100, 700))
    assert np.flatnonzero(lab.kvm.host.state == 0).tolist() == gone.tolist()
    assert lab.kvm.host.present == [100, 324]


def test_ranges_may_overlap_and_each_is_counted() -> None:
    """mn_active_invalidate_count: the fault path sees any of them."""
    lab = Lab(64 * MIB)
    lab.fill()
    running = [steps_of(lab, 0, 8000), steps_of(lab, 8000, 16000)]
    most = max(
        count for _, count in watched(lab, lambda: lab.kvm.notifier.in_progress, running[1], 1000)
    )
    lab.env.run()
    assert most == 2
    assert (lab.kvm.notifier.in_progress, lab.kvm.notifier.sequence) == (0, 2)


def test_counters_change_under_the_write_lock_only() -> None:
    lab = Lab(64 * MIB)
    lab.fill()
    running = steps_of(lab, 0, 16000)
    steps_of(lab, 16000, 16001)
    notifier = lab.kvm.notifier
    changes = watched(lab, lambda: (notifier.in_progress, notifier.sequence), running, 100)[1:]
    lab.env.run()
    held = [
        (row["entry"], row["entry"] + row["hold"])
        for row in account(lab.kvm.mmu_lock.rows)
        if row["mode"]
    ]
    assert changes
    for t_ns, _ in changes:
        # A section's effects are there when it is granted, a hand-over before its entry.
        assert any(entry - 200 <= t_ns <= end for entry, end in held)


def test_without_a_subscription_only_the_host_is_touched() -> None:
    """After unregistering: no notifier call, stage 2 as it was."""
    lab = Lab(2 * MIB)
    lab.fill()
    lab.kvm.notifier.subscribed = False
    lab.drop()
    assert not lab.kvm.mmu_lock.rows
    assert lab.kvm.stage2.leaf.entries.all()
    assert not lab.kvm.host.state.any()


# -- lock-break -------------------------------------------------------------------------------


def broken(preemption: str, kernel: str = "linux-6.12", blockable: bool = True) -> Lab:
    """3 GiB taken back while a reader waits since the first chunk."""
    lab = Lab(3 * GIB, kernel=kernel, host={"preemption": preemption})
    fill_sparsely(lab, 2 * MIB)
    waiting = reader(lab, 50_000, hold_ns=77)
    running = steps_of(lab, 0, lab.kvm.leaves, blockable=blockable)
    lab.entered = lab.env.run(waiting)  # type: ignore[attr-defined]
    lab.in_progress = lab.kvm.notifier.in_progress  # type: ignore[attr-defined]
    lab.env.run(running)
    return lab


def starts(lab: Lab) -> list[dict[str, int]]:
    return [row for row in account(lab.kvm.mmu_lock.rows) if row["site"] == RANGE_START]


def test_a_waiter_gets_in_after_the_chunk_and_the_range_stays_in_progress() -> None:
    lab = broken("full")
    first, second = starts(lab)
    line = lab.kvm.costs.line
    seen = first["entry"] + first["hold"] + line.transfer_ns
    assert lab.entered == seen + lab.kvm.costs.handoff_ns  # type: ignore[attr-defined]
    assert second["entry"] > lab.entered + 77  # type: ignore[attr-defined]
    assert lab.in_progress == 1  # type: ignore[attr-defined]
    assert not lab.kvm.stage2.leaf.entries.any()
    assert not lab.kvm.oracle.violations


def test_the_last_chunk_is_not_followed_by_a_break() -> None:
    """stage2_apply_range(): only if there is a next one; one waiter, one break of two possible."""
    lab = broken("full")
    assert len(starts(lab)) == 2
    lab = Lab(GIB)
    fill_sparsely(lab, 2 * MIB)
    waiting = reader(lab, 50_000)
    running = steps_of(lab, 0, lab.kvm.leaves)
    lab.env.run(waiting & running)
    assert len(starts(lab)) == 1


@pytest.mark.parametrize(
    ("kernel", "preemption", "breaks"),
    [
        *(("linux-6.12", "full", 1), ("linux-6.12", "lazy", 1)),
        *(("linux-6.12", "voluntary", 0), ("linux-6.12", "none", 0)),
        *(("linux-6.4", "voluntary", 1), ("linux-6.4", "none", 1), ("linux-6.4", "full", 1)),
    ],
)
def test_who_breaks_a_contended_lock(kernel: str, preemption: str, breaks: int) -> None:
    """rwlock_needbreak(): by the build up to v6.10, by the run-time preemption model since."""
    assert len(starts(broken(preemption, kernel))) == 1 + breaks


def test_who_may_not_block_does_not_break() -> None:
    """The OOM reaper (MMU_NOTIFIER_RANGE_BLOCKABLE)."""
    assert len(starts(broken("full", blockable=False))) == 1


def test_a_walk_ends_when_the_tree_went_while_the_lock_was_dropped() -> None:
    """mmu->pgt is read again for each chunk."""
    lab = Lab(3 * GIB)
    fill_sparsely(lab, 2 * MIB)

    def detach() -> Iterator[Any]:
        yield lab.env.timeout(50_000)

        def section(entry_ns: int) -> tuple[int, int]:
            lab.kvm.stage2.attached = False
            return 10, entry_ns + 10

        yield from acquired(lab.kvm.mmu_lock.write(50_000, 5, AGE, section))

    lab.env.process(detach())
    lab.env.run(steps_of(lab, 0, lab.kvm.leaves))
    chunk = GIB // (4 * KIB)
    assert not lab.kvm.stage2.leaf.entries[:chunk].any()
    assert lab.kvm.stage2.leaf.entries[chunk:].any()
    assert lab.kvm.notifier.in_progress == 0


# -- SRCU -------------------------------------------------------------------------------------


def woken(env: Environment, srcu: Srcu, t_ns: int) -> dict[str, int]:
    """Fill in when somebody who waits from ``t`` on is woken."""
    result: dict[str, int] = {}

    def wait() -> Iterator[Any]:
        yield env.timeout(t_ns)
        yield srcu.synchronize(t_ns)
        result["at"] = int(env.now)

    env.process(wait())
    return result


def section(env: Environment, srcu: Srcu, begin_ns: int, end_ns: int) -> None:
    def steps() -> Iterator[Any]:
        yield env.timeout(begin_ns)
        token = srcu.enter(begin_ns)
        yield env.timeout(end_ns - begin_ns)
        srcu.leave(token, end_ns)

    env.process(steps())


@pytest.mark.parametrize(
    ("sections", "at_ns"),
    [
        ([], 1000 + 2 * WAKEUP),
        ([(0, 999)], 1000 + 2 * WAKEUP),
        ([(0, 5000)], 5000 + WAKEUP),
        ([(0, 5000), (500, 9000)], 9000 + WAKEUP),
        ([(1001, 9000)], 1000 + 2 * WAKEUP),
        ([(0, 5000), (1001, 9000)], 5000 + WAKEUP),
    ],
)
def test_a_waiter_waits_for_those_who_were_inside(
    sections: list[tuple[int, int]], at_ns: int
) -> None:
    """synchronize_srcu(): those before it, not those after; two wake-ups if there was nobody."""
    env = Environment()
    srcu = Srcu(env, WAKEUP)
    for begin, end in sections:
        section(env, srcu, begin, end)
    result = woken(env, srcu, 1000)
    env.run()
    assert result["at"] == at_ns


def test_every_waiter_has_its_own_holdouts() -> None:
    env = Environment()
    srcu = Srcu(env, WAKEUP)
    section(env, srcu, 0, 5000)
    section(env, srcu, 2000, 8000)
    first, second = woken(env, srcu, 1000), woken(env, srcu, 3000)
    env.run()
    assert (first["at"], second["at"]) == (5000 + WAKEUP, 8000 + WAKEUP)


def test_an_invalidation_is_one_section() -> None:
    lab = Lab(64 * MIB)
    lab.fill()
    running = steps_of(lab, 0, 16000)
    result = woken(lab.env, lab.kvm.notifier.srcu, 2000)
    end = lab.env.run(running)
    lab.env.run()
    assert result["at"] == end + lab.kvm.costs.wakeup_ns
    assert account(lab.kvm.mmu_lock.rows)[0]["met"] == FAST
