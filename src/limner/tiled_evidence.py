"""Log probabilities of the structures of a section, tile by tile: each tile holds those that are near, one by one.

A section may have hundreds of structures, but only a few of them lie near any of its pixels. All the others are alike
there, and one number stands for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limner.completion import common_deviation

STRIP_PIXELS = 4096  # of a tile of `TiledEvidence.of_all`: what is computed from one stays small


@dataclass(frozen=True)
class Tile:
    """A part of a section.

    Parameters
    ----------
    rows, columns : slice
        Where it lies, with both ends given.
    near : Tensor of int
        Indices of the structures that are told apart here, increasing, shape (l,).
    log_p : Tensor
        Their log probabilities, shape (l, y, x).
    log_far : Tensor
        log probability of each of the other structures, shape (y, x); read only where there are others.
    """

    rows: slice
    columns: slice
    near: Tensor
    log_p: Tensor
    log_far: Tensor

    @property
    def where(self) -> tuple[slice, slice]:
        """Where it lies in arrays (..., Y, X)."""
        return self.rows, self.columns


@dataclass(frozen=True)
class TiledEvidence:
    """Log probabilities of L structures at each pixel of a section.

    Parameters
    ----------
    tiles : sequence of Tile
        They cover the section and do not overlap.
    structures : int
        L.
    shape : tuple of int
        Size (Y, X) of the section.

    Examples
    --------
    >>> log_p = torch.tensor([0.7, 0.1]).log().view(2, 1, 1)  # the third and fourth structure share the rest
    >>> tile = Tile(slice(0, 1), slice(0, 1), torch.tensor([0, 2]), log_p, torch.tensor([[0.1]]).log())
    >>> [round(v, 2) for v in TiledEvidence([tile], 4, (1, 1)).dense().exp().flatten().tolist()]
    [0.7, 0.1, 0.1, 0.1]
    """

    tiles: Sequence[Tile]
    structures: int
    shape: tuple[int, int]

    @classmethod
    def of_all(cls, log_p: Tensor) -> TiledEvidence:
        """Strips of dense log probabilities (L, Y, X), which are not copied; every structure is told apart."""
        structures, height, width = log_p.shape
        step = max(1, STRIP_PIXELS // width)
        near, columns = torch.arange(structures, device=log_p.device), slice(0, width)
        tiles = []
        for top in range(0, height, step):
            part = log_p[:, top : top + step]
            tiles.append(Tile(slice(top, top + part.shape[1]), columns, near, part, torch.zeros_like(part[0])))
        return cls(tiles, structures, (height, width))

    def others(self, tile: Tile) -> int:
        """How many structures a tile does not tell apart."""
        return self.structures - len(tile.near)

    def dense(self) -> Tensor:
        """All of them, shape (L, Y, X)."""
        found = self.tiles[0].log_p.new_empty(self.structures, *self.shape)
        for tile in self.tiles:
            part = found[(slice(None), *tile.where)]
            if self.others(tile):
                part.copy_(tile.log_far.expand_as(part))
            part[tile.near] = tile.log_p
        return found

    def tempered(self, temperature: float) -> TiledEvidence:
        """Divided by a temperature > 0 and normalised."""
        tiles = []
        for tile in self.tiles:
            log_p, log_far = tile.log_p / temperature, tile.log_far / temperature
            total = log_total(log_p, log_far, self.others(tile))
            tiles.append(Tile(*tile.where, tile.near, log_p - total, log_far - total))
        return TiledEvidence(tiles, self.structures, self.shape)

    def best(self) -> tuple[Tensor, Tensor]:
        """Probability and index of the likeliest of the structures told apart, each (Y, X)."""
        device = self.tiles[0].log_p.device
        highest = torch.empty(self.shape, device=device)
        index = torch.empty(self.shape, dtype=torch.int64, device=device)
        for tile in self.tiles:
            log_p, place = tile.log_p.max(dim=0)
            highest[tile.where], index[tile.where] = log_p.exp(), tile.near[place]
        return highest, index

    def entropy(self) -> float:
        """Mean entropy over pixels, nats."""
        total = 0.0
        for tile in self.tiles:
            far = self.others(tile) * tile.log_far.exp() * tile.log_far
            total -= float((tile.log_p.exp() * tile.log_p).sum() + far.sum())
        return total / math.prod(self.shape)

    def at(self, pixels: Tensor) -> Tensor:
        """Log probabilities at flat indices into (Y, X): (N,) -> (L, N)."""
        found = self.tiles[0].log_p.new_empty(self.structures, len(pixels))
        for tile in self.tiles:
            inside, row, column = pixels_inside(tile.rows, tile.columns, pixels, self.shape[1])
            part = tile.log_far[row, column].repeat(self.structures, 1)
            part[tile.near] = tile.log_p[:, row, column]
            found[:, inside] = part
        return found

    def areas(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Pixels of which each structure is the likeliest, and its `limner.completion.common_deviation`, each (L,)."""
        deviation = np.zeros(self.structures)
        for tile in self.tiles:
            near = tile.near.cpu().numpy()
            far = np.ones(self.structures, dtype=bool)
            far[near] = False
            deviation[near] += common_deviation(tile.log_p.exp().cpu().numpy())
            if far.any():
                deviation[far] += common_deviation(tile.log_far.exp().cpu().numpy()[None])
        likeliest = np.bincount(self.best()[1].cpu().numpy().ravel(), minlength=self.structures)
        return likeliest.astype(np.int64), deviation


def log_total(logs: Tensor, log_far: Tensor, others: int) -> Tensor:
    """log of the sum over the structures told apart, (l, y, x), and `others` that are all `log_far`, (y, x)."""
    near = torch.logsumexp(logs, dim=0)
    return torch.logaddexp(near, log_far + math.log(others)) if others else near


def pixels_inside(rows: slice, columns: slice, pixels: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which flat indices into a section of some width lie in a tile, and in which of its rows and columns; (n,) each.

    Examples
    --------
    >>> pixels_inside(slice(1, 3), slice(2, 4), torch.tensor([0, 6, 11]), width=4)
    (tensor([1, 2]), tensor([0, 1]), tensor([0, 1]))
    """
    row, column = pixels // width - rows.start, pixels % width - columns.start
    within = (row >= 0) & (row < rows.stop - rows.start) & (column >= 0) & (column < columns.stop - columns.start)
    inside = torch.nonzero(within)[:, 0]
    return inside, row[inside], column[inside]
