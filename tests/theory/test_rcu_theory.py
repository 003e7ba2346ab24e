"""RCU's bounds with what its steps cost: each is computed from rates and ticks, none from a run.

Mean waits are rows of ``simkvm validate theory``, with free costs; here are the shortest and the
longest ones, and what has an inequality instead of a closed form. Arrivals are Poisson with a
fixed seed. Where a sample mean is compared, the interval is 4.5 standard errors wide on each side
(two-sided risk below 1e-5), worked out from the variance that the theory gives, so a wrong model
cannot widen it.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import accumulate
from math import sqrt

import pytest

from simkvm.kernel.rcu import RcuCosts
from simkvm.validate import theory_rcu
from simkvm.validate.theory_rcu import BUCKETS, PERIODS

Z = 4.5
COSTS = RcuCosts(call_rcu_ns=106, callback_invoke_ns=50, wakeup_ns=3900, context_switch_ns=1400)
Stream = partial(theory_rcu.Stream, cost_ns=60, costs=COSTS)


def poisson(rate_per_s: float, count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [int(t) for t in accumulate(rng.expovariate(rate_per_s / 1e9) for _ in range(count))]


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("offloaded", [False, True])
def test_littles_law(offloaded: bool) -> None:
    """Mean outstanding = arrival rate * mean wait, by two independent countings.

    The left side integrates the number outstanding over time, in the order in which queueing and
    invoking happen; over a drained run the law is exact.
    """
    stream = Stream(poisson(50_000, 20_000, seed=1), hz=250, busy=4, offloaded=offloaded)
    steps = sorted([(t, 1) for t in stream.queued] + [(t, -1) for t in stream.invoked])
    end_ns = steps[-1][0]
    outstanding = area = last = 0
    for t, step in steps:
        area += outstanding * (t - last)
        outstanding += step
        last = t
        assert outstanding >= 0
    assert outstanding == 0
    rate = len(stream.queued) / end_ns
    assert area / end_ns == pytest.approx(rate * mean(stream.waits), rel=1e-9)


def test_busy_cpus_invoke_between_three_and_five_ticks_after() -> None:
    """Continuous grace periods of 2 ticks on busy CPUs.

    A CPU notices a grace period at its first tick and reports at the second; both number what is
    queued for the next one. So a callback of the first tick waits 4 to 5 ticks, one of the second
    3 to 4. Invocation at 10 callbacks a batch delays it by less than the time that all of a grace
    period's callbacks take; what is queued during the softirq of a tick is still numbered by it.
    """
    rate_per_s, count, cost = 2_000, 20_000, 60
    stream = Stream(poisson(rate_per_s, count, seed=2), hz=250, busy=4, cost_ns=cost)
    tick = stream.tick_ns
    per_period = rate_per_s * 2 * tick / 1e9
    slack = COSTS.core_ns * 3 + 3 * per_period * (cost + COSTS.callback_invoke_ns)
    assert 3 * tick - 10 * slack < min(stream.waits) < 3.01 * tick
    assert 4.99 * tick < max(stream.waits) < 5 * tick + 10 * slack


@pytest.mark.parametrize("hz", list(PERIODS))
def test_rare_callbacks_wait_for_a_grace_period_and_one_or_two_ticks(hz: int) -> None:
    """RCU idle at each arrival: up to a tick to be numbered, the period, 1 tick to learn it.

    An idle host needs the timer: 2 ticks at HZ 100 and 250, 3 at 300, 4 at 1000. The kthread's
    own scan and wake-ups end before the next tick, so they add nothing.
    """
    rng = random.Random(hz)
    tick, ticks = 1_000_000_000 / hz, PERIODS[hz]
    count = 500
    times = list(accumulate(int(tick * (20 + 30 * rng.random())) for _ in range(count)))
    stream = Stream(times, hz, busy=0)
    assert len(stream.periods) == count
    assert min(stream.waits) >= (ticks + 1) * tick - 1
    assert max(stream.waits) <= (ticks + 2) * tick + COSTS.core_ns + 1


@pytest.mark.parametrize(("hz", "busy"), [(100, 0), (250, 0), (250, 4), (1000, 0), (1000, 4)])
def test_no_callback_waits_longer_than_two_periods_and_three_ticks(hz: int, busy: int) -> None:
    """Worst case: queued just after this CPU's report, the rest of that grace period and one tick
    pass before it gets its number, and the grace period that runs by then does not count either.

    So: (period - 2 ticks left after the report) + 1 to be numbered, the rest of the next, a full
    one, and 1 tick to learn its end.
    """
    stream = Stream(poisson(3_000, 6_000, seed=hz + busy), hz, busy)
    tick = stream.tick_ns
    period = max(end - start for _, start, end, _ in stream.periods)
    batches = max(duration for _, _, _, duration in stream.batches)
    assert min(stream.waits) > min(end - start for _, start, end, _ in stream.periods)
    assert max(stream.waits) <= 2 * period + 3 * tick + 10 * (batches + COSTS.core_ns)


def test_periods_follow_back_to_back_under_load() -> None:
    """With callbacks in every tick the rate of grace periods is one per 2 ticks of HZ=250."""
    stream = Stream(poisson(20_000, 40_000, seed=3), hz=250, busy=4)
    spanned_ns = stream.periods[-1][2] - stream.periods[0][1]
    assert len(stream.periods) == round(spanned_ns / (2 * stream.tick_ns))


def test_invocation_cannot_outrun_ten_batches_a_tick_and_half_a_cpu() -> None:
    """A backlog on a busy CPU, 100 us a callback, HZ=1000, 8 CPUs: how fast it drains.

    In 6 ms of turns ksoftirqd has 3 ms, plus the tail of the batch in which its turn ended. In
    the thread's 3 ms each tick may serve until the second jiffy after it began: the whole rest.
    So at least half of the CPU goes to callbacks, and never more than all of it.
    """
    count, cost = 3_000, 100_000 - COSTS.callback_invoke_ns
    stream = Stream([500_000] * count, hz=1000, busy=8, cpus=8, cost_ns=cost)
    begin, end = stream.invoked[0], stream.invoked[-1]
    rate = (count - 1) * 100_000 / (end - begin)
    assert 0.5 <= rate <= 1.0
    assert stream.stolen_ns >= count * 100_000


def test_callbacks_cost_what_they_say() -> None:
    """Stolen time = callbacks * (dispatch + their cost) + core passes, kthread runs aside."""
    count, cost = 5_000, 200
    stream = Stream(poisson(10_000, count, seed=4), hz=250, busy=4, cost_ns=cost)
    callbacks = count * (cost + COSTS.callback_invoke_ns)
    ticks = stream.invoked[-1] // stream.tick_ns
    passes = ticks + len(stream.batches)
    kthread = 4 * len(stream.periods) * 2 * COSTS.context_switch_ns
    assert callbacks <= stream.stolen_ns <= callbacks + passes * COSTS.core_ns + kthread


# -- offloaded and lazy callbacks -------------------------------------------------------------

WAKE = COSTS.switch_ns
SCAN = COSTS.core_ns + 4 * COSTS.fqs_scan_per_cpu_ns


@pytest.mark.parametrize("hz", list(PERIODS))
def test_rare_offloaded_callbacks_wait_two_ticks_less(hz: int) -> None:
    """Half a tick to be numbered, half of one in the period, and one to learn the end are saved.

    The period begins two wake-ups after the call, at any moment of a tick, and ends with one: the
    fraction that has passed is uniform. A third wake-up ends it, two more lead to the callback.
    """
    rng = random.Random(hz)
    tick = 1_000_000_000 / hz
    count = 500
    times = list(accumulate(int(tick * (20 + 30 * rng.random())) for _ in range(count)))
    stream = Stream(times, hz, busy=0, offloaded=True)
    assert len(stream.periods) == count
    const = 5 * WAKE + SCAN
    assert min(stream.waits) >= (PERIODS[hz] - 1) * tick + 3 * WAKE
    assert max(stream.waits) <= PERIODS[hz] * tick + const + 1


@pytest.mark.parametrize("hz", list(PERIODS))
def test_a_lone_lazy_callback_waits_for_the_end_of_its_timers_bucket(hz: int) -> None:
    """10 s, then up to the bucket of jiffies in which the timer is, then a grace period."""
    rng = random.Random(hz)
    tick = 1_000_000_000 / hz
    count = 300
    times = list(accumulate(int((12 + 3 * rng.random()) * 1e9) for _ in range(count)))
    stream = Stream(times, hz, busy=0, offloaded=True, lazy=True)
    assert len(stream.periods) == count
    after = PERIODS[hz] * tick + 3 * WAKE + SCAN
    assert min(stream.waits) >= 1e10 + after - 1
    assert max(stream.waits) <= 1e10 + BUCKETS[hz] * tick + after + 1


@pytest.mark.parametrize("rate_per_s", [0.5, 5.0])
def test_lazy_callbacks_wait_for_the_first_of_them(rate_per_s: float) -> None:
    """The first waits D; those that come meanwhile, rate * D of them, half of it on average.

    D is 10 s to 10.256 s (HZ=250) and a grace period of 2 ticks. Given the first ones the others
    are independent and uniform, so the mean of n waits has a deviation below D / sqrt(12 n), to
    which the number of the first ones adds less than as much.
    """
    count = 4_000
    stream = Stream(poisson(rate_per_s, count, seed=5), 250, busy=0, offloaded=True, lazy=True)

    def theory(d_s: float) -> float:
        return (d_s + rate_per_s * d_s**2 / 2) / (1 + rate_per_s * d_s)

    waited_s = mean(stream.waits) / 1e9
    error_s = Z * 2 * 10.27 / sqrt(12 * count)
    assert theory(10.0) - error_s < waited_s < theory(10.256 + 0.012) + error_s
    cycle_s = 1 / rate_per_s + 10.14
    assert len(stream.periods) == pytest.approx(stream.invoked[-1] / 1e9 / cycle_s, rel=0.05)
