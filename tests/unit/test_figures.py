"""Do the figures show the numbers of the results, on axes that people can read?

What is tested are the artists' data: an image comparison passes a line that is off by a constant.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
import synthetic_results as synthetic
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from simkvm.scenario.errors import InputError
from simkvm.show import figures, points, style
from simkvm.show.caption import caption
from simkvm.show.distribution import Distribution, distribution
from simkvm.show.figure_deferred import steps_in, thinned
from simkvm.show.figure_locks import share_text
from simkvm.units import format_count, format_duration

LOCKLESS = "linux-7.1-lockless"


@pytest.fixture(scope="module")
def sweep() -> synthetic.SyntheticResults:
    return synthetic.kernel_sweep(vcpus=(1, 2, 8))


@pytest.fixture(scope="module")
def rates() -> synthetic.SyntheticResults:
    return synthetic.rate_sweep()


@pytest.fixture(scope="module")
def sizes() -> synthetic.SyntheticResults:
    return synthetic.page_size_sweep()


@pytest.fixture(scope="module")
def memories() -> synthetic.SyntheticResults:
    return synthetic.memory_sweep()


@pytest.fixture(scope="module")
def lock_figure(sweep) -> Figure:
    return figures.lock_distribution(sweep, "hold")


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [ax for ax in figure.axes if ax.get_title(loc="left") == title]
    return found


def labelled(ax: Axes) -> dict[str, list]:
    """Lines that stand for data, by label."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def tick_labels(axis) -> list[str]:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    return axis.get_major_formatter().format_ticks(ticks)


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of which one covers part of the other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = {
        id(tick.label1)
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not np.prod(np.subtract(axis.get_view_interval(), tick.get_loc())) <= 0
    }
    inside = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]
    return [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(inside, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


# --- distributions -----------------------------------------------------------------------------


def hand_made(values: list[int]) -> tuple[np.ndarray, Distribution]:
    low, high, count = synthetic.bucketed(np.array(values))
    return np.array(values), Distribution(
        low.astype(float), high.astype(float), count.astype(float), ("read",)
    )


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_exact_to_the_width_of_a_bucket(share):
    values = np.random.default_rng(3).lognormal(7, 1.2, 20_000).astype(int)
    _, found = hand_made(list(values))
    exact = np.quantile(values, share, method="inverted_cdf")

    assert found.quantile_ns(share) == pytest.approx(exact, rel=1 / 32, abs=1)


def test_small_values_are_exact():
    _, found = hand_made([0] * 60 + [5] * 39 + [9])

    assert found.quantile_ns(0.5) == 0
    assert found.quantile_ns(0.9) == 5
    assert found.quantile_ns(1.0) == 9


def test_tail_is_the_share_of_values_at_or_above_each_bucket():
    values, found = hand_made([3, 3, 40, 41, 700, 9_000, 9_000, 9_000])
    x, y = found.tail()

    for low, last in zip(found.low_ns, found.high_ns - 1, strict=True):
        assert y[np.flatnonzero(x == low)[0]] == (values >= low).mean()
        assert y[np.flatnonzero(x == last)[-1]] == max((values > last).mean(), 3 / 8)
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) <= 0).all()
    assert y[-1] > 0, "a logarithmic axis has no zero"


def test_tail_of_waits_starts_at_the_share_that_waited():
    _, found = hand_made([0] * 75 + [100] * 25)
    x, y = found.tail()

    assert (x[0], y[0]) == (1, 0.25)
    assert (np.diff(x) >= 0).all()
    assert (y[:2] == 0.25).all()


def test_distributions_of_guests_and_runs_are_pooled():
    results = [synthetic.result(guests=2), synthetic.result(seed=2)]
    found = distribution(results, "fault", "hold")

    assert found.total == sum(
        r.locks.loc[r.locks["site"] == "fault", "acquisitions"].sum() for r in results
    )
    assert found.modes == ("read",)
    assert distribution(results, "teardown", "hold") is None


