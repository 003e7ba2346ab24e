"""The lazy access engine: its parts against plain counting, whole runs against explicit ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from lab import events, world
from scipy.stats import ks_2samp

from simkvm.guest.faulting import FaultingLeaves
from simkvm.guest.lazy import Lazy
from simkvm.guest.lazy_flags import LazyFlags, never_missed
from simkvm.guest.leaf_weights import Equal, LeafWeights, Shares, leaf_weights
from simkvm.guest.patterns import Place as PatternPlace
from simkvm.guest.patterns import Zipf
from simkvm.guest.touch_order import Place, TouchOrder
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario import access
from simkvm.scenario.errors import InputError
from simkvm.scenario.load import require_possible
from simkvm.scenario.schema import Scenario
from simkvm.units import GIB, MIB

LEVEL = 0.001 / 30
"""Of each test of a drawn figure: thirty of them are wrong once in a thousand sets of seeds."""

# -- the order of touches -------------------------------------------------------------------------


def ahead_of(starts: dict[int, int], step: int, here: Place, until: int) -> list[Place]:
    """All touches from ``here`` up to ``until``, in order."""
    every = [Place(t, v) for v, start in starts.items() for t in range(start, until, step)]
    return sorted(place for place in every if place >= here)


@pytest.mark.parametrize("seed", range(40))
def test_touches_come_in_the_order_of_a_plain_list(seed: int) -> None:
    drawn = random.Random(seed)
    step = drawn.randint(1, 9)
    order, starts = TouchOrder(step), dict[int, int]()
    for _ in range(60):
        plain = ahead_of(starts, step, order.here, order.here.t_ns + 400)
        match drawn.choice(["join", "go", "nth", "leave"]):
            case "join" if (vcpu := drawn.randrange(5)) not in starts:
                starts[vcpu] = order.here.t_ns + drawn.randint(1, 25)
                order.join(vcpu, starts[vcpu])
            case "go":
                there = Place(order.here.t_ns + drawn.randint(1, 30), drawn.randrange(6))
                made = order.made
                assert order.go_to(there) == sum(place < there for place in plain)
                assert order.made - made == sum(place < there for place in plain)
            case "nth" if starts:
                number = drawn.randint(1, 30)
                assert order.nth(number) == plain[number - 1]
            case "leave" if starts:
                vcpu = drawn.choice(list(starts))
                made = len(range(starts.pop(vcpu), order.here.t_ns, step))
                assert order.leave(vcpu) == made
                assert vcpu not in order


# -- weights and draws ----------------------------------------------------------------------------


def test_weights_are_the_shares_of_the_pattern() -> None:
    spec = access.Zipf(exponent=0.8)
    weights = leaf_weights(spec, 300, 1, np.random.default_rng(5))
    rng = np.random.default_rng(1)
    drawn = Zipf(spec, PatternPlace(0, 1, 300, 4096, rng, np.random.default_rng(5), None, 1.0))  # type: ignore[arg-type]
    counts = np.bincount(drawn.draw(200_000), minlength=300)
    expected = weights.of(0, 300) / weights.total * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert 200 < statistic < 420, "chi-square of 299 degrees: mean 299, deviation 24"


@pytest.mark.parametrize("spec", [access.HotCold(hot_access_ratio=1.0), access.Zipf()])
def test_leaves_of_many_pages_have_their_sum(spec: Any) -> None:
    pages = leaf_weights(spec, 64, 1, np.random.default_rng(5))
    leaves = leaf_weights(spec, 8, 8, np.random.default_rng(5))
    summed = pages.of(0, 64).reshape(8, 8).sum(axis=1) / pages.total
    assert leaves.of(0, 8) / leaves.total == pytest.approx(summed, rel=1e-6)


@pytest.mark.parametrize("weights", [Equal(200), Shares(np.arange(200, dtype=np.float32) / 19900)])
def test_faulting_leaves_are_drawn_by_weight(weights: LeafWeights) -> None:
    rng = np.random.default_rng(3)
    entries = rng.choice([0, VALID, VALID | WRITE], 200).astype(np.uint8)
    leaves = FaultingLeaves(weights, entries, write_ratio=0.3)
    entries[30:150] = VALID | WRITE
    entries[40:44] = 0, VALID, 0, 0
    leaves.refresh(30, 150)
    entries[7] = 0
    leaves.refresh(7, 8)
    share = weights.of(0, 200) / weights.total
    faulting = share * np.where(entries == 0, 1.0, np.where(entries == VALID, 0.3, 0.0))
    assert leaves.hazard == pytest.approx(faulting.sum())
    drawn = [leaves.draw(*rng.random(3)) for _ in range(20_000)]
    counts = np.bincount([leaf for leaf, _ in drawn], minlength=200)
    assert not counts[faulting == 0].any()
    expected = (faulting / faulting.sum() * len(drawn))[faulting > 0]
    statistic = ((counts[faulting > 0] - expected) ** 2 / expected).sum()
    degrees = np.count_nonzero(faulting) - 1
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5
    assert all(write for leaf, write in drawn if entries[leaf])


def test_a_large_range_gives_the_sums_of_single_changes() -> None:
    weights = Shares(np.random.default_rng(2).random(50_000).astype(np.float32) / 25_000)
    entries = np.full(50_000, VALID | WRITE, np.uint8)
    at_once, one_by_one = (FaultingLeaves(weights, entries, 0.5) for _ in range(2))
    entries[100:49_000] = 0
    at_once.refresh(100, 49_000)
    for leaf in range(100, 49_000):
        one_by_one.refresh(leaf, leaf + 1)
    assert at_once.hazard == one_by_one.hazard
    for uniform in np.linspace(0, 1, 50, endpoint=False):
        assert at_once.draw(0, uniform, 0) == one_by_one.draw(0, uniform, 0)


# -- accessed flags -------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0.02, 0.3), (0.1, 0.1), (0.3, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("touches", [0, 1, 7, 60])
def test_a_cached_page_stays_unseen_as_a_markov_chain_says(
    a: float, b: float, touches: int
) -> None:
    cached, displaced = 1.0, 0.0  # and its flag clear
    for _ in range(touches):
        cached, displaced = cached * (1 - b), displaced * (1 - a) + cached * b
    found = never_missed(np.array([a]), np.array([b]), np.array([touches]))
    assert found[0] == pytest.approx(cached + displaced, abs=1e-12)


class Touching:
    """A guest of ``leaves`` mapped pages, and as many explicit ones, a row each, in lock-step."""

    def __init__(self, share: np.ndarray, places: int, vcpus: int, rows: int) -> None:
        leaves = len(share)
        weights: LeafWeights = Shares(share.astype(np.float32))
        made = world(
            guest={"memory": leaves * 4096, "mapped": True, "access": {"pattern": "uniform"}},
            machine={"base": "graviton3-64c", "set": {"tlb_l2_entries": places}},
            duration="1ms",
        )
        self.entries = made.kvms[0].stage2.leaf.entries
        self.counts = np.zeros(vcpus, np.int64)
        rng = np.random.default_rng(8)
        self.flags = LazyFlags(
            made.kvms[0],
            weights,
            0.5,
            vcpus,
            lambda _: self.counts.copy(),
            lambda _: int(self.counts.sum()),
            rng,
        )
        self.rng, self.share, self.places = rng, share, places
        self.tags = np.full((rows, vcpus, places), -1)
        self.young = np.ones((rows, leaves), np.bool_)

    def touch(self, vcpu: int, touches: int) -> None:
        rows = np.arange(len(self.young))
        for _ in range(touches):
            pages = self.rng.choice(len(self.share), len(rows), p=self.share)
            places = pages % self.places
            missed = self.tags[rows, vcpu, places] != pages
            self.young[rows[missed], pages[missed]] = True
            self.tags[rows, vcpu, places] = pages
        self.counts[vcpu] += touches

    def begin(self) -> None:
        """Once more: everything young, nothing cached."""
        self.flags.look(0, 0, len(self.share))
        self.flags.flush(0)
        self.entries |= np.uint8(AF)


STORIES: dict[str, list[str]] = {
    "passes": ["2", "look", "clear", "3", "look", "clear", "3", "look"],
    "two looks": ["4", "look", "clear", "1", "look", "3", "look"],
    "a flush": ["4", "look", "clear", "2", "flush", "2", "look", "clear", "3", "look"],
    "two flushes": ["4", "look", "clear", "2", "flush", "1", "flush", "2", "look", "clear", "3"],
    "partly cleared": ["4", "look", "clear half", "3", "look", "clear", "2", "look"],
}


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_each_flag_is_set_as_often_as_an_explicit_one(story: str, vcpus: int) -> None:
    """Page by page, after any story of touches, looks, clears and flushes."""
    share = np.array([0.3, 0.1, 0.05, 0.2, 0.05, 0.15, 0.15])
    rows = 1200
    explicit = Touching(share, 3, vcpus, rows)
    seen = np.zeros(len(share))
    steps = [*STORIES[story], "look"]
    touches: list[tuple[int, int]] = []
    for step in steps:
        if step.isdigit():
            touches += [(vcpu, int(step) * (1 + vcpu)) for vcpu in range(vcpus)]
            for vcpu, number in touches[-vcpus:]:
                explicit.touch(vcpu, number)
        elif step == "flush":
            explicit.tags[:] = -1
        elif step.startswith("clear"):
            explicit.young[:, :: 2 if step == "clear half" else 1] = False
    lazy = Touching(share, 3, vcpus, 0)
    for _ in range(rows):
        lazy.begin()
        for step in steps:
            if step.isdigit():
                lazy.counts += [int(step) * (1 + vcpu) for vcpu in range(vcpus)]
            elif step == "flush":
                lazy.flags.flush(0)
            elif step.startswith("clear"):
                lazy.entries[:: 2 if step == "clear half" else 1] &= np.uint8(~AF & 0xFF)
            else:
                lazy.flags.look(0, 0, len(share))
        seen += (lazy.entries & AF) != 0
    for page, count in enumerate(seen):
        expected = explicit.young[:, page].mean()
        error = (2 * max(expected * (1 - expected), 1e-3) / rows) ** 0.5
        assert abs(count / rows - expected) < 4.6 * error, (page, count / rows, expected)


# -- whole runs -----------------------------------------------------------------------------------

PATTERNS: dict[str, dict[str, Any]] = {
    "uniform": {"pattern": "uniform"},
    "zipf": {"pattern": "zipf", "exponent": 0.9},
    "hot_cold": {"pattern": "hot_cold", "hot_ratio": 0.25, "hot_access_ratio": 0.9},
}
SMALL_TLB = {"base": "graviton3-64c", "set": {"tlb_l2_entries": 16}}
DROP = {"kind": "madvise_dontneed", "guest": "vm", "range": 64 << 10, "rate": 12_000}
RUNS = 24


def keys(engine: str, pattern: str, **guest: Any) -> dict[str, Any]:
    touch = {"think": 400, **PATTERNS[pattern], **guest.pop("access", {})}
    return {"guest": {"memory": MIB, "engine": engine, "access": touch, **guest}}


def run(**given: Any) -> tuple[World, Record]:
    made = world(**given)
    return made, made.run()


@cache
def filled(engine: str, pattern: str) -> np.ndarray:
    """Of runs that fill memory: faults at a third, two thirds and the end, and pages touched."""
    found = []
    for number in range(RUNS):
        given = keys(engine, pattern, vcpus=2)
        made, record = run(**given, duration=900_000, seed=1 + 2 * number + (engine == "lazy"))
        kvm = made.kvms[0]
        series = dict(zip(record.series["t_ns"], record.series["faults"], strict=True))
        at = [max(t for t in series if t <= 300_000 * n) for n in (1, 2, 3)]
        mapped = np.count_nonzero(kvm.stage2.leaf.entries & VALID)
        found.append([*(series[t] for t in at), mapped, record.summary["touches"]])
    return np.array(found, np.float64)


@cache
def aged(engine: str, pattern: str, machine: str) -> np.ndarray:
    """Of runs under ageing whose memory is taken away: faults, young pages, touches, accessed."""
    x86 = machine == "x86-icelake-64c"
    found = []
    for number in range(RUNS):
        given = keys(engine, pattern, vcpus=2)
        made, record = run(
            **given,
            duration=2_000_000,
            seed=1 + 2 * number + (engine == "lazy"),
            kernel="linux-6.12-x86" if x86 else "linux-6.12",
            machine={"base": machine, "set": {"tlb_l2_entries": 16}},
            ageing={"interval": 100_000},
            contenders={"drop": DROP},
        )
        kvm, summary = made.kvms[0], record.summary
        kvm.accesses.catch_up(2_000_000, 0, kvm.leaves)
        accessed = np.count_nonzero(kvm.stage2.young(0, kvm.leaves))
        found.append([summary["faults"], summary["young_pages"], summary["touches"], accessed])
    return np.array(found, np.float64)


def agree(explicit: np.ndarray, lazy: np.ndarray) -> None:
    """Column by column: means by Welch's interval, distributions by Kolmogorov and Smirnov."""
    for column in range(explicit.shape[1]):
        first, second = explicit[:, column], lazy[:, column]
        error = ((first.var(ddof=1) + second.var(ddof=1)) / RUNS) ** 0.5
        assert abs(first.mean() - second.mean()) <= 4.3 * error + 1e-9, (column, first, second)
        assert ks_2samp(first, second).pvalue > LEVEL, column


