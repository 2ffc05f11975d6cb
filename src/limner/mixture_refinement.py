"""What a scan's own intensities say about its labels: a Gaussian mixture under a spatial prior, fitted to each scan.

A prior f_{j,l} gives each voxel j the probability of each label l. The voxel's intensity then is

    x[j] ~ sum_l f_{j,l} sum_c share_{l,c} Normal(g(j) mu_{l,c}, sigma_{l,c}^2),      g(j) = 1 + sum_m a_m P_m(j)

with one or several Gaussians c a label and a gain g, the smooth shading of the scan: products of Legendre polynomials
of low total degree. EM finds mu, sigma, share and a, and each iteration raises the likelihood:

    E-step   p_{j,l,c} proportional to f_{j,l} share_{l,c} Normal(x[j]; g(j) mu_{l,c}, sigma_{l,c}^2)      `e_step`
    M-step   a, mu, sigma and share, each the best given the others                                       `m_step`

All that the M-step needs are sums over voxels of p, p x P_m and p P_m P_n. The gain multiplies means, and noise stays
what it is: so a is the solution of a linear system, and no logarithm of intensities near 0 is taken. 0 must mean "no
signal", as in MR; scans with another zero are fitted too, but their shading is not quite of this form.

References
----------
Van Leemput et al., "Automated model-based bias field correction of MR images of the brain", IEEE TMI 18, 1999,
https://doi.org/10.1109/42.811270. Departures: a gain on the means where the paper adds a bias to log intensities; the
prior is any, the decoder's of Dalca et al. 2018, https://doi.org/10.1109/CVPR.2018.00968, for instance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.polynomial.legendre import legvander
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2**13  # voxels at once: their probabilities stay in the processor's cache
SWEEPS = 2  # of the M-step, which costs next to nothing, through its parameters
LOWEST_GAIN = 0.2


@dataclass(frozen=True)
class Mixture:
    """What intensities look like: K Gaussians, each of one label, and the gain field.

    Parameters
    ----------
    owners : Tensor of int
        The label of each Gaussian, shape (K,).
    means, sigmas, shares : Tensor
        Each Gaussian's mu, sigma, and share in its label, shape (K,); float64.
    gain : Tensor
        Coefficients 1, a_1, a_2, ... of the polynomials, shape (M,), float64; (1,): no shading.
    order : int
        Highest total degree of the polynomials.
    """

    owners: Tensor
    means: Tensor
    sigmas: Tensor
    shares: Tensor
    gain: Tensor
    order: int

    @property
    def n_labels(self) -> int:
        """Number of labels L."""
        return int(self.owners.max()) + 1


@dataclass(frozen=True)
class Settings:
    """How mixtures are fitted.

    Parameters
    ----------
    order : int
        Highest total degree of the gain field's polynomials; 0: none.
    gaussians : int or sequence of int
        Gaussians of each label.
    iterations : int
        At most so many.
    tolerance : float
        Stop when an iteration raises the likelihood by less, nats a voxel.
    sampled : int
        Fit to about so many voxels, evenly taken, where there are more.
    """

    order: int = 3
    gaussians: int | Sequence[int] = 1
    iterations: int = 100
    tolerance: float = 1e-4
    sampled: int = 250_000


@dataclass(frozen=True)
class Sums:
    """Sums over voxels, weighted by the probabilities of the K Gaussians; r is what is left of x beside g mu."""

    likelihood: float  # sum of log p(x[j]), nats
    squares: Tensor  # sum of p r^2, (K,)
    residuals: Tensor  # sum of p r P_m, (K, M)
    products: Tensor  # sum of p P_m P_n, (K, M, M); [:, 0, 0] is the number of voxels of each Gaussian


def positions_in(mask: NDArray[np.bool_]) -> Tensor:
    """Places of a mask's voxels, in the order of ``pixels[mask]``: shape (N, n_axes), float32, [-1, 1] over the mask.

    Examples
    --------
    >>> positions_in(np.array([[False, True, True, True]]))
    tensor([[ 0., -1.],
            [ 0.,  0.],
            [ 0.,  1.]])
    """
    places = np.argwhere(mask).astype(np.float32)
    low, high = places.min(axis=0), places.max(axis=0)
    places -= (low + high) / 2
    places /= np.maximum(high - low, 1) / 2
    return torch.from_numpy(places)


def polynomials(positions: Tensor, order: int) -> Tensor:
    """P_m: products of Legendre polynomials along each axis, by total degree, 0 to `order`; (N, n_axes) -> (M, N).

    Examples
    --------
    >>> polynomials(torch.tensor([[0.5, -1.0]]), order=1)  # 1, then those of degree 1
    tensor([[ 1.0000],
            [-1.0000],
            [ 0.5000]])
    """
    n_axes = positions.shape[1]
    along = torch.from_numpy(legvander(positions.cpu().numpy(), order)).permute(1, 2, 0).contiguous().to(positions)
    degrees = sorted((d for d in product(range(order + 1), repeat=n_axes) if sum(d) <= order), key=sum)
    return torch.stack([along[range(n_axes), d].prod(dim=0) for d in degrees])


@dataclass(frozen=True)
class Basis:
    """Polynomials at the voxels that a mixture is fitted to.

    Parameters
    ----------
    terms : Tensor
        Those of up to twice the gain field's degree, shape (T, N): sums of products of two, which the M-step needs, are
        sums of these. The first M are the gain field's.
    products : Tensor
        P_m P_n as a sum of terms, shape (M, M, T), float64.
    """

    terms: Tensor
    products: Tensor

    @classmethod
    def at(cls, positions: Tensor, order: int) -> Basis:
        """At places (N, n_axes), for gain fields of an order."""
        n_axes = positions.shape[1]
        # as many points along each axis as polynomials of twice the degree have coefficients
        along = torch.linspace(-1, 1, 2 * order + 1, dtype=torch.float64)
        points = torch.cartesian_prod(*[along] * n_axes).reshape(-1, n_axes)
        low, high = polynomials(points, order), polynomials(points, 2 * order)
        pairs = (low[:, None] * low).flatten(0, 1)
        products = torch.linalg.lstsq(high.T, pairs.T).solution.T.reshape(len(low), len(low), len(high))
        return cls(polynomials(positions, 2 * order), products.to(positions.device))

    @property
    def gain_terms(self) -> Tensor:
        """P_m at the voxels, shape (M, N)."""
        return self.terms[: len(self.products)]


def gain_field(positions: Tensor, mixture: Mixture) -> Tensor:
    """g at each place: (N, n_axes) -> (N,). The scan divided by it is free of shading."""
    return mixture.gain.to(positions) @ polynomials(positions, mixture.order)


def fit_mixture(
    image: Tensor, log_prior: Tensor, positions: Tensor, noise: float, settings: Settings | None = None
) -> tuple[Mixture, list[float]]:
    """Fit a mixture to one scan by EM.

    Parameters
    ----------
    image : Tensor
        Intensities of N voxels, those within a mask, shape (N,), any unit and dtype.
    log_prior : Tensor
        log f, shape (L, N), float32 or float64, normalised over labels; -inf where a label cannot be. All is computed
        in its dtype and on its device.
    positions : Tensor
        As of `positions_in`, shape (N, n_axes).
    noise : float
        The scan's noise, > 0, in its unit: no sigma becomes smaller.
    settings : Settings, optional
        Order of the gain field, Gaussians of each label, when to stop.

    Returns
    -------
    Mixture
    list of float
        The log likelihood of the voxels fitted to, nats, of each iteration: it never falls.

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite, the noise is not positive, or labels and `gaussians` differ in
        number.
    """
    settings = settings or Settings()
    _check(image, log_prior, positions, noise)
    step = max(1, len(image) // settings.sampled)
    image, log_prior = image[::step].to(log_prior), log_prior[:, ::step].contiguous()
    basis = Basis.at(positions[::step].to(log_prior), settings.order)
    mixture = initial_mixture(image, log_prior, basis, noise, settings)
    bound: list[float] = []
    for _ in range(settings.iterations):
        sums = e_step(image, log_prior, basis, mixture)
        bound.append(sums.likelihood)
        if len(bound) > 1 and bound[-1] - bound[-2] < settings.tolerance * len(image):
            break
        mixture = m_step(sums, mixture, basis, noise)
    return mixture, bound


def initial_mixture(image: Tensor, log_prior: Tensor, basis: Basis, noise: float, settings: Settings) -> Mixture:
    """Each label's mean and deviation under the prior alone; its Gaussians beside one another; no shading."""
    n_labels = len(log_prior)
    gaussians = settings.gaussians
    counts = [gaussians] * n_labels if isinstance(gaussians, int) else list(gaussians)
    if len(counts) != n_labels or min(counts) < 1:
        raise ValueError(
            f"fit_mixture(): gaussians are {gaussians}, labels {n_labels}; give one number above 0 a label"
        )
    prior = log_prior.exp()
    size = prior.sum(dim=1).double().clamp_min(1e-9)
    mean = (prior @ image).double() / size
    spread = torch.stack([p @ (image - float(m)) ** 2 for p, m in zip(prior, mean, strict=True)]).double() / size
    owners = torch.repeat_interleave(torch.tensor(counts)).to(image.device)
    offset = torch.cat([torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in counts]).to(mean)
    share = torch.tensor([1 / n for n in counts], dtype=torch.float64, device=image.device)[owners]
    sigma = spread.sqrt()[owners].clamp_min(noise)
    gain = torch.eye(1, len(basis.products), dtype=torch.float64, device=image.device)[0]
    return Mixture(owners, mean[owners] + offset * sigma, sigma, share, gain, settings.order)


