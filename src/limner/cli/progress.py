"""How far a run has come: bars with time left in a terminal, lines now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Report = Callable[[str, int, int], None]
SECONDS_BETWEEN_LINES = 30  # where there is no terminal


@contextmanager
def progress_on(stream: TextIO | None = None) -> Iterator[Report]:
    """Show progress on `stream` (default: stderr) while the block runs.

    Yields
    ------
    callable
        Takes the name of a stage, how much of it is done and how much there is; may be called from any thread.

    Examples
    --------
    >>> with progress_on(sys.stdout) as report:  # doctest: +ELLIPSIS
    ...     for done in range(3):
    ...         report("registration", done, 2)
    registration: 2 of 2 (... s)
    """
    stream = stream or sys.stderr
    if stream.isatty():
        with _bars(stream) as bars:
            yield _to_bars(bars)
    else:
        yield _to_lines(stream)


def _bars(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )


def _to_bars(bars: Progress) -> Report:
    tasks: dict[str, TaskID] = {}
    lock = threading.Lock()

    def report(stage: str, done: int, total: int) -> None:
        with lock:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

    return report


def _to_lines(stream: TextIO) -> Report:
    """A stage begins when the one before it ended, for its first report comes when something of it is done already."""
    began = told = time.monotonic()
    finished: set[str] = set()
    lock = threading.Lock()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal began, told
        with lock:
            now = time.monotonic()
            if stage in finished or (done < total and now - told < SECONDS_BETWEEN_LINES):
                return
            told, seconds = now, now - began
            if done >= total:
                finished.add(stage)
                began = now
                print(f"{stage}: {done} of {total} ({seconds:.1f} s)", file=stream, flush=True)
            else:
                left = seconds * (total - done) / max(done, 1)
                print(f"{stage}: {done} of {total} (about {left:.0f} s left)", file=stream, flush=True)

    return report
