"""The file /sys/kernel/debug/lru_gen: generations to read, ageing and eviction to write.

Source: mm/vmscan.c (``lru_gen_seq_show``, ``lru_gen_seq_write``, ``run_cmd``, ``run_aging``,
``run_eviction``) and Documentation/admin-guide/mm/multigen_lru.rst, v6.12. A write of several
commands, parted by commas, semicolons or new lines, ends with the first that fails. Memcgs have the
numbers 1, 2... in the order of their first guests; there is one node, 0.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final

from simpy import Event

from simkvm.kernel.listed import ANON, DEFAULT_SWAPPINESS, MAX_SWAPPINESS, TYPES
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.mglru import MAX_NR_GENS
from simkvm.kernel.task import Task, reach
from simkvm.kernel.vmscan import Reclaimer
from simkvm.units import NS_PER_MS

if TYPE_CHECKING:
    from simkvm.kernel.pgdat import Pgdat
    from simkvm.observe.recorder import Recorder
    from simkvm.scenario.memory import LruGenWrite

#: A letter and three numbers, then perhaps one or two more.
COMMAND: Final = re.compile(r"(\S)\s*(\d+)\s+(\d+)\s+(\d+)(?:\s+(\d+))?(?:\s+(\d+))?\s*")


class LruGenFile:
    """The file; ``task``: who writes to it."""

    def __init__(self, pgdat: Pgdat, task: Task) -> None:
        self._pgdat = pgdat
        self._task = task
        self._reclaimer = Reclaimer(pgdat, task)

    def write(self, text: str, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        """Write commands at ``t_ns``: returns 0, or the number of the error that the system call
        fails with, and when it is over.
        """
        for command in re.split(r"[,;\n]", text):
            if command.strip():
                error, t_ns = yield from self._run(command.strip(), t_ns)
                if error:
                    return error, t_ns
        return 0, t_ns

    def _run(self, command: str, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        found = COMMAND.fullmatch(command)
        if found is None:
            return errno.EINVAL, t_ns
        letter, *rest = found.groups()
        memcg, node, seq = (int(number) for number in rest[:3])
        swappiness, option = (None if number is None else int(number) for number in rest[3:])
        if node or not 1 <= memcg <= len(self._pgdat.generations):
            return errno.EINVAL, t_ns
        if swappiness is None:
            swappiness = self._pgdat.swappiness_now()
        lruvec = self._pgdat.generations[memcg - 1]
        if swappiness > MAX_SWAPPINESS + lruvec.rules.two_step:
            return errno.EINVAL, t_ns
        reclaimer = self._reclaimer
        if letter == "+":
            forced = option is None or option > 0
            return (yield from reclaimer.age_on_command(lruvec, seq, t_ns, swappiness, forced))
        if letter == "-":
            wanted = 1 << 62 if option is None else option
            return (yield from reclaimer.evict_on_command(lruvec, seq, wanted, t_ns, swappiness))
        return errno.EINVAL, t_ns


def generations(pgdat: Pgdat, t_ns: int) -> list[str]:
    """What reading the file gives at ``t_ns``, line by line; nothing of the classic LRU."""
    lines: list[str] = []
    for number, lruvec in enumerate(pgdat.generations):
        identity = number + 1 if lruvec.rules.two_step else f"{number + 1:5}"  # %llu since 7.x
        lines.append(f"memcg {identity} {pgdat.paths[number]}")
        lines.append(" node     0")
        lines += generation_lines(lruvec, t_ns)
    return lines


def generation_lines(lruvec: ListedLruvec, t_ns: int) -> list[str]:
    """One line a generation: its number, its age in ms, and folios of each type.

    It begins with the oldest that anonymous folios have, and since v6.14 that any have.
    """
    lines: list[str] = []
    sizes = [lruvec.sizes_of(of_type) for of_type in TYPES]
    rules = lruvec.rules
    first = lruvec.oldest(DEFAULT_SWAPPINESS) if rules.two_step else lruvec.min_seqs[ANON]
    for seq in range(first, lruvec.max_seq + 1):
        place = seq % MAX_NR_GENS
        age_ms = (t_ns - lruvec.birth_ns[place]) // NS_PER_MS
        counts = "".join(f" {of_type[place]:10} " for of_type in sizes)
        lines.append(f" {seq:10} {age_ms:10}{counts}")
    return lines


class LruGenWriter:
    """Who writes to the file, as the scenario says; failures are noted."""

    def __init__(
        self, pgdat: Pgdat, task: Task, writes: Sequence[LruGenWrite], recorder: Recorder
    ) -> None:
        self.task = task
        self.file = LruGenFile(pgdat, task)
        self._pgdat = pgdat
        self._env = pgdat.pages.env
        self._writes = writes
        self._recorder = recorder

    def run(self) -> Generator[Event, Any, None]:
        """One write after the other, each when its time has come."""
        task = self.task
        sched = self._pgdat.kvms[0][0].sched
        t_ns = 0
        sched.sleep(task, t_ns)
        for number, write in enumerate(sorted(self._writes, key=lambda write: write.at)):
            t_ns = yield from reach(self._env, max(t_ns, write.at))
            began_ns = t_ns = yield from sched.wake(task, t_ns)
            error, t_ns = yield from self.file.write(write.write, t_ns)
            t_ns = yield from reach(self._env, t_ns + task.cpu.take_stolen())
            said = f"lru_gen: {write.write!r}: {os.strerror(error)}" if error else ""
            self._recorder.phase("lru_gen_write", number, began_ns, t_ns, said)
            sched.sleep(task, t_ns)