def e_step(image: Tensor, log_prior: Tensor, basis: Basis, mixture: Mixture) -> Sums:
    """Log likelihood, and the sums that the M-step needs.

    Parameters
    ----------
    image, log_prior : Tensor
        Shapes (N,) and (L, N).
    basis : Basis
        Polynomials at the voxels.
    mixture : Mixture
        What the probabilities are computed with.
    """
    n_gaussians, n_gain = len(mixture.means), len(mixture.gain)
    likelihood = 0.0
    squares = mixture.means.new_zeros(n_gaussians)
    residuals = mixture.means.new_zeros(n_gaussians, n_gain)
    moments = mixture.means.new_zeros(n_gaussians, len(basis.terms))
    for block in _blocks(len(image)):
        terms = basis.terms[:, block]
        gain = mixture.gain.to(terms) @ terms[:n_gain]
        log_p, r = _log_joint(image[block], log_prior[:, block], gain, mixture)
        evidence = torch.logsumexp(log_p, dim=0)
        p = torch.exp(log_p - evidence)
        likelihood += float(evidence.double().sum())
        squares += (p * r * r).sum(dim=1)
        residuals += (p * r) @ terms[:n_gain].T
        moments += p @ terms.T
    return Sums(likelihood, squares, residuals, torch.einsum("kt,mnt->kmn", moments, basis.products))


