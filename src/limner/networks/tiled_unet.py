"""The U-Net whose receptive field is known to the pixel, so that tiles give what the whole image gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Span = tuple[int, int]

PAPER_WIDTHS = (64, 128, 256, 512, 1024)
CONVOLUTIONS = 2  # of 3 x 3 in each block: each looks one pixel further


class Block(nn.Sequential):
    """Two zero-padded 3 x 3 convolutions, each with ReLU and then batch normalisation.

    In evaluation without gradients normalisation is folded into its convolution: the same numbers but for rounding, and
    half as many maps written to memory.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(n_out),
            nn.Conv2d(n_out, n_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(n_out),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same size: (B, n_in, Y, X) -> (B, n_out, Y, X)."""
        if self.training or torch.is_grad_enabled():
            for layer in self:
                maps = layer(maps)
            return maps
        maps = _normalised_convolution(self[0], self[2], maps)
        return _normalised_convolution(self[3], self[5], maps)


def _normalised_convolution(convolution: Any, normalisation: Any, maps: Tensor) -> Tensor:
    """Convolution, ReLU and batch normalisation as one convolution and one clamp in place.

    Normalisation is a r + b in each channel, and a max(z, 0) + b = max(a z + b, b), or with negative a the minimum.
    Zeros that pad the maps stay zeros, which they would not if b were folded into the next convolution.
    """
    scale = normalisation.weight / torch.sqrt(normalisation.running_var + normalisation.eps)
    shift = normalisation.bias - normalisation.running_mean * scale
    weight = convolution.weight * scale[:, None, None, None]
    maps = F.conv2d(maps, weight, convolution.bias * scale + shift, padding=1)
    lowest = torch.where(scale >= 0, shift, -torch.inf)[:, None, None]
    highest = torch.where(scale >= 0, torch.inf, shift)[:, None, None]
    return torch.clamp(maps, lowest, highest, out=maps)


class TiledUNet(nn.Module):
    """U-Net whose output is as large as its input, of any size, and equal tile by tile to that of the whole image.

    Where a side is odd, the last pixel is pooled alone, and the upsampled map is cut to the size of its skip: every
    level ends where the image ends, so zero padding means the same at each border, whatever the image's size. In
    evaluation every output pixel depends on the pixels of its receptive field alone.

    Parameters
    ----------
    in_channels : int
        Number of input channels C.
    n_maps : int
        Number of output maps L; two are background and object (nuclei), or cell and membrane.
    widths : tuple of int
        Channels of each level, from the full size down; each level halves the size. `PAPER_WIDTHS` has 31 M
        parameters, the default 1.9 M.

    References
    ----------
    .. [1] Mercadier, Besbinar, Frossard, "Automatic segmentation of nuclei in histopathology images using
       encoding-decoding convolutional neural networks", ICASSP 2019.
    .. [2] Ronneberger et al. 2015, https://doi.org/10.1007/978-3-319-24574-4_28

    Examples
    --------
    >>> network = TiledUNet(widths=(4, 8, 16, 32, 64)).eval()
    >>> network(torch.zeros(1, 3, 21, 30)).shape, network.alignment, network.halo
    (torch.Size([1, 2, 21, 30]), 16, 94)
    """

    def __init__(self, in_channels: int = 3, n_maps: int = 2, widths: tuple[int, ...] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block(i, o) for i, o in zip((in_channels, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(below, skip, 2, stride=2) for below, skip in pairs)
        self.up = nn.ModuleList(Block(2 * skip, skip) for _, skip in pairs)
        self.head = nn.Conv2d(widths[0], n_maps, 1)

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.down)

    @property
    def alignment(self) -> int:
        """Product of the poolings: tiles begin at multiples of it."""
        return int(2 ** (self.levels - 1))

    @property
    def halo(self) -> int:
        """How many pixels beyond a region that begins and ends at multiples of `alignment` its outputs depend on."""
        return -self.receptive_field(0)[0]

    def receptive_field(self, pixel: int) -> Span:
        """First and last input pixel, along either axis, on which output pixel `pixel` of an endless image depends.

        Up to the lowest level each block looks `CONVOLUTIONS` further and each upsampled pixel comes from one of half
        the index; from there on each pooled pixel comes from two.
        """
        first = last = pixel
        for _ in range(self.levels - 1):
            first, last = (first - CONVOLUTIONS) // 2, (last + CONVOLUTIONS) // 2
        first, last = first - CONVOLUTIONS, last + CONVOLUTIONS
        for _ in range(self.levels - 1):
            first, last = 2 * first - CONVOLUTIONS, 2 * last + 1 + CONVOLUTIONS
        return first, last

    def forward(self, image: Tensor, region: tuple[slice, slice] | None = None) -> Tensor:
        """Logits of the image, or of a region of it.

        Parameters
        ----------
        image : Tensor
            Shape (B, C, Y, X).
        region : tuple of slice, optional
            Rows and columns to answer for. Upwards from the lowest level nothing else is computed, which makes halos
            cheaper.

        Returns
        -------
        Tensor
            Shape (B, L, Y, X), or (B, L, y, x) for a region.
        """
        skips = []
        x = image
        for depth, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if depth else x)
            skips.append(x)
        height, width = image.shape[2:]
        rows, columns = region or (slice(0, height), slice(0, width))
        needed = [[(rows.start, rows.stop), (columns.start, columns.stop)]]  # of each level's output, from the top
        for skip in skips[:-1]:
            needed.append([_below(span, size) for span, size in zip(needed[-1], skip.shape[2:], strict=True)])
        corner = (0, 0)  # where x begins in its level
        for block, enlarge, skip, spans in zip(self.up, self.enlarge, skips[-2::-1], needed[-2::-1], strict=True):
            corner = (2 * corner[0], 2 * corner[1])
            entering = [_widened(span, size) for span, size in zip(spans, skip.shape[2:], strict=True)]
            x = torch.cat([_cut(skip, entering), _cut(enlarge(x), entering, corner)], dim=1)
            x = _cut(block(x), spans, (entering[0][0], entering[1][0]))
            corner = (spans[0][0], spans[1][0])
        return self.head(x)


def _widened(span: Span, size: int) -> Span:
    """What a block must be given for its outputs in `span` to hold; it ends where its level ends."""
    return max(span[0] - CONVOLUTIONS, 0), min(span[1] + CONVOLUTIONS, size)


def _below(span: Span, size: int) -> Span:
    """The outputs of the next level down from which those of `span` come; `size` is that of the level of `span`."""
    first, last = _widened(span, size)
    return first // 2, (last + 1) // 2


def _cut(maps: Tensor, spans: Sequence[Span], corner: Span = (0, 0)) -> Tensor:
    """Rows and columns of maps whose own first pixel lies at `corner`."""
    (top, bottom), (left, right) = spans
    return maps[:, :, top - corner[0] : bottom - corner[0], left - corner[1] : right - corner[1]]
