"""One worker per core with one torch thread each.

torch's own threads spin at barriers: on blocks this small and a busy machine they were 60 times slower than one.
"""

from __future__ import annotations

import os
import sys
from _thread import start_new_thread
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Semaphore, local

import torch

from bitroute.backends._compiled import use_compiled

TURN_SECONDS = 50e-6
AHEAD = 16
_worker = local()


class Stopped(Exception):
    """Ends a worker for whose work nobody waits any more."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _short_turns() -> Iterator[None]:
    """Whoever comes back from a block's arithmetic waits for Python a tenth of a block's time, not for ten blocks'."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_all(tasks: Iterable[Callable[[], None]]) -> None:
    """Runs the tasks, as many at a time as there are cores, and what they leave `aside`.

    The first error ends the rest and is raised; it, or an interrupt, stops running tasks at their next `check_stop`.
    A signal may come while Python holds a lock, which then stays held: the caller's thread takes none but a queue's.
    """
    crew, ended = _Crew(), SimpleQueue[BaseException | None]()

    def work() -> None:
        try:
            _work(crew, tasks)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    with torch_threads(1), _short_turns():
        start_new_thread(work, ())
        try:
            error = ended.get()
        except BaseException:
            crew.stop = True
            ended.get()
            raise
    if error:
        raise error


def _work(crew: _Crew, tasks: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(cores(), initializer=_start, initargs=(crew,)) as pool:
        futures = [pool.submit(_unless_stopped, task) for task in tasks]
        try:
            if not wait(futures, return_when=FIRST_EXCEPTION).not_done:
                wait(crew.left)
        finally:
            crew.stop = True
            for threads in (pool, crew.disk):
                threads.shutdown(cancel_futures=True)
    for future in [*futures, *crew.left]:
        error = None if future.cancelled() else future.exception()
        if error and not isinstance(error, Stopped):
            raise error


def aside(work: Callable[[], None]) -> None:
    """Called in a task: leaves what waits for the disk to one more thread, so that the worker can go on.

    Where the disk is that far behind that AHEAD such works wait, with a file open each, the worker waits too.
    """
    crew: _Crew = _worker.crew
    crew.places.acquire()
    future = crew.disk.submit(work)
    crew.left.append(future)
    future.add_done_callback(crew.heed)


def check_stop() -> None:
    """Called between blocks: raises Stopped in a worker whose `run_all` is ending."""
    crew: _Crew | None = getattr(_worker, "crew", None)
    if crew and crew.stop:
        raise Stopped


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Crew:
    """What the threads of one `run_all` share."""

    def __init__(self) -> None:
        self.stop = False
        self.places = Semaphore(AHEAD)
        self.disk = ThreadPoolExecutor(1, initializer=_start, initargs=(self,))
        self.left: list[Future[None]] = []

    def heed(self, future: Future[None]) -> None:
        self.places.release()
        if not future.cancelled() and future.exception():
            self.stop = True


def _unless_stopped(task: Callable[[], None]) -> None:
    check_stop()
    task()


def _start(crew: _Crew) -> None:
    torch.set_num_threads(1)
    use_compiled()
    _worker.crew = crew
