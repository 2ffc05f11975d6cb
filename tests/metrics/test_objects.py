"""Object scores against hand-derived numbers, brute force over masks, and invariance to relabelling."""

from __future__ import annotations

import json
import math
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment

from limner.metrics.objects import (
    BATCH,
    BLOCK,
    ObjectScore,
    aji,
    aji_plus,
    count_overlaps,
    f1,
    panoptic_quality,
    pool_scores,
    score_objects,
    summarise,
    summarise_groups,
)

Labels = NDArray[np.int64]
EMPTY: Labels = np.zeros((4, 5), dtype=np.int64)
OBJECT_SCORES = ("aji", "aji_once", "aji_plus", "pq", "dq", "sq", "f1")


def row(*runs: tuple[int, int]) -> Labels:
    """A label image of one row from (id, number of pixels)."""
    return np.concatenate([np.full(n, i, dtype=np.int64) for i, n in runs])[np.newaxis]


def random_objects(seed: int, shape: tuple[int, ...] = (40, 50), n: int = 25) -> Labels:
    """Overlapping boxes, later ones on top; ids with gaps."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int64)
    for i in rng.permutation(np.arange(1, n + 1) * 3):
        corner = [rng.integers(0, size) for size in shape]
        labels[tuple(slice(c, c + rng.integers(3, 14)) for c in corner)] = i
    return labels


def perturbed(labels: Labels, seed: int) -> Labels:
    """Shifted by a pixel, some objects gone, some merged, some cut in two, and some new."""
    rng = np.random.default_rng(seed)
    moved = np.roll(labels, rng.integers(-1, 2, size=labels.ndim), tuple(range(labels.ndim)))
    ids = rng.permutation(np.unique(moved[moved > 0]))
    moved[np.isin(moved, ids[:3])] = 0
    moved[moved == ids[3]] = ids[4]
    moved[(moved == ids[5]) & (np.arange(labels.shape[-1]) % 2 == 0)] = 1000
    return np.where(moved == 0, random_objects(seed + 100, labels.shape, 6) * 7, moved)


class Oracle:
    """Every definition spelled out over boolean masks and the full matrix of IoU."""

    def __init__(self, predicted: Labels, truth: Labels) -> None:
        self.true = [truth == i for i in np.unique(truth[truth > 0])]
        self.predicted = [predicted == i for i in np.unique(predicted[predicted > 0])]
        t, p = (np.array(masks).reshape(len(masks), -1).astype(float) for masks in (self.true, self.predicted))
        self.iou = (t @ p.T) / (truth.size - (1 - t) @ (1 - p).T)

    def aggregate(self, pairs: list[tuple[int, int]]) -> float:
        intersection = sum(int((self.true[i] & self.predicted[j]).sum()) for i, j in pairs)
        union = sum(int((self.true[i] | self.predicted[j]).sum()) for i, j in pairs)
        union += sum(int(t.sum()) for i, t in enumerate(self.true) if i not in {i for i, _ in pairs})
        union += sum(int(p.sum()) for j, p in enumerate(self.predicted) if j not in {j for _, j in pairs})
        return intersection / union

    def aji(self, reuse: bool) -> float:
        pairs: list[tuple[int, int]] = []
        for i, ious in enumerate(self.iou):
            free = [j for j in range(len(ious)) if reuse or j not in {j for _, j in pairs}]
            best = max(free, key=lambda j: ious[j], default=None)
            if best is not None and ious[best] > 0:
                pairs.append((i, best))
        return self.aggregate(pairs)

    def aji_plus(self) -> float:
        rows, columns = linear_sum_assignment(-self.iou)
        return self.aggregate([(i, j) for i, j in zip(rows, columns, strict=True) if self.iou[i, j] > 0])

    def matches(self, threshold: float) -> int:
        rows, columns = linear_sum_assignment(-(self.iou >= threshold).astype(float))
        return int((self.iou[rows, columns] >= threshold).sum())


CASES = [(random_objects(s, shape), s) for s in range(8) for shape in ((40, 50), (18, 22, 24))]


@pytest.mark.parametrize(("truth", "seed"), CASES)
def test_scores_agree_with_brute_force(truth: Labels, seed: int) -> None:
    predicted = perturbed(truth, seed)
    oracle = Oracle(predicted, truth)
    score = score_objects(predicted, truth, iou=0.3)
    assert score.aji == aji(predicted, truth) == pytest.approx(oracle.aji(reuse=True), abs=1e-12)
    assert score.aji_once == aji(predicted, truth, reuse=False) == pytest.approx(oracle.aji(reuse=False), abs=1e-12)
    assert score.aji_plus == aji_plus(predicted, truth) == pytest.approx(oracle.aji_plus(), abs=1e-12)
    objects = len(oracle.true) + len(oracle.predicted)
    above = oracle.iou[oracle.iou > 0.5]
    sq = above.mean() if len(above) else math.nan
    expected = (2 * above.sum() / objects, 2 * len(above) / objects, sq)
    assert tuple(panoptic_quality(predicted, truth)) == pytest.approx(expected, nan_ok=True)
    assert tuple(score.panoptic) == pytest.approx(expected, nan_ok=True)
    assert score.f1 == pytest.approx(2 * oracle.matches(0.3) / objects)
    for threshold in (0.05, 0.5, 0.9):
        assert f1(predicted, truth, threshold) == pytest.approx(2 * oracle.matches(threshold) / objects)


def test_the_cases_tell_definitions_apart() -> None:
    scores = [score_objects(perturbed(t, n), t) for t, n in CASES]
    assert sum(0 < s.panoptic_matches < s.true_objects for s in scores) > 12
    kinds = [[s.aji, s.aji_once, s.aji_plus] for s in scores]
    assert max(abs(a - b) for a, b, _ in kinds) > 0.005
    assert max(abs(a - c) for a, _, c in kinds) > 0.005
    assert max(abs(b - c) for _, b, c in kinds) > 0.0005


@pytest.mark.parametrize("seed", range(4))
def test_pixel_scores_agree_with_brute_force(seed: int) -> None:
    truth = random_objects(seed)
    predicted = perturbed(truth, seed)
    p, t = predicted > 0, truth > 0
    scores = score_objects(predicted, truth).scores()
    precision, recall = (p & t).sum() / p.sum(), (p & t).sum() / t.sum()
    assert scores["pixel_precision"] == pytest.approx(precision)
    assert scores["pixel_recall"] == pytest.approx(recall)
    assert scores["pixel_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["pixel_iou"] == pytest.approx((p & t).sum() / (p | t).sum())
    assert scores["pixel_accuracy"] == pytest.approx((p == t).mean())


def test_a_split_object() -> None:
    # 10 true pixels found as 6 and 4: IoU .6 and .4. The better half is the pair: 6 / 10, and 4 more for the other.
    score = score_objects(row((1, 6), (2, 4), (0, 2)), row((5, 10), (0, 2)))
    assert score.aji == score.aji_once == score.aji_plus == pytest.approx(6 / (10 + 4))
    # one match, three objects: DQ 2/3, SQ .6
    assert score.panoptic == pytest.approx((0.4, 2 / 3, 0.6))
    assert score.scores()["pixel_f1"] == 1


def test_a_merged_pair_is_used_twice_once_and_one_to_one() -> None:
    # objects of 4 and 6 pixels found as one of 10: IoU .4 and .6
    predicted, truth = row((9, 10), (0, 3)), row((1, 4), (2, 6), (0, 3))
    assert aji(predicted, truth) == pytest.approx((4 + 6) / (10 + 10))
    # object 1 chooses first and takes the prediction; object 2 is left with its 6 pixels
    assert aji(predicted, truth, reuse=False) == pytest.approx(4 / (10 + 6))
    assert aji(predicted, row((2, 4), (1, 6), (0, 3)), reuse=False) == pytest.approx(6 / (10 + 4))
    # one to one, the larger sum of IoU: object 2 is the partner
    assert aji_plus(predicted, truth) == pytest.approx(6 / (10 + 4))
    assert panoptic_quality(predicted, truth) == pytest.approx((0.4, 2 / 3, 0.6))


def test_a_used_prediction_leaves_the_second_best() -> None:
    # object 1 (5 pixels): prediction 7 holds 3 of it, IoU 3/9; object 2 (5 pixels): 4 of 7's, IoU 4/8, 8's 1, IoU 1/5
    predicted, truth = row((0, 2), (7, 7), (8, 1)), row((1, 5), (2, 5))
    assert aji(predicted, truth) == pytest.approx((3 + 4) / (9 + 8 + 1))  # 8 is in no pair
    assert aji(predicted, truth, reuse=False) == pytest.approx((3 + 1) / (9 + 5))
    assert aji_plus(predicted, truth) == pytest.approx((3 + 1) / (9 + 5))  # 3/9 + 1/5 > 4/8


def test_the_largest_sum_of_iou_is_not_the_greedy_one() -> None:
    # 1: 10 pixels, 2: 8 pixels. 7 holds 6 of 1 and 6 of 2 (IoU 6/16, 6/14), 8 the last 2 of 2 (2/8).
    # Greedy takes 2-7 (.43) alone: 1 has no other partner. 1-7 with 2-8 sums to .625.
    predicted, truth = row((0, 4), (7, 12), (8, 2)), row((1, 10), (2, 8))
    assert aji_plus(predicted, truth) == pytest.approx((6 + 2) / (16 + 8))


def test_a_shifted_square() -> None:
    truth, predicted = np.zeros((20, 20), int), np.zeros((20, 20), int)
    truth[5:15, 5:15] = 1
    predicted[5:15, 7:17] = 1  # 80 shared, 120 in either
    score = score_objects(predicted, truth)
    assert score.aji == score.aji_plus == score.aji_once == pytest.approx(2 / 3)
    assert score.panoptic == pytest.approx((2 / 3, 1, 2 / 3))
    scores = score.scores()
    assert scores["pixel_precision"] == scores["pixel_recall"] == scores["pixel_f1"] == pytest.approx(0.8)
    assert scores["pixel_accuracy"] == pytest.approx(1 - 40 / 400)


def test_an_iou_of_one_half_counts_for_f1_and_not_for_panoptic_quality() -> None:
    predicted, truth = row((1, 4), (2, 3)), row((1, 2), (0, 2), (2, 3))
    assert f1(predicted, truth) == 1
    assert panoptic_quality(predicted, truth) == pytest.approx((0.5, 0.5, 1))
    assert f1(predicted, truth, 0.5 + 1e-9) == 0.5


def test_matches_are_as_many_as_can_be() -> None:
    # 7 overlaps both (3/8 with 1, 3/9 with 2), 8 only 1 (2/5): taking the best pair first would leave 2 alone
    predicted, truth = row((8, 2), (7, 6), (0, 3)), row((1, 5), (2, 6))
    assert [f1(predicted, truth, t) for t in (0.3, 0.35, 0.5)] == [1, 0.5, 0]


def test_neither_true_nor_predicted_objects() -> None:
    score = score_objects(EMPTY, EMPTY)
    scores = score.scores()
    assert all(math.isnan(scores[name]) for name in OBJECT_SCORES)
    assert math.isnan(scores["pixel_precision"])
    assert math.isnan(scores["pixel_recall"])
    assert scores["pixel_accuracy"] == 1
    assert math.isnan(aji(EMPTY, EMPTY))
    assert math.isnan(aji_plus(EMPTY, EMPTY))
    nothing = score_objects(EMPTY[:0], EMPTY[:0])
    assert math.isnan(nothing.scores()["pixel_accuracy"])
    assert json.loads(json.dumps(nothing.to_json(), allow_nan=False))["aji"] is None


def test_only_true_or_only_predicted_objects_or_none_that_overlap() -> None:
    some = EMPTY.copy()
    some[:2, :2], some[3, 3] = 4, 8
    elsewhere = EMPTY.copy()
    elsewhere[0, 4] = 1
    for predicted, truth in ((EMPTY, some), (some, EMPTY), (elsewhere, some)):
        scores = score_objects(predicted, truth).scores()
        assert [scores[n] for n in OBJECT_SCORES if n != "sq"] == [0] * 6
        assert math.isnan(scores["sq"])
        assert scores["pixel_f1"] == scores["pixel_iou"] == 0
    assert math.isnan(score_objects(EMPTY, some).scores()["pixel_precision"])
    assert score_objects(EMPTY, some).scores()["pixel_recall"] == 0
    assert score_objects(EMPTY, some).aji_union == score_objects(some, EMPTY).aji_union == 5


def relabelled(labels: Labels, new: NDArray[np.integer]) -> Labels:
    ids = np.unique(labels[labels > 0])
    table = np.zeros(labels.max() + 1, dtype=new.dtype)
    table[ids] = new[: len(ids)]
    return table[labels]


@pytest.mark.parametrize("seed", range(4))
def test_ids_do_not_matter(seed: int) -> None:
    truth = random_objects(seed)
    predicted = perturbed(truth, seed)
    score = score_objects(predicted, truth)
    rng = np.random.default_rng(seed)
    for dtype in (np.uint8, np.uint16, np.int32, np.uint32):
        other = relabelled(predicted, rng.permutation(250).astype(dtype) + dtype(1))
        again = score_objects(other, relabelled(truth, np.arange(1, 251, dtype=dtype))).scores()
        for name, value in score.scores().items():
            assert again[name] == pytest.approx(value, abs=1e-12), name
    shuffled = score_objects(predicted, relabelled(truth, rng.permutation(250) + 1)).scores()
    for name, value in score.scores().items():
        if name != "aji_once":  # there the true ids are the order of choice
            assert shuffled[name] == pytest.approx(value, abs=1e-12), name


def test_ids_beyond_32_bit() -> None:
    truth = random_objects(1)
    predicted = perturbed(truth, 1)
    far = np.where(predicted > 0, predicted + 2**40, 0)
    farther = np.where(truth > 0, truth.astype(np.uint64) + np.uint64(2**63), np.uint64(0))
    assert score_objects(far, farther) == score_objects(predicted, truth)
    everywhere = score_objects(np.full((2, 3), 2**40), np.full((2, 3), 2**40 + 1))
    assert everywhere == score_objects(np.full((2, 3), 1), np.full((2, 3), 1))


def test_true_and_predicted_change_places() -> None:
    truth = random_objects(2)
    predicted = perturbed(truth, 2)
    there, back = score_objects(predicted, truth), score_objects(truth, predicted)
    assert there.aji_plus == pytest.approx(back.aji_plus)
    assert tuple(there.panoptic) == pytest.approx(tuple(back.panoptic))
    assert there.f1 == back.f1
    assert there.scores()["pixel_precision"] == back.scores()["pixel_recall"]


def test_an_image_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = random_objects(3)
    predicted = perturbed(truth, 3)
    whole = count_overlaps(predicted, truth)
    assert truth.size < BLOCK
    monkeypatch.setattr("limner.metrics.objects.BLOCK", 7)
    parts = count_overlaps(predicted, truth)
    for name in ("true_sizes", "predicted_sizes", "true_index", "predicted_index", "pixels"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert count_overlaps(predicted[:, ::-1], truth[:, ::-1]).pixels.tolist() == whole.pixels.tolist()


@pytest.mark.parametrize("batch", [1, 5, BATCH])
def test_batches_do_not_change_the_matching(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = random_objects(4, (60, 80), 120)
    predicted = perturbed(truth, 4)
    expected = Oracle(predicted, truth).aji_plus()
    monkeypatch.setattr("limner.metrics.objects.BATCH", batch)
    assert aji_plus(predicted, truth) == pytest.approx(expected, abs=1e-12)


def test_one_to_one_is_the_best_of_all_permutations() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        truth, predicted = rng.integers(0, 5, (2, 6, 6))
        oracle = Oracle(predicted, truth)
        square = np.zeros((5, 5))
        square[: oracle.iou.shape[0], : oracle.iou.shape[1]] = oracle.iou
        best = max(permutations(range(5)), key=lambda p: square[range(5), p].sum())
        pairs = [(i, j) for i, j in enumerate(best) if square[i, j] > 0]
        assert aji_plus(predicted, truth) == pytest.approx(oracle.aggregate(pairs), abs=1e-12)


def test_a_random_pattern_of_many_small_objects() -> None:
    truth = label(np.random.default_rng(6).random((80, 80)) < 0.4)[0]
    predicted = label(np.roll(truth, 1, axis=0) > 0)[0]
    oracle = Oracle(predicted, truth)
    assert len(oracle.true) > 300
    assert f1(predicted, truth, 0.1) == 2 * oracle.matches(0.1) / (len(oracle.true) + len(oracle.predicted))


def three_scores() -> list[ObjectScore]:
    return [
        score_objects(row((1, 6), (0, 4)), row((1, 3), (0, 7))),  # AJI 3/6
        score_objects(row((1, 2), (2, 8)), row((1, 2), (3, 8))),  # AJI 10/10
        score_objects(row((0, 10)), row((0, 10))),  # no object at all
    ]


def test_mean_and_spread_leave_undefined_scores_out() -> None:
    summary = summarise(three_scores())
    assert summary.pooled.images == 3
    assert summary.mean["aji"] == pytest.approx((0.5 + 1) / 2)
    assert summary.sd["aji"] == pytest.approx(0.5 / math.sqrt(2))  # divisor n - 1 of the two images with objects
    assert summary.mean["pixel_accuracy"] == pytest.approx((0.7 + 1 + 1) / 3)
    assert summary.mean["sq"] == 1  # an IoU of 1/2 is no match, so the first image has no SQ
    assert math.isnan(summary.sd["sq"])


def test_pooled_counts_weigh_an_image_by_what_it_holds() -> None:
    pooled = pool_scores(three_scores())
    assert pooled.aji == pytest.approx(13 / 16)
    assert pooled.f1 == 1
    assert pooled.panoptic.dq == pytest.approx(2 * 2 / (3 + 3))
    assert pooled.image_pixels == 30
    assert pooled.scores()["pixel_accuracy"] == pytest.approx(27 / 30)
    assert pool_scores([pooled, pooled]).aji == pooled.aji


def test_groups() -> None:
    first, second, third = three_scores()
    scores = {"b1": first, "a1": second, "b2": third, "b3": second}
    groups = summarise_groups(scores, {"a1": "A", "b1": "B", "b2": "B", "b3": "B", "other": "C"})
    assert list(groups) == ["B", "A"]
    assert groups["B"].mean["aji"] == pytest.approx(0.75)
    assert groups["B"].pooled == pool_scores([first, second, third])
    assert math.isnan(groups["A"].sd["aji"])
    values = json.loads(json.dumps(groups["A"].to_json(), allow_nan=False))
    assert values["images"] == 1
    assert values["sd"]["aji"] is None
    assert values["pooled"]["counts"]["true_objects"] == 2
    with pytest.raises(ValueError, match="image b2 has no group"):
        summarise_groups(scores, {"a1": "A", "b1": "B", "b3": "B"})


def test_scores_that_cannot_be_pooled() -> None:
    with pytest.raises(ValueError, match=r"pool_scores\(\): no score given"):
        summarise([])
    with pytest.raises(ValueError, match=r"thresholds \[0\.5, 0\.7\] given"):
        pool_scores([score_objects(EMPTY, EMPTY), score_objects(EMPTY, EMPTY, 0.7)])


@pytest.mark.parametrize(
    ("predicted", "truth", "found"),
    [
        (EMPTY, EMPTY[:3], r"predicted labels have shape \(4, 5\), the truth \(3, 5\)"),
        (EMPTY.astype(float), EMPTY, "type float64 found for predicted labels; give integers"),
        (EMPTY, EMPTY.astype(bool), "type bool found for the truth; give integers"),
        (EMPTY - 1, EMPTY, "label -1 found in predicted labels"),
        (EMPTY[0], EMPTY[0], r"shape \(5,\) found for predicted labels; give \(y, x\)"),
    ],
)
def test_what_is_no_pair_of_label_images_is_refused(predicted: Labels, truth: Labels, found: str) -> None:
    for function in (aji, aji_plus, panoptic_quality, f1, score_objects, count_overlaps):
        with pytest.raises(ValueError, match=rf"count_overlaps\(\): {found}"):
            function(predicted, truth)


@pytest.mark.parametrize("threshold", [0, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="give a threshold above 0 and at most 1"):
        f1(EMPTY, EMPTY, threshold)
