"""How sure a result really is: scaling log probabilities so that they predict their own errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from limner.metrics.pixels import expected_calibration_error


def mean_log_loss(log_probabilities: Tensor, truth: Tensor) -> float:
    """Mean of minus the log probability of the true class; (L, N) and (N,) -> nats a pixel."""
    return float(-log_probabilities.gather(0, truth[None]).mean())


def best_scale(loss: Callable[[float], float], low: float, high: float) -> float:
    """The factor in [low, high] with the lowest loss, sought on a logarithmic scale (Brent, bounded).

    Parameters
    ----------
    loss : callable
        Loss as a function of the factor.
    low, high : float
        Bounds, both > 0.

    Examples
    --------
    >>> round(best_scale(lambda s: (s - 3) ** 2, 0.1, 100), 2)
    3.0
    """
    found = minimize_scalar(
        lambda t: loss(float(np.exp(t))), bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-3}
    )
    return float(np.exp(found.x))


def held_out_sections(labelled: Sequence[int]) -> tuple[int, ...]:
    """Labelled sections on which scales are fitted: every fourth, not the first or last, six at most.

    Examples
    --------
    >>> held_out_sections([0, 10, 20, 30, 40, 50, 60, 70])
    (20, 60)
    >>> held_out_sections([0, 10])
    ()
    """
    inner = list(labelled)[1:-1]
    chosen = inner[1::4] or inner[:1]
    return tuple(chosen[:: math.ceil(len(chosen) / 6)]) if chosen else ()


def first_within_one_standard_error(scores: Sequence[Sequence[float]]) -> int:
    """Index of the first choice whose mean score is within one standard error of the best choice's.

    Parameters
    ----------
    scores : sequence of sequence of float
        For each choice, the simplest first, its score on each of the same cases; higher is better.

    Returns
    -------
    int

    References
    ----------
    .. [1] Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3. Here the standard error is that of
       the difference to the best choice, case by case.

    Examples
    --------
    >>> first_within_one_standard_error([[0.5, 0.5], [0.8, 0.9], [0.81, 0.9]])
    1
    """
    found = np.asarray(scores)  # (choices, cases)
    loss = found[found.mean(axis=1).argmax()] - found
    standard_error = loss.std(axis=1, ddof=1) / math.sqrt(loss.shape[1]) if loss.shape[1] > 1 else 0.0
    return int(np.argmax(loss.mean(axis=1) <= standard_error))


def temperature_scaling(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The temperature with the lowest log loss, each sample counting the same.

    Parameters
    ----------
    samples : sequence of (Tensor, Tensor)
        Log probabilities (L, N) and true classes (N,).

    Returns
    -------
    dict
        ``temperature``, and the expected calibration error before and after, ``ece_before`` and ``ece_after``.

    References
    ----------
    .. [1] Guo et al. 2017, "On calibration of modern neural networks", https://arxiv.org/abs/1706.04599
    """

    def loss(temperature: float) -> float:
        return sum(mean_log_loss(torch.log_softmax(w / temperature, dim=0), t) for w, t in samples if len(t))

    def calibration_error(temperature: float) -> float:
        shown = [torch.softmax(w / temperature, dim=0).max(dim=0) for w, _ in samples]
        confidence = torch.cat([s.values for s in shown]).cpu().numpy()
        correct = torch.cat([s.indices == t for s, (_, t) in zip(shown, samples, strict=True)]).cpu().numpy()
        return float(expected_calibration_error(confidence, correct))

    temperature = best_scale(loss, 0.05, 50.0)
    before, after = calibration_error(1.0), calibration_error(temperature)
    return {"temperature": temperature, "ece_before": before, "ece_after": after}
