"""How a sweep tells people how far it is: always on stderr, so that stdout stays for results.

A bar on a terminal, a line that renews itself in a notebook, and a plain line now and then anywhere
else, where a bar would fill a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from simkvm.units import format_duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar

LINE_EVERY_S = 10.0
"""How often a log gets a line, if there is news."""
NO_NEWS_EVERY_S = 60.0
"""How often it gets one without."""

NOTEBOOK_EVERY_S = 0.25


class Progress(Protocol):
    """What a sweep reports to. The calls come in this order, from one thread."""

    def start(self, total: int, done: int) -> None:
        """There are `total` points, of which `done` need not be run."""

    def point(self, failed: bool) -> None:
        """One more point has been run."""

    def tick(self) -> None:
        """Nothing new, but time has passed."""

    def stop(self) -> None:
        """The end, also after an error."""


class Silent:
    """Says nothing."""

    def start(self, total: int, done: int) -> None:
        """Nothing."""

    def point(self, failed: bool) -> None:
        """Nothing."""

    def tick(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines:
    """A line every `every_s` seconds if there is news, and one at the end, through `show`."""

    def __init__(
        self,
        show: Callable[[str], None],
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show = show
        self._every_s = every_s
        self._clock = clock
        self._total = self._done = self._ran = self._failed = 0
        self._told = -1  #: how many had been run when the last line was shown
        self._started_s = self._shown_s = clock()

    def start(self, total: int, done: int) -> None:
        """Remember where and when the work begins."""
        self._total, self._done = total, done
        self._started_s = self._shown_s = self._clock()

    def point(self, failed: bool) -> None:
        """Count it."""
        self._done += 1
        self._ran += 1
        self._failed += failed
        self.tick()

    def tick(self) -> None:
        """Show the line if the last one is old."""
        wait_s = self._every_s if self._ran > self._told else NO_NEWS_EVERY_S
        if self._clock() - self._shown_s >= wait_s:
            self._shown_s, self._told = self._clock(), self._ran
            self._show(self.line())

    def stop(self) -> None:
        """Show the last line, unless it was."""
        if self._ran > self._told:
            self._show(self.line())

    def line(self) -> str:
        """Such as "12/40 points, 1 failed, 3.4 s a point, 1.6 min left"."""
        parts = [f"{self._done}/{self._total} points"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._ran:
            each_s = (self._clock() - self._started_s) / self._ran
            parts.append(f"{_people(each_s)} a point")
            if left := self._total - self._done:
                parts.append(f"{_people(each_s * left)} left")
        return ", ".join(parts)


class Bar:
    """A bar on a terminal, by rich."""

    def __init__(self) -> None:
        self._bar: RichBar | None = None

    def start(self, total: int, done: int) -> None:
        """Draw it."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("points{task.fields[failures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._failed = 0
        self._task = self._bar.add_task("", total=total, completed=done, failures="")
        self._bar.start()

    def point(self, failed: bool) -> None:
        """Move it."""
        self._failed += failed
        if self._bar is not None:
            failures = f", {self._failed} failed" if self._failed else ""
            self._bar.update(self._task, advance=1, failures=failures)

    def tick(self) -> None:
        """Nothing: rich draws by itself."""

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


class Notebook(Lines):
    """A line that renews itself in the cell's output.

    Not rich's own widget, which needs ipywidgets; this needs what every notebook has.
    """

    def __init__(self) -> None:
        super().__init__(self._renew, every_s=NOTEBOOK_EVERY_S)
        self._handle: Any = None

    def _renew(self, line: str) -> None:
        import IPython.display

        display: Any = IPython.display.display
        bundle = {"text/plain": line}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def automatic(stream: TextIO | None = None) -> Progress:
    """The one that suits where stderr (or `stream`) goes."""
    out = stream or sys.stderr
    if _in_notebook():
        return Notebook()
    if out.isatty():
        return Bar()
    return Lines(lambda line: print(f"simkvm: {line}", file=out, flush=True))


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this, found without importing IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _people(seconds: float) -> str:
    return format_duration(round(seconds * 1e9))