# --- which points are compared -----------------------------------------------------------------


def test_counts_of_a_machine_are_whole_numbers():
    machine = {"base": "x86-icelake-64c", "set": {"cores": 128.0, "ghz": 2.5, "hw_af": True}}

    label = points.reference_label(machine)

    assert label == "x86-icelake-64c cores=128 ghz=2.5 hw_af=True"


def test_ordered_axes_default_to_their_largest_value(sweep):
    groups = points.variants(sweep)

    assert list(groups) == list(synthetic.KERNELS)
    assert {r.axes["guests.vm0.vcpus"] for group in groups.values() for r in group} == {8}


def test_where_selects_by_short_name_and_by_meaning(sweep, rates):
    (group,) = points.variants(sweep, where={"vcpus": 2, "kernel": LOCKLESS}).values()
    assert [r.axes for r in group] == [{"kernel": LOCKLESS, "guests.vm0.vcpus": 2}]

    slow = points.variants(rates, where={"contenders.unmap.rate": "1 / ms"})
    assert {r.axes["contenders.unmap.rate"] for g in slow.values() for r in g} == {"1000 / s"}

    two = points.variants(sweep, where={"kernel": ["linux-7.1", LOCKLESS]})
    assert list(two) == ["linux-7.1", LOCKLESS]


def test_where_with_a_wrong_axis_names_the_nearest(sweep):
    with pytest.raises(InputError, match=r"no axis 'vcpu' \(did you mean 'vcpus'\?\)"):
        points.variants(sweep, where={"vcpu": 2})


def test_where_that_matches_nothing(sweep):
    with pytest.raises(InputError, match="no point matches"):
        points.variants(sweep, where={"vcpus": 3})


def test_axes_without_an_order_make_variants():
    results = [
        synthetic.result(kernel, axes={"kernel": kernel, "host.preemption": model})
        for kernel in ("linux-7.1", LOCKLESS)
        for model in ("full", "lazy")
    ]

    assert list(points.variants(results)) == [
        "linux-7.1, preemption=full",
        "linux-7.1, preemption=lazy",
        f"{LOCKLESS}, preemption=full",
        f"{LOCKLESS}, preemption=lazy",
    ]


def test_replications_stay_together():
    results = [
        synthetic.result(axes={"kernel": "linux-7.1", "replication": i}, replication=i)
        for i in range(3)
    ]

    assert [len(group) for group in points.variants(results).values()] == [3]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (8, 8.0),
        (0.5, 0.5),
        ("200 / s", 200.0),
        ("5 / ms", 5_000.0),
        ("2 MiB", 2 << 20),
        ("10 ms", 10_000_000),
        ("linux-7.1", None),
        (True, None),
        ("2 apples", None),
    ],
)
def test_values_with_an_order(written, value):
    assert points.number(written) == value


def test_axes_of_one_name_are_told_apart():
    keys = ["guests.a.vcpus", "guests.b.vcpus", "kernel"]

    assert list(points.short_names(keys).values()) == ["a.vcpus", "b.vcpus", "kernel"]


# --- locks -------------------------------------------------------------------------------------


def test_a_panel_for_each_site_in_order(lock_figure):
    assert [ax.get_title(loc="left") for ax in lock_figure.axes] == [
        *("fault", "age", "range_start", "range_end")
    ]


def test_lines_are_the_tails_of_the_largest_point(lock_figure, sweep):
    (result,) = [r for r in sweep if r.axes == {"kernel": LOCKLESS, "guests.vm0.vcpus": 8}]
    x, y = distribution([result], "fault", "hold").tail()
    line = labelled(panel(lock_figure, "fault"))[LOCKLESS]

    np.testing.assert_array_equal(line.get_xdata(), x)
    np.testing.assert_array_equal(line.get_ydata(), y)


