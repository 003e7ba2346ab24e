"""The bypass list of an offloaded CPU (rcu_nocb_try_bypass() in kernel/rcu/tree_nocb.h, v6.12).

A CPU that calls ``call_rcu()`` often would contend with its kthreads for its callback list. So only
a few calls a jiffy go there; the others are put aside into the bypass list, which is flushed once
it is a jiffy old or long. Lazy callbacks go into it at once and may stay for ten seconds.
"""

from __future__ import annotations

from enum import IntEnum

from simkvm.kernel.rcu_config import RcuConfig
from simkvm.kernel.rcu_segcblist import Entry, SegmentedCallbackList


class Defer(IntEnum):
    """What rcuog is to be woken for later, in order of urgency (RCU_NOCB_WAKE_*)."""

    NOT = 0
    BYPASS = 1
    LAZY = 2
    WAKE = 3
    FORCE = 4


class Bypass:
    """Decides where a call on one offloaded CPU goes. Times are jiffies."""

    __slots__ = ("_callbacks", "_config", "_count", "_first", "_last", "lazy")

    def __init__(self, callbacks: SegmentedCallbackList, config: RcuConfig) -> None:
        self._callbacks = callbacks
        self._config = config
        self._first = 0  # when the oldest of the list came, or the list was flushed
        self._last = -1  # jiffy of the last call
        self._count = 0  # calls in that jiffy, and what earlier ones left over
        self.lazy = 0  #: lazy callbacks in the list (lazy_len)

    def __len__(self) -> int:
        return len(self._callbacks.bypass)

    @property
    def only_lazy(self) -> bool:
        """Whether nothing in the list is urgent; also true of an empty one."""
        return len(self) == self.lazy

    def call(self, entry: Entry, jiffy: int) -> bool:
        """Queue a callback. True: rcuog may have to be told, the caller is to look into that."""
        held, only_lazy, lazy = len(self), self.only_lazy, entry[3]
        self._count_call(jiffy)
        if self._count < self._config.nobypass_per_jiffy and not lazy:
            self.flush(jiffy)
            self._callbacks.append(entry)
            return True
        old = self._lazy_is_old(jiffy) if only_lazy else jiffy != self._first
        self._callbacks.bypass.append(entry)
        self.lazy += lazy
        if held and (old or held >= self._config.qhimark):
            self.flush(jiffy)
            return True
        if not held:
            self._first = jiffy
        # Otherwise whatever is in the segments keeps rcuog from sleeping for ever.
        return (not held or (only_lazy and not lazy)) and not self._callbacks.waiting

    def _count_call(self, jiffy: int) -> None:
        limit = self._config.nobypass_per_jiffy
        if jiffy == self._last:
            self._count += 1
            return
        self._last = jiffy
        self._count = min(max(self._count - limit, 0), limit)

    def _lazy_is_old(self, jiffy: int) -> bool:
        return jiffy > self._first + self._config.lazy_flush_jiffies

    def flush_if_old(self, jiffy: int) -> None:
        """What rcuog does with the list whenever it looks (nocb_gp_wait)."""
        if not len(self):
            return
        old = self._lazy_is_old(jiffy) if self.only_lazy else jiffy > self._first + 1
        if old or len(self) > 2 * self._config.qhimark:
            self.flush(jiffy)

    def flush(self, jiffy: int) -> None:
        """Move all to the callback list (rcu_nocb_do_flush_bypass)."""
        self._callbacks.flush_bypass()
        self.lazy = 0
        self._first = jiffy
