"""Progress as lines where nobody watches."""

from __future__ import annotations

import io
import re

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