def test_who_takes_no_lock_has_no_line_and_is_named(lock_figure):
    age = panel(lock_figure, "age")

    assert list(labelled(age)) == ["linux-7.1", "linux-7.1-read-locked"]
    (said,) = [text for text in texts(age) if text.startswith(LOCKLESS)]
    assert said.endswith("does not take the lock here")


def test_the_table_under_a_panel_says_what_the_lock_table_says(lock_figure, sweep):
    (result,) = [r for r in sweep if r.axes == {"kernel": "linux-7.1", "guests.vm0.vcpus": 8}]
    stored = result.locks.set_index("site").loc["age"]
    (said,) = [t for t in texts(panel(lock_figure, "age")) if t.startswith("linux-7.1 ")]

    assert said == f"{'linux-7.1':<21}  " + " ".join(
        [
            "write",
            f"{format_count(stored['acquisitions']):>8}",
            *(f"{format_duration(stored[f'hold_{f}_ns']):>8}" for f in ("p50", "p99", "max")),
        ]
    )


def test_percentiles_are_marked_on_the_curve(lock_figure):
    ax = panel(lock_figure, "fault")
    curve = labelled(ax)["linux-7.1"]
    marks = {line.get_label(): line for line in ax.lines if line.get_label().startswith("_p")}

    for name, share in (("p50", 0.5), ("p99", 0.01)):
        ((x,), (y,)) = marks[f"_{name} linux-7.1"].get_data()
        assert y == pytest.approx(share)
        assert np.interp(x, *curve.get_data()) == pytest.approx(share, rel=0.05)


def test_marks_stay_on_a_curve_of_few_acquisitions():
    result = synthetic.result(scale=1e-9)  # 50 acquisitions a site: the curve ends at 2%
    ax = panel(figures.lock_distribution(result), "fault")
    (mark,) = [line for line in ax.lines if line.get_label() == "_p99 linux-7.1"]

    assert mark.get_ydata()[0] == labelled(ax)["linux-7.1"].get_ydata()[-1] == 0.02


def test_lock_axes_are_logarithmic_with_units_and_hold_all_data(lock_figure):
    for ax in lock_figure.axes:
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert {"100 ns", "1 us", "10 us"} <= set(tick_labels(ax.xaxis))
        assert {"100%", "10%", "1%"} <= set(tick_labels(ax.yaxis))
        for line in labelled(ax).values():
            assert ax.get_xlim()[0] <= line.get_xdata()[0]
            assert line.get_xdata()[-1] <= ax.get_xlim()[1]
            assert ax.get_ylim()[0] <= line.get_ydata()[-1]


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100%"), (0.01, "1%"), (0.001, "0.1%"), (1e-5, "1 in 100,000")]
)
def test_shares_for_people(share, text):
    assert share_text(share) == text


def test_waits_say_where_the_line_starts(sweep):
    figure = figures.lock_distribution(sweep, "wait", where={"vcpus": 1})

    assert all("share that had to wait" in ax.get_xlabel() for ax in figure.axes)
    holds = figures.lock_distribution(sweep, "hold")
    assert {ax.get_xlabel() for ax in holds.axes} == {"hold time"}
    line = labelled(panel(figure, "fault"))["linux-7.1"]
    (result,) = [r for r in sweep if r.axes == {"kernel": "linux-7.1", "guests.vm0.vcpus": 1}]
    fault = result.locks.set_index("site").loc["fault"]
    assert line.get_ydata()[0] == fault["contended"] / fault["acquisitions"]


def test_sites_in_one_panel_differ_by_line_style():
    ax = figures.lock_sites(synthetic.result(), "wait")
    lines = labelled(ax)

    assert list(lines) == ["fault", "age", "range_start", "range_end"]
    assert {site: line.get_linestyle() for site, line in lines.items()} == {
        site: style.SITE_LINES[site] for site in lines
    }
    assert len({to_hex(line.get_color()) for line in lines.values()}) == 1


