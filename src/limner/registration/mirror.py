"""Where the points of a symmetric specimen lie in its mirror image.

A brain is seldom cut quite square: one half of a section lies further forward than the other, so that the mirror image
of a labelled section crosses the sections between the labelled ones. What is labelled there on the right tells what to
expect on the left. The mirror image is described by a reflection in a plane, found by Gauss-Newton steps on the images
[1]_, and by what the specimen's own asymmetry leaves of each labelled section: a velocity field of
`limner.registration.label_flow`. (A plane found on signed distances of labels turned too little on the mouse stack:
between labelled sections these are blurred.)

Points have shape (3, y, x): mm along z as sections are placed, and mm along y and x from the middle of the section.

References
----------
.. [1] Nocedal and Wright 2006, "Numerical Optimization", section 10.3
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from limner.registration.affine import centred_points
from limner.registration.warp import Spacing2D

ROUNDS = 10  # Gauss-Newton steps
DAMPING = 1e-3  # of the mean diagonal
APART = 0.1  # mm between the two points of which a slope is the difference
SMALL = 1e-4  # step of a parameter of which the derivative is a difference


@dataclass(frozen=True)
class Column:
    """Values on consecutive sections, read anywhere in or between them.

    Parameters
    ----------
    values : Tensor
        Shape (K, L, Y, X).
    positions : Tensor
        Of the K sections, shape (K,), mm, increasing.
    spacing : tuple of float
        Pixel spacing (y, x), mm.
    """

    values: Tensor
    positions: Tensor
    spacing: Spacing2D

    def at(self, points: Tensor) -> Tensor:
        """Values at points (3, y, x), linear between pixels and sections, beyond as at the border: (L, y, x)."""
        count, _, height, width = self.values.shape
        z = 2 * (along(self.positions, points[0]) + 0.5) / count - 1
        y, x = 2 * points[1] / (height * self.spacing[0]), 2 * points[2] / (width * self.spacing[1])
        grid = torch.stack([x, y, z], dim=-1)[None, None]
        stack = self.values.transpose(0, 1)[None]
        return F.grid_sample(stack, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]

    def holds(self, points: Tensor) -> Tensor:
        """Which points lie within the sections' canvas, bool, (y, x)."""
        height, width = self.values.shape[2:]
        return (points[1].abs() <= height * self.spacing[0] / 2) & (points[2].abs() <= width * self.spacing[1] / 2)


def along(positions: Tensor, z: Tensor) -> Tensor:
    """Places of `z` (mm) among increasing positions, as fractional indices within them.

    Examples
    --------
    >>> along(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([-1.0, 0.5, 2.0, 9.0])).tolist()
    [0.0, 0.5, 1.5, 2.0]
    """
    if len(positions) == 1:
        return torch.zeros_like(z)
    right = torch.searchsorted(positions, z.contiguous()).clamp(1, len(positions) - 1)
    before, after = positions[right - 1], positions[right]
    return (right - 1 + (z - before) / (after - before)).clamp(0, len(positions) - 1)


def section_points(position: float, shape: tuple[int, int], spacing: Spacing2D, device: str = "cpu") -> Tensor:
    """The points of a section's pixels, (3, Y, X), mm."""
    in_plane = centred_points(shape, spacing, torch.device(device))
    return torch.cat([torch.full_like(in_plane[:1], position), in_plane])


def reflection(parameters: Tensor, middle_z: float) -> Tensor:
    """The map (3, 4) that mirrors points in a plane.

    Parameters
    ----------
    parameters : Tensor
        How far the plane's normal turns from x towards z and towards y, radians; how far along x the plane lies from
        the middle of the section at `middle_z`, mm.
    middle_z : float
        Where the plane is turned about, mm.

    Examples
    --------
    >>> reflection(torch.tensor([0.0, 0.0, 0.5]), 7.0)[2].tolist()  # x becomes 1 - x
    [0.0, 0.0, -1.0, 1.0]
    """
    to_z, to_y, offset = parameters.unbind()
    normal = torch.stack([to_z.sin() * to_y.cos(), to_y.sin(), to_z.cos() * to_y.cos()])
    linear = torch.eye(3).to(parameters) - 2 * torch.outer(normal, normal)
    stays = torch.stack([parameters.new_tensor(middle_z), torch.zeros_like(offset), offset])
    return torch.cat([linear, (stays - linear @ stays)[:, None]], dim=1)


def carried(matrix: Tensor, points: Tensor) -> Tensor:
    """Points (3, y, x) after an affine map (3, 4)."""
    return torch.einsum("ij,jyx->iyx", matrix[:, :3], points) + matrix[:, 3, None, None]


def fit_reflection(
    sections: Sequence[tuple[Tensor, Tensor]], column: Callable[[Tensor], Column], middle_x: float
) -> Tensor:
    """The map (3, 4) of `reflection` under which a stack is most like its mirror image.

    Parameters
    ----------
    sections : sequence of (Tensor, Tensor)
        Points (3, y, x) and grey levels (C, y, x) of some sections.
    column : callable
        Gives the sections to be read at points.
    middle_x : float
        Where the plane is sought first, mm from the middle of the section.

    Returns
    -------
    Tensor
        Shape (3, 4); where images are blank, the plane at `middle_x`.
    """
    parameters = torch.tensor([0.0, 0.0, middle_x], dtype=torch.float64)
    middle_z = sum(float(points[0].mean()) for points, _ in sections) / len(sections)
    steps = SMALL * torch.eye(3, dtype=torch.float64)
    for _ in range(ROUNDS):
        matrix = reflection(parameters, middle_z)
        tangents = [(reflection(parameters + step, middle_z) - matrix) / SMALL for step in steps]
        second, first = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        for points, fixed in sections:
            there = carried(matrix.to(points), points)
            read = column(there)
            slopes = torch.stack([_slope(read, there, axis) for axis in range(3)])
            ways = torch.stack([carried(t.to(points), points) for t in tangents])  # (parameters, 3, y, x)
            changes = torch.einsum("payx,acyx->pcyx", ways, slopes).flatten(1)
            second += (changes @ changes.T).double().cpu()
            first += (changes @ (fixed - read.at(there)).flatten()).double().cpu()
        if not bool(second.diagonal().min() > 0):  # blank images say nothing, nor does what lies at infinity
            break
        damped = second + DAMPING * second.diagonal().mean() * torch.eye(3, dtype=torch.float64)
        parameters = parameters + torch.linalg.solve(damped, first)
    return reflection(parameters, middle_z).float()


def _slope(read: Column, points: Tensor, axis: int) -> Tensor:
    apart = points.new_zeros(3, 1, 1)
    apart[axis] = APART / 2
    return (read.at(points + apart) - read.at(points - apart)) / APART
