"""Whole slides: levels of a pyramid, read region by region, at a magnification chosen by um per pixel.

A slide may be SVS, NDPI, OME-TIFF, another TIFF, OME-Zarr, PNG or JPEG. Pixels come out as 8-bit RGB, whatever is
stored: alpha is laid over white, grey is repeated three times, and more than 8 bits are scaled down. Memory is bounded
by the region asked for; PNG, JPEG and TIFF of one strip are decoded whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import zarr
from numpy.typing import NDArray

from limner.io.content import reading, unreadable
from limner.io.ome_zarr import is_ome_zarr, open_multiscales
from limner.io.slide_tiff import RawLevel, open_tiff_levels

SLIDE_ENDINGS = (".svs", ".ndpi", ".scn", ".bif", ".tif", ".tiff", ".btf", ".tf8", ".zarr", ".png", ".jpg", ".jpeg")
ROUND_TO_LEVEL = 0.01  # a level whose pixels are this near the wanted size is taken as it is
LARGEST_SOURCE = 1 << 23  # pixels of a finer level that are in memory at once while a view is resampled
BITS = (8, 10, 12, 14, 16)


@dataclass(frozen=True)
class Level:
    """One magnification of a slide: slice it like an array of shape (Y, X, 3), uint8.

    Parameters
    ----------
    shape : tuple of int
        (Y, X, 3).
    um_per_px : tuple of float, optional
        Size of a pixel (y, x) in micrometres; None where the slide does not state it.
    downsample : tuple of float
        Pixels (y, x) of the slide's finest level that one pixel spans. Pixel i of this level has its centre at
        ``(i + 0.5) * downsample - 0.5`` of the finest level's pixels.
    read : callable
        From y0, y1, x0, x1 within the shape to pixels (y1 - y0, x1 - x0, 3).

    Examples
    --------
    >>> level = level_of_array(np.zeros((40, 50), np.uint8))
    >>> level[10:20, :7].shape
    (10, 7, 3)
    """

    shape: tuple[int, int, int]
    um_per_px: tuple[float, float] | None
    downsample: tuple[float, float]
    read: Callable[[int, int, int, int], NDArray[np.uint8]]

    dtype = np.dtype(np.uint8)
    ndim = 3

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        """Pixels of a region, by slices of step 1 for y and x (and one for the channels); ends are cut as in NumPy."""
        keys = (key,) if not isinstance(key, tuple) else key
        if Ellipsis in keys:
            keys = keys[: keys.index(Ellipsis)]
        if len(keys) > 3 or not all(isinstance(k, slice) and k.step in (None, 1) for k in keys):
            raise ValueError(f"Level[]: the index is {key!r}; give slices of step 1 for y and x")
        (y0, y1, _), (x0, x1, _), _ = (
            (keys[i] if i < len(keys) else slice(None)).indices(n) for i, n in enumerate(self.shape)
        )
        channels = keys[2] if len(keys) == 3 else slice(None)
        if y1 <= y0 or x1 <= x0:
            return np.zeros((max(y1 - y0, 0), max(x1 - x0, 0), 3), np.uint8)[..., channels]
        return self.read(y0, y1, x0, x1)[..., channels]


@dataclass(frozen=True)
class Slide:
    """A slide: its levels, finest first. Made by `open_slide`; may be pickled, and is then opened anew.

    Parameters
    ----------
    path : Path
        The file or OME-Zarr folder.
    levels : tuple of Level
        At least one; shapes decrease.
    """

    path: Path
    levels: tuple[Level, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Y, X, 3) of the finest level."""
        return self.levels[0].shape

    @property
    def um_per_px(self) -> tuple[float, float] | None:
        """Size (y, x) of the finest level's pixels in micrometres, or None."""
        return self.levels[0].um_per_px

    def at(self, um_per_px: float) -> Level:
        """The slide with square pixels of `um_per_px` micrometres.

        It is resampled lazily, region by region, from the coarsest level that is not coarser than asked for (from the
        finest where all are). Each pixel is the mean of the area it covers; where pixels become smaller, values are
        interpolated linearly. A region's pixels do not depend on how the image is cut into regions, to the bit.

        Parameters
        ----------
        um_per_px : float
            Above 0. A level within 1 % of it is given as it is, with the size that its pixels have.

        Returns
        -------
        Level

        Raises
        ------
        ValueError
            If the slide does not state its pixel size, or `um_per_px` is not above 0.
        """
        if self.um_per_px is None:
            raise ValueError(
                f"Slide.at(): {self.path} does not state its pixel size; give um_per_px to open_slide() (on the "
                "command line --um-per-px)"
            )
        if not (np.isfinite(um_per_px) and um_per_px > 0):
            raise ValueError(f"Slide.at(): um_per_px is {um_per_px}; give a number above 0")
        return _resampled(self._nearest_finer(um_per_px), um_per_px)

    def thumbnail(self, longest_side: int = 1000) -> Level:
        """The whole slide with square scaling, its longest side at most `longest_side` pixels; needs no pixel size."""
        factor = max(1.0, max(self.shape) / longest_side)
        finer = [level for level in self.levels if max(level.downsample) <= factor * (1 + ROUND_TO_LEVEL)]
        level = finer[-1] if finer else self.levels[0]
        return _scaled(level, (max(1.0, factor / level.downsample[0]), max(1.0, factor / level.downsample[1])))

    def _nearest_finer(self, um_per_px: float) -> Level:
        finer = [
            level
            for level in self.levels
            if level.um_per_px and max(level.um_per_px) <= um_per_px * (1 + ROUND_TO_LEVEL)
        ]
        return finer[-1] if finer else self.levels[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path, self.um_per_px)