def test_sites_can_be_drawn_into_axes_of_the_caller():
    mine = Figure().add_subplot()

    assert figures.lock_sites(synthetic.result(), ax=mine) is mine


def test_without_locks_there_is_no_lock_figure():
    result = synthetic.result()
    result.histograms = result.histograms.iloc[:0]

    with pytest.raises(InputError, match="no histogram of mmu_lock"):
        figures.lock_distribution(result)


# --- deferred memory over time -----------------------------------------------------------------


TIMELINE = pd.DataFrame(
    {
        "t_ns": [0, 100, 300, 600],
        "deferred_tables": [0, 2, 5, 1],
        "deferred_bytes": [0, 8_192, 20_480, 4_096],
        "reported_table_bytes": [40_960] * 4,
        "table_bytes": [40_960, 49_152, 61_440, 45_056],
    }
)


def test_steps_of_a_window_start_with_the_value_that_holds_there():
    steps = steps_in(TIMELINE, "deferred_bytes", (200, 700))

    assert steps.t_ns.tolist() == [200, 300, 600, 700]
    assert steps.value.tolist() == [8_192, 20_480, 4_096, 4_096]
    assert steps.mean() == (100 * 8_192 + 300 * 20_480 + 100 * 4_096) / 500
    assert steps.peak() == (300, 20_480)


@pytest.mark.parametrize("window", [(200, 200), (300, 100)])
def test_an_empty_window_is_refused(window):
    with pytest.raises(InputError, match="nothing to show"):
        steps_in(TIMELINE, "deferred_bytes", window)


def test_thinning_keeps_the_ends_and_the_extremes():
    rng = np.random.default_rng(5)
    table = pd.DataFrame({"t_ns": np.arange(50_000), "v": rng.integers(0, 10_000, 50_000)})
    table.loc[31_234, "v"] = 99_999
    steps = steps_in(table, "v", (0, 50_000))
    thin = thinned(steps, 1_000)

    assert len(thin.t_ns) <= 1_002
    assert thin.peak() == (31_234, 99_999)
    assert (thin.t_ns[0], thin.t_ns[-1]) == (0, 50_000)
    assert thin.value.min() == steps.value.min()
    assert thinned(thin, 2_000) is thin


def test_deferred_memory_draws_the_timeline_with_mean_and_peak(rates):
    result = rates.points[-1]
    figure = figures.deferred_memory(result)
    (ax,) = figure.axes
    lines = labelled(ax)

    steps = lines["deferred"]
    assert steps.get_drawstyle() == "steps-post"
    np.testing.assert_array_equal(steps.get_xdata()[:-1], result.timeline["t_ns"])
    np.testing.assert_array_equal(steps.get_ydata()[:-1], result.timeline["deferred_bytes"])

    assert lines["mean"].get_ydata()[0] == pytest.approx(result.summary["deferred_bytes_mean"])
    ((at,), (most,)) = lines["peak"].get_data()
    assert most == result.summary["deferred_bytes_peak"]
    row = result.timeline.set_index("t_ns").loc[at]
    (said,) = [text for text in texts(ax) if text.startswith("peak")]
    assert f"{row['deferred_tables']:g} tables" in said
    assert f"{most / row['table_bytes']:.1%} of table memory" in said


def test_deferred_axes_are_in_time_and_binary_bytes(rates):
    (ax,) = figures.deferred_memory(rates.points[-1]).axes

    assert ax.get_xlim() == (0, 200_000_000)
    assert {"50 ms", "100 ms"} <= set(tick_labels(ax.xaxis))
    assert {"512 KiB", "1 MiB"} <= set(tick_labels(ax.yaxis))


