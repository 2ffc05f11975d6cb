"""Side by side: results in order, progress in the caller's thread, and all stop together."""

import subprocess
import sys
import threading

import pytest
import torch

from limner.parallel import jobs_on, side_by_side


def quiet(done, total):
    """No progress."""


def test_pieces_really_run_at_the_same_time():
    """Each waits for the other: one after the other they would never meet."""
    meeting = threading.Barrier(2, timeout=30)
    assert side_by_side([0, 1], lambda _: meeting.wait() >= 0, 2, quiet) == {0: True, 1: True}


def test_results_keep_the_order_of_the_items_and_progress_comes_from_the_callers_thread():
    first_may_end = threading.Event()

    def work(item):
        if item == "slow":
            first_may_end.wait(30)
        else:
            first_may_end.set()
        return item.upper()

    told = []
    found = side_by_side(["slow", "quick"], work, 2, lambda *said: told.append((*said, threading.current_thread())))
    assert list(found.items()) == [("slow", "SLOW"), ("quick", "QUICK")]
    assert told == [(1, 2, threading.current_thread()), (2, 2, threading.current_thread())]


def test_after_a_failure_nothing_more_is_begun():
    begun = []

    def work(item):
        begun.append(item)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        side_by_side(list(range(100)), work, 1, quiet)
    assert len(begun) < 100


def test_an_interruption_in_progress_lets_running_work_end_and_begins_no_more():
    ended = []

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(list(range(100)), ended.append, 1, interrupt)
    assert 1 <= len(ended) < 100


def test_torch_threads_are_shared_out_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        seen = side_by_side([0, 1], lambda _: torch.get_num_threads(), 2, quiet)
        assert set(seen.values()) == {2}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_no_items_no_threads():
    assert side_by_side([], lambda item: item, 4, quiet) == {}


def test_freed_memory_is_kept():
    """In a process of its own, for it cannot be undone: what is freed comes back without its pages being cleared."""
    script = """
import resource
import numpy as np
from limner.parallel import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 26, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(keep_freed_memory(), faults(), faults(), faults())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, *counts = run.stdout.split()
    if kept == "False":
        pytest.skip("this C library cannot keep it")
    assert int(counts[2]) < 100


def test_no_more_jobs_than_cores_that_the_process_may_use(monkeypatch):
    """A cluster gives a job some cores of a node."""
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 4, 70}, raising=False)
    assert jobs_on("cpu", 0) == 3
    assert jobs_on("cpu", 8) == 8
    assert jobs_on("cuda", 0) == 1
    monkeypatch.delattr("os.sched_getaffinity")
    assert jobs_on("cpu", 0) == 128