@pytest.mark.parametrize("pattern", PATTERNS)
def test_memory_is_filled_at_the_same_pace(pattern: str) -> None:
    agree(filled("explicit", pattern), filled("lazy", pattern))


@pytest.mark.parametrize(
    ("pattern", "machine"),
    [*((pattern, "graviton3-64c") for pattern in PATTERNS), ("zipf", "x86-icelake-64c")],
)
def test_ageing_and_unmaps_find_the_same(pattern: str, machine: str) -> None:
    agree(aged("explicit", pattern, machine), aged("lazy", pattern, machine))


def taken(engine: str) -> np.ndarray:
    """Of runs whose memory is mapped and taken away: the faults."""
    found = []
    for number in range(RUNS):
        given = keys(engine, "uniform", mapped=True)
        seed = 1 + 2 * number + (engine == "lazy")
        _, record = run(**given, duration=2_000_000, seed=seed, contenders={"drop": DROP})
        found.append([record.summary["faults"]])
    return np.array(found, np.float64)


def counts_from_the_start(patch: pytest.MonkeyPatch) -> None:
    """As if touches before the last look counted again."""
    look = LazyFlags._decide

    def decide(flags: LazyFlags, low: int, high: int, counts: Any) -> None:
        looked = flags._looked.copy()
        look(flags, low, high, counts)
        flags._looked[:] = looked

    patch.setattr(LazyFlags, "_decide", decide)


