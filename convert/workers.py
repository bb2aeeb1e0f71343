"""One worker per core with one torch thread each.

torch's own threads spin at barriers: on blocks this small and a busy machine they were 60 times slower than one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event, local

import torch

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


def run_all(tasks: Iterable[Callable[[], None]]) -> None:
    """Runs the tasks, as many at a time as there are cores; the first error ends the rest and is raised.

    An error or an interrupt stops running tasks at their next `check_stop`.
    """
    stop = Event()
    futures: list[Future[None]] = []
    with torch_threads(1), ThreadPoolExecutor(cores(), initializer=_start, initargs=(stop,)) as pool:
        try:
            futures += (pool.submit(task) for task in tasks)
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error and not isinstance(error, Stopped):
            raise error


def check_stop() -> None:
    """Called between blocks: raises Stopped in a worker whose `run_all` is ending."""
    stop: Event | None = getattr(_worker, "stop", None)
    if stop and stop.is_set():
        raise Stopped


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(stop: Event) -> None:
    torch.set_num_threads(1)
    _worker.stop = stop
