"""Are the texts of the kernel's tools read as they are meant, and is anything else refused?"""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from simkvm.cli import main
from simkvm.measure import observation
from simkvm.measure.observation import FEWEST_BITS, WHAT, Observation, Tallies, Tally
from simkvm.measure.read import read, read_all
from simkvm.scenario.errors import InputError

MEASURED = Path(__file__).parents[1] / "measured"


def observed(tmp_path: Path, text: str, phase: str = "") -> dict[tuple[str, str], Observation]:
    path = tmp_path / "measured.txt"
    path.write_text(text)
    return {(row.what, row.key): row for row in read(str(path), phase)}


def refused(tmp_path: Path, text: str | bytes) -> InputError:
    path = tmp_path / "bad.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError) as caught:
        read(str(path))
    assert caught.value.file == str(path)
    return caught.value


# --- Distributions ---


def test_quantiles_are_exact_while_values_are_few() -> None:
    tally = Tally()
    for value in (30, 10, 20, 40):
        tally.add(value)
    row = tally.observation("function", "f")
    assert (row.n, row.min_ns, row.max_ns, row.mean_ns, row.sum_ns) == (4, 10, 40, 25, 100)
    assert (row.p10_ns, row.p50_ns, row.p90_ns, row.p99_ns) == (10, 20, 40, 40)


def test_a_tally_of_many_values_stays_small_and_close() -> None:
    rng, tally = random.Random(1), Tally()
    values = [int(rng.lognormvariate(9, 2)) * 1000 + rng.randrange(1000) for _ in range(200_000)]
    for value in values:
        tally.add(value)
    assert len(tally.counts) <= observation.MOST_DISTINCT
    assert (tally.n, tally.total, tally.largest) == (len(values), sum(values), max(values))
    values.sort()
    for q in (0.1, 0.5, 0.9, 0.99):
        assert tally.quantile(q) == pytest.approx(values[int(q * len(values))], rel=2**-FEWEST_BITS)


def test_keys_beyond_the_most_go_together() -> None:
    tallies = Tallies(most=2)
    for key in "abcdca":
        tallies.add("hold", key, "", 5)
    assert {row.key: row.n for row in tallies.observations()} == {"a": 2, "b": 1, "(others)": 3}


# --- ftrace ---

GRAPH = """\
# tracer: function_graph
#
#     TIME        CPU  TASK/PID         DURATION                  FUNCTION CALLS
    1.000000 |   0)   labvm-10     |   0.912 us    |  leaf();
    1.000001 |   0)   labvm-10     |               |  outer() {
    1.000002 |   0)   labvm-10     | + 12.000 us   |    leaf();
    1.000003 |   0)   labvm-10     |               |    middle() {
 ------------------------------------------
 0)   labvm-10     =>    <idle>-0
 ------------------------------------------

    1.000004 |   0)    <idle>-0    |               |  other() {
    1.000005 |   0)    <idle>-0    |   3.000 us    |  }
    1.000006 |   0)   labvm-10     |   5.500 us    |    } /* middle */
    1.000007 |   0)   labvm-10     | ! 123.456 us  |  }
    1.000008 |   0)   labvm-10     |               |  evented() {
    1.000009 |   0)   labvm-10     |               |    /* kvm_age_hva: mmu notifier age hva: 0x1 */
    1.000010 |   0)   labvm-10     |   2.000 us    |  }
    1.000011 |   0)   labvm-10     |   9.000 us    |  } /* begun_before */
"""


def test_a_call_tree_gives_durations_and_tells_leaves_from_the_rest(tmp_path: Path) -> None:
    rows = observed(tmp_path, GRAPH)
    assert rows["function", "leaf"].n == 2
    assert (rows["function", "leaf"].min_ns, rows["function", "leaf"].max_ns) == (912, 12_000)
    assert rows["function", "middle"].sum_ns == 5500
    assert rows["function", "other"].sum_ns == 3000
    assert rows["function_outer", "outer"].sum_ns == 123_456
    assert rows["function_outer", "evented"].sum_ns == 2000
    assert rows["function_outer", "begun_before"].sum_ns == 9000
    assert rows["count", "kvm_age_hva"].n == 1
    assert len(rows) == 7


def test_the_short_form_without_times_and_tasks(tmp_path: Path) -> None:
    rows = observed(
        tmp_path,
        " 0)               |  outer() {\n"
        " 1)   7.000 us    |  leaf [kvm]();\n"
        " 0)   1.000 us    |    leaf [kvm]();\n"
        " 0) + 20.000 us   |  }\n"
        " 0)   ==========> |\n"
        " 0)   2.000 us    |  leaf(kvm=0x12, x=3); /* = 0x0 */\n",
    )
    assert rows["function", "leaf"].sum_ns == 10_000
    assert rows["function_outer", "outer"].sum_ns == 20_000


