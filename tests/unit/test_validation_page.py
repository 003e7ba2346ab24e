"""Does the page show every row, and misses with their reasons?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from simkvm.cli import main
from simkvm.validate import published, theory, traces
from simkvm.validate.benchmarks import UNANSWERED
from simkvm.validate.curves import AXES
from simkvm.validate.row import PublishedRow, TheoryRow, TraceRow

ROOT = Path(__file__).parents[2]

HELD = TheoryRow("lock/wait", "a | wait", "ns", 10.0, 10.1, 9.5, 10.5, "a book, (1)")
TRACED = TraceRow("fault/0/read", "read", "acquisitions", 3, 3, "deb-fault fault-c")
OTHERWISE = TraceRow(
    "locks/1/write", "write", "acquisitions", 3, 2, "a-locks locks-sparse", "CPU sharing"
)


def measured(factor: float) -> list[PublishedRow]:
    """The whole record, with everything simulated ``factor`` times too long."""
    rows = []
    for figure in published.figures():
        if published.benchmark_of(figure) is not None:
            rows.append(published._row(figure, factor * figure.value, 0.25, ""))
        elif figure.id in UNANSWERED:
            rows.append(published._row(figure, None, 1.0, UNANSWERED[figure.id]))
    return [replace(row, note="too slow") if row.verdict == "outside" else row for row in rows]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    rows = measured(request.param)
    monkeypatch.setattr(theory, "rows", lambda: iter([HELD]))
    monkeypatch.setattr(traces, "rows", lambda: iter([TRACED, OTHERWISE]))
    monkeypatch.setattr(published, "rows", lambda *_: [*rows, *published.shapes(r for r in rows)])
    done = CliRunner().invoke(main, ["validate", "page", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = [Path(line) for line in done.output.splitlines()]
    assert written[0] == tmp_path / "validation.md"
    assert [path.name for path in written[1:]] == [f"{axis.name}.png" for axis in AXES]
    text = written[0].read_text(encoding="utf-8")
    assert all(f"](validation/{path.name})" in text for path in written[1:])
    return text


@pytest.mark.parametrize("page", [1.0], indirect=True)
def test_a_model_that_is_right(page: str) -> None:
    rows = measured(1.0)
    predicted = [row for row in rows if row.is_prediction]
    met = sum(row.verdict == "inside" for row in predicted)
    assert f"of {len(predicted)} predictions {met} inside (100%), 1 of them a mere bound" in page
    for row in rows:
        assert f"| {row.id} |" in page
    assert "**outside**" not in page
    assert "a \\| wait" in page
    assert "3 against 2 (CPU sharing)" in page
    assert UNANSWERED["D-1"] in page
    assert "* `service` = 13 us, of the workload: V2-6 latency_p50" in page
    assert "* `fault_hold_ns` = 400, as the base has it: from 0.53 to 0.64 us" in page


@pytest.mark.parametrize("page", [1.5], indirect=True)
def test_a_model_that_is_too_slow(page: str) -> None:
    rows = measured(1.5)
    outside = [row for row in rows if row.verdict == "outside"]
    assert outside
    assert page.count("| **outside** |") >= len(outside)
    assert ": too slow." in page
    # K-1 is a bound, and shapes do not change when all is 1.5 times as long
    assert "| 1.50 | 1/4 | predicted | inside |" in page
    shapes = page.split("### Shapes of the curves")[1].split("## Traces", maxsplit=1)[0]
    assert "**outside**" not in shapes


def test_a_folder_that_cannot_be_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theory, "rows", lambda: pytest.fail("computed"))
    (tmp_path / "docs").write_text("")
    done = CliRunner().invoke(main, ["validate", "page", "--out", str(tmp_path / "docs")])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    done = CliRunner().invoke(main, ["validate", "page", "--memory", "lots"])
    assert done.exit_code == 2
    assert done.output.startswith("--memory: 'lots' is not a size")


def test_the_page_in_the_repository_has_every_row_of_the_record() -> None:
    text = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    for row in measured(1.0):
        assert f"| {row.id} | {row.params} | {row.about} |" in text
    assert "not explained" not in text


def test_the_readme_counts_as_the_page_does() -> None:
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    predicted = [line for line in page.splitlines() if "| predicted | " in line and "`" not in line]
    run = [line for line in predicted if "missing" not in line and _is_measurement(line)]
    met = sum(line.endswith("| inside |") for line in run)
    assert f"Of {len(run)} published figures that the model predicts" in readme
    assert f"{met} come out within 20 %" in readme


def _is_measurement(line: str) -> bool:
    """Rows of measurements have a scale, those of shapes have none."""
    return line.count("|") == 10
