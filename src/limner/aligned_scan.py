"""A scan brought to a template's grid for a network, and what was found there brought back to the scan's own voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.intensity import estimate_noise, normalise_scan
from limner.registration.template import Template, find_brain
from limner.registration.volume_affine import Alignment
from limner.registration.volume_transform import covered, resample
from limner.space import Space
from limner.volume import Volume

Mask = NDArray[np.bool_]

LEAST_NOISE = 1e-3  # of the range between the percentiles: scans made by a program have none


@dataclass(frozen=True)
class AlignedScan:
    """A scan on its own grid and on a template's.

    Parameters
    ----------
    volume : Volume
        The scan as it was read, grey.
    brain : ndarray of bool
        Where its brain is, on its own grid.
    alignment : Alignment
        From the template to the scan.
    image : ndarray of float32
        On the template's grid, the percentiles 5 and 95 of the brain at 0 and 1 (`normalise_scan`), 0 outside it.
    inside : ndarray of bool
        The brain on the template's grid.
    known : ndarray of bool
        What of the template's grid lies in the scan's field of view.
    noise : float
        Standard deviation of the noise, estimated on the scan's own grid, in the scan's own unit.
    scale : float
        The scan's own unit in that of `image`.
    """

    volume: Volume
    brain: Mask
    alignment: Alignment
    image: NDArray[np.float32]
    inside: Mask
    known: Mask
    noise: float
    scale: float


def place(volume: Volume, alignment: Alignment, template: Template, brain: Mask | None = None) -> AlignedScan:
    """Bring a scan to a template's grid.

    Parameters
    ----------
    volume : Volume
        Grey.
    alignment : Alignment
        As `align` found it.
    template : Template
        What it was aligned to.
    brain : ndarray of bool, optional
        Shape of the scan; else as of `find_brain`.

    Raises
    ------
    ValueError
        If nothing of the brain lies on the template's grid, or it shows one grey level only.
    """
    brain = find_brain(volume.pixels) if brain is None else brain
    transform, space = alignment.transform, template.space
    low, high = np.percentile(volume.pixels[brain], (5, 95)) if brain.any() else (0.0, 1.0)
    if not high > low:
        raise ValueError(f"place(): the brain shows the grey level {low:g} alone; give a scan with structures")
    levels = normalise_scan(volume.pixels, brain)
    # what lies outside the brain must not darken its border
    share = resample(Volume(brain.astype(np.float32), volume.space), space, transform).pixels
    sums = resample(Volume(np.where(brain, levels, 0), volume.space), space, transform).pixels
    inside = share >= 0.5
    if not inside.any():
        raise ValueError("place(): nothing of the brain lies on the template's grid; check the alignment")
    return AlignedScan(
        volume=volume,
        brain=brain,
        alignment=alignment,
        image=np.divide(sums, share, out=np.zeros_like(sums), where=inside),
        inside=inside,
        known=covered(volume.space, space, transform),
        noise=max(estimate_noise(volume.pixels, brain), LEAST_NOISE * float(high - low)),
        scale=1 / float(high - low),
    )


def at_voxels(maps: Tensor, template: Space, scan: AlignedScan) -> Tensor:
    """Maps on the template's grid at the voxels of a scan's brain, linear between; those outside take the nearest.

    Parameters
    ----------
    maps : Tensor
        Shape (L, Z, Y, X), on the grid `template`.
    template : Space
        The template's grid.
    scan : AlignedScan
        With N voxels in its brain.

    Returns
    -------
    Tensor
        Shape (L, N), in the order of ``pixels[scan.brain]``.
    """
    indices = np.argwhere(scan.brain)
    points = scan.alignment.transform.inverse()(_physical(indices, scan.volume.space))
    return sampled(maps, _indices(points, template))


def sampled(maps: Tensor, indices: NDArray[Any]) -> Tensor:
    """Maps (L, Z, Y, X) at indices (N, 3) that need not be whole numbers, linear between; shape (L, N)."""
    size = np.array(maps.shape[1:], float)
    grid = torch.from_numpy(((2 * indices + 1) / size - 1)[:, ::-1].astype(np.float32)).to(maps.device)
    found = F.grid_sample(maps[None], grid[None, None, None], padding_mode="border", align_corners=False)
    return found[0, :, 0, 0]


def spread(values: NDArray[Any], mask: Mask) -> NDArray[Any]:
    """Values (N,) of a mask's voxels put in their places, 0 elsewhere; the inverse of ``pixels[mask]``."""
    whole = np.zeros(mask.shape, values.dtype)
    whole[mask] = values
    return whole


def _physical(indices: NDArray[Any], space: Space) -> NDArray[np.float64]:
    steps = np.asarray(space.direction) * np.asarray(space.spacing)
    return np.asarray(indices @ steps.T + np.asarray(space.origin))


def _indices(points: NDArray[np.float64], space: Space) -> NDArray[np.float64]:
    steps = np.asarray(space.direction) * np.asarray(space.spacing)
    return np.asarray((points - np.asarray(space.origin)) @ np.linalg.inv(steps).T)