def test_the_idle_tasks_of_two_cpus_are_two(tmp_path: Path) -> None:
    rows = observed(
        tmp_path,
        "    1.0 |   0)    <idle>-0    |               |  a() {\n"
        "    1.1 |   1)    <idle>-0    |               |  b() {\n"
        "    1.2 |   0)    <idle>-0    |   1.000 us    |  }\n"
        "    1.3 |   1)    <idle>-0    |   2.000 us    |  }\n",
    )
    assert {key: row.sum_ns for (_, key), row in rows.items()} == {"a": 1000, "b": 2000}


def test_lost_events_end_all_open_calls(tmp_path: Path) -> None:
    """What ends after a gap may be another call than what began before."""
    rows = observed(
        tmp_path,
        " 0)               |  a() {\nCPU:0 [LOST 12 EVENTS]\n 0)   1.000 us    |  }\n"
        " 0)   1.000 us    |  b();\n",
    )
    assert list(rows) == [("function", "b")]
    assert "1 calls ended" in rows["function", "b"].note


def test_trace_cmd_report_gives_the_same_as_the_trace_file(tmp_path: Path) -> None:
    report = (
        "cpus=4\n"
        "    labvm-10    [000]  1.000001: funcgraph_entry:                   |  outer() {\n"
        "    labvm-10    [000] d..1.  1.000002: funcgraph_entry:      + 12.000 us  |    leaf();\n"
        "    labvm-10    [000]  1.000007: funcgraph_exit:       ! 123.456 us |  }\n"
    )
    rows = observed(tmp_path, report)
    assert rows["function", "leaf"].sum_ns == 12_000
    assert rows["function_outer", "outer"].sum_ns == 123_456


def test_an_event_inside_a_call_costs_it_time_too(tmp_path: Path) -> None:
    report = (
        "    labvm-10    [000]  1.000001: funcgraph_entry:                   |  outer() {\n"
        "    labvm-10    [000]  1.000002: kvm_age_hva:  mmu notifier age hva: 0x1 -- 0x2\n"
        "    labvm-10    [000]  1.000007: funcgraph_exit:       ! 123.456 us |  }\n"
    )
    rows = observed(tmp_path, report)
    assert set(rows) == {("function_outer", "outer"), ("count", "kvm_age_hva")}


EVENTS = """\
# tracer: nop
      qemu-7    [001] d..1.   5.000010: contention_begin: 00000000e811deab (flags=SPIN|WRITE)
      qemu-8    [002] d..1.   5.000011: contention_begin: 00000000e811deab (flags=SPIN|READ)
      qemu-7    [001] d..1.   5.000014: contention_end: 00000000e811deab (ret=0)
      qemu-8    [002] d..1.   5.000020: contention_end: 00000000e811deab (ret=0)
      qemu-8    [002] .....   5.000030: kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x0000
      qemu-8    [002] .....   5.000037: kvm_entry: PC: 0x0000000000000000
      qemu-9    [002] .....   5.000040: kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x0 info1 0x0
      qemu-9    [002] .....   5.000049: kvm_entry: vcpu 0, rip 0x0
  rcu_preempt-16 [000] ..... 6.000000: rcu_grace_period: rcu_preempt 3317 start
  rcu_preempt-16 [000] ..... 6.008100: rcu_grace_period: rcu_preempt 3317 end
  rcu_preempt-16 [000] ..... 6.008200: rcu_grace_period: rcu_preempt 3321 end
   ksoftirqd-3  [003] ..s1.   6.100000: rcu_batch_start: rcu_preempt CBs=45 bl=10
   ksoftirqd-3  [003] ..s1.   6.100090: rcu_batch_end: rcu_preempt CBs-invoked=45 idle=.SI.
      qemu-7    [001] d....   7.000000: age: (kvm_age_gfn+0x0/0x70) kvm=0xffff0000c0b0d090
      qemu-7    [001] d....   7.000001: wl: (_raw_write_lock+0x0/0x70) lock=0xffff0000c0b0d090
      qemu-7    [001] d..1.   7.000004: wu: (_raw_write_unlock+0x0/0x70) lock=0xffff0000c0b0d090
      qemu-7    [001] d..1.   7.000005: wu: (_raw_write_unlock+0x0/0x70) lock=0xffff0000c0b0d090
      qemu-7    [001] d..1.   7.000006: wl: (_raw_write_lock+0x0/0x70) lock=0xffff800080b89000
"""


