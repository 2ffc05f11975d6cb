"""Label fusion: what the labelled sections around a section say about each of its pixels, as log probabilities.

Two families. `blend` interpolates the signed distances of labelled sections along z and reads the result as LogOdds:
what measured best on a real stack. `fuse` is the published mixture over atlases [1]_ [2]_, each atlas's LogOdds
normalised; `fuse(..., printed=True)` is the equation as Atzeni et al. printed it.

References
----------
.. [1] Sabuncu et al. 2010, "A generative model for image segmentation based on label fusion",
   https://doi.org/10.1109/TMI.2010.2050897
.. [2] Atzeni et al. 2018, https://doi.org/10.1007/978-3-030-00934-2_25, Eq. 4
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Interpolation = Literal["linear", "catmull-rom"]


def interpolation_weights(
    knots: Sequence[float], z: float, kind: Interpolation = "catmull-rom"
) -> list[tuple[int, float]]:
    """Which labelled sections take part at position `z`, and with what weight.

    Parameters
    ----------
    knots : sequence of float
        Positions of the labelled sections, mm, increasing.
    z : float
        Position wanted, mm.
    kind : {'linear', 'catmull-rom'}
        Two neighbours, or a cubic through up to four (tangents by central differences; at the ends one-sided).

    Returns
    -------
    list of (int, float)
        Index into `knots` and weight; weights sum to 1. Beyond the first or last knot that one alone counts.

    Examples
    --------
    >>> interpolation_weights([0.0, 1.0], 0.25, "linear")
    [(0, 0.75), (1, 0.25)]
    >>> interpolation_weights([0.0, 1.0], 7.0)
    [(1, 1.0)]
    """
    if z <= knots[0]:
        return [(0, 1.0)]
    if z >= knots[-1]:
        return [(len(knots) - 1, 1.0)]
    right = next(i for i, knot in enumerate(knots) if knot > z)
    left = right - 1
    step = knots[right] - knots[left]
    t = (z - knots[left]) / step
    if kind == "linear":
        return [(left, 1 - t), (right, t)]
    weights = {left: 2 * t**3 - 3 * t**2 + 1, right: 3 * t**2 - 2 * t**3}
    for at, share in ((left, t**3 - 2 * t**2 + t), (right, t**3 - t**2)):
        before, after = max(at - 1, 0), min(at + 1, len(knots) - 1)
        tangent = share * step / (knots[after] - knots[before])
        weights[after] = weights.get(after, 0.0) + tangent
        weights[before] = weights.get(before, 0.0) - tangent
    return sorted(weights.items())


def _uniform_where(uncovered: Tensor, log_probabilities: Tensor) -> Tensor:
    uniform = -math.log(log_probabilities.shape[0])
    return torch.where(uncovered, log_probabilities.new_tensor(uniform), log_probabilities)


def blend(distances: Tensor, weights: Tensor, covered: Tensor, rho: float) -> Tensor:
    """Log probabilities from signed distances interpolated along z.

    Parameters
    ----------
    distances : Tensor
        Signed distances of N atlases to L structures on the section's grid, shape (N, L, Y, X), mm, positive inside.
    weights : Tensor
        Interpolation weight of each atlas, shape (N,); they sum to 1 and may be negative.
    covered : Tensor of bool
        Shape (N, Y, X): where each atlas says anything. There the others' weights are scaled up to sum to 1.
    rho : float
        LogOdds per mm.

    Returns
    -------
    Tensor
        log p_f, shape (L, Y, X); uniform where no atlas covers the pixel.
    """
    shares, uncovered = local_shares(weights, covered)
    mean = torch.einsum("nyx,nlyx->lyx", shares, distances)
    return _uniform_where(uncovered, torch.log_softmax(rho * mean, dim=0))


def local_shares(weights: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each atlas at each pixel, (N, Y, X), and where no atlas says anything, (Y, X); given as for `blend`.

    Examples
    --------
    >>> covered = torch.tensor([[[True, True, False]], [[True, False, False]]])
    >>> shares, uncovered = local_shares(torch.tensor([0.75, 0.25]), covered)
    >>> shares[:, 0].tolist(), uncovered.tolist()
    ([[0.75, 1.0, 0.0], [0.25, 0.0, 0.0]], [[False, False, True]])
    """
    share = weights.view(-1, 1, 1) * covered
    total = share.sum(dim=0)
    uncovered = total < 0.05  # negative cubic weights alone are no evidence
    return share / torch.where(uncovered, 1.0, total), uncovered


def fuse(
    distances: Tensor,
    log_weights: Tensor,
    covered: Tensor,
    rho: float,
    printed: bool = False,
) -> Tensor:
    """Log probabilities from the published mixture over atlases.

    Parameters
    ----------
    distances : Tensor
        Shape (N, L, Y, X), mm, as for `blend`.
    log_weights : Tensor
        log w_n of each atlas and pixel, shape (N, Y, X); see `atlas_log_weights`.
    covered : Tensor of bool
        Shape (N, Y, X).
    rho : float
        LogOdds per mm; the paper's is 21.
    printed : bool
        Sum exp(rho D) over atlases before normalising, as printed: the atlas with the deeper label outweighs.

    Returns
    -------
    Tensor
        log p_f, shape (L, Y, X); uniform where no atlas covers the pixel.
    """
    odds = rho * distances
    per_atlas = odds if printed else torch.log_softmax(odds, dim=1)
    masked = torch.where(covered, log_weights, -torch.inf)
    uncovered = ~covered.any(dim=0)
    masked = torch.where(uncovered, 0.0, masked)
    mixed = torch.logsumexp(masked[:, None] + per_atlas, dim=0)
    return _uniform_where(uncovered, torch.log_softmax(mixed, dim=0))


def atlas_log_weights(
    image: Tensor, atlases: Tensor, gaps_mm: Tensor, sigma: float = 20.0, alpha: float = 1.0
) -> Tensor:
    """log w_n: how far an atlas is, and how unlike the section it looks at each pixel.

    Parameters
    ----------
    image : Tensor
        The section, 8-bit grey levels, shape (C, Y, X).
    atlases : Tensor
        The warped labelled sections, shape (N, C, Y, X).
    gaps_mm : Tensor
        Distance along z to each atlas, shape (N,), mm.
    sigma : float
        Standard deviation of grey levels; the paper's sigma**2 is 400. RGB: the mean over channels counts.
    alpha : float
        Decay with distance, per mm; the paper's is 1.

    Returns
    -------
    Tensor
        Shape (N, Y, X), up to a constant that all atlases share.
    """
    unlike = (atlases - image).square().mean(dim=1) / (2 * sigma**2)
    return -alpha * gaps_mm.view(-1, 1, 1) - unlike
