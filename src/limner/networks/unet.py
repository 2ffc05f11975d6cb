"""A U-Net that trains on two processor cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Sequential):
    """Two 3 x 3 convolutions, each with group normalisation (no batch statistics) and ReLU."""

    def __init__(self, n_in: int, n_out: int, groups: int = 8) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.GroupNorm(groups, n_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.GroupNorm(groups, n_out),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """U-Net in two parts: `features`, shared by all sections, and `head`, the classifier of each pixel.

    Parameters
    ----------
    n_classes : int
        Number of classes L.
    in_channels : int
        Number of input channels C.
    widths : tuple of int
        Channels of each level, from the full size down, multiples of 8. Each level halves the size.

    References
    ----------
    .. [1] Ronneberger et al. 2015, https://doi.org/10.1007/978-3-319-24574-4_28. Departures: group normalisation,
       zero padding so that the output has the input's size, bilinear upsampling, fewer channels.

    Examples
    --------
    >>> UNet(n_classes=5, in_channels=1, widths=(8, 16))(torch.zeros(1, 1, 21, 30)).shape
    torch.Size([1, 5, 21, 30])
    """

    def __init__(self, n_classes: int, in_channels: int = 1, widths: tuple[int, ...] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(i, o) for i, o in zip((in_channels, *widths), widths, strict=False))
        self.up = nn.ModuleList(
            Block(below + skip, skip) for below, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.n_features = widths[0]
        self.head = nn.Conv2d(widths[0], n_classes, 1)

    def features(self, image: Tensor) -> Tensor:
        """Features of every pixel; (B, C, Y, X) -> (B, widths[0], Y, X)."""
        skips = []
        x = image
        for depth, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if depth else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        return x

    def receptive_field(self, first: int, last: int) -> tuple[int, int]:
        """First and last pixel, along either axis of an endless image, on which outputs `first` to `last` depend.

        By convolutions; group normalisation also lets the mean and deviation of the whole image in.
        """
        for _ in self.up:  # two convolutions see two pixels further, and bilinear upsampling the next smaller pixel
            first, last = (first - 3) // 2, (last + 3) // 2
        first, last = first - 2, last + 2
        for _ in self.up:
            first, last = 2 * first - 2, 2 * last + 1 + 2
        return first, last

    def forward(self, image: Tensor) -> Tensor:
        """Logits; (B, C, Y, X) -> (B, L, Y, X)."""
        return self.head(self.features(image))
