import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline

from limner.label_fusion import atlas_log_weights, blend, fuse, interpolation_weights

EVEN = [0.0, 1.0, 2.0, 3.0, 4.0]
UNEVEN = [0.0, 0.3, 1.1, 1.5, 3.9]


def interpolated(knots, values, z, kind):
    return sum(weight * values[i] for i, weight in interpolation_weights(knots, z, kind))


@pytest.mark.parametrize("kind", ["linear", "catmull-rom"])
@pytest.mark.parametrize("knots", [EVEN, UNEVEN, UNEVEN[:2], UNEVEN[:3]])
def test_interpolation_reproduces_linear_functions(knots, kind):
    for z in np.linspace(knots[0], knots[-1], 37):
        weights = interpolation_weights(knots, z, kind)
        assert sum(w for _, w in weights) == pytest.approx(1)
        assert len({i for i, _ in weights}) == len(weights) <= (2 if kind == "linear" else 4)
        assert interpolated(knots, [3 * k - 2 for k in knots], z, kind) == pytest.approx(3 * z - 2)


@pytest.mark.parametrize("knots", [EVEN, UNEVEN, UNEVEN[:2], UNEVEN[:3]])
def test_catmull_rom_is_the_hermite_spline_with_central_differences(knots):
    values = np.random.default_rng(0).standard_normal(len(knots))
    x = np.array(knots)
    slopes = np.empty(len(x))
    slopes[1:-1] = (values[2:] - values[:-2]) / (x[2:] - x[:-2])
    slopes[[0, -1]] = np.diff(values)[[0, -1]] / np.diff(x)[[0, -1]]
    spline = CubicHermiteSpline(x, values, slopes)
    for z in np.linspace(x[0], x[-1], 41):
        assert interpolated(knots, values, z, "catmull-rom") == pytest.approx(spline(z))


@pytest.mark.parametrize("kind", ["linear", "catmull-rom"])
@pytest.mark.parametrize("knots", [EVEN, UNEVEN])
def test_interpolation_passes_through_the_knots_and_is_constant_beyond(knots, kind):
    for i, knot in enumerate(knots):
        at_knot = np.zeros(len(knots))
        for j, weight in interpolation_weights(knots, knot, kind):
            at_knot[j] = weight
        np.testing.assert_allclose(at_knot, np.eye(len(knots))[i], atol=1e-12)
    assert interpolation_weights(knots, knots[0] - 5, kind) == [(0, 1.0)]
    assert interpolation_weights(knots, knots[-1] + 5, kind) == [(len(knots) - 1, 1.0)]


def test_interpolation_with_hand_derived_weights():
    """Halfway between even knots Catmull-Rom is (-1, 9, 9, -1) / 16."""
    assert dict(interpolation_weights(EVEN, 1.5)) == pytest.approx({0: -1 / 16, 1: 9 / 16, 2: 9 / 16, 3: -1 / 16})
    assert interpolation_weights(UNEVEN, 0.7, "linear") == [(1, pytest.approx(0.5)), (2, pytest.approx(0.5))]
    assert interpolation_weights([2.0], 2.5) == interpolation_weights([2.0], 1.0) == [(0, 1.0)]


