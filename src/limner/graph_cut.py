"""The 3D graph cut: from heat maps of the sections to an organ in one piece.

Harada et al. 2019, with voxels that are no cubes. The energy of labels l, given the heat h in [0, 1] and the image x in
8-bit grey levels (RGB: Euclidean distance of colours), is

    E = sum over voxels |l_v - h_v| + gamma * sum over 6-neighbours a_vw |l_v - l_w| (exp(-(x_v - x_w)^2 / s^2) + delta)

with a_vw the area of the face between two voxels over the distance of their centres, scaled so that its geometric mean
in plane is 1. Of several organs with a heat h_l each, the first term is 1 - h_l(v), and |l_v - l_w| is 1 where labels
differ.

| what | function |
| --- | --- |
| E | `energy` |
| its minimum, exact for two labels | `cut`, with `limner.max_flow` |
| several organs by alpha-expansion (Boykov, Veksler, Zabih 2001) | `cut_labels` |
| volumes that do not fit: a narrow band (Lombaert et al. 2005) | `cut_coarse_to_fine` |

Capacities are whole numbers: a quantum is 1 / `LEVELS` of the energy of one voxel that goes against a heat of 1 (more
if gamma is above about 30). What that costs in energy is measured in docs/benchmarks.md.

All read heat, image and seeds section by section, so that these may be anything that is sliced like an array: numpy's
memmap, zarr, dask.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from limner.max_flow import LARGEST_CAPACITY, Network, empty_network, send, source_side

LEVELS = 1000
FEWEST_LEVELS = 50
Spacing: TypeAlias = tuple[float, float, float]
Array: TypeAlias = NDArray[Any]  # or anything that is sliced like one


@dataclass(frozen=True)
class CutOptions:
    """How neighbours hold together.

    Parameters
    ----------
    gamma : float
        Weight of the neighbours against the heat, 0 or more. 0: each voxel by itself.
    contrast : float
        s, above 0: grey levels. Neighbours that differ by much more hold together by `delta` alone.
    delta : float
        0 or more: what holds neighbours together however much they differ.

    Raises
    ------
    ValueError
        If one of them is out of its range.
    """

    gamma: float = 1.0
    contrast: float = 10.0
    delta: float = 0.1

    def __post_init__(self) -> None:
        for name, lowest in (("gamma", "0 or more"), ("contrast", "more than 0"), ("delta", "0 or more")):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and lowest != "0 or more"):
                raise ValueError(f"CutOptions(): {name} is {value}; give {lowest}")


class CoarseToFine(NamedTuple):
    """What `cut_coarse_to_fine` found.

    Parameters
    ----------
    labels : ndarray of bool
        Shape (Z, Y, X).
    energy : float
        Of the labels, at full size; that of the exact cut is at most as large.
    voxels : tuple of int
        How many voxels the solver held, at each level from the coarsest on.
    """

    labels: NDArray[np.bool_]
    energy: float
    voxels: tuple[int, ...]


def face_weights(spacing: Spacing) -> NDArray[np.float64]:
    """Face area over distance between neighbours along z, y, x, scaled to a geometric mean of 1 in plane.

    Parameters
    ----------
    spacing : tuple of float
        (z, y, x), mm.

    Returns
    -------
    ndarray of float64
        Shape (3,).

    Examples
    --------
    >>> face_weights((0.1, 0.05, 0.05))
    array([0.25, 1.  , 1.  ])
    """
    z, y, x = spacing
    return np.array([y * x / z**2, x / y, y / x])


def energy(
    labels: Array, heat: Array, image: Array, spacing: Spacing, options: CutOptions, seeds: Array | None = None
) -> float:
    """The energy that the cuts minimise.

    Parameters
    ----------
    labels : ndarray of bool or int
        Shape (Z, Y, X).
    heat : ndarray of float
        Shape (Z, Y, X): how likely each voxel is in the organ; or (L, Z, Y, X), one heat for each label, background
        first. In [0, 1].
    image : ndarray of uint8
        Shape (Z, Y, X) or (Z, Y, X, C), 8-bit grey levels.
    spacing : tuple of float
        Between voxel centres (z, y, x), mm.
    options : CutOptions
        How neighbours hold together.
    seeds : ndarray of bool, optional
        Shape (L, Z, Y, X), 2 labels for one organ: which voxels must have label l.

    Returns
    -------
    float
        Infinite where a seed has another label.

    Raises
    ------
    ValueError
        If shapes do not match, a heat is outside [0, 1], a voxel is a seed of two labels or a spacing is not above 0.

    Examples
    --------
    >>> heat, image = np.array([[[0.75, 0.25]]]), np.array([[[90, 90]]], np.uint8)
    >>> energy(np.array([[[1, 0]]]), heat, image, (1, 1, 1), CutOptions(gamma=2, delta=0))
    2.5
    """
    volume = _Volume("energy", heat, image, seeds)
    if labels.shape != volume.shape:
        raise ValueError(f"energy(): labels have shape {labels.shape}, the heat {volume.shape}; give one label a voxel")
    faces = options.gamma * _checked_faces("energy", spacing)
    total, above, image_above = 0.0, None, None
    for z in range(volume.shape[0]):
        here, section = labels[z].astype(np.uint8), volume.image_section(z)
        if (seed := volume.seed_section(z)) is not None and (here != seed)[seed >= 0].any():
            return math.inf
        total += float(volume.costs(z, here).sum(dtype=np.float64))
        total += faces[1] * _borders(here[1:], here[:-1], section[1:], section[:-1], options)
        total += faces[2] * _borders(here[:, 1:], here[:, :-1], section[:, 1:], section[:, :-1], options)
        if above is not None and image_above is not None:
            total += faces[0] * _borders(here, above, section, image_above, options)
        above, image_above = here, section
    return float(total)


def _borders(labels: Array, others: Array, image: Array, other_image: Array, options: CutOptions) -> float:
    """Sum of the neighbour term, without gamma and faces, over pairs whose labels differ."""
    apart = labels != others
    step = image[apart].astype(np.float64) - other_image[apart]
    return float((np.exp(-(step**2).sum(axis=-1) / options.contrast**2) + options.delta).sum())


def cut(
    heat: Array, image: Array, spacing: Spacing, options: CutOptions | None = None, seeds: Array | None = None
) -> NDArray[np.bool_]:
    """The labels of least energy, exact but for the quantum of the capacities.

    Needs about 40 bytes a voxel, the inputs apart. Two cores are better than one: slabs of sections are begun with in
    threads of their own, which changes nothing in the result.

    Parameters
    ----------
    heat : ndarray of float
        Shape (Z, Y, X): how likely each voxel is in the organ, in [0, 1].
    image : ndarray of uint8
        Shape (Z, Y, X) or (Z, Y, X, C), 8-bit grey levels.
    spacing : tuple of float
        Between voxel centres (z, y, x), mm.
    options : CutOptions, optional
        How neighbours hold together.
    seeds : ndarray of bool, optional
        Shape (2, Z, Y, X): voxels that must be background, and that must be organ.

    Returns
    -------
    ndarray of bool
        Shape (Z, Y, X), True in the organ; of several cuts of least energy the one with the smallest organ.

    Raises
    ------
    ValueError
        If shapes do not match, the image is not of 8 bit, a heat is outside [0, 1] or not a number, a voxel is a seed
        of both, a spacing is not above 0, or neighbours weigh so much that nothing is left of the heat.

    References
    ----------
    .. [1] Boykov and Kolmogorov 2004, https://doi.org/10.1109/TPAMI.2004.60

    Examples
    --------
    >>> heat = np.array([[[0.9, 0.9, 0.4, 0.9, 0.1, 0.1]]])
    >>> image = np.full(heat.shape, 100, np.uint8)
    >>> cut(heat, image, (0.05, 0.04, 0.04), CutOptions(gamma=0.3)).astype(int)
    array([[[1, 1, 1, 1, 0, 0]]])
    """
    volume = _Volume("cut", _one_organ("cut", heat), image, seeds)
    tables = _tables("cut", spacing, options or CutOptions(), volume)
    return _expand(volume, volume.seed_labels(), 1, tables).astype(bool)


def cut_labels(
    heats: Array, image: Array, spacing: Spacing, options: CutOptions | None = None, seeds: Array | None = None
) -> NDArray[np.uint8]:
    """Several organs: labels whose energy no expansion of one label lowers.

    Starts with background everywhere but on seeds, so that of two labels the first expansion is the exact cut.

    Parameters
    ----------
    heats : ndarray of float
        Shape (L, Z, Y, X): how likely each voxel has each label, background first, in [0, 1]; L from 2 to 255.
    image, spacing, options
        As for `cut`.
    seeds : ndarray of bool, optional
        Shape (L, Z, Y, X): voxels that must have label l.

    Returns
    -------
    ndarray of uint8
        Shape (Z, Y, X), labels 0 to L - 1; their energy is at most twice the least.

    Raises
    ------
    ValueError
        As for `cut`.

    References
    ----------
    .. [1] Boykov, Veksler and Zabih 2001, https://doi.org/10.1109/34.969114

    Examples
    --------
    >>> heats = np.array([[0.8, 0.1, 0.1], [0.1, 0.9, 0.2], [0.1, 0.0, 0.7]]).reshape(3, 1, 1, 3)
    >>> cut_labels(heats, np.array([[[0, 90, 200]]], np.uint8), (1, 1, 1))
    array([[[0, 1, 2]]], dtype=uint8)
    """
    options = options or CutOptions()
    if heats.ndim != 4 or not 2 <= len(heats) <= 255:
        raise ValueError(f"cut_labels(): heats have shape {heats.shape}; give (L, Z, Y, X), L from 2 to 255")
    volume = _Volume("cut_labels", heats, image, seeds)
    tables = _tables("cut_labels", spacing, options, volume)
    labels = volume.seed_labels()
    least, unchanged = energy(labels, heats, image, spacing, options), 0
    for alpha in cycle([*range(1, len(heats)), 0]):
        expanded = _expand(volume, labels, alpha, tables)
        found = energy(expanded, heats, image, spacing, options)
        lower = found < least
        labels, least = (expanded, found) if lower else (labels, least)
        unchanged = 0 if lower else unchanged + 1
        if unchanged == len(heats):
            break
    return labels


def cut_coarse_to_fine(
    heat: Array,
    image: Array,
    spacing: Spacing,
    options: CutOptions | None = None,
    seeds: Array | None = None,
    max_voxels: int = 20_000_000,
    band: int = 1,
) -> CoarseToFine:
    """The cut of a volume that does not fit into memory: coarse first, then near its surface at ever finer levels.

    Each level halves the spacing: in plane, and along z once voxels are no longer higher than wide. Heat and image of a
    coarse voxel are means. Only voxels in the band are in the solver; those outside keep the label of the coarse voxel
    that they lie in, and hold to their neighbours in the band.

    Parameters
    ----------
    heat, image, spacing, options, seeds
        As for `cut`. Read section by section, once a level.
    max_voxels : int
        Voxels of the coarsest level, at most.
    band : int
        Half the width of the band in coarse voxels: 1 takes those on either side of the coarse surface, with corners.

    Returns
    -------
    CoarseToFine
        Labels, their energy, and how many voxels were in the solver.

    Raises
    ------
    ValueError
        As for `cut`; and if `max_voxels` or `band` are less than 1.

    References
    ----------
    .. [1] Lombaert et al. 2005, https://doi.org/10.1109/ICCV.2005.81

    Examples
    --------
    >>> z, y, x = np.indices((16, 16, 16)) - 8
    >>> ball = np.where(z**2 + y**2 + x**2 < 36, 0.9, 0.1)
    >>> image = np.full(ball.shape, 90, np.uint8)
    >>> found = cut_coarse_to_fine(ball, image, (1, 1, 1), CutOptions(gamma=0.1), max_voxels=600)
    >>> bool((found.labels == (ball > 0.5)).all()), found.voxels[0]
    (True, 512)
    """
    if max_voxels < 1 or band < 1:
        raise ValueError(f"cut_coarse_to_fine(): max_voxels is {max_voxels}, band {band}; give 1 or more")
    options = options or CutOptions()
    volume = _Volume("cut_coarse_to_fine", _one_organ("cut_coarse_to_fine", heat), image, seeds)
    levels = _levels(volume, spacing, max_voxels)
    tables = [_tables("cut_coarse_to_fine", spacing, options, level) for level in levels]
    labels, voxels = _expand(levels[0], levels[0].seed_labels(), 1, tables[0]), [math.prod(levels[0].shape)]
    for coarse, level, table in zip(levels, levels[1:], tables[1:], strict=False):
        start, inside = _narrow_band(level, labels, coarse, band)
        labels = _expand(level, start, 1, table, inside)
        voxels.append(inside.voxels)
    return CoarseToFine(labels.astype(bool), energy(labels, heat, image, spacing, options, seeds), tuple(voxels))


def _one_organ(function: str, heat: Array) -> Array:
    if heat.ndim != 3:
        raise ValueError(f"{function}(): heat has shape {heat.shape}; give (Z, Y, X)")
    return heat


def _checked_faces(function: str, spacing: Spacing) -> NDArray[np.float64]:
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"{function}(): spacing is {spacing}; give three lengths (z, y, x) above 0, in mm")
    return face_weights(spacing)


@dataclass(frozen=True)
class _Volume:
    """What the labels are found from, section by section, in blocks of `factor` voxels."""

    function: str
    heat: Array
    image: Array
    seeds: Array | None
    factor: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        full, labels = self.heat.shape[-3:], 2 if self.heat.ndim == 3 else self.heat.shape[0]
        if self.image.ndim not in (3, 4) or self.image.shape[:3] != full:
            self.refuse(f"image has shape {self.image.shape}, heat {self.heat.shape}; give both on one grid")
        if self.image.dtype != np.uint8:
            self.refuse(f"image is of {self.image.dtype}; give 8-bit grey levels (uint8)")
        if self.seeds is not None and (self.seeds.shape != (labels, *full) or self.seeds.dtype != bool):
            self.refuse(f"seeds are {self.seeds.dtype} of shape {self.seeds.shape}; give bool of {(labels, *full)}")

    def refuse(self, why: str) -> None:
        raise ValueError(f"{self.function}(): {why}")

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = (-(-n // f) for n, f in zip(self.heat.shape[-3:], self.factor, strict=True))
        return z, y, x

    def blocks(self, z: int) -> slice:
        return slice(z * self.factor[0], (z + 1) * self.factor[0])

    def heat_section(self, z: int) -> NDArray[np.float32]:
        """(Y, X) or (L, Y, X)."""
        found = np.asarray(self.heat[..., self.blocks(z), :, :], dtype=np.float32)
        if not (found.min() >= 0 and found.max() <= 1):
            self.refuse(f"heat of section {z * self.factor[0]} is not within [0, 1] everywhere; give probabilities")
        return _means(found, self.factor)

    def image_section(self, z: int) -> NDArray[np.uint8]:
        """(Y, X, C)."""
        found = np.asarray(self.image[self.blocks(z)])
        channels = found[None] if found.ndim == 3 else np.moveaxis(found, -1, 0)
        if self.factor != (1, 1, 1):
            channels = np.rint(_means(channels.astype(np.float32), self.factor)).astype(np.uint8)[:, None]
        return np.ascontiguousarray(np.moveaxis(channels[:, 0], 0, -1))

    def seed_section(self, z: int) -> NDArray[np.int16] | None:
        """The label that a voxel must have, (Y, X); -1: any. Of a block that has seeds of several, any."""
        if self.seeds is None:
            return None
        found = np.asarray(self.seeds[:, self.blocks(z)])
        if (found.sum(axis=0) > 1).any():
            self.refuse(f"on section {z * self.factor[0]} a voxel is a seed of two labels; keep one")
        marked = _means(found.astype(np.float32), self.factor) > 0
        return np.where(marked.sum(axis=0) == 1, marked.argmax(axis=0), -1).astype(np.int16)

    def seed_labels(self) -> NDArray[np.uint8]:
        """Background but on seeds, (Z, Y, X)."""
        labels = np.zeros(self.shape, np.uint8)
        for z in range(self.shape[0]):
            if (seed := self.seed_section(z)) is not None:
                labels[z] = np.maximum(seed, 0)
        return labels

    def costs(self, z: int, labels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What labels (Y, X) cost each voxel of a section, its neighbours apart."""
        return _costs(self.heat_section(z), labels)

    def pulls(self, z: int, labels: NDArray[np.uint8], alpha: int) -> NDArray[np.float32]:
        """What each voxel of a section gains, its neighbours apart, by taking the label alpha; a seed: -inf."""
        heat, seed = self.heat_section(z), self.seed_section(z)
        pulls = _costs(heat, labels) - _costs(heat, np.full_like(labels, alpha))
        return pulls if seed is None else np.where(seed >= 0, np.float32(-np.inf), pulls)