def test_pairs_of_events_become_waits_holds_exits_and_grace_periods(tmp_path: Path) -> None:
    rows = observed(tmp_path, EVENTS)
    times = {place: (row.n, row.sum_ns) for place, row in rows.items() if place[0] != "count"}
    assert times == {
        ("wait", "rwlock:W"): (1, 4000),
        ("wait", "rwlock:W 00000000e811deab"): (1, 4000),
        ("wait", "rwlock:R"): (1, 9000),
        ("wait", "rwlock:R 00000000e811deab"): (1, 9000),
        ("exit", "DABT_LOW"): (1, 7000),
        ("exit", "EPT_VIOLATION"): (1, 9000),
        ("grace_period", "rcu_preempt"): (1, 8_100_000),
        ("callback", "rcu_preempt"): (1, 2000),
        ("hold", "rwlock:W mmu_lock"): (1, 3000),
    }
    assert rows["count", "wu (_raw_write_unlock)"].n == 2


def test_a_marker_says_what_the_host_does(tmp_path: Path) -> None:
    path = tmp_path / "marked"
    path.write_text(
        "    1.0 |   0)   sh-1     |               |  /* simkvm begin age_page */\n"
        "    1.1 |   0)   x-2      |   1.000 us    |  f();\n"
        "    1.2 |   0)   sh-1     |               |  /* simkvm end */\n"
        "    1.3 |   0)   x-2      |   2.000 us    |  f();\n"
    )
    phases = {row.phase: row.sum_ns for row in read(str(path)) if row.key == "f"}
    assert phases == {"age_page": 1000, "": 2000}
    path.write_text(path.read_text().replace("age_page", "age_pages"))
    with pytest.raises(InputError, match="unknown phase 'age_pages'") as caught:
        read(str(path))
    assert caught.value.hint == "age_page"


@pytest.mark.parametrize("name", sorted(path.name for path in MEASURED.glob("*.gz")))
def test_real_traces_are_read_to_their_last_line(name: str) -> None:
    assert read(str(MEASURED / name))


def test_a_real_trace_has_the_calls_that_a_search_counts() -> None:
    text = gzip.decompress((MEASURED / "fault-present.trace.gz").read_bytes()).decode()
    rows = {row.key: row for row in read(str(MEASURED / "fault-present.trace.gz"))}
    abort = rows["kvm_handle_guest_abort"]
    assert abort.n == text.count("kvm_handle_guest_abort();") > 300
    assert abort.p50_ns == 4112


def test_real_holds_are_those_of_the_text() -> None:
    text = gzip.decompress((MEASURED / "locks.trace.gz").read_bytes()).decode()
    rows = read(str(MEASURED / "locks.trace.gz"))
    taken = sum(row.n for row in rows if row.what == "hold")
    assert taken == text.count(" ru: ") + text.count(" wu: ") > 300


def test_an_unknown_line_of_a_trace_is_an_error(tmp_path: Path) -> None:
    error = refused(tmp_path, GRAPH + "what is this\n")
    line = GRAPH.count("\n") + 1
    assert (error.line, error.message) == (line, "not a line of ftrace: 'what is this'")


# --- lock_stat ---

LOCK_STAT = (MEASURED / "lock_stat").read_text()


def test_lock_stat_gives_waits_holds_and_sites(tmp_path: Path) -> None:
    rows = observed(tmp_path, LOCK_STAT)
    wait = rows["wait", "&kvm->mmu_lock-W"]
    assert (wait.n, wait.min_ns, wait.max_ns, wait.mean_ns) == (15, 250, 10_500, 4000)
    assert wait.p50_ns is None
    hold = rows["hold", "&kvm->mmu_lock-R"]
    assert (hold.n, hold.min_ns, hold.max_ns, hold.sum_ns) == (200, 500, 1000, 140_000)
    assert ("wait", "&kvm->mmu_lock-R") not in rows
    assert rows["count", "&kvm->mmu_lock waited at user_mem_abort+0x3a0/0xa00"].n == 6
    assert rows["count", "&kvm->mmu_lock waited for at user_mem_abort+0x3a0/0xa00"].n == 15


def test_lock_stat_with_a_number_too_few_is_an_error(tmp_path: Path) -> None:
    assert refused(tmp_path, LOCK_STAT.replace("          10.50", "")).line == 6
    assert refused(tmp_path, LOCK_STAT.replace("version 0.4", "version 9")).line == 1


