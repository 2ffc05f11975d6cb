"""What the benchmark of stack completion does to a stack, and how it scores."""

import numpy as np
import pytest

from limner.metrics.pixels import evaluation_mask, score_stack
from limner.space import Space
from limner.volume import LabelMap, Volume
from stack_completion import ROWS, Case, count, displace, merged, pooled_dice, resampled, table

SPACING = (0.05, 0.04, 0.02)


def labelled_blocks(seed: int = 0, n: int = 6) -> LabelMap:
    draw = np.random.default_rng(seed)
    labels = np.zeros((n, 40, 60), np.uint8)
    for z in range(n):
        for structure in (1, 2, 3):
            y, x = draw.integers(5, 20), draw.integers(5, 40)
            labels[z, y : y + 12, x : x + 14] = structure
    return LabelMap(labels, Space(labels.shape, SPACING))


def counts_of(predicted: LabelMap, truth: LabelMap, sections: list[int]) -> list:
    masks = {z: evaluation_mask(truth.labels[z], SPACING[1:], 0.2) for z in sections}
    return [count(predicted.labels[z], truth.labels[z], masks[z], 4) for z in sections]


def test_counts_give_the_scores_of_limner() -> None:
    truth, predicted = labelled_blocks(0), labelled_blocks(1)
    sections = [1, 2, 4]
    expected = score_stack(predicted, truth, sections, 0.2)
    counts = counts_of(predicted, truth, sections)
    assert [c.right / c.n for c in counts] == pytest.approx(list(expected.accuracy.values()))
    dice = pooled_dice(sum(c.both for c in counts), sum(c.sizes for c in counts))
    assert dice == pytest.approx(expected.mean_dice)


def test_structures_that_occur_nowhere_do_not_lower_dice() -> None:
    assert pooled_dice(np.array([9, 3, 0]), np.array([20, 8, 0])) == pytest.approx(0.75)


def test_gaps_are_drawn_whole() -> None:
    truth, predicted = labelled_blocks(0), labelled_blocks(1)
    good, bad = counts_of(truth, truth, [0, 1]), counts_of(predicted, truth, [2, 3])
    draws = resampled([*good, *bad], gaps=[0, 0, 1, 1])
    low = np.median([c.right / c.n for c in bad])
    # of two gaps: the good one twice, the bad one twice, or one of each; never parts of a gap
    mixed = np.median([c.right / c.n for c in [*good, *bad]])
    assert {round(v, 9) for v in draws["median_accuracy"]} == {1.0, round(low, 9), round(mixed, 9)}
    assert 0.2 < np.mean(draws["median_accuracy"] == 1.0) < 0.3


def test_rows_are_compared_draw_by_draw() -> None:
    truth, predicted = labelled_blocks(0), labelled_blocks(1)
    first, second = (resampled(counts_of(predicted, truth, [1, 2, 3]), [0, 1, 2]) for _ in range(2))
    assert np.array_equal(first["median_accuracy"], second["median_accuracy"])


def test_displaced_sections_are_turned_and_shifted_by_what_was_drawn() -> None:
    n = 40
    labels = np.zeros((n, 41, 61), np.uint8)
    labels[:, 10:31, 10:51] = 1
    labels[:, 18:23, 48:51] = 2  # its side tells which way a section was turned
    truth = LabelMap(labels, Space(labels.shape, SPACING))
    moved = displace(Volume(labels.astype(np.float32), truth.space), truth, seed=3)[1].labels
    draw = np.random.default_rng(3)
    angles, shifts = draw.uniform(-10, 10, n), draw.uniform(-0.1, 0.1, (n, 2)) * 61 * SPACING[2]
    centre = (np.array(moved.shape[1:]) - 1) / 2
    mm = [(np.argwhere(m > 0).mean(axis=0) - centre) * SPACING[1:] for m in moved]
    assert np.allclose(mm, shifts, atol=0.021)  # half a pixel
    handles = [
        (np.argwhere(m == 2).mean(axis=0) - centre) * SPACING[1:] - s for m, s in zip(moved, shifts, strict=True)
    ]
    found = [np.degrees(np.arctan2(-y, x)) for y, x in handles]
    assert np.allclose(found, angles, atol=3.0)
    assert np.ptp(angles) > 15


def test_displacing_loses_nothing_and_moves_images_with_labels() -> None:
    truth = labelled_blocks(2, n=20)
    images = Volume(100.0 * (truth.labels == 2).astype(np.float32), truth.space)
    moved_images, moved = displace(images, truth)
    areas, before = np.array([(t.labels == 1).sum(axis=(1, 2)) for t in (moved, truth)])
    assert np.allclose(areas, before, rtol=0.12)
    assert (moved.labels[:, [0, -1]] == 0).all() and (moved.labels[:, :, [0, -1]] == 0).all()
    bright = moved_images.pixels / np.maximum(moved_images.pixels.max(axis=(1, 2), keepdims=True), 1) > 0.5
    assert ((bright == (moved.labels == 2)).mean(axis=(1, 2)) > 0.98).all()
    factors = np.array([p.max() for p in moved_images.pixels]) / 100
    assert factors.min() > 0.79 and factors.max() < 1.21 and np.ptp(factors) > 0.2


def test_sections_between_labels_only() -> None:
    truth = LabelMap(np.ones((270, 2, 2), np.uint8), Space((270, 2, 2), SPACING))
    images = Volume(np.ones((270, 2, 2), np.float32), truth.space)
    tenth, fortieth = Case(images, truth, 10, False), Case(images, truth, 40, False)
    assert len(tenth.sections("everywhere")) == 225
    assert max(fortieth.sections("everywhere")) == 239
    assert tenth.sections("piece") == [*range(101, 110), *range(111, 120)]
    assert fortieth.sections("piece") == [*range(121, 160), *range(161, 200)]
    fourth = tenth.sections("fourth")
    assert set(np.diff(fourth)) == {4, 8} and {z % 10 for z in fourth} == {2, 4, 6, 8}
    known = tenth.annotations.label_map.labels
    assert known[10].all() and not known[11].any()


def test_table_leaves_unmeasured_cost_empty() -> None:
    result = {
        **{"title": "copy", "median_accuracy": 0.5, "minimum_accuracy": 0.25, "mean_accuracy": 0.5, "mean_dice": 0.75},
        "intervals": {"median_accuracy": [0.4, 0.6], "mean_dice": [0.7, 0.8]},
    }
    expected = "| copy | 0.5000 (0.400 to 0.600) | 0.2500 | 0.5000 | 0.7500 (0.700 to 0.800) |  |  |  |"
    assert table([result]).splitlines()[-1] == expected


def test_rows_of_an_earlier_call_stay_where_no_newer_were_made() -> None:
    def case(**rows: int) -> dict[str, list[dict[str, object]]]:
        named = {row.group: row.title for row in ROWS}
        return {"everywhere": [{"title": named[group], "maker": maker} for group, maker in rows.items()], "fourth": []}

    found = merged({"every10": case(gem=0, nearest=0), "every5": case(linear=0)}, {"every10": case(fusion=1, gem=1)})
    assert [(row["title"], row["maker"]) for row in found["every10"]["everywhere"]] == [
        ("copy of the nearest labelled section", 0),
        ("Limner, fusion", 1),
        ("Limner, gem", 1),
    ]
    assert found["every5"] == case(linear=0)
