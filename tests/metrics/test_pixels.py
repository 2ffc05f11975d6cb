"""Scores against brute force, scipy and hand-derived numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from skimage.morphology import disk

from limner.metrics.pixels import (
    StackScore,
    accuracy,
    confusion,
    dice,
    dice_per_label,
    evaluation_mask,
    expected_calibration_error,
    mean_dice,
    overlap_per_label,
    score_stack,
)
from limner.space import Space
from limner.volume import LabelMap

NAN = float("nan")


def random_labels(seed: int, shape: tuple[int, ...] = (30, 40)) -> NDArray[np.int32]:
    values = np.array([0, 0, 0, 1, 2, 40, 65000], dtype=np.int32)
    return np.random.default_rng(seed).choice(values, size=shape)


def brute_mask(truth: NDArray[np.int32], spacing: tuple[float, float], within: float) -> NDArray[np.bool_]:
    mask = np.zeros(truth.shape, dtype=bool)
    structures = np.argwhere(truth > 0) * spacing
    for index in np.ndindex(truth.shape):
        gaps = np.linalg.norm(structures - np.asarray(index) * spacing, axis=1)
        mask[index] = gaps.size > 0 and gaps.min() <= within + 1e-9
    return mask


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.05, 0.02), (0.3, 0.7)])
def test_mask_agrees_with_brute_force(spacing: tuple[float, float]) -> None:
    truth = np.zeros((20, 25), dtype=np.int32)
    truth[9:11, 12] = 3
    truth[2, 20] = 1
    for within in (0.0, 2.5 * spacing[0], 3 * spacing[1]):
        np.testing.assert_array_equal(evaluation_mask(truth, spacing, within), brute_mask(truth, spacing, within))


def test_mask_agrees_with_dilation_by_a_disk() -> None:
    truth = (np.random.default_rng(1).random((60, 50)) > 0.99).astype(np.uint8)
    expected = binary_dilation(truth > 0, disk(4))
    np.testing.assert_array_equal(evaluation_mask(truth, (0.04, 0.04), 0.16), expected)


def test_anisotropic_spacing_widens_the_mask_along_the_finer_axis() -> None:
    truth = np.zeros((21, 21), dtype=np.uint8)
    truth[10, 10] = 1
    mask = evaluation_mask(truth, (0.1, 0.05), 0.2)
    assert mask[:, 10].sum() == 5  # two pixels of 0.1 mm either way
    assert mask[10].sum() == 9  # four pixels of 0.05 mm either way
    np.testing.assert_array_equal(evaluation_mask(truth, (0.05, 0.1), 0.2), mask.T)


def test_mask_of_a_section_without_structures_is_empty() -> None:
    assert not evaluation_mask(np.zeros((4, 4), dtype=int), (1, 1), 100).any()


def test_accuracy_by_hand() -> None:
    predicted, truth = np.array([[1, 2, 0], [0, 0, 5]]), np.array([[1, 2, 3], [0, 4, 5]])
    assert accuracy(predicted, truth) == pytest.approx(4 / 6)
    assert accuracy(predicted, truth, truth > 2) == pytest.approx(1 / 3)
    assert math.isnan(accuracy(predicted, truth, truth > 9))


def test_dice_and_confusion_agree_with_brute_force() -> None:
    predicted, truth = random_labels(0), random_labels(1)
    mask = np.random.default_rng(2).random(truth.shape) > 0.4
    for where in (None, mask):
        selected = np.ones(truth.shape, dtype=bool) if where is None else where
        labels, counts = confusion(predicted, truth, where)
        assert labels.tolist() == [0, 1, 2, 40, 65000]
        for i, a in enumerate(labels):
            for j, b in enumerate(labels):
                assert counts[i, j] == ((truth == a) & (predicted == b) & selected).sum()
        scores = dice_per_label(predicted, truth, where)
        assert set(scores) == {1, 2, 40, 65000}
        for label, score in scores.items():
            p, t = (predicted == label) & selected, (truth == label) & selected
            assert score == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()), abs=1e-15)
            assert dice(predicted, truth, label, where) == score


def test_large_and_negative_labels_are_counted_like_small_ones() -> None:
    predicted, truth = random_labels(0), random_labels(1)
    labels, counts = confusion(predicted, truth)
    for offset in (2**24, -100):
        shifted, same = confusion(
            np.where(predicted > 0, predicted + offset, 0), np.where(truth > 0, truth + offset, 0)
        )
        order = np.argsort(np.where(labels > 0, labels + offset, 0))
        assert shifted.tolist() == np.where(labels > 0, labels + offset, 0)[order].tolist()
        np.testing.assert_array_equal(same, counts[np.ix_(order, order)])
    labels, counts = confusion(predicted[:0], truth[:0])
    assert labels.tolist() == [0]
    assert counts.tolist() == [[0]]


def test_dice_is_symmetric_and_knows_absent_labels() -> None:
    predicted, truth = np.array([1, 1, 0, 7]), np.array([1, 0, 0, 0])
    assert dice_per_label(predicted, truth) == dice_per_label(truth, predicted)
    assert dice(predicted, truth, 7) == 0.0  # in one of the two only
    assert math.isnan(dice(predicted, truth, 3))  # in neither
    assert dice(predicted, truth, 1) == pytest.approx(2 / 3)
    assert mean_dice({1: 2 / 3, 7: 0.0, 3: NAN}) == pytest.approx(1 / 3)
    assert math.isnan(mean_dice({}))


def test_labels_of_different_dtypes_compare_by_value() -> None:
    predicted, truth = np.array([200, 3], dtype=np.uint8), np.array([200, -1], dtype=np.int16)
    assert accuracy(predicted, truth) == 0.5
    assert dice_per_label(predicted, truth) == {3: 0.0, 200: 1.0}


@pytest.mark.parametrize("function", [accuracy, confusion])
def test_shapes_must_agree(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=rf"{function.__name__}\(\): predicted labels have shape \(2,\), the truth"):
        function(np.zeros(2, dtype=int), np.zeros((1, 2), dtype=int))


def brute_calibration(sure: NDArray[np.float64], right: NDArray[np.bool_], bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = (sure >= b / bins) & ((sure < (b + 1) / bins) | ((b == bins - 1) & (sure == 1)))
        if inside.any():
            total += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_agrees_with_brute_force(bins: int) -> None:
    rng = np.random.default_rng(3)
    sure = np.concatenate([rng.random(500), [0.0, 1.0, 0.5, 0.25]])
    right = rng.random(sure.shape) < sure**2
    assert expected_calibration_error(sure, right, bins) == pytest.approx(brute_calibration(sure, right, bins))


def test_calibration_error_by_hand() -> None:
    assert expected_calibration_error([0.75] * 4, [True, True, True, False]) == 0
    assert expected_calibration_error([1.0, 1.0], [False, False]) == 1
    # gaps 0.2 in one interval (weight 3) and 0.4 in another (weight 1)
    assert expected_calibration_error([0.8, 0.4], [True, False], weights=[3, 1]) == pytest.approx(0.25)
    assert expected_calibration_error([0.8, 0.1], [True, True], weights=[1, 0]) == pytest.approx(0.2)
    assert math.isnan(expected_calibration_error([], []))
    with pytest.raises(ValueError, match="2 confidences, 1 outcomes"):
        expected_calibration_error([0.1, 0.2], [True])
    with pytest.raises(ValueError, match=r"to 1\.5; give 0 to 1"):
        expected_calibration_error([1.5], [True])


def stacks() -> tuple[LabelMap, LabelMap]:
    space = Space(shape=(5, 30, 40), spacing=(0.2, 0.05, 0.1))
    truth = random_labels(4, space.shape)
    truth[:, :12] = 0
    truth[3] = 0
    predicted = np.where(np.random.default_rng(5).random(truth.shape) < 0.7, truth, random_labels(6, space.shape))
    predicted[:, 29] = 9  # a label that the truth lacks
    return LabelMap(predicted, space), LabelMap(truth, space)


def test_stack_score_agrees_with_the_single_sections() -> None:
    predicted, truth = stacks()
    sections = [0, 1, 3, 4]
    score = score_stack(predicted, truth, sections, within_mm=0.2)
    assert list(score.accuracy) == sections
    masks = np.stack([evaluation_mask(t, (0.05, 0.1), 0.2) for t in truth.labels])
    masks[2] = False
    for z in (0, 1, 4):
        assert score.accuracy[z] == pytest.approx(accuracy(predicted.labels[z], truth.labels[z], masks[z]))
        assert score.dice[z] == dice_per_label(predicted.labels[z], truth.labels[z], masks[z])
    assert math.isnan(score.accuracy[3])
    assert score.dice[3] == {}
    pooled = dice_per_label(predicted.labels, truth.labels, masks)
    assert score.pooled_dice == pytest.approx(pooled)
    assert score.pooled_dice[9] == 0
    assert score.mean_dice == pytest.approx(np.mean(list(pooled.values())))
    known = [score.accuracy[z] for z in (0, 1, 4)]
    assert score.median_accuracy == pytest.approx(np.median(known))
    assert score.minimum_accuracy == min(known)


def test_pooled_dice_differs_from_the_mean_of_the_sections() -> None:
    space = Space(shape=(2, 1, 4), spacing=(1, 1, 1))
    truth = LabelMap(np.array([[[1, 1, 1, 1]], [[1, 0, 0, 0]]]), space)
    predicted = LabelMap(np.array([[[1, 1, 1, 1]], [[0, 0, 0, 0]]]), space)
    score = score_stack(predicted, truth, [0, 1], within_mm=0)
    assert score.pooled_dice == {1: pytest.approx(8 / 9)}  # the mean of the sections' 1 and 0 would be 1/2
    assert score.accuracy == {0: 1.0, 1: 0.0}


def test_stack_score_as_json() -> None:
    predicted, truth = stacks()
    values = json.loads(json.dumps(score_stack(predicted, truth, [1, 3], 0.2).to_json({40: "Pons"}), allow_nan=False))
    assert values["within_mm"] == 0.2
    assert values["structures"]["40"]["name"] == "Pons"
    assert values["structures"]["1"]["name"] == "label 1"
    assert values["sections"]["3"] == {"accuracy": None, "mean_dice": None, "dice": {}}
    assert set(values["sections"]["1"]["dice"]) == {"1", "2", "9", "40", "65000"}


def test_score_of_nothing_is_nan() -> None:
    score = StackScore(1.0, {0: NAN}, {0: {}}, {})
    assert math.isnan(score.median_accuracy)
    assert math.isnan(score.minimum_accuracy)
    assert score.to_json()["mean_dice"] is None


def test_stack_score_refuses_what_does_not_fit() -> None:
    predicted, truth = stacks()
    with pytest.raises(ValueError, match=r"predicted labels have shape \(4, 30, 40\), the truth \(5, 30, 40\)"):
        score_stack(LabelMap(predicted.labels[:4], Space((4, 30, 40), (0.2, 0.05, 0.1))), truth, [0], 1)
    with pytest.raises(ValueError, match="have spacing"):
        score_stack(LabelMap(predicted.labels, Space((5, 30, 40), (0.2, 0.1, 0.1))), truth, [0], 1)
    with pytest.raises(ValueError, match="section 5 is named, but the stack has sections 0 to 4"):
        score_stack(predicted, truth, [0, 5], 1)
    with pytest.raises(ValueError, match="no section is named"):
        score_stack(predicted, truth, [], 1)
    with pytest.raises(ValueError, match="within_mm is -1"):
        score_stack(predicted, truth, [0], -1)


def test_overlap_counts_pixels_by_hand() -> None:
    truth = np.array([[1, 1, 1, 1, 0, 0, 2, 0]])
    found = np.array([[1, 1, 1, 0, 1, 1, 0, 0]])
    scores = overlap_per_label(found, truth, [1, 2, 3])
    assert scores[1] == {"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9, "iou": 3 / 6}
    assert scores[2]["recall"] == scores[2]["iou"] == 0
    assert math.isnan(scores[2]["precision"])
    assert all(math.isnan(score) for score in scores[3].values())
    with pytest.raises(ValueError, match=r"overlap_per_label\(\): predicted has shape \(1, 8\), truth \(8,\)"):
        overlap_per_label(found, truth[0], [1])


def test_f1_of_overlap_is_dice() -> None:
    found, truth = random_labels(0), random_labels(1)
    scores = overlap_per_label(found, truth, [1, 2, 40, 65000])
    assert {label: score["f1"] for label, score in scores.items()} == pytest.approx(dice_per_label(found, truth))
