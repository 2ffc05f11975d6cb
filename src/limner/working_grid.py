"""The grid that a method works on: a stack in 8-bit levels, at the images' own pixels or at coarser ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.annotations import Scribbles
from limner.intensity import grey_window, to_8_bit
from limner.training import with_coordinates
from limner.volume import Volume

LARGEST_STACK = 16_000_000  # voxels, unless the user asks for another pixel size


@dataclass(frozen=True)
class Grid:
    """The stack as the method sees it: 8-bit levels (Z, Y, X, C), reduced `factor` times in plane."""

    levels: NDArray[np.float32]
    spacing: tuple[float, float, float]
    factor: int
    full_shape: tuple[int, int, int]

    @classmethod
    def of(cls, images: Volume, working_um: float | None) -> Grid:
        """At about `working_um`: a whole number of pixels becomes one."""
        z, y, x = images.space.spacing
        own_um = 1000 * math.sqrt(y * x)
        if working_um is not None and working_um < 0.75 * own_um:
            raise ValueError(
                f"--working-um: {working_um:g} um is finer than the images ({own_um:g} um); give {own_um:g} or more"
            )
        voxels = math.prod(images.space.shape)
        factor = math.ceil(math.sqrt(voxels / LARGEST_STACK)) if working_um is None else round(working_um / own_um)
        factor = max(1, factor)
        pixels = images.pixels[..., None] if images.pixels.ndim == 3 else images.pixels
        window = grey_window(images.pixels)
        levels = np.concatenate([_reduced(to_8_bit(section[None], window), factor) for section in pixels])
        return cls(levels, (z, y * factor, x * factor), factor, images.space.shape)

    @property
    def um_per_px(self) -> float:
        """Micrometres."""
        return 1000 * math.sqrt(self.spacing[1] * self.spacing[2])

    def marks(self, scribbles: Scribbles) -> NDArray[np.int32]:
        """Strokes on this grid: 0 unmarked, then 1 + index into `Scribbles.classes`; organs win over background."""
        marks = np.zeros(self.levels.shape[:3], np.int32)
        for z in scribbles.sections:
            labels, drawn = scribbles.label_map.labels[z], scribbles.weights[z] > 0
            for mark, label in enumerate(scribbles.classes, start=1):
                stroke = drawn & (labels == label)
                marks[z][_blocks(stroke[None, ..., None], self.factor).any(axis=(0, 2, 4, 5))] = mark
        return marks

    def middles(self, labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """Labels (Z, Y, X) at the middle of each pixel of this grid."""
        rows, columns = (
            np.minimum(np.arange(n) * self.factor + self.factor // 2, size - 1)
            for n, size in zip(self.levels.shape[1:3], labels.shape[1:], strict=True)
        )
        return labels[:, rows[:, None], columns]

    def enlarged(self, maps: NDArray[np.floating[Any] | np.bool_]) -> NDArray[np.float32]:
        """Maps (L, Y, X) in [0, 1] of one section at the images' own size, linear between pixels."""
        if self.factor == 1:
            return maps.astype(np.float32)
        size = [self.factor * n for n in maps.shape[1:]]
        large = F.interpolate(torch.from_numpy(maps.astype(np.float32))[None], size=size, mode="bilinear")[0]
        # weights of the interpolation may add up to a little more than 1
        return large[:, : self.full_shape[1], : self.full_shape[2]].clamp_(0, 1).numpy()

    def enlarged_labels(self, labels: NDArray[np.integer[Any]]) -> NDArray[np.uint16]:
        """Labels (Y, X) of one section at the images' own size: at each pixel the one that reaches farthest there."""
        present = np.unique(labels).tolist()
        if self.factor == 1:
            return labels.astype(np.uint16)
        most = self.enlarged(labels[None] == present[0])[0]
        large = np.full(most.shape, present[0], np.uint16)
        for label in present[1:]:
            share = self.enlarged(labels[None] == label)[0]
            large[share > most] = label
            np.maximum(most, share, out=most)
        return large

    def inputs(self, sections: slice | Sequence[int], located: bool) -> Tensor:
        """What the network sees of some sections, (n, C, Y, X): levels in [0, 1] and, if `located`, z, y and x."""
        chosen = np.arange(len(self.levels))[sections]
        images = torch.from_numpy(self.levels[chosen]).permute(0, 3, 1, 2) / 255
        if not located:
            return images
        return with_coordinates(images, torch.from_numpy(chosen).float(), (0.0, float(len(self.levels) - 1)))


def _blocks(pixels: NDArray[Any], factor: int) -> NDArray[Any]:
    """(Z, Y, X, C) as (Z, y, factor, x, factor, C); edges are repeated."""
    missing = [(0, 0), *((0, -n % factor) for n in pixels.shape[1:3]), (0, 0)]
    padded = np.pad(pixels, missing, mode="edge")
    n, height, width, channels = padded.shape
    return padded.reshape(n, height // factor, factor, width // factor, factor, channels)


def _reduced(pixels: NDArray[Any], factor: int) -> NDArray[np.float32]:
    if factor == 1:
        return np.asarray(pixels, np.float32)
    return _blocks(pixels, factor).mean(axis=(2, 4), dtype=np.float32)
