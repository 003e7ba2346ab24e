"""Reports for a terminal: one run in the words of lock_stat, one sweep with a row a point.

The reports are rich renderables, of which `simkvm.show.text.render` makes text. Those of a run fit
in 100 columns.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simkvm.scenario.groups import member_names
from simkvm.show import lru_gen
from simkvm.show.distribution import site_figure, together
from simkvm.show.points import (
    AxisOfStudy,
    OneOrMany,
    ResultLike,
    axes_of,
    in_site_order,
    listed,
    reference_label,
    summary_of,
    value_of,
)
from simkvm.show.text import NOTHING, Row, titled_table, wrapped
from simkvm.units import format_count, format_duration, format_size

WIDTH = 100
END_OF_VMS = "End of VMs"
WORK = "Requests and work done"
SELFTEST = "Passes of the selftest"
RECLAIM = "Reclaim, in pages"
KSWAPD = "kswapd's time, by function with what it calls"
DIRECT = "Direct reclaim's time, likewise"
TABLES_AND_RCU = "RCU and stage-2 tables"
CALLBACKS = "What RCU callbacks do"
OOM_KILL = "oom_kill"  #: phases that are the OOM killer's
MOST_VIOLATIONS = 5
PLACE_WIDTH = 30
QUANTITIES = ("wait", "hold")
FIGURES = ("p50", "p99", "max")


def run_report(result: ResultLike) -> Group:
    """Everything about one run: headline, what a selftest prints, guests, ageing, mmu_lock, RCU,
    ends of VMs, safety.
    """
    return Group(
        headline(result),
        *printed(result),
        *killed(result),
        guest_table(result),
        *one_row(result, WORK),
        *one_row(result, RECLAIM),
        *one_row(result, KSWAPD),
        *one_row(result, DIRECT),
        ageing_table(result),
        *lock_tables(result),
        rcu_table(result),
        *teardown_table(result),
        *violations(result),
    )


def headline(result: ResultLike) -> RenderableType:
    """What was run, how long, and whether it was safe."""
    scenario, summary = result.scenario, summary_of(result)
    where = reference_label(scenario.get("machine", "?"))
    kernel = reference_label(scenario.get("kernel", "?"))
    title = f"{scenario.get('name', '')}: {kernel} on {where}, seed {scenario.get('seed', '?')}"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    for name, guest in scenario.get("guests", {}).items():
        grid.add_row("  guest", f"{name}: {describe_guest(guest)}")
    if scenario.get("selftest"):
        grid.add_row("  selftest", wrapped(describe_selftest(scenario["selftest"]), WIDTH - 16))
    events = _count(summary.get("events"))
    grid.add_row("  simulated", f"{_time(summary.get('sim_ns'))} in {events} events")
    grid.add_row("  fingerprint", result.fingerprint)
    if scenario.get("bugs"):
        grid.add_row("  bugs", ", ".join(scenario["bugs"]))
    grid.add_row("  safety", verdict(result))
    return Group(Text(title, "bold"), grid, "")


def printed(result: ResultLike) -> list[RenderableType]:
    """What a KVM selftest prints, line by line as it prints it; nothing for other workloads."""
    phases = getattr(result, "phases", None)
    if phases is None or phases.empty:
        return []
    phases = phases[~phases["name"].isin((*lru_gen.NAMES, OOM_KILL))]
    if phases.empty:
        return []
    said = phases[(phases["line"] != "") | (phases["name"] == "message")]["line"]
    text = "\n".join(said)
    return [Text("As the selftest prints it", "bold"), Text(text), ""]


def killed(result: ResultLike) -> list[RenderableType]:
    """Whom the OOM killer chose, and when; nothing if it had nothing to do."""
    phases = getattr(result, "phases", None)
    if phases is None or phases.empty or not (phases["name"] == OOM_KILL).any():
        return []
    kills = phases[phases["name"] == OOM_KILL]
    rows = [[name, _time(at_ns)] for name, at_ns in kills[["line", "begin_ns"]].values.tolist()]
    return [titled_table("Killed, out of memory", ("guest", "at"), rows)]


def describe_selftest(selftest: Mapping[str, Any]) -> str:
    """One line about a selftest of a resolved scenario: its name and the options that are set."""
    said = {
        key: value
        for key, value in selftest.items()
        if key != "test" and value is not None and value is not False
    }
    options = ", ".join(f"{key} {'yes' if v is True else v}" for key, v in said.items())
    return f"{selftest['test']}: {options}"


def describe_guest(guest: Mapping[str, Any]) -> str:
    """One line about a guest of a resolved scenario."""
    vcpus, count = int(guest.get("vcpus", 1)), int(guest.get("count", 1))
    memory = _size_of(guest.get("memory") or guest.get("memory_per_vcpu"))
    each = "" if guest.get("memory") else " each"
    pages = f"{_size_of(guest.get('page_size', 4096))} pages"
    mapping, page = guest.get("mapping"), guest.get("page_size")
    mapped = f" mapped as {_size_of(mapping)}" if mapping not in (None, page) else ""
    pattern = guest.get("access", {}).get("pattern", "?")
    plural = "vCPU" if vcpus == 1 else "vCPUs"
    times = f"{count} x " if count > 1 else ""
    return f"{times}{vcpus} {plural}, {memory}{each} in {pages}{mapped}, {pattern}"


def verdict(result: ResultLike) -> Text:
    """Clean, violated, and whether that was expected."""
    expected = result.scenario.get("expect", "safe")
    expected_unsafe = expected == "unsafe"
    found = _found(result)
    if not found:
        return (
            Text("clean, though a violation was expected", "yellow")
            if expected_unsafe
            else (Text("clean", "green"))
        )
    text = f"VIOLATED: {found} violation{'s' if found > 1 else ''}"
    if expected == "any":
        return Text(f"{text}, which was the question", "yellow")
    return Text(f"{text}, as expected", "yellow") if expected_unsafe else Text(text, "bold red")


def guest_table(result: ResultLike) -> RenderableType:
    """Touches and faults, one row a guest or group if there are several and samples of each."""
    summary = summary_of(result)
    headers = ["guest", "touches", "touches/s", "faults", "retries", "vCPU wall"]
    rows = [
        [
            "all" if len(set(_labels(result).values())) > 1 else _only_guest(result),
            _count(summary.get("touches")),
            _count(summary.get("touches_per_s")),
            _count(summary.get("faults")),
            _count(summary.get("fault_retries")),
            _time(summary.get("vcpu_wall_ns")),
        ]
    ]
    return titled_table("Guests", headers, [*_rows_by_guest(result), *rows])


def one_row(result: ResultLike, title: str) -> list[RenderableType]:
    """A table of a sweep for one run; nothing if no column has anything to say."""
    shown = [(header, cell(result)) for header, cell in SWEEP_TABLES[title]]
    shown = [(header, found) for header, found in shown if found != NOTHING]
    if not shown:
        return []
    headers, row = zip(*shown, strict=True)
    return [titled_table(title, headers, [row], left=0)]


def ageing_table(result: ResultLike) -> RenderableType:
    """Ageing passes over each guest, those over the guests of a group together."""
    passes = result.passes
    if passes.empty:
        return Group(Text("Ageing", "bold"), "  no pass was completed", "")
    headers = [
        *("guest", "passes", "mean", "p50", "max"),
        *("pages\nscanned", "young", "young\nshare", "calls"),
    ]
    return titled_table(
        "Ageing passes",
        headers,
        [_ageing_row(*group) for group in passes.groupby(_labelled(result, passes["guest"]))],
    )


def lock_tables(result: ResultLike) -> list[RenderableType]:
    """Acquisitions, contention, waits and holds by call site and mode.

    A table a lock and guest; the locks of the guests of a group are shown together.
    """
    locks = result.locks
    if locks.empty:
        return [Group(Text("mmu_lock", "bold"), "  was never taken", "")]
    label = _labelled(result, locks["guest"])
    several = locks["guest"].nunique() > 1
    headers = [
        *("site", "mode", "acqui-\nsitions", "con-\ntended"),
        *(f"{quantity}\n{figure}" for quantity in QUANTITIES for figure in FIGURES),
        "queue\nmax",
    ]
    return [
        titled_table(
            f"{lock}{f' of {guest}' if several else ''}, by call site and mode",
            headers,
            _lock_rows(_one_lock(result, table)),
            left=2,
        )
        for (lock, guest), table in locks.groupby(["lock", label])
    ]


def rcu_table(result: ResultLike) -> RenderableType:
    """Grace periods, callbacks, and the table memory that waits for them."""
    summary = summary_of(result)
    headers = [
        *("grace\nperiods", "p50", "p99", "call-\nbacks"),
        *("deferred\ntables\nmean", "peak", "deferred\nbytes\nmean", "peak"),
        *("tables\nallocated", "freed"),
    ]
    row = [
        _count(summary.get("grace_periods")),
        _grace(summary, "p50"),
        _grace(summary, "p99"),
        _count(summary.get("callbacks")),
        _count(summary.get("deferred_tables_mean")),
        _count(summary.get("deferred_tables_peak")),
        _size(summary.get("deferred_bytes_mean")),
        _size(summary.get("deferred_bytes_peak")),
        _count(summary.get("tables_allocated")),
        _count(summary.get("tables_freed")),
    ]
    return titled_table("RCU and stage-2 tables", headers, [row], left=0)


def teardown_table(result: ResultLike) -> list[RenderableType]:
    """The walk that freed a tree; nothing if no VM came to its end."""
    if not _ends_a_vm(result):
        return []
    summary = summary_of(result)
    row = [
        _time(summary.get("teardown_longest_ns")),
        _time(summary.get("teardown_walk_ns")),
        _count(summary.get("teardown_visits")),
    ]
    headers = ["longest stretch", "walk", "entries visited"]
    return [titled_table(END_OF_VMS, headers, [row], left=0)]


def violations(result: ResultLike) -> list[RenderableType]:
    """The first violations with the events that led to them, oldest first; nothing if clean."""
    found = result.violations
    if not found:
        return []
    parts: list[RenderableType] = [Text("Safety", "bold")]
    for i, violation in enumerate(found[:MOST_VIOLATIONS], start=1):
        parts += _violation(i, violation)
    if len(found) > MOST_VIOLATIONS:
        parts.append(f"  and {_found(result) - MOST_VIOLATIONS} more")
    return [*parts, ""]


def sweep_report(results: OneOrMany, failed: Iterable[Mapping[str, Any]] = ()) -> Group:
    """A sweep with a row a point: guests and ageing; mmu_lock; ends of VMs; RCU and memory.

    `failed`: points without a result, as mappings with `axes` and `reason`.
    """
    points = listed(results)
    parts: list[RenderableType] = []
    if points:
        axes = list(axes_of(points).values())
        for title, columns in SWEEP_TABLES.items():
            if title not in NEEDS or any(map(NEEDS[title], points)):
                parts += _sweep_table(title, columns, points, axes)
    for failure in failed:
        place = ", ".join(f"{key}={reference_label(v)}" for key, v in failure["axes"].items())
        parts.append(Text(f"failed: {place or 'the point'}: {failure['reason']}", "red"))
    return Group(*parts) if parts else Group("no finished point")


def _labels(result: ResultLike) -> dict[str, str]:
    """What reports call each guest: its name, or that of its group and how many there are."""
    return {
        member: name if (count := int(guest.get("count", 1))) == 1 else f"{name} ({count})"
        for name, guest in result.scenario.get("guests", {}).items()
        for member in member_names(name, int(guest.get("count", 1)))
    }


def _labelled(result: ResultLike, guests: pd.Series[Any]) -> pd.Series[Any]:
    labels = _labels(result)
    return guests.map(lambda guest: labels.get(guest, guest))


def _one_lock(result: ResultLike, table: pd.DataFrame) -> pd.DataFrame:
    """A row a site and mode, whether the rows are those of one guest's lock or of several."""
    guests = set(table["guest"])
    if len(guests) == 1:
        return table
    histograms = result.histograms
    ours = histograms["guest"].isin(guests) & histograms["lock"].isin(set(table["lock"]))
    return together(table, histograms[ours])


