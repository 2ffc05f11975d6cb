"""How sure a result really is: scaling log probabilities so that they predict their own errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor


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
