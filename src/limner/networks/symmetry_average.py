"""A network whose answer is the mean over the eight symmetries of the square, and over shifted crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SymmetryAverage(nn.Module):
    """The mean of a network's probabilities for an image turned and mirrored, each turned back.

    Poolings see pixels in blocks. So that a tile, turned, falls into the same blocks as the whole image turned, images
    are first extended to a multiple of the network's alignment. Further crops, each begun some pixels earlier, see
    other blocks.

    Parameters
    ----------
    network : TiledNetwork
        As of `limner.inference`: with `halo`, `alignment`, and logits (B, L, Y, X) of images (B, C, Y, X).
    symmetries : bool
        Average over all eight; else the image as it is.
    shifts : sequence of int
        By how many pixels, below the alignment, the crops averaged over begin earlier; at least one.

    Raises
    ------
    ValueError
        If there is no shift, or one that is not below the alignment.

    Examples
    --------
    >>> from limner.networks.contextual import ContextualNetwork
    >>> network = SymmetryAverage(ContextualNetwork(widths=(4, 4, 8, 8))).eval()
    >>> image = torch.rand(1, 1, 21, 30)
    >>> bool(torch.allclose(network(image).flip(3), network(image.flip(3)), atol=1e-5))
    False
    >>> image = torch.rand(1, 1, 24, 32)
    >>> bool(torch.allclose(network(image).flip(3), network(image.flip(3)), atol=1e-5))
    True
    """

    def __init__(self, network: Any, symmetries: bool = True, shifts: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.network = network
        self.turns = [(k, mirrored) for k in range(4) for mirrored in (False, True)] if symmetries else [(0, False)]
        self.shifts = tuple(shifts)
        if not self.shifts or not all(0 <= shift < self.alignment for shift in self.shifts):
            raise ValueError(
                f"SymmetryAverage(): shifts {self.shifts} found; give one or more from 0 to {self.alignment - 1}"
            )

    @property
    def alignment(self) -> int:
        """As of the network."""
        return int(self.network.alignment)

    @property
    def halo(self) -> int:
        """The network's, and once more the alignment where crops are shifted."""
        return int(self.network.halo) + (self.alignment if any(self.shifts) else 0)

    def forward(self, image: Tensor, region: tuple[slice, slice] | None = None) -> Tensor:
        """Logarithms of mean probabilities: (B, C, Y, X) to (B, L, Y, X), or (B, L, y, x) of a region."""
        height, width = image.shape[2:]
        total = torch.zeros(())
        for shift in self.shifts:
            below, right = (-(n + shift) % self.alignment for n in (height, width))
            extended = F.pad(image, (shift, right, shift, below), mode="replicate")
            for k, mirrored in self.turns:
                turned = torch.rot90(extended.flip(3) if mirrored else extended, k, (2, 3))
                found = torch.rot90(torch.softmax(self.network(turned), dim=1), -k, (2, 3))
                found = found.flip(3) if mirrored else found
                total = total + found[:, :, shift : shift + height, shift : shift + width]
        mean = total / (len(self.shifts) * len(self.turns))
        mean = mean if region is None else mean[:, :, region[0], region[1]]
        return torch.log(mean.clamp_min(torch.finfo(mean.dtype).tiny))
