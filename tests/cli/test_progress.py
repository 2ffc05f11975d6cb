"""Progress as lines where nobody watches."""

from __future__ import annotations

import io
import re

import pytest

from limner.cli import progress
from limner.cli.progress import progress_on


def test_one_line_a_stage_outside_a_terminal() -> None:
    stream = io.StringIO()
    with progress_on(stream) as report:
        for done in range(4):
            report("registration", done, 3)
            report("sections", done, 3)
        report("sections", 3, 3)
    lines = stream.getvalue().splitlines()
    assert [re.sub(r"[\d.]+ s", "T", line) for line in lines] == ["registration: 3 of 3 (T)", "sections: 3 of 3 (T)"]


def test_a_long_stage_is_told_now_and_then_and_begins_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 8.0, 40.0, 60.0, 90.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress.progress_on(stream) as report:
        report("registration", 2, 10)
        report("registration", 10, 10)
        report("training", 1, 10)
        report("training", 5, 10)
    assert stream.getvalue().splitlines() == [
        "registration: 10 of 10 (40.0 s)",
        "training: 5 of 10 (about 50 s left)",  # 50 s for the first half
    ]


def test_bars_in_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress_on(stream) as report:
        report("registration", 1, 4)
        report("registration", 4, 4)
    assert "registration" in stream.getvalue()
    assert "4/4" in stream.getvalue()