def test_every_grace_period_has_a_band_and_a_tick(rates):
    result = rates.points[-1]
    (ax,) = figures.deferred_memory(result).axes
    bands = [c for c in ax.collections if c.get_label() == "_bands"]
    (ends,) = [c for c in ax.collections if c.get_label() == "_ends"]

    spans = sorted(
        (path.vertices[:, 0].min(), path.vertices[:, 0].max())
        for band in bands
        for path in band.get_paths()
    )
    assert spans == list(
        zip(result.grace_periods["start_ns"], result.grace_periods["end_ns"], strict=True)
    )
    assert len(ends.get_segments()) == len(spans)
    # Neighbours differ in tint.
    assert len(bands) == 2
    assert to_hex(bands[0].get_facecolor()[0]) != to_hex(bands[1].get_facecolor()[0])


def test_too_many_grace_periods_are_left_out():
    result = synthetic.result(LOCKLESS)
    starts = np.arange(0, 200_000_000, 100_000)
    result.grace_periods = pd.DataFrame(
        {"number": starts // 100_000, "start_ns": starts, "end_ns": starts + 90_000, "fqs_scans": 0}
    )
    (whole,) = figures.deferred_memory(result).axes
    (zoomed,) = figures.deferred_memory(result, (0, 10_000_000)).axes

    assert not [c for c in whole.collections if c.get_label() == "_bands"]
    assert whole.get_xlabel() == "simulated time (2000 grace periods, too many to show)"
    assert zoomed.get_xlabel() == "simulated time (bands: grace periods)"
    assert [c for c in zoomed.collections if c.get_label() == "_bands"]


def test_a_window_zooms_and_changes_mean_and_peak(rates):
    result = rates.points[-1]
    (ax,) = figures.deferred_memory(result, (0, 8_000_000)).axes
    before = result.timeline[result.timeline["t_ns"] < 8_000_000]

    assert ax.get_xlim() == (0, 8_000_000)
    assert ax.figure.get_suptitle().endswith(", 0 ns to 8 ms")
    assert labelled(ax)["peak"].get_ydata()[0] == before["deferred_bytes"].max()


def test_variants_share_time_and_scale():
    results = [synthetic.result(LOCKLESS, rate=rate) for rate in (500, 5_000)]
    for result, name in zip(results, ("none", "vcpus"), strict=True):
        result.axes = {"host.nohz_full": name}
    figure = figures.deferred_memory(results)

    assert [ax.get_title(loc="left") for ax in figure.axes] == ["nohz_full=none", "nohz_full=vcpus"]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1


def test_who_never_defers_is_named_and_takes_no_room(rates):
    figure = figures.deferred_memory(rates)

    assert [ax.get_title(loc="left") for ax in figure.axes] == [LOCKLESS]
    said = " ".join(figure.get_supxlabel().split())
    assert said.endswith("no table ever waits with linux-7.1")


def test_if_nobody_defers_the_figure_says_so():
    (ax,) = figures.deferred_memory(synthetic.result("linux-7.1")).axes

    assert "no table waits for a grace period" in texts(ax)


def test_a_shorter_run_is_averaged_over_its_own_time():
    short = synthetic.result(LOCKLESS, sim_ns=100_000_000, axes={"host.preemption": "full"})
    long = synthetic.result(LOCKLESS, axes={"host.preemption": "lazy"})
    figure = figures.deferred_memory([short, long])

    for ax, result in zip(figure.axes, (short, long), strict=True):
        mean = labelled(ax)["mean"].get_ydata()[0]
        assert mean == pytest.approx(result.summary["deferred_bytes_mean"])


def test_the_peak_is_in_the_middle_of_its_figure(rates):
    ax = figures.deferred_peak(rates).axes[0]
    result = rates.points[-1]
    at = result.timeline.loc[result.timeline["deferred_bytes"].idxmax(), "t_ns"]
    low, high = ax.get_xlim()

    assert labelled(ax)["peak"].get_ydata()[0] == result.summary["deferred_bytes_peak"]
    assert high - low <= 10 * synthetic.GRACE_NS
    assert low <= at <= high


# --- sweeps ------------------------------------------------------------------------------------


def test_deferred_against_rate(rates):
    figure = figures.deferred_vs_rate(rates)
    stored = [r.summary for r in rates if r.axes["kernel"] == LOCKLESS]

    for ax, name in zip(figure.axes, ("mean", "peak"), strict=True):
        line = labelled(ax)[LOCKLESS]
        assert line.get_xdata().tolist() == [200, 1_000, 5_000, 20_000]
        assert line.get_ydata().tolist() == [s[f"deferred_bytes_{name}"] for s in stored]
        assert len(labelled(ax)["linux-7.1"].get_xdata()) == 0
        assert any(t.startswith("linux-7.1 ") and t.endswith("  0 everywhere") for t in texts(ax))
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert tick_labels(ax.xaxis) == ["200 / s", "1000 / s", "5 / ms", "20 / ms"]
        assert "64 KiB" in tick_labels(ax.yaxis)
        (said,) = [t for t in texts(ax) if t.startswith(LOCKLESS)]
        assert said.endswith(style.format_size(stored[-1][f"deferred_bytes_{name}"]))


def test_no_panel_of_deferred_memory_is_cut_off_at_the_top():
    kernels = {"linux-6.4-yuzhao-v2-lockless": 20_000, LOCKLESS: 500}  # the largest comes first
    results = [
        synthetic.result(kernel, rate=rate, axes={"kernel": kernel})
        for kernel, rate in kernels.items()
    ]

    panels = figures.deferred_memory(results).axes

    highest = max(int(result.timeline["deferred_bytes"].max()) for result in results)
    assert {ax.get_ylim()[1] for ax in panels} == {highest * 1.3}


def test_ageing_against_vcpus(sweep):
    figure = figures.ageing_scaling(sweep)
    stored = [r.summary for r in sweep if r.axes["kernel"] == "linux-7.1"]

    for ax, column in zip(figure.axes, ("ageing_pass_mean_ns", "vcpu_wall_ns"), strict=True):
        line = labelled(ax)["linux-7.1"]
        assert line.get_xdata().tolist() == [1, 2, 8]
        assert line.get_ydata().tolist() == [s[column] for s in stored]
        assert tick_labels(ax.xaxis) == ["1", "2", "8"]
        assert all(label.endswith(" ms") for label in tick_labels(ax.yaxis))
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_endless_guests_are_compared_by_throughput():
    results = synthetic.kernel_sweep(vcpus=(1, 8))
    for result in results:
        result.summary["vcpu_wall_ns"] = result.summary["sim_ns"]
    guest = figures.ageing_scaling(results).axes[1]

    assert labelled(guest)["linux-7.1"].get_ydata().tolist() == [
        r.summary["touches_per_s"] for r in results.points[:2]
    ]
    assert all(label.endswith(" / s") for label in tick_labels(guest.yaxis))


def test_replications_are_a_mean_and_a_band(sweep):
    again = synthetic.kernel_sweep(vcpus=(1, 2, 8), replication=1)
    figure = figures.ageing_scaling([*sweep, *again])
    pairs = [
        (a.summary["ageing_pass_mean_ns"], b.summary["ageing_pass_mean_ns"])
        for a, b in zip(sweep, again, strict=True)
        if a.axes["kernel"] == "linux-7.1"
    ]
    line = labelled(figure.axes[0])["linux-7.1"]

    np.testing.assert_allclose(line.get_ydata(), np.mean(pairs, axis=1))
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (np.min(pairs), np.max(pairs))
    assert "2 replications" in figure.get_supxlabel()


def test_callback_cost_shows_the_time_of_a_table_and_of_a_gib(sizes):
    figure = figures.callback_cost(sizes)
    each, gib = figure.axes

    for ax, column in ((each, "callback_ns_per_table"), (gib, "callback_ns_per_unmapped_gib")):
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert tick_labels(ax.xaxis) == ["4 KiB", "16 KiB", "64 KiB"]
        for kernel, line in labelled(ax).items():
            stored = [r.summary[column] for r in sizes if r.axes["kernel"] == kernel]
            assert list(line.get_ydata()) == stored


@pytest.mark.parametrize(
    "draw", [figures.callback_cost, figures.deferred_vs_rate, figures.ageing_scaling]
)
def test_without_the_axis_there_is_nothing_to_draw(draw):
    with pytest.raises(InputError, match="sweep"):
        draw(synthetic.result())


# --- what all figures share --------------------------------------------------------------------


def test_pressure_shows_requests_and_tails_by_memory(memories):
    figure = figures.under_pressure(memories)
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert titles == ["Requests", "Latency, p99.9"]
    drawn = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3]
    assert len(drawn) == 2, "a line a kernel, a point a size"
    with pytest.raises(InputError, match="does not sweep the host's memory"):
        figures.under_pressure(memories.points[:1])


