"""What registered images leave between two labelled sections, found from the labels themselves.

Images carry one section's labels onto the next only so well: borders that do not show stay apart. Where both sections
are labelled the rest is known, and a velocity field that carries the one's signed distances onto the other's says how
structures moved, grew and shrank on the way. Half of it from either side is where they meet.

References
----------
.. [1] Arsigny et al. 2006, "A log-Euclidean framework for statistics on diffeomorphisms",
   https://doi.org/10.1007/11866565_113: the field and its fractions
.. [2] Johnson and Lindenstrauss 1984: few random sums of many maps keep the distances between points
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from limner.registration.velocity_field import exponential, roughness, smooth
from limner.registration.warp import Spacing2D, resize_displacement, warp

SQUARINGS = 4
OF_SIZE = 0.001  # of the field's own size beside its gradient: structures may move far


@dataclass(frozen=True)
class Options:
    """How the velocity field is sought.

    Parameters
    ----------
    pixels : int
        The longer side of the maps it is sought on, after maps of half that size.
    steps : int
        Adam steps at each of the two sizes.
    step_size : float
        Adam's step in these pixels, before smoothing.
    stiffness : float
        Weight of the mean squared gradient of the field beside the squared difference of the maps, each over the clip,
        summed over structures. Chosen on labelled sections left out (docs/benchmarks.md).
    most : int
        So many maps are compared; of more structures, as many random sums, which keep distances.
    """

    pixels: int = 68
    steps: int = 15
    step_size: float = 0.3
    stiffness: float = 3.0
    most: int = 32


def label_velocity(
    fixed: Tensor, moving: Tensor, spacing: Spacing2D, clip_mm: float, options: Options | None = None
) -> Tensor:
    """Velocity v with ``fixed(p) = moving(exp(v)(p))``, as nearly as its stiffness lets it.

    Parameters
    ----------
    fixed, moving : Tensor
        Signed distances to the same L structures, shape (L, Y, X), mm, within the clip.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    clip_mm : float
        What the distances are clipped at, mm.
    options : Options, optional
        Size, steps and stiffness.

    Returns
    -------
    Tensor
        Shape (1, 2, y, x), mm, on the grid on which it was sought; see `follow`.

    Examples
    --------
    >>> x = torch.linspace(-2, 2, 64).expand(64, 64)  # from a border between two structures, mm
    >>> fixed, moving = (torch.stack([d, -d]).clamp(-1, 1) for d in (x, x + 0.2))  # .2 mm further left
    >>> velocity = label_velocity(fixed, moving, (0.06, 0.06), 1.0)
    >>> bool(-0.2 < velocity[0, 1, 32, 32] < -0.1)
    True
    """
    options = options or Options()
    shape = (fixed.shape[1], fixed.shape[2])
    both, every = torch.stack([fixed, moving], dim=1), range(len(fixed))
    maps = few(lambda chosen: both[list(chosen)], every, options.most).transpose(0, 1) / clip_mm
    velocity = fixed.new_zeros(1, 2, 1, 1)
    finest = max(1.0, max(shape) / options.pixels)
    for shrink in (2 * finest, finest):
        level = max(1, round(shape[0] / shrink)), max(1, round(shape[1] / shrink))
        step_mm = _step(shape, spacing, level)
        unit = fixed.new_tensor(step_mm).view(1, 2, 1, 1)
        f, m = F.interpolate(maps, size=level, mode="bilinear", antialias=True).split(1)
        base = resize_displacement(velocity, level) / unit
        free = torch.zeros_like(base, requires_grad=True)
        optimiser = torch.optim.Adam([free], lr=options.step_size)
        with torch.enable_grad():
            for _ in range(options.steps):
                pixels = base + smooth(free)
                half = pixels * unit / 2
                there, back = exponential(half, step_mm, SQUARINGS), exponential(-half, step_mm, SQUARINGS)
                unlike = (warp(f, back, step_mm) - warp(m, there, step_mm)).square().sum(dim=1).mean()
                loss = unlike + options.stiffness * roughness(pixels, OF_SIZE).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        velocity = ((base + smooth(free)) * unit).detach()
    return velocity


def follow(velocity: Tensor, share: float, shape: tuple[int, int], spacing: Spacing2D) -> Tensor:
    """Displacement a share of the way along a velocity of `label_velocity`; below 0: back.

    Parameters
    ----------
    velocity : Tensor
        Shape (1, 2, y, x), mm.
    share : float
        1: from the fixed section to the moving one.
    shape : tuple of int
        Size (Y, X) of the sections.
    spacing : tuple of float
        Their pixel spacing (y, x) in mm.

    Returns
    -------
    Tensor
        Shape (1, 2, Y, X), mm.
    """
    step_mm = _step(shape, spacing, (velocity.shape[2], velocity.shape[3]))
    return resize_displacement(exponential(share * velocity, step_mm), shape)


def _step(shape: tuple[int, int], spacing: Spacing2D, level: tuple[int, int]) -> Spacing2D:
    """Spacing of a grid of size `level` that covers sections of size `shape`, mm."""
    return spacing[0] * shape[0] / level[0], spacing[1] * shape[1] / level[1]


def few(maps_of: Callable[[Sequence[int]], Tensor], structures: Sequence[int], most: int) -> Tensor:
    """Maps of L structures, or `most` random sums of them whose squared differences are alike on average [2]_.

    Always the same sums, so that warping before and after are alike. Maps are asked for `most` at a time: hundreds of
    them are never in memory at once.

    Parameters
    ----------
    maps_of : callable
        Gives the maps (l, ...) of some of the structures.
    structures : sequence of int
        What it is to be asked for.
    most : int
        Of the maps that come back.

    Returns
    -------
    Tensor
        Shape (L, ...), or (`most`, ...) if that is less.
    """
    if len(structures) <= most:
        return maps_of(structures)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (most, len(structures)), generator=generator) * 2 - 1
    first = maps_of(structures[:most])
    total = torch.zeros_like(first)
    for begin in range(0, len(structures), most):
        maps = first if begin == 0 else maps_of(structures[begin : begin + most])
        total += torch.einsum("kl,l...->k...", signs[:, begin : begin + most].to(maps) / most**0.5, maps)
    return total
