"""Random changes of training sections: rotation, translation, scaling, contrast and brightness."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Ranges from which each change is drawn evenly.

    Parameters
    ----------
    rotation : float
        Largest angle either way, degrees.
    translation : float
        Largest shift either way along y and x, as a fraction of the section's size.
    scaling : float
        Largest relative change of size either way.
    contrast : float
        Largest relative change of contrast either way.
    brightness : float
        Largest addition either way, as a fraction of the grey range.
    """

    rotation: float = 10.0
    translation: float = 0.05
    scaling: float = 0.1
    contrast: float = 0.2
    brightness: float = 0.1

    def moved_by(self, share: float) -> Augmentation:
        """The same with rotation, translation and scaling times `share`."""
        return replace(
            self,
            rotation=share * self.rotation,
            translation=share * self.translation,
            scaling=share * self.scaling,
        )


def random_transforms(n: int, shape: tuple[int, int], ranges: Augmentation, generator: torch.Generator) -> Tensor:
    """Similarity transforms for `affine_grid` of sections of `shape` (Y, X); shape (n, 2, 3).

    Rotation keeps angles on the pixel grid, so that a section that is not square is not sheared.
    """

    def draw(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle, scale = draw(math.radians(ranges.rotation)), 1 + draw(ranges.scaling)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    aspect = shape[0] / shape[1]
    rows = [cos, -sin * aspect, 2 * draw(ranges.translation), sin / aspect, cos, 2 * draw(ranges.translation)]
    return torch.stack(rows, dim=1).view(n, 2, 3)


def augment(
    images: Tensor,
    targets: Tensor,
    ranges: Augmentation,
    generator: torch.Generator,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Change sections and their labels alike; each section of the batch differently.

    Parameters
    ----------
    images : Tensor
        Shape (B, C, Y, X), grey range [0, 1].
    targets : Tensor
        Labels (B, Y, X), int.
    ranges : Augmentation
        How far to go.
    generator : torch.Generator
        On the CPU; decides every draw.
    shape : tuple of int, optional
        Size (Y', X') of what is returned, down to half of (Y, X), which it is unless given.

    Returns
    -------
    images : Tensor
        Shape (B, C, Y', X'); beyond the border the image continues.
    targets : Tensor
        Shape (B, Y', X'), nearest pixel.
    weights : Tensor
        Shape (B, Y', X'), 0 where the section did not reach, else 1.
    """
    transforms = random_transforms(len(images), (images.shape[2], images.shape[3]), ranges, generator)
    size = [*images.shape[:2], *(shape or images.shape[2:])]
    grid = F.affine_grid(transforms.to(images.device), size, align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    labels = F.grid_sample(targets[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    gain = 1 + (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1) * ranges.contrast
    shift = (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1) * ranges.brightness
    middle = moved.mean(dim=(1, 2, 3), keepdim=True)
    moved = (moved - middle) * gain.to(images.device) + middle + shift.to(images.device)
    weights = (grid.abs() <= 1).all(dim=-1).float()
    return moved, labels[:, 0].round().long(), weights


def elastic(maps: Tensor, sigma: float, generator: torch.Generator, knots: int = 32) -> Tensor:
    """Bend maps smoothly, each of the batch in its own way.

    Parameters
    ----------
    maps : Tensor
        Shape (B, C, Y, X); channels of one image are bent alike.
    sigma : float
        Standard deviation of the displacement at the knots, pixels.
    generator : torch.Generator
        On the CPU; decides every draw.
    knots : int
        Distance between knots, pixels; cubic in between.

    Returns
    -------
    Tensor
        Shape (B, C, Y, X), linear between pixels, mirrored at the border.
    """
    n, _, height, width = maps.shape
    coarse = (n, 2, max(2, height // knots + 1), max(2, width // knots + 1))
    shift = F.interpolate(
        torch.randn(coarse, generator=generator) * sigma, size=(height, width), mode="bicubic", align_corners=True
    )
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, height, width], align_corners=False)
    shift = shift.permute(0, 2, 3, 1) * torch.tensor((2 / width, 2 / height))
    return F.grid_sample(maps, (grid + shift).to(maps.device), padding_mode="reflection", align_corners=False)


def deform_volume(maps: Tensor, sigma: float, stretch: float, generator: torch.Generator, knots: int = 16) -> Tensor:
    """Bend and stretch a volume of labels at random, all its maps alike.

    Parameters
    ----------
    maps : Tensor
        Shape (C, Z, Y, X), float; each voxel takes the values of one voxel, so labels stay labels.
    sigma : float
        Standard deviation of the displacement at the knots, voxels.
    stretch : float
        Standard deviation of each entry of the linear map that is added to the identity.
    generator : torch.Generator
        On the CPU; decides every draw.
    knots : int
        Distance between knots, voxels; linear in between.

    Returns
    -------
    Tensor
        Shape (C, Z, Y, X); beyond the border the volume continues.

    Examples
    --------
    >>> labels = torch.arange(3.0).repeat_interleave(9).view(1, 3, 3, 3)
    >>> bool((deform_volume(labels, 0.0, 0.0, torch.Generator()) == labels).all())
    True
    """
    shape = maps.shape[1:]
    coarse = [max(2, round(n / knots) + 1) for n in shape]
    bend = F.interpolate(torch.randn(1, 3, *coarse, generator=generator) * sigma, shape, mode="trilinear")
    # from voxels in the order z, y, x to grid_sample's unit, half the volume's length, in the order x, y, z
    bend = bend.flip(1).movedim(1, -1) * torch.tensor([2 / n for n in shape[::-1]])
    linear = torch.eye(3) + stretch * torch.randn(3, 3, generator=generator)
    grid = F.affine_grid(torch.cat([linear, torch.zeros(3, 1)], dim=1)[None], [1, 1, *shape], align_corners=False)
    return F.grid_sample(maps[None], grid + bend, mode="nearest", padding_mode="border", align_corners=False)[0]
