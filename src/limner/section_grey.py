"""Grey levels of a section of any size: what they are brought to, and how noisy they are.

Sections are read in bands and parts, never whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from limner.inference import Image
from limner.intensity import estimate_noise

SAMPLED = 1_000_000  # pixels, about, that a section's mean and deviation are taken from
MARGIN = 0.25  # of the outermost pixels with one very level: more than any has in a micrograph
BAND = 512  # rows of a section that are read at once for them
PARTS, PART = 3, 256  # so many parts along either side, of so many pixels, tell the noise
NOISIER = 1.25  # times the noise that is known; less is within the scatter of sections of one stack
LARGEST_SIGMA = 2.0  # pixels: more would smooth membranes away
MOST_NOISE = 0.99  # of a section's deviation
REACH = 4  # deviations after which a Gaussian is cut
STRIP = 5  # pixels: a margin is nowhere narrower


def grey_statistics(image: Image) -> tuple[float, float]:
    """Mean and deviation of a section without its margin.

    Of every n-th row and column where it has more than `SAMPLED` pixels. Rows are read in bands, so that a section of
    any size needs little memory.
    """
    height, width = image.shape[:2]
    stride = max(1, math.ceil(math.sqrt(height * width / SAMPLED)))
    rows = math.ceil(BAND / stride) * stride
    bands = (np.asarray(image[slice(y, y + rows), slice(0, width)]) for y in range(0, height, rows))
    some = np.concatenate([band[::stride, ::stride].ravel() for band in bands]).astype(np.float64)
    level = margin_level(image)
    seen = some if level is None or (some == level).all() else some[some != level]
    return float(seen.mean()), max(float(seen.std()), 1e-6)


def margin_level(image: Image) -> float | None:
    """The one grey level around a section that was moved on its canvas; None where there is no such margin."""
    height, width = image.shape[:2]
    rows = [image[slice(y, y + 1), slice(0, width)] for y in (0, height - 1)]
    columns = [image[slice(0, height), slice(x, x + 1)] for x in (0, width - 1)]
    levels, counts = np.unique(np.concatenate([np.ravel(line) for line in (*rows, *columns)]), return_counts=True)
    return float(levels[counts.argmax()]) if counts.max() >= MARGIN * counts.sum() else None


def standardised(image: Image) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """What brings a section's pixels to mean 0 and deviation 1, by `grey_statistics` of the whole section."""
    mean, deviation = (np.float32(value) for value in grey_statistics(image))

    def prepare(pixels: NDArray[Any]) -> NDArray[np.float32]:
        prepared: NDArray[np.float32] = (pixels.astype(np.float32) - mean) / deviation
        return prepared

    return prepare


def relative_noise(image: Image) -> float:
    """Standard deviation of a section's noise over that of its grey levels: the median over nine parts.

    Estimated as Immerkaer 1996 does, see `limner.intensity.estimate_noise`; 0 where nothing but margin is seen.

    Parameters
    ----------
    image : array-like
        Grey, shape (Y, X).

    Examples
    --------
    >>> draw = np.random.default_rng(0)
    >>> stripes = np.where(np.arange(300) % 100 < 50, 80.0, 120.0)  # a deviation of 20
    >>> round(relative_noise(np.tile(stripes, (300, 1)) + draw.normal(0, 5, (300, 300))), 1)
    0.2
    """
    level = margin_level(image)
    spans = []
    for n in image.shape[:2]:
        starts = np.linspace(0, max(0, n - PART), PARTS).astype(int)
        spans.append([slice(int(start), int(start) + PART) for start in sorted(set(starts))])
    found = []
    for rows in spans[0]:
        for columns in spans[1]:
            part = np.asarray(image[rows, columns])
            try:
                found.append(estimate_noise(part, np.ones(part.shape, bool) if level is None else part != level))
            except ValueError:  # margin, or a few pixels
                continue
    return float(np.median(found)) / grey_statistics(image)[1] if found else 0.0


@dataclass(frozen=True)
class Smoothing:
    """How a section is smoothed.

    Parameters
    ----------
    sigma : float
        Deviation of the Gaussian, pixels; 0: not at all.
    level : float or None
        Grey level of the section's margin, which has no part in it.
    """

    sigma: float = 0.0
    level: float | None = None