def random_atlases(n=3, n_labels=4, shape=(5, 6), seed=0):
    """Distances (N, L, Y, X), log weights (N, Y, X) and a cover that leaves the first pixels to fewer atlases."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randn(n, n_labels, *shape, generator=generator) * 0.1
    log_weights = -torch.rand(n, *shape, generator=generator)
    covered = torch.ones(n, *shape, dtype=torch.bool)
    covered[0, 0], covered[:2, 1], covered[:, 2] = False, False, False
    return distances, log_weights, covered


def test_blend_of_one_atlas_is_the_softmax_of_its_distances():
    distances, _, _ = random_atlases(n=1)
    covered = torch.ones(1, 5, 6, dtype=torch.bool)
    found = blend(distances, torch.ones(1), covered, 21.0)
    odds = np.exp(21.0 * distances[0].numpy())
    np.testing.assert_allclose(found.exp(), odds / odds.sum(axis=0), rtol=1e-4)


def test_blend_scales_up_the_weights_of_the_atlases_that_cover():
    distances, _, covered = random_atlases()
    weights = torch.tensor([0.6, 0.3, 0.1])
    found = blend(distances, weights, covered, 5.0)
    for y, x in np.ndindex(5, 6):
        known = covered[:, y, x]
        if not known.any():
            expected = torch.full((4,), math.log(1 / 4))
        else:
            share = weights[known] / weights[known].sum()
            expected = torch.log_softmax(5.0 * (share[:, None] * distances[known, :, y, x]).sum(0), 0)
        torch.testing.assert_close(found[:, y, x], expected)


def test_blend_with_negative_weights():
    distances, _, _ = random_atlases()
    weights = torch.tensor([-0.1, 0.6, 0.5])
    covered = torch.ones(3, 5, 6, dtype=torch.bool)
    covered[1:, 0] = False  # only the atlas of negative weight is left: no evidence
    found = blend(distances, weights, covered, 5.0)
    torch.testing.assert_close(found[:, 0], torch.full((4, 6), math.log(1 / 4)))
    mean = (weights[:, None, None, None] * distances).sum(0)
    torch.testing.assert_close(found[:, 1:], torch.log_softmax(5.0 * mean, 0)[:, 1:])


def mixture(distances, log_weights, covered, rho, printed):
    """Equation 4 in loops: sum over atlases of w_n p_n(l), p_n normalised over labels first unless as printed."""
    n_atlases, n_labels, height, width = distances.shape
    result = np.empty((n_labels, height, width))
    for y in range(height):
        for x in range(width):
            total = np.zeros(n_labels)
            for n in range(n_atlases):
                if not covered[n, y, x]:
                    continue
                odds = np.exp(rho * distances[n, :, y, x])
                total += np.exp(log_weights[n, y, x]) * (odds if printed else odds / odds.sum())
            result[:, y, x] = total / total.sum() if total.any() else 1 / n_labels
    return result


@pytest.mark.parametrize("printed", [False, True])
def test_fuse_is_the_mixture_over_atlases(printed):
    distances, log_weights, covered = random_atlases()
    found = fuse(distances, log_weights, covered, 21.0, printed)
    expected = mixture(*(t.double().numpy() for t in (distances, log_weights, covered)), 21.0, printed)
    np.testing.assert_allclose(found.exp(), expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(found.exp()[:, 2], 0.25, rtol=1e-6)  # no atlas


def test_the_deeper_label_outweighs_only_as_printed():
    """Two atlases say label 1, 0.1 mm from its border; one says label 0, 1 mm deep."""
    distances = torch.tensor([[-0.1, 0.1], [-0.1, 0.1], [1.0, -1.0]]).view(3, 2, 1, 1)
    covered = torch.ones(3, 1, 1, dtype=torch.bool)
    normalised = fuse(distances, torch.zeros(3, 1, 1), covered, 21.0).exp().flatten()
    printed = fuse(distances, torch.zeros(3, 1, 1), covered, 21.0, printed=True).exp().flatten()
    one = 1 / (1 + math.exp(-4.2))  # what each of the first two gives label 1
    assert normalised.tolist() == pytest.approx([1 - 2 * one / 3, 2 * one / 3], rel=1e-5)
    assert printed[0] > 0.999999


def test_a_constant_added_to_all_log_weights_changes_nothing():
    distances, log_weights, covered = random_atlases()
    for printed in (False, True):
        found = fuse(distances, log_weights - 3000.0, covered, 21.0, printed)
        torch.testing.assert_close(found, fuse(distances, log_weights, covered, 21.0, printed), atol=2e-3, rtol=0)


@pytest.mark.parametrize("printed", [False, True])
def test_huge_odds_do_not_overflow(printed):
    distances, log_weights, covered = random_atlases()
    for found in (
        fuse(distances, log_weights, covered, 1e6, printed),
        blend(distances, torch.tensor([0.5, 0.3, 0.2]), covered, 1e6),
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found.exp().sum(0), torch.ones(5, 6))


def test_atlas_log_weights_in_loops():
    generator = torch.Generator().manual_seed(0)
    image, atlases = torch.rand(3, 4, 5, generator=generator) * 255, torch.rand(2, 3, 4, 5, generator=generator) * 255
    gaps = torch.tensor([0.05, 0.4])
    found = atlas_log_weights(image, atlases, gaps, sigma=30.0, alpha=2.0)
    for n, y, x in np.ndindex(2, 4, 5):
        squares = [(float(atlases[n, c, y, x]) - float(image[c, y, x])) ** 2 for c in range(3)]
        expected = -2.0 * float(gaps[n]) - sum(squares) / 3 / (2 * 30.0**2)
        assert float(found[n, y, x]) == pytest.approx(expected, rel=1e-5)
    alike = atlas_log_weights(image, image.expand(2, -1, -1, -1), gaps)
    torch.testing.assert_close(alike, -gaps.view(2, 1, 1).expand(2, 4, 5))  # the paper's alpha of 1 per mm
