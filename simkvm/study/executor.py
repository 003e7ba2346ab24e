"""The driver of a sweep: runs many independent tasks and loses none of them to a dead worker.

A plain process pool fails everything queued when one worker is killed, and on Ctrl-C first finishes
its queue. The driver keeps few tasks in flight, replaces a broken pool, finds out which task
kills its worker, and stops at once when interrupted. It knows nothing of simulations: results are
whatever the work returns, and the work of a sweep stores its point itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import wait as wait_for_any
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Task = TypeVar("Task")

Backend = Callable[[int], Executor]
"""Makes an executor of that many workers."""

MAX_KILLS = 3
"""A task is given up when this many workers died while it was in flight."""

LAST_WORDS_S = 5.0
"""How long a dead pool has to give up its tasks, before they are taken from it."""

TICK_S = 0.5
"""How often a driver that waits looks up, so that progress is shown while long points run."""


class BackendLost(Exception):  # noqa: N818 (the event, as Interrupted)
    """The executor cannot run anything any more; what was finished before is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep, after its workers are gone. What was finished before is kept.

    A KeyboardInterrupt, so that no `except Exception` on the way swallows it. `done` and `total`
    count points, and are 0 where the thrower knows none.
    """

    def __init__(self, done: int = 0, total: int = 0) -> None:
        super().__init__(f"interrupted after {done} of {total} points; what was finished is kept")
        self.done = done
        self.total = total


@dataclass(frozen=True)
class Failure:
    """Why a task has no result: `reason` in one line, `where` the calls that led there.

    `attempts` is 1 for a task that raised, which it would do again, and the number of dead workers
    for one that killed them. Calls are "module.function:line", never the path of a file.
    """

    reason: str
    attempts: int
    where: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException, attempts: int = 1) -> Failure:
        """The failure that `error` is, without the driver's own call in front."""
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        calls = traceback.walk_tb(error.__traceback__)
        where = (
            f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}:{line}"
            for frame, line in calls
            if frame.f_code is not attempt.__code__
        )
        return cls(" ".join(reason.split()), attempts, tuple(where))


def attempt(work: Callable[[Task], R], task: Task) -> R | Failure:
    """Do the work. What it raises becomes a Failure here, in the worker, since an exception that
    does not survive pickling would take the whole pool with it.
    """
    try:
        return work(task)
    except (Exception, SystemExit) as error:
        return Failure.of(error)


def process_pool(workers: int) -> Executor:
    """Worker processes started afresh: neither Arrow's nor BLAS's threads survive a fork."""
    return _Pool(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_become_worker
    )


class _Pool(ProcessPoolExecutor):
    """Starts all its workers on the first submission, and submits with Ctrl-C held back.

    A worker started later could miss that its pool has just been declared dead, take tasks that
    are being run elsewhere, and never end (CPython up to 3.12 takes no lock there). A Ctrl-C
    between a worker's start and its entry in the pool's books would leave it to nobody. And workers
    inherit the hold, so that a Ctrl-C, which reaches every process of a terminal, does not meet
    them at their imports.
    """

    _safe_to_dynamically_spawn_children = property(lambda _: False, lambda *_: None)

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _become_worker() -> None:
    """Leave Ctrl-C to the parent, and go when the parent goes, however it died.

    A pool's worker holds both ends of the pipe it reads its tasks from, so without a look at its
    parent it would wait there for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_go_with, args=(parent.sentinel,), daemon=True).start()


def _go_with(sentinel: int) -> None:
    wait_for_any([sentinel])
    os._exit(1)


class _Inline(Executor):
    """Runs each task in this process as it is submitted."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def inline(workers: int) -> Executor:
    """No workers at all: everything in this process, one task after the other."""
    del workers
    return _Inline()


class Drive(Generic[Task, R]):
    """Runs tasks through a backend.

    `settled` is called in this process for each task as it finishes, with what the work returned or
    a Failure. `tick` is called now and then in between. No more than `window` tasks are in flight:
    all of them come under suspicion when a worker dies.
    """

    def __init__(
        self,
        work: Callable[[Task], R],
        settled: Callable[[Task, R | Failure], None],
        *,
        workers: int,
        backend: Backend = process_pool,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.work = work
        self.settled = settled
        self.workers = workers
        self.backend = backend
        self.tick = tick
        self.window = 1 if backend is inline else workers + 1
        self._executor: Executor | None = None
        self._flying: dict[Future[R | Failure], tuple[Task, int]] = {}
        self._suspects: deque[tuple[Task, int]] = deque()

    def run(self, tasks: Iterable[Task]) -> None:
        """Run them all: first those never tried, several at a time, then the suspects one by one.

        Alone, a task can only kill its own worker; and a machine that ran out of memory with all
        workers busy may have enough for one.

        Raises Interrupted on Ctrl-C, with the workers gone, and BackendLost if the executor cancels
        tasks by itself or its workers do not even start.
        """
        try:
            self._run(((task, 0) for task in tasks), self.window)
            while self._suspects:
                self._run(iter([self._suspects.popleft()]), 1)
        except KeyboardInterrupt:
            self._close(kill=True)
            raise Interrupted from None
        except BaseException:
            self._close(kill=True)
            raise
        self._close()

    def _run(self, tasks: Iterator[tuple[Task, int]], window: int) -> None:
        """Run (task, workers it has killed so far) until none is left or in flight."""
        while True:
            executor = self._executor or self._open()
            broken = False
            for item in islice(tasks, window - len(self._flying)):
                try:
                    future = executor.submit(attempt, self.work, item[0])
                except BrokenExecutor:
                    tasks, broken = chain([item], tasks), True
                    break
                self._flying[future] = item
            if not self._flying and not broken:
                return
            if broken or self._collect(TICK_S) or getattr(executor, "_broken", False):
                self._collect(LAST_WORDS_S, until=ALL_COMPLETED)
                self._suspects.extend(self._flying.values())
                self._close(kill=True)
            self.tick()

    def _collect(self, timeout_s: float, until: str = FIRST_COMPLETED) -> bool:
        """Settle what finishes in time. True: the pool is dead."""
        broken = False
        for future in wait(self._flying, timeout_s, until).done:
            broken |= self._settle(future, *self._flying.pop(future))
        return broken

    def _settle(self, future: Future[R | Failure], task: Task, kills: int) -> bool:
        """True if the future says that its pool is dead."""
        try:
            outcome = future.result()
        except CancelledError:
            raise BackendLost("the executor dropped its tasks") from None
        except BrokenExecutor:
            if kills + 1 < MAX_KILLS:
                self._suspects.append((task, kills + 1))
            else:
                self.settled(task, Failure("its worker process died every time", kills + 1))
            return True
        except Exception as error:  # it never reached a worker, or its result never came back
            outcome = Failure.of(error)
        self.settled(task, outcome)
        return False

    def _open(self) -> Executor:
        """A new executor, of which at least one worker has answered."""
        self._executor = executor = self.backend(self.workers)
        try:
            executor.submit(os.getpid).result()
        except BrokenExecutor:
            raise BackendLost(
                "a worker process died at its start; a script that starts a sweep must do so under "
                "'if __name__ == \"__main__\":', since every worker imports it"
            ) from None
        return executor

    def _close(self, kill: bool = False) -> None:
        executor, self._executor = self._executor, None
        if executor is None:
            return
        if kill:
            for future in self._flying:
                future.cancel()
            self._flying.clear()
            for process in list((getattr(executor, "_processes", None) or {}).values()):
                process.kill()
        executor.shutdown(wait=True)
