"""Access patterns: each against its definition; statistics inside intervals computed from it."""

import gc
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chi2

from simkvm.guest import popularity
from simkvm.guest.patterns import CHUNK_TOUCHES, PATTERNS, Chunk, build, finite, touches
from simkvm.guest.popularity import scattered, zipf_cumulative, zipf_weights
from simkvm.guest.trace import assemble, write_trace
from simkvm.scenario.errors import InputError

Array = npt.NDArray[Any]
UNLIKELY = 1e-6
"""Chance that a correct pattern fails a statistical test here, were the seed not fixed."""


def access(pattern: str, **values: Any) -> SimpleNamespace:
    defaults = {
        "populate": {"write": True, "repeat": 1, "every": 1, "think": 0},
        "uniform": {"touches": 10_000, "write_ratio": 0.5, "think": 0},
        "zipf": {"touches": 10_000, "exponent": 0.99, "write_ratio": 0.5, "think": 0},
        "hot_cold": {
            "touches": 10_000,
            "hot_ratio": 0.1,
            "hot_access_ratio": 0.9,
            "write_ratio": 0.5,
            "think": 0,
        },
        "phases": {"repeat": 1},
        "trace": {"file": "demo.parquet", "repeat": 1, "think": 0},
    }
    return SimpleNamespace(pattern=pattern, **(defaults[pattern] | values))


def chunks(model: Any, vcpu: int = 0, vcpus: int = 1, pages: int = 1000, **values: Any) -> Any:
    place = {
        "page_bytes": 4096,
        "rng": np.random.default_rng([1, vcpu]),
        "layout_rng": np.random.default_rng(2),
    }
    return build(model, vcpu=vcpu, vcpus=vcpus, pages=pages, **(place | values))


def joined(stream: Iterable[Chunk]) -> tuple[Array, Array, Array]:
    """Pages, writes and gaps of a finite stream."""
    parts = list(stream)
    gaps = [np.broadcast_to(np.asarray(part.gaps_ns), part.pages.shape) for part in parts]
    empty = [np.zeros(0, dtype=np.int64)]
    return (
        np.concatenate(empty + [part.pages for part in parts]),
        np.concatenate(empty + [part.writes for part in parts]),
        np.concatenate(empty + gaps),
    )


def assert_distributed(counts: Array, probabilities: Array) -> None:
    """Pearson's test; cells of small expectation are pooled."""
    expected = probabilities * counts.sum()
    order = np.argsort(-expected)
    large = order[expected[order] >= 10]
    small = order[expected[order] < 10]
    observed = np.append(counts[large], counts[small].sum())
    expected = np.append(expected[large], expected[small].sum())
    cells = expected > 0
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    assert statistic < chi2.isf(UNLIKELY, cells.sum() - 1)


def assert_share(hits: int, total: int, probability: float) -> None:
    low, high = binom.ppf([UNLIKELY / 2, 1 - UNLIKELY / 2], total, probability)
    assert low <= hits <= high


# The contract of every pattern


def every_pattern() -> list[Any]:
    drawn = [access(name) for name in ("uniform", "zipf", "hot_cold")]
    sparse = access("populate", every=7)
    return [access("populate", repeat=3), sparse, *drawn, access("phases", phases=drawn, repeat=2)]


@pytest.mark.parametrize("model", every_pattern(), ids=lambda model: model.pattern)
@pytest.mark.parametrize("vcpus", [1, 3])
def test_chunks_are_well_formed(model: Any, vcpus: int) -> None:
    for vcpu in range(vcpus):
        for chunk in chunks(model, vcpu, vcpus, pages=9000):
            assert 0 < chunk.pages.size <= CHUNK_TOUCHES
            assert chunk.pages.shape == chunk.writes.shape
            assert (chunk.pages.dtype, chunk.writes.dtype) == (np.int64, np.bool_)
            assert 0 <= chunk.pages.min() <= chunk.pages.max() < 9000


@pytest.mark.parametrize("model", every_pattern(), ids=lambda model: model.pattern)
def test_touches_announces_what_comes(model: Any) -> None:
    made = sum(joined(chunks(model, vcpu, 3, pages=9000))[0].size for vcpu in range(3))
    assert touches(model, 9000, 3) == made


@pytest.mark.parametrize("model", every_pattern(), ids=lambda model: model.pattern)
def test_same_generators_give_the_same_touches(model: Any) -> None:
    first, second = joined(chunks(model)), joined(chunks(model))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["uniform", "zipf", "hot_cold"])
def test_endless_patterns_go_on_and_begin_like_short_ones(name: str) -> None:
    endless = joined(islice(chunks(access(name, touches=None)), 20))
    assert endless[0].size == 20 * CHUNK_TOUCHES
    short = joined(chunks(access(name, touches=5000)))
    for one, other in zip(short, endless, strict=True):
        np.testing.assert_array_equal(one, other[:5000])