def test_pressure_on_guests_that_serve_nobody_shows_their_touches():
    memories = synthetic.memory_sweep()
    for result in memories.points:
        for name in ("requests_per_s", "latency_p999_ns"):
            result.summary[name] = np.nan
        result.summary["vcpu_wall_ns"] = result.summary["sim_ns"]
    figure = figures.under_pressure(memories)
    assert [ax.get_ylabel() for ax in figure.axes] == ["touches a second"]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_no_text_covers_another(name, sweep, rates, sizes, memories):
    kind = figures.FIGURES[name]
    results = next(r for r in (rates, sweep, sizes, memories) if kind.applies(r))

    assert overlaps(kind.function(results)) == []


def test_a_difference_of_a_thousandth_does_not_fill_a_panel():
    memories = synthetic.memory_sweep()
    for number, result in enumerate(memories.points):
        result.summary["requests_per_s"] = 70.7e3 * (1 + number / 5000)

    low, high = figures.under_pressure(memories).axes[0].get_ylim()

    assert high / low == pytest.approx(1.5)
    assert low < 70.7e3 < high


def test_locks_are_shown_where_memory_is_shortest(memories):
    groups = points.variants(memories)
    shown = [result for group in groups.values() for result in group]

    assert {result.axes["host.memory.size"] for result in shown} == {"48 MiB"}
    assert caption(memories, shown).endswith("at size = 48\u00a0MiB (the smallest of 3)")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_long_names_and_many_sites_cover_nothing_either(name):
    results = [
        synthetic.result(
            LOCKLESS,
            vcpus=vcpus,
            axes={
                "kernel": "",
                "guests.vm0.vcpus": vcpus,
                "guests.vm0.page_size": f"{4 * vcpus} KiB",
                "contenders.vmm.rate": f"{vcpus} / ms",
                "host.memory.size": f"{80 - vcpus} MiB",
            },
        )
        for _ in range(2)
        for vcpus in (1, 8)
    ]
    for number, result in enumerate(results):
        synthetic.pressed(result, 1 + number % 2, lockless=True)
    for result, free in zip(results, ["free_removed_table_count_test", "inline"] * 2, strict=True):
        changes = {"table_free": free, "teardown_walk": "chunked"}
        result.scenario["kernel"] = {"base": LOCKLESS, "set": changes}
        result.histograms = pd.concat(
            [result.histograms, result.histograms.replace({"site": {"age": "x", "fault": "y"}})]
        )

    assert overlaps(figures.draw(name, results)) == []