def open_slide(path: str | Path, um_per_px: tuple[float, float] | float | None = None) -> Slide:
    """Open a slide for reading by region.

    Parameters
    ----------
    path : str or Path
        SVS, NDPI or another TIFF (OME-TIFF, tiled, with or without a pyramid), an OME-Zarr image, PNG or JPEG.
    um_per_px : float or tuple of float, optional
        Size of a pixel (y, x) in micrometres; goes before what the file states.

    Returns
    -------
    Slide

    Raises
    ------
    ValueError
        If the file is missing, damaged, of another format, or neither grey nor RGB of 8 or 16 bit; the file is named.
        A file may also prove damaged when a region is read: the error is the same.

    Examples
    --------
    >>> import tempfile
    >>> import tifffile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tifffile.imwrite(f"{folder}/a.tif", np.zeros((64, 96, 3), np.uint8), tile=(32, 32), photometric="rgb")
    ...     slide = open_slide(f"{folder}/a.tif", um_per_px=0.5)
    ...     slide.at(1.0)[:10, :10].shape, slide.at(1.0).shape
    ((10, 10, 3), (32, 48, 3))
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"open_slide(): {path} does not exist")
    if path.suffix.lower() not in SLIDE_ENDINGS and not is_ome_zarr(path):
        raise ValueError(
            f"open_slide(): {path} is of no known format; give a file ending in {', '.join(SLIDE_ENDINGS)}"
        )
    raw, stated = _open_levels(path)
    size = _pair(um_per_px) if um_per_px is not None else stated
    if size is not None and not all(np.isfinite(s) and s > 0 for s in size):
        raise ValueError(f"open_slide(): um_per_px is {size} for {path}; give numbers above 0 (y, x)")
    if any(min(level.shape) < 1 for level in raw):
        raise unreadable(path, "it states a size of 0 pixels")
    try:
        return Slide(path, tuple(_levels(path, raw, size)))
    except ArithmeticError:
        raise unreadable(path, "the sizes of its levels do not fit together") from None


def level_of_array(pixels: NDArray[Any], um_per_px: tuple[float, float] | None = None) -> Level:
    """A level that holds its pixels in memory: (Y, X), (Y, X, 3) or (Y, X, 4), 8 or 16 bit."""
    raw = _raw_of_array(pixels)
    return next(iter(_levels(Path("an array"), [raw], um_per_px)))


def _pair(um_per_px: tuple[float, float] | float) -> tuple[float, float]:
    y, x = um_per_px if isinstance(um_per_px, tuple) else (um_per_px, um_per_px)
    return float(y), float(x)


def _open_levels(path: Path) -> tuple[list[RawLevel], tuple[float, float] | None]:
    try:
        if path.is_dir():
            return _open_zarr_levels(path)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            return open_tiff_levels(path)
        with reading(path):
            return [_raw_of_array(iio.imread(path))], None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise unreadable(path, error) from None
    except Exception as error:  # tifffile and zarr raise many kinds on damaged files
        raise unreadable(path, error) from None


def _raw_of_array(pixels: NDArray[Any]) -> RawLevel:
    channels = pixels if pixels.ndim == 3 else pixels[..., np.newaxis]
    channels = channels.astype(np.uint8) * 255 if channels.dtype == bool else channels
    shape = (channels.shape[0], channels.shape[1])
    return RawLevel(shape, channels.shape[2], channels.dtype, lambda y0, y1, x0, x1: channels[y0:y1, x0:x1])


def _open_zarr_levels(path: Path) -> tuple[list[RawLevel], tuple[float, float] | None]:
    multiscales = open_multiscales(path)
    axes = multiscales.axes
    for array in multiscales.arrays:
        stacked = [a for a, n in zip(axes, array.shape, strict=True) if a not in "yxc" and n > 1]
        if stacked:
            raise ValueError(f"open_slide(): {path} is a stack (axes {axes}); give one plane, or use read()")
    _, y, x = multiscales.spacings[0]
    stated = None if y is None or x is None else (y * 1e3, x * 1e3)
    return [_raw_of_zarr(path, array, axes) for array in multiscales.arrays], stated


def _raw_of_zarr(path: Path, array: zarr.Array[Any], axes: str) -> RawLevel:
    lengths = dict(zip(axes, array.shape, strict=True))

    def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        wanted = {"y": slice(y0, y1), "x": slice(x0, x1), "c": slice(None)}
        with reading(path):
            pixels = np.asarray(array[tuple(wanted.get(a, 0) for a in axes)])
        kept = [a for a in axes if a in "yxc"]
        pixels = pixels.transpose([kept.index(a) for a in "yxc" if a in kept])
        return pixels if "c" in kept else pixels[..., np.newaxis]

    return RawLevel((lengths["y"], lengths["x"]), lengths.get("c", 1), array.dtype, read)


def _levels(path: Path, raw: list[RawLevel], um_per_px: tuple[float, float] | None) -> list[Level]:
    first = raw[0]
    if first.channels not in (1, 2, 3, 4):
        raise ValueError(f"open_slide(): {path} has {first.channels} channels; give grey (1) or RGB (3)")
    if first.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"open_slide(): {path} has pixels of type {first.dtype}; export it as 8- or 16-bit integers")
    bits = _bits(raw[-1])
    levels = []
    for level in raw:
        y, x = (_ratio(n, m) for n, m in zip(first.shape, level.shape, strict=True))
        size = None if um_per_px is None else (um_per_px[0] * y, um_per_px[1] * x)
        levels.append(Level((*level.shape, 3), size, (y, x), _as_rgb(level, bits)))
    return levels


def _ratio(whole: int, part: int) -> float:
    """By how much a level is smaller; a whole number where rounding the size may have hidden one."""
    ratio = whole / part
    nearest = round(ratio)
    return float(nearest) if whole // nearest <= part <= -(-whole // nearest) else ratio


def _bits(level: RawLevel) -> int:
    """Bits that the brightest pixel of the coarsest level needs: 12-bit cameras store their values in 16."""
    if level.dtype == np.uint8:
        return 8
    brightest, (height, width) = 0, level.shape
    rows = max(1, LARGEST_SOURCE // max(width, 1))
    for y in range(0, height, rows):
        brightest = max(brightest, int(level.read(y, min(y + rows, height), 0, width)[..., :3].max()))
    return next(b for b in BITS if brightest < 1 << b)


def _as_rgb(level: RawLevel, bits: int) -> Callable[[int, int, int, int], NDArray[np.uint8]]:
    def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        pixels = level.read(y0, y1, x0, x1)
        colours, alpha = pixels, None
        if level.channels in (2, 4):
            colours, alpha = pixels[..., :-1], pixels[..., -1:]
        eight = _to_8_bit(colours, bits)
        if alpha is not None:
            opacity = alpha.astype(np.float32) / np.iinfo(alpha.dtype).max
            eight = np.rint(eight * opacity + 255 * (1 - opacity)).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(eight, (*eight.shape[:2], 3)))

    return read


def _to_8_bit(pixels: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    scale = np.float32(255 / ((1 << bits) - 1))
    return np.clip(np.rint(pixels.astype(np.float32) * scale), 0, 255).astype(np.uint8)


def _resampled(level: Level, um_per_px: float) -> Level:
    own_y, own_x = level.um_per_px or (um_per_px, um_per_px)
    return _scaled(level, (um_per_px / own_y, um_per_px / own_x))


def _scaled(level: Level, factors: tuple[float, float]) -> Level:
    """A level whose pixels are `factors` (y, x) times as large."""
    if all(abs(f - 1) <= ROUND_TO_LEVEL for f in factors):
        return level
    (height, width, _), (fy, fx) = level.shape, factors
    shape = (max(1, round(height / fy)), max(1, round(width / fx)), 3)
    size = None if level.um_per_px is None else (level.um_per_px[0] * fy, level.um_per_px[1] * fx)

    def read(y0: int, y1: int, x0: int, x1: int) -> NDArray[np.uint8]:
        n_source = (y1 - y0) * fy * (x1 - x0) * fx
        if n_source > LARGEST_SOURCE and max(y1 - y0, x1 - x0) > 1:
            if (y1 - y0) * fy >= (x1 - x0) * fx and y1 - y0 > 1:
                middle = (y0 + y1) // 2
                return np.concatenate([read(y0, middle, x0, x1), read(middle, y1, x0, x1)], axis=0)
            middle = (x0 + x1) // 2
            return np.concatenate([read(y0, y1, x0, middle), read(y0, y1, middle, x1)], axis=1)
        rows, row_weights = _taps(y0, y1, fy, height)
        columns, column_weights = _taps(x0, x1, fx, width)
        top, left = rows.min(), columns.min()
        source = level.read(int(top), int(rows.max()) + 1, int(left), int(columns.max()) + 1)
        down = _weighted_sum(source.astype(np.float32), rows - top, row_weights)
        both = _weighted_sum(down.swapaxes(0, 1), columns - left, column_weights).swapaxes(0, 1)
        return np.clip(np.rint(both), 0, 255).astype(np.uint8)

    downsample = (level.downsample[0] * fy, level.downsample[1] * fx)
    return Level(shape, size, downsample, read)


def _taps(first: int, last: int, factor: float, length: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Source pixels and weights of output pixels `first` to `last`, both (outputs, taps); weights sum to 1.

    With a factor above 1 a weight is the part of the source pixel that the output pixel covers; below, it is linear
    interpolation between the two nearest centres. Depends on each output pixel alone, not on the region.
    """
    outputs = np.arange(first, last, dtype=np.float64)[:, np.newaxis]
    reach = max(factor, 1.0)
    centre = (outputs + 0.5) * factor
    start = np.floor(centre - reach / 2 if factor >= 1 else centre - 0.5)
    taps = start + np.arange(int(np.ceil(reach)) + 1)
    if factor >= 1:
        low, high = centre - factor / 2, np.minimum(centre + factor / 2, length)
        weights = np.clip(np.minimum(taps + 1, high) - np.maximum(taps, low), 0, 1)
    else:
        weights = np.clip(1 - np.abs(taps + 0.5 - centre), 0, 1)
    # an output pixel that lies wholly past the last source pixel, by rounding of the size, repeats it
    weights[weights.sum(axis=1) <= 1e-9, 0] = 1.0
    weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(taps, 0, length - 1).astype(np.intp), weights.astype(np.float32)


def _weighted_sum(
    source: NDArray[np.float32], taps: NDArray[np.intp], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Sum along axis 0, tap by tap in a fixed order, so that equal regions give equal bits."""
    total = np.zeros((len(taps), *source.shape[1:]), np.float32)
    for k in range(taps.shape[1]):
        total += source[taps[:, k]] * weights[:, k, np.newaxis, np.newaxis]
    return total
