"""How alike two images are, as functions to minimise."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def _box(n: int, window: int, like: tuple[torch.device, torch.dtype]) -> Tensor:
    """Matrix (n, n) that takes means in a window along an axis of `n` pixels; the window is cut at its ends."""
    with torch.inference_mode(mode=False):
        places = torch.arange(n, device=like[0])
        near = ((places[:, None] - places).abs() <= window // 2).to(like[1])
        return near / near.sum(dim=1, keepdim=True)


def box_mean(image: Tensor, window: int) -> Tensor:
    """Mean in the box around each pixel, shape (B, C, Y, X); boxes are cut at the image border.

    As a product with a matrix on either side: at the some hundred pixels that registration works at this is several
    times faster than pooling, forwards and backwards.
    """
    (height, width), like = image.shape[2:], (image.device, image.dtype)
    return _box(height, window, like) @ image @ _box(width, window, like).T


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

    images = torch.cat([fixed, moved, fixed * moved, fixed * fixed, moved * moved], dim=1)
    mean_fixed, mean_moved, both, fixed_squared, moved_squared = box_mean(images, window).chunk(5, dim=1)
    covariance = both - mean_fixed * mean_moved
    variance_fixed = (fixed_squared - mean_fixed**2).clamp_min(0) + noise_variance
    variance_moved = (moved_squared - mean_moved**2).clamp_min(0) + noise_variance
    return covariance**2 / (variance_fixed * variance_moved)


def local_correlation_loss(
    fixed: Tensor, moved: Tensor, weights: Tensor, window: int = 9, noise_variance: float = 1e-3
) -> Tensor:
    """One minus the weighted mean of `local_correlation`, for each pair of the batch.

    Parameters
    ----------
    fixed, moved : Tensor
        Shape (B, C, Y, X), intensities in [0, 1].
    weights : Tensor
        Shape (B, 1, Y, X), >= 0: 0 where a pixel does not count. A pair without weight gets loss 1.
    window : int
        Side of the box in pixels.
    noise_variance : float
        As for `local_correlation`.

    Returns
    -------
    Tensor
        Shape (B,), in [0, 1].
    """
    similarity = local_correlation(fixed, moved, window, noise_variance).mean(dim=1, keepdim=True)
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
