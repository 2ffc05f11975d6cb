"""What a run is said to take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limner.cli.stack_estimate import Work

LARGE = Work(200, 180, (10_000, 10_000), (500, 500), structures=15, steps=4000, jobs=2)


def test_it_is_near_what_was_measured() -> None:
    """The runs of docs/benchmarks.md: 12 sections by fusion on one core, and a small stack by gem on two."""
    fusion = Work(12, 8, (5790, 8130), (644, 904), structures=14, steps=0)
    assert fusion.seconds == pytest.approx(84, rel=0.5)
    assert fusion.memory == pytest.approx(1.79e9, rel=0.3)
    small = Work(270, 225, (193, 271), (193, 271), structures=15, steps=4000, jobs=2, channels=1)
    assert small.seconds == pytest.approx(960, rel=0.5)
    assert small.memory == pytest.approx(1.5e9, rel=0.4)


def test_sections_are_never_in_memory_at_once() -> None:
    all_at_once = 200 * 10_000 * 10_000 * 3
    assert LARGE.memory < all_at_once / 10
    assert replace(LARGE, working_size=(2000, 2000)).memory > 3 * LARGE.memory


def test_it_grows_with_the_work() -> None:
    for more in ({"sections": 400}, {"unlabelled": 190}, {"structures": 30}, {"jobs": 1}, {"size": (20_000, 10_000)}):
        assert replace(LARGE, **more).seconds > LARGE.seconds
    assert replace(LARGE, steps=0).seconds < LARGE.seconds - 500


def test_in_words() -> None:
    assert str(LARGE) == "about 47 min and 4 GB of memory"
    assert not Work(3, 2, (30, 30), (30, 30), structures=2, steps=0).is_long
