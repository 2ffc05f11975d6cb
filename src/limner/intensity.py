"""Intensities: a common 8-bit scale for a stack, and where tissue is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.filters import threshold_otsu

SAMPLED = 2**25  # pixels from which percentiles and thresholds are taken


def background_level(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Median of all sections' border pixels, one value a channel; shape (C,) from (Z, Y, X, C)."""
    borders = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    return np.median(np.concatenate([b.reshape(-1, pixels.shape[-1]) for b in borders]), axis=0).astype(np.float32)


def tissue_mask(pixels: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a stack stands out from its background, bright on dark or dark on bright, by Otsu's threshold.

    Parameters
    ----------
    pixels : ndarray
        Shape (Z, Y, X) or (Z, Y, X, C).

    Returns
    -------
    ndarray of bool
        Shape (Z, Y, X); all False for a constant stack.

    Examples
    --------
    >>> stack = np.zeros((1, 4, 4)); stack[0, 1:3, 1:3] = 9
    >>> int(tissue_mask(stack).sum())
    4
    """
    channels = pixels if pixels.ndim == 4 else pixels[..., None]
    contrast = np.abs(channels.astype(np.float32) - background_level(channels)).mean(axis=-1)
    if contrast.max() <= 0:
        return np.zeros(contrast.shape, dtype=bool)
    # a few hot pixels would stretch the histogram until all tissue falls into its first bin
    contrast = np.minimum(contrast, np.percentile(contrast, 99.9) or contrast.max())
    return contrast > float(threshold_otsu(contrast.ravel()))  # type: ignore[no-untyped-call]


def to_8_bit(pixels: NDArray[Any], window: tuple[float, float] | None = None) -> NDArray[np.float32]:
    """Map the 0.5 and 99.5 percentiles of a stack's tissue to 0 and 255, once for the stack.

    Parameters
    ----------
    pixels : ndarray
        Shape (Z, Y, X) or (Z, Y, X, C), any real dtype.
    window : tuple of float, optional
        As `grey_window` gives it for the whole stack, of which `pixels` is a part.

    Returns
    -------
    ndarray of float32
        Same shape, not rounded, clipped to [0, 255]; 0 throughout for a constant stack.
    """
    low, high = grey_window(pixels) if window is None else window
    scale = 255.0 / (high - low) if high > low else 0.0
    levels = pixels.astype(np.float32)
    levels -= np.float32(low)
    levels *= np.float32(scale)
    return np.clip(levels, 0, 255, out=levels)


def grey_window(pixels: NDArray[Any]) -> tuple[float, float]:
    """What `to_8_bit` maps to 0 and to 255, of a stack (Z, Y, X) or (Z, Y, X, C).

    Examples
    --------
    >>> stack = np.zeros((1, 4, 4)); stack[0, 1:3, 1:3] = 9
    >>> grey_window(stack)
    (0.0, 9.0)
    """
    # every few pixels tell the percentiles as well, and no copy of a whole large stack is made
    step = max(1, round((pixels.size / SAMPLED) ** (1 / 3)))
    some = pixels[::step, ::step, ::step] if min(pixels.shape[:3]) > step else pixels
    mask = tissue_mask(some)
    inside = some[mask] if mask.any() else some.reshape(-1)
    low, high = np.percentile(inside, (0.5, 99.5))
    # background darker or brighter than the darkest and brightest tissue must stay distinct from it
    level = background_level(pixels if pixels.ndim == 4 else pixels[..., None]).mean()
    return float(min(low, level)), float(max(high, level))
