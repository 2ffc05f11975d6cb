"""A robust rigid or affine start: exhaustive search of rotation and shift, then descent on global correlation.

A transform is a matrix (B, 2, 3) in mm: the point `p` (y, x; mm from the image centre) of the fixed image matches
``matrix[:, :, :2] @ p + matrix[:, :, 2]`` in the moving image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limner.losses.similarity import global_correlation
from limner.registration.warp import Spacing2D, warp


def identity(n_pairs: int, device: torch.device | None = None) -> Tensor:
    """The transform that moves nothing, shape (n_pairs, 2, 3)."""
    return torch.eye(2, 3, device=device).repeat(n_pairs, 1, 1)


def invert(matrix: Tensor) -> Tensor:
    """Inverse transforms, shape (B, 2, 3)."""
    linear = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([linear, -linear @ matrix[:, :, 2:]], dim=2)


def centred_points(shape: tuple[int, int], spacing: Spacing2D, device: torch.device) -> Tensor:
    """Position (y, x) of every pixel in mm from the image centre, shape (2, Y, X)."""
    axes = [
        (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2) * s
        for n, s in zip(shape, spacing, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def to_displacement(matrix: Tensor, shape: tuple[int, int], spacing: Spacing2D) -> Tensor:
    """The displacement field of a transform, shape (B, 2, Y, X), mm."""
    points = centred_points(shape, spacing, matrix.device)
    moved = torch.einsum("bij,jyx->biyx", matrix[:, :, :2], points) + matrix[:, :, 2, None, None]
    return moved - points


def _rotations(angles: Tensor) -> Tensor:
    """Rotation about the centre by `angles` (radians), shape (N, 2, 3)."""
    cos, sin, zero = torch.cos(angles), torch.sin(angles), torch.zeros_like(angles)
    return torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)


def _best_shift(fixed: Tensor, moving: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score (B,) and shift in pixels along y and x (B,) that bring `moving` best onto `fixed`, by Fourier transform."""
    height, width = fixed.shape[2:]
    size = (2 * height, 2 * width)
    spectrum = torch.fft.rfft2(fixed, size).conj() * torch.fft.rfft2(moving, size)
    correlation = torch.fft.irfft2(spectrum, size).sum(dim=1).flatten(1)
    norm = (fixed.square().sum(dim=(1, 2, 3)) * moving.square().sum(dim=(1, 2, 3))).sqrt().clamp_min(1e-12)
    score, at = correlation.max(dim=1)
    y, x = at // (2 * width), at % (2 * width)
    return score / norm, torch.where(y >= height, y - 2 * height, y), torch.where(x >= width, x - 2 * width, x)


def search_rigid(fixed: Tensor, moving: Tensor, spacing: Spacing2D, max_angle: float, step: float = 6.0) -> Tensor:
    """Best of all shifts and of rotations up to `max_angle`, by correlation of what stands out from background.

    Parameters
    ----------
    fixed, moving : Tensor
        Shape (B, C, Y, X), 0 in the background; small images (about 64 pixels a side) suffice.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    max_angle, step : float
        Largest rotation tried and distance between tried rotations, in degrees.

    Returns
    -------
    Tensor
        Transforms, shape (B, 2, 3).
    """
    n_steps = int(max_angle // step)
    best_score = fixed.new_full((len(fixed),), -math.inf)
    best = identity(len(fixed), fixed.device)
    for angle in sorted((step * k for k in range(-n_steps, n_steps + 1)), key=abs):
        rotation = _rotations(fixed.new_full((len(fixed),), math.radians(angle)))
        turned = warp(
            moving, to_displacement(rotation, (fixed.shape[2], fixed.shape[3]), spacing), spacing, outside="zeros"
        )
        score, shift_y, shift_x = _best_shift(fixed, turned)
        shift = torch.stack([shift_y * spacing[0], shift_x * spacing[1]], dim=1).to(fixed.dtype)
        # turned(p) = moving(R p), and fixed(p) = turned(p + shift): the match of p is R (p + shift)
        rotation[:, :, 2] = torch.einsum("bij,bj->bi", rotation[:, :, :2], shift)
        better = score > best_score + 1e-4
        best_score = torch.where(better, score, best_score)
        best = torch.where(better[:, None, None], rotation, best)
    return best


def refine(
    fixed: Tensor,
    moving: Tensor,
    weights: Tensor,
    spacing: Spacing2D,
    start: Tensor,
    rigid: bool = False,
    steps: int = 60,
) -> Tensor:
    """Descend from `start` on one minus the global correlation (Adam).

    Parameters
    ----------
    fixed, moving, weights : Tensor
        Shape (B, C, Y, X); weights (B, 1, Y, X) say which pixels of the fixed image count.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    start : Tensor
        Transforms, shape (B, 2, 3).
    rigid : bool
        Only rotate and shift; else all six parameters are free.
    steps : int
        Number of steps.

    Returns
    -------
    Tensor
        Of `start` and all steps the transforms with the highest correlation, shape (B, 2, 3).
    """
    shape = (fixed.shape[2], fixed.shape[3])
    extent = max(shape[0] * spacing[0], shape[1] * spacing[1]) / 2  # mm; puts all parameters on one scale
    turn = torch.zeros(len(fixed), device=fixed.device, requires_grad=True)
    change = torch.zeros(len(fixed), 2, 3, device=fixed.device, requires_grad=True)
    free = torch.tensor([[0.0, 0, 1], [0, 0, 1]] if rigid else [[1.0, 1, 1], [1, 1, 1]], device=fixed.device)
    unit = torch.tensor([1.0, 1.0, extent], device=fixed.device)
    optimiser = torch.optim.Adam([turn, change], lr=0.01)
    best, best_score = start.clone(), fixed.new_full((len(fixed),), -math.inf)
    for step in range(steps + 1):
        rotation = _rotations(turn)[:, :, :2]
        matrix = torch.cat([rotation @ start[:, :, :2], start[:, :, 2:]], dim=2) + change * free * unit
        moved = warp(moving, to_displacement(matrix, shape, spacing), spacing)
        score = global_correlation(fixed, moved, weights)
        with torch.no_grad():
            better = score > best_score
            best_score = torch.where(better, score, best_score)
            best = torch.where(better[:, None, None], matrix, best)
        if step < steps:
            optimiser.zero_grad()
            (-score.sum()).backward()
            optimiser.step()
    return best.detach()