@pytest.mark.parametrize("name", ["uniform", "zipf", "hot_cold"])
@pytest.mark.parametrize("count", [0, 1, CHUNK_TOUCHES, CHUNK_TOUCHES + 1])
def test_drawn_patterns_make_just_their_touches(name: str, count: int) -> None:
    assert joined(chunks(access(name, touches=count)))[0].size == count


@pytest.mark.parametrize("name", ["uniform", "zipf", "hot_cold"])
def test_vcpus_draw_on_their_own(name: str) -> None:
    one, other = (joined(chunks(access(name), vcpu, 2))[0] for vcpu in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", ["uniform", "zipf", "hot_cold"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_write_ratio(name: str, ratio: float) -> None:
    writes = joined(chunks(access(name, write_ratio=ratio)))[1]
    assert_share(int(writes.sum()), writes.size, ratio)


@pytest.mark.parametrize("name", ["populate", "uniform", "zipf", "hot_cold"])
def test_think_is_the_gap(name: str) -> None:
    assert set(joined(chunks(access(name, think=250)))[2].tolist()) == {250}


def test_finite_and_endless() -> None:
    never = access("uniform", touches=None)
    once = access("populate")
    cases = {
        True: [once, access("zipf"), access("trace"), access("phases", phases=[once, once])],
        False: [
            never,
            access("trace", repeat=None),
            access("phases", phases=[once], repeat=None),
            access("phases", phases=[once, never]),
            access("phases", phases=[access("phases", phases=[never])]),
        ],
    }
    for expected, models in cases.items():
        for model in models:
            assert finite(model) is expected
            if not expected:
                assert touches(model, 1000, 2) is None


def test_registry_names_every_pattern_of_the_scenario() -> None:
    assert set(PATTERNS) == {"populate", "uniform", "zipf", "hot_cold", "phases", "trace"}


# Populate


@given(st.integers(1, 20_000), st.integers(1, 7), st.integers(1, 3))
def test_populate_touches_its_share_in_order(pages: int, vcpus: int, repeat: int) -> None:
    covered = []
    for vcpu in range(vcpus):
        got, writes, _ = joined(chunks(access("populate", repeat=repeat), vcpu, vcpus, pages))
        share = list(range(vcpu * pages // vcpus, (vcpu + 1) * pages // vcpus))
        assert got.tolist() == share * repeat
        assert writes.all()
        covered += share
    assert covered == list(range(pages))


@given(st.integers(1, 20_000), st.integers(1, 7), st.integers(1, 9000), st.integers(1, 3))
def test_populate_can_leave_pages_out(pages: int, vcpus: int, every: int, repeat: int) -> None:
    model = access("populate", every=every, repeat=repeat)
    made = 0
    for vcpu in range(vcpus):
        parts = list(chunks(model, vcpu, vcpus, pages))
        assert all(0 < part.pages.size <= CHUNK_TOUCHES for part in parts)
        got, writes, _ = joined(parts)
        low, high = vcpu * pages // vcpus, (vcpu + 1) * pages // vcpus
        assert got.tolist() == [*range(low, high, every)] * repeat
        assert writes.all()
        made += got.size
    assert touches(model, pages, vcpus) == made


def test_populate_can_read() -> None:
    assert not joined(chunks(access("populate", write=False)))[1].any()


# Draws


def test_uniform_is_uniform_over_the_whole_guest() -> None:
    pages, _, _ = joined(chunks(access("uniform", touches=50_000), 1, 4, pages=300))
    assert_distributed(np.bincount(pages, minlength=300), np.full(300, 1 / 300))


def by_rank(pages: Array, total: int) -> Array:
    """Touches by rank, by the layout that `chunks` hands in."""
    return np.bincount(pages, minlength=total)[scattered(total, np.random.default_rng(2))]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.99, 1.0, 1.7, 4.0])
def test_zipf_follows_its_law(exponent: float) -> None:
    pages, _, _ = joined(chunks(access("zipf", touches=100_000, exponent=exponent), pages=500))
    law = np.arange(1, 501.0) ** -exponent
    assert_distributed(by_rank(pages, 500), law / law.sum())


@pytest.mark.parametrize("pages", [1, 2])
def test_zipf_of_hardly_any_pages(pages: int) -> None:
    got, _, _ = joined(chunks(access("zipf", exponent=1.0), pages=pages))
    assert_share(int(by_rank(got, pages)[0]), got.size, 1 / sum(1 / r for r in range(1, pages + 1)))


@pytest.mark.parametrize("name", ["zipf", "hot_cold"])
def test_all_vcpus_agree_on_the_popular_pages(name: str) -> None:
    model = access(name, touches=40_000, exponent=1.2)
    shared = np.random.default_rng(7)  # one object for all: build must not draw from it
    tops = []
    for vcpu in range(3):
        pages, _, _ = joined(chunks(model, vcpu, 3, layout_rng=shared))
        tops.append(set(np.argsort(-np.bincount(pages, minlength=1000))[:5].tolist()))
    if name == "zipf":
        assert tops[0] == tops[1] == tops[2]
    hot = set(scattered(1000, np.random.default_rng(7))[:100].tolist())
    assert all(top <= hot for top in tops)


def test_another_layout_makes_other_pages_popular() -> None:
    model = access("zipf", exponent=2.0)
    tops = {
        int(np.bincount(joined(chunks(model, layout_rng=np.random.default_rng(s)))[0]).argmax())
        for s in range(5)
    }
    assert len(tops) > 1


@pytest.mark.parametrize(
    ("hot_ratio", "hot_access_ratio", "hot_pages"),
    [(0.1, 0.9, 50), (0.29, 0.5, 145), (0.5, 0.0, 250), (0.0, 0.9, 0), (1.0, 0.2, 500)],
)
def test_hot_cold_follows_its_law(
    hot_ratio: float, hot_access_ratio: float, hot_pages: int
) -> None:
    model = access(
        "hot_cold", touches=60_000, hot_ratio=hot_ratio, hot_access_ratio=hot_access_ratio
    )
    counts = by_rank(joined(chunks(model, pages=500))[0], 500)
    law = np.full(500, 1 / 500)
    if 0 < hot_pages < 500:
        law[:hot_pages] = hot_access_ratio / hot_pages
        law[hot_pages:] = (1 - hot_access_ratio) / (500 - hot_pages)
    assert_distributed(counts, law)


def test_hot_set_is_rounded_to_the_nearest_page() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    model = access("hot_cold", hot_ratio=0.29, hot_access_ratio=1.0)
    assert np.unique(joined(chunks(model, pages=100))[0]).size == 29


# Popularity


@pytest.mark.parametrize("pages", [1, 2, 1000])
def test_scattered_is_a_permutation(pages: int) -> None:
    assert sorted(scattered(pages, np.random.default_rng(3)).tolist()) == list(range(pages))


def test_large_arrays_are_shared_and_then_freed() -> None:
    one = zipf_cumulative(5000, 0.75)
    assert zipf_cumulative(5000, 0.75) is one
    assert zipf_cumulative(5000, 0.76) is not one
    layout = scattered(5000, np.random.default_rng(4))
    assert scattered(5000, np.random.default_rng(4)) is layout
    del one, layout
    gc.collect()
    assert (5000, 0.75) not in popularity._ZIPF
    assert not [key for key in popularity._SCATTERED if key[0] == 5000]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.99, 1.0, 2.5, 30.0])