def m_step(sums: Sums, mixture: Mixture, basis: Basis, noise: float) -> Mixture:
    """Gain field, means, deviations and shares, each the best given the others.

    A Gaussian to which no voxel belongs stays as it is. Deviations are at least `noise`. The gain field goes towards
    the best only as far as it stays above `LOWEST_GAIN` at all voxels.
    """
    size, products = sums.products[:, 0, 0], sums.products
    before = mixture.means[:, None] * mixture.gain  # coefficients of g mu in the E-step, (K, M)
    signal = sums.residuals + torch.einsum("kmn,kn->km", products, before)  # sum of p x P_m
    held = size > 1e-6
    for _ in range(SWEEPS):
        if len(mixture.gain) > 1:
            mixture = replace(mixture, gain=_gain(signal, products, mixture, basis))
        signal_of_gain, power = signal @ mixture.gain, torch.einsum("kmn,m,n->k", products, mixture.gain, mixture.gain)
        means = torch.where(held, signal_of_gain / power.clamp_min(1e-12), mixture.means)
        change = before - means[:, None] * mixture.gain
        square = (
            sums.squares
            + 2 * (change * sums.residuals).sum(dim=1)
            + torch.einsum("kmn,km,kn->k", products, change, change)
        )
        sigmas = (square.clamp_min(0) / size.clamp_min(1e-12)).sqrt().clamp_min(noise)
        mixture = replace(mixture, means=means, sigmas=torch.where(held, sigmas, mixture.sigmas))
    of_label = size.new_zeros(mixture.n_labels).index_add(0, mixture.owners, size)[mixture.owners]
    shares = size.clamp_min(1e-12) / of_label.clamp_min(1e-12)
    return replace(mixture, shares=torch.where(of_label > 1e-6, shares, mixture.shares))


