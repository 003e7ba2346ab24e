"""What a CPU remembers of what actors told, asked at times that have come."""

from __future__ import annotations

import pytest

from simkvm.kernel.cpu import ATOMIC, DEPTH, GUEST, IDLE, KERNEL, MOMENTS, USER, Cpu


def test_a_cpu_nobody_spoke_for_is_idle_for_ever() -> None:
    cpu = Cpu(0)
    assert cpu.state(0) is IDLE
    assert cpu.state(1 << 50) is IDLE
    assert cpu.in_extended_quiescent_state(5)
    assert not cpu.switched_between(0, 1 << 50)


def test_states_hold_from_their_begin_and_end_before_their_end() -> None:
    cpu = Cpu(0)
    cpu.enter_guest(10, 20)
    cpu.spin(25)
    cpu.atomic(30, 40)
    cpu.enter_user(45, 50)
    cpu.sleep(60)
    expected = {9: IDLE, 10: GUEST, 19: GUEST, 20: KERNEL, 24: KERNEL, 25: ATOMIC, 29: ATOMIC}
    expected |= {30: ATOMIC, 39: ATOMIC, 40: KERNEL, 45: USER, 49: USER, 50: KERNEL, 60: IDLE}
    assert {t: cpu.state(t) for t in expected} == expected


def test_what_is_told_ahead_does_not_hide_what_runs_now() -> None:
    cpu = Cpu(0)
    cpu.enter_kernel(100)
    cpu.atomic(200, 300)
    cpu.enter_guest(300, 900)
    assert cpu.state(150) is KERNEL
    assert cpu.state(250) is ATOMIC
    assert not cpu.switched_between(100, 299), "the guest entry at 300 has not come"
    assert cpu.switched_between(100, 300)


def test_an_exit_before_the_told_end_of_guest_mode_counts() -> None:
    cpu = Cpu(0)
    cpu.enter_guest(0, 1000)
    cpu.enter_kernel(400)
    assert cpu.state(500) is KERNEL


def test_waking_and_sleeping_are_context_switches() -> None:
    cpu = Cpu(0)
    cpu.enter_kernel(10)
    cpu.sleep(20)
    cpu.spin(30)
    for moment in (10, 20, 30):
        assert cpu.switched_between(moment - 1, moment)
        assert not cpu.switched_between(moment, moment + 5)
    cpu.enter_kernel(50)
    assert not cpu.switched_between(30, 60), "going on in the kernel is none"
    cpu.context_switch(70)
    assert cpu.switched_between(60, 70)
    assert cpu.state(75) is KERNEL


@pytest.mark.parametrize("nohz_full", [False, True])
def test_guest_and_user_mode_are_extended_only_under_context_tracking(nohz_full: bool) -> None:
    cpu = Cpu(0, nohz_full=nohz_full)
    cpu.enter_guest(10, 20)
    cpu.enter_user(30, 40)
    assert cpu.in_extended_quiescent_state(15) is nohz_full
    assert cpu.in_extended_quiescent_state(35) is nohz_full
    assert not cpu.in_extended_quiescent_state(25)
    assert cpu.extended_between(5, 25) is nohz_full
    cpu.sleep(50)
    assert cpu.in_extended_quiescent_state(50)
    assert cpu.extended_between(49, 50)


def test_preemptible_between_looks_between_the_locks() -> None:
    cpu = Cpu(0)
    cpu.atomic(100, 200)
    cpu.atomic(200, 300)
    cpu.atomic(310, 400)
    cpu.spin(400)
    assert cpu.preemptible_between(50, 99), "idle before anything was told"
    assert not cpu.preemptible_between(100, 299)
    assert cpu.preemptible_between(100, 300), "300 to 309 is open"
    assert cpu.preemptible_between(308, 350)
    assert not cpu.preemptible_between(309, 350), "the open part is not after 309"
    assert not cpu.preemptible_between(310, 5000)
    cpu.enter_guest(6000, 7000)
    assert cpu.preemptible_between(310, 6000)


def test_what_is_forgotten_is_read_as_preemption_off() -> None:
    cpu = Cpu(0)
    for t in range(0, 20 * DEPTH, 20):
        cpu.atomic(t + 10, t + 20)
        cpu.enter_kernel(t + 20)
    oldest = 20 * (DEPTH - DEPTH // 2)
    assert cpu.state(oldest) is ATOMIC
    assert not cpu.preemptible_between(0, oldest)


def test_a_lock_loop_does_not_push_out_a_context_switch() -> None:
    cpu = Cpu(0)
    cpu.enter_kernel(10)
    for t in range(30, 30 + 100 * DEPTH, 10):
        cpu.atomic(t, t + 5)
    assert cpu.switched_between(0, 1 << 40)
    for t in range(1 << 20, (1 << 20) + MOMENTS):
        cpu.context_switch(t)
    assert not cpu.switched_between(0, 1000), "only so many moments are kept"


def test_a_guest_entry_is_remembered_over_the_locks_of_a_fault() -> None:
    cpu = Cpu(0)
    cpu.enter_guest(10, 20)
    for t in range(30, 30 + 10 * (DEPTH - 1), 10):
        cpu.atomic(t, t + 5)
    assert cpu.switched_between(0, 1 << 40)
    cpu.spin(1 << 20)
    assert not cpu.switched_between(0, 1 << 40), "forgotten, which only delays"


def test_softirq_time_is_stolen_from_a_thread_and_collected_once() -> None:
    cpu = Cpu(0)
    cpu.steal(5, 100)
    assert cpu.take_stolen() == 0, "idle: nobody to take it from"
    cpu.enter_guest(10, 100)
    cpu.steal(20, 30)
    cpu.steal(50, 12)
    assert cpu.take_stolen() == 42
    assert cpu.take_stolen() == 0