def test_zipf_weights_are_powers(exponent: float) -> None:
    ranks = np.concatenate([np.arange(1, 5000), 2 ** np.arange(13, 40)])
    weights = zipf_weights(ranks, exponent)
    np.testing.assert_allclose(weights, ranks.astype(float) ** -exponent, rtol=2e-13)


def test_zipf_weights_of_powers_of_two_are_exact_and_ones_vanish_quietly() -> None:
    assert zipf_weights(np.array([1, 2, 4, 1024]), 1.0).tolist() == [1, 0.5, 0.25, 2**-10]
    assert zipf_weights(np.array([1, 2**40]), 1e6).tolist() == [1, 0]


def test_zipf_sums_run_on_over_blocks() -> None:
    sums = zipf_cumulative(3 * popularity.BLOCK_RANKS + 5, 0.99)
    plain = np.cumsum(np.arange(1, sums.size + 1.0) ** -0.99)
    np.testing.assert_allclose(sums, plain, rtol=1e-12)


# Phases


def test_phases_follow_each_other_and_repeat() -> None:
    first = access("populate", think=1)
    second = access("populate", think=2, write=False)
    pages, writes, gaps = joined(chunks(access("phases", phases=[first, second], repeat=2)))
    assert pages.tolist() == list(range(1000)) * 4
    assert writes.tolist() == ([True] * 1000 + [False] * 1000) * 2
    assert gaps.tolist() == ([1] * 1000 + [2] * 1000) * 2


def test_each_phase_has_its_own_hot_set_and_keeps_it() -> None:
    one = access("hot_cold", hot_access_ratio=1.0, touches=5000)
    pages, _, _ = joined(chunks(access("phases", phases=[one, one], repeat=2)))
    first, second, third, fourth = (set(part.tolist()) for part in np.split(pages, 4))
    assert first == third
    assert second == fourth
    assert len(first & second) < 50  # of 100; the mean is 10


