"""Do the rules hold where threads share CPUs, and does nothing change where each has its own?"""

from __future__ import annotations

from typing import Any

from hypothesis import Phase, given, settings
from worlds import after_every_event, world

from invariants import drawn
from invariants.test_world import every_rule_holds
from simkvm.kernel.cpu import IDLE
from simkvm.kernel.sched import FairScheduler
from simkvm.scenario.schema import Scenario


def shared(spec: Scenario, **host: Any) -> Scenario:
    """``spec`` on a host whose threads share CPUs."""
    update = {"scheduler": "fair", **host}
    return spec.model_copy(update={"host": spec.host.model_copy(update=update)})


def few(spec: Scenario) -> Scenario:
    """The same on fewer CPUs than threads, as the seed has it."""
    return shared(spec, cpus=1 + spec.seed % max(1, spec.host.cpus - 2), hz=1000)  # type: ignore[operator]


def scheduler_holds(spec: Scenario) -> FairScheduler:
    """Run ``spec`` and look at the run queues after every event."""
    made = world(few(spec))
    sched = made.sched
    assert isinstance(sched, FairScheduler)
    waited_ns = dict.fromkeys(sched.threads, 0)

    def check() -> None:
        now = int(made.env.now)
        waiting = [thread for queue in sched.queues for thread in queue.waiting]
        running = [queue.current for queue in sched.queues if queue.current is not None]
        assert len({*waiting, *running}) == len(waiting) + len(running), "each is in one place"
        for queue in sched.queues:
            assert not (waiting and queue.idle(now)), "no CPU is idle while a thread waits"
            if queue.current is not None and queue.current.task.on_cpu:
                assert queue.current.task.cpu is queue.cpu
                assert queue.cpu.state(now) is not IDLE
        assert all(thread.task.on_cpu == (thread in running) for thread in sched.threads.values())
        for task, thread in sched.threads.items():
            assert thread.wait_ns >= waited_ns[task]
            waited_ns[task] = thread.wait_ns

    after_every_event(made, check)
    record = made.run()
    end_ns = record.summary["sim_ns"]
    assert record.summary["cpu_busy_ratio"] <= 1.001, "what is told ahead may be past the end"
    for thread in sched.threads.values():
        assert thread.run_ns + thread.wait_ns <= end_ns * 1.001
    return sched


@settings(max_examples=10, phases=[Phase.generate])
@given(drawn.scenarios(takers=True))
def test_every_rule_holds_on_few_cpus(spec: Scenario) -> None:
    every_rule_holds(few(spec))


@settings(max_examples=6, phases=[Phase.generate])
@given(drawn.scenarios(arch="x86", sized=True))
def test_every_rule_holds_on_few_cpus_of_x86(spec: Scenario) -> None:
    every_rule_holds(few(spec))


@settings(max_examples=10, phases=[Phase.generate])
@given(drawn.scenarios(takers=True))
def test_no_cpu_is_idle_while_a_thread_waits(spec: Scenario) -> None:
    scheduler_holds(spec)


@settings(max_examples=8, phases=[Phase.generate])
@given(drawn.scenarios(teardown=False, takers=True))
def test_with_a_cpu_for_each_nothing_changes(spec: Scenario) -> None:
    """Where ties are drawn, an event more shifts them; but for that, to the nanosecond."""
    spec = spec.model_copy(update={"ties": "fifo"})
    own, fair = world(spec).run(), world(shared(spec)).run()
    assert fair.fingerprint == own.fingerprint
    assert fair.summary["runqueue_wait_total_ns"] == 0
