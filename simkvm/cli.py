"""The commands: parse, call the API, print. No logic, and nothing heavy is imported before it is
used.

Exit status: 0 done; 1 the safety oracle found a violation that the scenario did not expect (or a
point of a sweep has no result, or a result did not come out again); 2 wrong input; 130 interrupted;
141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simkvm import api
from simkvm.scenario.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from simkvm.scenario.load import Study
    from simkvm.study.result import Result, Results
    from simkvm.study.sensitivity import Sensitivity
    from simkvm.validate.row import Row

VIOLATED = 1
WRONG_INPUT = 2
INTERRUPTED = 130
NO_READER = 141

NOT_THERE = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""What a path that the user gave can do wrong."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """A group whose commands report wrong input in one line, and end quietly when told to."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into an exit status."""
        try:
            with _ended_in_order():
                result = super().invoke(ctx)
            sys.stdout.flush()
        except InputError as error:
            click.echo(str(error), err=True)
            ctx.exit(WRONG_INPUT)
        except NOT_THERE as error:
            # Arrow's have no file name of their own, but a text with one.
            named = f"{error.filename}: {str(error.strerror).lower()}"
            click.echo(named if error.filename else str(error.strerror or error), err=True)
            ctx.exit(WRONG_INPUT)
        except KeyboardInterrupt as stop:
            click.echo(f"simkvm: {str(stop) or 'interrupted'}", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # The interpreter flushes once more when it ends, and must not complain then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(NO_READER)
        return result


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Take SIGTERM for a Ctrl-C, so that a sweep ends its workers and says how to go on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """I/N as two numbers; whether they make sense is for the sweep to say."""
    if value is None:
        return None
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise click.BadParameter(f"{value!r} is not two numbers such as 0/4", ctx, param)
    return int(index), int(count)


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A size in bytes; what is wrong with it is said of the option."""
    from simkvm.units import parse_size

    try:
        return parse_size(value)
    except InputError as error:
        raise InputError(error.message, key=param.opts[0], hint=error.hint) from None


sets_option = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a value of the file; repeat."
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Use this seed, not the file's."
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes to run points in; default: one a CPU.",
)
memory_option = click.option(
    "--memory",
    default="32 GiB",
    callback=_size,
    show_default=True,
    metavar="SIZE",
    help="Guest memory that a benchmark may fault in; what needs more is scaled down.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(package_name="simkvm", message="%(prog)s %(version)s")
def main() -> None:
    """Simulate MGLRU page ageing over KVM guests: mmu_lock, RCU and page-table memory.

    Start with `simkvm workloads`, then `simkvm run FILE`.
    """


@main.command()
@click.argument("file")
@sets_option
@click.option("--out", metavar="DIR", help="Keep the result in this store, and draw its figures.")
@click.option("--lock-stat", metavar="FILE", help="Write the locks as /proc/lock_stat would.")
@click.option(
    "--lru-gen",
    is_flag=True,
    help="Print the generations as /sys/kernel/debug/lru_gen does. Memory that a guest has "
    "from the start was an hour old then.",
)
@seed_option
@json_option
@click.pass_context
def run(
    ctx: click.Context,
    *,
    file: str,
    sets: tuple[str, ...],
    out: str | None,
    lock_stat: str | None,
    lru_gen: bool,
    seed: int | None,
    as_json: bool,
) -> None:
    """Simulate one point and report on it, or the points that a sweep says to run first."""
    from simkvm.show import document, points, tables
    from simkvm.show.lru_gen import require_generations
    from simkvm.show.lru_gen import text as generations

    study = api.load(file, sets, seed)
    if len(study.first) == 1:
        study = replace(study, points=study.first)
    for option, given in (("--lock-stat", lock_stat is not None), ("--lru-gen", lru_gen)):
        if given:
            study.require_one_point(option)
    if lru_gen:
        require_generations(study)
    if len(study.first) > 1:
        ctx.exit(_run_first(study, out, as_json))
    result = api.run(study, out=out)
    if lock_stat is not None:
        from simkvm.show.lock_stat import text

        Path(lock_stat).write_text(text(result), encoding="utf-8")
    if out is not None:
        _draw_all(result, Path(out), err=True)
    if as_json:
        click.echo(document.as_json(document.run_document(result)))
    else:
        _show(tables.run_report(result))
        if lru_gen:
            click.echo(generations(result))
    _warn_of_unfulfilled([result])
    ctx.exit(VIOLATED if points.unexpected(result) else 0)


def _run_first(study: Study, out: str | None, as_json: bool) -> int:
    """Run the points that a sweep says to run first, each against the first; the exit status."""
    from simkvm.show import document, points, tables
    from simkvm.show.change import change_table

    with tempfile.TemporaryDirectory() as aside:
        with _going_on():
            results = api.sweep(replace(study, points=study.first), out or aside)
        if as_json:
            click.echo(document.as_json(document.sweep_document(results, results.failed)))
        else:
            for part in (tables.sweep_report(results, results.failed), *change_table(results)):
                _show(part)
        _warn_of_unfulfilled(results)
        bad = results.failed or any(points.unexpected(result) for result in results)
    return VIOLATED if bad else 0


@main.command()
@click.argument("file")
@sets_option
@click.option(
    "--replications",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Run every point N times, each with random streams of its own.",
)
@jobs_option
@click.option(
    "--shard",
    callback=_shard,
    metavar="I/N",
    help="Run only points I, I+N, I+2N ...; I counts from 0.",
)
@click.option("--out", metavar="DIR", help="The store; default: results/NAME.")
@seed_option
@json_option
@click.pass_context
def sweep(
    ctx: click.Context,
    *,
    file: str,
    sets: tuple[str, ...],
    replications: int,
    jobs: int | None,
    shard: tuple[int, int] | None,
    out: str | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Simulate what a store lacks of a sweep, and report."""
    from simkvm.show import document, points, tables

    with _going_on():
        results = api.sweep(file, out, jobs, replications, set=sets, seed=seed, shard=shard)
    if as_json:
        click.echo(document.as_json(document.sweep_document(results, results.failed)))
    else:
        _show(tables.sweep_report(results, results.failed))
    _warn_of_unfulfilled(results)
    click.echo(f"simkvm: {len(results)} points in {results.store.root}", err=True)
    bad = results.failed or any(points.unexpected(result) for result in results)
    ctx.exit(VIOLATED if bad else 0)


@main.command()
@click.argument("file")
@click.option(
    "--metric",
    required=True,
    metavar="NAME",
    help="A column of the summary, or SITE.COLUMN of the locks, as fault.wait_p99_ns.",
)
@sets_option
@click.option("--over", metavar="KEY=VALUE", help="Divide by the point with this value on an axis.")
@click.option(
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME",
    help="Try only this one; repeat. Default: all that a run asks for.",
)
@click.option(
    "--replications",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Run everything N times, each with random streams of its own.",
)
@jobs_option
@click.option("--out", metavar="DIR", help="The store; default: results/NAME-sensitivity.")
@seed_option
@json_option
@click.pass_context
def sensitivity(
    ctx: click.Context,
    *,
    file: str,
    metric: str,
    sets: tuple[str, ...],
    over: str | None,
    parameters: tuple[str, ...],
    replications: int,
    jobs: int | None,
    out: str | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Say which constants of its machine a result hangs on.

    Each is set to its low and to its high, one at a time.
    """
    from simkvm.show import document
    from simkvm.show.sensitivity import document as as_document
    from simkvm.show.sensitivity import report

    with _going_on():
        analysis = api.sensitivity(
            file,
            metric,
            out,
            jobs,
            over=over,
            parameters=parameters,
            replications=replications,
            set=sets,
            seed=seed,
        )
    if as_json:
        click.echo(document.as_json(as_document(analysis)))
    else:
        _show(report(analysis))
    _draw_tornado(analysis)
    ctx.exit(VIOLATED if analysis.failed else 0)


@main.command()
@click.argument("result")
@click.option("--figure", metavar="NAME", help="Only this figure; default: all that apply.")
@click.option("--out", metavar="FILE", help="Where to write it: png, svg or pdf.")
def plot(result: str, figure: str | None, out: str | None) -> None:
    """Draw figures of a sweep or point, from its folder RESULT."""
    from simkvm.show import figures

    if out is not None and figure is None:
        raise click.UsageError("--out names one file; say with --figure what to draw")
    opened = api.open_any(result)
    if figure is None:
        _draw_all(opened, Path(result))
        return
    path = Path(out) if out is not None else Path(result) / "figures" / f"{figure}.png"
    click.echo(str(figures.write(figures.draw(figure, opened), path)))


@main.command()
@click.argument("result")
@click.option(
    "--traces",
    multiple=True,
    default=["."],
    metavar="DIR",
    help="Look for traces in and below this folder; repeat. Default: the current one.",
)
@click.pass_context
def verify(ctx: click.Context, result: str, traces: tuple[str, ...]) -> None:
    """Run a sweep or point again and compare every figure.

    RESULT is the folder of a sweep, or of one point in it.
    """
    from simkvm.show.text import named_table

    differing = 0
    for key, differences in api.verify(result, traces):
        click.echo(f"{key}  {'DIFFERS' if differences else 'reproduced'}")
        if differences:
            differing += 1
            rows = [vars(difference) for difference in differences]
            _show(named_table(rows, {"name": None, "stored": 40, "found": 40}))
    ctx.exit(VIOLATED if differing else 0)


@main.command()
@click.argument("name", required=False)
def machines(name: str | None) -> None:
    """List the machines, or the costs of one."""
    from simkvm.scenario.machine import load_machine
    from simkvm.show.catalogue import machine_report
    from simkvm.show.text import named_table

    if name is None:
        rows = [vars(machine) for machine in api.machines().values()]
        _show(named_table(rows, dict.fromkeys(["name", "arch", "cores", "ghz", "title"])))
        return
    _show(machine_report(load_machine(name)))


@main.command()
@click.argument("name", required=False)
@click.option("--diff", nargs=2, metavar="A B", help="Only the policies in which A and B differ.")
def kernels(name: str | None, diff: tuple[str, str] | None) -> None:
    """List the kernels, or the policies of one."""
    from simkvm.scenario import kernel
    from simkvm.show.catalogue import kernel_diff, kernel_report
    from simkvm.show.text import named_table

    if diff is not None:
        if name is not None:
            raise click.UsageError("give either a name or --diff")
        first, second = map(kernel.load_kernel, diff)
        _show(kernel_diff(kernel.diff(first, second), *diff))
    elif name is not None:
        _show(kernel_report(kernel.load_kernel(name)))
    else:
        rows = [vars(variant) for variant in api.kernels().values()]
        _show(named_table(rows, dict.fromkeys(["name", "arch", "title"])))


@main.command()
def bugs() -> None:
    """List the known mistakes that a scenario can put back (key bugs)."""
    from simkvm.kernel.bugs import BUGS
    from simkvm.show.text import named_table

    rows = [vars(bug) for bug in BUGS.values()]
    _show(named_table(rows, {"name": None, "kind": None, "about": 36, "source": 44}))


@main.command()
def schema() -> None:
    """Print the JSON schema of scenario files."""
    from simkvm.scenario.describe import json_schema
    from simkvm.show import document

    click.echo(document.as_json(json_schema()))


@main.command()
@click.argument("key")
def explain(key: str) -> None:
    """Say what KEY of a scenario file means.

    KEY is dotted: host.hz, guests.vm0.access.
    """
    from simkvm.scenario.describe import explain as text_of

    click.echo(text_of(key))


@main.command()
@click.argument("folder", default="workloads")
def workloads(folder: str) -> None:
    """List the scenario files in FOLDER (default: ./workloads)."""
    from simkvm.show.text import named_table

    rows = [vars(workload) for workload in api.workloads(folder)]
    _show(named_table(rows, {"path": None, "points": None, "description": 60}))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--csv", metavar="FILE", help="Write the summaries as CSV; - is stdout.")
def results(folder: str, csv: str | None) -> None:
    """Report on a finished sweep, or write it as CSV."""
    from simkvm.show import tables

    opened = api.open_results(folder)
    if csv is None:
        _show(tables.sweep_report(opened, opened.failed))
        return
    with click.open_file(csv, "w", encoding="utf-8") as file:
        opened.summary.to_csv(file, index=False)


@main.group(name="import", cls=Commands)
def import_() -> None:
    """Bring in what was measured or recorded on a real host."""


@import_.command()
@click.argument("file")
@click.option("--out", required=True, metavar="FILE", help="The trace to write, .parquet.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="N",
    help="Leave out touches of pages that are among the last N distinct ones.",
)
@click.option("--page-size", default="4 KiB", callback=_size, show_default=True, metavar="SIZE")
def lackey(file: str, out: str, window: int, page_size: int) -> None:
    """Reduce a recording by valgrind's lackey.

    FILE is the output of valgrind --tool=lackey --trace-mem=yes, plain or .gz; - is stdin.
    """
    from simkvm.guest.lackey import convert
    from simkvm.show.catalogue import trace_report

    header = convert(file, out, page_size=page_size, window=window)
    _show(trace_report(header, out))


@import_.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--phase", default="", metavar="PHASE", help="What the host did meanwhile.")
@click.option("--out", metavar="FILE", help="Keep the observations as .csv or .json.")
@json_option
def ftrace(files: tuple[str, ...], *, phase: str, out: str | None, as_json: bool) -> None:
    """Read measurements: how long functions, locks and grace periods took.

    FILE is the text of ftrace or trace-cmd report, perf lock contention, /proc/lock_stat or a
    bpftrace script, plain or .gz; - is stdin. contrib/ has the recipes.
    """
    from simkvm.measure import observation, read
    from simkvm.show import document
    from simkvm.show.measurements import observation_report

    rows = [row for file in files for row in read.read(file, phase)]
    if out is not None:
        observation.write(rows, out)
    if as_json:
        click.echo(document.as_json(observation.document(rows)))
    else:
        _show(observation_report(rows))


@import_.command()
@click.argument("file")
@click.option("--out", required=True, metavar="FILE", help="The trace to write, .parquet.")
@click.option("--target", metavar="ID", help="The target to take, if there are several.")
@click.option("--sample", metavar="TIME", help="The sampling interval, if FILE lacks it (5 ms).")
@click.option("--resolution", metavar="TIME", help="A page is touched once in it; default: sample.")
@click.option("--ghz", default=3.0, show_default=True, metavar="N", help="Of the replay's machine.")
@click.option(
    "--writes",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    metavar="SHARE",
    help="Of touches after a page's first, which writes.",
)
@click.option("--idle", is_flag=True, help="Touch regions without accesses once, at the start.")
@click.option("--page-size", default="4 KiB", callback=_size, show_default=True, metavar="SIZE")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, metavar="N")
def damon(
    file: str,
    out: str,
    target: str | None,
    sample: str | None,
    resolution: str | None,
    ghz: float,
    writes: float,
    idle: bool,
    page_size: int,
    seed: int,
) -> None:
    """Draw a trace with the heat that DAMON recorded.

    FILE is what damo writes: its JSON (plain or compressed), the raw form of its reports, or the
    damon_aggregated events as perf script prints them; - is stdin.
    """
    from simkvm.guest.damon import convert
    from simkvm.show.catalogue import damon_report

    imported = convert(
        file,
        out,
        target=target,
        sample=sample,
        resolution=resolution,
        ghz=ghz,
        writes=writes,
        idle=idle,
        seed=seed,
        page_size=page_size,
    )
    _show(damon_report(imported, out))


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--machine",
    default="ampere-altra-80c",
    show_default=True,
    metavar="BASE",
    help="The machine that keeps what was not measured: a name or a profile.",
)
@click.option("--overhead", metavar="TIME|FUNCTION", help="The tracer's own part of a duration.")
@click.option("--kernel", default="", metavar="TEXT", help="The kernel measured, for the source.")
@click.option("--out", metavar="FILE", help="Write the profile, .toml.")
@json_option
def calibrate(
    files: tuple[str, ...],
    *,
    machine: str,
    overhead: str | None,
    kernel: str,
    out: str | None,
    as_json: bool,
) -> None:
    """Make a machine profile of measurements.

    FILE is what simkvm import ftrace reads or writes, or PHASE=FILE to say what the host did
    meanwhile; contrib/README.md lists the phases.
    """
    from simkvm.measure.profile import calibrated, written
    from simkvm.show import document
    from simkvm.show.measurements import calibration_report

    calibration = calibrated(files, machine, overhead=overhead, kernel=kernel, out=out)
    if out is not None:
        written(calibration, out)
    if as_json:
        click.echo(document.as_json(calibration.document()))
    else:
        _show(calibration_report(calibration, out))


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--out", default="docs", show_default=True, metavar="DIR", help="Where to write.")
@click.option(
    "--workloads",
    "folder",
    default="workloads",
    show_default=True,
    metavar="DIR",
    help="Where the scenario files are.",
)
@click.option(
    "--store",
    default="results/answers",
    show_default=True,
    metavar="DIR",
    help="Keep runs below this folder, and run what is missing there.",
)
@click.option(
    "--replications",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    metavar="N",
    help="Runs of every point whose figure gets an interval.",
)
@jobs_option
def answers(
    *,
    names: tuple[str, ...],
    out: str,
    folder: str,
    store: str,
    replications: int,
    jobs: int | None,
) -> None:
    """Write the pages of docs/answers and docs/sensitivity.md anew, with their figures.

    Every number in them comes from a run. Without NAME all pages are written.
    """
    from simkvm.answers.pages import write
    from simkvm.answers.runs import Runs, Unfinished

    runs = Runs(Path(folder), Path(store), jobs, replications)
    try:
        with _going_on():
            for path in write(names, Path(out), runs):
                click.echo(str(path))
    except Unfinished as missing:
        raise click.ClickException(str(missing)) from None


@main.group(cls=Commands)
def validate() -> None:
    """Hold the model against theory, publications and traces.

    The exit status is 0 when the rows were computed; what they say is in them.
    """


@validate.command()
@click.option("--only", metavar="GLOB", default="*", help="Only rows whose id matches.")
@json_option
def theory(*, only: str, as_json: bool) -> None:
    """Closed forms: queueing, RCU, young pages, geometry."""
    from simkvm.validate.theory import rows

    _report_rows(list(rows(only)), as_json=as_json)


@validate.command()
@click.option("--only", metavar="GLOB", default="*", help="Only rows whose id matches.")
@jobs_option
@click.option("--out", metavar="DIR", help="Keep the runs in this store, and use what is there.")
@memory_option
@json_option
def published(*, only: str, jobs: int | None, out: str | None, memory: int, as_json: bool) -> None:
    """Figures that were measured on real machines.

    Takes some 25 minutes on two CPUs, or 4 with --memory 2GiB.
    """
    from simkvm.validate.published import rows

    _report_rows(rows(only, out, jobs, memory), as_json=as_json)


@validate.command()
@click.option("--out", default="docs", show_default=True, metavar="DIR", help="Write it here.")
@click.option("--store", metavar="DIR", help="Keep the benchmarks' runs in this store.")
@memory_option
@jobs_option
def page(*, out: str, store: str | None, memory: int, jobs: int | None) -> None:
    """All of it as DIR/validation.md, with figures.

    Takes some half an hour on two CPUs, or 5 minutes with --memory 2GiB.
    """
    from simkvm.show.validation_page import write

    for path in write(Path(out), store, memory, jobs):
        click.echo(str(path))


@validate.command()
@json_option
def traces(*, as_json: bool) -> None:
    """Counts of a traced Linux 6.12 with KVM guests."""
    from simkvm.validate.traces import rows

    _report_rows(list(rows()), as_json=as_json)


@contextmanager
def _going_on() -> Iterator[None]:
    """Around work that a store keeps: what stops it says that the same command goes on."""
    from simkvm.study.executor import BackendLost

    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{stop}; the same command goes on from there") from None
    except BackendLost as lost:
        raise click.ClickException(f"{lost}; the same command goes on from there") from None


def _show(report: RenderableType) -> None:
    from simkvm.show.text import render

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    click.echo(render(report, colour=colour))


def _report_rows(rows: Sequence[Row], *, as_json: bool) -> None:
    from simkvm.show import document
    from simkvm.show.validation import report
    from simkvm.validate.row import document as as_document

    if as_json:
        click.echo(document.as_json(as_document(rows)))
    else:
        _show(report(rows))


def _draw_all(opened: Result | Results, folder: Path, *, err: bool = False) -> None:
    from simkvm.show import figures

    paths = figures.write_all(opened, folder / "figures")
    for path in paths:
        click.echo(str(path), err=err)
    if not paths:
        needed = " or ".join(figures.needs())
        click.echo(f"simkvm: no figure applies: it takes {needed}", err=True)


def _draw_tornado(analysis: Sensitivity) -> None:
    from simkvm.show import figures
    from simkvm.show.figure_tornado import tornado

    root = analysis.results.store.root
    if any(one.moving for one in analysis.tornados):
        path = root / "figures" / f"tornado-{analysis.metric}.png"
        click.echo(str(figures.write(tornado(analysis), path)), err=True)
    click.echo(f"simkvm: {len(analysis.results)} points in {root}", err=True)


def _warn_of_unfulfilled(results: Iterable[Result]) -> None:
    """An unsafe scenario that did nothing wrong deserves a look: it may no longer test anything."""
    for result in results:
        if result.scenario.get("expect") == "unsafe" and not result.violations:
            name = result.scenario.get("name")
            click.echo(f"simkvm: warning: {name} expects a violation, none was found", err=True)
