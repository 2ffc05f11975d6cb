"""How alike two images are, as functions to minimise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def local_correlation(fixed: Tensor, moved: Tensor, window: int = 9, noise_variance: float = 1e-3) -> Tensor:
    """Squared correlation of two images in the box around each pixel.

    Parameters
    ----------
    fixed, moved : Tensor
        Shape (B, C, Y, X), float. The scale is that of `noise_variance`; intensities in [0, 1] suit its default.
    window : int
        Side of the box in pixels, odd.
    noise_variance : float
        Added to both local variances, so that flat regions score 0 and not the correlation of their noise.

    Returns
    -------
    Tensor
        Shape (B, C, Y, X), in [0, 1]; boxes are cut at the image border.

    References
    ----------
    .. [1] Cachier et al. 2003, "Iconic feature based nonrigid registration: the PASHA algorithm",
       https://doi.org/10.1016/S1077-3142(03)00002-X

    Examples
    --------
    >>> image = torch.rand(1, 1, 16, 16)
    >>> bool(local_correlation(image, 2 * image + 1, noise_variance=0.0).min() > 0.99)
    True
    """

    def box_mean(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, window, stride=1, padding=window // 2, count_include_pad=False)

    mean_fixed, mean_moved = box_mean(fixed), box_mean(moved)
    covariance = box_mean(fixed * moved) - mean_fixed * mean_moved
    variance_fixed = (box_mean(fixed * fixed) - mean_fixed**2).clamp_min(0) + noise_variance
    variance_moved = (box_mean(moved * moved) - mean_moved**2).clamp_min(0) + noise_variance
    return covariance**2 / (variance_fixed * variance_moved)


def local_correlation_loss(fixed: Tensor, moved: Tensor, weights: Tensor, window: int = 9) -> Tensor:
    """One minus the weighted mean of `local_correlation`, for each pair of the batch.

    Parameters
    ----------
    fixed, moved : Tensor
        Shape (B, C, Y, X), intensities in [0, 1].
    weights : Tensor
        Shape (B, 1, Y, X), >= 0: 0 where a pixel does not count. A pair without weight gets loss 1.
    window : int
        Side of the box in pixels.

    Returns
    -------
    Tensor
        Shape (B,), in [0, 1].
    """
    similarity = local_correlation(fixed, moved, window).mean(dim=1, keepdim=True)
    total = weights.sum(dim=(1, 2, 3)).clamp_min(torch.finfo(weights.dtype).eps)
    return 1 - (similarity * weights).sum(dim=(1, 2, 3)) / total


def global_correlation(fixed: Tensor, moved: Tensor, weights: Tensor) -> Tensor:
    """Weighted correlation coefficient of each pair over the whole image.

    Parameters
    ----------
    fixed, moved : Tensor
        Shape (B, C, Y, X).
    weights : Tensor
        Shape (B, 1, Y, X), >= 0.

    Returns
    -------
    Tensor
        Shape (B,), in [-1, 1]; 0 where an image is constant.
    """
    weights = weights.expand_as(fixed)
    total = weights.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    a = fixed - (fixed * weights).sum(dim=(1, 2, 3), keepdim=True) / total
    b = moved - (moved * weights).sum(dim=(1, 2, 3), keepdim=True) / total
    covariance = (weights * a * b).sum(dim=(1, 2, 3))
    variances = (weights * a * a).sum(dim=(1, 2, 3)) * (weights * b * b).sum(dim=(1, 2, 3))
    return covariance / variances.clamp_min(1e-12).sqrt()