def _only_guest(result: ResultLike) -> str:
    return next(iter(_labels(result).values()), "all")


def _rows_by_guest(result: ResultLike) -> list[Row]:
    series = getattr(result, "series", None)
    labels = _labels(result)
    if series is None or series.empty or len(labels) < 2:
        return []
    last = series.sort_values("t_ns", kind="stable").groupby("guest", sort=False).last()
    groups = last.groupby(last.index.map(lambda guest: labels.get(guest, guest)), sort=False)
    rows: list[Row] = []
    for label, members in groups:
        if len(groups) > 1:
            rows.append(_guest_row(str(label), {**members.sum(), "t_ns": members["t_ns"].max()}))
        if len(members) > 1:
            by_touches = members.sort_values("touches", kind="stable")
            rows.append(_guest_row(f"  least: {by_touches.index[0]}", by_touches.iloc[0]))
            rows.append(_guest_row(f"  most: {by_touches.index[-1]}", by_touches.iloc[-1]))
    return rows


def _guest_row(name: str, sample: Mapping[str, Any] | pd.Series[Any]) -> Row:
    return [
        name,
        _count(sample["touches"]),
        _count(sample["touches"] / (sample["t_ns"] / 1e9)) if sample["t_ns"] else NOTHING,
        _count(sample["faults"]),
        _count(sample["retries"]),
        NOTHING,
    ]


