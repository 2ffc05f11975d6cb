"""What tests of `limner prior` share: brains drawn by formula, as label maps and as scans of two contrasts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from limner.io import write_result
from limner.space import Space
from limner.volume import Volume

# centre and half axes in mm (z, y, x), label; later ones lie on earlier ones
PARTS = [
    ((0, 0, 0), (56, 70, 56), 3),  # cortex
    ((-42, 40, 0), (24, 30, 44), 3),
    ((6, -4, 0), (42, 54, 44), 2),  # white matter
    ((-42, 40, 0), (14, 20, 32), 2),
    ((14, -12, 14), (12, 34, 9), 4),  # ventricles, left and right
    ((14, -12, -14), (12, 34, 9), 43),
]
GREY = {"bright": {0: 0, 3: 60, 2: 100, 4: 25, 43: 25}, "dark": {0: 0, 3: 140, 2: 90, 4: 200, 43: 200}}
GRID = Space((36, 40, 32), (4.0, 4.0, 4.0), (-74.0, -78.0, -62.0))
# the same brain with axes in another order, two of them flipped, and other voxels
TURNED = Space(
    (30, 32, 40), (4.2, 4.4, 4.0), (62.0, -78.0, -61.0), ((0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
)


def points_of(space: Space) -> NDArray[np.float64]:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in space.shape), indexing="ij"), axis=-1)
    return np.asarray(space.origin) + (index * space.spacing) @ np.asarray(space.direction).T


def brain_labels(seed: int, space: Space = GRID) -> NDArray[np.uint8]:
    """Each seed is a subject, a little larger or smaller, whose ventricles (4 left, 43 right) differ."""
    draw, labels = np.random.default_rng(seed), np.zeros(space.shape, np.uint8)
    stretch, wide = 1 + draw.normal(0, 0.03, 3), 1 + draw.normal(0, 0.15)
    points = points_of(space) / stretch
    for centre, axes, label in PARTS:
        half = np.array(axes) * (wide if label > 3 else 1)
        labels[(((points - centre) / half) ** 2).sum(axis=-1) < 1] = label
    return labels


def brain_scan(seed: int, contrast: str = "bright", space: Space = GRID) -> NDArray[np.int16]:
    labels = brain_labels(seed, space)
    levels = np.zeros(256)
    levels[list(GREY[contrast])] = list(GREY[contrast].values())
    noisy = levels[labels] + np.random.default_rng(100 + seed).normal(0, 4, labels.shape)
    return np.where(labels > 0, np.maximum(noisy, 1), 0).astype(np.int16)


def write_volume(path: Path, pixels: NDArray[np.integer], space: Space = GRID) -> Path:
    """NIfTI, named without its ending."""
    return write_result(path.parent, path.name, pixels, Volume(np.zeros(space.shape), space))


@pytest.fixture(scope="session")
def brains() -> SimpleNamespace:
    """`labels`, `scan` and `write` of this module, and the grids `usual` and `turned`."""
    return SimpleNamespace(labels=brain_labels, scan=brain_scan, write=write_volume, usual=GRID, turned=TURNED)


@pytest.fixture
def label_maps(tmp_path: Path) -> Path:
    """Five subjects."""
    for seed in range(5):
        write_volume(tmp_path / "maps" / f"m{seed}", brain_labels(seed))
    return tmp_path / "maps"
