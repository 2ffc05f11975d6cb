"""A network on an image of any size, tile by tile: equal to the whole image at once, in memory bounded by the tile."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limner.parallel import side_by_side
from limner.tiles import Tile, TileGrid

Write = Callable[[Tile, NDArray[np.float32]], None]
Batch = tuple[Tile, ...]


class TiledNetwork(Protocol):
    """What a network must say of itself, beside being a torch module."""

    @property
    def halo(self) -> int:
        """How far beyond an aligned region its outputs look, pixels."""

    @property
    def alignment(self) -> int:
        """Product of its poolings."""

    def __call__(self, image: Tensor, region: tuple[slice, slice]) -> Tensor:
        """Logits of a region: (B, C, Y, X) -> (B, L, y, x)."""


class Image(Protocol):
    """An array of numpy, zarr or dask, or anything that gives the pixels of two slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(Y, X) or (Y, X, C)."""

    def __getitem__(self, region: tuple[slice, slice]) -> Any:
        """Pixels of some rows and columns."""


@dataclass(frozen=True)
class Options:
    """How an image is cut and where it is computed. Nothing here but `halo` changes the result.

    Parameters
    ----------
    window : int
        Longest side of what is read at once, pixels; a multiple of the network's alignment.
    halo : int or None
        Pixels read around what is kept; None: what the network asks for. Less is faster and no longer exact.
    margin : int
        Pixels around each tile's core for which results are handed over too, for joining objects across seams.
    batch : int
        Tiles of the same size computed at once; more than 1 pays on a GPU with small windows.
    jobs : int
        Batches side by side: one may read while another is computed.
    device : {'auto', 'cpu', 'cuda'}
        'auto' takes a GPU where there is one.
    scheduler : str, optional
        Address of a dask.distributed cluster whose workers compute; None: threads here.
    """

    window: int = 1536
    halo: int | None = None
    margin: int = 0
    batch: int = 1
    jobs: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scheduler: str | None = None

    def grid(self, network: TiledNetwork, shape: tuple[int, int]) -> TileGrid:
        """The tiles of an image of shape (Y, X)."""
        halo = network.halo if self.halo is None else self.halo
        return TileGrid(shape, self.window, halo, self.margin, network.alignment)


PAPER_WINDOWS = Options(window=256, halo=64)
"""Windows of 256 every 128, the central 128 kept, and more at the image's border (Mercadier et al. 2019)."""