def test_an_endless_phase_is_the_last_one_seen() -> None:
    model = access("phases", phases=[access("uniform", touches=None), access("populate")])
    assert len(list(islice(chunks(model), 50))) == 50


def test_endless_rounds_without_a_touch_end() -> None:
    model = access("phases", phases=[access("populate")], repeat=None)
    assert list(chunks(model, vcpu=0, vcpus=2, pages=1)) == []


# Trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trace = assemble(
        [0, 513, 0, 7],
        [False, True, True, False],
        [1, 20, 300, 4000],
        instructions_after_last=50_000,
    )
    write_trace(tmp_path / "demo.parquet", trace)
    return tmp_path


def test_each_vcpu_replays_a_copy_of_its_own(folder: Path) -> None:
    for vcpu in range(2):
        pages, writes, _ = joined(chunks(access("trace"), vcpu, 2, 2048, base_dir=folder))
        assert pages.tolist() == [vcpu * 1024 + page for page in (0, 513, 0, 7)]
        assert writes.tolist() == [False, True, True, False]


def test_gaps_are_the_instructions_up_to_the_next_record(folder: Path) -> None:
    model = access("trace", think=7)
    gaps = joined(chunks(model, pages=1024, base_dir=folder, instruction_ns=2.0))[2]
    assert gaps.tolist() == [2 * 20 + 7, 2 * 300 + 7, 2 * 4000 + 7, 2 * 50_001 + 7]


def test_fractions_of_a_nanosecond_are_not_lost(folder: Path) -> None:
    """Time after k touches is the floor of the exact time, in every round."""
    model = access("trace", repeat=1000)
    gaps = joined(chunks(model, pages=1024, base_dir=folder, instruction_ns=0.3))[2]
    instructions = np.cumsum([20, 300, 4000, 50_001] * 1000)
    assert np.cumsum(gaps).tolist() == (instructions * 3 // 10).tolist()


def test_long_pauses_at_a_slow_guest_do_not_overflow(tmp_path: Path) -> None:
    longest = 2**31 - 1
    records = CHUNK_TOUCHES
    trace = assemble(np.zeros(records), np.zeros(records), np.full(records, longest))
    write_trace(tmp_path / "demo.parquet", trace)
    model = access("trace")
    gaps = joined(chunks(model, base_dir=tmp_path, instruction_ns=1000.999999))[2]
    assert int(gaps.sum()) == records * longest * 1_000_999_999 // 10**6


def test_a_trace_repeats(folder: Path) -> None:
    pages, _, _ = joined(chunks(access("trace", repeat=3), pages=1024, base_dir=folder))
    assert pages.tolist() == [0, 513, 0, 7] * 3
    assert touches(access("trace", repeat=3), 1024, 2, folder) == 24
    endless = chunks(access("trace", repeat=None), pages=1024, base_dir=folder)
    assert len(list(islice(endless, 9))) == 9


def test_long_traces_come_in_chunks(tmp_path: Path) -> None:
    records = 2 * CHUNK_TOUCHES + 3
    page = np.arange(records) % 512
    trace = assemble(page, page % 2, np.arange(records), instructions_after_last=5)
    write_trace(tmp_path / "demo.parquet", trace)
    parts = list(chunks(access("trace"), base_dir=tmp_path, instruction_ns=1.0))
    assert [part.pages.size for part in parts] == [CHUNK_TOUCHES, CHUNK_TOUCHES, 3]
    pages, writes, gaps = joined(parts)
    np.testing.assert_array_equal(pages, page)
    np.testing.assert_array_equal(writes, page % 2)
    assert gaps.tolist() == [*range(1, records), 5]


@pytest.mark.parametrize(
    ("page_bytes", "expected", "copy"),
    [(16 << 10, [0, 128, 0, 1], 256), (64 << 10, [0, 32, 0, 0], 64)],
)
def test_larger_guest_pages(folder: Path, page_bytes: int, expected: list[int], copy: int) -> None:
    model = access("trace")
    pages = joined(chunks(model, 1, 2, 2 * copy, page_bytes=page_bytes, base_dir=folder))[0]
    assert pages.tolist() == [copy + page for page in expected]


def test_smaller_guest_pages_are_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "demo.parquet", assemble([0], [True], [1], page_size=16 << 10))
    with pytest.raises(InputError, match="larger than the guest's 4096"):
        chunks(access("trace"), base_dir=tmp_path)


def test_a_guest_too_small_for_the_copies_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"needs 1024 pages for each of 2 vCPUs.*has 2047"):
        chunks(access("trace"), 0, 2, 2047, base_dir=folder)


def test_a_missing_trace_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no such trace file.*demo\.parquet"):
        chunks(access("trace", file="demos.parquet"), base_dir=folder)