# --- perf lock contention ---

PERF = """\
 contended   total wait     max wait     avg wait         type   caller

        19    194.23 us     21.41 us     10.22 us   rwlock:W   kvm_mmu_notifier_clear_young+0x98
         2      1.50 ms      1.00 ms    750.00 us   rwsem:R   do_user_addr_fault+0x40e

=== output for debug ===

bad: 0, total: 3
"""
PERF_CSV = """\
# output: contended, total wait, max wait, avg wait, type, caller
19, 194230, 21410, 10220, rwlock:W, kvm_mmu_notifier_clear_young+0x98
2, 1500000, 1000000, 750000, rwsem:R, do_user_addr_fault+0x40e
"""
WAITS = {
    ("wait", "rwlock:W kvm_mmu_notifier_clear_young+0x98"): (19, 194_230, 21_410, 10_220),
    ("wait", "rwsem:R do_user_addr_fault+0x40e"): (2, 1_500_000, 1_000_000, 750_000),
}


@pytest.mark.parametrize("text", [PERF, PERF_CSV, PERF_CSV.replace(", ", ";")])
def test_perf_lock_contention_as_text_and_as_csv(tmp_path: Path, text: str) -> None:
    rows = observed(tmp_path, text)
    found = {place: (r.n, r.sum_ns, r.max_ns, r.mean_ns) for place, r in rows.items()}
    assert found == WAITS


def test_perf_by_lock_and_with_other_columns(tmp_path: Path) -> None:
    text = (
        "[ perf record: Captured and wrote 1 MB ]\n"
        " contended   avg wait              address   symbol\n\n"
        "  3   5.00 us     ffff8a1b2c3d4e00   mmu_lock (rwlock)\n"
    )
    rows = observed(tmp_path, text)
    row = rows["wait", "ffff8a1b2c3d4e00 mmu_lock (rwlock)"]
    assert (row.n, row.mean_ns, row.sum_ns) == (3, 5000, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (PERF.replace("194.23 us", "194.23"), 3),
        (PERF_CSV.replace("1500000", "x"), 3),
        (PERF_CSV.replace("19,", "19"), 2),
    ],
)
def test_a_malformed_line_of_perf_is_an_error(tmp_path: Path, text: str, line: int) -> None:
    assert refused(tmp_path, text).line == line


# --- bpftrace ---

BPFTRACE = """\
Attaching 4 probes...
^C

@calls: 77
@hold_ns[age]:
[256, 512)             10 |@@@@                                                |
[512, 1K)              90 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|
[1K, 2K)                0 |                                                    |

@function_us[kvm_age_gfn, write]:
[10, 20)                1 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|
[20, ...)               1 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|

@wait_ns[age]: count 4, average 25, total 100
@sizes:
[0]                     5 |@@@@@                                               |
[1]                     5 |@@@@@                                               |
"""


def test_bpftrace_histograms_stats_and_counts(tmp_path: Path) -> None:
    rows = observed(tmp_path, BPFTRACE)
    hold = rows["hold", "age"]
    assert (hold.n, hold.min_ns, hold.max_ns, hold.mean_ns) == (100, 256, 1023, None)
    assert hold.p10_ns == 511
    assert hold.p50_ns == pytest.approx(512 + 511 * 40 / 90)
    assert rows["function", "kvm_age_gfn, write"].max_ns == 39_000
    assert (rows["wait", "age"].n, rows["wait", "age"].mean_ns) == (4, 25)
    assert rows["count", "@calls"].n == 77
    assert (rows["value", "@sizes"].n, rows["value", "@sizes"].p90_ns) == (10, 1)


def test_a_malformed_bucket_is_an_error(tmp_path: Path) -> None:
    assert refused(tmp_path, BPFTRACE.replace("[512, 1K)  ", "[512, 1K  ")).line == 7
    assert refused(tmp_path, BPFTRACE.replace("[512, 1K)  ", "[128, 256)")).line == 7


# --- Files ---


