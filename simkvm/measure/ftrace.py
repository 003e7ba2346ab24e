"""ftrace's text: ``trace``, ``trace_pipe``, ``trace-cmd report``, ``perf script``.

Events stand on lines of their own, or as comments in the call tree of ``function_graph``. Of
single events this makes durations:

* ``lock:contention_begin`` to ``contention_end`` of one task and lock: a wait, by the kind of lock
  as ``perf lock`` names it (include/trace/events/lock.h), rwlocks by address too;
* kprobes on ``_raw_read_lock``, ``_raw_write_lock`` and their unlocks: a hold. Its beginning is the
  call, so a wait for the lock is in it;
* ``kvm:kvm_exit`` to ``kvm_entry`` of one task: the handling of an exit, by its reason;
* ``rcu:rcu_grace_period`` ``start`` to ``end`` of one number: a grace period;
* ``rcu:rcu_batch_start`` to ``rcu_batch_end`` on one CPU, over the callbacks invoked.

All other events are counted. Timestamps have whole microseconds unless ``trace-cmd report -t``
printed them, so differences of them are that coarse; ``function_graph`` durations are not.

A marker ``simkvm begin PHASE`` (written to ``trace_marker``) says what the host does from there to
``simkvm end``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from simkvm.measure.function_graph import INTERRUPT, Graph, nanoseconds, row
from simkvm.measure.observation import Observation, Tallies
from simkvm.measure.text import Lines

TOOL: Final = "ftrace"

EVENT: Final = re.compile(
    r"\s*(?P<task>\S.*?)(?:-|\s+)(?P<pid>\d+)(?:/\d+)?\s+(?:\([\s\d-]+\)\s+)?\[(?P<cpu>\d+)\]\s+"
    r"(?:[^\s\d]\S*\s+)?(?P<time>\d+\.\d+):\s+"
    r"(?:[a-z_0-9]+:)?(?P<event>[A-Za-z_]\w*):(?P<rest>.*)"
)
FUNCTION: Final = re.compile(r"\s*\S.*-\d+\s+\[\d+\].*\d+\.\d+: \S+ <-\S+\s*")
GRAPH_EVENTS: Final = ("funcgraph_entry", "funcgraph_exit")
GRAPH_REST: Final = re.compile(
    r"\s*(?:[+!#*@$]\s*)?(?:(?P<duration>\d+(?:\.\d+)?)\s+us)?\s*\|(?P<body>.*)"
)
COMMENTED: Final = re.compile(r"(?P<event>[A-Za-z_]\w*):\s?(?P<rest>.*)")
LOST: Final = re.compile(
    r"\s*CPU:?\s*\d+\s*(?:\[LOST \d+ EVENTS\]|: \d+ EVENTS DROPPED|:? ?\[?\d+ EVENTS DROPPED\]?)\s*"
)
MARKER: Final = re.compile(r"simkvm (?P<verb>begin|end)\b\s*(?P<phase>\w*)")
HEADS: Final = ("# tracer:", "cpus=", "version =", "trace-cmd version")
IGNORED: Final = re.compile(
    r"\s*|\s*#.*|\s*-+\s*|cpus=\d+|(?:trace-cmd )?version\b.*|CPU \d+ is empty"
    r"|\s*CPU:?\s*\d+ buffer started.*|\s*##### CPU \d+ buffer started ####"
    r"|.*<(?:user )?stack trace>\s*|\s*=> .*|\s+[0-9a-f]{6,16}\s+\S.*\(.*\)\s*"  # stacks
)

LOCKS: Final = {
    "_raw_read_lock": ("R", True),
    "_raw_write_lock": ("W", True),
    "_raw_read_unlock": ("R", False),
    "_raw_write_unlock": ("W", False),
}
KPROBE: Final = re.compile(r"\s*\((?P<function>[\w.]+)\+0x0/0x[0-9a-f]+\)(?P<arguments>.*)")
ADDRESS: Final = re.compile(r"\b(?P<name>\w+)=0x(?P<value>[0-9a-f]+)\b")


def recognises(line: str) -> bool:
    """Whether a line can only be ftrace's."""
    if line.startswith(HEADS) or EVENT.fullmatch(line) or FUNCTION.fullmatch(line):
        return True
    found = row(line)
    return found is not None and (found.duration_ns is not None or found.cpu != "")


