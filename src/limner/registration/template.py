"""What scans are aligned to: the image of a brain, cropped to it, on the grid that all share."""

# mypy: disable-error-code="no-untyped-call"
# SimpleITK has no type hints.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from limner.intensity import tissue_mask
from limner.registration.volume_transform import AffineTransform, check_volume, resample, to_image, triple
from limner.space import Space
from limner.volume import LabelMap, Volume

Mask = NDArray[np.bool_]

MARGIN = 3  # voxels around a template's brain
MULTIPLE = 16  # sizes of a template's grid are multiples of it
LEAST = 16  # voxels across a brain; with 12 and 14 phantoms were turned the wrong way
MOST = 5e7  # voxels of a grid; a human brain at 0.5 mm has 3e7
USUAL = 90  # voxels along a brain


@dataclass(frozen=True)
class Template:
    """What scans are aligned to: an image of a brain and where the brain is, on the grid that all share.

    Parameters
    ----------
    pixels : ndarray of float32
        Shape (Z, Y, X), 0 outside the brain, above it to 1 inside.
    space : Space
        Its shape is (Z, Y, X), each length a multiple of 16.
    """

    pixels: NDArray[np.float32]
    space: Space

    @property
    def brain(self) -> Mask:
        """Where the brain is, shape (Z, Y, X)."""
        return self.pixels > 0

    @cached_property
    def image(self) -> sitk.Image:
        """For SimpleITK."""
        return to_image(self.pixels, self.space)


def make_template(volume: Volume, spacing_mm: float = 2.0, brain: Mask | None = None) -> Template:
    """Crop a volume to its brain and bring it to a common grid.

    Parameters
    ----------
    volume : Volume
        Grey; of a head with its skull give `brain` too.
    spacing_mm : float
        Spacing of the grid along all axes.
    brain : ndarray of bool, optional
        Shape of `volume`, True inside the brain; else as of `find_brain`.

    Returns
    -------
    Template
        Axes as of `volume`; sizes are multiples of 16, with at least three voxels around the brain.

    Raises
    ------
    ValueError
        If there is no brain, the volume is no grey image with evenly spaced sections, or at this spacing the brain
        spans fewer than 16 voxels along an axis or its grid has more than 5e7.
    """
    check_volume(volume, "make_template")
    inside = brain_or_found(volume, brain, "make_template")
    space = _grid_around(inside, volume.space, spacing_mm)
    pixels = resample(replace(volume, pixels=scaled(volume.pixels, inside), source=None), space).pixels
    on_grid = resample(Volume(inside.astype(np.float32), volume.space), space).pixels >= 0.5
    return Template(np.where(on_grid, np.maximum(pixels, 0.01), 0).astype(np.float32), space)


def find_brain(pixels: NDArray[Any]) -> Mask:
    """Where a scan without skull shows something: what is not its background, or what `tissue_mask` finds.

    A scan has a background where at least a twentieth of its voxels have one same value, its smallest, and are joined
    to its border: what is enclosed by the brain, fluid without signal say, belongs to it.
    """
    bare = ndimage.binary_fill_holes(pixels > pixels.min())
    return bare if 1 - bare.mean() >= 0.05 else tissue_mask(pixels)


def paint(label_map: LabelMap, intensities: Mapping[int, float]) -> NDArray[np.float32]:
    """An image of the labels, float32, shape (Z, Y, X); background is 0.

    Raises
    ------
    ValueError
        If a label has no intensity.
    """
    missing = [label for label in label_map.present if label and label not in intensities]
    if missing:
        raise ValueError(f"paint(): labels {missing} have no intensity; give one each, or merge them into background")
    values = np.zeros(max(label_map.present, default=0) + 1, np.float32)
    for label in label_map.present:
        values[label] = intensities[label] if label else 0
    return values[label_map.labels]


def mean_intensities(label_map: LabelMap, template: Template, transform: AffineTransform) -> dict[int, float]:
    """Mean intensity of the template where each label lies; that of the brain for labels that lie nowhere in it."""
    labels = resample(label_map, template.space, transform).labels
    inside = template.brain
    sums = np.bincount(labels[inside], template.pixels[inside], minlength=max(label_map.present) + 1)
    counts = np.bincount(labels[inside], minlength=len(sums))
    usual = float(template.pixels[inside].mean())
    return {n: float(sums[n] / counts[n]) if counts[n] else usual for n in label_map.present}


def brain_or_found(what: Volume | LabelMap, brain: Mask | None, function: str) -> Mask:
    inside = find_brain(what.pixels) if brain is None and isinstance(what, Volume) else brain
    assert inside is not None
    if inside.shape != what.space.shape:
        raise ValueError(
            f"{function}(): the brain's mask has shape {inside.shape}, the image {what.space.shape}; give both on one "
            "grid"
        )
    if not inside.any():
        raise ValueError(f"{function}(): the volume of shape {inside.shape} is all background; give one with a brain")
    return inside


def scaled(pixels: NDArray[Any], inside: Mask) -> NDArray[np.float32]:
    """From 0.1 to 1 inside, by the percentiles 0.5 and 99.5, so that no bright vessel takes all bins; 0 outside."""
    low, high = np.percentile(pixels[inside], (0.5, 99.5))
    levels = (pixels.astype(np.float32) - low) / max(high - low, 1e-6 * max(abs(high), 1.0))
    return np.where(inside, 0.1 + 0.9 * np.clip(levels, 0, 1), 0).astype(np.float32)


def _grid_around(inside: Mask, space: Space, spacing_mm: float) -> Space:
    """A grid of the same axes around a brain, its lengths multiples of `MULTIPLE`."""
    bounds = [first_and_last(inside, axis) for axis in range(3)]
    low, high = (np.array(ends, float) for ends in zip(*bounds, strict=True))
    extent = (high - low) * space.spacing / spacing_mm + 1 + 2 * MARGIN
    shape = np.ceil(extent / MULTIPLE) * MULTIPLE
    _check_size((high - low + 1) * space.spacing, float(shape.prod()), spacing_mm)
    corner = (low + high) / 2 - (shape - 1) / 2 * spacing_mm / np.asarray(space.spacing)
    z, y, x = (int(n) for n in shape)
    return Space((z, y, x), (spacing_mm,) * 3, triple(space.to_physical(corner.tolist())), space.direction)


def _check_size(sides_mm: NDArray[np.float64], n_voxels: float, spacing_mm: float) -> None:
    """Refuse a spacing at which a brain cannot be aligned, or its grid not be held."""
    across = sides_mm.min() / spacing_mm
    if across < LEAST:
        found = f"spans {int(across)} voxels, at least {LEAST} are needed"
    elif n_voxels > MOST:
        found = f"needs a grid of {n_voxels:.2g} voxels, at most {MOST:.2g} are possible"
    else:
        return
    fitting = min(sides_mm.max() / USUAL, sides_mm.min() / (1.1 * LEAST))  # two digits are off by 1/20 at most
    flat = sides_mm.max() > 3 * USUAL * fitting
    sides = " x ".join(f"{side:.3g}" for side in sides_mm)
    raise ValueError(
        f"make_template(): spacing_mm is {spacing_mm:g}, at which the brain of {sides} mm (z, y, x) {found}; "
        + ("give a brain that is not so flat" if flat else f"give {fitting:.2g}")
    )


def first_and_last(inside: Mask, axis: int) -> tuple[int, int]:
    along = np.flatnonzero(inside.any(axis=tuple(i for i in range(3) if i != axis)))
    return int(along[0]), int(along[-1])
