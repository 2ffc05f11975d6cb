from itertools import product

import numpy as np
import pytest

from limner.registration.section_poses import (
    SHARE,
    find_orientations,
    misfit,
    most_likely,
    solve_poses,
    to_matrices,
)

PAIRS = np.array([(z, z + step) for step in (1, 2) for z in range(6 - step)])


def fits(true, rng, noise=0.02):
    """Correlations of pairs in each relative orientation: .95 in the true one, less in others."""
    fit = 0.7 + rng.normal(0, noise, (len(PAIRS), 4))
    fit[np.arange(len(PAIRS)), true[PAIRS[:, 0]] ^ true[PAIRS[:, 1]]] += 0.25
    return fit


def cost(orientations, fit):
    of_pairs = misfit(fit)[np.arange(len(PAIRS)), orientations[PAIRS[:, 0]] ^ orientations[PAIRS[:, 1]]]
    return of_pairs.sum() + SHARE * (orientations != 0).sum()


@pytest.mark.parametrize("seed", range(4))
def test_orientations_and_gains_are_those_of_all_arrangements(seed):
    """Of all 4^6; noise as large as the differences, so that the best is not the true one throughout."""
    rng = np.random.default_rng(seed)
    fit = fits(rng.integers(0, 4, 6) * (rng.random(6) < 0.4), rng, noise=0.1)
    every = [np.array(o) for o in product(range(4), repeat=6)]
    costs = np.array([cost(o, fit) for o in every])
    found = find_orientations(PAIRS, fit, 6)
    assert cost(found.found, fit) == pytest.approx(costs.min())
    as_is = np.flatnonzero(found.found == 0)
    anchor = as_is[len(as_is) // 2]
    for z in range(6):
        kept = [c for o, c in zip(every, costs, strict=True) if o[z] == 0 and o[anchor] == 0]
        partners = (z == PAIRS).sum()
        assert found.gain[z] == pytest.approx((min(kept) - costs.min()) / partners)


@pytest.mark.parametrize("true", [[0, 0, 3, 0, 0, 0], [0, 0, 0, 0, 0, 2], [0, 1, 1, 0, 0, 0], [0] * 6])
def test_clear_orientations_are_found(true):
    true = np.array(true)
    found = find_orientations(PAIRS, fits(true, np.random.default_rng(0)), 6)
    assert found.sure.tolist() == true.tolist()


def test_a_mirror_image_that_fits_a_little_better_is_no_alarm():
    fit = np.tile([0.95, 0.5, 0.95, 0.5], (len(PAIRS), 1))
    near_2 = (PAIRS == 2).any(axis=1)
    fit[near_2, 2] = 0.952
    found = find_orientations(PAIRS, fit, 6)
    assert found.sure.tolist() == [0] * 6


WALK = 0.3  # step of the anatomy


def dense(pairs, steps, of_sections, of_pairs):
    """Mean of the sections' errors given the differences, of the normal model by dense matrices."""
    n = pairs.max() + 1
    difference = np.zeros((len(pairs), n))
    difference[np.arange(len(pairs)), pairs[:, 1]] = 1
    difference[np.arange(len(pairs)), pairs[:, 0]] = -1
    walk = WALK**2 * np.minimum.outer(np.arange(n), np.arange(n))
    spread = difference @ (of_sections**2 * np.eye(n) + walk) @ difference.T + of_pairs**2 * np.eye(len(pairs))
    return of_sections**2 * difference.T @ np.linalg.inv(spread) @ steps


@pytest.fixture
def chain():
    """60 sections with errors of 3 each, on anatomy that wanders; differences over one and two with errors of .1."""
    rng = np.random.default_rng(0)
    pairs = np.array([(z, z + step) for step in (1, 2) for z in range(60 - step)])
    errors = rng.normal(0, 3, (60, 2))
    whole = errors + rng.normal(0, WALK, (60, 2)).cumsum(axis=0)
    return pairs, whole, whole[pairs[:, 1]] - whole[pairs[:, 0]] + rng.normal(0, 0.1, (len(pairs), 2))


def test_errors_are_those_of_the_normal_model_with_the_true_scales(chain):
    """The scales are estimated, so about; taking the anatomy's way for errors would be .6 off."""
    pairs, whole, steps = chain
    found, expected = most_likely(pairs, steps, np.ones(len(pairs)), 60), dense(pairs, steps, 3, 0.1)
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.25
    chained = whole - whole.mean(axis=0)
    assert np.sqrt(np.mean((chained - expected) ** 2)) > 0.5


def test_a_failed_pair_counts_for_little(chain):
    pairs, _, steps = chain
    right = most_likely(pairs, steps, np.ones(len(pairs)), 60)
    steps = steps.copy()
    steps[20] += 15
    wrong = dense(pairs, steps, 3, 0.1)
    found = most_likely(pairs, steps, np.ones(len(pairs)), 60)

    def worst(errors):
        return np.abs(errors - right).max()

    assert worst(found) < 0.8 < 2 < worst(wrong)


def test_curved_anatomy_stays_curved():
    """Sections lie well; each pair would move the next by the same, as along a curved brain: a chain adds 6 up."""
    pairs = np.array([(z, z + step) for step in (1, 2) for z in range(60 - step)])
    rng = np.random.default_rng(0)
    steps = 0.1 * (pairs[:, 1] - pairs[:, 0])[:, None] + rng.normal(0, 0.03, (len(pairs), 1))
    assert np.abs(most_likely(pairs, steps, np.ones(len(pairs)), 60)).max() < 0.1


def test_what_nothing_was_measured_of_is_zero():
    found = most_likely(np.array([(0, 1), (1, 3)]), np.array([[1.0], [2.0]]), np.ones(2), 4)
    assert found[2] == 0
    assert not most_likely(np.zeros((0, 2), int), np.zeros((0, 2)), np.zeros(0), 3).any()


def test_poses_undo_rotations_shifts_and_flips():
    """Sections that lie at random around a stack; pairs between them are exact."""
    rng = np.random.default_rng(0)
    n = 30
    orientations = np.where(rng.random(n) < 0.3, rng.integers(1, 4, n), 0)
    flips = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1)])[orientations]
    angle, shift, middle = rng.normal(0, 0.15, n), rng.normal(0, 1, (n, 2)), np.array([2.0, -1.0])
    turn = np.moveaxis(np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]), 2, 0)
    true = flips[:, :, None] * np.concatenate([turn, shift[:, :, None]], axis=2)
    pairs = np.array([(z, z + step) for step in (1, 2) for z in range(n - step)])
    first, second = true[pairs[:, 0]], true[pairs[:, 1]]
    linear = second[:, :, :2] @ first[:, :, :2].transpose(0, 2, 1)
    moved = second[:, :, 2] - np.einsum("kij,kj->ki", linear, first[:, :, 2])
    matrices = np.concatenate([linear, moved[:, :, None]], axis=2)
    centres = np.einsum("nij,j->ni", true[:, :, :2], middle) + true[:, :, 2]
    poses = solve_poses(pairs, matrices, orientations, centres, np.ones((len(pairs), 2)))
    found = to_matrices(poses, orientations, centres)
    np.testing.assert_allclose(np.linalg.det(found[:, :, :2]), np.prod(flips, axis=1))
    # up to a slow drift: neighbours fit one another, which before were .2 radians and 1 mm off
    back = np.linalg.inv(found[:, :, :2])
    relative = back @ true[:, :, :2]
    assert np.abs(np.diff(relative[:, 1, 0])).max() < 0.05
    at = np.einsum("nij,nj->ni", back, centres - found[:, :, 2])
    assert np.abs(np.diff(at, axis=0)).max() < 0.25
