"""Diffeomorphic registration of sections: a stationary velocity field found by descent on local correlation.

``register`` is the whole method: an affine start, then on images of growing size a velocity field whose exponential
(scaling and squaring) warps the moving image onto the fixed one. All pairs of a batch are solved together.

References
----------
.. [1] Arsigny et al. 2006, "A log-Euclidean framework for statistics on diffeomorphisms",
   https://doi.org/10.1007/11866565_113 (scaling and squaring)
.. [2] Modat et al. 2012, "Parametric non-rigid registration using a stationary velocity field",
   https://doi.org/10.1109/MMBIA.2012.6164745
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.losses.similarity import global_correlation, local_correlation_loss
from limner.registration import affine
from limner.registration.warp import (
    Spacing2D,
    compose,
    covers,
    jacobian_determinants,
    resize_displacement,
    warp,
)

Start = Literal["none", "rigid", "affine"]


@dataclass(frozen=True)
class Options:
    """How the velocity field is sought.

    Parameters
    ----------
    finest_pixels : int
        The longer side of the images at the finest level. 68 is a quarter of the mouse sections on which registration
        was measured; twice that gained nothing.
    levels : int
        Number of levels, each half as large as the next finer one.
    steps : int
        Adam steps at each level.
    step_size : float
        Adam's step in pixels of the level, before smoothing.
    window : int
        Side of the box of local correlation in pixels of the level.
    stiffness : float
        Weight of the mean squared gradient of the velocity field beside local correlation. Without it neighbouring
        sections follow each other's texture: chained over 10 sections that lost .01 accuracy, with 10 it gained .01.
    start : {'none', 'rigid', 'affine'}
        What is sought before the velocity field.
    max_angle : float
        Largest rotation the start tries, in degrees.
    narrowing : int
        By how many pixels the window is narrower with each coarser level, even.
    noise_variance : float
        As for `limner.losses.similarity.local_correlation`: contrast below it does not count.
    squarings : int
        Of the exponential while the field is sought; the result has more.
    last_steps : int
        Adam steps at a further level, twice as fine as `finest_pixels`; its window is wider by `narrowing`.
    """

    finest_pixels: int = 68
    levels: int = 2
    steps: int = 40
    step_size: float = 0.2
    window: int = 9
    stiffness: float = 10.0
    start: Start = "affine"
    max_angle: float = 42.0
    narrowing: int = 0
    noise_variance: float = 1e-3
    squarings: int = 5
    last_steps: int = 0

    @classmethod
    def direct(cls) -> Options:
        """For single pairs of sections far apart, of which no chain is made.

        A coarser and a finer level, less stiffness, and fainter contrast counts. Windows grow with the level by less
        than pixels shrink: so wide a window on the coarsest images would blur what is to be found there.
        """
        return cls(levels=3, steps=30, last_steps=15, narrowing=2, stiffness=1.0, noise_variance=1e-4, squarings=4)

    def stages(self, shape: tuple[int, int]) -> list[tuple[float, int, int]]:
        """Factor by which sections of `shape` (Y, X) are reduced, window and steps of each level, coarse to fine."""
        finest = max(1.0, max(shape) / self.finest_pixels)
        coarse = [
            (finest * 2**level, max(3, self.window - self.narrowing * level), self.steps)
            for level in range(self.levels - 1, 0, -1)
        ]
        # a level whose shorter side is under two windows of local correlation teaches nothing
        found = [stage for stage in coarse if min(shape) / stage[0] >= 2 * stage[1] - 2]
        found.append((finest, self.window, self.steps))
        if self.last_steps and finest > 1:
            found.append((max(1.0, finest / 2), self.window + self.narrowing, self.last_steps))
        return found


@dataclass(frozen=True)
class Registration:
    """What carries moving images onto fixed ones, and back.

    Parameters
    ----------
    displacement : Tensor
        Shape (B, 2, Y, X), mm: from each pixel of the fixed image to its match in the moving image.
    inverse_displacement : Tensor
        The same from the moving image to the fixed one.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    matched : tuple of bool
        For each pair whether it could be registered; where False the displacement is zero.
    """

    displacement: Tensor
    inverse_displacement: Tensor
    spacing: Spacing2D
    matched: tuple[bool, ...]

    def warp(self, image: NDArray[Any] | Tensor) -> NDArray[np.float32]:
        """Carry moving images onto the fixed ones (linear; border continues).

        Shape (B, Y, X) or (B, Y, X, C), or (Y, X) where there is one pair; the same comes back.
        """
        return self._apply(np.asarray(image, dtype=np.float32), "bilinear")

    def warp_labels(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Carry labels, shape (B, Y, X) or (Y, X), onto the fixed images (nearest pixel); 0 where nothing matches."""
        values, places = np.unique(labels, return_inverse=True)  # float32 would round labels above 2**24
        warped = self._apply(places.reshape(labels.shape).astype(np.float32), "nearest")
        covered = self.coverage().reshape(labels.shape)
        return np.where(covered, values[warped.astype(int)], 0).astype(labels.dtype)

    def coverage(self) -> NDArray[np.bool_]:
        """Which pixels of the fixed images have their match inside the moving image, shape (B, Y, X)."""
        return covers(self.displacement, self.spacing)[:, 0].cpu().numpy()

    def inverse(self) -> Registration:
        """The registration that carries the fixed images onto the moving ones."""
        return Registration(self.inverse_displacement, self.displacement, self.spacing, self.matched)

    def jacobian_determinants(self) -> NDArray[np.float32]:
        """Local change of area, shape (B, Y, X); <= 0 would be a fold."""
        return jacobian_determinants(self.displacement, self.spacing).cpu().numpy()

    def _apply(self, image: NDArray[np.float32], mode: Literal["bilinear", "nearest"]) -> NDArray[np.float32]:
        expected = (len(self.displacement), *self.displacement.shape[2:])
        single = image.ndim == 2 and (1, *image.shape) == expected
        if image.shape[:3] != expected and not single:
            raise ValueError(
                f"Registration.warp(): images have shape {image.shape}, the registration {expected} (pairs, y, x)"
            )
        channels = torch.from_numpy(image.reshape(*expected, -1)).permute(0, 3, 1, 2)
        moved = warp(channels.to(self.displacement.device), self.displacement, self.spacing, mode)
        return moved.permute(0, 2, 3, 1).reshape(image.shape).cpu().numpy()