def parse(lines: Lines) -> Iterator[Observation]:
    """The observations of a whole trace. Raises InputError at a line that is none of ftrace's."""
    trace = _Trace(lines)
    for line in lines:
        trace.take(line)
    return trace.observations()


class _Trace:
    """A trace on its way through."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.tallies = Tallies()
        self.graph = Graph(self.tallies)
        self.events = Events(self.tallies)

    def take(self, line: str) -> None:
        if self._graph(line) or self._event(line) or self.graph.switched(line):
            return  # the usual first: a trace has millions of these
        if LOST.fullmatch(line):
            self.graph.lost()
            self.events.lost()
        elif not any(pattern.fullmatch(line) for pattern in (IGNORED, INTERRUPT, FUNCTION)):
            raise self.lines.error(f"not a line of ftrace: {line[:60]!r}")

    def _graph(self, line: str) -> bool:
        found = row(line)
        if found is None:
            return False
        task = self.graph.task(found.cpu, found.pid)
        try:
            comment = self.graph.take(task, found.duration_ns, found.body, self.events.phase)
        except ValueError:
            return False
        if comment is not None:
            event = COMMENTED.fullmatch(comment)
            if event is None or event["event"] == "simkvm":
                self.events.marker(comment)
            else:
                self.events.take(found.time_ns, found.cpu, task, event["event"], event["rest"])
        return True

    def _event(self, line: str) -> bool:
        match = EVENT.fullmatch(line)
        if match is None:
            return False
        pid, cpu, event, rest = match.group("pid", "cpu", "event", "rest")
        task = self.graph.task(str(int(cpu)), pid)
        if event in GRAPH_EVENTS:
            return self._graph_event(task, rest)
        self.graph.interrupted(task)
        self.events.take(nanoseconds(match["time"], 10**9), cpu, task, event, rest)
        return True

    def _graph_event(self, task: str, rest: str) -> bool:
        match = GRAPH_REST.fullmatch(rest)
        if match is None:
            return False
        duration = match["duration"]
        ns = None if duration is None else nanoseconds(duration, 1000)
        try:
            self.graph.take(task, ns, match["body"], self.events.phase)
        except ValueError:
            return False
        return True

    def observations(self) -> Iterator[Observation]:
        note = ""
        if self.graph.unmatched:
            note = f"{self.graph.unmatched} calls ended without a beginning"
        for observation in self.tallies.observations():
            key = self.events.named(observation.key)
            yield replace(observation, key=key, tool=TOOL, note=note)


class Events:
    """Pairs of events, and how often each event came."""

    MOST_OPEN: Final = 1 << 16

    def __init__(self, tallies: Tallies) -> None:
        self.tallies = tallies
        self.phase = ""
        self._since: dict[tuple[str, ...], tuple[int, str]] = {}
        self._mmu_locks: set[str] = set()

    def lost(self) -> None:
        """Forget what has begun: its end may be missing."""
        self._since.clear()

    def named(self, key: str) -> str:
        """The key, saying mmu_lock where the address is known to be that of one."""
        kind, _, address = key.partition(" ")
        return f"{kind} mmu_lock" if address in self._mmu_locks else key

    def marker(self, text: str) -> None:
        """A line that a user wrote into the trace."""
        match = MARKER.match(text.strip())
        if match is not None:
            self.phase = match["phase"] if match["verb"] == "begin" else ""

    def take(self, time_ns: int | None, cpu: str, task: str, event: str, rest: str) -> None:
        """One event; without a time it is only counted."""
        rest = rest.strip()
        if event in {"tracing_mark_write", "print", "bprint", "bputs"}:
            self.marker(rest.removeprefix("tracing_mark_write: "))
            return
        kprobe = KPROBE.fullmatch(rest)
        if kprobe is not None:
            event = f"{event} ({kprobe['function']})"
            self._kprobe(time_ns, task, kprobe["function"], kprobe["arguments"])
        elif time_ns is not None:
            self._paired(time_ns, cpu, task, event, rest)
        self.tallies.count(event, self.phase)

    def _paired(self, time_ns: int, cpu: str, task: str, event: str, rest: str) -> None:
        words = rest.replace("(", " ").replace(")", " ").split()
        if event == "contention_begin" and words:
            self._begin(("contention", task, words[0]), time_ns, _lock_type(rest))
        elif event == "contention_end" and words:
            self._end(("contention", task, words[0]), time_ns, "wait", words[0])
        elif event == "kvm_exit":
            self._begin(("exit", task), time_ns, _exit_reason(rest))
        elif event == "kvm_entry":
            self._end(("exit", task), time_ns, "exit")
        elif event == "rcu_grace_period" and len(words) >= 3:
            flavour, number, step = words[:3]
            if step == "start":
                self._begin(("rcu", flavour, number), time_ns, flavour)
            elif step == "end":
                self._end(("rcu", flavour, number), time_ns, "grace_period")
        elif event == "rcu_batch_start" and words:
            self._begin(("batch", cpu), time_ns, words[0])
        elif event == "rcu_batch_end":
            invoked = re.search(r"CBs-invoked=(\d+)", rest)
            if invoked is not None and int(invoked[1]):
                self._end(("batch", cpu), time_ns, "callback", share=int(invoked[1]))

    def _kprobe(self, time_ns: int | None, task: str, function: str, arguments: str) -> None:
        addresses = {found["name"]: found["value"] for found in ADDRESS.finditer(arguments)}
        if "kvm" in addresses:
            # The lock is the first member of struct kvm (include/linux/kvm_host.h, v6.12).
            self._mmu_locks.add(addresses["kvm"])
        known = LOCKS.get(function)
        if known is None or time_ns is None or not addresses:
            return
        mode, taken = known
        address = addresses.get("lock", next(iter(addresses.values())))
        begun = ("hold", mode, task, address)
        if taken:
            self._begin(begun, time_ns, f"rwlock:{mode} {address}")
        else:
            self._end(begun, time_ns, "hold")

    def _begin(self, begun: tuple[str, ...], time_ns: int, key: str) -> None:
        if len(self._since) >= self.MOST_OPEN:
            self._since.pop(next(iter(self._since)))
        self._since[begun] = (time_ns, key)

    def _end(
        self, begun: tuple[str, ...], time_ns: int, what: str, address: str = "", share: int = 1
    ) -> None:
        since_ns, key = self._since.pop(begun, (time_ns + 1, ""))
        if time_ns < since_ns:
            return  # its beginning is missing
        value_ns = (time_ns - since_ns) // share
        self.tallies.add(what, key, self.phase, value_ns)
        if key.startswith("rwlock:") and address:
            self.tallies.add(what, f"{key} {address.removeprefix('0x')}", self.phase, value_ns)


def _lock_type(rest: str) -> str:
    """The kind of a lock by the flags of its contention, as ``perf lock contention`` says it."""
    flags = re.search(r"flags=([A-Z|]*)", rest)
    names = set(flags[1].split("|")) if flags is not None else set()
    if "MUTEX" in names:
        return "mutex"
    if "RT" in names:
        return "rt-mutex"
    if "PERCPU" in names:
        return "pcpu-sem:R" if "READ" in names else "pcpu-sem:W"
    mode = "R" if "READ" in names else "W" if "WRITE" in names else ""
    if "SPIN" in names:
        return f"rwlock:{mode}" if mode else "spinlock"
    return f"rwsem:{mode}" if mode else "semaphore"


def _exit_reason(rest: str) -> str:
    """The reason of an exit: of arm64 the class in brackets, of x86 what follows ``reason``."""
    arm64 = re.search(r"\((\w+)\)", rest) or re.match(r"\s*(\w+):", rest)
    x86 = re.search(r"\breason (\w+)", rest)
    found = x86 or arm64
    return found[1] if found is not None else "unknown"
