"""Scores of neurites: known splits, mergers and holes; scikit-image; thinning at the image's edge; warping."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import label
from skimage.metrics import adapted_rand_error, variation_of_information
from skimage.morphology import skeletonize
from skimage.segmentation import watershed

from limner.metrics.neurites import (
    NeuriteScores,
    cells_of_labels,
    count_topology,
    near_borders,
    score_cells,
    score_maps,
    simple_points,
    thin,
    v_info,
    v_rand,
    warp,
)

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "em_isbi2012" / "labels"


def polygons(size: int = 128, n: int = 40, width: float = 3, seed: int = 0) -> NDArray[np.bool_]:
    """Cells of a Voronoi diagram, parted by membranes of some `width` pixels that run to the image's edge."""
    points = np.random.default_rng(seed).uniform(0, size, (n, 2))
    distance = np.sort(np.linalg.norm(np.indices((size, size))[None] - points[:, :, None, None], axis=1), axis=0)
    return distance[1] - distance[0] > width


def two_cells() -> NDArray[np.bool_]:
    """Two cells of 9 x 10 pixels and a membrane of one pixel between them."""
    cells = np.ones((9, 21), bool)
    cells[:, 10] = False
    return cells


def overall(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NeuriteScores:
    return score_cells([predicted], [truth]).overall


def with_single_pixels(segments: NDArray[np.int32]) -> NDArray[np.int64]:
    """Every pixel of 0 gets an id of its own."""
    ids = segments.astype(np.int64)
    ids[ids == 0] = ids.max() + 1 + np.arange((ids == 0).sum())
    return ids


# known values


def test_one_merger() -> None:
    truth, predicted = two_cells(), two_cells()
    predicted[4, 10] = True  # a gap of one pixel
    scores = overall(predicted, truth)
    assert scores.v_rand_split == scores.v_info_split == 1
    assert scores.v_rand_merge == pytest.approx(2 * 90**2 / 180**2)
    assert scores.v_rand == pytest.approx(2 / 3)
    assert scores.rand_error == pytest.approx(1 / 3)
    assert scores.v_info == 0  # one segment says nothing of the two cells
    assert scores.warping_error == pytest.approx(1 / 189)  # that pixel cannot be warped away
    assert (scores.splits, scores.mergers, scores.others) == (0, 1, 0)
    assert scores.pixel_error == pytest.approx(1 - 2 * 180 / (180 + 181))


def test_one_split() -> None:
    truth, predicted = two_cells(), two_cells()
    predicted[:, 5] = False  # the left cell: 9 x 5, a line of 9, 9 x 4
    scores = overall(predicted, truth)
    both = 45**2 + 36**2 + 90**2 + 9  # each pixel of the line is a segment of its own
    assert scores.v_rand_merge == scores.v_info_merge == 1
    assert scores.v_rand_split == pytest.approx(both / (2 * 90**2))
    assert scores.v_rand == pytest.approx(2 * both / (both + 2 * 90**2))
    assert scores.rand_error == pytest.approx(1 - scores.v_rand)  # the line is thin already
    of_segments = -sum(n / 180 * math.log2(n / 180) for n in [45, 36, 90, *[1] * 9])
    assert scores.v_info == pytest.approx(1 / (of_segments / 2 + 1 / 2))
    assert (scores.splits, scores.mergers, scores.others) == (1, 0, 0)


def test_thick_membranes_cost_the_rand_error_and_not_v_rand() -> None:
    truth = polygons(n=12)
    predicted = ndimage.binary_erosion(truth, iterations=2, border_value=1)
    segments = label(predicted, connectivity=1)
    assert segments.max() == label(truth, connectivity=1).max()  # no cell was lost or split
    scores = overall(predicted, truth)
    assert scores.v_rand > 0.995
    assert scores.rand_error > 0.1
    assert (scores.splits, scores.mergers, scores.others, scores.warping_error) == (0, 0, 0, 0)


def test_hole_and_island() -> None:
    truth, predicted = two_cells(), two_cells()
    predicted[4, 5] = False
    scores = overall(predicted, truth)
    assert scores.v_rand == scores.v_info == 1  # thinning closes the hole
    assert scores.rand_error == pytest.approx(1 - 2 * (89**2 + 90**2 + 1) / (89**2 + 90**2 + 1 + 2 * 90**2))
    assert (scores.splits, scores.mergers, scores.others) == (0, 0, 1)
    assert scores.warping_error == pytest.approx(1 / 189)
    wide = np.zeros((9, 21), bool)
    island = wide.copy()
    island[4, 10] = True
    assert count_topology(wide, island) == (0, 0, 1)  # a cell that is not there


def test_missing_cells_are_not_warped_away() -> None:
    """Without a limit to the warp each cell would shrink to one pixel and the error be next to 0."""
    truth = polygons()
    scores = overall(np.zeros_like(truth), truth)
    assert scores.warping_error > 0.1
    assert scores.others == label(truth, connectivity=1).max()
    assert scores.v_rand < 0.01
    assert warp(truth, np.zeros_like(truth), movable=np.ones_like(truth)).sum() == scores.others


def test_a_cell_split_in_three_and_three_cells_merged() -> None:
    whole = np.ones((20, 50), bool)
    parts = whole.copy()
    parts[:, [15, 35]] = False
    assert overall(parts, whole).splits == 2
    assert overall(whole, parts).mergers == 2


def test_a_slanting_membrane_is_one_merger() -> None:
    """Membranes are connected over corners: what is missing of one is one patch."""
    y, x = np.indices((12, 12))
    parts = (x != y) & (x != y + 1)
    assert label(parts, connectivity=1).max() == 2
    scores = overall(np.ones_like(parts), parts)
    assert (scores.splits, scores.mergers, scores.others) == (0, 1, 0)
    scores = overall(parts, np.ones_like(parts))
    assert (scores.splits, scores.mergers, scores.others) == (1, 0, 0)


def test_undefined_scores() -> None:
    nothing, one = np.zeros((5, 6), bool), np.ones((5, 6), bool)
    scores = overall(one, nothing)
    assert all(math.isnan(s) for s in (scores.v_rand, scores.v_info, scores.rand_error))
    assert scores.to_json()["v_rand"] is None
    both = score_cells([one, two_cells()], [nothing, two_cells()])
    assert both.overall.v_rand == both.overall.v_info == 1  # the section without cells is left out
    assert overall(one, one).v_info == 1  # one segment, one cell: nothing to tell apart


# oracles


def entropy(ids: NDArray[np.integer]) -> float:
    fractions = np.unique(ids, return_counts=True)[1] / ids.size
    return -float((fractions * np.log2(fractions)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_scores_agree_with_scikit_image(seed: int) -> None:
    cells, segments = label(polygons(seed=seed), connectivity=1), thin(polygons(n=55, seed=seed + 9))
    single = with_single_pixels(segments)
    split, merged = variation_of_information(cells, single, ignore_labels=(0,))
    of_segments, of_cells = entropy(single[cells > 0]), entropy(cells[cells > 0])
    found = v_info(segments, cells)
    assert found.split == pytest.approx(1 - split / of_segments)
    assert found.merge == pytest.approx(1 - merged / of_cells)
    assert found.score == pytest.approx(1 - (split + merged) / (of_segments + of_cells))
    error, of_true_pairs, of_found_pairs = adapted_rand_error(cells, single, ignore_labels=(0,))
    # a pixel makes a pair with itself here and not there: the scores differ by about one over the pixels of a cell
    assert v_rand(segments, cells) == pytest.approx((1 - error, of_true_pairs, of_found_pairs), abs=0.005)


@pytest.mark.parametrize("seed", range(3))
def test_thinning_is_scikit_images_watershed_but_for_ties(seed: int) -> None:
    cells = ndimage.binary_erosion(polygons(seed=seed), iterations=seed + 1, border_value=1)
    seeds = label(cells, connectivity=1)
    expected = watershed(np.zeros(cells.shape, np.uint8), seeds, connectivity=1, watershed_line=True)
    segments = thin(cells)
    assert (segments[cells] == seeds[cells]).all()
    either = (segments > 0) & (expected > 0)
    assert (segments[either] == expected[either]).mean() > 0.99
    assert (segments > 0).mean() == pytest.approx((expected > 0).mean(), abs=0.01)
    down, right = segments[1:] * segments[:-1], segments[:, 1:] * segments[:, :-1]
    assert (segments[1:] == segments[:-1])[down > 0].all()  # no two segments touch
    assert (segments[:, 1:] == segments[:, :-1])[right > 0].all()


def test_simple_points_by_counting_parts() -> None:
    ring = [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]  # anticlockwise from the right
    four = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)
    for code in range(256):
        cell = np.zeros((3, 3), bool)
        for bit, place in enumerate(ring):
            cell[place] = code >> bit & 1
        membrane = ~cell
        membrane[1, 1] = False
        beside = set(label(cell, connectivity=1)[four & cell])
        assert simple_points()[code] == (len(beside) == 1 and label(membrane, connectivity=2).max() == 1)
    assert simple_points().sum() == 116


# thinning and the image's edge


def skeleton_score(truth: NDArray[np.bool_], continued: int) -> float:
    """V_rand of a perfect truth whose membranes were thinned to a skeleton, the image continued by some pixels."""
    lines = skeletonize(np.pad(~truth, continued, mode="reflect"))
    inside = slice(continued, -continued or None)
    return v_rand(label(~lines[inside, inside], connectivity=1), label(truth, connectivity=1)).score


def test_a_perfect_truth_scores_one_up_to_the_edge() -> None:
    truth = polygons(width=5)
    scores = overall(truth, truth)
    assert scores.v_rand == scores.v_info == scores.v_rand_split == scores.v_info_merge == 1
    assert skeleton_score(truth, continued=32) > 0.99
    assert skeleton_score(truth, continued=0) < 0.9  # gaps open where the skeleton retracts from the edge


@pytest.mark.skipif(not DATA.is_dir(), reason="no data")
def test_a_perfect_truth_of_a_real_section_scores_one() -> None:
    from imageio.v3 import imread

    truth = np.asarray(imread(DATA / "00.png")) > 0
    scores = overall(truth, truth)
    assert scores.v_rand == scores.v_info == 1
    assert scores.rand_error == scores.warping_error == scores.pixel_error == 0
    assert skeleton_score(truth, continued=0) < 0.8


# warping


@pytest.mark.parametrize("seed", range(3))
def test_warping_keeps_the_topology_and_only_approaches(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth = polygons(seed=seed)
    predicted = ndimage.gaussian_filter(truth + draw.normal(0, 1.5, truth.shape), 2) > 0.5
    warped = warp(truth, predicted, certainty=draw.uniform(size=truth.shape))
    assert (warped != truth).any()
    assert (warped == predicted)[warped != truth].all()
    assert not (warped != truth)[~near_borders(truth)].any()
    for a, b in ((truth, warped), (warped, truth)):
        assert ndimage.label(a)[1] == ndimage.label(b)[1]
    outside = [np.pad(~m, 1, constant_values=True) for m in (truth, warped)]
    assert ndimage.label(outside[0], np.ones((3, 3)))[1] == ndimage.label(outside[1], np.ones((3, 3)))[1]


@pytest.mark.parametrize("reach", [1, 3, 5])
def test_the_reach_is_counted_in_pixels_from_the_border(reach: int) -> None:
    cells = np.arange(40) < 20
    assert np.flatnonzero(near_borders(np.tile(cells, (4, 1)), reach)[2]).tolist() == list(
        range(20 - reach, 20 + reach)
    )
    assert not near_borders(np.ones((4, 4), bool)).any()
    assert near_borders(np.ones((4, 4), bool), math.inf).all()


def test_a_membrane_that_lies_elsewhere_is_no_error() -> None:
    truth, predicted = polygons(), np.roll(polygons(), 1, axis=1)
    inner = (slice(None), slice(8, -8))  # what the roll carried over the edge is another matter
    scores = overall(predicted[inner], truth[inner])
    assert scores.pixel_error > 0.03
    assert scores.warping_error < 0.002
    assert scores.splits + scores.mergers <= 2


def test_what_is_certain_is_warped_first() -> None:
    """Cells of one pixel in a row: either may give way, not both."""
    truth, predicted = np.array([[1, 1, 0]], bool), np.zeros((1, 3), bool)
    assert warp(truth, predicted).tolist() == [[False, True, False]]
    assert warp(truth, predicted, certainty=np.array([[0, 1, 0]])).tolist() == [[True, False, False]]


# stacks and thresholds


def test_scores_of_a_stack() -> None:
    """V_rand, V_info and warping error are means over the sections; Rand and pixel error are pooled."""
    truth = [two_cells(), polygons()]
    predicted = [np.ones_like(truth[0]), polygons(seed=1)]
    score = score_cells(predicted, truth)
    first, second = score.sections
    assert [first, second] == [overall(p, t) for p, t in zip(predicted, truth, strict=True)]
    for name in ("v_rand", "v_rand_split", "v_info", "v_info_merge", "warping_error"):
        assert getattr(score.overall, name) == pytest.approx((getattr(first, name) + getattr(second, name)) / 2)
    assert score.overall.mergers == first.mergers + second.mergers
    shared = sum((p & t).sum() for p, t in zip(predicted, truth, strict=True))
    assert score.overall.pixel_error == pytest.approx(1 - 2 * shared / sum(m.sum() for m in predicted + truth))
    assert abs(score.overall.rand_error - second.rand_error) < abs(score.overall.rand_error - first.rand_error)


def test_one_threshold_for_all_sections() -> None:
    """Each section has a threshold of its own at which it is perfect; the stack has to take one."""
    cells = two_cells()
    first, second = np.where(cells, 0.1, 0.3), np.where(cells, 0.5, 0.9)
    score = score_maps([first, second], [cells, cells], thresholds=(0.2, 0.4, 0.6))
    assert score.thresholds == (0.2, 0.4, 0.5, 0.6)
    assert [at.sections[0].v_rand for at in score.at] == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])
    assert [at.sections[1].v_rand for at in score.at[-1:]] == [1]
    threshold, best = score.best("v_rand")
    assert threshold == 0.6
    assert best.overall.v_rand == pytest.approx((1 + 2 / 3) / 2)
    assert score.at_half is score.at[2]


def test_a_binary_map_is_membrane_at_its_threshold() -> None:
    cells = two_cells()
    score = score_maps([(~cells).astype(float) / 2], [cells])
    assert score.at_half.overall.v_rand == 1
    assert score.best("rand_error")[0] == 0.5  # of many that are perfect


@pytest.mark.parametrize("axis", [0, 1])
def test_touching_cells_are_kept_apart(axis: int) -> None:
    labels = np.repeat(np.repeat([[4, 4, 9, 0, 9]], 3, axis=1), 3, axis=0)
    labels = labels if axis else labels.T
    cells = cells_of_labels(labels)
    assert label(cells, connectivity=1).max() == 3
    assert cells.sum() == (labels > 0).sum() - 3  # one pixel wide
    assert (cells_of_labels(labels[None]) == cells).all()
    assert (cells_of_labels(np.stack([labels, labels + 1]))[0] == cells).all()  # nothing is cut between sections


def test_turning_and_mirroring_change_nothing_but_ties() -> None:
    truth, predicted = polygons(), polygons(seed=1)
    scores, turned = overall(predicted, truth), overall(np.rot90(predicted), np.rot90(truth))
    assert turned.v_rand == pytest.approx(scores.v_rand, abs=0.005)
    assert turned.rand_error == pytest.approx(scores.rand_error)
    assert turned.warping_error == pytest.approx(scores.warping_error, rel=0.05)


def test_what_is_refused() -> None:
    cells = two_cells()
    with pytest.raises(ValueError, match=r"^score_cells\(\): 2 sections predicted, 1 true; give"):
        score_cells([cells, cells], [cells])
    with pytest.raises(ValueError, match=r"^score_cells\(\): section 0 has shape \(9, 20\), its truth \(9, 21\); give"):
        score_cells([cells[:, 1:]], [cells])
    with pytest.raises(
        ValueError, match=r"^score_cells\(\): the truth is of type int64; give masks, of labels through"
    ):
        score_cells([cells], [cells.astype(int)])
    with pytest.raises(ValueError, match=r"^score_cells\(\): a prediction is of type uint8; give masks"):
        score_cells([cells.astype(np.uint8)], [cells])
    with pytest.raises(ValueError, match=r"^score_maps\(\): uint8 from 0 to 1 found; give probabilities in \[0, 1\]"):
        score_maps([cells.astype(np.uint8)], [cells])
    with pytest.raises(ValueError, match=r"^score_maps\(\): float64 from nan to nan found; give probabilities"):
        score_maps([cells * math.nan], [cells])
    with pytest.raises(ValueError, match=r"^score_maps\(\): reach is -1; give pixels, 0 or more"):
        score_maps([cells * 0.5], [cells], reach=-1)
    with pytest.raises(ValueError, match=r"^score_maps\(\): thresholds are \(0, 0\.5\); give"):
        score_maps([cells * 0.5], [cells], thresholds=(0, 0.5))
    with pytest.raises(ValueError, match=r"^best\(\): 'splits' is no score with a best threshold; give one of v_rand"):
        score_maps([cells * 0.5], [cells], thresholds=(0.5,)).best("splits")
