"""What a VMM asks of dirty logging: the ioctls on one memslot, as generators of kernel steps."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from simpy import Event

from simkvm.kernel.task import Task

Steps = Generator[Event, Any, int]


@dataclass(frozen=True)
class Memslot:
    """A memslot: its number from 0, and its guest pages ``first_page`` up to ``+ pages``."""

    number: int
    first_page: int
    pages: int


class DirtyLog(Protocol):
    """Dirty logging of one guest. Every method returns when its ioctl returns.

    ``manual_protect``: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with KVM_DIRTY_LOG_INITIALLY_SET.
    """

    manual_protect: bool

    def enable(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        """KVM_SET_USER_MEMORY_REGION with KVM_MEM_LOG_DIRTY_PAGES."""

    def get(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        """KVM_GET_DIRTY_LOG."""

    def clear(self, task: Task, t_ns: int, memslot: Memslot, first_page: int, pages: int) -> Steps:
        """KVM_CLEAR_DIRTY_LOG of ``pages`` from page ``first_page`` of the memslot on."""

    def disable(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        """KVM_SET_USER_MEMORY_REGION without the flag."""