def test_overlaps_would_be_found():
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")

    assert overlaps(figure) == [("one", "other")]


def test_a_kernel_has_one_colour_everywhere(sweep, rates):
    expected = style.KERNEL_COLOURS[LOCKLESS]

    for ax in (
        panel(figures.lock_distribution(sweep), "fault"),
        figures.deferred_vs_rate(rates).axes[0],
        figures.ageing_scaling(sweep).axes[0],
    ):
        assert to_hex(labelled(ax)[LOCKLESS].get_color()) == expected


def test_colours_differ_and_do_not_depend_on_company():
    names = ["mine", "linux-7.1", "linux-7.1 table_free=inline", LOCKLESS]
    colours = style.variant_colours(names)

    assert list(colours) == names
    assert len(set(colours.values())) == len(names)
    assert colours[LOCKLESS] == style.variant_colours([LOCKLESS])[LOCKLESS]
    assert len(set(style.KERNEL_COLOURS.values())) == len(style.KERNEL_COLOURS)


def test_caption_says_what_was_varied_and_what_was_held(sweep, rates):
    def words(results, shown):
        return caption(results, shown).replace("\u00a0", " ")

    assert words(sweep, sweep.points) == (
        "synthetic · machine ampere-altra · seed 1 · varied: kernel linux-7.1, "
        "linux-7.1-read-locked, linux-7.1-lockless, vcpus 1, 2, 8"
    )
    assert words(rates, rates.points[:4]).endswith(
        "varied: rate 200 / s … 20 / ms · at kernel = linux-7.1"
    )
    one = synthetic.result()
    assert words(one, [one]) == "synthetic · machine ampere-altra · kernel linux-7.1 · seed 1"