def smoothing_to(image: Image, noise: float) -> Smoothing:
    """What takes the noise of a section that is clearly noisier than `noise` down to it.

    By a Gaussian of up to `LARGEST_SIGMA` pixels; more noise than that takes away stays. White noise is taken for
    granted: where neighbouring pixels share theirs, more of it stays, too.

    Parameters
    ----------
    image : array-like
        Grey, shape (Y, X).
    noise : float
        As of `relative_noise`; 0: not known, nothing is done.
    """
    found = relative_noise(image) if noise > 0 else 0.0
    if not 0 < NOISIER * noise < found:
        return Smoothing(0.0)
    # over the deviation of what is no noise, which smoothing leaves
    wanted, there = (n / math.sqrt(1 - n**2) for n in (min(noise, MOST_NOISE), min(found, MOST_NOISE)))
    return Smoothing(sigma_for(min(1.0, wanted / there)), margin_level(image))


@dataclass(frozen=True)
class Smoothed:
    """A section under a Gaussian: pixels are read with what the filter needs around them, so that any part is exact.

    A margin keeps its level, and nothing of it comes into the section.

    Parameters
    ----------
    image : array-like
        Grey, shape (Y, X).
    smoothing : Smoothing
        With a sigma above 0.
    """

    image: Image
    smoothing: Smoothing

    @property
    def shape(self) -> tuple[int, ...]:
        """(Y, X)."""
        return self.image.shape

    def __getitem__(self, region: tuple[slice, slice]) -> NDArray[np.float32]:
        """Pixels of some rows and columns, smoothed."""
        sigma, level = self.smoothing.sigma, self.smoothing.level
        radius = math.ceil(REACH * sigma)
        reach = radius + 2 * STRIP  # what decides whether the outermost of them are margin
        read, kept = [], []
        for span, n in zip(region, self.shape[:2], strict=True):
            start, stop, _ = span.indices(n)
            read.append(slice(max(0, start - reach), min(n, stop + reach)))
            kept.append(slice(start - read[-1].start, stop - read[-1].start))
        pixels = np.asarray(self.image[read[0], read[1]]).astype(np.float32)
        inside = np.ones(pixels.shape, bool)
        if level is not None:  # single pixels of that level belong to the section
            inside = ~ndimage.binary_opening(pixels == level, np.ones((STRIP, STRIP)))
        weight = ndimage.gaussian_filter(inside.astype(np.float32), sigma, radius=radius)
        smooth = ndimage.gaussian_filter(np.where(inside, pixels, 0), sigma, radius=radius) / np.maximum(weight, 1e-6)
        found: NDArray[np.float32] = np.where(inside, smooth, pixels)[kept[0], kept[1]]
        return found


@dataclass(frozen=True)
class Quieted:
    """A section as it is or smoothed: which of the two is found when its pixels are first asked for.

    Parameters
    ----------
    image : array-like
        Grey, shape (Y, X).
    find : callable
        Gives the smoothing.
    """

    image: Image
    find: Callable[[], Smoothing]

    @property
    def shape(self) -> tuple[int, ...]:
        """(Y, X)."""
        return self.image.shape

    @cached_property
    def smoothing(self) -> Smoothing:
        """As `find` gives it, once."""
        return self.find()

    def __getitem__(self, region: tuple[slice, slice]) -> NDArray[Any]:
        """Pixels of some rows and columns."""
        seen = Smoothed(self.image, self.smoothing) if self.smoothing.sigma else self.image
        return np.asarray(seen[region])


def sigma_for(share: float) -> float:
    """Deviation of the Gaussian, in pixels up to `LARGEST_SIGMA`, that leaves this share of white noise in 2D.

    Examples
    --------
    >>> round(sigma_for(0.25), 2)  # 1 / (2 sqrt(pi) sigma)
    1.13
    """

    def left(sigma: float) -> float:
        radius = math.ceil(REACH * sigma)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        return float(((kernel / kernel.sum()) ** 2).sum())

    if left(LARGEST_SIGMA) >= share:
        return LARGEST_SIGMA
    return float(optimize.brentq(lambda sigma: left(sigma) - share, 1e-3, LARGEST_SIGMA))
