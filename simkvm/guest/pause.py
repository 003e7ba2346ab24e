"""What a vCPU's thread does between two stretches of guest code: the VMM's side of KVM_RUN."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu


class Pause(ABC):
    """Stands among the chunks of a vCPU. What comes next is asked for when it is over."""

    @abstractmethod
    def spend(self, vcpu: Vcpu, t_ns: int) -> Generator[Event, Any, int]:
        """What the thread of ``vcpu`` does from ``t_ns`` on; returns when that is over."""
