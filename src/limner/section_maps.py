"""Probability maps of a stack's sections, made tile by tile and kept so that a stopped run goes on.

No more than a tile is in memory while a network computes, and no more than a section afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.inference import Image, Options, TiledNetwork, predict
from limner.run_record import Store
from limner.tiles import Tile, TileGrid

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SectionMaps:
    """One map for each section, as tiles in a store.

    Parameters
    ----------
    store : Store
        Holds a stage for each tile of each section.
    keys : tuple of str
        What each section's map depends on: image, network and settings.
    grids : tuple of TileGrid
        The tiles of each section.
    """

    store: Store
    keys: tuple[str, ...]
    grids: tuple[TileGrid, ...]

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, z: int) -> NDArray[np.float32]:
        """The map of a section, shape (Y, X), in [0, 1].

        Raises
        ------
        ValueError
            If a tile is missing.
        """
        whole = np.empty(self.grids[z].shape, np.float32)
        for tile in self.grids[z]:
            found = self.store.load(_stage(z, tile), self.keys[z])
            if found is None:
                self.store.remove(_stage(z, tile))
                raise ValueError(
                    f"SectionMaps(): tile {tile.index} of section {z} is missing or damaged; give the command again"
                )
            whole[tile.core.slices] = found["map"]
        return whole

    def done(self, z: int) -> set[tuple[int, int]]:
        """Indices of a section's tiles that are there."""
        return {tile.index for tile in self.grids[z] if self.store.holds(_stage(z, tile), self.keys[z])}

    def keep(self, z: int, tile: Tile, values: NDArray[np.float32]) -> None:
        """Keep a tile's part of a section's map."""
        self.store.save(_stage(z, tile), self.keys[z], {"map": values})


def make_maps(
    network: TiledNetwork,
    images: Sequence[Image],
    keys: Sequence[str],
    store: Store,
    channel: int,
    options: Options,
    prepare: Callable[[Image], Callable[[NDArray[Any]], NDArray[np.float32]]],
    progress: Progress = lambda *_: None,
) -> SectionMaps:
    """Compute the maps of all sections; tiles that the store holds are passed over.

    Parameters
    ----------
    network : TiledNetwork
        As of `limner.inference.predict`.
    images : sequence of array-like
        Each (Y, X), or anything that gives the pixels of two slices; sizes may differ.
    keys : sequence of str
        What each section's map depends on.
    store : Store
        Where tiles are kept.
    channel : int
        The class whose probability is kept.
    options : Options
        Windows, device, scheduler; its margin is 0.
    prepare : callable
        From a section to what makes the network's input of its pixels.
    progress : callable
        Called with tiles done and tiles in all.

    Returns
    -------
    SectionMaps
    """
    grids = tuple(options.grid(network, (image.shape[0], image.shape[1])) for image in images)
    maps = SectionMaps(store, tuple(keys), grids)
    total, before = sum(len(grid) for grid in grids), 0
    for z, image in enumerate(images):
        done = maps.done(z)
        if len(done) < len(grids[z]):

            def write(tile: Tile, found: NDArray[np.float32], z: int = z) -> None:
                maps.keep(z, tile, found[channel])

            def tell(n: int, _: int, before: int = before) -> None:
                progress(before + n, total)

            predict(network, image, write, options, done=done, progress=tell, prepare=prepare(image))
        before += len(grids[z])
        progress(before, total)
    return maps


def _stage(z: int, tile: Tile) -> str:
    """Named by what the tile covers: one of another size is another."""
    spans = (f"{part.start}-{part.stop}" for part in tile.core.slices)
    return f"map-{z:05}-{'-'.join(spans)}"
