from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import norm

from limner.mixture_refinement import (
    LOWEST_GAIN,
    Basis,
    Mixture,
    Settings,
    e_step,
    fit_mixture,
    gain_field,
    initial_mixture,
    m_step,
    polynomials,
    positions_in,
    posterior,
)

SHAPE = (16, 28, 28)
LEVELS = np.array([40.0, 100.0, 130.0, 100.0])  # labels 1 and 3 look alike: place alone tells them apart


def phantom(noise=6.0, shading=0.25, seed=0):
    """Folded shells in a ball, a blurred and shifted prior, and a scan shaded along y and x: arrays of voxels."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2) + 0.08 * np.sin(7 * np.arctan2(y, x))
    labels = (radius < 0.85).astype(int) + (radius < 0.6)
    labels[(radius < 0.85) & (x > 0.55)] = 3
    maps = np.stack([ndimage.gaussian_filter((labels == k).astype(float), 2.0) for k in range(4)])
    prior = np.roll(maps, 1, axis=2) + 1e-4
    gain = 1 + shading * y - 0.6 * shading * x * y
    scan = gain * LEVELS[labels] + np.random.default_rng(seed).normal(0, noise, SHAPE)
    mask = radius < 1
    prior = torch.from_numpy(prior[:, mask] / prior[:, mask].sum(axis=0))
    return torch.from_numpy(scan[mask]), prior.log(), positions_in(mask), labels[mask], gain[mask]


def dice(found, truth):
    return np.mean(
        [2 * np.sum((found == k) & (truth == k)) / (np.sum(found == k) + np.sum(truth == k)) for k in (1, 2, 3)]
    )


def refined(image, log_prior, positions, **settings):
    mixture, _ = fit_mixture(image, log_prior, positions, 1.0, Settings(**settings))
    return posterior(image, log_prior, positions, mixture).argmax(dim=0).numpy()


@pytest.fixture
def mixture():
    """Two labels, the second with two Gaussians, shading along one axis."""
    means, sigmas, shares = torch.tensor([[1.0, 3.0, 5.0], [0.5, 1.0, 2.0], [1.0, 0.3, 0.7]], dtype=torch.float64)
    gain = torch.tensor([1.0, 0.2], dtype=torch.float64)
    return Mixture(torch.tensor([0, 1, 1]), means, sigmas, shares, gain, order=1)


def test_polynomials_are_orthogonal_products():
    positions = positions_in(np.ones((41, 41, 41), bool)).double()
    basis = polynomials(positions, 2)
    assert len(basis) == 10
    assert (basis[0] == 1).all()
    z, y, _ = positions.T
    for expected in (z, y, z * y, (3 * y**2 - 1) / 2):
        assert (basis - expected).abs().amax(dim=1).min() < 1e-6
    between = basis @ basis.T / len(positions)
    assert (between - torch.diag(torch.diag(between))).abs().max() < 0.06


@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_products_of_polynomials(n_axes):
    positions = torch.rand(50, n_axes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, low = Basis.at(positions, 3), polynomials(positions, 3)
    torch.testing.assert_close(basis.gain_terms, low)
    torch.testing.assert_close(torch.einsum("mnt,tj->mnj", basis.products, basis.terms), low[:, None] * low)


def test_posterior_by_hand(mixture):
    image, positions = torch.tensor([2.0, 4.0]).double(), torch.tensor([[-1.0], [1.0]]).double()
    prior = torch.tensor([[0.4, 0.0], [0.6, 1.0]]).double()
    first = 0.4 * norm.pdf(2, 0.8 * 1, 0.5)
    second = 0.6 * (0.3 * norm.pdf(2, 0.8 * 3, 1) + 0.7 * norm.pdf(2, 0.8 * 5, 2))
    found = posterior(image, prior.log(), positions, mixture).numpy()
    np.testing.assert_allclose(found, [[first / (first + second), 0], [second / (first + second), 1]], rtol=1e-6)
    likelihood = e_step(image, prior.log(), Basis.at(positions, 1), mixture).likelihood
    third = 0.3 * norm.pdf(4, 1.2 * 3, 1) + 0.7 * norm.pdf(4, 1.2 * 5, 2)
    assert likelihood == pytest.approx(np.log(first + second) + np.log(third))


def test_known_labels_give_their_own_means_deviations_and_likelihood():
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 200)
    image = draw.normal([5.0, 20.0, 7.0], [1.0, 2.0, 3.0], (200, 3)).T.ravel()
    log_prior = torch.from_numpy(np.where(np.arange(3)[:, None] == labels, 0, -np.inf))
    positions = torch.from_numpy(draw.uniform(-1, 1, (600, 3)))
    found, bound = fit_mixture(torch.from_numpy(image), log_prior, positions, 1e-3, Settings(order=0))
    expected = [(image[labels == k].mean(), image[labels == k].std()) for k in range(3)]
    np.testing.assert_allclose(torch.stack([found.means, found.sigmas], 1).numpy(), expected, rtol=1e-9)
    each = np.concatenate([norm.logpdf(image[labels == k], *expected[k]) for k in range(3)])
    assert bound[-1] == pytest.approx(each.sum())


def test_known_labels_without_noise_give_the_gain_exactly():
    _, _, positions, labels, gain = phantom()
    log_prior = torch.from_numpy(np.where(np.arange(4)[:, None] == labels, 0, -np.inf))
    image = torch.from_numpy(LEVELS[labels] * gain)
    settings = Settings(order=2, iterations=60, tolerance=0)
    found, _ = fit_mixture(image, log_prior, positions.double(), 1e-3, settings)
    constant = gain_field(positions.double(), found).numpy() / gain
    np.testing.assert_allclose(constant, constant[0], rtol=1e-4)
    np.testing.assert_allclose(found.means.numpy() * constant[0], LEVELS, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{}, {"order": 0}, {"gaussians": 2}, {"order": 1, "gaussians": (3, 1, 2, 1)}])
def test_the_likelihood_never_falls(settings, dtype):
    image, log_prior, positions, *_ = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in phantom())
    settings = Settings(**{"iterations": 25, "tolerance": 0, **settings})
    _, bound = fit_mixture(image, log_prior, positions, 1.0, settings)
    slack = 1e-9 if dtype == torch.float64 else 2e-7
    assert np.diff(bound).min() > -slack * abs(bound[-1])
    assert bound[-1] - bound[0] > 0.05 * len(image)


def test_each_parameter_is_the_best_given_the_others(monkeypatch):
    """A step away, of one parameter alone, lowers the expected log likelihood of the M-step."""
    monkeypatch.setattr("limner.mixture_refinement.SWEEPS", 300)
    image, log_prior, positions, *_ = phantom()
    basis = Basis.at(positions.to(image), 2)
    before = initial_mixture(image, log_prior, basis, 1.0, Settings(order=2, gaussians=2))
    before = replace(before, gain=torch.linspace(1, -0.05, len(before.gain)).double())

    def expected(mixture):
        p, total = [], 0.0
        for m in (before, mixture):
            mu = m.means[:, None] * (m.gain @ basis.gain_terms)
            log = torch.from_numpy(norm.logpdf(image, mu, m.sigmas[:, None])) + m.shares.log()[:, None]
            p.append(log + log_prior[m.owners])
        total = (torch.softmax(p[0], dim=0) * p[1]).sum()
        return float(total)

    after = m_step(e_step(image, log_prior, basis, before), before, basis, 1.0)
    best = expected(after)
    assert best > expected(before) + 1
    for k in range(len(after.means)):
        for factor in (0.99, 1.01):
            scale = torch.ones_like(after.means)
            scale[k] = factor
            assert expected(replace(after, means=after.means * scale)) < best
            assert expected(replace(after, sigmas=after.sigmas * scale)) < best
    for share in (-0.01, 0.01):
        assert expected(replace(after, shares=after.shares + share * torch.tensor([1, -1] * 4))) < best
    for m in range(1, len(after.gain)):
        for step in (-0.005, 0.005):
            gain = after.gain.clone()
            gain[m] += step
            assert expected(replace(after, gain=gain)) < best


def test_no_deviation_below_the_noise():
    image, log_prior, positions, *_ = phantom(noise=0.0, shading=0.0)
    found, bound = fit_mixture(image, log_prior, positions, 9.0, Settings(order=0))
    assert found.sigmas.min() == 9
    assert np.diff(bound).min() >= -1e-9 * abs(bound[-1])


def test_refinement_beats_the_prior_and_shading_is_found():
    image, log_prior, positions, labels, gain = phantom()
    of_prior = dice(log_prior.argmax(dim=0).numpy(), labels)
    unshaded = dice(refined(image, log_prior, positions, order=0), labels)
    shaded = dice(refined(image, log_prior, positions, order=3), labels)
    assert unshaded > of_prior + 0.03
    assert shaded > unshaded + 0.05
    mixture, _ = fit_mixture(image, log_prior, positions, 1.0)
    found = gain_field(positions, mixture).numpy()
    np.testing.assert_allclose(found / found.mean(), gain / gain.mean(), atol=0.05)


def test_without_shading_the_gain_field_costs_little():
    image, log_prior, positions, labels, _ = phantom(shading=0.0)
    unshaded, shaded = (dice(refined(image, log_prior, positions, order=n), labels) for n in (0, 3))
    assert shaded > unshaded - 0.01


def test_unit_of_intensity_does_not_matter():
    image, log_prior, positions, *_ = phantom()
    found = [
        posterior(scale * image, log_prior, positions, fit_mixture(scale * image, log_prior, positions, scale)[0])
        for scale in (1.0, 1e3)
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_fitting_to_some_voxels_is_nearly_as_good():
    image, log_prior, positions, labels, _ = phantom()
    every, some = (dice(refined(image, log_prior, positions, sampled=n), labels) for n in (10**6, len(image) // 4))
    assert every != some
    assert some > every - 0.02


def test_two_gaussians_for_labels_of_two_tissues():
    """Tissues at 0 and 20 are one label, those at 10 and 30 another; the prior is wrong in three tenths of voxels."""
    draw = np.random.default_rng(0)
    image = torch.from_numpy(draw.normal(np.repeat([0.0, 20.0, 10.0, 30.0], 300), 1.0))
    truth = np.repeat([0, 1], 600)
    said = np.where(draw.uniform(size=1200) < 0.7, truth, 1 - truth)
    log_prior = torch.from_numpy(np.where(np.arange(2)[:, None] == said, 0.7, 0.3)).log()
    nowhere = torch.zeros(1200, 3)
    one, two = ((refined(image, log_prior, nowhere, order=0, gaussians=n) == truth).mean() for n in (1, (2, 2)))
    assert two > 0.99
    assert one < 0.8


def test_a_section_and_a_label_that_is_nowhere():
    image, log_prior, positions, labels, _ = phantom()
    section = positions[:, 0] == positions[:, 0].median()
    nowhere = torch.cat([log_prior, torch.full_like(log_prior[:1], -torch.inf)])[:, section]
    found, bound = fit_mixture(image[section], nowhere, positions[section], 1.0)
    p = posterior(image[section], nowhere, positions[section], found)
    assert p.isfinite().all() and not p[4].any()
    torch.testing.assert_close(p.sum(dim=0), torch.ones_like(p[0]))
    assert np.isfinite(bound).all()
    assert dice(p.argmax(dim=0).numpy(), labels[section]) > 0.8


def test_the_gain_stays_positive():
    """A scan that fades to nothing at one side, and below: the gain is held above its lowest, the bound still rises."""
    image, log_prior, positions, *_ = phantom()
    image = image * (0.4 - 0.9 * positions[:, 2])
    found, bound = fit_mixture(image, log_prior, positions, 1.0, Settings(iterations=30, tolerance=0))
    assert gain_field(positions, found).min() > LOWEST_GAIN - 1e-6
    assert np.diff(bound).min() > -1e-9 * abs(bound[-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"log_prior": torch.zeros(2, 9)}, r"log_prior \(2, 9\)"),
        ({"positions": torch.zeros(9, 3)}, r"positions \(9, 3\)"),
        ({"image": torch.full((10,), torch.nan)}, "not finite"),
        ({"noise": 0.0}, "noise is 0.0"),
        ({"settings": Settings(gaussians=(1, 2, 1))}, r"gaussians are \(1, 2, 1\), labels 2"),
    ],
)
def test_what_cannot_be_fitted(change, said):
    arguments = {
        "image": torch.ones(10),
        "log_prior": torch.full((2, 10), 0.5).log(),
        "positions": torch.zeros(10, 3),
        "noise": 1.0,
    }
    with pytest.raises(ValueError, match=said):
        fit_mixture(**{**arguments, **change})
