"""The call tree of ftrace's ``function_graph`` tracer: durations by function.

A column before the last bar is a duration, what follows it is a call, the end of one, or an event
in a comment (Documentation/trace/ftrace.rst, v6.12). Calls nest by their indentation, two blanks a
level, separately in every task. A call with anything traced inside it took longer for that: the
tracer's own time is in it, so its duration is told apart from that of a call without.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from simkvm.measure.observation import Tallies

MARKS: Final = r"[+!#*@$]"
LINE: Final = re.compile(
    r"\s*(?:(?P<time>\d+\.\d+)\s*\|\s*)?"
    r"(?:(?P<cpu>\d+)\)\s*)?"
    r"(?:(?P<task>[^|]*?)-(?P<pid>\d+)\s*\|\s*)?"
    rf"\s*(?:{MARKS}\s*)?(?:(?P<duration>\d+(?:\.\d+)?)\s+us)?\s*\|(?P<body>.*)"
)
INTERRUPT: Final = re.compile(r".*(?:==========>|<==========)\s*\|?\s*")
SWITCH: Final = re.compile(r"\s*(?P<cpu>\d+)\)\s*\S.*?\s+=>\s+\S.*-(?P<pid>\d+)\s*")
CALL: Final = re.compile(
    r"(?P<indent>\s*)(?P<function>[A-Za-z_][\w.$]*)\s*(?:\[[^\]]+\]\s*)?\(.*\)\s*(?P<open>\{|;).*"
)
END: Final = re.compile(r"(?P<indent>\s*)\}\s*(?:/\*\s*(?P<function>[A-Za-z_][\w.$]*)?.*\*/)?.*")
COMMENT: Final = re.compile(r"\s*/\*\s?(?P<text>.*?)\s*(?:\*/)?\s*$")


class Row(NamedTuple):
    """One line of the graph. ``time_ns`` and ``duration_ns`` are None where the line has none."""

    time_ns: int | None
    cpu: str
    pid: str
    duration_ns: int | None
    body: str


def row(line: str) -> Row | None:
    """The columns of a line of the ``trace`` file, or None if it is none."""
    match = LINE.fullmatch(line)
    if match is None:
        return None
    time, cpu, pid, duration, body = match.group("time", "cpu", "pid", "duration", "body")
    return Row(
        None if time is None else nanoseconds(time, 10**9),
        cpu or "",
        pid or "",
        None if duration is None else nanoseconds(duration, 1000),
        body,
    )


def nanoseconds(number: str, unit_ns: int) -> int:
    """A decimal number of units as whole nanoseconds, exactly as long as it has no more digits."""
    whole, _, fraction = number.partition(".")
    return int(whole) * unit_ns + int(fraction or 0) * unit_ns // int(10 ** len(fraction))


class _Call(NamedTuple):
    indent: int
    function: str


class Graph:
    """The open calls of every task, and the durations of those that ended."""

    def __init__(self, tallies: Tallies) -> None:
        self.tallies = tallies
        self.unmatched = 0
        self._open: dict[str, list[_Call]] = {}
        self._busy: dict[str, set[int]] = {}
        self._running: dict[str, str] = {}

    def switched(self, line: str) -> bool:
        """Note that a CPU went on to another task, if ``line`` says so."""
        match = SWITCH.fullmatch(line)
        if match is None:
            return False
        self._running[match["cpu"]] = match["pid"]
        return True

    def task(self, cpu: str, pid: str) -> str:
        """Whose calls those on this line are. Every CPU has an idle task, and all are number 0."""
        task = pid or self._running.get(cpu)
        return f"cpu{cpu}" if task in {None, "0"} else str(task)

    def lost(self) -> None:
        """Forget the open calls: events are missing, and ends would meet the wrong beginnings."""
        self._open.clear()
        self._busy.clear()

    def interrupted(self, task: str) -> None:
        """Something was traced inside whatever ``task`` is in."""
        self._busy[task] = {call.indent for call in self._open.get(task, ())}

    def take(self, task: str, duration_ns: int | None, body: str, phase: str) -> str | None:
        """Take the last column of a line; return the text of a comment, None for a call.

        Raises ValueError if it is neither.
        """
        call = CALL.fullmatch(body)
        if call is not None:
            self._call(task, call, duration_ns, phase)
            return None
        end = END.fullmatch(body)
        if end is not None:
            self._end(task, end, duration_ns, phase)
            return None
        comment = COMMENT.fullmatch(body)
        if comment is None:
            raise ValueError(body)
        self.interrupted(task)
        return comment["text"]

    def _call(self, task: str, call: re.Match[str], duration_ns: int | None, phase: str) -> None:
        indent = len(call["indent"])
        stack = self._open.setdefault(task, [])
        while stack and stack[-1].indent >= indent:  # their ends are missing
            stack.pop()
        self.interrupted(task)
        if call["open"] == "{":
            stack.append(_Call(indent, call["function"]))
        elif duration_ns is not None:
            self.tallies.add("function", call["function"], phase, duration_ns)

    def _end(self, task: str, end: re.Match[str], duration_ns: int | None, phase: str) -> None:
        indent = len(end["indent"])
        stack = self._open.setdefault(task, [])
        while stack and stack[-1].indent > indent:
            stack.pop()
        function = end["function"]
        begun = bool(stack) and stack[-1].indent == indent
        if begun:
            opened = stack.pop().function
            function = function or opened
        if function is None or duration_ns is None:
            self.unmatched += 1
            return
        busy = self._busy.setdefault(task, set())
        # What was in a call whose beginning is missing, nobody knows.
        what = "function" if begun and indent not in busy else "function_outer"
        busy.discard(indent)
        self.tallies.add(what, function, phase, duration_ns)
