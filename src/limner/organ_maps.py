"""From the working grid to the images' own size: labels, heat maps, uncertainty and volumes of organs.

Labels are kept at full size, a byte a voxel; maps of numbers stay small, and each section of them is enlarged when it
is asked for. Of 200 sections of 5,700 x 10,000 pixels one map would take 46 GB otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.annotations import Scribbles
from limner.space import Space
from limner.volume import MadeSections
from limner.working_grid import Grid


@dataclass(frozen=True)
class Organ:
    """Its volume, and the volumes of what is organ with a chance of 3/4 and of 1/4, mm3."""

    label: int
    volume_mm3: float
    interval_mm3: tuple[float, float]


@dataclass(frozen=True)
class OrganMaps:
    """What was found, at the images' own size.

    Parameters
    ----------
    labels : ndarray of uint
        Shape (Z, Y, X): the strokes' own labels, in the smallest type that holds them.
    heat_maps : tuple of MadeSections
        Chance of each class, background first.
    uncertainty : MadeSections
        1 - the chance of the label that was found; 0 where it was drawn.
    organs : tuple of Organ
        Their volumes.
    """

    labels: NDArray[np.unsignedinteger[Any]]
    heat_maps: tuple[MadeSections, ...]
    uncertainty: MadeSections
    organs: tuple[Organ, ...]


def to_full_size(
    grid: Grid,
    chances: NDArray[np.float32],
    labels: NDArray[np.integer[Any]],
    scribbles: Scribbles,
    space: Space,
) -> OrganMaps:
    """Bring chances and labels to the size of the images, strokes as they were drawn.

    Parameters
    ----------
    grid : Grid
        The working grid, (z, y, x).
    chances : ndarray of float32
        Of each of the strokes' classes, shape (L, z, y, x), in [0, 1].
    labels : ndarray of int
        Shape (z, y, x): indices into the strokes' classes.
    scribbles : Scribbles
        The strokes, at full size.
    space : Space
        Of the images.
    """
    found = _full_size(grid, labels, scribbles)
    heat_maps = tuple(MadeSections(space.shape, partial(_enlarged, grid, own)) for own in chances)
    uncertainty = MadeSections(space.shape, partial(_uncertainty, found, heat_maps, scribbles))
    voxel = math.prod(space.spacing)
    organs = (_organ(own, found, heat, voxel) for own, heat in zip(scribbles.classes, heat_maps, strict=True) if own)
    return OrganMaps(found, heat_maps, uncertainty, tuple(organs))


def _full_size(grid: Grid, labels: NDArray[np.integer[Any]], scribbles: Scribbles) -> NDArray[np.unsignedinteger[Any]]:
    own = np.array(scribbles.classes).astype(np.min_scalar_type(scribbles.classes[-1]))
    found = np.empty(grid.full_shape, own.dtype)
    for z, section in enumerate(labels):
        found[z] = own[grid.enlarged_labels(section)]
    for z in scribbles.sections:
        np.copyto(found[z], scribbles.label_map.labels[z], where=scribbles.weights[z] > 0, casting="unsafe")
    return found


def _enlarged(grid: Grid, chances: NDArray[np.float32], z: int) -> NDArray[np.float32]:
    return grid.enlarged(chances[z][None])[0]


def _uncertainty(
    found: NDArray[np.integer[Any]], heat_maps: Sequence[MadeSections], scribbles: Scribbles, z: int
) -> NDArray[np.float32]:
    """1 - the chance of the label that was found; 0 where it was drawn."""
    uncertainty = np.empty(found.shape[1:], np.float32)
    for own, heat in zip(scribbles.classes, heat_maps, strict=True):
        here = found[z] == own
        if here.any():
            np.subtract(1, heat[z], out=uncertainty, where=here)
    uncertainty[scribbles.weights[z] > 0] = 0
    return uncertainty


def _organ(own: int, found: NDArray[np.integer[Any]], heat: MadeSections, voxel: float) -> Organ:
    """Its volumes, of voxels of `voxel` mm3."""
    voxels = likely = possible = 0
    for labels, chance in zip(found, heat, strict=True):
        here = labels == own
        voxels += int(here.sum())
        likely += int((here & (chance >= 0.75)).sum())
        possible += int((here | (chance >= 0.25)).sum())
    return Organ(own, voxel * voxels, (voxel * likely, voxel * possible))