def test_a_value_is_not_torn_apart_by_a_line_break(rates):
    assert "20\u00a0/\u00a0ms" in caption(rates, rates.points)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 6 << 20, [i << 20 for i in range(7)]),
        (0, 1_400_000, [0, 262_144, 524_288, 786_432, 1_048_576, 1_310_720]),
        (5, 5, [5]),
    ],
)
def test_binary_ticks(low, high, ticks):
    assert style.binary_ticks(low, high) == ticks


def test_figures_apply_where_they_say_something(sweep, rates, sizes):
    def names(results):
        return [name for name, kind in figures.FIGURES.items() if kind.applies(results)]

    locks = ["lock_hold", "lock_wait"]
    deferred = ["deferred_memory", "deferred_peak"]
    assert names(rates) == [*locks, *deferred, "deferred_vs_rate"]
    assert names(sweep) == [*locks, *deferred, "ageing_scaling"]
    assert names(sizes) == [*locks, *deferred, "callback_cost"]
    assert names(synthetic.result("linux-7.1")) == locks


def test_write_all_writes_what_applies_and_nothing_else(tmp_path):
    paths = figures.write_all(synthetic.result("linux-7.1"), tmp_path / "figures")

    assert paths == [tmp_path / "figures" / f"lock_{q}.png" for q in ("hold", "wait")]
    assert sorted(tmp_path.rglob("*.*")) == sorted(paths)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("ending", figures.FORMATS)
def test_a_figure_is_the_same_file_every_time(tmp_path, ending):
    one, other = (
        figures.write(figures.lock_sites(synthetic.result()).figure, tmp_path / f"{i}.{ending}")
        for i in range(2)
    )

    assert one.read_bytes() == other.read_bytes()


def test_an_unknown_format_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="png, svg, pdf"):
        figures.write(Figure(), tmp_path / "sub" / "a.gif")
    assert not list(tmp_path.iterdir())


def test_an_unknown_figure_names_the_nearest(sweep):
    with pytest.raises(InputError, match=r"unknown figure 'lock_holds' \(did you mean 'lock_hold'"):
        figures.draw("lock_holds", sweep)


def test_a_figure_that_does_not_apply_says_what_it_needs(sweep):
    with pytest.raises(InputError, match="deferred_vs_rate needs a sweep over the rate"):
        figures.draw("deferred_vs_rate", sweep)


def test_figures_show_themselves_in_a_notebook():
    ax = figures.lock_sites(synthetic.result())

    assert ax._repr_png_().startswith(b"\x89PNG")
    assert ax.figure._repr_png_().startswith(b"\x89PNG")
    assert ax.figure.canvas.manager is None, "pyplot holds no reference to it"


def test_drawing_leaves_the_callers_settings_alone():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.lock_sites(synthetic.result())

    assert dict(mpl.rcParams) == before