def misses_what_goes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lazy, "_changed", lambda lazy, *_: lazy._plan())


def writes_to_what_is_read_only(patch: pytest.MonkeyPatch) -> None:
    made = FaultingLeaves.__init__

    def init(leaves: FaultingLeaves, weights: Any, entries: Any, _: float) -> None:
        made(leaves, weights, entries, 0.0)

    patch.setattr(FaultingLeaves, "__init__", init)


def test_a_guest_whose_memory_is_taken_faults_as_often() -> None:
    agree(taken("explicit"), taken("lazy"))


@pytest.mark.parametrize(
    ("mistake", "runs"),
    [
        (counts_from_the_start, lambda engine: aged(engine, "hot_cold", "graviton3-64c")[:, [1]]),
        (misses_what_goes, taken),
        (writes_to_what_is_read_only, lambda engine: filled(engine, "uniform")),
    ],
)
def test_a_mistake_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None],
    runs: Callable[[str], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    explicit = runs("explicit")
    mistake(monkeypatch)
    aged.cache_clear()
    filled.cache_clear()
    with pytest.raises(AssertionError):
        agree(explicit, runs("lazy"))
    aged.cache_clear()
    filled.cache_clear()


# -- what is not drawn ----------------------------------------------------------------------------


def test_a_mapped_guest_ends_with_an_explicit_one() -> None:
    ends = {}
    for engine in ("explicit", "lazy"):
        touch = {"touches": 12_345, "think": 37}
        given = keys(engine, "uniform", vcpus=3, mapped=True, access=touch)
        made, record = run(**given)
        ends[engine] = [(v.touches, v.finished_ns) for v in made.kvms[0].vcpus]
        assert record.summary["touches"] == 3 * 12_345
        assert record.summary["faults"] == 0
    assert ends["explicit"] == ends["lazy"]


@pytest.mark.parametrize("t_ns", [1, 41, 42, 43, 99_999])
def test_a_mapped_guest_has_touched_as_often_at_any_time(t_ns: int) -> None:
    made = {}
    for engine in ("explicit", "lazy"):
        given = keys(engine, "zipf", vcpus=2, mapped=True, access={"think": 37})
        made[engine] = run(**given, duration=t_ns)[1].summary["touches"]
    assert made["explicit"] == made["lazy"]


@pytest.mark.parametrize("engine", ["explicit", "lazy"])
def test_one_page_faults_once(engine: str) -> None:
    touch = {"touches": 50, "write_ratio": 1.0}
    given = keys(engine, "uniform", memory=4096, access=touch)
    made, record = run(**given)
    assert (record.summary["faults"], record.summary["touches"]) == (1, 50)
    assert made.kvms[0].vcpus[0].finished_ns == record.summary["sim_ns"]


def test_pages_that_are_never_touched_are_never_mapped() -> None:
    touch = {"hot_access_ratio": 1.0, "touches": 3_000}
    mapped = []
    for engine in ("explicit", "lazy"):
        made, _ = run(**keys(engine, "hot_cold", access=touch))
        mapped.append(made.kvms[0].stage2.leaf.entries & VALID != 0)
    assert np.array_equal(*mapped), "the same pages are hot"


def test_warm_pages_cost_no_event() -> None:
    """64 vCPUs touch 64 GiB for a second: half a billion touches and more."""
    made = world(
        guest={
            "memory": 64 * GIB,
            "vcpus": 64,
            "mapped": True,
            "engine": "lazy",
            "access": {"pattern": "uniform", "think": 100},
        },
        duration="1s",
    )
    record = made.run()
    assert record.summary["touches"] > 600_000_000
    assert events(made.env) < 64 + 2 * 65 + 10, "each vCPU's start, and the samples of the run"


@pytest.mark.parametrize(
    "guest",
    [
        {"memory": 256 * MIB, "mapping": 2 * MIB},
        {"memory": 4 * MIB, "memslots": 4},
        {"memory": 4 * MIB, "page_size": 64 << 10},
    ],
    ids=["blocks", "slots", "64K"],
)
def test_any_leaf_size_and_number_of_slots(guest: dict[str, Any]) -> None:
    """Every leaf is faulted in once: writes only, many touches a leaf."""
    touch = {"write_ratio": 1.0, "think": 2_000}
    given = keys("lazy", "zipf", vcpus=2, access=touch, **guest)
    made, record = run(**given, duration=20_000_000, ties="shuffle", ageing={"interval": 500_000})
    kvm = made.kvms[0]
    mapped = np.count_nonzero(kvm.stage2.leaf.entries & VALID)
    assert mapped > kvm.leaves // 2
    assert mapped <= record.summary["faults"] <= 1.2 * mapped + 5
    assert record.summary["young_pages"] > mapped
    assert record.summary["touches"] == sum(vcpu.touches for vcpu in kvm.vcpus) > 5_000


def test_a_run_gives_the_same_again_and_another_seed_does_not() -> None:
    given = keys("lazy", "zipf", vcpus=2) | {"duration": 300_000, "ageing": {"interval": 50_000}}
    prints = [run(**given, seed=seed)[1].fingerprint for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "balloon", "guest": "vm", "target": MIB // 2, "rate": 100_000},
        {"kind": "migration", "guest": "vm", "interval": "300us"},
        {"kind": "compaction", "guest": "vm", "pages": 32, "interval": "200us"},
        {"kind": "fork", "guest": "vm", "child": "100us", "interval": "400us"},
        {"kind": "mprotect", "guest": "vm", "read_only": "20us", "writable": "200us"},
        {"kind": "numa_balancing", "guest": "vm", "scan_size": MIB, "period": "300us", "delay": 0},
        {"kind": "memslot", "guest": "vm", "pause": "50us", "interval": "500us"},
        {"kind": "pre_fault", "guest": "vm", "start": "100us"},
        {"kind": "oom_reaper", "guest": "vm", "start": "900us", "delay": "100us"},
    ],
    ids=lambda other: other["kind"],
)
def test_whoever_takes_memory_meets_the_same_guest(other: dict[str, Any]) -> None:
    """The numbers of faults and touches, over a few runs."""
    found = {}
    for engine in ("explicit", "lazy"):
        rows = []
        for seed in range(12):
            given = keys(engine, "zipf", vcpus=2)
            number = 1 + 2 * seed + (engine == "lazy")
            _, record = run(**given, duration=1_500_000, seed=number, contenders={"other": other})
            rows.append([record.summary["faults"], record.summary["touches"]])
        found[engine] = np.array(rows, np.float64)
    explicit, lazy = found["explicit"], found["lazy"]
    error = ((explicit.var(axis=0, ddof=1) + lazy.var(axis=0, ddof=1)) / 12) ** 0.5
    assert (abs(explicit.mean(axis=0) - lazy.mean(axis=0)) <= 5.5 * error + 2).all(), found