def _ageing_row(guest: object, passes: pd.DataFrame) -> Row:
    took = passes["end_ns"] - passes["start_ns"]
    scanned, young = int(passes["scanned"].sum()), int(passes["young"].sum())
    return [
        str(guest),
        _count(len(passes)),
        _time(took.mean()),
        _time(took.median()),
        _time(took.max()),
        _count(scanned),
        _count(young),
        f"{young / scanned:.1%}" if scanned else NOTHING,
        _count(passes["calls"].sum()),
    ]


def _lock_rows(table: pd.DataFrame) -> list[Row]:
    place = {site: i for i, site in enumerate(in_site_order(table["site"]))}
    rows = table.assign(place=table["site"].map(place)).sort_values(["place", "mode"])
    return [
        [
            str(row["site"]),
            str(row["mode"]),
            _count(row["acquisitions"]),
            f"{row['contended'] / row['acquisitions']:.1%}" if row["acquisitions"] else NOTHING,
            *(_time(row[f"{q}_{f}_ns"]) for q in QUANTITIES for f in FIGURES),
            _count(row["queue_max"]),
        ]
        for _, row in rows.iterrows()
    ]


def _violation(i: int, violation: Mapping[str, Any]) -> list[RenderableType]:
    kind = str(violation.get("kind", "violation")).replace("_", " ")
    head = f"{i}. {kind} at {_time(violation.get('time_ns'))}"
    if violation.get("guest"):
        head += f", guest {violation['guest']}"
    said = textwrap.wrap(str(violation.get("message", "")), WIDTH - 5)
    return [
        Text(f"  {head}", "red"),
        *(Text(f"     {line}") for line in said),
        *(Text(f"       {event}") for event in violation.get("timeline", [])),
    ]


