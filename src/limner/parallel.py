"""Where work is done: on which device, in which memory, and independent pieces side by side, stopped together."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    items: Sequence[Item], work: Callable[[Item], Result], jobs: int, progress: Callable[[int, int], None]
) -> dict[Item, Result]:
    """Do `work` on every item in `jobs` threads that share torch's threads between them.

    When a piece of work fails or the caller is interrupted (Ctrl-C), those that run are finished, none is begun any
    more, and the exception is raised.

    Parameters
    ----------
    items : sequence
        Hashable, each once.
    work : callable
        ``work(item)`` gives the item's result; numpy and torch work leaves the other threads free.
    jobs : int
        Threads; no more than there are items are started.
    progress : callable
        ``progress(done, total)``, called in the caller's thread after each item.

    Returns
    -------
    dict
        Result of each item, in the order of `items`.

    Examples
    --------
    >>> side_by_side([3, 1, 2], lambda item: item**2, jobs=2, progress=lambda done, total: None)
    {3: 9, 1: 1, 2: 4}
    """
    if not items:
        return {}
    jobs = max(1, min(jobs, len(items)))
    stop = threading.Event()

    def unless_stopped(item: Item) -> tuple[Item, Result] | None:
        return None if stop.is_set() else (item, work(item))

    done: dict[Item, Result] = {}
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(max(1, threads // jobs),)) as pool:
        try:
            for future in as_completed([pool.submit(unless_stopped, item) for item in items]):
                done |= [found] if (found := future.result()) is not None else []
                progress(len(done), len(items))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)
    return {item: done[item] for item in items}


def chosen_device(device: str) -> str:
    """``cpu`` or ``cuda``; raise ValueError for another name, and for a GPU that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"complete(): device is {device!r}; give 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("complete(): device is 'cuda', but torch finds no CUDA GPU here; give 'cpu' or 'auto'")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def usable_cores() -> int:
    """Processor cores that this process may use: of a cluster's node those that it was given."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def jobs_on(device: str, asked: int) -> int:
    """How many pieces of work go side by side: as many as asked, for 0 as there are usable cores; one on a GPU."""
    return 1 if device != "cpu" else asked or usable_cores()


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it needs next.

    glibc hands large blocks back at once, and getting them anew costs a third of the time of a network's inference on
    a CPU: the system clears each page again. For commands that do one thing over and over; returns False where the C
    library knows no such thing, and nothing changes.

    References
    ----------
    ``man 3 mallopt``: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(-8, 1), mallopt(-4, 0), mallopt(-1, 2_000_000_000), mallopt(-2, 1 << 28)])
