"""How the sections of a stack lie: which are turned or mirrored, and the rotation and shift that make neighbours fit.

Chained registrations of neighbours drift, and straighten anatomy that is curved along the stack. Pairs at one and two
sections' distance are therefore taken for sums of three: an error of each section as given, on its own; a random walk
of the anatomy, which is no error and stays; and errors of the pairs. How large each is, is estimated from the pairs
themselves. A stack that lies well already stays as it is; one whose sections each lie differently becomes smooth.

References
----------
.. [1] Casamitjana et al. 2022, "Robust joint registration of multiple stains and MRI for multimodal 3D histology
   reconstruction", https://doi.org/10.1016/j.media.2021.102265 (the most likely transforms given pairs over several
   distances)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

from limner.registration.section_pairs import AS_IS, FLIPS

SHARE = 0.02  # nats a section that is not as it is costs: most sections lie right
SURE = 0.22  # nats a pair by which another orientation must fit better: 1.25 times less unexplained variance
DEGREES_OF_FREEDOM = 4.0  # of the errors of pairs: Student's t, so that a failed pair counts for little
ROUNDS = 8  # of weighing pairs anew
# what is expected of the anatomy's steps beside the errors of sections, and how many nats off that is taken for one
# deviation: a few sections cannot tell the two apart, and then errors are the likelier
ANATOMY, ANATOMY_NATS = 0.1, 1.5
ANCHOR = 1e-6  # of the precision of a step of the anatomy: holds the anatomy of the whole stack near 0
NARROWEST, WIDEST = 1e3, 20.0  # times less, or more, than the differences: the scales that are tried
NATS = 1e-4  # of unexplained variance, below which fits are equally good


def misfit(correlation: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log of the share of variance that a pair's fit leaves unexplained, nats; correlations below 0 count as 0."""
    return np.log(1 - np.clip(correlation, 0, 1).astype(np.float64) ** 2 + NATS)


@dataclass(frozen=True)
class Orientations:
    """Orientations of the sections.

    Parameters
    ----------
    found : ndarray of int
        Which of `FLIPS` each section best is, shape (N,).
    gain : ndarray of float
        Nats a pair by which that fits better than the section as it is, everything else arranged as best it can;
        0 where it is as it is.
    """

    found: NDArray[np.int64]
    gain: NDArray[np.float64]

    @property
    def sure(self) -> NDArray[np.int64]:
        """The same with those that are not certain taken as they are."""
        return np.where(self.gain > SURE, self.found, AS_IS)


