"""The workers: all tasks run, the first error is the one that is raised, and nobody finishes work for nothing."""

from __future__ import annotations

import time
from functools import partial
from signal import SIGINT, pthread_kill
from threading import Event, Timer, main_thread

import pytest

from bitroute.convert.workers import aside, check_stop, run_all


def work_for_a_minute(started: Event) -> None:
    started.set()
    for _ in range(6000):
        check_stop()
        time.sleep(0.01)


def test_every_task_runs() -> None:
    done = list[int]()
    run_all(partial(done.append, number) for number in range(100))
    assert sorted(done) == list(range(100))


def test_an_error_stops_the_other_tasks_and_is_raised() -> None:
    started = Event()

    def fail() -> None:
        started.wait(10)
        raise ValueError("the first error")

    start = time.monotonic()
    with pytest.raises(ValueError, match="the first error"):
        run_all([partial(work_for_a_minute, started), fail])
    assert time.monotonic() - start < 10


def test_an_interrupt_stops_every_task() -> None:
    assert main_thread().ident
    start, started = time.monotonic(), Event()
    Timer(0.2, pthread_kill, (main_thread().ident, SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_all(partial(work_for_a_minute, started) for _ in range(1000))
    assert time.monotonic() - start < 10


def test_outside_a_worker_nothing_stops() -> None:
    check_stop()


def test_work_left_aside_is_done_before_all_is_over() -> None:
    done = list[int]()

    def slowly(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    run_all(partial(aside, partial(slowly, number)) for number in range(10))
    assert sorted(done) == list(range(10))


def test_an_error_aside_stops_the_tasks_and_is_raised() -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    start = time.monotonic()
    with pytest.raises(OSError, match="the disk is full"):
        run_all([partial(aside, fail), partial(work_for_a_minute, Event())])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("milliseconds", range(8))
def test_an_interrupt_at_any_moment_ends_the_wait(milliseconds: int) -> None:
    """It may come while the locks of thousands of futures are taken."""
    assert main_thread().ident
    timer = Timer(milliseconds / 1000, pthread_kill, (main_thread().ident, SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        run_all([*[check_stop] * 3000, partial(work_for_a_minute, Event())])
