"""``docs/validation.md``: what the model was held against, with figures, misses included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from simkvm.scenario.machine import load_machine
from simkvm.show.figure_validation import measured_and_simulated
from simkvm.show.figures import write as write_figure
from simkvm.show.validation import figure, tally
from simkvm.validate import published, theory, traces
from simkvm.validate.curves import AXES, curves
from simkvm.validate.hosts import Host, host_of, hosts
from simkvm.validate.row import PublishedRow, Row, ShapeRow, TheoryRow, TraceRow

MEASURED = """\
Each figure that somebody measured on a real machine and sent to a list, its benchmark run again.
None of these machines was at hand and most are not even named, so each is a shipped profile with a
few constants, of it or of the workload, *fitted* to a few rows, which the tables call fit. All
others are *predicted*: nothing was adjusted to them. A row is inside within 20 %, or anywhere above
where only a bound was published. A row that could not be run is missing, and is not counted among
the predictions. Scale is the share of the guests' memory that was simulated, to save time; times
are those of the whole.
"""
TRACED = """\
Counts and tick-driven lengths of Linux 6.12 on arm64 with KVM guests, in emulation (how they were
taken stands in `simkvm/validate/traced/record.py`). Counts have to be equal.
"""
CLOSED_FORMS = """\
Closed forms, each beside a run that should obey it. What is drawn has an interval from its own
replications, in which theory has to lie. What is not drawn has to be equal.
"""


def write(out: Path, store: str | None, limit_bytes: int, jobs: int | None) -> list[Path]:
    """Compute every row and write the page and its figures below the folder ``out``.

    Returns the paths. What was there is replaced.
    """
    out.mkdir(parents=True, exist_ok=True)  # before the half hour, not after it
    held = list(theory.rows())
    traced = list(traces.rows())
    known = published.rows("*", store, jobs, limit_bytes)
    measured = [row for row in known if isinstance(row, PublishedRow)]
    shapes = [row for row in known if isinstance(row, ShapeRow)]
    drawn = list(_figures(out, measured))
    page = out / "validation.md"
    page.write_text(
        "\n".join(
            [
                *_head(held, measured, shapes, traced),
                *_published(measured, shapes, [path.relative_to(out) for path in drawn]),
                *_traces(traced),
                *_theory(held),
            ]
        ),
        encoding="utf-8",
    )
    return [page, *drawn]


def _figures(out: Path, rows: Sequence[PublishedRow]) -> Iterable[Path]:
    found = curves(rows)
    for axis in AXES:
        mine = [curve for curve in found if curve.set_ == axis.rows]
        if mine:
            path = out / "validation" / f"{axis.name}.png"
            yield write_figure(measured_and_simulated(axis.title, mine), path)


def _head(
    held: Sequence[Row],
    measured: Sequence[PublishedRow],
    shapes: Sequence[Row],
    traced: Sequence[Row],
) -> list[str]:
    today = datetime.now(tz=UTC).date().isoformat()
    return [
        "# What the model was held against",
        "",
        f"Written on {today} by `make validation`, simkvm {version('simkvm')}. Every number below",
        "was computed by it. `simkvm validate theory`, `published` and `traces` print them, with",
        "`--json` one document.",
        "",
        f"* Theory: {tally(held)}.",
        f"* Published measurements: {tally(measured)}.",
        f"* Shapes of their curves: {tally(shapes)}.",
        f"* Traces of a real kernel: {tally(traced)}.",
        "",
        "What the model cannot tell at all is in [limits.md](limits.md).",
        "",
    ]


def _published(
    rows: Sequence[PublishedRow], shapes: Sequence[ShapeRow], drawn: Sequence[Path]
) -> list[str]:
    lines = [
        "## Published measurements",
        "",
        MEASURED,
        *(f"![{path.stem}]({path.as_posix()})\n" for path in drawn),
    ]
    for host in hosts():
        mine = [row for row in rows if host_of(row.id) is host]
        if mine:
            lines += _host(host, mine)
    lines += ["### Shapes of the curves", ""]
    lines += _table(
        ("id", "what", "measured", "simulated", "counts as the same", "role", "verdict"),
        (
            (
                row.id,
                row.about,
                f"{figure(row.measured)} {row.unit}",
                f"{figure(row.simulated)} {row.unit}",
                f"{figure(row.low)} to {figure(row.high)}",
                row.role,
                _loud(row),
            )
            for row in shapes
        ),
    )
    return lines


def _host(host: Host, rows: Sequence[PublishedRow]) -> list[str]:
    sources = ", ".join(dict.fromkeys(f"`{row.source}`" for row in rows))
    lines = [f"### {host.title}", "", f"Base: `{host.base}`. Source: {sources}.", ""]
    for name, value in host.shape.items():
        lines.append(f"* `{name}` = {figure(value)}: what the message says or implies")
    lines += [f"* {assumption}" for assumption in host.assumed]
    for fitted in host.fitted:
        lines.append(f"* `{fitted.name}` = {figure(fitted.value)}: {fitted.how}")
    for fitted in host.fitted_workload:
        lines.append(f"* `{fitted.name}` = {fitted.value}, of the workload: {fitted.how}")
    if not (host.fitted or host.fitted_workload):
        lines.append("* nothing fitted")
    base = load_machine(host.base)
    for name, how in host.shared.items():
        lines.append(f"* `{name}` = {figure(base[name])}, as the base has it: {how}")
    lines.append("")
    lines += _table(
        ("id", "parameters", "what", "measured", "simulated", "ratio", "scale", "role", "verdict"),
        (
            (
                row.id,
                row.params,
                row.about,
                f"{row.prefix}{figure(row.measured)} {row.unit}",
                f"{figure(row.simulated)} {row.unit if row.simulated is not None else ''}".strip(),
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                f"1/{round(1 / row.scale)}" if row.scale < 1 else "1",
                row.role,
                _loud(row),
            )
            for row in rows
        ),
    )
    missed = [row for row in rows if row.verdict != "inside"]
    if missed:
        lines += ["Why rows are missed:", ""]
        by_reason: dict[str, list[str]] = {}
        for row in missed:
            by_reason.setdefault(row.note, []).append(f"{row.id} {row.about}")
        lines += [f"* {'; '.join(ids)}: {reason}." for reason, ids in by_reason.items()]
        lines.append("")
    return lines


def _traces(rows: Sequence[TraceRow]) -> list[str]:
    lines = [
        "## Traces of a real kernel",
        "",
        TRACED,
    ]
    by_set: dict[str, list[TraceRow]] = {}
    for row in rows:
        by_set.setdefault(row.source, []).append(row)
    lines += _table(
        ("trace", "rows", "equal or inside", "otherwise"),
        (
            (
                source,
                str(len(group)),
                str(sum(row.verdict in ("equal", "inside") for row in group)),
                "; ".join(
                    f"{row.id}: {figure(row.measured)} against {figure(row.simulated)}"
                    f" ({row.abstraction or row.verdict})"
                    for row in group
                    if row.verdict not in ("equal", "inside")
                )
                or "-",
            )
            for source, group in by_set.items()
        ),
    )
    return lines


def _theory(rows: Sequence[TheoryRow]) -> list[str]:
    return [
        "## Theory",
        "",
        CLOSED_FORMS,
        *_table(
            ("id", "what", "theory", "simulated", "deviation", "+-", "source", "verdict"),
            (
                (
                    row.id,
                    row.about,
                    f"{figure(row.expected)} {row.unit}",
                    figure(row.simulated),
                    f"{row.deviation:+.1%}",
                    f"{row.half_width:.1%}" if row.half_width else "exact",
                    row.source,
                    _loud(row),
                )
                for row in rows
            ),
        ),
    ]


def _loud(row: Row) -> str:
    return row.verdict if row.verdict in ("inside", "equal") else f"**{row.verdict}**"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [" | ".join(headers), " | ".join("---" for _ in headers)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [*(f"| {line} |" for line in lines), ""]
