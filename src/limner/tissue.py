"""Where on a stained slide tissue is, so that glass is passed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import gaussian, threshold_otsu

DARKEST_GLASS = 200.0  # grey levels; a slide without glass has no pixel from which to learn how bright glass is
BLACK = 15  # as dark as this in every channel: outside of what the scanner covered
LOWEST_DENSITY = 0.05  # noise and shading of bare glass stay below
HIGHEST_DENSITY = 0.07  # pale nuclei and stroma stay above, also beside strong stain, which draws Otsu's threshold up


@dataclass(frozen=True)
class TissueMap:
    """Tissue on a slide, seen on its thumbnail.

    Parameters
    ----------
    mask : ndarray of bool
        Shape (Y, X) of the thumbnail.
    shape : tuple of int
        (Y, X) of the full image.

    Examples
    --------
    >>> tissue = TissueMap(np.eye(2, dtype=bool), (100, 100))
    >>> tissue.holds_tissue((0, 40), (0, 40)), tissue.holds_tissue((0, 40), (60, 90))
    (True, False)
    """

    mask: NDArray[np.bool_]
    shape: tuple[int, int]

    def holds_tissue(self, rows: tuple[int, int], columns: tuple[int, int], margin: int = 0) -> bool:
        """Whether a region of the full image, rows and columns from first to last (not included), touches tissue.

        Parameters
        ----------
        rows, columns : tuple of int
            In pixels of the full image; they may reach beyond it.
        margin : int
            Pixels of the full image by which the region is widened on every side.
        """
        slices = []
        for (start, stop), whole, small in zip((rows, columns), self.shape, self.mask.shape, strict=True):
            start, stop = max(start - margin, 0), min(stop + margin, whole)
            if stop <= start:
                return False
            # every pixel of the thumbnail that the region touches
            slices.append(slice(start * small // whole, -(-stop * small // whole)))
        return bool(self.mask[tuple(slices)].any())

    @property
    def fraction(self) -> float:
        """Part of the image that is tissue, 0 to 1."""
        return float(self.mask.mean()) if self.mask.size else 0.0


def find_tissue(
    thumbnail: NDArray[np.uint8], shape: tuple[int, int], smallest: float = 2e-4, sigma: float = 2.0
) -> TissueMap:
    """Tissue on bright-field slides of any stain.

    The optical density of the most absorbing channel, relative to glass, is cut at Otsu's threshold. Glass is the 99.5
    percentile of brightness, but not darker than 200; the threshold is kept between 0.05 and 0.07, so that a slide
    that is all glass has no tissue and one that is all tissue is tissue throughout. It rather takes a rim of glass
    for tissue than pale nuclei for glass.

    Parameters
    ----------
    thumbnail : ndarray of uint8
        Shape (Y, X, 3), RGB, some 1000 pixels long.
    shape : tuple of int
        (Y, X) of the full image.
    smallest : float
        Specks of tissue and holes in it below this part of the image's area are removed.
    sigma : float
        Blur before the cut, in pixels of the thumbnail.

    Returns
    -------
    TissueMap

    Raises
    ------
    ValueError
        If the thumbnail is not RGB of 8 bit.

    References
    ----------
    Otsu (1979), doi:10.1109/TSMC.1979.4310076.

    Examples
    --------
    >>> slide = np.full((50, 60, 3), 240, np.uint8)
    >>> slide[10:30, 20:40] = (200, 120, 180)
    >>> find_tissue(slide, (5000, 6000)).holds_tissue((1500, 2000), (2500, 3000))
    True
    """
    if thumbnail.ndim != 3 or thumbnail.shape[2] != 3 or thumbnail.dtype != np.uint8:
        raise ValueError(
            f"find_tissue(): the thumbnail has shape {thumbnail.shape} and type {thumbnail.dtype}; give RGB of 8 bit"
        )
    density = optical_density(thumbnail)
    density = gaussian(density, sigma, mode="nearest")  # type: ignore[no-untyped-call]
    threshold = LOWEST_DENSITY
    if density.max() > density.min():
        otsu = threshold_otsu(density)  # type: ignore[no-untyped-call]
        threshold = float(np.clip(otsu, LOWEST_DENSITY, HIGHEST_DENSITY))
    n_pixels = max(1, round(smallest * density.size))
    mask = ~_without_specks(~_without_specks(density > threshold, n_pixels), n_pixels)
    return TissueMap(mask, shape)


def optical_density(thumbnail: NDArray[np.uint8]) -> NDArray[np.float64]:
    """-log10 of the transmission in the most absorbing channel, relative to glass; 0 where black or brighter.

    Examples
    --------
    >>> optical_density(np.array([[[250, 250, 250], [250, 25, 100]]], np.uint8)).round(2)
    array([[0., 1.]])
    """
    brightest = thumbnail.max(axis=-1)
    covered = brightest > BLACK
    glass = max(DARKEST_GLASS, float(np.percentile(brightest[covered], 99.5)) if covered.any() else 0.0)
    darkest = np.maximum(thumbnail.min(axis=-1).astype(float), 1.0)
    return np.where(covered, np.clip(-np.log10(darkest / glass), 0, None), 0.0)


def _without_specks(mask: NDArray[np.bool_], smallest: int) -> NDArray[Any]:
    """Without parts of fewer than `smallest` pixels."""
    parts, _ = ndimage.label(mask)
    keep = np.bincount(parts.ravel()) >= smallest
    keep[0] = False
    return keep[parts]