def find_orientations(pairs: NDArray[np.int64], correlation: NDArray[np.float64], n: int) -> Orientations:
    """Orientations that explain the fits of all pairs best.

    Most sections are as they should be; that also tells a turned section from a stack that is turned around it.

    Parameters
    ----------
    pairs : ndarray of int
        Of sections at most two apart, shape (K, 2); of sections numbered along the stack without gaps.
    correlation : ndarray
        In each relative orientation, shape (K, 4).
    n : int
        Number of sections.

    Returns
    -------
    Orientations

    Examples
    --------
    >>> fit = np.full((3, 4), 0.5)  # three sections, of which the middle one fits the others mirrored left to right
    >>> fit[[0, 1, 2], [2, 2, 0]] = 0.9
    >>> find_orientations(np.array([(0, 1), (1, 2), (0, 2)]), fit, 3).sure
    array([0, 2, 0])
    """
    if n < 2:
        return Orientations(np.zeros(n, np.int64), np.zeros(n))
    costs = _costs(pairs, misfit(correlation), n)
    first = _marginals(costs).argmin(axis=1)
    # fixes which way round the stack is: else any section could be as it is if all others were turned
    as_is = np.flatnonzero(first == AS_IS)
    anchor = int(as_is[len(as_is) // 2]) if len(as_is) else 0
    own = costs[0].copy()
    own[anchor] += np.where(np.arange(4) == AS_IS, 0.0, np.inf)
    marginals = _marginals((own, *costs[1:]))
    found = marginals.argmin(axis=1)
    partners = np.bincount(pairs.ravel(), minlength=n)
    return Orientations(found, (marginals[:, AS_IS] - marginals.min(axis=1)) / np.maximum(partners, 1))


Costs = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _costs(pairs: NDArray[np.int64], misfits: NDArray[np.float64], n: int) -> Costs:
    """Costs of orientations of a section (n, 4), it and the next (n, 4, 4), and it and the next but one (n, 4, 4)."""
    own = np.tile(np.where(np.arange(4) == AS_IS, 0.0, SHARE), (n, 1))
    relative = np.arange(4)[:, None] ^ np.arange(4)
    between = {1: np.zeros((n, 4, 4)), 2: np.zeros((n, 4, 4))}
    for (a, b), row in zip(pairs.tolist(), misfits, strict=True):
        between[abs(b - a)][min(a, b)] += row[relative]
    return own, between[1], between[2]


def _marginals(costs: Costs) -> NDArray[np.float64]:
    """Least cost of the whole stack for each orientation of each section, (n, 4), by dynamic programming both ways."""
    own, next_one, next_but_one = costs
    n = len(own)
    # least cost of all before, given the orientations of sections i and i + 1, and of all after
    before, after = np.zeros((n - 1, 4, 4)), np.zeros((n - 1, 4, 4))
    here = own[:-1, :, None] + own[1:, None, :] + next_one[:-1]
    before[0] = here[0]
    for i in range(1, n - 1):
        step = before[i - 1][:, :, None] + next_but_one[i - 1][:, None, :]
        before[i] = step.min(axis=0) + next_one[i] + own[i + 1]
    for i in range(n - 3, -1, -1):
        ahead = next_but_one[i][:, None, :] + (next_one[i + 1] + own[i + 2] + after[i + 1])[None]
        after[i] = ahead.min(axis=2)
    both = before + after
    return np.concatenate([both.min(axis=2), both[-1:].min(axis=1)])


@dataclass(frozen=True)
class Poses:
    """Rotation and shift of each section beside how it is given, apart from its orientation.

    Parameters
    ----------
    angles : ndarray
        Radians, shape (N,), as of `limner.registration.affine`: from the aligned stack to the section.
    shifts : ndarray
        Where the middle of the section's tissue comes to lie beside where it is, (N, 2), mm, y and x.
    """

    angles: NDArray[np.float64]
    shifts: NDArray[np.float64]


def solve_poses(
    pairs: NDArray[np.int64],
    matrices: NDArray[np.float64],
    orientations: NDArray[np.int64],
    centres: NDArray[np.float64],
    uncertainty: NDArray[np.float64],
) -> Poses:
    """The most likely poses given registered pairs.

    Parameters
    ----------
    pairs : ndarray of int
        Fixed and moving section, shape (K, 2).
    matrices : ndarray
        Transforms between the sections as given, shape (K, 2, 3), mm.
    orientations : ndarray of int
        Of the sections, shape (N,).
    centres : ndarray
        Middle of each section's tissue as given, mm from its centre, shape (N, 2).
    uncertainty : ndarray
        Of the rotation and the shift of each pair, each up to a common factor, shape (K, 2), > 0.

    Returns
    -------
    Poses
    """
    flips = np.asarray(FLIPS, dtype=np.float64)[orientations]
    middle = centres * flips
    first, second = pairs.T
    # between the sections with their flips taken back, only rotations and shifts are left
    linear = flips[second][:, :, None] * matrices[:, :, :2] * flips[first][:, None, :]
    shift = flips[second] * matrices[:, :, 2]
    turned = np.arctan2(linear[:, 1, 0] - linear[:, 0, 1], linear[:, 0, 0] + linear[:, 1, 1])
    angles = most_likely(pairs, turned[:, None], uncertainty[:, 0], len(orientations))[:, 0]
    match = np.einsum("kij,kj->ki", linear, middle[first]) + shift
    upright = np.einsum("kji,kj->ki", rotation(angles[second]), match - middle[second])
    steps = middle[first] - middle[second] - upright
    return Poses(angles, most_likely(pairs, steps, uncertainty[:, 1], len(orientations)))


def rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrices (..., 2, 2) acting on (y, x), of angles in radians."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2)


def to_matrices(poses: Poses, orientations: NDArray[np.int64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Transforms from the aligned stack to each section as given, shape (N, 2, 3), mm; arguments as above."""
    flips = np.asarray(FLIPS, dtype=np.float64)[orientations]
    turn, middle = rotation(poses.angles), centres * flips
    shift = middle - np.einsum("nij,nj->ni", turn, middle + poses.shifts)
    return flips[:, :, None] * np.concatenate([turn, shift[:, :, None]], axis=2)


def most_likely(
    pairs: NDArray[np.int64], steps: NDArray[np.float64], uncertainty: NDArray[np.float64], n: int
) -> NDArray[np.float64]:
    """Errors of sections given measured differences between them.

    Differences are those of the sections' errors, which are normal around 0; of what the anatomy does along the stack,
    which is a random walk and stays; and errors of the measurements (Student's t). The three scales are those under
    which the differences are likeliest, with a weak preference for steps of the anatomy a tenth of the errors.

    Parameters
    ----------
    pairs : ndarray of int
        Shape (K, 2); the second less the first is measured.
    steps : ndarray
        Differences of each coordinate, shape (K, D).
    uncertainty : ndarray
        Relative standard deviations of the measurements, shape (K,).
    n : int
        Number of sections.

    Returns
    -------
    ndarray
        Shape (N, D); 0 where nothing was measured.

    Examples
    --------
    >>> chain = np.stack([np.arange(9), np.arange(1, 10)], axis=1)
    >>> lie = np.where(np.arange(10) == 4, 1.0, 0.0)  # one section is 1 off
    >>> most_likely(chain, np.diff(lie)[:, None], np.ones(9), 10)[4].round()
    array([1.])
    """
    if not len(pairs):
        return np.zeros((n, steps.shape[1]))
    weights = 1 / uncertainty**2
    spread = max(float(np.sqrt(np.mean(steps**2))), 1e-12)
    lowest, highest = np.log(spread / NARROWEST), np.log(spread * WIDEST)
    found, scales = np.zeros((n, steps.shape[1])), np.log([spread, spread / 10, spread / 10])

    def cost(logs: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
        kept = np.clip(logs, lowest, highest)
        unusual = (kept[1] - kept[0] - math.log(ANATOMY)) / ANATOMY_NATS
        try:
            return 0.5 * unusual**2 - _log_evidence(pairs, steps, weights, n, np.exp(kept))[0]
        except linalg.LinAlgError:  # scales so far apart that no number holds both
            return math.inf

    for _ in range(ROUNDS):
        fit = optimize.minimize(
            cost,
            scales,
            args=(weights,),
            method="Nelder-Mead",
            options={"xatol": 0.05, "fatol": 0.05, "maxiter": 120},
        )
        scales = np.clip(fit.x, lowest, highest)
        found, errors = _log_evidence(pairs, steps, weights, n, np.exp(scales))[1:]
        squares = (errors**2).mean(axis=1) / (uncertainty * math.exp(scales[2])) ** 2
        weights = (DEGREES_OF_FREEDOM + 1) / (DEGREES_OF_FREEDOM + squares) / uncertainty**2
    return found


def _log_evidence(
    pairs: NDArray[np.int64],
    steps: NDArray[np.float64],
    weights: NDArray[np.float64],
    n: int,
    scales: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Log density of the differences up to a constant, likeliest errors of sections and of pairs.

    The scales are those of errors of sections, of steps of the anatomy, and of errors of pairs. Unknown are, for each
    section in turn, its error and where the anatomy has wandered to: their precision matrix is banded.
    """
    of_sections, of_anatomy, of_pairs = (float(s) for s in scales)
    first, second = pairs.T
    precision = weights / of_pairs**2
    reach = 2 * int(np.abs(second - first).max()) + 1
    prior = np.zeros((reach + 1, 2 * n))  # lower form: [j - i, i] holds row j, column i
    prior[0, ::2] = 1 / of_sections**2
    step = 1 / of_anatomy**2
    prior[0, 1:-2:2] += step
    prior[0, 3::2] += step
    prior[2, 1:-2:2] = -step
    prior[0, 1::2] += ANCHOR * step  # only differences matter; this fixes the rest
    bands = prior.copy()
    towards = np.zeros((2 * n, steps.shape[1]))
    signed = [(2 * second + k, 1.0) for k in (0, 1)] + [(2 * first + k, -1.0) for k in (0, 1)]
    for index, sign in signed:
        np.add.at(towards, index, sign * precision[:, None] * steps)
        for other, other_sign in signed:
            lower = index >= other
            at = (index - other)[lower], other[lower]
            np.add.at(bands, at, sign * other_sign * precision[lower])
    factor = linalg.cholesky_banded(bands, lower=True)
    unknown = linalg.cho_solve_banded((factor, True), towards)
    whole = unknown[::2] + unknown[1::2]
    square = (precision[:, None] * steps**2).sum() - (towards * unknown).sum()
    log_determinant = 2 * np.log(factor[0]).sum() - 2 * np.log(linalg.cholesky_banded(prior, lower=True)[0]).sum()
    evidence = -0.5 * float(square + steps.shape[1] * (log_determinant - np.log(precision).sum()))
    return evidence, unknown[::2], whole[second] - whole[first] - steps