def test_anything_else_is_refused_with_a_place(tmp_path: Path) -> None:
    error = refused(tmp_path, "\nDear diary,\n")
    assert error.line == 2
    assert "neither ftrace" in error.message
    assert refused(tmp_path, "").message == "is empty"
    assert "is not text" in refused(tmp_path, b"\0\1\2").message
    assert "trace-cmd report" in refused(tmp_path, b"\x17\x08\x44tracing6\0").message
    assert "perf lock contention -i" in refused(tmp_path, b"PERFILE2\0").message
    assert refused(tmp_path, gzip.compress(GRAPH.encode())[:-20]).message.startswith("incomplete")


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text(GRAPH)
    with pytest.raises(InputError) as caught:
        read(str(tmp_path / "trace.tx"))
    assert (caught.value.message, caught.value.hint) == ("no such file", "trace.txt")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_observations_come_back_from_a_file(tmp_path: Path, suffix: str) -> None:
    rows = [*read(str(MEASURED / "unmap-nested.trace.gz"), "unmap_table")]
    (tmp_path / "stat").write_text(LOCK_STAT)
    rows += read(str(tmp_path / "stat"))
    path = str(tmp_path / f"kept.{suffix}")
    observation.write(rows, path)
    assert read(path) == rows


def test_a_wrong_file_of_observations_is_refused(tmp_path: Path) -> None:
    head = ",".join(observation.COLUMNS)
    assert refused(tmp_path, f"{head}\nhold,age,x{',' * 12}\n").line == 2
    assert refused(tmp_path, f"{head}\nholds,age,1{',' * 12}\n").hint == "hold"
    assert refused(tmp_path, f"{head}\nhold,age\n").line == 2
    assert refused(tmp_path, '[\n{"what": 1,}\n]').line == 2


def test_memory_does_not_grow_with_a_trace(tmp_path: Path) -> None:
    def peak(repeats: int) -> int:
        path = tmp_path / "long.gz"
        body = "".join(GRAPH.splitlines(keepends=True)[3:])
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.write("# tracer: function_graph\n")
            for _ in range(repeats):
                file.write(body)
        tracemalloc.start()
        read(str(path))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(2000) < peak(100) + 50_000


# --- The command ---


def test_the_command_prints_and_keeps(tmp_path: Path) -> None:
    out = tmp_path / "kept.csv"
    trace = str(MEASURED / "age-held.trace.gz")
    ran = CliRunner().invoke(main, ["import", "ftrace", trace, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "kvm_age_gfn" in ran.output
    assert read(str(out)) == read(trace)
    as_json = CliRunner().invoke(main, ["import", "ftrace", trace, "--json"])
    assert json.loads(as_json.output) == observation.document(read(trace))


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing\n")
    out = tmp_path / "kept.csv"
    args = ["import", "ftrace", str(tmp_path / "x"), "--out", str(out)]
    ran = CliRunner().invoke(main, args)
    assert ran.exit_code == 2
    assert ran.output.startswith(f"{tmp_path}/x:1: neither ftrace")
    assert ran.output.count("\n") == 1
    assert not out.exists()
    with pytest.raises(InputError) as caught:
        read_all([f"fault_presnt={MEASURED / 'map.trace.gz'}"])
    assert caught.value.hint == "fault_present"


SAMPLES = {
    "graph": GRAPH,
    "events": EVENTS,
    "lock_stat": LOCK_STAT,
    "perf": PERF,
    "perf csv": PERF_CSV,
    "bpftrace": BPFTRACE,
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_damaged_text_is_read_or_refused_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    text = SAMPLES[name]
    at = data.draw(st.integers(0, len(text) - 1))
    until = data.draw(st.integers(at, min(len(text), at + 40)))
    put = data.draw(st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=6))
    path = tmp_path_factory.mktemp("damaged") / "text"
    path.write_text(text[:at] + put + text[until:])
    rows, error = [], None
    try:
        rows = read(str(path))
    except InputError as refusal:
        error = refusal
    assert error is None or (error.file == str(path) and "\n" not in str(error))
    for row in rows:
        assert row.what in WHAT
        assert row.n >= 0
        times = (row.min_ns, row.p10_ns, row.p50_ns, row.p90_ns, row.p99_ns, row.max_ns)
        known = [time for time in times if time is not None]
        assert row.tool.startswith(("perf", "lock_stat")) or known == sorted(known)


def test_stacks_of_a_trace_are_passed_over(tmp_path: Path) -> None:
    text = (
        "qemu 7 [001] 5.000010: lock:contention_begin: 0xffff1234 (flags=SPIN|WRITE)\n"
        "\tffff800080012345 kvm_age_gfn+0x10 ([kernel.kallsyms])\n\n"
        "qemu 7 [001] 5.000030: lock:contention_end: 0xffff1234 (ret=0)\n"
        " => kvm_age_gfn\n"
    )
    rows = observed(tmp_path, text)
    assert rows["wait", "rwlock:W"].sum_ns == 20_000
    assert rows["wait", "rwlock:W ffff1234"].n == 1