Cell = Callable[[ResultLike], str]


def _figure(column: str, text: Callable[[Any], str]) -> Cell:
    return lambda result: text(summary_of(result).get(column))


def _of_passes(column: str) -> Cell:
    """A time about ageing passes; nothing if there was none."""

    def cell(result: ResultLike) -> str:
        summary = summary_of(result)
        return _time(summary.get(column)) if summary.get("ageing_passes") else NOTHING

    return cell


def _at_site(site: str, quantity: str, figure: str) -> Cell:
    return lambda result: _time(site_figure([result], site, quantity, figure))


def _sweep_table(
    title: str,
    columns: Sequence[tuple[str, Cell]],
    points: Sequence[ResultLike],
    axes: Sequence[AxisOfStudy],
) -> list[RenderableType]:
    """Axes, replications and those columns in which any point has something to say, if any."""
    places = {
        axis.name: [wrapped(value_of(point, axis.key), PLACE_WIDTH) for point in points]
        for axis in axes
    }
    repeated = [str(point.scenario.get("replication", 0)) for point in points]
    if len(set(repeated)) > 1:
        places["rep"] = repeated
    shown = [(header, [cell(point) for point in points]) for header, cell in columns]
    shown = [(header, found) for header, found in shown if set(found) != {NOTHING}]
    if not shown:
        return []
    headers = [*places, *(header for header, _ in shown)]
    rows = zip(*places.values(), *(found for _, found in shown), strict=True)
    return [titled_table(title, headers, rows, left=len(places))]


