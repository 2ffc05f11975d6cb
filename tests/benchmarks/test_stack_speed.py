"""How the benchmark of speed counts seconds, and which sections it takes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from limner.space import Space
from limner.volume import LabelMap, Volume
from stack_completion import Case
from stack_speed import OF_A_SECTION, OF_A_STACK, Clock, accuracy, few_sections, over_stops, seconds_a_section


class Hand:
    """A clock that stands still unless it is moved on."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def move(self, seconds: float) -> float:
        self.time += seconds
        return seconds


def stack(n: int = 270, every: int = 10) -> Case:
    truth = LabelMap(np.ones((n, 2, 2), np.uint8), Space((n, 2, 2), (0.05, 0.04, 0.04)))
    return Case(Volume(np.ones((n, 2, 2), np.float32), truth.space), truth, every, False)


def test_a_stage_inside_another_counts_for_itself_alone() -> None:
    hand = Hand()
    clock, inner = Clock(hand), SimpleNamespace(work=hand.move)
    outer = SimpleNamespace(work=lambda: hand.move(1.0) + inner.work(2.0) + hand.move(4.0) + inner.work(8.0))
    with clock.on({"outer": (outer, "work"), "inner": (inner, "work")}, "rest"):
        hand.move(16.0)
        assert outer.work() == 15.0  # what is counted gives what it gave
        inner.work(32.0)
    assert clock.seconds == {"outer": 5.0, "inner": 42.0, "rest": 16.0}
    inner.work(64.0)  # no longer counted
    assert sum(clock.seconds.values()) == 63.0


def test_a_stage_that_fails_is_counted_and_what_was_patched_is_put_back() -> None:
    hand = Hand()

    def fail() -> None:
        hand.move(3.0)
        raise KeyError("lost")

    clock, owner = Clock(hand), SimpleNamespace(fail=fail)
    with pytest.raises(KeyError, match="lost"), clock.on({"failing": (owner, "fail")}, "rest"):
        owner.fail()
    assert owner.fail is fail
    assert clock.seconds == {"failing": 3.0, "rest": 0.0}


def test_seconds_add_up_over_stops(tmp_path: Path) -> None:
    assert over_stops({"faults": 1.0, "rho": 2.0}, None) == {"faults": 1.0, "rho": 2.0}
    over_stops({"faults": 1.0, "rho": 2.0}, tmp_path)
    expected = {"faults": 5.0, "rho": 2.0, "scales": 8.0}
    assert over_stops({"faults": 4.0, "scales": 8.0}, tmp_path) == expected


@pytest.mark.parametrize(("gaps", "each"), [(3, 2), (1, 9), (25, 1), (4, 3)])
def test_sections_are_withheld_ones_of_as_many_gaps_as_asked_for(gaps: int, each: int) -> None:
    chosen = few_sections(stack(), gaps, each)
    assert len(set(chosen)) == len(chosen) == gaps * each
    assert set(chosen) <= set(stack().sections("everywhere"))
    assert np.unique([z // 10 for z in chosen], return_counts=True)[1].tolist() == [each] * gaps


def test_seconds_of_a_section_in_a_whole_run() -> None:
    """450 s over 225 sections, 36 s of local training in two gaps of nine, and 12 s over three sections."""
    own = {"local training": 36.0, "GEM": 9.0, "fusion": 3.0}
    assert seconds_a_section({"registration": 50.0, "training": 400.0}, own, stack(), [11, 15, 42]) == 2.0 + 2.0 + 4.0


def test_accuracy_is_that_of_the_pixels_near_structures() -> None:
    labels = np.zeros((1, 40, 40), np.uint8)
    labels[0, 10:20, 10:20] = 1
    truth = LabelMap(labels, Space(labels.shape, (0.05, 0.04, 0.04)))
    case = Case(Volume(labels.astype(np.float32), truth.space), truth, 10, False)
    far, near = labels[0].astype(int), labels[0].astype(int)
    far[39, 39], near[10, 10] = 1, 0
    assert accuracy(case, 0, far) == 1.0
    outside = [max(0, 10 - i, i - 19) for i in range(40)]  # pixels from the structure along either axis
    counted = sum(y**2 + x**2 <= 5**2 for y in outside for x in outside)  # of .04 mm
    assert accuracy(case, 0, near) == pytest.approx(1 - 1 / counted)


def test_every_stage_that_is_timed_is_there() -> None:
    for owner, name in {**OF_A_STACK, **OF_A_SECTION}.values():
        assert callable(getattr(owner, name))