def exponential(velocity: Tensor, spacing: Spacing2D, squarings: int = 6) -> Tensor:
    """Displacement reached by following a velocity field for unit time, by scaling and squaring.

    Parameters
    ----------
    velocity : Tensor
        Shape (B, 2, Y, X), mm.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    squarings : int
        The field is divided by 2 to this power, then composed with itself so often.

    Returns
    -------
    Tensor
        Displacement, shape (B, 2, Y, X), mm.
    """
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = compose(displacement, displacement, spacing)
    return displacement


def smooth(field: Tensor, window: int = 5) -> Tensor:
    """Two box filters (about a Gaussian of ``sqrt((window**2 - 1) / 6)`` pixels), zero beyond the border."""
    (height, width), like = field.shape[2:], (field.device, field.dtype)
    return _twice_box(height, window, like) @ field @ _twice_box(width, window, like).T


@lru_cache(maxsize=64)
def _twice_box(n: int, window: int, like: tuple[torch.device, torch.dtype]) -> Tensor:
    """Matrix (n, n) of two box filters along an axis of `n` pixels with zeros beyond; see `similarity.box_mean`."""
    with torch.inference_mode(mode=False):
        places = torch.arange(n, device=like[0])
        box = ((places[:, None] - places).abs() <= window // 2).to(like[1]) / window
        return box @ box


def _resized(image: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.interpolate(image, size=shape, mode="bilinear", align_corners=False, antialias=True)


def _level_shape(shape: tuple[int, int], shrink: float) -> tuple[int, int]:
    return max(1, round(shape[0] / shrink)), max(1, round(shape[1] / shrink))


def _level_spacing(shape: tuple[int, int], spacing: Spacing2D, level: tuple[int, int]) -> Spacing2D:
    return spacing[0] * shape[0] / level[0], spacing[1] * shape[1] / level[1]


def _start(fixed: Tensor, moving: Tensor, spacing: Spacing2D, start: Start, max_angle: float) -> Tensor:
    """Rigid or affine transforms, kept only where they raise the correlation over the identity."""
    matrix = affine.identity(len(fixed), fixed.device)
    if start == "none":
        return matrix
    shape = (fixed.shape[2], fixed.shape[3])
    level = _level_shape(shape, max(1.0, max(shape) / 64))
    step = _level_spacing(shape, spacing, level)
    small_fixed, small_moving = _resized(fixed, level), _resized(moving, level)
    found = affine.search_rigid(small_fixed, small_moving, step, max_angle)
    everywhere = torch.ones_like(small_fixed[:, :1])

    def score(candidate: Tensor) -> Tensor:
        moved = warp(small_moving, affine.to_displacement(candidate, level, step), step)
        return global_correlation(small_fixed, moved, everywhere)

    # the search must win clearly: on sections that already lie alike it would only add its own step size
    gain = score(found) - score(matrix)
    matrix = torch.where((gain > 0.02)[:, None, None], found, matrix)
    return affine.refine(small_fixed, small_moving, everywhere, step, matrix, rigid=start == "rigid")


def roughness(velocity: Tensor, of_size: float = 0.01) -> Tensor:
    """Mean squared gradient of a field in pixels, and a little of its size so that empty regions stay; (B,)."""
    along_y, along_x = velocity.diff(dim=2).square(), velocity.diff(dim=3).square()
    size = velocity.square().mean(dim=(1, 2, 3))
    return along_y.mean(dim=(1, 2, 3)) + along_x.mean(dim=(1, 2, 3)) + of_size * size


def _velocity(fixed: Tensor, moving: Tensor, weights: Tensor, spacing: Spacing2D, options: Options) -> Tensor:
    """Descend on local correlation and roughness, level by level; velocity at the finest level's size, mm."""
    shape = (fixed.shape[2], fixed.shape[3])
    velocity = fixed.new_zeros(len(fixed), 2, 1, 1)
    for shrink, window, steps in options.stages(shape):
        level = _level_shape(shape, shrink)
        step_mm = _level_spacing(shape, spacing, level)
        f, m, w = (_resized(x, level) for x in (fixed, moving, weights))
        unit = f.new_tensor(step_mm).view(1, 2, 1, 1)
        base = resize_displacement(velocity, level) / unit
        free = torch.zeros_like(base, requires_grad=True)
        optimiser = torch.optim.Adam([free], lr=options.step_size)
        for _ in range(steps):
            pixels = base + smooth(free)
            moved = warp(m, exponential(pixels * unit, step_mm, options.squarings), step_mm)
            unlike = local_correlation_loss(f, moved, w, window, options.noise_variance)
            loss = unlike + options.stiffness * roughness(pixels)
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        velocity = ((base + smooth(free)) * unit).detach()
    return velocity


def _as_batch(image: NDArray[Any] | Tensor, name: str) -> Tensor:
    # unlike torch, numpy also takes lists and unsigned 16-bit integers
    tensor = (image if isinstance(image, Tensor) else torch.from_numpy(np.asarray(image, dtype=np.float32))).float()
    if tensor.ndim == 3 and tensor.shape[2] != 3:
        return tensor[:, None]
    if tensor.ndim == 4 and tensor.shape[3] == 3:
        return tensor.permute(0, 3, 1, 2)
    raise ValueError(
        f"register(): {name} has shape {tuple(tensor.shape)}; give (y, x), (pairs, y, x) or, for RGB, (pairs, y, x, 3)"
    )


def in_unit_range(image: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from the background (median of the border) scaled to [0, 1], and which images can be used.

    Those that are flat or hold NaN or infinity cannot; they become 0.
    """
    border = torch.cat([image[:, :, 0], image[:, :, -1], image[..., 0], image[..., -1]], dim=2)
    foreground = (image - border.median(dim=2).values[:, :, None, None]).abs()
    values = foreground.flatten(1)
    scale = values.kthvalue(math.ceil(0.995 * values.shape[1]), dim=1).values  # torch.quantile takes 2**24 values only
    scale = torch.where(scale > 0, scale, foreground.flatten(1).amax(1))
    usable = (scale > 1e-6) & values.isfinite().all(dim=1)
    scaled = (foreground / scale.clamp_min(1e-6)[:, None, None, None]).clamp(0, 1)
    return torch.where(usable[:, None, None, None], scaled, 0.0), usable  # grid_sample crashes on NaN


def register(
    fixed: NDArray[Any] | Tensor,
    moving: NDArray[Any] | Tensor,
    spacing: Spacing2D,
    *,
    options: Options | None = None,
    device: str | torch.device = "cpu",
) -> Registration:
    """Find the diffeomorphism that carries each moving section onto its fixed section.

    Parameters
    ----------
    fixed, moving : array
        Shape (Y, X) for one pair, (B, Y, X) for grey or (B, Y, X, 3) for RGB pairs, any intensity scale.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    options : Options, optional
        The start, levels, steps and windows.
    device : str
        Where to compute, 'cpu' or 'cuda'.

    Returns
    -------
    Registration
        An empty or constant section, or one with NaN, gets the identity, a warning, and False in `matched`.

    Raises
    ------
    ValueError
        If shapes differ or the spacing is not positive.

    Examples
    --------
    >>> image = np.zeros((64, 64)); image[20:40, 24:44] = 1
    >>> result = register(image, np.roll(image, 3, axis=1), spacing=(0.1, 0.1))
    >>> round(float(result.displacement[0, 1, 30, 34]), 1)  # 3 pixels of 0.1 mm
    0.3
    """
    fixed, moving = (x[None] if x.ndim == 2 else x for x in (fixed, moving))
    f, m = _as_batch(fixed, "fixed").to(device), _as_batch(moving, "moving").to(device)
    if f.shape != m.shape:
        raise ValueError(
            f"register(): fixed is {tuple(f.shape)}, moving {tuple(m.shape)} (B, C, Y, X); pad to one size"
        )
    if not all(s > 0 for s in spacing):
        raise ValueError(f"register(): spacing is {spacing} mm (y, x); both must be above 0")
    options = options or Options()
    shape = (f.shape[2], f.shape[3])
    (f, usable_f), (m, usable_m) = in_unit_range(f), in_unit_range(m)
    usable = usable_f & usable_m
    if not bool(usable.all()):
        pairs = np.flatnonzero(~usable.cpu().numpy()).tolist()
        warnings.warn(
            f"register(): pairs {pairs} hold an empty or constant section, or NaN; they stay in place", stacklevel=2
        )
    weights = _foreground_weights(f, m)
    matrix = _start(f, m, spacing, options.start, options.max_angle)
    matrix = torch.where(usable[:, None, None], matrix, affine.identity(len(f), f.device))
    linear = affine.to_displacement(matrix, shape, spacing)
    placed = warp(m, linear, spacing)
    velocity = _velocity(f, placed, weights, spacing, options) * usable[:, None, None, None]
    velocity = resize_displacement(velocity, shape)
    # p -> q = exp(v)(p) in the placed image -> A q in the moving one; back: q = A^-1 r, p = exp(-v)(q)
    forward, backward = exponential(velocity, spacing), exponential(-velocity, spacing)
    inverse_linear = affine.to_displacement(affine.invert(matrix), shape, spacing)
    return Registration(
        _then_affine(forward, matrix, spacing),
        compose(inverse_linear, backward, spacing),
        spacing,
        tuple(usable.tolist()),
    )


def _then_affine(displacement: Tensor, matrix: Tensor, spacing: Spacing2D) -> Tensor:
    """Follow a displacement, then an affine transform (exact also where the displacement leaves the grid)."""
    shape = (displacement.shape[2], displacement.shape[3])
    shift = matrix[:, :, 2, None, None]
    bend = matrix[:, :, :2] - torch.eye(2, device=matrix.device)
    points = affine.centred_points(shape, spacing, matrix.device) + displacement
    return displacement + torch.einsum("bij,bjyx->biyx", bend, points) + shift


def _foreground_weights(fixed: Tensor, moving: Tensor, dilation: int = 9) -> Tensor:
    """1 where either image stands out from its background, and a rim around, shape (B, 1, Y, X)."""
    either = torch.maximum(fixed, moving).amax(dim=1, keepdim=True)
    return F.max_pool2d((either > 0.1).float(), dilation, stride=1, padding=dilation // 2)
