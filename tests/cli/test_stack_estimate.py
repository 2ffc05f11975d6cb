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


def test_it_is_near_what_hundreds_of_structures_took() -> None:
    """The whole runs of docs/benchmarks.md, one core: the Allen atlas (labels only), and the fine mouse stack."""
    atlas = Work(528, 475, (320, 456), (320, 456), structures=200, steps=0, channels=1, pairs=0)
    assert atlas.seconds == pytest.approx(357, rel=0.6)
    assert atlas.memory == pytest.approx(2.8e9, rel=0.3)
    fine = Work(270, 243, (193, 271), (193, 271), structures=250, steps=0, channels=1)
    assert fine.seconds == pytest.approx(221, rel=0.6)
    part = replace(fine, sections=31, unlabelled=27, all_structures=323, network_pixels=68)
    few, many = (replace(part, steps=steps).seconds for steps in (1, 1000))
    assert (many - few) / 999 == pytest.approx(0.3, rel=0.6)
    assert replace(part, steps=1000, all_structures=700).seconds > replace(part, steps=1000).seconds + 100


def test_the_papers_network_takes_far_longer() -> None:
    assert replace(LARGE, large_network=True).seconds > 5 * LARGE.seconds
    more = replace(LARGE, whole_network=True).seconds - LARGE.seconds
    assert more == pytest.approx(180 / 2 * (15.3 - 0.58), rel=0.5)  # two jobs; docs/benchmarks.md, "Speed of gem"
    assert replace(LARGE, pairs=0).seconds < LARGE.seconds < replace(LARGE, pairs=6).seconds


def test_sections_are_never_in_memory_at_once() -> None:
    all_at_once = 200 * 10_000 * 10_000 * 3
    assert LARGE.memory < all_at_once / 10
    assert replace(LARGE, working_size=(2000, 2000)).memory > 3 * LARGE.memory


def test_it_grows_with_the_work() -> None:
    for more in ({"sections": 400}, {"unlabelled": 190}, {"structures": 30}, {"jobs": 1}, {"size": (20_000, 10_000)}):
        assert replace(LARGE, **more).seconds > LARGE.seconds
    assert replace(LARGE, steps=0).seconds < LARGE.seconds - 500


def test_in_words() -> None:
    assert str(LARGE) == "about 48 min and 4 GB of memory"
    assert not Work(3, 2, (30, 30), (30, 30), structures=2, steps=0).is_long
    quick_and_large = Work(3, 2, (15_000, 15_000), (1000, 1000), structures=30, steps=0, jobs=8, pairs=0)
    assert quick_and_large.memory > 4e9
    assert quick_and_large.is_long
