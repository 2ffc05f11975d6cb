"""Displacement fields: sampling images through them, composing them, and what they do to area.

A displacement field `u`, shape (B, 2, Y, X), holds for every pixel of the fixed image how far away in mm (channel 0
along y, channel 1 along x) the matching point of the moving image lies: ``moved(p) = moving(p + u(p))``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Spacing2D = tuple[float, float]


def _sampling_grid(displacement: Tensor, spacing: Spacing2D, moving_shape: tuple[int, int]) -> Tensor:
    """Normalised (x, y) coordinates for `grid_sample`, shape (B, Y, X, 2)."""
    _, _, height, width = displacement.shape
    step = displacement.new_tensor(spacing).view(1, 2, 1, 1)
    rows = torch.arange(height, device=displacement.device, dtype=displacement.dtype).view(1, height, 1)
    columns = torch.arange(width, device=displacement.device, dtype=displacement.dtype).view(1, 1, width)
    pixels = displacement / step
    y = (2 * (pixels[:, 0] + rows) + 1) / moving_shape[0] - 1
    x = (2 * (pixels[:, 1] + columns) + 1) / moving_shape[1] - 1
    return torch.stack([x, y], dim=-1)


def warp(
    image: Tensor,
    displacement: Tensor,
    spacing: Spacing2D,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    outside: Literal["border", "zeros"] = "border",
) -> Tensor:
    """Sample an image where a displacement field points.

    Parameters
    ----------
    image : Tensor
        The moving image, shape (B, C, Y, X), float.
    displacement : Tensor
        Shape (B, 2, Y, X), mm.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    mode : {'bilinear', 'nearest'}
        Interpolation; 'nearest' keeps label values.
    outside : {'border', 'zeros'}
        What points outside the image read: its border, or 0.

    Returns
    -------
    Tensor
        Shape (B, C, Y, X).

    Examples
    --------
    >>> image = torch.arange(5.0).view(1, 1, 1, 5)
    >>> shift = torch.zeros(1, 2, 1, 5)
    >>> shift[:, 1] = 0.1  # one pixel of 0.1 mm to the right
    >>> [round(v, 3) for v in warp(image, shift, (0.1, 0.1)).flatten().tolist()]
    [1.0, 2.0, 3.0, 4.0, 4.0]
    """
    shape = (image.shape[2], image.shape[3])
    grid = _sampling_grid(displacement, spacing, shape)
    return F.grid_sample(image, grid, mode=mode, padding_mode=outside, align_corners=False)


def covers(displacement: Tensor, spacing: Spacing2D) -> Tensor:
    """Where a displacement field points into the moving image; bool, shape (B, 1, Y, X)."""
    shape = (displacement.shape[2], displacement.shape[3])
    return (_sampling_grid(displacement, spacing, shape).abs() <= 1).all(dim=-1)[:, None]


def compose(first: Tensor, second: Tensor, spacing: Spacing2D) -> Tensor:
    """The displacement that follows `first` and then, from where it arrives, `second`.

    Parameters
    ----------
    first, second : Tensor
        Shape (B, 2, Y, X), mm: from image a to image b, and from b to c.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.

    Returns
    -------
    Tensor
        From a to c, shape (B, 2, Y, X), mm. Outside its grid `second` continues as at the border.
    """
    return first + warp(second, first, spacing)


def resize_displacement(displacement: Tensor, shape: tuple[int, int]) -> Tensor:
    """The same field (mm) on a grid of `shape` (Y, X) that covers the same area."""
    if displacement.shape[2:] == shape:
        return displacement
    return F.interpolate(displacement, size=shape, mode="bilinear", align_corners=False)


def jacobian_determinants(displacement: Tensor, spacing: Spacing2D) -> Tensor:
    """Local change of area, by central differences.

    Parameters
    ----------
    displacement : Tensor
        Shape (B, 2, Y, X), mm; Y, X >= 2.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.

    Returns
    -------
    Tensor
        Shape (B, Y, X): 1 where area is kept, <= 0 where the field folds.
    """
    dy_dy, dy_dx = torch.gradient(displacement[:, 0], spacing=list(spacing), dim=(1, 2))
    dx_dy, dx_dx = torch.gradient(displacement[:, 1], spacing=list(spacing), dim=(1, 2))
    return (1 + dy_dy) * (1 + dx_dx) - dy_dx * dx_dy
