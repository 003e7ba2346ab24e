"""The dirty-logging ioctls as tests call them: for every memslot, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from simpy import Event

from simkvm.kernel.kvm import Kvm
from simkvm.selftests.main_thread import MainThread

Steps = Generator[Event, Any, None]


class DirtyLogging:
    """Dirty logging of all memslots of ``kvm``.

    ``manual_protect``: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is switched on with all that it has, so
    that bits are set when logging begins.
    """

    def __init__(self, test: MainThread, kvm: Kvm, manual_protect: bool) -> None:
        self._test = test
        self._log = kvm.dirty_log
        self._log.manual_protect = self._log.initially_set = manual_protect
        self._memslots = [range(first, last) for first, last in kvm.memslots]

    def enable(self) -> Steps:
        """Switch it on."""
        yield from self._each(lambda slot, t: self._log.enable(self._test.task, t, slot))

    def get(self) -> Steps:
        """Read the log."""
        yield from self._each(lambda slot, t: self._log.get(self._test.task, t, slot))

    def clear(self) -> Steps:
        """Protect what was read, a whole memslot in a call."""
        yield from self._each(
            lambda slot, t: self._log.clear(self._test.task, t, slot, 0, len(slot))
        )

    def disable(self) -> Steps:
        """Switch it off."""
        yield from self._each(lambda slot, t: self._log.disable(self._test.task, t, slot))

    def _each(self, call: Callable[[range, int], Generator[Event, Any, int]]) -> Steps:
        test = self._test
        for memslot in self._memslots:
            yield from test.ioctl(call(memslot, test.t_ns + test.ioctl_ns))