def _gain(signal: Tensor, products: Tensor, mixture: Mixture, basis: Basis) -> Tensor:
    """Coefficients 1, a_1, ...: weighted least squares, or part of the way there."""
    precision = mixture.means / mixture.sigmas**2
    left = torch.einsum("k,kmn->mn", precision * mixture.means, products)
    right = precision @ signal
    # on the processor, where least squares take matrices of any rank, as that of a mask of one section is
    a = torch.linalg.lstsq(left[1:, 1:].cpu(), (right - left[:, 0])[1:, None].cpu(), driver="gelsd").solution[:, 0]
    best = torch.cat([mixture.gain[:1], a.to(mixture.gain)])
    # the expected log likelihood is concave in a: a part of the way to the best raises it as well
    old, new = (gain.to(basis.terms) @ basis.gain_terms for gain in (mixture.gain, best))
    part = torch.where(new < LOWEST_GAIN, (old - LOWEST_GAIN) / (old - new), 1.0).min().clamp_min(0)
    return mixture.gain + float(part) * (best - mixture.gain)


def posterior(image: Tensor, log_prior: Tensor, positions: Tensor, mixture: Mixture) -> Tensor:
    """Probability of each label given the prior and the voxel's own intensity.

    Parameters
    ----------
    image, log_prior, positions : Tensor
        As of `fit_mixture`.
    mixture : Mixture
        As `fit_mixture` gives it.

    Returns
    -------
    Tensor
        Shape (L, N), sums to 1 over labels.
    """
    found = torch.empty_like(log_prior)
    for block in _blocks(len(image)):
        gain = gain_field(positions[block].to(log_prior), mixture)
        log_p, _ = _log_joint(image[block].to(log_prior), log_prior[:, block], gain, mixture)
        p = torch.softmax(log_p, dim=0)
        found[:, block] = torch.zeros_like(log_prior[:, block]).index_add_(0, mixture.owners, p)
    return found


def _log_joint(image: Tensor, log_prior: Tensor, gain: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """log f share Normal(x; g mu, sigma^2) of n voxels and K Gaussians, and x - g mu; each (K, n)."""
    constant = torch.log(mixture.shares) - torch.log(mixture.sigmas) - 0.5 * math.log(2 * math.pi)
    mu, scale, constant = (v.to(image)[:, None] for v in (mixture.means, -0.5 / mixture.sigmas**2, constant))
    r = image - mu * gain
    return torch.addcmul(log_prior[mixture.owners] + constant, r * r, scale), r


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))


def _check(image: Tensor, log_prior: Tensor, positions: Tensor, noise: float) -> None:
    n = len(image)
    if log_prior.shape[1:] != (n,) or len(positions) != n or not n:
        raise ValueError(
            f"fit_mixture(): image has shape {tuple(image.shape)}, log_prior {tuple(log_prior.shape)}, positions "
            f"{tuple(positions.shape)}; give (N,), (L, N) and (N, axes) of the same voxels"
        )
    if not image.isfinite().all():
        raise ValueError("fit_mixture(): the image has values that are not finite; leave those voxels out of the mask")
    if not noise > 0:
        raise ValueError(f"fit_mixture(): noise is {noise}; give a number above 0, from estimate_noise() for instance")