@pytest.mark.parametrize("order", ["process_exit", "close_vm"])
def test_a_guest_that_ends_stops_touching(order: str) -> None:
    given = keys("lazy", "zipf", vcpus=2, teardown={"order": order, "at": 200_000})
    made, record = run(**given, duration=1_000_000)
    assert made.teardowns[0].done
    assert all(200_000 <= vcpu.finished_ns < 220_000 for vcpu in made.kvms[0].vcpus)
    assert record.summary["safety"] == "clean"


# -- what it is not for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"access": {"pattern": "populate"}}, "not populate"),
        ({"contenders": {"k": {"kind": "ksm", "guest": "vm"}}}, "k asks when pages were touched"),
        ({"contenders": {"r": {"kind": "free_page_reporting", "guest": "vm"}}}, "r asks when"),
        ({"contenders": {"d": {"kind": "dirty_log", "guest": "vm"}}}, "d logs which pages"),
        ({"contenders": {"t": {"kind": "khugepaged", "guest": "vm"}}}, "t changes the size"),
        ({"machine": {"base": "graviton3-64c", "set": {"hw_af": False}}}, "accessed flags"),
        ({"machine": {"base": "graviton3-64c", "set": {"page_touch_ns": 0}}}, "take time"),
    ],
)
def test_what_needs_every_touch_is_refused(changes: dict[str, Any], message: str) -> None:
    touch = changes.pop("access", {"pattern": "uniform"})
    guest = {"memory": 4 * MIB, "engine": "lazy", "access": touch}
    spec = Scenario.model_validate(
        {
            "name": "test",
            "machine": "graviton3-64c",
            "kernel": "linux-6.12",
            "duration": "1s",
            "guests": {"vm": guest},
            **changes,
        }
    )
    with pytest.raises(InputError, match=message):
        require_possible(spec)
