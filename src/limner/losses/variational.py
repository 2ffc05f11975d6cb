"""The terms of the variational bounds of the anatomical prior, each summed over pixels and averaged over the batch.

    equation of Dalca et al.                                    function
    KL[q(z) || Normal(0, 1)], Eq. 11, its sign mended           kl_loss
    - sum_j log f_{j, s[j]}(z)                                  reconstruction_loss
    - sum_j log sum_l f_{j,l}(z) Normal(x[j]; mu_l, sigma_l)    mixture_loss
    the same bounded, Eq. 12 and 14, the square put back        mixture_bound_loss
    - sum_j log Normal(x[j]; y[j], sigma)                       image_loss

Labels are independent given z, so the sum over labels within the logarithm is exact and no bound is needed; by Jensen's
inequality the bound is never smaller.

References
----------
Dalca, Guttag, Sabuncu, CVPR 2018, https://doi.org/10.1109/CVPR.2018.00968
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of Normal(mean, variance) from Normal(0, 1): 1/2 sum (mean^2 + var - log var - 1).

    Parameters
    ----------
    mean, log_variance : Tensor
        Shape (B, D).

    Returns
    -------
    Tensor
        Scalar, >= 0, nats.

    Examples
    --------
    >>> kl_loss(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2))
    tensor(4.5000)
    """
    return 0.5 * (mean**2 + torch.exp(log_variance) - log_variance - 1).sum(dim=1).mean()


def reconstruction_loss(log_probabilities: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """How unlikely the decoder holds a label map: - sum_j w_j log f_{j, s[j]}.

    Parameters
    ----------
    log_probabilities : Tensor
        log f, shape (B, L, Y, X) or (B, L, Z, Y, X), normalised over labels.
    labels : Tensor of int
        Shape (B, Y, X) or (B, Z, Y, X), 0 to L - 1; anything where the weight is 0.
    weights : Tensor, optional
        Shape of the labels, in [0, 1]; 0: unknown, gives neither loss nor gradient. Default: 1.

    Returns
    -------
    Tensor
        Scalar, nats a map.
    """
    weights = _weights(labels, weights)
    labels = labels.masked_fill(weights == 0, 0).long()
    return -_sum_of_known(log_probabilities.gather(1, labels[:, None])[:, 0], weights)


def mixture_loss(
    log_probabilities: Tensor, image: Tensor, means: Tensor, sigmas: Tensor, weights: Tensor | None = None
) -> Tensor:
    """How unlikely an image is, its labels summed out: - sum_j w_j log sum_l f_{j,l} Normal(x[j]; mu_l, sigma_l).

    Parameters
    ----------
    log_probabilities : Tensor
        log f, shape (B, L, Y, X) or (B, L, Z, Y, X), normalised over labels.
    image : Tensor
        Shape (B, 1, Y, X) or (B, 1, Z, Y, X); anything where the weight is 0.
    means, sigmas : Tensor
        mu_l and sigma_l > 0 in the image's unit, shape (L,), or (B, L) of each image.
    weights : Tensor, optional
        Shape (B, Y, X) or (B, Z, Y, X), in [0, 1]; 0: unknown, gives neither loss nor gradient. Default: 1.

    Returns
    -------
    Tensor
        Scalar, nats an image.
    """
    weights = _weights(image[:, 0], weights)
    log_normal = _log_normal(image, means, sigmas, weights)
    return -_sum_of_known(torch.logsumexp(log_probabilities + log_normal, dim=1), weights)


def mixture_bound_loss(
    log_probabilities: Tensor, image: Tensor, means: Tensor, sigmas: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The paper's bound of `mixture_loss`, of the same arguments: - sum_j w_j sum_l f_{j,l} log Normal(...).

    Never smaller than `mixture_loss`, and as large where f is certain or all labels look alike.
    """
    weights = _weights(image[:, 0], weights)
    log_normal = _log_normal(image, means, sigmas, weights)
    return -_sum_of_known((log_probabilities.exp() * log_normal).sum(dim=1), weights)


def image_loss(reconstruction: Tensor, image: Tensor, sigma: float, weights: Tensor | None = None) -> Tensor:
    """How unlikely an image is, given its auto-encoder's: - sum_j w_j log Normal(x[j]; y[j], sigma).

    Parameters
    ----------
    reconstruction, image : Tensor
        Shape (B, 1, Y, X) or (B, 1, Z, Y, X); the image anything where the weight is 0.
    sigma : float
        > 0, in the image's unit.
    weights : Tensor, optional
        As of `mixture_loss`.

    Returns
    -------
    Tensor
        Scalar, nats an image.
    """
    weights = _weights(image[:, 0], weights)
    residual = image.masked_fill(weights[:, None] == 0, 0.0) - reconstruction
    log_normal = -0.5 * (residual / sigma) ** 2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    return -_sum_of_known(log_normal[:, 0], weights)


def _log_normal(image: Tensor, means: Tensor, sigmas: Tensor, weights: Tensor) -> Tensor:
    """log Normal(x; mu_l, sigma_l) of every pixel and label, (B, L, ...); where nothing is known, that of x = 0."""
    image = image.masked_fill(weights[:, None] == 0, 0.0)
    spatial = (1,) * (image.ndim - 2)
    mu, sigma = (v.reshape(-1, v.shape[-1], *spatial) for v in (means, sigmas))
    return -0.5 * ((image - mu) / sigma) ** 2 - torch.log(sigma) - 0.5 * math.log(2 * math.pi)


def _weights(like: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones(like.shape, device=like.device) if weights is None else weights


def _sum_of_known(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over pixels, mean over the batch; values (B, ...) where the weight is 0 may be infinite."""
    return torch.where(weights > 0, weights * values, 0.0).sum() / len(values)
