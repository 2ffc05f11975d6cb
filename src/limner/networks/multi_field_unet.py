"""Several U-Nets that see the same point at different magnifications: fine detail and wide surroundings at once.

All see patches of the same size in pixels: the lower the magnification, the wider the field of view. Of a whole section
each sees all, reduced. What they say is enlarged to the finest grid, put side by side and joined by two convolutions; a
last convolution of one pixel makes scores of it.

References
----------
Tokunaga et al., "Adaptive weighting multi-field-of-view CNN for semantic segmentation in pathology", CVPR 2019,
arXiv:1904.06040. Departures: each U-Net hands on several maps, not its classes' probabilities, and plain
convolutions join them, not weights that another network makes up for each image; all are trained together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limner.networks.unet import Block, UNet

Region = tuple[slice, slice]


class MultiFieldUNet(nn.Module):
    """Scores and features of every pixel of sections of any size, or of patches of them.

    Parameters
    ----------
    n_classes : int
        Number of classes L, background included.
    in_channels : int
        Number of input channels C: 1 for grey, 3 for RGB.
    widths : tuple of int
        Channels of each level of each U-Net, multiples of 8; there are `widths[0]` features.
    magnifications : tuple of int
        By how much each U-Net's view is reduced: 1, then increasing.

    Raises
    ------
    ValueError
        If the magnifications do not begin with 1 or do not increase.

    Examples
    --------
    >>> network = MultiFieldUNet(n_classes=2, in_channels=3, widths=(8, 16))
    >>> section = torch.rand(1, 3, 101, 150)
    >>> network(section).shape, network.features(section).shape
    (torch.Size([1, 2, 101, 150]), torch.Size([1, 8, 101, 150]))
    >>> network(section, [(slice(20, 52), slice(60, 92))]).shape
    torch.Size([1, 2, 32, 32])
    >>> network.receptive_field(0)
    (-40, 47)
    """

    def __init__(
        self,
        n_classes: int,
        in_channels: int = 1,
        widths: tuple[int, ...] = (16, 32, 64),
        magnifications: tuple[int, ...] = (1, 2, 4),
    ) -> None:
        super().__init__()
        if magnifications[:1] != (1,) or any(b <= a for a, b in pairwise(magnifications)):
            raise ValueError(
                f"MultiFieldUNet(): magnifications are {magnifications}; begin with 1 and go on with larger numbers"
            )
        self.magnifications = magnifications
        self.fields = nn.ModuleList(UNet(widths[0], in_channels, widths) for _ in magnifications)
        # no ReLU on the features: pixels at which all were 0 would teach nothing, and a rare organ may lie in such
        self.join = nn.Sequential(*list(Block(widths[0] * len(magnifications), widths[0]))[:-1])
        self.n_features = widths[0]
        self.head = nn.Conv2d(widths[0], n_classes, 1)

    def receptive_field(self, pixel: int) -> tuple[int, int]:
        """First and last pixel, along either axis of an endless image, on which output `pixel` depends.

        By convolutions, in whole sections; group normalisation also lets the mean and deviation of all that is seen in.
        """
        spans = []
        for reduced, unet in zip(self.magnifications, self.fields, strict=True):
            first, last = pixel - 2, pixel + 2  # of the convolutions that join
            # pixel i lies at (i + 1/2) / reduced - 1/2 on the reduced grid: the pixels there below and above
            first, last = (2 * first + 1 - reduced) // (2 * reduced), -((reduced - 1 - 2 * last) // (2 * reduced))
            first, last = unet.receptive_field(first, last)  # type: ignore[operator]
            spans.append((first * reduced, (last + 1) * reduced - 1))
        return min(first for first, _ in spans), max(last for _, last in spans)

    def features(self, image: Tensor, regions: Sequence[Region] | None = None) -> Tensor:
        """What the last layer makes its scores of.

        Parameters
        ----------
        image : Tensor
            Whole sections, shape (B, C, Y, X), whatever is known around the patches at least: the widest field is as
            many times as large as a patch as it is reduced.
        regions : sequence of (slice, slice), optional
            Rows and columns of a patch of each image, all of one size. Every U-Net then sees as many pixels around the
            same point, moved inwards where the image ends, and less of an image that is smaller than its field.

        Returns
        -------
        Tensor
            Shape (B, widths[0], Y, X), or (B, widths[0], y, x) for patches.

        Raises
        ------
        ValueError
            If there is not one region an image, or they differ in size or reach beyond the image.
        """
        height, width = image.shape[2:]
        if regions is None:
            regions = [(slice(0, height), slice(0, width))] * len(image)
        _check_regions(regions, image)
        maps = [
            _seen(unet, reduced, image, regions) for reduced, unet in zip(self.magnifications, self.fields, strict=True)
        ]
        return self.join(torch.cat(maps, dim=1))

    def forward(self, image: Tensor, regions: Sequence[Region] | None = None) -> Tensor:
        """Logits (B, L, Y, X) of sections, or of patches (B, L, y, x); arguments as of `features`."""
        return self.head(self.features(image, regions))


def _check_regions(regions: Sequence[Region], image: Tensor) -> None:
    if len(regions) != len(image):
        raise ValueError(f"features(): there are {len(regions)} regions and {len(image)} images; give one each")
    sizes = {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in regions}
    if len(sizes) > 1:
        raise ValueError(f"features(): regions have the sizes {sorted(sizes)}; give regions of one size")
    for region in regions:
        if any(not 0 <= span.start < span.stop <= n for span, n in zip(region, image.shape[2:], strict=True)):
            rows, columns = region
            raise ValueError(
                f"features(): rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop} are not "
                f"within an image of {tuple(image.shape[2:])}; move the region inside"
            )


def _seen(unet: nn.Module, reduced: int, image: Tensor, regions: Sequence[Region]) -> Tensor:
    """One U-Net's maps of its view of each region, on the finest grid."""
    view = F.avg_pool2d(image, reduced, ceil_mode=True) if reduced > 1 else image
    windows = [tuple(_window(s, reduced, n) for s, n in zip(r, view.shape[2:], strict=True)) for r in regions]
    maps = unet(torch.stack([one[:, *window] for one, window in zip(view, windows, strict=True)]))
    return maps if reduced == 1 else _enlarged(maps, reduced, windows, regions)


def _window(span: slice, reduced: int, size: int) -> slice:
    """As many reduced pixels as `span` has pixels, around the same middle, within the reduced image of `size`."""
    length = min(span.stop - span.start, size)
    first = (span.start + span.stop) // (2 * reduced) - length // 2
    first = min(max(first, 0), size - length)
    return slice(first, first + length)


def _enlarged(maps: Tensor, reduced: int, windows: Sequence[tuple[slice, ...]], regions: Sequence[Region]) -> Tensor:
    """Maps of the windows, linear between their pixels, at the pixels of the regions.

    Pixel i of the finest grid has its middle at (i + 1/2) / reduced in pixels of the reduced grid; `affine_grid` counts
    from -1 to 1 over the window and over the region.
    """
    transforms = torch.zeros(len(regions), 2, 3)
    for transform, window, region in zip(transforms, windows, regions, strict=True):
        for row, axis in enumerate((1, 0)):  # x first
            n, length = region[axis].stop - region[axis].start, window[axis].stop - window[axis].start
            scale = n / (reduced * length)
            transform[row, row] = scale
            transform[row, 2] = scale - 1 + 2 * (region[axis].start / reduced - window[axis].start) / length
    size = [len(regions), 1, *(s.stop - s.start for s in regions[0])]
    grid = F.affine_grid(transforms.to(maps), size, align_corners=False)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