def unit_range(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Whole numbers of 8 or 16 bit divided by the largest there is of their kind; other numbers as they are.

    Examples
    --------
    >>> unit_range(np.array([0, 51, 255], np.uint8))
    array([0. , 0.2, 1. ], dtype=float32)
    """
    largest = np.iinfo(pixels.dtype).max if np.issubdtype(pixels.dtype, np.integer) else 1
    return pixels.astype(np.float32) / np.float32(largest)


def predict(
    network: TiledNetwork,
    image: Image,
    write: Write,
    options: Options | None = None,
    *,
    skip: Callable[[Tile], bool] = lambda _: False,
    done: Collection[tuple[int, int]] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
    prepare: Callable[[NDArray[Any]], NDArray[np.float32]] = unit_range,
) -> TileGrid:
    """Class probabilities of every pixel, handed over tile by tile.

    Parameters
    ----------
    network : TiledNetwork
        Such as `TiledUNet`; computed in evaluation on a copy, so the caller's stays as it is.
    image : array-like
        Shape (Y, X) or (Y, X, C); only what a tile reads is ever asked for.
    write : callable
        ``write(tile, probabilities)`` with float32 probabilities of ``tile.kept``, shape (L, y, x). Never called by
        two threads at once, in no certain order. When it has returned, the tile is done: a caller who wants to resume
        notes ``tile.index`` there.
    options : Options, optional
        Windows, device, scheduler.
    skip : callable
        ``skip(tile)`` is true where there is nothing to see (glass): the tile is neither read nor computed, and is
        written as class 0 with probability 1.
    done : collection of (int, int)
        Indices of tiles that an earlier run wrote: nothing is done for them. The window and margin must be the same.
    progress : callable
        ``progress(done, total)`` in tiles, those of `done` included.
    prepare : callable
        Makes the network's input (y, x, C), float32, from pixels (y, x, C); it must treat every pixel by itself.

    Returns
    -------
    TileGrid
        The tiles, for whoever goes on with what was written.

    Raises
    ------
    ValueError
        When the image has neither two nor three axes, or the window is too small for the network.

    Examples
    --------
    >>> from limner.networks.tiled_unet import TiledUNet
    >>> image, found = np.zeros((300, 500, 3), np.uint8), np.zeros((2, 300, 500), np.float32)
    >>> def write(tile, probabilities):
    ...     found[:, *tile.kept.slices] = probabilities
    >>> grid = predict(TiledUNet(widths=(4, 4, 4, 4, 4)), image, write, Options(window=256, device="cpu"))
    >>> grid.counts, bool(np.allclose(found.sum(axis=0), 1))
    ((2, 5), True)
    """
    options = options or Options()
    if len(image.shape) not in (2, 3):
        raise ValueError(f"predict(): the image has shape {tuple(image.shape)}; give (Y, X) or (Y, X, C)")
    grid = options.grid(network, (int(image.shape[0]), int(image.shape[1])))
    evaluation: Any = copy.deepcopy(network)
    evaluation.eval().to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU
    computer = _Computer(evaluation, options.device)
    written = {tile.index for tile in grid if tile.index in done}
    progress(len(written), len(grid))

    def hand_over(tile: Tile, probabilities: NDArray[np.float32]) -> None:
        write(tile, probabilities)
        written.add(tile.index)

    todo: list[Tile] = []
    for tile in grid:
        if tile.index not in written and skip(tile):
            hand_over(tile, _class_0(computer.maps(image.shape[2:]), tile))
            progress(len(written), len(grid))
        elif tile.index not in written:
            todo.append(tile)

    def load(batch: Batch) -> NDArray[np.float32]:
        return np.stack([_pixels(image, tile, prepare) for tile in batch])

    def finish(batch: Batch, probabilities: NDArray[np.float32]) -> None:
        for tile, found in zip(batch, probabilities, strict=True):
            hand_over(tile, found)

    course = _Course(list(batches(todo, options.batch)), load, finish, lambda: progress(len(written), len(grid)))
    if options.scheduler is None or not todo:
        _compute_here(computer, course, options.jobs)
    else:
        _compute_on_cluster(computer, course, options.scheduler)
    return grid


def batches(tiles: Iterable[Tile], most: int) -> Iterator[Batch]:
    """Runs of up to `most` tiles that can be computed as one tensor: same size read, same part of it kept."""
    for _, alike in groupby(tiles, key=_likeness):
        while batch := tuple(islice(alike, max(1, most))):
            yield batch


@dataclass(frozen=True)
class _Course:
    """What is to be computed and what happens before and after; `finish` and `tell` are for one thread at a time."""

    batches: list[Batch]
    load: Callable[[Batch], NDArray[np.float32]]
    finish: Callable[[Batch, NDArray[np.float32]], None]
    tell: Callable[[], None]


@dataclass(frozen=True)
class _Computer:
    """A network in evaluation and where to compute it; travels to the workers of a cluster."""

    network: Any
    device: Literal["auto", "cpu", "cuda"]

    def __call__(self, pixels: NDArray[np.float32], region: tuple[slice, slice]) -> NDArray[np.float32]:
        """Probabilities of a region: (B, Y, X, C) -> (B, L, y, x)."""
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        device = "cuda" if cuda else "cpu"
        with torch.inference_mode():
            images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)  # already channels last in memory
            logits = self.network.to(device)(images, region)
            return torch.softmax(logits, dim=1).contiguous().cpu().numpy()

    def maps(self, channels: tuple[int, ...]) -> int:
        """Number L of classes, as the network says on one pixel."""
        pixel = np.zeros((1, 1, 1, *(channels or (1,))), np.float32)
        return self(pixel, (slice(0, 1), slice(0, 1))).shape[1]


def _pixels(image: Image, tile: Tile, prepare: Callable[[NDArray[Any]], NDArray[np.float32]]) -> NDArray[np.float32]:
    """What a tile reads, as the network wants it, (y, x, C)."""
    pixels = np.asarray(image[tile.read.slices])
    prepared = prepare(pixels if pixels.ndim == 3 else pixels[..., None])
    return np.ascontiguousarray(prepared, dtype=np.float32)


def _class_0(maps: int, tile: Tile) -> NDArray[np.float32]:
    """Probabilities of a tile that nobody looked at."""
    probabilities = np.zeros((maps, *tile.kept.shape), np.float32)
    probabilities[0] = 1
    return probabilities


def _likeness(tile: Tile) -> tuple[object, ...]:
    return tile.read.shape, tile.kept.within(tile.read)


def _region(batch: Batch) -> tuple[slice, slice]:
    return batch[0].kept.within(batch[0].read)


def _compute_here(computer: _Computer, course: _Course, jobs: int) -> None:
    """Batches in threads of this process; results are written by one of them at a time."""
    writing = threading.Lock()

    def work(batch: Batch) -> None:
        probabilities = computer(course.load(batch), _region(batch))
        with writing:
            course.finish(batch, probabilities)

    side_by_side(course.batches, work, jobs, lambda *_: course.tell())


def _compute_on_cluster(computer: _Computer, course: _Course, address: str) -> None:
    """Batches on the workers of a cluster.

    Pixels are read here and travel with the task, so workers need no access to the image; twice as many batches as
    there are worker threads are under way at once, which bounds the memory.
    """
    from dask.distributed import Client, as_completed

    with Client(address, set_as_default=False) as client:
        sent = client.scatter(computer, broadcast=True, hash=False)
        waiting = iter(course.batches)
        batch_of: dict[Any, Batch] = {}

        def submit(batch: Batch) -> Any:
            future = client.submit(_call, sent, course.load(batch), _region(batch), pure=False)
            batch_of[future.key] = batch
            return future

        at_once = 2 * max(1, sum(client.nthreads().values()))
        running = as_completed([submit(batch) for batch in islice(waiting, at_once)], loop=client.loop)
        for future in running:
            course.finish(batch_of.pop(future.key), future.result())
            course.tell()
            future.release()
            for batch in islice(waiting, 1):
                running.add(submit(batch))


def _call(computer: _Computer, pixels: NDArray[np.float32], region: tuple[slice, slice]) -> NDArray[np.float32]:
    """Runs on the worker."""
    return computer(pixels, region)
