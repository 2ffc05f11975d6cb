"""Log probabilities of the structures of a section, tile by tile: each tile holds those that are near, one by one.

A section may have hundreds of structures, but only a few of them lie near any of its pixels. All the others are alike
there, and one number stands for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.completion import common_deviation

AT_ONCE = 32  # structures at every pixel of a section, in memory at a time
STRIP_PIXELS = 4096  # of a tile that tells all structures apart: what is computed from one stays small


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
class MadeTiles:
    """Tiles that are made anew each time they are gone through, so that one is in memory at a time.

    Parameters
    ----------
    make : callable
        Begins to make them.
    """

    make: Callable[[], Iterator[Tile]]

    def __iter__(self) -> Iterator[Tile]:
        return self.make()


@dataclass(frozen=True)
class TiledEvidence:
    """Log probabilities of L structures at each pixel of a section.

    Parameters
    ----------
    tiles : iterable of Tile
        They cover the section and do not overlap; gone through as often as need be.
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

    tiles: Iterable[Tile]
    structures: int
    shape: tuple[int, int]

    @classmethod
    def of_all(cls, log_p: Tensor) -> TiledEvidence:
        """Strips of dense log probabilities (L, Y, X), which are not copied; every structure is told apart."""
        structures, height, width = log_p.shape
        return cls(list(_strips(log_p, 0, slice(0, width))), structures, (height, width))

    @classmethod
    def of_none(cls, structures: int, shape: tuple[int, int], device: str = "cpu") -> TiledEvidence:
        """All structures are as likely everywhere; in strips, of which one is in memory at a time."""
        near, step = torch.arange(0, device=device), max(1, STRIP_PIXELS // shape[1])

        def made() -> Iterator[Tile]:
            for top in range(0, shape[0], step):
                size = min(step, shape[0] - top), shape[1]
                far = torch.full(size, -math.log(structures), device=device)
                yield Tile(slice(top, top + size[0]), slice(0, shape[1]), near, far.new_empty(0, *size), far)

        return cls(MadeTiles(made), structures, shape)

    def others(self, tile: Tile) -> int:
        """How many structures a tile does not tell apart."""
        return self.structures - len(tile.near)

    def reduced(self, shape: tuple[int, int]) -> Tensor:
        """Probabilities on a coarser grid of that size, (L, y, x); some structures at a time."""
        parts = []
        for first in range(0, self.structures, AT_ONCE):
            chances = self.dense(first, min(first + AT_ONCE, self.structures)).exp()
            parts.append(F.interpolate(chances[None], shape, mode="bilinear", antialias=True)[0])
        return torch.cat(parts)

    def combined(self, with_others: Callable[[Tile], Tensor]) -> TiledEvidence:
        """Evidence that tells every structure apart, made tile by tile (large ones in strips) when it is asked for.

        Parameters
        ----------
        with_others : callable
            From a tile that tells every structure apart to log probabilities (L, y, x).
        """

        def made() -> Iterator[Tile]:
            for tile in self.tiles:
                for part in _strips(self._all(tile), tile.rows.start, tile.columns):
                    yield replace(part, log_p=with_others(part))

        return TiledEvidence(MadeTiles(made), self.structures, self.shape)

    def _all(self, tile: Tile, first: int = 0, last: int | None = None) -> Tensor:
        """Log probabilities of all structures in a tile, or from `first` to before `last`, (L, y, x)."""
        last = self.structures if last is None else last
        if not self.others(tile):
            return tile.log_p[first:last]
        found = tile.log_far.repeat(last - first, 1, 1)
        inside = (tile.near >= first) & (tile.near < last)
        found[tile.near[inside] - first] = tile.log_p[inside]
        return found

    def dense(self, first: int = 0, last: int | None = None) -> Tensor:
        """All of them, shape (L, Y, X), or those from `first` to before `last`."""
        last = self.structures if last is None else last
        found = torch.empty(0)
        for tile in self.tiles:
            if not len(found):
                found = tile.log_p.new_empty(last - first, *self.shape)
            found[(slice(None), *tile.where)] = self._all(tile, first, last)
        return found

    def tempered(self, temperature: float) -> TiledEvidence:
        """Divided by a temperature > 0 and normalised."""

        def made() -> Iterator[Tile]:
            for tile in self.tiles:
                log_p, log_far = tile.log_p / temperature, tile.log_far / temperature
                total = log_total(log_p, log_far, self.others(tile))
                yield Tile(*tile.where, tile.near, log_p - total, log_far - total)

        tiles = MadeTiles(made) if isinstance(self.tiles, MadeTiles) else list(made())
        return TiledEvidence(tiles, self.structures, self.shape)

    def best(self) -> tuple[Tensor, Tensor]:
        """Probability and index of the likeliest of the structures told apart, each (Y, X)."""
        highest, index = torch.empty(0), torch.empty(0)
        for tile in self.tiles:
            log_p, place = tile.log_p.max(dim=0)
            if not len(index):
                highest = log_p.new_empty(self.shape)
                index = place.new_empty(self.shape)
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
        found = torch.empty(0)
        for tile in self.tiles:
            if not len(found):
                found = tile.log_p.new_empty(self.structures, len(pixels))
            inside, row, column = pixels_inside(tile.rows, tile.columns, pixels, self.shape[1])
            part = tile.log_far[row, column].repeat(self.structures, 1)
            part[tile.near] = tile.log_p[:, row, column]
            found[:, inside] = part
        return found

    def areas(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Pixels of which each structure is the likeliest, and its `limner.completion.common_deviation`, each (L,)."""
        likeliest, deviation = np.zeros(self.structures, dtype=np.int64), np.zeros(self.structures)
        for tile in self.tiles:
            near = tile.near.cpu().numpy()
            likeliest[near] += np.bincount(tile.log_p.argmax(dim=0).cpu().numpy().ravel(), minlength=len(near))
            far = np.ones(self.structures, dtype=bool)
            far[near] = False
            deviation[near] += common_deviation(tile.log_p.exp().cpu().numpy())
            if far.any():
                deviation[far] += common_deviation(tile.log_far.exp().cpu().numpy()[None])
        return likeliest, deviation


def _strips(log_p: Tensor, first: int, columns: slice) -> Iterator[Tile]:
    """Tiles of some rows each of dense log probabilities (L, Y, X), which begin at row `first` of the section."""
    structures, height, width = log_p.shape
    step = max(1, STRIP_PIXELS // width)
    near = torch.arange(structures, device=log_p.device)
    for top in range(0, height, step):
        part = log_p[:, top : top + step]
        rows = slice(first + top, first + top + part.shape[1])
        yield Tile(rows, columns, near, part, torch.zeros_like(part[0]))


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
