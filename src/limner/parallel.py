"""Where work is done: on which device, and independent pieces of it side by side, stopped together."""

from __future__ import annotations

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