def _grace(summary: Mapping[str, Any], figure: str) -> str:
    """A percentile of grace periods; nothing if there was none, whatever the summary says of it."""
    return (
        _time(summary.get(f"grace_period_{figure}_ns")) if summary.get("grace_periods") else NOTHING
    )


def _frees_tables(result: ResultLike) -> bool:
    summary = summary_of(result)
    return bool(summary.get("tables_freed") or summary.get("callbacks"))


def _has_callbacks(result: ResultLike) -> bool:
    return bool(summary_of(result).get("callbacks"))


def _found(result: ResultLike) -> int:
    """Violations, those included that the oracle only counted."""
    return max(len(result.violations), int(summary_of(result).get("violations") or 0))


def _ends_a_vm(result: ResultLike) -> bool:
    return bool(summary_of(result).get("teardown_walk_ns"))


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _time(value: Any) -> str:
    return NOTHING if _missing(value) else format_duration(round(value))


def _time_spent(value: Any) -> str:
    return _time(value) if value else NOTHING


def _count_made(value: Any) -> str:
    return _count(value) if value else NOTHING


def _size(value: Any) -> str:
    return NOTHING if _missing(value) else format_size(round(value))


def _count(value: Any) -> str:
    return NOTHING if _missing(value) else format_count(value)


def _some(value: Any) -> str:
    """A count of what most runs have none of."""
    return _count(value) if value else NOTHING


def _share(value: Any) -> str:
    """A share in percent; nothing for none at all."""
    return NOTHING if _missing(value) or not value else f"{100 * value:.3g}%"


def _quotient(value: Any) -> str:
    return NOTHING if _missing(value) else f"{value:.3g}"


def _size_of(value: object) -> str:
    return format_size(value) if isinstance(value, int) else str(value)


def _functions(whose: str) -> tuple[tuple[str, Cell], ...]:
    """Shares of the time of ``whose`` reclaim by function."""
    titles = {
        **{"folio_referenced": "folio_\nreferenced", "look_around": "look_\naround"},
        **{"notifier": "notifier", "write_lock": "write\nlock", "read_lock": "read\nlock"},
        **{"ageing": "ageing\nwalk", "unmap": "unmap", "compression": "compres-\nsion"},
        "swap_writepage": "swap\nwrite",
    }
    return tuple(
        (title, _figure(f"{whose}_share_{name}_ratio", _share)) for name, title in titles.items()
    )


