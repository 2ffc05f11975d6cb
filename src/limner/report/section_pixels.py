"""Pictures as text that a web page can hold: images as JPEG, labels and chances as packed bytes.

Labels and chances are deflated bytes, not PNG: a browser gives them back exactly, also where it blurs what a page
reads from a canvas to guard against tracking, and a label map spoilt by one grey level names the wrong structure.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

LONGEST_SIDE = 1000  # pixels; larger sections are shown smaller
MOST_PIXELS = 200_000_000  # of all sections together, so that a report of 500 sections still opens (some 100 MB)
JPEG_QUALITY = 82
HUNDREDTHS = 100  # chances are kept to 0.01
_SAMPLES = 2_000_000  # pixels from which the grey range of a stack is estimated


def grey_range(pixels: NDArray[Any]) -> tuple[float, float]:
    """The values of a stack shown as black and as white.

    Parameters
    ----------
    pixels : ndarray
        Shape (Z, Y, X) or (Z, Y, X, 3), any real dtype.

    Returns
    -------
    tuple of float
        The 0.5 and 99.5 percentiles of the finite pixels of the whole stack; (0, 255) where pixels have 8 bits.

    Examples
    --------
    >>> grey_range(np.arange(1001, dtype=np.uint16).reshape(1, 1, 1001))
    (5.0, 995.0)
    """
    if pixels.dtype == np.uint8:
        return 0.0, 255.0
    step = max(1, int(np.ceil((pixels.size / _SAMPLES) ** 0.5)))  # thin out y and x, keep every section
    sample = pixels[:, ::step, ::step].astype(np.float64).ravel()
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(sample, (0.5, 99.5))
    return float(low), float(high)


def surround_colour(pixels: NDArray[Any], grey: tuple[float, float]) -> str:
    """The colour that surrounds the tissue as ``#rrggbb``: the median over all sections' corners.

    Examples
    --------
    >>> surround_colour(np.full((2, 9, 9, 3), (255, 240, 250), np.uint8), (0, 255))
    '#fff0fa'
    """
    corners = _eight_bit(pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(np.float32), grey)
    colour = np.broadcast_to(np.median(corners, axis=(0, 1)), 3)
    return "#" + "".join(f"{round(float(part)):02x}" for part in colour)


def shown_size(shape: tuple[int, int, int], longest: int = LONGEST_SIDE) -> tuple[int, int]:
    """The (y, x) size at which Z pictures of `shape` (Z, Y, X) are kept: their own, unless too large.

    Examples
    --------
    >>> shown_size((40, 193, 271)), shown_size((40, 3000, 4000)), shown_size((500, 3000, 4000))
    ((193, 271), (750, 1000), (548, 730))
    """
    n_sections, height, width = shape
    shrink = min(1.0, longest / max(height, width), (MOST_PIXELS / (n_sections * height * width)) ** 0.5)
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def pack_image(
    section: NDArray[Any], grey: tuple[float, float], size: tuple[int, int], quality: int = JPEG_QUALITY
) -> str:
    """A section's image as base64 text of a JPEG file.

    Parameters
    ----------
    section : ndarray
        Shape (Y, X) or (Y, X, 3), any real dtype; what is not finite is shown black.
    grey : tuple of float
        Values shown as black and as white.
    size : tuple of int
        (y, x) size to keep; a smaller one takes the mean over each new pixel's area.
    quality : int
        Of the JPEG file, 1 to 100.

    Examples
    --------
    >>> pack_image(np.zeros((4, 4)), (0, 1), (4, 4))[:4]  # how every JPEG file begins
    '/9j/'
    """
    finite = np.nan_to_num(section.astype(np.float32), copy=False, nan=grey[0], posinf=grey[0], neginf=grey[0])
    shown = _eight_bit(_mean_resized(finite, size), grey)
    return base64.b64encode(iio.imwrite("<bytes>", shown, extension=".jpg", quality=quality)).decode()


def pack_labels(numbers: NDArray[np.integer[Any]], size: tuple[int, int]) -> str:
    """A section's structures as base64 text of deflated 16-bit numbers, little end first.

    Parameters
    ----------
    numbers : ndarray of int
        Shape (Y, X), 0 to 65535: each pixel's place in the report's list of structures, not its label.
    size : tuple of int
        (y, x) size to keep; a smaller one takes the nearest pixel.

    Examples
    --------
    >>> zlib.decompress(base64.b64decode(pack_labels(np.array([[0, 258]]), (1, 2))))
    b'\\x00\\x00\\x02\\x01'
    """
    return _deflated(nearest(numbers, size).astype("<u2"))


def nearest(section: NDArray[np.integer[Any]], size: tuple[int, int]) -> NDArray[np.integer[Any]]:
    """A section (Y, X) at another (y, x) size: each new pixel is the nearest old one."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(section.shape, size, strict=True)
    )
    return section[np.ix_(rows, columns)]


def pack_strokes(numbers: NDArray[np.integer[Any]], size: tuple[int, int]) -> str:
    """A section's strokes as base64 text of deflated 16-bit numbers, little end first; thin strokes are not lost.

    Parameters
    ----------
    numbers : ndarray of int
        Shape (Y, X), 0 to 65535; 0 where nothing was drawn.
    size : tuple of int
        (y, x) size to keep; a smaller one takes the largest number over each new pixel's area.

    Examples
    --------
    >>> zlib.decompress(base64.b64decode(pack_strokes(np.array([[0, 0, 0, 2, 0, 0]]), (1, 2))))
    b'\\x00\\x00\\x02\\x00'
    """
    for axis, new in enumerate(size):
        numbers = np.maximum.reduceat(numbers, _starts(numbers.shape[axis], new), axis=axis)
    return _deflated(numbers.astype("<u2"))


def pack_hundredths(chances: NDArray[np.floating[Any]], size: tuple[int, int]) -> str:
    """A section's uncertainty, or another chance, as base64 text of deflated bytes, in hundredths.

    Parameters
    ----------
    chances : ndarray of float
        Shape (Y, X), in [0, 1].
    size : tuple of int
        (y, x) size to keep; a smaller one takes the mean over each new pixel's area.

    Examples
    --------
    >>> list(zlib.decompress(base64.b64decode(pack_hundredths(np.array([[0.0, 0.254, 1.0]]), (1, 3)))))
    [0, 25, 100]
    """
    mean = _mean_resized(chances.astype(np.float32), size)
    return _deflated(np.clip(mean * HUNDREDTHS, 0, HUNDREDTHS).round().astype(np.uint8))


def _eight_bit(values: NDArray[np.float32], grey: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = grey
    span = high - low if high > low else 1.0
    scaled = np.nan_to_num((values - low) * (255.0 / span), nan=0.0)
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _mean_resized(section: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The mean over whole pixels that fall to each new pixel: as good as exact areas to look at, and much faster."""
    for axis, new in enumerate(size):
        old = section.shape[axis]
        starts = _starts(old, new)
        n_pixels: NDArray[Any] = np.diff(starts, append=old).astype(np.float32)
        n_pixels = n_pixels.reshape([-1 if i == axis else 1 for i in range(section.ndim)])
        section = np.add.reduceat(section, starts, axis=axis) / n_pixels
    return section


def _starts(old: int, new: int) -> NDArray[np.int64]:
    """The first of the `old` pixels that fall to each of the `new`, along one axis."""
    return np.arange(new) * old // new


def _deflated(array: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
