"""Signed distances to the structures of a section, of which only the blocks are kept where they are not all clipped.

A section may have hundreds of structures, but most of them are small: nearly everywhere they are as far as it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limner.distances import signed_distance

BLOCK = 8  # pixels along y and x


@dataclass(frozen=True)
class StructureDistances:
    """Signed distances to the L structures of a section; equal to those of `limner.distances.signed_distance`.

    Parameters
    ----------
    structures : tuple of int
        Their labels, increasing.
    shape : tuple of int
        Size (Y, X) of the section.
    index : Tensor of int
        Which of `blocks` lies where, shape (L, y, x); 0: further than the clip everywhere in the block.
    blocks : Tensor
        mm, shape (N, `BLOCK`, `BLOCK`), the first all minus the clip.

    Examples
    --------
    >>> labels = np.zeros((64, 64), int)
    >>> labels[:4, :4] = 7
    >>> distances = StructureDistances.of(labels, (0.1, 0.1), clip_mm=0.25)
    >>> distances.structures, len(distances.blocks)  # the first, all 64 of the background, one of structure 7
    ((0, 7), 66)
    >>> distances.near(slice(30, 40), slice(0, 64)).tolist()
    [0]
    >>> [round(d, 2) for d in distances.at(torch.tensor([1]), slice(0, 1), slice(2, 6)).flatten().tolist()]
    [0.15, 0.05, -0.05, -0.15]
    """

    structures: tuple[int, ...]
    shape: tuple[int, int]
    index: Tensor
    blocks: Tensor

    @classmethod
    def of(
        cls, labels: NDArray[np.integer[Any]], spacing: tuple[float, float], clip_mm: float, device: str = "cpu"
    ) -> StructureDistances:
        """Those of every label that occurs.

        Parameters
        ----------
        labels : ndarray of int
            Shape (Y, X).
        spacing : tuple of float
            Pixel spacing (y, x) in mm.
        clip_mm : float
            Distances beyond this are set to it, mm.
        device : str
            Where to keep them.
        """
        height, width = labels.shape
        rows, columns = -(-height // BLOCK), -(-width // BLOCK)
        structures = np.unique(labels).tolist()
        index = np.zeros((len(structures), rows, columns), np.int64)
        padded = np.empty((rows * BLOCK, columns * BLOCK), np.float32)
        blocks, n = [np.full((1, BLOCK, BLOCK), -clip_mm, np.float32)], 1
        for place, structure in zip(index, structures, strict=True):
            padded[...] = -clip_mm
            padded[:height, :width] = signed_distance(labels == structure, spacing, clip_mm)
            parts = padded.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
            near = (parts > blocks[0][0, 0, 0]).any(axis=(2, 3))
            found = parts[near]
            place[near] = np.arange(n, n + len(found))
            blocks.append(found)
            n += len(found)
        kept = torch.from_numpy(np.concatenate(blocks)).to(device)
        return cls(tuple(structures), (height, width), torch.from_numpy(index).to(device), kept)

    def near(self, rows: slice, columns: slice) -> Tensor:
        """Which structures are nearer than the clip somewhere in the blocks that a window touches, (l,), increasing."""
        touched = (slice(None), *(_blocks_of(span) for span in (rows, columns)))
        return torch.nonzero(self.index[touched].flatten(1).any(dim=1))[:, 0]

    def at(self, chosen: Tensor, rows: slice, columns: slice) -> Tensor:
        """Distances to some of the structures in a window with both ends given, (l, y, x), mm."""
        down, right = _blocks_of(rows), _blocks_of(columns)
        found = self.blocks[self.index[chosen, down, right]]  # (l, y, x, BLOCK, BLOCK)
        y, x = found.shape[1:3]
        whole = found.transpose(2, 3).reshape(len(chosen), y * BLOCK, x * BLOCK)
        top, left = down.start * BLOCK, right.start * BLOCK
        return whole[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]

    def of_structure(self, structure: int) -> Tensor:
        """Distances to a structure that is there, (Y, X), mm."""
        return self.dense([structure])[0]

    def dense(self, structures: Sequence[int]) -> Tensor:
        """Distances to given structures, minus the clip where one is not there, (L, Y, X), mm."""
        found = self.blocks[0, 0, 0].expand(len(structures), *self.shape).clone()
        place = {s: i for i, s in enumerate(self.structures)}
        for out, structure in zip(found, structures, strict=True):
            if structure in place:
                out[...] = self.at(torch.tensor([place[structure]]), *(slice(0, n) for n in self.shape))[0]
        return found


def _blocks_of(span: slice) -> slice:
    """The blocks that a part of a row or column touches."""
    return slice(span.start // BLOCK, (span.stop - 1) // BLOCK + 1)
