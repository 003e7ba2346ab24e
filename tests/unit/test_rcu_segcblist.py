"""Segments of a callback list, against rcu_segcblist_accelerate() and _advance()."""

from __future__ import annotations

from simkvm.kernel.rcu_segcblist import SegmentedCallbackList


def nothing(_: int) -> int:
    return 0


def with_callbacks(count: int) -> SegmentedCallbackList:
    callbacks = SegmentedCallbackList()
    for t in range(count):
        callbacks.enqueue(t, nothing)
    callbacks.see(count)
    return callbacks


def test_a_cpu_sees_what_was_queued_before_and_not_in_the_same_nanosecond() -> None:
    callbacks = SegmentedCallbackList()
    for t in (5, 10, 10, 20):
        callbacks.enqueue(t, nothing)
    callbacks.see(10)
    assert (callbacks.seen, len(callbacks)) == (1, 4)
    callbacks.see(11)
    assert (callbacks.seen, len(callbacks)) == (3, 4)


def test_numbering_takes_all_and_a_later_number_only_the_new() -> None:
    callbacks = with_callbacks(3)
    assert callbacks.accelerate(1)
    callbacks.enqueue(7, nothing)
    callbacks.see(8)
    assert callbacks.unnumbered == 1
    assert callbacks.accelerate(2)
    assert (callbacks.wait, callbacks.next_ready, callbacks.unnumbered) == (3, 1, 0)


def test_a_third_number_finds_both_segments_taken() -> None:
    callbacks = with_callbacks(1)
    for number in (1, 2):
        callbacks.accelerate(number)
        callbacks.enqueue(10 * number, nothing)
        callbacks.see(10 * number + 1)
    assert not callbacks.accelerate(3)
    assert (callbacks.wait, callbacks.next_ready, callbacks.unnumbered) == (1, 1, 1)


def test_an_earlier_number_overrides_a_later_one() -> None:
    callbacks = with_callbacks(2)
    callbacks.accelerate(5)
    assert callbacks.accelerate(4)
    callbacks.advance(4)
    assert callbacks.ready == 2


def test_nothing_to_number() -> None:
    callbacks = with_callbacks(1)
    assert callbacks.accelerate(1)
    assert not callbacks.accelerate(2), "the only callback keeps its earlier number"
    callbacks.advance(1)
    assert callbacks.ready == 1
    assert not callbacks.accelerate(9)


def test_advancing_moves_up_to_the_number_that_ended() -> None:
    callbacks = with_callbacks(2)
    callbacks.accelerate(3)
    callbacks.enqueue(10, nothing)
    callbacks.see(11)
    callbacks.accelerate(4)
    callbacks.advance(2)
    assert callbacks.ready == 0
    callbacks.advance(3)
    assert (callbacks.ready, callbacks.wait, callbacks.wait_number) == (2, 1, 4)
    callbacks.enqueue(20, nothing)
    callbacks.see(21)
    callbacks.accelerate(5)
    callbacks.advance(9)
    assert (callbacks.ready, callbacks.waiting) == (4, 0)


def test_taking_gives_the_oldest_first() -> None:
    callbacks = with_callbacks(3)
    callbacks.accelerate(1)
    callbacks.advance(1)
    assert [callbacks.take()[0] for _ in range(3)] == [0, 1, 2]
    assert len(callbacks) == callbacks.ready == 0


def test_a_softirq_queues_between_what_a_thread_told_ahead() -> None:
    callbacks = SegmentedCallbackList()
    callbacks.enqueue_many([10, 30, 50], lambda t, index: 0)
    callbacks.enqueue(20, nothing)
    callbacks.enqueue_many([15, 40], lambda t, index: 0)
    assert [entry[0] for entry in callbacks.arriving] == [10, 15, 20, 30, 40, 50]
    assert [entry[2] for entry in callbacks.arriving] == [0, 0, -1, 1, 1, 2]
