"""The dirty-logging ioctls as tests call them: for every memslot, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from simpy import Event

from simkvm.kernel.dirty_logging import DirtyLog, Memslot
from simkvm.kernel.kvm import Kvm
from simkvm.scenario.errors import InputError
from simkvm.selftests.main_thread import MainThread

Steps = Generator[Event, Any, None]


class DirtyLogging:
    """Dirty logging of the memslots of ``kvm``, ``memslots`` of equal size."""

    def __init__(self, test: MainThread, kvm: Kvm, memslots: int) -> None:
        self._test = test
        self._kvm = kvm
        each = kvm.pages // memslots
        self.memslots = [Memslot(number, number * each, each) for number in range(memslots)]

    @property
    def log(self) -> DirtyLog:
        """The guest's log. Raises InputError if its kernel has none."""
        log = self._kvm.dirty_log
        if log is None:
            raise InputError(
                f"{self._test.name} needs dirty logging, which {self._kvm.kernel.name} has not"
            )
        return log

    def enable(self) -> Steps:
        """Switch it on."""
        yield from self._each(lambda slot, t: self.log.enable(self._test.task, t, slot))

    def get(self) -> Steps:
        """Read the log."""
        yield from self._each(lambda slot, t: self.log.get(self._test.task, t, slot))

    def clear(self) -> Steps:
        """Protect what was read, a whole memslot in a call."""
        yield from self._each(
            lambda slot, t: self.log.clear(self._test.task, t, slot, 0, slot.pages)
        )

    def disable(self) -> Steps:
        """Switch it off."""
        yield from self._each(lambda slot, t: self.log.disable(self._test.task, t, slot))

    def _each(self, call: Callable[[Memslot, int], Generator[Event, Any, int]]) -> Steps:
        test = self._test
        for memslot in self.memslots:
            yield from test.ioctl(call(memslot, test.t_ns + test.ioctl_ns))