def _costs(heat: NDArray[np.float32], labels: NDArray[np.uint8]) -> NDArray[np.float32]:
    if heat.ndim == 2:
        return np.where(labels, 1 - heat, heat)
    return np.asarray(1 - np.take_along_axis(heat, labels[None].astype(np.intp), axis=0)[0])


def _means(stack: NDArray[np.float32], factor: tuple[int, int, int]) -> NDArray[np.float32]:
    """Means over blocks, the last ones as wide as they are: (..., factor of z or less, Y, X) to (..., Y, X)."""
    if factor == (1, 1, 1):
        return stack[..., 0, :, :]
    section = stack.mean(axis=-3)
    short = [(0, -n % f) for n, f in zip(section.shape[-2:], factor[1:], strict=True)]
    section = np.pad(section, [(0, 0)] * (section.ndim - 2) + short, mode="edge")
    y, x = (n // f for n, f in zip(section.shape[-2:], factor[1:], strict=True))
    return section.reshape(*section.shape[:-2], y, factor[1], x, factor[2]).mean(axis=(-3, -1))


class _Tables(NamedTuple):
    """Capacities between neighbours along z, y, x by squared difference of grey levels, and the quantum's inverse."""

    capacities: NDArray[np.uint16]  # (3, D)
    scale: float


def _tables(function: str, spacing: Spacing, options: CutOptions, volume: _Volume) -> _Tables:
    faces = options.gamma * _checked_faces(function, spacing) / np.asarray(volume.factor)
    largest = float(faces.max()) * (1 + options.delta)
    scale = min(LEVELS, LARGEST_CAPACITY / largest) if largest > 0 else LEVELS
    if scale < FEWEST_LEVELS:
        volume.refuse(
            f"neighbours weigh up to {largest:.0f} times a voxel's heat (gamma {options.gamma}, spacing {spacing} mm); "
            f"lower gamma so that it is at most {LARGEST_CAPACITY // FEWEST_LEVELS}"
        )
    channels = 1 if volume.image.ndim == 3 else volume.image.shape[3]
    alike = np.exp(-np.arange(255**2 * channels + 1) / options.contrast**2)
    return _Tables(np.rint(scale * faces[:, None] * (alike + options.delta)).astype(np.uint16), scale)


class _Band(NamedTuple):
    """The voxels to be solved, as blocks of `step` of them."""

    blocks: NDArray[np.bool_]  # on the coarse grid
    step: tuple[int, ...]
    shape: tuple[int, int, int]  # of the fine grid

    def section(self, z: int) -> NDArray[np.bool_]:
        return np.asarray(self.blocks[z // self.step[0]][np.ix_(*_inside(self.shape[1:], self.step[1:]))])

    def numbers(self) -> Iterator[Array | None]:
        """Of the nodes of each section, -1 outside the band; None where it is more than a section away."""
        wanted = np.asarray(self.blocks.any(axis=(1, 2)))[_inside(self.shape[:1], self.step[:1])[0]]
        begin = 0
        for z, near in enumerate(ndimage.binary_dilation(wanted, np.ones(3))):
            inside = self.section(z)
            end = begin + int(np.count_nonzero(inside))
            number = np.full(inside.shape, -1, np.int32)
            number[inside] = np.arange(begin, end, dtype=np.int32)
            begin = end
            yield number if near else None

    @property
    def voxels(self) -> int:
        return sum(int(np.count_nonzero(self.section(z))) for z in range(self.shape[0]))


def _inside(shape: tuple[int, ...], step: tuple[int, ...]) -> list[NDArray[np.intp]]:
    """The block that each voxel lies in, along each axis."""
    return [np.arange(n) // s for n, s in zip(shape, step, strict=True)]


def _levels(volume: _Volume, spacing: Spacing, max_voxels: int) -> list[_Volume]:
    """From the coarsest to the volume itself."""
    levels = [volume]
    while math.prod(levels[0].shape) > max_voxels:
        z, y, x = levels[0].factor
        flat = spacing[0] * z < 1.5 * math.sqrt(spacing[1] * y * spacing[2] * x)
        levels.insert(0, replace(volume, factor=(2 * z if flat else z, 2 * y, 2 * x)))
    return levels


def _narrow_band(
    volume: _Volume, coarse: NDArray[np.uint8], coarse_volume: _Volume, width: int
) -> tuple[NDArray[np.uint8], _Band]:
    """Labels carried down from the coarse level, background in the band but on seeds; and the band."""
    step = tuple(c // f for c, f in zip(coarse_volume.factor, volume.factor, strict=True))
    labels = coarse[np.ix_(*_inside(volume.shape, step))]
    size = 2 * width + 1
    near = ndimage.maximum_filter(coarse, size) != ndimage.minimum_filter(coarse, size)
    if volume.seeds is not None:
        near |= ndimage.maximum_filter(_contradicted(volume, labels, coarse.shape, step), size)
    band = _Band(near, step, volume.shape)
    for z in range(volume.shape[0]):
        labels[z][band.section(z)] = 0
        if (seed := volume.seed_section(z)) is not None:
            labels[z] = np.where(seed >= 0, seed, labels[z])
    return labels, band


def _contradicted(
    volume: _Volume, labels: NDArray[np.uint8], coarse_shape: tuple[int, ...], step: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Coarse voxels that hold a seed of the other label."""
    found = np.zeros(coarse_shape, bool)
    for z in range(volume.shape[0]):
        seed = volume.seed_section(z)
        assert seed is not None
        y, x = np.nonzero((seed >= 0) & (seed != labels[z]))
        found[z // step[0], y // step[1], x // step[2]] = True
    return found


SEED = 2**24  # more than all neighbours together can weigh
THINNEST_SLAB = 16  # sections to a thread, at least
_Joined: TypeAlias = tuple[Array, Array, Array]  # numbers of nodes, labels, image of a section


def _expand(
    volume: _Volume, labels: NDArray[np.uint8], alpha: int, tables: _Tables, band: _Band | None = None
) -> NDArray[np.uint8]:
    """The best of all labels in which voxels keep theirs or take alpha (Boykov, Veksler, Zabih 2001, section 5)."""
    reached = source_side(_network(volume, labels, alpha, tables, band))
    if band is None:
        idle = volume.shape[1] * volume.shape[2]
        return np.where(reached[idle:-idle].reshape(volume.shape), np.uint8(alpha), labels)
    expanded, begin = labels.copy(), 0
    for z in range(volume.shape[0]):
        inside = band.section(z)
        end = begin + int(np.count_nonzero(inside))
        expanded[z][inside] = np.where(reached[begin:end], alpha, labels[z][inside])
        begin = end
    return expanded


def _network(volume: _Volume, labels: NDArray[np.uint8], alpha: int, tables: _Tables, band: _Band | None) -> Network:
    """The expansion as a cut: on the source's side are the voxels that take alpha.

    Slabs of sections are built, and what flows within them is sent, in threads of their own; then they are joined.
    """
    network = _empty_network(volume, band)
    depth, y, x = volume.shape
    threads = 1 if band is not None else max(1, min(os.cpu_count() or 1, depth // THINNEST_SLAB))
    bounds = [depth * i // threads for i in range(threads + 1)]

    def build(begin: int, end: int) -> tuple[_Joined | None, _Joined | None]:
        first = above = None
        for z, section in enumerate(_sections(volume, labels, alpha, tables.scale, band, range(begin, end)), begin):
            if section is not None:
                _load(network.nodes, section[0], section[3])
                _join(network, above, section[:3], tables, alpha)
            above = None if section is None else section[:3]
            first = above if z == begin else first
        if threads > 1:
            send(network, (begin + 1) * y * x, (end + 1) * y * x)
        return first, above

    with ThreadPoolExecutor(threads) as pool:
        slabs = list(pool.map(build, bounds[:-1], bounds[1:]))
    for (_, above), (below, _) in pairwise(slabs):
        _join_neighbours(*network[:2], above, below, 1, tables.capacities[0], alpha)
    return network


def _join(network: Network, above: _Joined | None, here: _Joined, tables: _Tables, alpha: int) -> None:
    """Join the voxels of a section to each other and to those of the section above."""
    for d, first in ((1, above), (3, here), (5, here)):
        if first is not None:
            _join_neighbours(*network[:2], first, here, d, tables.capacities[d // 2], alpha)


def _empty_network(volume: _Volume, band: _Band | None) -> Network:
    """Nodes for all voxels, an idle section on either side; or for those in the band, an idle one at the end."""
    _, y, x = volume.shape
    nodes = math.prod(volume.shape) + 2 * y * x if band is None else band.voxels + 1
    if nodes > 2**31 - 1:
        volume.refuse(f"{nodes} voxels are more than one cut can hold; use cut_coarse_to_fine()")
    if band is None:
        return empty_network(nodes, np.array([-y * x, y * x, -x, x, -1, 1]))
    return empty_network(nodes, np.full((nodes, 6), nodes - 1, np.int32))


def _sections(
    volume: _Volume, labels: NDArray[np.uint8], alpha: int, scale: float, band: _Band | None, which: range
) -> Iterator[tuple[Array, Array, Array, Array] | None]:
    """Numbers of the voxels' nodes (-1: keeps its label), labels, image (Y, X, C) and pulls in quanta, else (Y, X).

    None for a section that has no voxel in the band and does not touch one that has.
    """
    numbers = _numbers(volume.shape) if band is None else band.numbers()
    for z, number in zip(range(volume.shape[0]), numbers, strict=True):
        if z not in which:
            continue
        if number is None:
            yield None
            continue
        pulls = np.clip(np.rint(scale * volume.pulls(z, labels[z], alpha)), -SEED, SEED).astype(np.int32)
        yield number, labels[z], volume.image_section(z), pulls


def _numbers(shape: tuple[int, int, int]) -> Iterator[Array]:
    """Of the nodes of each section when all voxels have one; the first section's follow on an idle section."""
    plane = np.arange(shape[1] * shape[2], dtype=np.int32).reshape(shape[1:])
    return (plane + np.int32((z + 1) * plane.size) for z in range(shape[0]))


@njit(cache=True, nogil=True)
def _load(nodes, number, pulls):  # type: ignore[no-untyped-def]
    """Put a section's voxels into the network."""
    for y in range(number.shape[0]):
        for x in range(number.shape[1]):
            if number[y, x] >= 0:
                nodes[number[y, x]].excess += pulls[y, x]


@njit(cache=True, nogil=True)
def _join_neighbours(nodes, steps, first, second, d, weights, alpha):  # type: ignore[no-untyped-def]
    """Join the neighbours in direction d: from one section to the next along z (1), within one along y (3) or x (5)."""
    number, labels, image = first
    next_number, next_labels, next_image = second
    down, right = int(d == 3), int(d == 5)
    for y in range(number.shape[0] - down):
        for x in range(number.shape[1] - right):
            v, u = y + down, x + right
            i, j = number[y, x], next_number[v, u]
            label, next_label = labels[y, x], next_labels[v, u]
            weight = np.int64(weights[_unlike(image, next_image, y, x, v, u)])
            free, next_free = i >= 0 and label != alpha, j >= 0 and next_label != alpha
            if free and next_free:  # Table 1 of the paper
                forth = weight if label == next_label else 0
                nodes[j].excess += weight - forth
                flow = _at_once(np.int64(nodes[i].excess), np.int64(nodes[j].excess), forth, weight)
                nodes[i].excess -= flow
                nodes[j].excess += flow
                nodes[i].capacity[d] = forth - flow
                nodes[j].capacity[d ^ 1] = weight + flow
                _link(steps, i, j, d)
            elif free:
                nodes[i].excess += _towards(next_label, label, alpha) * weight
            elif next_free:
                nodes[j].excess += _towards(label, next_label, alpha) * weight


@njit(cache=True, nogil=True)
def _at_once(excess, next_excess, forth, back):  # type: ignore[no-untyped-def]
    """What flows between two neighbours without a detour: most of all flow when heat is noisy."""
    forwards = min(max(excess, 0), max(-next_excess, 0), forth)
    return forwards - min(max(-excess, 0), max(next_excess, 0), back)


@njit(cache=True, nogil=True)
def _unlike(first, second, y, x, v, u):  # type: ignore[no-untyped-def]
    """Squared difference of grey levels, summed over channels."""
    total = np.int64(0)
    for c in range(first.shape[2]):
        step = np.int64(first[y, x, c]) - np.int64(second[v, u, c])
        total += step * step
    return total


@njit(cache=True, nogil=True)
def _link(steps, v, w, d):  # type: ignore[no-untyped-def]
    """Write down who is neighbour to whom where it does not follow from the numbers."""
    if steps.ndim == 2:
        steps[v, d], steps[w, d ^ 1] = w, v


@njit(cache=True, nogil=True)
def _towards(fixed, free, alpha):  # type: ignore[no-untyped-def]
    """Whether a neighbour that keeps its label pulls towards alpha (1), away from it (-1) or neither."""
    if fixed == alpha:
        return 1
    return -1 if fixed == free else 0
