"""Where voxels lie: shape, spacing, origin, direction, and the positions of unevenly spaced sections.

Everything in memory is ordered ``(z, y, x)``: sections run along z, the array's first axis. Lengths are millimetres.
The physical frame is SimpleITK's (LPS), its axes in the order z, y, x as well; ``limner.io`` alone converts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IDENTITY: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Space:
    """The grid of a volume.

    Parameters
    ----------
    shape : tuple of int
        Number of voxels along z, y, x.
    spacing : tuple of float
        Distance between voxel centres along z, y, x in mm, all > 0. With `positions`, the first entry is nominal.
    origin : tuple of float
        Physical position of voxel (0, 0, 0) in mm, order z, y, x.
    direction : tuple of tuple of float
        3 x 3 matrix; column j is the unit vector along which index axis j (z, y, x) runs, rows in the order z, y, x.
    positions : tuple of float, optional
        Position of each section along z in mm, strictly increasing; None when the sections are evenly spaced.

    Raises
    ------
    ValueError
        If a spacing is not positive and finite, or positions are missing, duplicate or not increasing.

    Examples
    --------
    >>> Space(shape=(3, 4, 5), spacing=(0.05, 0.04, 0.04)).section_positions
    array([0.  , 0.05, 0.1 ])
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[tuple[float, float, float], ...] = IDENTITY
    positions: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not all(np.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"Space(): spacing is {self.spacing} mm (z, y, x); every entry must be above 0")
        if self.positions is None:
            return
        if len(self.positions) != self.shape[0]:
            raise ValueError(
                f"Space(): {len(self.positions)} section positions for {self.shape[0]} sections; give one each"
            )
        for i, (a, b) in enumerate(pairwise(self.positions)):
            if not b > a:
                raise ValueError(
                    f"Space(): section positions must increase, but section {i} is at {a} mm and section {i + 1} at "
                    f"{b} mm; sort the sections and give each its own position"
                )

    @property
    def section_positions(self) -> NDArray[np.float64]:
        """Position of every section along z in mm, shape (Z,), increasing."""
        if self.positions is not None:
            return np.asarray(self.positions, dtype=float)
        return np.arange(self.shape[0], dtype=np.float64) * self.spacing[0]

    def with_positions(self, positions: Sequence[float]) -> Space:
        """The same grid with its sections at `positions` (mm); the nominal z spacing stays as it is."""
        return replace(self, positions=tuple(float(p) for p in positions))

    def to_physical(self, index: Sequence[float]) -> NDArray[np.float64]:
        """Physical position in mm (z, y, x) of a voxel index (z, y, x); uses spacing, not `positions`."""
        scaled = np.asarray(index, dtype=float) * np.asarray(self.spacing)
        return np.asarray(self.origin) + np.asarray(self.direction) @ scaled

    def to_index(self, point: Sequence[float]) -> NDArray[np.float64]:
        """Continuous voxel index (z, y, x) of a physical position in mm (z, y, x); inverse of `to_physical`."""
        offset = np.asarray(point, dtype=float) - np.asarray(self.origin)
        return np.linalg.solve(np.asarray(self.direction), offset) / np.asarray(self.spacing)