SWEEP_TABLES: dict[str, tuple[tuple[str, Cell], ...]] = {
    "Guests and ageing": (
        ("touches/s", _figure("touches_per_s", _count)),
        ("vCPU\nwall", _figure("vcpu_wall_ns", _time)),
        ("faults", _figure("faults", _count)),
        ("retries", _figure("fault_retries", _count)),
        ("access\nfaults", _figure("access_faults", _some)),
        ("failed\ncmpxchgs", _figure("failed_cmpxchgs", _some)),
        ("pass\nmean", _of_passes("ageing_pass_mean_ns")),
        ("max", _of_passes("ageing_pass_max_ns")),
        ("a page", _of_passes("ageing_ns_per_page")),
        ("safety", _figure("safety", str)),
    ),
    WORK: (
        ("requests", _figure("requests", _count_made)),
        ("requests/s", _figure("requests_per_s", _count)),
        ("latency\nmean", _figure("latency_mean_ns", _time)),
        ("p50", _figure("latency_p50_ns", _time)),
        ("p99", _figure("latency_p99_ns", _time)),
        ("p99.9", _figure("latency_p999_ns", _time)),
        ("max", _figure("latency_max_ns", _time)),
        ("bytes/s", _figure("bytes_per_s", _size)),
        ("loads/s", _figure("loads_per_s", _count)),
    ),
    SELFTEST: (
        ("run 1", _figure("run1_ns", _time)),
        ("reset", _figure("reset_ns", _time)),
        ("run 2", _figure("run2_ns", _time)),
    ),
    RECLAIM: (
        ("scanned\nkswapd", _figure("pgscan_kswapd", _count_made)),
        ("direct", _figure("pgscan_direct", _count_made)),
        ("stolen\nkswapd", _figure("pgsteal_kswapd", _count_made)),
        ("direct", _figure("pgsteal_direct", _count_made)),
        ("swapped\nin", _figure("pswpin", _count_made)),
        ("out", _figure("pswpout", _count_made)),
        ("alloc\nstalls", _figure("allocstall", _count_made)),
        ("stalled\nsome", _figure("psi_some_ratio", _share)),
        ("full", _figure("psi_full_ratio", _share)),
        ("mmu_lock\nwrites\na page", _figure("mmu_lock_writes_per_stolen_page", _quotient)),
        ("OOM\nkills", _figure("oom_kills", _count_made)),
    ),
    KSWAPD: (
        ("busy", _figure("kswapd_busy_ratio", _share)),
        *_functions("kswapd"),
    ),
    DIRECT: (
        ("in all", _figure("direct_reclaim_ns_total", _time_spent)),
        *_functions("direct_reclaim"),
    ),
    "mmu_lock": (
        ("fault\nwait\np50", _at_site("fault", "wait", "p50")),
        ("p99", _at_site("fault", "wait", "p99")),
        ("max", _at_site("fault", "wait", "max")),
        ("age\nwait\np99", _at_site("age", "wait", "p99")),
        ("hold\np99", _at_site("age", "hold", "p99")),
        ("range_start\nhold\np99", _at_site("range_start", "hold", "p99")),
        ("max", _at_site("range_start", "hold", "max")),
    ),
    END_OF_VMS: (
        ("longest\nstretch", _figure("teardown_longest_ns", _time_spent)),
        ("walk", _figure("teardown_walk_ns", _time_spent)),
        ("visits", _figure("teardown_visits", _count_made)),
        ("violations", _figure("violations", _count)),
    ),
    TABLES_AND_RCU: (
        ("grace\nperiod\np50", lambda result: _grace(summary_of(result), "p50")),
        ("p99", lambda result: _grace(summary_of(result), "p99")),
        ("call-\nbacks", _figure("callbacks", _count)),
        ("deferred\nmean", _figure("deferred_bytes_mean", _size)),
        ("peak", _figure("deferred_bytes_peak", _size)),
        ("tables\nfreed", _figure("tables_freed", _count)),
    ),
    CALLBACKS: (
        ("call-\nbacks", _figure("callbacks", _count)),
        ("time\nin all", _figure("callback_ns_total", _time)),
        ("a table", _figure("callback_ns_per_table", _time)),
        ("a GiB\nunmapped", _figure("callback_ns_per_unmapped_gib", _time)),
        ("tables\ncollapsed", _figure("collapses", _count)),
        ("tables\nleaked", _figure("tables_leaked", _count)),
    ),
}
"""The tables of a sweep: each column's header and its cell of a point."""

NEEDS: dict[str, Callable[[ResultLike], bool]] = {
    END_OF_VMS: _ends_a_vm,
    TABLES_AND_RCU: _frees_tables,
    CALLBACKS: _has_callbacks,
}
"""Tables that are shown only if some point has to do with them."""
